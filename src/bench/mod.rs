//! The benchmark behind `tiebeam bench`: what an adapter can reach, and how near each kernel comes.
//!
//! A row is checked against an f64 reference on a sample of elements before it is timed; a wrong result has no time. Its
//! time stands beside the least time that the measured ceilings allow, `max(bytes / copy, flops / fma)`: the roofline.

pub mod ceilings;
mod page;
mod report;
mod rows;
mod train;

pub use ceilings::Ceilings;
pub use page::{markdown, page};
pub use report::{Host, Record, Run, read_runs};
pub use rows::{Suite, rows};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::time::{Duration, Instant};

/// An element of a row's result and what it must be.
pub struct Check {
    /// Position in the result.
    pub at: usize,
    /// By the f64 reference.
    pub want: f64,
    /// Allowed distance.
    pub bound: f64,
}

/// One kernel at one size.
pub struct Row {
    /// The op, the same word as its file.
    pub family: &'static str,
    /// Sizes, and what is special.
    pub shape: String,
    /// Bytes that must move, each operand and result once.
    pub bytes: f64,
    /// Floating-point operations that must happen; 0 where moving is all.
    pub flops: f64,
    /// Whether operands are f16, so that matrix units may do it.
    pub half: bool,
    /// The kernel chosen and its constants, where there is a choice.
    pub constants: String,
    /// Ops in a call, for rows about the cost of many.
    pub ops: usize,
    /// Sets of inputs that calls take in turn, so that a cache does not flatter.
    pub sets: usize,
    /// Computes with a set of inputs.
    pub run: Box<dyn Fn(usize) -> Tensor>,
    /// Calls before the one whose result is checked.
    pub before: usize,
    /// Of the result with set 0.
    pub checks: Vec<Check>,
}

impl Row {
    /// A row of f32 operands that moves and computes this much; what else it is follows.
    pub fn new(
        family: &'static str,
        shape: String,
        [bytes, flops]: [f64; 2],
        run: Box<dyn Fn(usize) -> Tensor>,
    ) -> Row {
        let (constants, checks) = (String::new(), Vec::new());
        Row { family, shape, bytes, flops, half: false, constants, ops: 1, sets: 1, run, before: 0, checks }
    }

    /// `matmul 512x512x512`.
    pub fn name(&self) -> String {
        format!("{} {}", self.family, self.shape)
    }

    /// Seconds of the first call, shader compilation and readback included.
    ///
    /// # Errors
    /// When a sampled element is off by more than its bound, or the device has a fault.
    pub fn check(&self, gpu: &Gpu) -> Result<f64> {
        let started = Instant::now();
        let mut got: Vec<f32> = (self.run)(0).to_vec()?;
        let first = started.elapsed().as_secs_f64();
        for _ in 0..self.before {
            got = (self.run)(0).to_vec()?;
        }
        for check in &self.checks {
            let value = got.get(check.at).copied().map_or(f64::NAN, f64::from);
            let off = (value - check.want).abs();
            if off.is_nan() || off > check.bound {
                let (name, adapter) = (self.name(), gpu.adapter());
                return Err(Error::device(format!(
                    "{name}: element {} is {value}, want {} within {:.1e}, on {adapter}; no time for a wrong result",
                    check.at, check.want, check.bound
                )));
            }
        }
        Ok(first)
    }
}

/// Times of one row, in seconds a call.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Of the samples.
    pub median: f64,
    /// Of the samples.
    pub min: f64,
    /// Of the samples.
    pub max: f64,
    /// Samples taken.
    pub samples: usize,
    /// Calls in a sample.
    pub inner: usize,
    /// `timestamps` of the device, or `wall` time around many calls.
    pub clock: &'static str,
}

/// Times `call(i)`, which records work for the `i`-th time.
///
/// # Errors
/// The device's fault.
pub fn measure(gpu: &Gpu, budget: Duration, mut call: impl FnMut(usize)) -> Result<Stats> {
    let mut count = 0;
    let mut sample = |calls: usize, clock: &str| -> Result<f64> {
        gpu.synchronize()?;
        let mut work = || {
            for _ in 0..calls {
                call(count);
                count += 1;
            }
        };
        let started = Instant::now();
        if clock == "timestamps" {
            return Ok(gpu.time(work)? / calls as f64);
        }
        work();
        gpu.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / calls as f64)
    };
    // On a CPU driver host and device share the cores, so only the wall says what a call costs.
    let clock = if gpu.adapter().is_software() || !gpu.has_timestamps() { "wall" } else { "timestamps" };
    sample(1, "wall")?;
    let once = sample(2, "wall")?.min(sample(2, "wall")?);
    let inner = ((0.02 / once) as usize).clamp(1, 1000);
    let started = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || (times.len() < 25 && started.elapsed() < budget) {
        times.push(sample(inner, clock)?);
    }
    times.sort_by(f64::total_cmp);
    let (samples, median) = (times.len(), times[times.len() / 2]);
    Ok(Stats { median, min: times[0], max: times[samples - 1], samples, inner, clock })
}

/// Checks and times a row.
///
/// # Errors
/// [`Row::check`]'s, the device's, or a row above its ceiling: then the ceiling was measured badly.
pub fn time(gpu: &Gpu, row: &Row, ceilings: &Ceilings, budget: Duration) -> Result<Record> {
    let first = row.check(gpu)?;
    let stats = measure(gpu, budget, |i| {
        let y = (row.run)(i % row.sets);
        no_grad(|| y.contiguous().evaluate());
    })?;
    let record = Record::new(row, ceilings, first, stats);
    match record.fraction {
        Some(fraction) if fraction > 1.0 => Err(Error::device(format!(
            "{}: {:.0}% of its ceiling ({}): the ceiling was measured badly, on a busy machine perhaps; run it again",
            row.name(),
            100.0 * fraction,
            record.ceiling
        ))),
        _ => Ok(record),
    }
}
