//! Compares optimizers with loops in f64, and resumed runs with uninterrupted ones. Also checks what a step leaves behind.
//!
//! Gradients are exact: the loss is `sum(w * c)`, whose gradient is `c`. A step then differs from the f64 loop only by the
//! rounding of a dozen operations on numbers no larger than the weight and the learning rate.

use crate::support::folder::Folder;
use crate::support::*;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig, StepInfo};
use tiebeam::store::{
    Checkpoint, load_checkpoint, load_tensors, load_tensors_as_stored, save_checkpoint, save_tensors,
};
use tiebeam::{DType, Gpu, Grads, Rng, Tensor};

/// One element, an odd number, one above a chunk, several chunks and a rest, and a multiple of four.
pub(super) const SIZES: [usize; 5] = [1, 67, 1025, 3 * 1024 + 7, 256];
/// The leaf that never gets a gradient in [`Problem`]'s losses.
pub(super) const IDLE: usize = 1;
pub(super) const STEPS: usize = 5;
pub(super) const WD: f32 = 0.1;
pub(super) const LR_SCALE: f32 = 0.5;
pub(super) const CLIP: f32 = 40.0;

/// Initial leaves, and the gradient of each leaf in each step.
pub(super) struct Problem {
    pub start: Vec<Vec<f32>>,
    pub gradients: Vec<Vec<Vec<f32>>>,
}

impl Problem {
    pub fn new(seed: u64) -> Problem {
        let mut rng = Rng::new(seed);
        let mut draw = |n: usize, scale: f32| {
            let mut x = vec![0.0; n];
            rng.fill_normal(&mut x);
            x.iter_mut().for_each(|x| *x *= scale);
            x
        };
        let start = SIZES.map(|n| draw(n, 1.0)).to_vec();
        // The norms are about 67 times the scale, so some steps are clipped at 40 and others are not.
        let gradients =
            (0..STEPS).map(|s| SIZES.map(|n| draw(n, [1.0, 0.1, 2.0, 0.5, 0.8][s])).to_vec()).collect();
        Problem { start, gradients }
    }

    pub fn leaves(&self, gpu: &Gpu) -> Vec<Tensor> {
        self.start.iter().map(|x| Tensor::from_slice(gpu, x, [x.len()]).requires_grad()).collect()
    }

    pub fn backward(&self, gpu: &Gpu, leaves: &[Tensor], step: usize) -> Grads {
        let term = |i: usize| {
            let c = &self.gradients[step][i];
            leaves[i].mul(&Tensor::from_slice(gpu, c, [c.len()])).sum_all()
        };
        let active: Vec<usize> = (0..leaves.len()).filter(|&i| i != IDLE).collect();
        let loss = active[1..].iter().fold(term(active[0]), |sum, &i| sum.add(&term(i)));
        loss.backward().expect("backward")
    }

    pub fn norm(&self, step: usize) -> f64 {
        let active = (0..SIZES.len()).filter(|&i| i != IDLE);
        active.flat_map(|i| &self.gradients[step][i]).map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt()
    }
}

/// Returns weight decay and rate scale: even leaves have decay, odd ones have half the rate and no decay.
pub(super) fn settings(leaf: usize) -> (f64, f64) {
    if leaf.is_multiple_of(2) { (f64::from(WD), 1.0) } else { (0.0, f64::from(LR_SCALE)) }
}

pub(super) fn groups(leaves: &[Tensor]) -> Vec<Group> {
    let part = |odd: usize| {
        Group::new(
            leaves.iter().enumerate().filter(move |(i, _)| i % 2 == odd).map(|(i, t)| (format!("w{i}"), t)),
        )
    };
    vec![part(0).weight_decay(WD), part(1).lr_scale(LR_SCALE)]
}

fn rates() -> [f32; STEPS] {
    [0.01, 0.02, 0.03, 0.02, 0.01]
}

fn factor(norm: f64, clip: Option<f32>) -> f64 {
    clip.map_or(1.0, |clip| (f64::from(clip) / (norm + 1e-6)).min(1.0))
}

