//! Replaces a single file atomically.

use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use twox_hash::XxHash3_128;

/// Calls `write` to write a temporary file beside `path`, syncs it to the disk and renames it over `path`.
///
/// On any error the old file is left intact and the temporary file is removed. The temporary file of a killed process is removed
/// by the next replacement of the same file.
///
/// - If `path` is a symbolic link, the file that it points to is replaced, or created if missing.
/// - A replaced file keeps its mode, and its owner and group if this process may set them. If it may not, set-user-id and
///   set-group-id bits are dropped. Hard links, access lists and extended attributes are not transferred to the new file.
/// - A character device or a pipe is written directly, as by the shell's `>`, so an error leaves a part of the data there. A pipe
///   without a reader is refused at once. Folders, sockets and block devices are refused too.
///
/// # Errors
/// [`Error::Io`] that names `path`, and the errors of `write`.
pub fn replace(path: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(path, e);
    let target = match Target::of(path)? {
        Target::File(target) => target,
        Target::Through => return write(&open_through(path)?),
    };
    remove_leftovers(&target);
    let (temporary, file) = Temporary::create(&target).map_err(failed)?;
    write(&file)?;
    if let Ok(old) = target.metadata() {
        keep_owner_and_mode(&old, &file);
    }
    // The data must be on the disk before the name refers to it. A crash then leaves either the old file or the new one.
    file.sync_all().map_err(failed)?;
    temporary.rename(file, &target).map_err(failed)
}

/// [`replace`] with text or other bytes as the content.
///
/// # Errors
/// As [`replace`].
pub fn replace_with(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    replace(path, |mut file| file.write_all(bytes.as_ref()).map_err(|e| Error::io(path, e)))
}

/// Replaces a file by its content with `bytes` appended. A missing file is created. Only `bytes` is written to devices and pipes.
///
/// # Errors
/// As [`replace`], and when the file cannot be read.
pub fn append(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let mut all = match Target::of(path)? {
        Target::File(target) => match std::fs::read(target) {
            Ok(earlier) => earlier,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io(path, e)),
        },
        Target::Through => Vec::new(),
    };
    all.extend(bytes.as_ref());
    replace_with(path, all)
}

/// Checks whether [`replace`] could write `path` now. Callers use it before long work.
///
/// # Errors
/// [`Error::Io`] that names `path`, when its folder is missing or not writable, or `path` is of a kind that is refused. A pipe is
/// not opened: its reader would take the close for the end of the data.
pub fn check(path: &Path) -> Result<()> {
    match Target::of(path)? {
        Target::File(target) => Temporary::create(&target).map(drop).map_err(|e| Error::io(path, e)),
        Target::Through => Ok(()),
    }
}

/// The kind of a path that is to be written.
enum Target {
    /// A regular file, existing or not, with all links resolved.
    File(PathBuf),
    /// A device or a pipe, which is written directly.
    Through,
}

impl Target {
    fn of(path: &Path) -> Result<Target> {
        let failed = |e| Error::io(path, e);
        // The system follows links here, because those in /proc, where /dev/stdout points, cannot be resolved as paths.
        let found = match path.metadata() {
            Ok(found) => Some(found),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed(e)),
        };
        if let Some(found) = found.as_ref().filter(|found| !found.is_file()) {
            let Some(what) = unwritable(found) else { return Ok(Target::Through) };
            return Err(failed(io::Error::other(format!("this is a {what}; name a file"))));
        }
        let target = behind_links(path).map_err(failed)?;
        let folder = folder_of(&target);
        if !folder.is_dir() {
            let message = format!("the folder {} is not there; make it first", folder.display());
            return Err(failed(io::Error::new(io::ErrorKind::NotFound, message)));
        }
        if found.is_some() && !target.exists() {
            return Err(failed(io::Error::other(
                "the file behind this link has no name any more; name a file",
            )));
        }
        Ok(Target::File(target))
    }
}

/// Returns the name of a kind of file that cannot be written, or `None` for character devices and pipes.
fn unwritable(found: &Metadata) -> Option<&'static str> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = found.file_type();
        if kind.is_char_device() || kind.is_fifo() {
            return None;
        }
        if kind.is_socket() {
            return Some("socket");
        }
        if kind.is_block_device() {
            return Some("block device");
        }
    }
    Some(if found.is_dir() { "folder" } else { "special file" })
}

/// Opens a character device or a pipe.
#[cfg(unix)]
fn open_through(path: &Path) -> Result<File> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    use std::os::unix::fs::OpenOptionsExt;
    let failed = |e| Error::io(path, e);
    // Opening a pipe without a reader would wait for ever. With NONBLOCK it fails.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = File::options().write(true).custom_flags(flags.bits() as i32).open(path);
    let file = opened.map_err(|e| match e.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::NXIO) => {
            let message = "nobody reads from there; start the reader of this pipe first, or name a file";
            failed(io::Error::new(e.kind(), message))
        }
        _ => failed(e),
    })?;
    // Writes to a full pipe should wait, so NONBLOCK is removed again.
    let flags = fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
    fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
    Ok(file)
}

