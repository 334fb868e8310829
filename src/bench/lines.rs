//! Writes and reads runs as JSON lines: one object for the host, one for the ceilings, and one per row, as they are measured.
//!
//! If ceilings are measured again, they are written as a further line. The last one of a run applies to all its rows. Fractions in
//! the file refer to the ceilings at the time of writing, and are recomputed when the file is read.

use super::{Ceilings, Event, Failed, Host, Record, Run};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// A line as it is written. The date and the mark on rows above their ceilings are for people, and are not read back.
#[derive(Serialize)]
#[serde(tag = "line", rename_all = "lowercase")]
enum Written<'a> {
    Host {
        #[serde(flatten)]
        host: &'a Host,
        date: String,
    },
    Ceilings(&'a Ceilings),
    Row {
        #[serde(flatten)]
        record: &'a Record,
        above: bool,
    },
    Failed(&'a Failed),
}

/// A line of a run, after its host line.
#[derive(Deserialize)]
#[serde(tag = "line", rename_all = "lowercase")]
enum Read {
    Ceilings(Ceilings),
    Row(Record),
    Failed(Failed),
}

impl Event<'_> {
    /// Returns the event's line in a file, or `None` for events that are only shown.
    pub fn to_json(&self) -> Option<Value> {
        let line = match self {
            Event::Host(host) => Written::Host { host, date: host.date() },
            Event::Ceilings(ceilings) => Written::Ceilings(ceilings),
            Event::Row(record) => Written::Row { record, above: record.is_above() },
            Event::Failed(failed) => Written::Failed(failed),
            Event::Measured(..) | Event::Turn(_) | Event::Lost(_) => return None,
        };
        Some(json!(line))
    }
}

/// A line of a file, with its path and line number.
pub(super) struct Line<'a> {
    path: &'a Path,
    at: usize,
    pub value: Value,
}

impl Line<'_> {
    /// The lines of a file that are not empty, as JSON objects.
    pub(super) fn all<'a>(path: &'a Path, text: &str) -> Result<Vec<Line<'a>>> {
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        lines
            .map(|(at, line)| {
                let line = match serde_json::from_str(line) {
                    Ok(value) => Line { path, at, value },
                    Err(e) => {
                        return Err(Line { path, at, value: Value::Null }.bad(&format!("not JSON ({e})")));
                    }
                };
                if line.value.is_object() { Ok(line) } else { Err(line.bad("no JSON object")) }
            })
            .collect()
    }

    pub(super) fn bad(&self, what: &str) -> Error {
        Error::config(format!(
            "{}:{}: {what}; give a file of JSON lines such as 'tiebeam bench --json' writes",
            self.path.display(),
            self.at
        ))
    }

    /// The kind of a line that Tiebeam wrote: `host`, `ceilings`, `row` or `failed`.
    pub(super) fn kind(&self) -> Option<&str> {
        self.value["line"].as_str()
    }

    /// Deserializes the line.
    pub(super) fn read<'a, T: Deserialize<'a>>(&'a self) -> Result<T> {
        T::deserialize(&self.value).map_err(|e| self.bad(&e.to_string()))
    }
}

/// Reads what `tiebeam bench --json` wrote, including the `.part` of a killed program. A file may hold several runs, each of which
/// begins with a `host` line.
///
/// # Errors
/// [`Error::Io`], or [`Error::Config`] with file and line if the file is not a run.
pub fn read_runs(path: &Path) -> Result<Vec<Run>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    parse_runs(path, &text)
}

/// Reads runs from a text. `path` is its name in errors.
///
/// # Errors
/// As [`read_runs`].
pub fn parse_runs(path: &Path, text: &str) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    for line in Line::all(path, text)? {
        if line.kind() == Some("host") {
            let (host, ceilings) = (line.read()?, Ceilings::default());
            runs.push(Run { host, ceilings, records: Vec::new(), failed: Vec::new() });
            continue;
        }
        let Some(run) = runs.last_mut() else { return Err(line.bad("no host before it")) };
        match line.read()? {
            Read::Ceilings(ceilings) => run.ceilings = ceilings,
            Read::Row(mut record) => {
                // Files from before 0.1.0 have no `half`. Only f16 rows are compared with matrix units.
                record.half |= record.ceiling == "coop f16";
                run.records.push(record);
            }
            Read::Failed(failed) => run.failed.push(failed),
        }
    }
    if runs.is_empty() {
        return Err(Line { path, at: 1, value: Value::Null }.bad("no run"));
    }
    for run in &mut runs {
        run.records.iter_mut().for_each(|record| record.hold(&run.ceilings));
    }
    Ok(runs)
}
