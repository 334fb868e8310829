//! Fits the models' tensors to each other: which stand in for others, which are not merged, and what is said about it.

use super::config::{Slice, Source};
use super::heads::{HEADS, is_table};
use super::job::{Input, Job, Model, Output, Stage};
use super::method::{Arguments, Method};
use crate::error::Result;
use crate::merge::Weights;
use crate::store::{FileDType, some};
use serde_json::Value;
use std::collections::BTreeSet;

/// Kinds of models whose head is not tied if their settings do not say it. For other kinds transformers takes it to be tied.
const UNTIED: [&str; 19] = [
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
    "gptj",
    "olmo",
    "olmo2",
    "stablelm",
    "glm",
    "granite",
    "deepseek_v3",
    "codegen",
    "persimmon",
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
    // GPT-2's causal mask has the name of a bias.
    let is_square = matches!(shape, &[1, 1, rows, columns] if rows == columns);
    let mask = (name.ends_with(".attn.bias") || name.ends_with(".attention.bias")) && is_square;
    mask || ends.iter().any(|end| name.ends_with(end))
}

/// What to do about tables that differ in their number of rows.
fn tokens_differ(name: &str, [a, b]: [&[usize]; 2]) -> &'static str {
    match is_table(name) && a.get(1..) == b.get(1..) {
        true => "; `tokenizer_source: base` or `union` merges tables by their tokens",
        false => "",
    }
}

/// Whether settings say that the output head is the table of token vectors. `None` if there are none, or they leave it open.
fn tied(settings: Option<&Value>) -> Option<bool> {
    let settings = settings?;
    let said = |part: &Value| part["tie_word_embeddings"].as_bool();
    let untied = settings["model_type"].as_str().is_some_and(|kind| UNTIED.contains(&kind));
    said(&settings["text_config"]).or_else(|| said(settings)).or(untied.then_some(false))
}

impl Model {
    /// The table of token vectors that is this model's output head, by its settings, or because it has no other.
    fn table_for(&self, head: &str) -> Option<&'static str> {
        let (_, tables) = HEADS.iter().find(|(known, _)| *known == head)?;
        let table = tables.iter().find(|table| self.checkpoint.contains(table))?;
        let is_table = tied(self.settings.as_ref()).unwrap_or(!self.checkpoint.contains(head));
        is_table.then_some(table)
    }
}

