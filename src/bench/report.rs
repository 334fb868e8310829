//! The results of a run: its host, ceilings and rows, and the lines of the table that people read.

use super::{Ceilings, Row, Stats};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a run took place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// The adapter's name.
    pub adapter: String,
    /// Discrete, integrated, virtual, software or other.
    pub kind: String,
    /// Vulkan, Metal, DX12 or GL.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// This crate's version.
    pub version: String,
    /// Seconds since 1970 when the run began.
    pub unix_time: u64,
    /// The number of the machine's processors.
    pub cores: usize,
    /// The name of the class by which kernels were chosen ([`DeviceClass::name`](crate::gpu::DeviceClass::name)). Empty in files
    /// that were written before this field existed.
    #[serde(default)]
    pub class: String,
    /// Whether `tiebeam tune` had changed kernels or numbers of the class.
    #[serde(default)]
    pub tuned: bool,
}

impl Host {
    /// Describes the host of an open device.
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
            class: gpu.class().name.into(),
            tuned: !gpu.choices().is_empty(),
        }
    }

    /// Returns a text with the class that chose the kernels. Empty if the class is not known.
    pub fn kernels(&self) -> String {
        let tuned = if self.tuned { ", tuned" } else { "" };
        if self.class.is_empty() {
            String::new()
        } else {
            format!(", kernels of the class '{}'{tuned}", self.class)
        }
    }

    /// The date of the run, such as `2026-11-23`.
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The op.
    pub family: String,
    /// Sizes.
    pub shape: String,
    /// Milliseconds per call, the median of the samples.
    pub median_ms: f64,
    /// Milliseconds per call of the fastest sample.
    pub min_ms: f64,
    /// Milliseconds per call of the slowest sample.
    pub max_ms: f64,
    /// Milliseconds of the first call, including shader compilation and readback.
    pub first_ms: f64,
    /// The number of samples.
    pub samples: u64,
    /// Calls per sample.
    pub inner: u64,
    /// `timestamps` or `wall`.
    pub clock: String,
    /// Bytes that must move per call.
    pub bytes: f64,
    /// Floating-point operations per call.
    pub flops: f64,
    /// Whether operands are f16.
    #[serde(default)]
    pub half: bool,
    /// Ops per call. More than 1 in rows that measure the cost of many ops.
    pub ops: u64,
    /// The chosen kernel and its constants, if there is a choice.
    #[serde(default)]
    pub constants: String,
    /// The ceiling with which the row is compared, or `none`.
    pub ceiling: String,
    /// The least time that the ceiling allows, divided by the median.
    #[serde(skip_deserializing)]
    pub fraction: Option<f64>,
}

impl Record {
    pub(super) fn new(row: &Row, ceilings: &Ceilings, first: f64, stats: Stats) -> Record {
        let mut record = Record {
            family: String::new(),
            shape: String::new(),
            median_ms: stats.median * 1e3,
            min_ms: stats.min * 1e3,
            max_ms: stats.max * 1e3,
            first_ms: first * 1e3,
            samples: stats.samples as u64,
            inner: stats.inner as u64,
            clock: stats.clock.into(),
            bytes: row.bytes,
            flops: row.flops,
            half: row.half,
            ops: row.ops as u64,
            constants: row.constants.clone(),
            ceiling: String::new(),
            fraction: None,
        };
        record.hold(ceilings);
        record
    }

    /// Compares the row with these ceilings: sets `ceiling` and `fraction`.
    pub fn hold(&mut self, ceilings: &Ceilings) {
        let least = ceilings.least(self.bytes, self.flops, self.half);
        // Many small ops may be fused into any number of dispatches, so such rows have no ceiling.
        let least = least.filter(|_| self.ops == 1);
        self.fraction = least.map(|(seconds, _)| seconds / (self.median_ms * 1e-3));
        self.ceiling = least.map_or("none", |(_, which)| which.name()).into();
    }

    /// Whether the row is faster than its ceiling allows, because its arrays stayed in a cache or the ceiling is too low.
    pub fn is_above(&self) -> bool {
        self.fraction.is_some_and(|f| f > 1.0)
    }

