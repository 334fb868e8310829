//! MAP finds the trade-offs between tasks from few evaluations. Each task's metric gets a quadratic surrogate in the scaling
//! coefficients of the task vectors, and a search over the surrogates finds the Pareto front.
//!
//! Source: Li et al., arXiv 2406.07529. The search is NSGA-II (Deb et al. 2002).

use crate::error::{Error, Result};
use crate::linalg;
use crate::rng::Rng;
use crate::setters::setters;

/// The function that maps the quadratic to the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Link {
    /// The metric is the quadratic itself. Suits losses.
    Identity,
    /// The metric is the quadratic's sigmoid. Suits accuracies.
    Sigmoid,
    /// The metric is the quadratic's softplus `log(1 + exp x)`. Suits losses, which are never negative.
    Softplus,
}

impl Link {
    fn apply(self, x: f64) -> f64 {
        match self {
            Link::Identity => x,
            Link::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            // Without overflow.
            Link::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        }
    }

    fn inverse(self, y: f64) -> f64 {
        match self {
            Link::Identity => y,
            Link::Sigmoid => {
                let y = y.clamp(1e-4, 1.0 - 1e-4);
                (y / (1.0 - y)).ln()
            }
            Link::Softplus => {
                let y = y.max(1e-6);
                y + (-(-y).exp_m1()).ln()
            }
        }
    }
}

/// A task's metric as a function of the coefficients `c`: `link(c^T Q c + b . c + e)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Surrogate {
    coefficients: Vec<f64>,
    link: Link,
}

/// Returns `1`, all `c_i` and all `c_i c_j`: `(K + 1)(K + 2) / 2` numbers.
fn features(c: &[f64]) -> Vec<f64> {
    let products = (0..c.len()).flat_map(|i| (i..c.len()).map(move |j| c[i] * c[j]));
    std::iter::once(1.0).chain(c.iter().copied()).chain(products).collect()
}

impl Surrogate {
    /// Fits a surrogate by least squares to metrics `values` that were measured at the coefficients `points`.
    ///
    /// # Errors
    /// When there are fewer than `(K + 1)(K + 2) / 2` points in general position.
    ///
    /// # Panics
    /// When there is not one value per point, or points have different lengths.
    #[track_caller]
    pub fn fit(points: &[Vec<f64>], values: &[f64], link: Link) -> Result<Surrogate> {
        assert!(points.len() == values.len(), "map: {} points, {} values", points.len(), values.len());
        let rows: Vec<Vec<f64>> = points.iter().map(|c| features(c)).collect();
        let n = rows.first().map_or(0, Vec::len);
        assert!(rows.iter().all(|row| row.len() == n), "map: points of different lengths");
        let few =
            || Error::config(format!("map: {n} or more points in general position determine a surrogate"));
        if rows.len() < n || n == 0 {
            return Err(few());
        }
        let mut gram = vec![0.0; n * n];
        let mut right = vec![0.0; n];
        for (row, value) in rows.iter().zip(values) {
            let value = link.inverse(*value);
            for i in 0..n {
                right[i] += row[i] * value;
                (0..n).for_each(|j| gram[i * n + j] += row[i] * row[j]);
            }
        }
        let coefficients = linalg::solve_positive(&gram, n, &right, 1).ok_or_else(few)?;
        Ok(Surrogate { coefficients, link })
    }

    /// Predicts the metric at `c`.
    pub fn value(&self, c: &[f64]) -> f64 {
        self.link.apply(features(c).iter().zip(&self.coefficients).map(|(f, w)| f * w).sum())
    }

    /// Returns the fraction of the values' variance that the surrogate explains.
    pub fn r_squared(&self, points: &[Vec<f64>], values: &[f64]) -> f64 {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let rest: f64 = points.iter().zip(values).map(|(c, v)| (v - self.value(c)).powi(2)).sum();
        let all = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
        // Of equal values there is nothing to explain.
        if all > 0.0 { 1.0 - rest / all } else { f64::from(u8::from(rest <= 1e-12)) }
    }
}

/// Draws `n` points to measure at, uniformly from a cube.
pub fn samples(tasks: usize, n: usize, [low, high]: [f64; 2], rng: &mut Rng) -> Vec<Vec<f64>> {
    let mut draw = Draw::new(rng);
    (0..n).map(|_| (0..tasks).map(|_| low + (high - low) * draw.next()).collect()).collect()
}

/// A point of a front: coefficients, and the objective of each task there.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Scaling coefficients.
    pub coefficients: Vec<f64>,
    /// Objectives. Larger is better.
    pub objectives: Vec<f64>,
}

/// Settings of [`front`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Search {
    /// Least and largest coefficient.
    pub bounds: [f64; 2],
    /// Points per generation, an even number.
    pub population: usize,
    /// Number of generations.
    pub generations: usize,
}

setters!(Search { bounds: [f64; 2], population: usize, generations: usize });

