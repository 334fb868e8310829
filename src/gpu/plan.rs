//! Plans: the dispatches that an op will make. They are pure functions of sizes and of the device's class, so they are
//! known before there is a device.

use super::Gpu;
use super::buffer::Buffer;
use super::kernel::Launch;
use super::shader::Source;
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

/// One dispatch of a plan.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Pass {
    /// The op that launches it.
    pub op: String,
    /// The kernel with its constants.
    pub source: Source,
    /// The kernel's entry.
    pub entry: String,
    /// Workgroups along each axis.
    pub grid: [u32; 3],
    /// Parts of the axis that is summed or walked. Each part has its own result, and a later pass joins them.
    pub parts: usize,
    /// Bytes of operands and results, each counted once.
    pub bytes: f64,
    /// Floating-point operations.
    pub flops: f64,
}

impl Pass {
    /// The kernel, its entry and its constants: `matmul main TILE_M=64 TILE_N=64`.
    pub fn kernel(&self) -> String {
        let numbers = self.source.numbers().map(|(name, value)| format!(" {name}={value}"));
        format!("{} {}{}", self.source.name(), self.entry, numbers.collect::<String>())
    }

    /// Workgroups in all.
    pub fn workgroups(&self) -> usize {
        self.grid.iter().map(|&n| n as usize).product()
    }

    /// Threads of a workgroup, as the kernel's text declares them.
    ///
    /// # Errors
    /// When the kernel does not assemble.
    pub fn threads(&self) -> Result<usize> {
        let (module, _) = self.source.assemble()?.check(naga::valid::Capabilities::all())?;
        let entry = module.entry_points.iter().find(|entry| entry.name == self.entry);
        Ok(entry.map_or(0, |entry| entry.workgroup_size.iter().map(|&n| n as usize).product()))
    }

    /// Bytes of workgroup memory that the kernel's file declares, whichever of its entries use them.
    ///
    /// # Errors
    /// When the kernel does not assemble.
    pub fn workgroup_memory(&self) -> Result<usize> {
        let (module, _) = self.source.assemble()?.check(naga::valid::Capabilities::all())?;
        let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
        Ok(shared.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx()) as usize).sum())
    }
}

/// The dispatches that a thread makes, or only plans, on one device.
struct Watch {
    gpu: u64,
    seen: Vec<Pass>,
    /// If dispatches are only planned, and none runs.
    only: Option<Only>,
}

/// A plan whose dispatches do not run.
struct Only {
    /// Unique to this plan.
    number: u64,
    /// What was made for the results of its dispatches, which never ran.
    made: Vec<(String, Weak<Buffer>)>,
}

impl Only {
    fn new() -> Only {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Only { number: LAST.fetch_add(1, Relaxed) + 1, made: Vec::new() }
    }

    /// Notes which results exist only because of this plan. Other buffers still have the contents from before.
    fn note(&mut self, launch: &Launch) {
        launch.written().for_each(|buffer| self.note_result(launch.op, buffer));
    }

    fn note_result(&mut self, op: &str, buffer: &Arc<Buffer>) {
        if buffer.plan == Some(self.number) {
            self.made.push((op.to_string(), Arc::downgrade(buffer)));
        }
    }

    /// Lets the results that somebody still holds carry an error, so that nobody takes them for computed.
    fn end(self) {
        for (op, buffer) in self.made {
            if let Some(buffer) = buffer.upgrade() {
                let message = format!("{op} was only planned, by Gpu::only_planned, so it has no values");
                buffer.fail(&Error::config(message));
            }
        }
    }
}

thread_local! {
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

/// Puts a watch back even if the work panics.
struct Back(Option<Watch>);

impl Drop for Back {
    fn drop(&mut self) {
        let ended = WATCH.replace(self.0.take());
        if let Some(only) = ended.and_then(|watch| watch.only) {
            only.end();
        }
    }
}

/// Runs `work` as if its dispatches were neither seen nor only planned.
pub(super) fn aside<T>(work: impl FnOnce() -> T) -> T {
    let _back = Back(WATCH.take());
    work()
}

/// Formats bytes or operations with a unit prefix, such as `16.8 M`.
fn count(x: f64) -> String {
    match x {
        1e9.. => format!("{:.1} G", x * 1e-9),
        1e6.. => format!("{:.1} M", x * 1e-6),
        1e3.. => format!("{:.1} k", x * 1e-3),
        _ => format!("{x} "),
    }
}

impl fmt::Display for Pass {
    /// `matmul main TILE_M=64 TILE_N=64: 256 workgroups of 64, 8 parts, 16.8 MB, 8.4 MFLOP`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kernel())?;
        let threads = self.threads().unwrap_or(0);
        write!(f, ": {} workgroups of {threads}", self.workgroups())?;
        if self.parts > 1 {
            write!(f, ", {} parts", self.parts)?;
        }
        write!(f, ", {}B", count(self.bytes))?;
        if self.flops > 0.0 { write!(f, ", {}FLOP", count(self.flops)) } else { Ok(()) }
    }
}

