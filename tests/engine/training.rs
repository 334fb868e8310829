//! Special cases of long trainings: classes that a teacher excludes, norms that overflow, skipped steps, and parameters that join
//! late.

use crate::support::*;
use tiebeam::nn::distillation;
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig, StateTensor};
use tiebeam::{Gpu, Result, Step, Tensor};

fn row(gpu: &Gpu, x: &[f32]) -> Tensor {
    Tensor::from_slice(gpu, x, [1, x.len()])
}

fn close(what: &str, got: &Tensor, want: &[f64], bound: f64) {
    let got = download(got);
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= bound * want.abs().max(1.0), "{what}: {got}, not {want}");
    }
}

/// Computes `t^2 sum p (log p - log q)` with `0 log 0 = 0`, and its gradient `t (q - p)`, in f64.
fn distilled(student: &[f64], teacher: &[f64], t: f64) -> (f64, Vec<f64>) {
    let softmax = |x: &[f64]| {
        let all: Vec<f64> = x.iter().map(|x| (x / t).exp()).collect();
        let sum: f64 = all.iter().sum();
        all.iter().map(|x| x / sum).collect::<Vec<_>>()
    };
    let (q, p) = (softmax(student), softmax(teacher));
    let terms = p.iter().zip(&q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p * (p / q).ln());
    (t * t * terms.sum::<f64>(), p.iter().zip(&q).map(|(p, q)| t * (q - p)).collect())
}

#[test]
fn a_class_that_the_teacher_excludes_has_no_part() {
    let gpu = gpu();
    let student = row(gpu, &[1.0, 2.0, 0.0]).requires_grad();
    let loss = distillation(&student, &row(gpu, &[1.0, f32::NEG_INFINITY, 0.0]), 2.0);
    // PyTorch's kl_div gives 2.8247709.
    let (want, gradient) = distilled(&[1.0, 2.0, 0.0], &[1.0, f64::NEG_INFINITY, 0.0], 2.0);
    assert!((want - 2.8247709).abs() < 1e-6);
    close("loss", &loss, &[want], 1e-6);
    close("gradient", loss.backward().unwrap().get(&student).unwrap(), &gradient, 1e-6);
    // A class that both exclude has no part in the loss and no gradient. If only the student excludes it, the loss is infinite.
    let both = row(gpu, &[1.0, f32::NEG_INFINITY, 0.0]).requires_grad();
    let loss = distillation(&both, &row(gpu, &[0.0, f32::NEG_INFINITY, 1.0]), 1.0);
    let (want, gradient) = distilled(&[1.0, 0.0], &[0.0, 1.0], 1.0);
    close("without the class", &loss, &[want], 1e-6);
    let got = loss.backward().unwrap();
    close("without the class", got.get(&both).unwrap(), &[gradient[0], 0.0, gradient[1]], 1e-6);
    let alone = distillation(&both.detach(), &row(gpu, &[0.0, 0.0, 0.0]), 1.0);
    assert_eq!(alone.item().unwrap(), f32::INFINITY);
    // A NaN score does not count as an excluded class.
    let lost = distillation(&student, &row(gpu, &[1.0, f32::NAN, 0.0]), 2.0);
    assert!(lost.item().unwrap().is_nan());
}

/// A variance beyond f32 gives NaN instead of zeros that look valid.
#[test]
fn a_norm_that_overflows_is_nan() {
    let gpu = gpu();
    let all_nan =
        |what: &str, x: &Tensor| assert!(download(x).iter().all(|x| x.is_nan()), "{what}: {:?}", download(x));
    for (width, long) in [(4, false), (4099, false), (1 << 17, true)] {
        let mut data = vec![0f32; 2 * width];
        for (i, x) in data.iter_mut().enumerate() {
            *x = [1.0, -1.0, 0.0, 1.0][i % 4] * if i < width { 1e20 } else { 1.0 };
        }
        let x = Tensor::from_slice(gpu, &data, [2, width]).requires_grad();
        for (name, y) in [("layer", x.layer_norm(None, None, 1e-5)), ("rms", x.rms_norm(None, 1e-5))] {
            let what = format!("{name} norm of {width}, long {long}");
            all_nan(&what, &y.slice(0, 0..1));
            let sound = download(&y.slice(0, 1..2));
            assert!(sound.iter().all(|y| y.abs() < 2.0) && sound[0] > 0.5, "{what}: the row beside");
            let dx = y.square().sum_all().backward().unwrap();
            all_nan(&what, &dx.get(&x).unwrap().slice(0, 0..1));
            assert!(download(&dx.get(&x).unwrap().slice(0, 1..2)).iter().all(|x| x.is_finite()), "{what}");
        }
    }
    // A large variance within f32 gives the right result.
    let y = row(gpu, &[1e18, -1e18, 0.0, 1e18]).layer_norm(None, None, 1e-5);
    close("within f32", &y, &[0.904534, -1.507557, -0.301511, 0.904534], 1e-5);
}

