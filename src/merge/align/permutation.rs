//! Permutations of a model's units, which are applied lazily, inverted, composed and stored in files.

use super::heads::{HeadOrder, HeadSizes};
use super::plan::CheckedSpec;
use super::spec::{GroupKind, Spec};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::store::Weights;
use crate::store::{Entry, File, save};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const FORMAT: &str = "tiebeam.permutation";
const VERSION: &str = "1";
const SPEC: &str = "tiebeam.spec";

/// One order for every group of a spec, new -> old: index `i` of a permuted axis is index `order[i]` of the original.
///
/// A model that is permuted by it computes the same function.
#[derive(Clone, Debug, PartialEq)]
pub struct Permutation {
    spec: Spec,
    orders: BTreeMap<String, Vec<u32>>,
}

impl Permutation {
    /// Creates a permutation from orders by the names of a spec's groups. Heads have four (`name.q`, `name.k`, `name.v`,
    /// `name.o`).
    ///
    /// # Errors
    /// When an order is missing, belongs to no group, has an index twice or not at all, or does not keep heads together.
    pub fn new(spec: Spec, orders: BTreeMap<String, Vec<u32>>) -> Result<Permutation> {
        let mut left: Vec<&String> = orders.keys().collect();
        let mut take = |name: &str| {
            left.retain(|other| *other != name);
            let order = orders.get(name).ok_or_else(|| fault(name, "is missing"))?;
            let mut seen = vec![false; order.len()];
            for &i in order {
                match seen.get_mut(i as usize) {
                    Some(seen) if !*seen => *seen = true,
                    _ => {
                        return Err(fault(name, &format!("is no permutation: index {i} of {}", order.len())));
                    }
                }
            }
            Ok(order)
        };
        for group in &spec.groups {
            let GroupKind::Heads(heads) = &group.kind else {
                take(&group.name)?;
                continue;
            };
            let four = heads.parts().map(|(part, _)| take(&format!("{}.{part}", group.name)));
            let [q, k, v, o] = four.map(|order| order.map(|order| &order[..]));
            let (q, k, v, o) = (q?, k?, v?, o?);
            let dim = q.len().checked_div(heads.heads).unwrap_or(0);
            let sizes = HeadSizes { heads: heads.heads, kv_heads: heads.kv_heads, dim, rotary: heads.rotary };
            if HeadOrder::parse(&sizes, [q, k, v, o]).is_none() {
                return Err(fault(&group.name, "moves elements out of their heads, or q, k, v and o apart"));
            }
        }
        match left.first() {
            Some(name) => Err(fault(name, "belongs to no group of the spec")),
            None => Ok(Permutation { spec, orders }),
        }
    }

    /// The identity, which changes nothing.
    ///
    /// # Errors
    /// When the spec does not fit `weights`; the message lists what is wrong.
    pub fn identity(spec: &Spec, weights: &dyn Weights) -> Result<Permutation> {
        let plan = CheckedSpec::new(spec, &[weights])?;
        Ok(Permutation::of(spec, &plan, plan.identity()))
    }

    /// Creates a permutation from orders in the sequence of `plan.orders`, which are known to be valid.
    pub(in crate::merge) fn of(spec: &Spec, plan: &CheckedSpec, orders: Vec<Vec<u32>>) -> Permutation {
        let names = plan.orders.iter().map(|(name, _)| name.clone());
        Permutation { spec: spec.clone(), orders: names.zip(orders).collect() }
    }

    /// Returns the orders in the sequence of `plan.orders`.
    ///
    /// # Errors
    /// When this permutation belongs to another spec or to models of other sizes.
    pub(in crate::merge) fn in_plan(&self, plan: &CheckedSpec) -> Result<Vec<Vec<u32>>> {
        let find = |(name, size): &(String, usize)| match self.orders.get(name) {
            Some(order) if order.len() == *size => Ok(order.clone()),
            Some(order) => Err(fault(name, &format!("has {} indices, the models {size}", order.len()))),
            None => Err(fault(name, "is missing")),
        };
        plan.orders.iter().map(find).collect()
    }

    /// The spec that these orders belong to.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// All orders by name.
    pub fn orders(&self) -> &BTreeMap<String, Vec<u32>> {
        &self.orders
    }

    /// Counts the indices that this permutation moves.
    pub fn moved(&self) -> usize {
        let out_of_place =
            |order: &Vec<u32>| order.iter().zip(0..).filter(|(old, new)| **old != *new).count();
        self.orders.values().map(out_of_place).sum()
    }

