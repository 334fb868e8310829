//! Averages of parameters, and what programs do to gradients before an optimizer takes them.

use crate::optim::panics;
use crate::support::*;
use tiebeam::optim::{
    AdamW, AdamWConfig, Ema, Group, LossScale, LossScaleConfig, Sgd, SgdConfig, StepEvent, clip_grad_norm,
    clip_grad_value,
};
use tiebeam::{Gpu, Grads, Result, Step, Tensor};

const SIZES: [usize; 4] = [1, 1025, 67, 4];

/// Leaves of several sizes, all of whose gradients are their factors times `x`.
struct Net {
    leaves: Vec<Tensor>,
    sgd: Sgd,
}

impl Net {
    fn new(gpu: &Gpu) -> Result<Net> {
        let leaf = |(i, n): (usize, usize)| {
            let data: Vec<f32> = (0..n).map(|e| (e as f32 * 0.7 + i as f32).sin()).collect();
            Tensor::from_slice(gpu, &data, [n]).requires_grad()
        };
        let leaves: Vec<Tensor> = SIZES.into_iter().enumerate().map(leaf).collect();
        // Two arenas, because the leaf of 1025 elements is larger than this.
        let config = SgdConfig::default().arena_limit(Some(2048));
        let sgd = Sgd::new(gpu, vec![Group::new(named(&leaves))], config)?;
        Ok(Net { leaves, sgd })
    }

    fn step(&mut self, x: &Tensor) -> Result<()> {
        let terms = self.leaves.iter().enumerate().map(|(i, leaf)| leaf.sum_all().scale(i as f32 - 1.5));
        let loss = terms.reduce(|a, b| a.add(&b)).expect("a leaf").mul(x);
        self.sgd.step(&loss.backward()?, 0.1).map(drop)
    }
}

fn named(leaves: &[Tensor]) -> Vec<(String, &Tensor)> {
    leaves.iter().enumerate().map(|(i, leaf)| (format!("w{i}"), leaf)).collect()
}

fn bits<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<u32> {
    tensors.into_iter().flat_map(|x| x.to_vec::<f32>().expect("elements")).map(f32::to_bits).collect()
}

fn averages(ema: &Ema) -> Vec<u32> {
    let all: Vec<Tensor> = ema.named().into_iter().map(|(_, x)| x).collect();
    bits(&all)
}

#[test]
fn averages_follow_the_formula() -> Result<()> {
    let gpu = quiet();
    for warmup in [false, true] {
        let mut net = Net::new(&gpu)?;
        let mut ema = Ema::new(named(&net.leaves), 0.75)?.warmup(warmup);
        let mut want: Vec<Vec<f64>> = net.leaves.iter().map(download).collect();
        for n in 0..4 {
            net.step(&Tensor::scalar(&gpu, 1.0 + n as f32))?;
            let before = gpu.dispatches();
            ema.update()?;
            assert_eq!(gpu.dispatches() - before, 3, "one for each arena and place of averages");
            let d = if warmup { ((1.0 + n as f64) / (10.0 + n as f64)).min(0.75) } else { 0.75 };
            for (want, leaf) in want.iter_mut().zip(&net.leaves) {
                want.iter_mut().zip(download(leaf)).for_each(|(e, w)| *e = d * *e + (1.0 - d) * w);
            }
            for ((name, got), want) in ema.named().iter().zip(&want) {
                within(&format!("{name} after update {n}"), &download(got), want, |e| {
                    8.0 * U * (1.0 + want[e].abs())
                });
            }
        }
        assert_eq!(ema.updates(), 4);
    }
    Ok(())
}

/// Parameters may belong to no optimizer, and may be taken by one later.
#[test]
fn averages_find_parameters_that_move() -> Result<()> {
    let gpu = gpu();
    let w = Tensor::from_slice(gpu, &[1f32, 2.0, 3.0], [3]).requires_grad();
    let other = Tensor::from_slice(gpu, &[5f32], [1]);
    let mut ema = Ema::new([("w", &w), ("other", &other)], 0.5)?;
    ema.update()?;
    let before = w.detach().sum_all();
    let mut step = Step::record(gpu, &[], |_| ema.update().map(|()| vec![]))?;
    step.run(&[])?;
    assert_eq!(ema.named()[0].1.to_vec::<f32>()?, [1.0, 2.0, 3.0]);
    let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
    // It would read the elements where they were.
    let message = step.run(&[]).map(drop).expect_err("w has moved").to_string();
    assert!(message.contains("record the step again"), "{message}");
    sgd.step(&w.sum_all().backward()?, 1.0)?;
    ema.update()?;
    assert_eq!((ema.named()[0].1.to_vec::<f32>()?, ema.updates()), (vec![0.5, 1.5, 2.5], 4));
    assert_eq!((ema.named()[1].1.to_vec::<f32>()?, before.item()?), (vec![5.0], 6.0));
    Ok(())
}

