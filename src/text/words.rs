//! A tokenizer with what its model needs around it.

use super::chat::ChatTemplate;
use super::stream::{Rule, Stream};
use crate::error::{Error, Result};
use std::sync::OnceLock;
use tokenizers::Tokenizer;

/// A model's tokenizer, and what the model's files say about the text around it.
///
/// It is made by [`open`](Words::open), [`of_gguf`](Words::of_gguf) or [`in_folder`](Words::in_folder).
pub struct Words {
    /// Takes control tokens in a text for text.
    tokenizer: Tokenizer,
    /// The same with control tokens recognised. It is made when it is first needed.
    parsing: OnceLock<Tokenizer>,
    rule: Rule,
    before: Vec<u32>,
    after: Vec<u32>,
    begins_chats: bool,
    bos: Option<u32>,
    ends: Vec<u32>,
    limit: usize,
    kind: String,
    chat: Option<ChatTemplate>,
}

/// The numbers without those that came before.
pub(super) fn distinct(all: Vec<u32>) -> Vec<u32> {
    let mut seen = Vec::with_capacity(all.len());
    for id in all {
        if !seen.contains(&id) {
            seen.push(id);
        }
    }
    seen
}

/// What a file says, from which [`Words`] are made.
pub(super) struct Parts {
    pub tokenizer: Tokenizer,
    pub rule: Rule,
    /// Tokens put before and after a text, in addition to those of the tokenizer's own post-processor.
    pub before: Vec<u32>,
    pub after: Vec<u32>,
    /// Whether a conversation gets BOS too, where its template writes none.
    pub begins_chats: bool,
    pub ends: Vec<u32>,
    /// Size of the model's table of tokens.
    pub limit: usize,
    pub kind: String,
    pub chat: Option<ChatTemplate>,
}

fn fault(error: impl ToString) -> Error {
    Error::config(format!("the tokenizer failed on this text: {}", error.to_string()))
}

impl Words {
    /// The texts of the tokens that were added to the vocabulary.
    pub(super) fn added(&self) -> Vec<String> {
        let mut all: Vec<_> = self.tokenizer.get_added_tokens_decoder().into_iter().collect();
        all.sort_by_key(|(id, _)| *id);
        all.into_iter().map(|(_, token)| token.content).collect()
    }

    /// Checks that the parts fit together, and makes words of them.
    pub(super) fn assembled(parts: Parts) -> Result<Words, String> {
        let Parts { mut tokenizer, rule, before, after, begins_chats, ends, limit, kind, chat } = parts;
        if let Some(id) = before.iter().chain(&after).chain(&ends).find(|id| **id as usize >= limit) {
            return Err(format!("token {id} is to begin or end texts, but there are only {limit} tokens"));
        }
        // A file may hold the lengths to which a training cut and padded its texts. They are not part of the model.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(true);
        let parsing = OnceLock::new();
        let bos = None;
        let mut words =
            Words { tokenizer, parsing, rule, before, after, begins_chats, bos, ends, limit, kind, chat };
        words.bos = words.first_added().map_err(|error| error.to_string())?;
        Ok(words)
    }

    /// The token that the file, or else the tokenizer's post-processor, puts before a text.
    fn first_added(&self) -> Result<Option<u32>> {
        let of = |around: bool| self.tokenizer.encode_fast("a", around).map_err(fault);
        let (all, plain) = (of(true)?, of(false)?);
        let own = all.get_ids().first().filter(|_| !all.get_ids().starts_with(plain.get_ids()));
        let first = self.before.first().or(own).copied();
        match first.filter(|id| *id as usize >= self.limit) {
            None => Ok(first),
            Some(id) => {
                Err(fault(format!("it begins with token {id}, and there are only {} tokens", self.limit)))
            }
        }
    }

    fn ids(&self, tokenizer: &Tokenizer, text: &str, around: bool) -> Result<Vec<u32>> {
        let encoding = tokenizer.encode_fast(text, around).map_err(fault)?;
        let ids = encoding.get_ids().to_vec();
        match ids.iter().find(|id| **id as usize >= self.limit) {
            None => Ok(ids),
            Some(id) => Err(fault(format!(
                "it gives token {id}, and the model's table has only {} tokens",
                self.limit
            ))),
        }
    }

    /// Returns the tokens of a text, as the model's own tokenizer gives them: with BOS before it if the model adds one. Control
    /// tokens written in the text are text.
    ///
    /// # Errors
    /// [`Error::Config`] when the text becomes tokens that the model does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.ids(&self.tokenizer, text, true)?;
        Ok([&self.before[..], &ids[..], &self.after[..]].concat())
    }

    /// Returns the tokens of a text alone, without BOS, to continue or measure it.
    ///
    /// # Errors
    /// As [`encode`](Words::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(&self.tokenizer, text, false)
    }

    /// Returns the tokens of what [`ChatTemplate::render`] wrote. Control tokens are recognised in all of it, also in the messages.
    ///
    /// Most templates write BOS. Where one does not, a folder's conversation has none, as from `apply_chat_template` of
    /// transformers, and a GGUF file's has it if its texts have, as in llama.cpp.
    ///
    /// # Errors
    /// As [`encode`](Words::encode).
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>> {
        let mut ids = self.parsed(rendered)?;
        if let Some(bos) = self.bos.filter(|bos| self.begins_chats && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The tokens of a text in which control tokens are recognised.
    pub(crate) fn parsed(&self, text: &str) -> Result<Vec<u32>> {
        let parsing = self.parsing.get_or_init(|| {
            let mut parsing = self.tokenizer.clone();
            parsing.set_encode_special_tokens(false);
            parsing
        });
        self.ids(parsing, text, false)
    }

    /// Returns the text of tokens, without control tokens. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Config`] when the model has no such token.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let mut stream = self.stream();
        let mut text: String = tokens.iter().map(|token| stream.push(*token)).collect::<Result<_>>()?;
        text.push_str(&stream.finish());
        Ok(text)
    }

    /// Begins to decode tokens that come one at a time. For an answer that goes on in the middle of a text, the text's tokens are
    /// pushed first, because sentencepiece leaves out a blank where a text begins.
    pub fn stream(&self) -> Stream<'_> {
        Stream::new(&self.tokenizer, &self.rule, self.limit)
    }

    /// Tokens that end an answer. It is empty if the files name none.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The token that [`encode`](Words::encode) puts before a text, if the model adds one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The number of tokens, with those that were added to the vocabulary.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The tokenizer, with control tokens taken for text.
    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub(super) fn rule(&self) -> &Rule {
        &self.rule
    }

    /// The tokens that are put before and after a text, beside those of the tokenizer's own post-processor.
    pub(super) fn around(&self) -> [&[u32]; 2] {
        [&self.before, &self.after]
    }

    /// Size of the model's table of tokens, as far as the tokenizer's files say it: no token is its own from this on.
    pub fn table(&self) -> usize {
        self.limit
    }

    /// The kind of tokenizer, such as `byte-level BPE, llama-bpe` or `sentencepiece BPE`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The template that writes a conversation as text, if the files have one.
    pub fn chat(&self) -> Option<&ChatTemplate> {
        self.chat.as_ref()
    }
}
