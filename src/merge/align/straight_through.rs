//! Straight-through matching: searches for the permutation whose midpoint has the least loss.

use super::matching::{MatchOptions, match_weights};
use super::permutation::Permutation;
use super::plan::CheckedSpec;
use super::spec::Spec;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::optim::{Group, Sgd, SgdConfig};
use crate::setters::setters;
use crate::store::Weights;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Settings of [`straight_through`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StraightThroughOptions {
    /// Training steps. Each includes a weight matching.
    pub steps: usize,
    /// Learning rate of `theta`.
    pub lr: f32,
    /// Momentum of `theta`.
    pub momentum: f32,
    /// Settings of each step's matching. It starts from the permutation of the step before.
    pub matching: MatchOptions,
}

setters!(StraightThroughOptions { steps: usize, lr: f32, momentum: f32, matching: MatchOptions });

impl Default for StraightThroughOptions {
    fn default() -> Self {
        StraightThroughOptions { steps: 100, lr: 1e-2, momentum: 0.9, matching: MatchOptions::default() }
    }
}

/// A closure that computes a scalar loss from the midpoint's weights, which are tracked, and the step's number.
pub type MidpointLoss<'a> = dyn FnMut(&BTreeMap<String, Tensor>, usize) -> Result<Tensor> + 'a;

/// The result of [`straight_through`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StraightThrough {
    /// The permutation of `b` with the least loss.
    pub permutation: Permutation,
    /// The midpoint's loss at every step.
    pub losses: Vec<f64>,
    /// The step with the least loss.
    pub best: usize,
}

/// Searches for a permutation of `b` by training:
///
/// ```text
/// pi = weight matching of b to theta            (theta = a at first; warm start)
/// loss of (a + pi(b)) / 2; its gradient goes to theta as if theta were the midpoint
/// ```
///
/// It needs data for the loss, and a weight matching at every step. Weight matching alone is often as good, but this method
/// minimises the loss between the two models itself. Source: Ainsworth et al. 2022, section 3.3.
///
/// # Errors
/// As [`match_weights`]. Also when `steps` is 0 or a loss is NaN or infinite, and the errors of `loss`.
pub fn straight_through(
    gpu: &Gpu,
    spec: &Spec,
    a: &dyn Weights,
    b: &dyn Weights,
    options: &StraightThroughOptions,
    loss: &mut MidpointLoss,
) -> Result<StraightThrough> {
    let plan = CheckedSpec::new(spec, &[a, b])?;
    let names: Vec<&String> = plan.tensors.keys().collect();
    let ends: BTreeMap<String, Tensor> =
        names.iter().map(|name| Ok(((*name).clone(), a.read(gpu, name)?))).collect::<Result<_>>()?;
    // The optimizer writes into its leaves, so these are copies that leave `a` intact.
    let copy = |(name, x): (&String, &Tensor)| (name.clone(), x.scale(1.0).requires_grad());
    let theta: BTreeMap<String, Tensor> = ends.iter().map(copy).collect();
    let config = SgdConfig { lr: options.lr, momentum: options.momentum, ..SgdConfig::default() };
    let mut optimizer = Sgd::new(gpu, vec![Group::new(theta.iter())], config)?;
    let mut found: Option<StraightThrough> = None;
    let mut losses: Vec<f64> = Vec::with_capacity(options.steps);
    let mut matching = options.matching.clone();
    for step in 0..options.steps {
        let next = match_weights(gpu, spec, &theta, b, &matching)?.permutation;
        let permuted = next.permuted(b);
        let mut middle = BTreeMap::new();
        for (name, end) in &ends {
            let other = permuted.read(gpu, name)?;
            let free = &theta[name];
            let away = no_grad(|| end.add(&other).scale(0.5).sub(free));
            middle.insert(name.clone(), free.add(&away.detach()));
        }
        let value = loss(&middle, step)?;
        let grads = value.backward()?;
        let value = f64::from(value.item()?);
        if !value.is_finite() {
            let message =
                format!("straight-through matching: the loss of step {step} is {value}; use a lower lr");
            return Err(Error::config(message));
        }
        let best = found.as_ref().map(|found| losses[found.best]);
        losses.push(value);
        if best.is_none_or(|best| value < best) {
            found = Some(StraightThrough { permutation: next.clone(), losses: Vec::new(), best: step });
        }
        drop(middle);
        optimizer.step(&grads, options.lr)?;
        matching.start = Some(next);
    }
    let found = found.ok_or_else(|| Error::config("straight-through matching needs at least one step"))?;
    Ok(StraightThrough { losses, ..found })
}
