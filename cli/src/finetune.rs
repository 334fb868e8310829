//! `tiebeam finetune`: trains an adapter on the frozen weights of a language model.

use crate::context::{Context, on_interrupt, unless_stopped};
use crate::run::beside;
use crate::run::source::Source;
use crate::train::{self, How};
use serde_json::json;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use tiebeam::language::{Data, Examples, Training};
use tiebeam::models::adapter::{Adapter, AdapterConfig, AdapterKind};
use tiebeam::models::llama::Form;
use tiebeam::models::lm::Lm;
use tiebeam::optim::Exchange;
use tiebeam::ranks::Alone;
use tiebeam::share::ShardConfig;
use tiebeam::text::Words;
use tiebeam::{Error, Precision, Result, Rng, files};

const EXAMPLES: &str = "\
Examples:
  tiebeam finetune model.gguf --adapter lora --data questions.jsonl --out out/lora
  tiebeam finetune folder --adapter mos --rank 4 --budget 1 --data questions.jsonl --out out/mos
  tiebeam run model.gguf --adapter out/lora --prompt 'What is the capital of France?'

A line of --data is one of
  {\"prompt\": \"..\", \"completion\": \"..\"}
  {\"instruction\": \"..\", \"input\": \"..\", \"output\": \"..\"}
  {\"messages\": [{\"role\": \"user\", \"content\": \"..\"}, {\"role\": \"assistant\", \"content\": \"..\"}]}
  {\"text\": \"..\"}
Answers are learned, prompts are not; of messages the last one is the answer. The folder has the files of PEFT, which PEFT opens, except for mos, which it does not have.";

/// Train a small adapter on the frozen weights of a language model, packed ones too
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A GGUF file, a folder of Hugging Face's libraries, or one of `tiebeam train` or `convert`
    model: PathBuf,
    /// lora (low-rank parts), mos (low-rank parts of shared shards), miss (repeated shards) or bone (blocks)
    #[arg(long, value_name = "KIND", value_parser = ["lora", "mos", "miss", "bone"])]
    adapter: String,
    /// Questions and answers, a line of JSON each
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// Examples to measure on [default: the last tenth of --data]
    #[arg(long, value_name = "FILE.jsonl")]
    validation: Option<PathBuf>,
    /// Folder for the adapter
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Rank: of low-rank parts, of shards, or the side of blocks
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=65536))]
    rank: u32,
    /// Factor of low-rank parts, which is divided by the rank [default: twice the rank; mos: 16]
    #[arg(long)]
    alpha: Option<f32>,
    /// mos: rank of the LoRA with as many numbers
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    budget: u32,
    /// mos: shards of which a vector consists
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    shards: u32,
    /// mos: vectors of each block that are its own, out of the budget
    #[arg(long, default_value_t = 0)]
    private: u32,
    /// Layers that get a part, at every depth
    #[arg(long, value_delimiter = ',', default_value = "q,k,v,o,gate,up,down")]
    targets: Vec<String>,
    /// Epochs over the examples
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Steps, instead of epochs
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Examples of a step
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65536))]
    batch: u32,
    /// Cut the examples of a step into so many parts, one after the other, whose gradients are added up: less memory
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    accumulate: u32,
    /// Highest learning rate
    #[arg(long, default_value_t = 2e-4)]
    lr: f32,
    /// Most tokens of an example, if the model has as many
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(32..))]
    context: u32,
    /// Prompts and answers as they are, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Products and activations in f32, or in f16 or bf16 with f32 sums
    #[arg(long, default_value_t = Precision::F32)]
    precision: Precision,
    /// Start of the random numbers: the adapter, and the order of examples
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Steps between points of the curve, at which a checkpoint is written [default: a tenth]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    every: Option<u64>,
    /// Go on from the checkpoint in --out
    #[arg(long)]
    resume: bool,
}

