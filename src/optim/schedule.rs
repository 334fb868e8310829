//! Learning rates over time.

use std::f64::consts::PI;

/// How the learning rate of a step follows from the base rate. Steps are counted from 0. A `floor` is a fraction of the base
/// rate.
///
/// In the formulas, `n` is the step, and while warming up the rate is `base (n + 1) / warmup`.
///
/// ```
/// # use tiebeam::optim::Schedule;
/// let schedule = Schedule::Linear { warmup: 2, total: 6, floor: 0.5 };
/// let rates: Vec<f32> = (0..7).map(|step| schedule.lr(0.8, step)).collect();
/// assert_eq!(rates, [0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4]);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Schedule {
    /// The base rate at every step.
    Constant,
    /// A linear rise to the base rate, then half a cosine down to the floor:
    /// `base (floor + (1 - floor) (1 + cos(pi t)) / 2)` with `t = (n - warmup) / (total - warmup)`, at most 1.
    /// Source: Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts".
    WarmupCosine {
        /// Number of steps until the base rate is reached; 0 for none.
        warmup: u64,
        /// The step from which on the rate is lowest.
        total: u64,
        /// The lowest rate, as a fraction of the base rate.
        floor: f32,
    },
    /// A linear rise to the base rate, then a line down to the floor: `base (1 - (1 - floor) t)` with `t` as in
    /// `WarmupCosine`.
    Linear {
        /// Number of steps until the base rate is reached; 0 for none.
        warmup: u64,
        /// The step from which on the rate is lowest.
        total: u64,
        /// The lowest rate, as a fraction of the base rate.
        floor: f32,
    },
    /// Half a cosine down to the floor, again and again: `base (floor + (1 - floor) (1 + cos(pi c / T)) / 2)`, `c` steps
    /// after the last restart. The first period `T` is `period`, and each later one is `factor` times longer.
    /// Source: as `WarmupCosine`, in the form of PyTorch's `CosineAnnealingWarmRestarts`.
    CosineRestarts {
        /// Number of steps of the first period, above 0.
        period: u64,
        /// How much longer each period is than the one before, above 0.
        factor: u64,
        /// The rate at the end of a period, as a fraction of the base rate.
        floor: f32,
    },
    /// `base gamma^k`, where `k` is `n / every` without the rest.
    Step {
        /// Number of steps between two changes, above 0.
        every: u64,
        /// The factor of each change.
        gamma: f64,
    },
    /// `base gamma^k`, where `k` is the number of milestones up to `n`.
    MultiStep {
        /// The steps from which on the rate is lower, in any order.
        milestones: Vec<u64>,
        /// The factor of each change.
        gamma: f64,
    },
    /// `base gamma^n`.
    Exponential {
        /// The factor of each step.
        gamma: f64,
    },
    /// `base (1 - n / total)^power`, and 0 from step `total` on.
    Polynomial {
        /// The step from which on the rate is 0.
        total: u64,
        /// 1 is a line.
        power: f32,
    },
    /// Half a cosine from `base / start` up to `base`, which the last step of the first `up` of all steps reaches, and half a
    /// cosine down to `base / (start end)` at the last step, `total - 1`. The base rate is the highest here. PyTorch's defaults
    /// are 0.3, 25 and 10000.
    /// Source: Smith, Topin 2018, "Super-Convergence", arXiv 1708.07120, in the form of PyTorch's `OneCycleLR` with two phases.
    OneCycle {
        /// Number of steps.
        total: u64,
        /// The fraction of the steps that rise, between 0 and 1.
        up: f32,
        /// The base rate divided by the first one (`div_factor`).
        start: f32,
        /// The first rate divided by the last one (`final_div_factor`).
        end: f32,
    },
    /// A linear rise to the base rate, then `base sqrt(warmup / (n + 1))`. With `base = 1 / sqrt(width warmup)` it is the
    /// schedule of the transformer, also called Noam.
    /// Source: Vaswani et al. 2017, "Attention Is All You Need", equation 3.
    InverseSqrt {
        /// Number of steps until the base rate is reached; 0 counts as 1.
        warmup: u64,
    },
}

