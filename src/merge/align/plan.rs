//! Checks a spec against models: finds every permutation's size and every tensor's moves, and reports all faults at once.

use super::heads::{HeadOrder, HeadSizes};
use super::spec::{Axis, GroupKind, Heads, Spec, fits};
use crate::error::{Error, Result};
use crate::rng::Rng;
use crate::store::Weights;
use std::collections::{BTreeMap, BTreeSet};

/// The permutation of one axis of a tensor.
#[derive(Clone, Debug)]
pub(in crate::merge) struct Move {
    pub axis: usize,
    pub repeat: usize,
    /// Index of its order in [`CheckedSpec::orders`].
    pub order: usize,
}

/// A tensor in a checked spec.
#[derive(Clone, Debug)]
pub(in crate::merge) struct Placed {
    pub shape: Vec<usize>,
    pub moves: Vec<Move>,
    /// Whether it counts when models are compared. Running statistics do not.
    pub compared: bool,
}

/// A group as it is solved at one visit, with the indices of its permutations in [`CheckedSpec::orders`].
#[derive(Clone, Debug)]
pub(in crate::merge) struct Unit {
    pub name: String,
    /// One index, or four for heads: `q k v o`.
    pub orders: Vec<usize>,
    pub heads: Option<HeadSizes>,
}

/// A spec that fits its models.
#[derive(Clone, Debug)]
pub(in crate::merge) struct CheckedSpec {
    /// Name and length of every permutation.
    pub orders: Vec<(String, usize)>,
    pub units: Vec<Unit>,
    /// Every tensor that is moved or compared.
    pub tensors: BTreeMap<String, Placed>,
}

/// Most faults that a message lists.
const LISTED: usize = 20;

/// Joins the first faults into a text that ends with the number of those left out.
fn listed(all: &[String]) -> String {
    let mut text = all[..all.len().min(LISTED)].join("; ");
    if all.len() > LISTED {
        text += &format!("; and {} more", all.len() - LISTED);
    }
    text
}

impl CheckedSpec {
    /// Checks `spec` against models, which must have the same tensors.
    ///
    /// # Errors
    /// When tensors are missing or have other shapes in one of the models, or the spec does not fit. The message lists all faults.
    pub fn new(spec: &Spec, models: &[&dyn Weights]) -> Result<CheckedSpec> {
        let shapes = same_shapes(spec, models)?;
        let mut faults = Vec::new();
        let mut plan = CheckedSpec { orders: Vec::new(), units: Vec::new(), tensors: BTreeMap::new() };
        for (name, shape) in shapes {
            let compared = !spec.statistics.iter().any(|p| fits(p, &name));
            plan.tensors.insert(name, Placed { shape, moves: Vec::new(), compared });
        }
        for group in &spec.groups {
            match &group.kind {
                GroupKind::Units(axes) => {
                    let order = plan.order(&group.name, axes, &mut faults);
                    plan.units.push(Unit { name: group.name.clone(), orders: vec![order], heads: None });
                }
                GroupKind::Heads(heads) => plan.heads(&group.name, heads, &mut faults),
            }
        }
        plan.names(&mut faults);
        plan.axes(&mut faults);
        for (name, placed) in &plan.tensors {
            let fixed = spec.fixed.iter().any(|p| fits(p, name));
            match (placed.moves.is_empty(), fixed) {
                (true, false) => faults.push(format!(
                    "tensor `{name}` {:?} is in no group; if nothing in it moves, add it to `fixed`",
                    placed.shape
                )),
                (false, true) => faults.push(format!("tensor `{name}` is in a group and in `fixed`")),
                _ => {}
            }
        }
        match faults.is_empty() {
            true => Ok(plan),
            false => Err(Error::config(format!("permutation spec: {}", listed(&faults)))),
        }
    }

    /// Adds a permutation of these axes, which must agree on its length. Returns its index.
    fn order(&mut self, name: &str, axes: &[Axis], faults: &mut Vec<String>) -> usize {
        let order = self.orders.len();
        let mut length: Option<(usize, &str)> = None;
        for Axis { tensor, axis, repeat } in axes {
            let Some(placed) = self.tensors.get_mut(tensor) else {
                faults
                    .push(format!("group `{name}` names a tensor `{tensor}`, which the models do not have"));
                continue;
            };
            let Some(&size) = placed.shape.get(*axis) else {
                faults.push(format!("group `{name}`: `{tensor}` {:?} has no axis {axis}", placed.shape));
                continue;
            };
            if *repeat == 0 || size % repeat != 0 {
                faults.push(format!(
                    "group `{name}`: axis {axis} of `{tensor}` has {size} indices, no multiple of repeat {repeat}"
                ));
                continue;
            }
            let units = size / repeat;
            match length {
                None => length = Some((units, tensor)),
                Some((first, whose)) if first != units => faults.push(format!(
                    "group `{name}` has {first} units by `{whose}` and {units} by axis {axis} of `{tensor}`"
                )),
                _ => {}
            }
            placed.moves.push(Move { axis: *axis, repeat: *repeat, order });
        }
        if axes.is_empty() {
            faults.push(format!("group `{name}` has no axis"));
        }
        self.orders.push((name.to_string(), length.map_or(0, |(n, _)| n)));
        order
    }

