//! Random rotations and reflections, for what an example measures under them.

use tiebeam::Rng;

/// Three rows.
pub type Matrix = [[f64; 3]; 3];

/// An orthogonal matrix, evenly drawn: the rows are a normal matrix's, made orthonormal; the last one's sign
/// is a coin's.
pub fn orthogonal(rng: &mut Rng) -> Matrix {
    let mut draws = [0.0f32; 10];
    rng.fill_normal(&mut draws);
    let row = |i: usize| -> [f64; 3] { std::array::from_fn(|k| draws[3 * i + k] as f64) };
    let dot = |a: [f64; 3], b: [f64; 3]| (0..3).map(|k| a[k] * b[k]).sum::<f64>();
    let unit = |a: [f64; 3]| a.map(|x| x / dot(a, a).sqrt().max(1e-30));
    let a = unit(row(0));
    let b = row(1);
    let b = unit(std::array::from_fn(|k| b[k] - dot(a, b) * a[k]));
    let sign = (draws[9] as f64).signum();
    let c = std::array::from_fn(|k| {
        let (i, j) = ((k + 1) % 3, (k + 2) % 3);
        sign * (a[i] * b[j] - a[j] * b[i])
    });
    [a, b, c]
}

pub fn transposed(m: &Matrix) -> Matrix {
    std::array::from_fn(|i| std::array::from_fn(|j| m[j][i]))
}

pub fn times(m: &Matrix, x: [f64; 3]) -> [f64; 3] {
    std::array::from_fn(|i| (0..3).map(|j| m[i][j] * x[j]).sum())
}
