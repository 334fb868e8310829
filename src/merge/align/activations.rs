//! Activation matching: matches units whose activations on the same data are alike.

use super::matching::{Solved, solve};
use super::pairing::Cost;
use super::permutation::Permutation;
use super::plan::CheckedSpec;
use super::spec::Spec;
use crate::error::{Error, Result};
use crate::store::Weights;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// How the similarity of two units is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Similarity {
    /// `sum over data of z_a z_b`, of the raw activations (Ainsworth et al. 2022, section 3.1).
    #[default]
    InnerProduct,
    /// Pearson's correlation (Li et al. 2016). A unit with a constant activation has correlation 0.
    Correlation,
}

/// Sums over the data added so far, on the device.
struct Sums {
    rows: usize,
    /// `z_a^T z_b`
    products: Tensor,
    /// Sums and sums of squares of `z_a`, then of `z_b`.
    moments: [Tensor; 4],
}

/// Collects activations of both models on the same data, batch by batch, and solves one assignment per group. Sweeps are not
/// needed, since groups do not depend on each other. Groups without activations are not permuted.
pub struct ActivationMatching {
    spec: Spec,
    plan: CheckedSpec,
    similarity: Similarity,
    sums: BTreeMap<usize, Sums>,
}

/// The result of activation matching.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ActivationMatch {
    /// The permutation, to be applied to `b`.
    pub permutation: Permutation,
    /// Per group, the similarity of each unit and the one that it is matched to.
    pub agreement: BTreeMap<String, Vec<f64>>,
    /// Per group, the summed similarity of the matched units.
    pub values: BTreeMap<String, f64>,
    /// The largest optimality gap of any group's assignment.
    pub gap: f64,
}

impl ActivationMatching {
    /// Starts with no data, for models that fit `spec`.
    ///
    /// # Errors
    /// As [`crate::merge::match_weights`].
    pub fn new(
        spec: &Spec,
        a: &dyn Weights,
        b: &dyn Weights,
        similarity: Similarity,
    ) -> Result<ActivationMatching> {
        let plan = CheckedSpec::new(spec, &[a, b])?;
        Ok(ActivationMatching { spec: spec.clone(), plan, similarity, sums: BTreeMap::new() })
    }

    /// Adds both models' activations of a group on the same data, `[rows, units]` each, usually taken after the nonlinearity.
    /// For heads, add queries, keys, values and the inputs of the output layer, as `group.q`, `group.k`, `group.v`, `group.o`.
    ///
    /// # Errors
    /// When the spec has no group of this name, or the shapes do not fit it.
    pub fn add(&mut self, group: &str, a: &Tensor, b: &Tensor) -> Result<()> {
        let order = self.plan.orders.iter().position(|(name, _)| name == group);
        let order =
            order.ok_or_else(|| Error::config(format!("activations: no group `{group}` in the spec")))?;
        let units = self.plan.orders[order].1;
        if a.shape() != b.shape() || a.shape().len() != 2 || a.shape()[1] != units || a.shape()[0] == 0 {
            return Err(Error::config(format!(
                "activations of `{group}`: {} and {}; both need [rows, {units}]",
                a.shape(),
                b.shape()
            )));
        }
        let [a, b] = [a, b].map(|x| x.detach().cast(crate::DType::F32));
        no_grad(|| {
            let mut products = a.t().matmul_f32(&b);
            let mut moments = [a.sum(0), a.square().sum(0), b.sum(0), b.square().sum(0)];
            let mut rows = a.shape()[0];
            if let Some(sums) = self.sums.remove(&order) {
                rows += sums.rows;
                products = products.add(&sums.products);
                moments = std::array::from_fn(|i| moments[i].add(&sums.moments[i]));
            }
            products.evaluate();
            moments.iter().for_each(Tensor::evaluate);
            self.sums.insert(order, Sums { rows, products, moments });
        });
        Ok(())
    }

    /// Returns the best permutation for the activations collected.
    ///
    /// # Errors
    /// When activations are NaN or infinite, or the device fails.
    pub fn solve(&self) -> Result<ActivationMatch> {
        let mut orders = self.plan.identity();
        let mut values = BTreeMap::new();
        let mut agreement = BTreeMap::new();
        let mut gap = 0.0f64;
        for unit in &self.plan.units {
            if unit.orders.iter().all(|order| !self.sums.contains_key(order)) {
                continue;
            }
            let costs = unit.orders.iter().map(|&order| self.cost(order)).collect::<Result<Vec<_>>>()?;
            let Solved { orders: best, value, proof, .. } = solve(unit, &costs, None)?;
            if let ([cost], [order]) = (&costs[..], &best[..]) {
                let of = |(i, &j): (usize, &u32)| f64::from(cost.values[i * order.len() + j as usize]);
                agreement.insert(unit.name.clone(), order.iter().enumerate().map(of).collect());
            }
            unit.orders.iter().zip(best).for_each(|(&order, best)| orders[order] = best);
            values.insert(unit.name.clone(), value);
            gap = gap.max(proof.gap);
        }
        Ok(ActivationMatch {
            permutation: Permutation::of(&self.spec, &self.plan, orders),
            agreement,
            values,
            gap,
        })
    }

    fn cost(&self, order: usize) -> Result<Cost> {
        Ok(Cost { values: self.similarities(order)?, device: None })
    }

    /// Returns the similarities of all pairs of an order's units, all 0 if no activations were collected for it.
    fn similarities(&self, order: usize) -> Result<Vec<f32>> {
        let (name, units) = &self.plan.orders[order];
        let Some(sums) = self.sums.get(&order) else { return Ok(vec![0.0; units * units]) };
        let products = sums.products.to_vec::<f32>()?;
        if products.iter().any(|x| !x.is_finite()) {
            return Err(Error::config(format!("activations of `{name}` are NaN, infinite or too large")));
        }
        if self.similarity == Similarity::InnerProduct {
            return Ok(products);
        }
        let moments = sums.moments.iter().map(Tensor::to_vec::<f32>).collect::<Result<Vec<_>>>()?;
        let rows = sums.rows as f64;
        let model = |first: usize| -> Vec<(f64, f64)> {
            let one = |(&sum, &square): (&f32, &f32)| {
                let mean = f64::from(sum) / rows;
                (mean, (f64::from(square) / rows - mean * mean).max(0.0).sqrt())
            };
            moments[first].iter().zip(&moments[first + 1]).map(one).collect()
        };
        let [a, b] = [model(0), model(2)];
        let pair = |at: usize| {
            let ((mean_a, dev_a), (mean_b, dev_b)) = (a[at / units], b[at % units]);
            let covariance = f64::from(products[at]) / rows - mean_a * mean_b;
            // A deviation this small beside the mean is rounding, so the unit counts as constant.
            let still = dev_a <= 1e-3 * mean_a.abs() || dev_b <= 1e-3 * mean_b.abs();
            if still { 0.0 } else { (covariance / (dev_a * dev_b)) as f32 }
        };
        Ok((0..units * units).map(pair).collect())
    }
}
