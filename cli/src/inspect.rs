//! `tiebeam inspect`: what is in a model's file, without a device.

use crate::context::Context;
use crate::run::beside;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tiebeam::models::adapter::{AdapterConfig, Base};
use tiebeam::models::llama::Published;
use tiebeam::models::lm::{RopeScaling, Saved};
use tiebeam::store::gguf::Gguf;
use tiebeam::store::{Weights, located};
use tiebeam::text::Words;
use tiebeam::{Error, Result, files};

const EXAMPLES: &str = "\
Examples:
  tiebeam inspect model.gguf
  tiebeam inspect folder --tensors
  tiebeam inspect model.gguf --json";

/// Show what is in a language model's file: sizes, types, bits a weight, tokenizer, and whether `tiebeam run` can run it
///
/// Reads headers only, and needs no GPU.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A GGUF file, a folder with safetensors or with an adapter, or a safetensors file
    model: PathBuf,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
}

/// A tensor of a file.
struct Tensor {
    name: String,
    kind: String,
    shape: Vec<usize>,
    /// `None` if the size of its type is not known.
    bytes: Option<usize>,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    // Weights without their folder have no tokenizer, and the reason below says so.
    let alone = args.model.extension().is_some_and(|e| e == "safetensors" || e == "json");
    let path = &located(&args.model);
    if Saved::is_at(path) {
        return saved(args, path, context);
    }
    if path.join("adapter_config.json").is_file() {
        return adapter(args, path, context);
    }
    let published = Published::open(path);
    if !path.exists() {
        return published.map(drop);
    }
    let tensors = tensors(path, context)?;
    if args.tensors {
        list(&tensors, context)?;
    }
    match &published {
        Ok(model) => sizes(model, context)?,
        Err(_) => context.result(format_args!("{}: {} tensors", args.model.display(), tensors.len())),
    }
    types(&tensors, context)?;
    let words = Words::open(path);
    match &words {
        Ok(words) => tokenizer(words, context)?,
        Err(_) if alone => {}
        Err(error) => context.result(format_args!("tokenizer    none that is read: {error}")),
    }
    let reason = published.and_then(|model| model.check()).and(words.map(drop)).err();
    let reason = reason.map(|error| error.to_string());
    match &reason {
        None => context.result("runs         yes: `tiebeam run`"),
        Some(reason) => context.result(format_args!("runs         no: {reason}")),
    }
    context.record(&json!({"line": "runs", "runs": reason.is_none(), "reason": reason}))
}

/// Shows a model of `tiebeam train` or `convert`.
fn saved(args: &Args, path: &Path, context: &Context) -> Result<()> {
    let tensors = tensors(path, context)?;
    if args.tensors {
        list(&tensors, context)?;
    }
    let saved = Saved::open(path)?;
    for (name, value) in saved.config().settings().into_iter().filter(|(_, value)| !value.is_empty()) {
        context.result(format_args!("{name:12} {value}"));
    }
    let said = saved
        .metadata()
        .iter()
        .filter(|(name, _)| name.starts_with("train.") || name.starts_with("convert."));
    for (name, value) in said {
        context.result(format_args!("{name:26} {value}"));
    }
    context.record(&json!({"line": "lm", "settings": saved.config().settings()}))?;
    types(&tensors, context)?;
    let words = Words::open(&beside(path));
    let reason = words.err().map(|error| error.to_string());
    match &reason {
        None => context.result("runs         yes: `tiebeam run`"),
        Some(reason) => context.result(format_args!("runs         no: {reason}")),
    }
    context.record(&json!({"line": "runs", "runs": reason.is_none(), "reason": reason}))
}

/// Shows an adapter of `tiebeam finetune` or PEFT.
fn adapter(args: &Args, path: &Path, context: &Context) -> Result<()> {
    let tensors = tensors(&path.join("adapter_model.safetensors"), context)?;
    if args.tensors {
        list(&tensors, context)?;
    }
    let (config, base) = (AdapterConfig::open(path)?, Base::of_adapter(path)?);
    let base = base
        .map_or_else(|| "none is named".into(), |base| format!("{} ({:032x})", base.name, base.fingerprint));
    let (kind, targets) = (format!("{:?}", config.kind), config.targets.join(", "));
    context.result(format_args!(
        "adapter      {kind}\nrank         {}\nlayers       {targets}\nbase         {base}",
        config.rank()
    ));
    context.record(&json!({"line": "adapter", "kind": kind, "rank": config.rank(), "targets": config.targets, "base": base}))?;
    types(&tensors, context)?;
    context.result("runs         with its model: `tiebeam run MODEL --adapter FOLDER`");
    Ok(())
}

fn tensors(path: &Path, context: &Context) -> Result<Vec<Tensor>> {
    let is_safetensors = path.is_dir() || path.extension().is_some_and(|e| e == "safetensors" || e == "json");
    if is_safetensors {
        let shards = context.shards(path)?;
        let tensor = |name: String| {
            let info = shards.info(&name)?;
            let bytes = Some(shards.bytes(&name)?.len());
            Ok(Tensor { kind: info.dtype.to_string(), shape: info.shape.clone(), bytes, name })
        };
        return shards.names().into_iter().map(tensor).collect();
    }
    let file = Gguf::open(path)?;
    let tensor = |name: &str| {
        let (kind, shape) = (file.kind_name(name)?.to_string(), file.shape(name)?.to_vec());
        Ok::<_, Error>(Tensor { name: name.into(), kind, shape, bytes: file.bytes(name).ok() })
    };
    file.names().map(tensor).collect()
}

