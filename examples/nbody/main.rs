//! The N-body benchmark: predicts where five charged particles are 1000 steps later. The data are simulated here.
//!
//!     cargo run --release --example nbody -- --out out/nbody
//!
//! Two networks are trained: one on positions and orientations, and the same one on distances alone. Their baselines are no
//! motion and straight lines. Every epoch saves a checkpoint, from which `--resume` continues with the same bits. With
//! `--precision f16|bf16` a training step's products and activations have 16 bits, except in PONITA's fused kernels, which
//! compute in f32, so that it saves little; predictions are made in f32. Data and settings: Satorras et al. 2021 (arXiv
//! 2102.09844), Bekkers et al. 2024 (arXiv 2310.02970).

mod data;
mod net;
mod picture;
#[path = "../common/state.rs"]
mod state;
#[path = "../common/terminal.rs"]
mod terminal;
mod train;

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use tiebeam::geometry::{Grid, PonitaConfig};
use tiebeam::{Error, Gpu, Result, Rng};

/// Train on charged particles and compare with simpler predictions.
#[derive(Parser, Debug)]
#[command(version)]
pub struct Args {
    /// Passes over the training systems
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub epochs: u32,
    /// Systems to train on
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    pub systems: u32,
    /// Systems per step
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub batch: u32,
    /// Features per particle and orientation, and functions in the kernels' bases
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub channels: u32,
    /// Blocks
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub layers: u32,
    /// Orientations: 12 is an icosahedron, 6 an octahedron, others Fibonacci lattices
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(2..=1024))]
    pub orientations: u32,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-3)]
    pub lr: f32,
    /// The precision of training
    #[command(flatten)]
    pub scope: terminal::Scope,
    /// Seed of data, weights and batches
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Leave out the network on distances alone
    #[arg(long)]
    pub oriented_only: bool,
    /// Continue from the checkpoints in --out
    #[arg(long)]
    pub resume: bool,
    /// Folder for data, checkpoints and pictures
    #[arg(long, default_value = "out/nbody")]
    pub out: PathBuf,
}

fn body(args: &Args) -> Result<()> {
    if args.batch > args.systems {
        let message = format!("--batch {} is more than --systems {}", args.batch, args.systems);
        return Err(Error::config(message));
    }
    let gpu = Gpu::open()?;
    println!("adapter    {}", gpu.adapter());
    state::folder(&args.out)?;
    let data = data::load(&args.out.join("data.safetensors"), args.systems as usize, args.seed)?;
    let (still, straight) = (data.test.error_along(0.0), data.test.error_along(1.0));
    let slope = data.train.best_slope();
    let linear = data.test.error_along(slope);
    println!("no motion  test MSE {still:.4}");
    println!("x + v      test MSE {straight:.4}");
    println!("x + a v    test MSE {linear:.4}, a = {slope:.3} from the training systems");

    let stop = terminal::interruptible()?;
    let mut curves = Vec::new();
    for name in if args.oriented_only { &["oriented"][..] } else { &["oriented", "distances"] } {
        let mut rng = Rng::new(args.seed);
        let net = net::Net::new(&gpu, name, &config(args), grid(args.orientations as usize), &mut rng)?;
        let mut run = train::Run::new(args, &gpu, name, net, &data, &stop)?;
        if !run.train()? {
            println!("stopped    go on with --resume and the same arguments");
            return Ok(());
        }
        let report = run.test()?;
        println!("{report}");
        if *name == "oriented" {
            picture::trajectories(&args.out.join("trajectories.svg"), &data.test, &run.predict(&data.test)?)?;
            run.net.save(&args.out.join("model.safetensors"))?;
        }
        curves.push((*name, run.curve.clone(), report.mse));
    }
    println!("published  EGNN 0.0070 and PONITA 0.0043 on the set of the same statistics (not run here)");
    picture::curves(&args.out.join("curve.svg"), &curves, linear, gpu.adapter())?;
    println!("pictures   {}", args.out.join("{trajectories,curve}.svg").display());
    Ok(())
}

fn config(args: &Args) -> PonitaConfig {
    let channels = args.channels as usize;
    PonitaConfig::default()
        .channels(channels)
        .hidden(channels)
        .basis(channels)
        .layers(args.layers as usize)
        .pool(false)
}

fn grid(orientations: usize) -> Grid {
    match orientations {
        12 => Grid::icosahedron(),
        6 => Grid::octahedron(),
        n => Grid::fibonacci(n),
    }
}

fn main() -> ExitCode {
    terminal::main(|| body(&Args::parse()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Both networks learn in every precision, each of which rounds in its own way, and a checkpoint has the loss scale.
    #[test]
    fn every_precision_learns() {
        let gpu = Gpu::open().expect("an adapter");
        let data = data::Data::few(24);
        for name in ["oriented", "distances"] {
            let curve = |precision: &str| {
                let out = tempfile::tempdir().expect("a folder");
                let options =
                    ["--epochs", "6", "--batch", "6", "--channels", "8", "--layers", "1", "--lr", "0.01"];
                let more = ["--precision", precision, "--out", out.path().to_str().expect("a name")];
                let parse = |last: &[&'static str]| {
                    let all = ["nbody"].iter().chain(&options).chain(&more).chain(last);
                    Args::try_parse_from(all).expect("arguments")
                };
                let (args, resume) = (parse(&[]), parse(&["--resume"]));
                let new = |args| {
                    let net = net::Net::new(&gpu, name, &config(args), grid(12), &mut Rng::new(1))?;
                    train::Run::new(args, &gpu, name, net, &data, &Arc::default())
                };
                let mut run = new(&args).expect("a run");
                assert!(run.train().expect("training"));
                let curve = run.curve.clone();
                let scale = run.trainer.loss_scale().expect("one").scale().expect("a scale");
                drop(run);
                let resumed = new(&resume).expect("a run");
                assert_eq!(
                    resumed.trainer.loss_scale().expect("one").scale().expect("a scale"),
                    scale,
                    "{precision}"
                );
                curve.into_iter().map(|[loss, validation, _]| [loss, validation]).collect::<Vec<_>>()
            };
            let want = curve("f32");
            for (precision, got) in [("f32", want.clone()), ("f16", curve("f16")), ("bf16", curve("bf16"))] {
                let (first, last) = (got[0], got[got.len() - 1]);
                assert!(got.iter().flatten().all(|x| x.is_finite()), "{name} in {precision}: {got:?}");
                assert!((0..2).all(|i| last[i] < 0.8 * first[i]), "{name} in {precision}: {got:?}");
                assert_eq!(got == want, precision == "f32", "{name} in {precision}: {got:?}");
            }
        }
    }
}
