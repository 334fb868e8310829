//! How a packed matrix lies in memory, and its decoder on the host.
//!
//! A matrix is rows of 32-bit words. A row has three parts: the low bits of all levels, their high bits, and the scales.
//! Columns are taken in units of 32, the last one filled up with level 0. A level of 5 bits, for example, is a nibble of
//! the low part and a bit of the high part, so that each part is read by shifts that do not depend on the column.
//!
//! Where the low part fills whole vectors of four words, a row is filled up to whole vectors.
//!
//! | bits of a part | words of a unit | where column `c` of a unit is |
//! |---|---|---|
//! | 1 | 1 | bit `c` |
//! | 2 | 2 | bits `2 (c / 8)` of byte `c % 8` |
//! | 4 | 4 | bits `4 (c / 16)` of byte `c % 16` |
//! | 8 | 8 | byte `c` |

use crate::error::{Error, Result};
use crate::rng::Rng;
use half::{bf16, f16};

/// How the levels `q` of a group become weights `scale q + offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scales {
    /// An f16 scale for each group, and `offset = -2^(bits - 1) scale`.
    Symmetric,
    /// [`Scales::Symmetric`] with a bf16 scale.
    SymmetricBf16,
    /// An f16 scale and an f16 offset for each group, in one word.
    Affine,
    /// An f16 scale and a whole number `zero` of 16 bits for each group, in one word: `offset = -zero scale`.
    Zero,
    /// [`Scales::Zero`] with a bf16 scale.
    ZeroBf16,
    /// An f32 scale and an f32 offset for each group.
    Float,
    /// Q4_K and Q5_K of GGUF: `d`, `m` in f16 for 256 columns, and two bytes `s`, `t` for each group of 32. `scale = d s`,
    /// `offset = -m t`.
    Pairs,
    /// Q3_K and Q6_K of GGUF: `d` in f16 for 256 columns, and a signed byte `s` for each group of 16. `scale = d s`,
    /// `offset = -2^(bits - 1) scale`.
    Signed,
    /// Q2_K of GGUF: `d`, `m` in f16 for 256 columns, and two nibbles `s`, `t` for each group of 16. `scale = d s`,
    /// `offset = -m t`.
    Nibbles,
}

impl Scales {
    /// The columns that share a scale of the upper level, if there are two levels.
    pub(crate) fn block(self) -> Option<usize> {
        matches!(self, Scales::Pairs | Scales::Signed | Scales::Nibbles).then_some(256)
    }
}

/// Bits, groups and scales of a packed matrix.
///
/// ```
/// use tiebeam::share::{Packing, Scales};
/// let packing = Packing::new(4, 32, Scales::Affine)?; // 4 bits, 32 columns a group
/// let mut row = vec![0; packing.row_words(64)];
/// packing.write_levels(&[3; 64], &mut row);
/// packing.write_scale(&mut row, 64, 0, [0.5, -1.0]);
/// assert_eq!(packing.level(&row, 64, 5), 3);
/// assert_eq!(packing.decode(&row, 64)[5], 0.5 * 3.0 - 1.0);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    /// Bits of a level: 2, 3, 4, 5, 6 or 8.
    bits: u32,
    /// Columns that share a scale: a multiple of 16. The last group of a row may be shorter.
    group: usize,
    scales: Scales,
}

impl Packing {
    /// Levels of 2, 3, 4, 5, 6 or 8 bits in groups of this many columns.
    ///
    /// # Errors
    /// [`Error::Config`] for other bits, for a group that is no multiple of 16, and for scales in two levels with another
    /// group than theirs.
    pub fn new(bits: u32, group: usize, scales: Scales) -> Result<Packing> {
        let wrong = |message: String| Err(Error::config(format!("packed: {message}")));
        if !matches!(bits, 2..=6 | 8) {
            return wrong(format!("levels of {bits} bits; 2, 3, 4, 5, 6 and 8 are packed"));
        }
        let own = match scales {
            Scales::Pairs => Some(32),
            Scales::Signed | Scales::Nibbles => Some(16),
            _ => None,
        };
        match own {
            Some(own) if own != group => wrong(format!("{scales:?} has groups of {own}, not {group}")),
            None if group == 0 || !group.is_multiple_of(16) || group > 1 << 24 => {
                wrong(format!("groups of {group} columns; a group is a multiple of 16"))
            }
            _ => Ok(Packing { bits, group, scales }),
        }
    }

