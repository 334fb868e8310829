//! The metadata by which a GGUF file says what a folder's tokenizer is.

use super::chat::Message;
use super::folder::Settings;
use super::metadata::is_known_end;
use super::pieces::{Kind, Piece};
use super::words::Words;
use super::{json, proto};
use crate::error::{Error, Result};
use crate::store::gguf::Value;
use serde_json::Value as Json;
use std::path::Path;

/// The score of tokens that were added to sentencepiece's, by llama.cpp's converter.
const ADDED: f32 = -1000.0;

/// Most tokens of a table, so that a damaged file does not take all memory.
const MOST: usize = 1 << 24;

/// Tokens by their ids. `None`: no token has this id.
struct Table(Vec<Option<Piece>>);

impl Table {
    fn new(size: usize) -> Result<Table, String> {
        match size <= MOST {
            true => Ok(Table(vec![None; size])),
            false => Err(format!("a table of {size} tokens is more than any model has")),
        }
    }

    fn put(&mut self, id: u64, piece: Piece) -> Result<(), String> {
        let size = self.0.len();
        let place = usize::try_from(id).ok().and_then(|id| self.0.get_mut(id));
        let Some(place) = place else {
            return Err(format!("token {id} is '{}', and the model's table has only {size}", piece.text));
        };
        *place = Some(piece);
        Ok(())
    }

    /// All tokens. Ids without a token get a text that no text becomes.
    fn whole(self) -> Vec<Piece> {
        let unused = |id: usize| Piece { text: format!("[PAD{id}]"), score: ADDED, kind: Kind::Unused };
        self.0.into_iter().enumerate().map(|(id, piece)| piece.unwrap_or_else(|| unused(id))).collect()
    }
}

fn added_kind(special: bool) -> Kind {
    if special { Kind::Control } else { Kind::UserDefined }
}

