//! Models that are named as on Hugging Face's hub, `owner/name`. They are looked for in the cache of its own programs. Nothing is
//! downloaded.

use crate::error::Error;
use std::path::{Component, Path, PathBuf};

/// The folder where Hugging Face's programs keep downloads. The variables are theirs.
fn cache() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let user = || variable("HOME").or_else(|| variable("USERPROFILE"));
    let folder = |name: &str| {
        let path = variable(name)?;
        Some(path.strip_prefix("~").ok().and_then(|rest| Some(user()?.join(rest))).unwrap_or(path))
    };
    let own = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE"));
    let home = || folder("HF_HOME").map(|home| home.join("hub"));
    let shared = || folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub"));
    own.or_else(home).or_else(shared).or_else(|| Some(user()?.join(".cache/huggingface/hub")))
}

/// Splits a text of the form `owner/name`, `name`, or one of them with `@revision` behind it.
fn parsed(text: &str) -> Option<(&str, Option<&str>)> {
    let (name, revision) = match text.split_once('@') {
        Some((name, revision)) => (name, Some(revision)),
        None => (text, None),
    };
    let part = |part: &str| {
        let usual = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        usual && !part.is_empty() && !part.starts_with('.')
    };
    let is_file = [".safetensors", ".gguf", ".json", ".bin"].iter().any(|end| name.ends_with(end));
    let fits = name.split('/').count() <= 2 && name.split('/').all(part) && revision.is_none_or(part);
    (fits && !is_file).then_some((name, revision))
}

/// The folder in the cache of a model with this name: the revision that is asked for, the one to which `main` points, or the only
/// one.
fn snapshot(cache: &Path, name: &str, revision: Option<&str>) -> Option<PathBuf> {
    let folder = cache.join(format!("models--{}", name.replace('/', "--")));
    let snapshots = folder.join("snapshots");
    let one_name = |name: &str| {
        let mut parts = Path::new(name).components();
        matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
    };
    let at = |name: &str| Some(snapshots.join(name)).filter(|path| one_name(name) && path.is_dir());
    let meant = |reference: &str| {
        let commit = std::fs::read_to_string(folder.join("refs").join(reference)).ok();
        commit.and_then(|commit| at(commit.trim()))
    };
    if let Some(revision) = revision {
        return meant(revision).or_else(|| at(revision));
    }
    meant("main").or_else(|| {
        let mut all = std::fs::read_dir(&snapshots).ok()?.flatten().map(|entry| entry.path());
        all.next().filter(|_| all.next().is_none())
    })
}

/// Returns where a model is that a user names by `text`: the path itself, relative to `folder`, or if there is nothing, the
/// model of this name in the hub's cache.
pub(crate) fn named(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join(text);
    let found = || {
        let (name, revision) = parsed(text)?;
        snapshot(&cache()?, name, revision)
    };
    if path.exists() { path } else { found().unwrap_or(path) }
}

/// Returns where a model is: `path` itself, or if there is nothing and it is a name as on Hugging Face's hub (`owner/name`,
/// `owner/name@revision`), its folder in the cache of Hugging Face's programs (`HF_HUB_CACHE`, `HF_HOME`, or
/// `~/.cache/huggingface/hub`). If there is none either, `path` is returned. Nothing is downloaded.
pub fn located(path: &Path) -> PathBuf {
    path.to_str().map_or_else(|| path.into(), |text| named(Path::new(""), text))
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
    let none = "there is no such file or folder";
    // As mergekit has it. Other names with a plus go on with a slash or another plus, as `c++/model`.
    let after = path.to_string_lossy().split_once('+').and_then(|(_, after)| after.chars().next());
    if after.is_some_and(|c| c.is_ascii_alphanumeric() || ".~_".contains(c)) {
        return format!(
            "{none}; of `model+adapter`, one or the other is not there: an adapter is a folder with adapter_config.json and \
             adapter_model.safetensors, and a model has one"
        );
    }
    let mut parts = path.iter().rev().map(|part| part.to_string_lossy());
    let (last, before) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let name = format!("{before}/{last}");
    // A folder that is there is a folder, and no owner on the hub.
    let is_owner = !path.parent().is_some_and(Path::exists);
    let (Some(cache), Some((name, revision)), true) = (cache(), parsed(&name), is_owner) else {
        return none.into();
    };
    let revision = revision.map_or(String::new(), |revision| format!(" --revision {revision}"));
    format!(
        "{none}. If `{name}` is a model on Hugging Face's hub: `hf download {name}{revision}` puts it into {}, where it is found by \
         this name",
        cache.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub() {
        assert_eq!(parsed("mistralai/Mistral-7B-v0.1"), Some(("mistralai/Mistral-7B-v0.1", None)));
        assert_eq!(parsed("gpt2"), Some(("gpt2", None)));
        assert_eq!(parsed("a/b@v1.0"), Some(("a/b", Some("v1.0"))));
        for path in
            ["/a/b", "../a", "./a", "a/b/c", "a/b.safetensors", "a/", "/b", "~/a b", "", "a@", "a/b@../c"]
        {
            assert_eq!(parsed(path), None, "{path}");
        }
    }

    #[test]
    fn snapshots_are_found() {
        let cache = tempfile::tempdir().unwrap();
        let of = |revision: &str| cache.path().join("models--a--b/snapshots").join(revision);
        let found = |revision| snapshot(cache.path(), "a/b", revision);
        assert_eq!(found(None), None);
        std::fs::create_dir_all(of("1")).unwrap();
        assert_eq!(found(None), Some(of("1")));
        // Of two, none is chosen by chance.
        std::fs::create_dir_all(of("2")).unwrap();
        assert_eq!(found(None), None);
        assert_eq!(found(Some("1")), Some(of("1")));
        std::fs::create_dir_all(cache.path().join("models--a--b/refs")).unwrap();
        for (main, want) in [("2\n", Some(of("2"))), ("", None), ("..", None), ("3", None)] {
            std::fs::write(cache.path().join("models--a--b/refs/main"), main).unwrap();
            assert_eq!(found(None), want, "{main:?}");
        }
        std::fs::write(cache.path().join("models--a--b/refs/v1"), "1").unwrap();
        assert_eq!(found(Some("v1")), Some(of("1")));
    }

    #[test]
    fn what_is_missing_is_explained() {
        let said = |path: &str| advice(Path::new(path));
        assert!(said("x/mistralai/Mistral-7B").contains("`hf download mistralai/Mistral-7B`"));
        assert!(said("x/a/b@v1").contains("`hf download a/b --revision v1`"));
        for adapter in ["model.safetensors+lora", "owner/name+other/lora"] {
            assert!(said(adapter).contains("one or the other is not there"), "{adapter}");
        }
        assert!(!said("c++/x.safetensors").contains("adapter"));
        assert!(!said("../there/model.safetensors").contains("hub"));
        assert!(!said("src/nothing").contains("hub"), "{}", said("src/nothing"));
    }
}
