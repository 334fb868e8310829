//! Models that are named as on Hugging Face's hub, `owner/name`. They are looked for in the cache of its own programs. Nothing is
//! downloaded.

use crate::error::Error;
use std::path::{Path, PathBuf};

/// The folder where Hugging Face's programs keep downloads. The variables are theirs.
fn cache() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let own = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE"));
    let home = || folder("HF_HOME").map(|home| home.join("hub"));
    let shared = || folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub"));
    let user = || folder("HOME").or_else(|| folder("USERPROFILE"));
    own.or_else(home).or_else(shared).or_else(|| Some(user()?.join(".cache/huggingface/hub")))
}

/// Whether a text has the form of a name on the hub.
fn is_name(text: &str) -> bool {
    let part = |part: &str| {
        let usual = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        usual && !part.is_empty() && !part.starts_with('.')
    };
    let is_file = [".safetensors", ".gguf", ".json", ".bin"].iter().any(|end| text.ends_with(end));
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name)) && !is_file
}

/// The folder in the cache of a model with this name. It is the revision to which `main` points, or the only one.
fn snapshot(cache: &Path, name: &str) -> Option<PathBuf> {
    let folder = cache.join(format!("models--{}", name.replace('/', "--")));
    let snapshots = folder.join("snapshots");
    let main = std::fs::read_to_string(folder.join("refs/main")).ok();
    let named = main.map(|revision| snapshots.join(revision.trim())).filter(|path| path.is_dir());
    named.or_else(|| {
        let mut all = std::fs::read_dir(&snapshots).ok()?.flatten().map(|entry| entry.path());
        all.next().filter(|_| all.next().is_none())
    })
}

/// Returns where a model is that a user names by `text`: the path itself, relative to `folder`, or if there is nothing, the
/// model of this name in the hub's cache.
pub(crate) fn located(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join(text);
    if path.exists() || !is_name(text) {
        return path;
    }
    cache().and_then(|cache| snapshot(&cache, text)).unwrap_or(path)
}

/// Whether a path is in the hub's cache.
pub(crate) fn is_cached(path: &Path) -> bool {
    cache().is_some_and(|cache| path.starts_with(cache))
}

/// The error of a path where nothing is, which says what to do.
pub(crate) fn missing(path: &Path) -> Error {
    Error::io(path, std::io::Error::new(std::io::ErrorKind::NotFound, advice(path)))
}

fn advice(path: &Path) -> String {
    let mut parts = path.iter().rev().map(|part| part.to_string_lossy());
    let (last, before) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if last.contains('+') {
        return "there is no such file or folder; `model+adapter` is not read: merge the adapter into its model first".into();
    }
    let name = format!("{before}/{last}");
    match cache().filter(|_| is_name(&name)) {
        Some(cache) => format!(
            "there is no such file or folder. If `{name}` is a model on Hugging Face's hub: `hf download {name}` puts it into {}, \
             where it is found by this name",
            cache.display()
        ),
        None => "there is no such file or folder".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub() {
        for name in ["mistralai/Mistral-7B-v0.1", "a/b", "Qwen/Qwen2.5_x"] {
            assert!(is_name(name), "{name}");
        }
        for path in ["a", "/a/b", "../a", "./a", "a/b/c", "a/b.safetensors", "a/", "/b", "~/a b", ""] {
            assert!(!is_name(path), "{path}");
        }
    }

    #[test]
    fn snapshots_are_found() {
        let cache = tempfile::tempdir().unwrap();
        let of = |revision: &str| cache.path().join("models--a--b/snapshots").join(revision);
        assert_eq!(snapshot(cache.path(), "a/b"), None);
        std::fs::create_dir_all(of("1")).unwrap();
        assert_eq!(snapshot(cache.path(), "a/b"), Some(of("1")));
        // Of two, none is chosen by chance.
        std::fs::create_dir_all(of("2")).unwrap();
        assert_eq!(snapshot(cache.path(), "a/b"), None);
        std::fs::create_dir_all(cache.path().join("models--a--b/refs")).unwrap();
        std::fs::write(cache.path().join("models--a--b/refs/main"), "2\n").unwrap();
        assert_eq!(snapshot(cache.path(), "a/b"), Some(of("2")));
    }

    #[test]
    fn what_is_missing_is_explained() {
        let said = |path: &str| advice(Path::new(path));
        assert!(said("x/mistralai/Mistral-7B").contains("`hf download mistralai/Mistral-7B`"));
        assert!(said("model.safetensors+lora").contains("merge the adapter"));
        assert!(!said("../there/model.safetensors").contains("hub"));
    }
}
