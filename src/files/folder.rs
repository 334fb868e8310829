//! Replaces a folder atomically.

use super::manifest::{MANIFEST, Manifest, Ours, Stamp, join};
use super::replace::{behind_links, folder_of, is_number, keep_owner_and_mode, names, stem, sync_folder};
use crate::error::{Error, Result};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// Calls `write` to fill a new folder beside `path`, and renames it to `path` when it is complete.
///
/// The new folder contains a manifest, a file named [`MANIFEST`] that lists the files of `write` with size and hash. An existing
/// folder is replaced if it is empty or has a manifest:
///
/// - Files that are unchanged since they were listed are removed.
/// - All other files (not listed, or changed since) belong to the user and are moved into the new folder. If `write` made something
///   of the same name, nothing is replaced, and the error names the file.
///
/// A folder that has files but no manifest is refused, since all of it may belong to the user. If `path` is a symbolic link, the
/// folder that it points to is replaced. Mode and owner of a replaced folder are kept as by [`replace`](super::replace()).
///
/// On any error the old folder is left intact and the new one is removed. A killed process leaves the new folder as
/// `.NAME.PID.tmp`, and perhaps the old one as `.NAME.PID.old`. The next call for the same `path` removes the first and restores
/// the second; if the new folder is already in place, it moves the user's files there instead. While a call runs, it holds a lock
/// on `.NAME.tiebeam-lock`, and another call for the same `path` is refused.
///
/// `write` must make only files and folders, not links.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`] that names `path` or the conflicting file, and the errors of `write`.
pub fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let place = Place::take(path)?;
    let ours = place.ours(&Ours::new())?;
    let new = TemporaryFolder(place.beside("tmp"));
    #[cfg_attr(not(unix), expect(unused_mut, reason = "only there has a folder a mode"))]
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    if place.exists() {
        use std::os::unix::fs::DirBuilderExt;
        // The new folder gets the old one's mode only at the end. Until then, only the owner may read it.
        builder.mode(0o700);
    }
    builder.create(&new.0).map_err(|e| place.failed(e))?;
    write(&new.0)?;
    Manifest::make(&new.0)?;
    // The user may have added or changed files meanwhile.
    let ours = place.ours(&ours)?;
    place.swap(&new, &ours)
}

/// Whether a file of this name in the folder `path` may be replaced by [`replace_folder`]: there is none, or it is unchanged since it was
/// written by it.
pub fn is_ours(path: &Path, name: &str) -> bool {
    check_folder(path, [name]).is_ok()
}

/// Checks whether [`replace_folder`] could replace `path` by these files now. Callers use it before long work. It also repairs
/// what killed processes left.
///
/// # Errors
/// As [`replace_folder`].
pub fn check_folder<S: AsRef<str>>(path: &Path, files: impl IntoIterator<Item = S>) -> Result<()> {
    let place = Place::take(path)?;
    let ours = place.ours(&Ours::new())?;
    let taken = |name: &S| place.target.join(name.as_ref()).symlink_metadata().is_ok();
    match files.into_iter().find(|name| taken(name) && !ours.contains_key(name.as_ref())) {
        Some(name) => Err(in_the_way(&place.target.join(name.as_ref()))),
        None => Ok(()),
    }
}

fn in_the_way(path: &Path) -> Error {
    Error::config(format!(
        "{} is not as it was written here, or was put there by somebody, and would be replaced: move it away, or name another \
         folder",
        path.display()
    ))
}

/// The locked path of a folder.
struct Place {
    /// The caller's path, for error messages.
    path: PathBuf,
    /// The folder's path with all links resolved.
    target: PathBuf,
    stem: String,
    /// `None` if the file system has no locks. Folders of other processes are then left alone, since these may still be running.
    lock: Option<Lock>,
}

impl Place {
    /// Locks the place and repairs what killed processes left there.
    fn take(path: &Path) -> Result<Place> {
        // A trailing slash is removed, since the system would follow a link for it.
        let target = behind_links(&path.components().collect::<PathBuf>()).map_err(|e| Error::io(path, e))?;
        let Some(name) = target.file_name() else {
            return Err(Error::config(format!(
                "{}: the path does not end in a folder's name",
                path.display()
            )));
        };
        let parent = folder_of(&target);
        if !parent.is_dir() {
            let message = format!("the folder {} is not there; make it first", parent.display());
            return Err(Error::io(path, std::io::Error::new(std::io::ErrorKind::NotFound, message)));
        }
        let stem = stem(name);
        let lock = Lock::take(path, target.with_file_name(format!(".{stem}.tiebeam-lock")))?;
        let place = Place { path: path.into(), stem, lock, target };
        place.mend()?;
        Ok(place)
    }

