//! The types of tensors in GGUF files.

use crate::share::packed::{Packing, Scales};
use std::fmt;

/// A type of tensors that is read, shown as the format writes it: `F16`, `Q4_K`.
///
/// ```
/// use tiebeam::store::gguf::GgufType;
///
/// assert_eq!(GgufType::Q4K.to_string(), "Q4_K");
/// assert_eq!(GgufType::Q4K.block(), [256, 144]);
/// assert_eq!(GgufType::Q4K.bits(), 4.5);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GgufType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Signed bytes with an f16 scale for each 32.
    Q8_0,
    /// Levels of 4 bits with an f16 scale for each 32.
    Q4_0,
    /// Levels of 4 bits with an f16 scale and minimum for each 32.
    Q4_1,
    /// Levels of 5 bits with an f16 scale for each 32.
    Q5_0,
    /// Levels of 5 bits with an f16 scale and minimum for each 32.
    Q5_1,
    /// Levels of 2 bits, with scale and minimum of 4 bits for each 16.
    Q2K,
    /// Levels of 3 bits, with a scale of 6 bits for each 16.
    Q3K,
    /// Levels of 4 bits, with scale and minimum of 6 bits for each 32.
    Q4K,
    /// Levels of 5 bits, with scale and minimum of 6 bits for each 32.
    Q5K,
    /// Levels of 6 bits, with a scale of 8 bits for each 16.
    Q6K,
}

/// The number of each type in a file, its name there, and elements and bytes of a block.
const READ: [(u32, &str, GgufType, [usize; 2]); 13] = [
    (0, "F32", GgufType::F32, [1, 4]),
    (1, "F16", GgufType::F16, [1, 2]),
    (2, "Q4_0", GgufType::Q4_0, [32, 18]),
    (3, "Q4_1", GgufType::Q4_1, [32, 20]),
    (6, "Q5_0", GgufType::Q5_0, [32, 22]),
    (7, "Q5_1", GgufType::Q5_1, [32, 24]),
    (8, "Q8_0", GgufType::Q8_0, [32, 34]),
    (10, "Q2_K", GgufType::Q2K, [256, 84]),
    (11, "Q3_K", GgufType::Q3K, [256, 110]),
    (12, "Q4_K", GgufType::Q4K, [256, 144]),
    (13, "Q5_K", GgufType::Q5K, [256, 176]),
    (14, "Q6_K", GgufType::Q6K, [256, 210]),
    (30, "BF16", GgufType::BF16, [1, 2]),
];

/// Number, name, and elements and bytes of a block of the types that are listed but not read.
const OTHERS: [(u32, &str, [usize; 2]); 24] = [
    (9, "Q8_1", [32, 36]),
    (15, "Q8_K", [256, 292]),
    (16, "IQ2_XXS", [256, 66]),
    (17, "IQ2_XS", [256, 74]),
    (18, "IQ3_XXS", [256, 98]),
    (19, "IQ1_S", [256, 50]),
    (20, "IQ4_NL", [32, 18]),
    (21, "IQ3_S", [256, 110]),
    (22, "IQ2_S", [256, 82]),
    (23, "IQ4_XS", [256, 136]),
    (24, "I8", [1, 1]),
    (25, "I16", [1, 2]),
    (26, "I32", [1, 4]),
    (27, "I64", [1, 8]),
    (28, "F64", [1, 8]),
    (29, "IQ1_M", [256, 56]),
    (31, "Q4_0_4_4", [32, 18]),
    (32, "Q4_0_4_8", [32, 18]),
    (33, "Q4_0_8_8", [32, 18]),
    (34, "TQ1_0", [256, 54]),
    (35, "TQ2_0", [256, 66]),
    (39, "MXFP4", [32, 17]),
    (40, "NVFP4", [64, 36]),
    (41, "Q1_0", [128, 18]),
];

impl GgufType {
    fn row(self) -> &'static (u32, &'static str, GgufType, [usize; 2]) {
        READ.iter().find(|row| row.2 == self).expect("every type has a row")
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> [usize; 2] {
        self.row().3
    }

    /// Bits that an element takes in the file, with its share of the scales.
    pub fn bits(self) -> f64 {
        let [elements, bytes] = self.block();
        8.0 * bytes as f64 / elements as f64
    }

    /// How matrices of this type are packed on the device. `None` for floats.
    pub fn packing(self) -> Option<Packing> {
        let (bits, group, scales) = match self {
            GgufType::F32 | GgufType::F16 | GgufType::BF16 => return None,
            GgufType::Q8_0 => (8, 32, Scales::Symmetric),
            GgufType::Q4_0 => (4, 32, Scales::Symmetric),
            GgufType::Q4_1 => (4, 32, Scales::Affine),
            GgufType::Q5_0 => (5, 32, Scales::Symmetric),
            GgufType::Q5_1 => (5, 32, Scales::Affine),
            GgufType::Q4K => (4, 32, Scales::Pairs),
            GgufType::Q5K => (5, 32, Scales::Pairs),
            GgufType::Q6K => (6, 16, Scales::Signed),
            GgufType::Q3K => (3, 16, Scales::Signed),
            GgufType::Q2K => (2, 16, Scales::Nibbles),
        };
        Packing::new(bits, group, scales).ok()
    }

    /// The number of this type in a file.
    pub(super) fn number(self) -> u32 {
        self.row().0
    }

    /// Bytes of a block at which an f16 scale begins.
    pub(super) fn halves(self) -> &'static [usize] {
        match self {
            GgufType::F32 | GgufType::F16 | GgufType::BF16 => &[],
            GgufType::Q8_0 | GgufType::Q4_0 | GgufType::Q5_0 => &[0],
            GgufType::Q4_1 | GgufType::Q5_1 | GgufType::Q4K | GgufType::Q5K => &[0, 2],
            GgufType::Q2K => &[80, 82],
            GgufType::Q3K => &[108],
            GgufType::Q6K => &[208],
        }
    }
}

impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.row().1)
    }
}

/// The type of a tensor as its header has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read(GgufType),
    /// The number of a type that is not read.
    Other(u32),
}

impl Kind {
    pub(super) fn of(number: u32) -> Kind {
        READ.iter().find(|row| row.0 == number).map_or(Kind::Other(number), |row| Kind::Read(row.2))
    }

    /// The type's name, or `unknown`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Read(kind) => kind.row().1,
            Kind::Other(number) => OTHERS.iter().find(|row| row.0 == number).map_or("unknown", |row| row.1),
        }
    }

    /// Elements and bytes of a block, if they are known.
    pub(super) fn block(self) -> Option<[usize; 2]> {
        match self {
            Kind::Read(kind) => Some(kind.block()),
            Kind::Other(number) => OTHERS.iter().find(|row| row.0 == number).map(|row| row.2),
        }
    }

    /// The type if it is read, or a sentence that names it.
    pub(super) fn read(self) -> Result<GgufType, String> {
        match self {
            Kind::Read(kind) => Ok(kind),
            Kind::Other(number) => Err(format!(
                "type {} (number {number}) is not supported; Q8_0, Q6_K to Q2_K, Q5_1, Q5_0, Q4_1, Q4_0, BF16, F16 and F32 \
                 are, so take another file of this model, such as its Q4_K_M, Q5_K_M or Q8_0",
                self.name()
            )),
        }
    }
}
