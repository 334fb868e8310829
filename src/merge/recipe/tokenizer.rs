//! The files of the output that describe its tokens, and what follows for its settings.

use super::choice::TokenizerSource;
use super::job::Job;
use super::settings::{PARTS, for_parts};
use super::tokens::{Added, TOKENIZER};
use super::vocabulary::Chosen;
use crate::error::{Error, Result};
use crate::store::{is_tokenizer, settings_in};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Models of sentencepiece, to which no tokens can be added here.
const PIECES: [&str; 2] = [".model", ".spm"];

/// The settings beside `config.json` that have ids of tokens.
const GENERATION: &str = "generation_config.json";

impl Job {
    /// The names of the files that the output has, where those of the leading model are `names`.
    pub(super) fn with_tokenizer(&self, mut names: Vec<String>) -> Result<Vec<String>> {
        match &self.vocabulary {
            Some(Chosen { source: TokenizerSource::Union, found, .. }) if !found.new.is_empty() => {
                names.retain(|name| !PIECES.iter().any(|end| name.ends_with(end)));
            }
            Some(Chosen { source: TokenizerSource::Model(_), folder, .. }) => {
                names.retain(|name| !is_tokenizer(name));
                names.extend(settings_in(folder)?.into_iter().filter(|name| is_tokenizer(name)));
                names.sort();
            }
            _ => {}
        }
        Ok(names)
    }

    /// The folder that a file is copied from, where the leading model's is `lead`.
    pub(super) fn folder_for(&self, name: &str, lead: PathBuf) -> PathBuf {
        match &self.vocabulary {
            Some(chosen) if is_tokenizer(name) && matches!(chosen.source, TokenizerSource::Model(_)) => {
                chosen.folder.clone()
            }
            _ => lead,
        }
    }

    /// The contents of a file of the output but `config.json`, from those of the file that it is copied from.
    pub(super) fn with_tokens(&self, path: &Path, bytes: Vec<u8>) -> Result<(Vec<u8>, Vec<String>)> {
        let Some(chosen) = &self.vocabulary else { return Ok((bytes, Vec::new())) };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let (new, mut notes) = (&chosen.found.new, Vec::new());
        let known = [TOKENIZER, "tokenizer_config.json", "added_tokens.json"];
        let extends = !new.is_empty() && known.contains(&&*name);
        if !extends && (name != GENERATION || chosen.found.moved.is_empty()) {
            return Ok((bytes, notes));
        }
        let mut all: Value =
            serde_json::from_slice(&bytes).map_err(|e| Error::format(path, e.to_string()).because_of(e))?;
        let before = all.clone();
        match &*name {
            GENERATION => self.follow_ids(GENERATION, &mut all, &mut notes),
            _ => extend(&name, &mut all, new).map_err(|message| Error::format(path, message))?,
        }
        let bytes = if all == before { bytes } else { format!("{all:#}\n").into_bytes() };
        Ok((bytes, notes))
    }

    /// Makes `config.json` follow the output's vocabulary.
    pub(super) fn follow_vocabulary(&self, settings: &mut Value, notes: &mut Vec<String>) {
        let Some(chosen) = &self.vocabulary else { return };
        self.follow_ids("config.json", settings, notes);
        if chosen.found.is_same {
            return;
        }
        let rows = chosen.found.rows;
        let mut is_said = false;
        let mut changes = false;
        for_parts(settings, &mut |part| {
            if let Some(size) = part.get_mut("vocab_size").filter(|size| size.is_number()) {
                is_said = true;
                changes |= *size != json!(rows);
                *size = json!(rows);
            }
        });
        // Some kinds of models leave out a size that is usual for them.
        if !is_said && self.leader().tables().iter().any(|(_, shape)| shape.first() != Some(&rows)) {
            let part = PARTS.iter().find(|part| settings[**part].is_object());
            let part = match part {
                Some(part) => &mut settings[*part],
                None => settings,
            };
            if let Some(part) = part.as_object_mut() {
                part.insert("vocab_size".into(), json!(rows));
                changes = true;
            }
        }
        if changes {
            notes.push(format!("config.json: `vocab_size` becomes {rows}"));
        }
    }

