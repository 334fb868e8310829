//! Device memory: buffers by size class, uploads that respect the open batch, and the memory of recorded steps.

use super::buffer::{Buffer, Memory, MemoryStats, Pool};
use super::{Gpu, lock, recording};
use crate::error::{Error, Result};
use crate::files::size;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// Rounds a size up to its class. There are four classes per octave, so at most a quarter of a large buffer is wasted,
/// and similar sizes share buffers.
pub(super) fn size_class(bytes: u64) -> u64 {
    let bytes = bytes.max(256);
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.div_ceil(step) * step
}

/// How often free buffers are given back to the driver before a request is refused.
const MOST_TRIMS: usize = 16;

/// Bytes of a buffer that is being created, which no pool counts yet. They are given back when this is dropped.
struct Admitted<'a> {
    creating: &'a Mutex<u64>,
    bytes: u64,
}

impl Admitted<'_> {
    /// From here on the pool counts the bytes. In between, nobody sees them twice or not at all.
    fn count_in(mut self, pool: &Mutex<Pool>) {
        let mut creating = lock(self.creating);
        lock(pool).take(self.bytes);
        *creating -= std::mem::take(&mut self.bytes);
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            *lock(self.creating) -= self.bytes;
        }
    }
}

impl Gpu {
    /// Returns a buffer of at least `bytes` bytes, with arbitrary contents. If it cannot be made, it has no memory and
    /// carries the error.
    pub(crate) fn alloc(&self, op: &str, bytes: u64) -> Arc<Buffer> {
        self.alloc_in(op, bytes, &recording::pool(self))
    }

    pub(crate) fn alloc_in(&self, op: &str, bytes: u64, pool: &Arc<Mutex<Pool>>) -> Arc<Buffer> {
        let buffer = self.take_buffer(op, [bytes, size_class(bytes)], u64::MAX, pool);
        let mut pool = lock(pool);
        if pool.of_step {
            // Dropped buffers are only removed when the list is full, because a long step has many temporaries.
            if pool.lent.len() == pool.lent.capacity() {
                pool.lent.retain(|buffer| buffer.strong_count() > 0);
            }
            pool.lent.push(Arc::downgrade(&buffer));
        }
        buffer
    }

    /// Returns a buffer of at least `bytes`, and of `class` bytes if no limit is in the way.
    fn take_buffer(
        &self,
        op: &str,
        [bytes, class]: [u64; 2],
        newest_epoch: u64,
        pool: &Arc<Mutex<Pool>>,
    ) -> Arc<Buffer> {
        let mut buffer = Buffer::new(self, bytes, None);
        match self.try_take(op, [bytes, class], newest_epoch, pool) {
            Ok(raw) => buffer.memory = Some(Memory { raw, home: Arc::downgrade(pool) }),
            Err(error) => buffer.refused = Some(error),
        }
        Arc::new(buffer)
    }

    /// Checks that one tensor may have this many bytes.
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

    fn try_take(
        &self,
        op: &str,
        [bytes, class]: [u64; 2],
        newest_epoch: u64,
        from: &Mutex<Pool>,
    ) -> Result<wgpu::Buffer> {
        self.fits(op, bytes)?;
        let class = class.min(self.most_bytes() / 4 * 4).max(bytes);
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
        let mut raw = self.create(op, class, from);
        // The pool's free buffers may be of other sizes. They go back to the driver once the work on them is done. Meanwhile
        // other threads may let go of buffers, so this is tried again as long as there are some.
        for _ in 0..MOST_TRIMS {
            if raw.is_some() || class > self.0.most_memory {
                break;
            }
            let _ = self.wait_idle();
            self.trim();
            raw = self.create(op, class, from);
            if raw.is_none() && lock(&self.0.pool).stats.free == 0 {
                break;
            }
        }
        // This is no fault of the device: only what needs this buffer cannot be computed.
        let raw = raw.ok_or_else(|| {
            let limit = match self.0.most_memory {
                u64::MAX => String::new(),
                most => format!("at most {} are allowed (Options::memory, TIEBEAM_MEMORY); ", size(most)),
            };
            let message = format!("{limit}{:?}", self.memory_stats());
            Error::OutOfMemory { op: op.into(), bytes: class, message }
        })?;
        let held = self.held_by_steps();
        let mut pool = lock(&self.0.pool);
        let stats = &mut pool.stats;
        stats.created += 1;
        stats.most_used = stats.most_used.max(stats.used + held);
        stats.peak = stats.peak.max(stats.used + stats.free + held);
        Ok(raw)
    }

    /// Makes a new buffer of a pool. `None` if the device has no memory for it, or if the options do not allow as much.
    fn create(&self, op: &str, bytes: u64, of: &Mutex<Pool>) -> Option<wgpu::Buffer> {
        let admitted = self.admit(bytes)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let raw = self.create_for(op, bytes, usage)?;
        admitted.count_in(of);
        Some(raw)
    }

