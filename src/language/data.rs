//! What a language model is trained on and measured on.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::models::lm::{Lm, LmConfig};
use crate::rng::Rng;
use crate::tensor::Tensor;

/// Tokens for a [`Training`](super::Training): a [`Corpus`](super::Corpus), [`Examples`](super::Examples), or data of your own.
pub trait Data {
    /// Refuses a model that cannot be trained on this.
    ///
    /// # Errors
    /// [`crate::Error::Config`] with what does not fit.
    fn check(&self, model: &LmConfig) -> Result<()>;

    /// A number that tells different data apart, with high probability.
    fn id(&self) -> u128;

    /// Tokens and targets of step `step`, `[batch, tokens]` with up to `context` tokens. Targets of i32 may be
    /// [`IGNORED`](crate::models::lm::IGNORED).
    fn batch(&self, gpu: &Gpu, sizes: [usize; 2], step: u64, rng: &mut Rng) -> [Tensor; 2];

    /// Whether all batches have the same shape, so that a step can be recorded.
    fn is_even(&self) -> bool;

    /// The mean loss of held-out targets in nats, of about `limit` of them. `on` is told how many have been measured of how many.
    ///
    /// # Errors
    /// What `on` returns; when the device fails.
    fn measure(
        &self,
        model: &Lm,
        limit: usize,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<f64>;
}
