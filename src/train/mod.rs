//! The loop of a training run: an optimizer, a schedule, and when losses are read and work is saved.
//!
//! A program says how the loss of a step is computed. A [`Trainer`] takes the steps: backward pass, learning rate, optimizer,
//! reports, and the end when a flag is set. It prints nothing; a closure gets each [`Report`].
//!
//! ```
//! use tiebeam::nn::{Init, Linear, Parameters};
//! use tiebeam::optim::{AdamW, AdamWConfig, Group, Schedule};
//! use tiebeam::train::Trainer;
//! use tiebeam::{Gpu, Rng, Tensor};
//! # let gpu = Gpu::open()?;
//! let layer = Linear::new(&gpu, 3, 1, true, Init::KaimingUniform, &mut Rng::new(1));
//! let group = Group::new(Parameters::of(&layer).trainable());
//! let optimizer = AdamW::new(&gpu, vec![group], AdamWConfig::default().lr(0.2))?;
//! let schedule = Schedule::WarmupCosine { warmup: 2, total: 60, floor: 0.0 };
//!
//! let mut losses = Vec::new();
//! let mut trainer = Trainer::new(optimizer).schedule(schedule).report_every(10);
//! trainer.train(
//!     60,
//!     |_step, rng| {
//!         let x = Tensor::randn(&gpu, [16, 3], rng);
//!         Ok(layer.forward(&x).sub(&x.sum_keepdim(1)).square().mean_all())
//!     },
//!     |report| {
//!         losses.push(report.loss);
//!         Ok(())
//!     },
//! )?;
//! assert!(losses.len() == 7 && losses[6] < 0.01 * losses[0], "after steps 1, 10, 20, ... 60: {losses:?}");
//! # Ok::<(), tiebeam::Error>(())
//! ```
//!
//! # Epochs, evaluation and checkpoints
//!
//! [`Trainer::train`] goes up to a step, and a later call goes on from there. What happens between, such as an evaluation or a
//! [`Trainer::save`], is written between the calls:
//!
//! ```
//! # use tiebeam::nn::{Init, Linear, Parameters};
//! # use tiebeam::{Gpu, Rng, Tensor, optim::{Group, Sgd, SgdConfig}, train::Trainer};
//! # let gpu = Gpu::open()?;
//! # let path = std::env::temp_dir().join(format!("tiebeam-train-{}.safetensors", std::process::id()));
//! let net = Linear::new(&gpu, 2, 1, false, Init::KaimingUniform, &mut Rng::new(1));
//! let group = Group::new(Parameters::of(&net).trainable());
//! let mut trainer = Trainer::new(Sgd::new(&gpu, vec![group], SgdConfig::default())?).rng(Rng::new(7));
//! if path.exists() {
//!     trainer.load(&path, &net)?;
//! }
//! for epoch in trainer.step() / 4..3 {
//!     let loss = |_, rng: &mut Rng| Ok(net.forward(&Tensor::randn(&gpu, [4, 2], rng)).square().mean_all());
//!     trainer.train((epoch + 1) * 4, loss, |_report| Ok(()))?;
//!     trainer.save(&path, &net)?;
//! }
//! assert_eq!(trainer.step(), 12);
//! # std::fs::remove_file(&path).ok();
//! # Ok::<(), tiebeam::Error>(())
//! ```
//!
//! With a [`DataLoader`](crate::data::DataLoader), the batches of a run go on from its step, also in the middle of an epoch:
//!
//! ```
//! # use tiebeam::nn::{Init, Linear, Module};
//! # use tiebeam::{Gpu, Rng, Tensor, optim::{Group, Sgd, SgdConfig}, train::Trainer};
//! use tiebeam::data::DataLoader;
//! # let gpu = Gpu::open()?;
//! # let net = Linear::new(&gpu, 1, 1, true, Init::KaimingUniform, &mut Rng::new(1));
//! # let group = Group::new(net.parameters().trainable());
//! # let mut trainer = Trainer::new(Sgd::new(&gpu, vec![group], SgdConfig::default())?);
//! let rows: Vec<f32> = (0..50).map(|i| i as f32 / 50.0).collect();
//! let loader = DataLoader::new(&gpu, (rows.clone(), rows)).batch_size(8).shuffle(1);
//! let mut batches = loader.steps_from(trainer.step());
//! let loss = |_, _: &mut Rng| {
//!     let (x, y) = batches.next().expect("the dataset has a batch")?;
//!     Ok(net.forward(&x.unsqueeze(1)).mse_loss(&y.unsqueeze(1)))
//! };
//! trainer.train(3 * loader.len() as u64, loss, |report| {
//!     println!("{report}");
//!     Ok(())
//! })?;
//! assert_eq!(trainer.step(), 21);
//! # Ok::<(), tiebeam::Error>(())
//! ```
//!
//! # Micro-batches and ranks
//!
//! With [`Trainer::accumulate`] a step is the mean of several losses, and with [`Trainer::ranks`] of those of several processes, such as
//! the ranks of an MPI job by `tiebeam-mpi`. All ranks run the same program and take the same steps. Each computes the losses of its own
//! part of the batch; the gradients are summed in the order of the ranks, so that parameters stay the same bits everywhere. The random
//! generator is the same on all ranks too: draw the whole batch and take this rank's part of it, [`ranks::share`](crate::ranks::share),
//! and the run can go on with another number of ranks. Every loss counts alike, so where parts have different numbers of rows, scale a
//! part's mean loss by its rows times the number of parts over the rows of the batch. Buffers, such as the running means of
//! [`BatchNorm`](crate::nn::BatchNorm), follow a rank's own part; checkpoints are rank 0's.
//!
//! # What keeps a loop of its own
//!
//! A step here is one step of one optimizer. Two optimizers in turn and averages of parameters ([`Ema`](crate::optim::Ema)) need only a
//! few lines around [`Optimizer::step`]; write them as a loop.

