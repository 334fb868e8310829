//! The terminal's part of the examples: printed errors, Ctrl-C, the option `--precision` and progress bars. The loop itself is in the
//! library (`tiebeam::train`), which prints nothing.
#![allow(dead_code, reason = "each example uses what it needs")]

use indicatif::{ProgressBar, ProgressStyle};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::error::ErrorKind;
use tiebeam::train::Report;
use tiebeam::{Error, Precision, Result};

/// The precision in which a model is trained.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Scope {
    /// Products and activations in f32, or in f16 or bf16 with f32 sums, weights and optimizer
    #[arg(long, default_value_t = Precision::F32)]
    pub precision: Precision,
}

/// Runs an example's body with logging. An error is printed as a message, and the exit code says that it failed.
pub fn main(body: impl FnOnce() -> Result<()>) -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or("error,tiebeam=warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    match body() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            // 130 is the exit code that shells expect of a program that Ctrl-C ended.
            if error.kind() == ErrorKind::Stopped { ExitCode::from(130) } else { ExitCode::FAILURE }
        }
    }
}

/// Returns a flag that Ctrl-C sets. A second Ctrl-C ends the process.
pub fn interruptible() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = move || {
        if flag.swap(true, Ordering::SeqCst) {
            tiebeam::exit::at_once(130);
        }
    };
    let caught = ctrlc::set_handler(handler);
    caught.map_err(|e| Error::config(format!("Ctrl-C cannot be caught: {e}")))?;
    Ok(stop)
}

/// The bar of a training run with a message of the example's.
pub const TRAINING: &str = "{bar:32} {pos}/{len} {msg} ETA {eta}";

/// Shows a bar of so many steps, of which some are done.
pub fn bar(template: &str, done: u64, steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template"));
    bar.set_position(done);
    bar.reset_eta();
    bar
}

/// Prints each step whose gradients overflowed and each change of the loss scale, as events of `run`.
pub fn events(bar: &ProgressBar, run: &str, report: &Report) {
    for event in &report.events {
        bar.suspend(|| println!("{run:<10} {event}"));
    }
}