#[test]
fn replays_update_and_count() -> Result<()> {
    let gpu = gpu();
    let inputs: Vec<Tensor> = (0..5).map(|i| Tensor::scalar(gpu, 1.0 + i as f32)).collect();
    let (mut code, mut recorded) = (Net::new(gpu)?, Net::new(gpu)?);
    let mut of_code = Ema::new(named(&code.leaves), 0.9)?.warmup(true);
    let mut of_step = Ema::new(named(&recorded.leaves), 0.9)?.warmup(true);
    for x in &inputs {
        code.step(x)?;
        of_code.update()?;
    }
    let mut step = Step::record(gpu, &[&inputs[0]], |x| {
        recorded.step(&x[0])?;
        of_step.update()?;
        Ok(vec![])
    })?;
    for x in &inputs[1..] {
        step.run(&[x])?;
    }
    assert_eq!(averages(&of_step), averages(&of_code));
    assert_eq!((of_step.updates(), bits(&recorded.leaves)), (5, bits(&code.leaves)));
    // A step that changes nothing is averaged as it is.
    step.run(&[&Tensor::scalar(gpu, f32::NAN)])?;
    assert_eq!((of_step.updates(), bits(&recorded.leaves)), (6, bits(&code.leaves)));
    Ok(())
}

#[test]
fn a_swap_restores_every_bit() -> Result<()> {
    let gpu = gpu();
    let mut net = Net::new(gpu)?;
    let mut ema = Ema::new(named(&net.leaves), 0.5)?;
    net.step(&Tensor::scalar(gpu, 1.0))?;
    ema.update()?;
    let (params, means) = (bits(&net.leaves), averages(&ema));
    assert_ne!(params, means);
    let pending = net.leaves[1].detach().scale(2.0);
    let graph = net.leaves[1].square().sum_all();
    let got = ema.averaged(|| Ok(bits(&net.leaves)))?;
    assert_eq!(got, means);
    assert_eq!((bits(&net.leaves), averages(&ema)), (params.clone(), means.clone()));
    let doubled: Vec<f32> = net.leaves[1].to_vec::<f32>()?.iter().map(|x| 2.0 * x).collect();
    assert_eq!(pending.to_vec::<f32>()?, doubled, "a pending expression sees the old elements");
    assert!(panics(|| drop(graph.backward())).contains("changed in place"));
    // Also after an error or a panic.
    let failed = ema.averaged(|| Err::<(), _>(tiebeam::Error::config("no"))).expect_err("the error");
    assert!(failed.to_string().contains("no"));
    assert!(panics(|| drop(ema.averaged(|| -> Result<()> { panic!("inside") }))).contains("inside"));
    assert_eq!((bits(&net.leaves), averages(&ema)), (params.clone(), means.clone()));
    ema.swap()?;
    assert_eq!((bits(&net.leaves), averages(&ema)), (means, params.clone()));
    assert!(panics(|| drop(ema.update())).contains("swapped in"));
    assert!(panics(|| drop(ema.averaged(|| Ok(())))).contains("swapped in already"));
    assert!(ema.state_dict().expect_err("the parameters").to_string().contains("cannot be saved"));
    let inside = Step::record(gpu, &[], |_| ema.swap().map(|()| vec![]))
        .map(drop)
        .expect_err("a replay would swap back");
    assert!(inside.to_string().contains("a swap of averages inside a recorded step"), "{inside}");
    ema.swap()?;
    assert_eq!(bits(&net.leaves), params);
    net.step(&Tensor::scalar(gpu, 2.0))
}

