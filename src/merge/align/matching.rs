//! Weight matching: finds the permutation of one model that brings its weights nearest to another's.
//!
//! The problem is `max over permutations of sum_k <a_k, permuted b_k>`, which is the same as the least distance. With all groups
//! but one held fixed it is a linear assignment, which is solved exactly. Groups are solved in turn until none improves
//! (coordinate descent). The objective never falls, and the result is a local optimum that depends on the start and on the order
//! of visits. Source: Ainsworth, Hayase, Srinivasa 2022, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv
//! 2209.04836.

use super::heads::{self, columns};
use super::pairing::{Cost, Nearness, Pairing};
use super::permutation::{Permutation, Permuted};
use super::plan::{CheckedSpec, Unit};
use super::spec::Spec;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::linalg::assignment::{Goal, assign, assign_from};
use crate::rng::Rng;
use crate::setters::setters;
use crate::store::Weights;
use std::ops::ControlFlow;

/// The order in which groups are visited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum VisitOrder {
    /// As the spec lists them, in every sweep.
    Given,
    /// In a new order every sweep, drawn from the seed.
    #[default]
    Shuffled,
}

/// Settings of [`match_weights`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MatchOptions {
    /// The order in which groups are visited.
    pub order: VisitOrder,
    /// Seed of random orders and random starts.
    pub seed: u64,
    /// Number of runs. The first starts from `start`, the others from random permutations. The run with the largest objective is
    /// kept.
    pub runs: usize,
    /// Most sweeps of a run. A run usually ends after 3 to 50.
    pub sweeps: usize,
    /// A group's new permutation is taken if its value is higher by more than this fraction of it.
    pub tolerance: f64,
    /// The permutation that the first run starts from. `None` is the identity.
    pub start: Option<Permutation>,
    /// Bytes of both models that may stay on the device. Tensors beyond that are read again at every visit.
    pub cache_bytes: u64,
}

setters!(MatchOptions {
    order: VisitOrder,
    seed: u64,
    runs: usize,
    sweeps: usize,
    tolerance: f64,
    start: Option<Permutation>,
    cache_bytes: u64,
});

impl Default for MatchOptions {
    fn default() -> Self {
        MatchOptions {
            order: VisitOrder::Shuffled,
            seed: 0,
            runs: 1,
            sweeps: 100,
            tolerance: 1e-6,
            start: None,
            cache_bytes: 1 << 30,
        }
    }
}

/// The outcome of one visit: one group in one sweep.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Visit {
    /// Run, from 0.
    pub run: usize,
    /// Sweep of the run, from 0.
    pub sweep: usize,
    /// The group's name.
    pub group: String,
    /// The terms of the objective that depend on this group, after the visit.
    pub value: f64,
    /// Whether a better permutation was found and taken.
    pub accepted: bool,
    /// Whether nothing was computed, because no group that this one depends on has changed since its last visit.
    pub skipped: bool,
}

/// A permutation of `b`, and how near it brings `b` to `a`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Matching {
    /// The permutation, to be applied to `b`.
    pub permutation: Permutation,
    /// `sum_k <a_k, b_k>` before permuting.
    pub objective_before: f64,
    /// The same with `b` permuted.
    pub objective: f64,
    /// `||a - b||` before permuting.
    pub distance_before: f64,
    /// The same with `b` permuted.
    pub distance: f64,
    /// Sweeps of the run that was kept, including a last one that changed nothing.
    pub sweeps: usize,
    /// Visits of the run that was kept.
    pub visits: Vec<Visit>,
    /// The largest optimality gap of the groups' last assignments: a bound on what any single group could still gain.
    pub gap: f64,
    /// Whether every group's assignment is proved optimal (up to the tolerance) while the other groups stay as they are. False if
    /// the search ended early, by the limit of sweeps or by `watch`, while a group could still improve.
    pub exact: bool,
}

impl Matching {
    /// Returns `b` permuted. Each tensor is permuted when it is read.
    pub fn permuted<'a>(&'a self, b: &'a dyn Weights) -> Permuted<'a> {
        self.permutation.permuted(b)
    }

    /// Returns `1 - ||a - permuted b|| / ||a - b||`, the fraction of the distance that permuting removes.
    pub fn distance_ratio(&self) -> f64 {
        if self.distance_before == 0.0 { 0.0 } else { 1.0 - self.distance / self.distance_before }
    }
}

/// Finds the permutation that brings `b` nearest to `a`.
///
/// # Errors
/// When the models or the spec do not fit each other (the message lists everything that is wrong), a weight is NaN or infinite,
/// or a file or the device fails.
pub fn match_weights(
    gpu: &Gpu,
    spec: &Spec,
    a: &dyn Weights,
    b: &dyn Weights,
    options: &MatchOptions,
) -> Result<Matching> {
    match_weights_with(gpu, spec, a, b, options, &mut |_| ControlFlow::Continue(()))
}

