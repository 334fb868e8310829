//! Fits the models' tensors to each other: which stand in for others, which are not merged, and what is said about it.

use super::config::{Slice, Source};
use super::job::{Input, Job, Model, Output, Stage, is_float};
use super::method::{Arguments, Method};
use crate::error::Result;
use crate::merge::Weights;
use crate::store::{FileDType, some};
use serde_json::Value;
use std::collections::BTreeSet;

/// An output head and the tables of token vectors that a model without one, whose head is tied, has instead.
const HEADS: [(&str, &[&str]); 5] = [
    (
        "lm_head.weight",
        &[
            "model.embed_tokens.weight",
            "model.language_model.embed_tokens.weight",
            "transformer.wte.weight",
            "model.shared.weight",
            "model.decoder.embed_tokens.weight",
            "backbone.embeddings.weight",
        ],
    ),
    ("language_model.lm_head.weight", &["language_model.model.embed_tokens.weight"]),
    ("embed_out.weight", &["gpt_neox.embed_in.weight"]),
    ("output.weight", &["tok_embeddings.weight"]),
    ("cls.predictions.decoder.weight", &["bert.embeddings.word_embeddings.weight"]),
];

/// Kinds of models whose head is not tied if their settings do not say it. For other kinds transformers takes it to be tied.
const UNTIED: [&str; 12] = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "phi",
    "phi3",
    "gpt_neox",
    "falcon",
    "olmo2",
];

/// Ends of the names of packed weights and of what belongs to them, by GPTQ, AWQ, compressed-tensors, bitsandbytes, AQLM, HQQ and
/// MXFP4.
const PACKED: [&str; 12] = [
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_zero_point",
    ".absmax",
    ".quant_map",
    ".SCB",
    ".codebooks",
    ".W_q",
    "_blocks",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];

/// The most bytes at the beginning of a tensor in which an extreme element is looked for. A mask has one in its first rows.
const LOOK: usize = 1 << 18;

/// Whether a tensor is computed from the settings when a model is made, so that models may lack it.
fn is_buffer(name: &str, shape: &[usize]) -> bool {
    let ends =
        [".inv_freq", "position_ids", ".masked_bias", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"];
    // GPT-2's causal mask is [1, 1, n, n], and has the name of a bias.
    let mask = (name.ends_with(".attn.bias") || name.ends_with(".attention.bias")) && shape.len() == 4;
    mask || ends.iter().any(|end| name.ends_with(end))
}

/// Whether settings say that the output head is the table of token vectors. `None` if there are none, or they leave it open.
fn tied(settings: Option<&Value>) -> Option<bool> {
    let settings = settings?;
    let said = |part: &Value| part["tie_word_embeddings"].as_bool();
    let untied = settings["model_type"].as_str().is_some_and(|kind| UNTIED.contains(&kind));
    said(settings).or_else(|| said(&settings["text_config"])).or(untied.then_some(false))
}

impl Model {
    /// The table of token vectors that is this model's output head, because it has none of its own or has the table again.
    fn table_for(&self, head: &str) -> Option<&'static str> {
        let (_, tables) = HEADS.iter().find(|(known, _)| *known == head)?;
        let table = tables.iter().find(|table| self.checkpoint.contains(table))?;
        let said = tied(self.settings.as_ref());
        let is_table = match self.checkpoint.contains(head) {
            false => said != Some(false),
            true => {
                said == Some(true) && self.checkpoint.bytes(head).ok() == self.checkpoint.bytes(table).ok()
            }
        };
        is_table.then_some(table)
    }
}

