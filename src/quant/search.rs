//! The levels of one group of weights: their scale and offset with the least error.

use crate::error::{Error, Result};
use half::{bf16, f16};

/// The power of an error that is summed over a group: squares, which are what a layer's output sees of independent errors.
pub const POWER: f32 = 2.0;

/// Ranges that are tried: the whole one, and 20 smaller ones down to a half.
const CLIPS: usize = 20;

/// Smaller ranges are not tried when one has this many times the least error, and more than the range before it: what they cut
/// off only grows.
const HOPELESS: f64 = 2.0;

/// What levels `q` stand for: `scale q + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Form {
    /// The middle level is 0: `offset = -2^(bits - 1) scale`. Scales of both signs are used, because there is one more level
    /// below the middle than above it. With 8 bits that level is not used, as in Q8_0 of GGUF.
    Symmetric,
    /// An offset for each group, stored as the scale is.
    Affine,
    /// A level for each group that stands for 0: `offset = -zero scale`.
    Zero,
}

/// How scales and offsets are stored. They are rounded to this before levels are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stored {
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// IEEE single precision.
    F32,
}

impl Stored {
    pub(super) fn round(self, x: f32) -> f32 {
        match self {
            Stored::F16 => f16::from_f32(x).to_f32(),
            Stored::BF16 => bf16::from_f32(x).to_f32(),
            Stored::F32 => x,
        }
    }
}

/// Bits, groups and form of rounded weights.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Rounding {
    /// Bits of a level, 2 to 8.
    pub bits: u32,
    /// Columns that share a scale. `None`: the whole row.
    pub group: Option<usize>,
    /// What levels stand for.
    pub form: Form,
    /// How scales are stored.
    pub stored: Stored,
    /// The power of an error, [`POWER`] by default. A greater one, such as 2.4, gives large errors more weight.
    pub power: f32,
}

impl Rounding {
    /// Groups of 32 columns with f16 scales.
    pub fn new(bits: u32, form: Form) -> Rounding {
        Rounding { bits, group: Some(32), form, stored: Stored::F16, power: POWER }
    }

    /// Groups of so many columns.
    #[must_use]
    pub fn group(self, columns: usize) -> Rounding {
        Rounding { group: Some(columns), ..self }
    }

    /// One scale for each row.
    #[must_use]
    pub fn rows(self) -> Rounding {
        Rounding { group: None, ..self }
    }

    /// Stores scales in this type.
    #[must_use]
    pub fn stored(self, stored: Stored) -> Rounding {
        Rounding { stored, ..self }
    }

    /// Sums errors to this power.
    #[must_use]
    pub fn power(self, power: f32) -> Rounding {
        Rounding { power, ..self }
    }

    pub(super) fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::config(format!("quant: {message}")));
        match self {
            Rounding { bits, .. } if !(2..=8).contains(bits) => {
                wrong(format!("levels of {bits} bits; 2 to 8 can be rounded to"))
            }
            Rounding { group: Some(0), .. } => wrong("groups of 0 columns; a group has at least one".into()),
            Rounding { power, .. } if !(power.is_finite() && *power > 0.0) => {
                wrong(format!("errors to the power of {power}; it is a number over 0, such as {POWER}"))
            }
            _ => Ok(()),
        }
    }

    /// The greatest level.
    fn top(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }

    /// The middle level.
    fn middle(&self) -> f32 {
        (1u32 << (self.bits - 1)) as f32
    }

    /// The least level that is used.
    fn bottom(&self) -> f32 {
        if self.bits == 8 && self.form == Form::Symmetric { 1.0 } else { 0.0 }
    }
}

/// Scale and offset of a group as stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Grid {
    pub scale: f32,
    pub offset: f32,
    /// The level of every weight if there is no scale, and what stands for 0 in [`Form::Zero`] and [`Form::Symmetric`].
    pub zero: u8,
    /// `1 / scale`, or 0 for no scale.
    inverse: f32,
    bottom: f32,
    top: f32,
}

impl Grid {
    /// A grid of [`Form::Symmetric`]. `None` if the scale is too large to be stored.
    fn symmetric(rounding: &Rounding, scale: f32) -> Option<Grid> {
        let grid = Grid::scaled(rounding, scale)?;
        Some(Grid::zeroed(grid, rounding.middle() as u8))
    }

    /// A grid of levels from `low` to `high`.
    fn ranged(rounding: &Rounding, [low, high]: [f32; 2]) -> Option<Grid> {
        // Halves, because the difference of two large numbers may be beyond f32.
        let grid = Grid::scaled(rounding, (high / 2.0 - low / 2.0) / (rounding.top() / 2.0))?;
        if rounding.form == Form::Zero {
            let zero = (-low * grid.inverse).round().clamp(0.0, rounding.top());
            return Some(Grid::zeroed(grid, zero as u8));
        }
        let offset = rounding.stored.round(low);
        offset.is_finite().then_some(Grid { offset, ..grid })
    }

    fn scaled(rounding: &Rounding, scale: f32) -> Option<Grid> {
        let scale = rounding.stored.round(scale);
        // A scale too small to be inverted is as good as none.
        let inverse = Some(1.0 / scale).filter(|i| i.is_finite());
        let scale = if inverse.is_some() { scale } else { 0.0 * scale };
        let [bottom, top] = [rounding.bottom(), rounding.top()];
        let grid = Grid { scale, offset: 0.0, zero: 0, inverse: inverse.unwrap_or(0.0), bottom, top };
        (scale.is_finite() && (rounding.middle() * scale).is_finite()).then_some(grid)
    }

    fn zeroed(self, zero: u8) -> Grid {
        Grid { zero, offset: -f32::from(zero) * self.scale, ..self }
    }