mod checkpoint;
mod scalars;
mod together;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::optim::{LossScale, Optimizer, Schedule, StepEvent, Watch};
use crate::ranks::{Alone, Ranks, known};
use crate::rng::Rng;
use crate::step::Step;
use crate::tape::Grads;
use crate::tensor::Tensor;
pub use checkpoint::same_settings;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use together::{Coming, Seen, Split};

/// What a step computes: its loss, and tensors that are read with it. A loss alone is one, and so is a loss with a list:
/// `Ok((loss, vec![accuracy]))`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// A scalar, from which the backward pass begins.
    pub loss: Tensor,
    /// What [`Report::values`] is read from.
    pub values: Vec<Tensor>,
}

impl Outcome {
    /// The loss and the values in f32, without their history.
    fn tensors(&self) -> Result<Vec<Tensor>> {
        if self.loss.count() != 1 {
            let shape = self.loss.shape();
            return Err(Error::config(format!(
                "train: a loss of shape {shape}; reduce it, as mean_all does"
            )));
        }
        Ok(std::iter::once(&self.loss).chain(&self.values).map(|x| x.detach().cast(DType::F32)).collect())
    }
}

impl From<Tensor> for Outcome {
    fn from(loss: Tensor) -> Outcome {
        Outcome { loss, values: Vec::new() }
    }
}

impl From<(Tensor, Vec<Tensor>)> for Outcome {
    fn from((loss, values): (Tensor, Vec<Tensor>)) -> Outcome {
        Outcome { loss, values }
    }
}

/// What is known of a step once its results have arrived.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// The number of steps so far, with this one: the first step has 1.
    pub step: u64,
    /// The loss, without a loss scale.
    pub loss: f32,
    /// The learning rate.
    pub lr: f32,
    /// The norm of all gradients, before clipping and without a loss scale.
    pub norm: f32,
    /// The elements of the further tensors of the [`Outcome`].
    pub values: Vec<Vec<f32>>,
    /// Steps whose gradients overflowed and changes of the loss scale that were not reported yet.
    pub events: Vec<StepEvent>,
    /// The time since the first step of this trainer was done. That one is left out because it waits for the compiler.
    pub elapsed: Duration,
    /// The time that the other steps will take at the mean speed so far. `None` in the first report, and for `u64::MAX` steps, which
    /// only a flag ends.
    pub eta: Option<Duration>,
}

