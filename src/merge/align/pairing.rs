//! Two models on the device, tensor by tensor: computes the cost matrices of a visit and how near the models are.

use super::permutation::reorder;
use super::plan::{CheckedSpec, Placed, Unit};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::product::matmul::outer;
use crate::store::Weights;
use crate::tape::{Destination, no_grad};
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

/// A model's tensors, kept on the device up to a limit and read again beyond it.
struct Kept<'a> {
    weights: &'a dyn Weights,
    tensors: RefCell<BTreeMap<String, Tensor>>,
    room: RefCell<u64>,
}

impl<'a> Kept<'a> {
    fn new(weights: &'a dyn Weights, bytes: u64) -> Kept<'a> {
        Kept { weights, tensors: RefCell::default(), room: RefCell::new(bytes) }
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        if let Some(x) = self.tensors.borrow().get(name) {
            return Ok(x.clone());
        }
        let x = self.weights.read(gpu, name)?.contiguous();
        if self.has_room(&x) {
            x.evaluate();
            self.tensors.borrow_mut().insert(name.to_string(), x.clone());
        }
        Ok(x)
    }

    /// Takes `x`'s size off the remaining room if it fits. Returns whether it does.
    fn has_room(&self, x: &Tensor) -> bool {
        let mut room = self.room.borrow_mut();
        let left = room.checked_sub(4 * x.count() as u64);
        *room = left.unwrap_or(*room);
        left.is_some()
    }
}

/// Sums over all tensors that are compared.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::merge) struct Nearness {
    /// `sum_k <a_k, permuted b_k>`
    pub objective: f64,
    /// `sum_k ||a_k - permuted b_k||^2`
    pub squared_distance: f64,
}

/// A square cost matrix.
pub(in crate::merge) struct Cost {
    /// On the host, row-major.
    pub values: Vec<f32>,
    /// The same on the device, where it was computed there.
    pub device: Option<Tensor>,
}

/// Models `a` and `b` with a plan that fits both.
pub(in crate::merge) struct Pairing<'a> {
    gpu: &'a Gpu,
    pub plan: CheckedSpec,
    a: Kept<'a>,
    b: Kept<'a>,
    /// Per order, the part of its cost that comes from tensors that no other order moves. This part never changes.
    constant: RefCell<HashMap<usize, Tensor>>,
}

