//! Random directions for parameters, named by numbers: the same bits on every adapter and on the host.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, MOST_TURNS, Part, grid};
use crate::gpu::recording;
use crate::gpu::shader::Source;
use crate::ops::elementwise::random::normal_table_on;
use crate::rng::{normal_from_bits, philox};
use crate::tensor::Tensor;
use std::collections::HashSet;
use std::sync::LazyLock;

const OP: &str = "perturb";
/// Directions are at least 2^-28, and the lower part of a scalar at least 2^-15 of it.
const SMALLEST: f32 = 1.0 / (1u64 << 32) as f32 / (1u64 << 32) as f32;
/// Moves that one kernel makes, below the turns that a thread's loops may make.
const MOST: usize = MOST_TURNS / 2;

/// A step along one random direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    /// The number of the direction.
    pub id: u64,
    /// How far to go. 16 of its significant bits count, and less than 2^-64 is 0: [`Move::rounded`].
    pub by: f32,
}

impl Move {
    /// The scalar with 16 significant bits, half away from 0, of which a product with a direction is exact in two parts. Below 2^-64 it is
    /// 0: no product is so small that it is subnormal, which adapters may take for 0.
    #[must_use]
    pub fn rounded(self) -> f32 {
        if self.by.abs() < SMALLEST {
            return 0.0;
        }
        match self.by.is_finite() {
            true => f32::from_bits((self.by.to_bits() + 0x80) & 0xffff_ff00),
            false => self.by,
        }
    }

    /// The scalar as two numbers of at most 8 significant bits each.
    fn parts(self) -> [f32; 2] {
        let by = self.rounded();
        let high = f32::from_bits(by.to_bits() & 0xffff_0000);
        [high, by - high]
    }
}

/// Parameters with a copy from which they are moved along random directions:
///
/// ```text
/// w = base + sum_m c_m z_m        in the order of the moves
/// z_m[e] = a standard normal from seed, move, parameter and element, by Philox, rounded to 16 significant bits
/// ```
///
/// The products are exact in f32, so that the sums have the same bits on every adapter, whatever its compiler contracts. Nothing of the
/// directions is stored: they are made where they are needed, all moves in one pass.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::optim::{Directions, Move};
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]);
/// let mut directions = Directions::new([("w", &w)], 7)?;
/// directions.probe(&[Move { id: 0, by: 0.5 }])?;
/// assert_ne!(w.to_vec::<f32>()?, [1.0, 2.0]);
/// directions.probe(&[])?; // back, exactly
/// assert_eq!(w.to_vec::<f32>()?, [1.0, 2.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: the scheme of Zelikman, Huang, Liang, Haber, Goodman 2023, "Just One Byte (per gradient)". There the directions are restored
/// from a seed too; that they are the same on every adapter is ours.
pub struct Directions {
    gpu: Gpu,
    seed: u64,
    /// Each parameter, and the copy from which it is moved.
    leaves: Vec<[Tensor; 2]>,
}

impl Directions {
    /// Copies the parameters. Their order names them, so it must be the same wherever the same directions are meant.
    ///
    /// # Errors
    /// Inside a recorded step, when a parameter carries an error, or when the device has failed.
    ///
    /// # Panics
    /// When there are no parameters, or one is not an f32 tensor with elements of its own, on the device of the first, or comes twice.
    #[track_caller]
    pub fn new<N: Into<String>, T: std::borrow::Borrow<Tensor>>(
        params: impl IntoIterator<Item = (N, T)>,
        seed: u64,
    ) -> Result<Directions> {
        let params: Vec<(String, T)> = params.into_iter().map(|(name, x)| (name.into(), x)).collect();
        assert!(!params.is_empty(), "{OP}: there are no parameters");
        let gpu = params[0].1.borrow().gpu().clone();
        recording::refuse(&gpu, "random directions made")?;
        let mut values = HashSet::new();
        for (name, tensor) in &params {
            let tensor = tensor.borrow();
            assert!(tensor.gpu() == &gpu, "{OP}: `{name}` is on another device than the first parameter");
            assert!(tensor.dtype() == DType::F32, "{OP}: `{name}` is {}; parameters are f32", tensor.dtype());
            assert!(tensor.is_whole(), "{OP}: `{name}` is a view of a larger or permuted tensor");
            let new = values.insert(std::sync::Arc::as_ptr(&tensor.value));
            assert!(new, "{OP}: `{name}` holds the elements of another parameter; list a tied weight once");
            tensor.check()?;
        }
        let own: Vec<Tensor> = params.iter().map(|(_, tensor)| tensor.borrow().detach()).collect();
        let copies = gpu.snapshot(&own.iter().collect::<Vec<_>>())?;
        let leaves = own.into_iter().zip(copies).map(|(own, copy)| [own, copy]).collect();
        Ok(Directions { gpu, seed, leaves })
    }

