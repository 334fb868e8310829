//! Steps that are left out because their gradients overflowed, and the number of steps that the device counts without them.

use crate::support::*;
use tiebeam::optim::{
    AdamW, AdamWConfig, Group, LossScale, LossScaleConfig, Sgd, SgdConfig, StateTensor, StepInfo,
};
use tiebeam::{Gpu, Grads, Result, Step, Tensor};

/// An optimizer of either kind, as the tests of left out steps use it.
trait Steps {
    fn step(&mut self, grads: &Grads) -> Result<StepInfo>;
    fn state(&self) -> Result<Vec<StateTensor>>;
}

impl Steps for AdamW {
    fn step(&mut self, grads: &Grads) -> Result<StepInfo> {
        AdamW::step(self, grads, 0.1)
    }
    fn state(&self) -> Result<Vec<StateTensor>> {
        self.state_dict()
    }
}

impl Steps for Sgd {
    fn step(&mut self, grads: &Grads) -> Result<StepInfo> {
        Sgd::step(self, grads, 0.1)
    }
    fn state(&self) -> Result<Vec<StateTensor>> {
        self.state_dict()
    }
}

/// Runs steps with these factors of the loss, eagerly or replayed, and returns the bits of parameters and moments. The second
/// leaf has no gradient in the eager steps before `joins`.
fn left_out(adamw: bool, factors: &[f32], joins: usize, recorded: bool) -> Vec<u32> {
    let gpu = gpu();
    let leaf = |n: usize, x: f32| {
        Tensor::from_slice(gpu, &(0..n).map(|i| x + i as f32).collect::<Vec<_>>(), [n]).requires_grad()
    };
    let (w, late) = (leaf(1027, 0.5), leaf(5, -3.25));
    let groups = vec![Group::new([("w", &w)]).weight_decay(0.5), Group::new([("late", &late)]).lr_scale(0.5)];
    let mut optimizer: Box<dyn Steps> = if adamw {
        let config = AdamWConfig::default().betas((0.8, 0.99)).clip(Some(3.0)).arena_limit(Some(4352));
        Box::new(AdamW::new(gpu, groups, config).unwrap())
    } else {
        Box::new(Sgd::new(gpu, groups, SgdConfig::default().momentum(0.5).nesterov(true)).unwrap())
    };
    let step = |optimizer: &mut Box<dyn Steps>, factor: &Tensor, both: bool| {
        let sum = |x: &Tensor| x.mul(&x.sin()).sum_all();
        let loss = if both { sum(&w).add(&sum(&late)) } else { sum(&w) };
        optimizer.step(&loss.mul(factor).backward()?)
    };
    let inputs: Vec<Tensor> = factors.iter().map(|&factor| Tensor::scalar(gpu, factor)).collect();
    let mut replay = None;
    for (i, factor) in inputs.iter().enumerate() {
        match &mut replay {
            None if recorded && i == joins => {
                let record = |x: &[Tensor]| Ok(vec![step(&mut optimizer, &x[0], true)?.norm]);
                replay = Some(Step::record(gpu, &[factor], record).unwrap());
            }
            None => drop(step(&mut optimizer, factor, i >= joins).unwrap()),
            Some(replay) => drop(replay.run(&[factor]).unwrap()),
        }
    }
    let moments = optimizer.state().unwrap().into_iter().filter(|(name, ..)| !name.starts_with("step/"));
    let moments = moments.flat_map(|(_, _, data)| data);
    let parameters = [&w, &late].into_iter().flat_map(|x| x.to_vec::<f32>().unwrap());
    parameters.chain(moments).map(f32::to_bits).collect()
}

/// A step whose gradients overflow leaves everything as it was, the number of the next step included.
#[test]
fn a_run_with_an_overflow_has_the_bits_of_one_without_it() {
    for (adamw, recorded) in [(true, false), (true, true), (false, false), (false, true)] {
        let want = left_out(adamw, &[1.0, 0.5, 2.0, 1.5, 0.25], 2, false);
        // Overflows before and after the second leaf joins: they are no steps of either leaf.
        let some = [1.0, f32::INFINITY, 0.5, 2.0, f32::NAN, 1.5, f32::INFINITY, 0.25];
        assert!(left_out(adamw, &some, 3, recorded) == want, "AdamW {adamw}, recorded {recorded}");
        assert!(left_out(adamw, &[1.0, 0.5, 2.0, 1.5], 2, recorded) != want[..]);
    }
}

/// The correction of moments at any step is as exact as f32, although its powers are computed on the device.
#[test]
fn bias_is_corrected_as_in_f64_at_any_step() {
    let gpu = gpu();
    let gradients = [1e-6f32, 1e6];
    let loss = Tensor::from_slice(gpu, &gradients, [2]);
    let zeros = |name: &str| (name.to_string(), [2].into(), vec![0.0; 2]);
    for (b1, b2) in [(0.9, 0.999), (0.0, 0.5), (0.95, 0.99999), (0.3, 1.0 - 1e-9)] {
        for s in [1u64, 2, 3, 15, 16, 17, 100, 255, 256, 1000, 4097, 65_535, 1_000_003, 16_777_216, 1 << 31] {
            let w = Tensor::zeros(gpu, [2]).requires_grad();
            // Beside this eps the first moment's factor matters alone for the small gradient, and both do for the large one.
            let config = AdamWConfig::default().betas((b1, b2)).eps(1.0);
            let mut adamw = AdamW::new(gpu, vec![Group::new([("w", &w)])], config).unwrap();
            adamw.load_state(s - 1, &[zeros("m/w"), zeros("v/w")]).unwrap();
            adamw.step(&w.mul(&loss).sum_all().backward().unwrap(), 1.0).unwrap();
            let correct = |b: f64| 1.0 / (1.0 - b.powf(s as f64));
            let want = gradients.map(f64::from).map(|g| {
                let (m, v) = ((1.0 - b1) * g * correct(b1), (1.0 - b2) * g * g * correct(b2));
                -m / (v.sqrt() + 1.0)
            });
            within(&format!("{b1} {b2} step {s}"), &download(&w), &want, |i| 12.0 * U * want[i].abs());
        }
    }
}

