//! A text as tokens, of which a part is held out.

use super::data::{Data, Part};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{Lm, LmConfig, evaluate_on};
use crate::ranks::{Ranks, share};
use crate::rng::Rng;
use crate::tensor::Tensor;
#[cfg(feature = "text")]
use crate::text::Words;
use std::ops::Range;
use std::path::{Path, PathBuf};
use twox_hash::XxHash3_128;

/// Tokens to train on, and tokens that are held out.
///
/// ```
/// use tiebeam::language::Corpus;
/// let corpus = Corpus::new((0..1000).map(|i| i % 7).collect(), 7)?;
/// assert_eq!((corpus.train().len(), corpus.held_out().len()), (900, 100)); // the last tenth
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    train: Vec<u32>,
    held_out: Vec<u32>,
    vocab: usize,
    /// Bytes of the held-out text for each of its tokens, if they are known.
    bytes: Option<f64>,
}

/// Reads files one behind the other.
fn read(paths: &[PathBuf]) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for path in paths {
        let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        if bytes.is_empty() {
            let empty = std::io::Error::other("the file is empty; give a text to train on");
            return Err(Error::io(path, empty));
        }
        all.extend(bytes);
    }
    Ok(all)
}

impl Corpus {
    /// Makes a corpus of tokens below `vocab`, whose last tenth is held out.
    ///
    /// # Errors
    /// [`Error::Config`] for a token that is not in the vocabulary, and when a part would have fewer than two tokens.
    pub fn new(mut tokens: Vec<u32>, vocab: usize) -> Result<Corpus> {
        let held_out = tokens.split_off(tokens.len() - tokens.len() / 10);
        Corpus::of_parts(tokens, held_out, vocab)
    }

    /// [`Corpus::new`] with held-out tokens of their own.
    ///
    /// # Errors
    /// As [`Corpus::new`].
    pub fn of_parts(train: Vec<u32>, held_out: Vec<u32>, vocab: usize) -> Result<Corpus> {
        if let Some(token) = train.iter().chain(&held_out).find(|&&token| token as usize >= vocab) {
            return Err(Error::config(format!("token {token} is not in the vocabulary of {vocab}")));
        }
        let shortest = train.len().min(held_out.len());
        match shortest >= 2 {
            true => Ok(Corpus { train, held_out, vocab, bytes: None }),
            false => Err(Error::config(format!(
                "a text of {} tokens to train on and {} held out; both parts need more",
                train.len(),
                held_out.len()
            ))),
        }
    }

    /// Reads files of any bytes, each of which is a token, one behind the other. The last tenth is held out, or all of
    /// `validation`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read or is empty, and as [`Corpus::new`].
    pub fn of_bytes(paths: &[PathBuf], validation: Option<&Path>) -> Result<Corpus> {
        let wide = |bytes: Vec<u8>| bytes.into_iter().map(u32::from).collect::<Vec<u32>>();
        let train = wide(read(paths)?);
        let corpus = match validation {
            Some(path) => Corpus::of_parts(train, wide(read(&[path.into()])?), 256)?,
            None => Corpus::new(train, 256)?,
        };
        Ok(Corpus { bytes: Some(1.0), ..corpus })
    }

    /// Reads files of text and cuts them into tokens. The last tenth of the tokens is held out, or all of `validation`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read or has no text, and as [`Corpus::new`] and [`Words::encode_plain`].
    #[cfg(feature = "text")]
    pub fn of_text(words: &Words, paths: &[PathBuf], validation: Option<&Path>) -> Result<Corpus> {
        let tokens = |paths: &[PathBuf]| {
            let mut all = Vec::new();
            for path in paths {
                let text = String::from_utf8(read(std::slice::from_ref(path))?).map_err(|error| {
                    Error::io(path, std::io::Error::other(format!("{error}; a tokenizer needs text")))
                })?;
                all.extend(words.encode_plain(&text)?);
            }
            Ok::<_, Error>(all)
        };
        let train = tokens(paths)?;
        let corpus = match validation {
            Some(path) => Corpus::of_parts(train, tokens(&[path.into()])?, words.size())?,
            None => Corpus::new(train, words.size())?,
        };
        let bytes = words.decode(&corpus.held_out)?.len();
        Ok(Corpus { bytes: Some(bytes as f64 / corpus.held_out.len() as f64), ..corpus })
    }