    /// One group for each row of so many columns.
    ///
    /// # Errors
    /// As [`Packing::new`].
    pub fn rows(bits: u32, columns: usize, scales: Scales) -> Result<Packing> {
        Packing::new(bits, columns.next_multiple_of(16).max(16), scales)
    }

    /// Bits of a level.
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// Columns that share a scale.
    pub fn group(self) -> usize {
        self.group
    }

    /// What is stored for each group.
    pub fn scales(self) -> Scales {
        self.scales
    }

    /// The bits of the low and of the high part of a row.
    pub(crate) fn parts(self) -> [usize; 2] {
        match self.bits {
            2 | 4 | 8 => [self.bits as usize, 0],
            3 => [2, 1],
            bits => [4, bits as usize - 4],
        }
    }

    /// The level that stands for 0 if there is no offset: the middle one.
    pub(crate) fn middle(self) -> f32 {
        (1u32 << (self.bits - 1)) as f32
    }

    pub(crate) fn groups(self, columns: usize) -> usize {
        columns.div_ceil(self.group)
    }

    /// Words of the scales of a row.
    fn scale_words(self, columns: usize) -> usize {
        let groups = self.groups(columns);
        let blocks = columns.div_ceil(256);
        match self.scales {
            Scales::Symmetric | Scales::SymmetricBf16 => groups.div_ceil(2),
            Scales::Affine | Scales::Zero | Scales::ZeroBf16 => groups,
            Scales::Float => 2 * groups,
            Scales::Pairs | Scales::Nibbles => 5 * blocks,
            Scales::Signed => 4 * blocks + blocks.div_ceil(2),
        }
    }

    /// The word of a row at which its scales begin.
    pub(crate) fn scales_at(self, columns: usize) -> usize {
        self.parts().iter().sum::<usize>() * columns.div_ceil(32)
    }

    /// Words of a row of so many columns. Where the low part fills whole vectors of four words, in which kernels read it, a row
    /// does too.
    pub fn row_words(self, columns: usize) -> usize {
        let words = self.scales_at(columns) + self.scale_words(columns);
        if self.parts()[0] >= 4 { words.next_multiple_of(4) } else { words }
    }

    /// Bits of a weight with its share of the scales, in a row of so many columns.
    pub fn bits_a_weight(self, columns: usize) -> f64 {
        32.0 * self.row_words(columns) as f64 / columns.max(1) as f64
    }

    /// Writes the levels of one row to its words, whose scales are not touched.
    ///
    /// # Panics
    /// When a level has more bits, or the row has another number of words.
    pub fn write_levels(self, levels: &[u8], row: &mut [u32]) {
        assert_eq!(row.len(), self.row_words(levels.len()), "packed: words of a row of {}", levels.len());
        let [low, high] = self.parts();
        let units = levels.len().div_ceil(32);
        row[..self.scales_at(levels.len())].fill(0);
        for (c, &level) in levels.iter().enumerate() {
            let level = u32::from(level);
            assert!(level < 1 << self.bits, "packed: level {level} in {} bits", self.bits);
            let [word, shift] = place(low, c);
            row[word] |= (level & ((1 << low) - 1)) << shift;
            if high > 0 {
                let [word, shift] = place(high, c);
                row[units * low + word] |= (level >> low) << shift;
            }
        }
    }

    /// The level of column `c` of a row of so many columns.
    pub fn level(self, row: &[u32], columns: usize, c: usize) -> u32 {
        let [low, high] = self.parts();
        let read = |from: usize, bits: usize| {
            let [word, shift] = place(bits, c);
            row[from + word] >> shift & ((1 << bits) - 1)
        };
        let top = if high > 0 { read(columns.div_ceil(32) * low, high) << low } else { 0 };
        read(0, low) | top
    }