/// A parameter, its optimizer, and a loss scale of these settings.
fn scaled(gpu: &Gpu, config: LossScaleConfig) -> (Tensor, Sgd, LossScale) {
    let w = Tensor::from_slice(gpu, &[1f32, -2.0], [2]).requires_grad();
    let sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
    (w, sgd, LossScale::new(gpu, config).unwrap())
}

#[test]
fn gradients_are_divided_by_the_scale_that_they_have() -> Result<()> {
    let gpu = gpu();
    let (w, mut sgd, scale) = scaled(gpu, LossScaleConfig::default().scale(1024.0).interval(1));
    let of = |factor: f32| scale.backward_retain_graph(&w.scale(factor).sum_all());
    // Two raise the scale and one lowers it before the first gradients are taken.
    let late = of(1.0)?;
    for factor in [1.0, 1.0, f32::INFINITY] {
        sgd.step(&of(factor)?, 0.25)?;
    }
    assert_eq!((w.to_vec::<f32>()?, scale.scale()?), (vec![0.5, -2.5], 2048.0));
    let info = sgd.step(&late, 0.25)?;
    assert_eq!((w.to_vec::<f32>()?, info.norm.item()?), (vec![0.25, -2.75], 2f32.sqrt()));
    // A second optimizer divides by the same scale.
    let v = Tensor::from_slice(gpu, &[3f32], [1]).requires_grad();
    let mut other = Sgd::new(gpu, vec![Group::new([("v", &v)])], SgdConfig::default())?;
    let grads = scale.backward(&v.add(&w.sum_all()).sum_all())?;
    sgd.step(&grads, 0.25)?;
    other.step(&scale.backward(&v.sum_all())?, 0.25)?;
    assert_eq!((w.to_vec::<f32>()?, v.to_vec::<f32>()?), (vec![0.0, -3.0], vec![2.75]));
    Ok(())
}

#[test]
#[should_panic(expected = "a step came between")]
fn gradients_of_two_scales_are_not_added() {
    let gpu = gpu();
    let (w, mut sgd, scale) = scaled(gpu, LossScaleConfig::default());
    let first = scale.backward(&w.sum_all()).unwrap();
    sgd.step(&first, 0.1).unwrap();
    first.add(&scale.backward(&w.sum_all()).unwrap());
}

#[test]
fn a_scale_stays_where_its_inverse_is_a_number() -> Result<()> {
    let gpu = gpu();
    for (scale, factor, end) in [(-58, f32::INFINITY, -60), (58, 0.0, 60)] {
        let config = LossScaleConfig::default().scale(2f32.powi(scale)).interval(1);
        let (w, mut sgd, scale) = scaled(gpu, config);
        for _ in 0..5 {
            sgd.step(&scale.backward(&w.scale(factor).sum_all())?, 0.5)?;
        }
        assert_eq!(scale.scale()?, 2f32.powi(end));
        // Good gradients are still taken.
        sgd.step(&scale.backward(&w.sum_all())?, 0.5)?;
        assert_eq!(w.to_vec::<f32>()?, [0.5, -2.5]);
    }
    for wrong in [2f32.powi(-61), 2f32.powi(61), 0.0, -1.0, f32::NAN, f32::INFINITY] {
        let made = LossScale::new(gpu, LossScaleConfig::default().scale(wrong));
        assert!(made.is_err_and(|e| e.to_string().contains("between 2^-60 and 2^60")), "{wrong}");
    }
    Ok(())
}

#[test]
fn a_run_whose_factors_are_no_powers_of_two_resumes_with_the_same_bits() -> Result<()> {
    let gpu = gpu();
    let config = || LossScaleConfig::default().scale(100.0).growth(1.3).backoff(0.7).interval(1);
    let run = |break_at: usize| -> Result<Vec<u32>> {
        let (w, mut sgd, mut scale) = scaled(gpu, config());
        for step in 0..9 {
            if step == break_at {
                let mut state = scale.state_dict()?;
                scale = LossScale::new(gpu, config())?;
                scale.load_state(&mut state)?;
                assert!(state.is_empty());
            }
            let factor = if step % 4 == 1 { f32::INFINITY } else { 0.1 };
            sgd.step(&scale.backward(&w.square().scale(factor).sum_all())?, 0.5)?;
        }
        let state = scale.state_dict()?.into_iter().flat_map(|(_, _, data)| data);
        Ok(w.to_vec::<f32>()?.into_iter().chain(state).map(f32::to_bits).collect())
    };
    assert!(run(6)? == run(9)?);
    // A file from before the inverse was kept.
    let (.., scale) = scaled(gpu, config());
    let mut state = scale.state_dict()?;
    state.retain(|(name, ..)| !name.ends_with("inverse"));
    scale.load_state(&mut state)
}
