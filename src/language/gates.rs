//! Training the gates of FoldGPT, which tell what each block is worth.

use super::data::{Data, Part};
use crate::error::{Error, Result};
use crate::models::foldgpt::Gated;
use crate::models::lm::Lm;
use crate::nn::Module;
use crate::optim::{AdamW, AdamWConfig, Group, LossScale};
use crate::precision::{Precision, autocast};
use crate::rng::Rng;
use crate::setters::setters;
use crate::train::{Report, Trainer, same_settings};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// How gates are trained.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GateOptions {
    /// Steps of one window each.
    pub steps: u64,
    /// Blocks whose gates are driven to 0.
    pub removed: usize,
    /// How products and activations are stored.
    pub precision: Precision,
    /// Start of the random numbers that choose windows.
    pub seed: u64,
}

setters!(GateOptions { steps: u64, removed: usize, precision: Precision, seed: u64 });

impl Default for GateOptions {
    /// 60 steps, after which one block is told from the rest.
    fn default() -> GateOptions {
        GateOptions { steps: 60, removed: 1, precision: Precision::F32, seed: 1 }
    }
}

/// A run that trains a gate for each block of a model, whose weights rest: cross-entropy plus a [penalty](Gated::penalty) that drives
/// gates to 0 or 1 with [`GateOptions::removed`] of them near 0.
///
/// ```
/// # use tiebeam::{Gpu, Rng};
/// # let gpu = Gpu::open()?;
/// use tiebeam::language::{Corpus, GateOptions, GateTraining};
/// use tiebeam::models::{foldgpt::ranking, lm::{Lm, LmConfig}};
/// let config = LmConfig::small().vocab(5).width(16).heads(2).kv_heads(2).hidden(32).context(8).depth(3);
/// let model = Lm::new(&gpu, config, &mut Rng::new(1));
/// let corpus = Corpus::new((0..500).map(|i| i * i % 5).collect(), 5)?;
/// let mut training = GateTraining::new(&model, &corpus, GateOptions::default().steps(4))?;
/// let gates = training.run(None, &mut |_report| Ok(()))?.expect("nothing stopped it");
/// let least = ranking(&gates)[0];
/// assert!(least < 3 && gates[least] < 1.0);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct GateTraining<'a> {
    gated: Gated,
    data: &'a dyn Data,
    options: GateOptions,
    trainer: Trainer,
    said: BTreeMap<String, String>,
}

impl<'a> GateTraining<'a> {
    /// Begins a run with gates of 1.
    ///
    /// # Errors
    /// [`Error::Config`] when no block would remain or the text is too short; when the device fails.
    pub fn new(model: &Lm, data: &'a dyn Data, options: GateOptions) -> Result<GateTraining<'a>> {
        let (depth, removed) = (model.blocks.len(), options.removed);
        if removed >= depth {
            return Err(Error::config(format!(
                "{removed} of {depth} blocks are to be removed; one must remain"
            )));
        }
        data.check(&model.config)?;
        let mut resting = model.clone();
        resting.freeze(|_| true);
        let gated = Gated::new(resting);
        let gpu = model.gpu();
        let group = Group::new(gated.parameters().trainable());
        let optimizer = AdamW::new(gpu, vec![group], AdamWConfig::default().lr(RATE))?;
        let trainer = Trainer::new(optimizer)
            .scale(LossScale::of(gpu, options.precision)?)
            .rng(Rng::new(options.seed))
            .total(options.steps);
        Ok(GateTraining { gated, data, options, trainer, said: BTreeMap::new() })
    }

    /// Sets a flag that ends the run after the present step once it is true.
    #[must_use]
    pub fn stop(self, flag: Arc<AtomicBool>) -> GateTraining<'a> {
        GateTraining { trainer: self.trainer.stop(flag), ..self }
    }

    /// Adds what else must be the same when the run goes on, such as the model's name.
    #[must_use]
    pub fn say(mut self, name: &str, value: impl std::fmt::Display) -> GateTraining<'a> {
        self.said.insert(format!("gates.{name}"), value.to_string());
        self
    }

    /// Steps so far.
    pub fn step(&self) -> u64 {
        self.trainer.step()
    }

    fn settings(&self) -> BTreeMap<String, String> {
        let o = &self.options;
        let own = [
            ("steps", o.steps.to_string()),
            ("removed", o.removed.to_string()),
            ("precision", o.precision.to_string()),
            ("seed", o.seed.to_string()),
            ("data", format!("{:032x}", self.data.id())),
        ];
        let mut all = self.gated.model.config.metadata();
        all.extend(own.map(|(name, value)| (format!("gates.{name}"), value)));
        all.extend(self.said.clone());
        all
    }

    /// Goes on from a checkpoint that [`GateTraining::run`] wrote.
    ///
    /// # Errors
    /// [`Error::Format`] for a checkpoint of another model, text or options, with what differs; when it cannot be read.
    pub fn resume(&mut self, checkpoint: &Path) -> Result<()> {
        let settings = self.settings();
        self.trainer
            .load_if(checkpoint, &self.gated.gates, |found| same_settings(checkpoint, found, &settings))?;
        Ok(())
    }

    /// Trains to the last step, and returns the gates within 0 and 1, or `None` if the flag of [`GateTraining::stop`] ended it before.
    /// `checkpoint` is written every few steps and in both cases.
    ///
    /// # Errors
    /// What `on` returns; when a file cannot be written or the device fails.
    pub fn run(
        &mut self,
        checkpoint: Option<&Path>,
        on: &mut dyn FnMut(&Report) -> Result<()>,
    ) -> Result<Option<Vec<f32>>> {
        let (gated, data, options) = (&self.gated, self.data, self.options);
        let (gpu, depth) = (gated.model.gpu(), gated.gates.len() as f32);
        let keep = (depth - options.removed as f32) / depth;
        let loss = |step, rng: &mut Rng| {
            let sizes = [1, gated.model.config.context];
            let Part { tokens, targets, .. } = data.batch(gpu, sizes, (1, 0..1), step, rng).swap_remove(0);
            let loss = autocast(options.precision, || gated.forward(&tokens).cross_entropy(&targets, None));
            Ok(loss.add(&gated.penalty(POLARISATION, 1.0, keep)))
        };
        let settings = self.settings();
        while self.trainer.step() < options.steps {
            let to = (self.trainer.step() + EVERY).min(options.steps);
            let done = self.trainer.train(to, loss, &mut *on)?;
            if let Some(path) = checkpoint {
                self.trainer.save_with(path, &gated.gates, &settings)?;
            }
            if !done {
                return Ok(None);
            }
        }
        gated.values().map(Some)
    }
}

/// Steps between checkpoints.
const EVERY: u64 = 10;
/// Gates move from 1 to 0 within some 50 steps at this rate.
const RATE: f32 = 0.02;
/// The weight of the polarisation beside a loss of some nats.
const POLARISATION: f32 = 0.5;
