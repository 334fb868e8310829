//! The JSON header of a safetensors file: a strict reader, whose errors name the tensor at fault, and a writer.
//!
//! The `safetensors` crate reads headers too, but of two tensors with one name it keeps the last, and it does not say which
//! tensor has the wrong size. [`super::File`] checks with both.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::ops::Range;

use super::FileDType;

/// The longest header that readers of this format accept.
pub(super) const MAX_BYTES: u64 = 100_000_000;
/// The only key of the header that is not a tensor's name.
pub(super) const METADATA: &str = "__metadata__";

/// The header's entry for one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The element type in the file.
    pub dtype: FileDType,
    /// The sizes, outermost first. Empty for a scalar.
    pub shape: Vec<usize>,
    /// The range of its bytes, counted from the end of the header.
    pub(super) range: Range<usize>,
}

/// A header: tensors and metadata, both by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub tensors: BTreeMap<String, Info>,
    pub metadata: BTreeMap<String, String>,
}

/// Every type of the format. The `safetensors` crate can print their names but not parse them.
const DTYPES: [FileDType; 22] = [
    FileDType::F32,
    FileDType::F16,
    FileDType::BF16,
    FileDType::F64,
    FileDType::U32,
    FileDType::I32,
    FileDType::U64,
    FileDType::I64,
    FileDType::U16,
    FileDType::I16,
    FileDType::U8,
    FileDType::I8,
    FileDType::BOOL,
    FileDType::C64,
    FileDType::F8_E5M2,
    FileDType::F8_E4M3,
    FileDType::F8_E8M0,
    FileDType::F8_E4M3FNUZ,
    FileDType::F8_E5M2FNUZ,
    FileDType::F6_E2M3,
    FileDType::F6_E3M2,
    FileDType::F4,
];

/// Returns the bytes of a tensor, or `None` if they overflow or end inside a byte.
pub(super) fn tensor_bytes(dtype: FileDType, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

impl Header {
    /// Reads the header of a file with `data_bytes` bytes after it, and checks it for consistency.
    pub fn parse(text: &str, data_bytes: usize) -> Result<Header, String> {
        let mut reader = Reader { text, at: 0 };
        let mut header = Header::default();
        let mut metadata_seen = false;
        reader.object(|reader, name| {
            if name == METADATA {
                if std::mem::replace(&mut metadata_seen, true) {
                    return Err(reader.wrong(&format!("`{METADATA}` twice")));
                }
                return reader.metadata(&mut header.metadata);
            }
            let info = reader.tensor().map_err(|message| format!("tensor `{name}`: {message}"))?;
            match header.tensors.entry(name) {
                Vacant(place) => drop(place.insert(info)),
                Occupied(place) => return Err(format!("tensor `{}` is in the header twice", place.key())),
            }
            Ok(())
        })?;
        reader.space();
        if reader.at != text.len() {
            return Err(reader.wrong("the header should end here"));
        }
        header.check(data_bytes)?;
        Ok(header)
    }

    /// Checks that byte ranges match shapes, and that the tensors cover the data without overlaps or gaps.
    fn check(&self, data_bytes: usize) -> Result<(), String> {
        for (name, Info { dtype, shape, range }) in &self.tensors {
            let Range { start, end } = *range;
            if start > end || end > data_bytes {
                let range = format!("data_offsets [{start}, {end}]");
                return Err(format!(
                    "tensor `{name}`: {range} are not in the file's {data_bytes} bytes of data"
                ));
            }
            let Some(bytes) = tensor_bytes(*dtype, shape) else {
                return Err(format!(
                    "tensor `{name}`: {dtype} {shape:?} is no whole number of bytes below 2^64"
                ));
            };
            if bytes != end - start {
                let has = end - start;
                return Err(format!(
                    "tensor `{name}`: {dtype} {shape:?} takes {bytes} bytes, data_offsets give {has}"
                ));
            }
        }
        let mut order: Vec<_> = self.tensors.iter().collect();
        order.sort_by_key(|(_, info)| (info.range.start, info.range.end));
        let (mut covered, mut before) = (0, "the header");
        for (name, Info { range, .. }) in order {
            if range.start < covered {
                return Err(format!("tensor `{name}` starts at byte {}, inside `{before}`", range.start));
            }
            if range.start > covered {
                return Err(format!(
                    "tensor `{name}` starts at byte {}, {before} ends at {covered}",
                    range.start
                ));
            }
            (covered, before) = (range.end, name);
        }
        if covered != data_bytes {
            return Err(format!(
                "{before} ends at byte {covered} of {data_bytes} bytes of data; the rest is nobody's"
            ));
        }
        Ok(())
    }

    /// Returns the header as text: metadata, then tensors in the given order, padded with spaces to a multiple of 8 bytes.
    pub fn write<'a>(
        metadata: &BTreeMap<String, String>,
        tensors: impl Iterator<Item = (&'a str, FileDType, &'a [usize], Range<usize>)>,
    ) -> String {
        let mut members = Vec::new();
        if !metadata.is_empty() {
            let texts: Vec<_> = metadata.iter().map(|(k, v)| format!("{}:{}", quote(k), quote(v))).collect();
            members.push(format!("\"{METADATA}\":{{{}}}", texts.join(",")));
        }
        for (name, dtype, shape, Range { start, end }) in tensors {
            let shape = shape.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
            let info =
                format!("{{\"dtype\":\"{dtype}\",\"shape\":[{shape}],\"data_offsets\":[{start},{end}]}}");
            members.push(format!("{}:{info}", quote(name)));
        }
        let mut text = format!("{{{}}}", members.join(","));
        text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
        text
    }
}