    /// Whether a tensor of this name has an axis that follows a group.
    pub fn touches(&self, tensor: &str) -> bool {
        let has = |axes: &[super::spec::Axis]| axes.iter().any(|axis| axis.tensor == tensor);
        self.spec.groups.iter().any(|group| match &group.kind {
            GroupKind::Units(axes) => has(axes),
            GroupKind::Heads(heads) => heads.parts().iter().any(|(_, axes)| has(axes)),
        })
    }

    /// The permutation that undoes this one.
    pub fn inverse(&self) -> Permutation {
        let orders = self.orders.iter().map(|(name, order)| (name.clone(), inverse(order))).collect();
        Permutation { spec: self.spec.clone(), orders }
    }

    /// Returns the permutation that applies this one first and then `next`.
    ///
    /// # Errors
    /// When the two have different specs or sizes.
    pub fn then(&self, next: &Permutation) -> Result<Permutation> {
        let sizes = |p: &Permutation| p.orders.iter().map(|(n, o)| (n.clone(), o.len())).collect::<Vec<_>>();
        if self.spec != next.spec || sizes(self) != sizes(next) {
            return Err(Error::config(
                "two permutations of different specs or sizes cannot follow each other",
            ));
        }
        let both = |(name, order): (&String, &Vec<u32>)| {
            (name.clone(), next.orders[name].iter().map(|&i| order[i as usize]).collect())
        };
        Ok(Permutation { spec: self.spec.clone(), orders: self.orders.iter().map(both).collect() })
    }

    /// Checks that this permutation fits these weights: they have every tensor of the spec, with axes of the orders' sizes.
    ///
    /// # Errors
    /// When something does not fit; the message lists it.
    pub fn check(&self, weights: &dyn Weights) -> Result<()> {
        self.in_plan(&CheckedSpec::new(&self.spec, &[weights])?).map(|_| ())
    }

    /// Returns a model's weights under this permutation. Each tensor is permuted on the device when it is read.
    pub fn permuted<'a>(&'a self, weights: &'a dyn Weights) -> Permuted<'a> {
        let mut moves: BTreeMap<&str, Vec<Turn>> = BTreeMap::new();
        let mut add = |name: &str, axes: &'a [super::spec::Axis]| {
            for axis in axes {
                let turn = Turn { axis: axis.axis, repeat: axis.repeat, order: &self.orders[name] };
                moves.entry(&axis.tensor).or_default().push(turn);
            }
        };
        for group in &self.spec.groups {
            match &group.kind {
                GroupKind::Units(axes) => add(&group.name, axes),
                GroupKind::Heads(heads) => {
                    for (part, axes) in &heads.parts() {
                        add(&format!("{}.{part}", group.name), axes);
                    }
                }
            }
        }
        Permuted { weights, last: Mutex::default(), moves }
    }

    /// Writes the orders as i32 tensors, with the spec and `notes` in the header. The file is replaced atomically.
    ///
    /// # Errors
    /// When the file cannot be written; an old file is left intact.
    pub fn save(&self, path: impl AsRef<Path>, notes: &BTreeMap<String, String>) -> Result<()> {
        let mut metadata = notes.clone();
        metadata.insert(FORMAT.into(), VERSION.into());
        metadata.insert(SPEC.into(), self.spec.to_json());
        let entry = |(name, order): (&String, &'_ Vec<u32>)| {
            let signed: Vec<u8> = order.iter().flat_map(|&i| (i as i32).to_le_bytes()).collect();
            Entry::bytes(name.clone(), crate::store::FileDType::I32, &[order.len()], signed)
        };
        save(path, self.orders.iter().map(entry), &metadata)
    }

    /// Reads a file of [`Permutation::save`].
    ///
    /// # Errors
    /// When the file cannot be read, is not a file of permutations, or its orders do not fit its spec.
    pub fn load(path: impl AsRef<Path>) -> Result<Permutation> {
        let path = path.as_ref();
        let file = File::open(path)?;
        let wrong = |message: String| Error::format(path, message);
        let text = |key: &str| file.metadata().get(key).map(String::as_str);
        match (text(FORMAT), text(SPEC)) {
            (Some(VERSION), Some(spec)) => {
                let spec = Spec::from_json(spec).map_err(|e| wrong(e.to_string()))?;
                let names: Vec<&str> = file.names().collect();
                let read = |&name: &&str| Ok((name.to_string(), file.tensor_u32(name)?));
                let orders = names.iter().map(read).collect::<Result<_>>()?;
                Permutation::new(spec, orders).map_err(|e| wrong(e.to_string()))
            }
            (Some(other), Some(_)) => {
                Err(wrong(format!("permutations of version {other}; this crate reads {VERSION}")))
            }
            _ => Err(wrong(format!("no file of permutations: its header lacks `{FORMAT}` or `{SPEC}`"))),
        }
    }
}

