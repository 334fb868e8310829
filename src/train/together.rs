//! A step of several losses and several ranks: the gradients of each, and what the ranks tell each other.

use super::{Outcome, Trainer};
use crate::error::{Error, Result};
use crate::gpu::capture::Tap;
use crate::gpu::readback::Reading;
use crate::nn::Module;
use crate::optim::{LossScale, StateTensor};
use crate::ranks::{Ranks, agree, all_done, known, on_first, together};
use crate::rng::Rng;
use crate::shape::Shape;
use crate::step::Step;
use crate::store::overwrite;
use crate::tape::{Frame, Grads, Part, same_leaves};
use crate::tensor::Tensor;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::sync::atomic::Ordering;
use twox_hash::XxHash3_128;

/// What can be read of a step: the loss, the norm once the optimizer has stepped, and further values, in f32.
pub(super) enum Seen {
    /// On the device.
    There(Vec<Tensor>),
    /// Here already, since the ranks have told them each other. The norm is on the device.
    Here(Vec<Vec<f32>>, Option<Tensor>),
}

/// A part of [`Seen`] on its way.
pub(super) enum Coming {
    There(Reading),
    Here(Vec<f32>),
}

impl Coming {
    pub fn wait(self) -> Result<Vec<f32>> {
        match self {
            Coming::There(reading) => Ok(bytemuck::pod_collect_to_vec(&reading.wait()?)),
            Coming::Here(numbers) => Ok(numbers),
        }
    }
}

impl Seen {
    /// Puts the norm behind the loss.
    pub fn with_norm(self, norm: &Tensor) -> Seen {
        match self {
            Seen::There(mut tensors) => {
                tensors.insert(1, norm.detach());
                Seen::There(tensors)
            }
            Seen::Here(numbers, _) => Seen::Here(numbers, Some(norm.detach())),
        }
    }

    /// All of it, of a step on one rank.
    pub fn tensors(self) -> Result<Vec<Tensor>> {
        match self {
            Seen::There(tensors) => Ok(tensors),
            Seen::Here(..) => Err(Error::config("train: a recorded step of one rank has read its results")),
        }
    }

    /// Begins to read all of it.
    pub fn read(&self) -> Result<Vec<Coming>> {
        let there = |x: &Tensor| Ok(Coming::There(x.read::<f32>()?));
        match self {
            Seen::There(tensors) => tensors.iter().map(there).collect(),
            Seen::Here(numbers, norm) => {
                let mut all: Vec<Coming> = numbers.iter().cloned().map(Coming::Here).collect();
                if let Some(norm) = norm {
                    all.insert(1, there(norm)?);
                }
                Ok(all)
            }
        }
    }
}

/// The recorded step of a rank among others, in two parts: to the gradients, and from their sums on.
pub(super) struct Split {
    before: Step,
    /// Number of tensors that are read; the gradients follow them.
    results: usize,
    frame: Frame,
    /// [`Grads::signature`] of its gradients.
    signature: Vec<u8>,
    /// What is summed, in the order in which rank 0 has it.
    parts: Vec<Part>,
    /// Where this rank begins to read it, in the order in which this rank has it. Each is of the part of this number.
    taps: Vec<Tap>,
    after: Option<Step>,
}

impl Split {
    /// What the last run has found. The gradients are the memory that the next run writes.
    fn own(&self) -> (Grads, Vec<Tensor>) {
        let (results, rest) = self.before.outputs().split_at(self.results);
        (self.frame.with(rest), results.to_vec())
    }

    /// Orders the parts by when rank 0 has them, so that the first are on their way while the backward pass goes on. Other adapters may
    /// have them in another order, and a sum needs one.
    fn order(&mut self, ranks: &dyn Ranks) -> Result<()> {
        let parts = self.own().0.parts();
        let mut order: Vec<u32> = (0..parts.len() as u32).collect();
        order.sort_by_key(|&i| parts[i as usize].after);
        let mut bytes = bytemuck::cast_slice(&order).to_vec();
        ranks.broadcast(&mut bytes)?;
        let order: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        let mut parts: Vec<Option<Part>> = parts.into_iter().map(Some).collect();
        self.parts = order.iter().filter_map(|&i| parts.get_mut(i as usize)?.take()).collect();
        if self.parts.iter().all(|part| part.tap().is_some()) {
            self.taps = self.parts.iter().filter_map(Part::tap).collect();
            self.taps.sort_by_key(|tap| tap.after);
        }
        Ok(())
    }