/// Runs both and compares the parameters and the norm after every step.
pub(super) fn follow(
    name: &str,
    problem: &Problem,
    leaves: &[Tensor],
    clip: Option<f32>,
    mut step: impl FnMut(&Grads, f32) -> StepInfo,
    mut update: impl FnMut(usize, usize, &mut f64, f64, f64),
) {
    let gpu = gpu();
    let mut want: Vec<Vec<f64>> =
        problem.start.iter().map(|x| x.iter().map(|&x| x.into()).collect()).collect();
    let mut seen = [false; 2];
    for (s, lr) in rates().into_iter().enumerate() {
        let info = step(&problem.backward(gpu, leaves, s), lr);
        let norm = problem.norm(s);
        // The sum of squares is a tree, so the error is that of a few additions and of the root.
        within(&format!("{name}: norm {s}"), &[info.norm.item().expect("norm").into()], &[norm], |_| {
            16.0 * U * norm
        });
        let factor = factor(norm, clip);
        seen[(factor < 1.0) as usize] = true;
        for i in (0..want.len()).filter(|&i| i != IDLE) {
            for (e, w) in want[i].iter_mut().enumerate() {
                let offset: usize = SIZES[..i].iter().sum();
                update(
                    s,
                    offset + e,
                    w,
                    factor * f64::from(problem.gradients[s][i][e]),
                    f64::from(lr) * settings(i).1,
                );
            }
        }
        for (i, leaf) in leaves.iter().enumerate() {
            let want = &want[i];
            // The largest step of either optimizer here is a few learning rates times a gradient of at most 10.
            within(&format!("{name}: w{i} after step {s}"), &download(leaf), want, |e| {
                if i == IDLE { 0.0 } else { 32.0 * U * (want[e].abs() + f64::from(lr)) }
            });
        }
    }
    assert!(clip.is_none() || seen == [true; 2], "{name}: both kinds of steps, clipped and not, must occur");
}

pub(super) fn leaf_of(element: usize) -> usize {
    (0..SIZES.len()).find(|&i| element < SIZES[..=i].iter().sum()).expect("an element")
}

fn check_adamw(name: &str, clip: Option<f32>, arena_limit: Option<u64>) {
    let gpu = gpu();
    let problem = Problem::new(3);
    let leaves = problem.leaves(gpu);
    // eps is large enough that its place in the formula matters.
    let config = AdamWConfig::default().betas((0.9, 0.95)).eps(1e-3).clip(clip).arena_limit(arena_limit);
    let (b1, b2, eps) = (0.9f64, 0.95f64, f64::from(config.eps));
    let mut optimizer = AdamW::new(gpu, groups(&leaves), config).expect("adamw");
    let elements = SIZES.iter().sum();
    let (mut m, mut v) = (vec![0.0; elements], vec![0.0; elements]);
    follow(
        name,
        &problem,
        &leaves,
        clip,
        |grads, lr| optimizer.step(grads, lr).expect("step"),
        |s, e, w, g, lr| {
            *w *= 1.0 - lr * settings(leaf_of(e)).0;
            m[e] = b1 * m[e] + (1.0 - b1) * g;
            v[e] = b2 * v[e] + (1.0 - b2) * g * g;
            let s = s as i32 + 1;
            *w -= lr * (m[e] / (1.0 - b1.powi(s))) / ((v[e] / (1.0 - b2.powi(s))).sqrt() + eps);
        },
    );
    assert_eq!(optimizer.steps(), STEPS as u64);
    let state = optimizer.state_dict().expect("state");
    assert_eq!(state.len(), 2 * SIZES.len() + 2, "with a count of steps, and whose state it is");
    for (name, shape, data) in &state {
        if name.starts_with("kind/adamw/") {
            continue;
        }
        if name.starts_with("step/") {
            assert_eq!((name, data), (&format!("step/w{IDLE}"), &vec![0.0]), "it never had a gradient");
            continue;
        }
        let (moment, leaf) = name.split_once("/w").expect("a name of two parts");
        let i: usize = leaf.parse().expect("a leaf");
        assert_eq!(shape.count(), SIZES[i]);
        let start: usize = SIZES[..i].iter().sum();
        let want = &(if moment == "m" { &m } else { &v })[start..start + SIZES[i]];
        let got: Vec<f64> = data.iter().map(|&x| x.into()).collect();
        // The terms of a moment are at most the largest gradient, about 4.5 sigma with sigma 2 (or its square).
        let scale = if moment == "m" { 1.0 } else { 8.0 };
        within(name, &got, want, |e| if i == IDLE { 0.0 } else { 32.0 * U * (want[e].abs() + scale) });
    }
}

