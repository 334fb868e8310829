//! The files of a model's folder that are no weights: settings, tokenizer and chat template.

use crate::error::{Error, Result};
use std::path::Path;

/// Returns the names of the files that a folder with other weights of the same kind needs too, sorted.
pub(crate) fn settings_in(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .map_err(|e| Error::io(folder, e))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| is_setting(name) && folder.join(name).is_file())
        .collect();
    names.sort();
    Ok(names)
}

fn is_setting(name: &str) -> bool {
    // By prefix, because tokenizers and templates have files by many names. A GGUF file may begin so too, and holds weights.
    let prefixes = ["tokenizer", "vocab", "chat_template"];
    let others = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
    ];
    let by_prefix = prefixes.iter().any(|prefix| name.starts_with(prefix)) && !name.ends_with(".gguf");
    by_prefix || others.contains(&name)
}
