//! Loss scaling: gradients are computed of `scale loss`, so that small ones do not vanish in f16, and the optimizer divides
//! by the scale.

use super::StateTensor;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::precision::Precision;
use crate::setters::setters;
use crate::shape::Shape;
use crate::tape::{Grads, Scaled, Scaling};
use crate::tensor::Tensor;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const OP: &str = "loss scale";
/// Names of the state in files. An optimizer's state has no such names.
const STATE: [&str; 3] = ["loss_scale/scale", "loss_scale/finite_steps", "loss_scale/inverse"];
/// The least and the largest scale: their squares and inverses are far from where f32 ends.
const RANGE: [f32; 2] = [f32::from_bits((127 - 60) << 23), f32::from_bits((127 + 60) << 23)];

/// Settings of a [`LossScale`]. The defaults are those of PyTorch's `GradScaler`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LossScaleConfig {
    /// The scale of the first step, between 2^-60 and 2^60. It stays in that range.
    pub scale: f32,
    /// Multiplies the scale after `interval` steps in a row with finite gradients. A power of two rounds nothing.
    pub growth: f32,
    /// Multiplies the scale after a step whose gradients overflowed.
    pub backoff: f32,
    /// Number of steps. 0 keeps the scale as it is, whatever happens.
    pub interval: u32,
}

setters!(LossScaleConfig { scale: f32, growth: f32, backoff: f32, interval: u32 });

impl Default for LossScaleConfig {
    fn default() -> Self {
        LossScaleConfig { scale: 65536.0, growth: 2.0, backoff: 0.5, interval: 2000 }
    }
}

/// A loss scale that adapts on the device: a step whose gradients overflow changes nothing and lowers the scale, and many
/// steps in a row without an overflow raise it. The optimizer's events say when ([`super::AdamW::watch`]).
///
/// Gradients know the scale that they were computed with, and an optimizer divides by it. So the steps of an optimizer need
/// no other call, and recorded steps adapt too. If several optimizers share a scale, the steps of all count.
///
/// ```
/// # use tiebeam::{Gpu, Precision, Tensor, autocast};
/// # use tiebeam::optim::{Group, LossScale, LossScaleConfig, Sgd, SgdConfig};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [1, 2]).requires_grad();
/// let x = Tensor::from_slice(&gpu, &[3f32, 4.0], [2, 1]);
/// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
/// // The default of 65536 is beyond f16, so a loss whose own gradient is 1 would need a step to lower it.
/// let scale = LossScale::new(&gpu, LossScaleConfig::default().scale(1024.0))?;
/// let loss = autocast(Precision::F16, || w.matmul(&x).sum_all());
/// sgd.step(&scale.backward(&loss)?, 0.5)?;
/// assert_eq!(w.to_vec::<f32>()?, [-0.5, 0.0]);
/// assert!(sgd.watch()?.events()?.is_empty());
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: Micikevicius et al. 2018, "Mixed precision training", arXiv 1710.03740, section 3.2, and PyTorch's `GradScaler`.
pub struct LossScale {
    gpu: Gpu,
    scaling: Arc<Scaling>,
}

fn is_possible(scale: f32) -> bool {
    (RANGE[0]..=RANGE[1]).contains(&scale)
}

impl LossScale {
    /// Makes a scale.
    ///
    /// # Errors
    /// When a setting is out of range, which the message names, or the device has failed.
    pub fn new(gpu: &Gpu, config: LossScaleConfig) -> Result<LossScale> {
        let LossScaleConfig { scale, growth, backoff, interval } = config;
        let wrong = |name: &str, value: f32, rule: &str| {
            Err(Error::config(format!("{OP}: {name} is {value}; use a number {rule}")))
        };
        if !is_possible(scale) {
            return wrong("the scale", scale, "between 2^-60 and 2^60, such as 65536");
        }
        if !(growth.is_finite() && growth > 1.0) {
            return wrong("growth", growth, "above 1, such as 2");
        }
        if !(backoff > 0.0 && backoff < 1.0) {
            return wrong("backoff", backoff, "between 0 and 1, such as 0.5");
        }
        if interval >= 1 << 24 {
            return wrong("interval", interval as f32, "of steps below 2^24");
        }
        let state = Tensor::from_slice(gpu, &[scale, scale.recip(), 0.0, 0.0], [4]);
        state.check()?;
        let scaling = Scaling { state, growth, backoff, interval, steps: AtomicU64::new(0) };
        Ok(LossScale { gpu: gpu.clone(), scaling: Arc::new(scaling) })
    }

