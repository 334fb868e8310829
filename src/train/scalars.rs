//! Steps without gradients: see [`Scalars`](crate::optim::Scalars).

use super::together::{Seen, same_values, unlike};
use super::{Outcome, Trainer};
use crate::error::{Error, Result};
use crate::gpu::readback::Reading;
use crate::ranks::together;
use crate::rng::Rng;
use crate::step::Step;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::sync::atomic::Ordering;

/// Loss and further values of a step, read.
pub(super) type Numbers = Vec<Vec<f32>>;

impl Trainer {
    /// Whether the optimizer evaluates losses and takes no gradients.
    pub(super) fn is_by_scalars(&mut self) -> bool {
        self.optimizer.scalars().is_some()
    }

    /// Evaluates the losses of a step as they are, and returns their means.
    pub(super) fn evaluated<L: Into<Outcome>>(
        &self,
        rng: &mut Rng,
        mut loss: impl FnMut(&mut Rng) -> Result<L>,
    ) -> Result<Numbers> {
        let one = |_| read(&no_grad(|| loss(rng))?.into().tensors()?);
        means((0..self.parts).map(one).collect::<Result<_>>()?)
    }

    /// [`Trainer::evaluated`] of recorded losses.
    pub(super) fn evaluated_again<L: Into<Outcome>>(
        &self,
        rng: &mut Rng,
        recorded: &mut Option<Step>,
        inputs: &[Tensor],
        loss: &mut impl FnMut(&[Tensor], &mut Rng) -> Result<L>,
    ) -> Result<Numbers> {
        let (parts, all): (usize, Vec<&Tensor>) = (self.parts, inputs.iter().collect());
        let first = all.first().ok_or_else(|| Error::config("train: the batch has no tensors"))?;
        let outputs = match recorded {
            Some(recorded) => recorded.run(&all)?,
            None => {
                let each = inputs.len() / parts;
                let made = Step::record(first.gpu(), &all, |inputs| {
                    let one = |i: usize| {
                        let part = &inputs[i * each..(i + 1) * each];
                        no_grad(|| loss(part, rng))?.into().tensors()
                    };
                    let all = (0..parts).map(one).collect::<Result<Vec<_>>>()?;
                    all.iter().try_for_each(|own| same_values(&all[0], own))?;
                    Ok(all.concat())
                })?;
                recorded.insert(made).outputs()
            }
        };
        let numbers = read(outputs)?;
        means(numbers.chunks(numbers.len() / parts).map(<[_]>::to_vec).collect())
    }

