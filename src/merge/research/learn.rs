//! Trains the coefficients of [`Atlas`] through any model that is scored on tasks: what `merge_method: atlas` does.

use super::learned::Atlas;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::merge::evaluation::architecture::{Architecture, no_number};
use crate::merge::evaluation::evaluate::{Labelled, Score, Task, TaskData};
use crate::optim::{AdamW, AdamWConfig, Group, Schedule, clip_grad_norm};
use crate::rng::Rng;
use crate::setters::setters;
use crate::store::Tracked;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// What the coefficients are trained for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Objective {
    /// The loss at the labels or tokens of the data: task addition and few-shot learning.
    Supervised,
    /// The entropy of the predictions, without labels: adaptation at test time, as in AdaMerging (arXiv 2310.02575). It is least where
    /// everything is predicted to be one class, so it needs few steps and a small rate.
    Entropy,
    /// The entropy of the predictions minus that of their mean over the batch, without labels (Krause et al. 2010), which does not
    /// collapse into one class.
    Information,
    /// A high loss on the data beside a low one on a control task: task negation.
    Negate,
}

/// Settings of [`learn`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LearnOptions {
    /// What the coefficients are trained for.
    pub objective: Objective,
    /// Steps of the optimizer.
    pub steps: usize,
    /// Its rate at the first step, which falls to 0 by a cosine.
    pub rate: f32,
    /// Samples of each task in a step.
    pub batch: usize,
    /// Labelled rows of each class that are used, or all.
    pub shots: Option<usize>,
    /// Parts into which each tensor is divided at random, each with coefficients of its own.
    pub parts: usize,
    /// Task vectors of each tensor that are used: those with the largest gradients at the base. `None` is all.
    pub budget: Option<usize>,
    /// For [`Objective::Negate`], the share of the base's accuracy at the control task that must be kept. Of a text, the loss may grow by
    /// one over it.
    pub control: f64,
    /// Seed of the batches, the shots and the parts.
    pub seed: u64,
}

setters!(LearnOptions {
    objective: Objective,
    steps: usize,
    rate: f32,
    batch: usize,
    shots: Option<usize>,
    parts: usize,
    budget: Option<usize>,
    control: f64,
    seed: u64,
});

impl Default for LearnOptions {
    /// The authors' rate of 0.1 and batch of 128, for 200 steps; 0.95 of the control's merit.
    fn default() -> LearnOptions {
        LearnOptions {
            objective: Objective::Supervised,
            steps: 200,
            rate: 0.1,
            batch: 128,
            shots: None,
            parts: 1,
            budget: None,
            control: 0.95,
            seed: 0,
        }
    }
}

/// What was learned.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Learned {
    /// The model's tensors.
    pub weights: BTreeMap<String, Tensor>,
    /// The coefficients `[tasks, tensors, parts]`, with tensors in the order of names.
    pub coefficients: Tensor,
    /// The loss of every step.
    pub losses: Vec<f64>,
    /// The step after which the coefficients were best on the data, by which they are chosen. 0 is the base.
    pub best: usize,
}

/// Called with the step that was done, the number of all, and its loss.
pub type On<'a> = dyn FnMut(usize, usize, f64) -> Result<()> + 'a;

/// Weight decay of the coefficients, as the authors have it.
const DECAY: f32 = 0.1;

/// How often the coefficients are compared on all data.
const LOOKS: usize = 10;

/// Samples of each task by whose entropy coefficients are compared.
const LOOK: usize = 512;

