//! Merging by the models' behaviour on data: Fisher diagonals, and learned coefficients of task vectors.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::rng::Rng;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Computes the diagonal of the Fisher matrix, `F = 1/n sum_x sum_y p(y|x) (d log p(y|x) / d theta)^2`, with the exact sum over
/// classes `y`. [`fisher`](crate::merge::recipe::methods::fisher) merges by it.
///
/// `logits` returns the logits `[classes]` of a sample, computed from `leaves`. There is one backward pass per sample and class.
/// Source: Matena & Raffel, arXiv 2111.09832.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When there are no samples, the logits have another shape, or no leaf is part of them.
#[track_caller]
pub fn fisher_diagonal(
    leaves: &BTreeMap<String, Tensor>,
    samples: usize,
    mut logits: impl FnMut(usize) -> Tensor,
) -> Result<BTreeMap<String, Tensor>> {
    assert!(samples > 0, "fisher_diagonal: there are no samples");
    let mut sums: BTreeMap<String, Tensor> =
        leaves.iter().map(|(name, x)| (name.clone(), Tensor::zeros(x.gpu(), *x.shape()))).collect();
    for sample in 0..samples {
        let logits = logits(sample);
        assert!(
            logits.shape().len() == 1,
            "fisher_diagonal: logits {}; they must be [classes]",
            logits.shape()
        );
        let classes = logits.count();
        let logs = logits.log_softmax(0);
        let p = logs.detach().exp();
        let places = Tensor::positions(logits.gpu(), classes);
        for class in 0..classes {
            let here =
                places.eq(&Tensor::scalar(logits.gpu(), class as f32).cast(DType::U32)).cast(DType::F32);
            let grads = logs.backward_with_retain_graph(&here)?;
            let share = p.slice(0, class..class + 1).scale(1.0 / samples as f32).reshape([]);
            for (name, leaf) in leaves {
                let Some(gradient) = grads.get(leaf) else { continue };
                let sum = sums[name].add(&gradient.square().mul(&share));
                sum.evaluate();
                sums.insert(name.clone(), sum);
            }
        }
    }
    Ok(sums)
}

/// aTLAS: `theta_b = base_b + sum_i c[i, b, k] tau_ib`, with a learned coefficient for each task vector `i`, each tensor `b` and,
/// if tensors are divided, each part `k`. Everything else is frozen. Coefficients start at 0, where the model equals the base.
///
/// Source: Zhang et al., arXiv 2407.02880.
#[derive(Clone, Debug)]
pub struct Atlas {
    base: BTreeMap<String, Tensor>,
    /// The task vectors of each tensor, in the order of names.
    deltas: Vec<Vec<Tensor>>,
    /// The leaf `[tasks, tensors, parts]`.
    coefficients: Tensor,
    /// Per tensor, the part that each element belongs to. `None` if there is only one part.
    parts: Vec<Option<Tensor>>,
    /// 1 for the coefficients that are used, 0 for others, in their shape. `None` is all.
    used: Option<Tensor>,
}

impl Atlas {
    /// Computes the task vectors of `models` relative to `base`. With `parts` above 1, each element of a tensor is assigned at
    /// random to one of so many parts, and each part has its own coefficients.
    ///
    /// # Panics
    /// When there are no models, a model lacks a tensor of the base or has it in another shape, or `parts` is 0.
    #[track_caller]
    pub fn new(
        gpu: &Gpu,
        base: &BTreeMap<String, Tensor>,
        models: &[BTreeMap<String, Tensor>],
        parts: usize,
        rng: &mut Rng,
    ) -> Atlas {
        assert!(!models.is_empty() && parts > 0, "atlas: {} models, {parts} parts", models.len());
        let delta = |name: &String, base: &Tensor, model: &BTreeMap<String, Tensor>| {
            let x = model.get(name).unwrap_or_else(|| panic!("atlas: a model has no tensor `{name}`"));
            assert!(x.shape() == base.shape(), "atlas: `{name}` is {} and {}", x.shape(), base.shape());
            let delta = x.detach().sub(&base.detach());
            delta.evaluate();
            delta
        };
        let deltas =
            base.iter().map(|(name, b)| models.iter().map(|m| delta(name, b, m)).collect()).collect();
        let part = |b: &Tensor| {
            (parts > 1)
                .then(|| Tensor::rand(gpu, *b.shape(), rng).scale(parts as f32).cast(DType::U32).contiguous())
        };
        Atlas {
            parts: base.values().map(part).collect(),
            base: base.iter().map(|(name, b)| (name.clone(), b.detach())).collect(),
            deltas,
            coefficients: Tensor::zeros(gpu, [models.len(), base.len(), parts]).contiguous().requires_grad(),
            used: None,
        }
    }

