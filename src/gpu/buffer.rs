//! Buffers from a size-class pool, uploads that respect the open batch, readback through kept staging buffers.

use super::{Gpu, capture, lock};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, OnceLock, Weak};

/// Bytes that the pool holds, for watching a long run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    free: BTreeMap<u64, Vec<(u64, wgpu::Buffer)>>,
    stats: MemoryStats,
    /// Counts buffers given back to the driver.
    trims: u64,
    /// Whether it is a recorded step's, which keeps all that it takes.
    of_step: bool,
    /// What a step's code was given while it is recorded.
    lent: Vec<Weak<Buffer>>,
    /// A step's code has run: its memory is what replays write, and nobody else's.
    closed: bool,
    /// Bytes of a step's memory that are its inputs' and outputs'.
    inherited: u64,
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

    fn take(&mut self, bytes: u64) {
        self.stats.used += bytes;
        self.stats.most_used = self.stats.most_used.max(self.stats.used);
    }

    /// Bytes of a step's pool but for those that became tensors'.
    fn held(&self) -> u64 {
        self.stats.used + self.stats.free - self.inherited
    }
}

/// Memory of the device, and the pool that it goes back to.
struct Memory {
    raw: wgpu::Buffer,
    home: Weak<Mutex<Pool>>,
}

/// A device buffer that goes back to its pool when the last holder lets go.
///
/// It has no `data` when it could not be made or the op that writes it was skipped: then it carries the reason, and every op
/// that meets this buffer is skipped for the same one.
pub struct Buffer {
    memory: Option<Memory>,
    /// Where the elements are since a recorded step kept the memory above for its replays.
    moved: OnceLock<Memory>,
    /// The buffer that this is a part of, whose memory it is.
    whole: Option<Arc<Buffer>>,
    /// Whether a lost batch leaves no mark here: its parts have marks of their own, or a count may be off by one.
    spared: AtomicBool,
    /// Why it has no memory.
    refused: Option<Error>,
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
    fn new(gpu: &Gpu, size: u64, memory: Option<Memory>) -> Buffer {
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

    fn held(&self) -> Option<&Memory> {
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

/// Four classes to an octave: at most a quarter is wasted, and near sizes share buffers.
fn size_class(bytes: u64) -> u64 {
    let bytes = bytes.max(256);
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.div_ceil(step) * step
}

impl Gpu {
    /// A buffer of at least `bytes`, contents arbitrary. One that cannot be made has no memory and carries the error.
    pub(crate) fn alloc(&self, op: &str, bytes: u64) -> Arc<Buffer> {
        self.alloc_in(op, bytes, &capture::pool(self))
    }

    pub(crate) fn alloc_in(&self, op: &str, bytes: u64, pool: &Arc<Mutex<Pool>>) -> Arc<Buffer> {
        let buffer = self.take_buffer(op, bytes, u64::MAX, pool);
        let mut pool = lock(pool);
        if pool.of_step {
            // Those that are gone are forgotten when they are many: a long step has many temporaries.
            if pool.lent.len() == pool.lent.capacity() {
                pool.lent.retain(|buffer| buffer.strong_count() > 0);
            }
            pool.lent.push(Arc::downgrade(&buffer));
        }
        buffer
    }

    fn take_buffer(&self, op: &str, bytes: u64, newest_epoch: u64, pool: &Arc<Mutex<Pool>>) -> Arc<Buffer> {
        let mut buffer = Buffer::new(self, bytes, None);
        match self.try_take(op, bytes, newest_epoch, pool) {
            Ok(raw) => buffer.memory = Some(Memory { raw, home: Arc::downgrade(pool) }),
            Err(error) => buffer.refused = Some(error),
        }
        Arc::new(buffer)
    }

    /// Whether one tensor may have so many bytes.
    pub(super) fn fits(&self, op: &str, bytes: u64) -> Result<()> {
        let have = self.most_bytes();
        if bytes > have {
            return Err(Error::Limit { what: format!("{op}: bytes of one tensor"), need: bytes, have });
        }
        Ok(())
    }

    fn most_bytes(&self) -> u64 {
        self.limits().max_storage_buffer_binding_size.min(self.limits().max_buffer_size)
    }

    fn try_take(&self, op: &str, bytes: u64, newest_epoch: u64, from: &Mutex<Pool>) -> Result<wgpu::Buffer> {
        self.fits(op, bytes)?;
        let limit = self.most_bytes();
        let class = size_class(bytes).min(limit / 4 * 4).max(bytes);
        let mut pool = lock(from);
        if let Some(free) = pool.free.get_mut(&class)
            && let Some(at) = free.iter().rposition(|(epoch, _)| *epoch < newest_epoch)
        {
            let (_, raw) = free.remove(at);
            pool.stats.free -= class;
            pool.take(class);
            return Ok(raw);
        }
        drop(pool);
        let raw = match self.create(op, class) {
            Some(raw) => raw,
            // What waits in the pool may be of other sizes: it goes back to the driver once work on it is done.
            None => {
                let _ = self.wait_idle();
                self.trim();
                // The device is whole and others may go on: only what needs this buffer cannot be computed.
                self.create(op, class).ok_or_else(|| {
                    let stats = self.memory_stats();
                    Error::device(format!("{op}: out of device memory asking for {class} bytes; {stats:?}"))
                })?
            }
        };
        lock(from).take(class);
        let held = self.held_by_steps();
        let mut pool = lock(&self.0.pool);
        let stats = &mut pool.stats;
        stats.created += 1;
        stats.most_used = stats.most_used.max(stats.used + held);
        stats.peak = stats.peak.max(stats.used + stats.free + held);
        Ok(raw)
    }

    /// A new buffer, `None` when the device has no memory for it.
    fn create(&self, op: &str, bytes: u64) -> Option<wgpu::Buffer> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        self.create_for(op, bytes, usage)
    }

    /// A new buffer that the host can read, `None` when there is no memory for it.
    pub(super) fn create_readable(&self, op: &str, bytes: u64) -> Option<wgpu::Buffer> {
        self.create_for(op, bytes, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)
    }

    fn create_for(&self, op: &str, bytes: u64, usage: wgpu::BufferUsages) -> Option<wgpu::Buffer> {
        let scope = self.0.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let raw = self.0.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(op),
            size: bytes,
            usage,
            mapped_at_creation: false,
        });
        pollster::block_on(scope.pop()).is_none().then_some(raw)
    }

