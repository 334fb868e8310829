//! CMA-ES: a search without gradients, for few numbers and scores that are costly. It is what searches for the weights of a merge by
//! what the merged model reaches.
//!
//! Source: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, with its default settings.

use crate::error::Result;
use crate::linalg::symmetric_eigen;
use crate::rng::Rng;
use crate::setters::setters;

/// Settings of [`maximise`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct CmaOptions {
    /// Least and largest value of each number.
    pub bounds: [f64; 2],
    /// How many points are scored at most, the start among them.
    pub evaluations: usize,
    /// Seed of the points.
    pub seed: u64,
}

setters!(CmaOptions { bounds: [f64; 2], evaluations: usize, seed: u64 });

impl Default for CmaOptions {
    /// Between 0 and 1, 100 points.
    fn default() -> CmaOptions {
        CmaOptions { bounds: [0.0, 1.0], evaluations: 100, seed: 0 }
    }
}

/// The best point, and its score.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Found {
    /// The point.
    pub point: Vec<f64>,
    /// Its score.
    pub score: f64,
    /// How many points were scored.
    pub evaluations: usize,
}

/// Searches from `start` for the point with the largest score. Points outside of the bounds are moved to them before they are scored.
/// A score that is NaN counts as the worst.
///
/// # Errors
/// The first error of `score`.
///
/// # Panics
/// When `start` is empty, or the bounds are not ascending.
#[track_caller]
pub fn maximise(
    start: &[f64],
    options: &CmaOptions,
    score: &mut dyn FnMut(&[f64]) -> Result<f64>,
) -> Result<Found> {
    let [low, high] = options.bounds;
    assert!(!start.is_empty() && low < high, "cma: {} numbers from {low} to {high}", start.len());
    let clamped = |x: &[f64]| -> Vec<f64> { x.iter().map(|x| x.clamp(low, high)).collect() };
    let known = |score: f64| if score.is_nan() { f64::NEG_INFINITY } else { score };
    let first = clamped(start);
    let mut best = Found { score: known(score(&first)?), point: first.clone(), evaluations: 1 };
    let mut state = State::new(first, 0.3 * (high - low));
    let mut rng = Rng::new(options.seed);
    while best.evaluations < options.evaluations {
        let basis = state.basis();
        let count = state.size.min(options.evaluations - best.evaluations);
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            let point = clamped(&state.drawn(&basis, &mut rng));
            let value = known(score(&point)?);
            best.evaluations += 1;
            if value > best.score {
                (best.score, best.point) = (value, point.clone());
            }
            all.push((value, point));
        }
        if count < state.size {
            break;
        }
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        state.update(&all.into_iter().map(|(_, point)| point).collect::<Vec<_>>(), &basis);
    }
    Ok(best)
}

/// The distribution that points are drawn from, in the tutorial's names.
struct State {
    n: usize,
    /// Points of a generation: lambda.
    size: usize,
    weights: Vec<f64>,
    mean: Vec<f64>,
    sigma: f64,
    covariance: Vec<f64>,
    path_sigma: Vec<f64>,
    path_c: Vec<f64>,
    generation: i32,
}

/// The covariance as `B D^2 B^T`: the deviations `D`, and the rows of `B^T`.
struct Basis {
    deviations: Vec<f64>,
    vectors: Vec<f64>,
}

impl State {
    fn new(mean: Vec<f64>, sigma: f64) -> State {
        let n = mean.len();
        let size = 4 + (3.0 * (n as f64).ln()) as usize;
        let raw: Vec<f64> =
            (0..size / 2).map(|i| ((size as f64 + 1.0) / 2.0).ln() - (i as f64 + 1.0).ln()).collect();
        let sum: f64 = raw.iter().sum();
        let covariance = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
        State {
            n,
            size,
            weights: raw.into_iter().map(|w| w / sum).collect(),
            mean,
            sigma,
            covariance,
            path_sigma: vec![0.0; n],
            path_c: vec![0.0; n],
            generation: 0,
        }
    }

    fn basis(&self) -> Basis {
        let (values, vectors) = symmetric_eigen(&self.covariance, self.n);
        Basis { deviations: values.iter().map(|v| v.max(1e-20).sqrt()).collect(), vectors }
    }

    fn drawn(&self, basis: &Basis, rng: &mut Rng) -> Vec<f64> {
        let z: Vec<f64> = basis.deviations.iter().map(|d| d * f64::from(rng.normal())).collect();
        let at = |i: usize| (0..self.n).map(|k| z[k] * basis.vectors[k * self.n + i]).sum::<f64>();
        (0..self.n).map(|i| self.mean[i] + self.sigma * at(i)).collect()
    }

