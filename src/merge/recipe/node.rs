//! Reads values of a configuration, with their places for error messages.

use super::setting::{Scalar, Setting};
use crate::error::{Error, Result};
use crate::store::nearest;
use serde_json::{Map, Value};
use std::ops::Range;

/// A value and its place in the configuration, which error messages name.
pub(super) struct Node<'a> {
    pub at: String,
    pub value: &'a Value,
}

impl<'a> Node<'a> {
    pub fn wrong(&self, message: impl std::fmt::Display) -> Error {
        let at = if self.at.is_empty() { "the configuration" } else { &self.at };
        Error::config(format!("{at}: {message}"))
    }

    pub fn map(&self) -> Result<&'a Map<String, Value>> {
        self.value.as_object().ok_or_else(|| self.wrong("must be a map of keys"))
    }

    pub fn only(&self, keys: &[&str]) -> Result<()> {
        match self.map()?.keys().find(|key| !keys.contains(&key.as_str())) {
            Some(key) => {
                let near = nearest(key, keys.iter().copied());
                let near =
                    if near.is_empty() { "there are none here".into() } else { format!("near: {near}") };
                Err(self.wrong(format!("unknown key `{key}`; {near}")))
            }
            None => Ok(()),
        }
    }

    /// Returns a key's value, or `None` if it is null.
    pub fn get(&self, key: &str) -> Option<Node<'a>> {
        let value = self.value.get(key).filter(|v| !v.is_null())?;
        let dot = if self.at.is_empty() { "" } else { "." };
        Some(Node { at: format!("{}{dot}{key}", self.at), value })
    }

    pub fn need(&self, key: &str) -> Result<Node<'a>> {
        self.get(key).ok_or_else(|| self.wrong(format!("`{key}` is missing")))
    }

    pub fn text(&self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.wrong(format!("must be text, not {}", self.value)))
    }

    pub fn whole(&self) -> Result<u64> {
        self.value.as_u64().ok_or_else(|| self.wrong(format!("must be a whole number, not {}", self.value)))
    }

    pub fn real(&self) -> Result<f64> {
        numeric(self.value).ok_or_else(|| self.wrong(format!("must be a number, not {}", self.value)))
    }

    pub fn flag(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong(format!("must be true or false, not {}", self.value)))
    }

    pub fn list(&self) -> Result<Vec<Node<'a>>> {
        let list = self.value.as_array().filter(|l| !l.is_empty());
        let list = list.ok_or_else(|| self.wrong("must be a list that is not empty"))?;
        let node = |(i, value)| Node { at: format!("{}[{i}]", self.at), value };
        Ok(list.iter().enumerate().map(node).collect())
    }

    pub fn range(&self) -> Result<Range<usize>> {
        let ends = self.list()?.iter().map(Node::whole).collect::<Result<Vec<_>>>()?;
        match ends[..] {
            [start, end] if start < end => Ok(start as usize..end as usize),
            _ => Err(self.wrong("must be [first layer, layer behind the last]")),
        }
    }

    pub fn setting(&self) -> Result<Setting> {
        match self.value {
            Value::Number(number) => Ok(Setting::Same(Scalar::Number(number.as_f64().unwrap_or(f64::NAN)))),
            Value::Bool(flag) => Ok(Setting::Same(Scalar::Flag(*flag))),
            Value::String(text) => Ok(Setting::Same(Scalar::Text(text.clone()))),
            Value::Array(list) if !list.is_empty() && list.iter().all(|v| numeric(v).is_some()) => {
                Ok(Setting::Gradient(list.iter().filter_map(numeric).collect()))
            }
            Value::Array(_) => {
                let one = |node: Node| {
                    node.only(&["filter", "value"])?;
                    let filter = node.get("filter").map(|f| f.text().map(String::from)).transpose()?;
                    Ok((filter, node.need("value")?.setting()?))
                };
                Ok(Setting::Filters(self.list()?.into_iter().map(one).collect::<Result<_>>()?))
            }
            _ => Err(self.wrong("must be a value, a list of numbers, or a list of {filter, value}")),
        }
    }
}

/// A number, also one that is written as text.
pub(super) fn numeric(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.trim().parse().ok().filter(|x: &f64| x.is_finite()))
}
