//! Measures numbers of a device's class: its width, its rates and the cost of a dispatch.

use super::buffer::Buffer;
use super::kernel::{Launch, Part, grid};
use super::shader::Source;
use super::{DeviceClass, Gpu, choices, lock};
use crate::error::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

/// Threads of a workgroup, enough to fill a multiprocessor alone.
const THREADS: u32 = 256;
/// Independent chains of multiply-adds per thread, enough to hide their latency.
const CHAINS: u32 = 8;
const ROUNDS: u32 = 2048;
/// The most workgroups that are tried. No device that we know is wider.
const WIDEST: usize = 4096;

/// Returns the most workgroups that take hardly longer than one. With one more, some wait for others, and the time
/// doubles. `None` if even `most` workgroups take no longer.
fn knee(most: usize, mut seconds: impl FnMut(usize) -> Result<f64>) -> Result<Option<usize>> {
    let one = seconds(1)?;
    let mut waits = |groups: usize| Ok(seconds(groups)? > 1.5 * one);
    let mut fits = 1;
    while !waits(2 * fits)? {
        fits *= 2;
        if 2 * fits > most {
            return Ok(None);
        }
    }
    let mut too_many = 2 * fits;
    while too_many - fits > 1 {
        let middle = (fits + too_many) / 2;
        if waits(middle)? { too_many = middle } else { fits = middle }
    }
    Ok(Some(fits))
}

/// A measurement on one device.
struct Bench<'a> {
    gpu: &'a Gpu,
    source: Source,
    y: Arc<Buffer>,
}

impl Bench<'_> {
    fn launch(&self, entry: &str, groups: usize) {
        let turns = if entry == "main" { ROUNDS as usize } else { 0 };
        let y = Part::whole(&self.y);
        self.gpu.launch(
            Launch::new("fma", &self.source, entry, grid(groups))
                .bind_mut("y", y)
                .set("m", 0.999f32)
                .set("b", 0.001f32)
                .turns(turns)
                .reuse(0),
        );
    }

    /// Returns the seconds of the fastest of five calls of `work`.
    ///
    /// # Errors
    /// If the device has a fault, had no memory for the buffer that the kernels write, or its clock stood still.
    fn least(&self, work: impl Fn()) -> Result<f64> {
        self.y.data()?;
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            let seconds = if self.gpu.has_own_clock() {
                self.gpu.time(&work)?
            } else {
                self.gpu.synchronize()?;
                let started = Instant::now();
                work();
                self.gpu.synchronize()?;
                started.elapsed().as_secs_f64()
            };
            best = best.min(seconds);
        }
        self.gpu.check()?;
        if best > 0.0 {
            Ok(best)
        } else {
            Err(Error::device("the device's clock stands still; nothing can be measured"))
        }
    }

    /// Keeps the device busy for half a second, so that a GPU raises its clock rate.
    fn warm_up(&self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed().as_secs_f64() < 0.5 {
            (0..16).for_each(|_| self.launch("main", 64));
            self.gpu.synchronize()?;
        }
        Ok(())
    }
}

/// Bytes to copy: more than a cache holds, unless the adapter's bindings are smaller.
fn copied(gpu: &Gpu) -> u64 {
    let most = if gpu.class().is_cpu() { 64 << 20 } else { 256 << 20 };
    gpu.adapter().max_binding.min(most) / 4096 * 4096
}

fn copy(gpu: &Gpu, from: &Buffer, to: &Buffer, bytes: u64) {
    if let (Ok(from), Ok(to), Ok(encoder)) = (from.data(), to.data(), lock(&gpu.0.recorder).encoder(gpu)) {
        encoder.copy_buffer_to_buffer(from, 0, to, 0, bytes);
    }
}

impl Gpu {
    /// Measures this device's width, rates and cost of a dispatch, and keeps them with the choices of kernels. Returns
    /// the class with these numbers in place of the table's, which the adapter has from the next time that it is
    /// opened. A CPU's width is not measured, since it would depend on how many of its cores are free. A class that the
    /// user named is returned unchanged.
    ///
    /// # Errors
    /// The device's fault, missing memory for what is measured, or a clock that stands still.
    pub fn measure_class(&self) -> Result<DeviceClass> {
        if self.0.class_named {
            return Ok(self.class().clone());
        }
        let source =
            Source::file("bench_fma").u32("CHAINS", CHAINS).u32("THREADS", THREADS).u32("ROUNDS", ROUNDS);
        let beside = self.beside();
        let y = beside.alloc("fma", 4 * WIDEST as u64 * THREADS as u64);
        let bench = Bench { gpu: &beside, source, y };
        bench.warm_up()?;
        let mut class = self.class().clone();
        let note = |class: &mut DeviceClass, name: &str, number: f64| {
            self.note_device(name, number);
            choices::refine(class, name, number);
        };
        if !self.class().is_cpu()
            && let Some(width) = knee(WIDEST, |groups| bench.least(|| bench.launch("main", groups)))?
        {
            note(&mut class, "width", width as f64);
        }
        let groups = if class.is_cpu() { 16 } else { (8 * class.width as usize).min(WIDEST) };
        let flops = 2.0 * 4.0 * 4.0 * (CHAINS * ROUNDS * THREADS) as f64 * groups as f64;
        note(&mut class, "flops_s", (flops / bench.least(|| bench.launch("main", groups))?).round());
        let count = 500;
        let many = bench.least(|| (0..count).for_each(|_| bench.launch("nothing", 1)))?;
        note(&mut class, "dispatch", many / count as f64);
        let (bytes, times) = (copied(&beside), 4);
        let [from, to] = [(); 2].map(|()| beside.alloc("copy", bytes));
        from.data().and(to.data())?;
        let seconds = bench.least(|| (0..times).for_each(|_| copy(&beside, &from, &to, bytes)))?;
        note(&mut class, "bytes_s", (2.0 * (times * bytes) as f64 / seconds).round());
        Ok(class)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_knee_is_the_width() {
        for width in [1, 2, 3, 7, 8, 36, 132, 1000] {
            // One workgroup per multiprocessor at a time, with noise of a tenth on every other call.
            let mut calls = 0;
            let seconds = |groups: usize| {
                calls += 1;
                Ok(groups.div_ceil(width) as f64 * (1.0 + 0.1 * (calls % 2) as f64))
            };
            assert_eq!(knee(WIDEST, seconds).unwrap(), Some(width));
        }
        assert_eq!(knee(64, |_| Ok(1.0)).unwrap(), None, "no end in sight");
    }
}
