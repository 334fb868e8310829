//! Trains the same small character model with different kinds of sharing on the same budget, and compares stored parameters and
//! validation loss.
//!
//!     cargo run --release --example sharing_zoo -- --text "$(scripts/fetch-kjv.sh)"
//!
//! Each finished run adds a line to OUT/results.jsonl, and a second call makes only the runs that are missing there. The runs so
//! far are in benches/results/sharing/zoo.jsonl. If that file is copied to OUT/results.jsonl, they are not repeated. Settings are
//! those of a published comparison (MASA, arXiv 2508.04581), at a size that one core trains in minutes.

#[path = "common/terminal.rs"]
mod terminal;

use clap::Parser;
use indicatif::ProgressBar;
use plotters::prelude::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::Parameters;
use tiebeam::optim::{AdamW, AdamWConfig, Group, LossScale, Schedule};
use tiebeam::train::Trainer;
use tiebeam::{Error, Gpu, Precision, Result, Rng, Tensor, autocast, files, no_grad};

/// Train variants of weight sharing on one budget and compare them.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Text to train on; scripts/fetch-kjv.sh obtains the one behind the numbers in docs/families/depth.md
    #[arg(long)]
    text: PathBuf,
    /// Variants to train, by name
    #[arg(long, value_delimiter = ',', default_value = "baseline,tied,tied-lora,masa-qkvo,low-rank")]
    variants: Vec<String>,
    /// Seeds of weights and batches
    #[arg(long, value_delimiter = ',', default_value = "1,2,3")]
    seeds: Vec<u64>,
    /// Training steps
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// The precision of training
    #[command(flatten)]
    scope: terminal::Scope,
    /// Folder for results and picture
    #[arg(long, default_value = "out/zoo")]
    out: PathBuf,
}

const WIDTH: usize = 128;
const DEPTH: usize = 6;
const CONTEXT: usize = 64;
const BATCH: usize = 16;
const LR: f32 = 2e-3;
/// Characters of the held-out tenth that are scored.
const VALIDATION: usize = 65536;

/// Colours that are dark enough for text on white.
const COLOURS: [RGBColor; 9] = [
    RGBColor(31, 97, 168),
    RGBColor(190, 50, 50),
    RGBColor(40, 130, 70),
    RGBColor(180, 95, 10),
    RGBColor(110, 60, 160),
    RGBColor(20, 120, 130),
    RGBColor(150, 40, 110),
    RGBColor(90, 90, 90),
    RGBColor(110, 100, 0),
];

/// Name, kind of sharing in words, and description.
const VARIANTS: [(&str, &str, &str); 9] = [
    ("baseline", "none", "six blocks"),
    ("tied", "tied", "one block, norms of each depth's own"),
    ("tied-lora", "tied-lora rank 16 scale 1", "one block, and rank 16 of each depth's own"),
    ("tied-lora-4", "tied-lora rank 4 scale 1", "one block, and rank 4 of each depth's own"),
    ("cycle-2", "cycle 2 rank 0", "two blocks in turn"),
    ("cycle-2-lora", "cycle 2 rank 8", "two blocks in turn, and rank 8 of each depth's own"),
    ("masa-qkv", "dictionary 2 output false", "q, k, v from two atoms each"),
    ("masa-qkvo", "dictionary 2 output true", "q, k, v, o from two atoms each"),
    ("low-rank", "low-rank 21", "q, k, v, o of rank width / 6"),
];

/// Characters as numbers. The last tenth is held out.
struct Corpus {
    train: Vec<u32>,
    held_out: Vec<u32>,
    vocab: usize,
}