impl Gpu {
    /// Runs `work` and returns the dispatches that it makes in this thread, in order. Replayed steps are not seen.
    ///
    /// # Errors
    /// The device's fault.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::ones(&gpu, [4, 8]);
    /// for pass in gpu.planned(|| x.softmax(-1).evaluate())? {
    ///     println!("{pass}"); // kernel, workgroups, bytes and operations
    /// }
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn planned(&self, work: impl FnOnce()) -> Result<Vec<Pass>> {
        self.watch(work, None)
    }

    /// Like [`Gpu::planned`], but no dispatch runs, also in plans inside of `work`. A recorded step that `work` runs is left out. `work`
    /// must not depend on values, since results have arbitrary contents in it, and must not copy or save any. Tensors from before
    /// keep their values. A result that outlives `work` is computed later, if it follows from such tensors alone, or carries an
    /// error.
    ///
    /// # Errors
    /// The device's fault.
    pub fn only_planned(&self, work: impl FnOnce()) -> Result<Vec<Pass>> {
        self.watch(work, Some(Only::new()))
    }

    fn watch(&self, work: impl FnOnce(), only: Option<Only>) -> Result<Vec<Pass>> {
        self.synchronize()?;
        // Operands of the outer plan were never computed.
        let only = only.or_else(|| self.plan_number().map(|_| Only::new()));
        let back = Back(WATCH.replace(Some(Watch { gpu: self.0.id, seen: Vec::new(), only })));
        work();
        let seen = WATCH.with_borrow_mut(|watch| watch.as_mut().map(|watch| std::mem::take(&mut watch.seen)));
        drop(back);
        self.synchronize()?;
        Ok(seen.unwrap_or_default())
    }

    /// The number of the plan for which this thread only plans dispatches, if it does.
    pub(crate) fn plan_number(&self) -> Option<u64> {
        WATCH.with_borrow(|watch| {
            let watch = watch.as_ref().filter(|watch| watch.gpu == self.0.id)?;
            watch.only.as_ref().map(|only| only.number)
        })
    }

    /// Notes a result that shares the memory of one that this thread has only planned.
    pub(super) fn note_planned(&self, op: &str, buffer: &Arc<Buffer>) {
        WATCH.with_borrow_mut(|watch| {
            if let Some(only) = watch.as_mut().and_then(|watch| watch.only.as_mut()) {
                only.note_result(op, buffer);
            }
        });
    }

    /// Refuses what would leave tensors from before in memory that a plan never fills.
    pub(crate) fn refuse_in_plan(&self, what: &str) -> Result<()> {
        match self.plan_number() {
            Some(_) => {
                Err(Error::config(format!("{what} while dispatches are only planned; make it before")))
            }
            None => Ok(()),
        }
    }

    /// Forgets the dispatches that this thread has seen or planned so far.
    #[cfg(feature = "bench")]
    pub(crate) fn forget_passes(&self) {
        WATCH.with_borrow_mut(|watch| {
            if let Some(watch) = watch.as_mut().filter(|watch| watch.gpu == self.0.id) {
                watch.seen.clear();
            }
        });
    }

    /// Called after every dispatch, or in its place if dispatches are only planned.
    pub(super) fn note_pass(&self, launch: &Launch) {
        WATCH.with_borrow_mut(|watch| {
            let Some(watch) = watch.as_mut().filter(|watch| watch.gpu == self.0.id) else { return };
            if let Some(only) = &mut watch.only {
                only.note(launch);
            }
            watch.seen.push(Pass {
                op: launch.op.into(),
                source: launch.source.clone(),
                entry: launch.entry.into(),
                grid: launch.grid,
                parts: launch.work.parts,
                bytes: launch.bytes(),
                flops: launch.work.flops,
            });
        });
    }
}
