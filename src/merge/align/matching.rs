//! Weight matching: the permutation of one model that brings its weights nearest to another's.
//!
//! `max over permutations of sum_k <a_k, permuted b_k>`, the same as the least distance. With all groups but one held fixed it is
//! a linear assignment, solved exactly; groups take turns until none improves (coordinate descent), so the objective never falls
//! and the end is a local optimum, which depends on the start and the order. Source: Ainsworth, Hayase, Srinivasa 2022, "Git
//! Re-Basin: Merging Models modulo Permutation Symmetries", arXiv 2209.04836.

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

/// In which order groups are visited.
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
    /// In which order groups are visited.
    pub order: VisitOrder,
    /// Of orders and random starts.
    pub seed: u64,
    /// Runs: the first from `start`, the others from random permutations. The one with the largest objective is kept.
    pub runs: usize,
    /// Most sweeps of a run; 3 to 50 are usual.
    pub sweeps: usize,
    /// A new permutation is taken if its value is higher by more than this share.
    pub tolerance: f64,
    /// Where the first run starts; from the order of `b` as it is if `None`.
    pub start: Option<Permutation>,
    /// Bytes of both models that stay on the device; tensors beyond are read again at every visit.
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

/// What happened at one group in one sweep.
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
    /// Whether nothing was computed because no group that this one depends on has moved.
    pub skipped: bool,
}

/// A permutation of `b`, and how near it brings `b` to `a`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Matching {
    /// What moves where.
    pub permutation: Permutation,
    /// `sum_k <a_k, b_k>` of the models as they are.
    pub objective_before: f64,
    /// The same with `b` permuted.
    pub objective: f64,
    /// `||a - b||` of the models as they are.
    pub distance_before: f64,
    /// The same with `b` permuted.
    pub distance: f64,
    /// Sweeps of the run that was kept, the last one without a change included.
    pub sweeps: usize,
    /// Visits of the run that was kept.
    pub visits: Vec<Visit>,
    /// The largest gap of the last certificate of any group: how much more any single group's assignment could be worth.
    pub gap: f64,
    /// Whether every group's assignment is proved to be the best, the others held fixed as they are now: not where the search was
    /// ended while one of them could still change.
    pub exact: bool,
}

impl Matching {
    /// `b` under the permutation, each tensor moved when it is read.
    pub fn permuted<'a>(&'a self, b: &'a dyn Weights) -> Permuted<'a> {
        self.permutation.permuted(b)
    }

    /// `1 - ||a - permuted b|| / ||a - b||`, how much of the distance permuting takes away.
    pub fn distance_ratio(&self) -> f64 {
        if self.distance_before == 0.0 { 0.0 } else { 1.0 - self.distance / self.distance_before }
    }
}

/// Permutes `b` towards `a`.
///
/// # Errors
/// When models or spec do not fit each other (everything that is wrong is listed), a weight is NaN or infinite, or a file or the
/// device fails.
pub fn match_weights(
    gpu: &Gpu,
    spec: &Spec,
    a: &dyn Weights,
    b: &dyn Weights,
    options: &MatchOptions,
) -> Result<Matching> {
    match_weights_with(gpu, spec, a, b, options, &mut |_| ControlFlow::Continue(()))
}

/// As [`match_weights`], telling `watch` of every visit; when it breaks, the permutations so far are the result.
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

/// What a group's visit would solve: `C[i, j] = sum_k <slice i of a_k, slice j of b_k>`, `b` under all permutations but the
/// group's own.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GroupCosts {
    /// Name of the permutation and its square matrix, row-major: one, or for heads `q k v o`.
    pub matrices: Vec<(String, Vec<f32>)>,
    /// For heads, what each pair of key heads, new times old, is worth with its elements and query heads in their best order.
    pub head_pairs: Option<Vec<f64>>,
}

/// The costs of one group under a permutation of `b`.
///
/// # Errors
/// As [`match_weights`], and when the spec has no such group or the permutation is none of the spec.
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

/// `sum_k <a_k, b_k>` over the tensors that are compared.
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

/// What is known of a group's last assignment.
pub(in crate::merge) struct Proof {
    pub gap: f64,
    pub exact: bool,
}

/// The best orders of a unit for given costs.
pub(in crate::merge) struct Solved {
    pub orders: Vec<Vec<u32>>,
    pub value: f64,
    pub proof: Proof,
    /// Column potentials, to start the next assignment of this unit from.
    pub prices: Option<Vec<f64>>,
}

/// Solves a unit exactly, from the prices of an earlier, similar problem if there are any.
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
        // Without prices of an earlier sweep a GPU finds some.
        (None, Some(cost)) if !cost.gpu().class().is_cpu() => cost.assignment(Goal::Maximize)?,
        (None, _) => assign(values, [n, n], Goal::Maximize)?,
    };
    let orders = vec![columns(&best).into_iter().map(|column| column as u32).collect::<Vec<u32>>()];
    let value = value(costs, orders.iter());
    Ok(Solved { orders, value, proof: Proof { gap: best.gap, exact: best.exact }, prices: Some(best.dual_v) })
}

/// What orders are worth under costs.
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
    /// By unit: whether its costs changed since it was solved.
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

    /// Sweeps until a whole one changes nothing.
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

    /// Solves one unit; whether its orders changed.
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
