//! Buffers, the errors that they carry, and the pool that they come from by size classes.

use super::{Gpu, lock};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// Bytes that the pool holds, for watching a long run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Bytes in buffers that tensors and recorded steps hold now.
    pub used: u64,
    /// The part of `used` that recorded steps keep for intermediate results of their replays. Inputs and outputs are
    /// tensors.
    pub steps: u64,
    /// Bytes in buffers that wait to be used again.
    pub free: u64,
    /// The most that `used + free` has been.
    pub peak: u64,
    /// The most that `used` has been.
    pub most_used: u64,
    /// Buffers created since the device was opened. This number is constant in a steady loop.
    pub created: u64,
}

/// Free buffers by size class, each with the batch in which it was last let go.
#[derive(Default)]
pub(crate) struct Pool {
    pub(super) free: BTreeMap<u64, Vec<(u64, wgpu::Buffer)>>,
    pub(super) stats: MemoryStats,
    /// How many free buffers were given back to the driver because there were too many.
    pub(super) trims: u64,
    /// Whether the pool belongs to a recorded step. Such a pool keeps all buffers that it takes.
    pub(super) of_step: bool,
    /// Buffers that a step's code was given while it is recorded.
    pub(super) lent: Vec<Weak<Buffer>>,
    /// Whether the step's code has run. The memory then belongs to the replays alone.
    pub(super) closed: bool,
    /// Bytes of a step's memory that belong to its inputs and outputs.
    pub(super) inherited: u64,
}

impl Pool {
    /// The pool keeps as many bytes of free buffers as tensors ever held at once, and at least this many. Beyond that,
    /// the oldest are given back.
    const SPARE: u64 = 64 << 20;

    fn keep(&mut self, epoch: u64, raw: wgpu::Buffer) {
        if self.closed {
            return;
        }
        self.stats.used -= raw.size();
        self.stats.free += raw.size();
        self.free.entry(raw.size()).or_default().push((epoch, raw));
        while !self.of_step && self.stats.free > self.stats.most_used.max(Self::SPARE) {
            // Each class is sorted by the time of return.
            let oldest = self.free.values_mut().filter(|f| !f.is_empty()).min_by_key(|free| free[0].0);
            let Some(free) = oldest else { return };
            self.stats.free -= free.remove(0).1.size();
            self.trims += 1;
        }
    }

    pub fn trims(&self) -> u64 {
        self.trims
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    pub(super) fn take(&mut self, bytes: u64) {
        self.stats.used += bytes;
        self.stats.most_used = self.stats.most_used.max(self.stats.used);
    }

    /// Bytes of a step's pool, without those that became tensors.
    pub(super) fn held(&self) -> u64 {
        self.stats.used + self.stats.free - self.inherited
    }
}

/// Memory of the device, and the pool that it goes back to.
pub(super) struct Memory {
    pub raw: wgpu::Buffer,
    pub home: Weak<Mutex<Pool>>,
}

/// A device buffer that goes back to its pool when the last holder drops it.
///
/// It has no `data` if it could not be made, or if the op that writes it was skipped. It then carries the reason, and
/// every op that uses the buffer is skipped for the same reason.
pub struct Buffer {
    pub(super) memory: Option<Memory>,
    /// The elements' new memory, if a recorded step has kept `memory` for its replays.
    pub(super) moved: OnceLock<Memory>,
    /// The buffer that this is a part of. A part has no memory of its own.
    pub(super) whole: Option<Arc<Buffer>>,
    /// Whether a lost batch does not mark this buffer, either because its parts are marked instead or because it holds
    /// counts that may be off by one.
    spared: AtomicBool,
    /// Why it has no memory.
    pub(super) refused: Option<Error>,
    /// Why a write to it was skipped or lost. This error takes precedence over `refused`: an operand's error is the
    /// cause, even if the result is too large as well.
    failed: Mutex<Option<Error>>,
    /// Whether `failed` holds an error. Every launch checks this for each of its operands, without a lock.
    has_failed: AtomicBool,
    pub(crate) size: u64,
    /// Counts changes in place. A saved value was changed if its version has moved.
    pub(crate) version: AtomicU64,
    /// Whether the tensor that was in this buffer has its elements elsewhere now.
    left: AtomicBool,
    /// The number of the plan for whose dispatches it was made. They never run.
    pub(super) plan: Option<u64>,
    gpu: Weak<super::Inner>,
}

impl Buffer {
    pub(super) fn new(gpu: &Gpu, size: u64, memory: Option<Memory>) -> Buffer {
        Buffer {
            memory,
            moved: OnceLock::new(),
            whole: None,
            spared: AtomicBool::new(false),
            refused: None,
            failed: Mutex::default(),
            has_failed: AtomicBool::new(false),
            size,
            version: AtomicU64::new(0),
            left: AtomicBool::new(false),
            plan: gpu.plan_number(),
            gpu: Arc::downgrade(&gpu.0),
        }
    }