impl Corpus {
    fn read(path: &Path) -> Result<Corpus> {
        let fault = |message: String| Error::io(path, std::io::Error::other(message));
        let text = std::fs::read_to_string(path)
            .map_err(|e| fault(format!("{e}; --text names the text to train on, as UTF-8")))?;
        let mut letters: Vec<char> = text.chars().collect();
        letters.sort_unstable();
        letters.dedup();
        let number = |c: char| letters.binary_search(&c).expect("a character of the text") as u32;
        let all: Vec<u32> = text.chars().map(number).collect();
        let cut = all.len() - all.len() / 10;
        if all.len() - cut <= CONTEXT {
            let least = 10 * (CONTEXT + 2);
            return Err(fault(format!("{} characters are too few; give at least {least}", all.len())));
        }
        Ok(Corpus { train: all[..cut].to_vec(), held_out: all[cut..].to_vec(), vocab: letters.len() })
    }

    fn batch(&self, rng: &mut Rng) -> [Vec<u32>; 2] {
        let mut batch = [Vec::new(), Vec::new()];
        for _ in 0..BATCH {
            let start = rng.below(self.train.len() - CONTEXT);
            batch[0].extend(&self.train[start..start + CONTEXT]);
            batch[1].extend(&self.train[start + 1..start + CONTEXT + 1]);
        }
        batch
    }

    /// Returns the mean loss over adjacent windows of the held-out part, in nats per character.
    fn validate(&self, gpu: &Gpu, model: &Lm) -> Result<f64> {
        let windows: Vec<&[u32]> =
            self.held_out.windows(CONTEXT + 1).step_by(CONTEXT).take(VALIDATION / CONTEXT).collect();
        let (mut sum, mut count) = (0.0, 0);
        for some in windows.chunks(64) {
            let part = |from: usize| -> Vec<u32> {
                some.iter().flat_map(|w| w[from..from + CONTEXT].to_vec()).collect()
            };
            let [x, y] = [0, 1].map(|from| Tensor::from_slice(gpu, &part(from), [some.len(), CONTEXT]));
            let loss = no_grad(|| model.loss(&x, &y)).item()?;
            sum += loss as f64 * some.len() as f64;
            count += some.len();
        }
        Ok(sum / count as f64)
    }
}

fn optimizer(gpu: &Gpu, all: &Parameters) -> Result<AdamW> {
    let [matrices, vectors] = Group::split(all.trainable(), |_, p| p.shape().len() > 1);
    let config = AdamWConfig::default().lr(LR).betas((0.9, 0.95)).eps(1e-8).clip(Some(1.0));
    AdamW::new(gpu, vec![matrices.weight_decay(0.1), vectors], config)
}

/// Makes one run and returns its settings and results.
fn train(
    gpu: &Gpu,
    text: &Corpus,
    (name, sharing): (&str, &str),
    seed: u64,
    (steps, precision): (u32, Precision),
    (bar, stop): (&ProgressBar, &Arc<AtomicBool>),
) -> Result<Value> {
    let config = LmConfig::small()
        .vocab(text.vocab)
        .width(WIDTH)
        .heads(4)
        .kv_heads(4)
        .hidden(4 * WIDTH)
        .context(CONTEXT)
        .depth(DEPTH)
        .sharing(Sharing::named(sharing)?);
    let model = Lm::new(gpu, config, &mut Rng::new(seed));
    let parameters = Parameters::of(&model);
    let total = u64::from(steps);
    let mut trainer = Trainer::new(optimizer(gpu, &parameters)?)
        .schedule(Schedule::WarmupCosine { warmup: (total / 10).max(1), total, floor: 0.1 })
        .scale(LossScale::of(gpu, precision)?)
        // The batches of a seed are the same for every variant.
        .rng(Rng::new(seed ^ 0xba7c4))
        .report_every(20)
        .stop(stop.clone());
    let (started, before) = (Instant::now(), bar.position());
    let (run, mut last) = (format!("{name} seed {seed}:"), f32::NAN);
    let loss = |_, rng: &mut Rng| {
        let [x, y] = text.batch(rng).map(|t| Tensor::from_slice(gpu, &t, [BATCH, CONTEXT]));
        Ok(autocast(precision, || model.loss(&x, &y)))
    };
    let done = trainer.train(total, loss, |report| {
        terminal::events(bar, &run, report);
        last = report.loss;
        bar.set_message(format!("{run} step {}, loss {last:.3}", report.step));
        bar.set_position(before + report.step);
        match last.is_finite() {
            true => Ok(()),
            false => Err(Error::config(format!("{run} the loss is {last} at step {}", report.step - 1))),
        }
    })?;
    if !done {
        return Err(Error::stopped(
            "stopped; the runs that ended are kept, and the same command goes on with the others",
        ));
    }
    let seconds = started.elapsed().as_secs_f64();
    Ok(
        json!({"variant": name, "seed": seed, "steps": steps, "precision": precision.to_string(), "stored": parameters.stored(), "used": parameters.used(),
        "train_loss": last, "validation": text.validate(gpu, &model)?, "seconds": seconds,
        "characters": text.train.len() + text.held_out.len(), "adapter": gpu.adapter().name,
        "driver": gpu.adapter().driver, "version": env!("CARGO_PKG_VERSION")}),
    )
}

