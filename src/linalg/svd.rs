//! The singular value decomposition.

use super::{add_scaled, descending, dot, picked, rotate, scale_below_one, symmetric_eigen};

/// Singular values of `a [rows, columns]` in descending order, with `min(rows, columns)` vectors for each side, one per
/// row.
#[non_exhaustive]
pub struct Svd {
    /// In descending order, none below 0.
    pub values: Vec<f64>,
    /// Orthonormal, of length `rows` each.
    pub left: Vec<f64>,
    /// Orthonormal, of length `columns` each.
    pub right: Vec<f64>,
}

/// The singular value decomposition `a = sum_i values[i] left[i] right[i]^T` of a matrix `[rows, columns]`.
///
/// One-sided Jacobi: rotations make the rows of `a` (or its columns, if those are fewer) pairwise orthogonal. Their
/// lengths are then the singular values. The eigenvectors of `a a^T` give the first rotation, so that few further ones
/// are needed. These recover the digits that squaring loses. The errors of the values and of the rebuilt `a` are within
/// a few `2^-53 sqrt(n)` of the largest value, where n is the longer side. If an element is not finite, all results are
/// NaN. Source: Golub and Van Loan, Matrix Computations, 4th edition, section 8.6.3. A first rotation of this kind:
/// Drmač and Veselić, New fast and accurate Jacobi SVD algorithm, 2008.
///
/// # Panics
/// If `a` does not have `rows * columns` elements.
///
/// ```
/// let svd = tiebeam::linalg::singular_values(&[3.0, 0.0, 0.0, 0.0, 0.0, 4.0], 2, 3);
/// assert!((svd.values[0] - 4.0).abs() < 1e-12 && (svd.values[1] - 3.0).abs() < 1e-12);
/// assert_eq!((svd.left.len(), svd.right.len()), (2 * 2, 2 * 3));
/// ```
#[track_caller]
pub fn singular_values(a: &[f64], rows: usize, columns: usize) -> Svd {
    assert!(a.len() == rows * columns, "singular_values: {} elements for [{rows}, {columns}]", a.len());
    let few = rows.min(columns);
    if a.iter().any(|x| !x.is_finite()) {
        let all = |n: usize| vec![f64::NAN; n];
        return Svd { values: all(few), left: all(few * rows), right: all(few * columns) };
    }
    if rows <= columns {
        let [values, left, right] = by_rows(a.to_vec(), rows, columns);
        return Svd { values, left, right };
    }
    let turned = (0..a.len()).map(|e| a[e % rows * columns + e / rows]).collect();
    let [values, right, left] = by_rows(turned, columns, rows);
    Svd { values, left, right }
}

/// Returns values, left and right vectors of a matrix with at least as many columns as rows.
fn by_rows(mut a: Vec<f64>, rows: usize, columns: usize) -> [Vec<f64>; 3] {
    if a.is_empty() {
        return [Vec::new(), Vec::new(), Vec::new()];
    }
    let scale = scale_below_one(&mut a);
    let mut gram = vec![0.0; rows * rows];
    for (i, x) in a.chunks_exact(columns).enumerate() {
        for (j, y) in a.chunks_exact(columns).take(i + 1).enumerate() {
            gram[i * rows + j] = dot(x, y);
        }
    }
    let (_, mut left) = symmetric_eigen(&gram, rows);
    let mut right = vec![0.0; rows * columns];
    for (to, u) in right.chunks_exact_mut(columns).zip(left.chunks_exact(rows)) {
        for (&u, from) in u.iter().zip(a.chunks_exact(columns)) {
            add_scaled(to, u, from);
        }
    }
    orthogonalise(&mut right, &mut left, rows, columns);
    let lengths: Vec<f64> = right.chunks_exact(columns).map(|x| dot(x, x).sqrt()).collect();
    let order = descending(&lengths);
    let [left, mut right] = [(&left, rows), (&right, columns)].map(|(all, n)| picked(all, n, &order));
    let lengths: Vec<f64> = order.iter().map(|&i| lengths[i]).collect();
    for (x, length) in right.chunks_exact_mut(columns).zip(&lengths) {
        x.iter_mut().for_each(|x| *x /= if *length > 0.0 { *length } else { 1.0 });
    }
    complete(&mut right, columns, lengths.iter().take_while(|length| **length > 0.0).count());
    [lengths.iter().map(|length| length * scale).collect(), left, right]
}