    /// A buffer with these bytes in it.
    pub(crate) fn upload(&self, op: &str, bytes: &[u8], padded: u64) -> Arc<Buffer> {
        // `write_buffer` runs before every command of the next submit, so a buffer that the open batch still reads
        // must not be its target: only buffers let go in earlier batches qualify.
        let epoch = self.0.epoch.load(Ordering::Acquire);
        // Never from a recorded step's own memory: a replay writes the temporaries that lived there before, but uploads nothing.
        let buffer = self.take_buffer(op, padded, epoch, &self.0.pool);
        if let Ok(raw) = buffer.data() {
            self.write_words(raw, 0, bytes);
            lock(&self.0.recorder).uploaded(self, padded);
        }
        buffer
    }

    /// Writes before the next submit; the last word is filled up with zeros.
    pub(super) fn write_words(&self, raw: &wgpu::Buffer, offset: u64, bytes: &[u8]) {
        let whole = bytes.len() / 4 * 4;
        self.0.queue.write_buffer(raw, offset, &bytes[..whole]);
        if whole < bytes.len() {
            let mut tail = [0u8; 4];
            tail[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
            self.0.queue.write_buffer(raw, offset + whole as u64, &tail);
        }
    }

    /// Bytes held by tensors, by recorded steps and by the pool.
    pub fn memory_stats(&self) -> MemoryStats {
        let held = self.held_by_steps();
        let mut stats = lock(&self.0.pool).stats;
        stats.used += held;
        stats.steps = held;
        stats.most_used = stats.most_used.max(stats.used);
        stats.peak = stats.peak.max(stats.used + stats.free);
        stats
    }

    fn held_by_steps(&self) -> u64 {
        lock(&self.0.steps).iter().filter_map(|(_, pool)| pool.upgrade()).map(|pool| lock(&pool).held()).sum()
    }

    /// A pool for a step that will be recorded, with the recording's number, which is above 0.
    pub(crate) fn step_pool(&self) -> (u64, Arc<Mutex<Pool>>) {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pool = Arc::new(Mutex::new(Pool { of_step: true, ..Pool::default() }));
        let mut steps = lock(&self.0.steps);
        steps.retain(|(_, pool)| pool.strong_count() > 0);
        steps.push((number, Arc::downgrade(&pool)));
        (number, pool)
    }

    /// Whether some thread is recording the step of this number now.
    pub(super) fn is_recording(&self, number: u64) -> bool {
        let steps = lock(&self.0.steps);
        let pool = steps.iter().find(|step| step.0 == number).and_then(|(_, pool)| pool.upgrade());
        drop(steps);
        pool.is_some_and(|pool| !lock(&pool).is_closed())
    }

    /// Another buffer over the same memory, which replays will go on writing and which is a tensor's from here on; what holds
    /// `buffer` itself gets a copy when the pool is closed. One of another pool is its own heir.
    pub(crate) fn heir(&self, buffer: &Arc<Buffer>, pool: &Arc<Mutex<Pool>>) -> Arc<Buffer> {
        let Some(memory) = buffer.held().filter(|_| buffer.is_of(pool) && buffer.whole.is_none()) else {
            return buffer.clone();
        };
        let (raw, home) = (memory.raw.clone(), Arc::downgrade(&self.0.pool));
        lock(&self.0.pool).take(raw.size());
        lock(pool).inherited += raw.size();
        Arc::new(Buffer::new(self, buffer.size, Some(Memory { raw, home })))
    }

    /// Ends the recording of a step: its pool's memory is the replays' from here on. What the step's code made and somebody
    /// still holds keeps the elements of the recorded run, in memory of its own.
    pub(crate) fn close(&self, pool: &Arc<Mutex<Pool>>) {
        let lent = {
            let mut pool = lock(pool);
            pool.free.clear();
            pool.closed = true;
            std::mem::take(&mut pool.lent)
        };
        for buffer in lent.iter().filter_map(Weak::upgrade) {
            let Ok(old) = buffer.data() else { continue };
            match self.try_take("step", buffer.size, u64::MAX, &self.0.pool) {
                Ok(raw) => {
                    let bytes = buffer.size.next_multiple_of(4).min(old.size());
                    let mut recorder = lock(&self.0.recorder);
                    recorder.writes([&buffer]);
                    recorder.encoder(self).copy_buffer_to_buffer(old, 0, &raw, 0, bytes);
                    drop(recorder);
                    let _ = buffer.moved.set(Memory { raw, home: Arc::downgrade(&self.0.pool) });
                }
                Err(error) => buffer.fail(&error),
            }
        }
    }

    /// Gives the pool's free buffers back to the driver; returns their bytes.
    pub fn trim(&self) -> u64 {
        lock(&self.0.recorder).groups.clear();
        let mut pool = lock(&self.0.pool);
        pool.free.clear();
        std::mem::take(&mut pool.stats.free)
    }

    /// Copies `bytes` at `offset` of `buffer` to the host; waits for all recorded work.
    pub(crate) fn read(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let reading = self.start_read(buffer, offset, bytes)?;
        reading.wait()
    }

    pub(crate) fn start_read(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Reading> {
        capture::refuse(self, "a readback")?;
        self.check()?;
        buffer.data()?;
        let padded = bytes.div_ceil(4) * 4;
        let staging = self.take_staging(padded.max(4))?;
        let index = self.submit_with_findings(|recorder| {
            if padded > 0
                && let Ok(raw) = buffer.data()
            {
                recorder.encoder(self).copy_buffer_to_buffer(raw, offset, &staging, 0, padded);
            }
        });
        self.check()?;
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            let _ = sender.send(result);
        });
        Ok(Reading { gpu: self.clone(), staging: Some(staging), index, bytes, receiver })
    }