/// The results of one variant: stored parameters, validation losses and seconds.
struct Summary {
    name: String,
    stored: u64,
    losses: Vec<f64>,
    seconds: f64,
}

impl Summary {
    fn mean(&self) -> f64 {
        self.losses.iter().sum::<f64>() / self.losses.len() as f64
    }

    fn range(&self) -> (f64, f64) {
        let fold = |f: fn(f64, f64) -> f64, start| self.losses.iter().copied().fold(start, f);
        (fold(f64::min, f64::INFINITY), fold(f64::max, f64::NEG_INFINITY))
    }
}

fn summaries(records: &[Value], names: &[String]) -> Vec<Summary> {
    let of = |name: &String| {
        let own: Vec<&Value> = records.iter().filter(|r| r["variant"] == name.as_str()).collect();
        let number = |key: &str| own.iter().filter_map(|r| r[key].as_f64()).collect::<Vec<_>>();
        let (losses, times) = (number("validation"), number("seconds"));
        let stored = own.first().and_then(|r| r["stored"].as_u64())?;
        let seconds = times.iter().sum::<f64>() / times.len().max(1) as f64;
        (!losses.is_empty()).then(|| Summary { name: name.clone(), stored, losses, seconds })
    };
    names.iter().filter_map(of).collect()
}

/// Draws stored parameters against loss. Each seed's run is a mark. A line with the variant's name covers the range of its
/// losses.
fn draw(path: &Path, all: &[Summary]) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (860, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let (low, high) =
            all.iter().map(Summary::range).fold((f64::MAX, f64::MIN), |a, b| (a.0.min(b.0), a.1.max(b.1)));
        let most = all.iter().map(|s| s.stored).max().unwrap_or(1) as f64 / 1e6;
        let room = (high - low).max(0.01) * 0.15;
        let mut chart = ChartBuilder::on(&root)
            .caption("validation loss and stored parameters, equal training", ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(58)
            .build_cartesian_2d(0.0..most * 1.25, low - room..high + room)?;
        chart
            .configure_mesh()
            .x_desc("stored parameters, millions")
            .y_desc("validation loss, nats per character")
            .y_label_formatter(&|y| format!("{y:.3}"))
            .light_line_style(WHITE)
            .draw()?;
        for (i, s) in all.iter().enumerate() {
            let (x, colour) = (s.stored as f64 / 1e6, COLOURS[i % COLOURS.len()]);
            let (least, most) = s.range();
            chart.draw_series([PathElement::new([(x, least), (x, most)], colour.stroke_width(2))])?;
            chart.draw_series(s.losses.iter().map(|&y| Circle::new((x, y), 4, colour.filled())))?;
            let label = format!("{} {:.3}", s.name, s.mean());
            let place = EmptyElement::at((x, s.mean()))
                + Text::new(label, (9, -7), ("sans-serif", 14).into_font().color(&colour));
            chart.draw_series([place])?;
        }
        root.present()?;
    }
    Ok(files::replace_with(path, svg)?)
}

