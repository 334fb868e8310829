//! Rotary angles that are scaled for longer contexts than a model was first trained with.

use crate::error::{Error, Result};
use serde_json::Value;
use std::f64::consts::TAU;

/// How the frequencies `f_i = base^(-2 i / head_dim)` of the rotary angles are changed. The formulas are those of
/// transformers, under the same names.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// `f_i / factor`. Source: position interpolation, arXiv 2306.15595.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3.1: `f_i / factor` where the wavelength is above `original / low`, `f_i` where it is below `original / high`,
    /// and a blend of the two between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// `low_freq_factor`
        low: f64,
        /// `high_freq_factor`
        high: f64,
        /// The context before.
        original: f64,
    },
    /// YaRN, arXiv 2309.00071: `f_i` for angles that turn more than `fast` times within `original` tokens, `f_i / factor`
    /// for those that turn less than `slow` times, and a blend by position between. Cosines and sines are multiplied by
    /// `attention`.
    Yarn {
        /// The factor.
        factor: f64,
        /// The context before.
        original: f64,
        /// `beta_fast`
        fast: f64,
        /// `beta_slow`
        slow: f64,
        /// `attention_factor`
        attention: f64,
    },
}

impl RopeScaling {
    /// What YaRN multiplies cosines and sines with, if a file does not say it.
    pub(crate) fn yarn_attention(factor: f64) -> f64 {
        if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 }
    }

    /// Reads `rope_scaling` or `rope_parameters` of a `config.json`, whose model has this context. A context before scaling
    /// that stands outside of the object, `original`, goes first.
    pub(crate) fn from_json(rope: &Value, context: usize, original: Option<f64>) -> Result<RopeScaling> {
        let wrong = |message: String| Error::config(format!("config.json: rotary angles: {message}"));
        // Older files call it `type`.
        let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
        let number = |key: &str| {
            let value = rope[key].as_f64().filter(|v| v.is_finite() && *v > 0.0);
            value.ok_or_else(|| wrong(format!("'{kind}' needs a positive number `{key}`")))
        };
        if original.is_some_and(|original| !(original.is_finite() && original > 0.0)) {
            return Err(wrong("`original_max_position_embeddings` is no positive number".into()));
        }
        let number_or = |key: &str, otherwise: f64| match &rope[key] {
            Value::Null => Ok(otherwise),
            _ => number(key),
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            // These angles are the plain ones up to the model's context, and longer sequences are not computed.
            "dynamic" if original.or(rope["original_max_position_embeddings"].as_f64()).is_none() => {
                Ok(RopeScaling::None)
            }
            "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low: number("low_freq_factor")?,
                high: number("high_freq_factor")?,
                original: original.map_or_else(|| number("original_max_position_embeddings"), Ok)?,
            }),
            "yarn" => {
                if ["mscale", "mscale_all_dim"].iter().any(|key| !rope[*key].is_null())
                    || rope["truncate"] == false
                {
                    return Err(wrong("'yarn' with `mscale` or without truncation is not computed".into()));
                }
                let factor = number("factor")?;
                Ok(RopeScaling::Yarn {
                    factor,
                    original: original
                        .map_or_else(|| number_or("original_max_position_embeddings", context as f64), Ok)?,
                    fast: number_or("beta_fast", 32.0)?,
                    slow: number_or("beta_slow", 1.0)?,
                    attention: number_or("attention_factor", RopeScaling::yarn_attention(factor))?,
                })
            }
            other => Err(wrong(format!(
                "'{other}' is not computed; default, linear, llama3, yarn and, within the context, dynamic are"
            ))),
        }
    }

    /// The frequencies for heads of this width, and the factor of cosines and sines.
    pub fn frequencies(self, head_dim: usize, base: f64) -> (Vec<f64>, f64) {
        let plain = (0..head_dim / 2).map(|i| base.powf(-2.0 * i as f64 / head_dim as f64));
        match self {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low, high, original } => {
                let scaled = |f: f64| {
                    let turns = original * f / TAU;
                    // 0 where the wavelength is `original / low`, 1 where it is `original / high`.
                    let share = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    (1.0 - share) * f / factor + share * f
                };
                (plain.map(scaled).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original, fast, slow, attention } => {
                // The index whose angle turns so many times within the original context.
                let index =
                    |turns: f64| head_dim as f64 * (original / (turns * TAU)).ln() / (2.0 * base.ln());
                let first = index(fast).floor().max(0.0);
                let last = index(slow).ceil().min(head_dim as f64 - 1.0);
                let width = if first == last { 0.001 } else { last - first };
                let scaled = |(i, f): (usize, f64)| {
                    let share = ((i as f64 - first) / width).clamp(0.0, 1.0);
                    share * f / factor + (1.0 - share) * f
                };
                (plain.enumerate().map(scaled).collect(), attention)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of transformers 5.24, which computes them in f32.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 16.0 };
        let (found, _) = llama3.frequencies(8, 10000.0);
        assert!(found.iter().zip(LLAMA3).all(|(a, b)| (a - b).abs() < 1e-7 * b), "{found:?}");
        let attention = RopeScaling::yarn_attention(4.0);
        let yarn = RopeScaling::Yarn { factor: 4.0, original: 16.0, fast: 32.0, slow: 1.0, attention };
        let (found, factor) = yarn.frequencies(8, 10000.0);
        assert!(found.iter().zip(YARN).all(|(a, b)| (a - b).abs() < 1e-7 * b), "{found:?}");
        assert!((factor - 1.138_629_436_111_989).abs() < 1e-12);
    }

    const LLAMA3: [f64; 4] = [0.5760563611984253, 0.0125, 0.00125, 0.000125];
    const YARN: [f64; 4] = [1.0, 0.025, 0.0025, 0.00025];
}
