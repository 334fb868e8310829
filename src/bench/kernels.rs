//! Lists the kernels of one call of a row, as they were timed or as they are planned.

use super::{Entry, Row, caught};
use crate::error::Result;
use crate::gpu::plan::Pass;
use crate::gpu::{Gpu, Profiled};
use crate::tape::no_grad;

/// The kernels that a call of a row dispatched, from the longest total time to the shortest.
pub struct Kernels(pub Vec<Profiled>);

/// Makes a row and watches it. If that fails, `end` switches off what a panic may have left switched on.
fn watched<T>(
    gpu: &Gpu,
    entry: Entry,
    watch: impl FnOnce(&Row) -> Result<T>,
    end: impl FnOnce(),
) -> Result<T> {
    let found = caught(|| watch(&(entry.make)(gpu, false)?));
    if found.is_err() {
        gpu.take_fault();
        end();
    }
    gpu.trim();
    found
}

fn call(row: &Row) {
    let y = (row.run)(0);
    no_grad(|| y.contiguous().evaluate());
}

/// Makes a row, checks it, and profiles one more call with [`Gpu::profile`].
///
/// # Errors
/// Those of the row, including a panic in it, or the device's fault.
pub fn kernels(gpu: &Gpu, entry: Entry) -> Result<Kernels> {
    let profiled = |row: &Row| {
        // This also compiles the kernels, which would otherwise be part of the times.
        row.check(gpu)?;
        gpu.profile(|| call(row))
    };
    watched(gpu, entry, profiled, || drop(gpu.profile(|| ()))).map(Kernels)
}

/// Returns the dispatches that a call of a row plans for the class of this device, each with its count, in the order in which they
/// first occur. A line has the kernel, constants, workgroups, parts, bytes and operations. The row's inputs are computed, but no
/// dispatch of the call runs, and the replay of a recorded step is left out.
///
/// # Errors
/// As [`kernels`], except for wrong values, since no values are computed.
pub fn plan(gpu: &Gpu, entry: Entry) -> Result<Vec<(String, usize)>> {
    let planned = |row: &Row| {
        let mut possible = Ok(());
        let passes = gpu.only_planned(|| {
            possible = (row.run)(0).check();
            // The first call made what is made only once, such as an optimizer's state. The second plans only what repeats.
            gpu.forget_passes();
            call(row);
        })?;
        possible.map(|()| passes)
    };
    Ok(counted(&watched(gpu, entry, planned, || ())?))
}

/// Returns a line for each dispatch, with its count, in the order in which they first occur.
pub fn counted(passes: &[Pass]) -> Vec<(String, usize)> {
    let mut all: Vec<(String, usize)> = Vec::new();
    for pass in passes {
        let line = format!("{}: {pass}", pass.op);
        match all.iter_mut().find(|(known, _)| *known == line) {
            Some((_, count)) => *count += 1,
            None => all.push((line, 1)),
        }
    }
    all
}

impl Kernels {
    /// Returns a table with one line per kernel: its count, its share of the time, and the bytes that it binds.
    pub fn table(&self) -> String {
        let total: f64 = self.0.iter().map(|k| k.seconds).sum();
        let mut out = String::from("  count  share          MB  op: kernel entry\n");
        for k in &self.0 {
            let share = 100.0 * k.seconds / total;
            out += &format!("{:>7} {share:>5.1}% {:>11.3}  {}\n", k.count, k.bytes as f64 * 1e-6, k.kernel);
        }
        let count: usize = self.0.iter().map(|k| k.count).sum();
        let bytes: u64 = self.0.iter().map(|k| k.bytes).sum();
        out + &format!("{count:>7}   all  {:>11.3}\n", bytes as f64 * 1e-6)
    }
}