fn run(args: &Args) -> Result<()> {
    let known = || VARIANTS.map(|v| v.0).join(", ");
    let chosen: Result<Vec<_>> = args
        .variants
        .iter()
        .map(|name| {
            let found = VARIANTS.iter().find(|v| v.0 == name);
            found.ok_or_else(|| Error::config(format!("--variants: '{name}' is none of {}", known())))
        })
        .collect();
    let (chosen, text) = (chosen?, Corpus::read(&args.text)?);
    let gpu = Gpu::open()?;
    println!(
        "{}\n{} characters, {} distinct",
        gpu.adapter(),
        text.train.len() + text.held_out.len(),
        text.vocab
    );
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    let file = args.out.join("results.jsonl");
    let mut records: Vec<Value> = match std::fs::read_to_string(&file) {
        Ok(lines) => lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(Error::io(&file, e)),
    };
    let size = text.train.len() + text.held_out.len();
    let same = |r: &Value, name: &str, seed: u64| {
        // Runs of older versions were in f32.
        let precision = r["precision"].as_str().unwrap_or("f32") == args.scope.precision.to_string();
        let run = r["variant"] == name && r["seed"] == seed && r["steps"] == args.steps;
        run && precision && r["characters"] == size
    };
    let mut wanted = Vec::new();
    for &seed in &args.seeds {
        let missing = chosen.iter().filter(|v| !records.iter().any(|r| same(r, v.0, seed)));
        wanted.extend(missing.map(|v| (v.0, v.1, seed)));
    }
    let stop = terminal::interruptible()?;
    println!(
        "{} runs of {} steps to do, {} kept; each is kept in {} when it ends",
        wanted.len(),
        args.steps,
        args.seeds.len() * chosen.len() - wanted.len(),
        file.display()
    );
    let style = "{bar:24} {percent}% {wide_msg} {elapsed} so far, about {eta} to go";
    let bar = terminal::bar(style, 0, wanted.len() as u64 * args.steps as u64);
    for (name, sharing, seed) in wanted {
        let record =
            train(&gpu, &text, (name, sharing), seed, (args.steps, args.scope.precision), (&bar, &stop))?;
        bar.suspend(|| {
            println!(
                "{name} seed {seed}: validation {:.4}",
                record["validation"].as_f64().unwrap_or(f64::NAN)
            );
        });
        records.push(record);
        // The file is replaced after every run, so an interruption loses only the current run.
        files::replace_with(&file, records.iter().map(|r| r.to_string() + "\n").collect::<String>())?;
        gpu.trim();
    }
    bar.finish_and_clear();
    // Runs of other lengths or texts stay in the file but are not shown.
    let own: Vec<Value> =
        records.iter().filter(|r| r["steps"] == args.steps && r["characters"] == size).cloned().collect();
    let all = summaries(&own, &args.variants);
    println!(
        "\n| variant | stored parameters | validation, mean (least to most) of seeds | seconds a run | |\n|---|---|---|---|---|"
    );
    for s in &all {
        let what = VARIANTS.iter().find(|v| v.0 == s.name).map_or("", |v| v.2);
        let ((least, most), mean) = (s.range(), s.mean());
        println!(
            "| {} | {} | {mean:.4} ({least:.4} to {most:.4}), {} | {:.0} | {what} |",
            s.name,
            s.stored,
            s.losses.len(),
            s.seconds
        );
    }
    let picture = args.out.join("zoo.svg");
    draw(&picture, &all).map_err(|e| Error::io(&picture, std::io::Error::other(e.to_string())))?;
    println!("\npicture {}\nresults {}", picture.display(), file.display());
    Ok(())
}

fn main() -> ExitCode {
    let args = Args::parse();
    terminal::main(|| run(&args))
}
