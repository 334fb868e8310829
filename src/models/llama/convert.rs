//! What a GGUF file says of a model that is a folder.

use super::config::LlamaSettings;
use super::gguf::{FACTORS, NAMES};
use super::read::HUGGING_FACE;
use crate::error::{Error, Result};
use crate::models::lm::RopeScaling;
use crate::store::gguf::{Conversion, Place, Value};
use std::collections::BTreeMap;

fn whole(n: usize) -> Value {
    Value::Integer(n as i128)
}

/// A number in f32, as llama.cpp reads it.
fn float(x: f64) -> Value {
    Value::Float(f64::from(x as f32))
}

impl LlamaSettings {
    /// The architecture's name in GGUF files.
    fn architecture(&self) -> &'static str {
        if self.kind == "qwen2" { "qwen2" } else { "llama" }
    }

    /// How a folder with these settings and tensors becomes a GGUF file. The tokenizer is not part of it.
    ///
    /// # Errors
    /// [`Error::Config`] for what such a file cannot say, and for a tensor that these models do not have.
    pub fn gguf(&self, names: &[String]) -> Result<Conversion> {
        if self.config.window.is_some() && self.config.window_from > 0 {
            return Err(Error::config(
                "gguf: `max_window_layers`: windows of attention in some of the blocks only cannot be written",
            ));
        }
        let mut conversion = Conversion { metadata: self.metadata(), ..Conversion::default() };
        let c = &self.config;
        if let RopeScaling::Llama3 { .. } = c.rope_scaling {
            let plain = RopeScaling::None.frequencies(c.head_dim(), c.rope_base).0;
            let scaled = c.rope_scaling.frequencies(c.head_dim(), c.rope_base).0;
            let divisors = plain.iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32).collect();
            conversion.more.push((FACTORS.into(), divisors));
        }
        let places = self.places();
        for name in names {
            if HUGGING_FACE.ignored.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            let place = places.get(name).ok_or_else(|| {
                Error::config(format!(
                    "gguf: tensor `{name}` is in no model of this kind that can be written"
                ))
            })?;
            conversion.places.insert(name.clone(), place.clone());
        }
        Ok(conversion)
    }

    /// The places of all tensors that such a model may have.
    fn places(&self) -> BTreeMap<String, Place> {
        let (from, to, c) = (&HUGGING_FACE, &NAMES, &self.config);
        let mut all = BTreeMap::new();
        for (from, to) in [(from.embedding, to.embedding), (from.norm, to.norm), (from.head, to.head)] {
            all.insert(format!("{from}.weight"), Place::new(format!("{to}.weight")));
        }
        for l in 0..c.depth {
            let [a, b] = [(from.layer)(l), (to.layer)(l)];
            for (from, to) in from.norms.iter().zip(to.norms) {
                all.insert(format!("{a}{from}.weight"), Place::new(format!("{b}{to}.weight")));
            }
            for (i, (from, to)) in from.linears.iter().zip(to.linears).enumerate() {
                for kind in ["weight", "bias"] {
                    let place = Place::new(format!("{b}{to}.{kind}"));
                    let place = match (i, self.architecture()) {
                        (0, "llama") => place.heads(c.heads),
                        (1, "llama") => place.heads(c.kv_heads),
                        _ => place,
                    };
                    all.insert(format!("{a}{from}.{kind}"), place);
                }
            }
        }
        all
    }

    fn metadata(&self) -> Vec<(String, Value)> {
        let (c, kind) = (&self.config, self.architecture());
        let mut all = vec![("general.architecture".to_string(), Value::Text(kind.into()))];
        let mut put = |key: &str, value: Value| all.push((format!("{kind}.{key}"), value));
        put("vocab_size", whole(c.vocab));
        put("context_length", whole(c.context));
        put("embedding_length", whole(c.width));
        put("block_count", whole(c.depth));
        put("feed_forward_length", whole(c.hidden));
        put("attention.head_count", whole(c.heads));
        put("attention.head_count_kv", whole(c.kv_heads));
        put("attention.layer_norm_rms_epsilon", float(f64::from(c.eps)));
        put("rope.dimension_count", whole(c.head_dim()));
        put("rope.freq_base", float(c.rope_base));
        if c.head_dim() * c.heads != c.width {
            put("attention.key_length", whole(c.head_dim()));
            put("attention.value_length", whole(c.head_dim()));
        }
        if let Some(window) = c.window.filter(|&window| window < c.context) {
            put("attention.sliding_window", whole(window));
        }
        match c.rope_scaling {
            // Llama 3 has a tensor of divisors.
            RopeScaling::None | RopeScaling::Llama3 { .. } => {}
            RopeScaling::Linear { factor } => {
                put("rope.scaling.type", Value::Text("linear".into()));
                put("rope.scaling.factor", float(factor));
            }
            RopeScaling::Yarn { factor, original, fast, slow, attention } => {
                put("rope.scaling.type", Value::Text("yarn".into()));
                put("rope.scaling.factor", float(factor));
                put("rope.scaling.original_context_length", whole(original as usize));
                put("rope.scaling.attn_factor", float(attention / RopeScaling::yarn_attention(factor)));
                put("rope.scaling.yarn_beta_fast", float(fast));
                put("rope.scaling.yarn_beta_slow", float(slow));
            }
        }
        all
    }
}
