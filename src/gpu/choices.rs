//! Kernels chosen by measurement, on disk: one small text file an adapter, which later runs read.
//!
//! ```text
//! tiebeam 1 <adapter, driver and kernels>
//! matmul f32 lhs_plain rhs_plain 1024x1024x1024 1 = tiled 64x64 of 8x8
//! ```
//!
//! A file of another adapter, driver or version of the kernels is not looked at; one that cannot be read is left out
//! with a warning.

use super::{AdapterSummary, Gpu, lock};
use crate::error::{Error, Result};
use crate::files;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A number that changes whenever a kernel's text does, as hexadecimal.
pub(crate) const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.txt"));

/// What measured choices do in this process (`TIEBEAM_TUNE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tuning {
    /// Kernels are chosen by the built-in table alone: the same bits whatever was measured on this machine.
    Off,
    /// Choices made by an earlier `tiebeam tune` are used.
    #[default]
    Read,
    /// What has no choice yet is measured when it first runs, and kept.
    On,
}

impl Tuning {
    pub(super) fn parse(word: &str) -> Result<Tuning> {
        match word.to_ascii_lowercase().as_str() {
            "off" => Ok(Tuning::Off),
            "read" => Ok(Tuning::Read),
            "on" => Ok(Tuning::On),
            other => Err(Error::config(format!("TIEBEAM_TUNE: '{other}' is none of off, read and on"))),
        }
    }
}

/// The choices of one device.
pub(crate) struct Choices {
    tuning: Tuning,
    file: Option<PathBuf>,
    head: String,
    known: Mutex<BTreeMap<String, String>>,
}

impl Choices {
    pub fn open(tuning: Tuning, folder: Option<PathBuf>, adapter: &AdapterSummary) -> Choices {
        let head = format!("tiebeam 1 {}; {}; {}; {KERNELS}", adapter.name, adapter.backend, adapter.driver);
        let folder = folder.or_else(folder_of_user);
        let file = folder.map(|folder| folder.join(format!("kernels-{:016x}.txt", hash(&head))));
        let mut known = BTreeMap::new();
        if tuning != Tuning::Off
            && let Some(path) = &file
        {
            match read(path, &head) {
                Ok(found) => known = found,
                Err(why) => tracing::warn!(file = %path.display(), why, "measured choices left out"),
            }
        }
        Choices { tuning, file, head, known: Mutex::new(known) }
    }

    /// Choices in memory only, none so far.
    pub fn none() -> Choices {
        Choices { tuning: Tuning::Read, file: None, head: String::new(), known: Mutex::default() }
    }

    fn save(&self) -> Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        // What another process measured meanwhile stays.
        let mut all = read(path, &self.head).unwrap_or_default();
        all.extend(lock(&self.known).clone());
        let lines: Vec<String> = all.iter().map(|(key, choice)| format!("{key} = {choice}\n")).collect();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        }
        files::replace_with(path, format!("{}\n{}", self.head, lines.concat()))
    }
}

/// `$TIEBEAM_CACHE`, else `tiebeam` in the folder that this system has for such files.
fn folder_of_user() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(own) = variable("TIEBEAM_CACHE") {
        return Some(own);
    }
    let system = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        variable("HOME").map(|home| home.join("Library/Caches"))
    } else {
        variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
    };
    system.map(|folder| folder.join("tiebeam"))
}

/// FNV-1a: the same number in every build, which the standard hasher does not promise.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf29ce484222325, |h, b| (h ^ b as u64).wrapping_mul(0x100000001b3))
}

fn read(path: &Path, head: &str) -> Result<BTreeMap<String, String>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(e.to_string()),
    };
    let mut lines = text.lines();
    if lines.next() != Some(head) {
        return Err("it does not begin with this adapter's line".into());
    }
    let pair = |(i, line): (usize, &str)| {
        let (key, choice) = line.split_once(" = ").ok_or(format!("line {} is no 'key = choice'", i + 2))?;
        Ok((key.to_string(), choice.to_string()))
    };
    lines.enumerate().map(pair).collect()
}

impl Gpu {
    /// Whether anything may have been measured: without, kernels come from the table.
    pub(crate) fn has_choices(&self) -> bool {
        self.tunes() || !lock(&self.0.choices.known).is_empty()
    }

    /// Whether what has no choice yet is measured when it first runs.
    pub(crate) fn tunes(&self) -> bool {
        self.0.choices.tuning == Tuning::On
    }

    /// The kernel measured to be best for a class of problems.
    pub(crate) fn choice(&self, key: &str) -> Option<String> {
        lock(&self.0.choices.known).get(key).cloned()
    }

    /// Every measured choice at hand, by class.
    #[doc(hidden)]
    pub fn choices(&self) -> BTreeMap<String, String> {
        lock(&self.0.choices.known).clone()
    }

    /// Keeps a choice for this process.
    pub(crate) fn choose(&self, key: String, choice: String) {
        lock(&self.0.choices.known).insert(key, choice);
    }

    /// Writes the choices of this process, with those already in the file, for later runs.
    ///
    /// # Errors
    /// [`Error::Io`]; the old file is then as it was.
    pub fn save_choices(&self) -> Result<()> {
        self.0.choices.save()
    }

    /// The file of measured choices for this adapter, driver and version of the kernels; `None` where the system has no
    /// folder for it.
    pub fn choices_file(&self) -> Option<&Path> {
        self.0.choices.file.as_deref()
    }
}
