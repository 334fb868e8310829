//! `tiebeam fisher`.

use crate::context::{Context, on_interrupt, unless_stopped};
use crate::data::Tasks;
use clap::{Parser, ValueEnum};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;
use tiebeam::merge::Architecture;
use tiebeam::merge::fisher::{FisherOptions, Labels, fisher_of};
use tiebeam::store::save_tensors;
use tiebeam::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam fisher a.safetensors --data train-a.safetensors --out fisher-a.safetensors
  tiebeam fisher models/SmolLM2-135M --text book.txt --context 128 --samples 64 --out fisher.safetensors

A merge by `merge_method: fisher` names such a file for each model.";

/// Compute the diagonal of a model's Fisher matrix on data, for merges by `fisher`
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A safetensors file or folder of a network, or the folder of a language model
    model: PathBuf,
    #[command(flatten)]
    tasks: Tasks,
    /// Labels that the gradients are of [default: exact for networks, sampled for language models]
    #[arg(long = "of")]
    of: Option<Of>,
    /// Samples at most: rows of --data, windows of --text
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Rows of --data at a time
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Seed of labels that are sampled
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The file to write, with a tensor for each of the model's
    #[arg(long)]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Of {
    /// Every class, by its probability
    Exact,
    /// One label for each prediction, drawn from the model
    Sampled,
    /// The data's own labels
    Given,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let files = args.tasks.files()?;
    let [file] = &files[..] else {
        return Err(Error::config("a Fisher matrix is of one task; name one --data or --text"));
    };
    tiebeam::files::check(&args.out)?;
    let whole = |path: &std::path::Path| path.canonicalize().ok();
    let out = whole(&args.out);
    if out.is_some() && (out == whole(&args.model) || out == whole(&file.path)) {
        return Err(Error::config(format!(
            "--out {}: this is what is read; name another file",
            args.out.display()
        )));
    }
    let network = args.tasks.network()?;
    let gpu = context.open()?;
    let weights = context.shards(&args.model)?;
    let architecture = Architecture::open(&gpu, &weights, network.as_ref())?;
    let task = file.open(&gpu, &tiebeam::store::located(&args.model))?;
    let labels = args.of.map(|of| match of {
        Of::Exact => Labels::Exact,
        Of::Sampled => Labels::Sampled,
        Of::Given => Labels::Given,
    });
    let options = FisherOptions::default()
        .labels(labels)
        .samples(args.samples as usize)
        .batch(args.batch as usize)
        .seed(args.seed);
    let stop = on_interrupt()?;
    let start = Instant::now();
    let bar = context.bar(Some(0), "{bar:30} {pos}/{len} samples, {elapsed} so far, about {eta} to go");
    let mut samples = 0;
    let sums = fisher_of(&gpu, &architecture, &weights, &task, &options, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        samples = all;
        unless_stopped(&stop, "nothing was written")
    })?;
    bar.finish_and_clear();
    let notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    save_tensors(&args.out, &sums, &notes)?;
    let (seconds, out) = (start.elapsed().as_secs_f64(), args.out.display());
    context.result(format_args!("{} tensors from {samples} samples in {seconds:.1} s: {out}", sums.len()));
    context.record(&json!({
        "line": "fisher", "model": args.model, "task": task.name, "samples": samples, "seconds": seconds, "out": args.out,
    }))?;
    context.whole();
    Ok(())
}
