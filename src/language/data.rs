//! What a language model is trained on and measured on.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::models::lm::{Lm, LmConfig};
use crate::ranks::Ranks;
use crate::rng::Rng;
use crate::tensor::Tensor;
use std::ops::Range;

/// Some rows of a step's batch.
#[derive(Clone, Debug)]
pub struct Part {
    /// `[rows, tokens]`
    pub tokens: Tensor,
    /// `[rows, tokens]`. Targets of i32 may be [`IGNORED`](crate::models::lm::IGNORED).
    pub targets: Tensor,
    /// How much its mean loss counts beside those of the other parts, on average 1: in proportion to the number of targets.
    pub weight: f32,
}

/// Tokens for a [`Training`](super::Training): a [`Corpus`](super::Corpus), [`Examples`](super::Examples), or data of your own.
pub trait Data {
    /// Refuses a model that cannot be trained on this.
    ///
    /// # Errors
    /// [`crate::Error::Config`] with what does not fit.
    fn check(&self, model: &LmConfig) -> Result<()>;

    /// A number that tells different data apart, with high probability.
    fn id(&self) -> u128;

    /// The batch of step `step`, of `[batch, context]` tokens at most, cut into so many parts of nearly equal size by
    /// [`share`](crate::ranks::share). Returns those that are wanted. What is drawn from the generator is drawn for the whole batch, so that
    /// all ranks of a training have the same generator, whatever their parts.
    fn batch(
        &self,
        gpu: &Gpu,
        sizes: [usize; 2],
        parts_wanted: (usize, Range<usize>),
        step: u64,
        rng: &mut Rng,
    ) -> Vec<Part>;

    /// Whether all batches have the same shape, so that a step can be recorded.
    fn is_even(&self) -> bool;

    /// The mean loss of held-out targets in nats, of about `limit` of them. The ranks share the work, and all get the result. `on` is told
    /// how many have been measured of how many.
    ///
    /// # Errors
    /// What `on` returns, on every rank; when the device fails.
    fn measure(
        &self,
        model: &Lm,
        limit: usize,
        ranks: &dyn Ranks,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<f64>;
}
