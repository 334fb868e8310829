//! Random numbers that are the same bits on the host and on every adapter.
//!
//! The generator is counter based: a draw is a pure function of a seed, a stream and an element index. So the order in
//! which threads (or machines) fill a tensor does not matter, and a checkpoint needs two words of state.
//!
//! ```text
//! element i of stream s under seed k  =  philox(counter = [i/4, s.lo, s.hi, 0], key = k)[i % 4]
//! uniform = (word >> 8) * 2^-24                         in [0, 1), exact
//! normal  = -Phi^-1(p), p = (word' + 1/2) * 2^-32       word' = the low 31 bits; the top bit is the sign
//! ```
//!
//! `log`, `cos`, division and fused multiply-add differ between adapters, so the normal draw uses integers to the last
//! bit: a table holds the quantile function as quadratics in fixed point, and [`normal_from_bits`] evaluates one of
//! them and packs the f32 by hand. The table is computed with `+ - * / sqrt` only, for which IEEE 754 has one answer
//! everywhere. `shaders/lib/rng.wgsl` is a copy of this file in WGSL.
//!
//! Philox 4x32-10: Salmon, Moraes, Dror, Shaw, *Parallel random numbers: as easy as 1, 2, 3* (SC 2011).

mod draws;

pub(crate) use draws::{Drawn, Shifts, draw_from_here, drawn};

use draws::Counter;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

/// Philox 4x32 with 10 rounds: four random words from a 128-bit counter and a 64-bit key.
///
/// One round, with `hi, lo` the halves of a 32 x 32 bit product:
/// `[hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)]`; then `k0 += W0`, `k1 += W1`.
///
/// ```
/// use tiebeam::rng::philox;
/// assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
/// ```
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    const M0: u64 = 0xD251_1F53;
    const M1: u64 = 0xCD9E_8D57;
    const W0: u32 = 0x9E37_79B9; // golden ratio
    const W1: u32 = 0xBB67_AE85; // sqrt(3) - 1
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let (a, b) = (M0 * u64::from(c0), M1 * u64::from(c2));
        (c0, c1, c2, c3) = ((b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32);
        k0 = k0.wrapping_add(W0);
        k1 = k1.wrapping_add(W1);
    }
    [c0, c1, c2, c3]
}

/// A uniform draw from the top 24 bits of a random word: `(x >> 8) * 2^-24`, exact, in `[0, 1)`.
///
/// ```
/// use tiebeam::rng::uniform_from_bits;
/// assert_eq!(uniform_from_bits(0), 0.0);
/// assert_eq!(uniform_from_bits(1 << 31), 0.5);
/// assert!(uniform_from_bits(u32::MAX) < 1.0);
/// ```
pub fn uniform_from_bits(x: u32) -> f32 {
    const STEP: f32 = 1.0 / (1 << 24) as f32;
    (x >> 8) as f32 * STEP
}

/// Cells in one octave of the tail probability. The error falls with the cube of this number (`2^-25` at 64).
const CELLS: usize = 64;
/// Octaves: the possible leading-zero counts of a nonzero 32-bit word.
const OCTAVES: usize = 32;
/// Fraction bits of the fixed-point quantiles. The largest quantile, `6.34 * 2^28`, still fits an `i32`.
const FRACTION: u32 = 28;

/// A standard normal draw from one random word, by inversion. It is odd in the top bit, so the mean over all words is
/// 0.
///
/// The tail probability is `p = u 2^-33` with `u = 2 (x mod 2^31) + 1`. The leading zeros of `u` select an octave of
/// `p`, the 6 bits after the leading one select a cell, and the other 25 are a fraction `f` of the cell. The table
/// holds `a, b, c` of `z = a - (b - c f) f`. Draws are within `2^-25 + 2^-24 |z|` of the quantile, never 0, and reach
/// `|z| = 6.34`.
///
/// ```
/// use tiebeam::rng::normal_from_bits;
/// assert_eq!(normal_from_bits(5), -normal_from_bits(5 + (1 << 31))); // the top bit is the sign
/// ```
pub fn normal_from_bits(x: u32) -> f32 {
    let table = normal_table();
    let u = x << 1 | 1;
    let n = u << u.leading_zeros();
    let cell = normal_cell(x);
    let high = |a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32;
    let f = n << 7;
    let (a, b, c) = (table[cell], table[cell + 1], table[cell + 2]);
    // Near a quantile of 0, rounding of the truncated products may make `z` 0 or negative. Hence it is signed, and at
    // least one unit.
    let z = a.wrapping_sub(high(b.wrapping_sub(high(c, f)), f)).cast_signed().max(1).cast_unsigned();
    // Pack the f32: 24 bits rounded half up. A carry out of them correctly increments the exponent.
    let s = z.leading_zeros();
    let mantissa = (((z << s) >> 7) + 1) >> 1;
    f32::from_bits((x & 0x8000_0000) | (((157 - FRACTION - s) << 23) + mantissa))
}

