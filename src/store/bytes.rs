//! Conversions between the bytes of a file and numbers. An error names the element that cannot be converted.

use half::{bf16, f16};

use super::FileDType;

/// Converts the elements of `bytes`, which are a whole number, by `read`.
fn each<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&element| read(element)).collect()
}

/// Converts floats to f32. F16 and BF16 widen exactly, F64 rounds to nearest even. A finite value that is too large is an error.
pub(super) fn to_f32(dtype: FileDType, bytes: &[u8]) -> Result<Vec<f32>, String> {
    Ok(match dtype {
        FileDType::F32 => each(bytes, f32::from_le_bytes),
        FileDType::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        FileDType::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        FileDType::F64 => {
            let wide = each(bytes, f64::from_le_bytes);
            let narrow: Vec<_> = wide.iter().map(|&x| x as f32).collect();
            finite_stays_finite(wide.iter().zip(&narrow).map(|(w, n)| (*w, n.is_finite())), "f32")?;
            narrow
        }
        _ => return Err(format!("{dtype} is no float type of this crate; read it as integers or raw bytes")),
    })
}

/// Converts floats to f16, rounded to nearest even. A finite value that rounds beyond 65504 is an error.
pub(super) fn to_f16(dtype: FileDType, bytes: &[u8]) -> Result<Vec<f16>, String> {
    let (wide, narrow): (Vec<f64>, Vec<f16>) = match dtype {
        FileDType::F16 => return Ok(each(bytes, f16::from_le_bytes)),
        FileDType::F64 => each(bytes, f64::from_le_bytes).into_iter().map(|x| (x, f16_from_f64(x))).unzip(),
        _ => to_f32(dtype, bytes)?.into_iter().map(|x| (f64::from(x), f16::from_f32(x))).unzip(),
    };
    finite_stays_finite(wide.iter().zip(&narrow).map(|(w, n)| (*w, n.is_finite())), "f16")?;
    Ok(narrow)
}

fn finite_stays_finite(mut pairs: impl Iterator<Item = (f64, bool)>, into: &str) -> Result<(), String> {
    match pairs.position(|(wide, narrow_is_finite)| wide.is_finite() && !narrow_is_finite) {
        Some(i) => Err(format!("element {i} is too large for {into}")),
        None => Ok(()),
    }
}

/// Rounds to the nearest f16, ties to even. `f16::from_f64` drops the low 32 bits first, and so mistakes some values for ties.
fn f16_from_f64(x: f64) -> f16 {
    // Rounding to odd at f32's 24 bits and then to f16's 11 bits is the same as rounding once, because 24 >= 11 + 2
    // (Boldo, Melquiond 2008).
    let near = x as f32;
    let exact = f64::from(near) == x || x.is_nan();
    let truncated = near.to_bits() - u32::from(f64::from(near).abs() > x.abs());
    f16::from_f32(if exact { near } else { f32::from_bits(truncated | 1) })
}

/// Converts any integer type to `T`. A value out of range is an error. BOOL becomes 0 and 1.
pub(super) fn to_integer<T: TryFrom<i128>>(dtype: FileDType, bytes: &[u8]) -> Result<Vec<T>, String> {
    // i128 holds every integer type of the format, so one range check suffices.
    fn fit<const N: usize, T: TryFrom<i128>>(
        bytes: &[u8],
        read: impl Fn([u8; N]) -> i128,
    ) -> Result<Vec<T>, String> {
        let one = |(i, &element): (usize, &[u8; N])| {
            let x = read(element);
            let into = std::any::type_name::<T>();
            T::try_from(x).map_err(|_| format!("element {i} is {x}, out of the range of {into}"))
        };
        bytes.as_chunks().0.iter().enumerate().map(one).collect()
    }
    match dtype {
        FileDType::Bool => match bytes.iter().position(|&b| b > 1) {
            Some(i) => Err(format!("element {i} is byte {}, no BOOL", bytes[i])),
            None => fit(bytes, |[b]| b.into()),
        },
        FileDType::U8 => fit(bytes, |b| u8::from_le_bytes(b).into()),
        FileDType::I8 => fit(bytes, |b| i8::from_le_bytes(b).into()),
        FileDType::U16 => fit(bytes, |b| u16::from_le_bytes(b).into()),
        FileDType::I16 => fit(bytes, |b| i16::from_le_bytes(b).into()),
        FileDType::U32 => fit(bytes, |b| u32::from_le_bytes(b).into()),
        FileDType::I32 => fit(bytes, |b| i32::from_le_bytes(b).into()),
        FileDType::U64 => fit(bytes, |b| u64::from_le_bytes(b).into()),
        FileDType::I64 => fit(bytes, |b| i64::from_le_bytes(b).into()),
        _ => Err(format!("{dtype} is no integer type")),
    }
}

