//! What this adapter reaches when nothing but one thing is asked of it.

use super::measure;
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::kernel::{Launch, Work, grid};
use crate::gpu::shader::Source;
use crate::gpu::{Gpu, lock};
use crate::tensor::Tensor;
use std::time::{Duration, Instant};

/// Measured rates and costs of an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// Bytes read and written in a second by the best copy of large arrays: a kernel's or the driver's own.
    pub copy: f64,
    /// The same by the engine's elementwise kernel alone.
    pub kernel_copy: f64,
    /// f32 operations in a second, a fused multiply-add being two, on registers alone.
    pub fma32: f64,
    /// The same in f16, where the adapter has it.
    pub fma16: Option<f64>,
    /// Operations in a second of cooperative matrices, f16 in and f32 out, where the adapter has them.
    pub coop: Option<f64>,
    /// Seconds of a dispatch among many in one pass.
    pub dispatch: f64,
    /// Seconds of a dispatch in a pass of its own.
    pub pass: f64,
    /// Seconds of a dispatch in a submit of its own.
    pub submit: f64,
    /// Seconds until four bytes are on the host.
    pub readback: f64,
}

/// Chains of dependent multiply-adds a thread: how many fill an adapter differs.
const CHAINS: [u32; 4] = [1, 2, 4, 8];
const ROUNDS: u32 = 256;

fn fma(element: &str, chains: u32) -> Source {
    let source = Source::file("bench_fma").u32("CHAINS", chains);
    if element == "f16" { source.alias("Elem", "f16").enable("f16") } else { source }
}

/// Every kernel that only the benchmark uses.
pub fn shader_variants() -> Vec<Source> {
    let mut all: Vec<Source> = CHAINS.iter().flat_map(|&c| ["f32", "f16"].map(|e| fma(e, c))).collect();
    all.extend([8, 16].map(|size| coop(size, 32, 4)));
    all
}

fn coop(size: u32, lanes: u32, chains: u32) -> Source {
    let matrix = |of: &str| format!("coop_mat{size}x{size}<{of}>");
    Source::file("bench_coop")
        .u32("SIZE", size)
        .u32("LANES", lanes)
        .u32("CHAINS", chains)
        .alias("MatrixA", matrix("f16, A"))
        .alias("MatrixB", matrix("f16, B"))
        .alias("MatrixC", matrix("f32, C"))
        .enable("f16")
        .enable("wgpu_cooperative_matrix")
}

impl Ceilings {
    /// Measures; a few seconds.
    ///
    /// # Errors
    /// The device's fault.
    pub fn measure(gpu: &Gpu, mut done: impl FnMut(&str)) -> Result<Ceilings> {
        let budget = Duration::from_millis(400);
        let (kernel_copy, driver_copy) = copies(gpu, budget)?;
        done("copy");
        let best = |element: &str| -> Result<f64> {
            let rates: Result<Vec<f64>> = CHAINS.iter().map(|&c| fma_rate(gpu, element, c, budget)).collect();
            Ok(rates?.into_iter().fold(0.0, f64::max))
        };
        let fma32 = best("f32")?;
        done("fma f32");
        let fma16 = if gpu.has_f16() { Some(best("f16")?) } else { None };
        done("fma f16");
        let coop = coop_rate(gpu, budget)?;
        done("cooperative matrices");
        let [dispatch, pass, submit] = dispatches(gpu)?;
        done("dispatch");
        let readback = readback(gpu)?;
        done("readback");
        let copy = driver_copy.max(kernel_copy);
        Ok(Ceilings { copy, kernel_copy, fma32, fma16, coop, dispatch, pass, submit, readback })
    }

    /// The least seconds for moving `bytes` and doing `flops`, and which of the two it is. `half` says that operands are
    /// f16: then matrix units may do it.
    pub fn least(&self, bytes: f64, flops: f64, half: bool) -> (f64, &'static str) {
        let (rate, name) = match self.coop {
            Some(coop) if half && coop > self.fma32 => (coop, "coop f16"),
            _ => (self.fma32, "fma f32"),
        };
        let (moving, computing) = (bytes / self.copy, flops / rate);
        if moving >= computing { (moving, "copy") } else { (computing, name) }
    }
}

