//! Methods whose result is learned on data before it is written, and the search for the weights of others.

use super::config::{MergeConfig, Scalar, Search, Setting, Source};
use super::job::Job;
use super::method::{Arguments, Method};
use super::setting::{Limits, number};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::merge::cma::{CmaOptions, Found, maximise};
use crate::merge::evaluate::{Score, Task, TaskData};
use crate::merge::learn::{LearnOptions, Objective, learn};
use crate::merge::map::{Combined, Map, MapOptions, check_preference, map};
use crate::merge::pareto;
use crate::merge::partial::{PleasOptions, merge_networks};
use crate::merge::{Architecture, align::networks::repair_network};
use crate::models::network::Network;
use crate::tensor::Tensor;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What was learned, and how.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Learned {
    /// The tensors that are written.
    pub weights: BTreeMap<String, Tensor>,
    /// The steps that they belong to, if these are not the models' own.
    pub network: Option<Network>,
    /// What is worth knowing, one sentence each.
    pub notes: Vec<String>,
    /// The same for programs.
    pub record: Value,
}

impl Learned {
    /// Tensors that belong to the models' own steps.
    pub fn of(weights: BTreeMap<String, Tensor>, note: String, record: Value) -> Learned {
        Learned { weights, network: None, notes: vec![note], record }
    }
}

/// Called with what was done of how much, and a word about it.
pub type On<'a> = dyn FnMut(usize, usize, &str) -> Result<()> + 'a;

impl Job {
    /// The tasks that coefficients, weights and layers are learned on: those of the configuration's `learn`.
    ///
    /// # Errors
    /// As [`TaskFile::open`](crate::merge::evaluate::TaskFile::open).
    pub fn learning_tasks(&self, gpu: &Gpu) -> Result<Vec<Task>> {
        self.opened(gpu, self.config.learn.as_ref())
    }

    /// Learns what a method of [`Method::is_learned`] writes, from models in the order of [`Job::models`].
    ///
    /// # Errors
    /// When parameters are out of range, models and tasks do not fit, or the device fails; what `on` returns.
    pub fn learn(
        &self,
        gpu: &Gpu,
        sources: &[&dyn Weights],
        architecture: &Architecture,
        tasks: &[Task],
        on: &mut On,
    ) -> Result<Learned> {
        self.check()?;
        let models = self.merged_models(sources)?;
        match self.config.method {
            Method::Pleas => self.pleas(gpu, &models, architecture, tasks, on),
            Method::Atlas => self.atlas(gpu, sources[0], &models, architecture, tasks, on),
            Method::Map => self.map(gpu, sources, architecture, tasks, on),
            method => Err(Error::config(format!("`{}` learns nothing", method.name()))),
        }
    }

