//! The text: bytes to train on, held-out bytes, and baselines that predict these by counting.

use std::path::Path;
use tiebeam::{Error, Result, Rng};

/// Trained and held-out bytes.
pub struct Text {
    pub train: Vec<u8>,
    pub held_out: Vec<u8>,
}

impl Text {
    /// Splits off the last tenth, which is held out.
    pub fn new(bytes: Vec<u8>, name: &str, context: usize) -> Result<Text> {
        let cut = bytes.len() - bytes.len() / 10;
        let shortest = cut.min(bytes.len() - cut);
        if shortest < context + 1 {
            return Err(Error::config(format!(
                "{name}: {} bytes are too few: the held-out tenth must exceed one context of {context} bytes; \
                     give a text of at least {} bytes or a smaller --context",
                bytes.len(),
                10 * (context + 2)
            )));
        }
        Ok(Text { held_out: bytes[cut..].to_vec(), train: bytes[..cut].to_vec() })
    }

    pub fn read(path: &Path, context: usize) -> Result<Text> {
        let failed = |message: String| Error::io(path, std::io::Error::other(message));
        let bytes =
            std::fs::read(path).map_err(|e| failed(format!("{e}; --text names the file to train on")))?;
        if bytes.is_empty() {
            return Err(failed("the file is empty; give a text to train on".into()));
        }
        Text::new(bytes, &path.display().to_string(), context)
    }

    /// Draws `batch` random windows of the training part. Returns their tokens, and the same one byte later as targets.
    pub fn batch(&self, batch: usize, context: usize, rng: &mut Rng) -> (Vec<u32>, Vec<u32>) {
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..batch {
            let start = rng.below(self.train.len() - context);
            let window = &self.train[start..start + context + 1];
            tokens.extend(window[..context].iter().map(|&b| b as u32));
            targets.extend(window[1..].iter().map(|&b| b as u32));
        }
        (tokens, targets)
    }
}

/// Returns the loss of two baselines on the held-out part (without its first byte), in nats per byte. One predicts by counts of
/// single bytes in the training part, the other by counts of pairs, both with add-one smoothing.
pub fn baselines(text: &Text) -> (f64, f64) {
    let mut single = vec![1u64; 256];
    let mut pair = vec![1u64; 256 * 256];
    text.train.iter().for_each(|&b| single[b as usize] += 1);
    text.train.windows(2).for_each(|w| pair[w[0] as usize * 256 + w[1] as usize] += 1);
    let total: u64 = single.iter().sum();
    let after: Vec<u64> = pair.chunks(256).map(|row| row.iter().sum()).collect();
    let (mut unigram, mut bigram) = (0.0, 0.0);
    for w in text.held_out.windows(2) {
        let (a, b) = (w[0] as usize, w[1] as usize);
        unigram -= (single[b] as f64 / total as f64).ln();
        bigram -= (pair[a * 256 + b] as f64 / after[a] as f64).ln();
    }
    let n = (text.held_out.len() - 1) as f64;
    (unigram / n, bigram / n)
}

/// Returns sampled bytes as text. Invalid UTF-8 becomes the replacement character, and control characters become dots.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() && c != '\n' { '.' } else { c }).collect()
}
