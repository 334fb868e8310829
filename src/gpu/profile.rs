//! Profiles: where a piece of work spends its time, kernel by kernel.

use super::kernel::Launch;
use super::{Gpu, lock};
use crate::error::Result;
use std::collections::BTreeMap;
use std::time::Instant;

/// Calls of one kernel in [`Gpu::profile`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Profiled {
    /// The op, the kernel's name and its entry.
    pub kernel: String,
    /// Number of dispatches.
    pub count: usize,
    /// Bytes of operands and results, each counted once per dispatch.
    pub bytes: u64,
    /// Seconds of all these dispatches together.
    pub seconds: f64,
}

/// What a profile has seen so far.
#[derive(Default)]
pub(crate) struct Profile {
    kernels: BTreeMap<String, Profiled>,
    /// When the device was last idle. `None` while no profile runs.
    idle: Option<Instant>,
}

impl Gpu {
    /// Runs `work` and waits for the device after every kernel. Returns the kernels that it used, from the longest
    /// total time to the shortest.
    ///
    /// Waiting costs some microseconds per dispatch, and what the host does between two kernels counts for the second.
    /// So the totals say where to look, and [`Gpu::time`] says how long the work takes. Compilation counts too, so run
    /// `work` once before. Replayed steps are not seen.
    ///
    /// # Errors
    /// The device's fault.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::ones(&gpu, [64, 64]);
    /// for kernel in gpu.profile(|| x.matmul(&x).softmax(-1).evaluate())? {
    ///     println!("{kernel:?}");
    /// }
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn profile(&self, work: impl FnOnce()) -> Result<Vec<Profiled>> {
        self.synchronize()?;
        lock(&self.0.profile).idle = Some(Instant::now());
        work();
        let seen = std::mem::take(&mut *lock(&self.0.profile)).kernels;
        self.synchronize()?;
        let mut all: Vec<Profiled> = seen.into_values().collect();
        all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(all)
    }

    /// Called after every dispatch, while neither the recorder nor a pool is locked.
    pub(crate) fn profiled(&self, launch: &Launch) {
        if lock(&self.0.profile).idle.is_none() || self.wait_idle().is_err() {
            return;
        }
        let Profile { kernels, idle: Some(idle) } = &mut *lock(&self.0.profile) else { return };
        let kernel = format!("{}: {} {}", launch.op, launch.source.name(), launch.entry);
        let new = || Profiled { kernel: kernel.clone(), count: 0, bytes: 0, seconds: 0.0 };
        let entry = kernels.entry(kernel.clone()).or_insert_with(new);
        entry.count += 1;
        entry.bytes += launch.binds.iter().map(|bind| bind.part.size).sum::<u64>();
        entry.seconds += idle.elapsed().as_secs_f64();
        *idle = Instant::now();
    }
}
