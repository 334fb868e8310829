//! A step of fixed shapes, which is recorded once and replayed without running the code that made it.
//!
//! A replay encodes the same kernels on the same buffers: it checks no shapes, allocates no buffers and builds no
//! graph. State that a step advances goes on as if its code had run: an optimizer counts its steps, and random
//! generators move on.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::buffer::Buffer;
use crate::gpu::capture::{Capture, Tap};
use crate::gpu::readback::Reading;
use crate::gpu::recording;
use crate::gpu::value::Place;
use crate::tensor::Tensor;
use std::sync::Arc;

/// A recorded step.
///
/// The recording holds what the calling thread does with this device. Each run gives what the recorded code would give
/// if it ran again on these inputs:
///
/// * [`Step::outputs`] are the results of the last run, and may be the next run's inputs, in any order.
/// * Tensors from outside, such as weights, stay where they are: every run reads and writes the same memory. Values
///   that were pending before, or that are computed for other threads, are not part of the step.
/// * Tensors that the code makes and keeps, other than by returning them, permanently hold the elements of the recorded
///   run. Numbers that the host computes in the code stay those of the recorded run too. `memory_stats` counts what a
///   step holds.
/// * Random draws advance the generators that they come from: see [`Rng`](crate::Rng).
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
    /// The learning rates of optimizers from the next run on.
    rates: Vec<f32>,
}

impl Step {
    /// Runs `work` once on copies of `inputs` and records what it does. Its results are in [`Step::outputs`].
    ///
    /// # Errors
    /// The error of `work`, an input or output on another device, an error that an input or an op inside carries, or
    /// the device's fault. Also a readback, a write from the host, an optimizer made inside `work`, or a step recorded
    /// inside a step.
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
        // Each buffer is handed over once, so that two outputs that share a buffer still do.
        let mut heirs: Vec<(Arc<Buffer>, Arc<Buffer>)> = Vec::new();
        let mut inherit = |x: &Tensor| {
            let Place { buffer, offset } = x.place();
            let known = heirs.iter().find(|(old, _)| Arc::ptr_eq(old, &buffer));
            let heir = known.map_or_else(|| gpu.heir(&buffer, &pool), |(_, heir)| heir.clone());
            heirs.push((buffer, heir.clone()));
            if Arc::ptr_eq(&heirs[heirs.len() - 1].0, &heir) {
                // A tensor from outside. Its handle stays valid if an optimizer moves the elements.
                return x.clone();
            }
            Tensor::from_place(gpu, *x.shape(), x.dtype(), Place { buffer: heir, offset })
        };
        let inputs: Vec<Tensor> = fixed.iter().map(&mut inherit).collect();
        let handed: Vec<Tensor> = outputs.iter().map(&mut inherit).collect();
        let ours = heirs.drain(..).skip(inputs.len()).filter(|(old, heir)| !Arc::ptr_eq(old, heir));
        capture.set_results(ours.map(|(_, heir)| heir).collect());
        // Buffers of the pool that are still held after this are held by the recorded code.
        drop((fixed, outputs));
        gpu.close(&pool);
        let rates = capture.rates().to_vec();
        Ok(Step { gpu: gpu.clone(), capture, inputs, outputs: handed, rates })
    }

    /// Runs the step on new inputs and returns [`Step::outputs`].
    ///
    /// # Errors
    /// If an input differs from the recorded one in shape or dtype or is on another device (the error names it), if a
    /// learning rate is negative or not finite, if an input or a tensor that the step uses carries an error, or if the
    /// device has a fault. Then nothing runs.
    pub fn run(&mut self, inputs: &[&Tensor]) -> Result<&[Tensor]> {
        self.run_reading(inputs, &[])?;
        Ok(&self.outputs)
    }

    /// [`Step::run`] that begins to read what `taps` name as soon as the step has made it. They are sorted by their places in the step.
    pub(crate) fn run_reading(&mut self, inputs: &[&Tensor], taps: &[Tap]) -> Result<Vec<Reading>> {
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
        if self.gpu.plan_number().is_some() {
            return Ok(Vec::new());
        }
        // Values that are pending on the last results need these, not the next ones.
        self.gpu.settle(self.capture.results());
        copy(&self.gpu, inputs, &self.inputs)?;
        self.capture.replay(&self.rates, taps)
    }

    /// The results of the last run, which may be the recorded one. The next run overwrites them, so read them first, or
    /// take a [`Tensor::copy`].
    pub fn outputs(&self) -> &[Tensor] {
        &self.outputs
    }

    /// Sets the learning rate of the first optimizer step inside, from the next run on. The rates of later optimizer
    /// steps keep their recorded ratio to it. [`Step::set_lrs`] sets each rate separately.
    ///
    /// The next run refuses a rate that is negative or not finite, as an optimizer does, and a ratio to a recorded rate
    /// of 0. A step without optimizers has no rates to set.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Step;
    /// use tiebeam::optim::{Group, Sgd, SgdConfig};
    /// let w = Tensor::from_slice(&gpu, &[1f32], [1]).requires_grad();
    /// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
    /// let mut step = Step::record(&gpu, &[], |_| {
    ///     sgd.step(&w.sum_all().backward()?, 0.5)?;
    ///     Ok(vec![])
    /// })?; // 1 - 0.5
    /// step.set_lr(0.25);
    /// step.run(&[])?;
    /// assert_eq!(w.item()?, 0.25);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn set_lr(&mut self, lr: f32) {
        let recorded = self.capture.rates();
        let first = recorded.first().copied().unwrap_or_default();
        let scaled = |rate: &f32| match *rate == first {
            true => lr,
            false => (f64::from(lr) * f64::from(*rate) / f64::from(first)) as f32,
        };
        self.rates = recorded.iter().map(scaled).collect();
    }

    /// Sets the learning rates of the optimizer steps inside, in the order in which the recorded code takes them, from
    /// the next run on.
    ///
    /// # Errors
    /// If there are not as many as [`Step::lrs`], or one is negative or not finite. Then nothing is changed.
    pub fn set_lrs(&mut self, lrs: &[f32]) -> Result<()> {
        if lrs.len() != self.rates.len() {
            let (got, have) = (lrs.len(), self.rates.len());
            return Err(Error::config(format!("Step: {got} learning rates for {have} optimizer steps")));
        }
        lrs.iter().try_for_each(|lr| check_rate(*lr))?;
        self.rates = lrs.to_vec();
        Ok(())
    }

    /// The learning rates of the optimizer steps inside, as the next run uses them.
    pub fn lrs(&self) -> &[f32] {
        &self.rates
    }

    /// The number of dispatches in one run.
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

