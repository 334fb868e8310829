//! The card of a merged model: what it was made of, how, and under which licences.

use super::config::Source;
use super::job::{Job, Model};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

/// The name of a card.
pub(super) const CARD: &str = "README.md";

impl Job {
    /// The text of the card. `config` is that of the configuration.
    pub(super) fn card(&self, config: &str) -> String {
        let named: BTreeSet<&Path> = self
            .config
            .slices
            .iter()
            .flat_map(|slice| slice.sources.iter().map(|Source { model, .. }| model.as_path()))
            .chain(self.config.base.as_deref())
            .collect();
        let sources: Vec<&Model> =
            self.models.iter().filter(|model| named.contains(model.path.as_path())).collect();
        let licences: Vec<Option<String>> = sources.iter().map(|model| licence(&model.place())).collect();
        let mut text = String::from("---\n");
        let mut line = |words: String| text.write_str(&(words + "\n")).expect("a String takes everything");
        line("base_model:".into());
        sources.iter().for_each(|model| line(format!("- {}", quoted(&name(model)))));
        line("tags:\n- merge\n- tiebeam".into());
        // One licence for the whole only if every source names it.
        let first = licences.first().cloned().flatten();
        if let Some(licence) = first.filter(|first| licences.iter().all(|own| own.as_ref() == Some(first))) {
            line(format!("license: {licence}"));
        }
        line("---\n".into());
        line("# A merge".into());
        let method = self.config.method.name();
        line(format!(
            "\nMade by `{method}` with [Tiebeam](https://crates.io/crates/tiebeam) {} of these models:\n",
            env!("CARGO_PKG_VERSION")
        ));
        line("| model | licence |\n|---|---|".into());
        for (model, licence) in sources.iter().zip(&licences) {
            let base = self.has_base() && self.config.base.as_deref() == Some(&model.path);
            let licence = licence.as_deref().unwrap_or("not named in its card");
            line(format!("| {}{} | {licence} |", name(model), if base { " (base)" } else { "" }));
        }
        line("\nThe configuration:\n".into());
        // A fence that is longer than any in the text.
        let fence = "`".repeat(3 + config.matches("```").count().min(9));
        line(format!("{fence}yaml\n{}\n{fence}", config.trim_end()));
        text
    }
}

/// A model's name: that on the hub if it is in its cache, else the name of its folder or file.
fn name(model: &Model) -> String {
    let path = model.path.to_string_lossy().replace('\\', "/");
    let cached = path.split('/').find_map(|part| part.strip_prefix("models--"));
    match cached {
        Some(name) => name.replacen("--", "/", 1),
        None => path.rsplit('/').next().unwrap_or(&path).to_string(),
    }
}

/// A name as YAML takes it: in quotes unless it is plain.
fn quoted(name: &str) -> String {
    let is_plain = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._/+".contains(c));
    if is_plain { name.to_string() } else { serde_json::Value::from(name).to_string() }
}

/// The licence that a model's card names at its head.
fn licence(place: &Path) -> Option<String> {
    let folder = if place.is_dir() { place } else { place.parent()? };
    let text = std::fs::read_to_string(folder.join(CARD)).ok()?;
    let head = text.strip_prefix("---")?.split("\n---").next()?;
    let own = head.lines().find_map(|line| line.strip_prefix("license:"))?;
    let own = own.split(" #").next().unwrap_or(own).trim().trim_matches(['"', '\'']);
    let is_plain = own.chars().all(|c| c.is_ascii_alphanumeric() || "-._+".contains(c));
    (!own.is_empty() && is_plain).then(|| own.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_read_from_cards() {
        let folder = tempfile::tempdir().unwrap();
        let said = |text: &str| {
            std::fs::write(folder.path().join(CARD), text).unwrap();
            licence(folder.path())
        };
        assert_eq!(said("---\nlicense: apache-2.0\ntags: []\n---\n# A"), Some("apache-2.0".into()));
        assert_eq!(said("---\nlicense: \"mit\"\n---\n"), Some("mit".into()));
        assert_eq!(said("---\nlicense: mit # ours\n---\n"), Some("mit".into()));
        assert_eq!(["a/b-1.0", "we: ird", "1.5"].map(quoted), ["a/b-1.0", "\"we: ird\"", "\"1.5\""]);
        assert_eq!(said("# A model\nlicense: mit\n"), None);
        assert_eq!(said("---\nlicense: [a](b)\n---\n"), None);
        assert_eq!(said("---\ntags: []\n---\nlicense: mit"), None);
    }
}
