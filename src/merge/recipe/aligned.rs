//! Aligns the models of a merge: each is permuted towards the target model when it is read.

use super::config::Align;
use super::job::{Job, Model};
use super::method::Method;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::align::activations::{ActivationMatch, Similarity};
use crate::merge::align::matching::{MatchOptions, Matching, match_weights_with};
use crate::merge::align::networks::match_activations;
use crate::merge::align::permutation::Permutation;
use crate::merge::align::spec::Spec;
use crate::merge::evaluation::barrier::distance;
use crate::merge::{Architecture, Weights};
use crate::models::network::Network;
use crate::tensor::Tensor;
use std::ops::ControlFlow;
use std::path::Path;

/// How a model is aligned.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Found {
    /// The permutation of the model.
    pub permutation: Permutation,
    /// `||a - b||` before.
    pub distance_before: f64,
    /// `||a - pi(b)||`.
    pub distance: f64,
    /// Rounds of the search; none for activations, whose groups do not depend on each other.
    pub sweeps: usize,
    /// Whether every assignment is proved to be the best.
    pub exact: bool,
    /// The mean similarity of matched units, if they were matched by activations.
    pub similarity: Option<f64>,
}

impl Found {
    fn of_weights(matching: Matching) -> Found {
        Found {
            permutation: matching.permutation,
            distance_before: matching.distance_before,
            distance: matching.distance,
            sweeps: matching.sweeps,
            exact: matching.exact,
            similarity: None,
        }
    }

    fn of_activations(gpu: &Gpu, a: &dyn Weights, b: &dyn Weights, found: ActivationMatch) -> Result<Found> {
        let moved = distance(gpu, a, &found.permutation.permuted(&b))?;
        let units: Vec<f64> = found.agreement.values().flatten().copied().collect();
        let mean = units.iter().sum::<f64>() / units.len().max(1) as f64;
        let most = found.values.values().fold(0.0f64, |most, value| most.max(value.abs()));
        Ok(Found {
            distance_before: distance(gpu, a, b)?,
            distance: moved,
            sweeps: 0,
            exact: found.gap <= 1e-9 * most,
            similarity: Some(mean),
            permutation: found.permutation,
        })
    }
}

/// The matchings of a [`Job`]'s models.
#[derive(Clone, Debug)]
pub struct Aligned {
    /// One per model. `None` for the target, and for Fisher diagonals, which are permuted as their models.
    pub matchings: Vec<Option<Found>>,
    /// Per model, the index of the matching that it is read through.
    through: Vec<Option<usize>>,
}

impl Job {
    /// Matches every model to the target of `align`. Calls `watch` with the model's path and what was done, again and again; an error
    /// of `watch` ends the search.
    ///
    /// # Errors
    /// When spec and models do not fit, a weight is NaN or infinite, or a file or the device fails, and the errors of `watch`.
    pub fn align(
        &self,
        gpu: &Gpu,
        align: &Align,
        watch: &mut dyn FnMut(&Path, &str) -> Result<()>,
    ) -> Result<Aligned> {
        self.check()?;
        if self.config.method == Method::Signature {
            return Err(Error::config(
                "align: a signature's models are compared with the clean and the pretrained model, and are not moved; align them first",
            ));
        }
        let target = match &align.target {
            None => 0,
            Some(path) => self.models.iter().position(|m| m.path == *path).ok_or_else(|| {
                Error::config(format!("align.target: {} is none of the models", path.display()))
            })?,
        };
        let lead = &*self.models[target].checkpoint;
        let spec = match (align.spec.as_str(), self.network()?) {
            ("network", Some(network)) => Spec::network(lead, &network)?,
            (name, _) => Spec::named(name, lead)?,
        };
        let mut through: Vec<Option<usize>> = (0..self.models.len()).map(Some).collect();
        for output in &self.outputs {
            for (fisher, model) in output.others.iter().zip(&output.models) {
                let own = through[fisher.model].filter(|&of| of != fisher.model);
                if own.is_some_and(|of| of != model.model) {
                    return Err(Error::config(format!(
                        "align: {} holds the Fisher diagonals of two models, which are moved apart; give each a file",
                        self.models[fisher.model].path.display()
                    )));
                }
                through[fisher.model] = Some(model.model);
            }
        }
        let options = MatchOptions {
            seed: align.seed,
            runs: align.restarts + 1,
            // As much as the merge itself will need.
            cache_bytes: self.memory(),
            ..MatchOptions::default()
        };
        let a = &self.models[target];
        let by_activations = match align.by_activations {
            true => Some(self.activations(gpu, a)?),
            false => None,
        };
        let mut matchings = Vec::new();
        for (i, model) in self.models.iter().enumerate() {
            if i == target || through[i] != Some(i) {
                matchings.push(None);
                continue;
            }
            if let Some((network, inputs)) = &by_activations {
                let found = match_activations(
                    gpu,
                    network,
                    &spec,
                    [a, model],
                    inputs,
                    Similarity::InnerProduct,
                    &mut |done, all| watch(&model.path, &format!("{done} of {all} rows")),
                )?;
                matchings.push(Some(Found::of_activations(gpu, a, model, found)?));
                continue;
            }
            let mut stopped = Ok(());
            let matching = match_weights_with(gpu, &spec, a, model, &options, &mut |visit| {
                let (run, sweep, group) = (visit.run + 1, visit.sweep + 1, &visit.group);
                stopped = watch(&model.path, &format!("run {run}, sweep {sweep}, {group}"));
                if stopped.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
            stopped?;
            matchings.push(Some(Found::of_weights(matching)));
        }
        through.iter_mut().for_each(|t| *t = t.filter(|&t| matchings[t].is_some()));
        Ok(Aligned { matchings, through })
    }
}

impl Job {
    /// The network whose activations are compared, and the inputs of the tasks of `learn`.
    fn activations(&self, gpu: &Gpu, a: &Model) -> Result<(Network, Tensor)> {
        let Architecture::Network(network) =
            Architecture::open(gpu, &a.checkpoint, self.network()?.as_ref())?
        else {
            return Err(Error::config(
                "align: language models are not matched by activations; only networks are",
            ));
        };
        let inputs = super::learn::inputs_of(&self.learning_tasks(gpu)?)?;
        network.output(a, inputs.shape())?;
        Ok((network, inputs))
    }
}

impl Aligned {
    /// Returns the models of `job`, aligned.
    pub fn sources<'a>(&'a self, job: &'a Job) -> Vec<Box<dyn Weights + 'a>> {
        let one = |(model, through): (&'a Model, &Option<usize>)| {
            let matching = through.and_then(|i| self.matchings[i].as_ref());
            match matching {
                Some(found) => Box::new(found.permutation.permuted(model)) as Box<dyn Weights + 'a>,
                None => Box::new(model),
            }
        };
        job.models.iter().zip(&self.through).map(one).collect()
    }
}
