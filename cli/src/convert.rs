//! `tiebeam convert`: shares the weights of a trained model, trains it to bear that, and keeps it; or writes it out again.

use crate::context::{Context, on_interrupt, unless_stopped};
use crate::run::source::Source;
use crate::train::{self, CHECKPOINT, GATES, How};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tiebeam::decode::{Windows, perplexity_with};
use tiebeam::language::{Corpus, GateOptions, GateTraining, Training};
use tiebeam::models::conversion::{Conversion, ConversionOptions};
use tiebeam::models::foldgpt::ranking;
use tiebeam::models::llama::Form;
use tiebeam::models::lm::Lm;
use tiebeam::optim::Exchange;
use tiebeam::text::Words;
use tiebeam::{DType, Error, Gpu, Precision, Result, Tensor, files};

const EXAMPLES: &str = "\
Examples:
  tiebeam convert model.gguf recursive:15 --lora 64 --text book.txt --steps 200 --distill --out out/recursive
  tiebeam convert folder masa:24 --groups 3 --lora 64 --text book.txt --out out/masa
  tiebeam convert folder fold:2 --remove 4 --text book.txt --steps 200 --distill --tail 1 --out out/fold
  tiebeam convert out/recursive --untie --dtype bf16 --out out/plain
  tiebeam run out/recursive --prompt 'Why is the sky blue?'

recursive:B  B blocks in turn (relaxed recursion); --lora gives each depth a low-rank part, from the singular values of what it lacks
masa:S       q, k, v and o of S atoms each, in --groups that are cut where the output drifts most, with --lora for what is left
fold:G       --remove so many blocks, those with the smallest gates; G neighbours of the rest share their matrices (FoldGPT)
hashed:F     all weights from one store that is F times smaller (STABLE-RPS)

Weights of different blocks of a trained model are nearly orthogonal. A conversion breaks a model that was trained without it, the more
the less is kept: masa with a third of the atoms cannot work without long training, with four fifths, groups and --lora it does; recursive
and hashed need training too. What it costs is printed, before and after.";

/// Let the depths of a trained language model share weights, train it to bear that, and keep it; or write it out as ordinary folder
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// A GGUF file, a folder of Hugging Face's libraries, or one of `tiebeam train` or `convert`
    model: PathBuf,
    /// recursive:B, masa:S, fold:G or hashed:F
    #[arg(required_unless_present = "untie", conflicts_with = "untie")]
    conversion: Option<Conversion>,
    /// Write every matrix where it is used, as a folder that transformers opens: for models with RMS norms, rotary positions and SwiGLU
    #[arg(long)]
    untie: bool,
    /// Untie with an adapter on the weights
    #[arg(long, value_name = "FOLDER", requires = "untie")]
    adapter: Option<PathBuf>,
    /// Take an adapter of another base, such as the same model in another packing
    #[arg(long, requires = "adapter")]
    other_base: bool,
    /// Folder for the model and its tokenizer
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Text to measure perplexity on, to fit dictionaries and gates to, and to train on
    #[arg(long, value_name = "FILE", conflicts_with = "untie")]
    text: Option<PathBuf>,
    /// Windows of 256 tokens (or of the model's context, if that is shorter) at the end of the text, on which perplexity is measured
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..), requires = "text")]
    windows: u32,
    /// Rank of each depth's own low-rank parts (in masa, half of it for k and v)
    #[arg(long, default_value_t = 0, conflicts_with = "untie")]
    lora: usize,
    /// Groups of neighbouring blocks, each with dictionaries of its own
    #[arg(long, default_value_t = 1, conflicts_with = "untie")]
    groups: usize,
    /// Blocks at the start and the end that a recursive conversion keeps
    #[arg(long, num_args = 2, value_names = ["FIRST", "LAST"], conflicts_with = "untie")]
    ends: Option<Vec<usize>>,
    /// Blocks that a fold conversion leaves out
    #[arg(long, default_value_t = 0, conflicts_with = "untie")]
    remove: usize,
    /// Steps of training of the gates that choose them
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..), requires = "remove")]
    gate_steps: u64,
    /// Type of the weights of an ordinary folder
    #[arg(long, default_value = "f32", value_parser = ["f32", "f16", "bf16"], requires = "untie")]
    dtype: String,
    /// Steps of training after the conversion, on the text before its last windows
    #[arg(long, default_value_t = 0, conflicts_with = "untie")]
    steps: u64,
    /// Train towards the original model's scores instead of the text's next tokens
    #[arg(long, requires = "steps")]
    distill: bool,
    /// With --distill, compare the streams after so many of the last blocks too
    #[arg(long, default_value_t = 0, requires = "distill")]
    tail: usize,
    /// Windows of a step
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536), requires = "steps")]
    batch: u32,
    /// Highest learning rate
    #[arg(long, default_value_t = 1e-4, requires = "steps")]
    lr: f32,
    /// Steps between points of the curve, at which a checkpoint is written [default: a fifth]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), requires = "steps")]
    every: Option<u64>,
    /// Products and activations of training in f32, or in f16 or bf16 with f32 sums, weights and optimizer [default: f32]
    #[arg(long)]
    precision: Option<Precision>,
    /// Start of the random numbers that choose windows of the text [default: 1]
    #[arg(long)]
    seed: Option<u64>,
    /// Go on with the training, of gates too, from the checkpoints in --out
    #[arg(long)]
    resume: bool,
}

