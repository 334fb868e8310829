//! Small dense linear algebra in f64 on the host, by nalgebra. Matrices are row-major slices.

pub mod assignment;

use nalgebra::{DMatrix, SVD, SymmetricEigen};

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

/// The lower triangle `L` of `a = L L^T`, `a [n, n]` symmetric; `None` where `a` is not positive definite.
///
/// # Panics
/// When `a` has not `n * n` elements.
#[track_caller]
pub fn cholesky(a: &[f64], n: usize) -> Option<Vec<f64>> {
    assert!(a.len() == n * n, "cholesky: {} elements for [{n}, {n}]", a.len());
    let lower = DMatrix::from_row_slice(n, n, a).cholesky()?.unpack();
    // nalgebra stores columns: those of the transpose are the rows.
    Some(lower.transpose().as_slice().to_vec())
}

/// The solution `x [n, columns]` of `a x = b`, `a [n, n]` symmetric and positive definite, by Cholesky; `None` where it is not.
///
/// # Panics
/// When `a` has not `n * n` elements or `b` not `n * columns`.
#[track_caller]
pub fn solve_positive(a: &[f64], n: usize, b: &[f64], columns: usize) -> Option<Vec<f64>> {
    assert!(
        a.len() == n * n && b.len() == n * columns,
        "solve_positive: {} and {} elements for [{n}, {n}] and [{n}, {columns}]",
        a.len(),
        b.len()
    );
    let x = DMatrix::from_row_slice(n, n, a).cholesky()?.solve(&DMatrix::from_row_slice(n, columns, b));
    Some(x.transpose().as_slice().to_vec())
}

/// Singular values of `a [rows, columns]` from large to small, with `min(rows, columns)` vectors of each side, one a row.
pub struct Svd {
    /// From large to small.
    pub values: Vec<f64>,
    /// Of length `rows` each.
    pub left: Vec<f64>,
    /// Of length `columns` each.
    pub right: Vec<f64>,
}

/// The singular value decomposition `a = sum_i values[i] left[i] right[i]^T` of a matrix `[rows, columns]`.
///
/// # Panics
/// When `a` has not `rows * columns` elements.
#[track_caller]
pub fn singular_values(a: &[f64], rows: usize, columns: usize) -> Svd {
    assert!(a.len() == rows * columns, "singular_values: {} elements for [{rows}, {columns}]", a.len());
    if a.is_empty() {
        return Svd { values: Vec::new(), left: Vec::new(), right: Vec::new() };
    }
    let SVD { u, v_t, singular_values, .. } = DMatrix::from_row_slice(rows, columns, a).svd(true, true);
    let (u, v_t) = (u.expect("asked for"), v_t.expect("asked for"));
    // nalgebra stores columns: those of `u` and of `v` are the vectors.
    let (left, right) = (u.as_slice().to_vec(), v_t.transpose().as_slice().to_vec());
    Svd { values: singular_values.as_slice().to_vec(), left, right }
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

    #[test]
    fn cholesky_rebuilds_the_matrix_and_solves() {
        let a = [4.0, 2.0, 0.6, 2.0, 5.0, -1.0, 0.6, -1.0, 3.0];
        let l = cholesky(&a, 3).expect("positive definite");
        let product = |i: usize, j: usize| (0..3).map(|k| l[i * 3 + k] * l[j * 3 + k]).sum::<f64>();
        let x = [1.0, -2.0, 0.5, 3.0, 7.0, 0.25];
        let b: Vec<f64> = (0..6).map(|e| (0..3).map(|k| a[e / 2 * 3 + k] * x[k * 2 + e % 2]).sum()).collect();
        let solved = solve_positive(&a, 3, &b, 2).expect("positive definite");
        assert!(solved.iter().zip(x).all(|(got, want)| (got - want).abs() < 1e-12), "{solved:?}");
        for i in 0..3 {
            for j in 0..3 {
                assert!((product(i, j) - a[i * 3 + j]).abs() < 1e-12, "{i} {j}");
                assert!(j <= i || l[i * 3 + j] == 0.0, "above the diagonal: {i} {j}");
            }
        }
        assert!(cholesky(&[1.0, 2.0, 2.0, 1.0], 2).is_none());
    }

    #[test]
    fn singular_vectors_rebuild_the_matrix() {
        let a = [1.0, 2.0, -1.0, 0.5, 3.0, 0.0, 2.0, -2.0, 1.0, 1.0, 4.0, -0.5];
        for (rows, columns) in [(3, 4), (4, 3)] {
            let svd = singular_values(&a, rows, columns);
            assert!(svd.values.windows(2).all(|pair| pair[0] >= pair[1]));
            for (e, x) in a.iter().enumerate() {
                let (i, j) = (e / columns, e % columns);
                let term = |s: usize| svd.values[s] * svd.left[s * rows + i] * svd.right[s * columns + j];
                let sum: f64 = (0..3).map(term).sum();
                assert!((sum - x).abs() < 1e-12, "{i} {j}: {sum}");
            }
        }
    }
}
