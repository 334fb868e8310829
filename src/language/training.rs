//! The training run of a language model.

use super::curve::{self, Point};
use super::data::{Data, Part};
use crate::error::{Error, ErrorKind, Result};
use crate::gpu::Gpu;
use crate::models::foldgpt::tail_distillation;
use crate::models::lm::Lm;
use crate::nn::{Module, Visit, VisitMut};
use crate::optim::{
    AdamW, AdamWConfig, Exchange, Group, LossScale, Optimizer, Scalars, ScalarsConfig, Schedule,
};
use crate::precision::{Precision, autocast};
use crate::ranks::{Alone, Ranks, agree, check_parts, known};
use crate::rng::Rng;
use crate::setters::setters;
use crate::tensor::Tensor;
use crate::train::{Report, Trainer, same_settings};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// How a model is trained: AdamW with betas 0.9 and 0.95, gradients clipped to norm 1, a warm-up and a cosine to a tenth of the highest
/// rate. Whatever has two axes or more has weight decay, and so has the store of hashed weights; norms and biases have none.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct TrainingOptions {
    /// Windows of a step, each as long as the model's context.
    pub batch: usize,
    /// Parts into which a rank cuts its windows of a step, whose gradients are added up: less memory, more time.
    pub accumulate: usize,
    /// Number of steps.
    pub steps: u64,
    /// The highest learning rate.
    pub lr: f32,
    /// Steps until it is reached.
    pub warmup: u64,
    /// Weight decay of matrices.
    pub weight_decay: f32,
    /// How products and activations are stored.
    pub precision: Precision,
    /// Start of the random numbers that choose windows.
    pub seed: u64,
    /// Steps between points of the curve.
    pub every: u64,
    /// What ranks tell each other: gradients, or seeds and scalars, without a backward pass.
    pub exchange: Exchange,
    /// Held-out tokens that are measured at each point but the last, at which all are.
    pub validation: usize,
}

setters!(TrainingOptions {
    batch: usize,
    accumulate: usize,
    steps: u64,
    lr: f32,
    warmup: u64,
    weight_decay: f32,
    precision: Precision,
    seed: u64,
    every: u64,
    exchange: Exchange,
    validation: usize,
});

impl Default for TrainingOptions {
    /// 600 steps of 16 windows, the first 60 of them to reach a rate of 0.002; a point every 100 steps.
    fn default() -> TrainingOptions {
        TrainingOptions {
            batch: 16,
            accumulate: 1,
            steps: 600,
            lr: 2e-3,
            warmup: 60,
            weight_decay: 0.1,
            precision: Precision::F32,
            seed: 1,
            every: 100,
            exchange: Exchange::Gradients,
            validation: 1 << 16,
        }
    }
}

impl TrainingOptions {
    fn check(&self) -> Result<()> {
        let sizes = [
            ("batch", self.batch as u64),
            ("accumulate", self.accumulate as u64),
            ("steps", self.steps),
            ("every", self.every),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::config(format!("training: `{name}` is 0")));
        }
        let rates = [("lr", self.lr), ("weight_decay", self.weight_decay)];
        match rates.iter().find(|(_, rate)| !(rate.is_finite() && *rate >= 0.0)) {
            Some((name, rate)) => Err(Error::config(format!("training: `{name}` is {rate}"))),
            None => Ok(()),
        }
    }
}