/// Tokens of a window, if the model's context is not shorter.
const WINDOW: usize = 256;
/// Number of windows, from the start of the text, that dictionaries are fitted to.
const SAMPLE: usize = 8;

/// What a conversion works with.
struct Work<'a> {
    args: &'a Args,
    context: &'a Context,
    gpu: &'a Gpu,
    text: Option<Windows>,
    stop: Arc<AtomicBool>,
    words: &'a Words,
    /// Of the model that is converted.
    fingerprint: u128,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    args.check()?;
    let source = Source::open(&args.model, context)?;
    let words = Words::open(&crate::run::beside(&args.model))?;
    if let Some(conversion) = args.conversion {
        conversion.check(source.config(), &args.options())?;
    }
    let most = source.config().context;
    let window = if source.config().has_learned_positions() { most } else { most.min(WINDOW) };
    let needs_text =
        args.steps > 0 || args.remove > 0 || matches!(args.conversion, Some(Conversion::Masa(_)));
    if args.text.is_none() && needs_text && !args.untie {
        return Err(Error::config("--text is missing: dictionaries, gates and training need a text"));
    }
    let windows = |path: &PathBuf| {
        let text = context.read(path)?;
        Windows::of_text(&words, &text, args.windows as usize, window)
            .map_err(|error| Error::io(path, std::io::Error::other(error.to_string())))
    };
    let text = args.text.as_ref().map(windows).transpose()?;
    args.fresh()?;
    let (gpu, stop) = (context.open()?, on_interrupt()?);
    let model = source.load(&gpu, (if args.untie { most } else { window }, Form::F32), context, &stop)?;
    model.check_angles()?;
    let fingerprint = source.base(&args.model)?.fingerprint;
    train::made(&args.out)?;
    let work = Work { args, context, gpu: &gpu, text, stop, words: &words, fingerprint };
    match args.conversion {
        None => match &args.adapter {
            Some(folder) => work.untie(&source.adapted(&args.model, &model, folder, args.other_base)?),
            None => work.untie(&model),
        },
        Some(conversion) => work.convert(&model, conversion, most),
    }
}

impl Args {
    /// Refuses options that would be without effect, and a folder that is the model's own.
    fn check(&self) -> Result<()> {
        let none = |what: &str| Err(Error::config(format!("{what} is without effect here; leave it out")));
        let idle = (self.steps, self.remove) == (0, 0);
        let real = |path: &Path| std::fs::canonicalize(path).ok();
        let own = [&self.model, &crate::run::beside(&self.model)].map(|path| real(path));
        let same = real(&self.out).is_some_and(|out| own.contains(&Some(out)));
        match () {
            () if idle && self.resume => none("--resume without --steps or --remove"),
            () if idle && self.seed.is_some() => none("--seed without --steps or --remove"),
            () if idle && self.precision.is_some() => none("--precision without --steps or --remove"),
            () if self.remove > 0 && !matches!(self.conversion, Some(Conversion::Fold(_))) => {
                none("--remove, which is for fold:G,")
            }
            () if same => Err(Error::config(format!(
                "{} is the folder of the model itself; name another one with --out",
                self.out.display()
            ))),
            () => Ok(()),
        }
    }

    /// Checks that the folder is a new one, or has what --resume goes on from: first the gates, if there are any.
    fn fresh(&self) -> Result<()> {
        match self.resume && self.remove > 0 {
            true => train::is_there(&self.out.join(GATES)),
            false => train::fresh(&self.out, self.resume).map(drop),
        }
    }

    /// The options of the conversion, without blocks to be removed.
    fn options(&self) -> ConversionOptions {
        let ends = self.ends.as_ref().map_or([0, 0], |ends| [ends[0], ends[1]]);
        ConversionOptions::default().rank(self.lora).groups(self.groups).ends(ends)
    }

    fn precision(&self) -> Precision {
        self.precision.unwrap_or(Precision::F32)
    }

