//! Small dense linear algebra in f64 on the host. Matrices are row-major slices. The same input always gives the same
//! bits.

pub mod assignment;
mod eigen;
mod svd;

pub use eigen::symmetric_eigen;
pub use svd::{Svd, singular_values};

/// Returns the lower triangle `L` of `a = L L^T`, where `a [n, n]` is symmetric and only its lower triangle is read.
/// `None` if `a` is not positive definite. Source: Golub and Van Loan, Matrix Computations, 4th edition, section 4.2.
///
/// # Panics
/// If `a` does not have `n * n` elements.
///
/// ```
/// use tiebeam::linalg::cholesky;
/// let l = cholesky(&[4.0, 0.0, 2.0, 5.0], 2).expect("positive definite"); // the upper triangle is not read
/// assert_eq!(l, [2.0, 0.0, 1.0, 2.0]);
/// assert!(cholesky(&[-1.0], 1).is_none());
/// ```
#[track_caller]
pub fn cholesky(a: &[f64], n: usize) -> Option<Vec<f64>> {
    assert!(a.len() == n * n, "cholesky: {} elements for [{n}, {n}]", a.len());
    let mut lower = vec![0.0; n * n];
    for i in 0..n {
        let (above, row) = lower.split_at_mut(i * n);
        for j in 0..i {
            row[j] = (a[i * n + j] - dot(&row[..j], &above[j * n..][..j])) / above[j * n + j];
        }
        let square = a[i * n + i] - dot(&row[..i], &row[..i]);
        // NaN is refused too.
        if square.is_nan() || square <= 0.0 {
            return None;
        }
        row[i] = square.sqrt();
    }
    Some(lower)
}

/// Returns the solution `x [n, columns]` of `a x = b`, where `a [n, n]` is symmetric and positive definite, by
/// Cholesky. `None` if `a` is not positive definite.
///
/// # Panics
/// If `a` does not have `n * n` elements or `b` does not have `n * columns`.
///
/// ```
/// use tiebeam::linalg::solve_positive;
/// let x = solve_positive(&[4.0, 2.0, 2.0, 5.0], 2, &[6.0, 7.0], 1).expect("positive definite");
/// assert!((x[0] - 1.0).abs() < 1e-12 && (x[1] - 1.0).abs() < 1e-12);
/// ```
#[track_caller]
pub fn solve_positive(a: &[f64], n: usize, b: &[f64], columns: usize) -> Option<Vec<f64>> {
    assert!(
        a.len() == n * n && b.len() == n * columns,
        "solve_positive: {} and {} elements for [{n}, {n}] and [{n}, {columns}]",
        a.len(),
        b.len()
    );
    let lower = cholesky(a, n)?;
    let mut x = b.to_vec();
    // L y = b from the first row down, then L^T x = y from the last row up.
    for i in 0..n {
        let (before, rest) = x.split_at_mut(i * columns);
        for j in 0..i {
            add_scaled(&mut rest[..columns], -lower[i * n + j], &before[j * columns..][..columns]);
        }
        rest[..columns].iter_mut().for_each(|x| *x /= lower[i * n + i]);
    }
    for i in (0..n).rev() {
        let (before, rest) = x.split_at_mut(i * columns);
        rest[..columns].iter_mut().for_each(|x| *x /= lower[i * n + i]);
        for j in 0..i {
            add_scaled(&mut before[j * columns..][..columns], -lower[i * n + j], &rest[..columns]);
        }
    }
    Some(x)
}

/// `x . y`, summed in eight lanes and then in order.
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<8>(), y.as_chunks::<8>());
    let mut lanes = [0.0; 8];
    for (x, y) in x.iter().zip(y) {
        (0..8).for_each(|i| lanes[i] += x[i] * y[i]);
    }
    let rest: f64 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f64>() + rest
}

/// `to += s from`
fn add_scaled(to: &mut [f64], s: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += s * from);
}

/// Rotates the rows `x` and `y` with indices `i < j` in `a`, of length `n`, to `c x - s y` and `s x + c y`.
fn rotate(a: &mut [f64], n: usize, [i, j]: [usize; 2], [c, s]: [f64; 2]) {
    let (first, second) = a.split_at_mut(j * n);
    for (x, y) in first[i * n..][..n].iter_mut().zip(&mut second[..n]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

/// Divides by the power of two that brings the largest element below 1, so that squares do not overflow, and returns
/// it.
fn scale_below_one(a: &mut [f64]) -> f64 {
    let largest = a.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    if largest == 0.0 {
        return 1.0;
    }
    // Clamped so that the power and its reciprocal are normal numbers.
    let scale = 2f64.powi(largest.log2().floor().clamp(-1022.0, 1022.0) as i32 + 1);
    a.iter_mut().for_each(|x| *x /= scale);
    scale
}

/// The order that sorts `values` from large to small.
fn descending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    order
}

/// Returns the rows with these indices, of length `n` each.
fn picked(rows: &[f64], n: usize, order: &[usize]) -> Vec<f64> {
    order.iter().flat_map(|&i| &rows[i * n..][..n]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

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
    fn what_is_not_positive_definite_is_refused() {
        for a in
            [[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [f64::NAN, 0.0, 0.0, 1.0], [1.0, 0.0, f64::NAN, 1.0]]
        {
            assert!(cholesky(&a, 2).is_none() && solve_positive(&a, 2, &[1.0; 2], 1).is_none(), "{a:?}");
        }
        assert!(cholesky(&[], 0).is_some_and(|lower| lower.is_empty()));
    }

    /// Uniform draws between -1/2 and 1/2.
    pub(super) fn drawn(count: usize, seed: u64) -> Vec<f64> {
        let mut draws = vec![0.0f32; count];
        Rng::new(seed).fill_uniform(&mut draws);
        draws.into_iter().map(|x| f64::from(x) - 0.5).collect()
    }

    /// `x y^T` of `x [n, k]` and `y [m, k]`.
    pub(super) fn by_transposed(x: &[f64], y: &[f64], k: usize) -> Vec<f64> {
        let row = |x: &[f64]| y.chunks_exact(k).map(|y| dot(x, y)).collect::<Vec<_>>();
        x.chunks_exact(k).flat_map(row).collect()
    }

    /// The largest element by magnitude.
    pub(super) fn largest(a: &[f64]) -> f64 {
        a.iter().fold(0.0, |most, x| most.max(x.abs()))
    }

    /// How far rows of length `n` are from orthonormal.
    pub(super) fn skew(rows: &[f64], n: usize) -> f64 {
        let mut products = by_transposed(rows, rows, n);
        products.iter_mut().step_by(rows.len() / n + 1).for_each(|x| *x -= 1.0);
        largest(&products)
    }

    /// How far `sum_i values[i] left[i] right[i]^T` is from `a`.
    pub(super) fn miss(a: &[f64], values: &[f64], [left, right]: [&[f64]; 2], columns: usize) -> f64 {
        let mut rest = a.to_vec();
        for (i, value) in values.iter().enumerate() {
            let (u, v) = (&left[i * a.len() / columns..], &right[i * columns..][..columns]);
            rest.chunks_exact_mut(columns).zip(u).for_each(|(row, u)| add_scaled(row, -value * u, v));
        }
        largest(&rest)
    }
}
