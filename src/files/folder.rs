//! A folder.

use super::manifest::{MANIFEST, Manifest, Ours, Stamp, join};
use super::replace::{behind_links, folder_of, is_number, keep_owner_and_mode, names, stem, sync_folder};
use crate::error::{Error, Result};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

/// Has `write` fill a new folder beside `path` and renames it to `path` when it is complete.
///
/// The new folder lists what `write` put there in a file named [`MANIFEST`], with size and hash. A folder that is there already
/// is replaced if it is empty or has such a list, and then:
///
/// - Files that are as listed go.
/// - Everything else (what the list does not name, and what was changed since) is somebody's and is moved into the new folder. Where
///   `write` made something of the same name, nothing is replaced, and the error names it.
///
/// A folder without a list may be all somebody's and is refused, one that an older version made among them. A symbolic link stays one:
/// the folder that it points to is replaced. Mode and owner of a replaced folder stay as they do for [`replace`](super::replace()).
///
/// On any error the old folder is as it was and the new one is gone. A killed process leaves `.NAME.PID.tmp`, the new folder, and
/// perhaps `.NAME.PID.old`, the old one; the next call for the same `path` removes the first and restores the second, or moves
/// out of it what was somebody's where the new folder is in place. Of two calls for one `path` at once the second is refused; while one
/// runs, it holds a lock on `.NAME.tiebeam-lock`.
///
/// `write` makes files and folders, no links.
///
/// # Errors
/// [`Error::Io`] or [`Error::Config`] naming `path` or the file in the way, or what `write` returns.
pub fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let place = Place::take(path)?;
    let ours = place.ours(&Ours::new())?;
    let new = TemporaryFolder(place.beside("tmp"));
    #[cfg_attr(not(unix), expect(unused_mut, reason = "only there has a folder a mode"))]
    let mut builder = std::fs::DirBuilder::new();
    #[cfg(unix)]
    if place.exists() {
        use std::os::unix::fs::DirBuilderExt;
        // Nobody reads in the new folder what the old one, whose mode it gets at the end, keeps from them.
        builder.mode(0o700);
    }
    builder.create(&new.0).map_err(|e| place.failed(e))?;
    write(&new.0)?;
    Manifest::make(&new.0)?;
    // Somebody may have filled or changed the folder meanwhile.
    let ours = place.ours(&ours)?;
    place.swap(&new, &ours)
}

/// What [`replace_folder`] would say if it replaced `path` by these files now: for long work to know before it begins. What killed
/// processes left is mended here already.
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

/// The place of a folder, which nobody else replaces meanwhile.
struct Place {
    /// As the caller named it, for errors.
    path: PathBuf,
    /// Where the folder is, behind all links.
    target: PathBuf,
    stem: String,
    /// `None` where the file system has no locks: what others left cannot be told from what they use there, and stays.
    lock: Option<Lock>,
}

impl Place {
    /// Locks the place and mends what killed processes left there.
    fn take(path: &Path) -> Result<Place> {
        // Without a slash at the end, which would stand for the folder behind a link.
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

    /// The files that may go; an error where the folder is not ours to replace.
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

    /// Puts `new` where the old folder is, and what is somebody's into it.
    fn swap(&self, new: &TemporaryFolder, ours: &Ours) -> Result<()> {
        if !self.exists() {
            std::fs::rename(&new.0, &self.target).map_err(|e| self.failed(e))?;
            sync_folder(&self.target);
            return Ok(());
        }
        // First while the old folder is in place: it is not out of sight for an error that can be known.
        foreign(&self.target, &new.0, ours)?;
        let old = self.beside("old");
        std::fs::rename(&self.target, &old).map_err(|e| self.failed(e))?;
        // What came since is found now that nobody knows the folder's name.
        let put = foreign(&old, &new.0, ours)
            .and_then(|_| std::fs::rename(&new.0, &self.target).map_err(|e| self.failed(e)));
        if let Err(e) = put {
            std::fs::rename(&old, &self.target).map_err(|e| Error::io(&old, e))?;
            return Err(e);
        }
        sync_folder(&self.target);
        self.finish(&old, ours)
    }

    /// Moves what is somebody's from the `old` folder into the one in place, and removes the rest.
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
        // By this name it is removed by the next run if this one is killed halfway.
        let rest = self.beside("tmp");
        std::fs::rename(old, &rest).map_err(|e| Error::io(old, e))?;
        // The new folder is in place: what is left of the old one is no failure.
        let _ = std::fs::remove_dir_all(&rest);
        Ok(())
    }

    /// Removes and restores what killed processes left: they are gone, because the lock is ours.
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
        // The last one first, should there ever be several.
        old.sort_by_key(|path| std::cmp::Reverse(path.metadata().and_then(|found| found.modified()).ok()));
        for path in old {
            // An empty folder was made since; one that is not empty cannot be removed so.
            if !self.exists() || std::fs::remove_dir(&self.target).is_ok() {
                std::fs::rename(&path, &self.target).map_err(|e| Error::io(&path, e))?;
                continue;
            }
            // Nothing is moved into a folder that is not ours: it will be refused.
            if Manifest::read(&self.target)?.is_none() {
                continue;
            }
            // What has no list may be all somebody's.
            let ours = match Manifest::read(&path)? {
                Some(manifest) => manifest.unchanged(&path, &Ours::new())?,
                None => Ours::new(),
            };
            self.finish(&path, &ours)?;
        }
        Ok(())
    }
}

/// What is in the folder `old` and is not ours, by path in it: files, and whole folders where `new` has none of the name and none of
/// our files are below. An error where `new` has something else of the name.
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
        // What has no such name is not ours.
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

/// A locked file, removed at the end. A killed process leaves it unlocked.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// An error where another process or thread has it; `None` where there are no locks.
    fn take(folder: &Path, path: PathBuf) -> Result<Option<Lock>> {
        // More than once only where somebody else removes the file at this moment.
        for _ in 0..100 {
            let opened = File::options().write(true).create(true).truncate(false).open(&path);
            let file = opened.map_err(|e| Error::io(folder, e))?;
            match file.try_lock() {
                // Otherwise whoever had it before has just removed it.
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
        // Before the lock is freed, so that whoever takes it next sees that its file is gone.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A folder that is removed unless it was renamed.
struct TemporaryFolder(PathBuf);

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // As for files: the first error is already on its way.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
