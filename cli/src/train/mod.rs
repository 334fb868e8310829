//! `tiebeam train`: trains a language model on text, or a network on labelled rows.

mod network;

use crate::context::{Context, on_interrupt_of};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tiebeam::chart::{self, Frame, Line};
use tiebeam::decode::{Sampler, SamplerOptions};
use tiebeam::language::{Corpus, Point, Progress, Training, TrainingOptions};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::nn::Module;
use tiebeam::optim::Exchange;
use tiebeam::ranks::on_first;
use tiebeam::text::Words;
use tiebeam::{Error, Gpu, Precision, Result, Rng, files};

const EXAMPLES: &str = "\
Examples:
  tiebeam train --model lm.toml --text book.txt --out out/lm
  tiebeam train --model lm.toml --text a.txt b.txt --tokenizer folder --out out/lm --precision f16
  tiebeam train --model lm.toml --text book.txt --out out/lm --resume
  tiebeam run out/lm --prompt 'In the beginning' --raw
  tiebeam train --model digits.toml --data digits.safetensors --out out/digits --exchange scalars:8

The file of --model has one setting in a line; only width, heads, depth and context must be there:
  width = 128             # of the residual stream
  heads = 4               # kv_heads = 2 shares keys between queries
  depth = 6               # how many blocks are applied
  context = 64            # tokens of a window
  sharing = \"cycle 2 rank 8\"
  # none, tied, tied-lora rank R scale S, cycle B rank R, fold G, stages N N .., dictionary S output true [net], low-rank R, hashed F,
  # or by matrix: \"q k v o: dictionary 2 output true; up down: tied; none\"
  # ends = [1, 1]         # first and last blocks that share nothing
  # positions = \"rotary\"  # learned, none; norm = \"rms\" or \"layer\"; mlp = \"swiglu\" or \"gelu\"
  # experts = \"8 top 2 capacity 1.25 balance 0.01\"; shared_norms = true; hidden = 512; tied_head = true";

/// Train a language model on text, with any sharing of weights between its depths, or a network on labelled rows
///
/// With --data, trains a multilayer perceptron, whose settings are its `layers`, and writes model, curve and checkpoint. With --text,
/// writes a folder that `tiebeam run` opens: the model, its tokenizer, the curve as picture and JSON lines, samples, and a checkpoint
/// from which --resume goes on with the same bits.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Settings of the model (TOML)
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Text to train on; several files are read one behind the other
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "data", conflicts_with = "data")]
    text: Vec<PathBuf>,
    /// Labelled rows to train a network on: safetensors with inputs [rows, ..] and labels [rows]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["precision", "validation", "tokenizer", "sample"])]
    data: Option<PathBuf>,
    /// Name of the inputs in --data; integers are divided by the largest
    #[arg(long, default_value = "x", requires = "data")]
    inputs: String,
    /// Name of the labels in --data
    #[arg(long, default_value = "y", requires = "data")]
    labels: String,
    /// The last rows of --data, to measure on [default: a fifth]
    #[arg(long, value_name = "ROWS", requires = "data")]
    held_out: Option<u32>,
    /// Text to measure on [default: the last tenth of --text]
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// A folder or GGUF file whose tokenizer cuts the text [default: each byte is a token]
    #[arg(long, value_name = "MODEL")]
    tokenizer: Option<PathBuf>,
    /// Folder for the model and everything about its training
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Go on from the checkpoint in --out
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    how: How,
    /// Begin a sample at each point of the curve with this text
    #[arg(long, default_value = "\n")]
    sample: String,
}

