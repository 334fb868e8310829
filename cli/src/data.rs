//! The tasks that models are scored on, as the command line names them.

use crate::context::Context;
use clap::Args;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tiebeam::merge::evaluate::{Task, TaskFile, TaskKind};
use tiebeam::models::network::Network;
use tiebeam::{Error, Gpu, Result};

/// Options that name tasks.
#[derive(Args)]
pub struct Tasks {
    /// Labelled rows for a network: safetensors with x [rows, ..] and y [rows], as FILE or NAME=FILE; may be given several times
    #[arg(long, value_name = "[NAME=]FILE")]
    pub data: Vec<String>,
    /// A text for a language model, as FILE or NAME=FILE; may be given several times
    #[arg(long, value_name = "[NAME=]FILE")]
    pub text: Vec<String>,
    /// Name of the inputs in --data
    #[arg(long, default_value = "x")]
    pub inputs: String,
    /// Name of the labels in --data
    #[arg(long, default_value = "y")]
    pub labels: String,
    /// The network's outputs that are the classes of --data, as FIRST..END [default: all]
    #[arg(long, value_parser = range)]
    pub outputs: Option<Range<usize>>,
    /// Tokens of --text that are scored at most
    #[arg(long, default_value_t = 16384, value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens: u32,
    /// Tokens of a window of --text, each of which is predicted by itself
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
    /// A description of the network, as JSON [default: network.json beside the weights, or found by their names]
    #[arg(long)]
    pub network: Option<PathBuf>,
}

fn range(text: &str) -> Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(a, b)| Some(a.trim().parse().ok()?..b.trim().parse().ok()?));
    ends.filter(|range: &Range<usize>| !range.is_empty())
        .ok_or_else(|| "write FIRST..END, such as 0..5".into())
}

/// Splits NAME=FILE. A file that is there is a file, whatever its name.
fn named(text: &str) -> (Option<String>, PathBuf) {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !Path::new(text).exists() => {
            (Some(name.into()), path.into())
        }
        _ => (None, text.into()),
    }
}

impl Tasks {
    /// The tasks, in the order in which they are given: rows first.
    ///
    /// # Errors
    /// When there are none.
    pub fn files(&self) -> Result<Vec<TaskFile>> {
        let (context, limit) = (Some(self.context as usize), self.tokens as usize);
        let rows = TaskKind::Labelled {
            inputs: self.inputs.clone(),
            labels: self.labels.clone(),
            outputs: self.outputs.clone(),
        };
        let of = |all: &[String], kind: TaskKind| -> Vec<TaskFile> {
            let one = |text: &String| {
                let (name, path) = named(text);
                let file = TaskFile::of(path, kind.clone());
                match name {
                    Some(name) => file.named(name),
                    None => file,
                }
            };
            all.iter().map(one).collect()
        };
        let all = [of(&self.data, rows), of(&self.text, TaskKind::Text { limit, context })].concat();
        match all.is_empty() {
            true => Err(Error::config(
                "no task is named; give --data FILE for a network, --text FILE for a language model",
            )),
            false => Ok(all),
        }
    }

    /// Reads the tasks. `folder` has the tokenizer of a language model.
    pub fn open(&self, gpu: &Gpu, folder: &Path) -> Result<Vec<Task>> {
        self.files()?.iter().map(|file| file.open(gpu, folder)).collect()
    }

    /// The network that is described.
    pub fn network(&self) -> Result<Option<Network>> {
        self.network.as_ref().map(Network::read).transpose()
    }
}

/// Shows what is being scored. `text` says it.
pub fn bar(context: &Context, text: &str) -> indicatif::ProgressBar {
    let bar = context.bar(None, "{spinner} {elapsed} {wide_msg}");
    bar.set_message(text.to_string());
    bar
}
