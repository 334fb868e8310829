//! The benchmark behind `tiebeam bench`: the rates that an adapter can reach, and the share of them that each kernel reaches.
//!
//! Before a row is timed, a sample of its result's elements is checked against an f64 reference. A row with a wrong result gets no
//! time. A row's time is compared with the roofline: the least time that the measured ceilings allow,
//! `max(bytes / copy, flops / fma)`. [`run()`] goes through all rows, even if some of them fail.

mod baseline;
pub mod ceilings;
mod copy;
mod kernels;
mod lines;
mod ops;
pub mod outside;
mod page;
mod part;
mod report;
mod run;
mod systems;

pub use baseline::{Baseline, Match, Matches};
pub use ceilings::{Ceiling, Ceilings};
pub use kernels::{Kernels, counted, kernels, plan};
pub use lines::{parse_runs, read_runs};
pub use page::{markdown, page};
pub use part::Part;
pub use report::{Failed, Host, Record, Run};
pub use run::{Event, Settings, run, time};

use crate::dtype::DType;
use crate::error::{Error, Result, panic_text};
use crate::gpu::Gpu;
use crate::tensor::Tensor;
use std::cmp::Ordering::{Equal, Less};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// An element of a row's result, and its correct value.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Position in the result.
    pub at: usize,
    /// The value of the f64 reference.
    pub want: f64,
    /// The largest error that is allowed.
    pub bound: f64,
}

/// Makes a row on a device. If the flag is set, more elements of the result are checked.
pub type Make = Box<dyn FnOnce(&Gpu, bool) -> Result<Row>>;

/// A row's name and the function that makes it. Nothing is computed before that is called.
pub struct Entry {
    /// The op, or the name of what is measured.
    pub family: &'static str,
    /// The sizes, and the variant of the op.
    pub shape: String,
    /// Whether the row takes so long on this kind of device that it runs only if the command line selects it.
    pub asked: bool,
    /// Makes the row's inputs and reference on a device.
    pub make: Make,
}

impl Entry {
    /// Makes an entry for a row that is always measured.
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

    /// Whether one of these words is part of the name. Without words, all rows that are not `asked` are wanted.
    pub fn is_wanted(&self, words: &[String]) -> bool {
        let name = self.name();
        words.iter().any(|w| name.contains(w.as_str())) || words.is_empty() && !self.asked
    }
}

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Suite {
    /// A selection of sizes, which takes some minutes on two cores.
    Quick,
    /// Every size.
    Full,
}

/// Returns the rows for a CPU driver or for a GPU. The two differ in sizes, and in which rows run only if selected.
pub fn entries(cpu: bool, suite: Suite) -> Vec<Entry> {
    let mut all = ops::entries(cpu, suite);
    all.extend(systems::entries(cpu));
    all
}

/// Returns a call's result, or a tensor that carries the call's error, so that the call has no time.
fn carried(gpu: &Gpu, result: Result<Tensor>) -> Tensor {
    result.unwrap_or_else(|error| {
        let y = Tensor::empty(gpu, "bench", [1], DType::F32);
        y.place().buffer.fail(&error);
        y
    })
}

/// One kernel at one size.
pub struct Row {
    /// Bytes that must move, if each operand and result moves once.
    pub bytes: f64,
    /// Floating-point operations that must happen. 0 if the row only moves data.
    pub flops: f64,
    /// Whether operands are f16, so that matrix units may compute the products.
    pub half: bool,
    /// The chosen kernel and its constants, if there is a choice.
    pub constants: String,
    /// Ops per call, for rows that measure the cost of many ops.
    pub ops: usize,
    /// The number of sets of inputs. Successive calls use different sets, so that inputs do not come from a cache.
    pub sets: usize,
    /// Computes the result for one set of inputs.
    pub run: Box<dyn Fn(usize) -> Tensor>,
    /// The number of calls before the one whose result is checked.
    pub before: usize,
    /// Checks of the result for set 0.
    pub checks: Vec<Check>,
    /// Whether every call with set 0 has the same result, so that it can be checked again after timing.
    pub repeats: bool,
}

impl Row {
    /// Makes a row of f32 operands that moves `bytes` and does `flops`. The other fields have defaults, which callers change.
    pub fn new([bytes, flops]: [f64; 2], run: impl Fn(usize) -> Tensor + 'static) -> Row {
        let (constants, checks, run) = (String::new(), Vec::new(), Box::new(run));
        Row { bytes, flops, half: false, constants, ops: 1, sets: 1, run, before: 0, checks, repeats: false }
    }

    /// Checks the result and returns the seconds of the first call, including shader compilation and readback.
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

    /// Checks the result once more, if every call has the same result.
    fn check_again(&self, gpu: &Gpu) -> Result<()> {
        if self.repeats { self.compare(gpu, &(self.run)(0).to_vec()?) } else { Ok(()) }
    }

    fn compare(&self, gpu: &Gpu, got: &[f32]) -> Result<()> {
        for check in &self.checks {
            let value = got.get(check.at).copied().map_or(f64::NAN, f64::from);
            let off = (value - check.want).abs();
            // A NaN on either side is a wrong result too.
            if !matches!(off.partial_cmp(&check.bound), Some(Less | Equal)) {
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

/// Runs `work` and turns panics into errors.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::device(format!("panicked: {}", panic_text(&*panic)))))
}

/// Times of one row, in seconds per call.
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// The median of the samples.
    pub median: f64,
    /// The fastest sample.
    pub min: f64,
    /// The slowest sample.
    pub max: f64,
    /// The number of samples.
    pub samples: usize,
    /// Calls per sample.
    pub inner: usize,
    /// `timestamps` of the device, or `wall` for the host's clock.
    pub clock: &'static str,
}

/// How long a GPU works before the first sample, because its clock rises from idle under load.
const WARM: Duration = Duration::from_millis(100);

/// Times `call(i)`, which records the work of the `i`-th call.
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
    // Calls that take seconds vary little, so fewer samples suffice.
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
