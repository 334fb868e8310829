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
    /// Bytes of these that recorded steps keep for what their replays compute on the way; inputs and outputs are tensors.
    pub steps: u64,
    /// Bytes in buffers that wait to be used again.
    pub free: u64,
    /// The most that `used + free` has been.
    pub peak: u64,
    /// The most that `used` has been.
    pub most_used: u64,
    /// Buffers ever created on the device; constant in a steady loop.
    pub created: u64,
}

/// Free buffers by size class, each with the batch in which it was last let go.
#[derive(Default)]
pub(crate) struct Pool {
    pub(super) free: BTreeMap<u64, Vec<(u64, wgpu::Buffer)>>,
    pub(super) stats: MemoryStats,
    /// Counts buffers given back to the driver.
    pub(super) trims: u64,
    /// Whether it is a recorded step's, which keeps all that it takes.
    pub(super) of_step: bool,
    /// What a step's code was given while it is recorded.
    pub(super) lent: Vec<Weak<Buffer>>,
    /// A step's code has run: its memory is what replays write, and nobody else's.
    pub(super) closed: bool,
    /// Bytes of a step's memory that are its inputs' and outputs'.
    pub(super) inherited: u64,
}

impl Pool {
    /// Free buffers are worth as much memory as tensors ever took, and this: beyond it the oldest go.
    const SPARE: u64 = 64 << 20;

    fn keep(&mut self, epoch: u64, raw: wgpu::Buffer) {
        if self.closed {
            return;
        }
        self.stats.used -= raw.size();
        self.stats.free += raw.size();
        self.free.entry(raw.size()).or_default().push((epoch, raw));
        while !self.of_step && self.stats.free > self.stats.most_used.max(Self::SPARE) {
            // Each class is in order of return.
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

    /// Bytes of a step's pool but for those that became tensors'.
    pub(super) fn held(&self) -> u64 {
        self.stats.used + self.stats.free - self.inherited
    }
}

/// Memory of the device, and the pool that it goes back to.
pub(super) struct Memory {
    pub raw: wgpu::Buffer,
    pub home: Weak<Mutex<Pool>>,
}

/// A device buffer that goes back to its pool when the last holder lets go.
///
/// It has no `data` when it could not be made or the op that writes it was skipped: then it carries the reason, and every op
/// that meets this buffer is skipped for the same one.
pub struct Buffer {
    pub(super) memory: Option<Memory>,
    /// Where the elements are since a recorded step kept the memory above for its replays.
    pub(super) moved: OnceLock<Memory>,
    /// The buffer that this is a part of, whose memory it is.
    pub(super) whole: Option<Arc<Buffer>>,
    /// Whether a lost batch leaves no mark here: its parts have marks of their own, or a count may be off by one.
    spared: AtomicBool,
    /// Why it has no memory.
    pub(super) refused: Option<Error>,
    /// Why a write to it was skipped or lost. What an operand carries comes before what the size of the result would say.
    failed: Mutex<Option<Error>>,
    /// Whether there is such a reason: every launch asks each of its operands.
    has_failed: AtomicBool,
    pub(crate) size: u64,
    /// Counts writes after the first: a saved value whose version moved was changed in place.
    pub(crate) version: AtomicU64,
    /// Whether the tensor that was here has its elements elsewhere now.
    left: AtomicBool,
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
            gpu: Arc::downgrade(&gpu.0),
        }
    }

    /// A part of this buffer with a count of writes and an error of its own; places in it are counted from the whole's start.
    pub(crate) fn part(self: &Arc<Buffer>, gpu: &Gpu, size: u64) -> Arc<Buffer> {
        let mut part = Buffer::new(gpu, size, None);
        part.whole = Some(self.clone());
        self.spare();
        Arc::new(part)
    }

    /// From here on a lost batch leaves no mark here.
    pub(crate) fn spare(&self) {
        self.spared.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_spared(&self) -> bool {
        self.spared.load(Ordering::Relaxed)
    }

    /// The memory, or why what should be in it was never written.
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

    /// The memory whatever is in it: for who writes it anew.
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

    /// Notes why a write to this buffer was skipped or lost: what it holds now is left from earlier. The first reason stays.
    pub(crate) fn fail(&self, error: &Error) {
        lock(&self.failed).get_or_insert_with(|| error.clone());
        self.has_failed.store(true, Ordering::Release);
    }

    /// Notes that all of it was written anew.
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

    /// Notes that the tensor which was here has moved: recorded steps that read it here must not go on.
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
