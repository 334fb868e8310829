//! Writes a language model as an ordinary folder of Hugging Face's libraries, with every matrix stored where it is used.

use super::read::HUGGING_FACE;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::files;
use crate::models::lm::{LINEARS, Lm, LmConfig, MlpKind, NormKind, Positions, RopeScaling};
use crate::ops::product::site::Site;
use crate::ops::sequence::rope::Pairing;
use crate::store::{Entry, FileDType, bf16_bytes, save};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// How a published kind of model is called: in `model_type`, and its class in transformers.
fn kind(c: &LmConfig) -> Result<[&'static str; 2]> {
    let wrong = |what: &str| {
        Err(Error::config(format!("an ordinary folder: {what}; no published kind has this form")))
    };
    let form = (c.norm, c.positions, c.mlp, c.experts.is_some());
    if form != (NormKind::Rms, Positions::Rotary, MlpKind::SwiGlu, false) {
        return wrong("the model has not RMS norms, rotary positions and SwiGLU");
    }
    let [q, k, v, o, gate, up, down] = c.biases;
    match (c.window, [q, k, v, o], [gate, up, down]) {
        (
            None,
            [false, false, false, false] | [true, true, true, true],
            [false, false, false] | [true, true, true],
        ) => Ok(["llama", "LlamaForCausalLM"]),
        (_, [true, true, true, false], [false, false, false]) => Ok(["qwen2", "Qwen2ForCausalLM"]),
        (Some(_), [false, false, false, false], [false, false, false]) if c.window_from == 0 => {
            Ok(["mistral", "MistralForCausalLM"])
        }
        _ => wrong("its biases and its window of attention do not go together"),
    }
}

/// The scaling of rotary angles as `config.json` says it.
fn scaling(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low, high, original } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original as u64,
        }),
        RopeScaling::Yarn { factor, original, fast, slow, attention } => json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original as u64,
            "beta_fast": fast, "beta_slow": slow, "attention_factor": attention,
        }),
    }
}

/// The text of `config.json`.
fn config(c: &LmConfig, dtype: DType) -> Result<Value> {
    let [kind, class] = kind(c)?;
    let name = match dtype {
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
        _ => "float32",
    };
    let mut all = json!({
        "architectures": [class], "model_type": kind, "vocab_size": c.vocab, "hidden_size": c.width,
        "intermediate_size": c.hidden, "num_hidden_layers": c.depth, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim(), "hidden_act": "silu",
        "max_position_embeddings": c.context, "rms_norm_eps": c.eps, "rope_theta": c.rope_base,
        "rope_scaling": scaling(c.rope_scaling), "tie_word_embeddings": c.tied_head, "torch_dtype": name,
        "bos_token_id": null, "eos_token_id": null,
    });
    match kind {
        "llama" => {
            all["attention_bias"] = c.biases[0].into();
            all["mlp_bias"] = c.biases[4].into();
        }
        "qwen2" => {
            all["use_sliding_window"] = c.window.is_some().into();
            all["max_window_layers"] = c.window_from.into();
            all["sliding_window"] = c.window.into();
        }
        _ => all["sliding_window"] = c.window.into(),
    }
    Ok(all)
}

/// Where row `row` of q or k stands in a folder, if in the model neighbours are rotated together: there the two lie half a head apart.
pub(crate) fn half_row(row: usize, head: usize) -> usize {
    let (first, i) = (row / head * head, row % head);
    first + i / 2 + if i.is_multiple_of(2) { 0 } else { head / 2 }
}

/// The rows in the order of folders.
fn in_halves(rows: &[f32], head: usize, columns: usize) -> Vec<f32> {
    let mut new = vec![0.0; rows.len()];
    for (row, values) in rows.chunks(columns).enumerate() {
        new[half_row(row, head) * columns..][..columns].copy_from_slice(values);
    }
    new
}

/// The bytes of numbers in a type.
fn bytes(values: &[f32], dtype: DType, name: &str) -> Result<Vec<u8>> {
    let most = values.iter().filter(|x| x.is_finite()).fold(0.0f32, |most, x| most.max(x.abs()));
    if dtype == DType::F16 && !half::f16::from_f32(most).is_finite() {
        let message =
            format!("tensor `{name}` has numbers up to {most:e}, which f16 does not hold; use bf16 or f32");
        return Err(Error::config(message));
    }
    Ok(match dtype {
        DType::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_bits().to_le_bytes()).collect(),
        DType::Bf16 => bf16_bytes(values),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    })
}