/// Trains one coefficient for each task vector and tensor, with everything else frozen, by AdamW with gradients clipped to a norm
/// of 1. The coefficients that were best on the data at one of ten looks are taken, the base's among them. The model's own function
/// runs on `base + sum c tau`, so any [`Architecture`] can be learned through.
///
/// Source: Zhang et al., arXiv 2407.02880.
///
/// # Errors
/// When models and tasks do not fit, when a task has no row of some class and `shots` asks for some, when the loss is NaN or the
/// device fails; what `on` returns.
pub fn learn(
    gpu: &Gpu,
    architecture: &Architecture,
    base: &dyn Weights,
    models: &[&dyn Weights],
    tasks: &[Task],
    options: &LearnOptions,
    on: &mut On,
) -> Result<Learned> {
    let has_control = has_control(tasks, options)?;
    tasks.iter().try_for_each(|task| architecture.check(base, task))?;
    let mut rng = Rng::new(options.seed);
    let own = base.read_all(gpu)?;
    let others = models.iter().map(|model| model.read_all(gpu)).collect::<Result<Vec<_>>>()?;
    let mut atlas = Atlas::new(gpu, &own, &others, options.parts, &mut rng);
    drop(others);
    // Also what is chosen by is the few rows alone.
    let tasks =
        &tasks.iter().map(|task| few(gpu, task, options.shots, &mut rng)).collect::<Result<Vec<Task>>>()?;
    let mut pools: Vec<Pool> = tasks.iter().map(|task| pool(architecture, task, &mut rng)).collect();
    let looks = pools.iter().map(|pool| pool.samples[..pool.samples.len().min(LOOK)].to_vec()).collect();
    let run = Run { gpu, architecture, tasks, options, control: has_control, looks };
    if let Some(budget) = options.budget {
        let batches: Vec<Vec<u32>> =
            pools.iter_mut().map(|pool| pool.next(options.batch, &mut rng)).collect();
        let grads = run.loss(&atlas, &batches)?.backward()?;
        let gradient = grads.get(atlas.coefficients()).cloned();
        atlas = atlas.within(budget, gradient.as_ref())?;
    }
    let mut best = (
        run.merit(&atlas, f64::NEG_INFINITY, &mut || on(0, options.steps, f64::NAN))?,
        0,
        atlas.coefficients().to_vec::<f32>()?,
    );
    // A merit below 0 is a negated loss, of which so much more is allowed.
    let control = best.0.1;
    let floor = if control < 0.0 { control / options.control.max(1e-6) } else { control * options.control };
    let group = Group::new([("coefficients", atlas.coefficients())]).weight_decay(DECAY);
    let mut optimizer = AdamW::new(gpu, vec![group], AdamWConfig::default())?;
    let schedule = Schedule::WarmupCosine { warmup: 0, total: options.steps as u64, floor: 0.0 };
    let mut losses = Vec::new();
    let look = options.steps.div_ceil(LOOKS).max(1);
    for step in 0..options.steps {
        let batches: Vec<Vec<u32>> =
            pools.iter_mut().map(|pool| pool.next(options.batch, &mut rng)).collect();
        let loss = run.loss(&atlas, &batches)?;
        let (grads, _) = clip_grad_norm(&loss.backward()?, 1.0)?;
        optimizer.step(&grads, schedule.lr(options.rate, step as u64))?;
        let loss = f64::from(loss.item()?);
        if !loss.is_finite() {
            return Err(Error::config(format!("atlas: the loss is {loss} at step {step}; lower `rate`")));
        }
        losses.push(loss);
        if (step + 1) % look == 0 || step + 1 == options.steps {
            let merit = run.merit(&atlas, floor, &mut || on(step + 1, options.steps, loss))?;
            if merit.0 > best.0.0 {
                best = (merit, step + 1, atlas.coefficients().to_vec::<f32>()?);
            }
        }
        on(step + 1, options.steps, loss)?;
    }
    let coefficients = Tensor::from_slice(gpu, &best.2, *atlas.coefficients().shape());
    let weights = atlas.weights_under(&coefficients);
    weights.values().for_each(Tensor::evaluate);
    Ok(Learned { weights, coefficients, losses, best: best.1 })
}

/// Whether the last task is the control of a negation.
fn has_control(tasks: &[Task], options: &LearnOptions) -> Result<bool> {
    match (tasks.len(), options.objective) {
        (0, _) => Err(Error::config("atlas: there is no task to learn from")),
        (1, Objective::Negate) => Err(Error::config(
            "atlas: `objective: negate` needs a second task, the control, at which the model stays what it is",
        )),
        (_, objective) => Ok(objective == Objective::Negate),
    }
}

/// The samples of a task in a random order, without end.
struct Pool {
    samples: Vec<u32>,
    next: usize,
}

impl Pool {
    fn next(&mut self, count: usize, rng: &mut Rng) -> Vec<u32> {
        let count = count.clamp(1, self.samples.len());
        if self.next + count > self.samples.len() {
            rng.shuffle(&mut self.samples);
            self.next = 0;
        }
        self.next += count;
        self.samples[self.next - count..self.next].to_vec()
    }
}

/// A task with so many rows of each class, drawn at random, or the whole task.
fn few(gpu: &Gpu, task: &Task, shots: Option<usize>, rng: &mut Rng) -> Result<Task> {
    let (Some(shots), TaskData::Labelled(data)) = (shots, &task.data) else { return Ok(task.clone()) };
    let mut rows: Vec<u32> = (0..data.rows() as u32).collect();
    rng.shuffle(&mut rows);
    let mut left: BTreeMap<u32, usize> = BTreeMap::new();
    rows.retain(|&row| {
        let used = left.entry(data.labels[row as usize]).or_default();
        *used += 1;
        *used <= shots
    });
    if let Some((class, found)) = left.iter().find(|(_, found)| **found < shots) {
        return Err(Error::config(format!(
            "task `{}`: {found} rows of class {class}, and `shots` asks for {shots}",
            task.name
        )));
    }
    let labels = rows.iter().map(|&row| data.labels[row as usize]).collect();
    let inputs = data.inputs.index_select(0, &Tensor::from_slice(gpu, &rows, [rows.len()]));
    let few = Labelled { inputs, labels, outputs: data.outputs.clone() };
    Ok(Task { name: task.name.clone(), data: TaskData::Labelled(few) })
}

