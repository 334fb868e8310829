//! Any optimizer as one trait.

use super::events::Watch;
use super::{Rule, Scalars, StateTensor, StepInfo, Stepper};
use crate::error::{Error, Result};
use crate::tape::Grads;

/// Any optimizer, for programs that choose one at run time. Each optimizer has the same methods without this trait.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, optim::{Group, Lion, LionConfig, Optimizer, Sgd, SgdConfig}};
/// # let gpu = Gpu::open()?;
/// # let (fast, w) = (true, Tensor::ones(&gpu, [2]).requires_grad());
/// let groups = vec![Group::new([("w", &w)])];
/// let mut optimizer: Box<dyn Optimizer> = match fast {
///     true => Box::new(Lion::new(&gpu, groups, LionConfig::default())?),
///     false => Box::new(Sgd::new(&gpu, groups, SgdConfig::default())?),
/// };
/// optimizer.step(&w.sum_all().backward()?, 0.5)?;
/// assert_eq!((optimizer.name(), w.to_vec::<f32>()?), ("lion", vec![0.5, 0.5]));
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub trait Optimizer: Send + Sync {
    /// The name in messages: see [`Stepper::name`].
    fn name(&self) -> &'static str;
    /// One step: see [`Stepper::step`].
    ///
    /// # Errors
    /// As [`Stepper::step`].
    fn step(&mut self, grads: &Grads, lr: f32) -> Result<StepInfo>;
    /// The base learning rate: see [`Stepper::lr`].
    fn lr(&self) -> f32;
    /// Bytes of the state: see [`Stepper::state_bytes`].
    fn state_bytes(&self) -> usize;
    /// Number of steps: see [`Stepper::steps`].
    fn steps(&self) -> u64;
    /// Number of steps that changed nothing: see [`Stepper::skipped`].
    ///
    /// # Errors
    /// When the device has failed.
    fn skipped(&self) -> Result<u64>;
    /// What happened in the steps: see [`Stepper::watch`].
    ///
    /// # Errors
    /// When the device has failed.
    fn watch(&self) -> Result<Watch>;
    /// The state to save: see [`Stepper::state_dict`].
    ///
    /// # Errors
    /// When the device has failed.
    fn state_dict(&self) -> Result<Vec<StateTensor>>;
    /// Restores a saved state: see [`Stepper::load_state`].
    ///
    /// # Errors
    /// As [`Stepper::load_state`].
    fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()>;
    /// Itself, if it is one that evaluates losses and takes no gradients.
    fn scalars(&mut self) -> Option<&mut Scalars> {
        None
    }
    /// Called when the parameters have been set from outside, as by a checkpoint.
    ///
    /// # Errors
    /// When the device has failed.
    fn loaded(&mut self) -> Result<()> {
        Ok(())
    }
}

impl<R: Rule> Optimizer for Stepper<R> {
    fn name(&self) -> &'static str {
        self.name()
    }
    #[track_caller]
    fn step(&mut self, grads: &Grads, lr: f32) -> Result<StepInfo> {
        self.step(grads, lr)
    }
    fn lr(&self) -> f32 {
        self.lr()
    }
    fn state_bytes(&self) -> usize {
        self.state_bytes()
    }
    fn steps(&self) -> u64 {
        self.steps()
    }
    fn skipped(&self) -> Result<u64> {
        self.skipped()
    }
    fn watch(&self) -> Result<Watch> {
        self.watch()
    }
    fn state_dict(&self) -> Result<Vec<StateTensor>> {
        self.state_dict()
    }
    fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        self.load_state(steps, state)
    }
}

impl<R: Rule> From<Stepper<R>> for Box<dyn Optimizer> {
    fn from(stepper: Stepper<R>) -> Self {
        Box::new(stepper)
    }
}

impl Optimizer for Scalars {
    fn name(&self) -> &'static str {
        self.name()
    }
    /// # Errors
    /// Always: this optimizer takes no gradients.
    fn step(&mut self, _: &Grads, _: f32) -> Result<StepInfo> {
        Err(Error::config("scalars: this optimizer takes no gradients; a Trainer takes its steps"))
    }
    fn lr(&self) -> f32 {
        self.lr()
    }
    /// The copy of the parameters is no state: it is the parameters between steps.
    fn state_bytes(&self) -> usize {
        0
    }
    fn steps(&self) -> u64 {
        self.steps()
    }
    fn skipped(&self) -> Result<u64> {
        Ok(0)
    }
    fn watch(&self) -> Result<Watch> {
        self.watch()
    }
    fn state_dict(&self) -> Result<Vec<StateTensor>> {
        Ok(self.state_dict())
    }
    fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        self.load_state(steps, state)
    }
    fn scalars(&mut self) -> Option<&mut Scalars> {
        Some(self)
    }
    fn loaded(&mut self) -> Result<()> {
        self.loaded()
    }
}

impl From<Scalars> for Box<dyn Optimizer> {
    fn from(scalars: Scalars) -> Self {
        Box::new(scalars)
    }
}
