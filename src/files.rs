//! Files written whole or not at all.

use crate::error::{Error, Result};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Has `write` write a temporary file beside `path`, syncs it to the disk and renames it over `path`.
///
/// On any error the old file is as it was and the temporary file is gone.
///
/// # Errors
/// [`Error::Io`] naming `path`, or what `write` returns.
pub fn replace(path: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(path, e);
    let (temporary, file) = Temporary::create(path).map_err(failed)?;
    write(&file)?;
    // On the disk before the name points at it: a crash leaves the old file or the new one.
    file.sync_all().map_err(failed)?;
    // Windows does not rename open files.
    drop(file);
    temporary.rename(path).map_err(failed)
}

/// [`replace`] for a text or other bytes at hand.
///
/// # Errors
/// As [`replace`].
pub fn replace_with(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    replace(path, |mut file| io::Write::write_all(&mut file, bytes.as_ref()).map_err(|e| Error::io(path, e)))
}

/// What [`replace`] would say if it wrote `path` now: for long work to know before it begins.
///
/// # Errors
/// [`Error::Io`] naming `path`, when its folder is missing or takes no new file, or when it is a folder itself.
pub fn check(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        let message = format!("the folder {} is not there; make it first", folder.display());
        return Err(Error::Io { path: path.into(), message });
    }
    if path.is_dir() {
        return Err(Error::Io { path: path.into(), message: "this is a folder; name a file".into() });
    }
    Temporary::create(path).map(drop).map_err(|e| Error::io(path, e))
}

/// A file that removes itself unless it is renamed.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// A new file in the folder of `target`, because a rename must not cross file systems.
    fn create(target: &Path) -> io::Result<(Temporary, File)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = target.file_name() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a file name"));
        };
        loop {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
            let path = target.with_file_name(hidden);
            match File::create_new(&path) {
                Ok(file) => return Ok((Temporary(Some(path)), file)),
                // Left by a killed process that had our id.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn rename(mut self, target: &Path) -> io::Result<()> {
        let Some(path) = self.0.take() else { return Ok(()) };
        if let Err(e) = std::fs::rename(&path, target) {
            self.0 = Some(path);
            return Err(e);
        }
        // The new name itself must reach the disk. The file is good either way, and not every system can sync
        // a folder.
        #[cfg(unix)]
        if let Some(folder) = target.parent() {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Nothing more can be done about a file that cannot be removed; the first error is already on its
            // way.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Has `write` fill a new folder beside `path` and renames it to `path` when it is complete.
///
/// A folder that is there is replaced if it is empty or holds a file named `marker`, which `write` should put into every
/// folder that it makes; any other may be somebody's and is refused. On any error the old folder is as it was and the new one
/// is gone.
///
/// # Errors
/// [`Error::Io`] naming `path`, or what `write` returns.
pub fn replace_folder(path: &Path, marker: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(path, e);
    let Some(name) = path.file_name() else {
        return Err(Error::config(format!("{}: the path does not end in a folder's name", path.display())));
    };
    refuse_foreign(path, marker)?;
    let beside = |kind: &str| {
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.{kind}", std::process::id()));
        path.with_file_name(hidden)
    };
    let (new, old) = (TemporaryFolder(beside("tmp")), beside("old"));
    // Left by a killed process that had our id; where the folder itself is missing, the old one is all there is.
    let _ = std::fs::remove_dir_all(&new.0);
    if path.exists() {
        let _ = std::fs::remove_dir_all(&old);
    } else if old.exists() {
        std::fs::rename(&old, path).map_err(failed)?;
    }
    std::fs::create_dir(&new.0).map_err(failed)?;
    write(&new.0)?;
    // Somebody may have filled the folder meanwhile.
    refuse_foreign(path, marker)?;
    let replaces = path.exists();
    if replaces {
        std::fs::rename(path, &old).map_err(failed)?;
    }
    if let Err(e) = std::fs::rename(&new.0, path) {
        if replaces {
            let _ = std::fs::rename(&old, path);
        }
        return Err(failed(e));
    }
    if replaces {
        // The new folder is in place: what is left of the old one is no failure.
        let _ = std::fs::remove_dir_all(&old);
    }
    Ok(())
}

/// Refuses a folder that [`replace_folder`] would not replace, before the work for it is begun.
///
/// # Errors
/// [`Error::Io`] naming `path`.
pub fn refuse_foreign(path: &Path, marker: &str) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let mut entries = std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
    if entries.next().is_none() || path.join(marker).is_file() {
        return Ok(());
    }
    let path = path.display();
    Err(Error::config(format!(
        "{path} is there and holds no {marker}: it is not ours to replace; name another folder"
    )))
}

/// A folder that is removed unless it was renamed.
struct TemporaryFolder(PathBuf);

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // As for files: the first error is already on its way.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
