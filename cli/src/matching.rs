//! `tiebeam match` and `tiebeam match apply`.

use crate::context::{Context, on_interrupt, unless_stopped};
use clap::{Parser, Subcommand, ValueEnum};
use serde_json::json;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tiebeam::merge::evaluate::Labelled;
use tiebeam::merge::{
    Architecture, MatchOptions, Matching, Permutation, Shards, Spec, VisitOrder, Weights, match_weights_with,
};
use tiebeam::store::{Entry, save};
use tiebeam::{Error, Gpu, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam match a.safetensors b.safetensors --out p.safetensors
  tiebeam match a b --spec llama --permuted b-moved.safetensors
  tiebeam match apply p.safetensors b.safetensors --out moved.safetensors --inverse";

/// Find the permutation of a model's units that brings it nearest to another model
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_long_help = EXAMPLES)]
pub struct Args {
    /// Model that stays: a safetensors file, an index of shards, or a folder
    #[arg(required = true)]
    a: Option<PathBuf>,
    /// Model that is permuted
    #[arg(required = true)]
    b: Option<PathBuf>,
    /// What may be permuted: mlp, resnet, llama (heads from config.json), llama:HEADS:KV_HEADS, or a spec file; `-` reads one from
    /// stdin
    #[arg(long, default_value = "mlp")]
    spec: String,
    /// Write the permutation to this file
    #[arg(long)]
    out: Option<PathBuf>,
    /// Write the permuted model to this file
    #[arg(long)]
    permuted: Option<PathBuf>,
    /// Write the spec to this file, to be read or changed; `-` writes to stdout
    #[arg(long)]
    save_spec: Option<PathBuf>,
    /// Order in which groups are visited
    #[arg(long, value_enum, default_value = "shuffled")]
    order: OrderArg,
    /// Seed of orders and random starts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Runs, all but the first from random starts; the best is kept
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Most sweeps of a run
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    sweeps: u32,
    /// Start from this permutation
    #[arg(long)]
    start: Option<PathBuf>,
    /// Check on these rows (x, y) that the permuted network, a multilayer perceptron, has the same outputs
    #[arg(long)]
    data: Option<PathBuf>,
    #[command(subcommand)]
    apply: Option<Sub>,
}

