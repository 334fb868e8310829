//! Writes a tokenizer into a folder, whatever file it is from.

use super::stream::Rule;
use super::words::Words;
use crate::error::{Error, Result};
use crate::files;
use serde_json::{Value, json};
use std::path::Path;

impl Rule {
    /// The decoder of a `tokenizer.json` that does this, for the rules that are made without one.
    fn decoder(&self) -> Option<Value> {
        let blank = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
        let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        if *self == Rule::byte_level() {
            return Some(
                json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
            );
        }
        let parts = match [true, false].into_iter().find(|&prefix| *self == Rule::pieces(prefix))? {
            true => vec![blank, bytes, fuse, strip],
            false => vec![blank, bytes, fuse],
        };
        Some(json!({"type": "Sequence", "decoders": parts}))
    }
}

impl Words {
    /// Writes the tokenizer into a folder, from which [`Words::in_folder`] reads the same, and which other programs open: `tokenizer.json`,
    /// `tokenizer_config.json` with the chat template and the names of control tokens, and `generation_config.json` with the tokens that
    /// end an answer. `config.json`, whose number of tokens may be larger, is the model's.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let fault =
            |error: serde_json::Error| Error::config(format!("the tokenizer cannot be written: {error}"));
        let text = |value: &Value| serde_json::to_string_pretty(value).map_err(fault);
        let mut whole = serde_json::to_value(self.tokenizer()).map_err(fault)?;
        if whole["decoder"].is_null()
            && let Some(decoder) = self.rule().decoder()
        {
            whole["decoder"] = decoder;
        }
        let [before, after] = self.around();
        if !(before.is_empty() && after.is_empty()) {
            whole["post_processor"] = self.processor(before, after)?;
        }
        let put = |name: &str, text: String| files::replace_with(&folder.join(name), text);
        put("tokenizer.json", whole.to_string())?;
        let mut config =
            json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
        let named = |id: Option<u32>| id.and_then(|id| self.tokenizer().id_to_token(id));
        for (name, token) in
            [("bos_token", named(self.bos())), ("eos_token", named(self.ends().first().copied()))]
        {
            if let Some(token) = token {
                config[name] = token.into();
            }
        }
        if let Some(chat) = self.chat() {
            config["chat_template"] = chat.source().into();
            chat.marks().iter().for_each(|(name, token)| config[name] = token[..].into());
        }
        put("tokenizer_config.json", text(&config)?)?;
        let mut generation = json!({});
        if !self.ends().is_empty() {
            generation["eos_token_id"] = self.ends().into();
        }
        if let Some(bos) = self.bos() {
            generation["bos_token_id"] = bos.into();
        }
        put("generation_config.json", text(&generation)?)
    }

    /// The post-processor that puts these tokens around a text.
    fn processor(&self, before: &[u32], after: &[u32]) -> Result<Value> {
        let name = |id: &u32| {
            let found = self.tokenizer().id_to_token(*id);
            found.ok_or_else(|| Error::config(format!("the tokenizer has no token {id}")))
        };
        let mut single = Vec::new();
        let mut special = json!({});
        for (i, id) in before.iter().chain(after).enumerate() {
            if i == before.len() {
                single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
            }
            let name = name(id)?;
            single.push(json!({"SpecialToken": {"id": name, "type_id": 0}}));
            special[&name] = json!({"id": name, "ids": [id], "tokens": [name]});
        }
        if after.is_empty() {
            single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        }
        let mut pair = single.clone();
        pair.push(json!({"Sequence": {"id": "B", "type_id": 1}}));
        Ok(json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}))
    }
}
