//! Element types: what a buffer holds and how WGSL spells it.

use std::fmt;

/// The element type of a tensor.
///
/// ```
/// use tiebeam::DType;
/// assert_eq!((DType::F32.size(), DType::Bf16.size()), (4, 2));
/// assert!(DType::F16.is_float() && !DType::U32.is_float());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DType {
    /// 32-bit float, the default.
    F32,
    /// 16-bit float. This is a storage format with two elements per word. All arithmetic is in f32.
    F16,
    /// The upper half of a 32-bit float: f32's range with 8 significant bits. A storage format like f16, on every adapter.
    Bf16,
    /// 32-bit unsigned integer: indices and masks.
    U32,
    /// 32-bit signed integer: labels.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F16 | DType::Bf16 => 2,
            DType::F32 | DType::U32 | DType::I32 => 4,
        }
    }

    /// Whether gradients can flow through this type.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::Bf16)
    }

    /// Whether two elements share a word: f16 and bf16.
    pub const fn is_half(self) -> bool {
        matches!(self, DType::F16 | DType::Bf16)
    }

    /// Unit roundoff of the stored type: `2^-24` for f32, `2^-11` for f16, `2^-8` for bf16, 0 for integers.
    pub const fn roundoff(self) -> f64 {
        match self {
            DType::F32 => 1.0 / (1u64 << 24) as f64,
            DType::F16 => 1.0 / 2048.0,
            DType::Bf16 => 1.0 / 256.0,
            DType::U32 | DType::I32 => 0.0,
        }
    }

    /// The WGSL type in which this type is computed. f16 and bf16 are computed in f32.
    pub(crate) const fn wgsl(self) -> &'static str {
        match self {
            DType::F32 | DType::F16 | DType::Bf16 => "f32",
            DType::U32 => "u32",
            DType::I32 => "i32",
        }
    }

    /// Bytes of a buffer of `len` elements, rounded up to whole 16-byte blocks so that `vec4` loads stay inside.
    pub(crate) const fn buffer_bytes(self, len: usize) -> u64 {
        let bytes = (len * self.size()) as u64;
        if bytes == 0 { 16 } else { bytes.div_ceil(16) * 16 }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::U32 => "u32",
            DType::I32 => "i32",
        })
    }
}

/// A Rust type that a tensor can be made from and read back into.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Display {
    /// The tensor type that stores it.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for half::bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for u32 {
    const DTYPE: DType = DType::U32;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}