    /// The level nearest to `x`, not yet rounded to a whole number.
    fn place(&self, x: f32) -> f32 {
        if self.inverse == 0.0 {
            return f32::from(self.zero);
        }
        ((x - self.offset) * self.inverse).clamp(self.bottom, self.top)
    }

    /// The level of `x`.
    pub fn level(&self, x: f32) -> u8 {
        whole(self.place(x)) as u8
    }

    /// The weight of a level, rounded once, as [`Packing`](crate::share::packed::Packing) has it.
    pub fn value(&self, level: u8) -> f32 {
        self.scale.mul_add(f32::from(level), self.offset)
    }

    /// The sum of all errors to a power. What is beyond f32 is infinite.
    fn cost(&self, w: &[f32], power: f32) -> f64 {
        let error = |x: f32| x - (self.scale * whole(self.place(x)) + self.offset);
        if power != 2.0 {
            return w.iter().map(|&x| f64::from(error(x).abs().powf(power))).sum::<f64>().min(f64::INFINITY);
        }
        // Eight sums, which the compiler computes side by side.
        let (chunks, rest) = w.as_chunks::<8>();
        let mut sums = [0f32; 8];
        for chunk in chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += error(x) * error(x);
            }
        }
        let rest: f32 = rest.iter().map(|&x| error(x) * error(x)).sum();
        // The lesser one of NaN and a number is the number.
        (sums.iter().map(|&sum| f64::from(sum)).sum::<f64>() + f64::from(rest)).min(f64::INFINITY)
    }
}

/// Rounds a number of 0 to 2^22 to the nearest whole one, ties to even. The sum has no bits behind the point. This takes two
/// instructions on every processor.
fn whole(x: f32) -> f32 {
    const BIG: f32 = (3 << 22) as f32;
    x + BIG - BIG
}

/// The best grid so far.
struct Search<'a> {
    w: &'a [f32],
    power: f32,
    best: Option<(f64, Grid)>,
}

impl Search<'_> {
    /// Tries the grids of smaller and smaller ranges, and returns the step that was kept last.
    fn walk(&mut self, grid: impl Fn(usize) -> Option<Grid>) -> Option<usize> {
        let (mut kept, mut last) = (None, f64::INFINITY);
        for i in 0..=CLIPS {
            let Some(grid) = grid(i) else {
                // If the whole range cannot be stored, clipping must not hide it.
                if i == 0 {
                    return None;
                }
                continue;
            };
            let cost = grid.cost(self.w, self.power);
            match self.best {
                Some((least, _)) if cost > HOPELESS * least && cost > last => break,
                Some((least, _)) if cost >= least => {}
                _ => {
                    self.best = Some((cost, grid));
                    kept = Some(i);
                }
            }
            last = cost;
        }
        kept
    }

    fn exact(&self) -> bool {
        self.best.is_some_and(|(cost, _)| cost == 0.0)
    }
}

/// The grid of a group with the least error, or `None` when no scale that can be stored is large enough.
pub(super) fn best(w: &[f32], rounding: &Rounding) -> Option<Grid> {
    let mut search = Search { w, power: rounding.power, best: None };
    let low = w.iter().copied().fold(f32::INFINITY, f32::min);
    let high = w.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if low == high {
        search.best = equal(low, rounding).map(|grid| (grid.cost(w, rounding.power), grid));
    }
    if !search.exact() {
        match rounding.form {
            Form::Symmetric => symmetric(&mut search, [low, high], rounding),
            Form::Affine => ranged(&mut search, [low, high], rounding),
            Form::Zero => ranged(&mut search, [low.min(0.0), high.max(0.0)], rounding),
        }
    }
    search.best.map(|(_, grid)| grid)
}

/// The grid on which one level stands for `x` as it is stored.
fn equal(x: f32, rounding: &Rounding) -> Option<Grid> {
    match rounding.form {
        Form::Symmetric => Grid::symmetric(rounding, x),
        Form::Affine => Grid::ranged(rounding, [x, x]),
        Form::Zero => Some(Grid::scaled(rounding, x.abs())?.zeroed(u8::from(x < 0.0))),
    }
}

/// Tries ranges of both signs. One maps the greatest weight to the outermost level below the middle, and the other one to the
/// outermost level above it.
fn symmetric(search: &mut Search, [low, high]: [f32; 2], rounding: &Rounding) {
    let extreme = if -low > high { low } else { high };
    let below = rounding.middle() - rounding.bottom();
    for full in [-extreme / below, extreme / (rounding.middle() - 1.0)] {
        search.walk(|i| Grid::symmetric(rounding, full * clip(i)));
        // With as many levels on both sides, the other sign gives the same.
        if below < rounding.middle() {
            break;
        }
    }
}

/// The part of a range that is kept at step `i`.
fn clip(i: usize) -> f32 {
    1.0 - 0.5 * i as f32 / CLIPS as f32
}

/// Tries ranges that both ends leave by the same part, then other low ends, then other high ends.
fn ranged(search: &mut Search, [low, high]: [f32; 2], rounding: &Rounding) {
    let at = |from: f32, to: f32, i: usize| from + (to / 2.0 - from / 2.0) * (1.0 - clip(i));
    let ends = |[i, j]: [usize; 2]| [at(low, high, i), at(high, low, j)];
    let mut start = [0, 0];
    // The ends that move: both, the low one, the high one.
    for moving in [[true, true], [true, false], [false, true]] {
        let steps = |i| [0, 1].map(|end| if moving[end] { i } else { start[end] });
        if let Some(i) = search.walk(|i| Grid::ranged(rounding, ends(steps(i)))) {
            start = steps(i);
        }
    }
}