    fn failed(&self, e: std::io::Error) -> Error {
        Error::io(&self.path, e)
    }

    fn exists(&self) -> bool {
        self.target.symlink_metadata().is_ok()
    }

    fn beside(&self, kind: &str) -> PathBuf {
        self.target.with_file_name(format!(".{}.{}.{kind}", self.stem, std::process::id()))
    }

    /// Returns the files that may be removed. A folder that must not be replaced is an error.
    fn ours(&self, known: &Ours) -> Result<Ours> {
        if !self.exists() {
            return Ok(Ours::new());
        }
        let mut entries = self.target.read_dir().map_err(|e| self.failed(e))?;
        if let Some(manifest) = Manifest::read(&self.target)? {
            return manifest.unchanged(&self.target, known);
        }
        if entries.next().is_none() {
            return Ok(Ours::new());
        }
        let path = self.path.display();
        Err(Error::config(format!(
            "{path} is there and holds no {MANIFEST}, the list of what was written by us: it is not ours to replace; name another \
             folder, or move it away"
        )))
    }

    /// Replaces the old folder by `new` and moves the user's files into it.
    fn swap(&self, new: &TemporaryFolder, ours: &Ours) -> Result<()> {
        if !self.exists() {
            std::fs::rename(&new.0, &self.target).map_err(|e| self.failed(e))?;
            sync_folder(&self.target);
            return Ok(());
        }
        // Checked first with the old folder in place. A conflict that can be found now should not make it disappear for a moment.
        foreign(&self.target, &new.0, ours)?;
        let old = self.beside("old");
        std::fs::rename(&self.target, &old).map_err(|e| self.failed(e))?;
        // Checked again for files added since. No more can come now, because the folder has a new name.
        let put = foreign(&old, &new.0, ours)
            .and_then(|_| std::fs::rename(&new.0, &self.target).map_err(|e| self.failed(e)));
        if let Err(e) = put {
            std::fs::rename(&old, &self.target).map_err(|e| Error::io(&old, e))?;
            return Err(e);
        }
        sync_folder(&self.target);
        self.finish(&old, ours)
    }

    /// Moves the user's files from the `old` folder into the one in place, and removes the rest.
    fn finish(&self, old: &Path, ours: &Ours) -> Result<()> {
        for name in foreign(old, &self.target, ours)? {
            let (from, to) = (old.join(&name), self.target.join(&name));
            let moved = std::fs::create_dir_all(folder_of(&to)).and_then(|()| std::fs::rename(&from, &to));
            moved.map_err(|e| {
                let message =
                    format!("{e}; the new folder is in place, and this belongs to {}", to.display());
                Error::io(&from, std::io::Error::new(e.kind(), message))
            })?;
        }
        if let (Ok(old), Ok(new)) = (old.metadata(), File::open(&self.target)) {
            keep_owner_and_mode(&old, &new);
        }
        // If this process is killed during the removal, the next run removes a folder of this name.
        let rest = self.beside("tmp");
        std::fs::rename(old, &rest).map_err(|e| Error::io(old, e))?;
        // The new folder is in place, so a failure to remove the old one is not an error.
        let _ = std::fs::remove_dir_all(&rest);
        Ok(())
    }

