//! Fits the models' tensors to each other: which stand in for others, which are not merged, and what is said about it.

use super::job::{Input, Job, Model, Output, is_float};
use super::method::{Arguments, Method};
use super::settings::config_of;
use crate::error::Result;
use crate::merge::Weights;
use crate::store::FileDType;
use std::collections::{BTreeMap, BTreeSet};

/// An output head and the tables of token vectors that a model without one, whose head is tied, has instead.
const HEADS: [(&str, &[&str]); 5] = [
    (
        "lm_head.weight",
        &[
            "model.embed_tokens.weight",
            "model.language_model.embed_tokens.weight",
            "transformer.wte.weight",
            "shared.weight",
            "model.decoder.embed_tokens.weight",
            "backbone.embeddings.weight",
        ],
    ),
    ("language_model.lm_head.weight", &["language_model.model.embed_tokens.weight"]),
    ("embed_out.weight", &["gpt_neox.embed_in.weight"]),
    ("output.weight", &["tok_embeddings.weight"]),
    ("cls.predictions.decoder.weight", &["bert.embeddings.word_embeddings.weight"]),
];

/// Ends of the names of packed weights and of what belongs to them, by GPTQ, AWQ, compressed-tensors and bitsandbytes.
const PACKED: [&str; 8] = [
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_zero_point",
    ".absmax",
    ".quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];

/// The most bytes at the beginning of a tensor in which an infinite element is looked for. A mask has one in its first rows.
const LOOK: usize = 1 << 18;

/// Whether a tensor is computed from the settings when a model is made, so that models may lack it.
fn is_buffer(name: &str, shape: &[usize]) -> bool {
    let ends =
        [".inv_freq", "position_ids", ".masked_bias", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"];
    // GPT-2's causal mask is [1, 1, n, n], and has the name of a bias.
    let mask = (name.ends_with(".attn.bias") || name.ends_with(".attention.bias")) && shape.len() == 4;
    mask || ends.iter().any(|end| name.ends_with(end))
}

/// A few names, and how many more there are.
fn some(names: &BTreeSet<String>) -> String {
    let shown: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(3) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

impl Job {
    /// The head that other models have and the model `lead` does not, whose table of token vectors is its head.
    pub(super) fn head_of_others(&self, lead: usize) -> Option<String> {
        let lead = &self.models[lead].checkpoint;
        let lacks = |head: &str, tables: &[&str]| {
            !lead.contains(head) && tables.iter().any(|table| lead.contains(table))
        };
        let (head, _) = HEADS.iter().find(|(head, tables)| {
            lacks(head, tables) && self.models.iter().any(|model| model.checkpoint.contains(head))
        })?;
        Some(head.to_string())
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
        let is_small_float = dtype.bits() < 8 || format!("{dtype}").starts_with("F8");
        if is_small_float && !self.passes_through(arguments) {
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
            let model = &self.models[input.model];
            let tables =
                HEADS.iter().find(|(head, _)| *head == input.name).map_or(&[][..], |(_, tables)| tables);
            let has = |name: &&&str| model.checkpoint.contains(name);
            if let Some(table) = tables.iter().find(has).filter(|_| !model.checkpoint.contains(&input.name)) {
                input.name = table.to_string();
                tied.insert(input.model);
            }
        }
        for &i in &tied {
            self.notes.push(format!(
                "{} has no `{}`, because its head is tied; its `{}` is merged in that place",
                self.models[i].path.display(),
                output.name,
                output.inputs().find(|input| input.model == i).map_or("", |input| &input.name)
            ));
        }
        self.mixed_heads |= !tied.is_empty();
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
            self.notes
                .push(format!("not every model has the buffer `{}`; it is taken from {path}", output.name));
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
        if !is_float(first) {
            if let Some(other) = all.iter().position(|bytes| *bytes != all[0]) {
                let other = self.models[inputs[other].model].path.display();
                self.notes.push(format!(
                    "`{}` is {first} and differs between {path} and {other}; it is taken from {path}",
                    output.name
                ));
            }
            return Ok(false);
        }
        let same_type =
            |input: &&Input| self.models[input.model].checkpoint.dtype(&input.name).ok() == Some(first);
        let is_fixed = self.config.align.is_none() && self.config.method != Method::Passthrough;
        let is_mask = is_fixed && has_infinity(first, all[0]);
        if is_mask && inputs.iter().all(same_type) && all.iter().all(|bytes| *bytes == all[0]) {
            self.notes.push(format!(
                "`{}` has infinite elements, as a mask has, and is the same in all models; it is kept as it is",
                output.name
            ));
            return Ok(false);
        }
        Ok(true)
    }

    /// Looks at the models as a whole: packed weights, tensors that only some have, and what is not copied.
    pub(super) fn look(&mut self) -> Result<()> {
        self.find_packed();
        self.find_strangers();
        self.find_wide();
        self.find_left_behind()?;
        // A model that is read for several slices says the same several times.
        let mut said = BTreeSet::new();
        self.notes.retain(|note| said.insert(note.clone()));
        Ok(())
    }

    fn find_packed(&mut self) {
        let (mut problems, mut notes) = (Vec::new(), Vec::new());
        for Model { path, checkpoint } in &self.models {
            let names = checkpoint.names();
            let packed = names.iter().find(|name| PACKED.iter().any(|end| name.ends_with(end)));
            let config = config_of(checkpoint.path());
            let method =
                config.as_ref().map(|config| &config["quantization_config"]).filter(|c| !c.is_null());
            let path = path.display();
            match (packed, method) {
                (Some(name), method) => {
                    let by = method.and_then(|m| m["quant_method"].as_str()).map_or(String::new(), |m| format!(" ({m})"));
                    problems.push(format!(
                        "{path} has packed weights{by}, such as `{name}`, which cannot be merged; take the model from which they \
                         were made"
                    ));
                }
                (None, Some(_)) => notes.push(format!(
                    "{path}: config.json has `quantization_config`, and no tensor is packed; take it out if the weights are plain"
                )),
                (None, None) => {}
            }
        }
        self.problems.append(&mut problems);
        self.notes.append(&mut notes);
    }

    /// Adds tensors that only some models have to the problems, except for buffers.
    fn find_strangers(&mut self) {
        if self.config.slices.len() > 1 || self.config.slices[0].sources[0].layers.is_some() {
            return;
        }
        let used: BTreeSet<(usize, &str)> =
            self.outputs.iter().flat_map(|o| o.inputs().map(|i| (i.model, i.name.as_str()))).collect();
        let known: BTreeSet<usize> = used.iter().map(|u| u.0).collect();
        let (mut strangers, mut buffers) = (Vec::new(), BTreeMap::<usize, BTreeSet<String>>::new());
        for &i in &known {
            let Model { path, checkpoint } = &self.models[i];
            for name in checkpoint.names() {
                let noted = self.problems.iter().any(|p| p.contains(&format!("`{name}`")));
                if noted || used.contains(&(i, name.as_str())) {
                    continue;
                }
                if checkpoint.shape(&name).is_ok_and(|shape| is_buffer(&name, &shape)) {
                    buffers.entry(i).or_default().insert(name);
                } else {
                    strangers.push(format!("only {} has a tensor `{name}`", path.display()));
                }
            }
        }
        self.problems.append(&mut strangers);
        for (i, names) in buffers {
            let path = self.models[i].path.display();
            let (names, lead) = (some(&names), self.leader().path.display());
            self.notes.push(format!("{lead} lacks the buffers {names} of {path}; they are left out"));
        }
    }

    fn find_wide(&mut self) {
        let wide = |o: &&Output| {
            let input = o.inputs().next();
            let dtype = input.and_then(|i| self.models[i.model].checkpoint.dtype(&i.name).ok());
            dtype == Some(FileDType::F64) && o.arguments.is_some()
        };
        let names: BTreeSet<String> = self.outputs.iter().filter(wide).map(|o| o.name.clone()).collect();
        if !names.is_empty() && self.config.dtype.is_none() {
            let names = some(&names);
            self.notes.push(format!("{names} are F64 and are merged and written as F32"));
        }
    }
}

/// Whether the beginning of a tensor has an infinite element and no NaN.
fn has_infinity(dtype: FileDType, bytes: &[u8]) -> bool {
    let bytes = &bytes[..bytes.len().min(LOOK)];
    /// Counts infinite elements and NaN. `top` are the exponent's bits, which both have set.
    fn found<const N: usize>(bytes: &[u8], top: u64, all: u64) -> bool {
        let word = |e: &[u8; N]| {
            let mut wide = [0; 8];
            wide[..N].copy_from_slice(e);
            u64::from_le_bytes(wide) & all
        };
        let elements = || bytes.as_chunks::<N>().0.iter().map(word);
        elements().any(|x| x == top) && !elements().any(|x| x > top)
    }
    match dtype {
        FileDType::BF16 => found::<2>(bytes, 0x7f80, 0x7fff),
        FileDType::F16 => found::<2>(bytes, 0x7c00, 0x7fff),
        FileDType::F32 => found::<4>(bytes, 0x7f80_0000, 0x7fff_ffff),
        FileDType::F64 => found::<8>(bytes, 0x7ff0 << 48, u64::MAX >> 1),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infinite_elements_are_seen_in_every_type() {
        let f32s = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        assert!(has_infinity(FileDType::F32, &f32s(&[0.0, f32::NEG_INFINITY])));
        assert!(!has_infinity(FileDType::F32, &f32s(&[0.0, f32::MAX, 1e-40])));
        assert!(!has_infinity(FileDType::F32, &f32s(&[f32::INFINITY, f32::NAN])));
        assert!(has_infinity(FileDType::F64, &f64::INFINITY.to_le_bytes()));
        assert!(!has_infinity(FileDType::F64, &f64::NAN.to_le_bytes()));
        assert!(has_infinity(FileDType::F16, &half::f16::NEG_INFINITY.to_le_bytes()));
        assert!(has_infinity(FileDType::BF16, &half::bf16::INFINITY.to_le_bytes()));
        assert!(!has_infinity(FileDType::BF16, &half::bf16::MAX.to_le_bytes()));
        assert!(!has_infinity(FileDType::I64, &[0x80, 0x7f, 0, 0, 0, 0, 0xf0, 0x7f]));
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
