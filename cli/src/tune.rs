//! `tiebeam tune`.

use crate::context::Context;
use clap::Parser;
use serde_json::json;
use std::path::PathBuf;
use std::time::Duration;
use tiebeam::ops::product::matmul::tune::{Progress, tune_all};

const EXAMPLES: &str = "\
Examples:
  tiebeam tune
  tiebeam tune --minutes 20 --export choices.txt";

/// Measure this device and which kernels are fastest on it, and store the result for later runs (see TIEBEAM_TUNE)
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Minutes after which no further class of problems is started
    #[arg(long, default_value_t = 5.0, value_parser = minutes)]
    minutes: f64,
    /// Also write the measurements to this file, to ship with a program (Options::choices); `-` writes to stdout
    #[arg(long)]
    export: Option<PathBuf>,
}

/// Parses a number of minutes, which may be 0.
fn minutes(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| *number >= 0.0);
    number.ok_or_else(|| "give a number of minutes, 0 or more".into())
}

pub fn run(args: &Args, context: &Context) -> tiebeam::Result<()> {
    context.expect_data(args.export.as_deref())?;
    let gpu = context.open()?;
    context.result(gpu.adapter());
    let class = gpu.measure_class()?;
    context.record(&json!({
        "line": "device",
        "adapter": gpu.adapter().to_string(),
        "class": class.name,
        "width": class.width,
        "flops_s": class.flops_s,
        "bytes_s": class.bytes_s,
        "dispatch_s": class.dispatch,
    }))?;
    context.result(format_args!(
        "as {}: {} multiprocessors, {:.1} GFLOP/s, {:.1} GB/s, a dispatch {:.1} us",
        class.name,
        class.width,
        class.flops_s * 1e-9,
        class.bytes_s * 1e-9,
        class.dispatch * 1e6
    ));
    let bar = context.bar(Some(1), "{spinner} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go");
    context.result(format_args!("{:<58} {:<28} over the table's", "class", "fastest"));
    let mut written = Ok(());
    let budget = Duration::try_from_secs_f64(args.minutes * 60.0).unwrap_or(Duration::MAX);
    let Progress { done, failed, of, .. } = tune_all(&gpu, &class, budget, |at, tuned| {
        bar.set_length(at.of as u64);
        bar.set_position((at.done + at.failed) as u64);
        if let Some(t) = tuned {
            let gain = if t.best == t.table { "the same".into() } else { format!("{:.2}x", t.gain) };
            bar.suspend(|| context.result(format_args!("{:<58} {:<28} {gain}", t.class, t.best)));
            let line =
                json!({"line": "choice", "class": t.class, "best": t.best, "table": t.table, "gain": t.gain});
            written = std::mem::replace(&mut written, Ok(())).and_then(|()| context.record(&line));
        }
    })?;
    bar.finish_and_clear();
    written?;
    if let Some(path) = &args.export {
        context.write(path, &gpu.choices_text())?;
    }
    let kept = match gpu.choices_file() {
        Some(file) => format!("kept in {}", file.display()),
        None => "this system has no folder to keep them in: set TIEBEAM_CACHE".into(),
    };
    context.result(format_args!("{done} of {of} classes measured; {kept}"));
    if failed > 0 {
        context.note(format_args!("{failed} could not be measured here; the table's kernels stay for them"));
    }
    if done + failed < of {
        context.note("the time was up: --minutes gives it more");
    }
    Ok(())
}
