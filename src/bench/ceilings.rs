//! The rates that an adapter reaches in kernels that do only one thing: copy, multiply and add, or dispatch.

use super::{copy, measure};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::gpu::{Gpu, lock};
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Measured rates and costs of an adapter. `None` means that the adapter lacks the feature or that the measurement failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bytes read and written per second by the fastest copy of large arrays: one of several kernels or the driver's own copy.
    #[serde(rename = "copy_bytes_s")]
    pub copy: Option<f64>,
    /// Bytes read and written per second by the engine's elementwise kernel.
    #[serde(rename = "kernel_copy_bytes_s")]
    pub kernel_copy: Option<f64>,
    /// f32 operations per second on registers. A fused multiply-add counts as two.
    #[serde(rename = "fma32_flops")]
    pub fma32: Option<f64>,
    /// f16 operations per second on registers, if the adapter has f16.
    #[serde(rename = "fma16_flops")]
    pub fma16: Option<f64>,
    /// Operations per second of cooperative matrices with f16 operands and f32 sums, if the adapter has them.
    #[serde(rename = "coop_flops")]
    pub coop: Option<f64>,
    /// Seconds per dispatch, if many share one pass.
    #[serde(rename = "dispatch_s")]
    pub dispatch: Option<f64>,
    /// Seconds per dispatch, if each has its own pass.
    #[serde(rename = "pass_s")]
    pub pass: Option<f64>,
    /// Seconds per dispatch, if each has its own submit.
    #[serde(rename = "submit_s")]
    pub submit: Option<f64>,
    /// Seconds to read four bytes back to the host.
    #[serde(rename = "readback_s")]
    pub readback: Option<f64>,
}

/// One of the measurements behind [`Ceilings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ceiling {
    /// Copies of large arrays.
    Copy,
    /// Multiply-adds in f32.
    Fma32,
    /// Multiply-adds in f16.
    Fma16,
    /// Cooperative matrices.
    Coop,
    /// Dispatches in one pass, with a pass each, and with a submit each.
    Dispatch,
    /// A readback of four bytes.
    Readback,
}

impl Ceiling {
    /// All ceilings, in the order in which they are measured.
    pub const ALL: [Ceiling; 6] =
        [Ceiling::Copy, Ceiling::Fma32, Ceiling::Fma16, Ceiling::Coop, Ceiling::Dispatch, Ceiling::Readback];

    /// Its name in tables and files.
    pub fn name(self) -> &'static str {
        match self {
            Ceiling::Copy => "copy",
            Ceiling::Fma32 => "fma f32",
            Ceiling::Fma16 => "fma f16",
            Ceiling::Coop => "coop f16",
            Ceiling::Dispatch => "dispatch",
            Ceiling::Readback => "readback",
        }
    }
}

/// Numbers of independent chains of multiply-adds per thread. Adapters differ in how many chains they need for their full rate.
const CHAINS: [u32; 4] = [1, 2, 4, 8];
const ROUNDS: u32 = 256;
/// The time for measuring one kernel.
const BUDGET: Duration = Duration::from_millis(400);

fn fma(element: &str, chains: u32) -> Source {
    let source = Source::file("bench_fma").u32("CHAINS", chains);
    if element == "f16" { source.alias("Elem", "f16").enable("f16") } else { source }
}

fn coop(size: u32, lanes: u32, chains: u32) -> Source {
    Source::file("bench_coop")
        .u32("SIZE", size)
        .u32("LANES", lanes)
        .u32("CHAINS", chains)
        .matrices(size as usize)
}

/// Returns the greater of two rates.
fn best(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.into_iter().chain(b).reduce(f64::max)
}

impl Ceilings {
    /// Measures all ceilings, in a few seconds. `done` is called after each, with the error if it could not be measured. Such a
    /// ceiling stays `None`.
    pub fn measure(gpu: &Gpu, mut done: impl FnMut(Ceiling, Option<Error>)) -> Ceilings {
        let mut all = Ceilings::default();
        for ceiling in Ceiling::ALL {
            let error = super::caught(|| all.update(gpu, ceiling)).err();
            if error.is_some() {
                gpu.take_fault();
            }
            done(ceiling, error);
            gpu.trim();
        }
        all
    }

    /// Measures one ceiling again. A rate is replaced only by a higher one, because a ceiling is the highest rate ever seen.
    ///
    /// # Errors
    /// The device's fault, or if it has not enough memory.
    pub fn update(&mut self, gpu: &Gpu, ceiling: Ceiling) -> Result<()> {
        let chains = |element: &str| -> Result<Option<f64>> {
            let rates: Result<Vec<f64>> = CHAINS.iter().map(|&c| fma_rate(gpu, element, c)).collect();
            Ok(rates?.into_iter().reduce(f64::max))
        };
        match ceiling {
            Ceiling::Copy => {
                let (all, kernel) = copy::rates(gpu)?;
                self.copy = best(self.copy, Some(all));
                self.kernel_copy = best(self.kernel_copy, Some(kernel));
            }
            Ceiling::Fma32 => self.fma32 = best(self.fma32, chains("f32")?),
            Ceiling::Fma16 if gpu.has_f16() => self.fma16 = best(self.fma16, chains("f16")?),
            Ceiling::Fma16 => {}
            Ceiling::Coop => self.coop = best(self.coop, coop_rate(gpu)?),
            Ceiling::Dispatch => [self.dispatch, self.pass, self.submit] = dispatches(gpu)?.map(Some),
            Ceiling::Readback => self.readback = Some(readback(gpu)?),
        }
        Ok(())
    }

