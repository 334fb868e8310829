//! Parses YAML configurations into JSON values. A file must be one document without aliases or repeated keys.

use crate::error::{Error, Result};
use saphyr_parser::{Event, Parser, ScalarStyle};
use serde_json::{Map, Number, Value};

/// Most levels of nesting.
const DEPTH: usize = 64;

/// A list or map that is still open. A map has the key whose value comes next.
enum Open {
    List(Vec<Value>),
    Map(Map<String, Value>, Option<String>),
}

/// Returns the document as JSON values. Plain scalars that look like null, a boolean or a number become one; all others are text.
///
/// # Errors
/// For invalid YAML, a repeated key, a key that is not a scalar, an alias or a second document. The message names the line.
pub fn parse(text: &str) -> Result<Value> {
    let (mut open, mut done): (Vec<Open>, Option<Value>) = (Vec::new(), None);
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|e| Error::config(format!("no valid YAML: {e}")))?;
        let wrong = |what: &str| Err(Error::config(format!("YAML, line {}: {what}", span.start.line())));
        let value = match event {
            Event::Scalar(text, style, ..) => match open.last_mut() {
                Some(Open::Map(map, key @ None)) => {
                    if map.contains_key(&*text) {
                        return wrong(&format!("the key `{text}` comes twice"));
                    }
                    *key = Some(text.into_owned());
                    continue;
                }
                _ => scalar(&text, style == ScalarStyle::Plain),
            },
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if open.len() == DEPTH {
                    return wrong(&format!("nested more than {DEPTH} deep"));
                }
                if matches!(open.last(), Some(Open::Map(_, None))) {
                    return wrong("a key must be plain text");
                }
                let map = matches!(event, Event::MappingStart(..));
                open.push(if map { Open::Map(Map::new(), None) } else { Open::List(Vec::new()) });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(list)) => Value::Array(list),
                Some(Open::Map(map, _)) => Value::Object(map),
                None => return wrong("an end without a beginning"),
            },
            Event::Alias(_) => return wrong("aliases (`*name`) are not supported; write the value again"),
            Event::DocumentStart(_) if done.is_some() => {
                return wrong("a second document; one file is one merge");
            }
            _ => continue,
        };
        match open.last_mut() {
            Some(Open::List(list)) => list.push(value),
            Some(Open::Map(map, key)) => drop(map.insert(key.take().unwrap_or_default(), value)),
            None => done = Some(value),
        }
    }
    Ok(done.unwrap_or(Value::Null))
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
    fn bad_documents_are_errors() {
        let deep = "[".repeat(100) + &"]".repeat(100);
        let endless = "[".repeat(100_000);
        for (text, words) in [
            ("a: 1\nb: 2\na: 3", "line 3: the key `a` comes twice"),
            ("a: &x 1\nb: *x", "line 2: aliases"),
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
