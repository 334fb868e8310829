//! Results on their way to a file.

use crate::error::{Error, Result};
use crate::files;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file that grows line by line beside the one that it becomes, under that one's name and `.part`.
///
/// It takes the name only when it is whole. A program that is killed before leaves it where it is, with every line so far, and an
/// earlier file of the name as it was.
pub struct Part {
    path: PathBuf,
    /// `None` where lines go straight into a device or a pipe.
    part: Option<PathBuf>,
    file: File,
}

impl Part {
    /// Where the lines of `path` stand until they are all there.
    pub fn beside(path: &Path) -> PathBuf {
        let mut name = path.as_os_str().to_os_string();
        name.push(".part");
        name.into()
    }

    /// A new one, in place of what a killed program left.
    ///
    /// # Errors
    /// What [`files::check`] says of `path`, or that nothing can be written beside it.
    pub fn create(path: &Path) -> Result<Part> {
        files::check(path)?;
        let through = path.metadata().is_ok_and(|found| !found.is_file());
        let part = (!through).then(|| Part::beside(path));
        let open = part.as_deref().unwrap_or(path);
        let file = File::options().write(true).create(!through).truncate(!through).open(open);
        Ok(Part { path: path.into(), file: file.map_err(|e| Error::io(open, e))?, part })
    }

    /// Adds a line, which the system has when this returns.
    ///
    /// # Errors
    /// [`Error::Io`], as when the disk is full.
    pub fn line(&mut self, line: &str) -> Result<()> {
        // One write, so that a program that is killed leaves whole lines.
        let written = self.file.write_all(format!("{line}\n").as_bytes()).and_then(|()| self.file.flush());
        written.map_err(|e| Error::io(self.part.as_ref().unwrap_or(&self.path), e))
    }

    /// Leaves the lines where they are, of a run that did not come to its end; whether there are any. Without one nothing is left.
    ///
    /// # Errors
    /// [`Error::Io`] where an empty one cannot be taken away.
    pub fn leave(self) -> Result<bool> {
        let Some(part) = self.part else { return Ok(true) };
        let empty = self.file.metadata().is_ok_and(|found| found.len() == 0);
        drop(self.file);
        if empty {
            std::fs::remove_file(&part).map_err(|e| Error::io(&part, e))?;
        }
        Ok(!empty)
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// As [`files::replace`]; then the `.part` stays.
    pub fn finish(self) -> Result<()> {
        let Some(part) = self.part else { return Ok(()) };
        drop(self.file);
        // Through the one door for files, which keeps links, owner and mode of an earlier one.
        let lines = std::fs::read(&part).map_err(|e| Error::io(&part, e))?;
        files::replace_with(&self.path, lines)?;
        std::fs::remove_file(&part).map_err(|e| Error::io(&part, e))
    }
}
