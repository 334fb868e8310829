//! The element types of files. There are more than the types in which the engine computes.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The type of a tensor's elements in a safetensors file, shown as the file writes it: `F32`, `BOOL`, `F8_E4M3`.
///
/// The engine computes in the types of [`DType`](crate::DType). Tensors of other types are converted when they are read, or read as
/// bytes. Types are ordered as in the format's reference implementation, roughly by size, because files sort tensors by type.
///
/// ```
/// use tiebeam::store::FileDType;
///
/// assert_eq!(FileDType::F8E4M3.to_string(), "F8_E4M3");
/// assert_eq!(FileDType::BF16.bits(), 16);
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FileDType {
    /// A byte, 0 or 1.
    #[serde(rename = "BOOL")]
    Bool,
    /// Four bits of the OCP microscaling formats, MXFP4.
    F4,
    /// Six bits of the OCP microscaling formats, 2 of exponent and 3 of mantissa.
    #[serde(rename = "F6_E2M3")]
    F6E2M3,
    /// Six bits of the OCP microscaling formats, 3 of exponent and 2 of mantissa.
    #[serde(rename = "F6_E3M2")]
    F6E3M2,
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// An 8-bit float, 5 bits of exponent and 2 of mantissa.
    #[serde(rename = "F8_E5M2")]
    F8E5M2,
    /// An 8-bit float, 4 bits of exponent and 3 of mantissa.
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
    /// A power of two in 8 bits, the scale of the OCP microscaling formats.
    #[serde(rename = "F8_E8M0")]
    F8E8M0,
    /// [`FileDType::F8E4M3`] without infinities and without -0.
    #[serde(rename = "F8_E4M3FNUZ")]
    F8E4M3Fnuz,
    /// [`FileDType::F8E5M2`] without infinities and without -0.
    #[serde(rename = "F8_E5M2FNUZ")]
    F8E5M2Fnuz,
    /// Signed, 16 bits.
    I16,
    /// Unsigned, 16 bits.
    U16,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Signed, 32 bits.
    I32,
    /// Unsigned, 32 bits.
    U32,
    /// IEEE single precision.
    F32,
    /// Two f32, real and imaginary part.
    C64,
    /// IEEE double precision.
    F64,
    /// Signed, 64 bits.
    I64,
    /// Unsigned, 64 bits.
    U64,
}

impl FileDType {
    /// Whether it has floats of 16 bits or more, which are computed with.
    pub fn is_float(self) -> bool {
        matches!(self, FileDType::F64 | FileDType::F32 | FileDType::F16 | FileDType::BF16)
    }

    /// Bits of one element.
    pub fn bits(self) -> usize {
        use FileDType::*;
        match self {
            F4 => 4,
            F6E2M3 | F6E3M2 => 6,
            Bool | U8 | I8 | F8E5M2 | F8E4M3 | F8E8M0 | F8E4M3Fnuz | F8E5M2Fnuz => 8,
            I16 | U16 | F16 | BF16 => 16,
            I32 | U32 | F32 => 32,
            C64 | F64 | I64 | U64 => 64,
        }
    }
}

impl fmt::Display for FileDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The names are those of the serde attributes above.
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;

    /// Names, sizes and order are those of the reference implementation.
    #[test]
    fn types_are_those_of_the_reference() {
        use FileDType::*;
        let all = [
            Bool, F4, F6E2M3, F6E3M2, U8, I8, F8E5M2, F8E4M3, F8E8M0, F8E4M3Fnuz, F8E5M2Fnuz, I16, U16, F16,
            BF16, I32, U32, F32, C64, F64, I64, U64,
        ];
        let named = |name: &str| serde_json::from_value::<Dtype>(name.into()).expect(name);
        let theirs = all.map(|dtype| named(&dtype.to_string()));
        for (ours, theirs) in all.iter().zip(&theirs) {
            assert_eq!(ours.to_string(), theirs.to_string());
            assert_eq!(ours.bits(), theirs.bitsize(), "{ours}");
        }
        assert!(all.is_sorted() && theirs.is_sorted());
        // The reference has these 22 types, each once. If it adds a type, this test fails, since Tiebeam does not read it yet.
        let unknown = serde_json::from_value::<Dtype>("F31".into()).expect_err("no type").to_string();
        assert_eq!(unknown.matches('`').count() / 2 - 1, all.len(), "{unknown}");
        assert_eq!(format!("{F32:>5}|{U8:<5}|"), "  F32|U8   |");
    }
}
