//! What a program wrote into a folder, so that it later knows its own files from somebody's.

use super::replace::replace_with;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Component, Path};
use std::time::{Duration, SystemTime};
use twox_hash::XxHash3_128;

/// The file in every folder that [`replace_folder`](super::replace_folder) made, which lists the others with size and hash.
pub const MANIFEST: &str = ".tiebeam-files.json";

/// Files of up to so many bytes are hashed whatever their time says: they are what people edit, and quickly read.
const HASHED: u64 = 16 << 20;

/// The listed files, by path with `/`.
#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    files: BTreeMap<String, Entry>,
    /// When the list was written, which is when all of its files were last changed.
    #[serde(skip)]
    written: Option<SystemTime>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    /// XXH3 with 128 bits, as hexadecimal: it tells changes by people and programs, not by adversaries.
    xxh3: String,
}

/// What tells cheaply that a file did not change since it was last looked at.
#[derive(Clone, PartialEq)]
pub(super) struct Stamp {
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    pub(super) fn of(found: &Metadata) -> Stamp {
        Stamp { bytes: found.len(), modified: found.modified().ok() }
    }
}

/// Files of a folder that are as they were written, by path with `/`.
pub(super) type Ours = BTreeMap<String, Stamp>;

impl Manifest {
    /// Lists what is in a folder, writes the list into it, and gives all files the time of the list.
    ///
    /// The list itself holds no times: equal files make equal folders.
    pub(super) fn make(folder: &Path) -> Result<()> {
        let mut manifest = Manifest { files: BTreeMap::new(), written: None };
        manifest.add(folder, "")?;
        let path = folder.join(MANIFEST);
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|e| Error::format(&path, e.to_string()).because_of(e))?;
        replace_with(&path, text + "\n")?;
        // Whole seconds, and even ones, are what every file system and archive keeps; and no later change falls on them by chance.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs() / 2 * 2);
        for name in manifest.files.keys().map(String::as_str).chain([MANIFEST]) {
            // A file whose time cannot be set is compared by its hash.
            let options = File::options().read(true).write(cfg!(windows)).open(folder.join(name));
            let _ = options.and_then(|file| file.set_modified(time));
        }
        Ok(())
    }

    fn add(&mut self, folder: &Path, below: &str) -> Result<()> {
        let here = folder.join(below);
        for entry in here.read_dir().map_err(|e| Error::io(&here, e))? {
            let entry = entry.map_err(|e| Error::io(&here, e))?;
            let path = entry.path();
            let failed = |e| Error::io(&path, e);
            let Ok(name) = entry.file_name().into_string() else {
                return Err(Error::format(&path, "a listed file needs a name in UTF-8"));
            };
            let name = join(below, &name);
            if name == MANIFEST {
                continue;
            }
            if entry.file_type().map_err(failed)?.is_dir() {
                self.add(folder, &name)?;
                continue;
            }
            let bytes = entry.metadata().map_err(failed)?.len();
            self.files.insert(name, Entry { bytes, xxh3: hash(&path)? });
        }
        Ok(())
    }

    /// The list of a folder, if it has one.
    pub(super) fn read(folder: &Path) -> Result<Option<Manifest>> {
        let path = folder.join(MANIFEST);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let wrong = |e: serde_json::Error| {
            let message = format!("{e}; this list of what was written here is broken: name another folder");
            Error::format(&path, message)
        };
        let mut manifest: Manifest = serde_json::from_slice(&text).map_err(wrong)?;
        manifest.written = path.metadata().and_then(|found| found.modified()).ok();
        Ok(Some(manifest))
    }

    /// The listed files that are still as they were written. As rsync does, size and time are taken for the content of large files
    /// where both are as they were; others of the same size are hashed. What is in `known` with the same stamp was hashed before.
    pub(super) fn unchanged(&self, folder: &Path, known: &Ours) -> Result<Ours> {
        let mut ours = Ours::new();
        for (name, entry) in &self.files {
            if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
                continue;
            }
            let path = folder.join(name);
            let Ok(found) = path.symlink_metadata() else { continue };
            let stamp = Stamp::of(&found);
            if !found.is_file() || stamp.bytes != entry.bytes {
                continue;
            }
            let same = known.get(name) == Some(&stamp)
                || entry.bytes > HASHED && stamp.modified.is_some() && stamp.modified == self.written
                || hash(&path)? == entry.xxh3;
            if same {
                ours.insert(name.clone(), stamp);
            }
        }
        Ok(ours)
    }
}

/// A path below a folder, with `/` everywhere.
pub(super) fn join(below: &str, name: &str) -> String {
    if below.is_empty() { name.to_string() } else { format!("{below}/{name}") }
}

/// Read in parts: files are larger than the memory that a merge promises to need.
fn hash(path: &Path) -> Result<String> {
    let failed = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(failed)?;
    let (mut hasher, mut part) = (XxHash3_128::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut part) {
            Ok(0) => return Ok(format!("{:032x}", hasher.finish_128())),
            Ok(n) => hasher.write(&part[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
}