#[test]
fn saved_averages_go_on_with_the_same_bits() -> Result<()> {
    let gpu = gpu();
    let mut net = Net::new(gpu)?;
    let mut ema = Ema::new(named(&net.leaves), 0.9)?.warmup(true);
    let mut other = Ema::new(named(&net.leaves), 0.9)?.warmup(true);
    for n in 0..2 {
        net.step(&Tensor::scalar(gpu, 1.0 + n as f32))?;
        ema.update()?;
    }
    let mut state = ema.state_dict()?;
    state.push(("m/w0".into(), [1].into(), vec![3.0]));
    other.load_state(&mut state)?;
    assert_eq!((state.len(), other.updates(), averages(&other)), (1, 2, averages(&ema)));
    net.step(&Tensor::scalar(gpu, 5.0))?;
    ema.update()?;
    other.update()?;
    assert_eq!(averages(&other), averages(&ema));
    let mut fails = |change: &dyn Fn(&mut Vec<tiebeam::optim::StateTensor>), words: &str| {
        let mut state = ema.state_dict().unwrap();
        change(&mut state);
        let message = other.load_state(&mut state).expect_err("refused").to_string();
        assert!(message.contains(words), "{message}");
        assert_eq!((other.updates(), averages(&other)), (3, averages(&ema)));
    };
    fails(&|state| drop(state.remove(0)), "no state `ema/w0`");
    fails(&|state| drop(state.pop()), "no state `ema_updates`");
    fails(&|state| state[0].1 = [1, 1].into(), "state `ema/w0` is [1, 1], here it is [1]");
    fails(&|state| state.push(("ema/w9".into(), [1].into(), vec![0.0])), "`ema/w9` belongs to no parameter");
    Ok(())
}

#[test]
fn misuse_of_averages_panics_with_the_name() {
    let gpu = gpu();
    let w = Tensor::ones(gpu, [2, 3]);
    let build = |params: &[(&str, &Tensor)]| panics(|| drop(Ema::new(params.iter().copied(), 0.5)));
    assert!(build(&[]).contains("no parameters"));
    assert!(build(&[("w", &w), ("w", &w.copy())]).contains("two parameters are named `w`"));
    assert!(build(&[("a", &w), ("b", &w)]).contains("`b` holds the elements of another"));
    assert!(build(&[("h", &w.cast(tiebeam::DType::F16))]).contains("`h` is f16"));
    assert!(build(&[("v", &w.t())]).contains("`v` is a view"));
    assert!(Ema::new([("w", &w)], 1.0).is_err());
}

/// Clips by hand, as the optimizer does.
#[test]
fn clipping_apart_is_that_of_the_optimizer() -> Result<()> {
    let gpu = gpu();
    let x: Vec<f32> = (0..1025).map(|e| (e as f32 * 1.3).sin()).collect();
    let c = Tensor::from_slice(gpu, &x, [1025]);
    for most in [2.0f32, 1e3] {
        let leaves = || [1.0, 2.0].map(|v| Tensor::full(gpu, [1025], v).requires_grad());
        let loss = |[a, b]: &[Tensor; 2]| a.mul(&c).sum_all().add(&b.mul(&c).sum_all().scale(2.0));
        let [by_hand, by_option] = [leaves(), leaves()];
        let groups = |[a, b]: &[Tensor; 2]| vec![Group::new([("a", a), ("b", b)])];
        let mut plain = AdamW::new(gpu, groups(&by_hand), AdamWConfig::default())?;
        let mut clipping = AdamW::new(gpu, groups(&by_option), AdamWConfig::default().clip(Some(most)))?;
        for _ in 0..3 {
            let (grads, norm) = clip_grad_norm(&loss(&by_hand).backward()?, most)?;
            plain.step(&grads, 0.1)?;
            let info = clipping.step(&loss(&by_option).backward()?, 0.1)?;
            let want: f64 = x.iter().map(|&x| 5.0 * f64::from(x).powi(2)).sum::<f64>().sqrt();
            within("norm", &[norm.item()?.into()], &[want], |_| 16.0 * U * want);
            within("norm of the step", &[info.norm.item()?.into()], &[want], |_| 16.0 * U * want);
        }
        for (a, b) in by_hand.iter().zip(&by_option) {
            within("parameters", &download(a), &download(b), |_| 32.0 * U);
        }
    }
    // Without an optimizer, a gradient below the limit keeps its bits.
    let w = Tensor::ones(gpu, [1025]).requires_grad();
    let grads = w.mul(&c).sum_all().backward()?;
    let (same, _) = clip_grad_norm(&grads, 1e3)?;
    assert_eq!(same.get(&w).unwrap().to_vec::<f32>()?, x);
    assert!(clip_grad_norm(&grads, 0.0).is_err() && clip_grad_value(&grads, f32::NAN).is_err());
    assert!(panics(|| drop(clip_grad_norm(&Grads::default(), 1.0))).contains("no gradients"));
    Ok(())
}

/// Many gradients, so that sums are joined in several rounds; the numbers are those of PyTorch's `clip_grad_norm_`.
#[test]
fn the_norm_of_many_gradients() -> Result<()> {
    let gpu = gpu();
    let leaves: Vec<Tensor> = (0..21).map(|i| Tensor::full(gpu, [2], i as f32).requires_grad()).collect();
    let loss = leaves.iter().map(|w| w.square().sum_all().scale(0.5)).reduce(|a, b| a.add(&b)).expect("21");
    let (grads, norm) = clip_grad_norm(&loss.backward()?, 1.0)?;
    within("norm", &[norm.item()?.into()], &[75.76278770], |_| 1e-5);
    within("the last", &download(grads.get(&leaves[20]).unwrap()), &[0.26398184; 2], |_| 1e-7);
    Ok(())
}

