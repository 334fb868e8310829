//! How well a language model predicts tokens.

use super::Lm;
use crate::error::{Error, Result};
use crate::ranks::{Alone, Ranks, spread};
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
    evaluate_on(model, tokens, limit, &Alone, on)
}

/// [`evaluate`] on several ranks, which share the windows. All get the result, with the bits of one rank.
///
/// # Errors
/// As [`evaluate`], on every rank.
pub fn evaluate_on(
    model: &Lm,
    tokens: &[u32],
    limit: usize,
    ranks: &dyn Ranks,
    on: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<f64> {
    let context = model.config.context;
    let count = tokens.len().saturating_sub(1).min(limit);
    if count == 0 {
        return Err(Error::config("there are no held-out tokens to measure on"));
    }
    let (mut batches, mut at) = (Vec::new(), 0);
    while at < count {
        // Batches of whole windows come first. The rest is one shorter row.
        let left = count - at;
        let [rows, length] = if left >= context { [(left / context).min(ROWS), context] } else { [1, left] };
        batches.push((at, rows, length));
        at += rows * length;
    }
    let sums = spread(ranks, batches.len(), |i| {
        let (at, rows, length) = batches[i];
        let n = rows * length;
        let part = |from: usize| Tensor::from_slice(model.gpu(), &tokens[from..from + n], [rows, length]);
        let sum = summed(model, &part(at), &part(at + 1))?;
        on(at + n, count)?;
        Ok(sum)
    })?;
    // In order, so that any number of ranks gives the same bits.
    Ok(sums.iter().fold(0.0, |sum, own| sum + own) / count as f64)
}

/// The sum of the losses of all tokens. Scores are as wide as the vocabulary, so that those of many tokens may be too large for the
/// device; they are then computed of some tokens at a time.
fn summed(model: &Lm, tokens: &Tensor, targets: &Tensor) -> Result<f64> {
    let n = tokens.count();
    let most = (model.gpu().adapter().max_binding / 8) as usize / model.config.vocab.max(1);
    if n <= most {
        let loss = no_grad(|| model.loss(tokens, targets));
        return Ok(f64::from(loss.item()?) * n as f64);
    }
    let hidden = no_grad(|| model.hidden(tokens));
    let (width, targets) = (model.config.width, targets.reshape([n]));
    let hidden = hidden.reshape([n, width]);
    let mut sum = 0.0;
    for first in (0..n).step_by(most.max(1)) {
        let end = (first + most.max(1)).min(n);
        let loss = no_grad(|| {
            let part = hidden.slice(0, first..end).contiguous().reshape([1, end - first, width]);
            model
                .logits(&part)
                .reshape([end - first, model.config.vocab])
                .cross_entropy(&targets.slice(0, first..end), None)
        });
        sum += f64::from(loss.item()?) * (end - first) as f64;
    }
    Ok(sum)
}