/// Options of every training.
#[derive(clap::Args)]
#[command(next_help_heading = "Training")]
pub struct How {
    /// Steps
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Windows of a step, or rows of --data; on several ranks, of all together
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub batch: u32,
    /// Cut a rank's windows of a step into so many parts, one after the other, whose gradients are added up: less memory
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub accumulate: u32,
    /// Highest learning rate [default: 0.256 / width; with --data 0.01; with scalars 50 / parameters, at most 0.1]
    #[arg(long)]
    pub lr: Option<f32>,
    /// Steps until it is reached [default: a tenth]
    #[arg(long)]
    pub warmup: Option<u64>,
    /// Weight decay of matrices; scalars have none [default: 0.1]
    #[arg(long)]
    pub weight_decay: Option<f32>,
    /// Products and activations in f32, or in f16 or bf16 with f32 sums, weights and optimizer; not with --data
    #[arg(long, default_value_t = Precision::F32)]
    pub precision: Precision,
    /// What ranks tell each other in a step: gradients; or scalars, the slopes of the loss along random directions, which need no backward
    /// pass, in four bytes or, as scalars:8, in one
    #[arg(long, default_value_t = Exchange::Gradients)]
    pub exchange: Exchange,
    /// Start of the random numbers: weights, and the order of the text
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Steps between points of the curve, at which a checkpoint is written
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    pub every: u64,
}

impl How {
    /// The weight decay of matrices.
    fn decay(&self) -> Result<f32> {
        match (self.exchange, self.weight_decay) {
            (Exchange::Gradients, given) => Ok(given.unwrap_or(0.1)),
            (_, None | Some(0.0)) => Ok(0.0),
            (exchange, Some(_)) => Err(Error::config(format!(
                "--weight-decay: with --exchange {exchange} there is none; leave it out"
            ))),
        }
    }

    /// The options for a model of this width.
    ///
    /// # Errors
    /// For a weight decay that the exchange does not have.
    pub fn options(&self, width: usize) -> Result<TrainingOptions> {
        let options = TrainingOptions::default()
            .steps(self.steps)
            .batch(self.batch as usize)
            .accumulate(self.accumulate as usize)
            // 0.002 at width 128, where it was found to do for all kinds of sharing.
            .lr(self.lr.unwrap_or(0.256 / width as f32))
            .warmup(self.warmup.unwrap_or(self.steps.div_ceil(10)))
            .weight_decay(self.decay()?)
            .precision(self.precision)
            .exchange(self.exchange)
            .seed(self.seed)
            .every(self.every);
        Ok(options)
    }
}

/// Reads settings of TOML as words.
fn settings(path: &Path, context: &Context) -> Result<BTreeMap<String, String>> {
    let wrong = |message: String| Error::format(path, message);
    let table: toml::Table =
        context.read(path)?.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
    let word = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(n) => Some(n.to_string()),
        toml::Value::Float(x) => Some(x.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        _ => None,
    };
    let words = |(name, value): (&String, &toml::Value)| {
        let text = match value {
            toml::Value::Array(list) => {
                list.iter().map(word).collect::<Option<Vec<_>>>().map(|all| all.join(" "))
            }
            one => word(one),
        };
        let text =
            text.ok_or_else(|| wrong(format!("`{name}` is neither a word, a number nor a list of these")))?;
        Ok((name.clone(), text))
    };
    table.iter().map(words).collect()
}

/// The corpus and its tokenizer; `None` stands for bytes.
pub fn corpus(
    text: &[PathBuf],
    validation: Option<&Path>,
    tokenizer: Option<&Path>,
) -> Result<(Corpus, Option<Words>)> {
    match tokenizer {
        None => Ok((Corpus::of_bytes(text, validation)?, None)),
        Some(path) => {
            let words = Words::open(path)?;
            Ok((Corpus::of_text(&words, text, validation)?, Some(words)))
        }
    }
}

/// What a training needs before its model.
struct Ready {
    corpus: Corpus,
    words: Words,
    config: LmConfig,
    checkpoint: PathBuf,
}

impl Ready {
    /// Everything that needs no device is read first, so that what is wrong is said at once.
    fn read(args: &Args, context: &Context) -> Result<Ready> {
        let mut settings = settings(&args.model, context)?;
        let (corpus, words) = corpus(&args.text, args.validation.as_deref(), args.tokenizer.as_deref())?;
        let words = words.map_or_else(Words::of_bytes, Ok)?;
        settings.entry("vocab".into()).or_insert_with(|| corpus.vocab().to_string());
        let config = LmConfig::from_settings(&settings, &args.model.display().to_string())?;
        // The folder is rank 0's, and need not be there for the others.
        let checkpoint = match context.is_first() {
            true => fresh(&args.out, args.resume)?,
            false => args.out.join(CHECKPOINT),
        };
        Ok(Ready { corpus, words, config, checkpoint })
    }
}