    /// Replaces the ids of tokens in settings by those that the tokens have in the output.
    fn follow_ids(&self, file: &str, settings: &mut Value, notes: &mut Vec<String>) {
        let Some(chosen) = self.vocabulary.as_ref().filter(|chosen| !chosen.found.moved.is_empty()) else {
            return;
        };
        let theirs = std::fs::read(chosen.folder.join(file)).ok();
        let theirs: Value = theirs.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let place = chosen.folder.display();
        for_parts(settings, &mut |part| {
            for (key, value) in part.iter_mut() {
                if !["_token_id", "_token_ids", "_token_index"].iter().any(|end| key.ends_with(end)) {
                    continue;
                }
                let texts = chosen.texts(value);
                *value = match chosen.moved(value) {
                    Some(to) if to == *value => continue,
                    Some(to) => {
                        notes.push(format!("{file}: `{key}` {value} ({texts}) becomes {to}"));
                        to
                    }
                    // The tokenizer's own model says which token has the same task.
                    None => {
                        let to = said(&theirs, key).cloned().unwrap_or_default();
                        notes.push(format!(
                            "{file}: `{key}` {value} ({texts}) is no token of the output, and becomes {to} as in {place}"
                        ));
                        to
                    }
                };
            }
        });
    }

    /// Says which files of the tokenizer are others than the leading model's, and how they are changed.
    pub(super) fn note_tokenizer(&mut self, lead: &[String], folder: &Path) -> Result<()> {
        let Some(chosen) = &self.vocabulary else { return Ok(()) };
        let names = self.with_tokenizer(lead.to_vec())?;
        let is_gone = |name: &&String| !names.contains(name);
        let gone: Vec<&str> = lead.iter().filter(is_gone).map(String::as_str).collect();
        let mut notes = Vec::new();
        if !gone.is_empty() {
            let gone = gone.join(", ");
            notes.push(match chosen.source {
                TokenizerSource::Union => format!("{gone} is left out, because it lacks the added tokens"),
                _ => format!(
                    "{gone} of the leading model is left out, because the output has another tokenizer"
                ),
            });
        }
        if let TokenizerSource::Model(_) = chosen.source {
            let own: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_tokenizer(name)).collect();
            notes.push(format!("{} from {}", own.join(", "), chosen.folder.display()));
        }
        let path = folder.join(GENERATION);
        if let Ok(bytes) = std::fs::read(&path) {
            notes.append(&mut self.with_tokens(&path, bytes)?.1);
        }
        self.notes.append(&mut notes);
        Ok(())
    }
}

impl Chosen {
    /// An id, or a list of them, as the output has it. `None` if it has none of these tokens.
    fn moved(&self, value: &Value) -> Option<Value> {
        let one = |value: &Value| {
            let moved = value.as_u64().and_then(|id| self.found.moved.get(&u32::try_from(id).ok()?));
            moved.map_or(Some(value.clone()), |to| to.map(|to| json!(to)))
        };
        match value {
            Value::Array(all) if all.is_empty() => Some(value.clone()),
            Value::Array(all) => {
                let all: Vec<Value> = all.iter().filter_map(one).collect();
                (!all.is_empty()).then_some(Value::Array(all))
            }
            value => one(value),
        }
    }

    /// The tokens of these ids in the leading model, for a note.
    fn texts(&self, value: &Value) -> String {
        let text = |value: &Value| self.lead.by_id.get(&u32::try_from(value.as_u64()?).ok()?).cloned();
        let all: Vec<String> = match value {
            Value::Array(all) => all.iter().filter_map(text).collect(),
            one => text(one).into_iter().collect(),
        };
        crate::store::some(all.iter().map(String::as_str))
    }
}

/// What settings say, or a part of them.
fn said<'a>(settings: &'a Value, key: &str) -> Option<&'a Value> {
    let inner = || PARTS.iter().filter_map(|part| settings.get(part));
    settings.get(key).filter(|value| !value.is_null()).or_else(|| inner().find_map(|part| said(part, key)))
}

/// Adds tokens to a file of a tokenizer.
fn extend(name: &str, all: &mut Value, new: &[Added]) -> Result<(), String> {
    let object = all.as_object_mut().ok_or("it is no object")?;
    match name {
        TOKENIZER => {
            let list = object.entry("added_tokens").or_insert(Value::Null);
            if list.is_null() {
                *list = json!([]);
            }
            let list = list.as_array_mut().ok_or("its added_tokens are no list")?;
            list.extend(new.iter().map(|token| Value::Object(entry(token, true))));
        }
        "added_tokens.json" => object.extend(new.iter().map(|token| (token.text.clone(), json!(token.id)))),
        _ => {
            // Without the list, other programs take what tokenizer.json says.
            let list = object.get_mut("added_tokens_decoder").and_then(Value::as_object_mut);
            list.into_iter().for_each(|list| {
                list.extend(
                    new.iter().map(|token| (token.id.to_string(), Value::Object(entry(token, false)))),
                );
            });
        }
    }
    Ok(())
}

/// A token as files describe it.
fn entry(token: &Added, has_id: bool) -> Map<String, Value> {
    let mut said = token.said.clone();
    said.insert("content".into(), json!(token.text));
    said.remove("id");
    if has_id {
        said.insert("id".into(), json!(token.id));
    }
    said
}
