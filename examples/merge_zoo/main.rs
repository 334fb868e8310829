//! Merges five networks that were fine-tuned from one base on five tasks, by every method, and shows what each merge reaches at each
//! task.
//!
//!     cargo run --release --example merge_zoo
//!
//! Writes the networks, the tasks and the configurations to OUT, where `tiebeam merge` and `tiebeam evaluate` can use them, the
//! accuracies as JSON lines, and a table and a picture of them. Runs that are in the lines already are not repeated.

#[path = "../common/digits.rs"]
mod digits;
mod methods;
#[path = "../common/mlp.rs"]
mod mlp;
mod others;
mod table;
mod tasks;
#[path = "../common/terminal.rs"]
mod terminal;

use clap::Parser;
use digits::{Data, Set};
use mlp::{Recipe, train};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tasks::{NAMES, Task, save_set};
use tiebeam::merge::evaluate;
use tiebeam::merge::fisher::{FisherOptions, fisher_of};
use tiebeam::merge::{Architecture, Job, MergeConfig, Weights};
use tiebeam::models::network::Network;
use tiebeam::store::save_tensors;
use tiebeam::{Error, Gpu, Precision, Result, Rng, Tensor, files};

/// Merge networks of five tasks by every method, and show the accuracy at each task
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Seeds: each has a base, tasks and networks of its own
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    seeds: u32,
    /// Width of the two hidden layers
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=8192))]
    width: u32,
    /// Passes over the training images of a task
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    epochs: u32,
    /// Folder for networks, tasks, configurations, lines, table and picture
    #[arg(long, default_value = "out/merge_zoo")]
    out: PathBuf,
}

type Model = BTreeMap<String, Tensor>;

/// One seed's base, tasks and networks.
struct Family<'a> {
    gpu: &'a Gpu,
    folder: PathBuf,
    base: Model,
    tasks: Vec<Task>,
    models: Vec<Model>,
    network: Network,
}

/// The name of a task's files.
fn file_name(task: &str) -> String {
    task.replace(' ', "-")
}

impl Family<'_> {
    fn architecture(&self) -> Architecture {
        Architecture::Network(self.network.clone())
    }

    fn accuracy(&self, weights: &dyn Weights, set: &Set) -> Result<f64> {
        let task = evaluate::Task::labelled("set", set.x.clone(), set.labels.clone());
        let score = self.architecture().score(self.gpu, weights, &task, &mut |_, _| Ok(()))?;
        Ok(score.main())
    }

    /// Accuracy at each task, on the test or the validation images.
    fn accuracies(&self, weights: &dyn Weights, test: bool) -> Result<Vec<f64>> {
        let set = |task: &'_ Task| self.accuracy(weights, if test { &task.test } else { &task.validation });
        self.tasks.iter().map(set).collect()
    }

    /// Merges by a configuration, with the number of its grid that is best on the validation images.
    fn merged(&self, method: &methods::Method) -> Result<(Model, Value)> {
        let names: Vec<String> = self.tasks.iter().map(|task| file_name(task.name)).collect();
        let learn: Vec<Value> = names
            .iter()
            .map(|name| json!({"name": name, "data": format!("{name}-validation.safetensors")}))
            .collect();
        let learn = json!({"tasks": learn});
        let values: Vec<Option<f64>> = match method.grid {
            None => vec![None],
            Some((_, values)) => values.iter().map(|&value| Some(value)).collect(),
        };
        let mut best: Option<(f64, Model, Value)> = None;
        for value in values {
            let config = method.config(&names, &learn, value);
            let merged = self.merge(&config)?;
            let own = self.accuracies(&merged, false)?;
            let mean = own.iter().sum::<f64>() / own.len() as f64;
            if best.as_ref().is_none_or(|(most, ..)| mean > *most) {
                best = Some((mean, merged, config));
            }
        }
        best.map(|(_, model, config)| (model, config)).ok_or_else(|| Error::config("no value of a grid"))
    }

    /// What `tiebeam merge` would write for a configuration.
    fn merge(&self, config: &Value) -> Result<Model> {
        let job = Job::open(MergeConfig::from_value(config, &self.folder)?)?;
        let (gpu, sources) = (self.gpu, job.sources());
        let architecture = self.architecture();
        match &job.config.search {
            _ if !job.config.needs_data() => job.merged(gpu, &sources),
            Some(search) => {
                let tasks = job.learning_tasks(gpu)?;
                let on = &mut |_: usize, _: usize, _: &str| Ok(());
                let (_, weighted) = job.searched(gpu, &architecture, &tasks, search, on)?;
                weighted.merged(gpu, &sources)
            }
            None => {
                let tasks = job.learning_tasks(gpu)?;
                let learned = job.learn(gpu, &sources, &architecture, &tasks, &mut |_, _, _| Ok(()))?;
                Ok(learned.weights)
            }
        }
    }
}

