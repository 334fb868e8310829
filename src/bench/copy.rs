//! Measures the copy ceiling: the fastest of several kernels and of the driver's own copy.

use super::measure;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::gpu::{Gpu, lock};
use crate::tensor::Tensor;
use std::time::Duration;

/// Numbers of vec4 that each thread copies. Adapters differ in how many loads in flight they need for their full rate.
const SPANS: [u32; 4] = [1, 2, 4, 8];
/// The time for measuring one copy at one size.
const BUDGET: Duration = Duration::from_millis(200);

fn kernel(span: u32, lanes: u32) -> Source {
    Source::file("bench_copy").u32("SPAN", span).u32("LANES", lanes)
}

/// Returns the bytes read and written per second by the fastest copy, and by the engine's elementwise kernel.
///
/// Arrays are larger than any cache if binding limits and memory allow. A size that fails, for want of memory, is left out.
pub(super) fn rates(gpu: &Gpu) -> Result<(f64, f64)> {
    let most = gpu.adapter().max_binding.min(if gpu.adapter().is_software() { 64 << 20 } else { 1 << 30 });
    let (mut all, mut elementwise) = (0.0f64, 0.0f64);
    let mut failed = None;
    for bytes in [most / 4, most] {
        match at(gpu, bytes / ALIGNED * ALIGNED) {
            Ok(found) => (all, elementwise) = (all.max(found.0), elementwise.max(found.1)),
            Err(error) => {
                gpu.take_fault();
                failed = Some(error);
            }
        }
        gpu.trim();
    }
    match failed {
        Some(error) if all == 0.0 => Err(error),
        _ if all == 0.0 => Err(Error::device("copy: no array is large enough to be measured")),
        _ => Ok((all, elementwise)),
    }
}

/// Array sizes are multiples of this, so that every kernel's workgroups divide them evenly.
const ALIGNED: u64 = 16 * 256 * 8;

/// Measures the two rates with arrays of `bytes`.
fn at(gpu: &Gpu, bytes: u64) -> Result<(f64, f64)> {
    let count = bytes as usize / 4;
    let x = Tensor::ones(gpu, [count]);
    x.evaluate();
    let y = Tensor::empty(gpu, "copy", [count], DType::F32);
    let rate = |call: &mut dyn FnMut()| -> Result<f64> {
        let stats = measure(gpu, BUDGET, |_| call())?;
        // Copies skipped for want of memory would have taken no time.
        x.check()?;
        y.check()?;
        Ok(2.0 * bytes as f64 / stats.min)
    };
    let (from, to) = (x.place(), y.place());
    let mut best = rate(&mut || {
        if let (Ok(a), Ok(b), Ok(encoder)) =
            (from.buffer.data(), to.buffer.data(), lock(&gpu.0.recorder).encoder(gpu))
        {
            encoder.copy_buffer_to_buffer(a, from.offset, b, to.offset, bytes);
        }
    })?;
    let lanes = gpu.limits().max_compute_invocations_per_workgroup.clamp(1, 256);
    for span in SPANS {
        let (source, groups) = (kernel(span, lanes), count / (4 * span * lanes) as usize);
        best = best.max(rate(&mut || {
            let launch = Launch::new("copy", &source, "main", grid(groups)).bind("x", &x).bind_mut("y", &y);
            gpu.launch(launch.set("count", count / 4).turns(1).reuse(0));
        })?);
    }
    // The engine's kernel allocates its own result, so `y` is freed first.
    drop((to, y));
    let mut made = Ok(());
    let stats = measure(gpu, BUDGET, |_| {
        let z = x.affine(1.0, 0.0);
        z.evaluate();
        made = std::mem::replace(&mut made, Ok(())).and(z.check());
    })?;
    made?;
    let elementwise = 2.0 * bytes as f64 / stats.min;
    Ok((best.max(elementwise), elementwise))
}
