//! The command line: lists adapters, measures and tunes kernels, matches and merges models, and runs trained potentials.

mod barrier;
mod bench;
mod data;
mod matching;
mod merge;
mod predict;
mod tune;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tiebeam::error::ErrorKind;
use tiebeam::{Gpu, Result};

/// A GPU tensor engine for models that store fewer weights than they use.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the adapters that TIEBEAM_ADAPTER can choose from
    Adapters,
    /// Evaluate models between two multilayer perceptrons, unmatched and matched
    Barrier(barrier::Args),
    /// Measure an adapter's ceilings and how near each kernel comes to them
    Bench(bench::Args),
    /// Merge models by a YAML configuration
    Merge(merge::Args),
    /// Find the permutation of a model's units that brings it nearest to another model
    Match(matching::Args),
    /// Predict energies, forces and stress of extended XYZ frames with a trained potential
    Predict(predict::Args),
    /// Measure which kernels are fastest on this device, for later runs
    Tune(tune::Args),
}

fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Adapters => {
            Gpu::adapters()?.iter().for_each(|adapter| println!("{adapter}"));
            Ok(())
        }
        Command::Barrier(args) => barrier::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Match(args) => matching::run(&args),
        Command::Predict(args) => predict::run(&args),
        Command::Tune(args) => tune::run(&args),
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            // What a shell expects of a program that Ctrl-C ended.
            if error.kind() == ErrorKind::Stopped { ExitCode::from(130) } else { ExitCode::FAILURE }
        }
    }
}