/// Rotates the rows of `a` until they are orthogonal, and the rows of `with` by the same rotations. Rows shorter than
/// `2^-104` of the longest become 0.
fn orthogonalise(a: &mut [f64], with: &mut [f64], rows: usize, columns: usize) {
    // The cosine that rounding leaves between orthogonal rows.
    let bound = f64::EPSILON * (columns as f64).sqrt();
    // Two or three sweeps are usual. The bound guarantees that the loop ends.
    for _ in 0..60 {
        let mut squares: Vec<f64> = a.chunks_exact(columns).map(|x| dot(x, x)).collect();
        let least = squares.iter().copied().fold(0.0, f64::max) * f64::EPSILON.powi(4);
        for (x, square) in
            a.chunks_exact_mut(columns).zip(&mut squares).filter(|(_, square)| **square < least)
        {
            x.fill(0.0);
            *square = 0.0;
        }
        let mut turned = false;
        for i in 0..rows {
            for j in i + 1..rows {
                let [x, y] = [i, j].map(|i| &a[i * columns..][..columns]);
                let product = dot(x, y);
                if product.abs() <= bound * squares[i].sqrt() * squares[j].sqrt() {
                    continue;
                }
                turned = true;
                // The smaller of the two angles after which the product is 0.
                let zeta = (squares[j] - squares[i]) / (2.0 * product);
                let t = 1f64.copysign(zeta) / (zeta.abs() + zeta.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                rotate(a, columns, [i, j], [c, c * t]);
                rotate(with, rows, [i, j], [c, c * t]);
                for i in [i, j] {
                    let x = &a[i * columns..][..columns];
                    squares[i] = dot(x, x);
                }
            }
        }
        if !turned {
            break;
        }
    }
}

/// Replaces the rows from `known` on by vectors that are orthonormal to each other and to all rows before.
fn complete(a: &mut [f64], columns: usize, known: usize) {
    for i in known..a.len() / columns {
        let (before, rest) = a.split_at_mut(i * columns);
        // The axis that lies least in the span of the rows before. Its part outside that span is at least as long as
        // the average.
        let mut held = vec![0.0; columns];
        for x in before.chunks_exact(columns) {
            held.iter_mut().zip(x).for_each(|(held, x)| *held += x * x);
        }
        let axis = (0..columns).min_by(|&i, &j| held[i].total_cmp(&held[j])).expect("a column");
        let x = &mut rest[..columns];
        x.fill(0.0);
        x[axis] = 1.0;
        // Twice, because rounding leaves a little.
        for _ in 0..2 {
            for other in before.chunks_exact(columns) {
                add_scaled(x, -dot(x, other), other);
            }
        }
        let length = dot(x, x).sqrt();
        x.iter_mut().for_each(|x| *x /= length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::tests::{by_transposed, drawn, miss, skew};

    /// Checks the documented properties: the matrix is rebuilt, the vectors are orthonormal, the values are in order,
    /// and they are the same for the transposed matrix.
    fn holds(what: &str, a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
        let svd = singular_values(a, rows, columns);
        let bound = 8.0 * f64::EPSILON * (rows.max(columns) as f64).sqrt();
        let most = svd.values[0];
        let off = miss(a, &svd.values, [&svd.left, &svd.right], columns);
        let skew = [skew(&svd.left, rows), skew(&svd.right, columns)];
        assert!(
            off <= bound * most && skew.iter().all(|x| *x <= bound),
            "{what} [{rows}, {columns}]: off by {off:e} of {most:e}, skew {skew:?}"
        );
        assert!(svd.values.windows(2).all(|pair| pair[0] >= pair[1]), "{what}: {:?}", svd.values);
        assert!(svd.values.iter().all(|x| *x >= 0.0), "{what}: {:?}", svd.values);
        let turned: Vec<f64> = (0..a.len()).map(|e| a[e % rows * columns + e / rows]).collect();
        let other = singular_values(&turned, columns, rows).values;
        let near = other.iter().zip(&svd.values).all(|(x, y)| (x - y).abs() <= bound * most);
        assert!(near, "{what} [{rows}, {columns}]: {other:?}, {:?}", svd.values);
        svd.values
    }

    #[test]
    fn singular_vectors_rebuild_the_matrix() {
        for (rows, columns) in [(1, 1), (1, 9), (3, 4), (4, 3), (17, 17), (40, 7), (30, 100)] {
            let x = drawn(rows * columns, (rows * 1000 + columns) as u64);
            holds("random", &x, rows, columns);
            let few = rows.min(columns);
            let rank = few.div_ceil(3);
            let low = by_transposed(&x[..rows * rank], &drawn(columns * rank, 5), rank);
            let values = holds("rank n / 3", &low, rows, columns);
            assert!(values[rank..].iter().all(|x| *x <= 1e-14 * values[0]), "{values:?}");
            // Condition 1e14, by rows and by columns.
            for by in [columns, 1] {
                let side = if by == 1 { columns } else { rows };
                let part = |e: usize| if by == 1 { e % columns } else { e / columns };
                let factor = |e: usize| 10f64.powf(-14.0 * part(e) as f64 / side as f64);
                let graded: Vec<f64> = (0..x.len()).map(|e| x[e] * factor(e)).collect();
                holds("graded", &graded, rows, columns);
            }
            for scale in [1e-300, 1e300] {
                holds("far from 1", &x.iter().map(|x| x * scale).collect::<Vec<_>>(), rows, columns);
            }
            // Rows that are equal up to rounding.
            let twins: Vec<f64> = (0..x.len()).map(|e| x[e % columns] + 1e-15 * x[e]).collect();
            holds("twins", &twins, rows, columns);
        }
    }

    #[test]
    fn known_singular_values_are_found() {
        assert_eq!(holds("zero", &[0.0; 12], 3, 4), [0.0; 3]);
        assert_eq!(holds("diagonal", &[0.0, -2.0, 0.0, 0.0, 0.0, 5.0], 2, 3), [5.0, 2.0]);
        assert!(singular_values(&[], 0, 4).values.is_empty());
        // Hilbert's matrix of size 8: its largest and smallest singular value. The condition number is 1.5e10.
        let hilbert: Vec<f64> = (0..64).map(|e| 1.0 / (e / 8 + e % 8 + 1) as f64).collect();
        let values = holds("Hilbert", &hilbert, 8, 8);
        for (value, want) in [(values[0], 1.695_938_996_921_949_4), (values[7], 1.111_538_966_372_442e-10)] {
            assert!((value - want).abs() < 1e-14, "{value:e} for {want:e}");
        }
    }

    #[test]
    fn what_is_not_finite_gives_nan() {
        let svd = singular_values(&[1.0, f64::NAN, 2.0, 3.0, 4.0, 5.0], 2, 3);
        assert_eq!([svd.values.len(), svd.left.len(), svd.right.len()], [2, 4, 6]);
        assert!(svd.values.iter().chain(&svd.left).chain(&svd.right).all(|x| x.is_nan()));
    }
}
