//! The list of variants, `shaders/variants.txt`. It has a line for every kernel, with its constants and fragments, that
//! the test suite and the benchmark compile. A test translates the whole list for every target without a device, so
//! that every compiler has seen what has run on one driver.
//!
//! With `TIEBEAM_VARIANTS=FILE`, compiling a kernel whose line is not in the file fails, and the error says which line
//! to add. With `TIEBEAM_RECORD_VARIANTS=1` as well, the line is added to the file instead.

use super::lock;
use super::shader::Source;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

/// The list that this process checks its kernels against.
struct Held {
    path: PathBuf,
    lines: Mutex<HashSet<String>>,
    /// The file that new lines are appended to.
    record: Option<Mutex<File>>,
}

impl Held {
    fn open(path: PathBuf, record: bool) -> std::io::Result<Held> {
        let text = match std::fs::read_to_string(&path) {
            Err(error) if record && error.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read?,
        };
        let lines = Mutex::new(text.lines().map(String::from).collect());
        let file = || OpenOptions::new().create(true).append(true).open(&path);
        Ok(Held { record: record.then(file).transpose()?.map(Mutex::new), lines, path })
    }

    fn check(&self, source: &Source) -> Result<()> {
        for line in source.lines() {
            // Numbers that come from a model's data are replaced, so that one line covers all of them.
            let line = without_data(&line);
            if lock(&self.lines).contains(&line) {
                continue;
            }
            let Some(file) = &self.record else {
                let message = format!(
                    "a variant that is not in {}, so that no other target's compiler has seen it; add the line\n{line}\nor run \
                     `make variants`",
                    self.path.display()
                );
                return Err(Error::shader(source.name(), 0, message));
            };
            // In one write, because other processes append to the same file.
            lock(file).write_all(format!("{line}\n").as_bytes()).map_err(|e| Error::io(&self.path, e))?;
            lock(&self.lines).insert(line);
        }
        Ok(())
    }
}

/// Constants that come from a model's data, such as the seed of a hash. Texts for two values differ in that number
/// only.
const DATA: [&str; 3] = ["SEED", "SIGN_SEED", "STORED"];

fn without_data(line: &str) -> String {
    let word = |word: &str| match word.split_once('=') {
        Some((name, _)) if DATA.contains(&name) => format!("{name}=7u"),
        _ => word.to_string(),
    };
    if !line.contains("SEED=") {
        return line.to_string();
    }
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

/// The list that this process checks its kernels against, if there is one.
fn held() -> Option<&'static Result<Held>> {
    static HELD: OnceLock<Option<Result<Held>>> = OnceLock::new();
    let open = || {
        let path = std::env::var_os("TIEBEAM_VARIANTS").filter(|path| !path.is_empty()).map(PathBuf::from)?;
        let record = std::env::var_os("TIEBEAM_RECORD_VARIANTS").is_some_and(|v| !v.is_empty() && v != "0");
        Some(Held::open(path.clone(), record).map_err(|e| Error::io(&path, e)))
    };
    HELD.get_or_init(open).as_ref()
}

/// Whether there is a list, so that generated sources need their lines.
pub(super) fn is_held() -> bool {
    held().is_some()
}

/// Checks a kernel that is about to be compiled against the list, if there is one.
pub(super) fn check(source: &Source) -> Result<()> {
    match held() {
        None => Ok(()),
        Some(Ok(held)) => held.check(source),
        Some(Err(error)) => Err(error.clone()),
    }
}