impl Job {
    /// The table that is a model's head. Models that are aligned are compared by their own tensors, so there it is none.
    fn table_for(&self, model: usize, head: &str) -> Option<&'static str> {
        self.models[model].table_for(head).filter(|_| self.config.align.is_none())
    }

    /// Whether the output has a head and the leading model's head is its table.
    pub(super) fn has_new_head(&self) -> bool {
        let heads = HEADS.iter().filter(|(head, _)| self.outputs.iter().any(|o| o.name == *head));
        let mut heads = heads.map(|(head, _)| head);
        heads.any(|head| self.models[0].table_for(head).is_some())
    }

    /// Adds the head that other sources have and the model `lead` does not, and takes out one that all have as their table.
    pub(super) fn fit_head(&mut self, lead: usize, sources: &[&Source], names: &mut Vec<String>) {
        let is_source = |model: &&Model| {
            let base = self.config.base.as_ref() == Some(&model.path);
            base || sources.iter().any(|source| source.model == model.path)
        };
        let others: Vec<&Model> = self.models.iter().filter(is_source).collect();
        let mut twice = Vec::new();
        for (head, _) in HEADS {
            let Some(table) = self.table_for(lead, head) else { continue };
            let has_own = |model: &&Model| model.checkpoint.contains(head) && model.table_for(head).is_none();
            let listed = names.iter().position(|name| name == head);
            match (others.iter().any(has_own), listed) {
                (true, None) => names.push(head.into()),
                (false, Some(at)) => {
                    names.remove(at);
                    twice.push((head, table));
                }
                _ => {}
            }
        }
        for (head, table) in twice {
            self.notes.push(format!("`{head}` is `{table}` again, to which it is tied; it is left out"));
        }
    }

    /// Adds a tensor to the note about several, which has `{}` for their names.
    fn gather(&mut self, note: String, name: &str) {
        self.gathered.entry(note).or_default().insert(name.into());
    }

    /// Sets the output's shape and type from its first input, and returns the type. `None` if the inputs do not fit, or there is
    /// no such output; the reasons are added to the problems or notes.
    pub(super) fn fit(&mut self, output: &mut Output, arguments: &Arguments) -> Result<Option<FileDType>> {
        self.stand_in(output);
        self.keep_buffer(output);
        let mut problems = Vec::new();
        let mut lead: Option<(Input, Vec<usize>, FileDType)> = None;
        for input in output.inputs() {
            let model = &self.models[input.model];
            let path = model.path.display();
            let Ok(info) = model.checkpoint.info(&input.name) else {
                problems.push(format!("{path} has no tensor `{}`", input.name));
                continue;
            };
            match &lead {
                None => lead = Some((input.clone(), info.shape.clone(), info.dtype)),
                Some((first, shape, dtype)) => {
                    let other = self.models[first.model].path.display();
                    if *shape != info.shape {
                        let (a, b) = (&info.shape, shape);
                        problems.push(format!("`{}` is {a:?} in {path} and {b:?} in {other}", input.name));
                    } else if is_float(*dtype) != is_float(info.dtype) {
                        let (a, b) = (info.dtype, dtype);
                        problems.push(format!("`{}` is {a} in {path} and {b} in {other}", input.name));
                    }
                }
            }
        }
        let fits = problems.is_empty();
        self.problems.append(&mut problems);
        let Some((_, shape, dtype)) = lead.filter(|_| fits) else { return Ok(None) };
        if is_small_float(dtype) && !self.passes_through(arguments) {
            self.problems.push(format!(
                "`{}` is {dtype}, which cannot be merged; convert the model first",
                output.name
            ));
            return Ok(None);
        }
        (output.shape, output.dtype) = (shape, dtype);
        Ok(Some(dtype))
    }

    /// Lets a tied model's table of token vectors stand in for the head that others have.
    fn stand_in(&mut self, output: &mut Output) {
        let mut tied = BTreeSet::new();
        let inputs = output.base.iter_mut().chain(&mut output.models);
        for (input, table) in inputs.filter_map(|input| {
            let table = self.table_for(input.model, &input.name)?;
            Some((input, table))
        }) {
            let place = self.models[input.model].path.display();
            tied.insert(format!("{place} has no head of its own; its `{table}` stands for `{}`", input.name));
            input.name = table.into();
        }
        self.notes.extend(tied);
    }

    /// Takes a buffer that not every model has from those that have it.
    fn keep_buffer(&mut self, output: &mut Output) {
        let has = |input: &Input| self.models[input.model].checkpoint.info(&input.name).ok();
        let Some(found) = output.inputs().find_map(has) else { return };
        if !is_buffer(&output.name, &found.shape) || output.inputs().all(|input| has(input).is_some()) {
            return;
        }
        output.base = output.base.take().filter(|input| has(input).is_some());
        output.models.retain(|input| has(input).is_some());
        output.fishers.clear();
        if let Some(first) = output.inputs().next() {
            let path = self.models[first.model].path.display();
            self.gather(
                format!("not every model has the buffers {{}}; they are taken from {path}"),
                &output.name,
            );
        }
    }

    /// Whether an output is what its one model has, byte for byte.
    fn passes_through(&self, arguments: &Arguments) -> bool {
        self.config.method == Method::Passthrough && arguments.keeps() && self.config.align.is_none()
    }

    /// Whether an output is merged, for which so many inputs were asked. If not, the values of its first input are copied, and it
    /// is said where this is a choice.
    pub(super) fn is_merged(&mut self, output: &Output, arguments: &Arguments, asked: usize) -> Result<bool> {
        if self.passes_through(arguments) || output.inputs().count() < asked {
            return Ok(false);
        }
        let inputs: Vec<&Input> = output.base.iter().chain(&output.models).collect();
        let bytes = |input: &&Input| self.models[input.model].checkpoint.bytes(&input.name);
        let all = inputs.iter().map(bytes).collect::<Result<Vec<&[u8]>>>()?;
        let first = self.models[inputs[0].model].checkpoint.info(&inputs[0].name)?.dtype;
        let path = self.models[inputs[0].model].path.display();
        let is_buffer = is_buffer(&output.name, &output.shape);
        if !is_float(first) || is_buffer {
            if let Some(other) = all.iter().position(|bytes| *bytes != all[0]) {
                let other = self.models[inputs[other].model].path.display();
                let what = if is_buffer { "are buffers".to_string() } else { format!("are {first}") };
                let note =
                    format!("{{}} {what} and differ between {path} and {other}; they are taken from {path}");
                self.gather(note, &output.name);
            }
            return Ok(false);
        }
        let same_type =
            |input: &&Input| self.models[input.model].checkpoint.dtype(&input.name).ok() == Some(first);
        let is_fixed = self.config.align.is_none() && self.config.method != Method::Passthrough;
        let is_mask = is_fixed && has_extreme(first, all[0]);
        if is_mask && inputs.iter().all(same_type) && all.iter().all(|bytes| *bytes == all[0]) {
            let note = "{} have infinite elements, or nearly, as a mask has, and are the same in all models; they are kept as they are";
            self.gather(note.into(), &output.name);
            return Ok(false);
        }
        Ok(true)
    }

    /// Says what types become that are not the output's.
    pub(super) fn note_dtype(&mut self, output: &Output, stored: FileDType) {
        match (self.config.dtype, &output.arguments) {
            (None, Some(_)) if stored == FileDType::F64 => {
                self.gather("{} are F64 and are merged and written as F32".into(), &output.name);
            }
            (Some(dtype), None) if is_small_float(stored) => {
                self.gather(format!("{{}} stay {stored}, which is not converted to {dtype}"), &output.name);
            }
            _ => {}
        }
    }

    /// Looks at the models as a whole: packed weights, tensors that only some have, and what is not copied.
    pub(super) fn look(&mut self) -> Result<()> {
        self.find_packed();
        self.find_strangers();
        self.find_left_behind()?;
        for (note, names) in std::mem::take(&mut self.gathered) {
            self.notes.push(note.replace("{}", &some(names.iter().map(String::as_str))));
        }
        // A model that is read for several slices says the same several times.
        let mut said = BTreeSet::new();
        self.notes.retain(|note| said.insert(note.clone()));
        Ok(())
    }

    /// Refuses packed weights, unless nothing is computed with them.
    fn find_packed(&mut self) {
        let is_merged = |output: &Output| output.arguments.is_some();
        let computes = self.config.method != Method::Passthrough || self.outputs.iter().any(is_merged);
        for model in &self.models {
            let method = model.settings.as_ref().map(|config| &config["quantization_config"]);
            let method = method.filter(|config| !config.is_null());
            let path = model.path.display();
            match (model.packed(method.is_some()), method) {
                (Some(name), method) if computes => {
                    let by = method.and_then(|m| m["quant_method"].as_str());
                    let by = by.map_or(String::new(), |m| format!(" ({m})"));
                    self.problems.push(format!(
                        "{path} has packed weights{by}, such as `{name}`, which cannot be merged; take the model from which they \
                         were made"
                    ));
                }
                (None, Some(_)) => self.notes.push(format!(
                    "{path}: config.json has `quantization_config`, and all weights are plain; other programs may not load such a \
                     folder"
                )),
                _ => {}
            }
        }
    }

    /// Adds tensors that the output has no place for to the problems. Buffers are left out instead.
    fn find_strangers(&mut self) {
        let used: BTreeSet<(usize, &str)> =
            self.outputs.iter().flat_map(|o| o.inputs().map(|i| (i.model, i.name.as_str()))).collect();
        let (mut strangers, mut buffers) = (BTreeSet::new(), Vec::new());
        let slices = &self.config.slices;
        for (s, slice) in slices.iter().enumerate() {
            let ends = [s == 0, s + 1 == slices.len()];
            for i in self.models_of(slice) {
                let Model { path, checkpoint, .. } = &self.models[i];
                let layers =
                    slice.sources.iter().find(|source| source.model == *path).unwrap_or(&slice.sources[0]);
                let layers = layers.layers.as_ref();
                let belongs = |name: &str| match Stage::of(name) {
                    Stage::Before => ends[0],
                    Stage::After => ends[1],
                    Stage::Layer(layer) => layers.is_none_or(|range| range.contains(&layer)),
                };
                for name in checkpoint.names() {
                    let known =
                        used.contains(&(i, name.as_str())) || self.models[i].table_for(&name).is_some();
                    if known || !belongs(&name) {
                        continue;
                    }
                    if checkpoint.shape(&name).is_ok_and(|shape| is_buffer(&name, &shape)) {
                        buffers.push((path.display().to_string(), name));
                    } else {
                        strangers.insert((i, name));
                    }
                }
            }
        }
        let noted: BTreeSet<&str> =
            self.problems.iter().filter_map(|problem| problem.split('`').nth(1)).collect();
        strangers.retain(|(_, name)| !noted.contains(name.as_str()));
        let problems = strangers.into_iter().map(|(i, name)| {
            let path = self.models[i].path.display();
            let adapter = name.starts_with("base_model.model.");
            let hint = if adapter { ", as in an adapter: merge it into its model first" } else { "" };
            format!("only {path} has a tensor `{name}`{hint}")
        });
        let problems: Vec<String> = problems.collect();
        self.problems.extend(problems);
        let lead = self.leader().path.display().to_string();
        for (path, name) in buffers {
            self.gather(format!("{lead} lacks the buffers {{}} of {path}; they are left out"), &name);
        }
    }

    /// The models whose tensors a slice needs.
    fn models_of(&self, slice: &Slice) -> Vec<usize> {
        let paths = slice.sources.iter().map(|source| &source.model).chain(&self.config.base);
        let index = |path: &std::path::PathBuf| self.models.iter().position(|model| model.path == *path);
        let all: BTreeSet<usize> = paths.filter_map(index).collect();
        all.into_iter().collect()
    }
}

