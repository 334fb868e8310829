//! Readback through staging buffers, which are kept for reuse.

use super::buffer::Buffer;
use super::memory::size_class;
use super::{Gpu, lock, recording};
use crate::error::{Error, Result};
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};

/// Staging buffers that are kept.
const STAGED: usize = 32;

impl Gpu {
    /// Copies `bytes` bytes from `offset` of `buffer` to the host. Waits for all recorded work.
    pub(crate) fn read(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let reading = self.start_read(buffer, offset, bytes)?;
        reading.wait()
    }

    /// Begins a readback. This waits for the compiler, but not for the device.
    pub(crate) fn start_read(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Reading> {
        recording::refuse(self, "a readback")?;
        self.check()?;
        buffer.data()?;
        let padded = bytes.div_ceil(4) * 4;
        let staging = self.take_staging(padded.max(4))?;
        // The kernel that writes it may have been refused only now. Then there is nothing to copy.
        let index = self.submit_with_findings(|recorder| {
            if padded > 0
                && let Ok(raw) = buffer.data()
            {
                recorder.encoder(self)?.copy_buffer_to_buffer(raw, offset, &staging, 0, padded);
            }
            Ok(())
        })?;
        self.check()?;
        buffer.data()?;
        let (sender, receiver) = std::sync::mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |result| {
            let _ = sender.send(result);
        });
        let index = Some(index);
        Ok(Reading { gpu: self.clone(), staging: Some(staging), index, bytes, receiver })
    }

    fn take_staging(&self, bytes: u64) -> Result<wgpu::Buffer> {
        let mut ring = lock(&self.0.staging);
        if let Some(at) = ring.iter().position(|b| b.size() >= bytes && b.size() <= bytes.max(4096) * 4) {
            return Ok(ring.swap_remove(at));
        }
        drop(ring);
        let class = size_class(bytes).min(self.limits().max_buffer_size / 4 * 4).max(bytes);
        // Created before anything is recorded, because a copy to a buffer without memory would lose the whole open
        // batch.
        self.create_readable("readback", class).ok_or_else(|| {
            let message = format!("{:?}", self.memory_stats());
            Error::OutOfMemory { op: "a readback".into(), bytes: class, message }
        })
    }
}

/// A readback under way. Its commands are submitted. [`wait`](Reading::wait) blocks, [`poll`](Reading::poll) does not.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let x = Tensor::from_slice(&gpu, &[1u32, 2], [2]);
/// let mut reading = x.read::<u32>()?;
/// let bytes = loop {
///     match reading.poll()? {
///         Some(bytes) => break bytes,
///         None => std::thread::yield_now(), // other work may be done here
///     }
/// };
/// assert_eq!(bytes, [1, 0, 0, 0, 2, 0, 0, 0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
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
    /// The device's fault, if one stands. [`Error::Timeout`] if it takes too long. [`Error::Outside`] if the device
    /// checks ids and found some outside their range in work recorded before. This is reported once, whether or not
    /// these bytes depend on those ids.
    pub fn wait(self) -> Result<Vec<u8>> {
        self.wait_as(<[u8]>::to_vec)
    }

    /// Blocks like [`Reading::wait`], and fills `numbers` with f32 that are read, so that memory is used again.
    pub(crate) fn wait_into(self, numbers: &mut Vec<f32>) -> Result<()> {
        self.wait_as(|bytes| {
            numbers.resize(bytes.len() / 4, 0.0);
            bytemuck::cast_slice_mut::<f32, u8>(numbers).copy_from_slice(&bytes[..bytes.len() / 4 * 4]);
        })
    }

    fn wait_as<T>(mut self, copy: impl FnOnce(&[u8]) -> T) -> Result<T> {
        const WHAT: &str = "a readback";
        self.gpu.wait_for(self.index.take(), WHAT)?;
        // The callback runs in the poll above, or in another thread that is polling at this moment.
        let mapped = match self.gpu.0.wait {
            Some(limit) => self.receiver.recv_timeout(limit).map_err(|error| match error {
                RecvTimeoutError::Timeout => self.gpu.waited(WHAT),
                RecvTimeoutError::Disconnected => Error::device("a readback was dropped by the driver"),
            })?,
            None => {
                self.receiver.recv().map_err(|_| Error::device("a readback was dropped by the driver"))?
            }
        };
        self.take(mapped, copy)
    }

    /// Returns the bytes if they have arrived, else `None`. Never blocks.
    ///
    /// # Errors
    /// As for [`Reading::wait`].
    pub fn poll(&mut self) -> Result<Option<Vec<u8>>> {
        let polled = self.gpu.0.device.poll(wgpu::PollType::Poll);
        polled.map_err(|e| Error::device(format!("polling a readback: {e}")).because_of(e))?;
        match self.receiver.try_recv() {
            Ok(mapped) => self.take(mapped, <[u8]>::to_vec).map(Some),
            Err(TryRecvError::Empty) => self.gpu.check().map(|()| None),
            // The sender is dropped after it has sent once, so the bytes were taken before.
            Err(TryRecvError::Disconnected) => Err(Error::device("this readback was already taken")),
        }
    }

    fn take<T>(
        &mut self,
        mapped: Result<(), wgpu::BufferAsyncError>,
        copy: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        self.gpu.check()?;
        self.gpu.findings()?;
        mapped.map_err(|e| Error::device(format!("mapping a readback: {e}")).because_of(e))?;
        let staging = self.staging.take().ok_or_else(|| Error::device("this readback was already taken"))?;
        let view = staging.get_mapped_range(..).map_err(|e| Error::device(e.to_string()))?;
        let bytes = copy(&view[..self.bytes as usize]);
        drop(view);
        staging.unmap();
        let mut ring = lock(&self.gpu.0.staging);
        if ring.len() < STAGED {
            ring.push(staging);
        }
        Ok(bytes)
    }
}
