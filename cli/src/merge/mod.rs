//! `tiebeam merge`.

mod learned;

use crate::context::{Context, is_standard, on_interrupt, unless_stopped};
use crate::data::bar;
use crate::scores::Table;
use clap::Parser;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tiebeam::files::{parse_size, size};
use tiebeam::merge::aligned::Aligned;
use tiebeam::merge::config::Align;
use tiebeam::merge::evaluate::Task;
use tiebeam::merge::job::{Job, Output};
use tiebeam::merge::method::Method;
use tiebeam::merge::{Architecture, MergeConfig, Shards, Weights};
use tiebeam::{Error, Gpu, Result};
use twox_hash::XxHash3_128;

const EXAMPLES: &str = "\
Examples:
  tiebeam merge merge.yaml --dry-run
  tiebeam merge merge.yaml --out merged --shard-size 2GB
  cat merge.yaml | tiebeam merge - --out merged";

/// What is said of an output that was looked at again.
const READ_BACK: &str = "read back: every tensor is there in its shape and type";

/// Merge models by a configuration in mergekit's format
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A YAML file; paths in it are relative to its own folder. `-` reads stdin, with paths relative to this folder
    config: PathBuf,
    /// The folder to write. A folder of an earlier merge is replaced, but files that others put there are kept
    #[arg(long, required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Only print what would be done, and what prevents it
    #[arg(long)]
    dry_run: bool,
    /// Largest file of the output, with a unit: 500MB, 5GB, 4GiB
    #[arg(long, default_value = "5GB", value_parser = parse_size)]
    shard_size: u64,
}

/// Opens what a configuration names.
fn open(args: &Args, text: &str) -> Result<Job> {
    let path = &args.config;
    let folder = path.parent().filter(|_| !is_standard(path)).unwrap_or(Path::new("."));
    let config = MergeConfig::from_yaml(text, folder);
    Job::open(config.map_err(|e| Error::format(path, e.to_string()))?)
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    // Stdin is read by all ranks together, a file by each.
    let read = context.read(&args.config);
    let text = if is_standard(&args.config) { read? } else { context.all_done(read)? };
    let job = context.all_done(open(args, &text))?;
    let said = [
        ("the recipe", format!("{:032x}", XxHash3_128::oneshot(text.as_bytes()))),
        ("--shard-size", args.shard_size.to_string()),
        ("--dry-run", (args.dry_run || args.out.is_none()).to_string()),
    ];
    context.agree(said)?;
    if args.dry_run {
        context.result(job.describe(args.shard_size).trim_end());
        context.record(&plan(&job, args.shard_size))?;
        context.whole();
    } else {
        job.notes.iter().for_each(|note| context.note(note));
    }
    context.all_done(job.check())?;
    let (false, Some(out)) = (args.dry_run, &args.out) else { return Ok(()) };
    // The data for the evaluation are opened first, so an error in them is reported before anything is merged.
    let prepare = || {
        if context.is_first() {
            job.check_out(out, args.shard_size)?;
        }
        let gpu = context.open()?;
        let tasks = job.tasks(&gpu)?;
        Ok((gpu, tasks))
    };
    let (gpu, tasks) = context.all_done(prepare())?;
    context.agree(job.summary())?;
    context.note(gpu.adapter());
    let stopped = on_interrupt()?;
    if context.ranks.size() > 1 && !job.config.is_by_tensors() {
        context.note("this method is not spread over ranks: rank 0 does all of it");
        if !context.is_first() {
            return Ok(());
        }
    }
    let aligned =
        job.config.align.as_ref().map(|how| align(&gpu, &job, how, context, &stopped)).transpose()?;
    let boxed = aligned.as_ref().map(|aligned| aligned.sources(&job)).unwrap_or_default();
    let sources = match aligned {
        Some(_) => boxed.iter().map(|source| &**source).collect(),
        None => job.sources(),
    };
    let merge = Merge {
        gpu: &gpu,
        job: &job,
        sources: &sources,
        out,
        shard_bytes: args.shard_size,
        config: &text,
        context,
        stopped: &stopped,
    };
    if job.config.method == Method::Rmm {
        return merge.write_reversible();
    }
    match job.config.needs_data() {
        true => merge.write_learned()?,
        false => merge.write()?,
    }
    match tasks.is_empty() || !context.is_first() {
        true => Ok(()),
        false => merge.evaluate(&tasks),
    }
}

/// What a dry run shows, as a JSON line.
fn plan(job: &Job, shard_bytes: u64) -> Value {
    let tensor = |o: &Output| {
        json!({
            "name": o.name, "dtype": o.dtype.to_string(), "shape": o.shape, "merged": o.arguments.is_some(),
        })
    };
    json!({
        "line": "plan",
        "method": job.config.method.name(),
        "models": job.models.iter().map(|model| &model.path).collect::<Vec<_>>(),
        "bytes": job.bytes(),
        "files": job.shards(shard_bytes).len(),
        "memory": job.memory(),
        "passes": job.passes(),
        "tensors": job.outputs.iter().map(tensor).collect::<Vec<_>>(),
        "problems": job.problems,
        "notes": job.notes,
    })
}