impl Schedule {
    /// Returns the learning rate of step `step`, counted from 0. It is computed in f64.
    pub fn lr(&self, base: f32, step: u64) -> f32 {
        let base = f64::from(base);
        let rate = match *self {
            Schedule::WarmupCosine { warmup, .. } | Schedule::Linear { warmup, .. } if step < warmup => {
                base * (step + 1) as f64 / warmup as f64
            }
            _ => base * self.factor(step),
        };
        rate as f32
    }

    /// The rate as a multiple of the base rate, after a linear warm-up.
    fn factor(&self, n: u64) -> f64 {
        match *self {
            Schedule::Constant => 1.0,
            Schedule::WarmupCosine { warmup, total, floor } => {
                cosine(1.0, floor.into(), passed(n, warmup, total))
            }
            Schedule::Linear { warmup, total, floor } => {
                1.0 - (1.0 - f64::from(floor)) * passed(n, warmup, total)
            }
            Schedule::CosineRestarts { period, factor, floor } => {
                let (at, period) = since_restart(n, period.max(1), factor.max(1));
                cosine(1.0, floor.into(), at as f64 / period as f64)
            }
            Schedule::Step { every, gamma } => gamma.powf((n / every.max(1)) as f64),
            Schedule::MultiStep { ref milestones, gamma } => {
                let reached = milestones.iter().filter(|&&at| at <= n).count();
                gamma.powf(reached as f64)
            }
            Schedule::Exponential { gamma } => gamma.powf(n as f64),
            Schedule::Polynomial { total, power } => {
                if n < total {
                    (1.0 - n as f64 / total as f64).powf(power.into())
                } else {
                    0.0
                }
            }
            Schedule::OneCycle { total, up, start, end } => {
                let first = 1.0 / f64::from(start);
                let last = total.max(1) as f64 - 1.0;
                let (top, n) = (f64::from(up) * (last + 1.0) - 1.0, (n as f64).min(last));
                if n <= top && top > 0.0 {
                    cosine(first, 1.0, n / top)
                } else if last > top {
                    cosine(1.0, first / f64::from(end), (n - top) / (last - top))
                } else {
                    1.0
                }
            }
            Schedule::InverseSqrt { warmup } => {
                let (n, warmup) = ((n + 1) as f64, warmup.max(1) as f64);
                (n / warmup).min((warmup / n).sqrt())
            }
        }
    }
}

/// Half a cosine between two numbers, at a time from 0 to 1.
fn cosine(start: f64, end: f64, t: f64) -> f64 {
    end + (start - end) * (1.0 + (PI * t).cos()) / 2.0
}

/// The fraction of the steps after the warm-up that has passed.
fn passed(n: u64, warmup: u64, total: u64) -> f64 {
    // A warm-up that is longer than the run divides by no 0.
    if n >= total { 1.0 } else { (n - warmup) as f64 / (total - warmup) as f64 }
}

