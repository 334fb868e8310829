//! The list of variants: every kernel with its constants and imports that the suite and the benchmark make, in
//! `shaders/variants.txt`, a line each. A test translates the whole list for every target without a device, so that what has run
//! on one driver has been seen by every compiler.
//!
//! With `TIEBEAM_VARIANTS=FILE` a kernel whose line is not in the file fails when it is compiled and says the line to add; with
//! `TIEBEAM_RECORD_VARIANTS=1` beside it the line is added instead.

use super::lock;
use super::shader::Source;
use crate::error::{Error, Result};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

/// The list that this process is held to.
struct Held {
    path: PathBuf,
    lines: Mutex<HashSet<String>>,
    /// Where new lines go.
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
            // A number of the data, not of the code: one stands for all.
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
            // In one write: other processes add to the same file.
            lock(file).write_all(format!("{line}\n").as_bytes()).map_err(|e| Error::io(&self.path, e))?;
            lock(&self.lines).insert(line);
        }
        Ok(())
    }
}

/// Constants that come from a model's data, as a hash's seed does: any other value makes the same text but for the number.
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

/// The list that this process is held to, if there is one.
fn held() -> Option<&'static Result<Held>> {
    static HELD: OnceLock<Option<Result<Held>>> = OnceLock::new();
    let open = || {
        let path = std::env::var_os("TIEBEAM_VARIANTS").filter(|path| !path.is_empty()).map(PathBuf::from)?;
        let record = std::env::var_os("TIEBEAM_RECORD_VARIANTS").is_some_and(|v| !v.is_empty() && v != "0");
        Some(Held::open(path.clone(), record).map_err(|e| Error::io(&path, e)))
    };
    HELD.get_or_init(open).as_ref()
}

/// Whether sources should bring their lines.
pub(super) fn is_held() -> bool {
    held().is_some()
}

/// Holds a kernel that is about to be compiled to the list, if there is one.
pub(super) fn check(source: &Source) -> Result<()> {
    match held() {
        None => Ok(()),
        Some(Ok(held)) => held.check(source),
        Some(Err(error)) => Err(error.clone()),
    }
}