    /// Takes a step: losses at both ends of each direction, what the ranks tell each other, and the way that all of them go. `evaluate`
    /// gives the loss of this step's batch wherever the parameters are, and is called with the same generator each time. The loss that
    /// is returned is this rank's. After a failure the parameters are those before the step.
    pub(super) fn scalar_step(
        &mut self,
        lr: f32,
        evaluate: impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<Seen> {
        let stepped = self.told_step(lr, evaluate);
        if stepped.is_err() {
            // The first error is the one to tell. A device that has failed moves nothing.
            let _ = self.scalars()?.go(0, None);
        }
        stepped
    }

    fn told_step(
        &mut self,
        lr: f32,
        mut evaluate: impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<Seen> {
        let ranks = self.ranks.clone();
        let own = self.own_message(lr, &mut evaluate);
        let stop = self.stop.load(Ordering::SeqCst);
        let (message, result) = match own {
            Ok((message, numbers)) => (Ok(message), Ok(numbers)),
            Err(error) => (Err(error.clone()), Err(error)),
        };
        let mark = self.scalars()?.mark();
        let mut told = match (&message, stop && ranks.size() > 1) {
            (Ok(message), false) => ranks.gather_equal(message)?,
            _ if ranks.size() > 1 => ranks.gather_equal(&mark)?,
            _ => return Err(result.err().unwrap_or_else(|| Error::config("train: no scalar was found"))),
        };
        if told.chunks_exact(mark.len()).any(|message| message == mark) {
            // Some rank has failed, or was stopped. What it has found follows.
            let more = message.map(|message| [&message[..], &[u8::from(stop)]].concat());
            let all = together(&*ranks, more)?;
            self.stopped = all.iter().any(|message| message.last() == Some(&1));
            told =
                all.iter().flat_map(|message| &message[..message.len().saturating_sub(1)]).copied().collect();
        }
        let size = self.scalars()?.advance(&told, ranks.size())?;
        let mut numbers = result?;
        numbers.insert(1, vec![size]);
        Ok(Seen::Here(numbers, None))
    }

    fn scalars(&mut self) -> Result<&mut crate::optim::Scalars> {
        self.optimizer.scalars().ok_or_else(|| Error::config("train: the optimizer takes gradients"))
    }

    /// What this rank has to tell, and what was read.
    fn own_message(
        &mut self,
        lr: f32,
        evaluate: &mut impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<(Vec<u8>, Numbers)> {
        let size = self.ranks.size();
        self.scalars()?.begin(lr, size)?;
        let (slopes, numbers) = self.slopes(evaluate)?;
        Ok((self.scalars()?.message(&slopes, lr, size)?, numbers))
    }

    /// The slopes along this rank's directions, and the mean of what was read at their ends.
    fn slopes(
        &mut self,
        evaluate: &mut impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<(Vec<f64>, Numbers)> {
        // The generator itself, since recorded steps know no other.
        let mut rng = std::mem::replace(&mut self.rng, Rng::new(0));
        let found = self.slopes_by(&mut rng, evaluate);
        self.rng = rng;
        let (slopes, numbers) = found?;
        match slopes.iter().all(|slope| slope.is_finite()) {
            true => Ok((slopes, numbers)),
            false => Err(Error::config(format!(
                "train: the loss of step {} is not finite; begin again with a smaller learning rate, or go on from a checkpoint before it",
                self.step() + 1
            ))),
        }
    }

    fn slopes_by(
        &mut self,
        rng: &mut Rng,
        evaluate: &mut impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<(Vec<f64>, Numbers)> {
        let (rank, state) = (self.ranks.rank(), rng.state());
        let (mut slopes, mut all) = (Vec::new(), Vec::new());
        for sample in 0..self.scalars()?.config().samples {
            let mut ends = [0.0; 2];
            for (end, sign) in ends.iter_mut().zip([1.0, -1.0]) {
                self.scalars()?.go(rank, Some((sample, sign)))?;
                rng.set_state(state);
                let numbers = evaluate(self, rng)?;
                *end = numbers[0][0];
                all.push(numbers);
            }
            slopes.push(self.scalars()?.slope(ends));
        }
        Ok((slopes, means(all)?))
    }
}

fn read(tensors: &[Tensor]) -> Result<Numbers> {
    let readings: Vec<Reading> = tensors.iter().map(Tensor::read::<f32>).collect::<Result<_>>()?;
    readings.into_iter().map(|reading| Ok(bytemuck::pod_collect_to_vec(&reading.wait()?))).collect()
}

/// The means of numbers that were read several times.
fn means(all: Vec<Numbers>) -> Result<Numbers> {
    let lengths = |own: &Numbers| own.iter().map(Vec::len).collect::<Vec<_>>();
    let first = all.first().map(lengths).unwrap_or_default();
    if let Some(other) = all.iter().map(lengths).find(|other| *other != first) {
        return Err(unlike(&first, &other));
    }
    let mean = |i: usize, j: usize| {
        let sum: f64 = all.iter().map(|own| f64::from(own[i][j])).sum();
        (sum / all.len() as f64) as f32
    };
    Ok(first.iter().enumerate().map(|(i, n)| (0..*n).map(|j| mean(i, j)).collect()).collect())
}