#[test]
fn adamw_follows_the_formula() {
    check_adamw("adamw", None, None);
}

#[test]
fn adamw_clips() {
    check_adamw("adamw clipped", Some(CLIP), None);
}

#[test]
fn adamw_in_several_arenas() {
    // The leaf of 3079 elements is larger than this limit and gets its own arena.
    check_adamw("adamw in arenas", Some(CLIP), Some(4096));
}

#[test]
fn sgd_follows_the_formula() {
    let gpu = gpu();
    for (name, momentum, nesterov, clip, arena_limit) in [
        ("plain", 0.0f32, false, None, None),
        ("momentum", 0.9, false, Some(CLIP), Some(4096)),
        ("nesterov", 0.9, true, Some(CLIP), None),
    ] {
        let problem = Problem::new(4);
        let leaves = problem.leaves(gpu);
        let config =
            SgdConfig::default().momentum(momentum).nesterov(nesterov).clip(clip).arena_limit(arena_limit);
        let mut optimizer = Sgd::new(gpu, groups(&leaves), config).expect("sgd");
        let mut velocity = vec![0.0; SIZES.iter().sum()];
        follow(
            name,
            &problem,
            &leaves,
            clip,
            // The rates are scaled down, because a step of SGD is the gradient times the rate.
            |grads, lr| optimizer.step(grads, lr * 0.0625).expect("step"),
            |_, e, w, g, lr| {
                let (lr, mu) = (lr * 0.0625, f64::from(momentum));
                let g = g + settings(leaf_of(e)).0 * *w;
                let b = mu * velocity[e] + g;
                velocity[e] = b;
                *w -= lr * if nesterov { g + mu * b } else { b };
            },
        );
        assert_eq!(
            optimizer.state_dict().expect("state").len(),
            1 + if momentum > 0.0 { SIZES.len() } else { 0 }
        );
    }
}

#[test]
fn a_step_without_a_finite_norm_changes_nothing() {
    let gpu = gpu();
    for bad in [f32::NAN, f32::INFINITY, 3e30] {
        let w = Tensor::from_slice(gpu, &[1.0f32, 2.0, 3.0], [3]).requires_grad();
        let mut adamw =
            AdamW::new(gpu, vec![Group::new([("w", &w)]).weight_decay(0.5)], AdamWConfig::default()).unwrap();
        let u = Tensor::from_slice(gpu, &[1.0f32, 2.0, 3.0], [3]).requires_grad();
        let config = SgdConfig::default().momentum(0.5).clip(Some(1.0));
        let mut sgd = Sgd::new(gpu, vec![Group::new([("u", &u)])], config).unwrap();
        let c = Tensor::from_slice(gpu, &[0.5f32, bad, 0.5], [3]);
        let grads = w.add(&u).mul(&c).sum_all().backward().unwrap();
        assert!(!adamw.step(&grads, 0.1).unwrap().norm.item().unwrap().is_finite());
        assert!(!sgd.step(&grads, 0.1).unwrap().norm.item().unwrap().is_finite());
        for (leaf, state) in [(&w, adamw.state_dict()), (&u, sgd.state_dict())] {
            assert_eq!(leaf.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0], "gradient {bad}");
            assert!(state.unwrap().iter().all(|(_, _, data)| data.iter().all(|&x| x == 0.0)));
        }
    }
}

