//! Text that a model continues.

use super::Sampler;
use crate::error::Result;
use crate::models::lm::Session;

impl Session<'_> {
    /// Continues what the session has read, of which `scores` are what [`Session::push`] returned last: up to `most` tokens, each chosen by
    /// `sampler` and told to `on`, which ends it by `false` without that token. It also ends where the context is full. Returns the tokens.
    /// Where their number or the context ended it, the last one has not been read.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::decode::{Sampler, SamplerOptions};
    /// use tiebeam::models::lm::{Lm, LmConfig};
    /// let config = LmConfig::default().vocab(11).width(16).heads(2).kv_heads(2).hidden(32).context(12).depth(2);
    /// let model = Lm::new(&gpu, config, &mut Rng::new(1));
    /// let mut session = model.session(12)?;
    /// let scores = session.push(&[3, 1, 4])?;
    /// let mut likeliest = Sampler::new(SamplerOptions::default())?;
    /// let tokens = session.generate(scores, 5, &mut likeliest, |_token| Ok(true))?;
    /// assert_eq!((tokens.len(), session.length()), (5, 3 + 4));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Session::push`] and [`Sampler::pick`], and what `on` returns.
    pub fn generate(
        &mut self,
        mut scores: Vec<f32>,
        most: usize,
        sampler: &mut Sampler,
        mut on: impl FnMut(u32) -> Result<bool>,
    ) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        while tokens.len() < most {
            let token = sampler.pick(&scores)?;
            if !on(token)? {
                break;
            }
            tokens.push(token);
            if tokens.len() == most || self.length() == self.context() {
                break;
            }
            scores = self.push(&[token])?;
        }
        Ok(tokens)
    }
}