/// One line: `step 120  loss 0.3171  norm 0.93  lr 1.000e-3  12 s, 3 s left`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { step, loss, norm, lr, elapsed, eta, .. } = self;
        write!(
            f,
            "step {step}  loss {loss:.4}  norm {norm:.2}  lr {lr:.3e}  {:.0} s",
            elapsed.as_secs_f64()
        )?;
        match eta {
            Some(eta) => write!(f, ", {:.0} s left", eta.as_secs_f64()),
            None => Ok(()),
        }
    }
}

/// What of a step is on its way to the host.
struct Sent {
    step: u64,
    lr: f32,
    /// The loss, the norm and the further values.
    readings: Vec<Coming>,
    watch: Watch,
}

/// Takes the steps of a training run. The [page of this module](self) has examples.
pub struct Trainer {
    optimizer: Box<dyn Optimizer>,
    schedule: Schedule,
    lr: f32,
    scale: Option<LossScale>,
    rng: Rng,
    report_every: u64,
    total: u64,
    /// Losses of a step on each rank.
    parts: usize,
    ranks: Arc<dyn Ranks>,
    stop: Arc<AtomicBool>,
    /// Whether a flag was set on any rank when they last told each other.
    stopped: bool,
    /// When the first step was done, and the number of steps then.
    clock: Option<(Instant, u64)>,
}

impl Trainer {
    /// Makes a trainer with a constant learning rate, the optimizer's own, that reports every step. Takes any optimizer, or a
    /// `Box<dyn Optimizer>`.
    pub fn new(optimizer: impl Into<Box<dyn Optimizer>>) -> Trainer {
        let optimizer = optimizer.into();
        Trainer {
            lr: optimizer.lr(),
            optimizer,
            schedule: Schedule::Constant,
            scale: None,
            rng: Rng::new(0),
            report_every: 1,
            total: 0,
            parts: 1,
            ranks: Arc::new(Alone),
            stop: Arc::default(),
            stopped: false,
            clock: None,
        }
    }

    /// Sets how the learning rate follows from the optimizer's own, which is its base rate.
    #[must_use]
    pub fn schedule(self, schedule: Schedule) -> Trainer {
        Trainer { schedule, ..self }
    }

    /// Scales losses for the backward pass, as half precision needs it. The forward pass is the closure's, which opens
    /// [`autocast`](crate::autocast) itself.
    #[must_use]
    pub fn scale(self, scale: LossScale) -> Trainer {
        Trainer { scale: Some(scale), ..self }
    }

    /// Sets the generator that the closures draw from and checkpoints hold. The default has the seed 0.
    #[must_use]
    pub fn rng(self, rng: Rng) -> Trainer {
        Trainer { rng, ..self }
    }

    /// Sets how often losses are read: after the steps whose number is a multiple of this. The first step of the trainer and the
    /// last one of a call are always reported. A report reads a few numbers, late enough that the device does not wait for the host.
    #[must_use]
    pub fn report_every(self, steps: u64) -> Trainer {
        Trainer { report_every: steps, ..self }
    }

    /// Sets the length of the whole run, for [`Report::eta`]. The default is the step that a call goes up to.
    #[must_use]
    pub fn total(self, steps: u64) -> Trainer {
        Trainer { total: steps, ..self }
    }

    /// Sets a flag that ends training after the present step once it is true. Another thread may set it, or Ctrl-C, with a crate such
    /// as `ctrlc`:
    ///
    /// ```text
    /// let stop = Arc::new(AtomicBool::new(false));
    /// let flag = stop.clone();
    /// ctrlc::set_handler(move || flag.store(true, Ordering::SeqCst))?;
    /// let mut trainer = Trainer::new(optimizer).stop(stop);
    /// if !trainer.train(steps, loss, report)? {
    ///     trainer.save("run.safetensors", &model)?; // it was stopped
    /// }
    /// ```
    #[must_use]
    pub fn stop(self, flag: Arc<AtomicBool>) -> Trainer {
        Trainer { stop: flag, ..self }
    }