    fn take_staging(&self, bytes: u64) -> Result<wgpu::Buffer> {
        let mut ring = lock(&self.0.staging);
        if let Some(at) = ring.iter().position(|b| b.size() >= bytes && b.size() <= bytes.max(4096) * 4) {
            return Ok(ring.swap_remove(at));
        }
        drop(ring);
        let class = size_class(bytes).min(self.limits().max_buffer_size / 4 * 4).max(bytes);
        // Known before anything is recorded: a buffer without memory would take the open batch with it.
        self.create_readable("readback", class).ok_or_else(|| {
            let stats = self.memory_stats();
            Error::device(format!("a readback: out of memory asking for {class} bytes; {stats:?}"))
        })
    }
}

/// A readback under way: commands are submitted, [`wait`](Reading::wait) blocks, [`poll`](Reading::poll) does not.
pub struct Reading {
    gpu: Gpu,
    staging: Option<wgpu::Buffer>,
    index: Option<wgpu::SubmissionIndex>,
    bytes: u64,
    receiver: std::sync::mpsc::Receiver<Result<(), wgpu::BufferAsyncError>>,
}

impl Reading {
    /// Blocks until the bytes are here, at most as long as `Options::wait`.
    ///
    /// # Errors
    /// The device's fault, if one stands; [`Error::Device`] when it takes too long. [`Error::Outside`] where the device checks
    /// ids and found some in work recorded before: once, and whether or not these bytes depend on them.
    pub fn wait(mut self) -> Result<Vec<u8>> {
        const WHAT: &str = "a readback";
        self.gpu.wait_for(self.index.take(), WHAT)?;
        // The map is announced while polling: here, or by another thread at this moment.
        let mapped = match self.gpu.0.wait {
            Some(limit) => self.receiver.recv_timeout(limit).map_err(|error| match error {
                RecvTimeoutError::Timeout => self.gpu.waited(WHAT),
                RecvTimeoutError::Disconnected => Error::device("a readback was dropped by the driver"),
            })?,
            None => {
                self.receiver.recv().map_err(|_| Error::device("a readback was dropped by the driver"))?
            }
        };
        self.take(mapped)
    }

