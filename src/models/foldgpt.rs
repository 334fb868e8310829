//! FoldGPT: learned gates tell which blocks matter. The others are removed, and neighbours share one block's matrices.
//!
//! 1. Each block has a gate in 0 to 1, `x + g (block(x) - x)`, trained with a polarisation that drives gates to 0 or 1 under a
//!    budget. All gates are trained together, so a block's gate tells what it is worth beside the others (their
//!    coupling).
//! 2. Blocks with small gates are removed. Neighbours among the rest form groups that use the matrices of the group's
//!    first block, and each depth keeps its own norms.
//! 3. A short training with distillation of the tail repairs the damage.
//!
//! Source: arXiv 2407.00928.

use crate::error::Result;
use crate::models::lm::Lm;
use crate::nn::{distillation, module};
use crate::tensor::Tensor;

/// A model whose blocks have gates.
#[non_exhaustive]
pub struct Gated {
    /// The model.
    pub model: Lm,
    /// One scalar `[1]` per block, initially 1.
    pub gates: Vec<Tensor>,
}

impl Gated {
    /// Gives `model` gates of 1, with which it computes the same as before.
    pub fn new(model: Lm) -> Gated {
        let gpu = model.gpu();
        let gates = model.blocks.iter().map(|_| Tensor::ones(gpu, [1]).requires_grad()).collect();
        Gated { gates, model }
    }

    /// Scores of the next token, as in [`Lm::forward`], with every block's change multiplied by its gate.
    #[track_caller]
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        let x = self.model.hidden_through(tokens, |t, seen| {
            seen.before.add(&seen.stream.sub(seen.before).mul(&self.gates[t].clamp(0.0, 1.0)))
        });
        self.model.logits(&x)
    }

    /// Gates count within 0 and 1, here and in the pass.
    ///
    /// Returns the term that training adds to the loss: `strength * (t mean|g| - mean|g - mean g|) + (mean g - keep)^2`.
    ///
    /// The first part (the polarisation regulariser of neuron pruning) is least when gates are at the ends of their
    /// range; as means here, so that the strength does not depend on the depth. The second is ours, in the place of the paper's bound on
    /// the flops: it keeps the mean gate, and with it the share of blocks that remain, at `keep`.
    pub fn penalty(&self, strength: f32, t: f32, keep: f32) -> Tensor {
        let all = Tensor::concat(&self.gates.iter().collect::<Vec<_>>(), 0).clamp(0.0, 1.0);
        let mean = all.mean_all();
        let spread = all.sub(&mean).abs().mean_all();
        let polar = all.abs().mean_all().scale(t).sub(&spread).scale(strength);
        polar.add(&mean.affine(1.0, -keep).square())
    }

    /// Returns the gates as numbers within 0 and 1.
    ///
    /// # Errors
    /// When the device fails.
    pub fn values(&self) -> Result<Vec<f32>> {
        self.gates.iter().map(|gate| gate.clamp(0.0, 1.0).item()).collect()
    }

    /// Returns the model without the blocks in `removed`. The others form groups of `group` neighbours that share the
    /// matrices of the first, and each keeps its own norms. Their gates are near 1 and are dropped.
    ///
    /// # Errors
    /// As [`Lm::folded`].
    pub fn fold(&self, removed: &[usize], group: usize) -> Result<Lm> {
        self.model.folded(removed, group)
    }
}

/// Returns the blocks from the least important to the most, by the values of their gates.
///
/// ```
/// assert_eq!(tiebeam::models::foldgpt::ranking(&[0.9, 0.0, 0.7]), [1, 2, 0]);
/// ```
pub fn ranking(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    order
}

/// Returns the loss of the repair: `KL(teacher || student)` of the scores at temperature `t`, times `t^2`, plus the mean
/// squared differences of the last `tail` hidden states, counted from the end. The teacher gets no gradient.
///
/// # Panics
/// When `tail` is more than either model's depth.
#[track_caller]
pub fn tail_distillation(student: &Lm, teacher: &Lm, tokens: &Tensor, t: f32, tail: usize) -> Tensor {
    let theirs = crate::no_grad(|| teacher.streams(tokens));
    let ours = student.streams(tokens);
    assert!(
        tail <= ours.len() && tail <= theirs.len(),
        "tail distillation: {tail} of {} and {} depths",
        ours.len(),
        theirs.len()
    );
    let goal = crate::no_grad(|| teacher.logits(&theirs[theirs.len() - 1]));
    let kl = distillation(&student.logits(&ours[ours.len() - 1]), &goal, t);
    (1..=tail).fold(kl, |sum, i| {
        let (a, b) = (&ours[ours.len() - i], &theirs[theirs.len() - i]);
        sum.add(&a.sub(&b.detach()).square().mean_all())
    })
}

module!(Gated { model, gates });
