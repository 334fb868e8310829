//! The files of a model's folder that are no weights: settings, tokenizer, code and licence.

use crate::error::{Error, Result};
use std::path::Path;

/// Returns the names of the files that a folder with other weights of the same kind needs too, sorted.
pub fn settings_in(folder: &Path) -> Result<Vec<String>> {
    Ok(plain_files(folder)?.into_iter().filter(|name| is_setting(name)).collect())
}

/// Returns the names of files and folders that are neither weights nor what [`settings_in`] lists, sorted.
pub(crate) fn others_in(folder: &Path) -> Result<Vec<String>> {
    let mut names = plain_files(folder)?;
    names.retain(|name| !is_setting(name) && !is_weights(name));
    let folders = entries(folder)?.into_iter().filter(|name| folder.join(name).is_dir());
    names.extend(folders.map(|name| format!("{name}/")));
    names.retain(|name| !name.starts_with('.'));
    Ok(names)
}

fn entries(folder: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    let mut names: Vec<_> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

fn plain_files(folder: &Path) -> Result<Vec<String>> {
    Ok(entries(folder)?.into_iter().filter(|name| folder.join(name).is_file()).collect())
}

/// Whether a name is that of weights, of their index, or of the state of a training.
fn is_weights(name: &str) -> bool {
    let ends = [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".index.json",
        ".npz",
    ];
    ends.iter().any(|end| name.ends_with(end))
}

/// Whether a file says how text becomes tokens, how inputs are prepared, what the model computes, or under which terms. A card
/// (README.md) is of the one model, and is not among them.
fn is_setting(name: &str) -> bool {
    // By the beginning, because tokenizers, templates and licences have files by many names.
    let begins =
        ["tokenizer", "vocab", "chat_template", "LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY"];
    // Vocabularies and merges of tokenizers, processors, and code of the model's own with what it imports.
    let ends = [".model", ".tiktoken", ".spm", ".codes", "processor_config.json", "preprocessor.json", ".py"];
    let others = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "tekken.json",
        "normalizer.json",
        "network.json",
        "adapter_config.json",
    ];
    let by_parts =
        begins.iter().any(|word| name.starts_with(word)) || ends.iter().any(|word| name.ends_with(word));
    !is_weights(name) && (by_parts || others.contains(&name))
}

/// Whether a file, which is a setting, says how text becomes tokens. A template of chats is written with them.
pub(crate) fn is_tokenizer(name: &str) -> bool {
    let begins = ["tokeniz", "vocab", "chat_template"];
    let ends = [".model", ".tiktoken", ".spm", ".codes"];
    let others =
        ["special_tokens_map.json", "added_tokens.json", "merges.txt", "tekken.json", "normalizer.json"];
    let by_parts =
        begins.iter().any(|word| name.starts_with(word)) || ends.iter().any(|word| name.ends_with(word));
    is_setting(name) && (by_parts || others.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_of_one_kind() {
        let settings = [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
            "chat_template.jinja",
            "spiece.model",
            "sentencepiece.bpe.model",
            "tekken.json",
            "preprocessor_config.json",
            "processor_config.json",
            "video_preprocessor_config.json",
            "modeling_x.py",
            "configuration_x.py",
            "LICENSE",
            "LICENSE.txt",
            "NOTICE",
            "qwen.tiktoken",
        ];
        let weights = [
            "model.safetensors",
            "pytorch_model.bin",
            "optimizer.pt",
            "tokenizer.gguf",
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
        ];
        let others = ["README.md", "notes.txt", "trainer_state.json"];
        for name in settings {
            assert!(is_setting(name) && !is_weights(name), "{name}");
        }
        for name in
            ["tokenizer.json", "tokenization_x.py", "vocab.txt", "spiece.model", "chat_template.jinja"]
        {
            assert!(is_tokenizer(name), "{name}");
        }
        for name in ["config.json", "LICENSE", "modeling_x.py", "preprocessor_config.json", "tokenizer.gguf"]
        {
            assert!(!is_tokenizer(name), "{name}");
        }
        for name in weights {
            assert!(!is_setting(name) && is_weights(name), "{name}");
        }
        for name in others {
            assert!(!is_setting(name) && !is_weights(name), "{name}");
        }
    }
}
