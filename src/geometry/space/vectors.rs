//! Vectors and matrices of space, in f64 on the host.

use crate::rng::Rng;
use std::array::from_fn;

/// A vector in space.
pub type Vec3 = [f64; 3];

/// A matrix as three rows.
pub type Mat3 = [Vec3; 3];

/// `a . b`
pub fn dot(a: Vec3, b: Vec3) -> f64 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2]
}

/// `a x b`
pub fn cross(a: Vec3, b: Vec3) -> Vec3 {
    [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
}

/// The length of `a`.
pub fn norm(a: Vec3) -> f64 {
    dot(a, a).sqrt()
}

/// `a` scaled to length 1. The result for the zero vector is not finite.
pub fn unit(a: Vec3) -> Vec3 {
    let length = norm(a);
    a.map(|x| x / length)
}

/// `det m`: the volume that the rows span, negative if they are left-handed.
pub fn determinant(m: &Mat3) -> f64 {
    dot(m[0], cross(m[1], m[2]))
}

/// `m^T`
pub fn transposed(m: &Mat3) -> Mat3 {
    from_fn(|i| from_fn(|j| m[j][i]))
}

/// `m x`
pub fn times(m: &Mat3, x: Vec3) -> Vec3 {
    m.map(|row| dot(row, x))
}

/// `m^T x`: the sum of the rows of `m`, each times its number in `x`. This undoes `times` if `m` is orthogonal.
pub fn times_transposed(m: &Mat3, x: Vec3) -> Vec3 {
    from_fn(|k| x[0] * m[0][k] + x[1] * m[1][k] + x[2] * m[2][k])
}

/// Draws a uniformly distributed orthogonal matrix. Two rows of normal draws are made orthonormal (Gram-Schmidt); the
/// third is their cross product, with a random sign.
pub fn orthogonal(rng: &mut Rng) -> Mat3 {
    let mut draws = [0.0f32; 10];
    rng.fill_normal(&mut draws);
    let row = |i: usize| -> Vec3 { from_fn(|k| draws[3 * i + k] as f64) };
    // A row of zeros, or one parallel to the other, must not cause a division by zero.
    let unit = |a: Vec3| a.map(|x| x / norm(a).max(1e-30));
    let a = unit(row(0));
    let b = row(1);
    let b = unit(from_fn(|k| b[k] - dot(a, b) * a[k]));
    let sign = (draws[9] as f64).signum();
    [a, b, cross(a, b).map(|x| sign * x)]
}

/// Draws a uniformly distributed rotation: [`orthogonal`], times -1 if its determinant is -1.
pub fn rotation(rng: &mut Rng) -> Mat3 {
    let m = orthogonal(rng);
    let sign = determinant(&m).signum();
    m.map(|row| row.map(|x| sign * x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of uniform rotations every element has mean 0 and mean square 1/3, and no two elements are correlated.
    #[test]
    fn rotations_are_even_and_proper() {
        let mut rng = Rng::new(1);
        let count = 4000;
        let (mut sums, mut squares) = ([0.0; 9], [[0.0; 9]; 9]);
        for i in 0..count {
            let m = rotation(&mut rng);
            for (a, b) in (0..3).flat_map(|a| (0..3).map(move |b| (a, b))) {
                assert!((dot(m[a], m[b]) - (a == b) as u8 as f64).abs() < 1e-12, "draw {i}: {m:?}");
            }
            assert!((determinant(&m) - 1.0).abs() < 1e-12, "draw {i}: {m:?}");
            let x = [0.3, -1.2, 0.7];
            let back = times_transposed(&m, times(&m, x));
            assert!((0..3).all(|k| (back[k] - x[k]).abs() < 1e-12), "draw {i}: {back:?}");
            assert_eq!(times(&transposed(&m), x), times_transposed(&m, x));
            let all = m.as_flattened();
            for p in 0..9 {
                sums[p] += all[p] / count as f64;
                (0..9).for_each(|q| squares[p][q] += all[p] * all[q] / count as f64);
            }
        }
        // Four standard errors of a mean of `count` numbers of this variance.
        let bound = 4.0 * (1.0 / 3.0 / count as f64).sqrt();
        for p in 0..9 {
            assert!(sums[p].abs() < bound, "mean of element {p}: {}", sums[p]);
            for (q, square) in squares[p].iter().enumerate() {
                let want = if p == q { 1.0 / 3.0 } else { 0.0 };
                assert!((square - want).abs() < bound, "elements {p}, {q}: {square}");
            }
        }
    }

    #[test]
    fn reflections_are_half_of_the_orthogonal_matrices() {
        let mut rng = Rng::new(2);
        let mirrored = (0..1000).filter(|_| determinant(&orthogonal(&mut rng)) < 0.0).count();
        assert!((400..600).contains(&mirrored), "{mirrored} of 1000");
    }
}
