//! Generating with a cache of keys and values.

use super::{Lm, LmBlock};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Activation, Attention};
use crate::ops::sequence::cache::KvCache;
use crate::setters::setters;
use crate::share::{Site, Tied};
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// How a [`Session`] keeps what it has read.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SessionOptions {
    /// The most tokens of the sequence.
    pub context: usize,
    /// The most tokens that are computed at a time. Longer prompts take several passes, so that memory does not grow with them.
    pub chunk: usize,
    /// The type of stored keys and values: f32, or f16, which takes half the memory and rounds them.
    pub keys: DType,
}

setters!(SessionOptions { context: usize, chunk: usize, keys: DType });

impl Default for SessionOptions {
    fn default() -> SessionOptions {
        SessionOptions { context: 2048, chunk: 512, keys: DType::F32 }
    }
}

/// One sequence, with the keys and values of its tokens so far.
pub struct Session<'a> {
    model: &'a Lm,
    blocks: Vec<LmBlock>,
    caches: Vec<KvCache>,
    options: SessionOptions,
    length: usize,
    /// How far tokens have been written: as far as `length`, or further if tokens were forgotten.
    written: usize,
}

/// The most tokens of a chunk if attention has a window.
const WINDOWED_CHUNK: usize = 1024;

impl Lm {
    /// Starts an empty conversation with this model, of up to `context` tokens.
    ///
    /// # Errors
    /// [`Error::Config`] when the context is 0 or above the model's.
    pub fn session(&self, context: usize) -> Result<Session<'_>> {
        self.session_with(SessionOptions::default().context(context))
    }

    /// [`Lm::session`] with all options. Weights that are computed from several stored numbers are materialised once, for
    /// as long as the session lives; packed ones stay packed.
    ///
    /// # Errors
    /// [`Error::Config`] when the context is 0 or above the model's, the chunk is 0, or keys would be of another type than f32
    /// or f16.
    pub fn session_with(&self, options: SessionOptions) -> Result<Session<'_>> {
        let c = &self.config;
        let SessionOptions { context, keys, .. } = options;
        // A mask of a window has a row for each token of a chunk.
        let most = if c.window_of(c.window_from, context).is_some() { WINDOWED_CHUNK } else { usize::MAX };
        let chunk = options.chunk.min(context).min(most);
        let options = SessionOptions { chunk, ..options };
        if context == 0 || context > c.context {
            return Err(Error::config(format!(
                "a context of {context} tokens; this model has 1 to {}",
                c.context
            )));
        }
        if chunk == 0 || !matches!(keys, DType::F32 | DType::F16) {
            return Err(Error::config(format!(
                "chunks of {chunk} tokens, keys in {keys}: f32 and f16 are kept"
            )));
        }
        let gpu = self.gpu();
        let cache = |t: usize| {
            // With a window, old places are used again once no query of a chunk sees them.
            let places = c.window_of(t, context).map_or(context, |window| context.min(window - 1 + chunk));
            KvCache::with_dtype(gpu, 1, c.kv_heads, places, c.head_dim(), keys)
        };
        // For few rows, computing a weight from several stored numbers costs more than reading it.
        let blocks = no_grad(|| {
            let mut blocks = self.blocks_now();
            for (_, linear) in blocks.iter_mut().flat_map(LmBlock::linears_mut) {
                if linear.weight.stored().is_none() && !linear.weight.is_compact() {
                    linear.weight = Tied::new(&linear.weight.expand()).shared();
                }
            }
            blocks
        });
        let caches = (0..c.depth).map(cache).collect();
        Ok(Session { model: self, blocks, caches, options, length: 0, written: 0 })
    }
}

/// Where a chunk of tokens is in one cache.
struct Place {
    /// Lists of the place of the first token of a piece, and its number of tokens: two pieces where a cache ends.
    pieces: Vec<(Tensor, usize)>,
    /// Hides places that a query does not see, `[tokens, places in use]`, if that is not the plain causal order.
    mask: Option<Tensor>,
}