impl Default for Search {
    /// The settings of the paper's code: coefficients from -3 to 3, 100 points, 150 generations.
    fn default() -> Search {
        Search { bounds: [-3.0, 3.0], population: 100, generations: 150 }
    }
}

/// Searches for the Pareto front: points of which none dominates another, well spread over the front. `on` is called after each
/// generation, with its number.
///
/// # Errors
/// What `on` returns.
///
/// # Panics
/// When the population is odd or below 4, or there are no tasks.
#[track_caller]
pub fn front(
    objectives: &dyn Fn(&[f64]) -> Vec<f64>,
    tasks: usize,
    search: &Search,
    rng: &mut Rng,
    on: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Point>> {
    let size = search.population;
    assert!(size >= 4 && size.is_multiple_of(2) && tasks > 0, "map: {size} points for {tasks} tasks");
    let point = |coefficients: Vec<f64>| Point { objectives: objectives(&coefficients), coefficients };
    let mut living: Vec<Point> = samples(tasks, size, search.bounds, rng).into_iter().map(point).collect();
    for generation in 0..search.generations {
        let merit = merits(&living);
        let mut draw = Draw::new(rng);
        let mut parent = || {
            let [a, b] = [0, 1].map(|_| (draw.next() * size as f64) as usize);
            if merit[a] <= merit[b] { a } else { b }
        };
        let pairs: Vec<[usize; 2]> = (0..size / 2).map(|_| [parent(), parent()]).collect();
        for [a, b] in pairs {
            let [a, b] = [&living[a], &living[b]].map(|p| p.coefficients.clone());
            let children = crossed(&a, &b, &mut draw).map(|child| mutated(child, search.bounds, &mut draw));
            living.extend(children.map(point));
        }
        let merit = merits(&living);
        let mut order: Vec<usize> = (0..living.len()).collect();
        order.sort_by(|&a, &b| merit[a].0.cmp(&merit[b].0).then(merit[a].1.total_cmp(&merit[b].1)));
        living = order[..size].iter().map(|&i| living[i].clone()).collect();
        on(generation + 1)?;
    }
    let ranks = ranks(&living);
    Ok(living.into_iter().zip(ranks).filter(|(_, rank)| *rank == 0).map(|(point, _)| point).collect())
}

/// A source of single uniform draws.
struct Draw<'a> {
    rng: &'a mut Rng,
    buffer: Vec<f32>,
}

impl Draw<'_> {
    fn new(rng: &mut Rng) -> Draw<'_> {
        Draw { rng, buffer: Vec::new() }
    }

    fn next(&mut self) -> f64 {
        if self.buffer.is_empty() {
            self.buffer = vec![0.0; 256];
            self.rng.fill_uniform(&mut self.buffer);
        }
        f64::from(self.buffer.pop().unwrap_or(0.0))
    }
}

/// Whether `a` is at least as good for all objectives and better for one.
fn dominates(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a >= b) && a.iter().zip(b).any(|(a, b)| a > b)
}

/// Returns the front of each point: 0 if no point dominates it, 1 if only points of front 0 do, and so on.
fn ranks(points: &[Point]) -> Vec<usize> {
    let n = points.len();
    let over = |i: usize, j: usize| dominates(&points[i].objectives, &points[j].objectives);
    let mut above: Vec<usize> = (0..n).map(|j| (0..n).filter(|&i| over(i, j)).count()).collect();
    // NaN compares with nothing, so a point with a NaN would dominate all or none. Such points are on no front.
    let known = |i: usize| points[i].objectives.iter().all(|o| !o.is_nan());
    (0..n).filter(|&i| !known(i)).for_each(|i| above[i] = usize::MAX);
    let (mut ranks, mut rank, mut left) = (vec![usize::MAX; n], 0, (0..n).filter(|&i| known(i)).count());
    while left > 0 {
        let front: Vec<usize> = (0..n).filter(|&i| ranks[i] == usize::MAX && above[i] == 0).collect();
        for &i in &front {
            ranks[i] = rank;
            (0..n).filter(|&j| over(i, j)).for_each(|j| above[j] -= 1);
        }
        left -= front.len();
        rank += 1;
    }
    ranks
}

/// Returns what points are selected by, smallest first: the front, then the negated crowding distance.
fn merits(points: &[Point]) -> Vec<(usize, f64)> {
    let ranks = ranks(points);
    let mut room = vec![0.0f64; points.len()];
    for rank in 0..=ranks.iter().copied().filter(|&r| r < usize::MAX).max().unwrap_or(0) {
        let front: Vec<usize> = (0..points.len()).filter(|&i| ranks[i] == rank).collect();
        for o in 0..points[0].objectives.len() {
            let value = |i: usize| points[i].objectives[o];
            let mut order = front.clone();
            order.sort_by(|&a, &b| value(a).total_cmp(&value(b)));
            let [Some(&first), Some(&last)] = [order.first(), order.last()] else { continue };
            let width = (value(last) - value(first)).max(f64::MIN_POSITIVE);
            (room[first], room[last]) = (f64::INFINITY, f64::INFINITY);
            for three in order.windows(3) {
                room[three[1]] += (value(three[2]) - value(three[0])) / width;
            }
        }
    }
    ranks.into_iter().zip(room).map(|(rank, room)| (rank, -room)).collect()
}