#[test]
fn skipped_steps_are_counted() -> Result<()> {
    let gpu = gpu();
    let w = Tensor::from_slice(gpu, &[1f32, 2.0], [2]).requires_grad();
    let mut adamw = AdamW::new(gpu, vec![Group::new([("w", &w)])], AdamWConfig::default())?;
    let v = Tensor::ones(gpu, [2]).requires_grad();
    let mut sgd = Sgd::new(gpu, vec![Group::new([("v", &v)])], SgdConfig::default())?;
    sgd.step(&v.scale(f32::INFINITY).sum_all().backward()?, 0.1)?;
    assert_eq!((v.to_vec::<f32>()?, sgd.skipped()?, sgd.steps()), (vec![1.0; 2], 1, 1));
    let grads = w.sum_all().backward()?;
    adamw.step(&grads, 0.1)?;
    assert_eq!(adamw.skipped()?, 0);
    let before = w.to_vec::<f32>()?;
    // NaN gradients, and gradients whose sum of squares is beyond f32.
    for factor in [f32::NAN, 1e20] {
        adamw.step(&grads.scale(factor), 0.1)?;
    }
    assert_eq!((adamw.skipped()?, adamw.steps(), w.to_vec::<f32>()?), (2, 3, before.clone()));
    // The device also counts in a recorded step.
    let one = Tensor::scalar(gpu, 1.0);
    let mut step = Step::record(gpu, &[&one], |x| {
        adamw.step(&w.sum_all().mul(&x[0]).backward()?, 0.1)?;
        Ok(vec![])
    })?;
    for factor in [f32::NAN, 1.0, f32::INFINITY] {
        step.run(&[&Tensor::scalar(gpu, factor)])?;
    }
    assert_eq!((adamw.skipped()?, adamw.steps()), (4, 7));
    assert!(w.to_vec::<f32>()?.iter().zip(&before).all(|(now, before)| now < before && now.is_finite()));
    Ok(())
}

/// Three parameters that have gradients in different steps, compared with the formula with one step count per parameter.
struct Late {
    leaves: Vec<Tensor>,
    adamw: AdamW,
}

/// Whether parameter `i` has a gradient in step `s`.
fn present(i: usize, s: usize) -> bool {
    [true, s >= 3, s.is_multiple_of(2)][i]
}

const BETAS: (f64, f64) = (0.9, 0.95);

impl Late {
    fn new(gpu: &Gpu) -> Late {
        let leaves: Vec<Tensor> = (0..3).map(|i| Tensor::full(gpu, [3], i as f32).requires_grad()).collect();
        let group = Group::new(leaves.iter().enumerate().map(|(i, leaf)| (format!("w{i}"), leaf)));
        let config = AdamWConfig::default().betas(BETAS).eps(1e-6);
        Late { adamw: AdamW::new(gpu, vec![group], config).unwrap(), leaves }
    }

    /// The gradient of parameter `i` in step `s` is `(s + 1) (i + 1)`.
    fn step(&mut self, s: usize) {
        let terms = (0..3)
            .filter(|i| present(*i, s))
            .map(|i| self.leaves[i].scale(((s + 1) * (i + 1)) as f32).sum_all());
        let loss = terms.reduce(|a, b| a.add(&b)).unwrap();
        self.adamw.step(&loss.backward().unwrap(), 0.1).unwrap();
    }

    fn values(&self) -> Vec<Vec<f32>> {
        self.leaves.iter().map(|leaf| leaf.to_vec().unwrap()).collect()
    }
}

#[test]
fn bias_correction_counts_each_parameters_steps() {
    let mut late = Late::new(gpu());
    let mut want = [0.0, 1.0, 2.0];
    let (mut m, mut v, mut count) = ([0.0; 3], [0.0; 3], [0; 3]);
    for s in 0..7 {
        late.step(s);
        for i in (0..3).filter(|i| present(*i, s)) {
            let g = ((s + 1) * (i + 1)) as f64;
            count[i] += 1;
            m[i] = BETAS.0 * m[i] + (1.0 - BETAS.0) * g;
            v[i] = BETAS.1 * v[i] + (1.0 - BETAS.1) * g * g;
            let (b1, b2) = (1.0 - BETAS.0.powi(count[i]), 1.0 - BETAS.1.powi(count[i]));
            want[i] -= 0.1 * (m[i] / b1) / ((v[i] / b2).sqrt() + 1e-6);
        }
        for (leaf, want) in late.leaves.iter().zip(want) {
            close(&format!("step {s}"), leaf, &[want; 3], 2e-6);
        }
    }
    assert_eq!((late.adamw.steps(), count), (7, [7, 4, 4]));
}

