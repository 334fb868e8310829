//! `tiebeam quantise`.

use crate::context::{Context, is_standard, on_interrupt, unless_stopped};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tiebeam::decode::{Windows, perplexity_with};
use tiebeam::files::{parse_size, size};
use tiebeam::models::llama::{Form, Published};
use tiebeam::quant::{self, Item, Job, JobSettings, Measured, Part, Plan};
use tiebeam::text::{Words, gguf_metadata};
use tiebeam::{Error, Gpu, Result, no_grad};

const EXAMPLES: &str = "\
A PLAN is a list of NAME=BITS, NAME=BITS:GROUP, NAME=BITS:row and NAME=keep with commas between.
NAME is attn, mlp, head, embed, a linear layer (q, k, v, o, gate, up, down), or the name of a tensor
with * for anything. Later ones win.

Examples:
  tiebeam quantise models/SmolLM2-135M --bits 4 --group 64 --out models/SmolLM2-135M-4bit
  tiebeam quantise models/SmolLM2-135M --plan 'mlp=4:64,attn=8,*.layers.0.*=keep' --dry-run
  tiebeam quantise models/SmolLM2-135M --format gguf --bits 8 --out SmolLM2-135M.Q8_0.gguf
  tiebeam quantise model-f16.gguf --bits 4 --asymmetric --out model-q4_1.gguf --text kjv.txt";

/// Most tokens of a window.
const WINDOW: usize = 256;
/// Windows of which the states are compared: 32 MiB for a model of width 1024.
const COMPARED: usize = 32;

/// Round a language model's weights to few bits
///
/// The linear layers of the blocks are rounded. In a folder, the head and the table of token vectors stay as they are unless the
/// plan names them. In a GGUF file they become Q8_0, if they are floats. Norms and biases always stay.
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A folder with config.json and safetensors, or a GGUF file
    model: PathBuf,
    /// The folder or GGUF file to write. A folder of an earlier run is replaced, but files that others put there are kept
    #[arg(long, required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Bits of a weight: 4 or 8, and in GGUF files also 5
    #[arg(long, default_value_t = 4)]
    bits: u32,
    /// Columns that share a scale [default: 64 in folders, and 32 in GGUF files, which have no other groups]
    #[arg(long)]
    group: Option<usize>,
    /// Tensors for which something else holds, such as 'mlp=4:64,attn=8' (see below)
    #[arg(long)]
    plan: Option<Plan>,
    /// Levels that need not lie evenly around 0: with zeros in folders, Q4_1 and Q5_1 instead of Q4_0 and Q5_0 in GGUF files
    #[arg(long)]
    asymmetric: bool,
    /// How levels are chosen
    #[arg(long, value_enum, default_value_t = Method::Nearest)]
    method: Method,
    /// What is written [default: compressed-tensors for a folder, gguf for a GGUF file]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Largest file of weights in a folder, with a unit: 500MB, 5GB, 4GiB
    #[arg(long, default_value = "5GB", value_parser = parse_size)]
    shard_size: u64,
    /// Round weights of a GGUF file again that have few bits already
    #[arg(long)]
    requantise: bool,
    /// Only print what would become of each tensor
    #[arg(long)]
    dry_run: bool,
    /// Measure perplexity before and after, and how far outputs are off, at the end of this text
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    text: Option<PathBuf>,
    /// Windows of 256 tokens at the end of the text
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    windows: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Method {
    /// The nearest level, on the range with the least error in each group
    Nearest,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A folder with packed safetensors, for Tiebeam and, without --asymmetric, transformers
    CompressedTensors,
    /// A GGUF file, for llama.cpp and Tiebeam
    Gguf,
}