    /// Returns the least time in seconds that these ceilings allow for moving `bytes` and doing `flops`, and the ceiling that sets
    /// it. Returns `None` if there is no work or no ceiling for it. `half` means that operands are f16, so that matrix units may
    /// compute the products.
    pub fn least(&self, bytes: f64, flops: f64, half: bool) -> Option<(f64, Ceiling)> {
        let computing = match (self.fma32, self.coop) {
            (fma, Some(coop)) if half && fma.is_none_or(|fma| coop > fma) => Some((coop, Ceiling::Coop)),
            (fma, _) => fma.map(|rate| (rate, Ceiling::Fma32)),
        };
        let moving = self.copy.map(|rate| (bytes / rate, Ceiling::Copy)).filter(|_| bytes > 0.0);
        let computing = computing.map(|(rate, which)| (flops / rate, which)).filter(|_| flops > 0.0);
        moving.into_iter().chain(computing).max_by(|a, b| a.0.total_cmp(&b.0))
    }
}

/// Measures operations per second of many threads, each with `chains` independent chains of vec4 multiply-adds.
fn fma_rate(gpu: &Gpu, element: &str, chains: u32) -> Result<f64> {
    let source = fma(element, chains);
    let groups = if gpu.adapter().is_software() { 256 } else { 16384 };
    let y = Tensor::empty(gpu, "fma", [groups * 64], DType::F32);
    let stats = measure(gpu, BUDGET, |_| {
        let launch = Launch::new("fma", &source, "main", grid(groups)).bind_mut("y", &y);
        gpu.launch(launch.set("m", 0.999f32).set("b", 0.001f32).turns(ROUNDS as usize).reuse(0));
    })?;
    // Skipped dispatches would have taken no time.
    y.check()?;
    let flops = 2.0 * 4.0 * (chains * ROUNDS * 4) as f64 * (groups * 64) as f64;
    Ok(flops / stats.min)
}

/// Returns the kernels that measure [`Ceilings`] of matrix units, for the test of the list of variants, which is recorded on
/// adapters without them.
pub fn for_matrix_units() -> Vec<Source> {
    [16, 8].into_iter().flat_map(|size| [1, 4, 8].map(|chains| coop(size, 32, chains))).collect()
}

/// Measures operations per second of independent chains of cooperative multiply-adds, with one subgroup per workgroup.
fn coop_rate(gpu: &Gpu) -> Result<Option<f64>> {
    let Some(matrices) = gpu.coop_matrices() else { return Ok(None) };
    let (size, groups) = (matrices.size, if gpu.adapter().is_software() { 64 } else { 8192 });
    let mut best = 0.0f64;
    for chains in [1, 4, 8] {
        let source = coop(size, gpu.class().lanes, chains);
        let y = Tensor::empty(gpu, "coop", [groups * (chains * size * size) as usize], DType::F32);
        let stats = measure(gpu, BUDGET, |_| {
            let launch = Launch::new("coop", &source, "main", grid(groups)).bind_mut("y", &y);
            gpu.launch(launch.set("a", 0.5f32).set("b", 0.25f32).turns(ROUNDS as usize + 16).reuse(0));
        })?;
        y.check()?;
        let flops = 2.0 * (size as f64).powi(3) * (chains * ROUNDS * 4) as f64 * groups as f64;
        best = best.max(flops / stats.min);
    }
    Ok(Some(best))
}

/// Measures seconds per dispatch: many in one pass, a pass each, a submit each.
fn dispatches(gpu: &Gpu) -> Result<[f64; 3]> {
    let y = Tensor::empty(gpu, "dispatch", [64], DType::F32);
    let source = fma("f32", 1);
    let mut times = [f64::MAX; 3];
    for (between, time) in times.iter_mut().enumerate() {
        for _ in 0..4 {
            gpu.synchronize()?;
            let started = Instant::now();
            let count = if between == 2 { 200 } else { 1000 };
            for _ in 0..count {
                let launch = Launch::new("dispatch", &source, "nothing", [1, 1, 1]).bind_mut("y", &y);
                gpu.launch(launch.set("m", 0.0f32).set("b", 0.0f32).turns(0).reuse(0));
                match between {
                    1 => drop(lock(&gpu.0.recorder).encoder(gpu)?),
                    2 => gpu.flush()?,
                    _ => {}
                }
            }
            gpu.synchronize()?;
            *time = time.min(started.elapsed().as_secs_f64() / count as f64);
        }
    }
    Ok(times)
}

fn readback(gpu: &Gpu) -> Result<f64> {
    let x = Tensor::ones(gpu, [1]);
    let mut times = Vec::new();
    for _ in 0..20 {
        x.evaluate();
        gpu.synchronize()?;
        let started = Instant::now();
        x.item()?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
