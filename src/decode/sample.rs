//! The choice of the next token from its scores.

use crate::error::{Error, Result};
use crate::rng::Rng;
use crate::setters::setters;

/// How a [`Sampler`] chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SamplerOptions {
    /// Scores are divided by this before the softmax. With 0 the likeliest token is always chosen.
    pub temperature: f64,
    /// Only so many of the likeliest tokens are considered; 0 considers all.
    pub top_k: usize,
    /// Only the likeliest tokens whose probabilities add up to this are considered (nucleus sampling, arXiv 1904.09751).
    pub top_p: f64,
    /// The start of the random numbers.
    pub seed: u64,
    /// Only the first so many tokens are considered: a model's table may have more rows than its tokenizer has tokens.
    pub vocab: usize,
}

setters!(SamplerOptions { temperature: f64, top_k: usize, top_p: f64, seed: u64, vocab: usize });

impl Default for SamplerOptions {
    /// The likeliest token.
    fn default() -> SamplerOptions {
        SamplerOptions { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, vocab: usize::MAX }
    }
}

/// Chooses tokens: `p_i = exp((s_i - max s) / temperature)`, of which the `top_k` largest are kept, then the fewest whose share
/// of the sum is at least `top_p`, and one is drawn by its share. Equal scores are ordered by token. Equal scores and seeds give
/// equal tokens.
///
/// ```
/// use tiebeam::decode::{Sampler, SamplerOptions};
///
/// let mut likeliest = Sampler::new(SamplerOptions::default())?;
/// assert_eq!(likeliest.pick(&[0.5, 2.0, -1.0])?, 1);
/// let mut first = Sampler::new(SamplerOptions::default().vocab(1))?;
/// assert_eq!(first.pick(&[0.5, 2.0, -1.0])?, 0);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Sampler {
    options: SamplerOptions,
    rng: Rng,
}

impl Sampler {
    /// Makes a sampler, whose draws depend on the seed in `options`.
    ///
    /// # Errors
    /// [`Error::Config`] when the temperature is negative or no number, or `top_p` is not above 0 and at most 1.
    pub fn new(options: SamplerOptions) -> Result<Sampler> {
        let SamplerOptions { temperature, top_p, seed, .. } = options;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::config(format!(
                "a temperature of {temperature}; it is 0 or a positive number"
            )));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::config(format!("top-p of {top_p}; it is above 0 and at most 1")));
        }
        Ok(Sampler { options, rng: Rng::new(seed) })
    }

    /// The next token.
    ///
    /// # Errors
    /// [`Error::Config`] when there are no scores, or one is NaN.
    pub fn pick(&mut self, scores: &[f32]) -> Result<u32> {
        let scores = &scores[..scores.len().min(self.options.vocab)];
        if scores.is_empty() {
            return Err(Error::config("there are no scores to choose from"));
        }
        if scores.iter().any(|s| s.is_nan()) {
            return Err(Error::config(
                "the model's scores are NaN; its weights are damaged, or keys in f16 were too large",
            ));
        }
        let best = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
        let first = (0..scores.len()).min_by(best).unwrap_or(0);
        let SamplerOptions { temperature, top_k, top_p, .. } = self.options;
        if temperature == 0.0 {
            return Ok(first as u32);
        }
        // Infinite scores are equal or not, and their difference is no number.
        let p = |i: usize| match scores[i] == scores[first] {
            true => 1.0,
            false => (f64::from(scores[i] - scores[first]) / temperature).exp(),
        };
        let mut kept: Vec<usize> = (0..scores.len()).collect();
        if (1..kept.len()).contains(&top_k) {
            kept.select_nth_unstable_by(top_k - 1, best);
            kept.truncate(top_k);
        }
        let all: f64 = kept.iter().map(|&i| p(i)).sum();
        if top_p == 1.0 {
            kept.sort_unstable();
            return Ok(self.draw(&kept, all, p));
        }
        // What is below this cannot belong to the nucleus: even together such tokens have less than 1 - top_p.
        let least = (1.0 - top_p) * all / kept.len() as f64;
        kept.retain(|&i| p(i) >= least);
        kept.sort_unstable_by(best);
        let (mut sum, mut count) = (0.0, 0);
        while count < kept.len() && (count == 0 || sum < top_p * all) {
            sum += p(kept[count]);
            count += 1;
        }
        Ok(self.draw(&kept[..count], sum, p))
    }

    /// Draws one of these tokens, whose shares `p` add up to `sum`.
    fn draw(&mut self, tokens: &[usize], sum: f64, p: impl Fn(usize) -> f64) -> u32 {
        let mut unit = [0.0f32; 2];
        self.rng.fill_uniform(&mut unit);
        // 24 bits each.
        let mut left = (f64::from(unit[0]) + f64::from(unit[1]) / 16_777_216.0) * sum;
        for &i in tokens {
            left -= p(i);
            if left < 0.0 {
                return i as u32;
            }
        }
        tokens[tokens.len() - 1] as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: SamplerOptions, scores: &[f32]) -> Vec<f64> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0.0; scores.len()];
        for _ in 0..20_000 {
            counts[sampler.pick(scores).unwrap() as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn near(found: &[f64], want: &[f64]) {
        assert!(found.iter().zip(want).all(|(a, b)| (a - b).abs() < 0.015), "{found:?} for {want:?}");
    }

    #[test]
    fn tokens_come_as_often_as_their_probabilities_say() {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let scores = [2.0f32, 1.0, 0.0, 0.0].map(|s| s * std::f32::consts::LN_2);
        let options = SamplerOptions::default().temperature(1.0).seed(7);
        near(&counts(options, &scores), &[0.5, 0.25, 0.125, 0.125]);
        // At half the temperature odds are squared.
        near(&counts(options.temperature(0.5), &scores), &[16.0 / 22.0, 4.0 / 22.0, 1.0 / 22.0, 1.0 / 22.0]);
        near(&counts(options.top_k(2), &scores), &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        // 0.5 is not yet 0.6, and with 0.25 it is more.
        near(&counts(options.top_p(0.6), &scores), &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        // Of two equal tokens the first is kept.
        near(&counts(options.top_p(0.8), &scores), &[4.0 / 7.0, 2.0 / 7.0, 1.0 / 7.0, 0.0]);
        near(&counts(options.top_p(1e-9), &scores), &[1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_likeliest_is_the_first_of_equal_ones() {
        let mut sampler = Sampler::new(SamplerOptions::default()).unwrap();
        assert_eq!(sampler.pick(&[1.0, 3.0, 3.0]).unwrap(), 1);
        assert_eq!(sampler.pick(&[f32::NEG_INFINITY, f32::INFINITY]).unwrap(), 1);
        assert!(sampler.pick(&[]).is_err() && sampler.pick(&[0.0, f32::NAN]).is_err());
    }

    #[test]
    fn equal_seeds_give_equal_tokens() {
        let scores: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let drawn = |seed| {
            let mut sampler =
                Sampler::new(SamplerOptions::default().temperature(0.8).top_p(0.9).seed(seed)).unwrap();
            (0..50).map(|_| sampler.pick(&scores).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(drawn(3), drawn(3));
        assert_ne!(drawn(3), drawn(4));
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for wrong in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(Sampler::new(SamplerOptions::default().temperature(wrong)).is_err());
        }
        for wrong in [0.0, 1.5, f64::NAN] {
            assert!(Sampler::new(SamplerOptions::default().top_p(wrong)).is_err());
        }
    }
}
