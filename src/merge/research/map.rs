//! MAP from end to end: merged models are scored at a few points, a surrogate of each task's metric is fitted to the scores, and a
//! search over the surrogates finds the front of trade-offs, of which some points are scored in turn.

use super::pareto::{Link, Point, Search, Surrogate, front, samples};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::merge::evaluation::architecture::Architecture;
use crate::merge::evaluation::evaluate::{Score, Task};
use crate::rng::Rng;
use crate::setters::setters;
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// The model `base + sum c_i (model_i - base)`. Each tensor is computed when it is read.
pub struct Combined<'a> {
    /// The model that the others were trained from.
    pub base: &'a dyn Weights,
    /// The others.
    pub models: &'a [&'a dyn Weights],
    /// A coefficient of each.
    pub coefficients: Vec<f64>,
}

impl Weights for Combined<'_> {
    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.base.shape(name)
    }

    fn is_float(&self, name: &str) -> bool {
        self.base.is_float(name)
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        let base = self.base.read(gpu, name)?;
        let mut sum = base.clone();
        for (model, &c) in self.models.iter().zip(&self.coefficients) {
            let x = model.read(gpu, name)?;
            if x.shape() != base.shape() {
                let message =
                    format!("`{name}` is {} in one model and {} in another", x.shape(), base.shape());
                return Err(Error::config(message));
            }
            sum = no_grad(|| sum.add(&x.sub(&base).scale(c as f32)));
        }
        Ok(sum)
    }
}

/// Settings of [`map`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct MapOptions {
    /// How many merged models the surrogates are fitted to.
    pub samples: usize,
    /// How the search goes, and within which bounds.
    pub search: Search,
    /// The link of all surrogates. `None` is the sigmoid for accuracies and the softplus for losses.
    pub link: Option<Link>,
    /// How many points of the front are scored.
    pub checks: usize,
    /// Seed of the points and the search.
    pub seed: u64,
}

setters!(MapOptions { samples: usize, search: Search, link: Option<Link>, checks: usize, seed: u64 });

impl Default for MapOptions {
    /// 30 models with coefficients from 0 to 1, of whose front 10 points are scored.
    fn default() -> MapOptions {
        let search = Search::default().bounds([0.0, 1.0]);
        MapOptions { samples: 30, search, link: None, checks: 10, seed: 0 }
    }
}

/// A scored model.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Scored {
    /// The coefficients of the task vectors.
    pub coefficients: Vec<f64>,
    /// What it reaches at each task.
    pub scores: Vec<Score>,
}

impl Scored {
    fn is_finite(&self) -> bool {
        self.scores.iter().all(|score| score.loss.is_finite())
    }

    /// Whether it is at least as good as another at every task, and better at one.
    fn is_over(&self, other: &Scored) -> bool {
        let pairs = || self.scores.iter().zip(&other.scores).map(|(a, b)| (a.merit(), b.merit()));
        pairs().all(|(a, b)| a >= b) && pairs().any(|(a, b)| a > b)
    }
}

/// What [`map`] found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Map {
    /// The models that the surrogates are fitted to.
    pub samples: Vec<Scored>,
    /// The surrogate of each task.
    pub surrogates: Vec<Surrogate>,
    /// The share of each task's variance over the samples that its surrogate explains.
    pub r_squared: Vec<f64>,
    /// The front by the surrogates, in the order of the first objective. Objectives are merits: more is better.
    pub front: Vec<Point>,
    /// Points of the front that were scored, with their scores.
    pub checked: Vec<Scored>,
}

impl Map {
    /// The scored models of which none is over another, in the order of the first task: the front as it was measured.
    pub fn measured(&self) -> Vec<&Scored> {
        let all: Vec<&Scored> = self.samples.iter().chain(&self.checked).collect();
        let mut front: Vec<&Scored> =
            all.iter().copied().filter(|one| !all.iter().any(|other| other.is_over(one))).collect();
        front.sort_by(|a, b| a.scores[0].merit().total_cmp(&b.scores[0].merit()));
        front
    }

    /// The scored model that is best for some weights of the tasks: the largest weighted sum of merits, each scaled to its range over all
    /// that was scored.
    ///
    /// # Errors
    /// When there is not one weight for each task.
    pub fn best(&self, preference: &[f64]) -> Result<&Scored> {
        let all = || self.samples.iter().chain(&self.checked);
        let tasks = self.surrogates.len();
        if preference.len() != tasks {
            return Err(Error::config(format!("map: {} preferences for {tasks} tasks", preference.len())));
        }
        check_preference(preference)?;
        let range = |t: usize| {
            let merits = all().map(|scored| scored.scores[t].merit());
            merits.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
        };
        let ranges: Vec<(f64, f64)> = (0..tasks).map(range).collect();
        let value = |scored: &Scored| -> f64 {
            let one = |(t, p): (usize, &f64)| {
                let (low, high) = ranges[t];
                p * (scored.scores[t].merit() - low) / (high - low).max(f64::MIN_POSITIVE)
            };
            preference.iter().enumerate().map(one).sum()
        };
        all()
            .max_by(|a, b| value(a).total_cmp(&value(b)))
            .ok_or_else(|| Error::config("map: nothing was scored"))
    }
}

