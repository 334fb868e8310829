//! Measures the perplexity of a language model, and shows what sharing its weights costs. `tiebeam run` generates text with one.
//!
//!     cargo run --release --example smollm -- --model FILE --text TEXT
//!     cargo run --release --example smollm -- --model FILE --text TEXT --convert recursive:15 --lora 64

mod convert;
#[path = "../common/terminal.rs"]
mod terminal;

use clap::Parser;
use convert::Conversion;
use indicatif::ProgressBar;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use tiebeam::decode::{Windows, perplexity};
use tiebeam::models::llama::{Form, Llama, Published};
use tiebeam::nn::{Parameters, distillation};
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::text::Words;
use tiebeam::train::Trainer;
use tiebeam::{Error, Gpu, Result, Rng, Tensor, files, no_grad};

/// Measure a language model, and convert it to shared weights.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// GGUF file (scripts/fetch-smollm.sh obtains one), or a folder with config.json, a tokenizer and safetensors
    #[arg(long)]
    model: PathBuf,
    /// Text whose output error is measured after a conversion
    #[arg(long, default_value = "The capital of France is")]
    prompt: String,
    /// Text to measure perplexity on, and to train on after a conversion
    #[arg(long)]
    text: Option<PathBuf>,
    /// Windows of 256 tokens (or of the model's context, if that is shorter) at the end of the text, on which perplexity is measured
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    windows: u32,
    /// recursive:B (B blocks in turn), masa:S (S atoms for q, k, v and o each) or fold:G (groups of G neighbours)
    #[arg(long)]
    convert: Option<Conversion>,
    /// Rank of a low-rank part per layer in recursive and masa conversions (in masa, half of it for k and v)
    #[arg(long, default_value_t = 0)]
    lora: usize,
    /// Groups of neighbouring blocks, each with its own dictionaries, divided where the model's output drifts most
    #[arg(long, default_value_t = 1)]
    groups: usize,
    /// Steps of training after the conversion, on the text before its last windows
    #[arg(long, default_value_t = 0)]
    steps: u32,
    /// Train towards the original model's scores instead of the text's next tokens
    #[arg(long)]
    distill: bool,
    /// Append a line of results to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Learning rate of the training after the conversion
    #[arg(long, default_value_t = 1e-4)]
    lr: f32,
}

/// Tokens of a window, if the model's context is not shorter.
const WINDOW: usize = 256;
/// Most tokens of a sequence: those of a prompt.
const CONTEXT: usize = 1024;
/// Number of windows, from the start of the text, that dictionaries are fitted to.
const SAMPLE: usize = 8;

fn bar(count: u64) -> ProgressBar {
    terminal::bar("{bar:24} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go", 0, count)
}

/// Reads the text, whose last windows are measured.
fn read(path: &Path, words: &Words, windows: usize, context: usize) -> Result<Windows> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    Windows::of_text(words, &text, windows, WINDOW.min(context))
        .map_err(|e| Error::io(path, std::io::Error::other(e.to_string())))
}

/// A window's tokens and the token behind each.
fn pair(gpu: &Gpu, window: &[u32]) -> [Tensor; 2] {
    let length = window.len() - 1;
    [0, 1].map(|from| Tensor::from_slice(gpu, &window[from..from + length], [1, length]))
}

/// Measures the model on the windows behind a bar.
fn measured(model: &Llama, text: &Windows, what: &str) -> Result<f64> {
    let bar = bar(text.count() as u64);
    bar.set_message(format!("perplexity {what}"));
    let found = perplexity(model, text, |_| bar.inc(1));
    bar.finish_and_clear();
    found
}

