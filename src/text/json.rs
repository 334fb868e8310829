//! JSON files of a model's folder, and JSON as Python writes it.

use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io;
use std::path::Path;

/// Reads a file of JSON. A file that is not there is null.
pub(super) fn read(path: &Path) -> Result<Value> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Value::Null),
        text => text.map_err(|error| Error::io(path, error))?,
    };
    serde_json::from_str(&text)
        .map_err(|error| Error::format(path, format!("it is no JSON: {error}")).because_of(error))
}

/// The id of a token, or a list of them.
pub(super) fn ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(all) => all.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    }
}

/// Writes JSON in one line with the separators of items and keys.
struct Line<'a>([&'a str; 2]);

impl Line<'_> {
    fn item<W: ?Sized + io::Write>(&self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.0[0].as_bytes()) }
    }
}

impl Formatter for Line<'_> {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.0[1].as_bytes())
    }
}

/// Writes a value as Python's `json.dumps` does without escapes for characters. Separators are not used with an indent.
pub(super) fn written(
    value: &impl Serialize,
    indent: Option<usize>,
    separators: [&str; 2],
) -> serde_json::Result<String> {
    let mut out = Vec::new();
    match indent {
        Some(blanks) => {
            let blanks = " ".repeat(blanks.min(16));
            let form = PrettyFormatter::with_indent(blanks.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, form))?;
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Line(separators)))?,
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}