/// Returns the index of the first of three words for the cell of `x` in [`normal_table`].
fn normal_cell(x: u32) -> usize {
    let u = x << 1 | 1;
    let octave = u.leading_zeros();
    let cell = (u << octave) >> 25 & (CELLS as u32 - 1);
    3 * (octave as usize * CELLS + cell as usize)
}

/// The table behind [`normal_from_bits`], 24 KiB: `a, b, c` of cell `i` of octave `o` at `3 * (64 o + i)`,
/// times `2^28`.
///
/// The cell covers `p = 2^-(2+o) (1 + (i + f)/64)`, `f` in `[0, 1)`. Its quadratic goes through the quantiles at `f =
/// 0, 1/2, 1`. Kernels that draw normals bind the table.
pub(crate) fn normal_table() -> &'static [u32] {
    static TABLE: OnceLock<Vec<u32>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = Vec::with_capacity(3 * OCTAVES * CELLS);
        let mut octave_p = 0.25;
        for _ in 0..OCTAVES {
            for cell in 0..CELLS {
                let z = |f: f64| upper_quantile(octave_p * (1.0 + (cell as f64 + f) / CELLS as f64));
                let (z0, z1, z2) = (z(0.0), z(0.5), z(1.0));
                let coefficients = [z0, 3.0 * z0 - 4.0 * z1 + z2, 2.0 * (z0 - 2.0 * z1 + z2)];
                table.extend(coefficients.map(|c| (c * f64::from(1u32 << FRACTION) + 0.5) as u32));
            }
            octave_p *= 0.5;
        }
        table
    })
}

/// Returns `z` with `P(N(0,1) > z) = p`, for `p` in `[1e-11, 1/2]`, by algorithm AS 241 (Wichura 1988), with a relative
/// error of `1e-16`.
fn upper_quantile(p: f64) -> f64 {
    const CENTRE: [[f64; 8]; 2] = [
        [
            2_509.0809287301227,
            33_430.57558358813,
            67_265.7709270087,
            45_921.95393154987,
            13_731.69376550946,
            1_971.5909503065513,
            133.14166789178438,
            3.3871328727963665,
        ],
        [
            5_226.495278852854,
            28_729.085735721943,
            39_307.89580009271,
            21_213.794301586597,
            5_394.196021424751,
            687.1870074920579,
            42.31333070160091,
            1.0,
        ],
    ];
    const TAIL: [[f64; 8]; 2] = [
        [
            0.0007745450142783414,
            0.022723844989269184,
            0.2417807251774506,
            1.2704582524523684,
            3.6478483247632045,
            5.769497221460691,
            4.630337846156546,
            1.4234371107496835,
        ],
        [
            1.0507500716444169e-09,
            0.0005475938084995345,
            0.015198666563616457,
            0.14810397642748008,
            0.6897673349851,
            1.6763848301838038,
            2.053191626637759,
            1.0,
        ],
    ];
    let ratio = |[num, den]: &[[f64; 8]; 2], r: f64| {
        let horner = |c: &[f64; 8]| c.iter().fold(0.0, |sum, c| sum * r + c);
        horner(num) / horner(den)
    };
    let q = 0.5 - p;
    if q <= 0.425 { q * ratio(&CENTRE, 0.180625 - q * q) } else { ratio(&TAIL, (-ln(p)).sqrt() - 1.6) }
}