impl Args {
    fn config(&self, linears: &[&str]) -> Result<AdapterConfig> {
        let rank = self.rank as usize;
        let mos = self.adapter == "mos";
        if !mos && (self.budget, self.shards, self.private) != (1, 1, 0) {
            return Err(Error::config("--budget, --shards and --private are for --adapter mos"));
        }
        if self.alpha.is_some() && matches!(&self.adapter[..], "miss" | "bone") {
            return Err(Error::config("--alpha is for --adapter lora and mos; the others have no factor"));
        }
        let kind = match &self.adapter[..] {
            "mos" => {
                let config = ShardConfig::new(rank, self.budget as usize).shards(self.shards as usize);
                let config = config.private(self.private as usize);
                AdapterKind::Mos(self.alpha.map_or(config, |alpha| config.alpha(alpha)))
            }
            "miss" => AdapterKind::Miss { rank },
            "bone" => AdapterKind::Bone { rank },
            _ => AdapterKind::Lora { rank, alpha: self.alpha.unwrap_or(2.0 * rank as f32), rslora: false },
        };
        // A plain MLP has no gate.
        let targets: Vec<&str> = self.targets.iter().map(String::as_str).collect();
        let targets: Vec<&str> =
            targets.into_iter().filter(|name| *name != "gate" || linears.contains(name)).collect();
        AdapterConfig::new(kind, &targets)
    }
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let source = Source::open(&args.model, context)?;
    let words = Words::open(&beside(&args.model))?;
    let linears: Vec<&str> = source.config().linears().iter().map(|(name, _)| *name).collect();
    let config = args.config(&linears)?;
    let learned = source.config().has_learned_positions();
    let most =
        if learned { source.config().context } else { source.config().context.min(args.context as usize) };
    let form = (most, args.raw, args.seed);
    let examples = Examples::of_jsonl(&words, &args.data, args.validation.as_deref(), form)?;
    let [train, held_out] = examples.counts();
    context.note(format_args!(
        "{train} examples to train on, {held_out} held out; {} cut at {most} tokens",
        examples.cut()
    ));
    let checkpoint = train::fresh(&args.out, args.resume)?;
    let (gpu, stop) = (context.open()?, on_interrupt()?);
    let base = source.base(&args.model)?;
    let model = source.load(&gpu, (most, Form::Stored), context, &stop)?;
    let adapter = Adapter::new(&model, config, &mut Rng::new(args.seed))?;
    let tuned = adapter.apply(&model)?;
    let own: usize = tiebeam::nn::Module::parameters(&adapter).stored();
    context.note(format_args!(
        "{}: {own} numbers in the adapter, {:.3}% of the model's {}",
        args.adapter,
        100.0 * own as f64 / tuned.counts()[1] as f64,
        tuned.counts()[1]
    ));
    let steps =
        args.steps.unwrap_or_else(|| (train as u64 * u64::from(args.epochs)).div_ceil(args.batch.into()));
    let how = How {
        steps,
        batch: args.batch,
        accumulate: args.accumulate,
        exchange: Exchange::Gradients,
        lr: Some(args.lr),
        warmup: None,
        weight_decay: Some(0.0),
        precision: args.precision,
        seed: args.seed,
        every: args.every.unwrap_or(steps.div_ceil(10)),
    };
    train::made(&args.out)?;
    let before = measured(context, &examples, &tuned, &stop)?;
    context.result(format_args!("before: held out {before:.4} nats an answer's token"));
    let mut training = Training::new(&tuned, &examples, how.options(tuned.config.width)?)?
        .stop(stop)
        .say("adapter", format_args!("{:?}", adapter.config()))
        .say("base", format_args!("{:032x}", base.fingerprint));
    if args.resume {
        training.resume(&checkpoint)?;
        context.note(format_args!("goes on after step {}", training.step()));
    }
    if !train::watched(context, &mut training, Some(&checkpoint), &mut |_| Ok(()))? {
        let step = training.step();
        return Err(Error::stopped(format!(
            "stopped after step {step}; the same command with --resume goes on"
        )));
    }
    let after = training.curve().last().map_or(f64::NAN, |point| point.validation);
    adapter.save(&args.out, &model, &base)?;
    train::keep_curve(&args.out, &training, &gpu)?;
    let bytes = std::fs::metadata(args.out.join("adapter_model.safetensors")).map_or(0, |file| file.len());
    context.result(format_args!(
        "{}: held out {before:.4} before, {after:.4} after {steps} steps; {own} numbers, {}",
        args.adapter,
        files::size(bytes)
    ));
    context.record(&json!({
        "line": "finetuned", "adapter": args.adapter, "rank": args.rank, "budget": args.budget, "numbers": own,
        "before": before, "after": after, "steps": steps, "batch": args.batch, "lr": args.lr, "seed": args.seed,
        "examples": train, "held_out": held_out, "seconds": training.curve().last().map(|point| point.seconds),
        "model": base.name, "adapter_name": gpu.adapter().name, "driver": gpu.adapter().driver,
    }))?;
    context.note(format_args!(
        "wrote {}; `tiebeam run {} --adapter {}` uses it",
        args.out.display(),
        args.model.display(),
        args.out.display()
    ));
    Ok(())
}

fn measured(context: &Context, examples: &Examples, model: &Lm, stop: &AtomicBool) -> Result<f64> {
    let bar = context.bar(None, "{spinner} measuring {pos} held-out examples, {elapsed}");
    let found = examples.measure(model, usize::MAX, &Alone, &mut |done, _| {
        bar.set_position(done as u64);
        unless_stopped(stop, "no step was done")
    });
    bar.finish_and_clear();
    found
}
