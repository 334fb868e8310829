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
//! The optimizers are [`AdamW`], [`Adam`], [`Sgd`], [`RmsProp`] and [`Lion`], and without gradients [`Scalars`]. They differ in their
//! settings, a [`Rule`], and have the methods of [`Stepper`]; a program that takes any of them takes an [`Optimizer`]. [`Group::split`]
//! leaves norms and biases without decay in one line. Gradients of micro-batches are accumulated by [`Grads::mean_of`](crate::Grads::mean_of):
//!
//! ```
//! # use tiebeam::{Gpu, Grads, Tensor, optim::{Group, Lion, LionConfig}};
//! # let gpu = Gpu::open()?;
//! # let w = Tensor::ones(&gpu, [2]).requires_grad();
//! # let micro_batches = [1f32, 3.0].map(|x| Tensor::full(&gpu, [2], x));
//! # let mut optimizer = Lion::new(&gpu, vec![Group::new([("w", &w)])], LionConfig::default())?;
//! let parts = micro_batches.iter().map(|x| w.mul(x).mean_all().backward());
//! optimizer.step(&Grads::mean_of(parts)?, 1e-4)?;
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

mod adam;
mod adamw;
mod arena;
mod clip;
mod ema;
mod events;
mod group;
mod lion;
mod optimizer;
mod perturb;
mod plateau;
mod rmsprop;
mod rule;
mod scalars;
mod scale;
mod schedule;
mod sgd;
mod state;
mod stepper;
mod taken;

pub use adam::{Adam, AdamConfig};
pub use adamw::{AdamW, AdamWConfig};
pub use clip::{clip_grad_norm, clip_grad_value};
pub use ema::Ema;
pub use events::{StepEvent, Watch};
pub use group::Group;
pub use lion::{Lion, LionConfig};
pub use optimizer::Optimizer;
pub use perturb::{Directions, Move, moved};
pub use plateau::{PlateauConfig, ReduceOnPlateau};
pub use rmsprop::{RmsProp, RmsPropConfig};
pub use rule::Rule;
pub use scalars::{Exchange, Scalars, ScalarsConfig};
pub use scale::{LossScale, LossScaleConfig};
pub use schedule::Schedule;
pub use sgd::{Sgd, SgdConfig};
pub use stepper::Stepper;

use crate::shape::Shape;
use crate::tensor::Tensor;

/// The result of a step.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StepInfo {
    /// `sqrt` of the sum of all squared gradients, without their loss scale, before clipping. It is a scalar on the device;
    /// read it when it is of interest, and not in each step.
    pub norm: Tensor,
}

/// A named part of an optimizer's state, such as `m/blocks.wq`.
pub type StateTensor = (String, Shape, Vec<f32>);