impl Args {
    /// Whether it trains a network on rows, and no language model.
    pub fn has_data(&self) -> bool {
        self.data.is_some()
    }
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    match args.data {
        Some(_) => network::run(args, context),
        None => language(args, context),
    }
}

/// Says that all ranks have ended with the same parameters.
fn all_the_same(context: &Context, digest: u128) -> String {
    match context.ranks.size() {
        1 => format!("parameters {digest:032x}"),
        size => format!("parameters {digest:032x} on all {size} ranks"),
    }
}

fn language(args: &Args, context: &Context) -> Result<()> {
    let Ready { corpus, words, config, checkpoint } = context.all_done(Ready::read(args, context))?;
    let opened = context.open().and_then(|gpu| {
        let model = Lm::try_new(&gpu, config, &mut Rng::new(args.how.seed))?;
        let options = args.how.options(model.config.width)?;
        Ok((gpu, model, options))
    });
    let (gpu, model, mut options) = context.all_done(opened)?;
    if args.how.exchange != Exchange::Gradients && args.how.lr.is_none() {
        let count = model.parameters().trainable().iter().map(|(_, leaf)| leaf.count()).sum();
        options = options.lr(network::scalar_rate(count));
    }
    describe(context, &gpu, &model, &corpus);
    let stop = on_interrupt_of(context, &checkpoint)?;
    let training = Training::new(&model, &corpus, options);
    let mut training = context.all_done(training.and_then(|t| t.ranks(context.ranks.clone())))?.stop(stop);
    training.agree()?;
    if args.resume {
        training.resume(&checkpoint)?;
        context.note(format_args!("goes on after step {}", training.step()));
    }
    // Nothing was written before everything had been checked. A run that ends before its first checkpoint leaves an empty folder, in which
    // the same command begins again.
    on_first(&*context.ranks, || made(&args.out))?;
    if !context.is_first() {
        let done = watched(context, &mut training, Some(&checkpoint), &mut |_| Ok(()))?;
        if done {
            training.digest()?;
        }
        return if done { Ok(()) } else { Err(stopped(args, context, &training)) };
    }
    let mut samples = Samples { words: &words, prompt: &args.sample, model: &model, seed: args.how.seed };
    let keep_words = || match args.out.join("tokenizer.json").is_file() {
        true => Ok(()),
        false => words.save(&args.out),
    };
    let done = watched(context, &mut training, Some(&checkpoint), &mut |point| {
        keep_words()?;
        let text = samples.next(point)?;
        let path = args.out.join("samples.txt");
        files::append(&path, format!("--- step {}\n{text}\n", point.step))
    })?;
    keep_words()?;
    if !done {
        return Err(stopped(args, context, &training));
    }
    let kept = args.out.join("model.safetensors");
    model.save_with(&kept, &how_trained(&training))?;
    let digest = training.digest()?;
    report(context, args, &training, (&corpus, digest), &gpu)?;
    context.note(format_args!(
        "wrote {}; `tiebeam run {} --raw --prompt ..` continues texts",
        kept.display(),
        args.out.display()
    ));
    Ok(())
}

/// All ranks stop after the same step.
fn stopped(args: &Args, context: &Context, training: &Training) -> Error {
    context.ranks.all_failed();
    let (step, out) = (training.step(), args.out.display());
    Error::stopped(format!("stopped after step {step}; the same command with --resume goes on in {out}"))
}

/// The name of the checkpoint in the folder of a training.
pub const CHECKPOINT: &str = "checkpoint.safetensors";
/// The name of the checkpoint of gates.
pub const GATES: &str = "gates.safetensors";

/// Files of models, adapters and trainings, which a new one must not be mixed with. The first that is there is told, so that a checkpoint
/// stands before what else its training writes.
const FOREIGN: [&str; 8] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "adapter_config.json",
    CHECKPOINT,
    GATES,
    "tokenizer.json",
    "tokenizer.model",
];

