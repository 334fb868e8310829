//! What models are scored on: labelled rows, and texts.

use super::barrier::Evaluation;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::store::File;
use crate::tensor::Tensor;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Inputs and labels.
#[derive(Clone, Debug)]
pub struct Labelled {
    /// `[rows, ..]`
    pub inputs: Tensor,
    /// `[rows]`. A label counts from the first of `outputs`.
    pub labels: Vec<u32>,
    /// The outputs of the network that are this task's classes. `None` is all.
    pub outputs: Option<Range<usize>>,
}

/// Tokens of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// How many are scored at most, from the first one on.
    pub limit: usize,
    /// Tokens of a window, each of which is predicted by itself.
    pub context: usize,
}

/// The data of a task.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum TaskData {
    /// For networks that classify.
    Labelled(Labelled),
    /// For language models.
    Tokens(Tokens),
}

/// Something that a model is scored on.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its name in tables.
    pub name: String,
    /// Its data.
    pub data: TaskData,
}

/// What a model reaches at a task.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Score {
    /// Mean loss in nats: of a row, or of a token.
    pub loss: f64,
    /// Fraction of correct predictions, for labelled rows.
    pub accuracy: Option<f64>,
}

impl Score {
    /// The mean loss of a text's tokens.
    pub fn of_text(loss: f64) -> Score {
        Score { loss, accuracy: None }
    }

    /// What is shown beside the loss: the accuracy, or for a text the perplexity `exp(loss)`.
    pub fn main(&self) -> f64 {
        self.accuracy.unwrap_or_else(|| self.loss.exp())
    }

    /// The name of [`Score::main`].
    pub fn main_name(&self) -> &'static str {
        if self.accuracy.is_some() { "accuracy" } else { "perplexity" }
    }

    /// What merges are compared by, of which more is better: the accuracy, or for a text the negated loss.
    pub fn merit(&self) -> f64 {
        self.accuracy.unwrap_or(-self.loss)
    }
}

impl From<Evaluation> for Score {
    fn from(evaluation: Evaluation) -> Score {
        Score { loss: evaluation.loss, accuracy: Some(evaluation.accuracy) }
    }
}

/// Where a task's data are, as a configuration or the command line says it.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TaskFile {
    /// The task's name, by default that of the file.
    pub name: Option<String>,
    /// The file.
    pub path: PathBuf,
    /// What it holds.
    pub kind: TaskKind,
}

/// What the file of a task holds.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TaskKind {
    /// A safetensors file with rows and labels.
    Labelled {
        /// Name of the inputs `[rows, ..]`. Integers are divided by their largest.
        inputs: String,
        /// Name of the labels `[rows]`.
        labels: String,
        /// The network's outputs that are the classes, by default all.
        outputs: Option<Range<usize>>,
    },
    /// A text.
    Text {
        /// How many tokens are scored at most.
        limit: usize,
        /// Tokens of a window, by default up to 512.
        context: Option<usize>,
    },
}

impl TaskFile {
    /// Rows `x` and labels `y` of a safetensors file.
    pub fn labelled(path: impl Into<PathBuf>) -> TaskFile {
        TaskFile::of(path, TaskKind::Labelled { inputs: "x".into(), labels: "y".into(), outputs: None })
    }

    /// Up to 16 384 tokens of a text.
    pub fn text(path: impl Into<PathBuf>) -> TaskFile {
        TaskFile::of(path, TaskKind::Text { limit: 16384, context: None })
    }

    /// A file of this kind.
    pub fn of(path: impl Into<PathBuf>, kind: TaskKind) -> TaskFile {
        TaskFile { name: None, path: path.into(), kind }
    }

    /// Sets the name.
    pub fn named(self, name: impl Into<String>) -> TaskFile {
        TaskFile { name: Some(name.into()), ..self }
    }

    /// Reads the task. `folder` has the tokenizer of a language model.
    ///
    /// # Errors
    /// When a file cannot be read, a name is missing in it, there is no row, or shapes or types do not fit; for a text without a
    /// tokenizer.
    pub fn open(&self, gpu: &Gpu, folder: &Path) -> Result<Task> {
        let stem = || self.path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into());
        let data = match &self.kind {
            TaskKind::Labelled { inputs, labels, outputs } => {
                let read = Labelled::open(gpu, &self.path, inputs, labels)?;
                TaskData::Labelled(Labelled { outputs: outputs.clone(), ..read })
            }
            TaskKind::Text { limit, context } => {
                let tokens = tokens_of(&self.path, folder)?;
                TaskData::Tokens(Tokens { tokens, limit: *limit, context: context.unwrap_or(512) })
            }
        };
        Ok(Task { name: self.name.clone().unwrap_or_else(stem), data })
    }
}