impl Session<'_> {
    /// Number of tokens so far.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The most tokens.
    pub fn context(&self) -> usize {
        self.options.context
    }

    /// Bytes of the stored keys and values.
    pub fn cache_bytes(&self) -> usize {
        self.caches.iter().map(KvCache::bytes).sum()
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        (self.length, self.written) = (0, 0);
    }

    /// Forgets the tokens from this length on, and says whether it could: where attention has a window, keys of earlier tokens
    /// may have been overwritten, and then all tokens are forgotten.
    pub fn truncate(&mut self, length: usize) -> bool {
        let length = length.min(self.length);
        let window = self.model.config.window.unwrap_or(usize::MAX);
        // The next token needs the keys from `first` on, and those before `lost` have been overwritten.
        let first = (length + 1).saturating_sub(window);
        let kept = |cache: &KvCache| self.written.saturating_sub(cache.context()) <= first;
        match self.caches.iter().all(kept) {
            true => self.length = length,
            false => self.clear(),
        }
        self.length == length
    }

    /// Appends tokens, and returns the scores `[vocab]` of the token after the last one.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no token, one is not in the vocabulary, or the context is full; when the device
    /// fails. The session is then as it was, or empty if a window's keys have been overwritten ([`Session::length`]).
    pub fn push(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.push_watched(tokens, |_| Ok(()))
    }

    /// [`Session::push`], which tells `on_chunk` after each chunk how many of the tokens have been computed. An error of
    /// `on_chunk` ends it.
    ///
    /// # Errors
    /// As [`Session::push`], and what `on_chunk` returns.
    pub fn push_watched(
        &mut self,
        tokens: &[u32],
        mut on_chunk: impl FnMut(usize) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let (vocab, context) = (self.model.config.vocab, self.options.context);
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::config(format!("token {token} is not in the vocabulary of {vocab}")));
        }
        if tokens.is_empty() || self.length + tokens.len() > context {
            return Err(Error::config(format!(
                "{} tokens after {}: the context holds {context}; start a session with a longer one",
                tokens.len(),
                self.length
            )));
        }
        let before = self.length;
        let last = tokens.chunks(self.options.chunk).try_fold(None, |_, chunk| {
            let stream = self.chunk(chunk)?;
            on_chunk(self.length - before)?;
            Ok(Some(stream))
        });
        let scores = last.and_then(|last| {
            let x = last.ok_or_else(|| Error::config("no tokens"))?;
            no_grad(|| self.model.logits(&x)).to_vec::<f32>()
        });
        if scores.is_err() {
            // What has been computed of these tokens is forgotten.
            self.truncate(before);
        }
        scores
    }

    /// Computes the residual stream of one chunk, and returns it behind its last token.
    fn chunk(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let (model, c) = (self.model, &self.model.config);
        let (count, start) = (tokens.len(), self.length);
        let gpu = model.gpu();
        self.written = self.written.max(start + count);
        let stream = no_grad(|| -> Result<Tensor> {
            let list = |value: usize| Tensor::from_slice(gpu, &[value as u32], [1]);
            let (row, length) = (list(0), list(start + count));
            let plain = Place { pieces: vec![(list(start), count)], mask: None };
            let windowed =
                c.window_of(c.window_from, self.options.context).map(|_| self.place(c.window_from, count));
            let mut x = model.embed_from(&Tensor::from_slice(gpu, tokens, [1, count]), start);
            for (t, (block, cache)) in self.blocks.iter().zip(&mut self.caches).enumerate() {
                let place = windowed.as_ref().filter(|_| t >= c.window_from).unwrap_or(&plain);
                let [q, k, v] = model.project(block, &block.norm1.forward(&x), start);
                let [k, v] = [k, v].map(|y| y.permute([0, 2, 1, 3]));
                let mut from = 0;
                for (at, many) in &place.pieces {
                    let own = |x: &Tensor| x.slice(1, from..from + many);
                    cache.append(&own(&k), &own(&v), &row, at)?;
                    from += many;
                }
                let y = match &place.mask {
                    None => cache.attend(&q, &row, &length),
                    Some(mask) => cache.attend_masked(&q, mask),
                };
                let o = &block.attention.o;
                x = o.forward_with(&Attention::merge(&y), Activation::None, Some(&x));
                x = block.feed_forward(&x, None).0;
            }
            Ok(x.slice(1, count - 1..count))
        })?;
        stream.evaluate();
        stream.check()?;
        self.length += count;
        Ok(stream)
    }

    /// Where the next `count` tokens lie in the cache of a block with a window.
    fn place(&self, layer: usize, count: usize) -> Place {
        let (places, start) = (self.caches[layer].context(), self.length);
        let window = self.model.config.window.unwrap_or(usize::MAX);
        let first = start % places;
        let before_end = count.min(places - first);
        let gpu = self.model.gpu();
        let list = |place: usize| Tensor::from_slice(gpu, &[place as u32], [1]);
        let mut pieces = vec![(list(first), before_end)];
        if before_end < count {
            pieces.push((list(0), count - before_end));
        }
        let end = start + count;
        let used = end.min(places);
        if end <= window && end <= places {
            return Place { pieces, mask: None };
        }
        // Place `s` has the last token before `end` whose position is `s` modulo the number of places.
        let hidden = |i: usize, s: usize| {
            let back = (end - 1 + places - s) % places;
            match (end - 1).checked_sub(back) {
                Some(position) => position > start + i || start + i - position >= window,
                None => true,
            }
        };
        let all: Vec<f32> = (0..count * used)
            .map(|at| if hidden(at / used, at % used) { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        Place { pieces, mask: Some(Tensor::from_slice(gpu, &all, [count, used])) }
    }
}