    /// Readings in the order of the parts.
    fn sorted(&self, coming: Vec<Reading>) -> VecDeque<Reading> {
        let mut numbers: Vec<usize> = (0..self.parts.len()).collect();
        // As the taps were sorted.
        numbers.sort_by_key(|&i| self.parts[i].after);
        let mut readings: Vec<(usize, Reading)> = numbers.into_iter().zip(coming).collect();
        readings.sort_by_key(|(i, _)| *i);
        readings.into_iter().map(|(_, reading)| reading).collect()
    }
}

impl Trainer {
    /// The gradients of the mean of this step's losses, of which `outcome` gives each, by its number. On several ranks they are divided by
    /// their number, so that the sum over ranks is the mean. Also returns the mean loss, not divided, and further values.
    #[track_caller]
    pub(super) fn gradients(
        &mut self,
        mut outcome: impl FnMut(usize, &mut Rng) -> Result<Outcome>,
    ) -> Result<(Grads, Vec<Tensor>)> {
        let mut sums: Vec<Tensor> = Vec::new();
        let (size, scale, rng) = (self.ranks.size(), &self.scale, &mut self.rng);
        let mut one = |i: usize| {
            let outcome = outcome(i, rng)?;
            let own = outcome.tensors()?;
            let loss = outcome.loss;
            if i == 0 {
                sums = own;
            } else {
                same_values(&sums, &own)?;
                sums = sums.iter().zip(&own).map(|(sum, x)| sum.add(x)).collect();
            }
            let loss = if size == 1 { loss } else { loss.scale((1.0 / size as f64) as f32) };
            match scale {
                Some(scale) => scale.backward(&loss),
                None => loss.backward(),
            }
        };
        let parts = self.parts;
        let grads = Grads::mean_of((0..parts).map(&mut one))?;
        let mean = |sum: Tensor| if parts == 1 { sum } else { sum.scale((1.0 / parts as f64) as f32) };
        Ok((grads, sums.into_iter().map(mean).collect()))
    }

    /// [`Trainer::gradients`] of recorded losses. The inputs of each part follow each other.
    #[track_caller]
    pub(super) fn gradients_of<L: Into<Outcome>>(
        &mut self,
        inputs: &[Tensor],
        loss: &mut impl FnMut(&[Tensor], &mut Rng) -> Result<L>,
    ) -> Result<(Grads, Vec<Tensor>)> {
        let each = inputs.len() / self.parts;
        self.gradients(|i, rng| Ok(loss(&inputs[i * each..(i + 1) * each], rng)?.into()))
    }

    /// Sums the gradients over the ranks, and returns the means of their results. One rank keeps its results on the device.
    pub(super) fn agreed(&mut self, own: Result<(Grads, Vec<Tensor>)>) -> Result<(Grads, Seen)> {
        if self.ranks.size() == 1 {
            return own.map(|(grads, results)| (grads, Seen::There(results)));
        }
        self.tell(own.as_ref().map(|(grads, _)| grads.signature()).map_err(Clone::clone))?;
        let (mut grads, results) = own?;
        grads.sum_over(&*self.ranks)?;
        Ok((grads, self.means(&results)?))
    }

    /// Before the gradients travel, tells the other ranks which leaves this one has gradients of, and whether it has failed or was
    /// stopped. Nothing of the device is waited for.
    fn tell(&mut self, signature: Result<Vec<u8>>) -> Result<()> {
        let stop = u8::from(self.stop.load(Ordering::SeqCst));
        let message = signature.map(|signature| [&signature[..], &[stop]].concat());
        let mut all = together(&*self.ranks, message)?;
        let flags: Vec<Option<u8>> = all.iter_mut().map(Vec::pop).collect();
        self.stopped = flags.contains(&Some(1));
        known(&*self.ranks, same_leaves(&all))
    }

