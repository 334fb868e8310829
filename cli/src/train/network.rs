//! `tiebeam train --data`: trains a multilayer perceptron on labelled rows.

use super::{Args, CHECKPOINT, drifted, fresh, made, settings};
use crate::context::{Context, on_interrupt_of};
use serde_json::json;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::path::PathBuf;
use tiebeam::chart::{self, Frame, Line};
use tiebeam::merge::Evaluation;
use tiebeam::merge::evaluate;
use tiebeam::nn::{Init, Linear, Module, ModuleFile, Visit, VisitMut};
use tiebeam::optim::{AdamW, AdamWConfig, Exchange, Group, Optimizer, Scalars, ScalarsConfig, Schedule};
use tiebeam::ranks::{check_parts, on_first, share};
use tiebeam::train::{Trainer, same_settings};
use tiebeam::{Error, Gpu, Result, Rng, Tensor, files, no_grad};
use twox_hash::XxHash3_128;

/// Layers `fc0`, `fc1`, .. with ReLU between them, by whose names `tiebeam evaluate`, `match` and `merge` know the network.
struct Mlp(Vec<Linear>);

impl Mlp {
    fn new(gpu: &Gpu, sizes: &[usize], seed: u64) -> Mlp {
        let mut rng = Rng::new(seed);
        let mut layer =
            |pair: &[usize]| Linear::new(gpu, pair[0], pair[1], true, Init::KaimingUniform, &mut rng);
        Mlp(sizes.windows(2).map(&mut layer).collect())
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let last = self.0.len() - 1;
        let layer = |x: Tensor, (i, layer): (usize, &Linear)| {
            let y = layer.forward(&x);
            if i < last { y.relu() } else { y }
        };
        self.0.iter().enumerate().fold(x.clone(), layer)
    }
}

impl Module for Mlp {
    fn visit(&self, visit: &mut Visit) {
        self.0.iter().enumerate().for_each(|(i, layer)| visit.field(&format!("fc{i}"), layer));
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        self.0.iter_mut().for_each(|layer| visit.field(layer));
    }
}

/// Rows on the host, of which each step takes some, and rows that are held out.
struct Rows {
    width: usize,
    x: Vec<f32>,
    labels: Vec<u32>,
    held_out: HeldOut,
    id: String,
}

struct HeldOut {
    x: Vec<f32>,
    labels: Vec<u32>,
}

/// Reads `layers` of the settings.
fn sizes(args: &Args, context: &Context) -> Result<Vec<usize>> {
    let wrong = |message: String| Error::format(&args.model, message);
    let mut settings = settings(&args.model, context)?;
    let layers = settings.remove("layers").ok_or_else(|| {
        wrong("with --data, it needs `layers`, such as [64, 32, 10]: inputs, units between, classes".into())
    })?;
    if let Some(name) = settings.keys().next() {
        return Err(wrong(format!("`{name}` is no setting of a network, which has only `layers`")));
    }
    let sizes: Option<Vec<usize>> =
        layers.split(' ').map(|word| word.parse().ok().filter(|n| *n > 0)).collect();
    let Some(sizes) = sizes.filter(|sizes| sizes.len() > 1) else {
        return Err(wrong(format!(
            "`layers` is [{layers}]; give two sizes above 0 or more, such as [64, 10]"
        )));
    };
    // A matrix is made on the host first.
    match sizes.windows(2).find(|pair| pair[0].checked_mul(pair[1]).is_none_or(|n| n > MOST)) {
        Some(pair) => {
            Err(wrong(format!("`layers`: a matrix of {} x {} has more than 2^29 numbers", pair[0], pair[1])))
        }
        None => Ok(sizes),
    }
}

/// Numbers of a matrix.
const MOST: usize = 1 << 29;
/// Held-out rows that are measured at a time.
const AT_ONCE: usize = 4096;

