//! The training run, with checkpoints, evaluation and samples.

use crate::plot::{self, Lines};
use crate::{Args, Sizes, terminal};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tiebeam::decode::{Sampler, SamplerOptions};
use tiebeam::language::{Corpus, Data, Part, evaluate};
use tiebeam::models::lm::Lm;
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, Schedule};
use tiebeam::store::File;
use tiebeam::train::Trainer;
use tiebeam::{Error, Gpu, Precision, Result, Rng, autocast};

/// A training run.
struct Run<'a> {
    args: &'a Args,
    sizes: &'a Sizes,
    gpu: &'a Gpu,
    text: &'a Corpus,
    /// When the process began.
    started: Instant,
    model: Lm,
    trainer: Trainer,
    losses: Vec<(usize, f32)>,
}

pub fn run(args: &Args, sizes: &Sizes, gpu: &Gpu, text: &Corpus, started: Instant) -> Result<()> {
    let [unigram, bigram] = text.baselines().expect("bytes are few kinds of tokens");
    let mut rng = Rng::new(args.seed);
    let model = Lm::new(gpu, sizes.model.clone(), &mut rng);
    let total = sizes.steps as u64;
    let trainer = Trainer::new(optimizer(gpu, &model, sizes.lr)?)
        .schedule(Schedule::WarmupCosine { warmup: (total / 20).max(1), total, floor: 0.1 })
        .scale(LossScale::of(gpu, args.scope.precision)?)
        .rng(rng)
        .total(total)
        .stop(terminal::interruptible()?);
    let mut run = Run { args, sizes, gpu, text, started, model, trainer, losses: Vec::new() };
    run.print_sizes();
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    if args.resume {
        run.load()?;
    }
    let done = run.train()?;
    if !done {
        let step = run.trainer.step();
        println!("stopped    after step {step}; go on with --resume --out {}", args.out.display());
        return Ok(());
    }
    let validation = run.validate()?;
    println!("validation {validation:.4} nats/byte on all {} held-out bytes", text.held_out().len() - 1);
    println!("baselines  unigram {unigram:.4}, bigram {bigram:.4}: {:.4} below bigram", bigram - validation);
    let picture = args.out.join("loss.svg");
    let c = &sizes.model;
    let title = format!(
        "{} bytes, width {}, depth {} ({})",
        text.train().len(),
        c.width,
        c.depth,
        gpu.adapter().name
    );
    let lines = Lines { unigram, bigram, validation };
    plot::loss_curve(&picture, &run.losses, &lines, &title)?;
    println!("picture    {}", picture.display());
    println!("checkpoint {}", run.checkpoint().display());
    let sample = run.sample(b"\nfn ", 400)?;
    println!("sample     ---\n{sample}\n---");
    Ok(())
}

/// Creates the optimizer. Matrices have weight decay, vectors (norms) have none.
fn optimizer(gpu: &Gpu, model: &Lm, lr: f32) -> Result<AdamW> {
    let [matrices, vectors] = Group::split(Parameters::of(model).trainable(), |_, p| p.shape().len() > 1);
    let config = AdamWConfig::default().lr(lr).betas((0.9, 0.95)).eps(1e-8).clip(Some(1.0));
    AdamW::new(gpu, vec![matrices.weight_decay(0.1), vectors], config)
}