/// As [`match_weights`], and calls `watch` after every visit. When it breaks, the best permutation so far is the result.
///
/// # Errors
/// As [`match_weights`].
pub fn match_weights_with(
    gpu: &Gpu,
    spec: &Spec,
    a: &dyn Weights,
    b: &dyn Weights,
    options: &MatchOptions,
    watch: &mut dyn FnMut(&Visit) -> ControlFlow<()>,
) -> Result<Matching> {
    if options.runs == 0 || options.tolerance.is_nan() || options.tolerance < 0.0 {
        return Err(Error::config("match: needs at least one run and a tolerance of 0 or more"));
    }
    if options.start.as_ref().is_some_and(|start| start.spec() != spec) {
        return Err(Error::config("match: the permutation to start from belongs to another spec"));
    }
    let pairing = Pairing::new(gpu, CheckedSpec::new(spec, &[a, b])?, a, b, options.cache_bytes);
    pairing.check_finite()?;
    let before = pairing.nearness(&pairing.plan.identity())?;
    let mut rng = Rng::new(options.seed);
    let mut best: Option<(Nearness, Descent)> = None;
    for run in 0..options.runs {
        let start = match (run, &options.start) {
            (0, Some(start)) => start.in_plan(&pairing.plan)?,
            (0, None) => pairing.plan.identity(),
            _ => pairing.plan.random(&mut rng),
        };
        let mut descent = Descent::new(&pairing, start, run);
        let stopped = descent.run(options, &mut rng, watch)?.is_break();
        let nearness = pairing.nearness(&descent.orders)?;
        if best.as_ref().is_none_or(|(best, _)| nearness.objective > best.objective) {
            best = Some((nearness, descent));
        }
        if stopped {
            break;
        }
    }
    let (nearness, descent) = best.expect("there was a run");
    Ok(Matching {
        objective_before: before.objective,
        objective: nearness.objective,
        distance_before: before.squared_distance.sqrt(),
        distance: nearness.squared_distance.sqrt(),
        sweeps: descent.sweeps,
        gap: descent.proofs.iter().flatten().map(|proof| proof.gap).fold(0.0, f64::max),
        exact: descent.stale.iter().all(|stale| !stale)
            && descent.proofs.iter().all(|proof| proof.as_ref().is_some_and(|proof| proof.exact)),
        permutation: Permutation::of(spec, &pairing.plan, descent.orders),
        visits: descent.visits,
    })
}

/// The assignment problem of a group's visit: `C[i, j] = sum_k <slice i of a_k, slice j of b_k>`, with `b` under all
/// permutations but the group's own.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GroupCosts {
    /// The permutation's name and its square matrix, row-major. Heads have four: `q k v o`.
    pub matrices: Vec<(String, Vec<f32>)>,
    /// For heads, the value of each pair of key heads, `[new, old]`, with its elements and query heads in their best order.
    pub head_pairs: Option<Vec<f64>>,
}

/// Returns the costs of one group under a permutation of `b`.
///
/// # Errors
/// As [`match_weights`], and when the permutation's spec has no group of this name or does not fit the models.
pub fn group_costs(
    gpu: &Gpu,
    [a, b]: [&dyn Weights; 2],
    permutation: &Permutation,
    group: &str,
) -> Result<GroupCosts> {
    let plan = CheckedSpec::new(permutation.spec(), &[a, b])?;
    let orders = permutation.in_plan(&plan)?;
    let unit = plan.units.iter().find(|unit| unit.name == group).cloned();
    let unit = unit.ok_or_else(|| Error::config(format!("the permutation spec has no group `{group}`")))?;
    let pairing = Pairing::new(gpu, plan, a, b, 0);
    let costs = pairing.costs(&unit, &orders)?;
    let head_pairs = match (&unit.heads, &costs[..]) {
        (Some(sizes), [q, k, v, o]) => {
            Some(heads::solve(sizes, [q, k, v, o].map(|cost| &cost.values[..]))?.pairs)
        }
        _ => None,
    };
    let names = unit.orders.iter().map(|&order| pairing.plan.orders[order].0.clone());
    let matrices = names.zip(costs).map(|(name, cost)| (name, cost.values)).collect();
    Ok(GroupCosts { matrices, head_pairs })
}

/// Returns `sum_k <a_k, b_k>` over the tensors that are compared.
pub(in crate::merge) fn inner_product(
    gpu: &Gpu,
    spec: &Spec,
    a: &dyn Weights,
    b: &dyn Weights,
) -> Result<f64> {
    let plan = CheckedSpec::new(spec, &[a, b])?;
    let identity = plan.identity();
    Ok(Pairing::new(gpu, plan, a, b, 0).nearness(&identity)?.objective)
}

/// The optimality certificate of a group's last assignment.
pub(in crate::merge) struct Proof {
    pub gap: f64,
    pub exact: bool,
}

/// The best orders of a unit for given costs.
pub(in crate::merge) struct Solved {
    pub orders: Vec<Vec<u32>>,
    pub value: f64,
    pub proof: Proof,
    /// Column potentials. The unit's next assignment starts from these.
    pub prices: Option<Vec<f64>>,
}