impl Rows {
    fn read(args: &Args, sizes: &[usize]) -> Result<Rows> {
        let path = args.data.as_deref().ok_or_else(|| Error::config("--data is not given"))?;
        let wrong = |message: String| Error::format(path, message);
        let evaluate::Rows { inputs: mut x, mut labels, .. } =
            evaluate::Rows::open(path, &args.inputs, &args.labels)?;
        let rows = labels.len();
        let (width, classes) = (x.len() / rows, sizes[sizes.len() - 1]);
        if width != sizes[0] {
            return Err(wrong(format!("rows of {width} numbers, and the network has {} inputs", sizes[0])));
        }
        if let Some(label) = labels.iter().find(|label| **label as usize >= classes) {
            return Err(wrong(format!("label {label}, and the network has {classes} outputs")));
        }
        let held_out = args.held_out.map_or(rows / 5, |n| n as usize);
        if held_out == 0 || held_out >= rows {
            return Err(wrong(format!(
                "{rows} rows, of which {held_out} are held out; give --held-out a number of at least 1 and below {rows}"
            )));
        }
        let mut id = XxHash3_128::new();
        x.iter().for_each(|x| id.write(&x.to_le_bytes()));
        labels.iter().for_each(|label| id.write(&label.to_le_bytes()));
        let id = format!("{:032x}", id.finish_128());
        let first = rows - held_out;
        let held_out = HeldOut { x: x.split_off(first * width), labels: labels.split_off(first) };
        Ok(Rows { width, x, labels, held_out, id })
    }

    /// Parts of a step's batch: inputs, labels, and the weight of the mean loss.
    fn parts(
        &self,
        gpu: &Gpu,
        batch: usize,
        parts: usize,
        wanted: std::ops::Range<usize>,
        rng: &mut Rng,
    ) -> Vec<Part> {
        let chosen: Vec<usize> = (0..batch).map(|_| rng.below(self.labels.len())).collect();
        let one = |i: usize| {
            let rows = &chosen[share(batch, i, parts)];
            let x: Vec<f32> = rows
                .iter()
                .flat_map(|row| &self.x[row * self.width..(row + 1) * self.width])
                .copied()
                .collect();
            let labels: Vec<u32> = rows.iter().map(|row| self.labels[*row]).collect();
            let weight = (rows.len() * parts) as f32 / batch as f32;
            let inputs = [
                Tensor::from_slice(gpu, &x, [rows.len(), self.width]),
                Tensor::from_slice(gpu, &labels, [rows.len()]),
            ];
            Part { inputs, weight }
        };
        wanted.map(one).collect()
    }
}

struct Part {
    inputs: [Tensor; 2],
    weight: f32,
}

/// A point of the curve.
#[derive(Clone, Copy)]
struct Point {
    step: u64,
    loss: f64,
    held_out: f64,
    accuracy: f64,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Point { step, loss, held_out, accuracy } = self;
        write!(f, "step {step:6}  loss {loss:.4}, held out {held_out:.4}, accuracy {accuracy:.4}")
    }
}

impl Point {
    fn line(&self) -> serde_json::Value {
        json!({"step": self.step, "loss": self.loss, "validation": self.held_out, "accuracy": self.accuracy})
    }

    fn parse(line: &str) -> Option<Point> {
        let json: serde_json::Value = serde_json::from_str(line).ok()?;
        // JSON has no NaN and no infinity, and writes null.
        let number = |name: &str| json[name].as_f64().unwrap_or(f64::NAN);
        Some(Point {
            step: json["step"].as_u64()?,
            loss: number("loss"),
            held_out: number("validation"),
            accuracy: number("accuracy"),
        })
    }
}

/// The losses since the last point: a run that is stopped between two goes on to the same curve.
#[derive(Clone, Copy, Default)]
struct Since {
    sum: f64,
    count: u64,
}

impl Since {
    fn add(&mut self, loss: f32) {
        self.sum += f64::from(loss);
        self.count += 1;
    }

    fn mean(self) -> f64 {
        self.sum / self.count as f64
    }