    /// Writes scale and offset of group `g` of a row of so many columns, rounded to what is stored. What is computed from
    /// the scale ignores the offset, and [`Scales::Zero`] takes the zero in its place.
    ///
    /// # Panics
    /// For scales in two levels, which files have and nothing here makes.
    pub fn write_scale(self, row: &mut [u32], columns: usize, g: usize, [scale, offset]: [f32; 2]) {
        let own = &mut row[self.scales_at(columns)..];
        let halves = |word: &mut u32, which: usize, bits: u16| {
            *word = *word & !(0xffff << (16 * which)) | u32::from(bits) << (16 * which);
        };
        let whole = || (offset as i16) as u16;
        match self.scales {
            Scales::Symmetric => halves(&mut own[g / 2], g % 2, f16::from_f32(scale).to_bits()),
            Scales::SymmetricBf16 => halves(&mut own[g / 2], g % 2, bf16::from_f32(scale).to_bits()),
            Scales::Affine => {
                halves(&mut own[g], 0, f16::from_f32(scale).to_bits());
                halves(&mut own[g], 1, f16::from_f32(offset).to_bits());
            }
            Scales::Zero | Scales::ZeroBf16 => {
                let bits = match self.scales {
                    Scales::Zero => f16::from_f32(scale).to_bits(),
                    _ => bf16::from_f32(scale).to_bits(),
                };
                halves(&mut own[g], 0, bits);
                halves(&mut own[g], 1, whole());
            }
            Scales::Float => [own[2 * g], own[2 * g + 1]] = [scale.to_bits(), offset.to_bits()],
            Scales::Pairs | Scales::Signed | Scales::Nibbles => {
                panic!("packed: {:?} comes from files", self.scales)
            }
        }
    }

    /// Scale and offset of column `c` of a row of so many columns.
    pub fn scale(self, row: &[u32], columns: usize, c: usize) -> [f32; 2] {
        let own = &row[self.scales_at(columns)..];
        let (g, block) = (c / self.group, c / 256);
        let half = |word: u32, which: usize| f16::from_bits((word >> (16 * which)) as u16).to_f32();
        let short = |word: u32, which: usize| bf16::from_bits((word >> (16 * which)) as u16).to_f32();
        let middle = |scale: f32| [scale, -self.middle() * scale];
        let zero = |scale: f32, word: u32| [scale, -scale * f32::from((word >> 16) as i16)];
        match self.scales {
            Scales::Symmetric => middle(half(own[g / 2], g % 2)),
            Scales::SymmetricBf16 => middle(short(own[g / 2], g % 2)),
            Scales::Affine => [half(own[g], 0), half(own[g], 1)],
            Scales::Zero => zero(half(own[g], 0), own[g]),
            Scales::ZeroBf16 => zero(short(own[g], 0), own[g]),
            Scales::Float => [own[2 * g], own[2 * g + 1]].map(f32::from_bits),
            Scales::Pairs => {
                let own = &own[5 * block..];
                let g = c % 256 / 32;
                let [s, t] = [0, 8].map(|shift| own[1 + g / 2] >> (16 * (g % 2) + shift) & 255);
                [half(own[0], 0) * s as f32, -(half(own[0], 1) * t as f32)]
            }
            Scales::Signed => {
                let d = half(own[4 * columns.div_ceil(256) + block / 2], block % 2);
                let g = c % 256 / 16;
                middle(d * f32::from((own[4 * block + g / 4] >> (8 * (g % 4))) as u8 as i8))
            }
            Scales::Nibbles => {
                let own = &own[5 * block..];
                let g = c % 256 / 16;
                let [s, t] = [0, 4].map(|shift| own[1 + g / 4] >> (8 * (g % 4) + shift) & 15);
                [half(own[0], 0) * s as f32, -(half(own[0], 1) * t as f32)]
            }
        }
    }

