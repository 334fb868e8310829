//! What a run leaves: JSON lines, one object each, and a table for people.

use super::{Ceilings, Row, Stats};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use serde_json::{Value, json};
use std::path::Path;

/// Where a run took place.
#[derive(Clone, Debug, PartialEq)]
pub struct Host {
    /// The adapter's name.
    pub adapter: String,
    /// Discrete, integrated, virtual, software or other.
    pub kind: String,
    /// Vulkan, Metal, DX12 or GL.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// This crate's.
    pub version: String,
    /// Seconds since 1970 when the run began.
    pub unix_time: u64,
    /// The machine's processors.
    pub cores: usize,
}

impl Host {
    /// Of an open device.
    pub fn new(gpu: &Gpu) -> Host {
        let adapter = gpu.adapter();
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Host {
            adapter: adapter.name.clone(),
            kind: adapter.kind.into(),
            backend: adapter.backend.clone(),
            driver: adapter.driver.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            unix_time: since.map_or(0, |d| d.as_secs()),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        }
    }

    /// The day of the run, `2026-11-23`.
    pub fn date(&self) -> String {
        // Days to a civil date: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms".
        let z = (self.unix_time / 86400) as i64 + 719_468;
        let era = z.div_euclid(146_097);
        let doe = z.rem_euclid(146_097);
        let yoe = (doe - doe / 1460 + doe / 36524 - doe / 146_096) / 365;
        let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
        let mp = (5 * doy + 2) / 153;
        let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
        let year = yoe + era * 400 + (month <= 2) as i64;
        format!("{year:04}-{month:02}-{day:02}")
    }
}

/// One row's result.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The op.
    pub family: String,
    /// Sizes.
    pub shape: String,
    /// Milliseconds a call.
    pub median_ms: f64,
    /// Milliseconds a call.
    pub min_ms: f64,
    /// Milliseconds a call.
    pub max_ms: f64,
    /// The first call, shader compilation and readback included.
    pub first_ms: f64,
    /// Samples.
    pub samples: u64,
    /// Calls in a sample.
    pub inner: u64,
    /// `timestamps` or `wall`.
    pub clock: String,
    /// Bytes and operations a call, and ops for rows that are about their number.
    pub bytes: f64,
    /// See `bytes`.
    pub flops: f64,
    /// See `bytes`.
    pub ops: u64,
    /// The kernel chosen and its constants, where there is a choice.
    pub constants: String,
    /// Which ceiling the row is held against.
    pub ceiling: String,
    /// The least time that the ceiling allows over the median.
    pub fraction: Option<f64>,
}

impl Record {
    pub(super) fn new(row: &Row, ceilings: &Ceilings, first: f64, stats: Stats) -> Record {
        let (least, ceiling) = ceilings.least(row.bytes, row.flops, row.half);
        // Many small ops may be fused into any number of dispatches: no ceiling then.
        let (fraction, ceiling) =
            if row.ops == 1 { (Some(least / stats.median), ceiling) } else { (None, "none") };
        Record {
            family: row.family.into(),
            shape: row.shape.clone(),
            median_ms: stats.median * 1e3,
            min_ms: stats.min * 1e3,
            max_ms: stats.max * 1e3,
            first_ms: first * 1e3,
            samples: stats.samples as u64,
            inner: stats.inner as u64,
            clock: stats.clock.into(),
            bytes: row.bytes,
            flops: row.flops,
            ops: row.ops as u64,
            constants: row.constants.clone(),
            ceiling: ceiling.into(),
            fraction,
        }
    }

    /// `matmul 512x512x512`.
    pub fn name(&self) -> String {
        format!("{} {}", self.family, self.shape)
    }

    /// The rate in the row's own unit.
    pub fn rate(&self) -> String {
        let seconds = self.median_ms * 1e-3;
        if self.ops > 1 {
            format!("{:.2} us each", seconds / self.ops as f64 * 1e6)
        } else if self.ceiling == "copy" {
            format!("{:.2} GB/s", self.bytes / seconds * 1e-9)
        } else {
            format!("{:.2} GFLOP/s", self.flops / seconds * 1e-9)
        }
    }

    /// A line of the table under [`Record::HEAD`].
    pub fn line(&self) -> String {
        let fraction = self.fraction.map_or("-".into(), |f| format!("{:.0}% {}", 100.0 * f, self.ceiling));
        let spread = format!("{:.3} - {:.3}", self.min_ms, self.max_ms);
        let (name, rate) = (self.name(), self.rate());
        format!("{name:<40} {:>10.3} {spread:>21} {rate:>16} {fraction:>13}", self.median_ms)
    }

    /// The table's head.
    pub const HEAD: &str = "kernel                                    median ms          min - max ms             rate    of ceiling";
}

/// A run: where, what it could reach, what it reached.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// Where.
    pub host: Host,
    /// What the adapter reaches.
    pub ceilings: Ceilings,
    /// What the kernels reached.
    pub records: Vec<Record>,
}