#[test]
fn pending_expressions_see_the_old_parameters() {
    let gpu = gpu();
    let w = Tensor::from_slice(gpu, &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]).requires_grad();
    let zeros = Tensor::zeros(gpu, [4]).requires_grad();
    let group = Group::new([("w", &w), ("zeros", &zeros)]);
    let mut optimizer = Sgd::new(gpu, vec![group], SgdConfig::default()).unwrap();
    let grads = w.sum_all().add(&zeros.sum_all()).backward().unwrap();
    let doubled = w.detach().scale(2.0);
    let chain = doubled.t().add(&Tensor::ones(gpu, [3, 2])).scale(10.0);
    let view = w.detach().t();
    let product = w.mul(&w).sum_all();
    optimizer.step(&grads, 1.0).unwrap();
    assert_eq!(doubled.to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]);
    assert_eq!(chain.to_vec::<f32>().unwrap(), [30.0, 90.0, 50.0, 110.0, 70.0, 130.0]);
    // Handles to the parameter itself are not copies.
    assert_eq!(view.to_vec::<f32>().unwrap(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_eq!(zeros.to_vec::<f32>().unwrap(), [-1.0; 4]);
    assert_eq!(product.item().unwrap(), 91.0);
    let message = panics(|| drop(product.backward()));
    assert!(message.contains("changed in place"), "{message}");
}

pub(super) fn panics(work: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(work)).expect_err("must panic");
    panic
        .downcast_ref::<String>()
        .cloned()
        .unwrap_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string())
}

#[test]
fn misuse_panics_with_the_name() {
    let gpu = gpu();
    let build = |params: &[(&str, &Tensor)]| {
        let group = Group::new(params.iter().copied());
        panics(|| drop(AdamW::new(gpu, vec![group], AdamWConfig::default())))
    };
    let leaf = || Tensor::ones(gpu, [2, 3]).requires_grad();
    let plain = Tensor::ones(gpu, [3]);
    let w = leaf();
    assert!(build(&[("w", &plain)]).contains("`w` is no leaf"));
    assert!(
        build(&[("h", &plain.cast(DType::F16).requires_grad())])
            .contains("`h` is f16; parameters are trained in f32")
    );
    assert!(build(&[("v", &leaf().t().requires_grad())]).contains("`v` is a view"));
    assert!(build(&[("w", &w), ("w", &leaf())]).contains("two parameters are named `w`"));
    assert!(build(&[("a", &w), ("b", &w)]).contains("`b` holds the elements of another"));
    assert!(build(&[]).contains("no parameters"));
    let before = w.sum_all().backward().unwrap();
    let mut first = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
    assert!(build(&[("w", &w)]).contains("`w` belongs to another optimizer"));
    assert!(panics(|| drop(first.step(&before, 0.1))).contains("computed before this optimizer"));
    let elsewhere = leaf().sum_all().backward().unwrap();
    assert!(panics(|| drop(first.step(&elsewhere, 0.1))).contains("none of the 1 parameters has a gradient"));
    // The solution that the message suggests: another leaf with the same elements.
    let again = w.detach().requires_grad();
    let grads = w.sum_all().backward().unwrap();
    let mut second = Sgd::new(gpu, vec![Group::new([("w", &again)])], SgdConfig::default()).unwrap();
    second.step(&again.sum_all().backward().unwrap(), 0.5).unwrap();
    assert_eq!(w.to_vec::<f32>().unwrap(), [0.5; 6]);
    assert!(panics(|| drop(first.step(&grads, 0.1))).contains("another optimizer has taken"));
    for config in [
        AdamWConfig::default().eps(0.0),
        AdamWConfig::default().betas((0.9, 1.0)),
        AdamWConfig::default().clip(Some(f32::NAN)),
    ] {
        assert!(AdamW::new(gpu, vec![Group::new([("w", &leaf())])], config).is_err());
    }
    assert!(second.step(&again.sum_all().backward().unwrap(), f32::NAN).is_err());
}

/// A small regression with noise from the run's generator. It has everything that resuming must restore.
struct Run {
    params: Vec<(String, Tensor)>,
    optimizer: AdamW,
    rng: Rng,
}

impl Run {
    fn new(gpu: &Gpu, seed: u64) -> Run {
        let mut rng = Rng::new(seed);
        let mut draw = |n| {
            let mut x = vec![0.0; n];
            rng.fill_normal(&mut x);
            x
        };
        let (w, b) = (Tensor::from_slice(gpu, &draw(67), [67]), Tensor::from_slice(gpu, &draw(1), [1]));
        let params = vec![("w".to_string(), w.requires_grad()), ("b".to_string(), b.requires_grad())];
        let config = AdamWConfig::default().clip(Some(1.0)).arena_limit(Some(300));
        let group = Group::new(params.iter().map(|(name, t)| (name, t))).weight_decay(0.01);
        Run { optimizer: AdamW::new(gpu, vec![group], config).unwrap(), params, rng }
    }

