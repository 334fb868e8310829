//! How well a model predicts a text.

use crate::error::{Error, Result};
use crate::models::lm::Lm;
use crate::tape::no_grad;
use crate::tensor::Tensor;
#[cfg(feature = "text")]
use crate::text::Words;

/// The last tokens of a text, in windows that are predicted each by itself.
///
/// ```
/// use tiebeam::decode::Windows;
/// let windows = Windows::of_tokens((0..10).collect(), None, 2, 4)?; // the last 2 windows of 4 tokens
/// assert_eq!((windows.count(), windows.length()), (2, 4));
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of each window, and the token behind it.
    windows: Vec<Vec<u32>>,
    before: Vec<u32>,
    length: usize,
}

impl Windows {
    /// The last `count` windows of `length` tokens of a text. The first token of each is BOS if the model has one, because it
    /// expects that at the start of whatever it reads.
    ///
    /// # Errors
    /// [`Error::Config`] when the text is shorter, with how many tokens it has and needs, and as [`Words::encode`].
    #[cfg(feature = "text")]
    pub fn of_text(words: &Words, text: &str, count: usize, length: usize) -> Result<Windows> {
        Windows::of_tokens(words.encode(text)?, words.bos(), count, length)
    }

    /// [`Windows::of_text`] of tokens.
    ///
    /// # Errors
    /// [`Error::Config`] when there are fewer tokens, or for windows of no tokens.
    pub fn of_tokens(mut tokens: Vec<u32>, bos: Option<u32>, count: usize, length: usize) -> Result<Windows> {
        let need =
            count.checked_mul(length).and_then(|n| n.checked_add(1)).filter(|_| count > 0 && length > 0);
        let need = need.ok_or_else(|| Error::config(format!("{count} windows of {length} tokens")))?;
        let has = tokens.len();
        let cut = has.checked_sub(need).ok_or_else(|| {
            Error::config(format!("the text has {has} tokens; {count} windows of {length} need {need}"))
        })?;
        let window = |w: usize| {
            let mut window = tokens[cut + w * length..][..length + 1].to_vec();
            window[0] = bos.unwrap_or(window[0]);
            window
        };
        let windows = (0..count).map(window).collect();
        tokens.truncate(cut);
        Ok(Windows { windows, before: tokens, length })
    }

    /// Number of windows.
    pub fn count(&self) -> usize {
        self.windows.len()
    }

    /// Tokens of a window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The tokens of the windows, one behind the other.
    pub fn tokens(&self) -> Vec<u32> {
        let length = self.length;
        self.windows.iter().flat_map(|window| &window[..length]).copied().collect()
    }

    /// The tokens of the text before the windows.
    pub fn before(&self) -> &[u32] {
        &self.before
    }
}

/// Returns `exp` of the mean loss over the windows, in nats per token. Scores of one window are in memory at a time. `on_window` is
/// called behind each window with its index.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When a window has more tokens than the model's context.
#[track_caller]
pub fn perplexity(model: &Lm, windows: &Windows, mut on_window: impl FnMut(usize)) -> Result<f64> {
    perplexity_with(model, windows, |window, _| {
        on_window(window);
        Ok(())
    })
}

/// [`perplexity`], which also shows `see` the residual stream `[1, tokens, width]` behind the last block of each window. An error of
/// `see` ends it.
///
/// # Errors
/// As [`perplexity`], and those of `see`.
///
/// # Panics
/// As [`perplexity`].
#[track_caller]
pub fn perplexity_with(
    model: &Lm,
    windows: &Windows,
    mut see: impl FnMut(usize, &Tensor) -> Result<()>,
) -> Result<f64> {
    let mut sum = 0.0;
    for (w, window) in windows.windows.iter().enumerate() {
        let gpu = model.gpu();
        let [x, y] = [0, 1]
            .map(|from| Tensor::from_slice(gpu, &window[from..][..windows.length], [1, windows.length]));
        let (stream, loss) = no_grad(|| {
            let stream = model.hidden(&x);
            let loss = model.logits(&stream).cross_entropy(&y, None);
            (stream, loss)
        });
        sum += f64::from(loss.item()?);
        see(w, &stream)?;
    }
    Ok((sum / windows.count() as f64).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_the_end_of_a_text() {
        let windows = Windows::of_tokens((0..12).collect(), Some(99), 2, 4).expect("12 tokens are enough");
        assert_eq!(windows.before(), [0, 1, 2]);
        assert_eq!(windows.windows, [[99, 4, 5, 6, 7], [99, 8, 9, 10, 11]]);
        assert_eq!((windows.count(), windows.length()), (2, 4));
        let plain = Windows::of_tokens((0..12).collect(), None, 2, 4).expect("12 tokens are enough");
        assert_eq!(plain.windows[1], [7, 8, 9, 10, 11]);
        let short = Windows::of_tokens((0..8).collect(), None, 2, 4).unwrap_err().to_string();
        assert!(short.contains("the text has 8 tokens; 2 windows of 4 need 9"), "{short}");
        for (count, length) in [(0, 4), (2, 0), (usize::MAX, 2)] {
            assert!(Windows::of_tokens((0..8).collect(), None, count, length).is_err());
        }
    }
}
