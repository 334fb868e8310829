//! Writes results to a file line by line, and gives the file its name when it is complete.

use crate::error::{Error, Result};
use crate::files;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file that grows line by line beside its target, under the target's name with `.part` appended.
///
/// It replaces the target only when it is complete. If the program is killed before, the `.part` stays with every line so far, and
/// an earlier file of the target's name is unchanged.
pub struct Part {
    path: PathBuf,
    /// `None` if lines are written directly, because the target is a device or a pipe.
    part: Option<PathBuf>,
    file: File,
}

impl Part {
    /// The path of the `.part` of `path`.
    pub fn beside(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_os_string();
        name.push(".part");
        name.into()
    }

    /// Creates an empty `.part`, which replaces the one of a killed program.
    ///
    /// # Errors
    /// Those of [`files::check`] for `path`, or [`Error::Io`] if nothing can be written beside it.
    pub fn create(path: &Path) -> Result<Part> {
        files::check(path)?;
        let through = path.metadata().is_ok_and(|found| !found.is_file());
        let part = (!through).then(|| Part::beside(path));
        let open = part.as_deref().unwrap_or(path);
        let file = File::options().write(true).create(!through).truncate(!through).open(open);
        Ok(Part { path: path.into(), file: file.map_err(|e| Error::io(open, e))?, part })
    }

    /// Adds a line. It has reached the operating system when this returns.
    ///
    /// # Errors
    /// [`Error::Io`], for example when the disk is full.
    pub fn line(&mut self, line: &str) -> Result<()> {
        // A line is one write, so a killed program leaves only whole lines.
        let written = self.file.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.file.flush());
        written.map_err(|e| Error::io(self.part.as_ref().unwrap_or(&self.path), e))
    }

    /// Keeps the `.part` of a run that did not finish, and returns whether it has lines. A `.part` without lines is removed.
    ///
    /// # Errors
    /// [`Error::Io`] if an empty `.part` cannot be removed.
    pub fn leave(self) -> Result<bool> {
        let Some(part) = self.part else { return Ok(true) };
        let empty = self.file.metadata().is_ok_and(|found| found.len() == 0);
        drop(self.file);
        if empty {
            std::fs::remove_file(&part).map_err(|e| Error::io(&part, e))?;
        }
        Ok(!empty)
    }

    /// Replaces the target by the `.part`.
    ///
    /// # Errors
    /// As [`files::replace`]. The `.part` then stays.
    pub fn finish(self) -> Result<()> {
        let Some(part) = self.part else { return Ok(()) };
        drop(self.file);
        // `replace_with` keeps links, owner and mode of an earlier file, which a rename would not.
        let lines = std::fs::read(&part).map_err(|e| Error::io(&part, e))?;
        files::replace_with(&self.path, lines)?;
        std::fs::remove_file(&part).map_err(|e| Error::io(&part, e))
    }
}