fn fault(name: &str, what: &str) -> Error {
    Error::config(format!("permutation `{name}` {what}"))
}

pub(in crate::merge) fn inverse(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; order.len()];
    order.iter().zip(0..).for_each(|(&old, new)| inverse[old as usize] = new);
    inverse
}

/// Returns `x` with one axis in a new order. Each index of `order` moves `repeat` consecutive indices of the axis.
pub(in crate::merge) fn reorder(x: &Tensor, axis: usize, repeat: usize, order: &[u32]) -> Tensor {
    let ids: Vec<u32> = match repeat {
        1 => order.to_vec(),
        _ => order.iter().flat_map(|&old| (0..repeat as u32).map(move |r| old * repeat as u32 + r)).collect(),
    };
    x.index_select(axis as isize, &Tensor::from_slice(x.gpu(), &ids, [ids.len()]))
}

/// Weights under a [`Permutation`]. The last tensor that was read in parts stays on the device, so it is not permuted again for
/// each part.
pub struct Permuted<'a> {
    weights: &'a dyn Weights,
    last: Mutex<Option<(String, Tensor)>>,
    /// The permuted axes of each tensor.
    moves: BTreeMap<&'a str, Vec<Turn<'a>>>,
}

/// A new order of an axis. Each index of `order` moves `repeat` consecutive indices.
struct Turn<'a> {
    axis: usize,
    repeat: usize,
    order: &'a [u32],
}

impl Turn<'_> {
    /// Checks that the axis has as many indices as are permuted.
    fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        let want = self.order.len() * self.repeat;
        match shape.get(self.axis) == Some(&want) {
            true => Ok(()),
            false => Err(Error::config(format!(
                "tensor `{name}` {shape:?}: its axis {} should have {want} indices to be permuted",
                self.axis
            ))),
        }
    }

    fn is_still(&self) -> bool {
        self.order.iter().zip(0..).all(|(&old, new)| old == new)
    }
}

impl Permuted<'_> {
    /// Returns a tensor's bytes under the permutation, from its bytes as they are stored. Whatever the type of the elements is, no
    /// bit of them changes. Nothing is computed on a device.
    ///
    /// # Errors
    /// When there is no tensor of this name, or its shape does not fit the permutation or the bytes.
    pub fn bytes(&self, name: &str, stored: &[u8]) -> Result<Vec<u8>> {
        let shape = self.weights.shape(name)?;
        let count: usize = shape.iter().product();
        if !stored.len().is_multiple_of(count.max(1)) {
            return Err(Error::config(format!(
                "tensor `{name}` {shape:?}: {} bytes do not fit",
                stored.len()
            )));
        }
        let mut bytes = stored.to_vec();
        for turn in self.moves.get(name).into_iter().flatten() {
            turn.check(name, &shape)?;
            if turn.is_still() || bytes.is_empty() {
                continue;
            }
            // The bytes of one index of `order`: `repeat` indices of the axis with all that is behind them.
            let behind: usize = shape[turn.axis + 1..].iter().product();
            let unit = behind * turn.repeat * (stored.len() / count);
            let old = std::mem::take(&mut bytes);
            for block in old.chunks_exact(unit * turn.order.len()) {
                turn.order.iter().for_each(|&i| bytes.extend(&block[i as usize * unit..][..unit]));
            }
        }
        Ok(bytes)
    }
}

impl Weights for Permuted<'_> {
    fn names(&self) -> Vec<String> {
        self.weights.names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.weights.shape(name)
    }

    fn read_range(&self, gpu: &Gpu, name: &str, range: Range<usize>) -> Result<Tensor> {
        if !self.moves.contains_key(name) {
            return self.weights.read_range(gpu, name, range);
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = last.take().filter(|(kept, x)| kept == name && x.gpu() == gpu);
        let (name, x) = match kept {
            Some(kept) => kept,
            None => {
                let x = self.read(gpu, name)?;
                (name.to_string(), x.reshape([x.count()]).contiguous())
            }
        };
        let part = x.slice(0, range).contiguous();
        *last = Some((name, x));
        Ok(part)
    }

    fn sample(&self, name: &str, length: usize, starts: &[usize]) -> Result<Option<Vec<f32>>> {
        match self.moves.contains_key(name) {
            true => Ok(None),
            false => self.weights.sample(name, length, starts),
        }
    }

    fn is_float(&self, name: &str) -> bool {
        self.weights.is_float(name)
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        let mut x = self.weights.read(gpu, name)?;
        for turn in self.moves.get(name).into_iter().flatten() {
            turn.check(name, &x.shape()[..])?;
            if !turn.is_still() {
                x = reorder(&x, turn.axis, turn.repeat, turn.order);
            }
        }
        Ok(x)
    }
}
