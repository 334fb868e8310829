//! Gradient descent with momentum.

use super::arena::{Arenas, Kernel};
use super::{Group, StateTensor, StepInfo, at_least_zero, below_one, check_clip};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::shader::Source;
use crate::setters::setters;
use crate::tape::Grads;
use std::sync::Arc;

const OP: &str = "sgd";

/// Settings of [`Sgd`]; weight decay and rate scale are in its [`Group`]s.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SgdConfig {
    /// The base learning rate, which [`Sgd::lr`] gives to a schedule.
    pub lr: f32,
    /// How much of the velocity a step keeps; with 0 none is stored.
    pub momentum: f32,
    /// Looks ahead by one velocity.
    pub nesterov: bool,
    /// Scales all gradients together so that their norm is at most this.
    pub clip: Option<f32>,
    /// Bytes of one arena, for tests; the adapter's limit holds anyway.
    #[doc(hidden)]
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
/// Weight decay is part of the gradient here, as in PyTorch, and so passes through the velocity.
/// Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in the form
/// of PyTorch's `SGD` without dampening.
pub struct Sgd {
    arenas: Arenas,
    config: SgdConfig,
}

impl Sgd {
    /// Takes the parameters into arenas, with velocities of 0.
    ///
    /// # Errors
    /// For a setting out of range, which it names; the device's fault, if one stands.
    ///
    /// # Panics
    /// When a parameter is no f32 leaf with elements of its own, has another optimizer that is in use, or a name or tensor comes
    /// twice. The parameters are as they were then, as after an error.
    #[track_caller]
    pub fn new(gpu: &Gpu, groups: Vec<Group>, config: SgdConfig) -> Result<Sgd> {
        at_least_zero(OP, "lr", config.lr.into())?;
        below_one(OP, "momentum", config.momentum.into())?;
        if config.nesterov && config.momentum == 0.0 {
            return Err(Error::config(format!("{OP}: nesterov needs momentum; set it, such as to 0.9")));
        }
        check_clip(OP, config.clip)?;
        let moments: &[_] = if config.momentum > 0.0 { &["velocity"] } else { &[] };
        let arenas = Arenas::new(OP, gpu, groups, moments, config.arena_limit)?;
        Ok(Sgd { arenas, config })
    }

    /// Changes the parameters by one step at learning rate `lr`. Recorded like an op: nothing is read back.
    ///
    /// Pending expressions over the parameters are computed first. A graph that saved a parameter cannot go backward
    /// after this.
    ///
    /// # Errors
    /// For a learning rate that is negative or not finite; what a gradient carries; the device's fault, if one stands. Then no
    /// parameter and no state is changed, and the step is not counted.
    ///
    /// # Panics
    /// When no parameter has a gradient in `grads`, or one that was computed before this optimizer was made.
    #[track_caller]
    pub fn step(&mut self, grads: &Grads, lr: f32) -> Result<StepInfo> {
        at_least_zero(OP, "the learning rate", lr.into())?;
        let momentum = self.config.momentum;
        let entry = if momentum > 0.0 { "momentum" } else { "plain" };
        let numbers = Arc::new(move |lr: f32, _| vec![("lr", lr), ("mu", momentum)]);
        let moments: &[&str] = if momentum > 0.0 { &["b"] } else { &[] };
        let source = source(self.config.nesterov);
        let kernel = Kernel { source: &source, entry, moments, lr, numbers, counts: false };
        self.arenas.step(grads, self.config.clip, &kernel)
    }

    /// The base learning rate.
    pub fn lr(&self) -> f32 {
        self.config.lr
    }

    /// Bytes of what is kept between steps, beside the parameters.
    pub fn state_bytes(&self) -> usize {
        self.arenas.state_bytes()
    }

    /// Steps taken, those that changed nothing included.
    pub fn steps(&self) -> u64 {
        self.arenas.steps()
    }

    /// Steps that changed nothing because the gradients had no finite norm, since this optimizer was made. Waits for the device.
    ///
    /// # Errors
    /// The device's fault, if one stands.
    pub fn skipped(&self) -> Result<u64> {
        self.arenas.skipped()
    }

    /// The velocity `velocity/NAME` of every parameter; nothing without momentum.
    ///
    /// # Errors
    /// The device's fault, if one stands.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        self.arenas.state_dict(false)
    }

    /// Takes the velocities and the count of steps that [`Sgd::state_dict`] and [`Sgd::steps`] gave.
    ///
    /// # Errors
    /// When a tensor is missing, too many or of another shape, which is named; then nothing is changed.
    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        self.arenas.load_state(steps, state)
    }
}

fn source(nesterov: bool) -> Source {
    Source::file("sgd").bool("NESTEROV", nesterov)
}
