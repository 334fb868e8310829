//! Llama-type models in GGUF files.

use super::read::{self, Form, Head, Matrix, Names, Reader, Tensors, fits};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{Lm, LmConfig, RopeScaling};
use crate::ops::sequence::rope::Pairing;
use crate::store::gguf::{Gguf, GgufType, Value};
use crate::tensor::Tensor;

pub(super) const NAMES: Names = Names {
    embedding: "token_embd",
    norm: "output_norm",
    head: "output",
    layer: |l| format!("blk.{l}."),
    norms: ["attn_norm", "ffn_norm"],
    linears: ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"],
    ignored: &[FACTORS],
};

/// Divisors of the frequencies of rotary angles, which converters compute for Llama 3.
pub(super) const FACTORS: &str = "rope_freqs.weight";

/// The keys of these architectures that are honoured, or that change nothing that is computed.
const KNOWN: [&str; 28] = [
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "expert_count",
    "tensor_data_layout",
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    // Beside the one for RMS norms it has no use.
    "attention.layer_norm_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
];

/// Factors that change nothing if they are 1.
const FACTOR_KEYS: [&str; 4] = ["logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale"];

/// Whether a key's value says that it changes nothing: 0, which llama.cpp takes for a value that is not there, or a factor of 1.
fn changes_nothing(key: &str, value: &Value) -> bool {
    let is_neutral = |x: f64| x == 0.0 || x == 1.0 && FACTOR_KEYS.contains(&key);
    match value {
        Value::Bool(on) => !on,
        Value::Integer(n) => is_neutral(*n as f64),
        Value::Float(x) => is_neutral(*x),
        _ => false,
    }
}

/// A value in a message.
fn shown(value: &Value) -> String {
    match value {
        Value::Bool(on) => on.to_string(),
        Value::Integer(n) => n.to_string(),
        Value::Float(x) => x.to_string(),
        Value::Text(text) => format!("'{text}'"),
        Value::List(all) => format!("a list of {}", all.len()),
    }
}

/// The keys of one architecture.
struct Keys<'a> {
    file: &'a Gguf,
    kind: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.kind)
    }

    fn has(&self, key: &str) -> bool {
        self.file.metadata().contains_key(&self.key(key))
    }

    fn number(&self, key: &str) -> Result<usize> {
        self.file.number(&self.key(key))
    }

    fn number_or(&self, key: &str, otherwise: usize) -> Result<usize> {
        if self.has(key) { self.number(key) } else { Ok(otherwise) }
    }

    fn float(&self, key: &str) -> Result<f64> {
        self.file.float(&self.key(key))
    }

    fn float_or(&self, key: &str, otherwise: f64) -> Result<f64> {
        if self.has(key) { self.float(key) } else { Ok(otherwise) }
    }

    fn wrong(&self, key: &str, message: &str) -> Error {
        Error::config(format!("the file's `{}`: {message}", self.key(key)))
    }

    /// Refuses keys of this architecture that are not known, because they may change what is computed.
    fn check_known(&self) -> Result<()> {
        let prefix = format!("{}.", self.kind);
        for (name, value) in self.file.metadata() {
            let Some(key) = name.strip_prefix(&prefix) else { continue };
            if !KNOWN.contains(&key) && !changes_nothing(key, value) {
                let kind = if key == "pooling_type" { ", as in models for embeddings" } else { "" };
                return Err(self.wrong(
                    key,
                    &format!(
                        "is {}{kind}, which this program does not compute with; without it the answers would be others",
                        shown(value)
                    ),
                ));
            }
        }
        // Negative numbers mean that nothing is said.
        let is_plain = |key: &str| self.float_or(key, 1.0).map(|x| x == 1.0 || x < 0.0);
        for key in ["rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"] {
            if !is_plain(key)? {
                return Err(self.wrong(key, "this form of YaRN is not computed"));
            }
        }
        Ok(())
    }

    fn scaling(&self, context: usize) -> Result<RopeScaling> {
        let positive = |key: &str, otherwise: f64| {
            let number = self.float_or(key, otherwise)?;
            let fits = number.is_finite() && number > 0.0;
            if fits { Ok(number) } else { Err(self.wrong(key, "is no positive number")) }
        };
        // An older key for the same, in which 0 means that nothing is scaled.
        let older = self.float_or("rope.scale_linear", 0.0)?;
        let otherwise = if older == 0.0 { 1.0 } else { older };
        let factor = || positive("rope.scaling.factor", otherwise);
        let kind = match self.has("rope.scaling.type") {
            true => self.file.text(&self.key("rope.scaling.type"))?,
            false => "linear",
        };
        // llama.cpp multiplies cosines and sines by it under every kind.
        let attention = positive("rope.scaling.attn_factor", 1.0)?;
        if attention != 1.0 && kind != "yarn" {
            return Err(
                self.wrong("rope.scaling.attn_factor", "angles with a factor are computed under yarn only")
            );
        }
        match kind {
            "linear" if factor()? == 1.0 => Ok(RopeScaling::None),
            "none" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "yarn" if self.has("rope.scaling.yarn_log_multiplier") => {
                Err(self.wrong("rope.scaling.yarn_log_multiplier", "this form of YaRN is not computed"))
            }
            "yarn" => {
                let factor = factor()?;
                // 0 means the model's own context.
                let original = match self.number_or("rope.scaling.original_context_length", context)? {
                    0 => context,
                    original => original,
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    original: original as f64,
                    fast: positive("rope.scaling.yarn_beta_fast", 32.0)?,
                    slow: positive("rope.scaling.yarn_beta_slow", 1.0)?,
                    attention: attention * RopeScaling::yarn_attention(factor),
                })
            }
            other => {
                let message = format!("'{other}' is not computed; none, linear and yarn are");
                Err(self.wrong("rope.scaling.type", &message))
            }
        }
    }
}

