//! The loss along the segment between two models, and how far it rises above the losses at the ends.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::store::Weights;
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// The model `(1 - t) a + t b`. Each tensor is computed when it is read.
pub struct Interpolated<'a> {
    /// The model at `t = 0`.
    pub a: &'a dyn Weights,
    /// The model at `t = 1`.
    pub b: &'a dyn Weights,
    /// The position between them.
    pub t: f64,
}

impl Weights for Interpolated<'_> {
    fn names(&self) -> Vec<String> {
        self.a.names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.a.shape(name)
    }

    fn is_float(&self, name: &str) -> bool {
        self.a.is_float(name)
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        let [a, b] = [self.a.read(gpu, name)?, self.b.read(gpu, name)?];
        if a.shape() != b.shape() {
            return Err(unlike(name, &a, &b));
        }
        Ok(no_grad(|| a.scale((1.0 - self.t) as f32).add(&b.scale(self.t as f32))))
    }
}

/// Returns `||a - b||` over all tensors.
///
/// # Errors
/// When a tensor cannot be read or the two models differ in shapes.
pub fn distance(gpu: &Gpu, a: &dyn Weights, b: &dyn Weights) -> Result<f64> {
    let mut sum = 0.0;
    for name in a.float_names() {
        let [x, y] = [a.read(gpu, &name)?, b.read(gpu, &name)?];
        if x.shape() != y.shape() {
            return Err(unlike(&name, &x, &y));
        }
        sum += f64::from(no_grad(|| x.sub(&y).square().sum_all()).item()?);
    }
    Ok(sum.sqrt())
}

fn unlike(name: &str, x: &Tensor, y: &Tensor) -> Error {
    Error::config(format!("`{name}` is {} in one model and {} in the other", x.shape(), y.shape()))
}

/// Loss and accuracy of a model on some data.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// Mean loss.
    pub loss: f64,
    /// Fraction of correct predictions.
    pub accuracy: f64,
    /// Mean loss with the logits divided by the best temperature.
    pub tempered_loss: f64,
    /// The temperature that makes this loss least.
    pub temperature: f64,
}

impl Evaluation {
    /// Evaluates logits `[batch, classes]` against labels by cross-entropy, in f64 on the host.
    ///
    /// # Errors
    /// When labels and logits do not fit each other, or the device fails.
    pub fn of(logits: &Tensor, labels: &[u32]) -> Result<Evaluation> {
        let &[batch, classes] = &logits.shape()[..] else {
            return Err(Error::config(format!(
                "evaluation needs logits [batch, classes], got {}",
                logits.shape()
            )));
        };
        if batch != labels.len() || batch == 0 {
            return Err(Error::config(format!(
                "evaluation: {} labels for {batch} rows of logits",
                labels.len()
            )));
        }
        if let Some(at) = labels.iter().position(|&label| label as usize >= classes) {
            return Err(Error::config(format!(
                "label {} of row {at} is none of {classes} classes",
                labels[at]
            )));
        }
        let values = logits.to_vec::<f32>()?;
        // The label's logit is subtracted from each row, so the row's loss is the log of its sum of exponentials.
        let rows: Vec<f64> = values
            .chunks(classes)
            .zip(labels)
            .flat_map(|(row, &label)| row.iter().map(move |x| f64::from(*x) - f64::from(row[label as usize])))
            .collect();
        let right = rows.chunks(classes).zip(labels).filter(|(row, label)| {
            let best = (0..classes).fold(0, |best, i| if row[i] > row[best] { i } else { best });
            best as u32 == **label
        });
        let (temperature, tempered_loss) = temper(&rows, classes);
        Ok(Evaluation {
            loss: cross_entropy(&rows, classes, 1.0),
            accuracy: right.count() as f64 / batch as f64,
            tempered_loss,
            temperature,
        })
    }
}

/// Returns the mean over rows of `log sum_j exp(x_j / temperature)`.
fn cross_entropy(rows: &[f64], classes: usize, inverse_temperature: f64) -> f64 {
    let one = |row: &[f64]| {
        let most = row.iter().fold(f64::NEG_INFINITY, |m, x| m.max(x * inverse_temperature));
        most + row.iter().map(|x| (x * inverse_temperature - most).exp()).sum::<f64>().ln()
    };
    rows.chunks(classes).map(one).sum::<f64>() / (rows.len() / classes) as f64
}

