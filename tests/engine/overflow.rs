//! Steps that are left out because their gradients overflowed, and the number of steps that the device counts without them.

use crate::support::*;
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig, StateTensor, StepInfo};
use tiebeam::{Grads, Result, Step, Tensor};

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
