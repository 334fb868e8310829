//! The tokenizer inside a GGUF file: the metadata `tokenizer.ggml.*` and `tokenizer.chat_template`. What a key that is missing
//! means is as in llama.cpp.

use super::chat::ChatTemplate;
use super::pieces::{self, Kind, Piece, Prefix};
use super::split;
use super::stream::Rule;
use super::words::{Parts, Words, distinct};
use crate::error::{Error, Result};
use crate::store::gguf::{Gguf, Value};
use std::borrow::Cow;
use std::collections::BTreeMap;
use tokenizers::models::bpe::{BpeBuilder, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::{AddedToken, Tokenizer};

/// Tokens that end an answer or a text in every model that has them. A file names at most three ends, and some models have more.
const ENDS: [&str; 9] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "</s>",
];

/// Whether a token ends answers although no key names it. Converters have written added tokens as user-defined ones. A token may be BOS
/// too, as in Qwen2, and end texts.
pub(super) fn is_known_end(token: &str, kind: Kind) -> bool {
    matches!(kind, Kind::Control | Kind::UserDefined) && ENDS.contains(&token)
}

/// The metadata of a tokenizer.
struct Metadata<'a> {
    all: &'a BTreeMap<String, Value>,
    tokens: Vec<Cow<'a, str>>,
    kinds: Vec<Kind>,
}

/// Tokens that the file names.
struct Named {
    bos: Option<u32>,
    eos: Option<u32>,
    ends: Vec<u32>,
}

impl<'a> Metadata<'a> {
    fn read(all: &'a BTreeMap<String, Value>) -> Result<Metadata<'a>, String> {
        let mut read = Metadata { all, kinds: Vec::new(), tokens: Vec::new() };
        read.tokens = read.texts("tokenizer.ggml.tokens")?.into_iter().map(Cow::Borrowed).collect();
        read.kinds = vec![Kind::Normal; read.tokens.len()];
        if let Some(all) = read.list("tokenizer.ggml.token_type")? {
            let kind = |value: &Value| match value {
                Value::Integer(number) => Kind::of(*number),
                _ => Err("tokenizer.ggml.token_type is no list of numbers".into()),
            };
            read.kinds = all.iter().map(kind).collect::<Result<_, _>>()?;
        }
        read.clear_empty();
        Ok(read)
    }

    /// Gives tokens without a text, of which some files have several, texts of their own, which no text becomes.
    fn clear_empty(&mut self) {
        for (id, token) in self.tokens.iter_mut().enumerate().filter(|(_, token)| token.is_empty()) {
            *token = Cow::Owned(format!("[EMPTY_{id}]"));
            self.kinds[id] = Kind::Unused;
        }
    }

    fn value(&self, name: &str) -> Option<&'a Value> {
        self.all.get(name)
    }