    /// The scale for a precision: one that adapts for f16, and 1 for bf16 and f32, whose range is wide enough.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn of(gpu: &Gpu, precision: Precision) -> Result<LossScale> {
        let config = LossScaleConfig::default();
        match precision {
            Precision::F16 => LossScale::new(gpu, config),
            _ => LossScale::new(gpu, config.scale(1.0).interval(0)),
        }
    }

    /// Returns the gradients of `scale loss`, for an optimizer that divides by the scale. Uses the graph up, as
    /// [`Tensor::backward`] does.
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// As [`Tensor::backward`].
    #[track_caller]
    pub fn backward(&self, loss: &Tensor) -> Result<Grads> {
        self.from(loss, Tensor::backward_with)
    }

    /// Like [`LossScale::backward`], but keeps the graph for another call.
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// As [`Tensor::backward`].
    #[track_caller]
    pub fn backward_retain_graph(&self, loss: &Tensor) -> Result<Grads> {
        self.from(loss, Tensor::backward_with_retain_graph)
    }

    #[track_caller]
    fn from(&self, loss: &Tensor, backward: fn(&Tensor, &Tensor) -> Result<Grads>) -> Result<Grads> {
        assert!(
            loss.count() == 1,
            "backward: shape {} is not a scalar; reduce it to a loss first",
            loss.shape()
        );
        let steps = self.scaling.steps.load(Relaxed);
        // A copy, because a step may change the scale before one takes these gradients.
        let own = self.scaling.state.copy();
        own.evaluate();
        let seed = own.slice(0, 0..1).reshape(*loss.shape());
        let scaled = Scaled { scaling: self.scaling.clone(), own, steps };
        Ok(backward(loss, &seed)?.scaled_by(scaled))
    }

    /// The present scale. Waits for the device.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn scale(&self) -> Result<f32> {
        Ok(self.scaling.state.to_vec::<f32>()?[0])
    }

    /// Returns the scale and the number of finite steps since it changed, to be saved beside an optimizer's state.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        let state = self.scaling.state.to_vec::<f32>()?;
        let scalar = |(name, value): (&str, f32)| (name.to_string(), Shape::new(&[]), vec![value]);
        Ok(STATE.into_iter().zip([state[0], state[2], state[1]]).map(scalar).collect())
    }

    /// Whether a part of a saved state is a loss scale's.
    pub(crate) fn is_in((name, ..): &StateTensor) -> bool {
        STATE.contains(&name.as_str())
    }

    /// Restores what [`LossScale::state_dict`] returned, and takes it out of `state`, so that the rest is the optimizer's.
    ///
    /// # Errors
    /// When a part is missing or no possible scale. The message names it, and nothing changes.
    pub fn load_state(&self, state: &mut Vec<StateTensor>) -> Result<()> {
        let find = |name: &str| {
            let found = state.iter().find(|(own, _, data)| own == name && data.len() == 1);
            found.map(|(_, _, data)| data[0]).filter(|x| x.is_finite() && *x >= 0.0)
        };
        let [scale, finite, inverse] = STATE.map(find);
        let (Some(scale), Some(finite)) = (scale.filter(|&x| is_possible(x)), finite) else {
            return Err(Error::config(format!(
                "{OP}: there is no state `{}` and `{}`; it is another run's, or of a run without a loss scale",
                STATE[0], STATE[1]
            )));
        };
        state.retain(|(name, ..)| !STATE.contains(&name.as_str()));
        // Factors that are no powers of two round the two numbers apart. Older files have no inverse.
        let inverse = inverse.filter(|x| (x * scale - 1.0).abs() < 1e-3).unwrap_or(scale.recip());
        let bytes = [scale, inverse, finite, 0.0];
        let place = self.scaling.state.place();
        self.gpu.unchanged(|| self.gpu.overwrite_now(&[(place, bytemuck::cast_slice(&bytes))]))
    }
}
