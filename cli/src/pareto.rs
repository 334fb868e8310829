//! `tiebeam pareto`.

use crate::context::{Context, on_interrupt, unless_stopped};
use clap::Parser;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiebeam::chart::{self, Frame, Line};
use tiebeam::merge::evaluate::{Score, Task};
use tiebeam::merge::job::Job;
use tiebeam::merge::map::{Map, Scored};
use tiebeam::merge::method::Method;
use tiebeam::merge::{Architecture, MergeConfig};
use tiebeam::{Error, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam pareto map.yaml
  tiebeam pareto map.yaml --out front.svg --json=front.jsonl

The configuration is that of a merge by `merge_method: map`, with two tasks or more under `learn`.";

/// Find the trade-offs between tasks over the coefficients of task vectors: merge, evaluate, fit, search, evaluate again
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A YAML file of a merge by `map`; paths in it are relative to its own folder
    config: PathBuf,
    /// Draw the first two tasks' front to this SVG file
    #[arg(long)]
    out: Option<PathBuf>,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    if let Some(out) = &args.out {
        if out.extension().is_none_or(|end| end != "svg") {
            return Err(Error::config(format!("--out {}: the name must end in .svg", out.display())));
        }
        tiebeam::files::check(out)?;
    }
    let text = context.read(&args.config)?;
    let folder = args.config.parent().unwrap_or(Path::new("."));
    let config = MergeConfig::from_yaml(&text, folder)
        .map_err(|error| Error::format(&args.config, error.to_string()))?;
    if config.method != Method::Map {
        let name = config.method.name();
        return Err(Error::config(format!("merge_method: `{name}`; a front is found by `map`")));
    }
    let job = Job::open(config)?;
    job.notes.iter().for_each(|note| context.note(note));
    job.check()?;
    let gpu = context.open()?;
    let stop = on_interrupt()?;
    let tasks = job.learning_tasks(&gpu)?;
    let architecture = Architecture::open(&gpu, &job.leader().checkpoint, job.network()?.as_ref())?;
    let bar = context.bar(Some(0), "{bar:30} {pos}/{len} {msg}, {elapsed} so far, about {eta} to go");
    let found = job.front(&gpu, &job.sources(), &architecture, &tasks, &mut |done, all, word| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(word.to_string());
        unless_stopped(&stop, "nothing was written")
    })?;
    bar.finish_and_clear();
    show(&found, &tasks, context)?;
    if let Some(out) = &args.out {
        draw(out, &found, &tasks)?;
        context.note(format_args!("wrote {}", out.display()));
    }
    context.whole();
    Ok(())
}

fn show(found: &Map, tasks: &[Task], context: &Context) -> Result<()> {
    let names: Vec<&str> = tasks.iter().map(|task| task.name.as_str()).collect();
    for (name, r) in names.iter().zip(&found.r_squared) {
        context.result(format_args!(
            "{name}: the surrogate explains {:.1}% of the variance of {} models",
            100.0 * r,
            found.samples.len()
        ));
    }
    context.result(format_args!(
        "{} of {} models that were scored are on the front:",
        found.measured().len(),
        found.samples.len() + found.checked.len()
    ));
    let heads: String = names.iter().map(|name| format!("{name:<12} ")).collect();
    context.result(format_args!("{heads}coefficients"));
    for scored in found.measured() {
        let scores: String = scored.scores.iter().map(|score| format!("{:<12.4} ", score.main())).collect();
        let all: Vec<String> = scored.coefficients.iter().map(|c| format!("{c:.3}")).collect();
        context.result(format_args!("{scores}{}", all.join(" ")));
    }
    for (kind, all) in [("sample", &found.samples), ("checked", &found.checked)] {
        all.iter().try_for_each(|scored| context.record(&line(kind, scored, &names)))?;
    }
    found.measured().into_iter().try_for_each(|scored| context.record(&line("front", scored, &names)))?;
    context.record(&json!({"line": "surrogates", "tasks": names, "r_squared": found.r_squared}))
}

fn line(kind: &str, scored: &Scored, names: &[&str]) -> Value {
    let scores: serde_json::Map<String, Value> = names
        .iter()
        .zip(&scored.scores)
        .map(|(name, score)| (name.to_string(), json!(score.main())))
        .collect();
    json!({"line": kind, "coefficients": scored.coefficients, "scores": scores})
}

/// Draws what was scored and what the surrogates predict, over the merits of the first two tasks.
fn draw(out: &Path, found: &Map, tasks: &[Task]) -> Result<()> {
    let place = |scored: &Scored| (scored.scores[0].merit(), scored.scores[1].merit());
    let front = found.front.iter().map(|point| (point.objectives[0], point.objectives[1])).collect();
    let lines = [
        Line::dots("scored", found.samples.iter().chain(&found.checked).map(place).collect()),
        Line::dots("front by the surrogates", front),
        Line::new("front as scored", found.measured().into_iter().map(place).collect()),
    ];
    let word = |score: &Score| if score.accuracy.is_some() { "accuracy" } else { "loss, negated" };
    let label = |t: usize| format!("{}: {}", tasks[t].name, word(&found.samples[0].scores[t]));
    let (x, y) = (label(0), label(1));
    let title = "Trade-offs between two tasks, by coefficients of their task vectors";
    chart::lines(out, &Frame { title, x: &x, y: &y, logarithmic: false }, &lines)
}
