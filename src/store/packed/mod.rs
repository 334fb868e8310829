//! Reads the packed weights of Hugging Face's folders: compressed-tensors, GPTQ and AWQ.
//!
//! Such a folder's `config.json` has an object `quantization_config`, and in the place of `NAME.weight` there are several
//! tensors: levels in 32-bit words, scales and zeros. [`QuantConfig`] brings them into the layout of packed matrices.
//!
//! | method | levels | zeros |
//! |---|---|---|
//! | compressed-tensors, `pack-quantized` | words along the row | words down the rows |
//! | compressed-tensors, `int-quantized` | signed bytes | signed bytes |
//! | GPTQ | words along the inputs; outputs are columns | words along the outputs |
//! | AWQ, version GEMM | words along the outputs, out of order | as its levels |
//!
//! The layouts are those of <https://github.com/vllm-project/compressed-tensors>, <https://github.com/AutoGPTQ/AutoGPTQ> and
//! <https://github.com/casper-hansen/AutoAWQ>.

mod layout;
#[cfg(test)]
mod tests;

use super::Shards;
use crate::error::{Error, Result};
use serde_json::Value;

pub use layout::PackedRows;

/// How the weights of a folder are packed, from the object `quantization_config` of its `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantConfig {
    method: Method,
    bits: Vec<u32>,
    /// Columns of a group, if the settings name one number. `Some(None)` is the whole row.
    group: Option<Option<usize>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// `pack-quantized` of compressed-tensors.
    Compressed,
    /// `int-quantized` of compressed-tensors.
    Bytes,
    /// GPTQ, what is added to its stored zeros, and whether it was made in act order.
    Gptq {
        add: u32,
        ordered: bool,
    },
    Awq,
}

fn wrong(message: impl std::fmt::Display) -> Error {
    Error::config(format!("quantization_config: {message}"))
}

impl QuantConfig {
    /// Reads the object `quantization_config`.
    ///
    /// # Errors
    /// [`Error::Config`] for a method, format or number of bits that is not read. The message names it.
    pub fn from_json(config: &Value) -> Result<QuantConfig> {
        match config["quant_method"].as_str() {
            Some("compressed-tensors") => compressed(config),
            Some("gptq") => gptq(config),
            Some("awq") => awq(config),
            Some(other) => Err(wrong(format!(
                "the method {other} is not read; compressed-tensors, gptq and awq are, or take the model without quantisation"
            ))),
            None => Err(wrong("there is no `quant_method`")),
        }
    }

    /// Reads the weight `PREFIX.weight` in the layout of packed matrices: its packing, rows (outputs) and columns (inputs), and
    /// the words of all rows. `None` if this weight is not packed in the folder, so that it is read as floats; what the
    /// settings list as ignored is of this kind.
    ///
    /// # Errors
    /// [`Error::Format`], which names the tensor: for tensors that are missing or of another size or type, scales that are NaN
    /// or infinite, and columns in the order of GPTQ's activations (`desc_act`), in which neighbours have no common scale.
    /// [`Error::Config`] for groups that [`Packing`](crate::share::packed::Packing) does not have.
    pub fn packed(&self, weights: &Shards, name: &str) -> Result<Option<PackedRows>> {
        let Some(prefix) = name.strip_suffix("weight").filter(|p| p.is_empty() || p.ends_with('.')) else {
            return Ok(None);
        };
        let source = layout::Source { weights, prefix };
        let found = match self.method {
            Method::Compressed if source.has("weight_packed") => source.compressed(&self.bits)?,
            Method::Bytes if source.has("weight_scale") => source.bytes()?,
            Method::Gptq { add, ordered } if source.has("qweight") => {
                source.gptq(self.bits[0], self.group.flatten(), add, ordered)?
            }
            Method::Awq if source.has("qweight") => source.awq(self.group.flatten())?,
            // A weight that is nowhere is an error, with the nearest names.
            _ => return weights.info(name).map(|_| None),
        };
        Ok(Some(found))
    }

    /// Method, bits and groups in a few words, such as `GPTQ, 4 bits in groups of 128`.
    pub fn bits_text(&self) -> String {
        let method = match self.method {
            Method::Compressed => "compressed-tensors pack-quantized",
            Method::Bytes => "compressed-tensors int-quantized",
            Method::Gptq { .. } => "GPTQ",
            Method::Awq => "AWQ",
        };
        let bits: Vec<_> = self.bits.iter().map(u32::to_string).collect();
        let group = match self.group {
            Some(Some(columns)) => format!(" in groups of {columns}"),
            Some(None) => " with a scale for each row".into(),
            None => String::new(),
        };
        format!("{method}, {} bits{group}", bits.join(" and "))
    }
}

/// A whole number of the settings, under the first of these keys that is there.
fn number(config: &Value, keys: &[&str]) -> Result<Option<i64>> {
    let Some((key, value)) = keys.iter().map(|key| (key, &config[*key])).find(|(_, value)| !value.is_null())
    else {
        return Ok(None);
    };
    value.as_i64().map(Some).ok_or_else(|| wrong(format!("`{key}` is {value}, not a whole number")))
}

