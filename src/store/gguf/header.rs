//! The header of a GGUF file: metadata, and where each tensor is.

use super::types::Kind;
use std::collections::BTreeMap;
use std::ops::Range;

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
    pub(super) fn text(&self) -> Option<&str> {
        if let Value::Text(text) = self { Some(text) } else { None }
    }
}

pub(super) type Metadata = BTreeMap<String, Value>;
/// Where each value is in the file, with the number of its type before it.
pub(super) type Places = BTreeMap<String, Range<usize>>;
pub(super) type Tensors = BTreeMap<String, Info>;

pub(super) struct Info {
    /// Sizes from the outermost axis.
    pub shape: Vec<usize>,
    pub kind: Kind,
    pub start: usize,
    /// Bytes in the file. They are not known for a type with an unknown number.
    pub bytes: Option<usize>,
}

/// The alignment of tensors in files that name none.
pub(super) const ALIGNMENT: usize = 32;
/// Most axes of a tensor in this format.
pub(super) const MOST_AXES: usize = 4;
/// Most levels of nested metadata lists. More are refused, because a damaged file could exhaust the stack.
const MOST_NESTED: usize = 4;
/// Most values in lists of metadata. Vocabularies and their merges have some hundred thousand; a damaged file could announce a number
/// for each of its bytes, and a [`Value`] takes 32 times as many.
const MOST_VALUES: usize = 1 << 24;

/// Reads a slice from the front, with an error at its end.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
    /// Values that lists may still have.
    values: usize,
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
                self.values = self
                    .values
                    .checked_sub(count)
                    .ok_or_else(|| format!("lists of metadata have more than {MOST_VALUES} values in all"))?;
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

/// The header of a file.
pub(super) struct Header {
    pub metadata: Metadata,
    pub places: Places,
    pub tensors: Tensors,
}

/// Reads the header of a file: metadata and tensor infos.
pub(super) fn parse(data: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor { data, at: 0, values: MOST_VALUES };
    if cursor.take(4, "the first four bytes")? != b"GGUF" {
        return Err("this is no GGUF file: it does not begin with GGUF".into());
    }
    version(cursor.u32("the version")?)?;
    let (tensors, pairs) =
        (cursor.count("the number of tensors")?, cursor.count("the number of metadata pairs")?);
    let (mut metadata, mut places) = (BTreeMap::new(), BTreeMap::new());
    for _ in 0..pairs {
        let key = cursor.text("a metadata key")?;
        let start = cursor.at;
        let kind = cursor.u32("a metadata type")?;
        let value = cursor.value(kind, 0).map_err(|e| format!("{key}: {e}"))?;
        places.insert(key.clone(), start..cursor.at);
        metadata.insert(key, value);
    }
    whole(&metadata)?;
    let mut found = BTreeMap::new();
    for _ in 0..tensors {
        let name = cursor.text("a tensor's name")?;
        let info = info(&mut cursor).map_err(|e| format!("tensor `{name}`: {e}"))?;
        if found.insert(name.clone(), info).is_some() {
            return Err(format!("two tensors are named `{name}`"));
        }
    }
    place(&mut found, cursor.at.next_multiple_of(alignment(&metadata)?), data.len())?;
    Ok(Header { metadata, places, tensors: found })
}

fn version(version: u32) -> Result<(), String> {
    match version {
        2 | 3 => Ok(()),
        // A small number whose bytes are in the other order has none of the two low bytes.
        _ if version & 0xffff == 0 && version != 0 => Err(
            "the file is big-endian; convert it by `gguf-convert-endian FILE little` of the Python package gguf, or \
             download the little-endian file"
                .into(),
        ),
        _ => Err(format!("GGUF version {version} is not supported; versions 2 and 3 are")),
    }
}

/// Refuses one of several files that are one model.
fn whole(metadata: &Metadata) -> Result<(), String> {
    let number = |key: &str| match metadata.get(key) {
        Some(Value::Integer(n)) => Some(*n),
        _ => None,
    };
    match number("split.count") {
        Some(count) if count > 1 => {
            let part = number("split.no").map_or(String::new(), |no| format!(" {}", no.saturating_add(1)));
            Err(format!(
                "this is part{part} of a model in {count} files (split.count); merge them by `llama-gguf-split --merge \
                 FIRST-PART WHOLE` of llama.cpp and open the whole file"
            ))
        }
        _ => Ok(()),
    }
}

fn alignment(metadata: &Metadata) -> Result<usize, String> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT),
        Some(Value::Integer(n)) if (1..=1 << 20).contains(n) && (*n as usize).is_power_of_two() => {
            Ok(*n as usize)
        }
        Some(other) => Err(format!("general.alignment is {other:?}, not a power of two")),
    }
}

/// Makes offsets relative to the file, whose data begin at `start`, and checks that every tensor is inside.
fn place(found: &mut Tensors, start: usize, size: usize) -> Result<(), String> {
    for (name, info) in found {
        let bytes = info.bytes.unwrap_or(0);
        let at = start.checked_add(info.start);
        if at.and_then(|at| at.checked_add(bytes)).is_none_or(|end| end > size) {
            return Err(format!(
                "tensor `{name}` of {bytes} bytes lies past the end of the file ({size} bytes); the file is cut short"
            ));
        }
        info.start += start;
    }
    Ok(())
}

/// Reads one tensor's sizes, type and offset behind the header.
fn info(cursor: &mut Cursor) -> Result<Info, String> {
    let axes = cursor.u32("the number of axes")?;
    if axes as usize > MOST_AXES {
        return Err(format!("{axes} axes, over {MOST_AXES}"));
    }
    let mut shape = Vec::new();
    for _ in 0..axes {
        let size = u64::from_le_bytes(cursor.number("a size")?);
        shape.push(usize::try_from(size).map_err(|_| format!("an axis of {size}"))?);
    }
    shape.reverse();
    let kind = Kind::of(cursor.u32("the type")?);
    let start = u64::from_le_bytes(cursor.number("the offset")?);
    let start = usize::try_from(start).map_err(|_| format!("offset {start}"))?;
    let bytes = kind.block().map(|block| bytes(&shape, kind, block)).transpose()?;
    Ok(Info { shape, kind, start, bytes })
}

/// Bytes of a tensor. Its innermost axis is whole blocks.
pub(super) fn bytes(shape: &[usize], kind: Kind, [elements, bytes]: [usize; 2]) -> Result<usize, String> {
    let count = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    let columns = shape.last().copied().unwrap_or(1);
    let bytes =
        count.filter(|_| columns.is_multiple_of(elements)).and_then(|n| (n / elements).checked_mul(bytes));
    bytes.ok_or_else(|| {
        format!("{shape:?} is no size for {}, whose blocks have {elements} elements of a row", kind.name())
    })
}
