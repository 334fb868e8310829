//! `tiebeam merge`.

use crate::data::on_interrupt;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tiebeam::merge::aligned::Aligned;
use tiebeam::merge::config::Align;
use tiebeam::merge::evaluate::Data;
use tiebeam::merge::job::{Job, size};
use tiebeam::merge::{MergeConfig, Shards, Weights, yaml};
use tiebeam::{Error, Gpu, Options, Result};

/// Merge models by a configuration in mergekit's format.
#[derive(Parser)]
pub struct Args {
    /// A YAML file; paths in it are relative to its own folder
    config: PathBuf,
    /// The folder to write. A folder of an earlier merge is replaced, but files that others put there are kept
    #[arg(long, required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Only print what would be done, and what prevents it
    #[arg(long)]
    dry_run: bool,
    /// Largest file of the output, with a unit: 500MB, 5GB, 4GiB
    #[arg(long, default_value = "5GB", value_parser = bytes)]
    shard_size: u64,
    /// Index or part of the name of the adapter [default: the best]
    #[arg(long)]
    adapter: Option<String>,
}

/// Parses a number of bytes with a unit.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KIB" => 1024.0,
        "MIB" => 1_048_576.0,
        "GIB" => 1_073_741_824.0,
        _ => return Err(format!("`{unit}` is no unit; use KB, MB, GB, KiB, MiB or GiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is no number of bytes"))?;
    match (number * factor) as u64 {
        0 => Err("a file needs more than 0 bytes".into()),
        bytes => Ok(bytes),
    }
}

pub fn run(args: &Args) -> Result<()> {
    let path = &args.config;
    let failed = |message: String| Error::format(path, message);
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let config = yaml::parse(&text).and_then(|value| MergeConfig::from_value(&value, folder));
    let job = Job::open(config.map_err(|e| failed(e.to_string()))?)?;
    if args.dry_run {
        print!("{}", job.describe(args.shard_size));
    }
    job.check()?;
    let (false, Some(out)) = (args.dry_run, &args.out) else { return Ok(()) };
    job.check_out(out, args.shard_size)?;
    let gpu = Gpu::open_with(Options::default().adapter(args.adapter.clone()))?;
    println!("{}", gpu.adapter());
    // The data for the evaluation are opened first, so an error in them is reported before anything is merged.
    let data =
        job.config.evaluate.as_ref().map(|e| Data::open(&gpu, &e.data, &e.inputs, &e.labels)).transpose()?;
    let stopped = on_interrupt()?;
    let aligned =
        job.config.align.as_ref().map(|settings| align(&gpu, &job, settings, &stopped)).transpose()?;
    let boxed = aligned.as_ref().map(|aligned| aligned.sources(&job)).unwrap_or_default();
    let sources = match aligned {
        Some(_) => boxed.iter().map(|source| &**source).collect(),
        None => job.sources(),
    };
    let start = Instant::now();
    write(&gpu, &job, &sources, out, args.shard_size, &text, &stopped)?;
    let seconds = start.elapsed().as_secs_f64();
    let (n, written, rate) = (job.outputs.len(), size(job.bytes()), job.bytes() as f64 / 1e6 / seconds);
    println!("{n} tensors, {written} in {seconds:.1} s ({rate:.0} MB/s of output): {}", out.display());
    match data {
        Some(data) => evaluate(&gpu, &job, &sources, out, &data),
        None => Ok(()),
    }
}

/// Aligns the models and prints how near each came to the target.
fn align(gpu: &Gpu, job: &Job, settings: &Align, stopped: &AtomicBool) -> Result<Aligned> {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}").expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(200));
    let aligned = job.align(gpu, settings, &mut |path, visit| {
        let (run, sweep, group) = (visit.run + 1, visit.sweep + 1, &visit.group);
        bar.set_message(format!("aligning {}: run {run}, sweep {sweep}, {group}", path.display()));
        unless_stopped(stopped)
    });
    bar.finish_and_clear();
    let aligned = aligned?;
    for (model, matching) in job.models.iter().zip(&aligned.matchings) {
        let Some(m) = matching else { continue };
        let path = model.path.display();
        let proof = if m.exact { "each assignment proved best" } else { "assignments not proved best" };
        let (before, after, moved) = (m.distance_before, m.distance, m.permutation.moved());
        println!(
            "aligned {path}: distance {before:.4} to {after:.4}, {moved} indices moved, {} sweeps, {proof}",
            m.sweeps
        );
    }
    Ok(aligned)
}

fn unless_stopped(stopped: &AtomicBool) -> Result<()> {
    match stopped.load(Ordering::Relaxed) {
        true => Err(Error::stopped("stopped; nothing was written")),
        false => Ok(()),
    }
}

fn write(
    gpu: &Gpu,
    job: &Job,
    sources: &[&dyn Weights],
    out: &Path,
    shard_bytes: u64,
    config: &str,
    stopped: &AtomicBool,
) -> Result<()> {
    let bar = ProgressBar::new(job.bytes() * job.passes());
    let style = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {elapsed} so far, about {eta} to go";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(200));
    let done = job.run(gpu, sources, out, shard_bytes, config, &mut |bytes| {
        bar.inc(bytes);
        unless_stopped(stopped)
    });
    bar.finish_and_clear();
    done
}

/// Prints loss and accuracy of the inputs and the output.
fn evaluate(gpu: &Gpu, job: &Job, sources: &[&dyn Weights], out: &Path, data: &Data) -> Result<()> {
    let merged = Shards::open(out)?;
    // `job.models` includes the files of Fisher diagonals, which are left out here.
    let slices = job.config.slices.iter().flat_map(|slice| slice.sources.iter().map(|s| &s.model));
    let named: Vec<&PathBuf> = slices.chain(&job.config.base).collect();
    let inputs = job.models.iter().zip(sources).map(|(model, source)| (model.path.as_path(), *source));
    let inputs = inputs.filter(|(path, _)| named.iter().any(|n| n == path));
    println!("{:<9} {:<9} model", "loss", "accuracy");
    for (path, weights) in inputs.chain([(out, &merged as &dyn Weights)]) {
        let e = data.evaluate(gpu, weights)?;
        println!("{:<9.4} {:<9.4} {}", e.loss, e.accuracy, path.display());
    }
    Ok(())
}
