//! Reads GGUF, the file format of llama.cpp: metadata, tokenizer and quantised weights in one file.
//!
//! Layout (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): magic `GGUF`, version and counts, then key-value pairs,
//! tensor infos (name, sizes from the innermost, type, offset) and the data, aligned. Numbers are little-endian. A header with a
//! size beyond the end of the file is refused before anything is read or allocated by that size.

use crate::error::{Error, Result};
use half::{bf16, f16};
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// Any whole number.
    Integer(i128),
    /// Any float.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Values of one type.
    List(Vec<Value>),
}

impl Value {
    fn text(&self) -> Option<&str> {
        if let Value::Text(text) = self { Some(text) } else { None }
    }
}

/// A supported type of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TensorType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q8_0,
    Bf16,
}

/// Numbers and names of types that are not supported, for error messages.
const OTHER_KINDS: [(u32, &str); 22] = [
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
];

impl TensorType {
    fn of(number: u32) -> Result<TensorType, String> {
        Ok(match number {
            0 => TensorType::F32,
            1 => TensorType::F16,
            2 => TensorType::Q4_0,
            3 => TensorType::Q4_1,
            8 => TensorType::Q8_0,
            30 => TensorType::Bf16,
            other => {
                let name = OTHER_KINDS.iter().find(|k| k.0 == other).map_or("unknown", |k| k.1);
                return Err(format!(
                    "type {name} (number {other}) is not supported; convert the file to Q8_0, Q4_1, Q4_0, F16 or F32"
                ));
            }
        })
    }

    /// Elements and bytes of a block.
    fn block(self) -> [usize; 2] {
        match self {
            TensorType::F32 => [1, 4],
            TensorType::F16 | TensorType::Bf16 => [1, 2],
            TensorType::Q4_0 => [32, 18],
            TensorType::Q4_1 => [32, 20],
            TensorType::Q8_0 => [32, 34],
        }
    }

    /// Appends the elements of one block to `out`: `w = scale q + minimum`. Low nibbles are elements 0 to 15, high ones 16 to 31.
    fn expand(self, block: &[u8], out: &mut Vec<f32>) {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let nibbles = |from: usize| {
            let bytes = block[from..from + 16].iter();
            bytes.clone().map(|b| b & 15).chain(bytes.map(|b| b >> 4))
        };
        match self {
            TensorType::F32 => out.push(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
            TensorType::F16 => out.push(half(0)),
            TensorType::Bf16 => out.push(bf16::from_le_bytes([block[0], block[1]]).to_f32()),
            TensorType::Q4_0 => out.extend(nibbles(2).map(|q| half(0) * (q as f32 - 8.0))),
            TensorType::Q4_1 => out.extend(nibbles(4).map(|q| half(0) * q as f32 + half(2))),
            TensorType::Q8_0 => out.extend(block[2..34].iter().map(|&q| half(0) * (q as i8) as f32)),
        }
    }
}

type Metadata = BTreeMap<String, Value>;
type Tensors = BTreeMap<String, Info>;

struct Info {
    /// Sizes from the outermost axis.
    shape: Vec<usize>,
    kind: TensorType,
    start: usize,
    bytes: usize,
}

/// A mapped GGUF file.
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    tensors: Tensors,
}

/// Most axes of a tensor in this format.
const MOST_AXES: u32 = 4;
/// Most levels of nested metadata lists. More are refused, because a damaged file could exhaust the stack.
const MOST_NESTED: usize = 4;

