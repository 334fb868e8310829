//! The JSON header of a safetensors file: a writer, and a strict reader whose errors name the tensor at fault.
//!
//! The reference implementation, the crate `safetensors`, keeps the last of two tensors of one name, accepts a list in place of an
//! object, and does not say which tensor has the wrong size. This reader refuses the first two and names the tensor. A test checks
//! that the reference accepts every file that this reader accepts. As the reference does, it reads `"__metadata__": null` as no
//! metadata, and passes over fields of a tensor that the format does not have. Their names are kept, so that a caller can tell.

use serde::de::value::Error as NameError;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, IntoDeserializer, MapAccess, Visitor};
use serde::{Serialize, Serializer};
use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use super::FileDType;

/// The longest header that readers of this format accept.
pub(super) const MAX_BYTES: u64 = 100_000_000;
/// The one key of the header that is not a tensor.
pub(super) const METADATA: &str = "__metadata__";

/// What the header says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The element type in the file.
    pub dtype: FileDType,
    /// The sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where the bytes are, counted from the end of the header.
    pub(super) range: Range<usize>,
}

/// A header: tensors and metadata, both by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub tensors: BTreeMap<String, Info>,
    pub metadata: BTreeMap<String, String>,
    /// Fields of tensors that the format does not have.
    pub unknown: BTreeSet<String>,
}

/// Returns the bytes of a tensor, or `None` if they overflow or end inside a byte.
pub(super) fn tensor_bytes(dtype: FileDType, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
    let bits = elements.checked_mul(dtype.bits())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

impl Header {
    /// Reads the header of a file with `data_bytes` bytes after it, and checks it for consistency.
    pub fn parse(text: &str, data_bytes: usize) -> Result<Header, String> {
        let Object(header) = serde_json::from_str::<Object<Header>>(text).map_err(|e| told(&e, text))?;
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

    /// Returns the header's bytes, padded with spaces to a multiple of 8: metadata and then tensors in the given order.
    ///
    /// # Errors
    /// Those of `serde_json`. It has none for texts and numbers that are written to memory.
    pub fn write<'a>(
        metadata: &'a BTreeMap<String, String>,
        tensors: impl Iterator<Item = (&'a str, FileDType, &'a [usize], Range<usize>)>,
    ) -> serde_json::Result<Vec<u8>> {
        let notes = (!metadata.is_empty()).then_some((METADATA, Member::Notes(metadata)));
        let tensors = tensors.map(|(name, dtype, shape, Range { start, end })| {
            (name, Member::Tensor(Description { dtype, shape, data_offsets: [start, end] }))
        });
        let mut text = Vec::new();
        serde_json::Serializer::new(&mut text).collect_map(notes.into_iter().chain(tensors))?;
        text.resize(text.len().next_multiple_of(8), b' ');
        Ok(text)
    }
}

/// The value of one member of the header's JSON object.
#[derive(Serialize)]
#[serde(untagged)]
enum Member<'a> {
    Notes(&'a BTreeMap<String, String>),
    Tensor(Description<'a>),
}

/// The description of a tensor as it is written, with the field names of the format.
#[derive(Serialize)]
struct Description<'a> {
    dtype: FileDType,
    shape: &'a [usize],
    data_offsets: [usize; 2],
}

/// The description of a tensor as it is read.
struct Tensor {
    dtype: FileDType,
    shape: Vec<usize>,
    data_offsets: Vec<usize>,
    unknown: Vec<String>,
}

/// Reads a type from its name. serde's derived reader would also accept an object whose key is the name.
struct Named(FileDType);

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Named, D::Error> {
        let name = String::deserialize(deserializer)?;
        let known: Result<FileDType, NameError> = FileDType::deserialize(name.as_str().into_deserializer());
        known.map(Named).map_err(|_| D::Error::custom(format!("unknown dtype `{name}`")))
    }
}

/// A type that is read from a JSON object only.
trait FromObject: Sized {
    /// The type's name in errors.
    const WHAT: &str;

    fn read<'de, A: MapAccess<'de>>(members: A) -> Result<Self, A::Error>;
}

/// Makes a [`FromObject`] readable by serde.
struct Object<T>(T);

impl<'de, T: FromObject> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object<T>, D::Error> {
        deserializer.deserialize_map(Members(PhantomData)).map(Object)
    }
}

struct Members<T>(PhantomData<T>);

impl<'de, T: FromObject> Visitor<'de> for Members<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::WHAT)
    }

    fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<T, A::Error> {
        T::read(members)
    }
}

impl FromObject for Tensor {
    const WHAT: &str = "an object with `dtype`, `shape` and `data_offsets`";

    fn read<'de, A: MapAccess<'de>>(mut members: A) -> Result<Self, A::Error> {
        let (mut dtype, mut shape, mut data_offsets, mut unknown) = (None, None, None, Vec::new());
        while let Some(field) = members.next_key::<String>()? {
            let twice = match field.as_str() {
                "dtype" => dtype.replace(members.next_value::<Named>()?.0).is_some(),
                "shape" => shape.replace(members.next_value()?).is_some(),
                "data_offsets" => data_offsets.replace(members.next_value()?).is_some(),
                _ => {
                    members.next_value::<IgnoredAny>()?;
                    unknown.push(field.clone());
                    false
                }
            };
            if twice {
                return Err(A::Error::custom(format!("duplicate field `{field}`")));
            }
        }
        Ok(Tensor {
            dtype: dtype.ok_or_else(|| A::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| A::Error::missing_field("shape"))?,
            data_offsets: data_offsets.ok_or_else(|| A::Error::missing_field("data_offsets"))?,
            unknown,
        })
    }
}

