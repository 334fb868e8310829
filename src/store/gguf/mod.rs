//! Reads and writes GGUF, the file format of llama.cpp: metadata, tokenizer and quantised weights in one file.
//!
//! Layout (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): magic `GGUF`, version and counts, then key-value pairs,
//! tensor infos (name, sizes from the innermost, type, offset) and the data, aligned. Numbers are little-endian. A header with a
//! size beyond the end of the file is refused before anything is read or allocated by that size.

mod blocks;
mod conversion;
mod header;
mod repack;
#[cfg(test)]
mod tests;
mod types;
mod write;

use crate::error::{Error, Result};
use crate::share::packed::Packing;
use header::{Header, Info};
use memmap2::Mmap;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use conversion::{Conversion, Place};
pub use header::Value;
pub use repack::repack;
pub use types::GgufType;
pub use write::{Entry, save};
pub(crate) use write::{encoded, save_encoded};

/// A mapped GGUF file.
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl Gguf {
    /// Maps the file and reads its header. Tensors of types that are not supported are listed, and an error when they are read.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read. [`Error::Format`] for another format or version, a big-endian file, a part of
    /// a model in several files, an inconsistent header or a truncated file.
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf> {
        let path = path.as_ref().to_path_buf();
        let file = std::fs::File::open(&path).map_err(|e| Error::io(&path, e))?;
        // SAFETY: the map is only read as bytes, and its content is checked before use. As with every map, no program may
        // truncate the file while it is open.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let header = header::parse(&map).map_err(|message| Error::format(&path, message))?;
        Ok(Gguf { path, map, header })
    }

    /// The file's path, for messages.
    #[cfg(feature = "text")]
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// All metadata.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.header.metadata
    }

    /// All metadata as [`encoded`] values, with the types that they have in the file.
    pub(crate) fn encoded(&self) -> BTreeMap<String, Vec<u8>> {
        let places = self.header.places.iter();
        places.map(|(key, place)| (key.clone(), self.map[place.clone()].to_vec())).collect()
    }

    fn missing(&self, key: &str, what: &str) -> Error {
        Error::format(&self.path, format!("metadata has no {what} `{key}`"))
    }

    /// A whole number of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not a whole number of 0 or more.
    pub fn number(&self, key: &str) -> Result<usize> {
        match self.header.metadata.get(key) {
            Some(Value::Integer(n)) => usize::try_from(*n).map_err(|_| self.missing(key, "usable number")),
            Some(Value::List(_)) => {
                Err(Error::format(&self.path, format!("`{key}` is a list, where one number is read")))
            }
            _ => Err(self.missing(key, "number")),
        }
    }

    /// A float of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not a float.
    pub fn float(&self, key: &str) -> Result<f64> {
        match self.header.metadata.get(key) {
            Some(Value::Float(x)) => Ok(*x),
            _ => Err(self.missing(key, "float")),
        }
    }

    /// A text of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not text.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.header.metadata.get(key) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(self.missing(key, "text")),
        }
    }

    /// A list of texts of the metadata.
    ///
    /// # Errors
    /// [`Error::Format`] when the key is missing or its value is not a list of texts.
    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let Some(Value::List(all)) = self.header.metadata.get(key) else {
            return Err(self.missing(key, "list"));
        };
        all.iter().map(Value::text).collect::<Option<_>>().ok_or_else(|| self.missing(key, "list of texts"))
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    fn info(&self, name: &str) -> Result<&Info> {
        self.header
            .tensors
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

    fn wrong(&self, name: &str, message: impl std::fmt::Display) -> Error {
        Error::format(&self.path, format!("tensor `{name}`: {message}"))
    }

    /// Bytes that a tensor takes in the file.
    ///
    /// # Errors
    /// [`Error::Format`] when there is no tensor of this name, or its type has an unknown number.
    pub fn bytes(&self, name: &str) -> Result<usize> {
        let info = self.info(name)?;
        info.bytes.ok_or_else(|| self.wrong(name, info.kind.read().err().unwrap_or_default()))
    }

    /// The type of a tensor.
    ///
    /// # Errors
    /// [`Error::Format`] when there is no tensor of this name, or its type is not supported. The message names the type.
    pub fn kind(&self, name: &str) -> Result<GgufType> {
        self.info(name)?.kind.read().map_err(|message| self.wrong(name, message))
    }

    /// The name of a tensor's type, supported or not. A type with an unknown number is `unknown`.
    ///
    /// # Errors
    /// [`Error::Format`] when there is no tensor of this name.
    pub fn kind_name(&self, name: &str) -> Result<&'static str> {
        Ok(self.info(name)?.kind.name())
    }

    /// The bytes of a tensor as stored in the file.
    ///
    /// # Errors
    /// As [`Gguf::bytes`].
    pub fn bytes_of(&self, name: &str) -> Result<&[u8]> {
        let (start, bytes) = (self.info(name)?.start, self.bytes(name)?);
        // In range, since the header was checked against the file.
        Ok(&self.map[start..start + bytes])
    }

    /// Reads a tensor's elements, dequantised.
    ///
    /// # Errors
    /// As [`Gguf::kind`].
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>> {
        let kind = self.kind(name)?;
        let mut out = Vec::with_capacity(self.shape(name)?.iter().product());
        blocks::decode(kind, self.bytes_of(name)?, &mut out);
        Ok(out)
    }

    /// [`Gguf::tensor_f32`] of a range of rows, so that a large tensor can be read in pieces. Columns are the innermost axis, and
    /// rows all the others.
    ///
    /// # Errors
    /// As [`Gguf::kind`], and when the tensor has fewer rows.
    pub fn rows_f32(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let (kind, shape) = (self.kind(name)?, self.shape(name)?);
        let (columns, outer) = shape.split_last().map_or((1, shape), |(last, outer)| (*last, outer));
        let all: usize = outer.iter().product();
        if rows.start > rows.end || rows.end > all {
            return Err(self.wrong(name, format!("rows {rows:?} were asked for, it has {all}")));
        }
        let [elements, size] = kind.block();
        let row = columns / elements * size;
        let mut out = Vec::with_capacity(rows.len() * columns);
        blocks::decode(kind, &self.bytes_of(name)?[rows.start * row..rows.end * row], &mut out);
        Ok(out)
    }

    /// Reads a quantised tensor in the layout of packed matrices: its packing, rows and columns, and the words of all rows.
    /// Columns are the innermost axis, and rows all the others.
    ///
    /// # Errors
    /// As [`Gguf::kind`], for a tensor of floats, and for a scale that is NaN or infinite. The message names row and column.
    pub fn packed(&self, name: &str) -> Result<(Packing, [usize; 2], Vec<u32>)> {
        let (packing, [rows, columns]) = self.packing(name)?;
        Ok((packing, [rows, columns], self.packed_rows(name, 0..rows)?))
    }

    /// How [`Gguf::packed`] packs a tensor, and its rows and columns. Nothing is read.
    ///
    /// # Errors
    /// As [`Gguf::kind`], and for a tensor of floats.
    pub fn packing(&self, name: &str) -> Result<(Packing, [usize; 2])> {
        let kind = self.kind(name)?;
        let packing = kind.packing().ok_or_else(|| {
            self.wrong(name, format!("{kind} is not quantised; read it as floats by `tensor_f32`"))
        })?;
        let shape = self.shape(name)?;
        let (columns, outer) = shape.split_last().map_or((1, shape), |(last, outer)| (*last, outer));
        Ok((packing, [outer.iter().product(), columns]))
    }

    /// [`Gguf::packed`] of a range of rows, so that a large tensor can be read in pieces.
    ///
    /// # Errors
    /// As [`Gguf::packed`], and when the tensor has fewer rows.
    pub fn packed_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<u32>> {
        let (_, [all, columns]) = self.packing(name)?;
        if rows.start > rows.end || rows.end > all {
            return Err(self.wrong(name, format!("rows {rows:?} were asked for, it has {all}")));
        }
        let kind = self.kind(name)?;
        let [elements, size] = kind.block();
        let row = columns / elements * size;
        let bytes = &self.bytes_of(name)?[rows.start * row..rows.end * row];
        match broken_scale(kind, bytes) {
            Some(block) => {
                let (block, blocks) = (block + rows.start * (columns / elements), columns / elements);
                let (r, c) = (block / blocks, block % blocks * elements);
                Err(self.wrong(
                    name,
                    format!(
                        "the scale in row {r} at column {c} is NaN or infinite; the file is damaged, or what wrote it \
                         failed"
                    ),
                ))
            }
            None => Ok(repack(kind, bytes, columns)),
        }
    }
}

/// The first block with a scale that is NaN or infinite: those whose exponent is all ones.
fn broken_scale(kind: GgufType, bytes: &[u8]) -> Option<usize> {
    let [_, size] = kind.block();
    let broken = |block: &[u8]| kind.halves().iter().any(|&at| block[at + 1] & 0x7c == 0x7c);
    bytes.chunks_exact(size).position(broken)
}
