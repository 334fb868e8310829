//! `tiebeam tune`.

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;
use tiebeam::ops::matmul::tune::tune_all;
use tiebeam::{Gpu, Options, Result};

/// Measure which kernels are fastest here and keep the choices for later runs (see TIEBEAM_TUNE).
#[derive(Parser)]
pub struct Args {
    /// Index or part of the name of the adapter [default: the best]
    #[arg(long)]
    adapter: Option<String>,
    /// Minutes after which no further class of problems is begun
    #[arg(long, default_value_t = 5.0)]
    minutes: f64,
}

pub fn run(args: &Args) -> Result<()> {
    let gpu = Gpu::open_with(Options { adapter: args.adapter.clone(), ..Options::default() })?;
    println!("{}", gpu.adapter());
    let bar = ProgressBar::new(1);
    let style = "{spinner} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go";
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    bar.enable_steady_tick(Duration::from_millis(200));
    println!("{:<58} {:<28} over the table's", "class", "fastest");
    let budget = Duration::try_from_secs_f64(args.minutes * 60.0).unwrap_or(Duration::MAX);
    let done = tune_all(&gpu, budget, |at, all, tuned| {
        bar.set_length(all as u64);
        bar.set_position(at as u64);
        if let Some(t) = tuned {
            let gain = if t.best == t.table { "the same".into() } else { format!("{:.2}x", t.gain) };
            bar.suspend(|| println!("{:<58} {:<28} {gain}", t.class, t.best));
        }
    })?;
    bar.finish_and_clear();
    match gpu.choices_file() {
        Some(file) => println!("{done} classes measured; kept in {}", file.display()),
        None => {
            println!("{done} classes measured; this system has no folder to keep them in: set TIEBEAM_CACHE")
        }
    }
    Ok(())
}