/// A loss scale stays with clipped gradients, and the limit is for what it scales.
#[test]
fn clipping_knows_the_loss_scale() -> Result<()> {
    let gpu = gpu();
    let run =
        |clip: &dyn Fn(&Grads) -> Result<Grads>, factor: f32| -> Result<(Vec<f32>, f32, Vec<StepEvent>)> {
            let w = Tensor::from_slice(gpu, &[1f32, 2.0], [2]).requires_grad();
            let c = Tensor::from_slice(gpu, &[3f32, 4.0], [2]).scale(factor);
            let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
            let scale = LossScale::new(gpu, LossScaleConfig::default().scale(1024.0))?;
            sgd.step(&clip(&scale.backward(&w.mul(&c).sum_all())?)?, 0.5)?;
            Ok((w.to_vec()?, scale.scale()?, sgd.watch()?.events()?))
        };
    let near =
        |got: &[f32], want: [f32; 2]| got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-5);
    let by_norm = |grads: &Grads| {
        let (clipped, norm) = clip_grad_norm(grads, 2.5)?;
        assert!((norm.item()? - 5.0).abs() < 1e-5 || !norm.item()?.is_finite());
        Ok(clipped)
    };
    let (w, scale, events) = run(&by_norm, 1.0)?;
    assert!(near(&w, [0.25, 1.0]) && scale == 1024.0 && events.is_empty(), "{w:?}");
    let by_value = |grads: &Grads| clip_grad_value(grads, 3.5);
    let (w, scale, events) = run(&by_value, 1.0)?;
    assert!(near(&w, [-0.5, 0.25]) && scale == 1024.0 && events.is_empty(), "{w:?}");
    for factor in [f32::INFINITY, f32::NAN] {
        for clip in [&by_norm as &dyn Fn(&Grads) -> Result<Grads>, &by_value] {
            let (w, scale, events) = run(clip, factor)?;
            assert_eq!((w, scale, events.len()), (vec![1.0, 2.0], 512.0, 1), "{factor}");
        }
    }
    Ok(())
}

#[test]
fn the_mean_of_micro_batches() -> Result<()> {
    let gpu = gpu();
    let [w, v] = [(); 2].map(|()| Tensor::ones(gpu, [3]).requires_grad());
    let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
    let losses = [w.scale(1.0).sum_all(), w.scale(2.0).add(&v.scale(9.0)).sum_all(), w.scale(6.0).sum_all()];
    let grads = Grads::mean_of(losses.iter().map(Tensor::backward))?;
    assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [3.0; 3]);
    assert_eq!(grads.get(&v).unwrap().to_vec::<f32>()?, [3.0; 3]);
    sgd.step(&grads, 1.0)?;
    assert_eq!(w.to_vec::<f32>()?, [-2.0; 3]);
    assert!(panics(|| drop(Grads::mean_of([]))).contains("the mean of none"));
    let failed = Grads::mean_of([w.sum_all().backward(), Err(tiebeam::Error::config("late"))]).map(drop);
    assert!(failed.expect_err("the second").to_string().contains("late"));
    Ok(())
}

/// An average of equal weights is that weight, after any number of updates: a factor whose roundings add up would shrink it.
#[test]
fn averages_of_equal_weights_are_exact() -> Result<()> {
    let gpu = quiet();
    let w = Tensor::from_slice(&gpu, &[0.3f32, -7.0, 1e-20, 1e20, 0.1], [5]).requires_grad();
    for decay in [0.9, 0.9999, 0.99999] {
        let mut ema = Ema::new([("w", &w)], decay)?;
        for _ in 0..300 {
            ema.update()?;
        }
        assert_eq!(bits([&ema.named()[0].1]), bits([&w]), "{decay}");
    }
    Ok(())
}

#[test]
fn a_decay_of_0_keeps_nothing() -> Result<()> {
    let gpu = quiet();
    let w = Tensor::from_slice(&gpu, &[1.0f32, -3.0], [2]).requires_grad();
    let mut adam = AdamW::new(&gpu, vec![Group::new([("w", &w)])], AdamWConfig::default())?;
    let mut ema = Ema::new([("w", &w)], 0.0)?;
    adam.step(&w.mul(&w).sum_all().backward()?, 1.0 - 1e-7)?;
    ema.update()?;
    assert_eq!(bits([&ema.named()[0].1]), bits([&w]));
    Ok(())
}
