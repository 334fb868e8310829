//! Adam in its first form, in which weight decay is part of the gradient.

use super::adamw;
use super::rule::{Plan, Planned, Rule};
use super::stepper::Stepper;
use crate::error::Result;
use crate::gpu::shader::Source;
use crate::setters::setters;

/// Settings of [`Adam`]. Weight decay and rate scale are set per [`Group`](super::Group).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdamConfig {
    /// The base learning rate. [`Adam::lr`] returns it, as the input of a schedule.
    pub lr: f32,
    /// The shares of the running mean and of the running mean square that a step keeps.
    pub betas: (f64, f64),
    /// Added to the root of the mean square.
    pub eps: f32,
    /// Scales all gradients together so that their norm is at most this.
    pub clip: Option<f32>,
    /// The most bytes of one arena, from which more arenas and dispatches follow: the tests set it low. The adapter's limit
    /// applies in any case.
    pub arena_limit: Option<u64>,
}

setters!(AdamConfig {
    lr: f32,
    betas: (f64, f64),
    eps: f32,
    clip: Option<f32>,
    arena_limit: Option<u64>,
});

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, clip: None, arena_limit: None }
    }
}

/// Adam, whose weight decay is part of the gradient. At step `s = 1, 2, ...`, over all parameters that have a gradient:
///
/// ```text
/// norm = sqrt(sum of all g^2);  g *= min(1, clip / (norm + 1e-6))
/// g += wd w
/// m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
/// w -= lr (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps)
/// ```
///
/// The decay therefore passes through both moments. In [`AdamW`](super::AdamW) it does not, which is the better choice for
/// new work. Without weight decay the two are the same. `s` counts as there.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, optim::{Adam, AdamConfig, Group}};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, -2.0], [2]).requires_grad();
/// let group = Group::new([("w", &w)]).weight_decay(0.5);
/// let mut adam = Adam::new(&gpu, vec![group], AdamConfig::default())?;
/// // The gradients with decay are 1.5 and 0. The first step is the rate times their sign.
/// adam.step(&w.sum_all().backward()?, 0.25)?;
/// assert_eq!(w.to_vec::<f32>()?, [0.75, -2.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", in the form of PyTorch's `Adam` without `amsgrad`.
///
/// The state is `m/NAME` and `v/NAME` of each parameter.
pub type Adam = Stepper<AdamConfig>;

impl Rule for AdamConfig {}

impl Planned for AdamConfig {
    fn plan(&self) -> Result<Plan> {
        let (b1, b2) = self.betas;
        let source = Source::file("adamw").bool("COUPLED", true);
        adamw::plan("adam", source, [b1, b2], self.eps)?.settings(self.lr, self.clip, self.arena_limit)
    }
}
