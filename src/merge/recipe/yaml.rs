//! Parses YAML configurations into JSON values. A file must be one document without repeated keys. Anchors, aliases and merge keys
//! (`<<`) are resolved.

use crate::error::{Error, Result};
use saphyr_parser::{Event, Parser, ScalarStyle, Span};
use serde_json::{Map, Number, Value};
use std::collections::{BTreeMap, BTreeSet};

/// Most levels of nesting.
const DEPTH: usize = 64;

/// Most values that aliases may stand for together. A short text could stand for any number otherwise.
const COPIES: usize = 100_000;

/// A list or map that is still open, with the number of its anchor, or 0.
enum Open {
    List(Vec<Value>, usize),
    Map(OpenMap, usize),
}

#[derive(Default)]
struct OpenMap {
    all: Map<String, Value>,
    /// The key whose value comes next.
    key: Option<String>,
    /// The maps under merge keys, whose members count where the map has none of that name.
    merged: Vec<Value>,
}

/// A document as JSON values.
#[derive(Debug, Default)]
pub(super) struct Document {
    pub value: Value,
    /// The outermost keys under which an anchor is defined that is used under another one.
    pub anchored: BTreeSet<String>,
}

#[derive(Default)]
struct Reader {
    open: Vec<Open>,
    done: Option<Value>,
    anchors: BTreeMap<usize, Anchor>,
    copies: usize,
    anchored: BTreeSet<String>,
    /// The outermost key that is being read.
    outermost: String,
}

/// What an anchor stands for. One whose value is still open has none.
#[derive(Clone)]
struct Anchor {
    value: Value,
    /// Number of values in it.
    parts: usize,
    /// The outermost key under which it is defined.
    key: String,
}

/// Returns the document as JSON values. Plain scalars that look like null, a boolean or a number become one; all others are text.
///
/// # Errors
/// For invalid YAML, a repeated key, a key that is not a scalar, aliases that stand for more than 100 000 values, or a second
/// document. The message names the line.
pub fn parse(text: &str) -> Result<Value> {
    document(text).map(|document| document.value)
}

pub(super) fn document(text: &str) -> Result<Document> {
    let mut reader = Reader::default();
    for event in Parser::new_from_str(text) {
        let (event, span): (Event, Span) = event.map_err(|e| Error::config(format!("no valid YAML: {e}")))?;
        let line = span.start.line();
        reader.take(event).map_err(|what| Error::config(format!("YAML, line {line}: {what}")))?;
    }
    Ok(Document { value: reader.done.unwrap_or(Value::Null), anchored: reader.anchored })
}

impl Reader {
    fn take(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                let is_outermost = self.open.len() == 1;
                if let Some(Open::Map(OpenMap { all, key: key @ None, .. }, _)) = self.open.last_mut() {
                    if all.contains_key(&*text) {
                        return Err(format!("the key `{text}` comes twice"));
                    }
                    if is_outermost {
                        self.outermost = text.to_string();
                    }
                    *key = Some(text.into_owned());
                    return Ok(());
                }
                self.put(scalar(&text, plain), anchor)
            }
            Event::SequenceStart(anchor, _) => self.begin(Open::List(Vec::new(), anchor)),
            Event::MappingStart(anchor, _) => self.begin(Open::Map(OpenMap::default(), anchor)),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::List(list, anchor)) => self.put(Value::Array(list), anchor),
                Some(Open::Map(map, anchor)) => {
                    let whole = map.whole()?;
                    self.put(Value::Object(whole), anchor)
                }
                None => Err("an end without a beginning".into()),
            },
            Event::Alias(anchor) => {
                let Anchor { value, parts, key } =
                    self.anchors.get(&anchor).ok_or("an alias inside of what it stands for")?.clone();
                if key != self.outermost {
                    self.anchored.insert(key);
                }
                self.copies = self.copies.saturating_add(parts);
                if self.copies > COPIES {
                    return Err(format!("the aliases stand for more than {COPIES} values"));
                }
                if matches!(self.open.last(), Some(Open::Map(OpenMap { key: None, .. }, _))) {
                    return Err("a key must be plain text".into());
                }
                self.put(value, 0)
            }
            Event::DocumentStart(_) if self.done.is_some() => {
                Err("a second document; one file is one merge".into())
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, open: Open) -> Result<(), String> {
        if self.open.len() == DEPTH {
            return Err(format!("nested more than {DEPTH} deep"));
        }
        if matches!(self.open.last(), Some(Open::Map(OpenMap { key: None, .. }, _))) {
            return Err("a key must be plain text".into());
        }
        self.open.push(open);
        Ok(())
    }

    /// Puts a value where the text has it.
    fn put(&mut self, value: Value, anchor: usize) -> Result<(), String> {
        if anchor > 0 {
            let (parts, key) = (parts(&value), self.outermost.clone());
            self.anchors.insert(anchor, Anchor { value: value.clone(), parts, key });
        }
        match self.open.last_mut() {
            Some(Open::List(list, _)) => list.push(value),
            Some(Open::Map(map, _)) => {
                let key = map.key.take().unwrap_or_default();
                if key == "<<" {
                    map.merged.push(value);
                } else {
                    map.all.insert(key, value);
                }
            }
            None => self.done = Some(value),
        }
        Ok(())
    }
}