    /// Moves the distribution towards the better half of the points, best first.
    fn update(&mut self, points: &[Vec<f64>], basis: &Basis) {
        let n = self.n as f64;
        let effective = 1.0 / self.weights.iter().map(|w| w * w).sum::<f64>();
        let cs = (effective + 2.0) / (n + effective + 5.0);
        let damping = 1.0 + 2.0 * (((effective - 1.0) / (n + 1.0)).sqrt() - 1.0).max(0.0) + cs;
        let cc = (4.0 + effective / n) / (n + 4.0 + 2.0 * effective / n);
        let c1 = 2.0 / ((n + 1.3).powi(2) + effective);
        let cmu = (2.0 * (effective - 2.0 + 1.0 / effective) / ((n + 2.0).powi(2) + effective)).min(1.0 - c1);
        let chi = n.sqrt() * (1.0 - 1.0 / (4.0 * n) + 1.0 / (21.0 * n * n));
        let steps: Vec<Vec<f64>> = points[..self.weights.len()]
            .iter()
            .map(|point| point.iter().zip(&self.mean).map(|(x, m)| (x - m) / self.sigma).collect())
            .collect();
        let step: Vec<f64> =
            (0..self.n).map(|i| steps.iter().zip(&self.weights).map(|(s, w)| w * s[i]).sum()).collect();
        self.mean.iter_mut().zip(&step).for_each(|(m, s)| *m += self.sigma * s);
        // C^-1/2 step = B D^-1 B^T step
        let inner: Vec<f64> = (0..self.n)
            .map(|k| {
                (0..self.n).map(|i| basis.vectors[k * self.n + i] * step[i]).sum::<f64>()
                    / basis.deviations[k]
            })
            .collect();
        let white = |i: usize| (0..self.n).map(|k| basis.vectors[k * self.n + i] * inner[k]).sum::<f64>();
        let scale = (cs * (2.0 - cs) * effective).sqrt();
        for i in 0..self.n {
            self.path_sigma[i] = (1.0 - cs) * self.path_sigma[i] + scale * white(i);
        }
        self.generation += 1;
        let length = self.path_sigma.iter().map(|p| p * p).sum::<f64>().sqrt();
        let settled = (1.0 - (1.0 - cs).powi(2 * self.generation)).sqrt();
        let moving = length / settled < (1.4 + 2.0 / (n + 1.0)) * chi;
        let scale = if moving { (cc * (2.0 - cc) * effective).sqrt() } else { 0.0 };
        for (path, step) in self.path_c.iter_mut().zip(&step) {
            *path = (1.0 - cc) * *path + scale * step;
        }
        let lost = if moving { 0.0 } else { c1 * cc * (2.0 - cc) };
        for i in 0..self.n {
            for j in 0..self.n {
                let ranked: f64 = steps.iter().zip(&self.weights).map(|(s, w)| w * s[i] * s[j]).sum();
                let old = (1.0 - c1 - cmu + lost) * self.covariance[i * self.n + j];
                self.covariance[i * self.n + j] = old + c1 * self.path_c[i] * self.path_c[j] + cmu * ranked;
            }
        }
        self.sigma *= ((cs / damping) * (length / chi - 1.0)).exp().clamp(0.1, 10.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A valley that is turned and 30 times as long as it is wide.
    #[test]
    fn valleys_are_followed() {
        let at = [0.7, 0.2, 0.5];
        let mut score = |x: &[f64]| {
            let d: Vec<f64> = x.iter().zip(at).map(|(x, a)| x - a).collect();
            let (along, across) = (d[0] + d[1] - d[2], d[0] - d[1] + 0.5 * d[2]);
            Ok(-(along * along + 900.0 * across * across + d[2] * d[2]))
        };
        let options = CmaOptions::default().evaluations(2000).seed(3);
        let found = maximise(&[0.1, 0.9, 0.1], &options, &mut score).unwrap();
        assert!(found.score > -1e-6, "{found:?}");
        assert!(found.point.iter().zip(at).all(|(x, a)| (x - a).abs() < 1e-2), "{found:?}");
        assert_eq!(found, maximise(&[0.1, 0.9, 0.1], &options, &mut score).unwrap(), "the same seed");
        assert!(found.evaluations <= 2000);
    }

    #[test]
    fn bounds_and_nan_are_kept_out() {
        let mut most = f64::NEG_INFINITY;
        let mut score = |x: &[f64]| {
            most = x.iter().fold(most, |m, x| m.max(*x));
            Ok(if x[0] > 0.9 { f64::NAN } else { x[0] + x[1] })
        };
        let found = maximise(&[0.5, 0.5], &CmaOptions::default(), &mut score).unwrap();
        assert!(most <= 1.0 && found.score > 1.8 && found.point[0] <= 0.9, "{found:?}");
        let once = maximise(&[2.0], &CmaOptions::default().evaluations(1), &mut |x| Ok(x[0])).unwrap();
        assert_eq!((once.point, once.evaluations), (vec![1.0], 1));
    }
}
