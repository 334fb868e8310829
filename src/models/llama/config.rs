//! The sizes and constants of a Llama-type model.

use crate::error::{Error, Result};
use crate::models::lm::{LmConfig, RopeScaling};
use serde_json::Value;

/// The kinds of models that are read, as `config.json` and GGUF files name them.
pub(super) const KINDS: [&str; 3] = ["llama", "mistral", "qwen2"];

/// What `config.json` says besides sizes.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LlamaSettings {
    /// `llama`, `mistral` or `qwen2`.
    pub kind: String,
    /// Sizes and constants. With a tied head, a head in the file goes first.
    pub config: LmConfig,
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
        let config = LmConfig {
            vocab: of.number("vocab_size")?,
            width: of.number("hidden_size")?,
            heads,
            kv_heads: of.number_or("num_key_value_heads", heads)?,
            head_width: of.get("head_dim").map(|_| of.number("head_dim")).transpose()?,
            hidden: of.number("intermediate_size")?,
            depth: of.number("num_hidden_layers")?,
            context,
            rope_base: base.unwrap_or(10000.0),
            rope_scaling: RopeScaling::from_json(rope.0, context, original)?,
            eps: of.float("rms_norm_eps")?.ok_or_else(|| wrong("there is no number `rms_norm_eps`"))? as f32,
            ..LmConfig::default()
        };
        let mut config = windowed(config, &of, kind)?;
        config.check("config.json")?;
        let [attention, mlp] = [of.is_on("attention_bias")?, of.is_on("mlp_bias")?];
        config.biases = match kind {
            "qwen2" => [true, true, true, false, false, false, false],
            "llama" => [attention, attention, attention, attention, mlp, mlp, mlp],
            _ => [false; 7],
        };
        config.tied_head = of.is_on("tie_word_embeddings")?;
        Ok(LlamaSettings { kind: kind.into(), config, quantization: of.get("quantization_config").cloned() })
    }
}

/// Adds the window of attention. Qwen2 has it only if it says so, and from some block on.
fn windowed(config: LmConfig, of: &Json, kind: &str) -> Result<LmConfig> {
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
        (Some(_), Some(window_from)) if window_from < config.depth => {
            Ok(LmConfig { window: size, window_from, ..config })
        }
        _ => Ok(config),
    }
}

impl LmConfig {
    /// Reads the sizes in the text of a Hugging Face `config.json`. [`LlamaSettings::from_json`] reads the rest as well.
    ///
    /// # Errors
    /// As [`LlamaSettings::from_json`], and for packed weights.
    pub fn from_json(text: &str) -> Result<LmConfig> {
        let LlamaSettings { config, quantization, .. } = LlamaSettings::from_json(text)?;
        match quantization {
            Some(_) => Err(wrong(
                "`quantization_config`: these weights are packed; models::llama::Published reads them",
            )),
            None => Ok(config),
        }
    }
}