    /// The bytes if they are here, else `None`; never blocks.
    ///
    /// # Errors
    /// As [`Reading::wait`].
    pub fn poll(&mut self) -> Result<Option<Vec<u8>>> {
        let polled = self.gpu.0.device.poll(wgpu::PollType::Poll);
        polled.map_err(|e| Error::device(format!("polling a readback: {e}")))?;
        match self.receiver.try_recv() {
            Ok(mapped) => self.take(mapped).map(Some),
            Err(TryRecvError::Empty) => self.gpu.check().map(|()| None),
            // The sender spoke once and is gone: a second take.
            Err(TryRecvError::Disconnected) => Err(Error::device("this readback was already taken")),
        }
    }

    fn take(&mut self, mapped: Result<(), wgpu::BufferAsyncError>) -> Result<Vec<u8>> {
        self.gpu.check()?;
        self.gpu.findings()?;
        mapped.map_err(|e| Error::device(format!("mapping a readback: {e}")))?;
        let staging = self.staging.take().ok_or_else(|| Error::device("this readback was already taken"))?;
        let view = staging.get_mapped_range(..).map_err(|e| Error::device(e.to_string()))?;
        let bytes = view[..self.bytes as usize].to_vec();
        drop(view);
        staging.unmap();
        let mut ring = lock(&self.gpu.0.staging);
        if ring.len() < 8 {
            ring.push(staging);
        }
        Ok(bytes)
    }
}