    /// The means of results over the ranks.
    fn means(&self, results: &[Tensor]) -> Result<Seen> {
        let own = || -> Result<Vec<u8>> {
            let readings: Vec<Reading> = results.iter().map(Tensor::read::<f32>).collect::<Result<_>>()?;
            Ok(readings.into_iter().map(Reading::wait).collect::<Result<Vec<_>>>()?.concat())
        };
        let all = together(&*self.ranks, own())?;
        let numbers: Vec<Vec<f32>> = all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
        if let Some(rank) = numbers.iter().position(|other| other.len() != numbers[0].len()) {
            let error = format!("train: rank {rank} reads another number of values than rank 0");
            return known(&*self.ranks, Err(Error::config(error)));
        }
        let mean = |i: usize| {
            let sum: f64 = numbers.iter().map(|own| f64::from(own[i])).sum();
            (sum / numbers.len() as f64) as f32
        };
        let mut means = (0..numbers[0].len()).map(mean);
        let seen = results.iter().map(|x| means.by_ref().take(x.count()).collect()).collect();
        Ok(Seen::Here(seen, None))
    }

    /// Runs the recorded step of a rank among others, or records it.
    #[track_caller]
    pub(super) fn run_split<L: Into<Outcome>>(
        &mut self,
        recorded: &mut Option<Split>,
        inputs: Result<Vec<Tensor>>,
        lr: f32,
        loss: &mut impl FnMut(&[Tensor], &mut Rng) -> Result<L>,
    ) -> Result<Seen> {
        let known = recorded.is_some();
        let ran = inputs.and_then(|inputs| self.run_before(recorded, &inputs, loss));
        let signature = recorded.as_ref().map_or_else(Vec::new, |split| split.signature.clone());
        self.tell(ran.as_ref().map(|_| signature).map_err(Clone::clone))?;
        let coming = ran?;
        let Some(split) = recorded else { return Err(Error::config("train: nothing was recorded")) };
        if !known {
            split.order(&*self.ranks)?;
        }
        let (mut grads, results) = split.own();
        let ordered = split.sorted(coming);
        grads.sum_parts(&*self.ranks, &split.parts, ordered)?;
        let seen = self.means(&results)?;
        let Split { before, after, .. } = split;
        match after {
            Some(after) => {
                after.set_lr(lr);
                after.run(&[])?;
            }
            None => {
                let gpu = before.outputs().first().map(|x| x.gpu().clone());
                let gpu = gpu.ok_or_else(|| Error::config("train: the batch has no tensors"))?;
                *after = Some(Step::record(&gpu, &[], |_| Ok(vec![self.optimizer.step(&grads, lr)?.norm]))?);
            }
        }
        let norm = after.as_ref().and_then(|after| after.outputs().first());
        Ok(seen.with_norm(norm.ok_or_else(|| Error::config("train: nothing was recorded"))?))
    }

    /// Runs the part before the exchange. Returns readings of gradients, in the order in which this rank has them.
    #[track_caller]
    fn run_before<L: Into<Outcome>>(
        &mut self,
        recorded: &mut Option<Split>,
        inputs: &[Tensor],
        loss: &mut impl FnMut(&[Tensor], &mut Rng) -> Result<L>,
    ) -> Result<Vec<Reading>> {
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        if let Some(Split { before, taps, .. }) = recorded {
            return before.run_reading(&inputs, taps);
        }
        let first = inputs.first().ok_or_else(|| Error::config("train: the batch has no tensors"))?;
        let mut made = None;
        let before = Step::record(first.gpu(), &inputs, |inputs| {
            let (grads, mut results) = self.gradients_of(inputs, loss)?;
            made = Some((results.len(), grads.frame()));
            results.extend(grads.tensors());
            Ok(results)
        })?;
        let (results, frame) = made.ok_or_else(|| Error::config("train: nothing was recorded"))?;
        let (signature, parts, taps) = (Vec::new(), Vec::new(), Vec::new());
        let mut split = Split { before, results, frame, signature, parts, taps, after: None };
        split.signature = split.own().0.signature();
        *recorded = Some(split);
        Ok(Vec::new())
    }

