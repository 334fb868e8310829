//! Gradient descent with momentum.

use super::rule::{Plan, Planned, Rule, below_one};
use super::stepper::Stepper;
use crate::error::{Error, Result};
use crate::gpu::shader::Source;
use crate::setters::setters;

const OP: &str = "sgd";

/// Settings of [`Sgd`]. Weight decay and rate scale are set per [`Group`](super::Group).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SgdConfig {
    /// The base learning rate. [`Sgd::lr`] returns it, as the input of a schedule.
    pub lr: f32,
    /// The share of the velocity that a step keeps. With 0, no velocity is stored.
    pub momentum: f32,
    /// Whether the gradient looks ahead by one velocity.
    pub nesterov: bool,
    /// Scales all gradients together so that their norm is at most this.
    pub clip: Option<f32>,
    /// The most bytes of one arena, from which more arenas and dispatches follow: the tests set it low. The adapter's limit
    /// applies in any case.
    pub arena_limit: Option<u64>,
}

setters!(SgdConfig {
    lr: f32,
    momentum: f32,
    nesterov: bool,
    clip: Option<f32>,
    arena_limit: Option<u64>,
});

impl Default for SgdConfig {
    fn default() -> Self {
        SgdConfig { lr: 1e-2, momentum: 0.0, nesterov: false, clip: None, arena_limit: None }
    }
}

/// Stochastic gradient descent, over all parameters that have a gradient:
///
/// ```text
/// norm = sqrt(sum of all g^2);  g *= min(1, clip / (norm + 1e-6))
/// g += wd w
/// b = momentum b + g                                  (b = 0 at first)
/// w -= lr b,  or with nesterov  w -= lr (g + momentum b)
/// ```
///
/// Weight decay is part of the gradient here, as in PyTorch, so it passes through the velocity.
/// Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in the form
/// of PyTorch's `SGD` without dampening.
///
/// The state is `velocity/NAME` of each parameter, and nothing without momentum.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::optim::{Group, Sgd, SgdConfig};
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
/// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default().momentum(0.5))?;
/// for _ in 0..2 {
///     sgd.step(&w.sum_all().backward()?, 1.0)?; // every gradient is 1
/// }
/// assert_eq!(w.to_vec::<f32>()?, [-1.5, -0.5]); // steps of 1 and of 1.5
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub type Sgd = Stepper<SgdConfig>;

impl Rule for SgdConfig {}

impl Planned for SgdConfig {
    fn plan(&self) -> Result<Plan> {
        let momentum = self.momentum;
        below_one(OP, "momentum", momentum.into())?;
        if self.nesterov && momentum == 0.0 {
            return Err(Error::config(format!("{OP}: nesterov needs momentum; set it, such as to 0.9")));
        }
        let entry = if momentum > 0.0 { "momentum" } else { "plain" };
        let source = Source::file("sgd").bool("NESTEROV", self.nesterov);
        let plan = Plan::new(OP, source, entry, vec![("mu", momentum)]);
        let moments = if momentum > 0.0 { vec![["velocity", "b"]] } else { vec![] };
        Plan { moments, ..plan }.settings(self.lr, self.clip, self.arena_limit)
    }
}