impl Args {
    fn settings(&self, context: &Context) -> Result<JobSettings> {
        let Method::Nearest = self.method;
        let conversion = match self.format {
            Some(Format::Gguf) if self.model.is_dir() => {
                let mut conversion = Published::open(&self.model)?.gguf()?;
                let tokenizer = gguf_metadata(&self.model)?;
                conversion.metadata.extend(tokenizer.metadata);
                if let Some(remark) = tokenizer.remark {
                    context.note(remark);
                }
                Some(conversion)
            }
            _ => None,
        };
        Ok(JobSettings::default()
            .conversion(conversion)
            .bits(self.bits)
            .group(self.group)
            .asymmetric(self.asymmetric)
            .plan(self.plan.clone().unwrap_or_default())
            .requantise(self.requantise)
            .shard_bytes(self.shard_size)
            .format(self.format.map(|format| match format {
                Format::CompressedTensors => quant::Format::CompressedTensors,
                Format::Gguf => quant::Format::Gguf,
            })))
    }
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    if args.out.as_deref().is_some_and(is_standard) {
        return Err(Error::config(
            "--out: weights are written to a file or folder with a name, and not to stdout",
        ));
    }
    if let Some(out) = &args.out {
        let named = |name: &str| out.extension().is_some_and(|e| e == name);
        if args.model.is_dir() && args.format.is_none() && named("gguf") {
            return Err(Error::config("--out names a GGUF file; a folder becomes one with --format gguf"));
        }
        context.keep(out)?;
        let same =
            |text: &PathBuf| text.canonicalize().is_ok_and(|a| out.canonicalize().is_ok_and(|b| a == b));
        if args.text.as_ref().is_some_and(same) {
            return Err(Error::config("--out would replace the text that is read; name another file"));
        }
    }
    let job = Job::open(&args.model, args.settings(context)?)?;
    let (false, Some(out)) = (args.dry_run, &args.out) else { return plan(&job, context) };
    job.check_out(out)?;
    let measuring = args.text.as_deref().map(|text| Measuring::open(args, text, context)).transpose()?;
    let stopped = on_interrupt()?;
    remarks(&job, context);
    let before = measuring.as_ref().map(|m| m.before(&args.model, context, &stopped)).transpose()?;
    let start = Instant::now();
    let measured = write(&job, out, context, &stopped)?;
    let seconds = start.elapsed().as_secs_f64();
    for (item, measured) in job.items().iter().zip(&measured) {
        context.record(&line(item, measured.as_ref()))?;
    }
    report(&job, &measured, context);
    let (from, to) = (size(job.bytes_before()), size(job.bytes_after()));
    context.result(format_args!("{from} became {to} in {seconds:.1} s: {}", out.display()));
    let after = match (&measuring, &before) {
        (Some(measuring), Some(before)) => Some(measuring.after(out, before, context, &stopped)?),
        _ => None,
    };
    let mut all = total(&job);
    all["out"] = json!(out);
    all["seconds"] = json!(seconds);
    all["error"] = json!(sum(measured.iter().flatten()).relative());
    if let (Some(before), Some([after, off]), Some(measuring)) = (&before, after, &measuring) {
        context.result(format_args!(
            "perplexity {:.4} before, {after:.4} after, on {} windows of {} tokens",
            before.perplexity,
            measuring.windows.count(),
            measuring.windows.length()
        ));
        context.result(format_args!("output error {off:.4}: of the normed states before the head, relative"));
        all["perplexity_before"] = json!(before.perplexity);
        all["perplexity_after"] = json!(after);
        all["output_error"] = json!(off);
        all["windows"] = json!(measuring.windows.count());
        all["tokens"] = json!(measuring.windows.length());
        all["adapter"] = json!(measuring.gpu.adapter().name);
    }
    context.record(&all)
}

fn write(job: &Job, out: &Path, context: &Context, stopped: &AtomicBool) -> Result<Vec<Option<Measured>>> {
    let style = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {elapsed} so far, about {eta} to go";
    let bar = context.bar(Some(job.work()), style);
    let done = job.run(out, &mut |bytes| {
        bar.inc(bytes);
        unless_stopped(stopped, "nothing was written")
    });
    bar.finish_and_clear();
    done
}