    /// Sets the parameters to the copy and these moves. The copy stays.
    ///
    /// # Errors
    /// When there are more than 60 000 moves, a parameter carries an error, or the device has failed, and inside a recorded step. Then
    /// nothing has changed.
    pub fn probe(&mut self, moves: &[Move]) -> Result<()> {
        self.go("probe", moves)
    }

    /// Sets parameters and copy to the copy and these moves, of any number.
    ///
    /// # Errors
    /// As [`Directions::probe`]. If the device fails amid more than 30 000 moves, the first of them may have been made.
    pub fn advance(&mut self, moves: &[Move]) -> Result<()> {
        if moves.is_empty() {
            return self.go("advance", moves);
        }
        // The sum is an f32 after each move, so that where it is cut changes no bit.
        moves.chunks(MOST).try_for_each(|moves| self.go("advance", moves))
    }

    /// Takes the parameters as they are now for the copy, as after a file was loaded into them.
    ///
    /// # Errors
    /// When a parameter carries an error, or the device has failed.
    pub fn restart(&mut self) -> Result<()> {
        let (own, copies): (Vec<&Tensor>, Vec<&Tensor>) =
            self.leaves.iter().map(|[w, base]| (w, base)).unzip();
        self.gpu.fill_snapshot(&own, &copies)
    }

    fn go(&mut self, entry: &'static str, moves: &[Move]) -> Result<()> {
        static SOURCE: LazyLock<Source> = LazyLock::new(|| Source::file("perturb"));
        let gpu = &self.gpu;
        recording::refuse(gpu, "parameters moved along directions")?;
        let rows: Vec<[u32; 4]> = moves
            .iter()
            .map(|step| {
                let [a, b] = step.parts().map(f32::to_bits);
                [step.id as u32, (step.id >> 32) as u32, a, b]
            })
            .collect();
        let bytes: &[u8] = bytemuck::cast_slice(&rows);
        let table = gpu.upload(OP, bytes, (bytes.len() as u64).max(16));
        table.data()?;
        let draws = normal_table_on(gpu);
        let one = |(leaf, [w, base]): (usize, &[Tensor; 2])| {
            let n = w.count();
            let launch = Launch::new(OP, &SOURCE, entry, grid(n.div_ceil(4).div_ceil(64)))
                .bind("moves", Part::whole(&table))
                .bind("normal_table", Part::whole(&draws))
                .bind_mut("w", w)
                .set("n", n)
                .set("moves", moves.len())
                .set("leaf", leaf as u32)
                .set("key", [self.seed as u32, (self.seed >> 32) as u32])
                .turns(moves.len());
            match entry {
                "advance" => launch.bind_mut("kept", base),
                _ => launch.bind("base", base),
            }
        };
        let full = self.leaves.iter().enumerate().filter(|(_, [w, _])| w.count() > 0);
        let launches: Vec<Launch> = full.map(one).collect();
        let kept = usize::from(entry == "advance");
        let changed: Vec<_> =
            self.leaves.iter().flat_map(|leaf| &leaf[..=kept]).map(|x| x.place().buffer).collect();
        gpu.change(&changed, &launches)
    }
}