    /// Sets how many losses make a step: the closures are called so often, with the same number of the step, and the gradients are those
    /// of the mean of the losses. One graph is held at a time. Reports have the means of losses and values. The default is 1.
    ///
    /// # Panics
    /// When it is 0.
    #[must_use]
    #[track_caller]
    pub fn accumulate(self, losses: usize) -> Trainer {
        assert!(losses > 0, "train: a step of 0 losses");
        Trainer { parts: losses, ..self }
    }

    /// Trains together with other processes, which run the same program: gradients, losses and values are means over the ranks, and a flag
    /// of [`Trainer::stop`] on one rank stops all of them after the same step. A batch or a loss that fails on one rank fails on all. What
    /// else a rank returns early for, such as a lost device or an error of `report`, the others do not hear of, and whoever runs the ranks
    /// must end them (`tiebeam_mpi::run` does). [`Trainer::save`] and [`Trainer::load`] are then called by all ranks too.
    #[must_use]
    pub fn ranks(self, ranks: Arc<dyn Ranks>) -> Trainer {
        Trainer { ranks, ..self }
    }

    /// Changes the base rate of the schedule from the next step on, as a [`ReduceOnPlateau`](crate::optim::ReduceOnPlateau) wants
    /// it. It is not part of checkpoints.
    pub fn set_lr(&mut self, lr: f32) {
        self.lr = lr;
    }

