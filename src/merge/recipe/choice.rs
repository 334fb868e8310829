//! Which tokens the output of a merge has, as a configuration says it: `tokenizer_source`, or `tokenizer`.

use crate::error::{Error, Result};
use crate::store::nearest;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Whose tokens the output has.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum TokenizerSource {
    /// Those of the base, or of the first model without one.
    Base,
    /// Those of the base, and behind them those that only other models have.
    Union,
    /// Those of this model. It need not be one of those that are merged.
    Model(PathBuf),
}

/// Where the vector of a token is from.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRow {
    /// The model.
    pub model: PathBuf,
    /// Whether it stands for that of all models. If not, it stands in where a model lacks the token.
    pub force: bool,
}

/// The tokens of the output.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TokenizerConfig {
    /// Whose they are.
    pub source: TokenizerSource,
    /// Tokens whose vectors are from a certain model.
    pub tokens: BTreeMap<String, TokenRow>,
}

/// Reads the path of a model, which stands at this place of the configuration.
pub(super) type ReadPath<'a> = dyn Fn(&str, &Value) -> Result<PathBuf> + 'a;

/// Reads `tokenizer_source` or `tokenizer`. `None` if there is neither.
pub(super) fn read(root: &Value, path: &ReadPath) -> Result<Option<TokenizerConfig>> {
    let given = |key: &str| root.get(key).filter(|value| !value.is_null());
    let source = |at: &str, value: &Value| match value.as_str() {
        Some("base") => Ok(TokenizerSource::Base),
        Some("union") => Ok(TokenizerSource::Union),
        // Earlier versions of mergekit have a word before the path.
        Some(text) => match text.strip_prefix("model:") {
            Some(place) => Ok(TokenizerSource::Model(path(at, &place.into())?)),
            None => Ok(TokenizerSource::Model(path(at, value)?)),
        },
        None => Err(wrong(at, format!("must be `base`, `union` or the path of a model, not {value}"))),
    };
    match (given("tokenizer_source"), given("tokenizer")) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => {
            Err(wrong("the configuration", "has `tokenizer_source` and `tokenizer`; take one out"))
        }
        (Some(value), None) => {
            Ok(Some(TokenizerConfig { source: source("tokenizer_source", value)?, tokens: BTreeMap::new() }))
        }
        (None, Some(value)) => {
            let map = only(value, "tokenizer", &["source", "tokens"])?;
            let from = map.get("source").ok_or_else(|| wrong("tokenizer", "`source` is missing"))?;
            let source = source("tokenizer.source", from)?;
            let mut tokens = BTreeMap::new();
            let listed = map.get("tokens").filter(|tokens| !tokens.is_null());
            let listed = listed.map(|tokens| object(tokens, "tokenizer.tokens")).transpose()?;
            for (token, row) in listed.into_iter().flatten() {
                tokens.insert(token.clone(), token_row(&format!("tokenizer.tokens.{token}"), row, path)?);
            }
            Ok(Some(TokenizerConfig { source, tokens }))
        }
    }
}

fn token_row(at: &str, value: &Value, path: &ReadPath) -> Result<TokenRow> {
    let map = only(value, at, &["source", "force"])?;
    let source = map.get("source").ok_or_else(|| wrong(at, "`source` is missing"))?;
    if !source.is_string() {
        return Err(wrong(at, format!("`source` must be the path of a model; {source} is not supported")));
    }
    let force = match map.get("force") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(force)) => *force,
        Some(other) => return Err(wrong(at, format!("`force` must be true or false, not {other}"))),
    };
    Ok(TokenRow { model: path(&format!("{at}.source"), source)?, force })
}

fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| wrong(at, "must be a map of keys"))
}

/// A map that has no keys but these.
fn only<'a>(value: &'a Value, at: &str, keys: &[&str]) -> Result<&'a Map<String, Value>> {
    let map = object(value, at)?;
    match map.keys().find(|key| !keys.contains(&key.as_str())) {
        None => Ok(map),
        Some(key) => {
            let near = nearest(key, keys.iter().copied());
            Err(wrong(at, format!("`{key}` is not supported; near: {near}")))
        }
    }
}

fn wrong(at: &str, message: impl std::fmt::Display) -> Error {
    Error::config(format!("{at}: {message}"))
}
