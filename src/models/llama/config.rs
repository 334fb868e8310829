//! The sizes and constants of a Llama-type model.

use super::scaling::RopeScaling;
use crate::error::{Error, Result};
use crate::ops::sequence::rope::Pairing;
use crate::setters::setters;
use serde_json::Value;

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
    /// Width of a head, if it is not `width / heads`.
    pub head_width: Option<usize>,
    /// Width of the MLP.
    pub hidden: usize,
    /// Number of blocks.
    pub layers: usize,
    /// The most tokens in a sequence.
    pub context: usize,
    /// Base of the rotary angles.
    pub rope_base: f64,
    /// How the rotary angles differ from the plain ones.
    pub rope_scaling: RopeScaling,
    /// A query sees this many keys, the last ones, if that is less than all.
    pub window: Option<usize>,
    /// The first block that has the window.
    pub window_from: usize,
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
    head_width: Option<usize>,
    hidden: usize,
    layers: usize,
    context: usize,
    rope_base: f64,
    rope_scaling: RopeScaling,
    window: Option<usize>,
    window_from: usize,
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
            head_width: None,
            hidden: 1536,
            layers: 30,
            context: 2048,
            rope_base: 10000.0,
            rope_scaling: RopeScaling::None,
            window: None,
            window_from: 0,
            eps: 1e-5,
            pairing: Pairing::Halves,
        }
    }
}

/// The kinds of models that are read, as `config.json` and GGUF files name them.
pub(super) const KINDS: [&str; 3] = ["llama", "mistral", "qwen2"];

/// What `config.json` says besides sizes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LlamaSettings {
    /// `llama`, `mistral` or `qwen2`.
    pub kind: String,
    /// Sizes and constants.
    pub config: LlamaConfig,
    /// Whether the output head is the table of token vectors, unless the file has one.
    pub tied_head: bool,
    /// Which linear layers of a block have biases, in the order of [`LINEARS`](super::LINEARS).
    pub biases: [bool; 7],
    /// `quantization_config`, if the weights are packed.
    pub quantization: Option<Value>,
}

/// Settings of related kinds of models that change what is computed, and that these kinds do not have. A file with one of them
/// is of a model that names itself otherwise.
const OTHER_KINDS: [&str; 31] = [
    // Granite, MiniCPM, Cohere and Falcon-H1: factors.
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "scale_emb",
    "scale_depth",
    "dim_model_base",
    "logit_scale",
    "lm_head_multiplier",
    "key_multiplier",
    "mlp_multipliers",
    // Gemma: bounds, and a scale of its own.
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "rope_local_base_freq",
    // Mixtures of experts.
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_intermediate_size",
    // Qwen3, OLMo, Falcon, Llama 4 and others: norms, clipping and positions of other forms.
    "use_qk_norm",
    "qk_layernorm",
    "clip_qkv",
    "alibi",
    "use_alibi",
    "parallel_attn",
    "no_rope_layers",
    "attn_temperature_tuning",
    "attention_chunk_size",
    "add_cross_attention",
    "q_lora_rank",
    "use_bias",
];

/// Those of them that change nothing if they are 1.
const FACTORS: [&str; 7] = [
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "scale_emb",
    "logit_scale",
    "lm_head_multiplier",
    "key_multiplier",
];

/// Whether a setting says that it changes nothing: off, nothing of what it counts or bounds, or a factor of 1.
fn changes_nothing(key: &str, value: &Value) -> bool {
    let neutral = if FACTORS.contains(&key) { 1.0 } else { 0.0 };
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        number => number.as_f64() == Some(neutral),
    }
}

/// Reads values of `config.json`, with errors that name the file.
struct Json<'a>(&'a Value);

fn wrong(message: impl Into<String>) -> Error {
    Error::config(format!("config.json: {}", message.into()))
}

impl Json<'_> {
    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn number(&self, key: &str) -> Result<usize> {
        let n = self.0[key].as_u64().and_then(|n| usize::try_from(n).ok());
        n.ok_or_else(|| wrong(format!("there is no whole number `{key}`")))
    }

    fn number_or(&self, key: &str, otherwise: usize) -> Result<usize> {
        self.get(key).map_or(Ok(otherwise), |_| self.number(key))
    }

    fn is_on(&self, key: &str) -> Result<bool> {
        let flag =
            |value: &Value| value.as_bool().ok_or_else(|| wrong(format!("`{key}` is not true or false")));
        self.get(key).map_or(Ok(false), flag)
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        let float = |value: &Value| value.as_f64().ok_or_else(|| wrong(format!("`{key}` is no number")));
        self.get(key).map(float).transpose()
    }
}

