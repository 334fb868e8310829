//! `tiebeam extract`.

use crate::context::{Context, on_interrupt, unless_stopped};
use clap::Parser;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tiebeam::merge::Weights;
use tiebeam::merge::extract::{Extracted, extract};
use tiebeam::models::adapter::{Pair, SETTINGS, WEIGHTS, write_lora};
use tiebeam::{Error, Result, files};

const EXAMPLES: &str = "\
Examples:
  tiebeam extract models/base models/tuned --rank 16 --out out/lora
  tiebeam extract models/base models/tuned --rank 64 --only self_attn --out out/lora
  tiebeam run models/base --adapter out/lora --prompt 'Once upon a time'";

/// Extract a LoRA adapter from a fine-tuned model: the best low-rank approximation of each matrix's change
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// The model that was fine-tuned
    base: PathBuf,
    /// What it became, of the same shape
    model: PathBuf,
    /// Rank of the adapter
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    rank: u32,
    /// Take only matrices whose name contains this; may be given several times [default: all but embeddings and the head]
    #[arg(long)]
    only: Vec<String>,
    /// The folder to write, with adapter_config.json and adapter_model.safetensors as PEFT has them
    #[arg(long)]
    out: PathBuf,
}

/// Tables of token vectors and heads, whose changes PEFT keeps whole.
const TABLES: [&str; 6] = ["embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out"];

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let chosen = |name: &str| match args.only.is_empty() {
        true => !TABLES.iter().any(|table| name.contains(table)),
        false => args.only.iter().any(|part| name.contains(part)),
    };
    // PEFT has other factors for tables of token vectors, and leaves these ones out.
    if let Some(part) =
        args.only.iter().find(|part| TABLES.iter().any(|t| *t != "lm_head" && part.contains(t)))
    {
        return Err(Error::config(format!(
            "--only {part}: an adapter of LoRA does not hold tables of token vectors"
        )));
    }
    files::check_folder(&args.out, [SETTINGS, WEIGHTS])?;
    let gpu = context.open()?;
    let [base, model] = [context.shards(&args.base)?, context.shards(&args.model)?];
    let stop = on_interrupt()?;
    let start = Instant::now();
    let bar = context.bar(Some(0), "{bar:30} {pos}/{len} matrices, {elapsed} so far, about {eta} to go");
    let found = extract(&gpu, &base, &model, &chosen, args.rank as usize, &mut |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        unless_stopped(&stop, "nothing was written")
    })?;
    bar.finish_and_clear();
    if found.is_empty() {
        return Err(Error::config("no matrix that is taken differs between the models"));
    }
    let left = left_out(&gpu, &base, &model, &found)?;
    if args.only.is_empty() && !left.is_empty() {
        let (first, more) = (&left[0], left.len() - 1);
        context.note(format_args!(
            "`{first}` and {more} more differ too, and an adapter of LoRA does not hold them"
        ));
    }
    let name = args.base.file_name().map_or_else(String::new, |name| name.to_string_lossy().into());
    let pairs: Vec<Pair> = found.iter().map(|one| one.pair.clone()).collect();
    files::replace_folder(&args.out, |folder| {
        write_lora(folder, &pairs, args.rank as usize, (&name, Some(base.fingerprint()?)))
    })?;
    show(args, &found, start.elapsed().as_secs_f64(), context)
}

/// Names of other tensors that differ.
fn left_out(
    gpu: &tiebeam::Gpu,
    base: &dyn Weights,
    model: &tiebeam::merge::Shards,
    found: &[Extracted],
) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for name in model.names() {
        let is_float = format!("{}", model.dtype(&name)?).contains('F');
        if !is_float
            || found.iter().any(|one| one.pair.0 == name)
            || base.shape(&name)? != model.shape(&name)?
        {
            continue;
        }
        let change = model.read(gpu, &name)?.sub(&base.read(gpu, &name)?).square().sum_all();
        if change.item()? != 0.0 {
            left.push(name);
        }
    }
    Ok(left)
}

fn show(args: &Args, found: &[Extracted], seconds: f64, context: &Context) -> Result<()> {
    let (kept, all) =
        found.iter().fold((0.0, 0.0), |(kept, all), one| (kept + one.kept * one.length, all + one.length));
    let worst = found.iter().min_by(|a, b| a.kept.total_cmp(&b.kept));
    context.result(format_args!(
        "{} matrices at rank {}: {:.2}% of the change's squared length, in {seconds:.1} s: {}",
        found.len(),
        args.rank,
        100.0 * kept / all,
        args.out.display()
    ));
    if let Some(worst) = worst {
        context.note(format_args!("least is kept of {}: {:.2}%", worst.pair.0, 100.0 * worst.kept));
    }
    for one in found {
        context.record(
            &json!({"line": "matrix", "name": one.pair.0, "kept": one.kept, "squared_length": one.length}),
        )?;
    }
    context.record(&json!({
        "line": "extracted", "rank": args.rank, "matrices": found.len(), "kept": kept / all, "seconds": seconds,
        "out": args.out,
    }))?;
    context.whole();
    Ok(())
}