/// The tokens and merges of a `tokenizer.json` of byte-level BPE.
fn bytes(file: &Json, size: Option<usize>) -> Result<(Vec<Piece>, Vec<Value>), String> {
    let vocabulary = file["model"]["vocab"].as_object().ok_or("it has no vocabulary")?;
    let added = file["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let ids = vocabulary.values().chain(added.iter().map(|token| &token["id"])).filter_map(Json::as_u64);
    let most = ids.max().map_or(0, |most| most as usize + 1);
    let mut table = Table::new(size.unwrap_or(most))?;
    for (text, id) in vocabulary {
        let id = id.as_u64().ok_or_else(|| format!("'{text}' has no id"))?;
        table.put(id, Piece { text: text.clone(), score: 0.0, kind: Kind::Normal })?;
    }
    for token in added {
        let (Some(id), Some(text)) = (token["id"].as_u64(), token["content"].as_str()) else {
            return Err("an added token has no id or no text".into());
        };
        let kind = added_kind(token["special"] == true);
        table.put(id, Piece { text: text.into(), score: 0.0, kind })?;
    }
    let merges = file["model"]["merges"].as_array().ok_or("it has no merges")?;
    let merge = |merge: &Json| match (merge.as_str(), merge[0].as_str().zip(merge[1].as_str())) {
        (Some(text), _) => Ok(Value::Text(text.into())),
        (_, Some((a, b))) if !a.contains(' ') && !b.contains(' ') => Ok(Value::Text(format!("{a} {b}"))),
        _ => Err(format!("the merge {merge} cannot be written")),
    };
    Ok((table.whole(), merges.iter().map(merge).collect::<Result<_, String>>()?))
}

impl Settings {
    /// The tokens of a `tokenizer.model`, and those that were added to them.
    fn all_pieces(&self, model: proto::Model) -> Result<Vec<Piece>, String> {
        let (own, added) = (model.pieces.len(), self.added_pieces()?);
        let most = added.iter().map(|(id, _)| *id as usize + 1).max().unwrap_or(0).max(own);
        let mut table = Table::new(self.table().unwrap_or(most))?;
        for (id, piece) in (0..).zip(model.pieces) {
            table.put(id, piece)?;
        }
        for (id, piece) in added.into_iter().filter(|(id, _)| *id as usize >= own) {
            table.put(id.into(), piece)?;
        }
        Ok(table.whole())
    }

    fn added_pieces(&self) -> Result<Vec<(u32, Piece)>, String> {
        let all = self.listed()?;
        let piece = |(id, token): (u32, tokenizers::AddedToken)| {
            (id, Piece { score: ADDED, kind: added_kind(token.special), text: token.content })
        };
        Ok(all.into_iter().map(piece).collect())
    }
}

/// The lists of tokens and their types.
fn lists(pieces: &[Piece]) -> [(&'static str, Value); 2] {
    let texts = pieces.iter().map(|piece| Value::Text(piece.text.clone())).collect();
    let kinds = pieces.iter().map(|piece| Value::Integer(piece.kind.number())).collect();
    [("tokens", Value::List(texts)), ("token_type", Value::List(kinds))]
}

/// A folder's tokenizer and chat template in the words of GGUF.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TokenizerMetadata {
    /// The keys `tokenizer.*`.
    pub metadata: Vec<(String, Value)>,
    /// How a conversation becomes other tokens than in the folder, if it does.
    pub remark: Option<String>,
}

/// Returns the metadata `tokenizer.*` by which a GGUF file says what the tokenizer and the chat template of a folder are.
///
/// Byte-level BPE is read from `tokenizer.json` and must cut text by a rule that llama.cpp has a name for. Sentencepiece's BPE is
/// read from `tokenizer.model`, because `tokenizer.json` lacks its scores.
///
/// # Errors
/// As [`Words::in_folder`]. [`Error::Format`] for another kind of tokenizer, and for one that GGUF has no words for: it puts other
/// tokens than BOS around a text, cuts texts in another way than what would be written, or has more ends of an answer than there are
/// places for. What is written may end answers at further tokens, which end answers of every model that has them.
pub fn gguf_metadata(folder: &Path) -> Result<TokenizerMetadata> {
    let words = Words::in_folder(folder)?;
    let settings = Settings::read(folder)?;
    let fault = |message: String| {
        Error::format(folder, format!("the tokenizer cannot be written to a GGUF file: {message}"))
    };
    has_only_bos(&words).map_err(fault)?;
    let (whole, model) = (folder.join("tokenizer.json"), folder.join("tokenizer.model"));
    let mut all: Vec<(&str, Value)> = Vec::new();
    let pieces = if let Some(rule) = words.kind().strip_prefix("byte-level BPE, ") {
        let (pieces, merges) = bytes(&json::read(&whole)?, settings.table()).map_err(fault)?;
        all.extend([("model", Value::Text("gpt2".into())), ("pre", Value::Text(rule.into()))]);
        all.push(("merges", Value::List(merges)));
        pieces
    } else if words.kind() == "sentencepiece BPE" && model.is_file() {
        let data = std::fs::read(&model).map_err(|error| Error::io(&model, error))?;
        let model = proto::parse(&data).map_err(fault)?;
        let prefix = settings.tokenizer["add_prefix_space"].as_bool().unwrap_or(model.prefix);
        let pieces = settings.all_pieces(model).map_err(fault)?;
        all.extend([("model", Value::Text("llama".into())), ("pre", Value::Text("default".into()))]);
        all.push(("add_space_prefix", Value::Bool(prefix)));
        let scores = pieces.iter().map(|piece| Value::Float(f64::from(piece.score))).collect();
        all.push(("scores", Value::List(scores)));
        pieces
    } else {
        return Err(fault(match words.kind() {
            "sentencepiece BPE" => {
                "it needs sentencepiece's scores, which are in tokenizer.model only".into()
            }
            "byte-level BPE" => "it cuts text by a rule that has no name in GGUF files".into(),
            other => format!("it is {other}; byte-level BPE and sentencepiece BPE can be written"),
        }));
    };
    all.extend(named(&words, &settings, &pieces).map_err(fault)?);
    all.push(("add_bos_token", Value::Bool(words.bos().is_some())));
    all.extend(lists(&pieces));
    let mut metadata: Vec<_> =
        all.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    if let Some((_, source)) = settings.template(folder)? {
        metadata.push(("tokenizer.chat_template".into(), Value::Text(source)));
    }
    let written = Words::of_metadata(&metadata.iter().cloned().collect()).map_err(fault)?;
    says_the_same(&words, &written)?.map_err(fault)?;
    let remark = other_chat(&words, &written)?;
    Ok(TokenizerMetadata { metadata, remark })
}

/// The keys that name tokens.
fn named(words: &Words, settings: &Settings, pieces: &[Piece]) -> Result<Vec<(&'static str, Value)>, String> {
    let marked = |name: &str| {
        let place = settings.mark(name).and_then(|text| pieces.iter().position(|piece| piece.text == text));
        place.map(|id| id as u32)
    };
    let eos = marked("eos_token").or(words.ends().first().copied());
    let is_known =
        |id: &u32| pieces.get(*id as usize).is_some_and(|piece| is_known_end(&piece.text, piece.kind));
    // Ends that are known by their texts need no key, and get one where there is place.
    let others = words.ends().iter().copied().filter(|id| Some(*id) != eos);
    let (known, unknown): (Vec<u32>, Vec<u32>) = others.partition(is_known);
    if let Some(fourth) = unknown.get(2) {
        return Err(format!(
            "it has more than three ends of an answer, of which GGUF has no place for {fourth}"
        ));
    }
    let mut more = unknown.into_iter().chain(known);
    let ids = [
        ("bos_token_id", words.bos().or(marked("bos_token"))),
        ("eos_token_id", eos),
        ("eot_token_id", more.next()),
        ("eom_token_id", more.next()),
        ("unknown_token_id", marked("unk_token")),
        ("padding_token_id", marked("pad_token")),
    ];
    Ok(ids.into_iter().filter_map(|(key, id)| Some((key, Value::Integer(id?.into())))).collect())
}

/// Texts that rules of cutting, normalising and blanks tell apart. None begins with a blank, which GGUF has no rule for.
const PROBES: [&str; 7] = [
    "The ship's 12345 sails, IT'S 3.14",
    "Cafe\u{301} na\u{ef}ve STRASSE stra\u{df}e \u{fb01}n \u{ff21}\u{ff22}",
    "x  y   z\t\tend \n\n\n new!!\r\n--->",
    "\u{4f60}\u{597d} \u{3053}\u{3093} 2024\u{5e74} \u{1f600}\u{1f468}\u{200d}\u{1f469}",
    "don't WE'LL i'd he'Ve",
    "<|im_start|>user\nhi<|im_end|>",
    "a",
];

/// Whether what is written cuts texts as the tokenizer does, and ends answers where it does. It may end them at further tokens,
/// which end answers of every model that has them.
fn says_the_same(words: &Words, written: &Words) -> Result<Result<(), String>> {
    let is_cut = |text: &str| {
        Err(format!(
            "it cuts {text:?} in a way that GGUF has no rule for (a normaliser, a blank before texts, or tokens that stand in \
             one of its files only)"
        ))
    };
    for text in PROBES {
        if words.encode(text)? != written.encode(text)? {
            return Ok(is_cut(text));
        }
    }
    for text in words.added() {
        if words.parsed(&text)? != written.parsed(&text)? {
            return Ok(is_cut(&text));
        }
    }
    match words.ends().iter().find(|id| !written.ends().contains(id)) {
        None => Ok(Ok(())),
        Some(id) => Ok(Err(format!("token {id} ends answers, and would not"))),
    }
}

/// In what a conversation differs from the folder's, of which GGUF has not all rules.
fn other_chat(words: &Words, written: &Words) -> Result<Option<String>> {
    let Some(chat) = words.chat() else { return Ok(None) };
    let messages = [Message::user("hi"), Message::assistant("ho"), Message::user("x")];
    // A template may refuse some messages.
    let rendered = chat.render(&messages, true).or_else(|_| chat.render(&messages[..1], true));
    let Ok(text) = rendered else {
        return Ok(Some(
            "the template refuses a plain conversation, so its tokens were not compared with the folder's"
                .into(),
        ));
    };
    let is_same =
        |of: fn(&Words, &str) -> Result<Vec<u32>>| Ok::<_, Error>(of(words, &text)? == of(written, &text)?);
    Ok(match (is_same(Words::parsed)?, is_same(Words::encode_chat)?) {
        (true, true) => None,
        (true, false) => Some("a conversation begins with BOS in a GGUF file, and not in the folder".into()),
        (false, _) => Some(
            "a conversation gets other tokens than in the folder, such as blanks before messages, for which GGUF has no rule"
                .into(),
        ),
    })
}

/// Refuses a tokenizer that puts other tokens than BOS around a text.
fn has_only_bos(words: &Words) -> Result<(), String> {
    let of = |ids: Result<Vec<u32>>| ids.map_err(|error| error.to_string());
    let (all, plain) = (of(words.encode("a"))?, of(words.encode_plain("a"))?);
    match all == words.bos().into_iter().chain(plain).collect::<Vec<_>>() {
        true => Ok(()),
        false => Err("it puts other tokens than BOS around a text".into()),
    }
}