    fn text(self) -> String {
        format!("{:?} {}", self.sum, self.count)
    }

    fn parse(text: &str) -> Option<Since> {
        let (sum, count) = text.split_once(' ')?;
        Some(Since { sum: sum.parse().ok()?, count: count.parse().ok()? })
    }
}

/// The rate by which scalars are multiplied, for a model of so many numbers: as large as the noise of so many directions allows.
pub fn scalar_rate(count: usize) -> f32 {
    (50.0 / count as f32).min(0.1)
}

fn optimizer(args: &Args, gpu: &Gpu, model: &Mlp) -> Result<(Box<dyn Optimizer>, f32)> {
    let leaves = model.parameters().trainable();
    let count: usize = leaves.iter().map(|(_, leaf)| leaf.count()).sum();
    match args.how.exchange {
        Exchange::Gradients => {
            let lr = args.how.lr.unwrap_or(0.01);
            let [matrices, biases] = Group::split(leaves, |_, leaf| leaf.shape().len() > 1);
            let groups = vec![matrices.weight_decay(args.how.decay()?), biases];
            Ok((Box::new(AdamW::new(gpu, groups, AdamWConfig::default().lr(lr))?), lr))
        }
        Exchange::Scalars { byte } => {
            let lr = args.how.lr.unwrap_or(scalar_rate(count));
            let config = ScalarsConfig::default().lr(lr).byte(byte).seed(args.how.seed);
            Ok((Box::new(Scalars::new(leaves, config)?), lr))
        }
    }
}

/// What a run has opened.
struct Run<'a> {
    args: &'a Args,
    context: &'a Context,
    gpu: Gpu,
    rows: Rows,
    model: Mlp,
    checkpoint: PathBuf,
    settings: BTreeMap<String, String>,
    curve: Vec<Point>,
    since: Since,
}

/// Opens and checks everything, before anything is written.
fn prepared<'a>(args: &'a Args, context: &'a Context) -> Result<(Run<'a>, Trainer)> {
    let how = &args.how;
    let sizes = sizes(args, context)?;
    let checkpoint = match context.is_first() {
        true => fresh(&args.out, args.resume)?,
        false => args.out.join(CHECKPOINT),
    };
    check_parts(how.batch as usize, "rows", context.ranks.size(), how.accumulate as usize)?;
    let decay = how.decay()?;
    let rows = Rows::read(args, &sizes)?;
    let gpu = context.open()?;
    let model = Mlp::new(&gpu, &sizes, how.seed);
    let (optimizer, lr) = optimizer(args, &gpu, &model)?;
    let warmup = how.warmup.unwrap_or(how.steps.div_ceil(10)).clamp(1, how.steps);
    let said = [
        ("layers", format!("{sizes:?}")),
        ("train.data", rows.id.clone()),
        ("train.held_out", rows.held_out.labels.len().to_string()),
        ("train.batch", how.batch.to_string()),
        ("train.accumulate", how.accumulate.to_string()),
        ("train.steps", how.steps.to_string()),
        ("train.every", how.every.to_string()),
        ("train.warmup", warmup.to_string()),
        ("train.lr", lr.to_string()),
        ("train.weight_decay", decay.to_string()),
        ("train.exchange", how.exchange.to_string()),
        ("train.seed", how.seed.to_string()),
    ];
    let settings = said.map(|(name, value)| (name.to_string(), value)).into();
    let (curve, since) = (Vec::new(), Since::default());
    let trainer = Trainer::new(optimizer)
        .schedule(Schedule::WarmupCosine { warmup, total: how.steps, floor: 0.1 })
        .rng(Rng::new(how.seed))
        .accumulate(how.accumulate as usize)
        .ranks(context.ranks.clone())
        .total(how.steps)
        .stop(on_interrupt_of(context, &checkpoint)?);
    Ok((Run { args, context, gpu, rows, model, checkpoint, settings, curve, since }, trainer))
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let (mut run, mut trainer) = context.all_done(prepared(args, context))?;
    context.agree(run.settings.clone())?;
    run.begin(&mut trainer)?;
    run.train(&mut trainer)?;
    run.finish(&trainer)
}