    /// Reserves bytes for a buffer. `None` if that would be more than the options allow, beside what is held now and what
    /// other threads are creating.
    fn admit(&self, bytes: u64) -> Option<Admitted<'_>> {
        let mut creating = lock(&self.0.creating);
        if self.0.most_memory < u64::MAX {
            let stats = self.memory_stats();
            let held = stats.used.saturating_add(stats.free).saturating_add(*creating);
            if held.saturating_add(bytes) > self.0.most_memory {
                return None;
            }
        }
        *creating += bytes;
        Some(Admitted { creating: &self.0.creating, bytes })
    }

    /// Makes a new buffer that the host can read. `None` if there is no memory for it.
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

    /// Returns a buffer of `padded` bytes that begins with `bytes`.
    pub(crate) fn upload(&self, op: &str, bytes: &[u8], padded: u64) -> Arc<Buffer> {
        self.upload_in(op, bytes, [padded, size_class(padded)])
    }

    /// [`Gpu::upload`] for what stays on the device, such as a model's weights: the buffer is no larger than they are.
    pub(crate) fn upload_resident(&self, op: &str, bytes: &[u8], padded: u64) -> Arc<Buffer> {
        self.upload_in(op, bytes, [padded, padded.next_multiple_of(256)])
    }

    fn upload_in(&self, op: &str, bytes: &[u8], sizes: [u64; 2]) -> Arc<Buffer> {
        let [padded, _] = sizes;
        // `write_buffer` runs before every command of the next submit, so a buffer that the open batch still reads must
        // not be its target. Only buffers that were released in earlier batches qualify.
        let epoch = self.0.epoch.load(Ordering::Acquire);
        // Never from a recorded step's pool, because a replay overwrites the temporaries there but repeats no upload.
        let buffer = self.take_buffer(op, sizes, epoch, &self.0.pool);
        if let Ok(raw) = buffer.data() {
            self.write_words(raw, 0, bytes);
            lock(&self.0.recorder).uploaded(self, padded);
        }
        buffer
    }

    /// Writes before the commands of the next submit. The last word is padded with zeros.
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
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::ones(&gpu, [1000]);
    /// x.evaluate();
    /// assert!(gpu.memory_stats().used >= 4000);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
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

    /// Returns a pool for a step that will be recorded, and the recording's number, which is above 0.
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

    /// Returns another buffer over the same memory, for a tensor that outlives the recording and that replays write.
    /// Those who hold `buffer` itself get a copy when the pool is closed. A buffer of another pool is returned
    /// unchanged.
    pub(crate) fn heir(&self, buffer: &Arc<Buffer>, pool: &Arc<Mutex<Pool>>) -> Arc<Buffer> {
        let Some(memory) = buffer.held().filter(|_| buffer.is_of(pool) && buffer.whole.is_none()) else {
            return buffer.clone();
        };
        let (raw, home) = (memory.raw.clone(), Arc::downgrade(&self.0.pool));
        lock(&self.0.pool).take(raw.size());
        lock(pool).inherited += raw.size();
        let heir = Arc::new(Buffer::new(self, buffer.size, Some(Memory { raw, home })));
        self.note_planned("step", &heir);
        heir
    }

    /// Ends the recording of a step: from here on, its pool's memory belongs to the replays. Buffers that the step's
    /// code made and somebody still holds keep the elements of the recorded run, in memory of the device's pool.
    pub(crate) fn close(&self, pool: &Arc<Mutex<Pool>>) {
        let lent = {
            let mut pool = lock(pool);
            pool.free.clear();
            pool.closed = true;
            std::mem::take(&mut pool.lent)
        };
        for buffer in lent.iter().filter_map(Weak::upgrade) {
            let Ok(old) = buffer.data() else { continue };
            match self.moved(&buffer, old) {
                Ok(memory) => drop(buffer.moved.set(memory)),
                Err(error) => buffer.fail(&error),
            }
        }
    }

    /// Returns memory of the device's pool with a copy of the buffer's elements.
    fn moved(&self, buffer: &Arc<Buffer>, old: &wgpu::Buffer) -> Result<Memory> {
        let raw = self.try_take("step", [buffer.size, size_class(buffer.size)], u64::MAX, &self.0.pool)?;
        let bytes = buffer.size.next_multiple_of(4).min(old.size());
        let mut recorder = lock(&self.0.recorder);
        recorder.encoder(self)?.copy_buffer_to_buffer(old, 0, &raw, 0, bytes);
        recorder.writes([buffer]);
        drop(recorder);
        Ok(Memory { raw, home: Arc::downgrade(&self.0.pool) })
    }

    /// Gives the pool's free buffers back to the driver and returns their size in bytes.
    pub fn trim(&self) -> u64 {
        lock(&self.0.recorder).groups.clear();
        let mut pool = lock(&self.0.pool);
        pool.free.clear();
        std::mem::take(&mut pool.stats.free)
    }
}
