//! Extracts a LoRA adapter from a fine-tuned model: the best approximation of each matrix's change by a product of two thin ones.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::linalg::symmetric_eigen;
use crate::merge::Weights;
use crate::models::adapter::Pair;
use crate::rng::Rng;
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// The factors of a matrix's change, and how much of it they are.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Truncated {
    /// `A [rank, in]`, with `sqrt(s)` in it.
    pub a: Tensor,
    /// `B [out, rank]`, with `sqrt(s)` in it.
    pub b: Tensor,
    /// The singular values, largest first.
    pub values: Vec<f64>,
    /// `sum s_i^2 / |x|^2`, at most 1.
    pub kept: f64,
}

/// Columns beside the rank, which make the iteration converge where singular values lie near each other.
const BESIDE: usize = 8;

/// Most iterations.
const ROUNDS: usize = 30;

/// Computes the truncated singular value decomposition of `x [out, in]`: `B A` with the `rank` largest singular values, each
/// shared between the factors. It is found by subspace iteration on the device, which ends when the squares of the values no longer
/// grow by one in 10^7.
///
/// Source: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithm 4.4.
///
/// # Errors
/// When an element is NaN or infinite, or the device fails.
///
/// # Panics
/// When `x` is no matrix, or `rank` is 0.
#[track_caller]
pub fn truncated(x: &Tensor, rank: usize, seed: u64) -> Result<Truncated> {
    let &[out, inner] = &x.shape()[..] else { panic!("truncated: {} is no matrix", x.shape()) };
    assert!(rank > 0, "truncated: a rank of 0");
    let x = x.detach();
    let whole = f64::from(no_grad(|| x.square().sum_all()).item()?);
    if !whole.is_finite() {
        return Err(Error::config("an adapter cannot be extracted of a change that is not finite"));
    }
    let rank = rank.min(out).min(inner);
    let gpu = x.gpu();
    let width = (rank + BESIDE).min(out).min(inner);
    if whole == 0.0 {
        let (a, b) = (Tensor::zeros(gpu, [rank, inner]), Tensor::zeros(gpu, [out, rank]));
        return Ok(Truncated { a: a.contiguous(), b: b.contiguous(), values: vec![0.0; rank], kept: 1.0 });
    }
    no_grad(|| {
        let turned = x.t().contiguous();
        let start = Tensor::randn(gpu, [inner, width], &mut Rng::new(seed));
        let mut left = orthonormal(&x.matmul_f32(&start))?;
        let (mut last, mut found) = (0.0, None);
        for _ in 0..ROUNDS {
            let right = orthonormal(&turned.matmul_f32(&left))?;
            left = orthonormal(&x.matmul_f32(&right))?;
            // x is near left (left^T x), whose Gram matrix has the squares of the singular values.
            let inside = left.t().matmul_f32(&x);
            let gram = wide(&inside.matmul_f32(&inside.t()))?;
            let (squares, vectors) = symmetric_eigen(&gram, width);
            let sum: f64 = squares[..rank].iter().sum();
            let done = sum <= last * (1.0 + 1e-7);
            found = Some((inside, squares, vectors));
            last = sum;
            if done {
                break;
            }
        }
        let (inside, squares, vectors) = found.ok_or_else(|| Error::config("truncated: no round"))?;
        let values: Vec<f64> = squares[..rank].iter().map(|s| s.max(0.0).sqrt()).collect();
        // u_i = left v_i, and the right vectors are (left v_i)^T x / s_i = v_i^T inside / s_i.
        let (mut to_b, mut to_a) = (vec![0.0f32; width * rank], vec![0.0f32; rank * width]);
        for (i, s) in values.iter().enumerate() {
            let root = s.sqrt();
            for k in 0..width {
                let v = vectors[i * width + k];
                to_b[k * rank + i] = (v * root) as f32;
                to_a[i * width + k] = if root > 0.0 { (v / root) as f32 } else { 0.0 };
            }
        }
        let b = left.matmul_f32(&Tensor::from_slice(gpu, &to_b, [width, rank]));
        let a = Tensor::from_slice(gpu, &to_a, [rank, width]).matmul_f32(&inside);
        let kept = values.iter().map(|s| s * s).sum::<f64>() / whole;
        Ok(Truncated { a, b, values, kept: kept.min(1.0) })
    })
}

fn wide(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.to_vec::<f32>()?.into_iter().map(f64::from).collect())
}

/// Columns with the same span that are orthonormal; what depends on others becomes 0. Twice, because the first pass leaves what f32
/// rounds away.
fn orthonormal(x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for _ in 0..2 {
        let n = x.shape()[1];
        let (values, vectors) = symmetric_eigen(&wide(&x.t().matmul_f32(&x))?, n);
        let least = values[0] * 1e-12;
        let mut turn = vec![0.0f32; n * n];
        for (i, value) in values.iter().enumerate().filter(|(_, value)| **value > least && **value > 0.0) {
            (0..n).for_each(|k| turn[k * n + i] = (vectors[i * n + k] / value.sqrt()) as f32);
        }
        x = x.matmul_f32(&Tensor::from_slice(x.gpu(), &turn, [n, n]));
    }
    Ok(x)
}

/// What was extracted of one weight.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Extracted {
    /// Its name and factors.
    pub pair: Pair,
    /// The share of the change that the factors are.
    pub kept: f64,
    /// The squared length of the change.
    pub length: f64,
}

/// Extracts the change from `base` to `model` of the matrices that `chosen` accepts. Those that do not change are left out. `on` is
/// told how many matrices are done of how many.
///
/// # Errors
/// When a matrix is missing or has other sizes in the base, or the device fails; what `on` returns.
pub fn extract(
    gpu: &Gpu,
    base: &dyn Weights,
    model: &dyn Weights,
    chosen: &dyn Fn(&str) -> bool,
    rank: usize,
    on: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Extracted>> {
    let is_matrix = |name: &String| model.shape(name).is_ok_and(|shape| shape.len() == 2) && chosen(name);
    let names: Vec<String> = model.float_names().into_iter().filter(is_matrix).collect();
    let mut all = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let [a, b] = [base.read(gpu, name)?, model.read(gpu, name)?];
        if a.shape() != b.shape() {
            return Err(Error::config(format!(
                "`{name}` is {} in the base and {} in the model; an adapter keeps sizes",
                a.shape(),
                b.shape()
            )));
        }
        let change = no_grad(|| b.sub(&a));
        let length = f64::from(no_grad(|| change.square().sum_all()).item()?);
        if length != 0.0 {
            let found = truncated(&change, rank, i as u64)?;
            all.push(Extracted { pair: (name.clone(), found.a, found.b), kept: found.kept, length });
        }
        on(i + 1, names.len())?;
    }
    Ok(all)
}