#[cfg(not(unix))]
fn open_through(path: &Path) -> Result<File> {
    File::options().write(true).open(path).map_err(|e| Error::io(path, e))
}

/// Returns the path at the end of a chain of symbolic links. Nothing needs to exist there.
pub(super) fn behind_links(path: &Path) -> io::Result<PathBuf> {
    let mut at = path.to_path_buf();
    // Linux follows 40 links.
    for _ in 0..40 {
        match at.symlink_metadata() {
            Ok(found) if found.is_symlink() => at = folder_of(&at).join(at.read_link()?),
            Ok(_) => return Ok(at),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(at),
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "too many symbolic links follow each other here"))
}

/// Returns the folder that contains `path`.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Gives `new` the mode of `old`, and its owner and group if permitted.
///
/// Failures are ignored: the content matters more, and some file systems have neither modes nor owners.
#[cfg(unix)]
pub(super) fn keep_owner_and_mode(old: &Metadata, new: &File) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    let owners = |m: &Metadata| (m.uid(), m.gid());
    let given = new.metadata().is_ok_and(|new| owners(&new) == owners(old))
        || fchown(new, Some(old.uid()), Some(old.gid())).is_ok();
    if !given {
        // A member of the old group may still set the group.
        let _ = fchown(new, None, Some(old.gid()));
    }
    // With another owner, set-id bits would grant that owner's rights, which nobody asked for.
    let mask = if given { 0o7777 } else { 0o1777 };
    // The mode is set after the owner, because a change of the owner drops set-id bits.
    let _ = new.set_permissions(PermissionsExt::from_mode(old.mode() & mask));
}

#[cfg(not(unix))]
pub(super) fn keep_owner_and_mode(_: &Metadata, _: &File) {}

/// Returns the beginning of a temporary file's name: the name of its target, or the start and a hash of a long name. The target's
/// name may already have the greatest length that the file system allows.
pub(super) fn stem(name: &OsStr) -> String {
    match name.to_str() {
        Some(name) if name.len() <= 64 => name.to_string(),
        _ => {
            let start: String = name.to_string_lossy().chars().take(10).collect();
            format!("{start}~{:032x}", XxHash3_128::oneshot(name.as_encoded_bytes()))
        }
    }
}

/// Whether `path` still names the open `file`.
pub(super) fn names(path: &Path, file: &File) -> bool {
    let (Ok(at), Ok(open)) = (path.symlink_metadata(), file.metadata()) else { return false };
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        (at.dev(), at.ino()) == (open.dev(), open.ino())
    }
    #[cfg(not(unix))]
    {
        at.is_file() && open.is_file()
    }
}

/// Removes the temporary files of killed processes beside `target`. The system releases a killed process's locks, so a file that
/// can be locked is not in use.
fn remove_leftovers(target: &Path) {
    let Some(name) = target.file_name() else { return };
    let prefix = format!(".{}.", stem(name));
    // Files that cannot be read or removed are left, since they do no harm.
    for entry in folder_of(target).read_dir().into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".tmp"));
        let numbers = id.and_then(|id| id.split_once('-'));
        if !numbers.is_some_and(|(process, count)| is_number(process) && is_number(count)) {
            continue;
        }
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        if let Ok(file) = File::options().write(true).open(entry.path())
            && file.try_lock().is_ok()
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

pub(super) fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// A file that is removed on drop unless it was renamed.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// Creates a locked file in the folder of `target`, because a rename cannot cross file systems.
    fn create(target: &Path) -> io::Result<(Temporary, File)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let Some(name) = target.file_name() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a file name"));
        };
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        if target.exists() {
            use std::os::unix::fs::OpenOptionsExt;
            // The new file gets the old one's mode only at the end. Until then, only the owner may read it.
            options.mode(0o600);
        }
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".{}.{}-{count}.tmp", stem(name), std::process::id()));
            let file = match options.open(&path) {
                Ok(file) => file,
                // A killed process with the same id left it, or a process with that id on another machine uses it.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            };
            // Between creation and locking, another process may have taken the file for a leftover and locked or removed it. A
            // file system without locks is fine, since no process can do so there.
            if !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && path.exists() {
                return Ok((Temporary(Some(path)), file));
            }
        }
    }

    fn rename(mut self, file: File, target: &Path) -> io::Result<()> {
        let Some(path) = self.0.take() else { return Ok(()) };
        // Windows cannot rename open files. Elsewhere the lock is held until the temporary name is gone.
        #[cfg(not(unix))]
        drop(file);
        if let Err(e) = std::fs::rename(&path, target) {
            self.0 = Some(path);
            return Err(e);
        }
        #[cfg(unix)]
        drop(file);
        sync_folder(target);
        Ok(())
    }
}

/// Syncs the folder of `path`, so that a new name reaches the disk. Failures are ignored: the file is valid in any case, and not
/// every system can sync a folder.
pub(super) fn sync_folder(path: &Path) {
    #[cfg(unix)]
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    #[cfg(not(unix))]
    let _ = path;
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // An error here is ignored, because the error that led here is already being returned.
            let _ = std::fs::remove_file(path);
        }
    }
}