#[cfg(feature = "text")]
fn tokens_of(path: &Path, folder: &Path) -> Result<Vec<u32>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let words = crate::text::Words::open(folder).map_err(|error| {
        let place = folder.display();
        Error::config(format!(
            "{}: a text is for a language model, and {place} has no tokenizer ({error})",
            path.display()
        ))
    })?;
    let mut tokens: Vec<u32> = words.bos().into_iter().collect();
    tokens.extend(words.encode_plain(&text)?);
    match tokens.len() {
        0 | 1 => Err(Error::format(path, "the text has no tokens to predict")),
        _ => Ok(tokens),
    }
}

#[cfg(not(feature = "text"))]
fn tokens_of(path: &Path, _: &Path) -> Result<Vec<u32>> {
    Err(Error::config(format!("{}: texts are read with the feature `text`", path.display())))
}

/// Labelled rows as a file has them, on the host.
#[derive(Clone, Debug)]
pub struct Rows {
    /// Inputs, one row after the other.
    pub inputs: Vec<f32>,
    /// Their shape: `[rows, ..]`.
    pub shape: Vec<usize>,
    /// One for each row.
    pub labels: Vec<u32>,
}

impl Rows {
    /// Reads inputs `[rows, ..]` and labels `[rows]` by their names in a file. Inputs of an integer type are divided by their largest.
    ///
    /// # Errors
    /// When a name is missing, there is no row, or the shapes or types do not fit.
    pub fn open(path: impl AsRef<Path>, inputs: &str, labels: &str) -> Result<Rows> {
        let file = File::open(path.as_ref())?;
        let shape = file.info(inputs)?.shape.clone();
        let float = file.info(inputs)?.dtype.is_float();
        let values = if float {
            file.tensor_f32(inputs)?
        } else {
            let whole = file.tensor_u32(inputs)?;
            let most = whole.iter().copied().max().unwrap_or(0).max(1) as f32;
            whole.into_iter().map(|x| x as f32 / most).collect()
        };
        let wrong = |message: String| Error::format(file.path(), message);
        let rows = match shape[..] {
            [0, ..] => return Err(wrong(format!("`{inputs}` has no row"))),
            [rows, _, ..] => rows,
            _ => return Err(wrong(format!("`{inputs}` is {shape:?}; it must be [rows, width]"))),
        };
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(wrong(format!("`{inputs}` is {} at element {at}", values[at])));
        }
        file.expect(labels, &[rows])?;
        Ok(Rows { inputs: values, labels: file.tensor_u32(labels)?, shape })
    }
}

impl Labelled {
    /// [`Rows::open`], on the device.
    ///
    /// # Errors
    /// As [`Rows::open`].
    pub fn open(gpu: &Gpu, path: impl AsRef<Path>, inputs: &str, labels: &str) -> Result<Labelled> {
        let Rows { inputs, shape, labels } = Rows::open(path, inputs, labels)?;
        Ok(Labelled { inputs: Tensor::from_slice(gpu, &inputs, &shape[..]), labels, outputs: None })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.labels.len()
    }

    /// The outputs that are this task's classes.
    ///
    /// # Panics
    /// When there are fewer; [`Architecture::check`](super::architecture::Architecture::check) refuses that.
    pub(in crate::merge) fn classes(&self, logits: Tensor) -> Tensor {
        match &self.outputs {
            Some(range) => logits.slice(1, range.clone()),
            None => logits,
        }
    }
}

impl Task {
    /// Takes these outputs of a network for the task's classes. Labels count from the first of them.
    #[must_use]
    pub fn outputs(mut self, range: Range<usize>) -> Task {
        if let TaskData::Labelled(data) = &mut self.data {
            data.outputs = Some(range);
        }
        self
    }

    /// Labelled rows in memory.
    pub fn labelled(name: impl Into<String>, inputs: Tensor, labels: Vec<u32>) -> Task {
        Task { name: name.into(), data: TaskData::Labelled(Labelled { inputs, labels, outputs: None }) }
    }
}