impl Run {
    /// JSON lines: the host, the ceilings, a line for each row.
    pub fn to_json(&self) -> String {
        let (h, c) = (&self.host, &self.ceilings);
        let mut lines = vec![
            json!({"line": "host", "adapter": h.adapter, "kind": h.kind, "backend": h.backend, "driver": h.driver,
                "version": h.version, "unix_time": h.unix_time, "date": h.date(), "cores": h.cores}),
            json!({"line": "ceilings", "copy_bytes_s": c.copy, "kernel_copy_bytes_s": c.kernel_copy,
                "fma32_flops": c.fma32, "fma16_flops": c.fma16, "coop_flops": c.coop, "dispatch_s": c.dispatch, "pass_s": c.pass,
                "submit_s": c.submit, "readback_s": c.readback}),
        ];
        lines.extend(self.records.iter().map(|r| {
            json!({"line": "row", "family": r.family, "shape": r.shape, "median_ms": r.median_ms, "min_ms": r.min_ms,
                "max_ms": r.max_ms, "first_ms": r.first_ms, "samples": r.samples, "inner": r.inner, "clock": r.clock,
                "bytes": r.bytes, "flops": r.flops, "ops": r.ops, "constants": r.constants, "ceiling": r.ceiling, "fraction": r.fraction})
        }));
        lines.into_iter().map(|line| line.to_string() + "\n").collect()
    }

    fn from_json(path: &Path, text: &str) -> Result<Run> {
        let bad = |at: usize, what: &str| {
            let path = path.display();
            Error::config(format!("{path}:{at}: {what}; give a file that 'tiebeam bench --json' wrote"))
        };
        let (mut host, mut ceilings, mut records) = (None, None, Vec::new());
        for (at, line) in (1..).zip(text.lines()).filter(|(_, l)| !l.trim().is_empty()) {
            let v: Value = serde_json::from_str(line).map_err(|e| bad(at, &format!("not JSON ({e})")))?;
            let number = |k: &str| v[k].as_f64().ok_or_else(|| bad(at, &format!("no number '{k}'")));
            let text =
                |k: &str| v[k].as_str().map(str::to_string).ok_or_else(|| bad(at, &format!("no text '{k}'")));
            match v["line"].as_str() {
                Some("host") => {
                    host = Some(Host {
                        adapter: text("adapter")?,
                        kind: text("kind")?,
                        backend: text("backend")?,
                        driver: text("driver")?,
                        version: text("version")?,
                        unix_time: number("unix_time")? as u64,
                        cores: number("cores")? as usize,
                    });
                }
                Some("ceilings") => {
                    ceilings = Some(Ceilings {
                        copy: number("copy_bytes_s")?,
                        kernel_copy: number("kernel_copy_bytes_s")?,
                        fma32: number("fma32_flops")?,
                        fma16: v["fma16_flops"].as_f64(),
                        coop: v["coop_flops"].as_f64(),
                        dispatch: number("dispatch_s")?,
                        pass: number("pass_s")?,
                        submit: number("submit_s")?,
                        readback: number("readback_s")?,
                    });
                }
                Some("row") => records.push(Record {
                    family: text("family")?,
                    shape: text("shape")?,
                    median_ms: number("median_ms")?,
                    min_ms: number("min_ms")?,
                    max_ms: number("max_ms")?,
                    first_ms: number("first_ms")?,
                    samples: number("samples")? as u64,
                    inner: number("inner")? as u64,
                    clock: text("clock")?,
                    bytes: number("bytes")?,
                    flops: number("flops")?,
                    ops: number("ops")? as u64,
                    constants: v["constants"].as_str().unwrap_or_default().to_string(),
                    ceiling: text("ceiling")?,
                    fraction: v["fraction"].as_f64(),
                }),
                _ => return Err(bad(at, "neither host, ceilings nor row")),
            }
        }
        match (host, ceilings) {
            (Some(host), Some(ceilings)) => Ok(Run { host, ceilings, records }),
            _ => Err(bad(1, "no host or no ceilings")),
        }
    }
}

/// Reads files that [`Run::to_json`] wrote; one file may hold several runs, each from its `host` line on.
///
/// # Errors
/// [`Error::Io`], or [`Error::Config`] with file and line of what is no run.
pub fn read_runs(path: &Path) -> Result<Vec<Run>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let mut starts: Vec<usize> = text.match_indices("\"line\":\"host\"").map(|(at, _)| at).collect();
    starts.iter_mut().for_each(|at| *at = text[..*at].rfind('\n').map_or(0, |n| n + 1));
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    if starts.is_empty() {
        return Run::from_json(path, &text).map(|run| vec![run]);
    }
    starts.iter().zip(ends).map(|(&start, end)| Run::from_json(path, &text[start..end])).collect()
}