/// A tensor of the file, whose elements are computed as it is written.
struct Place {
    name: String,
    source: Source,
    /// The width of a head whose rows are put in another order.
    head: Option<usize>,
}

enum Source {
    Weight(Arc<dyn Site>),
    Vector(Tensor),
}

impl Place {
    fn new(name: String, source: Source) -> Place {
        Place { name, source, head: None }
    }

    fn entry(self, dtype: DType) -> Entry<'static> {
        let shape = match &self.source {
            Source::Weight(site) => site.size().to_vec(),
            Source::Vector(x) => x.shape().to_vec(),
        };
        let kind = match dtype {
            DType::F16 => FileDType::F16,
            DType::Bf16 => FileDType::BF16,
            _ => FileDType::F32,
        };
        let columns = shape.get(1).copied().unwrap_or(1);
        let name = self.name.clone();
        Entry::lazy(self.name, kind, &shape, move || {
            let values = match &self.source {
                Source::Weight(site) => no_grad(|| site.expand()).to_vec::<f32>()?,
                Source::Vector(x) => x.detach().cast(DType::F32).to_vec::<f32>()?,
            };
            let values = match self.head {
                Some(head) => in_halves(&values, head, columns),
                None => values,
            };
            bytes(&values, dtype, &name)
        })
    }
}

impl Lm {
    /// Writes the model as an ordinary folder: `config.json` and `model.safetensors` with the names of Hugging Face, in f32, f16 or
    /// bf16. Whatever the depths share is written out at each of them, so other programs open it, and it is as large as a model that
    /// shares nothing. The tokenizer is not part of it.
    ///
    /// # Errors
    /// [`Error::Config`] for a model that has no published form: anything but RMS norms, rotary positions and SwiGLU, and biases of one
    /// of the kinds. [`Error::Io`] when the folder cannot be written.
    pub fn save_folder(&self, folder: impl AsRef<Path>, dtype: DType) -> Result<()> {
        let (folder, c, names) = (folder.as_ref(), &self.config, &HUGGING_FACE);
        let settings = config(c, dtype)?;
        self.check_angles()?;
        let text =
            serde_json::to_string_pretty(&settings).map_err(|error| Error::config(error.to_string()))?;
        let mut places = Vec::new();
        let mut put = |path: &str, source: Source| places.push(Place::new(path.into(), source));
        put(&format!("{}.weight", names.embedding), Source::Weight(self.embedding.weight()));
        put(&format!("{}.weight", names.norm), Source::Vector(self.norm.gain.clone()));
        if let Some(head) = &self.head {
            put(&format!("{}.weight", names.head), Source::Weight(head.weight.clone()));
        }
        for (l, block) in no_grad(|| self.blocks_now()).iter().enumerate() {
            let prefix = (names.layer)(l);
            for (name, norm) in names.norms.iter().zip([&block.norm1, &block.norm2]) {
                places.push(Place::new(format!("{prefix}{name}.weight"), Source::Vector(norm.gain.clone())));
            }
            for (name, linear) in block.linears() {
                let at = LINEARS.iter().position(|own| *own == name).unwrap_or_default();
                let turned = matches!(name, "q" | "k") && c.pairing == Pairing::Neighbours;
                let head = turned.then(|| c.head_dim());
                let path = format!("{prefix}{}", names.linears[at]);
                let weight = Source::Weight(linear.weight.clone());
                places.push(Place { name: format!("{path}.weight"), source: weight, head });
                if let Some(bias) = &linear.bias {
                    places.push(Place {
                        name: format!("{path}.bias"),
                        source: Source::Vector(bias.clone()),
                        head,
                    });
                }
            }
        }
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, error))?;
        let metadata = [("format".to_string(), "pt".to_string())].into();
        let entries: Vec<Entry> = places.into_iter().map(|place| place.entry(dtype)).collect();
        save(folder.join("model.safetensors"), entries, &metadata)?;
        files::replace_with(&folder.join("config.json"), text)
    }
}
