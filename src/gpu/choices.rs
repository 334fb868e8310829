//! Measurements kept on disk: the best kernel per class of problems, and numbers of the device's class. Each adapter
//! has one small text file, which later runs read. A program may ship such a file.
//!
//! ```text
//! tiebeam 2 <adapter>; <backend>; <driver>; <class of the device>; <kernels>
//! device width = 132
//! matmul f32 lhs_plain rhs_plain 1024x1024x1024 1 = tiled 64x64 of 8x8
//! ```
//!
//! A file is used only for the adapter, driver, device class and version of the kernels that it names. A file that
//! cannot be read is ignored with a warning. A shipped file may hold several such sections.

use super::{AdapterSummary, DeviceClass, Gpu, Options, Tuning, lock};
use crate::error::{Error, Result};
use crate::files;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A hash of the texts of all kernels, in hexadecimal.
pub(crate) const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.txt"));

/// The start of a section's first line.
const MARK: &str = "tiebeam 2 ";
/// The start of a key whose value is a number of the device's class.
const DEVICE: &str = "device ";

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

type Known = BTreeMap<String, String>;

/// The choices of one device.
pub(crate) struct Choices {
    tuning: Tuning,
    file: Option<PathBuf>,
    head: String,
    known: Mutex<Known>,
    /// Choices that the program ships. They are used where nothing was measured on this machine, and they are not
    /// saved.
    shipped: Known,
}

impl Choices {
    /// Opens the choices of an adapter whose device class is `class`.
    ///
    /// # Errors
    /// If the file that the program ships cannot be read, because the options ask for it.
    pub fn open(options: Options, adapter: &AdapterSummary, class: &str) -> Result<Choices> {
        let AdapterSummary { name, backend, driver, .. } = adapter;
        let head = format!("{MARK}{name}; {backend}; {driver}; {class}; {KERNELS}");
        let file = folder(&options).map(|folder| folder.join(format!("kernels-{:016x}.txt", hash(&head))));
        let tuning = options.tuning.unwrap_or_default();
        let (mut known, mut brought) = (Known::new(), Known::new());
        if tuning != Tuning::Off {
            if let Some(path) = &options.choices {
                brought = shipped(path, &head, class)?;
            }
            match file.as_deref().map_or(Ok(Known::new()), |path| read(path, &head)) {
                Ok(found) => known = found,
                Err(why) => tracing::warn!(?file, why, "measured choices left out"),
            }
        }
        Ok(Choices { tuning, file, head, known: Mutex::new(known), shipped: brought })
    }

    /// Returns empty choices that are kept in memory only.
    pub fn none() -> Choices {
        let (head, known) = (String::new(), Mutex::default());
        Choices { tuning: Tuning::Read, file: None, head, known, shipped: Known::new() }
    }

    /// Replaces the table's numbers by those that were measured.
    pub fn refine(&self, class: &mut DeviceClass) {
        for (key, text) in self.all() {
            if let (Some(name), Ok(number)) = (key.strip_prefix(DEVICE), text.parse()) {
                refine(class, name, number);
            }
        }
    }

    /// Returns all choices. Those measured here take precedence over shipped ones.
    fn all(&self) -> Known {
        let mut all = self.shipped.clone();
        all.extend(lock(&self.known).clone());
        all
    }

    fn text(&self, all: &Known) -> String {
        let lines: Vec<String> = all.iter().map(|(key, choice)| format!("{key} = {choice}\n")).collect();
        format!("{}\n{}", self.head, lines.concat())
    }

    fn save(&self) -> Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        // Keeps what another process has measured in the meantime.
        let mut all = read(path, &self.head).unwrap_or_default();
        all.extend(lock(&self.known).clone());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        }
        files::replace_with(path, self.text(&all))
    }
}

/// Replaces one number of the class by a measured one. An unknown name or an impossible number is ignored with a
/// warning.
pub(super) fn refine(class: &mut DeviceClass, name: &str, number: f64) {
    let sensible = number > 0.0 && number.is_finite();
    match name {
        "width" if sensible => class.width = (number as u32).clamp(1, 1 << 16),
        "dispatch" if sensible => class.dispatch = number.clamp(1e-7, 1e-2),
        "bytes_s" if sensible => class.bytes_s = number,
        "flops_s" if sensible => class.flops_s = number,
        _ => tracing::warn!(name, number, "no number of a device's class"),
    }
}

/// The folder of what is kept between runs: the one that the options name, or the user's.
pub(super) fn folder(options: &Options) -> Option<PathBuf> {
    options.cache.clone().or_else(folder_of_user)
}

impl Gpu {
    /// The folder of measured choices and of compiled kernels, if [`Options::cache`] names no other: `TIEBEAM_CACHE`, or
    /// `tiebeam` in the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`, `~/Library/Caches` on macOS,
    /// `%LOCALAPPDATA%` on Windows). `None` if the system names no such folder.
    pub fn cache_folder() -> Option<PathBuf> {
        folder_of_user()
    }
}

