//! Methods that treat a model as one vector. Passes over all tensors first measure what the merge of each tensor needs, so that
//! no more than one tensor of each model is in memory.
//!
//! The argument `each` of these functions makes one such pass. It calls its closure with every tensor of the base and the same
//! tensor of all models.

use super::methods::{products, sign_consensus, task_vectors};
use crate::error::Result;
use crate::ops::order::rank::{self, Cut, Order};
use crate::tensor::Tensor;

/// Makes a pass: calls its argument with `(base, models)` for every tensor.
pub type Each<'a> = dyn FnMut(&mut dyn FnMut(&Tensor, &[Tensor]) -> Result<()>) -> Result<()> + 'a;

/// TIES as in its paper: trims over the whole vector and uses no weights. The result is `base + lambda mean`, where the mean is
/// over the elements that are not 0 and have the sign of the sum. Source: Yadav et al., arXiv 2306.01708.
#[derive(Debug)]
pub struct TiesGlobal {
    kept: Vec<Kept>,
}

/// Which elements of a model's task vector are kept.
#[derive(Clone, Debug)]
enum Kept {
    None,
    From(Cut),
    All,
}

impl TiesGlobal {
    /// The rank of the least magnitude that is kept, of `n`. `None` if all or none are.
    pub(super) fn cut(n: u64, density: f64) -> Option<u64> {
        let kept = ((density * n as f64) as u64).max(1).min(n);
        (density > 0.0 && kept < n).then(|| n - kept)
    }

    /// Finds the least of each model's `floor(density n)` largest magnitudes, where `n` is the number of elements of a model. It is
    /// at least one, and none at a density of 0. Takes three passes, or none if all or no elements are kept.
    ///
    /// # Errors
    /// The errors of `each`, and when the device fails.
    pub fn measure(models: usize, n: u64, density: f64, each: &mut Each) -> Result<TiesGlobal> {
        let Some(rank) = TiesGlobal::cut(n, density) else {
            return Ok(TiesGlobal { kept: vec![if density > 0.0 { Kept::All } else { Kept::None }; models] });
        };
        let ranks = vec![vec![rank]; models];
        let cuts = rank::select(Order::Magnitude, &ranks, |visit| {
            each(&mut |base, models| visit(&task_vectors(base, models)))
        })?;
        let kept = |cuts: Vec<Cut>| cuts.first().map_or(Kept::All, |cut| Kept::From(*cut));
        Ok(TiesGlobal { kept: cuts.into_iter().map(kept).collect() })
    }

    /// Merges the next tensor. Every tensor must be merged exactly once.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When the number of models differs from that in [`TiesGlobal::measure`].
    #[track_caller]
    pub fn merge(&mut self, base: &Tensor, models: &[Tensor], lambda: f32) -> Result<Tensor> {
        assert!(models.len() == self.kept.len(), "ties_global: {} models measured", self.kept.len());
        let deltas = task_vectors(base, models);
        let kept = deltas.iter().zip(&mut self.kept).map(|(d, kept)| match kept {
            Kept::None => Ok(d.scale(0.0)),
            Kept::From(cut) => rank::keep_between(d, Some(cut), None),
            Kept::All => Ok(d.clone()),
        });
        let kept = kept.collect::<Result<Vec<Tensor>>>()?;
        Ok(sign_consensus(base, &kept, &vec![1.0; kept.len()], true, lambda))
    }
}

/// Parameter competition balancing. For each model, over the whole vector:
///
/// - `A` is `|tau|`, clamped to its values at the ranks `1e-4 n` and `(1 - 1e-4) n - 1`, and `v = sign(tau) A`.
/// - `b = exp(N norm(A)^2) tanh(tau sum_i tau_i)`, with `norm` the min-max normalisation and `N` the number of models.
/// - `s` is `b`, clamped from below to its value at rank `(1 - ratio) n` and then min-max normalised.
///
/// The result is `base + lambda sum w_i s_i v_i / max(sum s_i, 1e-12)`, with a weight of each model, which the authors search
/// for. Source: Du et al., arXiv 2410.02396, by its reference code, which has `exp` and `tanh` where the paper has softmaxes.
#[derive(Debug)]
pub struct Pcb {
    /// Least and largest clamped magnitude of each model.
    magnitudes: Vec<[f32; 2]>,
    /// Least and largest clamped `b` of each model.
    balances: Vec<[f32; 2]>,
}

const OUTLIERS: f64 = 1e-4;