impl Run<'_> {
    fn begin(&mut self, trainer: &mut Trainer) -> Result<()> {
        let Run { args, context, gpu, rows, model, checkpoint, settings, .. } = self;
        context.note(gpu.adapter());
        let count: usize = model.parameters().trainable().iter().map(|(_, leaf)| leaf.count()).sum();
        context.note(format_args!(
            "{count} parameters; {} rows to train on, {} held out",
            rows.labels.len(),
            rows.held_out.labels.len()
        ));
        if args.resume {
            let said =
                trainer.load_if(&*checkpoint, model, |found| same_settings(checkpoint, found, settings))?;
            let word = |name: &str| said.get(name).map_or("", String::as_str);
            self.curve = word("train.curve").lines().filter_map(Point::parse).collect();
            self.since = Since::parse(word("train.since")).unwrap_or_default();
            context.note(format_args!("goes on after step {}", trainer.step()));
        } else {
            trainer.share_state(model)?;
        }
        on_first(&*context.ranks, || made(&args.out)).map(drop)
    }

    fn train(&mut self, trainer: &mut Trainer) -> Result<()> {
        let (args, context, how) = (self.args, self.context, &self.args.how);
        let bar = context
            .bar(Some(how.steps), "{bar:24} {pos}/{len} {wide_msg} {elapsed} so far, about {eta} to go");
        bar.set_position(trainer.step());
        bar.reset_eta();
        loop {
            let step = trainer.step();
            let due = step > 0 && (step == how.steps || step.is_multiple_of(how.every));
            // A run that was stopped at a point has not measured it.
            if due && self.curve.last().is_none_or(|point| point.step < step) {
                let point = self.measured(step)?;
                bar.suspend(|| context.result(point));
                self.keep(trainer, point)?;
            }
            if step >= how.steps {
                break;
            }
            let to = ((step / how.every + 1) * how.every).min(how.steps);
            let mut since = self.since;
            let done = self.steps(trainer, to, &mut |report| {
                since.add(report.loss);
                bar.set_message(format!("loss {:.3}", report.loss));
                bar.set_position(report.step);
                Ok(())
            })?;
            self.since = since;
            if !done {
                self.save(trainer)?;
                context.ranks.all_failed();
                return Err(Error::stopped(format!(
                    "stopped after step {}; the same command with --resume goes on in {}",
                    trainer.step(),
                    args.out.display()
                )));
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn steps(
        &self,
        trainer: &mut Trainer,
        to: u64,
        on: &mut dyn FnMut(&tiebeam::train::Report) -> Result<()>,
    ) -> Result<bool> {
        let (ranks, how) = (&self.context.ranks, &self.args.how);
        let (each, rank) = (how.accumulate as usize, ranks.rank());
        let mut waiting: VecDeque<Part> = VecDeque::new();
        let weights = RefCell::new(VecDeque::new());
        let batch = |_, rng: &mut Rng| {
            if waiting.is_empty() {
                let own = rank * each..(rank + 1) * each;
                waiting =
                    self.rows.parts(&self.gpu, how.batch as usize, each * ranks.size(), own, rng).into();
            }
            let part =
                waiting.pop_front().ok_or_else(|| Error::config("train: a batch has too few parts"))?;
            weights.borrow_mut().push_back(part.weight);
            Ok(part.inputs.to_vec())
        };
        let loss = |inputs: &[Tensor], _: &mut Rng| {
            let weight = weights.borrow_mut().pop_front().unwrap_or(1.0);
            let loss = self.model.forward(&inputs[0]).cross_entropy(&inputs[1], None);
            Ok(if weight == 1.0 { loss } else { loss.scale(weight) })
        };
        trainer.train_recorded(to, batch, loss, on)
    }

    fn measured(&self, step: u64) -> Result<Point> {
        let held_out = &self.rows.held_out;
        // The layers between are wider than the logits.
        let part = |x: &[f32]| {
            let x = Tensor::from_slice(&self.gpu, x, [x.len() / self.rows.width, self.rows.width]);
            no_grad(|| self.model.forward(&x))
        };
        let parts: Vec<Tensor> = held_out.x.chunks(AT_ONCE * self.rows.width).map(part).collect();
        let logits = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0);
        let found = Evaluation::of(&logits, &held_out.labels)?;
        Ok(Point { step, loss: self.since.mean(), held_out: found.loss, accuracy: found.accuracy })
    }

    /// Keeps a point and writes the checkpoint.
    fn keep(&mut self, trainer: &mut Trainer, point: Point) -> Result<()> {
        self.curve.push(point);
        self.since = Since::default();
        let mut line = point.line();
        line["line"] = "point".into();
        self.context.record(&line)?;
        self.save(trainer)
    }

    fn save(&self, trainer: &mut Trainer) -> Result<()> {
        if let Some(rank) = trainer.mend(&self.model)? {
            self.context.note(drifted(rank));
        }
        let mut said = self.settings.clone();
        let curve: Vec<String> = self.curve.iter().map(|point| point.line().to_string()).collect();
        said.insert("train.curve".into(), curve.join("\n"));
        said.insert("train.since".into(), self.since.text());
        trainer.save_with(&self.checkpoint, &self.model, &said)
    }

    fn finish(&self, trainer: &Trainer) -> Result<()> {
        let (context, out, gpu) = (self.context, &self.args.out, &self.gpu);
        let digest = trainer.digest(&self.model)?;
        if !context.is_first() {
            return Ok(());
        }
        let Some(last) = self.curve.last() else { return Ok(()) };
        let kept = out.join("model.safetensors");
        self.model.save_with(&kept, &self.settings)?;
        let line = |name: &str, of: fn(&Point) -> f64| {
            let points = self.curve.iter().map(|p| (p.step as f64, of(p))).filter(|(_, y)| y.is_finite());
            Line::new(name, points.collect::<Vec<_>>())
        };
        let lines = [line("held out", |p| p.held_out), line("training", |p| p.loss)];
        let title =
            format!("accuracy {:.3} after {} steps ({})", last.accuracy, last.step, gpu.adapter().name);
        let frame = Frame { title: &title, x: "step", y: "loss, nats", logarithmic: false };
        chart::lines(&out.join("loss.svg"), &frame, &lines)?;
        let text: String = self.curve.iter().map(|point| format!("{}\n", point.line())).collect();
        files::replace_with(&out.join("curve.jsonl"), text)?;
        context.result(format_args!(
            "held out: {:.4} of {} rows are right, loss {:.4}",
            last.accuracy,
            self.rows.held_out.labels.len(),
            last.held_out
        ));
        context.note(super::all_the_same(context, digest));
        context.record(&json!({
            "line": "trained", "validation": last.held_out, "accuracy": last.accuracy, "parameters": format!("{digest:032x}"),
            "ranks": context.ranks.size(), "adapter": gpu.adapter().name, "driver": gpu.adapter().driver,
        }))?;
        context.note(format_args!("wrote {} and {}", kept.display(), out.join("loss.svg").display()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_and_losses_are_read_back() {
        let point = Point { step: 3, loss: 1.0 / 3.0, held_out: f64::NAN, accuracy: 0.5 };
        let read = Point::parse(&point.line().to_string()).unwrap();
        assert_eq!((read.step, read.loss, read.accuracy), (3, point.loss, 0.5));
        assert!(read.held_out.is_nan() && Point::parse("{}").is_none());
        let since = Since { sum: 0.1 + 0.2, count: 7 };
        let read = Since::parse(&since.text()).unwrap();
        assert_eq!((read.sum, read.count), (since.sum, since.count));
    }
}