/// Returns `text` as a JSON string.
fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            '\0'..='\u{1f}' => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            _ => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// A reader of the part of JSON that a header may use: objects, strings, and lists of natural numbers.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl Reader<'_> {
    fn wrong(&self, what: &str) -> String {
        format!("byte {} of the header: {what}", self.at)
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Skips whitespace, then takes `byte` if it is next. Returns whether it was.
    fn take(&mut self, byte: u8) -> bool {
        self.space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), String> {
        if self.take(byte) { Ok(()) } else { Err(self.wrong(&format!("expected `{}`", char::from(byte)))) }
    }

    /// Reads `{"name": value, ...}`, with `value` read by `member`.
    fn object(
        &mut self,
        mut member: impl FnMut(&mut Self, String) -> Result<(), String>,
    ) -> Result<(), String> {
        self.expect(b'{')?;
        if self.take(b'}') {
            return Ok(());
        }
        loop {
            let name = self.string()?;
            self.expect(b':')?;
            member(self, name)?;
            if !self.take(b',') {
                return self.expect(b'}');
            }
        }
    }

    fn metadata(&mut self, into: &mut BTreeMap<String, String>) -> Result<(), String> {
        self.object(|reader, name| {
            let text = reader.string()?;
            match into.entry(name) {
                Vacant(place) => drop(place.insert(text)),
                Occupied(place) => return Err(format!("`{}` is in the metadata twice", place.key())),
            }
            Ok(())
        })
    }

    fn tensor(&mut self) -> Result<Info, String> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        self.object(|reader, field| {
            let twice = match field.as_str() {
                "dtype" => {
                    let name = reader.string()?;
                    let known = DTYPES.into_iter().find(|dtype| dtype.to_string() == name);
                    dtype.replace(known.ok_or_else(|| format!("unknown dtype `{name}`"))?).is_some()
                }
                "shape" => shape.replace(reader.naturals()?).is_some(),
                "data_offsets" => offsets.replace(reader.naturals()?).is_some(),
                _ => return Err(format!("unknown field `{field}`")),
            };
            if twice { Err(format!("`{field}` twice")) } else { Ok(()) }
        })?;
        let missing = |field: &str| format!("no `{field}`");
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;
        let [start, end] = offsets[..] else {
            return Err(format!("data_offsets {offsets:?} are not a begin and an end"));
        };
        let (dtype, shape) = (dtype.ok_or_else(|| missing("dtype"))?, shape.ok_or_else(|| missing("shape"))?);
        Ok(Info { dtype, shape, range: start..end })
    }

    /// Reads `[natural, ...]`.
    fn naturals(&mut self) -> Result<Vec<usize>, String> {
        let mut numbers = Vec::new();
        self.expect(b'[')?;
        if self.take(b']') {
            return Ok(numbers);
        }
        loop {
            self.space();
            let rest = &self.text[self.at..];
            let digits = &rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())];
            // JSON allows no leading zeros. A fraction or exponent behind the digits fails at the comma below.
            let number = digits.parse().ok().filter(|_| digits == "0" || !digits.starts_with('0'));
            numbers.push(number.ok_or_else(|| self.wrong("expected a natural number below 2^64"))?);
            self.at += digits.len();
            if !self.take(b',') {
                self.expect(b']')?;
                return Ok(numbers);
            }
        }
    }

    fn string(&mut self) -> Result<String, String> {
        self.expect(b'"')?;
        let mut string = String::new();
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.find(|c: char| c == '"' || c == '\\' || c < ' ').unwrap_or(rest.len());
            string.push_str(&rest[..plain]);
            self.at += plain;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(string);
                }
                Some(b'\\') => {
                    self.at += 1;
                    string.push(self.escape()?);
                }
                _ => return Err(self.wrong("a string without end")),
            }
        }
    }

    /// Reads the rest of an escape, behind its backslash.
    fn escape(&mut self) -> Result<char, String> {
        let kind = self.peek();
        self.at += 1;
        Ok(match kind {
            Some(c @ (b'"' | b'\\' | b'/')) => char::from(c),
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'u') => {
                let mut code = self.hex()?;
                // A character above 16 bits is written as two surrogates.
                if (0xd800..0xdc00).contains(&code) && self.text[self.at..].starts_with("\\u") {
                    self.at += 2;
                    let low = self.hex()?;
                    code = if (0xdc00..0xe000).contains(&low) {
                        0x1_0000 + ((code - 0xd800) << 10) + (low - 0xdc00)
                    } else {
                        code
                    };
                }
                char::from_u32(code).ok_or_else(|| self.wrong("half of a surrogate pair"))?
            }
            _ => {
                self.at -= 1;
                return Err(self.wrong("an unknown escape"));
            }
        })
    }

    /// Reads four hexadecimal digits.
    fn hex(&mut self) -> Result<u32, String> {
        let digits = self.text.get(self.at..self.at + 4).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let code = code.ok_or_else(|| self.wrong("expected four hexadecimal digits"))?;
        self.at += 4;
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_is_known_once() {
        let mut names: Vec<_> = DTYPES.iter().map(FileDType::to_string).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 22);
    }

    #[test]
    fn strings_survive() {
        for text in ["", "a.b", "\"\\/\u{8}\u{c}\n\r\t\u{0}\u{1f}\u{7f}", "größe", "🦀\u{10ffff}"] {
            let quoted = quote(text);
            let mut reader = Reader { text: &quoted, at: 0 };
            assert_eq!(reader.string().as_deref(), Ok(text));
            assert_eq!(reader.at, quoted.len());
        }
        let read = |text| Reader { text, at: 0 }.string();
        assert_eq!(read(r#""\u00e9\ud83e\uDD80\/""#).as_deref(), Ok("é🦀/"));
        for bad in [
            "\"",
            "\"\\",
            "\"\\u",
            "\"\\u12",
            "\"\\u+123\"",
            "\"\\x\"",
            "\"\n\"",
            "a",
            "",
            "\"\\é",
            "\"\\u00é\"",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        for bad in [r#""\ud83e""#, r#""\udd80""#, r#""\ud83e\u0041""#] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn written_headers_are_read_back() {
        let metadata =
            BTreeMap::from([("k\n".to_string(), "\"v\"".to_string()), (String::new(), String::new())]);
        let tensors = [("b", FileDType::F16, &[3, 1][..], 0..6), ("a", FileDType::U8, &[], 6..7)];
        let text = Header::write(&metadata, tensors.iter().cloned());
        assert_eq!(text.len() % 8, 0);
        let header = Header::parse(&text, 7).unwrap();
        assert_eq!(header.metadata, metadata);
        assert_eq!(header.tensors["b"], Info { dtype: FileDType::F16, shape: vec![3, 1], range: 0..6 });
        assert_eq!(header.tensors["a"], Info { dtype: FileDType::U8, shape: vec![], range: 6..7 });
        assert_eq!(Header::write(&BTreeMap::new(), [].into_iter()).trim_end(), "{}");
    }
}