/// Finds the temperature from 1/100 to 100 with the least loss, by golden section search over its logarithm. Returns it with that
/// loss. The loss is convex in the inverse temperature, so it has one minimum.
fn temper(rows: &[f64], classes: usize) -> (f64, f64) {
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let loss = |log: f64| cross_entropy(rows, classes, log.exp());
    let (mut low, mut high) = (-100f64.ln(), 100f64.ln());
    let (mut left, mut right) = (high - golden * (high - low), low + golden * (high - low));
    let (mut at_left, mut at_right) = (loss(left), loss(right));
    for _ in 0..30 {
        if at_left <= at_right {
            (high, right, at_right) = (right, left, at_left);
            left = high - golden * (high - low);
            at_left = loss(left);
        } else {
            (low, left, at_left) = (left, right, at_right);
            right = low + golden * (high - low);
            at_right = loss(right);
        }
    }
    let (log, least) = if at_left <= at_right { (left, at_left) } else { (right, at_right) };
    ((-log).exp(), least)
}

/// Evaluations of evenly spaced models on the segment from one model to another.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LossPath {
    /// Positions on the segment, from 0 to 1.
    pub lambdas: Vec<f64>,
    /// The evaluation at each position.
    pub points: Vec<Evaluation>,
}

impl LossPath {
    /// Evaluates `points` models from `a` to `b`, including both ends. A usual number is 25.
    ///
    /// # Errors
    /// For fewer than two points, and the errors of `evaluate`.
    pub fn between(
        a: &dyn Weights,
        b: &dyn Weights,
        points: usize,
        mut evaluate: impl FnMut(&dyn Weights) -> Result<Evaluation>,
    ) -> Result<LossPath> {
        if points < 2 {
            return Err(Error::config("a path needs two points or more"));
        }
        let lambdas: Vec<f64> = (0..points).map(|i| i as f64 / (points - 1) as f64).collect();
        let points = lambdas.iter().map(|&t| evaluate(&Interpolated { a, b, t })).collect::<Result<_>>()?;
        Ok(LossPath { lambdas, points })
    }

    /// The loss at each point.
    pub fn losses(&self) -> Vec<f64> {
        self.points.iter().map(|point| point.loss).collect()
    }

    /// The loss at each point under its best temperature.
    pub fn tempered_losses(&self) -> Vec<f64> {
        self.points.iter().map(|point| point.tempered_loss).collect()
    }

    /// The evaluation in the middle. With an even number of points it is the first one past the middle.
    pub fn middle(&self) -> &Evaluation {
        &self.points[self.points.len() / 2]
    }
}

/// How far the losses along a path rise above those at its ends, by the two definitions in use. Both are NaN if a loss is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Barrier {
    /// `max_l L(l) - (L(0) + L(1)) / 2` (Re-Basin). It is at least half the difference of the ends' losses.
    pub above_mean: f64,
    /// `max_l [L(l) - (1 - l) L(0) - l L(1)]` (Frankle et al. 2020). It is never negative.
    pub above_line: f64,
}

impl Barrier {
    /// Computes both barriers from losses at evenly spaced points.
    ///
    /// # Panics
    /// When there are fewer than two.
    #[track_caller]
    pub fn of(losses: &[f64]) -> Barrier {
        assert!(losses.len() > 1, "barrier: {} losses; a path has two ends", losses.len());
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        let t = |i: usize| i as f64 / (losses.len() - 1) as f64;
        // `f64::max` would ignore a NaN.
        if losses.iter().any(|loss| loss.is_nan()) {
            return Barrier { above_mean: f64::NAN, above_line: f64::NAN };
        }
        let highest = |base: &dyn Fn(f64) -> f64| {
            losses.iter().enumerate().map(|(i, loss)| loss - base(t(i))).fold(f64::NEG_INFINITY, f64::max)
        };
        Barrier {
            above_mean: highest(&|_| (first + last) / 2.0),
            above_line: highest(&|t| (1.0 - t) * first + t * last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_barriers() {
        let barrier = Barrier::of(&[1.0, 2.5, 2.0, 3.0]);
        assert!((barrier.above_mean - 1.0).abs() < 1e-15);
        assert!((barrier.above_line - (2.5 - 5.0 / 3.0)).abs() < 1e-15);
        assert_eq!(Barrier::of(&[1.0, 0.5, 1.0]).above_line, 0.0);
        assert!(Barrier::of(&[1.0, f64::NAN, 1.0]).above_mean.is_nan());
    }

    /// Logits that are k times the log-frequencies of the labels have the best temperature k.
    #[test]
    fn temperature_is_found() {
        let p = [0.7f64, 0.2, 0.1];
        for k in [0.05, 0.5, 1.0, 3.0, 40.0] {
            let mut rows = Vec::new();
            for (label, count) in [(0, 7), (1, 2), (2, 1)] {
                for _ in 0..count {
                    rows.extend(p.map(|q| k * (q.ln() - p[label].ln())));
                }
            }
            let (temperature, loss) = temper(&rows, 3);
            let entropy = -p.iter().map(|q| q * q.ln()).sum::<f64>();
            assert!(
                (temperature / k - 1.0).abs() < 1e-3 && (loss - entropy).abs() < 1e-6,
                "{k}: {temperature} {loss}"
            );
        }
    }
}