impl<'a> Pairing<'a> {
    /// `bytes` of the two models may stay on the device.
    pub fn new(
        gpu: &'a Gpu,
        plan: CheckedSpec,
        a: &'a dyn Weights,
        b: &'a dyn Weights,
        bytes: u64,
    ) -> Pairing<'a> {
        let [a, b] = [a, b].map(|weights| Kept::new(weights, bytes / 2));
        Pairing { gpu, plan, a, b, constant: RefCell::default() }
    }

    fn compared(&self) -> impl Iterator<Item = (&String, &Placed)> {
        self.plan.tensors.iter().filter(|(_, placed)| placed.compared)
    }

    /// Checks that all weights are finite.
    ///
    /// # Errors
    /// At the first NaN or infinity; the message names the model, the tensor and the index.
    pub fn check_finite(&self) -> Result<()> {
        for (which, kept) in [("the first", &self.a), ("the second", &self.b)] {
            let names: Vec<&String> = self.plan.tensors.keys().collect();
            let start = |name: &&String| kept.read(self.gpu, name)?.non_finite().read::<u32>();
            let readings = names.iter().map(start).collect::<Result<Vec<_>>>()?;
            for (name, reading) in names.into_iter().zip(readings) {
                let found: Vec<u32> = bytemuck::pod_collect_to_vec(&reading.wait()?);
                if found[0] > 0 {
                    let x = kept.read(self.gpu, name)?;
                    return Err(complaint(which, name, &x, (u32::MAX - found[1]) as usize)?);
                }
            }
        }
        Ok(())
    }

    /// Returns `b`'s tensor under all orders but that of axis `except`.
    fn moved(
        &self,
        name: &str,
        placed: &Placed,
        orders: &[Vec<u32>],
        except: Option<usize>,
    ) -> Result<Tensor> {
        let mut x = self.b.read(self.gpu, name)?;
        for step in placed.moves.iter().filter(|step| Some(step.axis) != except) {
            let order = &orders[step.order];
            if order.iter().zip(0..).any(|(&old, new)| old != new) {
                x = reorder(&x, step.axis, step.repeat, order);
            }
        }
        Ok(x)
    }

    /// Computes how near the models are with `b` under these orders.
    pub fn nearness(&self, orders: &[Vec<u32>]) -> Result<Nearness> {
        let mut sums = Vec::new();
        for (name, placed) in self.compared() {
            let a = self.a.read(self.gpu, name)?;
            let b = self.moved(name, placed, orders, None)?;
            no_grad(|| sums.extend([a.mul(&b).sum_all(), a.sub(&b).square().sum_all()]));
        }
        let sums = together(&sums)?;
        let add = |sum: Nearness, pair: &[f32]| Nearness {
            objective: sum.objective + f64::from(pair[0]),
            squared_distance: sum.squared_distance + f64::from(pair[1]),
        };
        Ok(sums.chunks(2).fold(Nearness::default(), add))
    }

    /// Computes the cost matrix of each of a unit's orders: `C[i, j] = sum_k <slice i of a_k, slice j of b_k>`, with `b` under
    /// all orders but the unit's own.
    pub fn costs(&self, unit: &Unit, orders: &[Vec<u32>]) -> Result<Vec<Cost>> {
        unit.orders.iter().map(|&order| self.cost(order, orders)).collect()
    }

    fn cost(&self, order: usize, orders: &[Vec<u32>]) -> Result<Cost> {
        let fixed = self.constant.borrow().get(&order).cloned();
        let fixed = match fixed {
            Some(fixed) => Some(fixed),
            None => {
                let fixed = self.products(order, orders, |placed| placed.moves.len() == 1)?;
                if let Some(fixed) = fixed.as_ref().filter(|fixed| self.a.has_room(fixed)) {
                    self.constant.borrow_mut().insert(order, fixed.clone());
                }
                fixed
            }
        };
        let turning = self.products(order, orders, |placed| placed.moves.len() > 1)?;
        let sum = match (fixed, turning) {
            (Some(fixed), Some(turning)) => no_grad(|| fixed.add(&turning)),
            (Some(sum), None) | (None, Some(sum)) => sum,
            // Only statistics follow this order, and these are not compared: every order is worth the same.
            (None, None) => Tensor::zeros(self.gpu, [self.plan.orders[order].1; 2]),
        };
        let values = sum.to_vec::<f32>()?;
        match values.iter().all(|c| c.is_finite()) {
            true => Ok(Cost { values, device: Some(sum) }),
            false => Err(Error::config(format!(
                "group `{}`: products of weights are beyond f32; scale the weights down",
                self.plan.orders[order].0
            ))),
        }
    }

    /// Returns the summed products of those tensors that this order moves and that satisfy `wanted`, or `None` without any.
    fn products(
        &self,
        order: usize,
        orders: &[Vec<u32>],
        wanted: impl Fn(&Placed) -> bool,
    ) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for (name, placed) in self.compared().filter(|(_, placed)| wanted(placed)) {
            let Some(own) = placed.moves.iter().find(|step| step.order == order) else { continue };
            let a = self.a.read(self.gpu, name)?;
            let b = self.moved(name, placed, orders, Some(own.axis))?;
            let [a, b] = [a, b].map(|x| unfold(&x, own.axis, own.repeat));
            let into = sum.take().map_or(Destination::New, Destination::Add);
            sum = Some(no_grad(|| outer("match", &a, &b, into)));
        }
        Ok(sum)
    }
}

/// Returns `x` as `[everything else, units]`. Each unit is `repeat` consecutive indices of the axis.
fn unfold(x: &Tensor, axis: usize, repeat: usize) -> Tensor {
    let (before, size, after) = x.shape().split_at_axis(axis);
    let units = size / repeat;
    let x = x.reshape([before, units, repeat * after]);
    match (before, repeat * after) {
        (_, 1) => x.reshape([before, units]),
        (1, rest) => x.reshape([units, rest]).t(),
        (_, rest) => x.permute([0, 2, 1]).reshape([before * rest, units]),
    }
}

/// Returns the error about the element at flat index `at`, which is NaN or infinite.
fn complaint(which: &str, name: &str, x: &Tensor, at: usize) -> Result<Error> {
    let value = x.reshape([x.count()]).slice(0, at..at + 1).to_vec::<f32>()?[0];
    let mut left = at;
    let mut place: Vec<usize> = Vec::new();
    for &size in x.shape().iter().rev() {
        place.insert(0, left % size);
        left /= size;
    }
    Ok(Error::config(format!(
        "tensor `{name}` of {which} model is {value} at index {place:?}; matching needs finite weights"
    )))
}

/// Reads several scalars in one transfer.
fn together(scalars: &[Tensor]) -> Result<Vec<f32>> {
    if scalars.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<Tensor> = scalars.iter().map(|x| x.reshape([1])).collect();
    Tensor::concat(&rows.iter().collect::<Vec<_>>(), 0).to_vec::<f32>()
}