/// Trains one seed's networks, and writes them with their tasks and Fisher diagonals.
fn family<'a>(
    gpu: &'a Gpu,
    data: &Data,
    args: &Args,
    seed: u64,
    stop: &Arc<AtomicBool>,
) -> Result<Family<'a>> {
    let folder = args.out.join(format!("seed-{seed}"));
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
    let mut rng = Rng::new(1000 + seed);
    let tasks =
        NAMES.iter().map(|&name| Task::new(gpu, data, name, &mut rng)).collect::<Result<Vec<Task>>>()?;
    let width = args.width as usize;
    let sizes = [data.train.x.shape()[1], width, width, data.classes()];
    let recipe = |epochs, lr| Recipe { epochs, batch: 50, lr, precision: Precision::F32 };
    let base = train(gpu, &tasks::of_base(gpu, data)?, (&sizes, None), &recipe(40, 0.05), seed, stop)?;
    save_tensors(folder.join("base.safetensors"), &base, &BTreeMap::new())?;
    let mut models = Vec::new();
    for task in &tasks {
        let name = file_name(task.name);
        let recipe = recipe(args.epochs as usize, 0.02);
        let model = train(gpu, &task.train, (&sizes, Some(&base)), &recipe, seed, stop)?;
        save_tensors(folder.join(format!("{name}.safetensors")), &model, &BTreeMap::new())?;
        for (part, set) in [("train", &task.train), ("validation", &task.validation), ("test", &task.test)] {
            save_set(&folder.join(format!("{name}-{part}.safetensors")), set)?;
        }
        models.push(model);
    }
    let network = Network::mlp(&base)?;
    let family = Family { gpu, folder, base, tasks, models, network };
    for (task, model) in family.tasks.iter().zip(&family.models) {
        let own = evaluate::Task::labelled(task.name, task.train.x.clone(), task.train.labels.clone());
        let options = FisherOptions::default();
        let fisher = fisher_of(gpu, &family.architecture(), model, &own, &options, &mut |_, _| Ok(()))?;
        let path = family.folder.join(format!("fisher-{}.safetensors", file_name(task.name)));
        save_tensors(&path, &fisher, &BTreeMap::new())?;
    }
    Ok(family)
}

/// All runs of one seed as lines.
fn seed(gpu: &Gpu, data: &Data, args: &Args, seed: u64, stop: &Arc<AtomicBool>) -> Result<Vec<Value>> {
    let family = family(gpu, data, args, seed, stop)?;
    let mut lines = Vec::new();
    let names: Vec<&str> = family.tasks.iter().map(|task| task.name).collect();
    let line = |part: &str, method: &str, accuracies: Vec<f64>| {
        let all: serde_json::Map<String, Value> =
            names.iter().zip(&accuracies).map(|(name, a)| (name.to_string(), json!(a))).collect();
        json!({"part": part, "seed": seed, "method": method, "accuracy": all})
    };
    lines.push(line("ends", "base", family.accuracies(&family.base, true)?));
    let own = family.tasks.iter().zip(&family.models);
    let own = own.map(|(task, model)| family.accuracy(model, &task.test)).collect::<Result<Vec<f64>>>()?;
    lines.push(line("ends", "each task's own network", own));
    let all = methods::all();
    let bar =
        terminal::bar("{bar:24} {pos}/{len} merges of a seed, {msg}, about {eta} to go", 0, all.len() as u64);
    for method in &all {
        if stop.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Error::stopped("stopped; the seeds that are done are kept"));
        }
        bar.set_message(method.name);
        let (merged, config) = family.merged(method)?;
        let text = serde_json::to_string_pretty(&config).map_err(|e| Error::config(e.to_string()))?;
        files::replace_with(&family.folder.join(format!("{}.yaml", file_name(method.name))), text)?;
        lines.push(line("merge", method.name, family.accuracies(&merged, true)?));
        bar.inc(1);
    }
    bar.finish_and_clear();
    lines.extend(others::lines(&family, data, args, seed, stop)?);
    Ok(lines)
}

/// The lines of a file, if there is one.
fn read(path: &Path) -> Result<Vec<Value>> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(Vec::new()) };
    let one = |line: &str| {
        serde_json::from_str(line).map_err(|e| Error::config(format!("{}: {e}", path.display())))
    };
    text.lines().map(one).collect()
}

fn body(args: &Args) -> Result<()> {
    let gpu = Gpu::open()?;
    println!("adapter {}", gpu.adapter());
    std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?;
    let data = Data::digits(&gpu)?;
    let stop = terminal::interruptible()?;
    let path = args.out.join("accuracies.jsonl");
    let settings = json!({
        "part": "settings", "width": args.width, "epochs": args.epochs, "adapter": gpu.adapter().name,
        "driver": gpu.adapter().driver,
    });
    let mut lines = read(&path)?;
    if lines.first().is_some_and(|first| *first != settings) {
        let message = format!("{}: these are runs of other settings; name another --out", path.display());
        return Err(Error::config(message));
    }
    if lines.is_empty() {
        lines.push(settings);
    }
    for number in 1..=u64::from(args.seeds) {
        if lines.iter().any(|line| line["seed"] == number) {
            continue;
        }
        lines.extend(seed(&gpu, &data, args, number, &stop)?);
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        files::replace_with(&path, text)?;
        println!("seed {number} of {} is done", args.seeds);
    }
    table::show(&lines, &args.out)
}

fn main() -> ExitCode {
    terminal::main(|| body(&Args::parse()))
}