impl FromObject for BTreeMap<String, String> {
    const WHAT: &str = "an object of texts";

    fn read<'de, A: MapAccess<'de>>(mut members: A) -> Result<Self, A::Error> {
        let mut all = BTreeMap::new();
        while let Some((name, text)) = members.next_entry::<String, String>()? {
            match all.entry(name) {
                Vacant(place) => drop(place.insert(text)),
                Occupied(place) => {
                    return Err(A::Error::custom(format!("`{}` twice", place.key())));
                }
            }
        }
        Ok(all)
    }
}

impl FromObject for Header {
    const WHAT: &str = "an object of tensors by name";

    fn read<'de, A: MapAccess<'de>>(mut members: A) -> Result<Self, A::Error> {
        let (mut header, mut metadata) = (Header::default(), None);
        while let Some(name) = members.next_key::<String>()? {
            if name == METADATA {
                let wrong = |e| A::Error::custom(format!("`{METADATA}`: {e}"));
                let texts: Option<Object<BTreeMap<_, _>>> = members.next_value().map_err(wrong)?;
                let texts = texts.map(|Object(texts)| texts).unwrap_or_default();
                if metadata.replace(texts).is_some() {
                    return Err(A::Error::custom(format!("`{METADATA}` is in the header twice")));
                }
                continue;
            }
            let of_tensor = |what: &dyn fmt::Display| A::Error::custom(format!("tensor `{name}`: {what}"));
            let Object(Tensor { dtype, shape, data_offsets, unknown }) =
                members.next_value().map_err(|e| of_tensor(&e))?;
            header.unknown.extend(unknown);
            let [start, end] = data_offsets[..] else {
                return Err(of_tensor(&format!("data_offsets {data_offsets:?} are not a begin and an end")));
            };
            let info = Info { dtype, shape, range: start..end };
            match header.tensors.entry(name) {
                Vacant(place) => drop(place.insert(info)),
                Occupied(place) => {
                    return Err(A::Error::custom(format!("tensor `{}` is in the header twice", place.key())));
                }
            }
        }
        header.metadata = metadata.unwrap_or_default();
        Ok(header)
    }
}

/// Returns the error's text with its position in bytes. serde's line number is useless, because a header is usually one line.
fn told(error: &serde_json::Error, text: &str) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let Some(what) = message.strip_suffix(&place) else { return message };
    let before: usize = text.split_inclusive('\n').take(error.line() - 1).map(str::len).sum();
    format!("{what}, at byte {} of the header", before + error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_survive() {
        for text in ["", "a.b", "\"\\/\u{8}\u{c}\n\r\t\u{0}\u{1f}\u{7f}", "größe", "🦀\u{10ffff}"] {
            let metadata = BTreeMap::from([(text.to_string(), text.to_string())]);
            let bytes = Header::write(&metadata, [(text, FileDType::U8, &[][..], 0..1)].into_iter()).unwrap();
            let header = Header::parse(std::str::from_utf8(&bytes).unwrap(), 1).unwrap();
            assert!(header.tensors.contains_key(text), "{text:?}");
            assert_eq!(header.metadata, metadata);
        }
        let read = |text: &str| {
            let header = Header::parse(&format!("{{\"__metadata__\":{{\"\":{text}}}}}"), 0)?;
            Ok::<_, String>(header.metadata[""].clone())
        };
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
    fn what_the_reference_passes_over_is_passed_over_and_named() {
        let text = r#"{"__metadata__":null,"w":{"strides":[1],"dtype":"U8","shape":[1],"data_offsets":[0,1],"a":{"b":2}}}"#;
        let header = Header::parse(text, 1).unwrap();
        assert_eq!(header.metadata, BTreeMap::new());
        assert_eq!(header.unknown, BTreeSet::from(["a".to_string(), "strides".to_string()]));
        assert_eq!(header.tensors["w"], Info { dtype: FileDType::U8, shape: vec![1], range: 0..1 });
    }

    #[test]
    fn errors_say_where_in_the_header() {
        let told = |text: &str| Header::parse(text, 0).unwrap_err();
        assert_eq!(told("{}x"), "trailing characters, at byte 3 of the header");
        assert_eq!(
            told("{\n\n \"w\":3}"),
            "tensor `w`: invalid type: integer `3`, expected an object with \
            `dtype`, `shape` and `data_offsets`, at byte 9 of the header"
        );
    }

    #[test]
    fn written_headers_are_read_back() {
        let metadata =
            BTreeMap::from([("k\n".to_string(), "\"v\"".to_string()), (String::new(), String::new())]);
        let tensors = [("b", FileDType::F16, &[3, 1][..], 0..6), ("a", FileDType::U8, &[], 6..7)];
        let written = String::from_utf8(Header::write(&metadata, tensors.into_iter()).unwrap()).unwrap();
        assert_eq!(written.len() % 8, 0);
        let header = Header::parse(&written, 7).unwrap();
        assert_eq!(header.metadata, metadata);
        assert_eq!(header.tensors["b"], Info { dtype: FileDType::F16, shape: vec![3, 1], range: 0..6 });
        assert_eq!(header.tensors["a"], Info { dtype: FileDType::U8, shape: vec![], range: 6..7 });
        assert_eq!(Header::write(&BTreeMap::new(), [].into_iter()).unwrap(), b"{}      ");
    }
}