impl Model {
    /// The name of a packed weight. `declared` is whether the settings say that there are some.
    fn packed(&self, declared: bool) -> Option<String> {
        let is_packed = |name: &String| {
            let by_name = PACKED.iter().any(|end| name.ends_with(end));
            let info = self.checkpoint.info(name);
            by_name || declared && info.is_ok_and(|info| info.shape.len() > 1 && !is_float(info.dtype))
        };
        self.checkpoint.names().into_iter().find(is_packed)
    }
}

/// Whether a type has fewer than 8 bits, or is a float of 8.
fn is_small_float(dtype: FileDType) -> bool {
    dtype.bits() < 8 || format!("{dtype}").starts_with("F8")
}

/// Whether the beginning of a tensor has an element that is infinite or so large that a sum of a few would be, and no NaN. Masks
/// are made of these.
fn has_extreme(dtype: FileDType, bytes: &[u8]) -> bool {
    let bytes = &bytes[..bytes.len().min(LOOK)];
    /// Looks for elements from `least` to infinity, `top`, and for NaN, by the bits without sign.
    fn found<const N: usize>(bytes: &[u8], least: u64, top: u64) -> bool {
        let word = |e: &[u8; N]| {
            let mut wide = [0; 8];
            wide[..N].copy_from_slice(e);
            u64::from_le_bytes(wide) & (u64::MAX >> (65 - 8 * N))
        };
        let elements = || bytes.as_chunks::<N>().0.iter().map(word);
        elements().any(|x| x >= least) && !elements().any(|x| x > top)
    }
    // Sums are f32, so only its own range matters: 2^124 is a sixteenth of it.
    match dtype {
        FileDType::BF16 => found::<2>(bytes, 251 << 7, 0x7f80),
        FileDType::F16 => found::<2>(bytes, 0x7c00, 0x7c00),
        FileDType::F32 => found::<4>(bytes, 251 << 23, 0x7f80_0000),
        FileDType::F64 => found::<8>(bytes, 0x7ff0 << 48, 0x7ff0 << 48),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extreme_elements_are_seen_in_every_type() {
        let f32s = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        assert!(has_extreme(FileDType::F32, &f32s(&[0.0, f32::NEG_INFINITY])));
        assert!(has_extreme(FileDType::F32, &f32s(&[0.0, f32::MIN])));
        assert!(!has_extreme(FileDType::F32, &f32s(&[0.0, 1e37, 1e-40])));
        assert!(!has_extreme(FileDType::F32, &f32s(&[f32::INFINITY, f32::NAN])));
        assert!(has_extreme(FileDType::F64, &f64::INFINITY.to_le_bytes()));
        assert!(!has_extreme(FileDType::F64, &f64::NAN.to_le_bytes()));
        assert!(has_extreme(FileDType::F16, &half::f16::NEG_INFINITY.to_le_bytes()));
        assert!(has_extreme(FileDType::BF16, &half::bf16::INFINITY.to_le_bytes()));
        assert!(has_extreme(FileDType::BF16, &half::bf16::MIN.to_le_bytes()));
        assert!(!has_extreme(FileDType::F16, &half::f16::MAX.to_le_bytes()));
        assert!(!has_extreme(FileDType::I64, &[0x80, 0x7f, 0, 0, 0, 0, 0xf0, 0x7f]));
    }

    #[test]
    fn buffers_are_known_by_name_and_shape() {
        assert!(is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq", &[32]));
        assert!(is_buffer("embeddings.position_ids", &[1, 512]));
        assert!(is_buffer("transformer.h.0.attn.bias", &[1, 1, 1024, 1024]));
        assert!(!is_buffer("visual.blocks.0.attn.bias", &[1024]));
        assert!(!is_buffer("model.norm.weight", &[8]));
    }
}
