//! The benchmark behind `tiebeam bench`: what an adapter can reach, and how near each kernel comes.
//!
//! A row is checked against an f64 reference on a sample of elements before it is timed; a wrong result has no time. Its
//! time stands beside the least time that the measured ceilings allow, `max(bytes / copy, flops / fma)`: the roofline.
//! [`run()`] goes through all rows whatever happens to one of them.

mod baseline;
pub mod ceilings;
mod copy;
mod kernels;
mod lines;
mod ops;
mod page;
mod part;
mod report;
mod run;
mod systems;

pub use baseline::{Baseline, Match, Matches};
pub use ceilings::{Ceiling, Ceilings};
pub use kernels::{Kernels, kernels, plan};
pub use lines::read_runs;
pub use page::{markdown, page};
pub use part::Part;
pub use report::{Failed, Host, Record, Run};
pub use run::{Event, Settings, run, time};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::tensor::Tensor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// An element of a row's result and what it must be.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Position in the result.
    pub at: usize,
    /// By the f64 reference.
    pub want: f64,
    /// Allowed distance.
    pub bound: f64,
}

/// Makes a row on a device. If it is told to check, the row has more elements to be checked.
pub type Make = Box<dyn FnOnce(&Gpu, bool) -> Result<Row>>;

/// A row by its name, before anything is made for it.
pub struct Entry {
    /// The op, by the same word as its file.
    pub family: &'static str,
    /// The sizes, and the variant of the op.
    pub shape: String,
    /// Whether the row takes so long here that it runs only if the command line selects it.
    pub asked: bool,
    /// Makes its inputs and reference on a device.
    pub make: Make,
}

impl Entry {
    /// A row that is always measured.
    pub fn new(
        family: &'static str,
        shape: impl Into<String>,
        make: impl FnOnce(&Gpu) -> Result<Row> + 'static,
    ) -> Entry {
        Entry { family, shape: shape.into(), asked: false, make: Box::new(|gpu, _| make(gpu)) }
    }

    /// `matmul 512x512x512`.
    pub fn name(&self) -> String {
        format!("{} {}", self.family, self.shape)
    }

    /// Whether one of these words is part of the name. Without words, all rows are wanted that need not be asked for.
    pub fn is_wanted(&self, words: &[String]) -> bool {
        let name = self.name();
        words.iter().any(|w| name.contains(w.as_str())) || words.is_empty() && !self.asked
    }
}

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Suite {
    /// Some minutes on two cores.
    Quick,
    /// Every size.
    Full,
}

/// The rows for a driver on the host's cores, or for a GPU. They differ in sizes, and in what is measured only if asked for.
pub fn entries(cpu: bool, suite: Suite) -> Vec<Entry> {
    let mut all = ops::entries(cpu, suite);
    all.extend(systems::entries(cpu));
    all
}

/// One kernel at one size.
pub struct Row {
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
    /// Whether every call with set 0 has the same result, so that it can be checked again after it was timed.
    pub repeats: bool,
}

impl Row {
    /// A row of f32 operands that moves `bytes` and does `flops`; what else it is follows.
    pub fn new([bytes, flops]: [f64; 2], run: impl Fn(usize) -> Tensor + 'static) -> Row {
        let (constants, checks, run) = (String::new(), Vec::new(), Box::new(run));
        Row { bytes, flops, half: false, constants, ops: 1, sets: 1, run, before: 0, checks, repeats: false }
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
        self.compare(gpu, &got)?;
        Ok(first)
    }

    /// Checks the result once more, if it is still the same.
    fn check_again(&self, gpu: &Gpu) -> Result<()> {
        if self.repeats { self.compare(gpu, &(self.run)(0).to_vec()?) } else { Ok(()) }
    }

    fn compare(&self, gpu: &Gpu, got: &[f32]) -> Result<()> {
        for check in &self.checks {
            let value = got.get(check.at).copied().map_or(f64::NAN, f64::from);
            let off = (value - check.want).abs();
            if off.is_nan() || off > check.bound {
                let adapter = gpu.adapter();
                return Err(Error::device(format!(
                    "element {} is {value}, want {} within {:.1e}, on {adapter}; no time for a wrong result",
                    check.at, check.want, check.bound
                )));
            }
        }
        Ok(())
    }
}

/// `work`, its panics as errors.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| s.to_string());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::device(format!("panicked: {}", text.unwrap_or_else(|| "without a text".into()))))
    })
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

/// Work before the first sample on a GPU, whose clock rises from idle under load.
const WARM: Duration = Duration::from_millis(100);

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
    let clock = if gpu.has_own_clock() { "timestamps" } else { "wall" };
    let mut once = sample(1, "wall")?;
    // A call of seconds is steady enough by itself.
    let least = if once > 2.0 { 3 } else { 5 };
    if once <= 2.0 {
        once = sample(2, "wall")?.min(sample(2, "wall")?);
    }
    let started = Instant::now();
    while !gpu.adapter().is_software() && started.elapsed() < WARM {
        once = once.min(sample(2, "wall")?);
    }
    let inner = ((0.02 / once) as usize).clamp(1, 1000);
    let started = Instant::now();
    let mut times = Vec::new();
    while times.len() < least || (times.len() < 25 && started.elapsed() < budget) {
        times.push(sample(inner, clock)?);
    }
    times.sort_by(f64::total_cmp);
    let (samples, median) = (times.len(), times[times.len() / 2]);
    Ok(Stats { median, min: times[0], max: times[samples - 1], samples, inner, clock })
}
