//! How many steps each parameter took part in, for bias correction: counted on the device, because only the device knows
//! which steps it skips.

use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::buffer::Buffer;
use crate::gpu::kernel::{self, Launch};
use std::sync::Arc;

/// Digits of a count of steps to the base 16, and the values of a digit.
const DIGITS: usize = 8;
const BASE: usize = 16;
/// Turns of the loops that count a step of one parameter: the digits, and the bits of a division, for two decays.
const TURNS: usize = 2 * (DIGITS + 32);
/// Words for each parameter: its steps, the factors that correct its two moments, and one that is not used.
pub(super) const WORDS: usize = 4;

/// The counts of an optimizer's parameters.
pub(super) struct Taken {
    pub buffer: Arc<Buffer>,
    powers: Arc<Buffer>,
}

impl Taken {
    /// Counts from 0 for so many parameters, whose moments decay by these factors.
    pub fn new(op: &str, gpu: &Gpu, leaves: usize, decays: [f64; 2]) -> Result<Taken> {
        let zeros = vec![0u8; 4 * WORDS * leaves];
        let powers: Vec<u64> = decays.into_iter().flat_map(powers).collect();
        let powers: &[u8] = bytemuck::cast_slice(&powers);
        let taken = Taken {
            buffer: gpu.upload(op, &zeros, zeros.len() as u64),
            powers: gpu.upload(op, powers, powers.len() as u64),
        };
        taken.buffer.data()?;
        taken.powers.data()?;
        Ok(taken)
    }

    /// All counts, as a kernel binds them.
    pub fn whole(&self) -> kernel::Part {
        kernel::Part::whole(&self.buffer)
    }

    /// Makes a launch count a step of so many parameters, which takes [`turns`].
    pub fn bind<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        launch.bind_mut("taken", self.whole()).bind("powers", kernel::Part::whole(&self.powers))
    }

    /// The image of these counts in the buffer. The factors are computed with the next count.
    pub fn image(counts: impl Iterator<Item = u64>) -> Vec<u32> {
        counts.flat_map(|count| [u32::try_from(count).unwrap_or(u32::MAX), 0, 0, 0]).collect()
    }
}

/// The most turns of a lane's loops that count a step of so many parameters in one workgroup of 256.
pub(super) fn turns(parameters: usize) -> usize {
    parameters.div_ceil(256) * TURNS
}

/// Returns `b^(d 16^k)` at `16 k + d` as fractions of 64 bits, for digits `d` above 0. The place of 0 holds nothing.
fn powers(b: f64) -> Vec<u64> {
    let times = |x: u64, y: u64| ((u128::from(x) * u128::from(y)) >> 64) as u64;
    let mut all = Vec::with_capacity(DIGITS * BASE);
    // `b` is below 1 and has 53 bits, so its fraction is exact unless it is tiny.
    let mut one = (b * 2f64.powi(64)) as u64;
    for _ in 0..DIGITS {
        let start = all.len();
        all.push(0);
        for digit in 1..=BASE {
            let last = all[start + digit - 1];
            all.push(if digit == 1 { one } else { times(last, one) });
        }
        one = all.pop().unwrap_or(0);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_those_of_the_decay() {
        for b in [0.0, 1e-3, 0.5, 0.9, 0.999, 1.0 - 1e-9] {
            let all = powers(b);
            assert_eq!(all.len(), DIGITS * BASE);
            for (at, &power) in all.iter().enumerate().filter(|(at, _)| at % BASE > 0) {
                let exponent = (at % BASE) as f64 * (BASE as f64).powi((at / BASE) as i32);
                // What is used of a power is its distance from 1.
                let got = (u128::from(power).abs_diff(1 << 64)) as f64 / 2f64.powi(64);
                let want = -(exponent * (b - 1.0).ln_1p()).exp_m1();
                assert!((got - want).abs() <= 1e-9 * want, "1 - {b}^{exponent}: {got}, not {want}");
            }
        }
    }
}
