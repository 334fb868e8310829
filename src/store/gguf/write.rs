//! Writes GGUF files atomically, with the same bytes for the same metadata and tensors.

use super::header::{ALIGNMENT, MOST_AXES, Value, bytes};
use super::types::{GgufType, Kind};
use crate::error::{Error, Result};
use crate::files;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// The version that is written.
const VERSION: u32 = 3;
/// Bytes of a tensor's name that llama.cpp reads, less the zero that it adds.
const LONGEST_NAME: usize = 63;

/// One tensor to be written.
pub struct Entry<'a> {
    name: String,
    kind: GgufType,
    shape: Vec<usize>,
    size: usize,
    data: Data<'a>,
}

enum Data<'a> {
    Bytes(Cow<'a, [u8]>),
    Lazy(Box<dyn FnOnce() -> Result<Vec<u8>> + 'a>),
}

impl<'a> Entry<'a> {
    /// A tensor of any type, from the bytes of its blocks. `shape` is from the outermost axis. All constructors panic if the
    /// data does not have the size of `shape`, if a row is no whole number of blocks, or for more than four axes.
    #[track_caller]
    pub fn bytes(
        name: impl Into<String>,
        kind: GgufType,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        let bytes = bytes.into();
        let has = bytes.len();
        let entry = Entry::new(name.into(), kind, shape, Data::Bytes(bytes));
        let (name, needs) = (&entry.name, entry.size);
        assert!(needs == has, "gguf: `{name}`: {kind} {shape:?} needs {needs} bytes, got {has}");
        entry
    }

    /// An F32 tensor.
    #[track_caller]
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        Entry::bytes(name, GgufType::F32, shape, bytemuck::cast_slice(values))
    }

    /// A tensor whose bytes are produced only when it is written, so that only one has to be in memory. If `produce` fails or
    /// returns another number of bytes than `shape` needs, [`save`] fails and leaves the old file intact.
    #[track_caller]
    pub fn lazy(
        name: impl Into<String>,
        kind: GgufType,
        shape: &[usize],
        produce: impl FnOnce() -> Result<Vec<u8>> + 'a,
    ) -> Self {
        Entry::new(name.into(), kind, shape, Data::Lazy(Box::new(produce)))
    }

    #[track_caller]
    fn new(name: String, kind: GgufType, shape: &[usize], data: Data<'a>) -> Self {
        assert!(shape.len() <= MOST_AXES, "gguf: `{name}`: {} axes, over {MOST_AXES}", shape.len());
        let size =
            bytes(shape, Kind::Read(kind), kind.block()).unwrap_or_else(|e| panic!("gguf: `{name}`: {e}"));
        Entry { name, kind, shape: shape.to_vec(), size, data }
    }
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({} {} {:?})", self.name, self.kind, self.shape)
    }
}

/// Writes a GGUF file of version 3 with an alignment of 32: first a temporary file beside it, which is synced to the disk and
/// then renamed over it, by the rules of [`files::replace()`]. On any error the old file is left intact.
///
/// Metadata and tensors are in the given order. The width of a number follows from its value, because [`Value`] does not have
/// it. A whole number is a u32 where it fits, and otherwise an i32, u64 or i64. Lists of them are of i32 first, as llama.cpp
/// wants its token types. A float is an f32 if that is exact, and an f64 otherwise.
///
/// # Errors
/// [`Error::Format`] for two tensors or two keys of one name, for a name that llama.cpp would not read, for another
/// `general.alignment` than 32, and for values that the format does not have: lists of several kinds, lists in lists, and
/// numbers of more than 64 bits. Those of [`files::replace()`] and of what produces the tensors.
///
/// ```
/// use tiebeam::store::gguf::{Entry, Gguf, Value, save};
/// let path = std::env::temp_dir().join(format!("tiebeam-save-{}.gguf", std::process::id()));
/// let metadata = [("general.name".to_string(), Value::Text("mine".into()))];
/// save(&path, &metadata, [Entry::f32("w", &[2, 1], &[0.5, 1.5])])?;
/// let file = Gguf::open(&path)?;
/// assert_eq!(file.text("general.name")?, "mine");
/// assert_eq!(file.tensor_f32("w")?, [0.5, 1.5]);
/// # std::fs::remove_file(path).ok();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn save<'a>(
    path: impl AsRef<Path>,
    metadata: &[(String, Value)],
    tensors: impl IntoIterator<Item = Entry<'a>>,
) -> Result<()> {
    let path = path.as_ref();
    let pairs = metadata.iter().map(|(key, value)| {
        if key == "general.alignment" && *value != Value::Integer(ALIGNMENT as i128) {
            return Err(format!("{key} is {value:?}; files are written with {ALIGNMENT}"));
        }
        Ok((key.clone(), encoded(value).map_err(|e| format!("{key}: {e}"))?))
    });
    let pairs = pairs.collect::<Result<Vec<_>, _>>().map_err(|message| Error::format(path, message))?;
    save_encoded(path, &pairs, tensors)
}