#[derive(Subcommand)]
enum Sub {
    /// Apply a permutation from a file to a model, or undo it
    Apply {
        /// A file of --out
        permutation: PathBuf,
        /// Model to permute
        model: PathBuf,
        /// Write the permuted model to this file
        #[arg(long)]
        out: PathBuf,
        /// Undo the permutation
        #[arg(long)]
        inverse: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum OrderArg {
    Given,
    Shuffled,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    context.expect_data(args.save_spec.as_deref())?;
    if let Some(Sub::Apply { permutation, model, out, inverse }) = &args.apply {
        let read = Permutation::load(permutation)?;
        let permutation = if *inverse { read.inverse() } else { read };
        let stop = on_interrupt()?;
        return write_permuted(&permutation, &context.shards(model)?, out, context, &stop);
    }
    // Both are required without a subcommand.
    let (Some(a), Some(b)) = (&args.a, &args.b) else { return Ok(()) };
    let gpu = context.open()?;
    let [a, b] = [context.shards(a)?, context.shards(b)?];
    let spec = match args.spec.as_str() {
        "-" => Spec::from_json(&context.read(Path::new("-"))?)?,
        name => Spec::named(name, &a)?,
    };
    if let Some(path) = &args.save_spec {
        context.write(path, &spec.to_json())?;
    }
    let started = Instant::now();
    let stop = on_interrupt()?;
    let matching = search(&gpu, args, context, &spec, [&a, &b], &stop)?;
    // A search that was stopped has a result, which is kept. The next Ctrl-C stops what follows.
    let stopped = unless_stopped(&stop, "what was found so far is kept");
    stop.store(false, Ordering::SeqCst);
    report(&matching, started.elapsed(), context)?;
    if let Some(path) = &args.data {
        check(&gpu, &matching, &b, path, context)?;
    }
    if let Some(path) = &args.out {
        let note = |name: &str, value: f64| (name.to_string(), value.to_string());
        let notes = [
            note("objective", matching.objective),
            note("distance", matching.distance),
            note("distance_before", matching.distance_before),
            note("gap", matching.gap),
        ];
        matching.permutation.save(path, &notes.into())?;
        context.note(format_args!("wrote {}", path.display()));
    }
    if let Some(path) = &args.permuted {
        write_permuted(&matching.permutation, &b, path, context, &stop)?;
    }
    context.whole();
    stopped
}

/// Matches, with a progress line. Ctrl-C ends the search with the permutation found so far.
fn search(
    gpu: &Gpu,
    args: &Args,
    context: &Context,
    spec: &Spec,
    [a, b]: [&Shards; 2],
    stop: &AtomicBool,
) -> Result<Matching> {
    let start = args.start.as_ref().map(Permutation::load).transpose()?;
    let order = match args.order {
        OrderArg::Given => VisitOrder::Given,
        OrderArg::Shuffled => VisitOrder::Shuffled,
    };
    let (runs, sweeps) = (args.runs as usize, args.sweeps as usize);
    let options = MatchOptions::default().order(order).seed(args.seed).runs(runs).sweeps(sweeps).start(start);
    let bar = context.bar(None, "{spinner} {msg} {elapsed}");
    bar.set_message("reading");
    let matching = match_weights_with(gpu, spec, a, b, &options, &mut |visit| {
        bar.set_message(format!("run {} sweep {}: {}", visit.run + 1, visit.sweep + 1, visit.group));
        if stop.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    bar.finish_and_clear();
    Ok(matching)
}

fn report(matching: &Matching, took: Duration, context: &Context) -> Result<()> {
    let orders = matching.permutation.orders();
    let accepted = matching.visits.iter().filter(|visit| visit.accepted).count();
    let groups = matching.permutation.spec().groups.len();
    let (seconds, sweeps, moved) = (took.as_secs_f64(), matching.sweeps, matching.permutation.moved());
    let indices = orders.values().map(Vec::len).sum::<usize>();
    context.result(format_args!(
        "matched     {groups} groups in {seconds:.2} s, {sweeps} sweeps, {accepted} improvements; \
         {moved} of {indices} indices moved"
    ));
    let m = matching;
    context.result(format_args!("objective   {:.6} -> {:.6}", m.objective_before, m.objective));
    context.result(format_args!(
        "distance    {:.6} -> {:.6} ({:.1}% less)",
        m.distance_before,
        m.distance,
        100.0 * m.distance_ratio()
    ));
    let proved = match matching.exact {
        true => "no group can be improved by itself",
        false => "not every group's assignment is proved to be the best beside the others as they are now",
    };
    context.result(format_args!("certificate gap {:.1e}: {proved}", m.gap));
    context.record(&json!({
        "line": "matching", "groups": groups, "seconds": seconds, "sweeps": sweeps, "improvements": accepted,
        "moved": moved, "indices": indices, "objective_before": m.objective_before, "objective": m.objective,
        "distance_before": m.distance_before, "distance": m.distance, "gap": m.gap, "exact": m.exact,
    }))
}

/// Checks that the permuted network has the same outputs as the original one.
fn check(gpu: &Gpu, matching: &Matching, b: &Shards, path: &Path, context: &Context) -> Result<()> {
    let Architecture::Network(net) = Architecture::open(gpu, b, None)? else {
        return Err(Error::config("--data is for networks, not for language models"));
    };
    let data = Labelled::open(gpu, path, "x", "y")?;
    net.check(b, data.inputs.shape(), &data.labels)
        .map_err(|error| Error::format(path, error.to_string()))?;
    let permuted = matching.permuted(b);
    let plain = net.logits(gpu, b, &data.inputs)?.to_vec::<f32>()?;
    let moved = net.logits(gpu, &permuted, &data.inputs)?.to_vec::<f32>()?;
    let most = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, f32::max);
    if plain.iter().chain(&moved).any(|x| !x.is_finite()) {
        return Err(Error::config("the network's answers are not finite on these data"));
    }
    let apart = most(&mut plain.iter().zip(&moved).map(|(x, y)| (x - y).abs()));
    let size = most(&mut plain.iter().map(|x| x.abs()));
    let rows = data.labels.len();
    context.result(format_args!("outputs     differ by {apart:.1e} at most, of {size:.1}, on {rows} rows"));
    context.record(&json!({"line": "outputs", "differ": apart, "largest": size, "rows": rows}))?;
    match apart <= 1e-5 * size.max(1.0) {
        true => Ok(()),
        false => Err(Error::config(format!(
            "the permuted network answers otherwise (by {apart}): the spec does not fit this model"
        ))),
    }
}

/// Writes a permuted model, tensor by tensor. Elements keep their type and their bits.
fn write_permuted(
    permutation: &Permutation,
    model: &Shards,
    out: &Path,
    context: &Context,
    stop: &AtomicBool,
) -> Result<()> {
    permutation.check(model)?;
    let permuted = permutation.permuted(model);
    let bar = context.bar(Some(model.names().len() as u64), "{bar:32} {pos}/{len} tensors, ETA {eta}");
    let entry = |name: String| -> Result<Entry> {
        let info = model.info(&name)?;
        let (permuted, bar, tensor) = (&permuted, &bar, name.clone());
        Ok(Entry::lazy(name, info.dtype, &info.shape, move || {
            unless_stopped(stop, "nothing was written")?;
            bar.inc(1);
            permuted.bytes(&tensor, model.bytes(&tensor)?)
        }))
    };
    let entries = model.names().into_iter().map(entry).collect::<Result<Vec<_>>>()?;
    let moved = entries.len();
    save(out, entries, &BTreeMap::from([("format".to_string(), "pt".to_string())]))?;
    bar.finish_and_clear();
    context.note(format_args!("wrote {} ({moved} tensors)", out.display()));
    Ok(())
}
