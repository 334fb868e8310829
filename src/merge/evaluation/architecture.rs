//! How a model computes: which function of its weights it is. The function runs on any [`Weights`], such as means of models, weights
//! that are still to be written, and weights that are computed from coefficients and tracked.

use super::barrier::Evaluation;
use super::evaluate::{Labelled, Score, Task, TaskData, Tokens};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::models::llama::Published;
use crate::models::lm::{Lm, LmConfig, Saved, evaluate};
use crate::models::network::{NETWORK, Network};
use crate::nn::functional;
use crate::store::Shards;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::path::Path;

/// The function that a model's weights belong to.
#[derive(Clone)]
#[non_exhaustive]
pub enum Architecture {
    /// A network that classifies.
    Network(Network),
    /// A language model with the names of Hugging Face's Llama models.
    Llama(Box<LmConfig>),
    /// A language model with our own names.
    Lm(Box<Lm>),
}

impl Architecture {
    /// Finds the architecture of a model on disk. A folder of Hugging Face's has it in its `config.json`, a language model of ours in
    /// its file. Others are networks: as `network` or a `network.json` beside the weights describes them, or known by their names.
    ///
    /// # Errors
    /// When it is none of these, or a file cannot be read; the message says what is missing.
    pub fn open(gpu: &Gpu, model: &Shards, network: Option<&Network>) -> Result<Architecture> {
        let folder = model.path().parent().unwrap_or(Path::new("."));
        let described = folder.join(NETWORK);
        if let Some(network) = network {
            return Ok(Architecture::Network(network.clone()));
        }
        if Saved::is_at(model.path()) {
            return Ok(Architecture::Lm(Box::new(Saved::open(model.path())?.load(gpu)?)));
        }
        if described.is_file() {
            return Ok(Architecture::Network(Network::read(described)?));
        }
        if model.contains("model.embed_tokens.weight") {
            let published = Published::open(folder)?;
            if let Some(packing) = published.packing() {
                return Err(Error::config(format!(
                    "{}: its weights are packed ({packing}), and are evaluated by `tiebeam evaluate` alone",
                    folder.display()
                )));
            }
            return Ok(Architecture::Llama(Box::new(published.config().clone())));
        }
        Network::of(model).map(Architecture::Network)
    }

    /// Checks that weights of these shapes can be scored on a task.
    ///
    /// # Errors
    /// When the task is for another kind of model, or its rows, labels or tokens do not fit.
    pub fn check(&self, weights: &dyn Weights, task: &Task) -> Result<()> {
        let of_task = |message: String| Error::config(format!("task `{}`: {message}", task.name));
        let wrong = |message: String| Err(of_task(message));
        match (self, &task.data) {
            (Architecture::Network(network), TaskData::Labelled(data)) => {
                let output = network.output(weights, data.inputs.shape());
                let output = output.map_err(|error| of_task(error.to_string()))?;
                let &[_, classes] = &output[..] else {
                    return wrong(format!("the network gives {output:?}; [rows, classes] is needed"));
                };
                let range = data.outputs.clone().unwrap_or(0..classes);
                if range.is_empty() || range.end > classes {
                    return wrong(format!("outputs {range:?} of {classes}"));
                }
                match data.labels.iter().position(|&label| label as usize >= range.len()) {
                    None => Ok(()),
                    Some(row) => wrong(format!(
                        "label {} of row {row} is none of the network's {}",
                        data.labels[row],
                        range.len()
                    )),
                }
            }
            (Architecture::Llama(_) | Architecture::Lm(_), TaskData::Tokens(data)) => {
                let vocab = self.vocab();
                match data.tokens.iter().position(|&token| token as usize >= vocab) {
                    Some(at) => wrong(format!(
                        "token {} at {at} is none of the model's {vocab}; is this its tokenizer?",
                        data.tokens[at]
                    )),
                    None if data.limit == 0 || data.context == 0 || data.tokens.len() < 2 => {
                        wrong("there are no tokens to predict".into())
                    }
                    None => Ok(()),
                }
            }
            (Architecture::Network(_), _) => {
                wrong("a text is for language models; a network needs `data`".into())
            }
            _ => wrong("labelled rows are for networks; a language model needs `text`".into()),
        }
    }

    fn vocab(&self) -> usize {
        match self {
            Architecture::Llama(config) => config.vocab,
            Architecture::Lm(model) => model.config.vocab,
            Architecture::Network(_) => 0,
        }
    }

