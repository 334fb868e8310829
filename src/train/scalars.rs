//! Steps without gradients: see [`Scalars`](crate::optim::Scalars).

use super::together::Seen;
use super::{Outcome, Trainer};
use crate::dtype::DType;
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
        let mut all = Vec::new();
        for _ in 0..self.parts {
            let Outcome { loss, values } = no_grad(|| loss(rng))?.into();
            all.push(read(&std::iter::once(loss).chain(values).collect::<Vec<_>>())?);
        }
        Ok(means(all))
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
                        let Outcome { loss, values } = no_grad(|| loss(part, rng))?.into();
                        Ok(std::iter::once(loss)
                            .chain(values)
                            .map(|x| x.cast(DType::F32))
                            .collect::<Vec<_>>())
                    };
                    Ok((0..parts).map(one).collect::<Result<Vec<_>>>()?.concat())
                })?;
                recorded.insert(made).outputs()
            }
        };
        let numbers = read(outputs)?;
        Ok(means(numbers.chunks(numbers.len() / parts).map(<[_]>::to_vec).collect()))
    }

    /// Takes a step: losses at both ends of each direction, what the ranks tell each other, and the way that all of them go. `evaluate`
    /// gives the loss of this step's batch wherever the parameters are, and is called with the same generator each time. The loss that
    /// is returned is this rank's. After a failure the parameters are those before the step.
    pub(super) fn scalar_step(
        &mut self,
        lr: f32,
        evaluate: impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<Seen> {
        let place = (self.ranks.rank(), self.ranks.size());
        let stepped = self.told_step(place, lr, evaluate);
        if stepped.is_err() {
            // The first error is the one to tell. A device that has failed moves nothing.
            let _ = self.scalars()?.go(place, None);
        }
        stepped
    }

    fn told_step(
        &mut self,
        place: (usize, usize),
        lr: f32,
        mut evaluate: impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<Seen> {
        let ranks = self.ranks.clone();
        let own = self.slopes(place, &mut evaluate);
        let stop = self.stop.load(Ordering::SeqCst);
        let (message, result) = match own {
            Ok((slopes, numbers)) => (Ok(self.scalars()?.message(&slopes, lr, place.1)), Ok(numbers)),
            Err(error) => (Err(error.clone()), Err(error)),
        };
        let mark = self.scalars()?.mark();
        let mut told = match (&message, stop && place.1 > 1) {
            (Ok(message), false) => ranks.gather_equal(message)?,
            _ if place.1 > 1 => ranks.gather_equal(&mark)?,
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
        let size = self.scalars()?.advance(&told, place.1)?;
        let mut numbers = result?;
        numbers.insert(1, vec![size]);
        Ok(Seen::Here(numbers, None))
    }

    fn scalars(&mut self) -> Result<&mut crate::optim::Scalars> {
        self.optimizer.scalars().ok_or_else(|| Error::config("train: the optimizer takes gradients"))
    }

    /// The slopes along this rank's directions, and the mean of what was read at their ends.
    fn slopes(
        &mut self,
        place: (usize, usize),
        evaluate: &mut impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<(Vec<f64>, Numbers)> {
        // The generator itself, since recorded steps know no other.
        let mut rng = std::mem::replace(&mut self.rng, Rng::new(0));
        let found = self.slopes_by(place, &mut rng, evaluate);
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
        place: (usize, usize),
        rng: &mut Rng,
        evaluate: &mut impl FnMut(&Trainer, &mut Rng) -> Result<Numbers>,
    ) -> Result<(Vec<f64>, Numbers)> {
        let (state, mut slopes, mut all) = (rng.state(), Vec::new(), Vec::new());
        for sample in 0..self.scalars()?.config().samples {
            let mut ends = [0.0; 2];
            for (end, sign) in ends.iter_mut().zip([1.0, -1.0]) {
                self.scalars()?.go(place, Some((sample, sign)))?;
                rng.set_state(state);
                let numbers = evaluate(self, rng)?;
                *end = numbers[0][0];
                all.push(numbers);
            }
            slopes.push(self.scalars()?.slope(ends));
        }
        Ok((slopes, means(all)))
    }
}

fn read(tensors: &[Tensor]) -> Result<Numbers> {
    let start = |x: &Tensor| x.detach().cast(DType::F32).read::<f32>();
    let readings: Vec<Reading> = tensors.iter().map(start).collect::<Result<_>>()?;
    readings.into_iter().map(|reading| Ok(bytemuck::pod_collect_to_vec(&reading.wait()?))).collect()
}

/// The means of numbers that were read several times.
fn means(all: Vec<Numbers>) -> Numbers {
    let count = all.len() as f64;
    let Some(first) = all.first() else { return Vec::new() };
    let mean = |i: usize, j: usize| {
        let sum: f64 =
            all.iter().map(|own| f64::from(*own.get(i).and_then(|x| x.get(j)).unwrap_or(&f32::NAN))).sum();
        (sum / count) as f32
    };
    first.iter().enumerate().map(|(i, own)| (0..own.len()).map(|j| mean(i, j)).collect()).collect()
}
