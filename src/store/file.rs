//! Reads safetensors files. A file is mapped, and its header is checked against its size.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use memmap2::Mmap;

pub use super::header::Info;
use super::header::{Header, MAX_BYTES};
use super::{FileDType, bytes};
use crate::error::{Error, Result};

/// An open safetensors file.
///
/// ```no_run
/// # fn main() -> tiebeam::error::Result<()> {
/// let file = tiebeam::store::File::open("model.safetensors")?;
/// file.expect("embed.weight", &[32_000, 512])?;
/// let embed: Vec<f32> = file.tensor_f32("embed.weight")?;
/// # Ok(()) }
/// ```
///
/// The file is mapped: opening reads only the header, and a tensor is read from the disk when it is first used. If another
/// program truncates the file meanwhile, this process is killed by `SIGBUS`. [`super::save`] replaces files and never truncates
/// them.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    bytes: Bytes,
    data_start: usize,
    header: Header,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

impl File {
    /// Maps the file and checks its header against its size.
    pub fn open(path: impl AsRef<Path>) -> Result<File> {
        let path = path.as_ref();
        let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        let kind = file.metadata().map_err(|e| Error::io(path, e))?;
        if !kind.is_file() {
            return Err(Error::format(path, "is no regular file; name a .safetensors file"));
        }
        // Not every platform can map an empty file. `from_bytes` refuses it as too short.
        if kind.len() == 0 {
            return File::from_bytes(path, Vec::new());
        }
        // SAFETY: the map is private to this value and only read as bytes, for which every pattern is valid. Nothing can
        // keep other programs from truncating the file; the documentation of the type says what happens then.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        File::new(path, Bytes::Mapped(map))
    }

    /// Checks a file that is already in memory. `path` is only used in error messages.
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<File> {
        File::new(path.as_ref(), Bytes::Owned(bytes))
    }

    fn new(path: &Path, bytes: Bytes) -> Result<File> {
        let wrong = |message: String| Error::format(path, format!("no valid safetensors file: {message}"));
        let Some((length, rest)) = bytes.split_first_chunk() else {
            return Err(wrong(format!("it has {} bytes, its length field alone takes 8", bytes.len())));
        };
        let length = u64::from_le_bytes(*length);
        // The first bytes of other formats are no length that fits.
        let other = || super::foreign::described(&bytes);
        if let Some(other) = (length > MAX_BYTES || length > rest.len() as u64).then(other).flatten() {
            return Err(Error::format(path, format!("no safetensors file: {other}")));
        }
        if length > MAX_BYTES {
            return Err(wrong(format!("its header claims {length} bytes, the limit is {MAX_BYTES}")));
        }
        let Some((text, data)) = rest.split_at_checked(length as usize) else {
            let has = rest.len();
            return Err(wrong(format!(
                "its header claims {length} bytes and {has} are left; was it cut short?"
            )));
        };
        let text = std::str::from_utf8(text).map_err(|e| wrong(format!("its header is not UTF-8: {e}")))?;
        let header = Header::parse(text, data.len()).map_err(&wrong)?;
        let data_start = 8 + text.len();
        Ok(File { path: path.to_path_buf(), bytes, data_start, header })
    }

    /// The path with which the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// The metadata of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Fields of tensors in the header that the format does not have. They are passed over.
    pub fn unknown_fields(&self) -> impl ExactSizeIterator<Item = &str> {
        self.header.unknown.iter().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.header.tensors.contains_key(name)
    }

    /// Shape and type of a tensor. The error of a missing name lists the nearest names that exist.
    pub fn info(&self, name: &str) -> Result<&Info> {
        self.header.tensors.get(name).ok_or_else(|| Error::format(&self.path, self.missing(name)))
    }

