//! Checkpointing: activations that the backward pass recomputes instead of keeping them.

use super::{Edge, Node, Op, Saved, Sink, is_recording, next_id, no_grad, set_paused};
use crate::precision::{Precision, autocast, precision};
use crate::tensor::Tensor;

struct Checkpoint<F> {
    inputs: Vec<Saved>,
    tracked: Vec<bool>,
    /// That of the scope in which it ran, for the second time.
    precision: Precision,
    work: F,
}

impl<F: Fn(&[Tensor]) -> Tensor + Send + Sync> Op for Checkpoint<F> {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn takes_half(&self) -> bool {
        true
    }

    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let inputs: Vec<Tensor> = self
            .inputs
            .iter()
            .zip(&self.tracked)
            .map(|(saved, &tracked)| {
                let tensor = saved.get("checkpoint").clone();
                if tracked { tensor.requires_grad() } else { tensor }
            })
            .collect();
        let floor = next_id();
        let output = autocast(self.precision, || set_paused(false, || (self.work)(&inputs)));
        let grads = sink.inner(&[output], dy, &inputs, floor);
        for (i, dx) in grads.into_iter().enumerate() {
            if let Some(dx) = dx {
                sink.add(i, dx);
            }
        }
    }
}

/// Runs `work` on `inputs` without keeping its intermediate results. The backward pass runs it again.
///
/// Instead of the activations of the whole closure, only its inputs are kept, at the price of a second forward pass.
/// `work` must give the same result both times, so random draws inside it must come from a generator that it copies.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::checkpoint;
/// let w = Tensor::from_slice(&gpu, &[3f32], [1]).requires_grad();
/// let y = checkpoint(&[&w], |inputs| inputs[0].square().square()); // w^4, without keeping w^2
/// let grads = y.sum_all().backward()?;
/// assert_eq!(grads.get(&w).unwrap().item()?, 108.0); // 4 w^3
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn checkpoint<F>(inputs: &[&Tensor], work: F) -> Tensor
where
    F: Fn(&[Tensor]) -> Tensor + Send + Sync + 'static,
{
    let detached: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    if !is_recording() {
        return work(&detached);
    }
    let output = no_grad(|| work(&detached)).detach();
    let node = Checkpoint {
        inputs: inputs.iter().map(|t| Saved::new(t)).collect(),
        tracked: inputs.iter().map(|t| t.is_tracked()).collect(),
        precision: precision(),
        work,
    };
    // Recorded even if no input is tracked, because the closure may capture leaves.
    let node = Node::of(Box::new(node), inputs);
    Tensor { edge: Some(Edge { node, output: 0 }), ..output }
}
