//! Trains a byte-level language model that uses one transformer block at every depth, and shows what that saves.
//!
//!     cargo run --release --example charlm -- --out out/demo
//!
//! `--sharing none|tied|tied-lora` chooses what the depths share, and `--precision f32|f16|bf16` how products and activations are
//! stored in training; a step whose gradients overflow is named and changes nothing. Ctrl-C saves a checkpoint, from which `--resume` continues
//! with the same bits as a run that was never stopped.

mod plot;
#[path = "../common/terminal.rs"]
mod terminal;
mod train;

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use tiebeam::language::{Corpus, Data};
use tiebeam::models::lm::LmConfig;
use tiebeam::models::sharing::Sharing;
use tiebeam::{Gpu, Result};

/// The default text: a frozen snapshot of this repository's sources and documentation (`examples/data/README.md`).
const CORPUS: &[u8] = include_bytes!("../data/corpus.txt");

/// What the depths of the model share.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum SharingArg {
    /// Nothing: every depth has its own block.
    None,
    /// One block, used at every depth. Each depth has its own norms.
    Tied,
    /// As tied, with an additional low-rank part for each depth.
    TiedLora,
}

/// Train a small language model with tied layers.
#[derive(Parser, Debug)]
#[command(version)]
pub struct Args {
    /// Text to train on, any bytes; its last tenth is held out [default: this repository's own sources]
    #[arg(long)]
    pub text: Option<PathBuf>,
    /// What the depths share
    #[arg(long, value_enum, default_value = "tied")]
    pub sharing: SharingArg,
    /// How often a block is applied
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub depth: u32,
    /// Width of the residual stream, a multiple of 32 [default: by adapter]
    #[arg(long, value_parser = width)]
    pub width: Option<u32>,
    /// Bytes in a training window [default: by adapter]
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..=4096))]
    pub context: Option<u32>,
    /// Windows per step [default: by adapter]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: Option<u32>,
    /// Training steps [default: by adapter]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub steps: Option<u32>,
    /// Rank of the low-rank parts
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub rank: u32,
    /// Highest learning rate [default: 0.4 / width]
    #[arg(long)]
    pub lr: Option<f32>,
    /// The precision of training
    #[command(flatten)]
    pub scope: terminal::Scope,
    /// Seed of weights, batches and samples
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Continue from the checkpoint in --out
    #[arg(long)]
    pub resume: bool,
    /// Folder for checkpoint, picture and sample
    #[arg(long, default_value = "out/charlm")]
    pub out: PathBuf,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub save_every: u32,
}

fn width(text: &str) -> std::result::Result<u32, String> {
    match text.parse() {
        Ok(n) if n >= 32 && n % 32 == 0 && n <= 8192 => Ok(n),
        _ => Err("must be a multiple of 32 from 32 to 8192".into()),
    }
}

/// The sizes of a run. Those that the user does not set are chosen so that the adapter takes about two minutes.
pub struct Sizes {
    /// The network.
    pub model: LmConfig,
    /// Sequences per step.
    pub batch: usize,
    /// Training steps.
    pub steps: usize,
    /// The highest learning rate.
    pub lr: f32,
}

fn sizes(args: &Args, gpu: &Gpu) -> Sizes {
    let (width, context, batch, steps) =
        if gpu.class().is_cpu() { (96, 64, 12, 350) } else { (256, 128, 32, 2000) };
    let width = args.width.map_or(width, |w| w as usize);
    let sharing = match args.sharing {
        SharingArg::None => Sharing::none(),
        SharingArg::Tied => Sharing::tied(),
        SharingArg::TiedLora => Sharing::tied_lora(args.rank as usize, 1.0),
    };
    let model = LmConfig::small()
        .vocab(256)
        .width(width)
        .heads(width / 32)
        .kv_heads(width / 32)
        .hidden(4 * width)
        .context(args.context.map_or(context, |c| c as usize))
        .depth(args.depth as usize)
        .sharing(sharing);
    Sizes {
        model,
        batch: args.batch.map_or(batch, |b| b as usize),
        steps: args.steps.map_or(steps, |s| s as usize),
        lr: args.lr.unwrap_or(0.4 / width as f32),
    }
}

fn run(args: &Args, started: Instant) -> Result<()> {
    let gpu = Gpu::open()?;
    println!("adapter    {}", gpu.adapter());
    let sizes = sizes(args, &gpu);
    let text = match &args.text {
        Some(path) => Corpus::of_bytes(std::slice::from_ref(path), None)?,
        None => Corpus::new(CORPUS.iter().map(|&byte| u32::from(byte)).collect(), 256)?,
    };
    text.check(&sizes.model)?;
    train::run(args, &sizes, &gpu, &text, started)
}

fn main() -> ExitCode {
    let started = Instant::now();
    terminal::main(|| run(&Args::parse(), started))
}
