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
    let tokenizer = name.starts_with("tokenizer") || name.starts_with("vocab") || name == "merges.txt";
    let json = ["config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"];
    tokenizer || json.contains(&name) || name.starts_with("chat_template")
}