/// Returns an output with its elements in order, in memory that is not an input's: a run writes its inputs first, and
/// these may be the last run's outputs.
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

/// Copies elements into tensors of the same shapes and dtypes that own their memory. Copies none if one of the inputs
/// carries an error. What became of the last run's copies does not matter.
fn copy(gpu: &Gpu, inputs: &[&Tensor], fixed: &[Tensor]) -> Result<()> {
    gpu.check()?;
    let dense: Vec<Tensor> = inputs.iter().map(|x| x.contiguous()).collect();
    let bytes = |x: &Tensor| if x.count() > 0 { x.dtype().buffer_bytes(x.count()) } else { 0 };
    let copies = dense.iter().zip(fixed).map(|(x, to)| (x.place(), to.place(), bytes(x)));
    gpu.copy_all(&copies.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::gpu::kernel::Launch;
    use crate::gpu::lock;
    use crate::gpu::shader::Source;

    /// A tensor whose kernel the driver refuses.
    fn refused(gpu: &Gpu) -> Tensor {
        let text = "@group(0) @binding(0) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(8192)
fn main(@builtin(global_invocation_id) id: vec3<u32>) { y[id.x % 2u] = 1.0; }
";
        let (source, y) =
            (Source::text("impossible", text.to_string()), Tensor::empty(gpu, "test", [2], DType::F32));
        gpu.launch(Launch::new("test", &source, "main", [1; 3]).bind_mut("y", &y).turns(0));
        y
    }

    /// What became of a run's inputs is no concern of the next run.
    #[test]
    fn a_step_runs_again_after_inputs_that_were_not_computed() {
        let gpu = Gpu::open().unwrap();
        let [x, y] = [[1f32, 2.0], [3.0, 4.0]].map(|v| Tensor::from_slice(&gpu, &v, [2]));
        let sum = |inputs: &[Tensor]| Ok(vec![inputs[0].add(&inputs[1].square()).sum_all()]);
        let mut step = Step::record(&gpu, &[&x, &y], sum).unwrap();
        let want = 28.0;
        assert_eq!(step.outputs()[0].item().unwrap(), want);
        let error = step.run(&[&x, &refused(&gpu)]).map(drop).unwrap_err();
        assert!(error.to_string().contains("impossible (test)"), "{error}");
        assert!(gpu.take_fault().is_some());
        assert_eq!(step.outputs()[0].item().unwrap(), want, "nothing ran");
        assert_eq!(step.run(&[&x, &y]).unwrap()[0].item().unwrap(), want);
        // The same for a batch that is lost with the copies of the inputs.
        step.run(&[&y, &x]).unwrap();
        let raw = x.place().buffer.data().unwrap().clone();
        lock(&gpu.0.recorder).encoder(&gpu).unwrap().copy_buffer_to_buffer(&raw, 0, &raw, 0, 4);
        assert!(gpu.synchronize().is_err() && gpu.take_fault().is_some());
        assert!(step.outputs()[0].item().is_err());
        assert_eq!(step.run(&[&x, &y]).unwrap()[0].item().unwrap(), want);
    }
}
