//! Turns tokens into text one at a time, by the rule of the model's decoder.

use crate::error::{Error, Result};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::OnceLock;
use tokenizers::Tokenizer;

/// How the names of tokens become text.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rule {
    /// Replaced inside each token.
    replaced: Vec<(String, String)>,
    bytes: Bytes,
    /// Leaves out this character in the first token.
    bare: Option<char>,
    /// Leaves out this character at the start, so many times at most.
    stripped: Option<(char, usize)>,
    /// Writes a blank between tokens.
    apart: bool,
}

/// Which tokens stand for single bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Bytes {
    #[default]
    None,
    /// Each character of a token is a byte, in the alphabet of GPT-2.
    Level,
    /// Tokens such as `<0x0A>`.
    Fallback,
}

impl Rule {
    /// Byte-level BPE.
    pub fn byte_level() -> Rule {
        Rule { bytes: Bytes::Level, ..Rule::default() }
    }

    /// Sentencepiece, whose text begins with a blank that is not the user's if `prefix` is true.
    pub fn pieces(prefix: bool) -> Rule {
        Rule {
            replaced: vec![("\u{2581}".into(), " ".into())],
            bytes: Bytes::Fallback,
            stripped: prefix.then_some((' ', 1)),
            ..Rule::default()
        }
    }

    /// Reads the decoder of a `tokenizer.json`.
    pub fn of(decoder: &Value) -> Result<Rule, String> {
        let mut rule = Rule::default();
        if decoder.is_null() {
            rule.apart = true;
        }
        let parts = decoder["decoders"].as_array().map_or(std::slice::from_ref(decoder), Vec::as_slice);
        let mut fused = false;
        for part in parts.iter().filter(|part| !part.is_null()) {
            rule.add(part, &mut fused)
                .ok_or_else(|| format!("its decoder {part} is none whose rule is known here"))?;
        }
        Ok(rule)
    }

    fn add(&mut self, part: &Value, fused: &mut bool) -> Option<()> {
        let text = |key: &str| part[key].as_str();
        match (text("type")?, *fused) {
            ("ByteLevel", false) if self.bytes == Bytes::None => self.bytes = Bytes::Level,
            ("ByteFallback", false) if self.bytes == Bytes::None => self.bytes = Bytes::Fallback,
            ("Replace", false) if self.bytes == Bytes::None => {
                let pattern = part["pattern"]["String"].as_str()?;
                self.replaced.push((pattern.into(), text("content")?.into()));
            }
            ("Metaspace", false) => {
                let blank = text("replacement")?;
                self.bare = (text("prepend_scheme") != Some("never")).then(|| blank.chars().next()).flatten();
                self.replaced.push((blank.into(), " ".into()));
            }
            ("Fuse", _) => *fused = true,
            ("Strip", true) if part["stop"] == 0 && self.stripped.is_none() => {
                let count = usize::try_from(part["start"].as_u64()?).ok()?;
                self.stripped = Some((text("content")?.chars().next()?, count));
            }
            _ => return None,
        }
        Some(())
    }

    /// The bytes of a token, and whether they may be a part of a character.
    fn bytes<'a>(&self, token: &'a str, first: bool) -> (Cow<'a, [u8]>, bool) {
        match self.bytes {
            Bytes::Level => {
                let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet().get(&c).copied()).collect();
                (bytes.map_or(Cow::Borrowed(token.as_bytes()), Cow::Owned), true)
            }
            Bytes::Fallback if fallback(token).is_some() => {
                (Cow::Owned(fallback(token).into_iter().collect()), true)
            }
            _ => {
                let mut text = Cow::Borrowed(token);
                if let Some(bare) = self.bare.filter(|_| first) {
                    text = Cow::Owned(text.replace(bare, ""));
                }
                for (from, to) in &self.replaced {
                    text = Cow::Owned(text.replace(from, to));
                }
                if self.apart && !first {
                    text = Cow::Owned(format!(" {text}"));
                }
                (Cow::Owned(text.into_owned().into_bytes()), false)
            }
        }
    }
}