    /// The number of steps so far: the optimizer's.
    pub fn step(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &dyn Optimizer {
        &*self.optimizer
    }

    /// The loss scale, if there is one.
    pub fn loss_scale(&self) -> Option<&LossScale> {
        self.scale.as_ref()
    }

    /// Trains until there are `to` steps, those of earlier calls and of a loaded checkpoint included. Returns whether there are:
    /// false if the flag of [`Trainer::stop`] ended it before.
    ///
    /// With [`Scalars`](crate::optim::Scalars), `loss` is called several times in a step, with the same number and the same generator,
    /// and must give the loss of the same batch; the loss of a report is then this rank's.
    ///
    /// `loss` gets the number of steps before this one, as [`Schedule::lr`] counts, and the generator. It returns a loss or an
    /// [`Outcome`]. `report` is called in the order of the steps: at once for the first step, and otherwise after one more step was
    /// given to the device. All are reported when this returns.
    ///
    /// # Errors
    /// The errors of `loss` and `report`. A loss that is not a scalar. A reported loss that is not finite, which ends the run before a
    /// bad checkpoint is saved; `report` sees it first and may return an error that says more. Those of [`Tensor::backward`] and
    /// [`Optimizer::step`].
    ///
    /// # Panics
    /// When no parameter of the optimizer has a gradient.
    #[track_caller]
    pub fn train<L: Into<Outcome>>(
        &mut self,
        to: u64,
        mut loss: impl FnMut(u64, &mut Rng) -> Result<L>,
        mut report: impl FnMut(&Report) -> Result<()>,
    ) -> Result<bool> {
        let (mut late, mut going) = (None, self.begins(to)?);
        while going {
            let (step, lr) = self.next();
            let seen = if self.is_by_scalars() {
                self.scalar_step(lr, |own, rng| own.evaluated(rng, |rng| loss(step, rng)))
            } else {
                let own = self.gradients(|_, rng| Ok(loss(step, rng)?.into()));
                self.agreed(own).and_then(|(grads, seen)| self.update(&grads, seen, lr))
            };
            let seen = self.or_report(seen, to, &mut late, &mut report)?;
            going = self.after(to, lr, &seen, &mut late, &mut report)?;
        }
        Ok(self.step() >= to)
    }

    /// Like [`Trainer::train`], with steps that are recorded once and replayed ([`Step`]), which costs the host less and gives the
    /// same bits. `batch` gives the inputs of a step, always of the same shapes. `loss` runs in the first step of a call only; it
    /// must not read back or upload, and what it draws from the generator it draws anew in every replay.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng, Tensor, nn::{Init, Linear, Parameters}, optim::{Group, Sgd, SgdConfig}, train::Trainer};
    /// # let gpu = Gpu::open()?;
    /// let net = Linear::new(&gpu, 2, 1, false, Init::Zeros, &mut Rng::new(1));
    /// let group = Group::new(Parameters::of(&net).trainable());
    /// let mut trainer = Trainer::new(Sgd::new(&gpu, vec![group], SgdConfig::default().lr(0.5))?);
    /// let batch = |_, rng: &mut Rng| Ok(vec![Tensor::randn(&gpu, [8, 2], rng)]);
    /// let mut ran = 0;
    /// trainer.train_recorded(5, batch, |inputs, _rng| {
    ///     ran += 1;
    ///     Ok(net.forward(&inputs[0]).sub(&inputs[0].sum_keepdim(1)).square().mean_all())
    /// }, |_report| Ok(()))?;
    /// assert_eq!((ran, trainer.step()), (1, 5));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Trainer::train`], [`Step::record`] and [`Step::run`], and when `batch` returns no tensor.
    ///
    /// # Panics
    /// As [`Trainer::train`].
    #[track_caller]
    pub fn train_recorded<L: Into<Outcome>>(
        &mut self,
        to: u64,
        mut batch: impl FnMut(u64, &mut Rng) -> Result<Vec<Tensor>>,
        mut loss: impl FnMut(&[Tensor], &mut Rng) -> Result<L>,
        mut report: impl FnMut(&Report) -> Result<()>,
    ) -> Result<bool> {
        let (mut whole, mut split): (Option<Step>, Option<Split>) = (None, None);
        let (mut late, mut going) = (None, self.begins(to)?);
        while going {
            let (step, lr) = self.next();
            let inputs = self.inputs(|rng| batch(step, rng));
            let by_scalars = self.is_by_scalars();
            let seen = match self.ranks.size() {
                _ if by_scalars => self.scalar_step(lr, |own, rng| {
                    let inputs = inputs.as_ref().map_err(Clone::clone)?;
                    own.evaluated_again(rng, &mut whole, inputs, &mut loss)
                }),
                1 => inputs.and_then(|inputs| self.run_whole(&mut whole, &inputs, lr, &mut loss)),
                _ => self.run_split(&mut split, inputs, lr, &mut loss),
            };
            let seen = self.or_report(seen, to, &mut late, &mut report)?;
            going = self.after(to, lr, &seen, &mut late, &mut report)?;
        }
        Ok(self.step() >= to)
    }

    /// The inputs of all losses of a step, one behind the other.
    fn inputs(&mut self, mut batch: impl FnMut(&mut Rng) -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
        let parts = (0..self.parts).map(|_| batch(&mut self.rng)).collect::<Result<Vec<_>>>()?;
        let first = parts[0].len();
        match parts.iter().find(|part| part.len() != first) {
            None => Ok(parts.concat()),
            Some(other) => Err(Error::config(format!(
                "train: a batch of {first} tensors and one of {} for the losses of a step; give as many for each",
                other.len()
            ))),
        }
    }

    /// Runs the recorded step of one rank, or records it.
    #[track_caller]
    fn run_whole<L: Into<Outcome>>(
        &mut self,
        recorded: &mut Option<Step>,
        inputs: &[Tensor],
        lr: f32,
        loss: &mut impl FnMut(&[Tensor], &mut Rng) -> Result<L>,
    ) -> Result<Seen> {
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        if let Some(recorded) = recorded {
            recorded.set_lr(lr);
            return Ok(Seen::There(recorded.run(&inputs)?.to_vec()));
        }
        let first = inputs.first().ok_or_else(|| Error::config("train: the batch has no tensors"))?;
        let made = Step::record(first.gpu(), &inputs, |inputs| {
            let (grads, results) = self.gradients_of(inputs, loss)?;
            self.update(&grads, Seen::There(results), lr)?.tensors()
        })?;
        Ok(Seen::There(recorded.insert(made).outputs().to_vec()))
    }

    /// Reports the step before, if a step failed, and returns the failure.
    fn or_report<T>(
        &mut self,
        result: Result<T>,
        to: u64,
        late: &mut Option<Sent>,
        report: &mut dyn FnMut(&Report) -> Result<()>,
    ) -> Result<T> {
        if result.is_err()
            && let Some(sent) = late.take()
        {
            let _ = self.report(sent, to, report);
        }
        result
    }

    /// Whether the run is to end. Ranks go by what they last told each other.
    fn is_stopped(&self) -> bool {
        match self.ranks.size() {
            1 => self.stop.load(Ordering::SeqCst),
            _ => self.stopped,
        }
    }

    fn begins(&mut self, to: u64) -> Result<bool> {
        self.meet(to)?;
        Ok(self.step() < to && !self.is_stopped())
    }

    /// The number of the next step, counted from 0, and its learning rate.
    fn next(&self) -> (u64, f32) {
        let step = self.step();
        (step, self.schedule.lr(self.lr, step))
    }

    /// Makes a step of the optimizer. Returns what can be read of it: loss, norm and further values, in f32.
    #[track_caller]
    fn update(&mut self, grads: &Grads, seen: Seen, lr: f32) -> Result<Seen> {
        let norm = self.optimizer.step(grads, lr)?.norm;
        Ok(seen.with_norm(&norm))
    }

    /// Begins to read a step's results if they are to be reported, and reports those that are due. Returns whether training goes on.
    fn after(
        &mut self,
        to: u64,
        lr: f32,
        seen: &Seen,
        late: &mut Option<Sent>,
        report: &mut dyn FnMut(&Report) -> Result<()>,
    ) -> Result<bool> {
        let (step, due) = (self.step(), late.take());
        let (first, last) = (self.clock.is_none(), step >= to || self.is_stopped());
        if first || last || step.is_multiple_of(self.report_every) {
            let readings = seen.read()?;
            *late = Some(Sent { step, lr, readings, watch: self.optimizer.watch()? });
        }
        if let Some(sent) = due {
            self.report(sent, to, report)?;
        }
        // The first is not late, because a user waits for it: the kernels are compiled until then.
        if (first || last)
            && let Some(sent) = late.take()
        {
            self.report(sent, to, report)?;
        }
        Ok(!last)
    }

    fn report(&mut self, sent: Sent, to: u64, report: &mut dyn FnMut(&Report) -> Result<()>) -> Result<()> {
        let Sent { step, lr, readings, watch } = sent;
        let mut read = readings.into_iter().map(Coming::wait).collect::<Result<Vec<Vec<f32>>>>()?;
        let values = read.split_off(2);
        let (loss, norm, events) = (read[0][0], read[1][0], watch.events()?);
        let (since, at) = *self.clock.get_or_insert_with(|| (Instant::now(), step));
        let elapsed = since.elapsed();
        let left = to.max(self.total).saturating_sub(step);
        let seconds = elapsed.as_secs_f64() * left as f64 / step.saturating_sub(at) as f64;
        let ends = to.max(self.total) < u64::MAX;
        let eta = Duration::try_from_secs_f64(seconds).ok().filter(|_| ends && step > at);
        report(&Report { step, loss, lr, norm, values, events, elapsed, eta })?;
        if loss.is_finite() {
            return Ok(());
        }
        let error = Error::config(format!(
            "train: the loss of step {step} is {loss}; begin again with a smaller learning rate, or go on from a checkpoint before it"
        ));
        // Of several ranks, all have found the same mean, unless it is a rank's own.
        if self.is_by_scalars() { Err(error) } else { known(&*self.ranks, Err(error)) }
    }
}