#[test]
fn the_counts_are_saved_where_they_differ() {
    let gpu = gpu();
    let mut whole = Late::new(gpu);
    (0..7).for_each(|s| whole.step(s));
    let mut half = Late::new(gpu);
    (0..4).for_each(|s| half.step(s));
    let state = half.adamw.state_dict().unwrap();
    let counts = |state: &[StateTensor]| {
        let all = state.iter().filter(|(name, ..)| name.starts_with("step/"));
        all.map(|(name, _, data)| (name.clone(), data[0])).collect::<Vec<_>>()
    };
    assert_eq!(counts(&state), [("step/w1".to_string(), 1.0), ("step/w2".to_string(), 2.0)]);
    let mut resumed = Late::new(gpu);
    let resume = |resumed: &mut Late, state: &[StateTensor]| {
        for (new, old) in resumed.leaves.iter_mut().zip(half.values()) {
            *new = Tensor::from_slice(gpu, &old, [3]).requires_grad();
        }
        let group = Group::new(resumed.leaves.iter().enumerate().map(|(i, leaf)| (format!("w{i}"), leaf)));
        let config = AdamWConfig::default().betas(BETAS).eps(1e-6);
        resumed.adamw = AdamW::new(gpu, vec![group], config).unwrap();
        resumed.adamw.load_state(4, state)
    };
    resume(&mut resumed, &state).unwrap();
    (4..7).for_each(|s| resumed.step(s));
    assert_eq!(resumed.values(), whole.values());
    // In a state of an older version without counts, all parameters have taken part in all steps. An invalid count is refused.
    let old: Vec<StateTensor> =
        state.iter().filter(|(name, ..)| !name.starts_with("step/")).cloned().collect();
    resume(&mut resumed, &old).unwrap();
    assert_eq!(counts(&resumed.adamw.state_dict().unwrap()), []);
    let mut wrong = state.clone();
    wrong.iter_mut().rfind(|(name, ..)| name == "step/w2").unwrap().2[0] = 0.5;
    let said = resume(&mut resumed, &wrong).unwrap_err().to_string();
    assert_eq!(said, "adamw: state `step/w2` is [0.5], no number of steps");
}

/// The device counts the steps of each parameter, so recorded updates can be replayed whatever steps happened in between.
#[test]
fn parameters_of_adamw_may_part() -> Result<()> {
    let gpu = gpu();
    let run = |recorded: bool| -> Result<[u32; 2]> {
        let [a, b] = [1.0f32, -2.0].map(|x| Tensor::from_slice(gpu, &[x], [1]).requires_grad());
        let mut adamw = AdamW::new(gpu, vec![Group::new([("a", &a), ("b", &b)])], AdamWConfig::default())?;
        let loss = |x: &Tensor| x.mul(&x.sin()).sum_all();
        let both = |adamw: &mut AdamW| adamw.step(&loss(&a).add(&loss(&b)).backward()?, 0.1).map(drop);
        adamw.step(&loss(&a).backward()?, 0.1)?;
        let mut step = match recorded {
            true => Some(Step::record(gpu, &[], |_| both(&mut adamw).map(|()| vec![]))?),
            false => both(&mut adamw).map(|()| None)?,
        };
        for alone in [None, Some(&b), Some(&b), None, Some(&a)] {
            if let Some(x) = alone {
                adamw.step(&loss(x).backward()?, 0.1)?;
            }
            match &mut step {
                Some(step) => drop(step.run(&[])?),
                None => both(&mut adamw)?,
            }
        }
        assert_eq!(adamw.steps(), 10);
        Ok([a.item()?.to_bits(), b.item()?.to_bits()])
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}

/// The same of an optimizer without counts.
#[test]
fn parameters_of_sgd_may_part() -> Result<()> {
    let gpu = gpu();
    let [a, b] = [(); 2].map(|()| Tensor::ones(gpu, [1]).requires_grad());
    let mut sgd = Sgd::new(gpu, vec![Group::new([("a", &a), ("b", &b)])], SgdConfig::default())?;
    let mut step = Step::record(gpu, &[], |_| {
        sgd.step(&a.add(&b).sum_all().backward()?, 0.25)?;
        Ok(vec![])
    })?;
    sgd.step(&a.sum_all().backward()?, 0.25)?;
    step.run(&[])?;
    assert_eq!([a.item()?, b.item()?], [0.25, 0.5]);
    Ok(())
}
