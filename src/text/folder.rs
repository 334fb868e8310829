//! The tokenizer of a Hugging Face folder.

use super::chat::ChatTemplate;
use super::pieces::{self, Prefix};
use super::stream::Rule;
use super::words::{Parts, Words, distinct};
use super::{json, proto, split};
use crate::error::{Error, Result};
use crate::store::gguf::Gguf;
use crate::store::located;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, ModelWrapper, NormalizerWrapper, Tokenizer};

/// The files beside the tokenizer. Those that are missing are null.
pub(super) struct Settings {
    model: Value,
    generation: Value,
    pub tokenizer: Value,
    special: Value,
    added: Value,
}

/// A token in `tokenizer_config.json`, which is written as text or as an object.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// What is looked at before a `tokenizer.json` is read as a whole.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    model: HeadModel,
}

#[derive(Default, Deserialize)]
struct HeadModel {
    continuing_subword_prefix: Option<String>,
}

/// Checks what a `tokenizer.json` puts around a text. The library that runs it takes for granted that every token is there.
fn check_processor(processor: &Value) -> Result<(), String> {
    for inner in processor["processors"].as_array().into_iter().flatten() {
        check_processor(inner)?;
    }
    for piece in processor["single"].as_array().into_iter().flatten() {
        let token = piece["SpecialToken"]["id"].as_str();
        if let Some(token) = token.filter(|token| processor["special_tokens"][token].is_null()) {
            return Err(format!(
                "its post-processor puts '{token}' around texts and does not say what that is"
            ));
        }
        if piece["Sequence"]["id"] == "B" {
            return Err("its post-processor asks for a second text".into());
        }
    }
    Ok(())
}

impl Settings {
    pub fn read(folder: &Path) -> Result<Settings> {
        let read = |name: &str| json::read(&folder.join(name));
        Ok(Settings {
            model: read("config.json")?,
            generation: read("generation_config.json")?,
            tokenizer: read("tokenizer_config.json")?,
            special: read("special_tokens_map.json")?,
            added: read("added_tokens.json")?,
        })
    }

    /// The text of a control token, such as `bos_token`.
    pub fn mark(&self, name: &str) -> Option<&str> {
        content(&self.tokenizer[name]).or_else(|| content(&self.special[name]))
    }

    fn marks(&self) -> BTreeMap<String, String> {
        let names = ["bos_token", "eos_token", "unk_token", "pad_token"];
        names.into_iter().filter_map(|name| Some((name.into(), self.mark(name)?.into()))).collect()
    }

    /// Size of the model's table of tokens, which may be larger or smaller than the tokenizer.
    pub fn table(&self) -> Option<usize> {
        self.model["vocab_size"].as_u64().and_then(|size| usize::try_from(size).ok())
    }

    /// Tokens that end an answer: those of generation_config.json, or else those of config.json, and the tokenizer's own.
    fn ends(&self, tokenizer: &Tokenizer, limit: usize) -> Result<Vec<u32>, String> {
        let fault = |file: &str| format!("eos_token_id of {file} is neither a token nor a list of tokens");
        let mut ends =
            json::ids(&self.generation["eos_token_id"]).ok_or_else(|| fault("generation_config.json"))?;
        if ends.is_empty() {
            ends = json::ids(&self.model["eos_token_id"]).ok_or_else(|| fault("config.json"))?;
        }
        let own = self.mark("eos_token").and_then(|token| tokenizer.token_to_id(token));
        ends.extend(own.filter(|id| (*id as usize) < limit));
        Ok(distinct(ends))
    }

    /// The template in its own file, or else in tokenizer_config.json, where it may be one of several.
    fn chat(&self, folder: &Path) -> Result<Option<ChatTemplate>> {
        let Some((path, source)) = self.template(folder)? else { return Ok(None) };
        ChatTemplate::new(&source, self.marks()).map(Some).map_err(|message| Error::format(path, message))
    }

