//! How well the singular vectors of two models are aligned. A permutation changes these vectors, but no singular value.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::linalg::singular_values;
use crate::store::Weights;

/// Returns how far the singular vectors of two models point the same way:
///
/// ```text
/// R(A, B) = sum_l sum_{i,j} (u_i^A . u_j^B) (v_i^A . v_j^B) / sum_l sqrt(n_l^A n_l^B)
/// ```
///
/// over matrices `l` and their `n_l` singular values of at least `gamma` times the largest. It is 1 for equal models, near 0 for
/// unrelated ones, and at most 1 in magnitude. A permutation changes no singular value, so matching can only turn the vectors,
/// and it aligns mainly those of large singular values. `tensors` are names of matrices; a tensor with more axes is read as a
/// matrix with its first axis as rows. Source: Ito, Yamada, Kumagai 2024, "Analysis of Linear Mode Connectivity via
/// Permutation-Based Weight Matching", arXiv 2402.04051 (the normalisation is ours).
///
/// # Errors
/// When a tensor is missing, has other sizes in the two models or holds NaN or infinity; for a `gamma` outside `[0, 1]`.
pub fn singular_alignment(gpu: &Gpu, [a, b]: [&dyn Weights; 2], tensors: &[&str], gamma: f64) -> Result<f64> {
    if !(0.0..=1.0).contains(&gamma) {
        return Err(Error::config(format!("singular alignment: gamma {gamma} is outside [0, 1]")));
    }
    let (mut sum, mut count) = (0.0, 0.0);
    for name in tensors {
        let mut parts = Vec::new();
        for weights in [a, b] {
            let x = weights.read(gpu, name)?;
            let rows = x.shape().first().copied().unwrap_or(1).max(1);
            let values: Vec<f64> = x.to_vec::<f32>()?.into_iter().map(f64::from).collect();
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                let message = format!(
                    "tensor `{name}` is {} at element {at}; singular vectors need numbers",
                    values[at]
                );
                return Err(Error::config(message));
            }
            parts.push((*x.shape(), rows, values));
        }
        if parts[0].0 != parts[1].0 {
            return Err(Error::config(format!(
                "`{name}` is {} in one model and {} in the other",
                parts[0].0, parts[1].0
            )));
        }
        let [(first, n), (second, m)] = [0, 1].map(|i| polar(&parts[i].2, parts[i].1, gamma));
        sum += first.iter().zip(&second).map(|(x, y)| x * y).sum::<f64>();
        count += ((n * m) as f64).sqrt();
    }
    Ok(if count == 0.0 { 0.0 } else { sum / count })
}

/// Returns `sum_i u_i v_i^T` over the singular values of at least `gamma` times the largest, and their number. The inner product
/// of two such matrices is the double sum of [`singular_alignment`].
fn polar(x: &[f64], rows: usize, gamma: f64) -> (Vec<f64>, usize) {
    let columns = x.len() / rows;
    let mut sum = vec![0.0; x.len()];
    let svd = singular_values(x, rows, columns);
    let largest = svd.values.first().copied().unwrap_or(0.0);
    let counted = svd.values.iter().take_while(|&&s| s > 0.0 && s >= gamma * largest).count();
    for i in 0..counted {
        let (u, v) = (&svd.left[i * rows..][..rows], &svd.right[i * columns..][..columns]);
        for (row, u) in sum.chunks_mut(columns).zip(u) {
            row.iter_mut().zip(v).for_each(|(sum, v)| *sum += u * v);
        }
    }
    (sum, counted)
}