fn list(tensors: &[Tensor], context: &Context) -> Result<()> {
    let wide = tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
    for Tensor { name, kind, shape, bytes } in tensors {
        let size = bytes.map_or("of unknown size".into(), |bytes| files::size(bytes as u64));
        context.result(format_args!("{name:wide$}  {kind:8} {:20} {size}", format!("{shape:?}")));
        context
            .record(&json!({"line": "tensor", "name": name, "type": kind, "shape": shape, "bytes": bytes}))?;
    }
    Ok(())
}

/// How rotary angles are scaled, in a few words.
fn scaling(scaling: RopeScaling) -> String {
    match scaling {
        RopeScaling::None => String::new(),
        RopeScaling::Linear { factor } => format!(", scaled linearly by {factor}"),
        RopeScaling::Llama3 { factor, .. } => format!(", scaled as in Llama 3 by {factor}"),
        RopeScaling::Yarn { factor, .. } => format!(", scaled by YaRN by {factor}"),
        _ => ", scaled".into(),
    }
}

fn sizes(model: &Published, context: &Context) -> Result<()> {
    let (c, parameters) = (model.config(), model.check().ok());
    let bytes = model.bytes().ok();
    let bits = bytes.zip(parameters).map(|(bytes, count)| 8.0 * bytes as f64 / count as f64);
    let name = model.title().map_or(String::new(), |title| format!(" ({title})"));
    let count = parameters.map_or(String::new(), |count| format!(", {:.1} M parameters", count as f64 / 1e6));
    context.result(format_args!("model        {}{name}{count}", model.kind()));
    if let (Some(bytes), Some(bits)) = (bytes, bits) {
        context
            .result(format_args!("weights      {}, {bits:.2} bits a parameter", files::size(bytes as u64)));
    }
    if let Some(packing) = model.packing() {
        context.result(format_args!("packing      {packing}"));
    }
    let window = c.window.map_or(String::new(), |window| format!(", window of {window}"));
    context.result(format_args!(
        "blocks       {} of width {}, MLP {}, {} heads of {} with {} of keys{window}",
        c.depth,
        c.width,
        c.hidden,
        c.heads,
        c.head_dim(),
        c.kv_heads
    ));
    context.result(format_args!(
        "context      {} tokens, rotary base {}{}",
        c.context,
        c.rope_base,
        scaling(c.rope_scaling)
    ));
    context.record(&json!({
        "line": "model", "kind": model.kind(), "title": model.title(), "parameters": parameters, "bytes": bytes,
        "bits_per_parameter": bits, "packing": model.packing(), "vocabulary": c.vocab, "layers": c.depth,
        "width": c.width, "hidden": c.hidden, "heads": c.heads, "key_heads": c.kv_heads, "head_dim": c.head_dim(),
        "context": c.context, "window": c.window, "rope_base": c.rope_base,
    }))
}

/// How many tensors have each type, and what they take.
fn types(tensors: &[Tensor], context: &Context) -> Result<()> {
    let mut all: BTreeMap<&str, (usize, u64, Option<usize>)> = BTreeMap::new();
    for tensor in tensors {
        let (count, elements, bytes) = all.entry(&tensor.kind).or_insert((0, 0, Some(0)));
        *count += 1;
        // The sizes of a tensor of an unknown type are not checked by anybody, and their product may be no number.
        let count = tensor.shape.iter().fold(1u64, |n, &size| n.saturating_mul(size as u64));
        *elements = elements.saturating_add(count);
        *bytes = bytes.zip(tensor.bytes).map(|(a, b)| a + b);
    }
    for (kind, (count, elements, bytes)) in &all {
        let size = bytes.map_or("of unknown size".into(), |bytes| {
            let bits = 8.0 * bytes as f64 / (*elements).max(1) as f64;
            format!("{}, {bits:.2} bits an element", files::size(bytes as u64))
        });
        context.result(format_args!("type         {kind}: {count} tensors, {size}"));
        let bytes: Value = json!(bytes);
        context.record(
            &json!({"line": "type", "type": kind, "tensors": count, "elements": elements, "bytes": bytes}),
        )?;
    }
    Ok(())
}

fn tokenizer(words: &Words, context: &Context) -> Result<()> {
    let template = words.chat().is_some();
    let bos = words.bos().map_or("no token before a text".into(), |bos| format!("{bos} before a text"));
    context.result(format_args!(
        "tokenizer    {}, {} tokens, {bos}, ends {:?}, {} chat template",
        words.kind(),
        words.size(),
        words.ends(),
        if template { "with a" } else { "no" }
    ));
    context.record(&json!({
        "line": "tokenizer", "kind": words.kind(), "tokens": words.size(), "bos": words.bos(), "ends": words.ends(),
        "chat_template": template,
    }))
}