    /// The text of the template, and the file that has it.
    pub fn template(&self, folder: &Path) -> Result<Option<(PathBuf, String)>> {
        let path = folder.join("chat_template.jinja");
        match std::fs::read_to_string(&path) {
            Ok(source) => Ok(Some((path, source))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let named = |all: &Vec<Value>| {
                    let default = all.iter().find(|one| one["name"] == "default")?;
                    default["template"].as_str().map(str::to_string)
                };
                let value = &self.tokenizer["chat_template"];
                let source = value.as_str().map(str::to_string).or_else(|| value.as_array().and_then(named));
                Ok(source.map(|source| (folder.join("tokenizer_config.json"), source)))
            }
            Err(error) => Err(Error::io(path, error)),
        }
    }

    /// The tokens that stand in tokenizer_config.json or added_tokens.json, by their ids.
    pub fn listed(&self) -> Result<Vec<(u32, AddedToken)>, String> {
        let mut all: Vec<(u32, AddedToken)> = Vec::new();
        let listed = self.tokenizer["added_tokens_decoder"].as_object().into_iter().flatten();
        for (id, token) in listed {
            let flag = |name: &str| token[name] == true;
            let text = token["content"].as_str().ok_or("added_tokens_decoder has a token without content")?;
            let added = AddedToken::from(text, flag("special")).normalized(flag("normalized"));
            let added = added.lstrip(flag("lstrip")).rstrip(flag("rstrip")).single_word(flag("single_word"));
            all.push((id.parse().map_err(|_| format!("added_tokens_decoder has '{id}' for an id"))?, added));
        }
        for (text, id) in self.added.as_object().into_iter().flatten() {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let id = id.ok_or_else(|| format!("added_tokens.json has no id for '{text}'"))?;
            if all.iter().all(|(other, _)| *other != id) {
                all.push((id, AddedToken::from(&text[..], false)));
            }
        }
        all.sort_by_key(|(id, _)| *id);
        Ok(all)
    }

    /// Adds the tokens that are listed and are not in `tokenizer.model`.
    fn extend(&self, tokenizer: &mut Tokenizer) -> Result<(), String> {
        for (id, token) in self.listed()? {
            let text = token.content.clone();
            tokenizer.add_tokens(&[token]);
            if tokenizer.token_to_id(&text) != Some(id) {
                return Err(format!("the added token '{text}' cannot have the id {id}"));
            }
        }
        Ok(())
    }