    fn step(&mut self, gpu: &Gpu) -> StepInfo {
        let mut x = vec![0.0; 32 * 67];
        self.rng.fill_normal(&mut x);
        let y: Vec<f32> = x.chunks(67).map(|row| row[0] - 2.0 * row[66] + 0.5).collect();
        let (w, b) = (&self.params[0].1, &self.params[1].1);
        let guess = Tensor::from_slice(gpu, &x, [32, 67]).mul(w).sum(1).add(b);
        let error = guess.sub(&Tensor::from_slice(gpu, &y, [32]));
        let grads = error.mul(&error).mean_all().backward().unwrap();
        self.optimizer.step(&grads, 0.01).unwrap()
    }

    fn save(&self, path: &std::path::Path) {
        let run = Checkpoint::default()
            .step(self.optimizer.steps())
            .optimizer(self.optimizer.state_dict().unwrap())
            .rng(Some(self.rng.clone()))
            .metadata([("note".to_string(), "half way".to_string())].into());
        save_checkpoint(path, &self.params, &run).unwrap();
    }

    fn load(&mut self, path: &std::path::Path) {
        let run = load_checkpoint(path, &self.params).unwrap();
        self.optimizer.load_state(run.step, &run.optimizer).unwrap();
        self.rng = run.rng.unwrap();
        assert_eq!(run.metadata["note"], "half way");
        assert_eq!(run.metadata.len(), 1);
    }

    fn bits(&self) -> Vec<u32> {
        let state = self.optimizer.state_dict().unwrap();
        let params = self.params.iter().flat_map(|(_, t)| t.to_vec::<f32>().unwrap());
        params.chain(state.into_iter().flat_map(|(_, _, data)| data)).map(f32::to_bits).collect()
    }
}

#[test]
fn a_resumed_run_has_the_same_bits() {
    let gpu = gpu();
    let folder = Folder::new("resume");
    let path = folder.join("run.safetensors");
    let mut whole = Run::new(gpu, 1);
    for step in 0..12 {
        if step == 7 {
            whole.save(&path);
        }
        whole.step(gpu);
    }
    // Another start and an extra step, so everything must come from the file.
    let mut resumed = Run::new(gpu, 2);
    resumed.step(gpu);
    let before = resumed.params[0].1.scale(1.0);
    let old = resumed.params[0].1.to_vec::<f32>().unwrap();
    resumed.load(&path);
    assert_eq!(before.to_vec::<f32>().unwrap(), old, "a pending expression keeps the old elements");
    assert_ne!(resumed.bits(), whole.bits());
    for _ in 7..12 {
        resumed.step(gpu);
    }
    assert_eq!(resumed.optimizer.steps(), 12);
    assert_eq!(resumed.bits(), whole.bits());
}