/// The architecture and the sizes that a file's metadata has.
pub(super) fn settings(file: &Gguf) -> Result<(String, LmConfig)> {
    let kind = file.text("general.architecture")?;
    if !["llama", "qwen2"].contains(&kind) {
        return Err(Error::config(format!(
            "the file's architecture is '{kind}'; 'llama', which Mistral has too, and 'qwen2' are read"
        )));
    }
    let keys = Keys { file, kind };
    if keys.number_or("expert_count", 0)? > 0 {
        return Err(keys.wrong("expert_count", "mixtures of experts are not computed"));
    }
    keys.check_known()?;
    if file.metadata().get(&keys.key("attention.causal")) == Some(&Value::Bool(false)) {
        return Err(keys.wrong("attention.causal", "attention that sees later tokens is not computed"));
    }
    let heads = keys.number("attention.head_count")?;
    let context = keys.number("context_length")?;
    let head_width = keys.has("attention.key_length").then(|| keys.number("attention.key_length"));
    let window = keys.has("attention.sliding_window").then(|| keys.number("attention.sliding_window"));
    let config = LmConfig {
        vocab: file.shape("token_embd.weight")?.first().copied().unwrap_or(0),
        width: keys.number("embedding_length")?,
        heads,
        kv_heads: keys.number_or("attention.head_count_kv", heads)?,
        head_width: head_width.transpose()?,
        hidden: keys.number("feed_forward_length")?,
        depth: keys.number("block_count")?,
        context,
        rope_base: keys.float_or("rope.freq_base", 10000.0)?,
        rope_scaling: keys.scaling(context)?,
        window: window.transpose()?.filter(|&window| window > 0),
        eps: keys.float("attention.layer_norm_rms_epsilon")? as f32,
        // Converters order the rows of q and k of a Llama so that neighbours are rotated together.
        pairing: if kind == "llama" { Pairing::Neighbours } else { Pairing::Halves },
        ..LmConfig::default()
    };
    config.check("the file")?;
    for key in ["attention.value_length", "rope.dimension_count"] {
        if keys.number_or(key, config.head_dim())? != config.head_dim() {
            return Err(keys.wrong(
                key,
                "heads that are rotated in part, or whose values have another width, are not computed",
            ));
        }
    }
    Ok((kind.into(), config))
}