/// The byte of a token such as `<0x0A>`.
pub(super) fn fallback(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The bytes of the characters of GPT-2's alphabet. A byte that is printable in Latin-1 is its own character, and the others are
/// the characters from U+0100 on, in order.
fn alphabet() -> &'static HashMap<char, u8> {
    static ALPHABET: OnceLock<HashMap<char, u8>> = OnceLock::new();
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    ALPHABET.get_or_init(|| {
        let own = (0..=255u8).filter(printable).map(|byte| (char::from(byte), byte));
        let others = (0..=255u8).filter(|byte| !printable(byte));
        own.chain(('\u{100}'..).zip(others)).collect()
    })
}

/// Decodes tokens as they come. Made by [`Words::stream`](super::Words::stream).
pub struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    rule: &'a Rule,
    /// Tokens from this one on do not exist.
    limit: usize,
    /// Bytes of a character whose other bytes have not come yet.
    waiting: Vec<u8>,
    first: bool,
    stripped: usize,
}

impl<'a> Stream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, rule: &'a Rule, limit: usize) -> Stream<'a> {
        Stream { tokenizer, rule, limit, waiting: Vec::new(), first: true, stripped: 0 }
    }

    /// Takes the next token and returns the text that is complete with it. It is empty for a control token, for a place of the
    /// model's table that has no token, and where a character needs more tokens.
    ///
    /// # Errors
    /// [`Error::Config`] when the model has no such token.
    pub fn push(&mut self, token: u32) -> Result<String> {
        if token as usize >= self.limit {
            let last = self.limit.saturating_sub(1);
            return Err(Error::config(format!("token {token} is none of the model's, which end at {last}")));
        }
        let mut text = String::new();
        let Some(name) = self.tokenizer.id_to_token(token) else { return Ok(text) };
        if self.tokenizer.get_added_vocabulary().is_special_token(&name) {
            return Ok(text);
        }
        let (bytes, part) = self.rule.bytes(&name, self.first);
        self.first = false;
        if !part {
            self.flush(&mut text);
        }
        self.waiting.extend_from_slice(&bytes);
        self.complete(&mut text);
        Ok(self.strip(text))
    }

    /// Returns what is left when no token follows: U+FFFD for the bytes of a character that was not completed.
    pub fn finish(mut self) -> String {
        let mut text = String::new();
        self.flush(&mut text);
        self.strip(text)
    }

    /// How many U+FFFD stand for some bytes that are no character. Sentencepiece writes one for each byte.
    fn damaged(&self, bytes: usize) -> usize {
        if self.rule.bytes == Bytes::Fallback { bytes } else { bytes.min(1) }
    }

    fn flush(&mut self, text: &mut String) {
        text.extend(std::iter::repeat_n('\u{fffd}', self.damaged(self.waiting.len())));
        self.waiting.clear();
    }

    /// Moves all characters that are complete from the waiting bytes to the text.
    fn complete(&mut self, text: &mut String) {
        let bytes = std::mem::take(&mut self.waiting);
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let error = match std::str::from_utf8(rest) {
                Ok(good) => {
                    text.push_str(good);
                    return;
                }
                Err(error) => error,
            };
            let (good, bad) = rest.split_at(error.valid_up_to());
            text.push_str(&String::from_utf8_lossy(good));
            let Some(wrong) = error.error_len() else {
                self.waiting = bad.to_vec();
                return;
            };
            text.extend(std::iter::repeat_n('\u{fffd}', self.damaged(wrong)));
            rest = &bad[wrong..];
        }
    }

    /// Takes the blanks off the start of all text.
    fn strip(&mut self, mut text: String) -> String {
        let Some((c, most)) = self.rule.stripped else { return text };
        while self.stripped < most && !text.is_empty() {
            if text.starts_with(c) {
                text.drain(..c.len_utf8());
                self.stripped += 1;
            } else {
                self.stripped = most;
            }
        }
        text
    }
}