/// [`save`] with values that are [`encoded`], or that stood in another file so. None of them may be another alignment.
pub(crate) fn save_encoded<'a>(
    path: &Path,
    metadata: &[(String, Vec<u8>)],
    tensors: impl IntoIterator<Item = Entry<'a>>,
) -> Result<()> {
    let tensors: Vec<_> = tensors.into_iter().collect();
    let header = header(metadata, &tensors).map_err(|message| Error::format(path, message))?;
    files::replace(path, |file| write(path, file, &header, tensors))
}

/// The bytes of a value behind the number of its type.
pub(crate) fn encoded(value: &Value) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    put(&mut out, value)?;
    Ok(out)
}

fn header(metadata: &[(String, Vec<u8>)], tensors: &[Entry]) -> Result<Vec<u8>, String> {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let mut keys = BTreeSet::new();
    for (key, value) in metadata {
        if !keys.insert(key) {
            return Err(format!("two values have the key `{key}`"));
        }
        text(&mut out, key);
        out.extend(value);
    }
    let (mut names, mut offset) = (BTreeSet::new(), 0usize);
    for tensor in tensors {
        let name = &tensor.name;
        if !names.insert(name) {
            return Err(format!("two tensors are named `{name}`"));
        }
        if name.len() > LONGEST_NAME {
            return Err(format!("tensor `{name}`: names have at most {LONGEST_NAME} bytes"));
        }
        text(&mut out, name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
        out.extend(tensor.kind.number().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        let end = offset.checked_add(tensor.size).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        offset = end.ok_or_else(|| format!("tensor `{name}` takes the file beyond the address space"))?;
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    Ok(out)
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Appends a value behind its type.
fn put(out: &mut Vec<u8>, value: &Value) -> Result<(), String> {
    let Value::List(all) = value else {
        let kind = kind_of(std::slice::from_ref(value), false)?;
        out.extend(kind.to_le_bytes());
        return put_as(out, kind, value);
    };
    let kind = kind_of(all, true)?;
    out.extend([9, kind].map(u32::to_le_bytes).concat());
    out.extend((all.len() as u64).to_le_bytes());
    all.iter().try_for_each(|value| put_as(out, kind, value))
}

/// The number of the narrowest type that holds all values, which are of one kind.
fn kind_of(all: &[Value], list: bool) -> Result<u32, String> {
    let mixed = || Err("a list has values of several kinds, or lists".to_string());
    match all.first() {
        // The kind of nothing is free.
        None => Ok(5),
        Some(Value::Text(_)) if all.iter().all(|v| matches!(v, Value::Text(_))) => Ok(8),
        Some(Value::Bool(_)) if all.iter().all(|v| matches!(v, Value::Bool(_))) => Ok(7),
        Some(Value::Float(_)) => {
            let mut narrow = true;
            for value in all {
                let Value::Float(x) = value else { return mixed() };
                narrow &= x.is_nan() || f64::from(*x as f32) == *x;
            }
            Ok(if narrow { 6 } else { 12 })
        }
        Some(Value::Integer(_)) => {
            let (mut least, mut most) = (i128::MAX, i128::MIN);
            for value in all {
                let Value::Integer(n) = value else { return mixed() };
                (least, most) = (least.min(*n), most.max(*n));
            }
            let fits = |low: i128, high: i128| low <= least && most <= high;
            let [signed, unsigned] =
                [(fits(i32::MIN.into(), i32::MAX.into()), 5), (fits(0, u32::MAX.into()), 4)];
            let short = if list { [signed, unsigned] } else { [unsigned, signed] };
            let long = [(fits(0, u64::MAX.into()), 10), (fits(i64::MIN.into(), i64::MAX.into()), 11)];
            let found = short.into_iter().chain(long).find(|(fits, _)| *fits);
            found.map(|(_, kind)| kind).ok_or_else(|| "a whole number has more than 64 bits".into())
        }
        _ => mixed(),
    }
}

/// Appends one value as the type that [`kind_of`] chose for it.
fn put_as(out: &mut Vec<u8>, kind: u32, value: &Value) -> Result<(), String> {
    match (kind, value) {
        // Signed numbers keep their bits in the wider type that holds all of them.
        (4 | 5, Value::Integer(n)) => out.extend((*n as u32).to_le_bytes()),
        (10 | 11, Value::Integer(n)) => out.extend((*n as u64).to_le_bytes()),
        (6, Value::Float(x)) => out.extend((*x as f32).to_le_bytes()),
        (12, Value::Float(x)) => out.extend(x.to_le_bytes()),
        (7, Value::Bool(yes)) => out.push(u8::from(*yes)),
        (8, Value::Text(words)) => text(out, words),
        _ => return Err(format!("{value:?} is no value of type {kind}")),
    }
    Ok(())
}

/// Writes header and tensors, each filled up to the alignment. `path` is only used in error messages.
fn write(path: &Path, out: impl Write, header: &[u8], tensors: Vec<Entry<'_>>) -> Result<()> {
    let failed = |e: io::Error| Error::io(path, e);
    let mut out = BufWriter::with_capacity(1 << 20, out);
    out.write_all(header).map_err(failed)?;
    for tensor in tensors {
        let (name, need) = (tensor.name, tensor.size);
        let bytes = match tensor.data {
            Data::Bytes(bytes) => bytes,
            Data::Lazy(produce) => Cow::Owned(produce()?),
        };
        if bytes.len() != need {
            let (kind, shape, has) = (tensor.kind, tensor.shape, bytes.len());
            let message =
                format!("tensor `{name}`: {kind} {shape:?} needs {need} bytes, {has} were produced");
            return Err(Error::format(path, message));
        }
        out.write_all(&bytes).map_err(failed)?;
        let padding = need.next_multiple_of(ALIGNMENT) - need;
        out.write_all(&[0; ALIGNMENT][..padding]).map_err(failed)?;
    }
    out.flush().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::super::Gguf;
    use super::*;
    use crate::files::scratch::Folder;

    fn metadata() -> Vec<(String, Value)> {
        let integers = |all: &[i128]| Value::List(all.iter().map(|&n| Value::Integer(n)).collect());
        let texts = |all: &[&str]| Value::List(all.iter().map(|&t| Value::Text(t.into())).collect());
        let all = [
            ("general.architecture", Value::Text("llama".into())),
            ("general.alignment", Value::Integer(32)),
            ("llama.block_count", Value::Integer(u32::MAX.into())),
            ("small", Value::Integer(-7)),
            ("large", Value::Integer(u64::MAX.into())),
            ("least", Value::Integer(i64::MIN.into())),
            ("eps", Value::Float(f64::from(1e-5f32))),
            ("third", Value::Float(1.0 / 3.0)),
            ("yes", Value::Bool(true)),
            ("tokens", texts(&["a", "\u{120}b", ""])),
            ("types", integers(&[1, -3, 6])),
            ("counts", integers(&[1, u32::MAX.into()])),
            ("wide", integers(&[-1, u32::MAX.into()])),
            ("scores", Value::List(vec![Value::Float(0.5), Value::Float(-1.0)])),
            ("none", Value::List(Vec::new())),
        ];
        all.map(|(key, value)| (key.to_string(), value)).into()
    }

    fn tensors() -> Vec<Entry<'static>> {
        let blocks: Vec<u8> = (0..3 * 34u8).map(|i| i & 0x3b).collect();
        vec![
            Entry::f32("norm", &[3], &[1.0, -0.0, 2.5]),
            Entry::bytes("w", GgufType::Q8_0, &[3, 32], blocks),
            Entry::lazy("late", GgufType::F16, &[2, 1, 1], || Ok(vec![0, 0x3c, 0, 0xbc])),
            Entry::f32("scalar", &[], &[7.0]),
            Entry::f32("empty", &[0, 4], &[]),
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = Folder::new("gguf-write");
        let path = folder.join("m.gguf");
        save(&path, &metadata(), tensors()).unwrap();
        let file = Gguf::open(&path).unwrap();
        assert_eq!(file.metadata(), &metadata().into_iter().collect());
        assert_eq!(file.names().count(), 5);
        assert_eq!(file.tensor_f32("norm").unwrap()[1].to_bits(), (-0.0f32).to_bits());
        assert_eq!((file.shape("w").unwrap(), file.kind("w").unwrap()), (&[3, 32][..], GgufType::Q8_0));
        assert_eq!(file.bytes_of("w").unwrap()[101], 101 & 0x3b);
        assert_eq!(
            (file.shape("late").unwrap(), file.tensor_f32("late").unwrap()),
            (&[2, 1, 1][..], vec![1.0, -1.0])
        );
        assert_eq!(file.tensor_f32("scalar").unwrap(), [7.0]);
        assert_eq!(file.shape("empty").unwrap(), [0, 4]);
        let first = std::fs::read(&path).unwrap();
        assert!(first.len().is_multiple_of(32));
        save(&path, &metadata(), tensors()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), first);
        assert_eq!(folder.names(), ["m.gguf"]);
    }

    #[test]
    fn failure_leaves_the_old_file() {
        let folder = Folder::new("gguf-failure");
        let path = folder.join("m.gguf");
        save(&path, &[], tensors()).unwrap();
        let old = std::fs::read(&path).unwrap();
        let says = |metadata: &[(String, Value)], tensors: Vec<Entry>, what: &str| {
            let error = save(&path, metadata, tensors).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        let one = |value: Value| [("key".to_string(), value)];
        let lost = || Err(Error::device("lost"));
        let short = Entry::lazy("z", GgufType::F16, &[2], || Ok(vec![0]));
        says(&[], vec![short], "tensor `z`: F16 [2] needs 4 bytes, 1 were produced");
        says(&[], vec![Entry::f32("a", &[0], &[]), Entry::lazy("z", GgufType::F32, &[1], lost)], "lost");
        says(&[], vec![Entry::f32("a", &[0], &[]), Entry::f32("a", &[0], &[])], "two tensors are named `a`");
        says(&[], vec![Entry::f32("n".repeat(64), &[0], &[])], "at most 63 bytes");
        says(&[metadata(), metadata()].concat(), vec![], "two values have the key `general.architecture`");
        says(&[("general.alignment".to_string(), Value::Integer(64))], vec![], "written with 32");
        says(&one(Value::Integer(1 << 64)), vec![], "key: a whole number has more than 64 bits");
        let mixed = vec![Value::Integer(1), Value::Bool(true)];
        says(&one(Value::List(mixed)), vec![], "key: a list has values of several kinds");
        says(&one(Value::List(vec![Value::List(Vec::new())])), vec![], "key: a list has values of several");
        assert_eq!(std::fs::read(&path).unwrap(), old);
        assert_eq!(folder.names(), ["m.gguf"]);
    }

    #[test]
    #[should_panic(
        expected = "gguf: `w`: [2, 48] is no size for Q4_0, whose blocks have 32 elements of a row"
    )]
    fn wrong_size_panics() {
        Entry::lazy("w", GgufType::Q4_0, &[2, 48], || Ok(Vec::new()));
    }
}