/// Says which tensors stay although they might have been rounded: one line for all of the same reason.
fn remarks(job: &Job, context: &Context) {
    let mut reasons: BTreeMap<&str, Vec<&Item>> = BTreeMap::new();
    for item in job.items() {
        let Some(remark) = &item.remark else { continue };
        reasons.entry(remark).or_default().push(item);
    }
    for (remark, items) in reasons {
        let first = items[0];
        let others = match items.len() - 1 {
            0 => format!("stays {}", first.from),
            more => format!("and {more} more stay as they are"),
        };
        context.note(format_args!("`{}` {others}: {remark}", first.name));
    }
}

/// Bits that a weight takes, with its share of the scales.
fn bits(bytes: u64, weights: usize) -> f64 {
    8.0 * bytes as f64 / weights.max(1) as f64
}

/// Prints what becomes of each tensor.
fn plan(job: &Job, context: &Context) -> Result<()> {
    let width = job.items().iter().map(|item| item.name.len()).max().unwrap_or(0);
    let heading = format!(
        "{:<width$}  {:<15} {:>6} {:>8} {:>11} {:>11}  bits",
        "tensor", "shape", "from", "to", "before", "after"
    );
    context.result(heading);
    for item in job.items() {
        let (shape, to) = (format!("{:?}", item.shape), if item.rounding.is_some() { &item.to } else { "" });
        let (before, after) = (size(item.bytes_before), size(item.bytes_after));
        let bits = bits(item.bytes_after, item.count());
        let remark = item.remark.as_ref().map(|remark| format!("  {remark}")).unwrap_or_default();
        context.result(format_args!(
            "{:<width$}  {shape:<15} {:>6} {to:>8} {before:>11} {after:>11} {bits:>5.2}{remark}",
            item.name, item.from
        ));
        context.record(&line(item, None))?;
    }
    let weights: usize = job.items().iter().map(Item::count).sum();
    context.result(format_args!(
        "{} tensors, {} ({:.2} bits a weight) to {} ({:.2} bits), as {}",
        job.items().len(),
        size(job.bytes_before()),
        bits(job.bytes_before(), weights),
        size(job.bytes_after()),
        bits(job.bytes_after(), weights),
        job.format()
    ));
    context.record(&total(job))
}

/// One tensor as a JSON line.
fn line(item: &Item, measured: Option<&Measured>) -> Value {
    json!({
        "line": "tensor", "name": item.name, "part": item.part.to_string(), "shape": item.shape,
        "from": item.from, "to": item.to, "rounded": item.rounding.is_some(),
        "bytes_before": item.bytes_before, "bytes_after": item.bytes_after,
        "bits_before": bits(item.bytes_before, item.count()), "bits_after": bits(item.bytes_after, item.count()),
        "error": measured.map(Measured::relative), "remark": item.remark,
    })
}

fn total(job: &Job) -> Value {
    let weights: usize = job.items().iter().map(Item::count).sum();
    let rounded = job.items().iter().filter(|item| item.rounding.is_some()).count();
    json!({
        "line": "total", "format": job.format().to_string(), "tensors": job.items().len(), "rounded": rounded,
        "weights": weights, "bytes_before": job.bytes_before(), "bytes_after": job.bytes_after(),
        "bits_before": bits(job.bytes_before(), weights), "bits_after": bits(job.bytes_after(), weights),
    })
}

fn sum<'a>(all: impl Iterator<Item = &'a Measured>) -> Measured {
    let mut sum = Measured::default();
    all.for_each(|one| sum += *one);
    sum
}

