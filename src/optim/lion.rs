//! Lion: the sign of a mean of gradients, with decoupled weight decay.

use super::rule::{Plan, Planned, Rule, below_one};
use super::stepper::Stepper;
use crate::error::Result;
use crate::gpu::shader::Source;
use crate::setters::setters;

const OP: &str = "lion";

/// Settings of [`Lion`]. Weight decay and rate scale are set per [`Group`](super::Group).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LionConfig {
    /// The base learning rate. [`Lion::lr`] returns it, as the input of a schedule.
    pub lr: f32,
    /// The share of the moment in the direction of a step, and the share of it that a step keeps.
    pub betas: (f64, f64),
    /// Scales all gradients together so that their norm is at most this.
    pub clip: Option<f32>,
    /// The most bytes of one arena, from which more arenas and dispatches follow: the tests set it low. The adapter's limit
    /// applies in any case.
    pub arena_limit: Option<u64>,
}

setters!(LionConfig {
    lr: f32,
    betas: (f64, f64),
    clip: Option<f32>,
    arena_limit: Option<u64>,
});

impl Default for LionConfig {
    fn default() -> Self {
        LionConfig { lr: 1e-4, betas: (0.9, 0.99), clip: None, arena_limit: None }
    }
}

/// Lion (evolved sign momentum), over all parameters that have a gradient:
///
/// ```text
/// norm = sqrt(sum of all g^2);  g *= min(1, clip / (norm + 1e-6))
/// w *= 1 - lr wd
/// w -= lr sign(b1 m + (1 - b1) g)
/// m = b2 m + (1 - b2) g                               (m = 0 at first)
/// ```
///
/// `sign(0)` is 0. Every element moves by the learning rate, so the paper uses a rate 3 to 10 times smaller than AdamW's, and
/// a weight decay larger by the same factor. There is one moment, so the state is half of AdamW's.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, optim::{Group, Lion, LionConfig}};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3]).requires_grad();
/// let c = Tensor::from_slice(&gpu, &[100f32, 0.0, -0.001], [3]);
/// let mut lion = Lion::new(&gpu, vec![Group::new([("w", &w)])], LionConfig::default())?;
/// lion.step(&w.mul(&c).sum_all().backward()?, 0.25)?;
/// assert_eq!(w.to_vec::<f32>()?, [0.75, 2.0, 3.25]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2.
///
/// The state is `m/NAME` of each parameter.
pub type Lion = Stepper<LionConfig>;

impl Rule for LionConfig {}

impl Planned for LionConfig {
    fn plan(&self) -> Result<Plan> {
        let (b1, b2) = self.betas;
        below_one(OP, "beta1", b1)?;
        below_one(OP, "beta2", b2)?;
        let numbers = vec![
            ("beta1", b1 as f32),
            ("rest1", (1.0 - b1) as f32),
            ("beta2", b2 as f32),
            ("rest2", (1.0 - b2) as f32),
        ];
        let plan = Plan::new(OP, Source::file("lion"), "update", numbers);
        Plan { moments: vec![["m", "m"]], ..plan }.settings(self.lr, self.clip, self.arena_limit)
    }
}
