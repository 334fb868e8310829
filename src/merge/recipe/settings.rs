//! The files beside the weights of a merge: which are copied, and what changes in `config.json`.

use super::config::Slice;
use super::job::{Job, layers_of};
use crate::error::{Error, Result};
use crate::files;
use crate::merge::Weights;
use crate::models::network::NETWORK;
use crate::store::{FileDType, others_in, settings_in};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Keys for the number of layers.
const COUNTS: [&str; 4] = ["num_hidden_layers", "num_layers", "n_layers", "n_layer"];

/// Keys for the number of layers of one half of a model, which is that of the layers that are stacked if it is the same.
const SOME_COUNTS: [&str; 3] = ["num_decoder_layers", "decoder_layers", "encoder_layers"];

/// Objects that hold the settings of the language model in a model of several parts.
pub(super) const PARTS: [&str; 5] =
    ["text_config", "llm_config", "language_config", "decoder", "thinker_config"];

/// Lists that are no list of layers, even if they have as many elements.
const OTHER_LISTS: [&str; 9] = [
    "architectures",
    "eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "mrope_section",
    "short_factor",
    "long_factor",
    "forced_decoder_ids",
];

/// Settings that speak of layers by their number or by a period. What they mean for stacked layers differs by model.
const BY_NUMBER: [&str; 23] = [
    "attention_types",
    "mlp_only_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "attn_layer_offset",
    "attn_layer_period",
    "expert_layer_offset",
    "expert_layer_period",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "moe_layer_freq",
    "moe_layers",
    "full_attention_interval",
    "sliding_window_pattern",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "num_kv_shared_layers",
    "cross_attention_layers",
    "global_attn_every_n_layers",
    "global_attention_layers",
    "hybrid_layer_ids",
    "layer_indices",
    "deepstack_visual_indexes",
];

/// A layer of the output: the settings of the model that it is from, that model's number of layers, and its number there.
struct Origin<'a> {
    model: usize,
    settings: Option<&'a Value>,
    layers: usize,
    layer: usize,
}

impl Job {
    /// The folder of the leading model.
    fn leading_folder(&self) -> PathBuf {
        self.leader().folder()
    }

    /// Whether the leading model's folder is its own. What is beside a file in another folder is not of the model.
    fn has_folder(&self) -> bool {
        self.leader().place().is_dir()
            || ["config.json", NETWORK].iter().any(|name| self.leading_folder().join(name).is_file())
    }

    /// Returns the file names of the leading model's settings and tokenizer.
    fn leading_settings(&self) -> Result<Vec<String>> {
        if self.has_folder() { settings_in(&self.leading_folder()) } else { Ok(Vec::new()) }
    }

    /// Returns the file names of the output's settings and tokenizer.
    pub(super) fn settings(&self) -> Result<Vec<String>> {
        self.with_tokenizer(self.leading_settings()?)
    }

    /// Says which files of the leading model's folder are not copied, and what stacked layers leave open in its settings.
    pub(super) fn find_left_behind(&mut self) -> Result<()> {
        self.note_tokenizer(&self.leading_settings()?, &self.leading_folder())?;
        if !self.has_folder() {
            return Ok(());
        }
        let others = others_in(&self.leading_folder())?;
        if !others.is_empty() {
            let (names, folder) = (others.join(", "), self.leading_folder());
            let folder = folder.display();
            self.notes.push(format!("not copied from {folder}: {names}"));
        }
        let path = self.leading_folder().join("config.json");
        if let Ok(bytes) = std::fs::read(&path) {
            let (_, mut notes) = self.changed(&path, bytes)?;
            self.notes.append(&mut notes);
        }
        Ok(())
    }

    /// Copies the leading model's settings and tokenizer, with what follows from the merge in `config.json`.
    pub(super) fn copy_settings(&self, folder: &Path) -> Result<()> {
        for name in self.settings()? {
            let path = self.folder_for(&name, self.leading_folder()).join(&name);
            let mut bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
            if name == "config.json" {
                bytes = self.changed(&path, bytes)?.0;
            } else {
                bytes = self.with_tokens(&path, bytes)?.0;
            }
            files::replace_with(&folder.join(name), bytes)?;
        }
        Ok(())
    }

    /// Returns a model's settings with the layers, the type and the head of the output, and notes about them.
    fn changed(&self, path: &Path, bytes: Vec<u8>) -> Result<(Vec<u8>, Vec<String>)> {
        let mut settings: Value =
            serde_json::from_slice(&bytes).map_err(|e| Error::format(path, e.to_string()).because_of(e))?;
        let before = settings.clone();
        let mut notes = Vec::new();
        self.follow_layers(&mut settings, &mut notes);
        self.follow_vocabulary(&mut settings, &mut notes);
        if self.has_new_head() {
            let is_root = std::cell::Cell::new(true);
            for_parts(&mut settings, &mut |part| {
                // Where nothing is said, transformers takes the head of most kinds to be tied.
                if is_root.replace(false)
                    || ["tie_word_embeddings", "vocab_size"].iter().any(|k| part.contains_key(*k))
                {
                    part.insert("tie_word_embeddings".into(), json!(false));
                }
            });
            notes.push(
                "config.json: `tie_word_embeddings` becomes false, because the output has a head".into(),
            );
        }
        if let Some(dtype) = self.config.dtype {
            let word = match dtype {
                FileDType::BF16 => "bfloat16",
                FileDType::F16 => "float16",
                _ => "float32",
            };
            set_dtype(&mut settings, word);
        }
        let bytes = if settings == before { bytes } else { format!("{settings:#}\n").into_bytes() };
        Ok((bytes, notes))
    }