    /// Before training up to a step: the ranks compare what says how many steps there are and what is told in each, and tell each other
    /// whether one is to stop.
    pub(super) fn meet(&mut self, to: u64) -> Result<()> {
        if self.ranks.size() == 1 {
            return Ok(());
        }
        let mut said = self.described();
        for (name, value) in [("steps so far", self.step()), ("steps", to)] {
            said.insert(name.into(), value.to_string());
        }
        agree(&*self.ranks, &said)?;
        let own = u8::from(self.stop.load(Ordering::SeqCst));
        self.stopped = together(&*self.ranks, Ok(vec![own]))?.iter().any(|told| *told == [1]);
        Ok(())
    }

    /// What must be the same on all ranks for them to understand each other.
    fn described(&mut self) -> BTreeMap<String, String> {
        let scalars = self.optimizer.scalars().map_or_else(String::new, |scalars| {
            let config = scalars.config();
            format!(
                ", samples {}, byte {}, eps {}, seed {}",
                config.samples, config.byte, config.eps, config.seed
            )
        });
        let optimizer = format!("{}{scalars}", self.optimizer.name());
        let rate = self.lr.to_string();
        let scaled = self.scale.is_some().to_string();
        [("optimizer", optimizer), ("rate", rate), ("loss scale", scaled)]
            .map(|(name, value)| (name.into(), value))
            .into()
    }

    /// Rank 0's words, on every rank.
    pub(super) fn first_words(&self, own: BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
        if self.ranks.size() == 1 {
            return Ok(own);
        }
        let json = |error: serde_json::Error| Error::config(format!("the words of rank 0: {error}"));
        let mut bytes = serde_json::to_vec(&own).map_err(json)?;
        self.ranks.broadcast(&mut bytes)?;
        serde_json::from_slice(&bytes).map_err(json)
    }

    /// Gives rank 0's parameters, buffers, optimizer's state, loss scale and generator to all ranks. A run of several ranks begins with
    /// this, so that all have the same bits whatever made their models. [`Trainer::load`] does it too.
    ///
    /// # Errors
    /// When a rank or the device fails, or the ranks have different models.
    pub fn share_state(&mut self, model: &(impl Module + ?Sized)) -> Result<()> {
        if self.ranks.size() == 1 {
            return Ok(());
        }
        let ranks = self.ranks.clone();
        let tensors = model.parameters().state_dict();
        // Ranks with other models would take one message for another.
        let mut said = self.described();
        said.extend(tensors.iter().enumerate().map(|(i, (name, tensor))| {
            (name.clone(), format!("tensor {i}, {} {}", tensor.dtype(), tensor.shape()))
        }));
        agree(&*ranks, &said)?;
        share_tensors(&*ranks, &tensors)?;
        let (position, state) = self.shared_state()?;
        let done = if ranks.rank() == 0 { Ok(()) } else { self.set_state(position[0], state) };
        all_done(&*ranks, done)?;
        self.rng.set_state([position[1], position[2]]);
        all_done(&*ranks, self.optimizer.loaded())
    }

    /// Rank 0's number of steps and state of the generator, and its [`Trainer::state`], on every rank.
    fn shared_state(&self) -> Result<([u64; 3], Vec<StateTensor>)> {
        let ranks = &*self.ranks;
        let json = |error: serde_json::Error| Error::config(format!("the state of rank 0: {error}"));
        let mut state = on_first(ranks, || self.state())?.unwrap_or_default();
        let heads: Vec<(&str, &[usize])> =
            state.iter().map(|(name, shape, _)| (&name[..], &shape[..])).collect();
        let [a, b] = self.rng.state();
        let mut head = serde_json::to_vec(&([self.step(), a, b], heads)).map_err(json)?;
        ranks.broadcast(&mut head)?;
        let (position, heads): ([u64; 3], Vec<(String, Vec<usize>)>) =
            serde_json::from_slice(&head).map_err(json)?;
        state.resize(heads.len(), (String::new(), Shape::new(&[]), Vec::new()));
        for ((name, shape, numbers), (its, sizes)) in state.iter_mut().zip(heads) {
            let mut bytes = bytemuck::cast_slice(numbers).to_vec();
            ranks.broadcast(&mut bytes)?;
            (*name, *shape, *numbers) = (its, Shape::new(&sizes), bytemuck::pod_collect_to_vec(&bytes));
        }
        Ok((position, state))
    }