/// The columns of a group. -1 is the whole row.
fn group(config: &Value, keys: &[&str]) -> Result<Option<usize>> {
    match number(config, keys)? {
        None | Some(-1) => Ok(None),
        Some(n) if n > 0 => Ok(Some(n as usize)),
        Some(n) => Err(wrong(format!("a group has {n} columns; it has 1 or more, or -1 for the whole row"))),
    }
}

/// Refuses keys by which other weights are meant than what is read. Keys that begin with `-:` name what is not quantised,
/// which is seen from the tensors.
fn absent(config: &Value, method: &str, keys: &[&str]) -> Result<()> {
    let empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(all) => all.keys().all(|key| key.starts_with("-:")),
        _ => false,
    };
    match keys.iter().find(|key| !empty(&config[**key])) {
        Some(key) => Err(wrong(format!("{method} with `{key}` is not read"))),
        None => Ok(()),
    }
}

/// The text of a key, in lower case, if it is there.
fn word(config: &Value, key: &str) -> Option<String> {
    config[key].as_str().map(str::to_lowercase)
}

fn gptq(config: &Value) -> Result<QuantConfig> {
    absent(config, "gptq", &["dynamic", "is_marlin_format"])?;
    let add = match word(config, "checkpoint_format").as_deref() {
        None | Some("gptq") => 1,
        Some("gptq_v2") => 0,
        Some(other) => {
            return Err(wrong(format!(
                "gptq with `checkpoint_format` {other} is not read; gptq and gptq_v2 are"
            )));
        }
    };
    let bits = match number(config, &["bits"])? {
        Some(bits @ (4 | 8)) => bits as u32,
        other => return Err(wrong(format!("gptq with {} bits is not read; 4 and 8 are", shown(other)))),
    };
    let group = group(config, &["group_size"])?;
    let ordered = config["desc_act"].as_bool().unwrap_or(false);
    Ok(QuantConfig { method: Method::Gptq { add, ordered }, bits: vec![bits], group: Some(group) })
}

fn awq(config: &Value) -> Result<QuantConfig> {
    match word(config, "version").as_deref() {
        None | Some("gemm") => {}
        Some(other) => return Err(wrong(format!("awq with `version` {other} is not read; gemm is"))),
    }
    match number(config, &["bits", "w_bit"])? {
        Some(4) => {}
        other => return Err(wrong(format!("awq with {} bits is not read; 4 are", shown(other)))),
    }
    let group = group(config, &["group_size", "q_group_size"])?;
    Ok(QuantConfig { method: Method::Awq, bits: vec![4], group: Some(group) })
}

fn shown(number: Option<i64>) -> String {
    number.map_or("no".into(), |n| n.to_string())
}

fn compressed(config: &Value) -> Result<QuantConfig> {
    let method = compressed_format(word(config, "format").as_deref())?;
    if let Some(other) = word(&config["sparsity_config"], "format").filter(|format| format != "dense") {
        return Err(wrong(format!("compressed-tensors with the sparsity {other} is not read")));
    }
    if !is_empty(&config["transform_config"]) {
        return Err(wrong("compressed-tensors with `transform_config`, which rotates values, is not read"));
    }
    let all = config["config_groups"].as_object().filter(|all| !all.is_empty());
    let all = all.ok_or_else(|| wrong("compressed-tensors has no `config_groups`"))?;
    let (mut bits, mut groups) = (Vec::new(), Vec::new());
    for (name, settings) in all {
        if let Some(own) = word(settings, "format")
            && compressed_format(Some(&own))? != method
        {
            return Err(wrong(format!("compressed-tensors: `{name}` has a format of its own, {own}")));
        }
        let (own, group) =
            compressed_weights(&settings["weights"], method).map_err(|e| wrong(format!("`{name}`: {e}")))?;
        bits.push(own);
        groups.push(group);
    }
    bits.sort_unstable();
    bits.dedup();
    groups.sort_unstable();
    groups.dedup();
    Ok(QuantConfig { method, bits, group: if groups.len() == 1 { groups.pop() } else { None } })
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}

fn compressed_format(format: Option<&str>) -> Result<Method> {
    match format {
        Some("pack-quantized") => Ok(Method::Compressed),
        Some("int-quantized") => Ok(Method::Bytes),
        other => Err(wrong(format!(
            "compressed-tensors with the format {} is not read; pack-quantized and int-quantized are",
            other.unwrap_or("missing")
        ))),
    }
}

/// Bits and group of one entry of `config_groups`.
fn compressed_weights(weights: &Value, method: Method) -> Result<(u32, Option<usize>), String> {
    if weights["type"].as_str().is_some_and(|kind| kind != "int") {
        return Err(format!("weights of type {} are not read; int is", weights["type"]));
    }
    let strategy = weights["strategy"].as_str().unwrap_or("group");
    let group = match strategy {
        "channel" => None,
        "group" => weights["group_size"].as_u64().and_then(|n| usize::try_from(n).ok()),
        other => return Err(format!("scales by the strategy {other} are not read; group and channel are")),
    };
    match (method, weights["num_bits"].as_u64()) {
        (Method::Compressed, Some(bits @ (4 | 8))) | (_, Some(bits @ 8)) => Ok((bits as u32, group)),
        (_, bits) => {
            Err(format!("weights of {} bits are not read", bits.map_or("no".into(), |b| b.to_string())))
        }
    }
}
