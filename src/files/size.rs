//! Numbers of bytes as people write and read them.

use crate::error::{Error, Result};

/// Parses a number of bytes with a unit: `500MB`, `5 GB`, `1.5GiB`. Units of 1000 are B, KB, MB, GB and TB, those of 1024 are KiB,
/// MiB, GiB and TiB, in any case. A number without a unit is in bytes.
///
/// ```
/// # use tiebeam::files::parse_size;
/// assert_eq!(parse_size("1.5GiB")?, 3 << 29);
/// assert_eq!(parse_size("500 mb")?, 500_000_000);
/// assert!(parse_size("3 apples").is_err());
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// # Errors
/// [`Error::Config`] for another unit, for no number, for less than one byte, and for 2^63 bytes or more.
pub fn parse_size(text: &str) -> Result<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let units = ["B", "KB", "MB", "GB", "TB", "KIB", "MIB", "GIB", "TIB"];
    let unit = unit.trim().to_ascii_uppercase();
    let factor = match units.iter().position(|known| *known == unit) {
        None if unit.is_empty() => 1.0,
        None => {
            let words = "B, KB, MB, GB, TB, KiB, MiB, GiB or TiB";
            return Err(Error::config(format!("'{text}' has no unit that is known; use {words}")));
        }
        Some(at) if at < 5 => 1000f64.powi(at as i32),
        Some(at) => 1024f64.powi(at as i32 - 4),
    };
    match number.parse::<f64>().map(|number| number * factor) {
        Ok(bytes) if bytes < 1.0 => Err(Error::config(format!("'{text}' is less than one byte"))),
        Ok(bytes) if bytes >= 2f64.powi(63) => {
            Err(Error::config(format!("'{text}' is more than any device has")))
        }
        Ok(bytes) => Ok(bytes as u64),
        Err(_) => Err(Error::config(format!("'{text}' is no number of bytes"))),
    }
}

/// Formats a number of bytes with a unit of 1024.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        let read = |text| parse_size(text).unwrap();
        assert_eq!([read("7"), read("7B"), read("2KB"), read("2 KiB")], [7, 7, 2000, 2048]);
        assert_eq!([read("1TB"), read("1tib"), read("0.5MiB")], [1_000_000_000_000, 1 << 40, 1 << 19]);
        for wrong in ["", "GB", "0", "0.2B", "-1", "1.2.3", "3 apples", "1e9", "nan", "9999999999TB"] {
            assert!(parse_size(wrong).unwrap_err().to_string().contains(&format!("'{wrong}'")), "{wrong}");
        }
        assert_eq!(
            [size(12), size(2048), size(3 << 19), size(3 << 29)].join(" "),
            "12 B 2.0 KiB 1.5 MiB 1.50 GiB"
        );
    }
}