impl Pcb {
    /// Measures the limits of each model's magnitudes and of `b`. `n` is the number of elements of a model. Takes six passes.
    ///
    /// # Errors
    /// The errors of `each`, and when the device fails.
    pub fn measure(models: usize, n: u64, ratio: f64, each: &mut Each) -> Result<Pcb> {
        if n == 0 {
            let none = vec![[0.0; 2]; models];
            return Ok(Pcb { magnitudes: none.clone(), balances: none });
        }
        let at = |rank: f64| (rank as u64).min(n.saturating_sub(1));
        let ends = |cuts: Vec<Vec<Cut>>| cuts.iter().map(|c| [c[0].value(), c[1].value()]).collect();
        let size = n as f64;
        let ranks = vec![vec![at(size * OUTLIERS), at(size * (1.0 - OUTLIERS) - 1.0)]; models];
        let cuts = rank::select(Order::Magnitude, &ranks, |visit| {
            each(&mut |base, models| visit(&task_vectors(base, models)))
        })?;
        let mut measured = Pcb { magnitudes: ends(cuts), balances: Vec::new() };
        let ranks = vec![vec![at(size * (1.0 - ratio)), n.saturating_sub(1)]; models];
        let cuts = rank::select(Order::Value, &ranks, |visit| {
            each(&mut |base, models| visit(&measured.balance(&task_vectors(base, models))))
        })?;
        measured.balances = ends(cuts);
        Ok(measured)
    }

    /// Computes `b` of each model.
    fn balance(&self, deltas: &[Tensor]) -> Vec<Tensor> {
        let sum = deltas[1..].iter().fold(deltas[0].clone(), |sum, d| sum.add(d));
        let one = |(d, ends): (&Tensor, &[f32; 2])| {
            let within = norm(&d.abs(), ends).square().scale(deltas.len() as f32).exp();
            within.mul(&d.mul(&sum).tanh())
        };
        deltas.iter().zip(&self.magnitudes).map(one).collect()
    }

    /// Merges one tensor.
    ///
    /// # Panics
    /// When the number of models differs from that in [`Pcb::measure`].
    #[track_caller]
    pub fn merge(&self, base: &Tensor, models: &[Tensor], weights: &[f32], lambda: f32) -> Tensor {
        let fits = models.len() == self.balances.len() && weights.len() == models.len();
        assert!(fits, "pcb: {} models measured, {} weights", self.balances.len(), weights.len());
        let deltas = task_vectors(base, models);
        let zero = Tensor::scalar(base.gpu(), 0.0);
        let [mut sum, mut total] = [zero.clone(), zero.clone()];
        let limits = self.balances.iter().zip(&self.magnitudes).zip(weights);
        for ((d, b), ((ends, [low, high]), &weight)) in deltas.iter().zip(self.balance(&deltas)).zip(limits) {
            let scale = norm(&b, ends);
            let size = d.abs().clamp(*low, *high);
            let signed = size.where_mask(&d.gt(&zero), &size.neg());
            let value = zero.where_mask(&d.eq(&zero), &signed);
            // A weight of 1 leaves the bits as they are.
            sum = sum.add(&scale.mul(&value.scale(weight)));
            total = total.add(&scale);
        }
        let total = total.maximum(&Tensor::scalar(base.gpu(), 1e-12));
        base.add(&sum.div(&total).scale(lambda))
    }
}

/// Returns `(clamp(x, low, high) - low) / (high - low)`, or 0 if `low` equals `high`.
fn norm(x: &Tensor, &[low, high]: &[f32; 2]) -> Tensor {
    let width = high - low;
    let scale = if width > 0.0 { width.recip() } else { 0.0 };
    x.clamp(low, high.max(low)).affine(1.0, -low).scale(scale)
}

/// Computes the L2 norm of each model's whole vector. Sums within a tensor are f32, of elements that are scaled if their squares
/// are beyond it. Sums over tensors are f64.
///
/// # Errors
/// The errors of `each`, and when the device fails.
pub fn l2_norms(
    models: usize,
    mut each: impl FnMut(&mut dyn FnMut(&[Tensor]) -> Result<()>) -> Result<()>,
) -> Result<Vec<f64>> {
    let mut squares = vec![0.0; models];
    each(&mut |tensors| {
        for (all, x) in squares.iter_mut().zip(tensors) {
            *all += products(std::slice::from_ref(x))?[0];
        }
        Ok(())
    })?;
    Ok(squares.into_iter().map(f64::sqrt).collect())
}
