//! A step of fixed shapes, recorded once and replayed without running the code that made it.
//!
//! A replay encodes the same kernels on the same buffers: no shapes are checked, no buffers taken, no graph is built. What
//! a step changes by itself goes on as if its code had run: an optimizer counts its steps, dropout and `randn` take the
//! streams that come next.

use crate::error::{Error, Result};
use crate::gpu::capture::Capture;
use crate::gpu::{Gpu, lock};
use crate::tensor::Tensor;

/// A recorded step.
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
    lr: Option<f32>,
}

impl Step {
    /// Runs `work` once on copies of `inputs` and keeps what it does. Its results are in [`Step::outputs`].
    ///
    /// Tensors that `work` uses and that are not among its inputs, such as weights, stay where they are: every replay
    /// reads and writes the same memory. Values that the host computes in `work`, such as a scalar or a slice's range,
    /// are those of the recorded run for ever.
    ///
    /// # Errors
    /// `work`'s own, an input of another device, what an input or an op inside carries, the device's fault, a readback or a
    /// write from the host inside `work`, and a step in a step.
    pub fn record(
        gpu: &Gpu,
        inputs: &[&Tensor],
        work: impl FnOnce(&[Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<Step> {
        gpu.check()?;
        if let Some(i) = inputs.iter().position(|x| x.gpu() != gpu) {
            return Err(elsewhere(i, gpu, inputs[i]));
        }
        let fixed: Vec<Tensor> =
            inputs.iter().map(|x| Tensor::empty(gpu, "step", x.shape(), x.dtype())).collect();
        copy(gpu, inputs, &fixed)?;
        // What is pending outside is made once, before: computed inside, it would be a kernel of every replay.
        gpu.settle_all();
        let (outputs, capture) = gpu.capture(|| {
            let outputs: Vec<Tensor> = work(&fixed)?.iter().map(|y| y.detach().contiguous()).collect();
            outputs.iter().for_each(Tensor::evaluate);
            Ok(outputs)
        })?;
        gpu.check()?;
        outputs.iter().try_for_each(Tensor::check)?;
        Ok(Step { gpu: gpu.clone(), capture, inputs: fixed, outputs, lr: None })
    }

    /// Runs the step on new inputs; gives [`Step::outputs`].
    ///
    /// # Errors
    /// When an input differs in shape or dtype from the recorded one or is on another device, which is named; what an input
    /// carries, or a tensor that the step uses. Then nothing is run. The device's fault.
    pub fn run(&mut self, inputs: &[&Tensor]) -> Result<&[Tensor]> {
        if inputs.len() != self.inputs.len() {
            let (got, want) = (inputs.len(), self.inputs.len());
            return Err(Error::config(format!("Step: {got} inputs, recorded with {want}")));
        }
        for (i, (new, old)) in inputs.iter().zip(&self.inputs).enumerate() {
            if new.gpu() != &self.gpu {
                return Err(elsewhere(i, &self.gpu, new));
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
        // What is pending on the last results wants those and not the next.
        let places: Vec<_> = self.outputs.iter().map(|y| y.place().buffer).collect();
        self.gpu.settle(&places);
        copy(&self.gpu, inputs, &self.inputs)?;
        self.capture.replay(self.lr)?;
        places.iter().for_each(|buffer| buffer.touch());
        Ok(&self.outputs)
    }

    /// The results of the last run, the recorded one included. The next run writes over them: read or copy them first.
    pub fn outputs(&self) -> &[Tensor] {
        &self.outputs
    }

    /// The learning rate of all optimizer steps inside, from the next run on.
    pub fn set_lr(&mut self, lr: f32) {
        self.lr = Some(lr);
    }

    /// Kernels of one run.
    pub fn dispatches(&self) -> usize {
        self.capture.dispatches()
    }
}

fn elsewhere(i: usize, gpu: &Gpu, input: &Tensor) -> Error {
    Error::config(format!(
        "Step: input {i} {} is on {:?}, the step on {gpu:?}; copy it over with to_vec and from_slice",
        input.shape(),
        input.gpu()
    ))
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
        if x.count() > 0 {
            gpu.settle(std::slice::from_ref(&to.buffer));
            let (a, b) = (from.buffer.data()?, to.buffer.data()?);
            let mut recorder = lock(&gpu.0.recorder);
            recorder.encoder(gpu).copy_buffer_to_buffer(a, from.offset, b, to.offset, bytes);
        }
    }
    Ok(())
}