    fn seed(&self) -> u64 {
        self.seed.unwrap_or(1)
    }

    /// What a stopped run leaves.
    fn left(&self) -> &'static str {
        match [CHECKPOINT, GATES].iter().any(|name| self.out.join(name).is_file()) {
            true => "the same command with --resume goes on",
            false => "nothing was written",
        }
    }
}

impl Work<'_> {
    /// Writes an ordinary folder.
    fn untie(&self, model: &Lm) -> Result<()> {
        let dtype = match &self.args.dtype[..] {
            "f16" => DType::F16,
            "bf16" => DType::Bf16,
            _ => DType::F32,
        };
        let out = &self.args.out;
        model.save_folder(out, dtype)?;
        self.words.save(out)?;
        let [stored, used] = model.counts();
        let path = out.join("model.safetensors");
        let bytes = std::fs::metadata(&path).map_err(|error| Error::io(&path, error))?.len();
        self.context.result(format_args!(
            "{}: {used} weights in {dtype}, {}; {stored} were stored",
            out.display(),
            files::size(bytes)
        ));
        self.context.record(&json!({
            "line": "untied", "stored_before": stored, "stored": used, "bytes": bytes, "dtype": dtype.to_string(),
        }))
    }

    fn convert(&self, model: &Lm, conversion: Conversion, most: usize) -> Result<()> {
        let args = self.args;
        let depth = model.blocks.len();
        if matches!(conversion, Conversion::Masa(atoms) if 10 * atoms < 8 * depth) {
            self.context.note(format_args!(
                "{conversion}: weights of different blocks of a trained model are nearly orthogonal, so that fewer than four fifths of \
                 {depth} atoms keep little more than chance; train long after it (--steps), or take more atoms with --groups and --lora"
            ));
        }
        let before = self.measured(model, "before")?;
        let options = self.options(model)?;
        let mut last = String::new();
        let converted = conversion.apply(model, &options, &self.sample()?, |what| {
            if last != what {
                self.context.note(format_args!("converting {what}"));
                last = what.into();
            }
        })?;
        unless_stopped(&self.stop, args.left())?;
        let ([whole, _], [stored, used]) = (model.counts(), converted.counts());
        self.context.result(format_args!(
            "{conversion}: {stored} of {whole} weights stored ({:.1}%), {used} used",
            100.0 * stored as f64 / whole as f64
        ));
        let after = self.measured(&converted, "after")?;
        let trained =
            if args.steps > 0 { self.train(&converted, model, (conversion, &options))? } else { None };
        let kept = args.out.join("model.safetensors");
        converted.with_context(most)?.save_with(&kept, &self.said(conversion, [before, after, trained]))?;
        self.words.save(&args.out)?;
        self.context.note(format_args!("wrote {}", kept.display()));
        self.context.record(&json!({
            "line": "converted", "conversion": conversion.to_string(), "lora": args.lora, "groups": args.groups,
            "ends": options.ends, "removed": options.removed, "stored": stored, "stored_before": whole,
            "stored_share": stored as f64 / whole as f64, "perplexity_before": before, "perplexity_after": after,
            "perplexity_trained": trained, "steps": args.steps, "distilled": args.distill, "tail": args.tail,
            "lr": args.lr, "batch": args.batch, "windows": args.windows,
            "model": args.model.file_name().map(|name| name.to_string_lossy()),
            "adapter": self.gpu.adapter().name, "driver": self.gpu.adapter().driver,
        }))
    }

    /// The options of the conversion, for which gates may have to be trained.
    fn options(&self, model: &Lm) -> Result<ConversionOptions> {
        let args = self.args;
        let options = args.options();
        if args.remove == 0 {
            return Ok(options);
        }
        let gates = self.gates(model)?;
        let mut removed = ranking(&gates)[..args.remove].to_vec();
        removed.sort_unstable();
        let shown: Vec<String> = gates.iter().map(|gate| format!("{gate:.2}")).collect();
        self.context.note(format_args!("gates {}; blocks {removed:?} are removed", shown.join(" ")));
        Ok(options.removed(removed))
    }

    /// Trains gates, or goes on with them.
    fn gates(&self, model: &Lm) -> Result<Vec<f32>> {
        let (args, corpus, path) = (self.args, self.corpus(model)?, self.args.out.join(GATES));
        let options = GateOptions::default().steps(args.gate_steps).removed(args.remove);
        let options = options.precision(args.precision()).seed(args.seed());
        let mut training = GateTraining::new(model, &corpus, options)?
            .stop(self.stop.clone())
            .say("base", format_args!("{:032x}", self.fingerprint));
        if args.resume && path.is_file() {
            training.resume(&path)?;
            self.context.note(format_args!("gates go on after step {}", training.step()));
        }
        let bar = self.context.bar(Some(args.gate_steps), "training gates {bar:24} {pos}/{len}, ETA {eta}");
        bar.set_position(training.step());
        bar.reset_eta();
        let gates = training.run(Some(&path), &mut |report| {
            bar.set_position(report.step);
            Ok(())
        });
        bar.finish_and_clear();
        let step = training.step();
        gates?.ok_or_else(|| {
            Error::stopped(format!(
                "stopped after step {step} of the gates; the same command with --resume goes on"
            ))
        })
    }

    /// Tokens that dictionaries are fitted to.
    fn sample(&self) -> Result<Tensor> {
        let Some(text) = &self.text else { return Ok(Tensor::from_slice(self.gpu, &[0u32], [1, 1])) };
        let (length, all) = (text.length(), text.before());
        let rows = (all.len() / length).min(SAMPLE);
        if rows == 0 {
            return Err(Error::config("the text has nothing before its last windows to fit dictionaries to"));
        }
        Ok(Tensor::from_slice(self.gpu, &all[..rows * length], [rows, length]))
    }

    /// The text before the last windows, and the last windows.
    fn corpus(&self, model: &Lm) -> Result<Corpus> {
        let text = self.text.as_ref().ok_or_else(|| Error::config("--text is missing"))?;
        Corpus::of_parts(text.before().to_vec(), text.tokens(), model.config.vocab)
    }

    fn measured(&self, model: &Lm, when: &str) -> Result<Option<f64>> {
        let Some(text) = &self.text else { return Ok(None) };
        let bar =
            self.context.bar(Some(text.count() as u64), "perplexity {bar:24} {pos}/{len} windows, ETA {eta}");
        let found = perplexity_with(model, text, |_, _| {
            bar.inc(1);
            unless_stopped(&self.stop, self.args.left())
        });
        bar.finish_and_clear();
        let found = found?;
        if !found.is_finite() {
            return Err(Error::config(format!(
                "the perplexity {when} is {found}: the weights are damaged, or too large for what is computed"
            )));
        }
        self.context.result(format_args!("perplexity {when} {found:.2}"));
        Ok(Some(found))
    }

    /// Trains the converted model. Returns its perplexity.
    fn train(
        &self,
        converted: &Lm,
        teacher: &Lm,
        (conversion, how): (Conversion, &ConversionOptions),
    ) -> Result<Option<f64>> {
        let (args, corpus) = (self.args, self.corpus(converted)?);
        let said = format!("{conversion} {how:?}");
        let how = How {
            steps: args.steps,
            batch: args.batch,
            accumulate: 1,
            exchange: Exchange::Gradients,
            lr: Some(args.lr),
            warmup: None,
            weight_decay: Some(0.0),
            precision: args.precision(),
            seed: args.seed(),
            every: args.every.unwrap_or(args.steps.div_ceil(5)),
        };
        let options = how.options(converted.config.width)?;
        let mut resting = teacher.clone();
        tiebeam::nn::Module::freeze(&mut resting, |_| true);
        let mut training = Training::new(converted, &corpus, options)?
            .stop(self.stop.clone())
            .say("conversion", said)
            .say("base", format_args!("{:032x}", self.fingerprint));
        if args.distill {
            training = training.teacher(&resting, args.tail)?;
        }
        let checkpoint = args.out.join(CHECKPOINT);
        if args.resume && checkpoint.is_file() {
            training.resume(&checkpoint)?;
            self.context.note(format_args!("goes on after step {}", training.step()));
        }
        if !train::watched(self.context, &mut training, Some(&checkpoint), &mut |_| Ok(()))? {
            let step = training.step();
            return Err(Error::stopped(format!(
                "stopped after step {step}; the same command with --resume goes on"
            )));
        }
        train::keep_curve(&args.out, &training, self.gpu)?;
        self.measured(converted, "trained")
    }

    /// What the model's file says of its making.
    fn said(&self, conversion: Conversion, perplexity: [Option<f64>; 3]) -> BTreeMap<String, String> {
        let args = self.args;
        let mut all: BTreeMap<String, String> =
            [("convert.conversion".to_string(), conversion.to_string())].into();
        let name = args.model.file_name().map(|name| name.to_string_lossy().into_owned());
        all.extend(name.map(|name| ("convert.model".to_string(), name)));
        all.insert("convert.steps".into(), args.steps.to_string());
        all.insert("convert.distilled".into(), args.distill.to_string());
        for (when, found) in ["before", "after", "trained"].iter().zip(perplexity) {
            all.extend(found.map(|found| (format!("convert.perplexity_{when}"), format!("{found:.3}"))));
        }
        all
    }
}