/// Aligns the models and prints how near each came to the target.
fn align(gpu: &Gpu, job: &Job, settings: &Align, context: &Context, stopped: &AtomicBool) -> Result<Aligned> {
    let bar = context.bar(None, "{spinner} {elapsed} {wide_msg}");
    let aligned = job.align(gpu, settings, &mut |path, what| {
        bar.set_message(format!("aligning {}: {what}", path.display()));
        unless_stopped(stopped, "nothing was written")
    });
    bar.finish_and_clear();
    let aligned = match job.config.is_by_tensors() {
        true => agreed(context, aligned)?,
        // Rank 0 is by itself.
        false => aligned?,
    };
    for (model, matching) in job.models.iter().zip(&aligned.matchings) {
        let Some(m) = matching else { continue };
        let path = model.path.display();
        let proof = if m.exact { "each assignment proved best" } else { "assignments not proved best" };
        let (before, after, moved) = (m.distance_before, m.distance, m.permutation.moved());
        match m.similarity {
            Some(mean) => context.result(format_args!(
                "aligned {path} by activations: {moved} indices moved, mean similarity {mean:.4}, {proof}"
            )),
            None => context.result(format_args!(
                "aligned {path}: distance {before:.4} to {after:.4}, {moved} indices moved, {} sweeps, {proof}",
                m.sweeps
            )),
        }
        context.record(&json!({
            "line": "aligned", "model": model.path, "distance_before": before, "distance": after,
            "moved": moved, "sweeps": m.sweeps, "exact": m.exact, "similarity": m.similarity,
        }))?;
    }
    Ok(aligned)
}

/// Every rank aligns for itself, by the same search on its own adapter: they must have found the same.
fn agreed(context: &Context, own: Result<Aligned>) -> Result<Aligned> {
    let aligned = context.all_done(own)?;
    let permutations: Vec<_> =
        aligned.matchings.iter().map(|found| found.as_ref().map(|found| &found.permutation)).collect();
    let hash = format!("{:032x}", XxHash3_128::oneshot(format!("{permutations:?}").as_bytes()));
    context.agree([("the alignment (adapters of several kinds may round differently)", hash)])?;
    Ok(aligned)
}

/// A merge that is written.
struct Merge<'a> {
    gpu: &'a Gpu,
    job: &'a Job,
    sources: &'a [&'a dyn Weights],
    /// The folder that is written.
    out: &'a Path,
    /// The largest file.
    shard_bytes: u64,
    /// The text of the configuration, which is kept in the folder.
    config: &'a str,
    context: &'a Context,
    stopped: &'a AtomicBool,
}

impl Merge<'_> {
    fn write(&self) -> Result<()> {
        let Merge { job, context, .. } = *self;
        let start = Instant::now();
        let style = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {elapsed} so far, about {eta} to go";
        let bar = context.bar(Some(job.bytes() * job.passes()), style);
        let (to, how) = ((self.sources, self.out), (self.shard_bytes, self.config));
        let done = job.run_on(&*context.ranks, self.gpu, to, how, &mut |bytes| {
            bar.inc(bytes);
            self.unless_stopped()
        });
        bar.finish_and_clear();
        done?;
        if !context.is_first() {
            return Ok(());
        }
        job.check_written(self.out)?;
        context.note(READ_BACK);
        let seconds = start.elapsed().as_secs_f64();
        let (n, written, rate) = (job.outputs.len(), size(job.bytes()), job.bytes() as f64 / 1e6 / seconds);
        context.result(format_args!(
            "{n} tensors, {written} in {seconds:.1} s ({rate:.0} MB/s of output): {}",
            self.out.display()
        ));
        context.record(&json!({
            "line": "merged", "out": self.out, "tensors": n, "bytes": job.bytes(), "seconds": seconds, "notes": job.notes,
        }))
    }

    /// Ends work whose output is not there yet, once Ctrl-C was pressed.
    fn unless_stopped(&self) -> Result<()> {
        unless_stopped(self.stopped, "nothing was written")
    }

    /// Prints the scores of the inputs and the output.
    fn evaluate(&self, tasks: &[Task]) -> Result<()> {
        let Merge { gpu, job, sources, out, context, stopped, .. } = *self;
        let merged = Shards::open(out)?;
        let architecture = Architecture::open(gpu, &merged, job.network()?.as_ref())?;
        // `job.models` includes the files of Fisher diagonals, which are left out here.
        let slices = job.config.slices.iter().flat_map(|slice| slice.sources.iter().map(|s| &s.model));
        let named: Vec<&PathBuf> = slices.chain(&job.config.base).collect();
        let inputs = job.models.iter().zip(sources).map(|(model, source)| (model.path.as_path(), *source));
        let inputs = inputs.filter(|(path, _)| named.iter().any(|n| n == path));
        let mut table = Table::new(context, tasks);
        for (path, weights) in inputs.chain([(out, &merged as &dyn Weights)]) {
            let bar = bar(context, &format!("evaluating {}", path.display()));
            let score = |task: &Task| {
                architecture.score(gpu, weights, task, &mut |done, all| {
                    bar.set_message(format!("evaluating {}: {done} of {all} tokens", path.display()));
                    unless_stopped(stopped, "the merge is written")
                })
            };
            unless_stopped(stopped, "the merge is written")?;
            // The inputs of a merge may lack what its output has, such as two heads.
            if path != out
                && let Some(error) = tasks.iter().find_map(|task| architecture.check(weights, task).err())
            {
                bar.finish_and_clear();
                context.note(format_args!("{} is not scored: {error}", path.display()));
                continue;
            }
            let scores = tasks.iter().map(score).collect::<Result<Vec<_>>>()?;
            bar.finish_and_clear();
            table.row(&path.display().to_string(), path, &scores)?;
        }
        Ok(())
    }
}
