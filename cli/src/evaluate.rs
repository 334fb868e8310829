//! `tiebeam evaluate`.

use crate::context::{Context, on_interrupt, unless_stopped};
use crate::data::{Tasks, bar};
use crate::run::source::Source;
use crate::scores::Table;
use clap::Parser;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use tiebeam::merge::evaluate::{Score, Task, TaskData};
use tiebeam::merge::{Architecture, Weights};
use tiebeam::models::llama::Form;
use tiebeam::models::lm;
use tiebeam::{Error, Gpu, Result};

const EXAMPLES: &str = "\
Examples:
  tiebeam evaluate a.safetensors b.safetensors --data test.safetensors
  tiebeam evaluate resnet18.safetensors --data day=day.safetensors --data night=night.safetensors
  tiebeam evaluate models/SmolLM2-135M --text book.txt --tokens 8192
  tiebeam evaluate models/SmolLM2-135M --adapter out/lora --text book.txt";

/// Score models on tasks: accuracy of networks on labelled rows, perplexity of language models on texts
#[derive(Parser)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Models: safetensors files or folders of networks; folders, GGUF files or trainings of language models
    #[arg(required = true)]
    models: Vec<PathBuf>,
    #[command(flatten)]
    tasks: Tasks,
    /// Put this adapter, a folder of PEFT's, on each language model
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Take an adapter that was made for another model
    #[arg(long, requires = "adapter")]
    other_base: bool,
}

pub fn run(args: &Args, context: &Context) -> Result<()> {
    let files = args.tasks.files()?;
    if args.adapter.is_some() && !args.tasks.data.is_empty() {
        return Err(Error::config("--adapter is for language models, which are scored on --text"));
    }
    let network = args.tasks.network()?;
    let gpu = context.open()?;
    let stop = on_interrupt()?;
    let mut table = None;
    for model in &args.models {
        // The tokens of a text differ between models, and so do the tasks.
        let folder = tiebeam::store::located(model);
        let tasks = files.iter().map(|file| file.open(&gpu, &folder)).collect::<Result<Vec<Task>>>()?;
        let table = table.get_or_insert_with(|| Table::new(context, &tasks));
        let is_text = |task: &Task| matches!(task.data, TaskData::Tokens(_));
        let scores = match tasks.iter().all(is_text) {
            true => of_language_model(args, &gpu, model, &tasks, context, &stop)?,
            false => {
                let weights = context.shards(model)?;
                let architecture = Architecture::open(&gpu, &weights, network.as_ref())?;
                of_network(&gpu, &architecture, &weights, &tasks, &stop)?
            }
        };
        table.row(&model.display().to_string(), model, &scores)?;
    }
    context.whole();
    Ok(())
}

fn of_network(
    gpu: &Gpu,
    architecture: &Architecture,
    weights: &dyn Weights,
    tasks: &[Task],
    stop: &AtomicBool,
) -> Result<Vec<Score>> {
    let one = |task: &Task| {
        architecture.score(gpu, weights, task, &mut |_, _| unless_stopped(stop, "nothing was written"))
    };
    tasks.iter().map(one).collect()
}

/// Language models are read in the form in which `tiebeam run` reads them, so packed weights stay packed.
fn of_language_model(
    args: &Args,
    gpu: &Gpu,
    path: &Path,
    tasks: &[Task],
    context: &Context,
    stop: &AtomicBool,
) -> Result<Vec<Score>> {
    let source = Source::open(path, context)?;
    let longest = (args.tasks.context as usize).min(source.config().context);
    let mut model = source.load(gpu, (longest, Form::Stored), context, stop)?;
    if let Some(adapter) = &args.adapter {
        model = source.adapted(path, &model, adapter, args.other_base)?;
    }
    let mut scores = Vec::new();
    for task in tasks {
        let TaskData::Tokens(data) = &task.data else { continue };
        let bar = bar(context, &task.name);
        let loss = lm::evaluate(&model, &data.tokens, data.limit, &mut |done, all| {
            bar.set_message(format!("{}: {done} of {all} tokens", task.name));
            unless_stopped(stop, "nothing was written")
        })?;
        bar.finish_and_clear();
        scores.push(Score::of_text(loss));
    }
    Ok(scores)
}
