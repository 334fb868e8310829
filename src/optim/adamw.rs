//! AdamW: moments of the gradient set the step of every element, with decoupled weight decay.

use super::arena::{Arenas, Kernel};
use super::{Group, StateTensor, StepInfo, Watch, at_least_zero, below_one, check_clip};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::shader::Source;
use crate::setters::setters;
use crate::tape::Grads;
use std::sync::Arc;

const OP: &str = "adamw";

/// Settings of [`AdamW`]. Weight decay and rate scale are set per [`Group`].
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
    /// The most bytes of one arena, for tests. The adapter's limit applies in any case.
    #[doc(hidden)]
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
pub struct AdamW {
    arenas: Arenas,
    config: AdamWConfig,
}

impl AdamW {
    /// Moves the parameters into arenas, with moments of 0.
    ///
    /// # Errors
    /// When a setting is out of range, which the message names, or the device has failed.
    ///
    /// # Panics
    /// When a parameter is not an f32 leaf with elements of its own, belongs to another optimizer that is in use, or a
    /// name or tensor comes twice. The parameters are then unchanged, as after an error.
    #[track_caller]
    pub fn new(gpu: &Gpu, groups: Vec<Group>, config: AdamWConfig) -> Result<AdamW> {
        at_least_zero(OP, "lr", config.lr.into())?;
        below_one(OP, "beta1", config.betas.0)?;
        below_one(OP, "beta2", config.betas.1)?;
        if !(config.eps.is_finite() && config.eps > 0.0) {
            let message = format!("{OP}: eps is {}; use a finite number above 0, such as 1e-8", config.eps);
            return Err(Error::config(message));
        }
        check_clip(OP, config.clip)?;
        let decays = Some(config.betas.into());
        let arenas = Arenas::new(OP, gpu, groups, &["m", "v"], decays, config.arena_limit)?;
        Ok(AdamW { arenas, config })
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
        let config = self.config.clone();
        let numbers = Arc::new(move |lr: f32| {
            let (b1, b2) = config.betas;
            vec![
                ("lr", lr),
                ("eps", config.eps),
                ("beta1", b1 as f32),
                ("beta2", b2 as f32),
                ("rest1", (1.0 - b1) as f32),
                ("rest2", (1.0 - b2) as f32),
            ]
        });
        let kernel = Kernel { source: &source(), entry: "update", moments: &["m", "v"], lr, numbers };
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

    /// Returns the moments `m/NAME` and `v/NAME` of every parameter, and `step/NAME` of those that some steps did not
    /// change. Together with [`AdamW::steps`], this is all that there is to save.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        self.arenas.state_dict()
    }

    /// Restores the moments and the count of steps that [`AdamW::state_dict`] and [`AdamW::steps`] returned.
    ///
    /// # Errors
    /// When a tensor is missing, superfluous or of another shape. The message names it, and nothing changes.
    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        self.arenas.load_state(steps, state)
    }
}

fn source() -> Source {
    Source::file("adamw")
}
