//! Grids of orientations: the points at which the sphere or the circle is sampled.

use super::vectors::{DVec3, Vec3};
use crate::gpu::Gpu;
use crate::tensor::Tensor;
use std::f64::consts::{PI, TAU};

/// The orientations of a network: unit vectors in space or in the plane, or none at all.
///
/// The grid does not turn with the input. A network is exactly equivariant under translations, permutations and those
/// rotations and reflections that permute its grid. Under others it is approximately equivariant, with an error that
/// falls with the number of points.
#[derive(Clone, Debug, PartialEq)]
pub struct Grid {
    /// Unit vectors whose third number is 0 in the plane. A single zero vector means positions without orientations.
    vectors: Vec<Vec3>,
    dimension: usize,
}

impl Grid {
    /// `n` points of the Fibonacci lattice on the sphere: `z = 1 - (2i+1)/n` at azimuth `pi (1 + sqrt 5) i`.
    ///
    /// # Panics
    /// When `n` is 0.
    #[track_caller]
    pub fn fibonacci(n: usize) -> Grid {
        assert!(n > 0, "Grid::fibonacci: needs at least one point");
        let point = |i: usize| {
            let z = 1.0 - (2 * i + 1) as f64 / n as f64;
            let azimuth = (PI * (1.0 + 5f64.sqrt()) * i as f64) % TAU;
            let radius = (1.0 - z * z).sqrt();
            [radius * azimuth.cos(), radius * azimuth.sin(), z]
        };
        Grid { vectors: (0..n).map(point).collect(), dimension: 3 }
    }

    /// `n` points in opposite pairs: the upper half of the Fibonacci lattice of `n` points, then their opposites.
    ///
    /// On the fused route, an edge and its reverse share kernels on this grid, so computing kernels costs as much as on
    /// another grid of half as many points. Messages, norm, MLP and memory cost as much as for all `n`. Rotating the
    /// input changes the outputs of an untrained network by 0.009 of their standard deviation at 64 points, and by 0.017
    /// on the Fibonacci lattice of 32 points, whose kernels cost the same. At equal numbers of points the Fibonacci
    /// lattice is mostly better.
    ///
    /// # Panics
    /// When `n` is 0 or odd.
    #[track_caller]
    pub fn antipodal(n: usize) -> Grid {
        assert!(
            n > 0 && n.is_multiple_of(2),
            "Grid::antipodal: {n} points; pairs need an even number above 0"
        );
        let mut grid = Grid::fibonacci(n);
        grid.vectors.truncate(n / 2);
        let others: Vec<Vec3> = grid.vectors.iter().map(|v| v.map(|x| -x)).collect();
        grid.vectors.extend(others);
        grid
    }

    /// The 4 vertices of a tetrahedron.
    pub fn tetrahedron() -> Grid {
        let odd = |v: &Vec3| v.iter().filter(|x| **x < 0.0).count() % 2 == 0;
        Grid::of(signs([1.0, 1.0, 1.0]).into_iter().filter(odd))
    }

    /// The 6 vertices of an octahedron.
    pub fn octahedron() -> Grid {
        Grid::of(turns([1.0, 0.0, 0.0]))
    }

    /// The 8 vertices of a cube.
    pub fn cube() -> Grid {
        Grid::of(signs([1.0, 1.0, 1.0]))
    }

    /// The 12 vertices of an icosahedron.
    pub fn icosahedron() -> Grid {
        Grid::of(turns([0.0, 1.0, golden()]))
    }

    /// The 20 vertices of a dodecahedron.
    pub fn dodecahedron() -> Grid {
        let others = turns([0.0, 1.0 / golden(), golden()]);
        Grid::of(signs([1.0, 1.0, 1.0]).into_iter().chain(others))
    }

    /// `n` directions of the plane at angles `2 pi i / n`.
    ///
    /// # Panics
    /// When `n` is 0.
    #[track_caller]
    pub fn circle(n: usize) -> Grid {
        assert!(n > 0, "Grid::circle: needs at least one angle");
        let angle = |i: usize| TAU * i as f64 / n as f64;
        Grid { vectors: (0..n).map(|i| [angle(i).cos(), angle(i).sin(), 0.0]).collect(), dimension: 2 }
    }

    /// Positions without orientations, in 2 or 3 dimensions: kernels depend on distances only (PNITA).
    ///
    /// # Panics
    /// When the dimension is not 2 or 3.
    #[track_caller]
    pub fn positions(dimension: usize) -> Grid {
        assert!((2..=3).contains(&dimension), "Grid::positions: dimension {dimension} is not 2 or 3");
        Grid { vectors: vec![[0.0; 3]], dimension }
    }

    /// Makes a grid of these vectors, `[n, dimension]` row-major as a model's file stores them, scaled to length 1.
    /// Returns `None` if there are no vectors, the dimension is not 2 or 3, a number is not finite or a vector is zero.
    /// One zero vector alone means [`Grid::positions`].
    pub fn from_vectors(vectors: &[f32], dimension: usize) -> Option<Grid> {
        let whole = (2..=3).contains(&dimension) && !vectors.is_empty();
        if !whole || !vectors.len().is_multiple_of(dimension) || vectors.iter().any(|x| !x.is_finite()) {
            return None;
        }
        if vectors.len() == dimension && vectors.iter().all(|&x| x == 0.0) {
            return Some(Grid::positions(dimension));
        }
        let vectors = vectors.chunks(dimension).map(|v| {
            let v = DVec3::new(v[0] as f64, v[1] as f64, v.get(2).copied().unwrap_or(0.0) as f64);
            (v.length() > 0.0).then(|| unit(v))
        });
        Some(Grid { vectors: vectors.collect::<Option<_>>()?, dimension })
    }