impl LlamaSettings {
    /// Reads the text of a Hugging Face `config.json`: of Llama 2 and 3, Mistral, Qwen2, SmolLM and what has their form.
    ///
    /// # Errors
    /// [`Error::Config`] for another kind of model, a setting that changes the computation in a way that is not supported, or
    /// a missing number.
    pub fn from_json(text: &str) -> Result<LlamaSettings> {
        let json: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let of = Json(&json);
        let kind = json["model_type"].as_str().unwrap_or("missing");
        if !KINDS.contains(&kind) {
            return Err(wrong(format!("the kind of model is '{kind}'; {} are read", KINDS.join(", "))));
        }
        let activations = ["hidden_act", "hidden_activation"].map(|key| json[key].as_str().unwrap_or("silu"));
        if let Some(activation) = activations.iter().find(|name| **name != "silu") {
            return Err(wrong(format!("the activation is '{activation}'; only 'silu' is computed")));
        }
        if let Some(norm) = json["norm_type"].as_str().filter(|norm| !norm.to_lowercase().contains("rms")) {
            return Err(wrong(format!("`norm_type` is '{norm}'; only RMS norms are computed")));
        }
        if let Some(key) = OTHER_KINDS.iter().find(|key| !changes_nothing(key, &json[**key])) {
            return Err(wrong(format!(
                "`{key}` is {}, which models of the kind '{kind}' do not have and which is not computed",
                json[*key]
            )));
        }
        // Newer files keep the rotary settings in an object of their own. If both are there, transformers takes the older one.
        let rope = Json(of.get("rope_scaling").or(of.get("rope_parameters")).unwrap_or(&Value::Null));
        if !rope.0.is_null() && !rope.0.is_object() {
            return Err(wrong(format!("`rope_scaling` is {}, and must be an object or null", rope.0)));
        }
        if let Some(key) = ["llama_4_scaling_beta"].into_iter().find(|key| !rope.0[*key].is_null()) {
            return Err(wrong(format!(
                "`{key}`: angles that scale queries by their position are not computed"
            )));
        }
        if rope.0.as_object().is_some_and(|all| all.values().any(Value::is_object)) {
            return Err(wrong("`rope_parameters`: blocks with different rotary angles are not computed"));
        }
        let either = |key: &str| Ok::<_, Error>(rope.float(key)?.or(of.float(key)?));
        let base = either("rope_theta")?;
        let context = of.number("max_position_embeddings")?;
        let original = of.float("original_max_position_embeddings")?;
        if either("partial_rotary_factor")?.is_some_and(|share| share != 1.0) {
            return Err(wrong("`partial_rotary_factor`: heads are rotated as a whole only"));
        }
        let heads = of.number("num_attention_heads")?;
        let config = LlamaConfig {
            vocab: of.number("vocab_size")?,
            width: of.number("hidden_size")?,
            heads,
            kv_heads: of.number_or("num_key_value_heads", heads)?,
            head_width: of.get("head_dim").map(|_| of.number("head_dim")).transpose()?,
            hidden: of.number("intermediate_size")?,
            layers: of.number("num_hidden_layers")?,
            context,
            rope_base: base.unwrap_or(10000.0),
            rope_scaling: RopeScaling::from_json(rope.0, context, original)?,
            eps: of.float("rms_norm_eps")?.ok_or_else(|| wrong("there is no number `rms_norm_eps`"))? as f32,
            ..LlamaConfig::default()
        };
        let config = config.windowed(&of, kind)?;
        config.check("config.json")?;
        let [attention, mlp] = [of.is_on("attention_bias")?, of.is_on("mlp_bias")?];
        Ok(LlamaSettings {
            biases: match kind {
                "qwen2" => [true, true, true, false, false, false, false],
                "llama" => [attention, attention, attention, attention, mlp, mlp, mlp],
                _ => [false; 7],
            },
            kind: kind.into(),
            config,
            tied_head: of.is_on("tie_word_embeddings")?,
            quantization: of.get("quantization_config").cloned(),
        })
    }
}

