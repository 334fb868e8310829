//! Aligns the models of a merge: each is permuted towards the target model when it is read.

use super::config::Align;
use super::job::Job;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::merge::align::matching::{MatchOptions, Matching, Visit, match_weights_with};
use crate::merge::align::spec::Spec;
use std::ops::ControlFlow;
use std::path::Path;

/// The matchings of a [`Job`]'s models.
#[derive(Clone, Debug)]
pub struct Aligned {
    /// One per model. `None` for the target, and for Fisher diagonals, which are permuted as their models.
    pub matchings: Vec<Option<Matching>>,
    /// Per model, the index of the matching that it is read through.
    through: Vec<Option<usize>>,
}

impl Job {
    /// Matches every model to the target of `align`. Calls `watch` with the model's path after each visit; an error of `watch`
    /// ends the search.
    ///
    /// # Errors
    /// When spec and models do not fit, a weight is NaN or infinite, or a file or the device fails, and the errors of `watch`.
    pub fn align(
        &self,
        gpu: &Gpu,
        align: &Align,
        watch: &mut dyn FnMut(&Path, &Visit) -> Result<()>,
    ) -> Result<Aligned> {
        self.check()?;
        let target = match &align.target {
            None => 0,
            Some(path) => self.models.iter().position(|m| m.path == *path).ok_or_else(|| {
                Error::config(format!("align.target: {} is none of the models", path.display()))
            })?,
        };
        let spec = Spec::named(&align.spec, &self.models[target].checkpoint)?;
        let mut through: Vec<Option<usize>> = (0..self.models.len()).map(Some).collect();
        for output in &self.outputs {
            for (fisher, model) in output.fishers.iter().zip(&output.models) {
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
        let a = &self.models[target].checkpoint;
        let mut matchings = Vec::new();
        for (i, model) in self.models.iter().enumerate() {
            if i == target || through[i] != Some(i) {
                matchings.push(None);
                continue;
            }
            let mut stopped = Ok(());
            let matching = match_weights_with(gpu, &spec, a, &model.checkpoint, &options, &mut |visit| {
                stopped = watch(&model.path, visit);
                if stopped.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
            stopped?;
            matchings.push(Some(matching));
        }
        through.iter_mut().for_each(|t| *t = t.filter(|&t| matchings[t].is_some()));
        Ok(Aligned { matchings, through })
    }
}

impl Aligned {
    /// Returns the models of `job`, aligned.
    pub fn sources<'a>(&'a self, job: &'a Job) -> Vec<Box<dyn Weights + 'a>> {
        let one = |(model, through): (&'a super::job::Model, &Option<usize>)| {
            let matching = through.and_then(|i| self.matchings[i].as_ref());
            match matching {
                Some(matching) => Box::new(matching.permuted(&model.checkpoint)) as Box<dyn Weights + 'a>,
                None => Box::new(&model.checkpoint),
            }
        };
        job.models.iter().zip(&self.through).map(one).collect()
    }
}
