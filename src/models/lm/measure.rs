//! How well a language model predicts tokens.

use super::Lm;
use crate::error::{Error, Result};
use crate::tape::no_grad;
use crate::tensor::Tensor;

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
