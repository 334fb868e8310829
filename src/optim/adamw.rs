//! AdamW: moments of the gradient set the step of every element, weight decay apart from both.

use super::arena::{Arenas, Kernel};
use super::{Group, StateTensor, StepInfo, at_least_zero, below_one, check_clip};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::shader::Source;
use crate::setters::setters;
use crate::tape::Grads;
use std::sync::Arc;

const OP: &str = "adamw";

/// Settings of [`AdamW`]; weight decay and rate scale are in its [`Group`]s.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdamWConfig {
    /// The base learning rate, which [`AdamW::lr`] gives to a schedule.
    pub lr: f32,
    /// How much of the mean and of the mean square a step keeps.
    pub betas: (f64, f64),
    /// Added to the root of the mean square.
    pub eps: f32,
    /// Scales all gradients together so that their norm is at most this.
    pub clip: Option<f32>,
    /// Bytes of one arena, for tests; the adapter's limit holds anyway.
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
/// `s` counts the steps in which the parameter had a gradient, as in PyTorch: one that joins late starts at 1.
/// Source: Loshchilov, Hutter 2019, "Decoupled Weight Decay Regularization".
pub struct AdamW {
    arenas: Arenas,
    config: AdamWConfig,
}

impl AdamW {
    /// Takes the parameters into arenas, with moments of 0.
    ///
    /// # Errors
    /// For a setting out of range, which it names; the device's fault, if one stands.
    ///
    /// # Panics
    /// When a parameter is no f32 leaf with elements of its own, has another optimizer that is in use, or a name or tensor comes
    /// twice. The parameters are as they were then, as after an error.
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
        let arenas = Arenas::new(OP, gpu, groups, &["m", "v"], config.arena_limit)?;
        Ok(AdamW { arenas, config })
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
        let config = self.config.clone();
        let numbers = Arc::new(move |lr: f32, step: u64| {
            let (s, (b1, b2)) = (step as f64, config.betas);
            vec![
                ("lr", lr),
                ("eps", config.eps),
                ("beta1", b1 as f32),
                ("beta2", b2 as f32),
                ("rest1", (1.0 - b1) as f32),
                ("rest2", (1.0 - b2) as f32),
                ("unbias1", (1.0 / (1.0 - b1.powf(s))) as f32),
                ("unbias2", (1.0 / (1.0 - b2.powf(s))) as f32),
            ]
        });
        let kernel =
            Kernel { source: &source(), entry: "update", moments: &["m", "v"], lr, numbers, counts: true };
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

    /// The moments `m/NAME` and `v/NAME` of every parameter, and `step/NAME` of those that had no gradient in some steps; with
    /// [`AdamW::steps`] all that there is to save.
    ///
    /// # Errors
    /// The device's fault, if one stands.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        self.arenas.state_dict(true)
    }

    /// Takes the moments and the count of steps that [`AdamW::state_dict`] and [`AdamW::steps`] gave.
    ///
    /// # Errors
    /// When a tensor is missing, too many or of another shape, which is named; then nothing is changed.
    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        self.arenas.load_state(steps, state)
    }
}

fn source() -> Source {
    Source::file("adamw")
}