    /// Whether this buffer belongs to the device of this handle.
    pub(super) fn is_on(&self, gpu: &Gpu) -> bool {
        std::ptr::eq(self.gpu.as_ptr(), Arc::as_ptr(&gpu.0))
    }

    /// Returns a part of this buffer with its own version and error. Offsets into a part are counted from the start of
    /// the whole buffer.
    pub(crate) fn part(self: &Arc<Buffer>, gpu: &Gpu, size: u64) -> Arc<Buffer> {
        let mut part = Buffer::new(gpu, size, None);
        part.whole = Some(self.clone());
        self.spare();
        Arc::new(part)
    }

    /// The buffer that this is a part of, or this buffer itself.
    pub(crate) fn root(self: &Arc<Buffer>) -> &Arc<Buffer> {
        self.whole.as_ref().map_or(self, |whole| whole.root())
    }

    /// From here on a lost batch does not mark this buffer.
    pub(crate) fn spare(&self) {
        self.spared.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_spared(&self) -> bool {
        self.spared.load(Ordering::Relaxed)
    }

    /// Returns the memory, or the reason why its contents were never written.
    pub(crate) fn data(&self) -> Result<&wgpu::Buffer> {
        if self.has_failed.load(Ordering::Acquire)
            && let Some(error) = &*lock(&self.failed)
        {
            return Err(error.clone());
        }
        if let Some(error) = &self.refused {
            return Err(error.clone());
        }
        match &self.whole {
            Some(whole) => whole.data(),
            None => Ok(&self.held().expect("a buffer without memory says why").raw),
        }
    }

    /// Returns the memory even if its contents were lost, for callers that write all of it.
    pub(super) fn memory(&self) -> Result<&wgpu::Buffer> {
        match (&self.whole, self.held()) {
            (Some(whole), _) => whole.memory(),
            (None, Some(memory)) => Ok(&memory.raw),
            (None, None) => self.data(),
        }
    }

    pub(super) fn held(&self) -> Option<&Memory> {
        self.moved.get().or(self.memory.as_ref())
    }

    /// Notes why a write to this buffer was skipped or lost, so that its contents are out of date. The first reason is
    /// kept.
    pub(crate) fn fail(&self, error: &Error) {
        lock(&self.failed).get_or_insert_with(|| error.clone());
        self.has_failed.store(true, Ordering::Release);
    }

    /// Removes the error, because all of the buffer is written anew.
    pub(super) fn heal(&self) {
        *lock(&self.failed) = None;
        self.has_failed.store(false, Ordering::Release);
    }

    /// Whether it came from this pool.
    pub(super) fn is_of(&self, pool: &Arc<Mutex<Pool>>) -> bool {
        match &self.whole {
            Some(whole) => whole.is_of(pool),
            None => self.held().is_some_and(|memory| std::ptr::eq(memory.home.as_ptr(), Arc::as_ptr(pool))),
        }
    }

    pub(crate) fn touch(&self) {
        self.version.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that the tensor which was in this buffer has moved. Recorded steps that read it here can no longer be
    /// replayed.
    pub(super) fn leave(&self) {
        self.left.store(true, Ordering::Release);
    }

    pub(super) fn is_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(inner) = self.gpu.upgrade() else { return };
        // Tells an upload whether commands that read this buffer may still be unsubmitted.
        let epoch = inner.epoch.load(Ordering::Acquire);
        for memory in self.memory.take().into_iter().chain(self.moved.take()) {
            if let Some(pool) = memory.home.upgrade() {
                lock(&pool).keep(epoch, memory.raw);
            }
        }
    }
}