/// Simulated binary crossover (Deb & Agrawal 1995) with distribution index 15.
fn crossed(a: &[f64], b: &[f64], draw: &mut Draw) -> [Vec<f64>; 2] {
    let mut children = [a.to_vec(), b.to_vec()];
    for i in 0..a.len() {
        let u = draw.next();
        let spread =
            if u < 0.5 { (2.0 * u).powf(1.0 / 16.0) } else { (2.0 - 2.0 * u).recip().powf(1.0 / 16.0) };
        let (middle, half) = ((a[i] + b[i]) / 2.0, spread * (a[i] - b[i]) / 2.0);
        (children[0][i], children[1][i]) = (middle + half, middle - half);
    }
    children
}

/// Polynomial mutation with distribution index 20, of one coefficient on average, clamped to the bounds.
fn mutated(mut c: Vec<f64>, [low, high]: [f64; 2], draw: &mut Draw) -> Vec<f64> {
    let rate = 1.0 / c.len() as f64;
    for x in &mut c {
        if draw.next() < rate {
            let u = draw.next();
            let step = match u {
                0.5.. => 1.0 - (2.0 - 2.0 * u).powf(1.0 / 21.0),
                _ => (2.0 * u).powf(1.0 / 21.0) - 1.0,
            };
            *x += step * (high - low);
        }
        *x = x.clamp(low, high);
    }
    c
}

/// Returns the area that points of two objectives dominate above a reference point.
pub fn hypervolume(points: &[[f64; 2]], reference: [f64; 2]) -> f64 {
    let mut points: Vec<[f64; 2]> = points.to_vec();
    points.sort_by(|a, b| b[0].total_cmp(&a[0]));
    let (mut area, mut height) = (0.0, reference[1]);
    for [x, y] in points {
        if x > reference[0] && y > height {
            area += (x - reference[0]) * (y - height);
            height = y;
        }
    }
    area
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_and_fronts() {
        assert_eq!(hypervolume(&[[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0]], [0.0, 0.0]), 6.0);
        assert_eq!(hypervolume(&[[1.0, 3.0], [-1.0, 9.0]], [0.0, 1.0]), 2.0);
        let point = |a: f64, b: f64| Point { coefficients: vec![], objectives: vec![a, b] };
        let points = [point(1.0, 3.0), point(2.0, 2.0), point(1.0, 2.0), point(0.0, 0.0), point(3.0, 1.0)];
        assert_eq!(ranks(&points), [0, 0, 1, 2, 0]);
    }

    /// A quadratic is recovered from as many points as it has coefficients, and fewer points are refused.
    #[test]
    fn quadratics_are_found() {
        let metric = |c: &[f64]| 1.0 - 0.5 * c[0] + 2.0 * c[0] * c[1] - c[1] * c[1];
        for (link, n) in [(Link::Identity, 6), (Link::Sigmoid, 9), (Link::Softplus, 9)] {
            let points = samples(2, n, [-1.0, 1.0], &mut Rng::new(3));
            let values: Vec<f64> = points.iter().map(|c| link.apply(metric(c))).collect();
            let fit = Surrogate::fit(&points, &values, link).unwrap();
            let at = [0.3, -0.8];
            assert!((fit.value(&at) - link.apply(metric(&at))).abs() < 1e-9);
            assert!(fit.r_squared(&points, &values) > 1.0 - 1e-12);
            assert!(Surrogate::fit(&points[..5], &values[..5], link).is_err());
            assert!(Surrogate::fit(&vec![points[0].clone(); 9], &[values[0]; 9], link).is_err());
        }
    }

    #[test]
    fn what_is_no_number_is_on_no_front() {
        let half = |c: &[f64]| match c[0] {
            x if x < 0.0 => vec![f64::NAN, 1e9],
            x if x > 2.5 => vec![f64::INFINITY, f64::NEG_INFINITY],
            x => vec![x, -x],
        };
        let search = Search { population: 20, generations: 10, ..Search::default() };
        let stop = &mut |generation| if generation == 3 { Err(Error::config("stopped")) } else { Ok(()) };
        assert!(front(&half, 1, &search, &mut Rng::new(1), stop).is_err());
        let front = front(&half, 1, &search, &mut Rng::new(1), &mut |_| Ok(())).unwrap();
        assert!(!front.is_empty() && front.iter().all(|p| p.objectives.iter().all(|o| !o.is_nan())));
    }
}