/// Returns the number of steps since the last restart, and the present period.
fn since_restart(n: u64, period: u64, factor: u64) -> (u64, u64) {
    if factor == 1 {
        return (n % period, period);
    }
    let (mut at, mut period) = (n, period);
    // Periods at least double, so there are at most 64.
    while at >= period {
        at -= period;
        period = period.saturating_mul(factor);
    }
    (at, period)
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
    /// At base rate 0.5. The numbers are those of PyTorch 2.15's classes, and of `LambdaLR` for the last one.
    #[test]
    fn rates_are_those_of_pytorch() {
        let check = |schedule: Schedule, want: &[f64]| {
            for (step, want) in want.iter().enumerate() {
                let got = f64::from(schedule.lr(0.5, step as u64));
                assert!(
                    (got - want).abs() < 1e-7 * want.max(1e-3),
                    "{schedule:?} at {step}: {got}, not {want}"
                );
            }
        };
        check(
            Schedule::Linear { warmup: 3, total: 8, floor: 0.1 },
            &[0.166666667, 0.333333333, 0.5, 0.5, 0.41, 0.32, 0.23, 0.14, 0.05, 0.05],
        );
        let doubled = [
            0.5,
            0.434099026,
            0.275,
            0.115900974,
            0.5,
            0.482872895,
            0.434099026,
            0.361103772,
            0.275,
            0.188896228,
            0.115900974,
            0.0671271052,
            0.5,
            0.495676688,
        ];
        check(Schedule::CosineRestarts { period: 4, factor: 2, floor: 0.1 }, &doubled);
        let equal = [0.5, 0.375, 0.125, 0.5, 0.375, 0.125, 0.5, 0.375];
        check(Schedule::CosineRestarts { period: 3, factor: 1, floor: 0.0 }, &equal);
        let stairs = [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125, 0.0625];
        check(Schedule::Step { every: 3, gamma: 0.5 }, &stairs);
        let stairs = [0.5, 0.5, 0.05, 0.05, 0.05, 0.005, 0.005, 0.005];
        check(Schedule::MultiStep { milestones: vec![5, 2], gamma: 0.1 }, &stairs);
        check(
            Schedule::Exponential { gamma: 0.9 },
            &[0.5, 0.45, 0.405, 0.3645, 0.32805, 0.295245, 0.2657205],
        );
        let square = [0.5, 0.347222222, 0.222222222, 0.125, 0.0555555556, 0.0138888889, 0.0, 0.0];
        check(Schedule::Polynomial { total: 6, power: 2.0 }, &square);
        let short = [
            0.02,
            0.26,
            0.5,
            0.475242316,
            0.405872827,
            0.305631011,
            0.194370989,
            0.094129173,
            0.024759684,
            2e-6,
            2e-6,
        ];
        check(Schedule::OneCycle { total: 10, up: 0.3, start: 25.0, end: 1e4 }, &short);
        let long = [
            0.05,
            0.0635691603,
            0.10264,
            0.1625,
            0.23592916,
            0.31407084,
            0.3875,
            0.44736,
            0.48643084,
            0.5,
            0.487776365,
            0.452301994,
            0.397049367,
            0.327426994,
            0.25025,
            0.173073006,
            0.103450633,
            0.0481980057,
            0.0127236351,
            0.0005,
        ];
        check(Schedule::OneCycle { total: 20, up: 0.5, start: 10.0, end: 100.0 }, &long);
        let noam = [
            0.125,
            0.25,
            0.375,
            0.5,
            0.447213595,
            0.40824829,
            0.377964473,
            0.353553391,
            0.333333333,
            0.316227766,
        ];
        check(Schedule::InverseSqrt { warmup: 4 }, &noam);
    }

    /// Settings that are 0 divide by nothing, and the last step of all has a rate.
    #[test]
    fn no_setting_gives_nan() {
        for step in [0, 1, 1 << 40, u64::MAX - 1] {
            for schedule in [
                Schedule::Linear { warmup: 0, total: 0, floor: 0.0 },
                Schedule::CosineRestarts { period: 0, factor: 0, floor: 0.5 },
                Schedule::CosineRestarts { period: 1, factor: 2, floor: 0.5 },
                Schedule::Step { every: 0, gamma: 0.5 },
                Schedule::Polynomial { total: 0, power: 0.0 },
                Schedule::OneCycle { total: 0, up: 0.0, start: 25.0, end: 1e4 },
                Schedule::OneCycle { total: 5, up: 1.0, start: 25.0, end: 1e4 },
                Schedule::InverseSqrt { warmup: 0 },
            ] {
                let rate = schedule.lr(1.0, step);
                assert!((0.0..=1.0).contains(&rate), "{schedule:?} at {step}: {rate}");
            }
        }
    }
}
