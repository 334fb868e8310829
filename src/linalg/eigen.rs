//! Eigenvalues and eigenvectors of symmetric matrices.

use super::{add_scaled, descending, dot, picked, rotate, scale_below_one};

/// Returns the eigenvalues of a symmetric matrix `a [n, n]` in descending order, and its orthonormal eigenvectors, one
/// per row, so that `a = sum_i values[i] vectors[i] vectors[i]^T`. Only the lower triangle of `a` is read.
///
/// Householder reflections make the matrix tridiagonal, then implicit QL steps with Wilkinson's shift make it diagonal.
/// The errors of the values and of the rebuilt `a` are within a few `2^-53 sqrt(n)` of the largest value. If an element
/// is not finite, all results are NaN. Source: Golub and Van Loan, Matrix Computations, 4th edition, sections 8.3.1 and
/// 8.3.3.
///
/// # Panics
/// If `a` does not have `n * n` elements.
///
/// ```
/// let (values, vectors) = tiebeam::linalg::symmetric_eigen(&[2.0, 1.0, 1.0, 2.0], 2);
/// assert!((values[0] - 3.0).abs() < 1e-12 && (values[1] - 1.0).abs() < 1e-12);
/// assert!((vectors[0] - vectors[1]).abs() < 1e-12); // (1, 1) / sqrt(2) or its opposite
/// ```
#[track_caller]
pub fn symmetric_eigen(a: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    assert!(a.len() == n * n, "symmetric_eigen: {} elements for [{n}, {n}]", a.len());
    if a.iter().any(|x| !x.is_finite()) {
        return (vec![f64::NAN; n], vec![f64::NAN; n * n]);
    }
    let mut work = a.to_vec();
    let scale = scale_below_one(&mut work);
    let (mut diagonal, mut beside, mut vectors) = tridiagonal(&mut work, n);
    diagonalise(&mut diagonal, &mut beside, &mut vectors);
    let order = descending(&diagonal);
    (order.iter().map(|&i| diagonal[i] * scale).collect(), picked(&vectors, n, &order))
}

/// Returns the tridiagonal matrix `Q^T a Q` as its diagonal and its off-diagonal (element i is between i and i + 1, the
/// last is 0), and `Q^T`. Works in the lower triangle of `a`, from the last row up, and leaves the reflections there.
fn tridiagonal(a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut diagonal, mut beside, mut betas) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
    let mut w = vec![0.0; n];
    for i in (0..n).rev() {
        let (above, row) = a.split_at_mut(i * n);
        diagonal[i] = row[i];
        let v = &mut row[..i];
        let Some((last, others)) = v.split_last() else { continue };
        beside[i - 1] = *last;
        if others.iter().all(|x| *x == 0.0) {
            continue;
        }
        // H = I - beta v v^T takes this row to (0, ..., 0, alpha).
        let square = dot(v, v);
        let (last, length) = (v[i - 1], square.sqrt());
        beside[i - 1] = -length.copysign(last);
        v[i - 1] = last + length.copysign(last);
        let beta = 1.0 / (square + last.abs() * length);
        betas[i] = beta;
        // H a H = a - v w^T - w v^T with w = p - (beta / 2) (p . v) v and p = beta a v.
        let w = &mut w[..i];
        w.fill(0.0);
        for (r, row) in above.chunks_exact(n).enumerate() {
            w[r] += dot(&row[..=r], &v[..=r]);
            add_scaled(&mut w[..r], v[r], &row[..r]);
        }
        w.iter_mut().for_each(|x| *x *= beta);
        let along = 0.5 * beta * dot(w, v);
        add_scaled(w, -along, v);
        for (r, row) in above.chunks_exact_mut(n).enumerate() {
            let (vr, wr) = (v[r], w[r]);
            row[..=r].iter_mut().zip(&v[..=r]).zip(&w[..=r]).for_each(|((x, v), w)| *x -= vr * w + wr * v);
        }
    }
    let mut turned = vec![0.0; n * n];
    turned.iter_mut().step_by(n + 1).for_each(|x| *x = 1.0);
    for i in 1..n {
        let v = &a[i * n..][..i];
        for row in turned.chunks_exact_mut(n).take(i) {
            let along = betas[i] * dot(&row[..i], v);
            add_scaled(&mut row[..i], -along, v);
        }
    }
    (diagonal, beside, turned)
}

