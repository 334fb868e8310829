//! The tokens of a model, by its `tokenizer.json`.

use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The name of the file.
pub(super) const TOKENIZER: &str = "tokenizer.json";

/// Ids from this one on are those of no vocabulary, and tables are not made as large.
const MOST: u32 = 1 << 24;

/// How the tokens of a vocabulary are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// A character for each byte, in the alphabet of GPT-2.
    Bytes,
    /// `▁` for a blank, as in sentencepiece.
    Pieces,
    /// As the text, where tokens inside of a word may have a prefix.
    Plain,
}

/// A token that is found in texts before the others.
#[derive(Clone, Debug)]
pub(super) struct Added {
    pub text: String,
    pub id: u32,
    /// Whether the vocabulary has it too.
    pub is_regular: bool,
    /// What the file says of it.
    pub said: Map<String, Value>,
}

/// The tokens of a model.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    /// The kind of the tokenizer, such as `BPE`.
    pub kind: String,
    pub spelling: Spelling,
    /// The tokens as they are written, by their ids.
    pub by_id: BTreeMap<u32, String>,
    /// The added ones in the order of the file.
    pub added: Vec<Added>,
    /// Number of tokens of the vocabulary without those that are only added.
    pub plain: usize,
    ids: HashMap<String, u32>,
    /// The places of the added ones by their texts.
    places: HashMap<String, usize>,
    /// What tokens inside of a word begin with.
    prefix: String,
}

/// What is read of the file.
#[derive(Deserialize)]
struct Described {
    added_tokens: Option<Vec<Map<String, Value>>>,
    model: DescribedModel,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct DescribedModel {
    #[serde(rename = "type", default)]
    kind: String,
    vocab: Value,
    continuing_subword_prefix: Option<String>,
}

impl Tokens {
    /// Reads the tokens of the model in a folder.
    ///
    /// # Errors
    /// When there is no `tokenizer.json`, it is damaged, or it gives one id to two tokens or two to one.
    pub fn read(folder: &Path) -> Result<Tokens> {
        let path = folder.join(TOKENIZER);
        let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::format(
                folder,
                "it has no tokenizer.json, by which tables are read by token; load its tokenizer by transformers and save it again",
            ),
            _ => Error::io(&path, error),
        })?;
        let described: Described = serde_json::from_slice(&bytes)
            .map_err(|e| Error::format(&path, format!("it describes no tokenizer: {e}")).because_of(e))?;
        Tokens::of(described).map_err(|message| Error::format(&path, message))
    }

    fn of(described: Described) -> Result<Tokens, String> {
        let spelling = spelling(&described);
        let DescribedModel { kind, vocab, continuing_subword_prefix } = described.model;
        let mut tokens = Tokens {
            kind,
            spelling,
            by_id: BTreeMap::new(),
            added: Vec::new(),
            plain: 0,
            ids: HashMap::new(),
            places: HashMap::new(),
            prefix: continuing_subword_prefix.unwrap_or_default(),
        };
        match vocab {
            Value::Object(all) => {
                all.iter().try_for_each(|(text, id)| tokens.add(text, id.as_u64()).map(drop))?;
            }
            // Unigram's pieces have the ids of their places.
            Value::Array(all) => {
                for (id, piece) in all.iter().enumerate() {
                    let text = piece[0].as_str().ok_or_else(|| format!("piece {id} has no text"))?;
                    tokens.add(text, Some(id as u64))?;
                }
            }
            _ => return Err("its `vocab` is neither a map nor a list".into()),
        }
        tokens.plain = tokens.by_id.len();
        for said in described.added_tokens.into_iter().flatten() {
            let text =
                said.get("content").and_then(Value::as_str).ok_or("an added token has no `content`")?;
            let (text, id) = (text.to_string(), said.get("id").and_then(Value::as_u64));
            let is_regular = tokens.id(&text).is_some();
            let id = tokens.add(&text, id)?;
            tokens.places.insert(text.clone(), tokens.added.len());
            tokens.added.push(Added { text, id, is_regular, said });
        }
        if tokens.by_id.is_empty() {
            return Err("it has no tokens".into());
        }
        Ok(tokens)
    }

    fn add(&mut self, text: &str, id: Option<u64>) -> Result<u32, String> {
        let id = id.and_then(|id| u32::try_from(id).ok()).filter(|&id| id < MOST);
        let id = id.ok_or_else(|| format!("the token `{text}` has no id below {MOST}"))?;
        if let Some(before) = self.ids.insert(text.into(), id)
            && before != id
        {
            return Err(format!("the token `{text}` has the ids {before} and {id}"));
        }
        match self.by_id.insert(id, text.into()) {
            Some(other) if other != text => {
                Err(format!("the tokens `{other}` and `{text}` have the id {id}"))
            }
            _ => Ok(id),
        }
    }

    /// The id of a token that is written so.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// What the file says of a token, if it is an added one.
    pub fn said(&self, token: &str) -> Option<&Map<String, Value>> {
        self.places.get(token).map(|&place| &self.added[place].said)
    }

    /// One more than the largest id.
    pub fn size(&self) -> usize {
        self.by_id.last_key_value().map_or(0, |(&id, _)| id as usize + 1)
    }

    /// The text of a token. `None` for a part of a character, or of what stands only inside of words.
    pub fn text(&self, token: &str) -> Option<String> {
        let is_added = |token: &str| self.places.contains_key(token);
        let text = match self.spelling {
            Spelling::Bytes => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte).collect();
                match bytes.and_then(|bytes| String::from_utf8(bytes).ok()) {
                    // An added token is its own text, and most of them are so in the alphabet too.
                    Some(text) if text == token => Some(text),
                    _ if is_added(token) => Some(token.into()),
                    text => text,
                }
            }
            Spelling::Pieces if is_byte(token) => None,
            Spelling::Pieces if !token.contains('▁') || is_added(token) => Some(token.into()),
            Spelling::Pieces => Some(token.replace('▁', " ")),
            Spelling::Plain => {
                let inside = !self.prefix.is_empty() && token.starts_with(&self.prefix);
                (!inside || is_added(token)).then(|| token.to_string())
            }
        };
        text.filter(|text| !text.is_empty())
    }

    /// Whether an added token of this text has an id of its own, which a token that is written so takes from it, and comes back as
    /// this text: characters of the alphabet become bytes, also those of added tokens.
    pub fn can_add(&self, text: &str) -> bool {
        let bytes: Option<Vec<u8>> = text.chars().map(byte).collect();
        let comes_back =
            self.spelling != Spelling::Bytes || bytes.is_none_or(|bytes| bytes == text.as_bytes());
        self.id(text).is_none() && comes_back
    }

    /// The ids of all tokens that have a text, by it.
    pub fn by_text(&self) -> HashMap<String, u32> {
        let mut all = HashMap::new();
        for (&id, token) in &self.by_id {
            if let Some(text) = self.text(token) {
                all.entry(text).or_insert(id);
            }
        }
        all
    }
}