/// Trains on random windows of the text, towards its next tokens or the scores of `teacher`.
fn uptrain(gpu: &Gpu, model: &Llama, teacher: Option<&Llama>, text: &Windows, args: &Args) -> Result<()> {
    let length = text.length();
    if text.before().len() <= length {
        return Err(Error::config("the text has nothing to train on before its last windows"));
    }
    let group = Group::new(Parameters::of(model).trainable());
    let optimizer = AdamW::new(gpu, vec![group], AdamWConfig::default().lr(args.lr).clip(Some(1.0)))?;
    let bar = bar(args.steps as u64);
    let loss = |_, rng: &mut Rng| {
        let start = rng.below(text.before().len() - length);
        let [x, y] = pair(gpu, &text.before()[start..start + length + 1]);
        Ok(match teacher {
            Some(teacher) => {
                let goal = no_grad(|| teacher.forward(&x));
                distillation(&model.forward(&x), &goal, 1.0)
            }
            None => model.loss(&x, &y),
        })
    };
    Trainer::new(optimizer).rng(Rng::new(1)).train(args.steps.into(), loss, |report| {
        bar.set_message(format!("training, loss {:.3}", report.loss));
        bar.set_position(report.step);
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(())
}

/// Measured effects of a conversion.
#[derive(Default)]
struct Measured {
    stored: f64,
    output_error: f64,
    before: Option<f64>,
    after: Option<f64>,
    trained: Option<f64>,
}

impl Measured {
    fn record(&self, gpu: &Gpu, args: &Args, conversion: &Conversion) -> Result<()> {
        let Some(path) = &args.json else { return Ok(()) };
        let line = json!({"conversion": conversion.to_string(), "lora": args.lora, "groups": args.groups,
            "stored_share": self.stored, "output_error": self.output_error, "perplexity_before": self.before,
            "perplexity_after": self.after, "perplexity_trained": self.trained, "steps": args.steps,
            "distilled": args.distill, "windows": args.windows, "lr": args.lr, "prompt": args.prompt,
            "model": args.model.file_name().map(|n| n.to_string_lossy()), "adapter": gpu.adapter().name,
            "driver": gpu.adapter().driver, "version": env!("CARGO_PKG_VERSION")});
        files::append(path, format!("{line}\n"))
    }
}

/// Shares the model's weights and prints what that costs and saves.
fn converted(
    gpu: &Gpu,
    model: &Llama,
    words: &Words,
    text: Option<&Windows>,
    args: &Args,
    conversion: &Conversion,
) -> Result<()> {
    let stored = Parameters::of(model).stored();
    // The conversion shares leaves with its model. A copy is converted if the model is the teacher, which must not change.
    let copy = args.distill.then(|| model.copied());
    let prompt = words.encode(&args.prompt)?;
    if prompt.is_empty() {
        return Err(Error::config("--prompt is empty; give at least one word"));
    }
    let sample = match text {
        Some(text) if text.before().len() >= SAMPLE * text.length() => {
            let tokens = &text.before()[..SAMPLE * text.length()];
            Tensor::from_slice(gpu, tokens, [SAMPLE, text.length()])
        }
        _ => Tensor::from_slice(gpu, &prompt, [1, prompt.len()]),
    };
    let new = conversion.apply(copy.as_ref().unwrap_or(model), args.lora, args.groups, &sample)?;
    let now = Parameters::of(&new).stored();
    let mut found = Measured { stored: now as f64 / stored as f64, ..Measured::default() };
    println!(
        "{conversion}: {} of {} MiB stored in f32 ({:.1}%)",
        now >> 18,
        stored >> 18,
        100.0 * found.stored
    );
    found.output_error = convert::output_error(gpu, model, &new, &prompt)?;
    println!("output error {:.3}: of the hidden states, relative", found.output_error);
    if let Some(text) = text {
        let (before, after) = (measured(model, text, "before")?, measured(&new, text, "after")?);
        println!("perplexity {before:.2} before, {after:.2} after");
        (found.before, found.after) = (Some(before), Some(after));
        if args.steps > 0 {
            uptrain(gpu, &new, args.distill.then_some(model), text, args)?;
            let trained = measured(&new, text, "trained")?;
            println!("perplexity {trained:.2} after {} steps of training", args.steps);
            found.trained = Some(trained);
        }
    }
    found.record(gpu, args, conversion)
}

fn run(args: &Args) -> Result<()> {
    if args.convert.is_none() && args.text.is_none() {
        return Err(Error::config(
            "give --text to measure perplexity, or --convert; `tiebeam run` generates text",
        ));
    }
    let (file, words) = (Published::open(&args.model)?, Words::open(&args.model)?);
    let text = args
        .text
        .as_deref()
        .map(|path| read(path, &words, args.windows as usize, file.config().context))
        .transpose()?;
    let gpu = Gpu::open()?;
    println!("{}", gpu.adapter());
    let started = Instant::now();
    // Only what is trained or converted has to be leaves.
    let form = if args.convert.is_some() { Form::F32 } else { Form::Stored };
    let model = file.load(&gpu, CONTEXT, form)?;
    gpu.synchronize()?;
    println!(
        "{} parameters, {} in the file, read in {:.1} s",
        file.check()?,
        files::size(file.bytes()? as u64),
        started.elapsed().as_secs_f64()
    );
    if let Some(conversion) = &args.convert {
        return converted(&gpu, &model, &words, text.as_ref(), args, conversion);
    }
    if let Some(text) = &text {
        let found = measured(&model, text, "")?;
        println!("perplexity {found:.2} on {} windows of {} tokens", text.count(), text.length());
    }
    Ok(())
}

fn main() -> ExitCode {
    terminal::main(|| run(&Args::parse()))
}