/// Refuses weights of tasks that prefer nothing.
pub(in crate::merge) fn check_preference(preference: &[f64]) -> Result<()> {
    let is_fine =
        preference.iter().all(|p| *p >= 0.0 && p.is_finite()) && preference.iter().any(|p| *p > 0.0);
    match is_fine {
        true => Ok(()),
        false => Err(Error::config(format!(
            "map: the preference {preference:?} must be numbers from 0 on, one of them above"
        ))),
    }
}

/// Called with how many models were scored of how many.
pub type On<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// Scores merged models, fits a quadratic surrogate in the coefficients to each task's metric, and searches for the front.
///
/// Source: Li et al., arXiv 2406.07529.
///
/// # Errors
/// When models and tasks do not fit, a score is NaN, there are too few samples for the surrogates, or the device fails; what `on`
/// returns.
pub fn map(
    gpu: &Gpu,
    architecture: &Architecture,
    base: &dyn Weights,
    models: &[&dyn Weights],
    tasks: &[Task],
    options: &MapOptions,
    on: &mut On,
) -> Result<Map> {
    if tasks.len() < 2 {
        return Err(Error::config("map: trade-offs are between two tasks or more"));
    }
    let k = models.len();
    let least = (k + 1) * (k + 2) / 2;
    if options.samples < least {
        return Err(Error::config(format!(
            "map: surrogates of {k} coefficients need {least} samples or more, not {}",
            options.samples
        )));
    }
    let all = options.samples + options.checks;
    let scored = |coefficients: Vec<f64>, done: usize, on: &mut On| -> Result<Scored> {
        let model = Combined { base, models, coefficients };
        let mut scores = Vec::new();
        for task in tasks {
            scores.push(architecture.score_any(gpu, &model, task, &mut |_, _| on(done, all))?);
        }
        on(done + 1, all)?;
        Ok(Scored { coefficients: model.coefficients, scores })
    };
    let mut rng = Rng::new(options.seed);
    let points = samples(k, options.samples, options.search.bounds, &mut rng);
    let mut measured =
        points.into_iter().enumerate().map(|(i, c)| scored(c, i, on)).collect::<Result<Vec<Scored>>>()?;
    // Coefficients that break a model say nothing of a surrogate.
    measured.retain(Scored::is_finite);
    let points: Vec<Vec<f64>> = measured.iter().map(|one| one.coefficients.clone()).collect();
    if points.len() < least {
        return Err(Error::config(format!(
            "map: {} of {} merged models have scores that are numbers, and surrogates need {least}; narrow `low` and `high`",
            points.len(),
            options.samples
        )));
    }
    let metric = |score: &Score| score.accuracy.unwrap_or(score.loss);
    let (mut surrogates, mut r_squared) = (Vec::new(), Vec::new());
    for t in 0..tasks.len() {
        let values: Vec<f64> = measured.iter().map(|one| metric(&one.scores[t])).collect();
        let is_accuracy = measured[0].scores[t].accuracy.is_some();
        let link = options.link.unwrap_or(if is_accuracy { Link::Sigmoid } else { Link::Softplus });
        let surrogate = Surrogate::fit(&points, &values, link)?;
        r_squared.push(surrogate.r_squared(&points, &values));
        surrogates.push(surrogate);
    }
    let is_loss: Vec<bool> = measured[0].scores.iter().map(|score| score.accuracy.is_none()).collect();
    let objectives = |c: &[f64]| -> Vec<f64> {
        let one = |(surrogate, is_loss): (&Surrogate, &bool)| {
            let value = surrogate.value(c);
            if *is_loss { -value } else { value }
        };
        surrogates.iter().zip(&is_loss).map(one).collect()
    };
    let mut front = front(&objectives, k, &options.search, &mut rng, &mut |_| on(options.samples, all))?;
    front.sort_by(|a, b| a.objectives[0].total_cmp(&b.objectives[0]));
    let mut checked = spread(&front, options.checks)
        .into_iter()
        .enumerate()
        .map(|(i, c)| scored(c, options.samples + i, on))
        .collect::<Result<Vec<Scored>>>()?;
    checked.retain(Scored::is_finite);
    Ok(Map { samples: measured, surrogates, r_squared, front, checked })
}

/// Coefficients of some points, evenly spread over the front.
fn spread(front: &[Point], count: usize) -> Vec<Vec<f64>> {
    let count = count.min(front.len());
    let at = |i: usize| if count > 1 { i * (front.len() - 1) / (count - 1) } else { front.len() / 2 };
    (0..count).map(|i| front[at(i)].coefficients.clone()).collect()
}
