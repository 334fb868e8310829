//! The sizes and constants of a Llama-type model.

use crate::error::{Error, Result};
use crate::ops::sequence::rope::Pairing;
use crate::setters::setters;

/// Sizes and constants.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LlamaConfig {
    /// Number of distinct tokens.
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; must divide `heads`.
    pub kv_heads: usize,
    /// Width of the MLP.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// The most tokens in a sequence.
    pub context: usize,
    /// Base of the rotary angles.
    pub rope_base: f64,
    /// Added to the variance in norms.
    pub eps: f32,
    /// Which elements of a head are rotated together.
    pub pairing: Pairing,
}

setters!(LlamaConfig {
    vocab: usize,
    width: usize,
    heads: usize,
    kv_heads: usize,
    hidden: usize,
    layers: usize,
    context: usize,
    rope_base: f64,
    eps: f32,
    pairing: Pairing,
});

impl Default for LlamaConfig {
    /// SmolLM 135M's sizes (<https://huggingface.co/HuggingFaceTB/SmolLM-135M>); a model's own come from its file.
    fn default() -> LlamaConfig {
        LlamaConfig {
            vocab: 49152,
            width: 576,
            heads: 9,
            kv_heads: 3,
            hidden: 1536,
            layers: 30,
            context: 2048,
            rope_base: 10000.0,
            eps: 1e-5,
            pairing: Pairing::Halves,
        }
    }
}

impl LlamaConfig {
    pub(super) fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// Reads the text of a Hugging Face `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for another kind of model, a setting that changes the computation in a way that is not
    /// supported, or a missing number.
    pub fn from_json(text: &str) -> Result<LlamaConfig> {
        let wrong = |message: String| Error::config(format!("config.json: {message}"));
        let json: serde_json::Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let kind = json["model_type"].as_str().unwrap_or("missing");
        if kind != "llama" {
            return Err(wrong(format!("the kind of model is '{kind}'; only 'llama' is read")));
        }
        // Newer files keep the rotary settings in a separate object.
        let rope = json.get("rope_parameters").filter(|v| v.is_object()).unwrap_or(&json);
        let base = [rope, &json].into_iter().find_map(|of| of["rope_theta"].as_f64());
        let scaling = rope.get("rope_type").and_then(|v| v.as_str()).is_some_and(|t| t != "default");
        let on = |key: &str| json[key].as_bool() == Some(true);
        let activation = json["hidden_act"].as_str().unwrap_or("silu");
        if scaling
            || !json["rope_scaling"].is_null()
            || on("attention_bias")
            || on("mlp_bias")
            || activation != "silu"
        {
            return Err(wrong(
                "scaled rotary angles, biases and activations other than 'silu' are not read".into(),
            ));
        }
        let number = |key: &str| {
            let n = json[key].as_u64().and_then(|n| usize::try_from(n).ok());
            n.ok_or_else(|| wrong(format!("there is no whole number `{key}`")))
        };
        let heads = number("num_attention_heads")?;
        let config = LlamaConfig {
            vocab: number("vocab_size")?,
            width: number("hidden_size")?,
            heads,
            kv_heads: number("num_key_value_heads").unwrap_or(heads),
            hidden: number("intermediate_size")?,
            layers: number("num_hidden_layers")?,
            context: number("max_position_embeddings")?,
            rope_base: base.unwrap_or(10000.0),
            eps: json["rms_norm_eps"]
                .as_f64()
                .ok_or_else(|| wrong("there is no number `rms_norm_eps`".into()))? as f32,
            pairing: Pairing::Halves,
        };
        config.check("config.json")?;
        match json["head_dim"].as_u64() {
            Some(own) if own != config.head_dim() as u64 => {
                Err(wrong(format!("heads of {own}, which is not {} / {heads}", config.width)))
            }
            _ => Ok(config),
        }
    }

    /// Refuses sizes that no model has before anything is made of them.
    pub(super) fn check(&self, name: &str) -> Result<()> {
        let sizes =
            [self.vocab, self.width, self.heads, self.kv_heads, self.hidden, self.layers, self.context];
        let fits = !sizes.contains(&0)
            && self.width.is_multiple_of(self.heads)
            && self.heads.is_multiple_of(self.kv_heads)
            && self.head_dim().is_multiple_of(2)
            && self.head_dim() <= 256
            && self.rope_base > 0.0;
        if fits {
            Ok(())
        } else {
            Err(Error::config(format!("{name}: these sizes make no Llama model: {self:?}")))
        }
    }
}
