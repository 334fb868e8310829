//! The option `--precision`, and what the examples print about a training run's steps.

use indicatif::ProgressBar;
use tiebeam::optim::Watch;
use tiebeam::{Precision, Result};

/// The precision in which a model is trained.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Scope {
    /// Products and activations in f32, or in f16 or bf16 with f32 sums, weights and optimizer
    #[arg(long, default_value_t = Precision::F32)]
    pub precision: Precision,
}

/// Prints each step whose gradients overflowed and each change of the loss scale, as events of `run`.
pub fn report(bar: &ProgressBar, run: &str, watch: Watch) -> Result<()> {
    for event in watch.events()? {
        bar.suspend(|| println!("{run:<10} {event}"));
    }
    Ok(())
}