fn spelling(described: &Described) -> Spelling {
    let has = |part: &Value, word: &str| part.to_string().contains(word);
    let Described { normalizer, pre_tokenizer, decoder, .. } = described;
    if has(pre_tokenizer, "\"ByteLevel\"") || has(decoder, "\"ByteLevel\"") {
        return Spelling::Bytes;
    }
    match [normalizer, pre_tokenizer, decoder].into_iter().any(|part| has(part, "▁")) {
        true => Spelling::Pieces,
        false => Spelling::Plain,
    }
}

/// The byte that a character stands for in GPT-2's alphabet: itself if it is printable in Latin-1, and the others are the characters
/// from U+0100 on. Module `text` has the same, and is not in every build.
fn byte(c: char) -> Option<u8> {
    match u32::from(c) {
        own @ (33..=126 | 161..=172 | 174..=255) => Some(own as u8),
        low @ 256..=288 => Some((low - 256) as u8),
        middle @ 289..=322 => Some((middle - 289 + 127) as u8),
        323 => Some(173),
        _ => None,
    }
}

/// Whether a token is a byte such as `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(json: &str) -> Result<Tokens, String> {
        Tokens::of(serde_json::from_str(json).map_err(|e| e.to_string())?)
    }

    #[test]
    fn texts_of_tokens() {
        let bytes = tokens(
            r#"{"model": {"type": "BPE", "vocab": {"Ġhi": 0, "Ã©": 1, "Ã": 2, "Ċ": 3}}, "decoder": {"type": "ByteLevel"},
                "added_tokens": [{"id": 4, "content": "é!"}]}"#,
        )
        .unwrap();
        let texts: Vec<Option<String>> = bytes.by_id.values().map(|token| bytes.text(token)).collect();
        assert_eq!(
            texts.iter().map(Option::as_deref).collect::<Vec<_>>(),
            [Some(" hi"), Some("é"), None, Some("\n"), Some("é!")]
        );
        // `Ã` is a token of one byte, and `é` would come back as another byte.
        assert_eq!(
            ["Ã", "é", "hi", " é", "日"].map(|text| bytes.can_add(text)),
            [false, false, true, true, true]
        );
        // All bytes are characters of the alphabet, each once.
        let all: std::collections::BTreeSet<u8> = ('\0'..'\u{200}').filter_map(byte).collect();
        assert_eq!((all.len(), ('\0'..'\u{200}').filter_map(byte).count()), (256, 256));
        let pieces = tokens(
            r#"{"model": {"vocab": [["<unk>", 0], ["▁a", -1], ["<0x0A>", -2]]}, "decoder": {"type": "Metaspace", "replacement": "▁"}}"#,
        )
        .unwrap();
        assert_eq!((pieces.text("▁a"), pieces.text("<0x0A>"), pieces.size()), (Some(" a".into()), None, 3));
        let words =
            tokens(r###"{"model": {"vocab": {"a": 0, "##b": 1}, "continuing_subword_prefix": "##"}}"###)
                .unwrap();
        assert_eq!((words.text("a"), words.text("##b")), (Some("a".into()), None));
    }

    #[test]
    fn contradictions_are_named() {
        for (json, words) in [
            (r#"{"model": {"vocab": {"a": 0, "b": 0}}}"#, "the tokens `a` and `b` have the id 0"),
            (
                r#"{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "a"}]}"#,
                "the token `a` has the ids 0 and 1",
            ),
            (r#"{"model": {"vocab": {"a": -1}}}"#, "the token `a` has no id below"),
            (r#"{"model": {"vocab": {"a": 4000000000}}}"#, "the token `a` has no id below"),
            (r#"{"model": {"vocab": 3}}"#, "neither a map nor a list"),
            (r#"{"model": {"vocab": [3]}}"#, "piece 0 has no text"),
            (r#"{"model": {"vocab": {}}}"#, "it has no tokens"),
            (r#"{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}"#, "no `content`"),
            ("{}", "missing field `model`"),
        ] {
            let message = tokens(json).expect_err(json);
            assert!(message.contains(words), "{json}: {message}");
        }
    }
}