    /// The models besides the base, each once, in the order of the configuration.
    pub(super) fn merged_models<'a>(&self, sources: &[&'a dyn Weights]) -> Result<Vec<&'a dyn Weights>> {
        let [slice] = &self.config.slices[..] else {
            return Err(Error::config("slices: what is learned is learned for whole models"));
        };
        let named = slice.sources.iter().filter(|source| !self.config.is_base_only(source));
        let index =
            |path: &std::path::PathBuf| self.models.iter().position(|model| model.path == *path).unwrap_or(0);
        Ok(named.map(|source| sources[index(&source.model)]).collect())
    }

    /// A parameter that is one for all models and tensors.
    fn setting(&self, key: &str) -> Option<Scalar> {
        match self.config.parameters.get(key) {
            Some(Setting::Same(value)) => Some(value.clone()),
            _ => None,
        }
    }

    fn number(&self, key: &str, default: f64, limits: Limits) -> Result<f64> {
        number(key, self.setting(key), Some(default), limits)
    }

    pub(super) fn count(&self, key: &str, default: usize) -> Result<usize> {
        match self.number(key, default as f64, Limits::Whole)? as usize {
            0 if key != "seed" => Err(Error::config(format!("parameter `{key}` must be above 0"))),
            count => Ok(count),
        }
    }

    fn some_count(&self, key: &str) -> Result<Option<usize>> {
        self.setting(key).is_some().then(|| self.count(key, 1)).transpose()
    }

    fn word<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Result<T> {
        match self.setting(key) {
            None => Ok(words[0].1),
            Some(Scalar::Text(text)) if words.iter().any(|(word, _)| *word == text) => {
                Ok(words.iter().find(|(word, _)| *word == text).expect("one is it").1)
            }
            Some(other) => {
                let all: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                Err(Error::config(format!(
                    "parameter `{key}` must be one of {}, not {other}",
                    all.join(", ")
                )))
            }
        }
    }

    fn learn_options(&self) -> Result<LearnOptions> {
        let objectives = [
            ("supervised", Objective::Supervised),
            ("entropy", Objective::Entropy),
            ("information", Objective::Information),
            ("negate", Objective::Negate),
        ];
        let usual = LearnOptions::default();
        Ok(usual
            .objective(self.word("objective", &objectives)?)
            .steps(self.count("steps", usual.steps)?)
            .rate(self.number("rate", f64::from(usual.rate), Limits::Positive)? as f32)
            .batch(self.count("batch", usual.batch)?)
            .shots(self.some_count("shots")?)
            .parts(self.count("parts", usual.parts)?)
            .budget(self.some_count("budget")?)
            .control(self.number("control", usual.control, Limits::Share)?)
            .seed(self.count("seed", 0)? as u64))
    }

    fn map_options(&self) -> Result<MapOptions> {
        let links = [
            ("auto", None),
            ("sigmoid", Some(pareto::Link::Sigmoid)),
            ("softplus", Some(pareto::Link::Softplus)),
            ("identity", Some(pareto::Link::Identity)),
        ];
        let usual = MapOptions::default();
        let [low, high] = usual.search.bounds;
        let bounds = [self.number("low", low, Limits::Any)?, self.number("high", high, Limits::Any)?];
        if bounds[0] >= bounds[1] {
            return Err(Error::config(format!(
                "parameters `low` {} and `high` {}: low must be less",
                bounds[0], bounds[1]
            )));
        }
        let population = self.count("population", usual.search.population)?;
        if population < 4 || !population.is_multiple_of(2) {
            return Err(Error::config(format!(
                "parameter `population` is {population}; it must be even, and 4 or more"
            )));
        }
        let generations = self.count("generations", usual.search.generations)?;
        let search = usual.search.bounds(bounds).population(population).generations(generations);
        Ok(usual
            .samples(self.count("samples", usual.samples)?)
            .search(search)
            .link(self.word("link", &links)?)
            .seed(self.count("seed", 0)? as u64))
    }

    fn pleas_options(&self) -> Result<PleasOptions> {
        let usual = PleasOptions::default();
        Ok(usual
            .ratio(self.number("ratio", usual.ratio, Limits::Share)?)
            .ridge(self.number("ridge", usual.ridge, Limits::Positive)?)
            .separate_heads(self.word("heads", &[("merged", false), ("separate", true)])?)
            .by_activations(self.word("match", &[("weights", false), ("activations", true)])?))
    }

    /// The weights of the tasks, by which a point of the front is chosen.
    fn preference(&self, tasks: usize) -> Result<Vec<f64>> {
        let all = match self.config.parameters.get("preference") {
            None => vec![1.0; tasks],
            Some(Setting::Gradient(all)) => all.clone(),
            Some(_) => {
                return Err(Error::config("parameter `preference` must be a list, one number for each task"));
            }
        };
        check_preference(&all)?;
        match all.len() == tasks {
            true => Ok(all),
            false => Err(Error::config(format!("map: {} preferences for {tasks} tasks", all.len()))),
        }
    }

    /// Checks what a method that learns will ask for, before anything is opened: its parameters, and that the tasks' files are there.
    pub(super) fn check_learning(&mut self) -> Result<()> {
        match self.config.method {
            Method::Atlas => drop(self.learn_options()?),
            Method::Map => {
                self.map_options()?;
                self.preference(self.config.learn.as_ref().map_or(0, |learn| learn.tasks.len()))?;
            }
            Method::Pleas => drop(self.pleas_options()?),
            _ => {}
        }
        let tasks = [&self.config.learn, &self.config.evaluate];
        let tasks = tasks.into_iter().flatten().flat_map(|tasks| &tasks.tasks);
        let missing = tasks.filter(|task| !task.path.exists());
        let missing: Vec<String> =
            missing.map(|task| format!("{}: there is no such file of a task", task.path.display())).collect();
        self.problems.extend(missing);
        Ok(())
    }

    /// Where between two models a merge lies that is to be repaired, from 0 to 1. `None` if it is on no line between two.
    fn middle(&self) -> Option<f64> {
        let merged: Vec<&Arguments> =
            self.outputs.iter().filter_map(|output| output.arguments.as_ref()).collect();
        let first = merged.first().filter(|_| self.outputs.iter().all(|o| o.models.len() <= 2))?;
        let is_even = merged.iter().all(|own| own.weights == first.weights && own.t == first.t);
        match self.config.method {
            Method::Average => Some(0.5),
            Method::Linear | Method::NuSlerp | Method::MetricsWeighted if is_even => {
                match first.weights[..] {
                    [a, b] if a + b != 0.0 => Some(f64::from(b / (a + b))),
                    _ => None,
                }
            }
            Method::Slerp if is_even => Some(f64::from(first.t)),
            _ => None,
        }
    }

    fn atlas(
        &self,
        gpu: &Gpu,
        base: &dyn Weights,
        models: &[&dyn Weights],
        architecture: &Architecture,
        tasks: &[Task],
        on: &mut On,
    ) -> Result<Learned> {
        let options = self.learn_options()?;
        let learned = learn(gpu, architecture, base, models, tasks, &options, &mut |done, all, loss| {
            let word = if loss.is_nan() { "comparing".to_string() } else { format!("loss {loss:.4}") };
            on(done, all, &word)
        })?;
        let coefficients = learned.coefficients.to_vec::<f32>()?;
        let [first, last] =
            [learned.losses.first(), learned.losses.last()].map(|loss| loss.copied().unwrap_or(f64::NAN));
        let note = format!(
            "learned {} coefficients of {} task vectors: loss {first:.4} to {last:.4}; those of step {} are best on the data",
            coefficients.len(),
            models.len(),
            learned.best
        );
        let record = json!({
            "line": "learned", "method": "atlas", "coefficients": coefficients, "shape": learned.coefficients.shape().to_vec(),
            "tensors": learned.weights.keys().collect::<Vec<_>>(), "losses": learned.losses, "best_step": learned.best,
        });
        Ok(Learned { weights: learned.weights, network: None, notes: vec![note], record })
    }

    /// The front of trade-offs between the tasks: [`map`].
    ///
    /// # Errors
    /// As [`Job::learn`].
    pub fn front(
        &self,
        gpu: &Gpu,
        sources: &[&dyn Weights],
        architecture: &Architecture,
        tasks: &[Task],
        on: &mut On,
    ) -> Result<Map> {
        let options = self.map_options()?;
        let models = self.merged_models(sources)?;
        map(gpu, architecture, sources[0], &models, tasks, &options, &mut |done, all| {
            on(done, all, "models scored")
        })
    }

    fn map(
        &self,
        gpu: &Gpu,
        sources: &[&dyn Weights],
        architecture: &Architecture,
        tasks: &[Task],
        on: &mut On,
    ) -> Result<Learned> {
        let preference = self.preference(tasks.len())?;
        let found = self.front(gpu, sources, architecture, tasks, on)?;
        let coefficients = found.best(&preference)?.coefficients.clone();
        let models = self.merged_models(sources)?;
        let model = Combined { base: sources[0], models: &models, coefficients: coefficients.clone() };
        let weights = model.read_all(gpu)?;
        let text: Vec<String> = coefficients.iter().map(|c| format!("{c:.3}")).collect();
        let note = format!(
            "of {} models that were scored, the coefficients {} are best",
            found.samples.len() + found.checked.len(),
            text.join(", ")
        );
        let record = json!({"line": "learned", "method": "map", "coefficients": coefficients, "r_squared": found.r_squared});
        Ok(Learned { weights, network: None, notes: vec![note], record })
    }

    fn pleas(
        &self,
        gpu: &Gpu,
        models: &[&dyn Weights],
        architecture: &Architecture,
        tasks: &[Task],
        on: &mut On,
    ) -> Result<Learned> {
        let Architecture::Network(network) = architecture else {
            return Err(Error::config("pleas: language models are not merged in part; only networks are"));
        };
        let options = self.pleas_options()?;
        let inputs = inputs_of(tasks)?;
        let merged =
            merge_networks(gpu, network, [models[0], models[1]], &inputs, &options, &mut |done, all| {
                on(done, all, "rows")
            })?;
        let (pairs, apart) = merged.splits.values().fold((0, 0), |(all, apart), split| {
            (all + split.merged.len() + split.apart.len(), apart + split.apart.len())
        });
        let note = format!(
            "{apart} of {pairs} pairs of units are kept apart; {:.2} times the cost of one network",
            merged.flops
        );
        let record = json!({
            "line": "learned", "method": "pleas", "pairs": pairs, "apart": apart, "flops": merged.flops,
        });
        Ok(Learned { weights: merged.weights, network: Some(merged.network), notes: vec![note], record })
    }

    /// Searches for the weights of the models by what the merged model reaches on the tasks: the mean of their merits. Returns the
    /// weights, and a job with them.
    ///
    /// # Errors
    /// When the method has no weights, when models and tasks do not fit, or the device fails; what `on` returns.
    pub fn searched(
        &self,
        gpu: &Gpu,
        architecture: &Architecture,
        tasks: &[Task],
        search: &Search,
        on: &mut On,
    ) -> Result<(Found, Job)> {
        let [slice] = &self.config.slices[..] else {
            return Err(Error::config("search: the weights of whole models are searched for, not of slices"));
        };
        let options =
            CmaOptions::default().bounds(search.bounds).evaluations(search.evaluations).seed(search.seed);
        let own = slice.sources.iter().filter(|source| !self.config.is_base_only(source));
        let start: Vec<f64> = own.map(|source| start_of(source, search)).collect();
        let mut done = 0;
        let found = maximise(&start, &options, &mut |weights| {
            let job = self.weighted(weights)?;
            let merged = job.merged(gpu, &job.sources())?;
            let mut scores = Vec::new();
            for task in tasks {
                let word = format!("merges, scoring {}", task.name);
                let mut look = |_: usize, _: usize| on(done, search.evaluations, &word);
                scores.push(architecture.score_any(gpu, &merged, task, &mut look)?);
            }
            let merit = scores.iter().map(Score::merit).sum::<f64>() / scores.len() as f64;
            done += 1;
            on(done, search.evaluations, &format!("mean merit {merit:.4}"))?;
            // Of equal accuracies, the lower loss is better.
            Ok(merit - 1e-6 * scores.iter().map(|score| score.loss).sum::<f64>())
        })?;
        let job = self.weighted(&found.point)?;
        Ok((found, job))
    }

    /// This job with other weights of the models, which are not opened again.
    fn weighted(&self, weights: &[f64]) -> Result<Job> {
        let mut config: MergeConfig = self.config.clone();
        let base_only: Vec<bool> =
            config.slices[0].sources.iter().map(|source| self.config.is_base_only(source)).collect();
        let mut weights = weights.iter();
        for (source, is_base) in config.slices[0].sources.iter_mut().zip(base_only) {
            if let Some(&weight) = weights.as_slice().first().filter(|_| !is_base) {
                weights.next();
                source.parameters.insert("weight".into(), Setting::Same(Scalar::Number(weight)));
            }
        }
        let mut job = Job::on(self.models.clone(), config)?;
        job.part = self.part;
        Ok(job)
    }

    /// Repairs a merged network of two models on the inputs of the tasks.
    ///
    /// # Errors
    /// When the model is no network, more or fewer than two models were merged, and as [`repair_network`].
    pub fn repaired(
        &self,
        gpu: &Gpu,
        sources: &[&dyn Weights],
        architecture: &Architecture,
        merged: &dyn Weights,
        tasks: &[Task],
    ) -> Result<BTreeMap<String, Tensor>> {
        let Architecture::Network(network) = architecture else {
            return Err(Error::config("repair: language models are not repaired; only networks are"));
        };
        let all = self.merged_models(sources)?;
        let ends = match (&all[..], self.config.base.is_some()) {
            ([a, b], _) => [*a, *b],
            ([b], true) => [sources[0], *b],
            _ if network.batch_norms().is_empty() => {
                return Err(Error::config(format!(
                    "repair: a network without batch norms is repaired between two models, not {}",
                    all.len()
                )));
            }
            _ => [all[0], all[0]],
        };
        let t = match (network.batch_norms().is_empty(), self.middle()) {
            (false, _) => 0.5,
            (true, Some(t)) => t,
            (true, None) => {
                return Err(Error::config(
                    "repair: a network without batch norms is repaired where it lies on the line between two models: by average, linear, \
                     slerp or nuslerp with one weight for all tensors",
                ));
            }
        };
        repair_network(gpu, network, ends, t, merged, &inputs_of(tasks)?)
    }
}

/// The inputs of all tasks, one behind the other.
pub(super) fn inputs_of(tasks: &[Task]) -> Result<Tensor> {
    let one = |task: &Task| match &task.data {
        TaskData::Labelled(data) => Ok(data.inputs.clone()),
        _ => Err(Error::config(format!("task `{}`: a network needs `data`", task.name))),
    };
    let all = tasks.iter().map(one).collect::<Result<Vec<Tensor>>>()?;
    let (first, rest) = all.split_first().ok_or_else(|| Error::config("there is no task"))?;
    match rest.iter().all(|x| x.shape()[1..] == first.shape()[1..]) {
        true => Ok(Tensor::concat(&all.iter().collect::<Vec<_>>(), 0)),
        false => Err(Error::config("the tasks' inputs have different shapes")),
    }
}

/// The weight of a model at which a search starts.
fn start_of(source: &Source, search: &Search) -> f64 {
    match source.parameters.get("weight") {
        Some(Setting::Same(Scalar::Number(weight))) => *weight,
        _ => search.first(),
    }
}
