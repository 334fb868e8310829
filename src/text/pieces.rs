//! BPE over sentencepiece's pieces, of a `tokenizer.model` or of a GGUF file of the kind `llama`.
//!
//! Sentencepiece joins the pair whose result has the highest score. Here the same is said by merges in the order of the scores.

use super::stream::fallback;
use std::collections::HashMap;
use tokenizers::models::bpe::{BpeBuilder, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, NormalizerWrapper, Tokenizer};

/// A token.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: Kind,
}

/// What a token is for. GGUF has sentencepiece's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    /// Begins or ends texts and messages, and is not written in them.
    Control,
    /// Always one token, wherever it is written.
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    pub fn of(number: i128) -> Result<Kind, String> {
        Ok(match number {
            // GGUF calls it undefined, and treats it as any token.
            0 | 1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            other => return Err(format!("a token is of the unknown type {other}")),
        })
    }

    /// The number of a kind in a GGUF file.
    pub fn number(self) -> i128 {
        match self {
            Kind::Normal => 1,
            Kind::Unknown => 2,
            Kind::Control => 3,
            Kind::UserDefined => 4,
            Kind::Unused => 5,
            Kind::Byte => 6,
        }
    }

    /// How the tokenizer finds such a token in a text, if it is more than BPE's.
    pub fn added(self, text: &str) -> Option<AddedToken> {
        match self {
            Kind::Control | Kind::Unknown => Some(AddedToken::from(text, true)),
            Kind::UserDefined => Some(AddedToken::from(text, false).normalized(false)),
            _ => None,
        }
    }
}

/// Where a blank is put that the user did not write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prefix {
    Nowhere,
    /// Before every part of a text that follows a control token, and before its start.
    EachPart,
    /// Before the start of the text, unless it begins with a blank.
    Start,
}

/// The ids of tokens by their text.
pub(super) type Vocabulary<'a> = HashMap<&'a str, u32>;

/// Returns the ids of tokens. Two tokens of one text are an error.
pub(super) fn numbered<'a>(tokens: impl Iterator<Item = &'a str>) -> Result<Vocabulary<'a>, String> {
    let mut all = HashMap::new();
    for (token, id) in tokens.zip(0u32..) {
        if let Some(other) = all.insert(token, id) {
            return Err(format!("tokens {other} and {id} are both '{token}'"));
        }
    }
    Ok(all)
}

/// The pairs that are joined, in the order in which they are preferred.
fn merges(pieces: &[Piece], vocabulary: &Vocabulary) -> Vec<(String, String)> {
    let normal = |text: &str| {
        let id = vocabulary.get(text).copied()?;
        (pieces[id as usize].kind == Kind::Normal).then_some(id)
    };
    let mut all = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.kind == Kind::Normal) {
        let cuts = piece.text.char_indices().skip(1).map(|(at, _)| piece.text.split_at(at));
        let mut pairs: Vec<_> =
            cuts.filter_map(|(left, right)| Some((normal(left)?, normal(right)?, left, right))).collect();
        pairs.sort_by_key(|(left, right, ..)| (*left, *right));
        all.extend(pairs.into_iter().map(|(_, _, left, right)| (piece.score, left, right)));
    }
    // Among equal scores the longer parts come first, and then the order of the tokens.
    let length = |text: &str| text.chars().count();
    all.sort_by(|(x, a, b), (y, c, d)| {
        y.total_cmp(x).then_with(|| (length(c), length(d)).cmp(&(length(a), length(b))))
    });
    all.into_iter().map(|(_, left, right)| (left.into(), right.into())).collect()
}

fn normalizer(prefix: bool) -> Result<Sequence, String> {
    let blanks = Replace::new(" ", "\u{2581}").map_err(|error| error.to_string())?;
    let mut parts: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        parts.push(Prepend::new("\u{2581}".into()).into());
    }
    parts.push(blanks.into());
    Ok(Sequence::new(parts))
}

/// Most bytes of a piece or of an added token. Sentencepiece makes pieces of 16 letters, and of longer runs of blanks. Every place in
/// a piece is tried as its cut, and added tokens are searched in every text, so that a damaged file with a token of megabytes
/// would take hours.
const LONGEST: usize = 1024;

/// Refuses a token that is too long to be one.
pub(super) fn check_length(text: &str) -> Result<(), String> {
    if text.len() <= LONGEST {
        return Ok(());
    }
    let start: String = text.chars().take(20).collect();
    Err(format!("the token '{start}...' has {} bytes, over {LONGEST}", text.len()))
}

/// Makes the tokenizer of these pieces.
pub(super) fn tokenizer(pieces: &[Piece], prefix: Prefix) -> Result<Tokenizer, String> {
    if let Some(piece) = pieces.iter().find(|piece| piece.score.is_nan()) {
        return Err(format!("the score of '{}' is no number", piece.text));
    }
    pieces.iter().try_for_each(|piece| check_length(&piece.text))?;
    let vocabulary = numbered(pieces.iter().map(|piece| &piece.text[..]))?;
    let bytes = pieces.iter().filter(|p| p.kind == Kind::Byte && fallback(&p.text).is_some()).count() == 256;
    let unknown = pieces.iter().find(|piece| piece.kind == Kind::Unknown);
    if unknown.is_none() && !bytes {
        return Err("it has no tokens for single bytes and none for what is unknown".into());
    }
    let merges = merges(pieces, &vocabulary);
    let owned = vocabulary.into_iter().map(|(text, id)| (text.to_string(), id));
    let mut model = BpeBuilder::new()
        .vocab_and_merges(owned.collect::<Vocab>(), merges)
        .fuse_unk(true)
        .byte_fallback(bytes);
    if let Some(unknown) = unknown {
        model = model.unk_token(unknown.text.clone());
    }
    let mut tokenizer = Tokenizer::new(model.build().map_err(|error| error.to_string())?);
    if prefix == Prefix::Start {
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('\u{2581}', PrependScheme::First, false)));
    } else {
        tokenizer.with_normalizer(Some(normalizer(prefix == Prefix::EachPart)?));
    }
    let added: Vec<AddedToken> = pieces.iter().filter_map(|piece| piece.kind.added(&piece.text)).collect();
    tokenizer.add_tokens(&added);
    Ok(tokenizer)
}