/// The frequencies of the rotary angles, which a tensor of the file may divide.
fn frequencies(file: &Gguf, config: &LmConfig) -> Result<(Vec<f64>, f64)> {
    let (mut all, factor) = config.rope_scaling.frequencies(config.head_dim(), config.rope_base);
    if file.names().any(|name| name == FACTORS) {
        let divisors = file.tensor_f32(FACTORS)?;
        if divisors.len() != all.len() || divisors.iter().any(|d| !(d.is_finite() && *d > 0.0)) {
            return Err(Error::config(format!(
                "tensor `{FACTORS}` needs {} positive numbers, one for each pair of a head",
                all.len()
            )));
        }
        all.iter_mut().zip(divisors).for_each(|(f, divisor)| *f /= f64::from(divisor));
    }
    Ok((all, factor))
}

/// The tensors of a file in one form.
struct Stored<'a>(&'a Gguf, Form);

impl Tensors for Stored<'_> {
    fn names(&self) -> Vec<String> {
        self.0.names().map(String::from).collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.0.shape(name).map(<[usize]>::to_vec)
    }

    fn check(&self, name: &str, want: &[usize]) -> Result<()> {
        self.0.kind(name)?;
        fits(name, self.0.shape(name)?, want)
    }

    fn matrix(&self, gpu: &Gpu, name: &str) -> Result<Matrix> {
        let Stored(file, form) = self;
        let kind = file.kind(name)?;
        let dtype = match kind {
            GgufType::F16 => DType::F16,
            GgufType::BF16 => DType::Bf16,
            _ => DType::F32,
        };
        if *form == Form::F32 || kind.packing().is_none() && dtype == DType::F32 {
            return Ok(Matrix::Tensor(self.vector(gpu, name)?));
        }
        if dtype.is_half() {
            return Ok(Matrix::Tensor(Tensor::resident(gpu, dtype, file.bytes_of(name)?, file.shape(name)?)));
        }
        let (packing, _, words) = file.packed(name)?;
        Ok(Matrix::Packed(packing, words))
    }

    fn vector(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        Ok(Tensor::from_slice(gpu, &self.0.tensor_f32(name)?, self.0.shape(name)?))
    }
}

/// Checks the headers of a file's tensors. Returns the number of weights.
pub(super) fn check(file: &Gguf) -> Result<usize> {
    let (_, config) = settings(file)?;
    frequencies(file, &config)?;
    read::check(&Stored(file, Form::Stored), &NAMES, &config, Head::AsFound, [false; 7])
}

/// Reads the model of a file.
pub(super) fn load(
    gpu: &Gpu,
    file: &Gguf,
    context: usize,
    form: Form,
    watch: &dyn Fn(usize) -> Result<()>,
) -> Result<Lm> {
    let (_, config) = settings(file)?;
    let context = config.context.min(context);
    let config = config.context(context);
    let frequencies = frequencies(file, &config)?;
    let stored = Stored(file, form);
    Reader::new(gpu, &stored, &NAMES, config).watch(watch).model(Head::AsFound, frequencies)
}

impl Lm {
    /// Reads a GGUF file whose architecture is `llama` or `qwen2`, for sequences of up to `context` tokens (or the file's own
    /// number, if that is less). Weights are dequantised to f32 leaves. [`Published`](super::Published) keeps them packed.
    ///
    /// # Errors
    /// [`Error::Config`] when the file has another architecture or its sizes do not fit, [`Error::Format`] when something
    /// is missing; when the device fails.
    pub fn from_gguf(gpu: &Gpu, file: &Gguf, context: usize) -> Result<Lm> {
        load(gpu, file, context, Form::F32, &|_| Ok(()))
    }
}

/// The name that a file gives its model.
pub(super) fn title(file: &Gguf) -> Option<String> {
    match file.metadata().get("general.name") {
        Some(Value::Text(name)) => Some(name.clone()),
        _ => None,
    }
}