    /// Decodes rows of so many columns: the reference of the kernels, which give the same bits.
    ///
    /// Scales of 16 bits times levels of up to 8 bits, and also times a second scale, are exact in f32. So `scale q +
    /// offset` is rounded once, whether it is computed by a fused multiply-add or not. [`Scales::Float`] is an exception.
    pub fn decode(self, words: &[u32], columns: usize) -> Vec<f32> {
        let mut all = Vec::with_capacity(words.len() / self.row_words(columns).max(1) * columns);
        for row in words.chunks_exact(self.row_words(columns).max(1)) {
            for c in 0..columns {
                let [scale, offset] = self.scale(row, columns, c);
                all.push(scale.mul_add(self.level(row, columns, c) as f32, offset));
            }
        }
        all
    }

    /// Checks that a row can have so many columns. `name` is that of the matrix.
    ///
    /// # Errors
    /// [`Error::Config`] when a scale of the upper level would have fewer columns than its block.
    pub fn fits(self, name: &str, columns: usize) -> Result<()> {
        match self.scales.block() {
            Some(block) if !columns.is_multiple_of(block) => Err(Error::config(format!(
                "{name}: rows of {columns} do not divide into blocks of {block}, which {:?} has",
                self.scales
            ))),
            _ => Ok(()),
        }
    }

    /// Checks that no scale of these rows is NaN or infinite. `name` is that of the tensor.
    ///
    /// # Errors
    /// [`Error::Config`], which names the row and the column.
    pub fn check(self, name: &str, words: &[u32], columns: usize) -> Result<()> {
        for (r, row) in words.chunks_exact(self.row_words(columns).max(1)).enumerate() {
            for c in (0..columns).step_by(self.group) {
                let pair = self.scale(row, columns, c);
                if let Some(wrong) = pair.iter().find(|v| !v.is_finite()) {
                    return Err(Error::config(format!(
                        "tensor `{name}`: a scale or offset in row {r} at column {c} is {wrong}; the file is damaged, or \
                         what wrote it failed"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Word and shift of column `c` in a part with so many bits.
fn place(bits: usize, c: usize) -> [usize; 2] {
    let (unit, c) = (c / 32, c % 32);
    match bits {
        1 => [unit, c],
        // Bytes 0 to `32 bits / 8 - 1` of a unit, each with `8 / bits` columns.
        _ => {
            let bytes = 4 * bits;
            [unit * bits + c % bytes / 4, 8 * (c % 4) + bits * (c / bytes)]
        }
    }
}

/// Words of a matrix `[rows, columns]` with levels and scales drawn at random, for tests. Every level is equally likely.
/// Weights are small multiples of 1 / 64, so that their sums are exact.
pub fn drawn(packing: Packing, [rows, columns]: [usize; 2], seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    let words = packing.row_words(columns);
    let mut all = vec![0; rows * words];
    for row in all.chunks_exact_mut(words) {
        let levels: Vec<u8> = (0..columns).map(|_| rng.below(1 << packing.bits) as u8).collect();
        packing.write_levels(&levels, row);
        if packing.scales.block().is_some() {
            // Any bits are bytes of up to 6 bits, and nibbles. The halves of the upper level are small numbers.
            let own = &mut row[packing.scales_at(columns)..];
            own.fill_with(|| rng.below(1 << 32) as u32 & 0x3f3f_3f3f);
            let blocks = columns.div_ceil(256);
            let halves = match packing.scales {
                Scales::Signed => (4 * blocks..4 * blocks + blocks.div_ceil(2)).collect::<Vec<_>>(),
                _ => (0..blocks).map(|block| 5 * block).collect(),
            };
            for at in halves {
                let [low, high] = [0; 2].map(|_| f16::from_f32((1 + rng.below(3)) as f32 / 64.0).to_bits());
                own[at] = u32::from(low) | u32::from(high) << 16;
            }
            continue;
        }
        for g in 0..packing.groups(columns) {
            let scale = (1 + rng.below(8)) as f32 / 64.0;
            let offset = match packing.scales {
                Scales::Zero | Scales::ZeroBf16 => rng.below(1 << packing.bits) as f32,
                _ => -(rng.below(64) as f32) / 64.0,
            };
            packing.write_scale(row, columns, g, [scale, offset]);
        }
    }
    all
}
