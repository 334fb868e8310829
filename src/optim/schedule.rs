//! Learning rates over time.

use std::f64::consts::PI;

/// How the learning rate of a step follows from the base rate.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Schedule {
    /// The base rate at every step.
    Constant,
    /// A linear rise to the base rate, then half a cosine down.
    /// Source: Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".
    WarmupCosine {
        /// Number of steps until the base rate is reached; 0 for none.
        warmup: u64,
        /// The step from which on the rate is lowest.
        total: u64,
        /// The lowest rate, as a fraction of the base rate.
        floor: f32,
    },
}

impl Schedule {
    /// Returns the learning rate of step `step`, counted from 0: while warming up `base (step + 1) / warmup`, then
    /// `base (floor + (1 - floor) (1 + cos(pi t)) / 2)` with `t = (step - warmup) / (total - warmup)`, at most 1.
    pub fn lr(&self, base: f32, step: u64) -> f32 {
        let Schedule::WarmupCosine { warmup, total, floor } = *self else { return base };
        let (base, floor) = (f64::from(base), f64::from(floor));
        if step < warmup {
            return (base * (step + 1) as f64 / warmup as f64) as f32;
        }
        let t = if step >= total { 1.0 } else { (step - warmup) as f64 / (total - warmup) as f64 };
        (base * (floor + (1.0 - floor) * (1.0 + (PI * t).cos()) / 2.0)) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_cosine_passes_its_corners() {
        let s = Schedule::WarmupCosine { warmup: 4, total: 12, floor: 0.25 };
        let rates: Vec<f32> = [0, 1, 3, 4, 8, 12, 1000].iter().map(|&step| s.lr(2.0, step)).collect();
        assert_eq!(rates, [0.5, 1.0, 2.0, 2.0, 1.25, 0.5, 0.5]);
        assert!((4..12).all(|step| s.lr(2.0, step) > s.lr(2.0, step + 1)));
        assert_eq!(Schedule::WarmupCosine { warmup: 0, total: 2, floor: 0.0 }.lr(1.0, 0), 1.0);
        // A warmup longer than the run never divides by zero.
        assert_eq!(Schedule::WarmupCosine { warmup: 5, total: 3, floor: 0.5 }.lr(1.0, 5), 0.5);
        assert_eq!(Schedule::Constant.lr(0.1, 7), 0.1);
    }
}