/// All samples of a task, in a random order.
fn pool(architecture: &Architecture, task: &Task, rng: &mut Rng) -> Pool {
    let mut samples: Vec<u32> = (0..architecture.samples(task) as u32).collect();
    rng.shuffle(&mut samples);
    Pool { samples, next: 0 }
}

struct Run<'a> {
    gpu: &'a Gpu,
    architecture: &'a Architecture,
    tasks: &'a [Task],
    options: &'a LearnOptions,
    control: bool,
    /// Samples of each task by whose entropy coefficients are compared, in a random order.
    looks: Vec<Vec<u32>>,
}

impl Run<'_> {
    /// The objective on a batch of each task, to be lowered.
    fn loss(&self, atlas: &Atlas, batches: &[Vec<u32>]) -> Result<Tensor> {
        let weights = atlas.weights();
        let mut sum: Option<Tensor> = None;
        for (i, (task, batch)) in self.tasks.iter().zip(batches).enumerate() {
            let (logits, targets) = self.architecture.scores(self.gpu, &Tracked(&weights), task, batch)?;
            let loss = match self.options.objective {
                Objective::Entropy | Objective::Information => self.entropy(&logits),
                _ => logits.cross_entropy(&Tensor::from_slice(self.gpu, &targets, [targets.len()]), None),
            };
            let is_control = self.control && i + 1 == self.tasks.len();
            let loss = match self.options.objective {
                Objective::Negate if !is_control => loss.neg(),
                _ => loss,
            };
            sum = Some(sum.map_or(loss.clone(), |sum| sum.add(&loss)));
        }
        let sum = sum.ok_or_else(|| Error::config("atlas: there is no task to learn from"))?;
        Ok(sum.scale(1.0 / self.tasks.len() as f32))
    }

    /// How good the coefficients are on all data: what they are chosen by, and the merit at the control. Coefficients with less than
    /// `floor` at the control are not chosen.
    fn merit(&self, atlas: &Atlas, floor: f64, look: &mut dyn FnMut() -> Result<()>) -> Result<(f64, f64)> {
        let weights = atlas.weights_under(&atlas.coefficients().detach());
        if matches!(self.options.objective, Objective::Entropy | Objective::Information) {
            // No labels are used, so none may choose.
            return Ok((-self.entropies(&weights, look)?, 0.0));
        }
        let mut scores = Vec::new();
        for task in self.tasks {
            scores.push(self.architecture.score(self.gpu, &weights, task, &mut |_, _| look())?);
        }
        let wanted = &scores[..scores.len() - usize::from(self.control)];
        let control = scores.last().filter(|_| self.control).map_or(0.0, Score::merit);
        // Among equal accuracies, the one with the lower loss.
        let mean = |of: &dyn Fn(&Score) -> f64| wanted.iter().map(of).sum::<f64>() / wanted.len() as f64;
        let merit = mean(&Score::merit) - 1e-6 * mean(&|score| score.loss);
        Ok(match self.options.objective {
            Objective::Negate if control < floor => (f64::NEG_INFINITY, control),
            Objective::Negate => (-merit, control),
            _ => (merit, control),
        })
    }

    /// The mean entropy of predictions, without that of the mean prediction for [`Objective::Information`].
    fn entropy(&self, logits: &Tensor) -> Tensor {
        let p = logits.softmax(1);
        let own = p.mul(&logits.log_softmax(1)).sum_all().scale(-1.0 / logits.shape()[0] as f32);
        match self.options.objective {
            Objective::Information => {
                let mean = p.mean(0);
                own.add(&mean.mul(&mean.affine(1.0, 1e-9).log()).sum_all())
            }
            _ => own,
        }
    }

    fn entropies(
        &self,
        weights: &BTreeMap<String, Tensor>,
        look: &mut dyn FnMut() -> Result<()>,
    ) -> Result<f64> {
        let mut sum = 0.0;
        for (task, samples) in self.tasks.iter().zip(&self.looks) {
            look()?;
            let (logits, _) = self.architecture.scores(self.gpu, weights, task, samples)?;
            let entropy = f64::from(self.entropy(&logits).item()?);
            if !entropy.is_finite() {
                return Err(no_number(&task.name, "entropy", entropy));
            }
            sum += entropy;
        }
        Ok(sum)
    }
}