/// Bytes a second of a kernel's copy and of the driver's, arrays far larger than any cache where memory allows.
fn copies(gpu: &Gpu, budget: Duration) -> Result<(f64, f64)> {
    let most = gpu.adapter().max_binding.min(if gpu.adapter().is_software() { 64 << 20 } else { 512 << 20 });
    let (mut kernel, mut driver) = (0.0f64, 0.0f64);
    for bytes in [most / 4, most] {
        let bytes = bytes / 4096 * 4096;
        let x = Tensor::ones(gpu, [bytes as usize / 4]);
        x.evaluate();
        let rate = |seconds: f64| 2.0 * bytes as f64 / seconds;
        kernel = kernel.max(rate(measure(gpu, budget, |_| x.affine(1.0, 0.0).evaluate())?.min));
        let to = Tensor::empty(gpu, "copy", [bytes as usize / 4], DType::F32);
        let (from, to) = (x.place(), to.place());
        driver = driver.max(rate(
            measure(gpu, budget, |_| {
                if let (Ok(a), Ok(b)) = (from.buffer.data(), to.buffer.data()) {
                    let mut recorder = lock(&gpu.0.recorder);
                    recorder.encoder(gpu).copy_buffer_to_buffer(a, from.offset, b, to.offset, bytes);
                }
            })?
            .min,
        ));
    }
    Ok((kernel, driver))
}

/// Operations a second of `CHAINS` independent chains of vec4 multiply-adds in each of many threads.
fn fma_rate(gpu: &Gpu, element: &str, chains: u32, budget: Duration) -> Result<f64> {
    let source = fma(element, chains);
    let groups = if gpu.adapter().is_software() { 256 } else { 16384 };
    let y = Tensor::empty(gpu, "fma", [groups * 64], DType::F32);
    let params: [f32; 2] = [0.999, 0.001];
    let stats = measure(gpu, budget, |_| {
        gpu.launch(Launch {
            op: "fma",
            source: &source,
            entry: "main",
            binds: vec![y.bind_mut(0)],
            params: bytemuck::cast_slice(&params),
            grid: grid(groups),
            turns: ROUNDS as usize,
            reuse: 0,
            work: Work::MOVES,
        });
    })?;
    let flops = 2.0 * 4.0 * (chains * ROUNDS * 4) as f64 * (groups * 64) as f64;
    Ok(flops / stats.min)
}

/// Operations a second of independent chains of cooperative multiply-adds, a subgroup to a workgroup.
fn coop_rate(gpu: &Gpu, budget: Duration) -> Result<Option<f64>> {
    let Some(matrices) = gpu.coop_matrices() else { return Ok(None) };
    let (size, groups) = (matrices.size, if gpu.adapter().is_software() { 64 } else { 8192 });
    let mut best = 0.0f64;
    for chains in [1, 4, 8] {
        let source = coop(size, gpu.lanes(), chains);
        let y = Tensor::empty(gpu, "coop", [groups * (chains * size * size) as usize], DType::F32);
        let params: [f32; 2] = [0.5, 0.25];
        let stats = measure(gpu, budget, |_| {
            let (params, grid, turns) = (bytemuck::cast_slice(&params), grid(groups), ROUNDS as usize + 16);
            let binds = vec![y.bind_mut(0)];
            gpu.launch(Launch {
                op: "coop",
                source: &source,
                entry: "main",
                binds,
                params,
                grid,
                turns,
                reuse: 0,
                work: Work::MOVES,
            });
        })?;
        let flops = 2.0 * (size as f64).powi(3) * (chains * ROUNDS * 4) as f64 * groups as f64;
        best = best.max(flops / stats.min);
    }
    Ok(Some(best))
}

/// Seconds a dispatch: many in a pass, a pass each, a submit each.
fn dispatches(gpu: &Gpu) -> Result<[f64; 3]> {
    let y = Tensor::empty(gpu, "dispatch", [64], DType::F32);
    let source = fma("f32", 1);
    let params: [f32; 2] = [0.0, 0.0];
    let mut times = [f64::MAX; 3];
    for (between, time) in times.iter_mut().enumerate() {
        for _ in 0..4 {
            gpu.synchronize()?;
            let started = Instant::now();
            let count = if between == 2 { 200 } else { 1000 };
            for _ in 0..count {
                let (op, entry, binds) = ("dispatch", "nothing", vec![y.bind_mut(0)]);
                let params = bytemuck::cast_slice(&params);
                gpu.launch(Launch {
                    op,
                    source: &source,
                    entry,
                    binds,
                    params,
                    grid: [1, 1, 1],
                    turns: 0,
                    reuse: 0,
                    work: Work::MOVES,
                });
                match between {
                    1 => drop(lock(&gpu.0.recorder).encoder(gpu)),
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