    fn heads(&mut self, name: &str, heads: &Heads, faults: &mut Vec<String>) {
        let before = faults.len();
        let orders: Vec<usize> = heads
            .parts()
            .iter()
            .map(|(part, axes)| self.order(&format!("{name}.{part}"), axes, faults))
            .collect();
        let &Heads { heads, kv_heads, rotary, .. } = heads;
        if heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
            faults.push(format!(
                "group `{name}`: {heads} heads do not share {kv_heads} key and value heads evenly"
            ));
        } else if faults.len() == before {
            let sizes: Vec<usize> = orders.iter().map(|&o| self.orders[o].1).collect();
            let dim = sizes[0] / heads;
            let want = [heads, kv_heads, kv_heads, heads].map(|n| n * dim);
            if dim == 0 || sizes != want {
                faults.push(format!(
                    "group `{name}`: q, k, v, o have {sizes:?} rows or columns, which are not {heads} and {kv_heads} heads of \
                     one size"
                ));
            }
            self.units.push(Unit {
                name: name.to_string(),
                orders,
                heads: Some(HeadSizes { heads, kv_heads, dim, rotary }),
            });
        }
    }

    /// Checks that every permutation has a name, and no other has the same.
    fn names(&self, faults: &mut Vec<String>) {
        let mut seen = BTreeSet::new();
        for (name, _) in &self.orders {
            if name.is_empty() || !seen.insert(name) {
                faults.push(format!("there are two groups, or one without a name: `{name}`"));
            }
        }
    }

    /// Checks that no axis is permuted twice and that no group permutes two axes of one tensor.
    fn axes(&self, faults: &mut Vec<String>) {
        for (name, placed) in &self.tensors {
            let mut axes = BTreeSet::new();
            let mut units = BTreeSet::new();
            for step in &placed.moves {
                let unit = self.units.iter().find(|unit| unit.orders.contains(&step.order));
                if !axes.insert(step.axis) {
                    faults.push(format!("axis {} of `{name}` is named twice", step.axis));
                } else if let Some(unit) = unit
                    && !units.insert(&unit.name)
                {
                    faults.push(format!(
                        "group `{}` ties two axes of `{name}`: that is a quadratic assignment, which is not solved here",
                        unit.name
                    ));
                }
            }
        }
    }

    /// Returns identity permutations.
    pub fn identity(&self) -> Vec<Vec<u32>> {
        self.orders.iter().map(|&(_, n)| (0..n as u32).collect()).collect()
    }

    /// Draws random permutations. Those of heads keep each head together.
    pub fn random(&self, rng: &mut Rng) -> Vec<Vec<u32>> {
        let mut all = self.identity();
        for unit in &self.units {
            match &unit.heads {
                None => rng.shuffle(&mut all[unit.orders[0]]),
                Some(sizes) => {
                    let flat = HeadOrder::random(sizes, rng).flat(sizes);
                    unit.orders.iter().zip(flat).for_each(|(&order, flat)| all[order] = flat);
                }
            }
        }
        all
    }

    /// Returns, for every unit, the other units whose permutations change its costs.
    pub fn neighbours(&self) -> Vec<BTreeSet<usize>> {
        let mut all = vec![BTreeSet::new(); self.units.len()];
        let unit_of = |order: usize| self.units.iter().position(|u| u.orders.contains(&order));
        for placed in self.tensors.values().filter(|placed| placed.compared) {
            let units: Vec<usize> = placed.moves.iter().filter_map(|m| unit_of(m.order)).collect();
            for &u in &units {
                all[u].extend(units.iter().filter(|&&v| v != u));
            }
        }
        all
    }
}

/// Returns the shapes of all tensors that the spec does not ignore, if these are the same in all models.
fn same_shapes(spec: &Spec, models: &[&dyn Weights]) -> Result<BTreeMap<String, Vec<usize>>> {
    let ignored = |name: &str| spec.ignored.iter().any(|p| fits(p, name));
    let mut all: Vec<BTreeMap<String, Vec<usize>>> = Vec::new();
    for model in models {
        let names = model.names().into_iter().filter(|name| !ignored(name));
        all.push(names.map(|name| Ok((name.clone(), model.shape(&name)?))).collect::<Result<_>>()?);
    }
    let mut faults = Vec::new();
    let Some((first, others)) = all.split_first() else {
        return Err(Error::config("a permutation spec needs a model to be held against"));
    };
    for (i, other) in others.iter().enumerate() {
        let whose = format!("model {}", i + 2);
        for (name, shape) in first {
            match other.get(name) {
                None => faults.push(format!("`{name}` is missing in {whose}")),
                Some(theirs) if theirs != shape => {
                    faults.push(format!("`{name}` is {shape:?} in model 1 and {theirs:?} in {whose}"));
                }
                _ => {}
            }
        }
        for name in other.keys().filter(|name| !first.contains_key(*name)) {
            faults.push(format!("`{name}` is in {whose} and missing in model 1"));
        }
    }
    match faults.is_empty() {
        true => Ok(first.clone()),
        false => Err(Error::config(format!("the models do not fit each other: {}", listed(&faults)))),
    }
}