    fn of(vectors: impl IntoIterator<Item = Vec3>) -> Grid {
        Grid { vectors: vectors.into_iter().map(|v| unit(v.into())).collect(), dimension: 3 }
    }

    /// Number of orientations; 1 for positions alone.
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Always false: a grid has at least one point.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Dimension of the space, 2 or 3.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Whether the grid has orientations.
    pub fn is_oriented(&self) -> bool {
        self.vectors.len() > 1 || self.vectors[0] != [0.0; 3]
    }

    /// The unit vectors; the third number is 0 in the plane.
    pub fn vectors(&self) -> &[Vec3] {
        &self.vectors
    }

    /// Returns the index of each point's opposite. Returns `None` if not every point has its own opposite: for tetrahedra, odd
    /// circles, Fibonacci lattices, grids that have a point twice, and positions without orientations.
    pub fn antipodes(&self) -> Option<Vec<usize>> {
        let opposite =
            |v: &[f64; 3]| self.vectors.iter().position(|w| (0..3).all(|i| (v[i] + w[i]).abs() < 1e-6));
        let all: Vec<usize> = self.vectors.iter().map(opposite).collect::<Option<_>>()?;
        let mutual = all.iter().enumerate().all(|(a, &b)| all[b] == a);
        (self.is_oriented() && mutual).then_some(all)
    }

    /// The unit vectors as `[orientations, dimension]`.
    pub fn tensor(&self, gpu: &Gpu) -> Tensor {
        let data: Vec<f32> =
            self.vectors.iter().flat_map(|v| v[..self.dimension].iter().map(|&x| x as f32)).collect();
        Tensor::from_slice(gpu, &data, [self.len(), self.dimension])
    }
}

fn golden() -> f64 {
    (1.0 + 5f64.sqrt()) / 2.0
}

/// Returns `v` with every choice of signs of its nonzero elements.
fn signs(v: Vec3) -> Vec<Vec3> {
    (0..3).fold(vec![v], |all, axis| {
        let both = |v: Vec3| {
            let mut other = v;
            other[axis] = -v[axis];
            if v[axis] == 0.0 { vec![v] } else { vec![v, other] }
        };
        all.into_iter().flat_map(both).collect()
    })
}

/// Scales `v` to length 1. It divides, where glam's `normalize` multiplies by the reciprocal of the length, so that each
/// number is rounded once.
fn unit(v: DVec3) -> Vec3 {
    (v / v.length()).into()
}

/// Returns the three cyclic permutations of `v`, each with every choice of signs.
fn turns(v: Vec3) -> Vec<Vec3> {
    let [x, y, z] = v;
    [[x, y, z], [y, z, x], [z, x, y]].into_iter().flat_map(signs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vertices of a regular polyhedron see each other under few different angles, and every vertex sees the same
    /// angles.
    #[test]
    fn polyhedra_are_regular() {
        let grids = [
            (Grid::tetrahedron(), 4, 2, false),
            (Grid::octahedron(), 6, 3, true),
            (Grid::cube(), 8, 4, true),
            (Grid::icosahedron(), 12, 4, true),
            (Grid::dodecahedron(), 20, 6, true),
        ];
        for (grid, count, angles, antipodal) in grids {
            assert_eq!(grid.len(), count);
            let dot = |v: &Vec3, w: &Vec3| DVec3::from(*v).dot(DVec3::from(*w));
            let seen = |v: &Vec3| {
                let mut dots: Vec<i64> =
                    grid.vectors().iter().map(|w| (dot(v, w) * 1e9).round() as i64).collect();
                dots.sort_unstable();
                dots
            };
            let first = seen(&grid.vectors()[0]);
            assert!(grid.vectors().iter().all(|v| seen(v) == first && (dot(v, v) - 1.0).abs() < 1e-12));
            let mut distinct = first;
            distinct.dedup();
            assert_eq!(distinct.len(), angles, "{count} vertices");
            assert_eq!(grid.antipodes().is_some(), antipodal, "{count} vertices");
        }
        assert!(Grid::circle(8).antipodes().is_some() && Grid::circle(5).antipodes().is_none());
        assert!(Grid::positions(3).antipodes().is_none());
        for n in [2, 6, 16, 64] {
            let pairs = Grid::antipodal(n).antipodes().unwrap();
            assert!(pairs.iter().enumerate().all(|(a, &b)| b == (a + n / 2) % n), "{n}");
        }
        let twice = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0, -1.0, 0.0, 0.0];
        assert!(Grid::from_vectors(&twice, 3).unwrap().antipodes().is_none());
    }

    #[test]
    fn what_a_file_holds_is_checked() {
        assert_eq!(Grid::from_vectors(&[0.0, 0.0, 2.0], 3), Some(Grid::of([[0.0, 0.0, 1.0]])));
        assert_eq!(Grid::from_vectors(&[0.0, 0.0], 2), Some(Grid::positions(2)));
        for bad in [&[1.0, f32::NAN, 0.0][..], &[1.0, 0.0], &[], &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]] {
            assert_eq!(Grid::from_vectors(bad, 3), None, "{bad:?}");
        }
    }
}