    /// Returns [`File::info`] of a tensor, with an error if it has another shape.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<&Info> {
        let info = self.info(name)?;
        if info.shape == shape {
            return Ok(info);
        }
        Err(self.wrong(name, format!("wanted shape {shape:?}, the file has {:?}", info.shape)))
    }

    /// The bytes of a tensor as stored in the file. They may be unaligned.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(self.find(name)?.1)
    }

    /// Reads a float tensor as f32. F16 and BF16 widen exactly. F64 is rounded to nearest even, and a finite value beyond the
    /// range of f32 is an error. Integers and 8-bit floats are refused.
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        self.read(name, bytes::to_f32)
    }

    /// [`File::tensor_f32`] of a range of elements in row-major order, so that a large tensor can be read in pieces. A range
    /// outside is an error.
    pub fn range_f32(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let (info, bytes) = self.find(name)?;
        let size = info.dtype.bits() / 8;
        let at = range.start.checked_mul(size).zip(range.end.checked_mul(size));
        let part = at.and_then(|(start, end)| bytes.get(start..end)).ok_or_else(|| {
            self.wrong(name, format!("elements {range:?} were asked for, its shape is {:?}", info.shape))
        })?;
        bytes::to_f32(info.dtype, part).map_err(|message| self.wrong(name, message))
    }

    /// [`File::range_f32`] of pieces of `length` elements that begin at `starts`, one after the other.
    pub(super) fn pieces_f32(&self, name: &str, length: usize, starts: &[usize]) -> Result<Vec<f32>> {
        let (info, bytes) = self.find(name)?;
        let size = info.dtype.bits() / 8;
        let mut all = Vec::with_capacity(starts.len() * length * size);
        for &start in starts {
            let piece = bytes.get(start * size..(start + length) * size).ok_or_else(|| {
                self.wrong(name, format!("element {start} was asked for, its shape is {:?}", info.shape))
            })?;
            all.extend_from_slice(piece);
        }
        bytes::to_f32(info.dtype, &all).map_err(|message| self.wrong(name, message))
    }

    /// Reads a float tensor as f16. Other types than F16 are rounded once, to nearest even, and a finite value beyond the range
    /// of f16 (65504) is an error. Integers and 8-bit floats are refused.
    pub fn tensor_f16(&self, name: &str) -> Result<Vec<f16>> {
        self.read(name, bytes::to_f16)
    }

    /// Reads an integer or BOOL tensor as u32. A value out of range is an error that names the element.
    pub fn tensor_u32(&self, name: &str) -> Result<Vec<u32>> {
        self.read(name, bytes::to_integer)
    }

    /// Reads an integer or BOOL tensor as i32. A value out of range is an error that names the element.
    pub fn tensor_i32(&self, name: &str) -> Result<Vec<i32>> {
        self.read(name, bytes::to_integer)
    }

    fn read<T>(&self, name: &str, convert: fn(FileDType, &[u8]) -> Result<Vec<T>, String>) -> Result<Vec<T>> {
        let (info, bytes) = self.find(name)?;
        convert(info.dtype, bytes).map_err(|message| self.wrong(name, message))
    }

    fn find(&self, name: &str) -> Result<(&Info, &[u8])> {
        let info = self.info(name)?;
        // In range, since `Header::parse` checked every range against the data.
        Ok((info, &self.bytes[self.data_start..][info.range.clone()]))
    }

    fn wrong(&self, name: &str, message: String) -> Error {
        Error::format(&self.path, format!("tensor `{name}`: {message}"))
    }

    fn missing(&self, name: &str) -> String {
        let near = nearest(name, self.names());
        let hint = if near.is_empty() { "the file has no tensors".into() } else { format!("near: {near}") };
        format!("no tensor `{name}`; {hint}")
    }
}

/// Returns the three of `names` that are most similar to `name`, quoted for an error message.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    let mut near: Vec<_> = names.map(|other| (distance(name, other), other)).collect();
    near.sort_unstable();
    let near: Vec<_> = near.iter().take(3).map(|(_, other)| format!("`{other}`")).collect();
    near.join(", ")
}

