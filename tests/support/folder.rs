//! Folders for the files of tests, all in `target/tmp/tests`. Folders of killed tests remain there until the next test run
//! removes them.
//!
//! The library's unit tests include this file too.
#![allow(dead_code)]

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Once;
use tempfile::TempDir;

/// The repository, which contains the reference vectors. `TIEBEAM_ROOT` names it for tests that were built elsewhere. Otherwise
/// it is where the tests were built.
pub fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The command's package is a folder of the repository.
    let built = if package.ends_with("cli") { package.parent().expect("the repository") } else { package };
    std::env::var_os("TIEBEAM_ROOT").map_or_else(|| built.into(), PathBuf::from)
}

/// A temporary folder of one test.
pub struct Folder {
    folder: TempDir,
    /// Locked while the test runs. The system releases the locks of killed processes.
    _lock: Option<File>,
}

impl Folder {
    pub fn new(test: &str) -> Folder {
        static SWEEP: Once = Once::new();
        let root = root().join("target/tmp/tests");
        std::fs::create_dir_all(&root).unwrap_or_else(|e| {
            panic!("{}: {e}; tests built elsewhere need TIEBEAM_ROOT, the repository here", root.display())
        });
        SWEEP.call_once(|| remove_leftovers(&root));
        loop {
            let folder =
                tempfile::Builder::new().prefix(&format!("{test}-")).tempdir_in(&root).expect("a folder");
            // Windows cannot open folders like this. Nothing is locked or removed there.
            let lock = File::open(folder.path()).ok();
            // If this fails, another process has taken the folder for a leftover in between.
            if lock.as_ref().is_none_or(|lock| lock.try_lock().is_ok()) && folder.path().is_dir() {
                return Folder { folder, _lock: lock };
            }
        }
    }

    /// The names in the folder, sorted.
    pub fn names(&self) -> Vec<String> {
        names(self)
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.folder.path()
    }
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = folder.read_dir().expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let mut names: Vec<String> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn remove_leftovers(root: &Path) {
    for entry in root.read_dir().into_iter().flatten().flatten() {
        if let Ok(folder) = File::open(entry.path())
            && folder.try_lock().is_ok()
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
