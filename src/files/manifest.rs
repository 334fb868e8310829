//! The manifest: a list of the files that this crate wrote into a folder. It tells them later from the user's files.

use super::replace::replace_with;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{Component, Path};
use std::time::{Duration, SystemTime};
use twox_hash::XxHash3_128;

/// Name of the manifest in every folder of [`replace_folder`](super::replace_folder). It lists the other files with size and
/// hash.
pub const MANIFEST: &str = ".tiebeam-files.json";

/// Files of up to this many bytes are always hashed, whatever their time. People edit such files, and they are read quickly.
const HASHED: u64 = 16 << 20;

/// The listed files, by path with `/`.
#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    files: BTreeMap<String, Entry>,
    /// Modification time of the manifest, which all listed files were given too.
    #[serde(skip)]
    written: Option<SystemTime>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    bytes: u64,
    /// XXH3 with 128 bits, as hexadecimal. It detects changes by people and programs, but not by an adversary.
    xxh3: String,
}

/// Size and time of a file. If both are the same as at an earlier look, the file is taken as unchanged.
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

/// The unchanged files of a manifest, by path with `/`.
pub(super) type Ours = BTreeMap<String, Stamp>;

impl Manifest {
    /// Writes a manifest of all files into a folder, and gives all files the same modification time.
    ///
    /// The manifest contains no times, so equal files give an equal manifest.
    pub(super) fn make(folder: &Path) -> Result<()> {
        let mut manifest = Manifest { files: BTreeMap::new(), written: None };
        manifest.add(folder, "")?;
        let path = folder.join(MANIFEST);
        let text = serde_json::to_string_pretty(&manifest)
            .map_err(|e| Error::format(&path, e.to_string()).because_of(e))?;
        replace_with(&path, text + "\n")?;
        // Every file system and archive can store even whole seconds, and a later change is unlikely to have such a time by
        // chance.
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs() / 2 * 2);
        for name in manifest.files.keys().map(String::as_str).chain([MANIFEST]) {
            // If the time cannot be set, the file will later be compared by its hash.
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

    /// Reads a folder's manifest, if it has one.
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

    /// Returns the listed files that are unchanged. A large file counts as unchanged if its size and time are, as in rsync. All
    /// other files of the listed size are hashed, unless `known`, the result of an earlier call, has them with the same stamp.
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

/// Joins a path below a folder and a name with `/`.
pub(super) fn join(below: &str, name: &str) -> String {
    if below.is_empty() { name.to_string() } else { format!("{below}/{name}") }
}

/// Hashes a file, read in parts. A whole file can be larger than the memory that a merge promises to need.
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