    /// The share of the ceiling, such as `43% fma f32`, with a mark if it is above the ceiling. Empty without a ceiling.
    pub fn share(&self) -> String {
        let mark = if self.is_above() { " (!)" } else { "" };
        self.fraction.map_or(String::new(), |f| format!("{:.0}% {}{mark}", 100.0 * f, self.ceiling))
    }

    /// `matmul 512x512x512`.
    pub fn name(&self) -> String {
        format!("{} {}", self.family, self.shape)
    }

    /// The rate, in the unit that fits the row: time per op, GB/s, GFLOP/s or TFLOP/s.
    pub fn rate(&self) -> String {
        let seconds = self.median_ms * 1e-3;
        if self.ops > 1 {
            format!("{:.2} us each", seconds / self.ops as f64 * 1e6)
        } else if self.ceiling == "copy" || self.flops == 0.0 {
            format!("{:.2} GB/s", self.bytes / seconds * 1e-9)
        } else {
            match self.flops / seconds {
                rate if rate < 1e13 => format!("{:.2} GFLOP/s", rate * 1e-9),
                rate => format!("{:.2} TFLOP/s", rate * 1e-12),
            }
        }
    }

    /// Returns the row's line of the table under [`Record::HEAD`].
    pub fn line(&self) -> String {
        let share = if self.fraction.is_some() { self.share() } else { "-".into() };
        let spread = format!("{} - {}", digits(self.min_ms), digits(self.max_ms));
        let (name, median, rate) = (self.name(), digits(self.median_ms), self.rate());
        format!("{name:<44} {median:>10} {spread:>21} {rate:>18} {share:>15}")
    }

    /// The head of the table.
    pub const HEAD: &str = "kernel                                        median ms          min - max ms               rate      of ceiling";
}

/// The note after tables that have a marked row.
pub(super) const MARK: &str = "(!): faster than its ceiling, which was measured again and kept; its arrays stayed in a cache, or no copy of ours is as fast";

/// Formats milliseconds with three decimals, or four below 0.1 ms.
pub(super) fn digits(ms: f64) -> String {
    if ms < 0.1 { format!("{ms:.4}") } else { format!("{ms:.3}") }
}

/// A row that failed, and so has no time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    /// The op.
    pub family: String,
    /// Sizes.
    pub shape: String,
    /// The text of the error.
    pub error: String,
}

impl Failed {
    /// `matmul 512x512x512`.
    pub fn name(&self) -> String {
        format!("{} {}", self.family, self.shape)
    }

    /// Returns the row's line of the table under [`Record::HEAD`].
    pub fn line(&self) -> String {
        format!("{:<44}     FAILED: {}", self.name(), self.error)
    }
}

/// A run of the benchmark on one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The machine and its device.
    pub host: Host,
    /// The ceilings of the adapter.
    pub ceilings: Ceilings,
    /// The rows that have a time.
    pub records: Vec<Record>,
    /// The rows that failed.
    pub failed: Vec<Failed>,
}

impl fmt::Display for Run {
    /// The table, with the adapter above it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, {}\n{}", self.host.adapter, self.host.driver, Record::HEAD)?;
        self.records.iter().try_for_each(|record| writeln!(f, "{}", record.line()))?;
        self.failed.iter().try_for_each(|failed| writeln!(f, "{}", failed.line()))?;
        self.remark().map_or(Ok(()), |remark| writeln!(f, "{remark}"))
    }
}

impl Run {
    /// Returns the note on rows above their ceilings, if there are any.
    pub fn remark(&self) -> Option<&'static str> {
        self.records.iter().any(Record::is_above).then_some(MARK)
    }

    /// Checks that all rows have a time.
    ///
    /// # Errors
    /// When rows failed. The message has their number and names.
    pub fn verdict(&self) -> Result<()> {
        if self.failed.is_empty() {
            return Ok(());
        }
        let (failed, all) = (self.failed.len(), self.records.len() + self.failed.len());
        let names: Vec<String> = self.failed.iter().map(Failed::name).collect();
        Err(Error::device(format!("{failed} of {all} rows failed, as told above: {}", names.join("; "))))
    }
}