    /// Makes the number of layers and the lists of a layer's length follow stacked layers.
    fn follow_layers(&self, settings: &mut Value, notes: &mut Vec<String>) {
        let counts: Vec<usize> = self.models.iter().map(|m| layers_of(&m.checkpoint.names())).collect();
        let lead = counts[0];
        let origins = |slice: &Slice| {
            let source = &slice.sources[0];
            let model = self.models.iter().position(|m| m.path == source.model)?;
            let (settings, layers) = (self.models[model].settings.as_ref(), counts[model]);
            let layer = |layer| Origin { model, settings, layers, layer };
            Some(source.layers.clone()?.map(layer).collect::<Vec<_>>())
        };
        let Some(origins) = self.config.slices.iter().map(origins).collect::<Option<Vec<_>>>() else {
            return;
        };
        let origins: Vec<Origin> = origins.into_iter().flatten().collect();
        // The leading model's layers in their order change nothing.
        let same =
            origins.iter().map(|origin| (origin.model, origin.layer)).eq((0..lead).map(|layer| (0, layer)));
        if same {
            return;
        }
        let (mut counted, mut followed, mut open) = (false, Vec::new(), Vec::new());
        for_parts(settings, &mut |part| {
            for key in COUNTS {
                if part.get(key).is_some_and(Value::is_number) {
                    part.insert(key.into(), json!(origins.len()));
                    counted = true;
                }
            }
            follow_lists(part, lead, &origins, [&mut followed, &mut open]);
            for key in SOME_COUNTS {
                if part.get(key) == Some(&json!(lead)) {
                    part.insert(key.into(), json!(origins.len()));
                    counted = true;
                }
            }
            // Qwen2's first layer with a window, where no list says it. Beyond the last layer, none has one.
            let first = part.get("max_window_layers").filter(|_| !part.contains_key("layer_types"));
            if let Some(first) = first.and_then(Value::as_u64) {
                if first as usize >= lead {
                    part.insert("max_window_layers".into(), json!(origins.len().max(first as usize)));
                } else {
                    open.push(format!("`max_window_layers` = {first}"));
                }
            }
            let number = |key: &&&str| part.get(**key).is_some_and(|v| !v.is_null() && v != &json!([]));
            open.extend(BY_NUMBER.iter().filter(number).map(|key| format!("`{key}` = {}", part[*key])));
        });
        if !counted {
            notes.push(format!(
                "config.json gives the number of layers by none of {}; set it to {} by hand",
                COUNTS.join(", "),
                origins.len()
            ));
        }
        if !followed.is_empty() {
            notes.push(format!("config.json: {} follow the layers", followed.join(", ")));
        }
        if !open.is_empty() {
            notes.push(format!(
                "config.json: {} speak of layers by number and are left as they are; look at them",
                open.join(", ")
            ));
        }
    }
}

/// Sets the type of the weights wherever the settings or parts of them say it.
fn set_dtype(settings: &mut Value, word: &str) {
    let Some(all) = settings.as_object_mut() else { return };
    for (key, value) in all {
        let is_type = matches!(value.as_str(), Some("float32" | "float16" | "bfloat16" | "float64"));
        if is_type && (key == "torch_dtype" || key == "dtype") {
            *value = json!(word);
        }
        set_dtype(value, word);
    }
}

/// Visits the settings of the whole model and those of its language model inside them.
pub(super) fn for_parts(settings: &mut Value, visit: &mut dyn FnMut(&mut Map<String, Value>)) {
    let Some(root) = settings.as_object_mut() else { return };
    visit(root);
    for part in PARTS {
        if let Some(inner) = root.get_mut(part) {
            for_parts(inner, visit);
        }
    }
}

/// Makes the lists with an element for each layer follow the layers. A layer of another model has that model's element. Lists
/// of which another model says nothing are left, and named among the `open` ones.
fn follow_lists(
    part: &mut Map<String, Value>,
    lead: usize,
    origins: &[Origin],
    [followed, open]: [&mut Vec<String>; 2],
) {
    for (key, value) in part.iter_mut() {
        let Some(list) = value.as_array().filter(|list| list.len() == lead && lead > 1) else { continue };
        if OTHER_LISTS.contains(&key.as_str()) {
            continue;
        }
        let element = |origin: &Origin| match origin.model {
            0 => list.get(origin.layer).cloned(),
            _ => list_in(origin.settings?, key)
                .filter(|own| own.len() == origin.layers)?
                .get(origin.layer)
                .cloned(),
        };
        match origins.iter().map(element).collect::<Option<Vec<Value>>>() {
            Some(new) => {
                *value = Value::Array(new);
                followed.push(format!("`{key}`"));
            }
            None => open.push(format!("`{key}`, a list of {lead},")),
        }
    }
}

/// A list of a model's settings, or of its language model's.
fn list_in<'a>(settings: &'a Value, key: &str) -> Option<&'a Vec<Value>> {
    let inner = || PARTS.iter().filter_map(|part| settings.get(part));
    settings.get(key).and_then(Value::as_array).or_else(|| inner().find_map(|part| list_in(part, key)))
}