/// What a run tells while it goes on.
#[non_exhaustive]
pub enum Progress<'a> {
    /// A step was done.
    Step(&'a Report),
    /// Held-out tokens were measured, so many of how many.
    Measured(usize, usize),
    /// The parameters of the rank of this number had other bits than rank 0's, although all had the same gradients, as with different
    /// drivers. Rank 0's are taken.
    Drifted(usize),
    /// A point of the curve was reached, and the checkpoint written if there is one.
    Point(&'a Point),
}

/// A training run.
///
/// ```
/// # use tiebeam::{Gpu, Rng};
/// # let gpu = Gpu::open()?;
/// use tiebeam::language::{Corpus, Training, TrainingOptions};
/// use tiebeam::models::lm::{Lm, LmConfig};
/// let config = LmConfig::small().vocab(5).width(16).heads(2).kv_heads(2).hidden(32).context(8).depth(2);
/// let model = Lm::new(&gpu, config, &mut Rng::new(1));
/// let corpus = Corpus::new((0..500).map(|i| i * i % 5).collect(), 5)?;
/// let options = TrainingOptions::default().steps(30).every(15).warmup(3).batch(4).lr(0.01);
/// let mut training = Training::new(&model, &corpus, options)?;
/// let done = training.run(None, &mut |_progress| Ok(()))?;
/// let curve = training.curve();
/// assert!(done && curve.len() == 2 && curve[1].validation < curve[0].validation);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Training<'a> {
    model: &'a Lm,
    teacher: Option<(&'a Lm, usize)>,
    data: &'a dyn Data,
    options: TrainingOptions,
    trainer: Trainer,
    ranks: Arc<dyn Ranks>,
    /// Whether the ranks have told each other that their settings are the same.
    agreed: bool,
    stop: Option<Arc<AtomicBool>>,
    curve: Vec<Point>,
    /// What else must be the same when a run goes on.
    said: BTreeMap<String, String>,
    open: Open,
}

/// What has been done since the last point, and how long the run has taken.
#[derive(Clone, Copy, Default)]
struct Open {
    sum: f64,
    count: u64,
    seconds: f64,
}

impl Open {
    fn text(self) -> String {
        format!("{:?} {} {:?}", self.sum, self.count, self.seconds)
    }

    fn parse(text: &str) -> Option<Open> {
        let mut words = text.split(' ');
        let [sum, count, seconds] = [(); 3].map(|()| words.next());
        Some(Open { sum: sum?.parse().ok()?, count: count?.parse().ok()?, seconds: seconds?.parse().ok()? })
    }
}

impl<'a> Training<'a> {
    /// Begins a run that trains the leaves of `model`.
    ///
    /// # Errors
    /// [`Error::Config`] when the corpus has other tokens than the model or is too short, or an option is out of range; when the device
    /// fails.
    pub fn new(model: &'a Lm, data: &'a dyn Data, options: TrainingOptions) -> Result<Training<'a>> {
        options.check()?;
        let gpu = model.gpu();
        data.check(&model.config)?;
        let TrainingOptions { lr, warmup, steps: total, .. } = options;
        let optimizer: Box<dyn Optimizer> = match options.exchange {
            Exchange::Gradients => Box::new(adamw(model, options)?),
            Exchange::Scalars { byte } => {
                let config = ScalarsConfig::default().lr(lr).byte(byte).seed(options.seed);
                Box::new(Scalars::new(model.parameters().trainable(), config)?)
            }
        };
        let trainer = Trainer::new(optimizer)
            .schedule(Schedule::WarmupCosine { warmup: warmup.clamp(1, total), total, floor: 0.1 })
            .scale(LossScale::of(gpu, options.precision)?)
            .rng(Rng::new(options.seed))
            .accumulate(options.accumulate)
            .total(total);
        let training = Training {
            model,
            teacher: None,
            data,
            options,
            trainer,
            ranks: Arc::new(Alone),
            agreed: false,
            stop: None,
            curve: Vec::new(),
            said: BTreeMap::new(),
            open: Open::default(),
        };
        training.check_parts()?;
        Ok(training)
    }

    /// Trains on several ranks: each has its part of every batch, and of what is measured. Parameters are the same on all of them, and by
    /// gradients losses and the curve are too; by scalars a loss is the rank's own, and the curve that is kept is the first one's, which
    /// writes the checkpoint. The batches are those of one rank, so that a run can go on with another number of ranks.
    ///
    /// Experts count their capacity in the tokens of a rank's part. What a model draws in its forward pass, such as the noise of its
    /// experts, is the same on every rank.
    ///
    /// # Errors
    /// [`Error::Config`] when a step has fewer windows than ranks times [`TrainingOptions::accumulate`].
    pub fn ranks(self, ranks: Arc<dyn Ranks>) -> Result<Training<'a>> {
        let training = Training { trainer: self.trainer.ranks(ranks.clone()), ranks, ..self };
        training.check_parts()?;
        Ok(training)
    }

    /// Parts of a step on all ranks.
    fn parts(&self) -> usize {
        self.ranks.size() * self.options.accumulate
    }

    fn check_parts(&self) -> Result<()> {
        check_parts(self.options.batch, "windows", self.ranks.size(), self.options.accumulate)
    }

    /// Compares what the ranks were told to do: model, options, data and version. [`Training::run`] and [`Training::resume`] do it if
    /// nobody has before.
    ///
    /// # Errors
    /// [`Error::Config`] on every rank, with the first rank that differs and in what; when a rank fails.
    pub fn agree(&mut self) -> Result<()> {
        if self.agreed || self.ranks.size() == 1 {
            return Ok(());
        }
        let mut said = self.settings();
        said.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        said.insert("train.step".into(), self.trainer.step().to_string());
        agree(&*self.ranks, &said)?;
        self.agreed = true;
        Ok(())
    }

    /// Trains towards another model's scores, `KL(teacher || model)`, instead of the next tokens, and towards its residual streams after
    /// the last `tail` blocks, by mean squared differences.
    ///
    /// # Errors
    /// [`Error::Config`] when the models have other vocabularies or contexts, or `tail` is above a depth.
    pub fn teacher(self, teacher: &'a Lm, tail: usize) -> Result<Training<'a>> {
        let (own, theirs) = (&self.model.config, &teacher.config);
        if (own.vocab, own.context) != (theirs.vocab, theirs.context) {
            return Err(Error::config(format!(
                "a teacher of {} tokens and a context of {}, and the model has {} and {}",
                theirs.vocab, theirs.context, own.vocab, own.context
            )));
        }
        let most = self.model.blocks.len().min(teacher.blocks.len());
        if tail > most || tail > 0 && own.width != theirs.width {
            return Err(Error::config(format!(
                "the last {tail} blocks cannot be compared; there are {most}"
            )));
        }
        Ok(Training { teacher: Some((teacher, tail)), ..self })
    }

    /// Sets a flag that ends the run after the present step, or the present part of a measurement, once it is true.
    #[must_use]
    pub fn stop(self, flag: Arc<AtomicBool>) -> Training<'a> {
        Training { trainer: self.trainer.stop(flag.clone()), stop: Some(flag), ..self }
    }

    /// Adds what else must be the same when the run goes on from a checkpoint, such as what an adapter is on.
    #[must_use]
    pub fn say(mut self, name: &str, value: impl std::fmt::Display) -> Training<'a> {
        self.said.insert(format!("train.{name}"), value.to_string());
        self
    }

    /// The points so far.
    pub fn curve(&self) -> &[Point] {
        &self.curve
    }

    /// Steps so far.
    pub fn step(&self) -> u64 {
        self.trainer.step()
    }

    /// Steps of the whole run.
    pub fn total(&self) -> u64 {
        self.options.steps
    }

    /// What must be the same when a run goes on: the model's settings and the options, by the names that files give them.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let o = &self.options;
        let mut all = self.model.config.metadata();
        let mut put = |name: &str, value: &dyn std::fmt::Display| {
            all.insert(format!("train.{name}"), value.to_string());
        };
        put("batch", &o.batch);
        if o.accumulate > 1 {
            put("accumulate", &o.accumulate);
        }
        put("steps", &o.steps);
        put("lr", &o.lr);
        put("warmup", &o.warmup);
        put("weight_decay", &o.weight_decay);
        put("precision", &o.precision);
        put("seed", &o.seed);
        put("every", &o.every);
        put("data", &format_args!("{:032x}", self.data.id()));
        if o.exchange != Exchange::Gradients {
            put("exchange", &o.exchange);
        }
        put("distilled", &self.teacher.is_some());
        put("tail", &self.teacher.map_or(0, |(_, tail)| tail));
        all.extend(self.said.clone());
        all
    }

    /// Goes on from a checkpoint that [`Training::run`] wrote.
    ///
    /// # Errors
    /// [`Error::Format`] for a checkpoint of another model, text or options, with what differs; when it cannot be read.
    pub fn resume(&mut self, checkpoint: &Path) -> Result<()> {
        self.agree()?;
        let settings = self.settings();
        let model = Trained(self.model.parameters().trainable());
        let metadata =
            self.trainer.load_if(checkpoint, &model, |found| same_settings(checkpoint, found, &settings))?;
        let curve = curve::parse(metadata.get("train.curve").map_or("", String::as_str));
        let curve = known(&*self.ranks, curve)?;
        self.open = metadata.get("train.open").and_then(|text| Open::parse(text)).unwrap_or_default();
        self.curve = curve;
        Ok(())
    }

    /// Trains to the last step. `checkpoint` is written at each point of the curve, and when the run is stopped. Returns whether all
    /// steps are done: false if the flag of [`Training::stop`] ended it before.
    ///
    /// # Errors
    /// A loss that is not finite, before a bad checkpoint is written; what `on` returns; when a file cannot be written or the device
    /// fails.
    pub fn run(
        &mut self,
        checkpoint: Option<&Path>,
        on: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<bool> {
        let (started, before, total) = (Instant::now(), self.open.seconds, self.options.steps);
        let seconds = || before + started.elapsed().as_secs_f64();
        let save = |own: &mut Training, on: &mut dyn FnMut(Progress) -> Result<()>| {
            own.mend(on)?;
            checkpoint.map_or(Ok(()), |path| own.save(path))
        };
        self.agree()?;
        if self.trainer.step() == 0 {
            self.trainer.share_state(&Trained(self.model.parameters().trainable()))?;
        }
        loop {
            let step = self.trainer.step();
            if self.is_due(step) {
                let Some(validation) = self.measured(step, on)? else {
                    self.open.seconds = seconds();
                    return save(self, on).map(|()| false);
                };
                let loss = self.open.sum / self.open.count.max(1) as f64;
                let point = Point { step, loss, validation, seconds: seconds() };
                self.open = Open { sum: 0.0, count: 0, seconds: point.seconds };
                self.curve.push(point);
                save(self, on)?;
                on(Progress::Point(&point))?;
            }
            if step >= total {
                return Ok(true);
            }
            let next = (step / self.options.every + 1) * self.options.every;
            let Open { mut sum, mut count, .. } = self.open;
            let done = self.steps(next.min(total), &mut |report| {
                (sum, count) = (sum + f64::from(report.loss), count + 1);
                on(Progress::Step(report))
            })?;
            self.open = Open { sum, count, seconds: seconds() };
            if !done {
                return save(self, on).map(|()| false);
            }
        }
    }

    /// A hash of the trained parameters, the same on every rank.
    ///
    /// # Errors
    /// As [`Trainer::digest`].
    pub fn digest(&self) -> Result<u128> {
        self.trainer.digest(&Trained(self.model.parameters().trainable()))
    }

    /// Takes rank 0's parameters where a rank's have become others.
    fn mend(&mut self, on: &mut dyn FnMut(Progress) -> Result<()>) -> Result<()> {
        let drifted = self.trainer.mend(&Trained(self.model.parameters().trainable()))?;
        drifted.map_or(Ok(()), |rank| on(Progress::Drifted(rank)))
    }

    /// Whether the curve has a point at this step and it has not been measured, as when a run was stopped there.
    fn is_due(&self, step: u64) -> bool {
        let ends = step == self.options.steps || step.is_multiple_of(self.options.every);
        step > 0 && ends && self.curve.last().is_none_or(|point| point.step < step)
    }

    /// Measures held-out tokens, all of them at the end. `None` if the run was stopped meanwhile.
    fn measured(&self, step: u64, on: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Option<f64>> {
        let limit = if step == self.options.steps { usize::MAX } else { self.options.validation };
        let stopped = || self.stop.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed));
        let found = self.data.measure(self.model, limit, &*self.ranks, &mut |done, of| match stopped() {
            true => Err(Error::stopped("stopped while held-out tokens were measured")),
            false => on(Progress::Measured(done, of)),
        });
        match found {
            // The flag may be another rank's.
            Err(error) if error.kind() == ErrorKind::Stopped && (stopped() || self.ranks.size() > 1) => {
                Ok(None)
            }
            found => found.map(Some),
        }
    }

    /// Trains up to a step. Returns whether it was reached.
    fn steps(&mut self, to: u64, on: &mut dyn FnMut(&Report) -> Result<()>) -> Result<bool> {
        let (model, teacher, data) = (self.model, self.teacher, self.data);
        let (gpu, precision): (&Gpu, _) = (model.gpu(), self.options.precision);
        let sizes = [self.options.batch, model.config.context];
        let loss = |tokens: &Tensor, targets: &Tensor, weight: f32, rng: &mut Rng| {
            let loss = autocast(precision, || match teacher {
                Some((teacher, tail)) => tail_distillation(model, teacher, tokens, 1.0, tail),
                None => model.training_loss(tokens, targets, rng),
            });
            Ok(if weight == 1.0 { loss } else { loss.scale(weight) })
        };
        let (parts, each, rank) = (self.parts(), self.options.accumulate, self.ranks.rank());
        // A batch is drawn as a whole, and its parts are asked for one by one.
        let mut waiting: VecDeque<Part> = VecDeque::new();
        let mut next = |step, rng: &mut Rng| {
            if waiting.is_empty() {
                waiting = data.batch(gpu, sizes, (parts, rank * each..(rank + 1) * each), step, rng).into();
            }
            waiting
                .pop_front()
                .ok_or_else(|| Error::config("training: the data gave too few parts of a batch"))
        };
        // Experts and windows make lists on the host as they go, so their steps cannot be recorded.
        let uploads = model.config.experts.is_some() || model.config.window.is_some();
        if uploads || !data.is_even() {
            let step = |step, rng: &mut Rng| {
                let Part { tokens, targets, weight } = next(step, rng)?;
                loss(&tokens, &targets, weight, rng)
            };
            return self.trainer.train(to, step, on);
        }
        // The weights of even parts are the same in every step. Recording asks for all parts before it computes their losses.
        let weights = RefCell::new(VecDeque::new());
        let batch = |step, rng: &mut Rng| {
            let Part { tokens, targets, weight } = next(step, rng)?;
            weights.borrow_mut().push_back(weight);
            Ok(vec![tokens, targets])
        };
        let recorded = |inputs: &[Tensor], rng: &mut Rng| {
            let weight = weights.borrow_mut().pop_front().unwrap_or(1.0);
            loss(&inputs[0], &inputs[1], weight, rng)
        };
        self.trainer.train_recorded(to, batch, recorded, on)
    }

    /// Writes the checkpoint.
    fn save(&self, path: &Path) -> Result<()> {
        let mut metadata = self.settings();
        metadata.insert("train.curve".into(), curve::text(&self.curve));
        metadata.insert("train.open".into(), self.open.text());
        // What rests is not written again at every point.
        self.trainer.save_with(path, &Trained(self.model.parameters().trainable()), &metadata)
    }
}