/// Solves a unit's assignment, starting from the prices of an earlier, similar problem if given.
pub(in crate::merge) fn solve(unit: &Unit, costs: &[Cost], prices: Option<&[f64]>) -> Result<Solved> {
    if let (Some(sizes), [q, k, v, o]) = (&unit.heads, costs) {
        let found = heads::solve(sizes, [q, k, v, o].map(|cost| &cost.values[..]))?;
        let orders = found.order.flat(sizes).to_vec();
        let value = value(costs, orders.iter());
        return Ok(Solved {
            orders,
            value,
            proof: Proof { gap: found.gap, exact: found.exact },
            prices: None,
        });
    }
    let Cost { values, device } = &costs[0];
    let n = values.len().isqrt();
    let best = match (prices, device) {
        (Some(prices), _) => assign_from(values, [n, n], Goal::Maximize, prices)?,
        // In the first sweep there are no prices to start from, and a GPU is faster at finding some.
        (None, Some(cost)) if !cost.gpu().class().is_cpu() => cost.assignment(Goal::Maximize)?,
        (None, _) => assign(values, [n, n], Goal::Maximize)?,
    };
    let orders = vec![columns(&best).into_iter().map(|column| column as u32).collect::<Vec<u32>>()];
    let value = value(costs, orders.iter());
    Ok(Solved { orders, value, proof: Proof { gap: best.gap, exact: best.exact }, prices: Some(best.dual_v) })
}

/// Returns the value of orders under costs.
pub(in crate::merge) fn value<'a>(costs: &[Cost], orders: impl Iterator<Item = &'a Vec<u32>>) -> f64 {
    let one = |(cost, order): (&Cost, &Vec<u32>)| {
        let n = order.len();
        order.iter().enumerate().map(|(i, &j)| f64::from(cost.values[i * n + j as usize])).sum::<f64>()
    };
    costs.iter().zip(orders).map(one).sum()
}

/// One run of coordinate descent.
struct Descent<'a> {
    pairing: &'a Pairing<'a>,
    run: usize,
    orders: Vec<Vec<u32>>,
    /// Per unit, whether its costs may have changed since it was last solved.
    stale: Vec<bool>,
    values: Vec<f64>,
    prices: Vec<Option<Vec<f64>>>,
    proofs: Vec<Option<Proof>>,
    sweeps: usize,
    visits: Vec<Visit>,
}

impl<'a> Descent<'a> {
    fn new(pairing: &'a Pairing<'a>, orders: Vec<Vec<u32>>, run: usize) -> Descent<'a> {
        let units = pairing.plan.units.len();
        Descent {
            pairing,
            run,
            orders,
            stale: vec![true; units],
            values: vec![0.0; units],
            prices: vec![None; units],
            proofs: (0..units).map(|_| None).collect(),
            sweeps: 0,
            visits: Vec::new(),
        }
    }

    /// Sweeps until one changes nothing, `options.sweeps` is reached or `watch` breaks.
    fn run(
        &mut self,
        options: &MatchOptions,
        rng: &mut Rng,
        watch: &mut dyn FnMut(&Visit) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let neighbours = self.pairing.plan.neighbours();
        let mut sequence: Vec<usize> = (0..self.stale.len()).collect();
        for sweep in 0..options.sweeps {
            if options.order == VisitOrder::Shuffled {
                rng.shuffle(&mut sequence);
            }
            let mut changed = false;
            self.sweeps = sweep + 1;
            for &unit in &sequence {
                let skipped = !self.stale[unit];
                let accepted = !skipped && self.visit(unit, options.tolerance)?;
                if accepted {
                    neighbours[unit].iter().for_each(|&other| self.stale[other] = true);
                }
                changed |= accepted;
                let group = self.pairing.plan.units[unit].name.clone();
                let value = self.values[unit];
                let visit = Visit { run: self.run, sweep, group, value, accepted, skipped };
                let flow = watch(&visit);
                self.visits.push(visit);
                if flow.is_break() {
                    return Ok(flow);
                }
            }
            if !changed {
                break;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Solves one unit. Returns whether its orders changed.
    fn visit(&mut self, at: usize, tolerance: f64) -> Result<bool> {
        let unit = &self.pairing.plan.units[at];
        let costs = self.pairing.costs(unit, &self.orders)?;
        let found = solve(unit, &costs, self.prices[at].as_deref())?;
        let now = value(&costs, unit.orders.iter().map(|&order| &self.orders[order]));
        let better = found.value > now + tolerance * found.value.abs();
        self.values[at] = if better { found.value } else { now };
        if better {
            unit.orders.iter().zip(found.orders).for_each(|(&order, new)| self.orders[order] = new);
        }
        self.prices[at] = found.prices;
        self.proofs[at] = Some(found.proof);
        self.stale[at] = false;
        Ok(better)
    }
}
