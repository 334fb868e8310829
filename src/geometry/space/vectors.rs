//! Vectors and matrices of space, in f64 on the host.
//!
//! Positions, forces and cells are plain arrays, as in files and in C. `glam` computes with them. Its vectors convert from
//! and into arrays at no cost:
//!
//! ```
//! use tiebeam::Rng;
//! use tiebeam::geometry::vectors::{DVec3, Vec3, rotation};
//!
//! let turn = rotation(&mut Rng::new(1));
//! let position: Vec3 = [0.0, 3.0, 4.0];
//! let turned: Vec3 = (turn * DVec3::from(position)).into();
//! assert!((DVec3::from(turned).length() - 5.0).abs() < 1e-12);
//! ```

use crate::rng::Rng;

pub use glam::{DMat3, DVec3};

/// A vector in space.
pub type Vec3 = [f64; 3];

/// A matrix as three rows.
pub type Mat3 = [Vec3; 3];

/// Returns `m x` for each of these vectors.
pub fn turned(m: &DMat3, vectors: &[Vec3]) -> Vec<Vec3> {
    vectors.iter().map(|&x| (m * DVec3::from(x)).into()).collect()
}

/// Draws a uniformly distributed orthogonal matrix. Two rows of normal draws are made orthonormal (Gram-Schmidt); the
/// third is their cross product, with a random sign.
pub fn orthogonal(rng: &mut Rng) -> DMat3 {
    let mut draws = [0.0f32; 10];
    rng.fill_normal(&mut draws);
    let [a, b] = [0, 3].map(|i| DVec3::from_array([0, 1, 2].map(|k| f64::from(draws[i + k]))));
    // A row of zeros, or one parallel to the other, must not cause a division by zero.
    let unit = |a: DVec3| a / a.length().max(1e-30);
    let a = unit(a);
    let b = unit(b - a.dot(b) * a);
    let sign = f64::from(draws[9]).signum();
    DMat3::from_cols(a, b, sign * a.cross(b)).transpose()
}

/// Draws a uniformly distributed rotation: [`orthogonal`], times -1 if its determinant is -1.
pub fn rotation(rng: &mut Rng) -> DMat3 {
    let m = orthogonal(rng);
    m.determinant().signum() * m
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element of a uniform rotation has mean 0 and mean square 1/3, and no two elements are correlated.
    #[test]
    fn rotations_are_even_and_proper() {
        let mut rng = Rng::new(1);
        let count = 4000;
        let (mut sums, mut squares) = ([0.0; 9], [[0.0; 9]; 9]);
        for i in 0..count {
            let m = rotation(&mut rng);
            assert!((m * m.transpose()).abs_diff_eq(DMat3::IDENTITY, 1e-12), "draw {i}: {m:?}");
            assert!((m.determinant() - 1.0).abs() < 1e-12, "draw {i}: {m:?}");
            let all = m.to_cols_array();
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
        let mirrored = (0..1000).filter(|_| orthogonal(&mut rng).determinant() < 0.0).count();
        assert!((400..600).contains(&mirrored), "{mirrored} of 1000");
    }
}