    /// Reads `tokenizer.json`, which says everything about the text itself.
    fn whole(&self, path: &Path) -> Result<Parts, String> {
        let of = |error: serde_json::Error| error.to_string();
        let text = std::fs::read(path).map_err(|error| error.to_string())?;
        let head: Head = serde_json::from_slice(&text).map_err(of)?;
        if head.model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty()) {
            return Err("its tokens inside a word have a prefix, which is not read".into());
        }
        let tokenizer = Tokenizer::from_bytes(&text).map_err(|error| error.to_string())?;
        check_processor(&serde_json::to_value(tokenizer.get_post_processor()).map_err(of)?)?;
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(of)?;
        let cutter = serde_json::to_value(tokenizer.get_pre_tokenizer()).map_err(of)?;
        let rule = Rule::of(&decoder)?;
        let composes = match tokenizer.get_normalizer() {
            Some(NormalizerWrapper::Sequence(all)) => matches!(all.as_ref(), [NormalizerWrapper::NFC(_)]),
            other => matches!(other, Some(NormalizerWrapper::NFC(_))),
        };
        let kind = match tokenizer.get_model() {
            ModelWrapper::BPE(model) if model.byte_fallback => "sentencepiece BPE".to_string(),
            ModelWrapper::BPE(_) if rule == Rule::byte_level() => {
                match split::recognised(&cutter, composes) {
                    Some(name) => format!("byte-level BPE, {name}"),
                    None => "byte-level BPE".into(),
                }
            }
            ModelWrapper::BPE(_) => "BPE".into(),
            ModelWrapper::Unigram(_) => "sentencepiece unigram".into(),
            ModelWrapper::WordPiece(_) => "WordPiece".into(),
            ModelWrapper::WordLevel(_) => "words".into(),
        };
        let (before, after) = (Vec::new(), Vec::new());
        let (ends, begins_chats) = (Vec::new(), false);
        Ok(Parts { tokenizer, rule, before, after, begins_chats, ends, limit: 0, kind, chat: None })
    }

    /// Reads `tokenizer.model` as transformers does for Llama's and Mistral's.
    fn pieces(&self, data: &[u8]) -> Result<Parts, String> {
        let model = proto::parse(data)?;
        let flag = |name: &str| self.tokenizer[name].as_bool();
        let prefix = flag("add_prefix_space").unwrap_or(model.prefix);
        let place = match (prefix, flag("legacy").unwrap_or(true)) {
            (false, _) => Prefix::Nowhere,
            (true, true) => Prefix::EachPart,
            (true, false) => Prefix::Start,
        };
        let mut tokenizer = pieces::tokenizer(&model.pieces, place)?;
        self.extend(&mut tokenizer)?;
        let token = |name: &str, own: Option<u32>| match self.mark(name) {
            None => Ok(own.filter(|id| (*id as usize) < model.pieces.len())),
            Some(text) => tokenizer
                .token_to_id(text)
                .map(Some)
                .ok_or_else(|| format!("its {name} is '{text}', which is none of its tokens")),
        };
        let (bos, eos) = (token("bos_token", model.bos)?, token("eos_token", model.eos)?);
        let chosen = |on: bool, id: Option<u32>| id.filter(|_| on).into_iter().collect();
        Ok(Parts {
            before: chosen(flag("add_bos_token").unwrap_or(true), bos),
            after: chosen(flag("add_eos_token").unwrap_or(false), eos),
            begins_chats: false,
            tokenizer,
            rule: Rule::pieces(prefix),
            ends: eos.into_iter().collect(),
            limit: 0,
            kind: "sentencepiece BPE".into(),
            chat: None,
        })
    }
}

impl Words {
    /// Reads a folder's `tokenizer.json`, or else its `tokenizer.model`, and what the other files say about the text: config.json,
    /// generation_config.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read. [`Error::Format`] when there is no tokenizer, or a file is damaged, contradicts
    /// another one, or says something that is not known here.
    pub fn in_folder(folder: &Path) -> Result<Words> {
        let settings = Settings::read(folder)?;
        let (whole, pieces) = (folder.join("tokenizer.json"), folder.join("tokenizer.model"));
        let (path, parts) = if whole.is_file() {
            let parts = settings.whole(&whole);
            (whole, parts)
        } else if pieces.is_file() {
            let data = std::fs::read(&pieces).map_err(|error| Error::io(&pieces, error))?;
            (pieces, settings.pieces(&data))
        } else {
            let message =
                "it has neither tokenizer.json nor tokenizer.model; a model folder needs its tokenizer";
            return Err(Error::format(folder, message));
        };
        let fault = |message: String| Error::format(&path, message);
        let mut parts = parts.map_err(fault)?;
        parts.limit = settings.table().unwrap_or_else(|| parts.tokenizer.get_vocab_size(true));
        let own = std::mem::take(&mut parts.ends);
        parts.ends = settings.ends(&parts.tokenizer, parts.limit).map_err(fault)?;
        if parts.ends.is_empty() {
            parts.ends = own;
        }
        parts.chat = settings.chat(folder)?;
        Words::assembled(parts).map_err(fault)
    }

    /// Reads the tokenizer of a GGUF file, of a folder, or of a model in the cache of Hugging Face's hub by its name.
    ///
    /// # Errors
    /// As [`of_gguf`](Words::of_gguf) and [`in_folder`](Words::in_folder).
    pub fn open(path: &Path) -> Result<Words> {
        let path = &located(path);
        if path.is_dir() { Words::in_folder(path) } else { Words::of_gguf(&Gguf::open(path)?) }
    }
}