impl Job {
    /// The table that is a model's head. Models that are aligned are compared by their own tensors, and a model that is passed
    /// through keeps those that it has.
    pub(super) fn table_for(&self, model: usize, head: &str) -> Option<&'static str> {
        let model = &self.models[model];
        let is_kept = self.config.method == Method::Passthrough && model.checkpoint.contains(head);
        model.table_for(head).filter(|_| self.config.align.is_none() && !is_kept)
    }

    /// Whether the output has a head, although the leading model's settings say or leave open that it is the table.
    pub(super) fn has_new_head(&self) -> bool {
        let lead = &self.models[0];
        let is_kept = |head: &str| {
            let passes = self.config.method == Method::Passthrough && !self.ends_differ();
            passes && lead.checkpoint.contains(head)
        };
        let is_new = |head: &str| match tied(lead.settings.as_ref()) {
            Some(tied) => tied && !is_kept(head),
            None => !lead.checkpoint.contains(head),
        };
        let mut heads = HEADS.iter().filter(|(head, _)| self.outputs.iter().any(|o| o.name == *head));
        heads.any(|(head, _)| is_new(head))
    }

    /// Whether what comes before the layers is from other models than what comes after them.
    fn ends_differ(&self) -> bool {
        let of = |slice: &Slice| slice.sources.iter().map(|s| s.model.clone()).collect::<Vec<_>>();
        self.config.slices.first().map(of) != self.config.slices.last().map(of)
    }

    /// Adds the head that the model `lead` of the last slice does not have to its names, if the output needs it: because other
    /// sources have one, or because the output's table is from other models. Takes out one that all have as their table.
    pub(super) fn fit_head(&mut self, lead: usize, sources: &[&Source], names: &mut Vec<String>) {
        let is_source = |model: &&Model| {
            let base = self.has_base() && self.config.base.as_ref() == Some(&model.path);
            base || sources.iter().any(|source| source.model == model.path)
        };
        let others: Vec<&Model> = self.models.iter().filter(is_source).collect();
        let apart = self.ends_differ();
        let mut left_out = Vec::new();
        for (head, _) in HEADS {
            let Some(table) = self.table_for(lead, head) else { continue };
            let has_own = |model: &&Model| model.checkpoint.contains(head) && model.table_for(head).is_none();
            let needed = apart || others.iter().any(has_own);
            let listed = names.iter().position(|name| name == head);
            if needed && listed.is_none() {
                names.push(head.into());
            }
            if !needed && others.iter().any(|model| model.checkpoint.contains(head)) {
                listed.map(|at| names.remove(at));
                left_out.push((head, table));
            }
        }
        for (head, table) in left_out {
            self.notes.push(format!("`{head}` is left out, because the settings tie it to `{table}`"));
        }
    }

    /// Whether the method computes with the base. Another method's base only gives its settings.
    pub(super) fn has_base(&self) -> bool {
        self.config.base.is_some() && self.config.method.has_task_vectors()
    }

    /// Adds a tensor to the note about several, which has `{}` for their names.
    pub(super) fn gather(&mut self, note: String, name: &str) {
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
            let Ok((own, own_type)) = model.described(&input.name) else {
                problems.push(format!("{path} has no tensor `{}`", input.name));
                continue;
            };
            match &lead {
                None => lead = Some((input.clone(), own, own_type)),
                Some((first, shape, dtype)) => {
                    let other = self.models[first.model].path.display();
                    if *shape != own {
                        let hint = tokens_differ(&output.name, [&own, shape]);
                        problems.push(format!(
                            "`{}` is {own:?} in {path} and {shape:?} in {other}{hint}",
                            input.name
                        ));
                    } else if dtype.is_float() != own_type.is_float() {
                        let (a, b) = (own_type, dtype);
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
        for input in output.base.iter_mut().chain(&mut output.models) {
            let Some(table) = self.table_for(input.model, &input.name) else { continue };
            let model = &self.models[input.model];
            let place = model.path.display();
            tied.insert(format!("{place}: the head is tied, so `{table}` stands for `{}`", input.name));
            // What is read by token has that name, because it takes other models' heads where it lacks a token.
            if !model.is_by_token(&input.name) {
                input.name = table.into();
            }
        }
        for (fisher, model) in output.others.iter_mut().zip(&output.models) {
            // The diagonal of a tied model has one for its table.
            if !self.models[fisher.model].checkpoint.contains(&fisher.name) {
                fisher.name = model.name.clone();
            }
        }
        self.notes.extend(tied);
    }

    /// Takes a buffer from the first input that has it. The others' may have another length.
    fn keep_buffer(&mut self, output: &mut Output) {
        let found = |input: &Input| self.models[input.model].checkpoint.info(&input.name).ok();
        let Some(first) = output.inputs().find(|input| found(input).is_some()).cloned() else { return };
        if !found(&first).is_some_and(|info| is_buffer(&output.name, &info.shape)) {
            return;
        }
        let path = self.models[first.model].path.display();
        let bytes = |input: &Input| self.models[input.model].checkpoint.bytes(&input.name).ok();
        if output.inputs().any(|input| bytes(input) != bytes(&first)) {
            let note = format!("the buffers {{}} are not the same in all models; they are taken from {path}");
            self.gather(note, &output.name);
        }
        (output.base, output.others) = (None, Vec::new());
        output.models = vec![first];
    }

    /// Whether an output is what its one model has, byte for byte.
    pub(super) fn passes_through(&self, arguments: &Arguments) -> bool {
        self.config.method == Method::Passthrough && arguments.keeps() && self.config.align.is_none()
    }

    /// Whether an output is merged. If not, the values of its first input are copied, and it is said where this is a choice.
    pub(super) fn is_merged(&mut self, output: &Output, arguments: &Arguments) -> Result<bool> {
        let is_changed = |input: &Input| self.models[input.model].changes(&input.name);
        if output.inputs().any(is_changed) {
            return Ok(true);
        }
        if self.passes_through(arguments) || is_buffer(&output.name, &output.shape) {
            return Ok(false);
        }
        let inputs: Vec<&Input> = output.base.iter().chain(&output.models).collect();
        let bytes = |input: &&Input| self.models[input.model].checkpoint.bytes(&input.name);
        let all = inputs.iter().map(bytes).collect::<Result<Vec<&[u8]>>>()?;
        let first = self.models[inputs[0].model].checkpoint.info(&inputs[0].name)?.dtype;
        let path = self.models[inputs[0].model].path.display();
        if !first.is_float() {
            if let Some(other) = all.iter().position(|bytes| *bytes != all[0]) {
                let other = self.models[inputs[other].model].path.display();
                let note = format!(
                    "{{}} are {first} and differ between {path} and {other}; they are taken from {path}"
                );
                self.gather(note, &output.name);
            }
            return Ok(false);
        }
        let same_type =
            |input: &&Input| self.models[input.model].checkpoint.dtype(&input.name).ok() == Some(first);
        let is_fixed = self.config.align.is_none() && self.config.method != Method::Passthrough;
        let is_equal = || inputs.iter().all(same_type) && all.iter().all(|bytes| *bytes == all[0]);
        let is_mask = || match extremes(first, all[0]) {
            Extremes::None => false,
            Extremes::Finite => self.config.method.keeps_equal(arguments),
            Extremes::Infinite => true,
        };
        if is_fixed && is_mask() && is_equal() {
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
            (Some(dtype), None)
                if output.dtype == stored
                    && stored != dtype
                    && (stored.is_float() || is_small_float(stored)) =>
            {
                self.gather(format!("{{}} stay {stored} and do not become {dtype}"), &output.name);
            }
            _ => {}
        }
    }

    /// Looks at the models as a whole: packed weights, tensors that only some have, and what is not copied.
    pub(super) fn look(&mut self) -> Result<()> {
        self.find_packed();
        self.find_strangers();
        self.find_adapters()?;
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

    /// Adds tensors that the output has no place for to the problems. Buffers are left out instead, and so is what stands outside of
    /// the layers that are stacked.
    fn find_strangers(&mut self) {
        let used: BTreeSet<(usize, &str)> =
            self.outputs.iter().flat_map(|o| o.inputs().map(|i| (i.model, i.name.as_str()))).collect();
        let noted: BTreeSet<&str> =
            self.problems.iter().filter_map(|problem| problem.split('`').nth(1)).collect();
        let (mut strangers, mut left_out) = (BTreeSet::new(), BTreeSet::new());
        let lead = self.leader().path.display();
        for (s, slice) in self.config.slices.iter().enumerate() {
            for i in self.models_of(slice) {
                let Model { path, checkpoint, .. } = &self.models[i];
                let path = path.display();
                for name in checkpoint.names() {
                    let is_known = used.contains(&(i, name.as_str())) || noted.contains(name.as_str());
                    if is_known || self.table_for(i, &name).is_some() {
                        continue;
                    }
                    match self.needs(s, i, &name) {
                        Some(true) if checkpoint.shape(&name).is_ok_and(|shape| is_buffer(&name, &shape)) => {
                            let note = format!("{lead} lacks the buffers {{}} of {path}; they are left out");
                            left_out.insert((note, name));
                        }
                        Some(true) => drop(strangers.insert((i, name))),
                        Some(false) => {
                            let note = format!(
                                "{{}} of {path} stand before or after the layers that are stacked of it; they are left out"
                            );
                            left_out.insert((note, name));
                        }
                        None => {}
                    }
                }
            }
        }
        let problems = strangers.into_iter().map(|(i, name)| {
            let path = self.models[i].path.display();
            let adapter = name.starts_with("base_model.model.");
            let hint = if adapter { ", as in an adapter: merge it into its model first" } else { "" };
            format!("only {path} has a tensor `{name}`{hint}")
        });
        let problems: Vec<String> = problems.collect();
        self.problems.extend(problems);
        left_out.into_iter().for_each(|(note, name)| self.gather(note, &name));
    }

    /// Whether a slice needs a tensor of a model. `None` if that tensor is of other layers, or the output has it from another slice.
    fn needs(&self, slice: usize, model: usize, name: &str) -> Option<bool> {
        let (slices, path) = (&self.config.slices, &self.models[model].path);
        let sources = &slices[slice].sources;
        let outside = |belongs: bool| match belongs {
            true => Some(true),
            false => (!self.outputs.iter().any(|output| output.name == name)).then_some(false),
        };
        let layer = match Stage::of(name) {
            Stage::Before => return outside(slice == 0),
            Stage::After => return outside(slice + 1 == slices.len()),
            Stage::Layer(layer) => layer,
        };
        // A base that is not listed is read where the first source is.
        let mut own = sources.iter().filter(|source| source.model == *path).peekable();
        let holds = |source: &Source| source.layers.as_ref().is_none_or(|range| range.contains(&layer));
        let holds = if own.peek().is_some() { own.any(holds) } else { holds(&sources[0]) };
        holds.then_some(true)
    }

    /// The models whose tensors a slice needs.
    fn models_of(&self, slice: &Slice) -> Vec<usize> {
        let base = self.config.base.as_ref().filter(|_| self.has_base());
        let paths = slice.sources.iter().map(|source| &source.model).chain(base);
        let index = |path: &std::path::PathBuf| self.models.iter().position(|model| model.path == *path);
        let all: BTreeSet<usize> = paths.filter_map(index).collect();
        all.into_iter().collect()
    }
}

impl Model {
    /// The name of a packed weight. `declared` is whether the settings say that there are some.
    fn packed(&self, declared: bool) -> Option<String> {
        let is_packed = |name: &String| {
            let Ok(info) = self.checkpoint.info(name) else { return false };
            // Some plain models have such names too, of floats.
            let by_name =
                PACKED.iter().any(|end| name.ends_with(end)) && (declared || !info.dtype.is_float());
            let is_matrix = info.shape.len() > 1 && !info.dtype.is_float() && info.dtype != FileDType::Bool;
            by_name || is_matrix && (declared || name.ends_with("weight") && !is_small_float(info.dtype))
        };
        self.checkpoint.names().into_iter().find(is_packed)
    }
}

/// Whether a type has fewer than 8 bits, or is a float of 8.
fn is_small_float(dtype: FileDType) -> bool {
    dtype.bits() < 8 || format!("{dtype}").starts_with("F8")
}

/// The largest elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Extremes {
    /// They are usual numbers, or there is NaN.
    None,
    /// They are so large that a sum of a few is infinite in f32.
    Finite,
    Infinite,
}

/// Looks for the extreme elements of which masks are made. They are found at the beginning of a tensor, NaN everywhere.
fn extremes(dtype: FileDType, bytes: &[u8]) -> Extremes {
    /// `large` is the least large number and `top` infinity, by their bits without sign.
    fn found<const N: usize>(bytes: &[u8], large: u64, top: u64) -> Extremes {
        let word = |e: &[u8; N]| {
            let mut wide = [0; 8];
            wide[..N].copy_from_slice(e);
            u64::from_le_bytes(wide) & (u64::MAX >> (65 - 8 * N))
        };
        let first = &bytes[..bytes.len().min(LOOK)];
        let most = first.as_chunks::<N>().0.iter().map(word).max().unwrap_or(0);
        // Few tensors come this far, so all of one can be looked through.
        let has_nan = || bytes.as_chunks::<N>().0.iter().map(word).any(|x| x > top);
        match most {
            _ if most < large || has_nan() => Extremes::None,
            _ if most < top => Extremes::Finite,
            _ => Extremes::Infinite,
        }
    }
    // Sums are f32, so only its own range matters: 2^124 is a sixteenth of it.
    match dtype {
        FileDType::BF16 => found::<2>(bytes, 251 << 7, 0x7f80),
        FileDType::F16 => found::<2>(bytes, 0x7c00, 0x7c00),
        FileDType::F32 => found::<4>(bytes, 251 << 23, 0x7f80_0000),
        FileDType::F64 => found::<8>(bytes, 0x7ff0 << 48, 0x7ff0 << 48),
        _ => Extremes::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extreme_elements_are_seen_in_every_type() {
        use Extremes::{Finite, Infinite};
        let f32s = |x: &[f32]| extremes(FileDType::F32, bytemuck::cast_slice(x));
        assert_eq!(f32s(&[0.0, f32::NEG_INFINITY]), Infinite);
        assert_eq!(f32s(&[0.0, f32::MIN]), Finite);
        assert_eq!(f32s(&[0.0, 1e37, 1e-40]), Extremes::None);
        assert_eq!(f32s(&[f32::INFINITY, f32::NAN]), Extremes::None);
        let far: Vec<f32> = [f32::INFINITY].into_iter().chain([0.0; 100_000]).chain([f32::NAN]).collect();
        assert_eq!(f32s(&far), Extremes::None, "NaN anywhere");
        assert_eq!(extremes(FileDType::F64, &f64::INFINITY.to_le_bytes()), Infinite);
        assert_eq!(extremes(FileDType::F64, &f64::NAN.to_le_bytes()), Extremes::None);
        assert_eq!(extremes(FileDType::F16, &half::f16::NEG_INFINITY.to_le_bytes()), Infinite);
        assert_eq!(extremes(FileDType::F16, &half::f16::MAX.to_le_bytes()), Extremes::None);
        assert_eq!(extremes(FileDType::BF16, &half::bf16::INFINITY.to_le_bytes()), Infinite);
        assert_eq!(extremes(FileDType::BF16, &half::bf16::MIN.to_le_bytes()), Finite);
        assert_eq!(extremes(FileDType::I64, &[0x80, 0x7f, 0, 0, 0, 0, 0xf0, 0x7f]), Extremes::None);
    }

    #[test]
    fn buffers_are_known_by_name_and_shape() {
        assert!(is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq", &[32]));
        assert!(is_buffer("embeddings.position_ids", &[1, 512]));
        assert!(is_buffer("transformer.h.0.attn.bias", &[1, 1, 1024, 1024]));
        assert!(!is_buffer("visual.blocks.0.attn.bias", &[1024]));
        assert!(!is_buffer("layers.0.attn.bias", &[1, 8, 16, 16]));
        assert!(!is_buffer("model.norm.weight", &[8]));
    }
}