    /// The first rank whose parameters are other bits than rank 0's, if there is one. Gradients are the same everywhere, but drivers may
    /// round an optimizer's division or root differently. [`Trainer::mend`] makes them the same again.
    ///
    /// # Errors
    /// When a rank or the device fails.
    pub fn differs(&self, model: &(impl Module + ?Sized)) -> Result<Option<usize>> {
        if self.ranks.size() == 1 {
            return Ok(None);
        }
        let all = together(&*self.ranks, hash(model).map(|hash| hash.to_le_bytes().to_vec()))?;
        Ok(all.iter().position(|own| *own != all[0]))
    }

    /// Where a rank's parameters are other bits than rank 0's, shares rank 0's state. Returns the first such rank.
    ///
    /// # Errors
    /// As [`Trainer::differs`] and [`Trainer::share_state`].
    pub fn mend(&mut self, model: &(impl Module + ?Sized)) -> Result<Option<usize>> {
        let differs = self.differs(model)?;
        if differs.is_some() {
            self.share_state(model)?;
        }
        Ok(differs)
    }

    /// A hash of the parameters' bits, which is the same on every rank.
    ///
    /// # Errors
    /// When a rank has other parameters than rank 0, on every rank; when a rank or the device fails.
    pub fn digest(&self, model: &(impl Module + ?Sized)) -> Result<u128> {
        match self.differs(model)? {
            None => hash(model),
            Some(rank) => {
                let error = format!("rank {rank} has ended with other parameters than rank 0");
                known(&*self.ranks, Err(Error::config(error)))
            }
        }
    }

    /// The state of optimizer and loss scale.
    pub(super) fn state(&self) -> Result<Vec<StateTensor>> {
        let mut state = self.optimizer.state_dict()?;
        if let Some(scale) = &self.scale {
            state.extend(scale.state_dict()?);
        }
        Ok(state)
    }

    /// Restores what [`Trainer::state`] returned. A state without a loss scale leaves the scale as it is.
    pub(super) fn set_state(&mut self, steps: u64, mut state: Vec<StateTensor>) -> Result<()> {
        let (mut scaled, optimizer) = match &self.scale {
            Some(_) => state.drain(..).partition(LossScale::is_in),
            None => (Vec::new(), state),
        };
        self.optimizer.load_state(steps, &optimizer)?;
        match self.scale.as_ref().filter(|_| !scaled.is_empty()) {
            Some(scale) => scale.load_state(&mut scaled),
            None => Ok(()),
        }
    }
}

/// Gives rank 0's elements of these tensors, which are the same kinds on all ranks, to all.
fn share_tensors(ranks: &dyn Ranks, tensors: &[(String, Tensor)]) -> Result<()> {
    for (name, tensor) in tensors {
        let mut bytes = on_first(ranks, || bytes_of(tensor))?.unwrap_or_default();
        ranks.broadcast(&mut bytes)?;
        let done = if ranks.rank() == 0 { Ok(()) } else { overwrite(tensor, &bytes) };
        all_done(ranks, done.map_err(|error| Error::config(format!("`{name}` of rank 0: {error}"))))?;
    }
    Ok(())
}

fn hash(model: &(impl Module + ?Sized)) -> Result<u128> {
    let mut hasher = XxHash3_128::new();
    for (_, tensor) in model.parameters().trainable() {
        hasher.write(&bytes_of(&tensor)?);
    }
    Ok(hasher.finish_128())
}

fn bytes_of(tensor: &Tensor) -> Result<Vec<u8>> {
    let place = tensor.contiguous().place();
    tensor.gpu().read(&place.buffer, place.offset, (tensor.count() * tensor.dtype().size()) as u64)
}

/// Checks that the losses of a step have values of the same shapes.
pub(super) fn same_values(first: &[Tensor], own: &[Tensor]) -> Result<()> {
    let shapes = |all: &[Tensor]| all.iter().map(|x| *x.shape()).collect::<Vec<_>>();
    match shapes(first) == shapes(own) {
        true => Ok(()),
        false => Err(unlike(&shapes(first), &shapes(own))),
    }
}

/// What is said of losses with other values.
pub(super) fn unlike(first: &impl Debug, own: &impl Debug) -> Error {
    Error::config(format!(
        "train: the losses of a step have values of different shapes, {first:?} and {own:?}; their means are reported"
    ))
}
