//! One file.

use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::fs::{File, Metadata, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use twox_hash::XxHash3_128;

/// Has `write` write a temporary file beside `path`, syncs it to the disk and renames it over `path`.
///
/// On any error the old file is as it was and the temporary file is gone; what a killed process left of its own is removed
/// by the next replacement of the same file.
///
/// - A symbolic link stays one: the file that it points to is replaced, or made where there is none yet.
/// - A replaced file keeps its mode, and its owner and group where this process may give files away; without that, set-user-id
///   and set-group-id bits are dropped. Hard links, access lists and extended attributes stay with the old file.
/// - A character device or a pipe is written through, as the shell's `>` does: what an error leaves is then half written. A pipe
///   that nobody reads is refused at once, so are folders, sockets and block devices.
///
/// # Errors
/// [`Error::Io`] naming `path`, or what `write` returns.
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
    // On the disk before the name points at it: a crash leaves the old file or the new one.
    file.sync_all().map_err(failed)?;
    temporary.rename(file, &target).map_err(failed)
}

/// [`replace`] for a text or other bytes at hand.
///
/// # Errors
/// As [`replace`].
pub fn replace_with(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    replace(path, |mut file| file.write_all(bytes.as_ref()).map_err(|e| Error::io(path, e)))
}

/// [`replace_with`] what a file holds and `bytes` behind it; a file that is missing is made. Devices and pipes get `bytes` alone.
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

/// What [`replace`] would say if it wrote `path` now: for long work to know before it begins.
///
/// # Errors
/// [`Error::Io`] naming `path`, when its folder is missing or takes no new file, or when it is nothing that is written to. A pipe
/// may lose its reader later, and is not opened here: a reader would take the end of that for the end of the data.
pub fn check(path: &Path) -> Result<()> {
    match Target::of(path)? {
        Target::File(target) => Temporary::create(&target).map(drop).map_err(|e| Error::io(path, e)),
        Target::Through => Ok(()),
    }
}

/// Where what is written to a path goes.
enum Target {
    /// To this regular file, behind all links, there or not.
    File(PathBuf),
    /// Destination a device or a pipe.
    Through,
}

impl Target {
    fn of(path: &Path) -> Result<Target> {
        let failed = |e| Error::io(path, e);
        // Links are followed by the system here: those of /proc, where /dev/stdout points, cannot be read as paths.
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

/// What it is that cannot be written to; `None` for what takes bytes as they come.
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
    // Opening a pipe that nobody reads waits for ever unless it is opened so.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = File::options().write(true).custom_flags(flags.bits() as i32).open(path);
    let file = opened.map_err(|e| match e.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::NXIO) => {
            let message = "nobody reads from there; start the reader of this pipe first, or name a file";
            failed(io::Error::new(e.kind(), message))
        }
        _ => failed(e),
    })?;
    // From here on a full pipe is waited for.
    let flags = fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
    fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
    Ok(file)
}

#[cfg(not(unix))]
fn open_through(path: &Path) -> Result<File> {
    File::options().write(true).open(path).map_err(|e| Error::io(path, e))
}

/// The path at the end of a chain of symbolic links, where nothing needs to be.
pub(super) fn behind_links(path: &Path) -> io::Result<PathBuf> {
    let mut at = path.to_path_buf();
    // As many as Linux follows.
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

/// The folder that holds `path`.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Gives `new` the mode of `old`, and its owner and group where that is permitted.
///
/// Never an error: the content is more than its owner, and some file systems have neither.
#[cfg(unix)]
pub(super) fn keep_owner_and_mode(old: &Metadata, new: &File) {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    let owners = |m: &Metadata| (m.uid(), m.gid());
    let given = new.metadata().is_ok_and(|new| owners(&new) == owners(old))
        || fchown(new, Some(old.uid()), Some(old.gid())).is_ok();
    if !given {
        // A member of the group may still give a file to it.
        let _ = fchown(new, None, Some(old.gid()));
    }
    // Set-id bits would lend the rights of another owner than the one who set them.
    let mask = if given { 0o7777 } else { 0o1777 };
    // After the owner, whose change drops set-id bits.
    let _ = new.set_permissions(PermissionsExt::from_mode(old.mode() & mask));
}

#[cfg(not(unix))]
pub(super) fn keep_owner_and_mode(_: &Metadata, _: &File) {}

/// What a temporary file's name begins with: the name of its target, or the beginning and a hash of a long one, because the
/// target's name may already be as long as names can be.
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

/// Removes the temporary files of killed processes beside `target`. The system frees a killed process's locks, so a file that
/// can be locked is nobody's.
fn remove_leftovers(target: &Path) {
    let Some(name) = target.file_name() else { return };
    let prefix = format!(".{}.", stem(name));
    // What cannot be looked at or removed stays: it is in nobody's way.
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

/// A file that removes itself unless it is renamed.
struct Temporary(Option<PathBuf>);

impl Temporary {
    /// A new, locked file in the folder of `target`, because a rename must not cross file systems.
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
            // Nobody reads in the new file what the old one, whose mode it gets at the end, keeps from them.
            options.mode(0o600);
        }
        loop {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = target.with_file_name(format!(".{}.{}-{count}.tmp", stem(name), std::process::id()));
            let file = match options.open(&path) {
                Ok(file) => file,
                // Left by a killed process that had our id, or in use by one that has it on another machine.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            };
            // Between the two calls another process may have taken the file for a leftover. Where there are no locks, nobody
            // can.
            if !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && path.exists() {
                return Ok((Temporary(Some(path)), file));
            }
        }
    }

    fn rename(mut self, file: File, target: &Path) -> io::Result<()> {
        let Some(path) = self.0.take() else { return Ok(()) };
        // Windows does not rename open files; elsewhere the lock is held until the name is gone.
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

/// Has a new name reach the disk. What it names is good either way, and not every system can sync a folder.
pub(super) fn sync_folder(path: &Path) {
    #[cfg(unix)]
    let _ = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    #[cfg(not(unix))]
    let _ = path;
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