fn folder_of_user() -> Option<PathBuf> {
    let named = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(own) = named("TIEBEAM_CACHE") {
        return Some(own);
    }
    // The specification of these folders says that a relative path is to be ignored.
    let variable = |name| named(name).filter(|path| path.is_absolute());
    let system = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        variable("HOME").map(|home| home.join("Library/Caches"))
    } else {
        variable("XDG_CACHE_HOME").or_else(|| variable("HOME").map(|home| home.join(".cache")))
    };
    system.map(|folder| folder.join("tiebeam"))
}

/// FNV-1a, because it gives the same number in every build, which the standard hasher does not promise.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf29ce484222325, |h, b| (h ^ b as u64).wrapping_mul(0x100000001b3))
}

/// Parses the sections of a file: each section's first line and its choices.
fn sections(text: &str) -> Result<Vec<(&str, Known)>, String> {
    let mut all: Vec<(&str, Known)> = Vec::new();
    for (i, line) in (1..).zip(text.lines()) {
        if line.starts_with(MARK) {
            all.push((line, Known::new()));
            continue;
        }
        let (_, known) = all.last_mut().ok_or("it does not begin with an adapter's line")?;
        let (key, choice) = line.split_once(" = ").ok_or(format!("line {i} is no 'key = choice'"))?;
        known.insert(key.to_string(), choice.to_string());
    }
    Ok(all)
}

fn read(path: &Path, head: &str) -> Result<Known, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Known::new()),
        Err(e) => return Err(e.to_string()),
    };
    match &mut sections(&text)?[..] {
        [(first, known)] if *first == head => Ok(std::mem::take(known)),
        _ => Err("it does not begin with this adapter's line".into()),
    }
}

/// Reads what a program ships for this adapter: the section that begins with exactly its line. Without such a section,
/// the kernels (but no numbers of the device) of all sections for its class and this version of the kernels, where
/// later sections override earlier ones.
fn shipped(path: &Path, head: &str, class: &str) -> Result<Known> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let all = sections(&text).map_err(|why| {
        let words = "give a file that 'tiebeam tune --export' wrote";
        Error::config(format!("{}: {why}; {words}", path.display()))
    })?;
    if let Some((_, known)) = all.iter().find(|(first, _)| *first == head) {
        return Ok(known.clone());
    }
    let end = format!("; {class}; {KERNELS}");
    let of_class = all.iter().filter(|(first, _)| first.ends_with(&end)).flat_map(|(_, known)| known);
    let kernels = of_class.filter(|(key, _)| !key.starts_with(DEVICE));
    Ok(kernels.map(|(key, choice)| (key.clone(), choice.clone())).collect())
}

impl Gpu {
    /// Whether any kernel may have a measured choice. If not, all kernels come from the table.
    pub(crate) fn has_choices(&self) -> bool {
        let choices = &self.0.choices;
        self.tunes() || !choices.shipped.is_empty() || !lock(&choices.known).is_empty()
    }

    /// Whether a class of problems without a choice is measured when it first runs.
    pub(crate) fn tunes(&self) -> bool {
        self.0.choices.tuning == Tuning::On
    }

    /// Returns the kernel that was measured to be best for a class of problems.
    pub(crate) fn choice(&self, key: &str) -> Option<String> {
        let choices = &self.0.choices;
        lock(&choices.known).get(key).or_else(|| choices.shipped.get(key)).cloned()
    }

    /// Returns every known choice of kernels, by class of problems: those that were measured, and those that came with the
    /// crate.
    pub fn choices(&self) -> BTreeMap<String, String> {
        self.0.choices.all()
    }

    /// Keeps a choice for this process.
    pub(crate) fn choose(&self, key: String, choice: String) {
        lock(&self.0.choices.known).insert(key, choice);
    }

    /// Keeps a measured number of this device's class. It takes effect when the adapter is next opened.
    pub(crate) fn note_device(&self, name: &str, number: f64) {
        self.choose(format!("{DEVICE}{name}"), format!("{number}"));
    }

    /// Writes the choices of this process, with those already in the file, for later runs.
    ///
    /// # Errors
    /// [`Error::Io`]. The old file is then unchanged.
    pub fn save_choices(&self) -> Result<()> {
        self.0.choices.save()
    }

    /// Writes what was measured on this adapter to a file that a program can ship ([`Options::choices`]).
    ///
    /// # Errors
    /// [`Error::Io`]. An older file is then unchanged.
    pub fn export_choices(&self, path: &Path) -> Result<()> {
        files::replace_with(path, self.choices_text())
    }

    /// Returns the text that [`Gpu::export_choices`] writes.
    pub fn choices_text(&self) -> String {
        let choices = &self.0.choices;
        choices.text(&lock(&choices.known))
    }

    /// The file of measured choices for this adapter, driver, device class and version of the kernels. `None` if the
    /// system has no folder for it.
    pub fn choices_file(&self) -> Option<&Path> {
        self.0.choices.file.as_deref()
    }
}