    /// The tokens to train on.
    pub fn train(&self) -> &[u32] {
        &self.train
    }

    /// The tokens that are held out.
    pub fn held_out(&self) -> &[u32] {
        &self.held_out
    }

    /// Number of distinct tokens that there may be.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Bytes of text for each held-out token, by which losses of different tokenizers are compared. `None` for bare tokens.
    pub fn bytes_per_token(&self) -> Option<f64> {
        self.bytes
    }

    /// The loss of two baselines on the held-out tokens but the first, in nats per token: by counts of single tokens in the part to
    /// train on, and by counts of pairs, both with one added to each count. `None` for more than 4096 kinds of tokens.
    pub fn baselines(&self) -> Option<[f64; 2]> {
        let n = self.vocab;
        if n > 4096 {
            return None;
        }
        let (mut single, mut pair) = (vec![1u64; n], vec![1u64; n * n]);
        self.train.iter().for_each(|&t| single[t as usize] += 1);
        self.train.windows(2).for_each(|w| pair[w[0] as usize * n + w[1] as usize] += 1);
        let total: u64 = single.iter().sum();
        let after: Vec<u64> = pair.chunks(n).map(|row| row.iter().sum()).collect();
        let mut sums = [0.0; 2];
        for w in self.held_out.windows(2) {
            let (a, b) = (w[0] as usize, w[1] as usize);
            sums[0] -= (single[b] as f64 / total as f64).ln();
            sums[1] -= (pair[a * n + b] as f64 / after[a] as f64).ln();
        }
        Some(sums.map(|sum| sum / (self.held_out.len() - 1) as f64))
    }
}

impl Data for Corpus {
    fn check(&self, model: &LmConfig) -> Result<()> {
        let [train, held_out] = [self.train.len(), self.held_out.len()];
        if self.vocab > model.vocab {
            let vocab = self.vocab;
            return Err(Error::config(format!(
                "a text of {vocab} kinds of tokens, and the model has {}",
                model.vocab
            )));
        }
        match train > model.context {
            true => Ok(()),
            false => Err(Error::config(format!(
                "the text has {train} tokens to train on and {held_out} held out, and a window takes {}; give a longer text or a \
                 smaller context",
                model.context + 1
            ))),
        }
    }

    fn id(&self) -> u128 {
        let mut hasher = XxHash3_128::new();
        for part in [&self.train, &self.held_out] {
            hasher.write(&(part.len() as u64).to_le_bytes());
            hasher.write(bytemuck::cast_slice(part));
        }
        hasher.finish_128()
    }

    /// Windows at random places.
    fn batch(
        &self,
        gpu: &Gpu,
        [batch, context]: [usize; 2],
        (parts, wanted): (usize, Range<usize>),
        _: u64,
        rng: &mut Rng,
    ) -> Vec<Part> {
        let starts: Vec<usize> = (0..batch).map(|_| rng.below(self.train.len() - context)).collect();
        let of = |starts: &[usize], from: usize| {
            let window = |&start: &usize| &self.train[start + from..start + from + context];
            let ids: Vec<u32> = starts.iter().flat_map(window).copied().collect();
            Tensor::from_slice(gpu, &ids, [starts.len(), context])
        };
        let part = |i| {
            let rows = &starts[share(batch, i, parts)];
            let weight = (rows.len() * parts) as f32 / batch as f32;
            Part { tokens: of(rows, 0), targets: of(rows, 1), weight }
        };
        wanted.map(part).collect()
    }

    fn is_even(&self) -> bool {
        true
    }

    fn measure(
        &self,
        model: &Lm,
        limit: usize,
        ranks: &dyn Ranks,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<f64> {
        evaluate_on(model, &self.held_out, limit, ranks, on)
    }
}
