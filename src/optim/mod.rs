//! Optimizers: parameters, gradients and moments lie in parallel arenas, and one kernel per arena makes a step.
//!
//! An optimizer moves its parameters into memory of its own, and all handles on them follow. Backward passes then write
//! gradients where the optimizer reads them. A step takes three dispatches, whatever the number of tensors (two more for
//! each further arena). Nothing is read back: the norm of the gradients stays on the device until it is read.
//!
//! ```no_run
//! use tiebeam::optim::{AdamW, AdamWConfig, Group, Schedule};
//! use tiebeam::{Gpu, Tensor};
//! let gpu = Gpu::open()?;
//! let w = Tensor::from_slice(&gpu, &[1.0f32, -2.0], [2]).requires_grad();
//! let group = Group::new([("w", &w)]).weight_decay(0.1);
//! let mut optimizer = AdamW::new(&gpu, vec![group], AdamWConfig::default().clip(Some(1.0)))?;
//! let schedule = Schedule::WarmupCosine { warmup: 10, total: 100, floor: 0.1 };
//! for step in 0..100 {
//!     let grads = w.mul(&w).sum_all().backward()?;
//!     optimizer.step(&grads, schedule.lr(1e-3, step))?;
//! }
//! # Ok::<(), tiebeam::Error>(())
//! ```
//!
//! A step changes nothing on the device if the norm of its gradients is not finite (because of a NaN, an infinity, or
//! squares whose sum overflows f32), so the last good parameters stay, and the run goes on with the bits of one without that
//! step. Only the host's counter of steps moves on, because the host does not wait for the norm. `skipped` returns the number
//! of such steps, and `watch` says which they were, and which parameters' gradients overflowed. A parameter without a gradient
//! is left alone: it does not decay, and its moments stay.
//!
//! A step changes all its parameters or none: one that returns an error has changed nothing. Parameters belong to one
//! optimizer at a time. When it is dropped, or could not be made, another one can take them, with the values that they
//! have. Once another has taken them, steps recorded before return an error and must be recorded again.

mod adamw;
mod arena;
mod events;
mod scale;
mod schedule;
mod sgd;
mod state;
mod taken;

pub use adamw::{AdamW, AdamWConfig};
pub use events::{StepEvent, Watch};
pub use scale::{LossScale, LossScaleConfig};
pub use schedule::Schedule;
pub use sgd::{Sgd, SgdConfig};

use crate::error::{Error, Result};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Parameters that share settings.
#[derive(Clone, Debug)]
pub struct Group {
    /// Leaves by name; the names must be unique over all groups of an optimizer.
    pub params: Vec<(String, Tensor)>,
    /// The fraction of a weight that a step at learning rate 1 removes. Use 0 for norms and biases.
    pub weight_decay: f32,
    /// Multiplies the learning rate of every step.
    pub lr_scale: f32,
}

impl Group {
    /// Makes a group without weight decay, at the unscaled learning rate.
    pub fn new<'a, N: Into<String>>(params: impl IntoIterator<Item = (N, &'a Tensor)>) -> Group {
        let params = params.into_iter().map(|(name, tensor)| (name.into(), tensor.clone())).collect();
        Group { params, weight_decay: 0.0, lr_scale: 1.0 }
    }

    /// Sets the weight decay.
    pub fn weight_decay(self, weight_decay: f32) -> Group {
        Group { weight_decay, ..self }
    }

    /// Sets the factor of the learning rate.
    pub fn lr_scale(self, lr_scale: f32) -> Group {
        Group { lr_scale, ..self }
    }
}

/// The result of a step.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StepInfo {
    /// `sqrt` of the sum of all squared gradients, without their loss scale, before clipping. It is a scalar on the device; read it when it is of
    /// interest, and not in each step.
    pub norm: Tensor,
}

/// A named part of an optimizer's state, such as `m/blocks.wq`.
pub type StateTensor = (String, Shape, Vec<f32>);

/// Checks the setting `name`, which must be finite and at least 0.
fn at_least_zero(op: &str, name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::config(format!("{op}: {name} is {value}; use a finite number, 0 or more")))
}

fn below_one(op: &str, name: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::config(format!("{op}: {name} is {value}; use a number from 0 up to but not 1, such as 0.9")))
}

fn check_clip(op: &str, clip: Option<f32>) -> Result<()> {
    match clip {
        Some(clip) if !(clip.is_finite() && clip > 0.0) => {
            Err(Error::config(format!("{op}: clip is {clip}; use a finite number above 0, or None")))
        }
        _ => Ok(()),
    }
}