/// QL steps until the off-diagonal `e` is 0. The rows of `vectors` are rotated with them.
fn diagonalise(d: &mut [f64], e: &mut [f64], vectors: &mut [f64]) {
    let n = d.len();
    for l in 0..n {
        // Two steps per eigenvalue are usual. The bound guarantees that the loop ends.
        for _ in 0..60 {
            let small = |i: &usize| e[*i].abs() <= f64::EPSILON * (d[*i].abs() + d[i + 1].abs());
            let m = (l..n - 1).find(small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            // Wilkinson's shift.
            let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let mut g = d[m] - d[l] + e[l] / (g + g.hypot(1.0).copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut split = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    split = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                let r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                rotate(vectors, n, [i, i + 1], [c, s]);
            }
            if !split {
                d[l] -= p;
                e[l] = g;
            }
            e[m] = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::tests::{by_transposed, drawn, miss, skew};

    /// Checks the documented properties: the matrix is rebuilt, the vectors are orthonormal, the values are in order.
    fn holds(what: &str, a: &[f64], n: usize) -> Vec<f64> {
        let (values, vectors) = symmetric_eigen(a, n);
        let most = values.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        let bound = 8.0 * f64::EPSILON * (n as f64).sqrt();
        let (off, skew) = (miss(a, &values, [&vectors, &vectors], n), skew(&vectors, n));
        assert!(
            off <= bound * most && skew <= bound,
            "{what}, n {n}: off by {off:e} of {most:e}, skew {skew:e}"
        );
        assert!(values.windows(2).all(|pair| pair[0] >= pair[1]), "{what}: {values:?}");
        values
    }

    #[test]
    fn eigenvectors_rebuild_the_matrix() {
        holds("small", &[4.0, 1.0, -2.0, 1.0, 3.0, 0.5, -2.0, 0.5, -1.0], 3);
        for n in [1, 2, 5, 17, 64, 130] {
            let x = drawn(n * n, n as u64);
            let sum: Vec<f64> = (0..n * n).map(|e| x[e] + x[e % n * n + e / n]).collect();
            holds("random", &sum, n);
            // Half of the eigenvalues are 0.
            let half = n.div_ceil(2);
            let values = holds("rank n / 2", &by_transposed(&x[..n * half], &x[..n * half], half), n);
            assert!(values[half..].iter().all(|x| x.abs() < 1e-13 * values[0]), "{values:?}");
            let graded: Vec<f64> =
                (0..n * n).map(|e| sum[e] * 10f64.powf(-14.0 * (e / n + e % n) as f64 / n as f64)).collect();
            holds("graded", &graded, n);
            for scale in [1e-300, 1e300] {
                holds("far from 1", &sum.iter().map(|x| x * scale).collect::<Vec<_>>(), n);
            }
        }
        assert!(symmetric_eigen(&[], 0).0.is_empty());
    }

    #[test]
    fn known_eigenvalues_are_found() {
        assert_eq!(holds("zero", &[0.0; 25], 5), [0.0; 5]);
        let mut diagonal = vec![0.0; 16];
        [3.0, -1.0, 7.0, 3.0].iter().enumerate().for_each(|(i, x)| diagonal[5 * i] = *x);
        assert_eq!(holds("diagonal", &diagonal, 4), [7.0, 3.0, 3.0, -1.0]);
        let ones = holds("ones", &[1.0; 36], 6);
        assert!((ones[0] - 6.0).abs() < 1e-14 && ones[1..].iter().all(|x| x.abs() < 1e-14), "{ones:?}");
        // 2 on the diagonal and -1 beside it: 2 - 2 cos(pi k / (n + 1)).
        let n = 40usize;
        let a: Vec<f64> = (0..n * n).map(|e| [2.0, -1.0, 0.0][(e / n).abs_diff(e % n).min(2)]).collect();
        for (k, value) in holds("second differences", &a, n).iter().rev().enumerate() {
            let want = 2.0 - 2.0 * (std::f64::consts::PI * (k + 1) as f64 / (n + 1) as f64).cos();
            assert!((value - want).abs() < 1e-14, "{k}: {value} for {want}");
        }
    }

    #[test]
    fn what_is_not_finite_gives_nan() {
        for x in [f64::NAN, f64::INFINITY] {
            let (values, vectors) = symmetric_eigen(&[1.0, x, x, 1.0], 2);
            assert!(values.iter().chain(&vectors).all(|x| x.is_nan()));
        }
    }
}