/// Returns f32 values as the bytes of a BF16 tensor, rounded to nearest, ties to even. NaN stays NaN.
///
/// ```
/// assert_eq!(tiebeam::store::bf16_bytes(&[1.0, -2.0]), [0x80, 0x3f, 0x00, 0xc0]);
/// ```
pub fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let round = |bits: u32| u16::from_le_bytes(bf16_bytes(&[f32::from_bits(bits)]).try_into().unwrap());
        assert_eq!(
            [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff].map(round),
            [0x3f80, 0x3f82, 0x3f81, 0x3f80]
        );
        assert_eq!([0x7f7f_ffff, 0x8000_0000, 0xff80_0000].map(round), [0x7f80, 0x8000, 0xff80]);
        assert!(bf16::from_bits(round(0x7f80_0001)).is_nan());
        // Every BF16 pattern survives the conversion to f32 and back.
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let back = bf16_bytes(&to_f32(FileDType::BF16, &all).unwrap());
        let differ = all.chunks(2).zip(back.chunks(2)).filter(|(a, b)| a != b);
        assert!(differ.into_iter().all(|(a, _)| bf16::from_le_bytes([a[0], a[1]]).is_nan()));
    }

    #[test]
    fn f64_to_f16_rounds_once() {
        // Just above the tie between 1 and 1 + 2^-10, so the upper one is nearest. Without the low bits it would be a tie.
        let above_tie = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
        assert_eq!(f16_from_f64(above_tie).to_bits(), 0x3c01);
        assert_eq!(f16_from_f64(-above_tie).to_bits(), 0xbc01);
        assert_eq!(f16_from_f64(1.0 + 2f64.powi(-11)).to_bits(), 0x3c00);
        assert_eq!(f16_from_f64(1e-300).to_bits(), 0);
        assert_eq!(f16_from_f64(2f64.powi(-25) * (1.0 + 1e-15)).to_bits(), 1);
        assert!(f16_from_f64(f64::NAN).is_nan() && f16_from_f64(1e300).is_infinite());
        for bits in 0..0x7bff {
            let (a, b) = (f16::from_bits(bits), f16::from_bits(bits + 1));
            let tie = (a.to_f64() + b.to_f64()) / 2.0;
            let step = tie * 1e-15;
            assert_eq!((f16_from_f64(tie - step), f16_from_f64(tie + step)), (a, b));
            assert_eq!(f16_from_f64(tie).to_bits() & 1, 0);
        }
    }

    #[test]
    fn ranges_hold() {
        let bytes = 1e300f64.to_le_bytes();
        assert_eq!(to_f32(FileDType::F64, &bytes).unwrap_err(), "element 0 is too large for f32");
        assert_eq!(to_f32(FileDType::F64, &f64::INFINITY.to_le_bytes()), Ok(vec![f32::INFINITY]));
        let bytes = [1f32, 65520.0].map(f32::to_le_bytes).concat();
        assert_eq!(to_f16(FileDType::F32, &bytes).unwrap_err(), "element 1 is too large for f16");
        let bytes = [7i64, -1, 1 << 32].map(i64::to_le_bytes).concat();
        assert!(to_integer::<u32>(FileDType::I64, &bytes).unwrap_err().contains("element 1 is -1"));
        assert!(to_integer::<i32>(FileDType::I64, &bytes).unwrap_err().contains("element 2 is 4294967296"));
        assert_eq!(to_integer::<i32>(FileDType::I8, &[255, 3]), Ok(vec![-1, 3]));
        assert!(to_integer::<u32>(FileDType::U64, &u64::MAX.to_le_bytes()).is_err());
        assert_eq!(to_integer::<u32>(FileDType::Bool, &[0, 1]), Ok(vec![0, 1]));
        assert!(to_integer::<u32>(FileDType::Bool, &[2]).is_err());
        assert!(to_integer::<u32>(FileDType::F32, &[0; 4]).is_err());
    }
}
