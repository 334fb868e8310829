//! Gradient descent with momentum.

use super::arena::{Arenas, Kernel};
use super::{Group, StateTensor, StepInfo, Watch, at_least_zero, below_one, check_clip};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::shader::Source;
use crate::setters::setters;
use crate::tape::Grads;
use std::sync::Arc;

const OP: &str = "sgd";

/// Settings of [`Sgd`]. Weight decay and rate scale are set per [`Group`].
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
    /// The most bytes of one arena, for tests. The adapter's limit applies in any case.
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
/// Weight decay is part of the gradient here, as in PyTorch, so it passes through the velocity.
/// Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in the form
/// of PyTorch's `SGD` without dampening.
pub struct Sgd {
    arenas: Arenas,
    config: SgdConfig,
}

impl Sgd {
    /// Moves the parameters into arenas, with velocities of 0.
    ///
    /// # Errors
    /// When a setting is out of range, which the message names, or the device has failed.
    ///
    /// # Panics
    /// When a parameter is not an f32 leaf with elements of its own, belongs to another optimizer that is in use, or a
    /// name or tensor comes twice. The parameters are then unchanged, as after an error.
    #[track_caller]
    pub fn new(gpu: &Gpu, groups: Vec<Group>, config: SgdConfig) -> Result<Sgd> {
        at_least_zero(OP, "lr", config.lr.into())?;
        below_one(OP, "momentum", config.momentum.into())?;
        if config.nesterov && config.momentum == 0.0 {
            return Err(Error::config(format!("{OP}: nesterov needs momentum; set it, such as to 0.9")));
        }
        check_clip(OP, config.clip)?;
        let moments: &[_] = if config.momentum > 0.0 { &["velocity"] } else { &[] };
        let arenas = Arenas::new(OP, gpu, groups, moments, None, config.arena_limit)?;
        Ok(Sgd { arenas, config })
    }

    /// Changes the parameters by one step at learning rate `lr`. It is recorded like an op, and nothing is read back.
    ///
    /// Pending expressions over the parameters are computed first. A graph that saved a parameter cannot go backward
    /// after this.
    ///
    /// # Errors
    /// When the learning rate is negative or not finite, a gradient carries an error, or the device has failed. Then no
    /// parameter and no state changes, and the step is not counted.
    ///
    /// # Panics
    /// When no parameter has a gradient in `grads`, or a gradient was computed before this optimizer was made.
    #[track_caller]
    pub fn step(&mut self, grads: &Grads, lr: f32) -> Result<StepInfo> {
        at_least_zero(OP, "the learning rate", lr.into())?;
        let momentum = self.config.momentum;
        let entry = if momentum > 0.0 { "momentum" } else { "plain" };
        let numbers = Arc::new(move |lr: f32| vec![("lr", lr), ("mu", momentum)]);
        let moments: &[&str] = if momentum > 0.0 { &["b"] } else { &[] };
        let source = source(self.config.nesterov);
        let kernel = Kernel { source: &source, entry, moments, lr, numbers };
        self.arenas.step(grads, self.config.clip, &kernel)
    }

    /// The base learning rate.
    pub fn lr(&self) -> f32 {
        self.config.lr
    }

    /// Bytes of the state between steps, without the parameters.
    pub fn state_bytes(&self) -> usize {
        self.arenas.state_bytes()
    }

    /// Number of steps taken, including those that changed nothing.
    pub fn steps(&self) -> u64 {
        self.arenas.steps()
    }

    /// Number of steps since this optimizer was made that changed nothing, because the norm of the gradients was not
    /// finite. Waits for the device.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn skipped(&self) -> Result<u64> {
        self.arenas.skipped()
    }

    /// Starts to read what happened in the steps so far: which gradients overflowed, and when the loss scale changed.
    /// Does not wait for the device.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn watch(&self) -> Result<Watch> {
        self.arenas.watch()
    }

    /// Returns the velocity `velocity/NAME` of every parameter; nothing without momentum.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        self.arenas.state_dict()
    }

    /// Restores the velocities and the count of steps that [`Sgd::state_dict`] and [`Sgd::steps`] returned.
    ///
    /// # Errors
    /// When a tensor is missing, superfluous or of another shape. The message names it, and nothing changes.
    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        self.arenas.load_state(steps, state)
    }
}

fn source(nesterov: bool) -> Source {
    Source::file("sgd").bool("NESTEROV", nesterov)
}
