//! The optimizer that all rules share.

use super::arena::Arenas;
use super::events::Watch;
use super::group::Group;
use super::rule::{Plan, Rule, at_least_zero};
use super::{StateTensor, StepInfo};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::tape::Grads;

/// An optimizer whose step is the rule of its settings: [`Sgd`](super::Sgd), [`Adam`](super::Adam),
/// [`AdamW`](super::AdamW), [`RmsProp`](super::RmsProp) and [`Lion`](super::Lion), where the formulas are. A program that
/// takes any of them takes a `&mut dyn` [`Optimizer`](super::Optimizer).
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::optim::{AdamW, AdamWConfig, Group};
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
/// let group = || vec![Group::new([("w", &w)])];
/// let mut first = AdamW::new(&gpu, group(), AdamWConfig::default())?;
/// first.step(&w.sum_all().backward()?, 1e-3)?;
/// let (steps, state) = (first.steps(), first.state_dict()?);
/// drop(first);
/// let mut second = AdamW::new(&gpu, group(), AdamWConfig::default())?;
/// second.load_state(steps, &state)?; // goes on as the first would have
/// assert_eq!(second.steps(), 1);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Stepper<R: Rule> {
    arenas: Arenas,
    plan: Plan,
    config: R,
}

impl<R: Rule> Stepper<R> {
    /// Moves the parameters into arenas, with a state of 0.
    ///
    /// # Errors
    /// When a setting is out of range, which the message names, or the device has failed.
    ///
    /// # Panics
    /// When a parameter is not an f32 leaf with elements of its own, belongs to another optimizer that is in use, or a
    /// name or tensor comes twice. The parameters are then unchanged, as after an error.
    #[track_caller]
    pub fn new(gpu: &Gpu, groups: Vec<Group>, config: R) -> Result<Stepper<R>> {
        let plan = config.plan()?;
        let arenas = Arenas::new(gpu, groups, &plan)?;
        Ok(Stepper { arenas, plan, config })
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
        at_least_zero(self.plan.op, "the learning rate", lr.into())?;
        self.arenas.step(grads, lr, &self.plan)
    }

    /// The optimizer's name in messages, such as `adamw`.
    pub fn name(&self) -> &'static str {
        self.plan.op
    }

    /// The settings.
    pub fn config(&self) -> &R {
        &self.config
    }

    /// The base learning rate.
    pub fn lr(&self) -> f32 {
        self.plan.lr
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

    /// Returns the state of every parameter, named as the optimizer's page says, such as `m/NAME`. If the update depends
    /// on the number of steps, also returns `step/NAME` of those parameters that some steps did not change. Together
    /// with [`Stepper::steps`], this is all that there is to save.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn state_dict(&self) -> Result<Vec<StateTensor>> {
        self.arenas.state_dict()
    }

    /// Restores the state and the count of steps that [`Stepper::state_dict`] and [`Stepper::steps`] returned.
    ///
    /// # Errors
    /// When a tensor is missing, superfluous or of another shape. The message names it, and nothing changes.
    pub fn load_state(&mut self, steps: u64, state: &[StateTensor]) -> Result<()> {
        self.arenas.load_state(steps, state)
    }
}