/// A few names in quotes, and how many more there are.
pub(crate) fn some<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().collect();
    let shown = names.iter().take(3).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(3) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Returns the Levenshtein distance in bytes: the least number of insertions, deletions and substitutions.
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.bytes().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn refusal(header: &str, data: &[u8]) -> String {
        File::from_bytes("f", with_header(header, data)).expect_err(header).to_string()
    }

    const VALID: &str = concat!(
        r#"{"__metadata__":{"kind":"test"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"#,
        r#""n":{"shape":[3],"data_offsets":[8,11],"dtype":"U8"},"#,
        r#""e":{"dtype":"F16","shape":[0,7],"data_offsets":[11,11]}}"#
    );
    const DATA: [u8; 11] = [0, 0, 128, 63, 0, 0, 0, 192, 1, 2, 255];

    #[test]
    fn valid_file_reads() {
        let file = File::from_bytes("f", with_header(VALID, &DATA)).unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["e", "n", "w"]);
        assert_eq!(file.metadata()["kind"], "test");
        assert_eq!(file.tensor_f32("w").unwrap(), [1.0, -2.0]);
        assert_eq!(file.tensor_f16("w").unwrap(), [f16::ONE, f16::from_f32(-2.0)]);
        assert_eq!(file.tensor_u32("n").unwrap(), [1, 2, 255]);
        assert_eq!(file.tensor_i32("n").unwrap(), [1, 2, 255]);
        assert!(file.tensor_f32("e").unwrap().is_empty());
        assert_eq!(file.bytes("n").unwrap(), [1, 2, 255]);
        assert_eq!(file.expect("w", &[2, 1]).unwrap().dtype, FileDType::F32);
        assert!(File::from_bytes("f", with_header("{}", &[])).unwrap().names().next().is_none());
    }

    #[test]
    fn errors_name_the_tensor() {
        let file = File::from_bytes("f", with_header(VALID, &DATA)).unwrap();
        let message = file.expect("w", &[1, 2]).unwrap_err().to_string();
        assert_eq!(message, "f: tensor `w`: wanted shape [1, 2], the file has [2, 1]");
        assert!(file.tensor_f32("n").unwrap_err().to_string().contains("tensor `n`: U8"));
        assert!(file.tensor_u32("w").unwrap_err().to_string().contains("tensor `w`: F32"));
        let message = file.info("ww").unwrap_err().to_string();
        assert_eq!(message, "f: no tensor `ww`; near: `w`, `e`, `n`");
        assert_eq!(["", "abc", "kitten"].map(|from| distance(from, "sitting")), [7, 7, 3]);
    }

    #[test]
    fn lying_headers_are_refused() {
        let tensor = |fields: &str| refusal(&format!("{{\"w\":{{{fields}}}}}"), &[0; 8]);
        for (fields, words) in [
            (r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#, "tensor `w`: F32 [3] takes 12 bytes"),
            (
                r#""dtype":"F32","shape":[2],"data_offsets":[0,16]"#,
                "tensor `w`: data_offsets [0, 16] are not in",
            ),
            (
                r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#,
                "tensor `w`: data_offsets [8, 0] are not in",
            ),
            (r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#, "tensor `w` starts at byte 4"),
            (r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#, "the rest is nobody's"),
            (
                r#""dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]"#,
                "tensor `w`: F32 [4294967296",
            ),
            (
                r#""dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]"#,
                "no whole number of bytes",
            ),
            (r#""dtype":"F4","shape":[3],"data_offsets":[0,8]"#, "no whole number of bytes"),
            (r#""dtype":"F31","shape":[2],"data_offsets":[0,8]"#, "tensor `w`: unknown dtype `F31`"),
            (
                r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#,
                "tensor `w`: invalid value: integer `-2`, expected usize, at byte 31 of the header",
            ),
            (
                r#""dtype":"F32","shape":[2.0],"data_offsets":[0,8]"#,
                "tensor `w`: invalid type: floating point `2.0`",
            ),
            (r#""dtype":"F32","shape":[02],"data_offsets":[0,8]"#, "tensor `w`: invalid number"),
            (
                r#""dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]"#,
                "tensor `w`: invalid type: floating point `1.84",
            ),
            (r#""dtype":"F32","shape":[2],"data_offsets":[0,8,9]"#, "tensor `w`: data_offsets [0, 8, 9]"),
            (r#""dtype":"F32","shape":[2]"#, "tensor `w`: missing field `data_offsets`"),
            (r#""shape":[2],"data_offsets":[0,8]"#, "tensor `w`: missing field `dtype`"),
            (r#""dtype":"F32","data_offsets":[0,8]"#, "tensor `w`: missing field `shape`"),
            (
                r#""dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]"#,
                "tensor `w`: duplicate field `dtype`",
            ),
            (r#""dtype":"F32","shape":[2],"data_offsets":[0,8],"dtype":"F32""#, "duplicate field `dtype`"),
            (r#""dtype":"F32","shape":[2],"data_offsets":[0,8],"#, "tensor `w`"),
            ("", "tensor `w`: missing field `dtype`"),
            (r#""dtype":{"F32":null},"shape":[2],"data_offsets":[0,8]"#, "tensor `w`: invalid type: map"),
            (r#""dtype":"F32","shape":{"0":2},"data_offsets":[0,8]"#, "tensor `w`: invalid type: map"),
        ] {
            let message = tensor(fields);
            assert!(message.contains(words), "{fields}: {message}");
        }
        let f32_at = |name: &str, start: usize| {
            format!(r#""{name}":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{}]}}"#, start + 4)
        };
        let pair = |a: &str, b: &str| refusal(&format!("{{{a},{b}}}"), &[0; 8]);
        assert!(pair(&f32_at("w", 0), &f32_at("w", 4)).contains("tensor `w` is in the header twice"));
        assert!(pair(&f32_at("w", 0), &f32_at("\\u0077", 4)).contains("tensor `w` is in the header twice"));
        assert!(pair(&f32_at("v", 0), &f32_at("w", 2)).contains("tensor `w` starts at byte 2, inside `v`"));
        assert!(pair(&f32_at("v", 0), &f32_at("w", 0)).contains("tensor `w` starts at byte 0, inside `v`"));
        for header in ["", "[]", "{", "null", "{}x", "{\"w\"}", "{,}", &"[".repeat(100_000)] {
            let message = refusal(header, &[]);
            assert!(
                message.starts_with("f: no valid safetensors file: ") && message.contains(" at byte "),
                "{message}"
            );
        }
        for (text, words) in [
            (r#"{"a":1}"#, "`__metadata__`: invalid type: integer `1`, expected a string"),
            (r#"{"a":"b","a":"c"}"#, "`__metadata__`: `a` twice"),
            ("[]", "`__metadata__`: invalid type: sequence, expected an object of texts"),
            (r#"{},"__metadata__":{}"#, "`__metadata__` is in the header twice"),
            (r#"{"a":"b""#, "EOF while parsing an object, at byte 25"),
        ] {
            let message = refusal(&format!("{{\"__metadata__\":{text}}}"), &[]);
            assert!(message.contains(words), "{text}: {message}");
        }
        assert!(refusal("{}", &[0]).contains("nobody's"));
        for (text, kind, byte) in [("3", "integer `3`", 6), (r#"["F32",[0],[0,0]]"#, "sequence", 5)] {
            let message = refusal(&format!("{{\"w\":{text}}}"), &[]);
            let object = "expected an object with `dtype`, `shape` and `data_offsets`";
            let words = format!("tensor `w`: invalid type: {kind}, {object}, at byte {byte} of the header");
            assert!(message.ends_with(&words), "{message}");
        }
    }

    #[test]
    fn lying_lengths_are_refused() {
        let valid = with_header(VALID, &DATA);
        for cut in 0..valid.len() {
            let error = File::from_bytes("f", valid[..cut].to_vec()).expect_err("cut short");
            assert!(matches!(error, Error::Format { .. }), "{error}");
        }
        for length in
            [u64::MAX, u64::MAX - 7, 1 << 63, 100_000_001, 100_000_000, 0, 1, VALID.len() as u64 + 1]
        {
            let mut bytes = valid.clone();
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            File::from_bytes("f", bytes).expect_err("a lying length");
        }
        let mut bytes = valid;
        bytes[10] = 0xff;
        assert!(File::from_bytes("f", bytes).unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn unreadable_paths_are_errors() {
        assert!(matches!(File::open("/no/such/file"), Err(Error::Io { .. })));
        assert!(File::open(std::env::temp_dir()).is_err());
    }

    proptest! {
        /// Opening a mutated file and reading its tensors never panics. If the file is accepted, the reference implementation
        /// accepts it too and reads the same bytes.
        #[test]
        fn mutations_never_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..6),
        ) {
            let mut bytes = with_header(VALID, &DATA);
            for (at, byte, kind) in edits {
                let i = at.index(bytes.len());
                match kind {
                    0 => bytes[i] = byte,
                    // Digits and brackets damage a header in more ways than random bytes do.
                    1 => bytes[i] = b"0123456789[]{}\",:\\-e"[usize::from(byte) % 20],
                    _ => bytes[i] ^= 1 << (byte % 8),
                }
            }
            if let Ok(file) = File::from_bytes("f", bytes.clone()) {
                let other = SafeTensors::deserialize(&bytes).expect("the reference reads it");
                prop_assert_eq!(other.len(), file.names().len());
                for name in file.names() {
                    let (_, _) = (file.tensor_f32(name), file.tensor_f16(name));
                    let (_, _) = (file.tensor_u32(name), file.tensor_i32(name));
                    prop_assert_eq!(other.tensor(name).unwrap().data(), file.bytes(name).unwrap());
                }
            }
        }
    }
}
