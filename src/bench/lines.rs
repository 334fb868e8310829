//! Runs as JSON lines, one object each: the host, the ceilings, a line for each row, as they come.
//!
//! Ceilings that were measured again are a further line; the last one of a run holds for all its rows. Fractions in the file are
//! those of the time of writing, and are computed anew when it is read.

use super::{Ceilings, Event, Failed, Host, Record, Run};
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::path::Path;

impl Event<'_> {
    /// Its line in a file; `None` for what is only to be seen.
    pub fn to_json(&self) -> Option<Value> {
        match self {
            Event::Host(host) => Some(host.to_json()),
            Event::Ceilings(ceilings) => Some(ceilings.to_json()),
            Event::Row(record) => Some(record.to_json()),
            Event::Failed(failed) => Some(failed.to_json()),
            Event::Measured(..) | Event::Turn(_) | Event::Lost(_) => None,
        }
    }
}

impl Host {
    fn to_json(&self) -> Value {
        json!({"line": "host", "adapter": self.adapter, "kind": self.kind, "backend": self.backend, "driver": self.driver,
            "version": self.version, "unix_time": self.unix_time, "date": self.date(), "cores": self.cores,
            "class": self.class, "tuned": self.tuned})
    }

    fn from_json(line: &Line) -> Result<Host> {
        Ok(Host {
            adapter: line.text("adapter")?,
            kind: line.text("kind")?,
            backend: line.text("backend")?,
            driver: line.text("driver")?,
            version: line.text("version")?,
            unix_time: line.number("unix_time")? as u64,
            cores: line.number("cores")? as usize,
            // Version 0.1.0 did not write these.
            class: line.value["class"].as_str().unwrap_or_default().to_string(),
            tuned: line.value["tuned"].as_bool().unwrap_or(false),
        })
    }
}

impl Ceilings {
    fn to_json(self) -> Value {
        json!({"line": "ceilings", "copy_bytes_s": self.copy, "kernel_copy_bytes_s": self.kernel_copy,
            "fma32_flops": self.fma32, "fma16_flops": self.fma16, "coop_flops": self.coop,
            "dispatch_s": self.dispatch, "pass_s": self.pass, "submit_s": self.submit, "readback_s": self.readback})
    }

    fn from_json(line: &Line) -> Ceilings {
        // What is no number could not be measured.
        let of = |key: &str| line.value[key].as_f64();
        Ceilings {
            copy: of("copy_bytes_s"),
            kernel_copy: of("kernel_copy_bytes_s"),
            fma32: of("fma32_flops"),
            fma16: of("fma16_flops"),
            coop: of("coop_flops"),
            dispatch: of("dispatch_s"),
            pass: of("pass_s"),
            submit: of("submit_s"),
            readback: of("readback_s"),
        }
    }
}

impl Record {
    fn to_json(&self) -> Value {
        json!({"line": "row", "family": self.family, "shape": self.shape, "median_ms": self.median_ms, "min_ms": self.min_ms,
            "max_ms": self.max_ms, "first_ms": self.first_ms, "samples": self.samples, "inner": self.inner,
            "clock": self.clock, "bytes": self.bytes, "flops": self.flops, "half": self.half, "ops": self.ops,
            "constants": self.constants, "ceiling": self.ceiling, "fraction": self.fraction, "above": self.is_above()})
    }

    fn from_json(line: &Line) -> Result<Record> {
        let ceiling = line.text("ceiling")?;
        // Version 0.1.0 did not write it; only rows of f16 are held against matrix units.
        let half = line.value["half"].as_bool().unwrap_or(ceiling == "coop f16");
        Ok(Record {
            family: line.text("family")?,
            shape: line.text("shape")?,
            median_ms: line.number("median_ms")?,
            min_ms: line.number("min_ms")?,
            max_ms: line.number("max_ms")?,
            first_ms: line.number("first_ms")?,
            samples: line.number("samples")? as u64,
            inner: line.number("inner")? as u64,
            clock: line.text("clock")?,
            bytes: line.number("bytes")?,
            flops: line.number("flops")?,
            half,
            ops: line.number("ops")? as u64,
            constants: line.value["constants"].as_str().unwrap_or_default().to_string(),
            ceiling,
            fraction: None,
        })
    }
}

impl Failed {
    fn to_json(&self) -> Value {
        json!({"line": "failed", "family": self.family, "shape": self.shape, "error": self.error})
    }

    fn from_json(line: &Line) -> Result<Failed> {
        Ok(Failed { family: line.text("family")?, shape: line.text("shape")?, error: line.text("error")? })
    }
}

/// A line of a file and where it stands.
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

    /// What a program of ours says that the line is.
    pub(super) fn kind(&self) -> Option<&str> {
        self.value["line"].as_str()
    }

    pub(super) fn number(&self, key: &str) -> Result<f64> {
        self.value[key].as_f64().ok_or_else(|| self.bad(&format!("no number '{key}'")))
    }

    pub(super) fn text(&self, key: &str) -> Result<String> {
        let text = self.value[key].as_str().map(str::to_string);
        text.ok_or_else(|| self.bad(&format!("no text '{key}'")))
    }
}

/// Reads what `tiebeam bench --json` wrote, the `.part` of a killed one included; one file may hold several runs, each from its
/// `host` line on.
///
/// # Errors
/// [`Error::Io`], or [`Error::Config`] with file and line of what is no run.
pub fn read_runs(path: &Path) -> Result<Vec<Run>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let mut runs: Vec<Run> = Vec::new();
    for line in Line::all(path, &text)? {
        if line.kind() == Some("host") {
            let (host, ceilings) = (Host::from_json(&line)?, Ceilings::default());
            runs.push(Run { host, ceilings, records: Vec::new(), failed: Vec::new() });
            continue;
        }
        let Some(run) = runs.last_mut() else { return Err(line.bad("no host before it")) };
        match line.kind() {
            Some("ceilings") => run.ceilings = Ceilings::from_json(&line),
            Some("row") => run.records.push(Record::from_json(&line)?),
            Some("failed") => run.failed.push(Failed::from_json(&line)?),
            _ => return Err(line.bad("neither host, ceilings, row nor failed")),
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