/// Natural logarithm of a positive normal number from `+ - * /` alone, because libm's differs between platforms.
///
/// `x = m 2^e` with `m` in `[3/4, 3/2)`, and `ln m = 2 (s + s^3/3 + s^5/5 + ...)`, `s = (m-1)/(m+1)`, `|s| <=
/// 1/5`.
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut e = (bits >> 52) as i32 - 1023;
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    if m >= 1.5 {
        (e, m) = (e + 1, m * 0.5);
    }
    let s = (m - 1.0) / (m + 1.0);
    let series = (0..=12).rev().fold(0.0, |sum, k| sum * (s * s) + 1.0 / f64::from(2 * k + 1));
    2.0 * s * series + f64::from(e) * std::f64::consts::LN_2
}

/// One stream of draws. A kernel that fills a tensor gets it, and the host can make the same tensor from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// The Philox key: the seed, low word first.
    pub key: [u32; 2],
    /// Counter words 1 and 2: the stream's number, low word first.
    pub id: [u32; 2],
}

impl Stream {
    /// The stream of draw `id` of the generator with this seed.
    const fn numbered(seed: u64, id: u64) -> Stream {
        Stream { key: words(seed), id: words(id) }
    }

    /// Returns four random words, for the elements `4 index .. 4 index + 4`.
    pub fn block(&self, index: u64) -> [u32; 4] {
        philox([index as u32, self.id[0], self.id[1], (index >> 32) as u32], self.key)
    }

    /// Fills `out` with uniform draws in `[0, 1)`. Element `i` depends on the stream and `i` only.
    pub fn fill_uniform(&self, out: &mut [f32]) {
        self.fill(out, uniform_from_bits);
    }

    /// Fills `out` with standard normal draws. Element `i` depends on the stream and `i` only.
    pub fn fill_normal(&self, out: &mut [f32]) {
        self.fill(out, normal_from_bits);
    }

    fn fill(&self, out: &mut [f32], draw: impl Fn(u32) -> f32) {
        for (index, block) in out.chunks_mut(4).enumerate() {
            for (value, word) in block.iter_mut().zip(self.block(index as u64)) {
                *value = draw(word);
            }
        }
    }

    /// Returns an unbiased number below `n` from the blocks from `index` on, which it advances, by Lemire's multiply
    /// and reject (2019).
    fn below(&self, index: &mut u64, n: u64) -> u64 {
        // The low half of word * n is not uniform over its smallest 2^64 mod n values, so those are rejected.
        let uneven = n.wrapping_neg() % n;
        loop {
            let [low, high, ..] = self.block(*index);
            *index += 1;
            let product = u128::from(u64::from(high) << 32 | u64::from(low)) * u128::from(n);
            if product as u64 >= uneven {
                return (product >> 64) as u64;
            }
        }
    }
}

/// A source of random streams: a seed and the number of draws so far.
///
/// Each fill, shuffle or number takes its own stream, so what one draw consumes never shifts the next. A clone gives
/// the streams that this generator would give next, and advances independently.
///
/// A recorded [`Step`](crate::Step) keeps the generators that its code draws from. Each of its runs takes from them
/// what the code would take, in order among the draws of the host and of other steps. So [`Rng::state`] is correct at
/// any moment, and a checkpoint between two runs resumes to the same bits. A generator that the recorded code itself
/// makes from a seed gives the same streams in every run, as it would if the code ran again. To restore a saved state
/// of a generator that steps draw from, use [`Rng::set_state`], because the steps would not know a new generator.
///
/// ```
/// use tiebeam::rng::Rng;
///
/// let mut rng = Rng::new(7);
/// let mut noise = [0.0; 8];
/// rng.fill_normal(&mut noise);
/// let checkpoint = rng.state();
/// let dice = rng.below(6);
/// assert_eq!(Rng::from_state(checkpoint).below(6), dice);
/// ```
pub struct Rng(Arc<Counter>);

/// A stream, and the number of its generator, by which recorded steps identify the generator.
#[derive(Clone, Copy)]
pub(crate) struct Draw {
    pub stream: Stream,
    pub generator: u64,
}

impl Rng {
    /// Makes a generator that has drawn nothing yet.
    pub fn new(seed: u64) -> Self {
        Rng::from_state([seed, 0])
    }