    /// Scores weights on a task. `on` is told how many tokens have been scored of how many.
    ///
    /// # Errors
    /// As [`Architecture::check`]; when a tensor is missing, the loss is NaN or the device fails; what `on` returns.
    pub fn score(
        &self,
        gpu: &Gpu,
        weights: &dyn Weights,
        task: &Task,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Score> {
        let score = self.score_any(gpu, weights, task, on)?;
        match score.loss.is_finite() {
            true => Ok(score),
            false => Err(no_number(&task.name, "loss", score.loss)),
        }
    }

    /// [`Architecture::score`], whose loss may be NaN or infinite.
    pub(in crate::merge) fn score_any(
        &self,
        gpu: &Gpu,
        weights: &dyn Weights,
        task: &Task,
        on: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Score> {
        self.check(weights, task)?;
        Ok(match &task.data {
            TaskData::Labelled(data) => Score::from(self.evaluation(gpu, weights, data)?),
            TaskData::Tokens(data) => {
                let run = |model: &Lm| evaluate(model, &data.tokens, data.limit, on);
                Score::of_text(self.with_model(gpu, weights, data.context, run)??)
            }
        })
    }

    /// Loss, accuracy and best temperature of a network on labelled rows.
    ///
    /// # Errors
    /// When the weights do not fit the rows or are no network's, or the device fails.
    pub fn evaluation(&self, gpu: &Gpu, weights: &dyn Weights, data: &Labelled) -> Result<Evaluation> {
        let Architecture::Network(network) = self else {
            return Err(Error::config("a language model is not evaluated on labelled rows"));
        };
        let logits = no_grad(|| network.logits(gpu, weights, &data.inputs))?;
        Evaluation::of(&data.classes(logits), &data.labels)
    }

    /// Runs a language model on these weights, with windows of up to `context` tokens.
    pub(in crate::merge) fn with_model<T>(
        &self,
        gpu: &Gpu,
        weights: &dyn Weights,
        context: usize,
        run: impl FnOnce(&Lm) -> T,
    ) -> Result<T> {
        match self {
            Architecture::Llama(config) => {
                let config = (**config).clone().context(config.context.min(context));
                Ok(run(&Lm::from_weights(gpu, weights, config)?))
            }
            Architecture::Lm(model) => {
                let mut model = match model.config.has_learned_positions() || context >= model.config.context
                {
                    true => (**model).clone(),
                    false => model.with_context(context)?,
                };
                functional(&mut model, weights, run)
            }
            Architecture::Network(_) => Err(Error::config("a network is no language model")),
        }
    }

    /// Number of units that [`Architecture::scores`] takes by index: rows, or windows of a text.
    pub fn samples(&self, task: &Task) -> usize {
        match &task.data {
            TaskData::Labelled(data) => data.rows(),
            TaskData::Tokens(data) => data.scored() / self.window(data),
        }
    }

    /// Tokens of a window of [`Architecture::scores`]: all that are scored, if these are fewer than a context.
    fn window(&self, data: &Tokens) -> usize {
        let most = match self {
            Architecture::Llama(config) => config.context,
            Architecture::Lm(model) => model.config.context,
            Architecture::Network(_) => data.context,
        };
        most.min(data.context).min(data.scored()).max(1)
    }

    /// Scores `[rows, classes]` of some samples and their targets `[rows]`, tracked from `weights`: rows of a network, or the tokens of
    /// whole windows of a language model.
    ///
    /// # Errors
    /// As [`Architecture::check`], or when the device fails.
    ///
    /// # Panics
    /// When an index is not below [`Architecture::samples`].
    pub fn scores(
        &self,
        gpu: &Gpu,
        weights: &dyn Weights,
        task: &Task,
        samples: &[u32],
    ) -> Result<(Tensor, Vec<u32>)> {
        match (&task.data, self) {
            (TaskData::Labelled(data), Architecture::Network(network)) => {
                let rows = Tensor::from_slice(gpu, samples, [samples.len()]);
                let logits = network.run(gpu, weights, &data.inputs.index_select(0, &rows), &mut |_| None)?;
                let labels = samples.iter().map(|&row| data.labels[row as usize]).collect();
                Ok((data.classes(logits), labels))
            }
            (TaskData::Tokens(data), Architecture::Llama(_) | Architecture::Lm(_)) => {
                let length = self.window(data);
                let part = |from: usize| -> Vec<u32> {
                    let window = |&w: &u32| &data.tokens[w as usize * length + from..][..length];
                    samples.iter().flat_map(window).copied().collect()
                };
                let (inputs, targets) = (part(0), part(1));
                let x = Tensor::from_slice(gpu, &inputs, [samples.len(), length]);
                let logits = self.with_model(gpu, weights, length, |model| model.forward(&x))?;
                Ok((logits.reshape([targets.len(), self.vocab()]), targets))
            }
            _ => self.check(weights, task).and(Err(Error::config("no samples of such a task"))),
        }
    }
}

impl Tokens {
    /// Number of tokens that are scored.
    fn scored(&self) -> usize {
        self.tokens.len().saturating_sub(1).min(self.limit)
    }
}

/// A score of a task that is NaN or infinite.
pub(in crate::merge) fn no_number(task: &str, what: &str, value: f64) -> Error {
    Error::config(format!(
        "task `{task}`: the {what} is {value}; the model's weights or the task's inputs are no numbers"
    ))
}
