//! `tiebeam tune`.

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::time::Duration;
use tiebeam::ops::product::matmul::tune::{Progress, tune_all};
use tiebeam::{Gpu, Options, Result};

/// Measure this device and which kernels are fastest on it, and store the result for later runs (see TIEBEAM_TUNE).
#[derive(Parser)]
pub struct Args {
    /// Index or part of the name of the adapter [default: the best]
    #[arg(long)]
    adapter: Option<String>,
    /// Minutes after which no further class of problems is started
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
    /// Also write the measurements to this file, to ship with a program (Options::choices)
    #[arg(long)]
    export: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let gpu = Gpu::open_with(Options::default().adapter(args.adapter.clone()))?;
    println!("{}", gpu.adapter());
    let class = gpu.measure_class()?;
    println!(
        "as {}: {} multiprocessors, {:.1} GFLOP/s, {:.1} GB/s, a dispatch {:.1} us",
        class.name,
        class.width,
        class.flops_s * 1e-9,
        class.bytes_s * 1e-9,
        class.dispatch * 1e6
    );
    let bar = ProgressBar::new(1);
    let style = "{spinner} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(200));
    println!("{:<58} {:<28} over the table's", "class", "fastest");
    let budget = Duration::try_from_secs_f64(args.minutes * 60.0).unwrap_or(Duration::MAX);
    let Progress { done, failed, of, .. } = tune_all(&gpu, &class, budget, |at, tuned| {
        bar.set_length(at.of as u64);
        bar.set_position((at.done + at.failed) as u64);
        if let Some(t) = tuned {
            let gain = if t.best == t.table { "the same".into() } else { format!("{:.2}x", t.gain) };
            bar.suspend(|| println!("{:<58} {:<28} {gain}", t.class, t.best));
        }
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.export {
        gpu.export_choices(path)?;
        println!("exported to {}", path.display());
    }
    let kept = match gpu.choices_file() {
        Some(file) => format!("kept in {}", file.display()),
        None => "this system has no folder to keep them in: set TIEBEAM_CACHE".into(),
    };
    println!("{done} of {of} classes measured; {kept}");
    if failed > 0 {
        println!("{failed} could not be measured here; the table's kernels stay for them");
    }
    if done + failed < of {
        println!("the time was up: --minutes gives it more");
    }
    Ok(())
}