/// Prints bytes, bits and errors of each kind of tensor.
fn report(job: &Job, measured: &[Option<Measured>], context: &Context) {
    let mut kinds: BTreeMap<(Part, &str), Vec<usize>> = BTreeMap::new();
    for (i, item) in job.items().iter().enumerate() {
        let to = if item.part == Part::Other && item.rounding.is_none() { "" } else { &item.to };
        kinds.entry((item.part, to)).or_default().push(i);
    }
    context.result(format_args!(
        "{:<8} {:<8} {:>7} {:>11} {:>11} {:>6} {:>6}  error",
        "part", "to", "tensors", "before", "after", "bits", "bits"
    ));
    for ((part, to), all) in kinds {
        let items = || all.iter().map(|&i| &job.items()[i]);
        let weights: usize = items().map(Item::count).sum();
        let [before, after] =
            [items().map(|i| i.bytes_before).sum::<u64>(), items().map(|i| i.bytes_after).sum()];
        let error = match items().any(|item| item.rounding.is_some()) {
            true => format!("{:.4}", sum(all.iter().filter_map(|&i| measured[i].as_ref())).relative()),
            false => "as it was".into(),
        };
        context.result(format_args!(
            "{part:<8} {to:<8} {:>7} {:>11} {:>11} {:>6.2} {:>6.2}  {error}",
            all.len(),
            size(before),
            size(after),
            bits(before, weights),
            bits(after, weights)
        ));
    }
}

/// The text on which models are measured.
struct Measuring {
    gpu: Gpu,
    windows: Windows,
}

/// What is known of the model that is rounded.
struct Before {
    perplexity: f64,
    /// Its normed states in each of the first windows.
    states: Vec<Vec<f32>>,
}

impl Measuring {
    /// Reads the text, so that what is wrong with it or with the model is reported before the long work.
    fn open(args: &Args, text: &Path, context: &Context) -> Result<Measuring> {
        let model = Published::open(&args.model)?;
        let words = Words::open(&args.model)?;
        let all = context.read(text)?;
        let length = WINDOW.min(model.config().context);
        let windows = Windows::of_text(&words, &all, args.windows as usize, length);
        let windows = windows.map_err(|e| Error::config(format!("{}: {e}", text.display())))?;
        Ok(Measuring { gpu: context.open()?, windows })
    }

    /// Measures a model, and shows `see` the normed states of the first windows.
    fn measure(
        &self,
        path: &Path,
        context: &Context,
        check: impl Fn() -> Result<()>,
        mut see: impl FnMut(usize, Vec<f32>),
    ) -> Result<f64> {
        let model = Published::open(path)?.load(&self.gpu, self.windows.length(), Form::Stored)?;
        let bar = context
            .bar(Some(self.windows.count() as u64), "{bar:30} perplexity: {pos}/{len} windows, ETA {eta}");
        let found = perplexity_with(&model, &self.windows, |window, stream| {
            if window < COMPARED {
                see(window, no_grad(|| model.norm.forward(stream)).to_vec()?);
            }
            bar.inc(1);
            check()
        });
        bar.finish_and_clear();
        found
    }

    fn before(&self, model: &Path, context: &Context, stopped: &AtomicBool) -> Result<Before> {
        let mut states = Vec::new();
        let check = || unless_stopped(stopped, "nothing was written");
        let perplexity = self.measure(model, context, check, |_, state| states.push(state))?;
        Ok(Before { perplexity, states })
    }

    /// The perplexity of the output, and the relative error of its states.
    fn after(
        &self,
        out: &Path,
        before: &Before,
        context: &Context,
        stopped: &AtomicBool,
    ) -> Result<[f64; 2]> {
        let (mut off, mut all) = (0.0, 0.0);
        let check = || unless_stopped(stopped, "the model is written, and was not measured");
        let perplexity = self.measure(out, context, check, |window, state| {
            for (&a, &b) in before.states[window].iter().zip(&state) {
                off += f64::from(a - b).powi(2);
                all += f64::from(a).powi(2);
            }
        })?;
        let relative = if all > 0.0 { (off / all).sqrt() } else { 0.0 };
        Ok([perplexity, relative])
    }
}