/// Checks that a folder has a checkpoint to go on from, or else nothing of another model. Returns the checkpoint's path.
pub fn fresh(out: &Path, resume: bool) -> Result<PathBuf> {
    let checkpoint = out.join(CHECKPOINT);
    if resume {
        return is_there(&checkpoint).map(|()| checkpoint);
    }
    match FOREIGN.iter().find(|name| out.join(name).exists()) {
        None => Ok(checkpoint),
        Some(&name @ (CHECKPOINT | GATES)) => Err(Error::config(format!(
            "{} is there already; --resume goes on with it, or name another folder",
            out.join(name).display()
        ))),
        Some(name) => Err(Error::config(format!(
            "{} has a {name} of another model; name a new folder with --out",
            out.display()
        ))),
    }
}

/// Whether there is a checkpoint to go on from.
pub fn is_there(checkpoint: &Path) -> Result<()> {
    match checkpoint.is_file() {
        true => Ok(()),
        false => {
            let path = checkpoint.display();
            Err(Error::config(format!("--resume: there is no {path}; leave --resume out to begin")))
        }
    }
}

/// Makes a folder if it is not there, and checks that a checkpoint can be written there.
pub fn made(out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).map_err(|error| Error::io(out, error))?;
    files::check(&out.join(CHECKPOINT))
}

fn describe(context: &Context, gpu: &Gpu, model: &Lm, corpus: &Corpus) {
    let ([stored, used], c) = (model.counts(), &model.config);
    context.note(gpu.adapter());
    context.note(format_args!(
        "{stored} parameters stored, {used} used ({:.2} times); width {}, depth {}, context {}, {:?}",
        used as f64 / stored as f64,
        c.width,
        c.depth,
        c.context,
        c.sharing
    ));
    if stored > used {
        context.note("the parts of `sharing` store more than the matrices that they stand for; take a smaller rank or fewer atoms");
    }
    context.note(format_args!(
        "{} tokens to train on, {} held out, {} kinds",
        corpus.train().len(),
        corpus.held_out().len(),
        corpus.vocab()
    ));
}

/// What is said of a rank whose parameters have become others.
fn drifted(rank: usize) -> String {
    format!(
        "rank {rank} had other parameters than rank 0, although all had the same steps: its driver rounds the optimizer's divisions or \
         roots in another way. Rank 0's parameters are taken"
    )
}

/// Runs a training behind a bar, and prints its points. `at_point` is called at each.
pub fn watched(
    context: &Context,
    training: &mut Training,
    checkpoint: Option<&Path>,
    at_point: &mut dyn FnMut(&Point) -> Result<()>,
) -> Result<bool> {
    let total = training.total();
    let bar = context.bar(Some(total), "{bar:24} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go");
    bar.set_position(training.step());
    bar.reset_eta();
    let done = training.run(checkpoint, &mut |progress| {
        match progress {
            Progress::Step(report) => {
                for event in &report.events {
                    bar.suspend(|| context.note(event));
                }
                bar.set_message(format!("loss {:.3}", report.loss));
                bar.set_position(report.step);
            }
            Progress::Measured(done, of) => {
                bar.set_message(format!("measuring {done} of {of} held-out tokens"));
            }
            Progress::Drifted(rank) => bar.suspend(|| context.note(drifted(rank))),
            Progress::Point(point) => {
                bar.suspend(|| {
                    context.result(format_args!(
                        "step {:6}  loss {:.4}, held out {:.4} nats a token, {:.0} s",
                        point.step, point.loss, point.validation, point.seconds
                    ));
                });
                context.record(&json!({
                    "line": "point", "step": point.step, "loss": point.loss, "validation": point.validation,
                    "seconds": point.seconds,
                }))?;
                at_point(point)?;
            }
            _ => {}
        }
        Ok(())
    });
    bar.finish_and_clear();
    done
}

/// What a model's file says of its training.
pub fn how_trained(training: &Training) -> BTreeMap<String, String> {
    let last = training.curve().last();
    let said = last.map(|point| ("train.validation".to_string(), format!("{:.4}", point.validation)));
    training.settings().into_iter().filter(|(name, _)| name.starts_with("train.")).chain(said).collect()
}

/// Texts that the model continues.
struct Samples<'a> {
    words: &'a Words,
    prompt: &'a str,
    model: &'a Lm,
    seed: u64,
}