impl OpenMap {
    /// The map with what its merge keys add.
    fn whole(self) -> Result<Map<String, Value>, String> {
        let mut all = self.all;
        let maps = self.merged.into_iter().flat_map(|value| match value {
            Value::Array(list) => list,
            one => vec![one],
        });
        for map in maps {
            let Value::Object(map) = map else { return Err("`<<` takes a map or a list of maps".into()) };
            for (key, value) in map {
                all.entry(key).or_insert(value);
            }
        }
        Ok(all)
    }
}

/// Number of values in a value, itself included.
fn parts(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(parts).sum::<usize>(),
        Value::Object(map) => 1 + map.values().map(parts).sum::<usize>(),
        _ => 1,
    }
}

/// Interprets a scalar by YAML's core schema, without infinities and NaN, which no setting may have.
fn scalar(text: &str, plain: bool) -> Value {
    if !plain {
        return Value::String(text.into());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    if let Ok(whole) = text.parse::<i64>() {
        return Value::Number(whole.into());
    }
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    let number = text.parse::<f64>().ok().filter(|_| numeric).and_then(Number::from_f64);
    number.map_or_else(|| Value::String(text.into()), Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_what_configurations_have() {
        let text = "
# a comment
models:
  - model: ../a b
    parameters: {weight: [0, 0.5, 1e-3], density: .5}
  - model: \"1.5\"
parameters:
  t:
    - filter: mlp
      value: -2
    - value: ~
normalize: True
empty:
";
        let want = json!({
            "models": [
                {"model": "../a b", "parameters": {"weight": [0, 0.5, 0.001], "density": 0.5}},
                {"model": "1.5"},
            ],
            "parameters": {"t": [{"filter": "mlp", "value": -2}, {"value": null}]},
            "normalize": true,
            "empty": null,
        });
        assert_eq!(parse(text).unwrap(), want);
        assert_eq!(parse("").unwrap(), Value::Null);
        // JSON is YAML.
        assert_eq!(parse(&want.to_string()).unwrap(), want);
    }

    #[test]
    fn aliases_and_merge_keys_are_resolved() {
        let text = "
x: &M a.safetensors
defaults: {common: &c {weight: 1, density: 0.5}, more: &d {density: 0.1, gamma: 2}}
models:
  - &first {model: *M, parameters: {<<: *c, weight: 0.25}}
  - *first
  - parameters: {weight: 3, <<: [*c, *d]}
";
        let first = json!({"model": "a.safetensors", "parameters": {"weight": 0.25, "density": 0.5}});
        let document = document(text).unwrap();
        let third = json!({"parameters": {"weight": 3, "density": 0.5, "gamma": 2}});
        assert_eq!(document.value["models"], json!([first, first, third]));
        assert_eq!(document.anchored.iter().collect::<Vec<_>>(), ["defaults", "x"]);
    }

    #[test]
    fn bad_documents_are_errors() {
        let deep = "[".repeat(100) + &"]".repeat(100);
        let endless = "[".repeat(100_000);
        let level = |i: usize| format!("l{i}: &l{i} [{}]\n", vec![format!("*l{}", i - 1); 10].join(", "));
        let laughs = "l0: &l0 [ha]\n".to_string() + &(1..10).map(level).collect::<String>();
        for (text, words) in [
            ("a: 1\nb: 2\na: 3", "line 3: the key `a` comes twice"),
            ("b: *x", "no valid YAML"),
            ("a: &x [*x]", "line 1: an alias inside of what it stands for"),
            ("a: &x 1\n<<: *x", "`<<` takes a map"),
            ("a: &x 1\nb: {*x : 2}", "a key must be plain text"),
            (&laughs, "the aliases stand for more than 100000 values"),
            ("a: [1, 2", "no valid YAML"),
            ("? [1]\n: 2", "a key must be plain text"),
            ("a: 1\n---\nb: 2", "a second document"),
            ("a: b: c", "no valid YAML"),
            ("\"abc", "no valid YAML"),
            (&deep, "nested more than 64 deep"),
            (&endless, ""),
        ] {
            let message = parse(text).expect_err(text).to_string();
            assert!(message.contains(words), "{}: {message}", &text[..text.len().min(20)]);
        }
    }
}