    /// Removes or restores folders that killed processes left. This process holds the lock, so no other one is still using them.
    fn mend(&self) -> Result<()> {
        let (mut new, mut old) = (Vec::new(), Vec::new());
        let prefix = format!(".{}.", self.stem);
        let parent = folder_of(&self.target);
        for entry in parent.read_dir().map_err(|e| Error::io(parent, e))?.flatten() {
            let name = entry.file_name();
            let rest = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.split_once('.'));
            let Some((process, kind)) = rest.filter(|(process, _)| is_number(process)) else { continue };
            let own = process == std::process::id().to_string();
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) || self.lock.is_none() && !own {
                continue;
            }
            match kind {
                "tmp" => new.push(entry.path()),
                "old" => old.push(entry.path()),
                _ => {}
            }
        }
        for path in new {
            if let Err(e) = std::fs::remove_dir_all(&path) {
                tracing::warn!(folder = %path.display(), %e, "left by a killed process and cannot be removed");
            }
        }
        // The newest first, should there ever be several.
        old.sort_by_key(|path| std::cmp::Reverse(path.metadata().and_then(|found| found.modified()).ok()));
        for path in old {
            // An empty folder at the path gives way. `remove_dir` fails for any other.
            if !self.exists() || std::fs::remove_dir(&self.target).is_ok() {
                std::fs::rename(&path, &self.target).map_err(|e| Error::io(&path, e))?;
                continue;
            }
            // Nothing is moved into a folder without a manifest, which the caller will refuse.
            if Manifest::read(&self.target)?.is_none() {
                continue;
            }
            // Without a manifest, every file may be the user's.
            let ours = match Manifest::read(&path)? {
                Some(manifest) => manifest.unchanged(&path, &Ours::new())?,
                None => Ours::new(),
            };
            self.finish(&path, &ours)?;
        }
        Ok(())
    }
}

/// Returns the paths, within the folder `old`, of the user's files. A folder is returned as a whole if `new` has none of its name
/// and it contains none of our files. It is an error if `new` has something else of the same name.
fn foreign(old: &Path, new: &Path, ours: &Ours) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    add_foreign(old, new, ours, "", &mut found)?;
    Ok(found)
}

fn add_foreign(old: &Path, new: &Path, ours: &Ours, below: &str, found: &mut Vec<PathBuf>) -> Result<()> {
    let here = old.join(below);
    for entry in here.read_dir().map_err(|e| Error::io(&here, e))? {
        let entry = entry.map_err(|e| Error::io(&here, e))?;
        let path = Path::new(below).join(entry.file_name());
        let kind = entry.file_type().map_err(|e| Error::io(entry.path(), e))?;
        // Our files have names in UTF-8.
        let name = entry.file_name().into_string().map(|name| join(below, &name)).ok();
        let there = new.join(&path).symlink_metadata().ok();
        if let Some(name) = name.as_ref().filter(|_| kind.is_dir()) {
            let inside = format!("{name}/");
            let holds_ours = ours.keys().any(|file| file.starts_with(&inside));
            if there.as_ref().map_or(holds_ours, |there| there.is_dir()) {
                add_foreign(old, new, ours, name, found)?;
                continue;
            }
        }
        let stamp = || entry.metadata().ok().map(|found| Stamp::of(&found));
        let is_ours = |name: &String| {
            name == MANIFEST || ours.get(name).is_some_and(|known| stamp().as_ref() == Some(known))
        };
        if !kind.is_dir() && name.as_ref().is_some_and(is_ours) {
            continue;
        }
        if there.is_some() {
            return Err(in_the_way(&old.join(&path)));
        }
        found.push(path);
    }
    Ok(())
}

/// A locked file, which is removed on drop. A killed process leaves the file, unlocked.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock. It is an error if another process or thread holds it. `None` if the file system has no locks.
    fn take(folder: &Path, path: PathBuf) -> Result<Option<Lock>> {
        // A retry is only needed if the previous holder removes the file between opening and locking.
        for _ in 0..100 {
            let opened = File::options().write(true).create(true).truncate(false).open(&path);
            let file = opened.map_err(|e| Error::io(folder, e))?;
            match file.try_lock() {
                // If the path no longer names this file, its previous holder has just removed it.
                Ok(()) if names(&path, &file) => return Ok(Some(Lock { path, _file: file })),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => break,
                Err(TryLockError::Error(_)) => {
                    let _ = std::fs::remove_file(&path);
                    return Ok(None);
                }
            }
        }
        Err(Error::config(format!(
            "{} is being written by another run, which holds {}: wait for its end, or name another folder",
            folder.display(),
            path.display()
        )))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed before the lock is released. Whoever locks this file next then sees that its path is gone, and retries.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A folder that is removed unless it was renamed.
struct TemporaryFolder(PathBuf);

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // An error here is ignored, because the error that led here is already being returned.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