impl Run<'_> {
    fn print_sizes(&self) {
        let all = Parameters::of(&self.model);
        let (stored, used) = (all.stored(), all.used());
        // Each parameter takes 16 bytes: its value, its gradient and two moments in f32.
        let saved = (used - stored.min(used)) as f64 * 16.0 / (1 << 20) as f64;
        println!(
            "parameters {stored} stored, {used} used ({:.2} times); {saved:.1} MiB of training memory saved",
            used as f64 / stored as f64
        );
        let c = &self.sizes.model;
        println!(
            "model      width {}, depth {}, heads {}, context {}, batch {}, {:?}, {}",
            c.width, c.depth, c.heads, c.context, self.sizes.batch, c.sharing, self.args.scope.precision
        );
        println!(
            "text       {}: {} bytes to train on, {} held out",
            self.args
                .text
                .as_deref()
                .map_or("sources of this repository".into(), |path| path.display().to_string()),
            self.text.train().len(),
            self.text.held_out().len()
        );
    }

    /// Trains up to the last step and saves on the way. Returns false if Ctrl-C stopped it before.
    fn train(&mut self) -> Result<bool> {
        let (steps, every) = (self.sizes.steps as u64, u64::from(self.args.save_every));
        let (batch, context) = (self.sizes.batch, self.sizes.model.context);
        let first = self.trainer.step();
        let bar = terminal::bar(terminal::TRAINING, first, steps);
        let started = Instant::now();
        let speed =
            |step: u64| ((step - first) as usize * batch * context) as f64 / started.elapsed().as_secs_f64();
        let mut going = true;
        while going {
            let (gpu, text, path) = (self.gpu, self.text, self.checkpoint());
            let (model, precision, losses) = (&self.model, self.args.scope.precision, &mut self.losses);
            let next = ((self.trainer.step() / every + 1) * every).min(steps);
            going = self.trainer.train(
                next,
                |_, rng| {
                    let Part { tokens, targets, .. } =
                        text.batch(gpu, [batch, context], (1, 0..1), 0, rng).swap_remove(0);
                    Ok(autocast(precision, || model.loss(&tokens, &targets)))
                },
                |report| {
                    terminal::events(&bar, "event", report);
                    let (step, loss) = (report.step, report.loss);
                    if !loss.is_finite() {
                        return Err(diverged(loss, step - 1, &path, precision));
                    }
                    losses.push((step as usize - 1, loss));
                    if step == first + 1 {
                        let seconds = self.started.elapsed().as_secs_f64();
                        bar.suspend(|| println!("first step {seconds:.1} s after the start, with compiling"));
                    }
                    bar.set_message(format!("loss {loss:.3} {:.0} tokens/s", speed(step)));
                    bar.set_position(step);
                    Ok(())
                },
            )? && next < steps;
            self.save()?;
        }
        bar.finish_and_clear();
        let (step, seconds) = (self.trainer.step(), started.elapsed().as_secs_f64());
        println!("trained    steps {first} to {step} in {seconds:.1} s, {:.0} tokens/s", speed(step));
        Ok(step == steps)
    }

    fn checkpoint(&self) -> PathBuf {
        self.args.out.join("checkpoint.safetensors")
    }

    /// Settings that must be the same when a run continues from a checkpoint.
    fn settings(&self) -> BTreeMap<String, String> {
        let mut all = self.sizes.model.metadata();
        all.insert("batch".into(), self.sizes.batch.to_string());
        all.insert("steps".into(), self.sizes.steps.to_string());
        all.insert("lr".into(), self.sizes.lr.to_string());
        all.insert("precision".into(), self.args.scope.precision.to_string());
        all.insert("text_bytes".into(), self.text.train().len().to_string());
        all
    }

    fn save(&self) -> Result<()> {
        let mut metadata = self.settings();
        let losses: Vec<String> = self.losses.iter().map(|(_, loss)| loss.to_bits().to_string()).collect();
        metadata.insert("losses".into(), losses.join(" "));
        self.trainer.save_with(self.checkpoint(), &self.model, &metadata)
    }

    fn load(&mut self) -> Result<()> {
        let path = self.checkpoint();
        let metadata = File::open(&path)?.metadata().clone();
        for (name, want) in &self.settings() {
            // Checkpoints from before there was a choice are of f32.
            let missing = if name == "precision" { "f32" } else { "nothing" };
            let have = metadata.get(name).map_or(missing, String::as_str);
            if have != want {
                let message =
                    format!("this checkpoint is of another run: {name} is {have} there, {want} here");
                return Err(Error::format(path, message));
            }
        }
        self.trainer.load(&path, &self.model)?;
        let losses = metadata.get("losses").map_or("", String::as_str);
        let parsed = losses.split_whitespace().map(|bits| bits.parse().map(f32::from_bits));
        self.losses = parsed.filter_map(std::result::Result::ok).enumerate().collect();
        println!("resumed    {} at step {}", path.display(), self.trainer.step());
        Ok(())
    }

    /// Returns the mean loss over every held-out byte but the first, in windows of one context.
    fn validate(&self) -> Result<f64> {
        let bytes = self.text.held_out();
        let bar = terminal::bar("{bar:32} {pos}/{len} validating, ETA {eta}", 0, bytes.len() as u64 - 1);
        let found = evaluate(&self.model, bytes, usize::MAX, &mut |done, _| {
            bar.set_position(done as u64);
            Ok(())
        });
        bar.finish_and_clear();
        found
    }

    /// Returns `prompt` and `count` more bytes, sampled at temperature 0.8.
    fn sample(&self, prompt: &[u8], count: usize) -> Result<String> {
        let context = self.sizes.model.context;
        let seed = self.args.seed ^ 0x5eed;
        let mut sampler = Sampler::new(SamplerOptions::default().temperature(0.8).seed(seed))?;
        let mut bytes = prompt.to_vec();
        let mut session = self.model.session(context)?;
        let wide = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).collect::<Vec<_>>();
        let mut scores = session.push(&wide(prompt))?;
        for _ in 0..count {
            bytes.push(sampler.pick(&scores)? as u8);
            scores = match session.length() < context {
                true => session.push(&wide(&bytes[bytes.len() - 1..]))?,
                false => {
                    // The context is full: the second half of what it holds is read again.
                    session.clear();
                    session.push(&wide(&bytes[bytes.len() - context / 2..]))?
                }
            };
        }
        let sample = printable(&bytes);
        let path = self.args.out.join("sample.txt");
        tiebeam::files::replace_with(&path, &sample)?;
        Ok(sample)
    }
}

/// Returns sampled bytes as text. Invalid UTF-8 becomes the replacement character, and control characters become dots.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() && c != '\n' { '.' } else { c }).collect()
}

/// The error of a run whose loss is not finite. It comes before a bad checkpoint is saved.
fn diverged(loss: f32, step: u64, checkpoint: &Path, precision: Precision) -> Error {
    // f16 ends at 65504, and a loss scale does not help values that are too large before they are scaled.
    let range = if precision == Precision::F16 { " or with --precision bf16" } else { "" };
    let last = if checkpoint.exists() {
        format!("the last good checkpoint is {}; resume it with a smaller --lr", checkpoint.display())
    } else {
        format!("no checkpoint was saved yet; start again with a smaller --lr{range}")
    };
    Error::config(format!("the loss is {loss} at step {step}; {last}"))
}
