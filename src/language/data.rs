//! What a language model is trained on and measured on.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{Lm, LmConfig};
use crate::rng::Rng;
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// Tokens for a [`Training`](super::Training): a [`Corpus`](super::Corpus), [`Examples`](super::Examples), or data of your own.
pub trait Data {
    /// Refuses a model that cannot be trained on this.
    ///
    /// # Errors
    /// [`Error::Config`] with what does not fit.
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

/// Rows that are measured at a time.
const ROWS: usize = 16;

/// Returns the mean loss in nats over the tokens but the first, at most `limit` of them, in windows of one context that are predicted each
/// by itself. `on` is told how many have been measured of how many.
///
/// # Errors
/// [`Error::Config`] when there are fewer than two tokens; what `on` returns; when the device fails.
pub fn evaluate(
    model: &Lm,
    tokens: &[u32],
    limit: usize,
    on: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<f64> {
    let context = model.config.context;
    let count = tokens.len().saturating_sub(1).min(limit);
    if count == 0 {
        return Err(Error::config("there are no held-out tokens to measure on"));
    }
    let (mut sum, mut at) = (0.0, 0);
    while at < count {
        // Batches of whole windows come first. The rest is one shorter row.
        let left = count - at;
        let [rows, length] = if left >= context { [(left / context).min(ROWS), context] } else { [1, left] };
        let n = rows * length;
        let part = |from: usize| Tensor::from_slice(model.gpu(), &tokens[from..from + n], [rows, length]);
        let loss = no_grad(|| model.loss(&part(at), &part(at + 1)));
        sum += f64::from(loss.item()?) * n as f64;
        at += n;
        on(at, count)?;
    }
    Ok(sum / count as f64)
}