    /// Uses only so many task vectors of each tensor: those whose coefficients have the largest gradients, summed over parts.
    ///
    /// # Errors
    /// When there is no gradient, or it cannot be read.
    ///
    /// # Panics
    /// When `budget` is 0.
    #[track_caller]
    pub fn within(self, budget: usize, gradient: Option<&Tensor>) -> Result<Atlas> {
        assert!(budget > 0, "atlas: a budget of no task vectors");
        let gradient = gradient.ok_or_else(|| Error::config("atlas: the coefficients have no gradient"))?;
        let [tasks, tensors, parts] = [0, 1, 2].map(|axis| self.coefficients.shape()[axis]);
        let sizes: Vec<f32> = gradient.abs().sum(2).to_vec()?;
        let mut used = vec![0.0f32; tasks * tensors * parts];
        for b in 0..tensors {
            let mut order: Vec<usize> = (0..tasks).collect();
            order.sort_by(|&i, &j| sizes[j * tensors + b].total_cmp(&sizes[i * tensors + b]));
            for &i in order.iter().take(budget) {
                used[(i * tensors + b) * parts..][..parts].fill(1.0);
            }
        }
        let used = Tensor::from_slice(self.coefficients.gpu(), &used, *self.coefficients.shape());
        Ok(Atlas { used: Some(used), ..self })
    }

    /// The coefficients `[tasks, tensors, parts]`, the only leaf to train.
    pub fn coefficients(&self) -> &Tensor {
        &self.coefficients
    }

    /// Computes the model's tensors from the coefficients, tracked for gradients.
    pub fn weights(&self) -> BTreeMap<String, Tensor> {
        self.weights_under(&self.coefficients)
    }

    /// Computes the model's tensors from other coefficients that broadcast to `[tasks, tensors, parts]`, such as one number per
    /// task, `[tasks, 1, 1]`.
    ///
    /// # Panics
    /// When the coefficients do not broadcast to that shape.
    #[track_caller]
    pub fn weights_under(&self, coefficients: &Tensor) -> BTreeMap<String, Tensor> {
        let c = coefficients.expand(*self.coefficients.shape());
        let c = self.used.as_ref().map_or(c.clone(), |used| c.mul(used));
        let number = |i: usize, b: usize, k: usize| {
            c.slice(0, i..i + 1).slice(1, b..b + 1).slice(2, k..k + 1).reshape([])
        };
        let one = |(b, (name, base)): (usize, (&String, &Tensor))| {
            let mut sum = base.clone();
            for (i, delta) in self.deltas[b].iter().enumerate() {
                let scale = match &self.parts[b] {
                    None => number(i, b, 0),
                    Some(parts) => {
                        (0..c.shape()[2]).fold(Tensor::zeros(base.gpu(), *base.shape()), |scale, k| {
                            let here = parts.eq(&Tensor::scalar(base.gpu(), k as f32).cast(DType::U32));
                            number(i, b, k).where_mask(&here, &scale)
                        })
                    }
                };
                sum = sum.add(&delta.mul(&scale));
            }
            (name.clone(), sum)
        };
        self.base.iter().enumerate().map(one).collect()
    }
}