/// What [`Directions::probe`] makes of a parameter, on the host: `leaf` is its place among the parameters. The bits are those of every
/// adapter.
pub fn moved(elements: &mut [f32], leaf: u32, seed: u64, moves: &[Move]) {
    let key = [seed as u32, (seed >> 32) as u32];
    for (i, block) in elements.chunks_mut(4).enumerate() {
        for step in moves {
            let words = philox([i as u32, step.id as u32, (step.id >> 32) as u32, leaf], key);
            let [a, b] = step.parts();
            for (w, word) in block.iter_mut().zip(words) {
                let z = f32::from_bits((normal_from_bits(word).to_bits() + 0x80) & 0xffff_ff00);
                *w = (*w + a * z) + b * z;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn moves(count: usize) -> Vec<Move> {
        let mut rng = Rng::new(9);
        let one =
            |i: usize| Move { id: (i as u64) << 30 | 5, by: rng.normal() * 2f32.powi(i as i32 % 12 - 9) };
        (0..count).map(one).collect()
    }

    #[test]
    fn parts_are_all_of_a_scalar_and_exact_with_every_direction() {
        let edges = [0.0, -0.0, 127.0, -3.0e-5, SMALLEST, -SMALLEST * 1.0001].map(|by| Move { id: 0, by });
        for step in moves(500).into_iter().chain(edges) {
            let [a, b] = step.parts();
            assert_eq!(a + b, step.rounded());
            assert!((step.rounded() - step.by).abs() <= step.by.abs() * 2f32.powi(-16));
            for part in [a, b] {
                assert_eq!(part.to_bits() & 0xffff, 0, "{part} has 8 bits");
                for word in [1u32, 77_777, 0x8000_0001, 0xffff_ffff, 12_345_678] {
                    let z = f32::from_bits((normal_from_bits(word).to_bits() + 0x80) & 0xffff_ff00);
                    assert_eq!(f64::from(part * z), f64::from(part) * f64::from(z), "exact");
                    assert!(part == 0.0 || (part * z).is_normal(), "{part} times {z} is subnormal");
                }
            }
        }
        let least = (0..=u32::MAX).step_by(0xffff).map(|word| normal_from_bits(word).abs());
        assert!(least.fold(1.0, f32::min) >= 2f32.powi(-28));
        assert_eq!(Move { id: 0, by: -SMALLEST * 0.999 }.rounded(), 0.0);
    }

    /// More moves than a kernel makes, in parts.
    #[test]
    fn many_moves_are_made_in_their_order() {
        let gpu = Gpu::open().unwrap();
        let w = Tensor::ones(&gpu, [3]);
        let mut directions = Directions::new([("w", &w)], 3).unwrap();
        let all: Vec<Move> =
            (0..MOST_TURNS as u64 + 77).map(|id| Move { id, by: 0.01 / (1 + id % 7) as f32 }).collect();
        assert!(directions.probe(&all).unwrap_err().to_string().contains("turns"));
        directions.advance(&all).unwrap();
        let mut want = [1.0; 3];
        moved(&mut want, 0, 3, &all);
        assert_eq!(w.to_vec::<f32>().unwrap(), want);
    }

    #[test]
    fn the_device_has_the_bits_of_the_host() {
        let gpu = Gpu::open().unwrap();
        let sizes = [1, 3, 4, 257, 70_001];
        let start: Vec<Vec<f32>> = sizes
            .iter()
            .map(|&n| {
                let mut values = vec![0.0; n];
                Rng::new(n as u64).fill_normal(&mut values);
                values
            })
            .collect();
        let own: Vec<Tensor> = start.iter().map(|x| Tensor::from_slice(&gpu, x, [x.len()])).collect();
        let named = || own.iter().enumerate().map(|(i, w)| (format!("w{i}"), w));
        let mut directions = Directions::new(named(), 0x1234_5678_9abc).unwrap();
        let mut base = start.clone();
        for count in [1, 0, 2, 17] {
            let moves = moves(count);
            let mut want = base.clone();
            want.iter_mut().enumerate().for_each(|(i, x)| moved(x, i as u32, 0x1234_5678_9abc, &moves));
            directions.probe(&moves).unwrap();
            for ((w, want), base) in own.iter().zip(&want).zip(&base) {
                assert!(w.to_vec::<f32>().unwrap() == *want, "{count} moves of {}", want.len());
                assert_eq!(*want == *base, count == 0);
            }
            directions.advance(&moves).unwrap();
            base = want;
        }
        directions.probe(&[]).unwrap();
        assert!(own.iter().zip(&base).all(|(w, base)| w.to_vec::<f32>().unwrap() == *base));
    }

    /// Directions of other numbers, parameters and seeds have nothing to do with each other, and are standard normal.
    #[test]
    fn directions_are_normal_and_apart() {
        let of = |leaf, seed, id| {
            let mut z = vec![0.0; 40_000];
            moved(&mut z, leaf, seed, &[Move { id, by: 1.0 }]);
            z
        };
        let all = [of(0, 1, 0), of(1, 1, 0), of(0, 2, 0), of(0, 1, 1), of(0, 1, 1 << 32)];
        for (i, a) in all.iter().enumerate() {
            for (j, b) in all.iter().enumerate() {
                let mean: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>() / a.len() as f64;
                assert!((mean - f64::from(u8::from(i == j))).abs() < 0.03, "{i} {j}: {mean}");
            }
        }
    }
}
