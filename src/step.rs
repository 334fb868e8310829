//! A step of fixed shapes, recorded once and replayed without running the code that made it.
//!
//! A replay encodes the same kernels on the same buffers: no shapes are checked, no buffers taken, no graph is built. What
//! a step changes by itself goes on as if its code had run: an optimizer counts its steps, and what is drawn at random moves
//! on the generators that it is drawn from.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::buffer::Buffer;
use crate::gpu::capture::Capture;
use crate::gpu::recording;
use crate::gpu::value::Place;
use crate::tensor::Tensor;
use std::sync::Arc;

/// A recorded step.
///
/// What is recorded is what the calling thread does with this device. Each run gives what the recorded code would give if it
/// ran again on these inputs:
///
/// * [`Step::outputs`] are the results of the last run, and may be the next run's inputs, in any order.
/// * Tensors from outside, such as weights, stay where they are: every run reads and writes the same memory. What was pending
///   on them before, or is computed for other threads, is no part of the step.
/// * Tensors that the code makes and keeps, other than by returning them, are those of the recorded run for good; so are numbers
///   that the host computes in it. `memory_stats` counts what a step holds.
/// * Random draws move on the generators that they come from: see [`Rng`](crate::Rng).
/// * Optimizers step at the rates of the recorded run, until [`Step::set_lr`] or [`Step::set_lrs`].
///
/// ```
/// use tiebeam::{Gpu, Step, Tensor};
///
/// let gpu = Gpu::open()?;
/// let x = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]);
/// let mut step = Step::record(&gpu, &[&x], |inputs| Ok(vec![inputs[0].square().sum_all()]))?;
/// assert_eq!(step.outputs()[0].item()?, 5.0);
/// let y = Tensor::from_slice(&gpu, &[3f32, 4.0], [2]);
/// assert_eq!(step.run(&[&y])?[0].item()?, 25.0);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Step {
    gpu: Gpu,
    capture: Capture,
    /// Where the recorded kernels read their inputs.
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    /// What optimizers step at from the next run on.
    rates: Vec<f32>,
}