#[test]
fn another_models_checkpoint_is_refused() {
    let gpu = gpu();
    let folder = Folder::new("refuse");
    let path = folder.join("run.safetensors");
    let run = Run::new(gpu, 1);
    run.save(&path);
    let refusal = |params: &[(&str, &[usize], DType)]| {
        let params: Vec<(String, Tensor)> =
            params.iter().map(|(n, s, d)| (n.to_string(), Tensor::full(gpu, *s, 9.0).cast(*d))).collect();
        let message = load_checkpoint(&path, &params).unwrap_err().to_string();
        assert!(message.contains("another model's checkpoint"), "{message}");
        assert!(params.iter().all(|(_, t)| download(t).iter().all(|&x| x == 9.0)), "nothing may be written");
        message
    };
    let w: (&str, &[usize], DType) = ("w", &[67], DType::F32);
    assert!(refusal(&[w, ("b", &[2], DType::F32)]).contains("tensor `b` is F32 [1], the model's is f32 [2]"));
    assert!(refusal(&[w, ("b", &[1], DType::F16)]).contains("the model's is f16 [1]"));
    assert!(refusal(&[w, ("b", &[1], DType::F32), ("c", &[1], DType::F32)]).contains("no tensor `c`"));
    assert!(refusal(&[w]).contains("tensor `b` is none of the model's"));
    // State of another optimizer.
    let mut other = Run::new(gpu, 3);
    let state = run.optimizer.state_dict().unwrap();
    let fails = |other: &mut Run, state: &[_], words: &str| {
        let before = other.bits();
        let message = other.optimizer.load_state(9, state).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
        assert_eq!((other.bits(), other.optimizer.steps()), (before, 0));
    };
    fails(&mut other, &state[1..], "no state `m/w`");
    let mut wrong = state.clone();
    wrong[3] = ("v/b".into(), [1, 1].into(), vec![1.0]);
    fails(&mut other, &wrong, "state `v/b` is [1, 1], here it is [1]");
    wrong[3] = state[3].clone();
    wrong.push(("v/c".into(), [1].into(), vec![1.0]));
    fails(&mut other, &wrong, "state `v/c` belongs to no parameter");
    // A file of weights alone is not a checkpoint.
    save_tensors(&path, [("w", &run.params[0].1)], &BTreeMap::new()).unwrap();
    assert!(load_checkpoint(&path, &run.params).unwrap_err().to_string().contains("no checkpoint"));
    let named = vec![("optimizer/w".to_string(), run.params[0].1.clone())];
    assert!(
        save_checkpoint(&path, &named, &Checkpoint::default())
            .unwrap_err()
            .to_string()
            .contains("`optimizer/w`")
    );
}

#[test]
fn tensors_are_read_as_saved() {
    let gpu = gpu();
    let folder = Folder::new("tensors");
    let path = folder.join("t.safetensors");
    let x = Tensor::from_slice(gpu, &[1.5f32, -0.0, 3e38, 4.0, 5.0, 6.0], [2, 3]);
    let half = x.slice(0, 1..2).cast(DType::F16);
    let index = Tensor::from_slice(gpu, &[7u32, u32::MAX], [2]);
    let (turned, scalar) = (x.t(), Tensor::scalar(gpu, 2.0));
    let all = [("x", &x), ("turned", &turned), ("half", &half), ("index", &index), ("scalar", &scalar)];
    save_tensors(&path, all, &BTreeMap::new()).unwrap();
    let back = load_tensors(gpu, &path).unwrap();
    assert_eq!(back.len(), all.len());
    for (name, tensor) in all {
        let read = &back[name];
        assert_eq!((read.shape(), read.dtype()), (tensor.shape(), tensor.dtype()), "{name}");
        assert_eq!(
            download(read).iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            download(tensor).iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            "{name}"
        );
    }
    // BF16 becomes f32 unless it is asked for.
    let brain = x.slice(1, 0..2).cast(DType::Bf16);
    save_tensors(&path, [("brain", &brain)], &BTreeMap::new()).unwrap();
    let (wide, stored) = (load_tensors(gpu, &path).unwrap(), load_tensors_as_stored(gpu, &path).unwrap());
    assert_eq!((wide["brain"].dtype(), stored["brain"].dtype()), (DType::F32, DType::Bf16));
    assert_eq!(download(&wide["brain"]), download(&brain));
    assert_eq!(download(&stored["brain"]), download(&brain));
    // Loading in place, in a type whose elements do not fill whole words.
    let target = Tensor::full(gpu, [1, 3], 0.0).cast(DType::F16);
    save_checkpoint(&path, &[("half".to_string(), half.clone())], &Checkpoint::default().step(3)).unwrap();
    assert_eq!(load_checkpoint(&path, &[("half".to_string(), target.clone())]).unwrap().step, 3);
    assert_eq!(download(&target), [4.0, 5.0, 6.0]);
}

#[test]
fn memory_is_constant() {
    let gpu = quiet();
    let mut run = Run::new(&gpu, 5);
    let mut first = None;
    for step in 0..200 {
        run.step(&gpu);
        if step == 40 {
            first = Some(gpu.memory_stats());
        }
    }
    let (first, last) = (first.unwrap(), gpu.memory_stats());
    assert_eq!(
        (first.used, first.created, first.peak),
        (last.used, last.created, last.peak),
        "{first:?} {last:?}"
    );
}