impl LlamaConfig {
    /// The width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_width.unwrap_or(self.width / self.heads.max(1))
    }

    /// Reads the sizes in the text of a Hugging Face `config.json`. [`LlamaSettings::from_json`] reads the rest as well.
    ///
    /// # Errors
    /// As [`LlamaSettings::from_json`], and for packed weights.
    pub fn from_json(text: &str) -> Result<LlamaConfig> {
        let LlamaSettings { config, quantization, .. } = LlamaSettings::from_json(text)?;
        match quantization {
            Some(_) => Err(wrong(
                "`quantization_config`: these weights are packed; models::llama::Published reads them",
            )),
            None => Ok(config),
        }
    }

    /// Adds the window of attention. Qwen2 has it only if it says so, and from some block on.
    fn windowed(self, of: &Json, kind: &str) -> Result<LlamaConfig> {
        let size = match of.0.get("sliding_window") {
            // What transformers takes where it is not mentioned. `null` means none.
            None if kind == "mistral" || kind == "qwen2" && of.is_on("use_sliding_window")? => Some(4096),
            _ => of.get("sliding_window").map(|_| of.number("sliding_window")).transpose()?,
        };
        let layers = match kind {
            "mistral" => Some(0),
            "qwen2" if of.is_on("use_sliding_window")? => Some(of.number_or("max_window_layers", 28)?),
            _ => None,
        };
        if let Some(types) = of.get("layer_types").and_then(Value::as_array) {
            let sliding = |l: usize| size.is_some() && layers.is_some_and(|first| l >= first);
            let same = |(l, t): (usize, &Value)| (t == "sliding_attention") == sliding(l);
            if !types.iter().enumerate().all(same) {
                return Err(wrong(
                    "`layer_types`: windows of attention in other blocks than the kind of model has",
                ));
            }
        }
        match (size, layers) {
            (Some(0), Some(_)) => Err(wrong("`sliding_window` is 0")),
            (Some(_), Some(window_from)) if window_from < self.layers => {
                Ok(LlamaConfig { window: size, window_from, ..self })
            }
            _ => Ok(self),
        }
    }

    /// The window of a block, if sequences of this length are longer.
    pub(super) fn window_of(&self, layer: usize, length: usize) -> Option<usize> {
        self.window.filter(|&window| layer >= self.window_from && window < length)
    }

    /// Refuses sizes that no model has before anything is made of them.
    pub(super) fn check(&self, name: &str) -> Result<()> {
        let wrong = |what: String| Err(Error::config(format!("{name}: {what}")));
        let sizes = [
            ("tokens", self.vocab),
            ("the width", self.width),
            ("heads", self.heads),
            ("key and value heads", self.kv_heads),
            ("the width of the MLP", self.hidden),
            ("blocks", self.layers),
            ("the context", self.context),
        ];
        if let Some((what, size)) = sizes.iter().find(|(_, size)| *size == 0 || *size >= 1 << 31) {
            return wrong(format!("{size} for {what}; it must be above 0 and below 2^31"));
        }
        let (heads, kv, dim) = (self.heads, self.kv_heads, self.head_dim());
        if self.head_width.is_none() && !self.width.is_multiple_of(heads) {
            return wrong(format!("a width of {} is no multiple of {heads} heads", self.width));
        }
        if !heads.is_multiple_of(kv) {
            return wrong(format!("{heads} heads are no multiple of {kv} key and value heads"));
        }
        if !(2..=256).contains(&dim) || !dim.is_multiple_of(2) {
            return wrong(format!("heads of width {dim}; even widths from 2 to 256 are computed"));
        }
        if !(self.rope_base.is_finite() && self.rope_base > 1.0) {
            return wrong(format!("the base of the rotary angles is {}; it must be above 1", self.rope_base));
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return wrong(format!("the norms add {}; it must be 0 or above", self.eps));
        }
        let (frequencies, factor) = self.rope_scaling.frequencies(self.head_dim(), self.rope_base);
        match frequencies.into_iter().chain([factor]).all(|x| x.is_finite() && x > 0.0) {
            true => Ok(()),
            false => Err(Error::config(format!(
                "{name}: rotary angles that are scaled by {:?} are no positive numbers",
                self.rope_scaling
            ))),
        }
    }
}
