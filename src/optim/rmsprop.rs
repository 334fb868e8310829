//! RMSprop: every gradient is divided by the root of its running mean square.

use super::rule::{Plan, Planned, Rule, above_zero, below_one};
use super::stepper::Stepper;
use crate::error::Result;
use crate::gpu::shader::Source;
use crate::setters::setters;

const OP: &str = "rmsprop";

/// Settings of [`RmsProp`]. Weight decay and rate scale are set per [`Group`](super::Group).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RmsPropConfig {
    /// The base learning rate. [`RmsProp::lr`] returns it, as the input of a schedule.
    pub lr: f32,
    /// The share of the running mean square that a step keeps.
    pub alpha: f64,
    /// Added to the root of the mean square.
    pub eps: f32,
    /// The share of the velocity that a step keeps. With 0, no velocity is stored.
    pub momentum: f32,
    /// Whether the running mean is subtracted, so that gradients are divided by their standard deviation.
    pub centered: bool,
    /// Scales all gradients together so that their norm is at most this.
    pub clip: Option<f32>,
    /// The most bytes of one arena, from which more arenas and dispatches follow: the tests set it low. The adapter's limit
    /// applies in any case.
    pub arena_limit: Option<u64>,
}

setters!(RmsPropConfig {
    lr: f32,
    alpha: f64,
    eps: f32,
    momentum: f32,
    centered: bool,
    clip: Option<f32>,
    arena_limit: Option<u64>,
});

impl Default for RmsPropConfig {
    fn default() -> Self {
        RmsPropConfig {
            lr: 1e-2,
            alpha: 0.99,
            eps: 1e-8,
            momentum: 0.0,
            centered: false,
            clip: None,
            arena_limit: None,
        }
    }
}

/// RMSprop, over all parameters that have a gradient:
///
/// ```text
/// norm = sqrt(sum of all g^2);  g *= min(1, clip / (norm + 1e-6))
/// g += wd w
/// v = alpha v + (1 - alpha) g^2
/// d = g / (sqrt(v) + eps),  or centered, with m = alpha m + (1 - alpha) g,  d = g / (sqrt(v - m^2) + eps)
/// w -= lr d,  or with momentum b = momentum b + d,  w -= lr b
/// ```
///
/// All moments are 0 at first and are not corrected for it, so early steps are long. `v - m^2` is a variance, and counts as 0
/// where rounding makes it negative.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, optim::{Group, RmsProp, RmsPropConfig}};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
/// let config = RmsPropConfig::default().alpha(0.75);
/// let mut rmsprop = RmsProp::new(&gpu, vec![Group::new([("w", &w)])], config)?;
/// // The first mean square is a quarter of the gradient's, so the step is twice the rate.
/// rmsprop.step(&w.scale(3.0).sum_all().backward()?, 0.25)?;
/// let got = w.to_vec::<f32>()?;
/// assert!((got[0] - 0.5).abs() < 1e-6 && (got[1] - 1.5).abs() < 1e-6);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: Tieleman, Hinton 2012, lecture 6e of "Neural Networks for Machine Learning"; centered: Graves 2013, "Generating
/// Sequences With Recurrent Neural Networks", arXiv 1308.0850; in the form of PyTorch's `RMSprop`.
///
/// The state is `v/NAME` of each parameter, `m/NAME` if centered, and `velocity/NAME` with momentum.
pub type RmsProp = Stepper<RmsPropConfig>;

impl Rule for RmsPropConfig {}

impl Planned for RmsPropConfig {
    fn plan(&self) -> Result<Plan> {
        below_one(OP, "alpha", self.alpha)?;
        below_one(OP, "momentum", self.momentum.into())?;
        above_zero(OP, "eps", self.eps)?;
        let moved = self.momentum > 0.0;
        let entry = match (self.centered, moved) {
            (false, false) => "plain",
            (false, true) => "momentum",
            (true, false) => "centered",
            (true, true) => "centered_momentum",
        };
        let mut moments = vec![["v", "v"]];
        moments.extend(self.centered.then_some(["m", "m"]));
        moments.extend(moved.then_some(["velocity", "b"]));
        let numbers = vec![
            ("alpha", self.alpha as f32),
            ("rest", (1.0 - self.alpha) as f32),
            ("eps", self.eps),
            ("mu", self.momentum),
        ];
        let plan = Plan::new(OP, Source::file("rmsprop"), entry, numbers);
        Plan { moments, ..plan }.settings(self.lr, self.clip, self.arena_limit)
    }
}