/// Reads a slice from the front, with an error at its end.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8], String> {
        let left = self.data.len() - self.at;
        if count > left {
            return Err(format!("the file ends in {what}: {count} bytes are announced, {left} are left"));
        }
        self.at += count;
        Ok(&self.data[self.at - count..self.at])
    }

    fn number<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        self.take(N, what).map(|bytes| bytes.try_into().expect("as many bytes as were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.number(what).map(u32::from_le_bytes)
    }

    /// Reads a count of things that take at least one byte each. More than the bytes that are left is an error.
    fn count(&mut self, what: &str) -> Result<usize, String> {
        let count = self.number(what).map(u64::from_le_bytes)?;
        let left = self.data.len() - self.at;
        usize::try_from(count)
            .ok()
            .filter(|&n| n <= left)
            .ok_or_else(|| format!("{what} announces {count} where {left} bytes are left"))
    }

    fn text(&mut self, what: &str) -> Result<String, String> {
        let length = self.count(what)?;
        let bytes = self.take(length, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, nested: usize) -> Result<Value, String> {
        let what = "a metadata value";
        Ok(match kind {
            0 => Value::Integer(self.number::<1>(what)?[0].into()),
            1 => Value::Integer((self.number::<1>(what)?[0] as i8).into()),
            2 => Value::Integer(u16::from_le_bytes(self.number(what)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.number(what)?).into()),
            4 => Value::Integer(self.u32(what)?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.number(what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.number(what)?).into()),
            7 => Value::Bool(self.number::<1>(what)?[0] != 0),
            8 => Value::Text(self.text("a metadata text")?),
            9 if nested < MOST_NESTED => {
                let (kind, count) = (self.u32(what)?, self.count("a metadata list")?);
                Value::List((0..count).map(|_| self.value(kind, nested + 1)).collect::<Result<_, _>>()?)
            }
            9 => return Err("metadata lists are nested too deep".into()),
            10 => Value::Integer(u64::from_le_bytes(self.number(what)?).into()),
            11 => Value::Integer(i64::from_le_bytes(self.number(what)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.number(what)?)),
            other => return Err(format!("metadata has a value of the unknown type {other}")),
        })
    }
}

/// Reads the header of a file: metadata and tensor infos.
fn parse(data: &[u8]) -> Result<(Metadata, Tensors), String> {
    let mut cursor = Cursor { data, at: 0 };
    if cursor.take(4, "the first four bytes")? != b"GGUF" {
        return Err("this is no GGUF file: it does not begin with GGUF".into());
    }
    let version = cursor.u32("the version")?;
    if version != 2 && version != 3 {
        return Err(format!("GGUF version {version} is not supported; versions 2 and 3 are"));
    }
    let (tensors, pairs) =
        (cursor.count("the number of tensors")?, cursor.count("the number of metadata pairs")?);
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let key = cursor.text("a metadata key")?;
        let kind = cursor.u32("a metadata type")?;
        let value = cursor.value(kind, 0).map_err(|e| format!("{key}: {e}"))?;
        metadata.insert(key, value);
    }
    let mut found = BTreeMap::new();
    for _ in 0..tensors {
        let name = cursor.text("a tensor's name")?;
        let info = info(&mut cursor).map_err(|e| format!("tensor `{name}`: {e}"))?;
        if found.insert(name.clone(), info).is_some() {
            return Err(format!("two tensors are named `{name}`"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Integer(n)) if (1..=1 << 20).contains(n) && (*n as usize).is_power_of_two() => {
            *n as usize
        }
        Some(other) => return Err(format!("general.alignment is {other:?}, not a power of two")),
    };
    let start = cursor.at.next_multiple_of(alignment);
    for (name, info) in &mut found {
        let end = start.checked_add(info.start).and_then(|at| at.checked_add(info.bytes));
        if end.is_none_or(|end| end > data.len()) {
            return Err(format!(
                "tensor `{name}` of {} bytes lies past the end of the file ({} bytes); the file is cut short",
                info.bytes,
                data.len()
            ));
        }
        info.start += start;
    }
    Ok((metadata, found))
}

/// Reads one tensor's sizes, type and offset behind the header.
fn info(cursor: &mut Cursor) -> Result<Info, String> {
    let axes = cursor.u32("the number of axes")?;
    if axes > MOST_AXES {
        return Err(format!("{axes} axes, over {MOST_AXES}"));
    }
    let mut shape = Vec::new();
    for _ in 0..axes {
        let size = u64::from_le_bytes(cursor.number("a size")?);
        shape.push(usize::try_from(size).map_err(|_| format!("an axis of {size}"))?);
    }
    shape.reverse();
    let kind = TensorType::of(cursor.u32("the type")?)?;
    let start = u64::from_le_bytes(cursor.number("the offset")?);
    let start = usize::try_from(start).map_err(|_| format!("offset {start}"))?;
    let count = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    let [elements, bytes] = kind.block();
    let bytes = count.filter(|n| n.is_multiple_of(elements)).and_then(|n| (n / elements).checked_mul(bytes));
    let bytes = bytes
        .ok_or_else(|| format!("{shape:?} is no size for {kind:?}, whose blocks have {elements} elements"))?;
    Ok(Info { shape, kind, start, bytes })
}

impl Gguf {
    /// Maps the file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read. [`Error::Format`] for another format or version, an unsupported type (the
    /// message names it), an inconsistent header or a truncated file.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf> {
        let path = path.as_ref().to_path_buf();
        let file = std::fs::File::open(&path).map_err(|e| Error::io(&path, e))?;
        // SAFETY: the map is only read as bytes, and its content is checked before use. As with every map, no program may
        // truncate the file while it is open.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let (metadata, tensors) = parse(&map).map_err(|message| Error::format(&path, message))?;
        Ok(Gguf { path, map, metadata, tensors })
    }

    /// The file's path, for messages.
    #[cfg(feature = "text")]
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// All metadata.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    fn missing(&self, key: &str, what: &str) -> Error {
        Error::format(&self.path, format!("metadata has no {what} `{key}`"))
    }

    /// A whole number of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not a whole number of 0 or more.
    pub fn number(&self, key: &str) -> Result<usize> {
        match self.metadata.get(key) {
            Some(Value::Integer(n)) => usize::try_from(*n).map_err(|_| self.missing(key, "usable number")),
            _ => Err(self.missing(key, "number")),
        }
    }

    /// A float of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not a float.
    pub fn float(&self, key: &str) -> Result<f64> {
        match self.metadata.get(key) {
            Some(Value::Float(x)) => Ok(*x),
            _ => Err(self.missing(key, "float")),
        }
    }

    /// A text of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not text.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(self.missing(key, "text")),
        }
    }

    /// A list of texts of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not a list of texts.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let Some(Value::List(all)) = self.metadata.get(key) else { return Err(self.missing(key, "list")) };
        all.iter().map(Value::text).collect::<Option<_>>().ok_or_else(|| self.missing(key, "list of texts"))
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn info(&self, name: &str) -> Result<&Info> {
        self.tensors
            .get(name)
            .ok_or_else(|| Error::format(&self.path, format!("there is no tensor `{name}`")))
    }

    /// Sizes of a tensor, from the outermost axis.
    ///
    /// # Errors
    /// [`Error::Format`] when there is no tensor of this name.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        self.info(name).map(|info| &info.shape[..])
    }

    /// Bytes that a tensor takes in the file.
    ///
    /// # Errors
    /// [`Error::Format`] when there is no tensor of this name.
    pub fn bytes(&self, name: &str) -> Result<usize> {
        self.info(name).map(|info| info.bytes)
    }

    /// Reads a tensor's elements, dequantised.
    ///
    /// # Errors
    /// [`Error::Format`] when there is no tensor of this name.
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.info(name)?;
        let mut out = Vec::with_capacity(info.shape.iter().product());
        let [_, bytes] = info.kind.block();
        for block in self.map[info.start..info.start + info.bytes].chunks_exact(bytes) {
            info.kind.expand(block, &mut out);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::scratch::Folder;

    fn text(s: &str) -> Vec<u8> {
        [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
    }

    /// Builds a file with three metadata pairs and these tensors: name, sizes innermost first, type, data.
    fn sample(tensors: &[(&str, &[u64], u32, Vec<u8>)]) -> Vec<u8> {
        let mut all = b"GGUF".to_vec();
        all.extend(3u32.to_le_bytes());
        all.extend((tensors.len() as u64).to_le_bytes());
        all.extend(3u64.to_le_bytes());
        all.extend([text("width"), 4u32.to_le_bytes().to_vec(), 576u32.to_le_bytes().to_vec()].concat());
        all.extend([text("eps"), 6u32.to_le_bytes().to_vec(), 0.5f32.to_le_bytes().to_vec()].concat());
        all.extend([text("tokens"), 9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().to_vec()].concat());
        all.extend([2u64.to_le_bytes().to_vec(), text("a"), text("\u{120}b")].concat());
        let mut offset = 0u64;
        for (name, sizes, kind, data) in tensors {
            all.extend(text(name));
            all.extend((sizes.len() as u32).to_le_bytes());
            sizes.iter().for_each(|size| all.extend(size.to_le_bytes()));
            all.extend(kind.to_le_bytes());
            all.extend(offset.to_le_bytes());
            offset += (data.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, data) in tensors {
            all.resize(all.len().next_multiple_of(32), 0);
            all.extend(data);
        }
        all
    }

    fn tensors() -> Vec<(&'static str, &'static [u64], u32, Vec<u8>)> {
        let half = |x: f32| f16::from_f32(x).to_le_bytes().to_vec();
        // Both the low and the high nibbles run from 0 to 15.
        let nibbles: Vec<u8> = (0..16).map(|i| i | i << 4).collect();
        let bytes: Vec<u8> = (0..32).map(|i| (i as i8 - 16) as u8).collect();
        vec![
            ("f", &[2, 1], 0, [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect()),
            ("q40", &[32], 2, [half(0.5), nibbles.clone()].concat()),
            ("q41", &[32], 3, [half(0.5), half(3.0), nibbles].concat()),
            ("q80", &[32], 8, [half(0.25), bytes].concat()),
        ]
    }

    fn open(bytes: &[u8]) -> Result<Gguf> {
        let folder = Folder::new("gguf");
        let path = folder.join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        Gguf::open(&path)
    }

    #[test]
    fn what_is_written_is_read() {
        let file = open(&sample(&tensors())).unwrap();
        assert_eq!((file.number("width").unwrap(), file.float("eps").unwrap()), (576, 0.5));
        assert_eq!(file.texts("tokens").unwrap(), ["a", "\u{120}b"]);
        assert_eq!((file.shape("f").unwrap(), file.tensor_f32("f").unwrap()), (&[1, 2][..], vec![1.5, -2.0]));
        let ramp =
            |from: f32, step: f32| (0..16).map(|i| from + step * i as f32).collect::<Vec<_>>().repeat(2);
        assert_eq!(file.tensor_f32("q40").unwrap(), ramp(-4.0, 0.5));
        assert_eq!(file.tensor_f32("q41").unwrap(), ramp(3.0, 0.5));
        let all: Vec<f32> = (0..32).map(|i| 0.25 * (i as f32 - 16.0)).collect();
        assert_eq!((file.tensor_f32("q80").unwrap(), file.bytes("q80").unwrap()), (all, 34));
        assert!(file.number("eps").is_err() && file.text("tokens").is_err() && file.tensor_f32("g").is_err());
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error() {
        let whole = sample(&tensors());
        for end in 0..whole.len() {
            assert!(open(&whole[..end]).is_err(), "{end} of {} bytes", whole.len());
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let says = |bytes: &[u8], what: &str| {
            let error = open(bytes).err().expect("refused").to_string();
            assert!(error.contains(what), "{error}");
        };
        let whole = sample(&tensors());
        let with = |at: usize, bytes: &[u8]| {
            let mut all = whole.clone();
            all[at..at + bytes.len()].copy_from_slice(bytes);
            all
        };
        says(b"no such thing", "does not begin with GGUF");
        says(&with(4, &[1]), "version 1");
        says(&with(8, &u64::MAX.to_le_bytes()), "number of tensors announces");
        says(&with(16, &u64::MAX.to_le_bytes()), "metadata pairs announces");
        says(&with(24, &u64::MAX.to_le_bytes()), "metadata key announces");
        says(&sample(&[("k", &[256], 12, vec![0; 144])]), "Q4_K (number 12)");
        says(&sample(&[("k", &[256], 77, vec![0; 144])]), "unknown (number 77)");
        says(&sample(&[("odd", &[33], 2, vec![0; 36])]), "`odd`: [33] is no size for Q4_0");
        says(&sample(&[("huge", &[u64::MAX, 8], 0, vec![])]), "tensor `huge`");
        says(&sample(&[("a", &[1], 0, vec![0; 4]), ("a", &[1], 0, vec![0; 4])]), "two tensors are named `a`");
    }
}