impl Samples<'_> {
    /// Up to 200 tokens at temperature 0.8.
    fn next(&mut self, point: &Point) -> Result<String> {
        let context = self.model.config.context;
        let mut prompt = self.words.encode(self.prompt)?;
        prompt.truncate(context.saturating_sub(1));
        if prompt.is_empty() {
            return Ok(String::new());
        }
        let options = SamplerOptions::default().temperature(0.8).seed(self.seed + point.step);
        let mut sampler = Sampler::new(options.vocab(self.words.table()))?;
        let mut session = self.model.session(context)?;
        let scores = session.push(&prompt)?;
        let most = context.min(200).saturating_sub(prompt.len());
        let more = session.generate(scores, most, &mut sampler, |t| Ok(!self.words.ends().contains(&t)))?;
        self.words.decode(&[prompt, more].concat())
    }
}

/// The losses of training and on held-out tokens.
fn losses(curve: &[Point]) -> Vec<Line> {
    let points = |of: fn(&Point) -> f64| curve.iter().map(|p| (p.step as f64, of(p))).collect::<Vec<_>>();
    vec![Line::new("training", points(|p| p.loss)), Line::new("held out", points(|p| p.validation))]
}

/// Writes the curve of a run as picture and as lines of JSON into its folder.
pub fn keep_curve(out: &Path, training: &Training, gpu: &Gpu) -> Result<()> {
    draw(out, &losses(training.curve()), training.curve(), gpu).map(drop)
}

/// Writes `loss.svg` with these lines, and `curve.jsonl`. Returns the path of the picture.
fn draw(out: &Path, lines: &[Line], curve: &[Point], gpu: &Gpu) -> Result<PathBuf> {
    let picture = out.join("loss.svg");
    let Some(last) = curve.last() else { return Ok(picture) };
    let adapter = &gpu.adapter().name;
    let title = format!("held out {:.4} nats a token after {} steps ({adapter})", last.validation, last.step);
    let frame = Frame { title: &title, x: "step", y: "loss, nats a token", logarithmic: false };
    chart::lines(&picture, &frame, lines)?;
    let line = |p: &Point| {
        let one = json!({"step": p.step, "loss": p.loss, "validation": p.validation, "seconds": p.seconds});
        format!("{one}\n")
    };
    files::replace_with(&out.join("curve.jsonl"), curve.iter().map(line).collect::<String>())?;
    Ok(picture)
}

/// Draws the curve, and prints the result beside what counting predicts.
fn report(
    context: &Context,
    args: &Args,
    training: &Training,
    (corpus, digest): (&Corpus, u128),
    gpu: &Gpu,
) -> Result<()> {
    let curve = training.curve();
    let Some(last) = curve.last() else { return Ok(()) };
    let mut lines = losses(curve);
    let baselines = corpus.baselines();
    if let Some([single, pair]) = baselines {
        let ends = [curve[0].step as f64, last.step as f64];
        lines.push(Line::level(format!("counts of tokens {single:.3}"), single, ends));
        lines.push(Line::level(format!("counts of pairs {pair:.3}"), pair, ends));
    }
    let picture = draw(&args.out, &lines, curve, gpu)?;
    let per_byte = corpus
        .bytes_per_token()
        .filter(|&bytes| bytes != 1.0)
        .map_or_else(String::new, |bytes| format!(", {:.4} a byte", last.validation / bytes));
    let counted = baselines.map_or_else(String::new, |[single, pair]| {
        format!("; counts of tokens predict {single:.4}, counts of pairs {pair:.4}")
    });
    context.result(format_args!(
        "held out {:.4} nats a token{per_byte}, perplexity {:.2}{counted}",
        last.validation,
        last.validation.exp()
    ));
    context.record(&json!({
        "line": "trained", "validation": last.validation, "bytes_per_token": corpus.bytes_per_token(),
        "unigram": baselines.map(|b| b[0]), "bigram": baselines.map(|b| b[1]), "seconds": last.seconds,
        "parameters": format!("{digest:032x}"), "ranks": context.ranks.size(),
        "adapter": gpu.adapter().name, "driver": gpu.adapter().driver,
    }))?;
    context.note(all_the_same(context, digest));
    context.note(format_args!("wrote {}", picture.display()));
    Ok(())
}
