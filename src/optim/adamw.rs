//! AdamW: moments of the gradient set the step of every element, with decoupled weight decay.

use super::rule::{Plan, Planned, Rule, above_zero, below_one};
use super::stepper::Stepper;
use crate::error::Result;
use crate::gpu::shader::Source;
use crate::setters::setters;

const OP: &str = "adamw";

/// Settings of [`AdamW`]. Weight decay and rate scale are set per [`Group`](super::Group).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdamWConfig {
    /// The base learning rate. [`AdamW::lr`] returns it, as the input of a schedule.
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

setters!(AdamWConfig {
    lr: f32,
    betas: (f64, f64),
    eps: f32,
    clip: Option<f32>,
    arena_limit: Option<u64>,
});

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, clip: None, arena_limit: None }
    }
}

/// Adam with decoupled weight decay. At step `s = 1, 2, ...`, over all parameters that have a gradient:
///
/// ```text
/// norm = sqrt(sum of all g^2);  g *= min(1, clip / (norm + 1e-6))
/// w *= 1 - lr wd
/// m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
/// w -= lr (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps)
/// ```
///
/// `s` counts the steps that changed the parameter, as in PyTorch: those in which it had a gradient and the norm was finite.
/// For a parameter that joins late it starts at 1.
/// Source: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization".
///
/// The state is `m/NAME` and `v/NAME` of each parameter.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::optim::{AdamW, AdamWConfig, Group};
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
/// let group = Group::new([("w", &w)]).weight_decay(0.1);
/// let mut adamw = AdamW::new(&gpu, vec![group], AdamWConfig::default())?;
/// adamw.step(&w.scale(100.0).sum_all().backward()?, 0.5)?;
/// let w = w.to_vec::<f32>()?; // decayed by 0.5 * 0.1, and one step of 0.5, whatever the gradient's size
/// assert!((w[0] - 0.45).abs() < 1e-4 && (w[1] - 1.4).abs() < 1e-4);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub type AdamW = Stepper<AdamWConfig>;

impl Rule for AdamWConfig {}

impl Planned for AdamWConfig {
    fn plan(&self) -> Result<Plan> {
        let (b1, b2) = self.betas;
        let plan = plan(OP, Source::file("adamw"), [b1, b2], self.eps)?;
        plan.settings(self.lr, self.clip, self.arena_limit)
    }
}

/// The update by `adamw.wgsl`, whose constants say how weights decay.
pub(super) fn plan(op: &'static str, source: Source, betas: [f64; 2], eps: f32) -> Result<Plan> {
    let [b1, b2] = betas;
    below_one(op, "beta1", b1)?;
    below_one(op, "beta2", b2)?;
    above_zero(op, "eps", eps)?;
    let numbers = vec![
        ("eps", eps),
        ("beta1", b1 as f32),
        ("beta2", b2 as f32),
        ("rest1", (1.0 - b1) as f32),
        ("rest2", (1.0 - b2) as f32),
    ];
    let plan = Plan::new(op, source, "update", numbers);
    Ok(Plan { moments: vec![["m", "m"], ["v", "v"]], decays: Some(betas), ..plan })
}