/// The optimizer of a training by gradients.
fn adamw(model: &Lm, options: TrainingOptions) -> Result<AdamW> {
    // A store of which matrices are made has one axis, and is no vector.
    let decays = |name: &str, leaf: &Tensor| leaf.shape().len() > 1 || name.ends_with("omega");
    let [nets, others] = Group::split(model.parameters().trainable(), |name, _| is_of_net(name));
    let [matrices, vectors] = Group::split(others.params, decays);
    let config = AdamWConfig::default().lr(options.lr).betas((0.9, 0.95)).eps(1e-8).clip(Some(1.0));
    let groups = vec![matrices.weight_decay(options.weight_decay), vectors, nets.lr_scale(NET_LR)];
    let groups: Vec<Group> = groups.into_iter().filter(|group| !group.params.is_empty()).collect();
    AdamW::new(model.gpu(), groups, config)
}

/// Every number of a network that makes coefficients moves those of all depths, and three layers of them move together, so that at the
/// rate of matrices the coefficients run away.
const NET_LR: f32 = 0.1;

fn is_of_net(name: &str) -> bool {
    name.contains(".net.") && !name.ends_with(".base")
}

/// The leaves of a model under their names.
struct Trained(Vec<(String, Tensor)>);

impl Module for Trained {
    fn visit(&self, visit: &mut Visit) {
        self.0.iter().for_each(|(name, leaf)| visit.store(name, leaf));
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        self.0.iter_mut().for_each(|(_, leaf)| visit.field(leaf));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::lm::LmConfig;
    use crate::models::sharing::Sharing;

    #[test]
    fn a_network_of_coefficients_is_known_by_its_names() {
        let config =
            LmConfig::default().vocab(5).width(8).heads(2).kv_heads(2).hidden(16).context(4).depth(3);
        let config = config.sharing(Sharing::dictionary_net(2, false));
        let model = Lm::new(&Gpu::open().expect("an adapter"), config, &mut Rng::new(1));
        // Of q, k and v each: vectors of depths, three matrices and three biases. Atoms and C0 have the ordinary rate.
        let all = model.parameters().trainable();
        assert_eq!(all.iter().filter(|(name, _)| is_of_net(name)).count(), 3 * 7);
    }
}
