//! Compares a run with the times of another engine or of an earlier run.

use super::lines::Line;
use super::report::digits;
use super::{Failed, Host, Record, Run};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// The time of one row of a baseline.
#[derive(Clone, Debug, PartialEq)]
struct Time {
    median_ms: f64,
    /// The engine and the adapter: `torch 2.11.0+cu130, NVIDIA H200`.
    who: String,
    /// The number of lines with this row's name in the file. The fastest is kept.
    lines: usize,
}

/// A line of another program, or a row of Tiebeam's own output.
#[derive(Deserialize)]
struct Timed {
    family: Option<String>,
    op: Option<String>,
    shape: String,
    median_ms: f64,
    peer: Option<String>,
    adapter: Option<String>,
    precision: Option<String>,
}

/// The fastest time of every row in a file of JSON lines.
#[derive(Clone, Debug, PartialEq)]
pub struct Baseline(BTreeMap<String, Time>);

/// Other programs' names of families, and Tiebeam's.
const FAMILIES: [(&str, &str); 2] =
    [("layernorm", "layer_norm"), ("se3conv fwd+bwd (geometry+basis+layer)", "ponita")];

impl Baseline {
    /// Reads JSON lines, either what `tiebeam bench --json` wrote or those of another program. The latter have `family` or `op`,
    /// `shape`, `median_ms` and optionally `peer`, `adapter` and `precision`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Config`], with file and line, for a line that is neither, and for a file without times.
    pub fn read(path: &Path) -> Result<Baseline> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Baseline::parse(path, &text)
    }

    /// Reads JSON lines from a text. `path` is its name in errors.
    ///
    /// # Errors
    /// As [`Baseline::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Baseline> {
        let mut all = BTreeMap::new();
        let (mut peer, mut adapter) = (String::new(), String::new());
        let lines = Line::all(path, text)?;
        for line in &lines {
            match line.kind() {
                Some("host") => {
                    let host: Host = line.read()?;
                    (peer, adapter) = (format!("tiebeam {}", host.version), host.adapter);
                    continue;
                }
                Some("ceilings" | "failed") => continue,
                _ => {}
            }
            let timed: Timed = line.read()?;
            let median_ms = timed.median_ms;
            let family = timed.family.or(timed.op).ok_or_else(|| line.bad("no text 'family' or 'op'"))?;
            let family = FAMILIES.iter().find(|f| f.0 == family).map_or(family.as_str(), |f| f.1);
            let name = format!("{family} {}", timed.shape);
            if median_ms <= 0.0 {
                return Err(line.bad("'median_ms' is not above 0"));
            }
            let of = |own: Option<String>, otherwise: &str| own.unwrap_or_else(|| otherwise.into());
            let who = [of(timed.peer, &peer), of(timed.adapter, &adapter), of(timed.precision, "")];
            let who = who.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ");
            let time = all.entry(name).or_insert(Time { median_ms, who: who.clone(), lines: 0 });
            time.lines += 1;
            if median_ms < time.median_ms {
                (time.median_ms, time.who) = (median_ms, who);
            }
        }
        match all.is_empty() {
            true => {
                Err(Error::config(format!("{}: no line with a time; give a file with some", path.display())))
            }
            false => Ok(Baseline(all)),
        }
    }

    /// Pairs the rows of a run with those of this baseline, by name.
    pub fn matches(&self, run: &Run) -> Matches {
        let mut found = Matches { rows: Vec::new(), ours: Vec::new(), theirs: Vec::new() };
        for record in &run.records {
            match self.0.get(&record.name()) {
                Some(time) => found.rows.push(Match {
                    name: record.name(),
                    ours_ms: record.median_ms,
                    theirs_ms: time.median_ms,
                    who: time.who.clone(),
                    lines: time.lines,
                }),
                None => found.ours.push(record.name()),
            }
        }
        found.ours.extend(run.failed.iter().map(Failed::name));
        let has = |name: &String| run.records.iter().map(Record::name).any(|ours| ours == *name);
        found.theirs = self.0.keys().filter(|name| !has(name)).cloned().collect();
        found
    }
}

/// A row that both the run and the baseline have.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// `matmul 512x512x512`.
    pub name: String,
    /// The run's median.
    pub ours_ms: f64,
    /// The baseline's median. If its file has several lines of this name, the smallest.
    pub theirs_ms: f64,
    /// The baseline's engine and adapter.
    pub who: String,
    /// The number of lines with this name in the baseline's file.
    pub lines: usize,
}

/// A run beside a [`Baseline`].
#[derive(Clone, Debug, PartialEq)]
pub struct Matches {
    /// Rows that both have.
    pub rows: Vec<Match>,
    /// Names of rows that only the run has, including rows that failed.
    pub ours: Vec<String>,
    /// Names of rows that only the baseline has.
    pub theirs: Vec<String>,
}

impl Matches {
    /// Returns a table to be read by people.
    pub fn table(&self) -> String {
        let head = ["kernel", "ours ms", "theirs ms", "ours/theirs", "who"];
        let mut out =
            format!("{:<44} {:>10} {:>10} {:>12}  {}\n", head[0], head[1], head[2], head[3], head[4]);
        for row in &self.rows {
            let ratio = format!("{:.2}", row.ours_ms / row.theirs_ms);
            let (ours, theirs) = (digits(row.ours_ms), digits(row.theirs_ms));
            let several = match row.lines {
                1 => String::new(),
                n => format!(", the fastest of {n} lines"),
            };
            let _ =
                writeln!(out, "{:<44} {ours:>10} {theirs:>10} {ratio:>12}  {}{several}", row.name, row.who);
        }
        for (who, names) in [("us", &self.ours), ("them", &self.theirs)] {
            if !names.is_empty() {
                let _ = writeln!(out, "only from {who}: {}", names.join("; "));
            }
        }
        out
    }
}