impl Step {
    /// Runs `work` once on copies of `inputs` and keeps what it does. Its results are in [`Step::outputs`].
    ///
    /// # Errors
    /// `work`'s own, an input or output of another device, what an input or an op inside carries, the device's fault, a readback,
    /// a write from the host or an optimizer made inside `work`, and a step in a step.
    pub fn record(
        gpu: &Gpu,
        inputs: &[&Tensor],
        work: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<Step> {
        gpu.check()?;
        if let Some(i) = inputs.iter().position(|x| x.gpu() != gpu) {
            return Err(elsewhere("input", i, gpu, inputs[i]));
        }
        let (number, pool) = gpu.step_pool();
        let fixed: Vec<Tensor> = inputs
            .iter()
            .map(|x| {
                let buffer = gpu.alloc_in("step", x.dtype().buffer_bytes(x.count()), &pool);
                Tensor::from_place(gpu, *x.shape(), x.dtype(), Place { buffer, offset: 0 })
            })
            .collect();
        copy(gpu, inputs, &fixed)?;
        let (outputs, mut capture) = gpu.capture((number, pool.clone()), || {
            let made = work(&fixed)?;
            if let Some(i) = made.iter().position(|y| y.gpu() != gpu) {
                return Err(elsewhere("output", i, gpu, &made[i]));
            }
            Ok(made.iter().map(|y| output(y, &fixed)).collect::<Vec<_>>())
        })?;
        gpu.check()?;
        outputs.iter().try_for_each(Tensor::check)?;
        // Handed over once each, so that two outputs of one tensor stay one.
        let mut heirs: Vec<(Arc<Buffer>, Arc<Buffer>)> = Vec::new();
        let mut inherit = |x: &Tensor| {
            let Place { buffer, offset } = x.place();
            let known = heirs.iter().find(|(old, _)| Arc::ptr_eq(old, &buffer));
            let heir = known.map_or_else(|| gpu.heir(&buffer, &pool), |(_, heir)| heir.clone());
            heirs.push((buffer, heir.clone()));
            if Arc::ptr_eq(&heirs[heirs.len() - 1].0, &heir) {
                // A tensor from outside, which follows where an optimizer moves it.
                return x.clone();
            }
            Tensor::from_place(gpu, *x.shape(), x.dtype(), Place { buffer: heir, offset })
        };
        let inputs: Vec<Tensor> = fixed.iter().map(&mut inherit).collect();
        let handed: Vec<Tensor> = outputs.iter().map(&mut inherit).collect();
        let ours = heirs.drain(..).skip(inputs.len()).filter(|(old, heir)| !Arc::ptr_eq(old, heir));
        capture.set_results(ours.map(|(_, heir)| heir).collect());
        // What is held beyond these two lists is the code's own.
        drop((fixed, outputs));
        gpu.close(&pool);
        let rates = capture.rates().to_vec();
        Ok(Step { gpu: gpu.clone(), capture, inputs, outputs: handed, rates })
    }

    /// Runs the step on new inputs; gives [`Step::outputs`].
    ///
    /// # Errors
    /// When an input differs in shape or dtype from the recorded one or is on another device, which is named; what an input
    /// carries, or a tensor that the step uses. Then nothing is run. The device's fault.
    pub fn run(&mut self, inputs: &[&Tensor]) -> Result<&[Tensor]> {
        recording::refuse(&self.gpu, "a step run")?;
        if inputs.len() != self.inputs.len() {
            let (got, want) = (inputs.len(), self.inputs.len());
            return Err(Error::config(format!("Step: {got} inputs, recorded with {want}")));
        }
        for (i, (new, old)) in inputs.iter().zip(&self.inputs).enumerate() {
            if new.gpu() != &self.gpu {
                return Err(elsewhere("input", i, &self.gpu, new));
            }
            if new.shape() != old.shape() || new.dtype() != old.dtype() {
                return Err(Error::config(format!(
                    "Step: input {i} is {} {} and was recorded as {} {}; record another step for it",
                    new.shape(),
                    new.dtype(),
                    old.shape(),
                    old.dtype()
                )));
            }
        }
        self.rates.iter().try_for_each(|rate| check_rate(*rate))?;
        self.gpu.check()?;
        // What is pending on the last results wants those and not the next.
        self.gpu.settle(self.capture.results());
        copy(&self.gpu, inputs, &self.inputs)?;
        self.capture.replay(&self.rates)?;
        Ok(&self.outputs)
    }

    /// The results of the last run, the recorded one included. The next run writes over them: read them first, or take a
    /// [`Tensor::copy`].
    pub fn outputs(&self) -> &[Tensor] {
        &self.outputs
    }

    /// The learning rate of the first optimizer step inside, from the next run on; the rates of those after it keep their
    /// recorded ratio to it. [`Step::set_lrs`] sets each by itself.
    ///
    /// A rate that is negative or not finite is refused by the next run, as an optimizer refuses it, and so is a ratio to a
    /// recorded rate of 0. A step without optimizers takes no rate.
    pub fn set_lr(&mut self, lr: f32) {
        let recorded = self.capture.rates();
        let first = recorded.first().copied().unwrap_or_default();
        let scaled = |rate: &f32| match *rate == first {
            true => lr,
            false => (f64::from(lr) * f64::from(*rate) / f64::from(first)) as f32,
        };
        self.rates = recorded.iter().map(scaled).collect();
    }

    /// The learning rates of the optimizer steps inside, in the order in which the recorded code takes them, from the next run on.
    ///
    /// # Errors
    /// When there are not as many as [`Step::lrs`], or one is negative or not finite; then nothing is changed.
    pub fn set_lrs(&mut self, lrs: &[f32]) -> Result<()> {
        if lrs.len() != self.rates.len() {
            let (got, have) = (lrs.len(), self.rates.len());
            return Err(Error::config(format!("Step: {got} learning rates for {have} optimizer steps")));
        }
        lrs.iter().try_for_each(|lr| check_rate(*lr))?;
        self.rates = lrs.to_vec();
        Ok(())
    }

    /// The learning rates of the optimizer steps inside that the next run takes.
    pub fn lrs(&self) -> &[f32] {
        &self.rates
    }

    /// Kernels of one run.
    pub fn dispatches(&self) -> usize {
        self.capture.dispatches()
    }
}

fn elsewhere(what: &str, i: usize, gpu: &Gpu, tensor: &Tensor) -> Error {
    Error::config(format!(
        "Step: {what} {i} {} is of another Gpu than the step: {:?} and {gpu:?}; copy it over with to_vec and from_slice",
        tensor.shape(),
        tensor.gpu()
    ))
}

fn check_rate(rate: f32) -> Result<()> {
    if rate.is_finite() && rate >= 0.0 {
        return Ok(());
    }
    Err(Error::config(format!("Step: the learning rate is {rate}; use a finite number, 0 or more")))
}

/// An output with its elements in order, and in memory that is no input's: a run writes its inputs first, and they may be the
/// last run's outputs.
fn output(y: &Tensor, inputs: &[Tensor]) -> Tensor {
    let y = y.detach().contiguous();
    let buffer = y.place().buffer;
    if !inputs.iter().any(|x| Arc::ptr_eq(&x.place().buffer, &buffer)) {
        return y;
    }
    let copy = y.copy();
    copy.evaluate();
    copy
}

/// Copies elements into tensors of the same shapes and dtypes that own their memory; none when one of them carries an error.
fn copy(gpu: &Gpu, inputs: &[&Tensor], fixed: &[Tensor]) -> Result<()> {
    gpu.check()?;
    let dense: Vec<Tensor> = inputs.iter().map(|x| x.contiguous()).collect();
    let from: Vec<_> = dense.iter().map(Tensor::place).collect();
    let to: Vec<_> = fixed.iter().map(Tensor::place).collect();
    from.iter().chain(&to).try_for_each(|place| place.buffer.data().map(drop))?;
    for ((x, from), to) in dense.iter().zip(&from).zip(&to) {
        let bytes = x.dtype().buffer_bytes(x.count());
        gpu.copy(from, to, if x.count() > 0 { bytes } else { 0 });
    }
    Ok(())
}
