//! Small dense linear algebra in f64 on the host, by nalgebra. Matrices are row-major slices.

use nalgebra::{DMatrix, SymmetricEigen};

/// Eigenvalues from large to small, and the eigenvectors, one a row, of a symmetric matrix `[n, n]`.
///
/// # Panics
/// When `a` has not `n * n` elements.
#[track_caller]
pub fn symmetric_eigen(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    assert!(a.len() == n * n, "symmetric_eigen: {} elements for [{n}, {n}]", a.len());
    let SymmetricEigen { eigenvectors, eigenvalues } = DMatrix::from_row_slice(n, n, a).symmetric_eigen();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| eigenvalues[j].total_cmp(&eigenvalues[i]));
    let vectors = order.iter().flat_map(|&i| eigenvectors.column(i).iter().copied().collect::<Vec<_>>());
    (order.iter().map(|&i| eigenvalues[i]).collect(), vectors.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_rebuild_the_matrix() {
        let a = [4.0, 1.0, -2.0, 1.0, 3.0, 0.5, -2.0, 0.5, -1.0];
        let (values, vectors) = symmetric_eigen(&a, 3);
        assert!(values[0] >= values[1] && values[1] >= values[2]);
        for i in 0..3 {
            for j in 0..3 {
                let sum: f64 = (0..3).map(|s| values[s] * vectors[s * 3 + i] * vectors[s * 3 + j]).sum();
                assert!((sum - a[i * 3 + j]).abs() < 1e-12, "{i} {j}: {sum}");
            }
        }
    }
}