    fn texts(&self, key: &str) -> Result<Vec<&'a str>, String> {
        let Some(Value::List(all)) = self.value(key) else { return Err(format!("there is no list {key}")) };
        let text = |value: &'a Value| match value {
            Value::Text(text) => Ok(&text[..]),
            _ => Err(format!("{key} is no list of texts")),
        };
        all.iter().map(text).collect()
    }

    /// A list that has one value for each token, if there is one.
    fn list(&self, key: &str) -> Result<Option<&'a [Value]>, String> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::List(all)) if all.len() == self.tokens.len() => Ok(Some(all)),
            Some(Value::List(all)) => {
                Err(format!("{key} has {} values for {} tokens", all.len(), self.tokens.len()))
            }
            Some(_) => Err(format!("{key} is no list")),
        }
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, String> {
        match self.value(&format!("tokenizer.ggml.{name}")) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(format!("tokenizer.ggml.{name} is neither true nor false")),
        }
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(format!("{key} is no text")),
        }
    }

    /// A token that the file names.
    fn id(&self, name: &str) -> Result<Option<u32>, String> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match self.value(&key) {
            None => Ok(None),
            Some(Value::Integer(id)) if (0..self.tokens.len() as i128).contains(id) => Ok(Some(*id as u32)),
            Some(Value::Integer(id)) => {
                Err(format!("{key} is {id}, which is none of the {} tokens", self.tokens.len()))
            }
            Some(_) => Err(format!("{key} is no number")),
        }
    }

    fn named(&self, pieces: bool) -> Result<Named, String> {
        // Sentencepiece's own numbers hold where the file has none.
        let or = |id: u32| (pieces && (id as usize) < self.tokens.len()).then_some(id);
        let (bos, eos) = (self.id("bos")?.or(or(1)), self.id("eos")?.or(or(2)));
        let mut ends: Vec<u32> = [eos, self.id("eot")?, self.id("eom")?].into_iter().flatten().collect();
        let known = (0..).zip(self.tokens.iter().zip(&self.kinds));
        ends.extend(known.filter(|(_, (token, kind))| is_known_end(token, **kind)).map(|(id, _)| id));
        Ok(Named { bos, eos, ends: distinct(ends) })
    }

    /// The tokenizer of byte-level BPE.
    fn bytes(&self, rule: &split::Rule) -> Result<Tokenizer, String> {
        let merges = self.texts("tokenizer.ggml.merges")?;
        let pair = |merge: &&str| {
            let parts = merge.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string()));
            parts.ok_or_else(|| format!("the merge '{merge}' is not two tokens with a blank between"))
        };
        let merges = merges.iter().map(pair).collect::<Result<Vec<_>, _>>()?;
        let vocabulary = pieces::numbered(self.tokens.iter().map(|token| &**token))?;
        let owned: Vocab = vocabulary.into_iter().map(|(text, id)| (text.to_string(), id)).collect();
        let model = BpeBuilder::new().vocab_and_merges(owned, merges).ignore_merges(rule.ignore_merges);
        let mut tokenizer = Tokenizer::new(model.build().map_err(|error| error.to_string())?);
        tokenizer.with_pre_tokenizer(Some(rule.cutter()?));
        if rule.composes {
            tokenizer.with_normalizer(Some(NFC));
        }
        let added: Vec<AddedToken> =
            self.tokens.iter().zip(&self.kinds).filter_map(|(text, kind)| kind.added(text)).collect();
        added.iter().try_for_each(|token| pieces::check_length(&token.content))?;
        tokenizer.add_tokens(&added);
        Ok(tokenizer)
    }

    /// The tokenizer of sentencepiece's BPE.
    fn pieces(&self, prefix: bool) -> Result<Tokenizer, String> {
        if self.flag("remove_extra_whitespaces")? == Some(true) {
            return Err("it removes blanks that follow each other, which is not read".into());
        }
        let scores = self.list("tokenizer.ggml.scores")?.ok_or("there is no list tokenizer.ggml.scores")?;
        let score = |value: &Value| match value {
            Value::Float(score) => Ok(*score as f32),
            Value::Integer(score) => Ok(*score as f32),
            _ => Err("tokenizer.ggml.scores is no list of numbers".to_string()),
        };
        let all = self.tokens.iter().zip(&self.kinds).zip(scores).map(|((text, kind), value)| {
            Ok(Piece { text: text.to_string(), score: score(value)?, kind: *kind })
        });
        let prefix = if prefix { Prefix::EachPart } else { Prefix::Nowhere };
        pieces::tokenizer(&all.collect::<Result<Vec<_>, String>>()?, prefix)
    }

    fn chat(&self, named: &Named) -> Result<Option<ChatTemplate>, String> {
        let Some(source) = self.text("tokenizer.chat_template")? else { return Ok(None) };
        // Only templates may show these two, and files exist in which they are none of the tokens.
        let shown = |name: &str| self.id(name).ok().flatten();
        let ids =
            [("bos", named.bos), ("eos", named.eos), ("unk", shown("unknown")), ("pad", shown("padding"))];
        let marks: BTreeMap<String, String> = ids
            .into_iter()
            .filter_map(|(name, id)| Some((format!("{name}_token"), self.tokens[id? as usize].to_string())))
            .collect();
        ChatTemplate::new(source, marks).map(Some)
    }

    fn words(mut self) -> Result<Words, String> {
        let model = self.text("tokenizer.ggml.model")?.ok_or("there is no text tokenizer.ggml.model")?;
        let pieces = match model {
            "gpt2" => false,
            "llama" => true,
            other => {
                return Err(format!(
                    "its kind is '{other}'; byte-level BPE ('gpt2') and sentencepiece BPE ('llama') are read"
                ));
            }
        };
        let named = self.named(pieces)?;
        // A token that begins or ends texts is a control token, whatever the file calls it.
        for id in named.ends.iter().copied().chain(named.bos) {
            self.kinds[id as usize] = Kind::Control;
        }
        let (tokenizer, rule, kind, adds) = if pieces {
            let prefix = self.flag("add_space_prefix")?.unwrap_or(true);
            (self.pieces(prefix)?, Rule::pieces(prefix), "sentencepiece BPE".to_string(), true)
        } else {
            let cut = split::Rule::named(self.text("tokenizer.ggml.pre")?.unwrap_or("default"))?;
            let kind = format!("byte-level BPE, {}", cut.name());
            (self.bytes(cut)?, Rule::byte_level(), kind, cut.adds_bos)
        };
        let begin = |adds: bool, id: Option<u32>, name: &str| match (adds, id) {
            (false, _) => Ok(Vec::new()),
            (true, Some(id)) => Ok(vec![id]),
            (true, None) => {
                Err(format!("texts are to have {name}, and there is no tokenizer.ggml.{name}_token_id"))
            }
        };
        Words::assembled(Parts {
            before: begin(
                self.flag("add_bos_token")?.unwrap_or(adds && named.bos.is_some()),
                named.bos,
                "bos",
            )?,
            after: begin(self.flag("add_eos_token")?.unwrap_or(false), named.eos, "eos")?,
            begins_chats: true,
            chat: self.chat(&named)?,
            limit: self.tokens.len(),
            ends: named.ends,
            tokenizer,
            rule,
            kind,
        })
    }
}

impl Words {
    /// Reads the tokenizer and the chat template of a GGUF file.
    ///
    /// # Errors
    /// [`Error::Format`] when the metadata is incomplete or contradicts itself or the model's table of tokens, or names a kind of
    /// tokenizer or a rule of cutting text that is not known here.
    pub fn of_gguf(file: &Gguf) -> Result<Words> {
        let fault = |message: String| Error::format(file.path(), format!("the tokenizer: {message}"));
        let words = Words::of_metadata(file.metadata()).map_err(fault)?;
        let rows = file.shape("token_embd.weight").ok().and_then(|shape| shape.first().copied());
        match rows.filter(|rows| *rows != words.table()) {
            None => Ok(words),
            Some(rows) => {
                Err(fault(format!("it has {} tokens, and the model's table {rows} rows", words.table())))
            }
        }
    }

    /// [`Words::of_gguf`] of the metadata alone.
    pub(super) fn of_metadata(all: &BTreeMap<String, Value>) -> Result<Words, String> {
        Metadata::read(all).and_then(Metadata::words)
    }
}