    /// `[seed, draws so far]`, for a checkpoint.
    ///
    /// ```
    /// use tiebeam::Rng;
    /// let mut rng = Rng::new(1);
    /// rng.below(10);
    /// let mut copy = Rng::from_state(rng.state());
    /// assert_eq!(copy.below(1000), rng.below(1000));
    /// ```
    pub fn state(&self) -> [u64; 2] {
        self.0.state()
    }

    /// Makes a generator with the state that [`Rng::state`] returned.
    pub fn from_state(state: [u64; 2]) -> Self {
        Rng(Counter::begin(state))
    }

    /// Sets this generator to a state, also for the recorded steps that draw from it.
    ///
    /// # Panics
    /// Inside a recorded step, because its replays could not repeat this.
    #[track_caller]
    pub fn set_state(&mut self, state: [u64; 2]) {
        assert!(!draws::is_recording(), "rng: set_state inside a recorded step; do it before or after");
        self.0.set(state);
    }

    /// Returns the next stream, which this generator has not given before.
    pub fn next_stream(&mut self) -> Stream {
        self.draw().stream
    }

    /// Returns the next stream, for a kernel.
    pub(crate) fn draw(&mut self) -> Draw {
        let [seed, id] = self.0.next();
        Draw { stream: Stream::numbered(seed, id), generator: self.0.number }
    }

    /// Fills `out` with uniform draws in `[0, 1)` from the next stream.
    ///
    /// ```
    /// let mut draws = [0f32; 5];
    /// tiebeam::Rng::new(1).fill_uniform(&mut draws);
    /// assert!(draws.iter().all(|x| (0.0..1.0).contains(x)));
    /// ```
    pub fn fill_uniform(&mut self, out: &mut [f32]) {
        self.next_stream().fill_uniform(out);
    }

    /// Fills `out` with standard normal draws from the next stream.
    ///
    /// ```
    /// let (mut a, mut b) = ([0f32; 5], [0f32; 9]);
    /// tiebeam::Rng::new(1).fill_normal(&mut a);
    /// tiebeam::Rng::new(1).fill_normal(&mut b);
    /// assert_eq!(a, b[..5]); // element i depends on the stream and i only
    /// ```
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        self.next_stream().fill_normal(out);
    }

    /// Returns a uniform draw in `[0, 1)`, the first of the next stream.
    ///
    /// ```
    /// let angle = std::f32::consts::TAU * tiebeam::Rng::new(1).uniform();
    /// assert!((0.0..std::f32::consts::TAU).contains(&angle));
    /// ```
    pub fn uniform(&mut self) -> f32 {
        uniform_from_bits(self.next_stream().block(0)[0])
    }

    /// Returns a standard normal draw, the first of the next stream.
    ///
    /// ```
    /// let mut first = [0.0];
    /// tiebeam::Rng::new(1).fill_normal(&mut first);
    /// assert_eq!(tiebeam::Rng::new(1).normal(), first[0]);
    /// ```
    pub fn normal(&mut self) -> f32 {
        normal_from_bits(self.next_stream().block(0)[0])
    }

    /// Returns an unbiased draw from `0..n`. Panics if `n` is 0.
    #[track_caller]
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "rng: below(0) has no values to draw from");
        self.next_stream().below(&mut 0, n as u64) as usize
    }

    /// Shuffles `items`, with every order equally likely (Fisher and Yates).
    ///
    /// ```
    /// let mut items = [1, 2, 3, 4];
    /// tiebeam::Rng::new(1).shuffle(&mut items);
    /// items.sort();
    /// assert_eq!(items, [1, 2, 3, 4]); // the same items, in another order before
    /// ```
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        let (stream, mut index) = (self.next_stream(), 0);
        for last in (1..items.len()).rev() {
            items.swap(last, stream.below(&mut index, last as u64 + 1) as usize);
        }
    }
}

impl Clone for Rng {
    fn clone(&self) -> Rng {
        Rng(self.0.copy())
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [seed, draws] = self.state();
        f.debug_struct("Rng").field("seed", &seed).field("draws", &draws).finish()
    }
}

/// Two generators are equal if they give the same streams from here on.
impl PartialEq for Rng {
    fn eq(&self, other: &Rng) -> bool {
        self.state() == other.state()
    }
}

impl Eq for Rng {}

impl Hash for Rng {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.state().hash(hasher);
    }
}

/// The low and the high word.
const fn words(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

#[cfg(test)]
mod tests;
