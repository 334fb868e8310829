//! Changes in place. Parameters, optimizer state and caches are the only memory that is written more than once.
//!
//! A pending expression reads its operands when it is computed, not when it was written down. So before a buffer that
//! tensors hold is changed, all pending values that need the old elements are computed. A change is recorded as a whole
//! or not at all, under a lock of its own, so that a snapshot sees all tensors at one moment.

use super::buffer::Buffer;
use super::kernel::Launch;
use super::launch::Prepared;
use super::record::Recorder;
use super::value::{Place, Value};
use super::{Gpu, lock, plan, recording};
use crate::error::Result;
use std::collections::HashSet;
use std::sync::{Arc, Weak};

/// Values that were pending when they were made, oldest first.
#[derive(Default)]
pub(crate) struct Pending {
    values: Vec<Weak<Value>>,
    prune_at: usize,
}

impl Pending {
    pub fn push(&mut self, value: &Arc<Value>) {
        if self.values.len() >= self.prune_at.max(1024) {
            self.values.retain(|value| value.strong_count() > 0);
            self.prune_at = 2 * self.values.len();
        }
        self.values.push(Arc::downgrade(value));
    }

    /// Returns the values that are still pending, and forgets the others.
    fn live(&mut self) -> Vec<Arc<Value>> {
        let mut live = Vec::new();
        self.values.retain(|value| match value.upgrade() {
            Some(value) if !value.is_settled() => {
                live.push(value);
                true
            }
            _ => false,
        });
        live
    }
}

/// Computes values, which are listed in the order in which they were made.
fn compute(values: Vec<Weak<Value>>) {
    // Latest first: an expression computes the values that it inlines, and one that only this expression held is gone
    // when its turn comes. For the same reason the loop keeps no handles: a value that seems to be held elsewhere would
    // be stored.
    for value in values.iter().rev() {
        if let Some(value) = value.upgrade() {
            value.place();
        }
    }
}

impl Gpu {
    /// Computes every pending value that reads one of `buffers`, directly or through other pending values.
    pub(crate) fn settle(&self, buffers: &[Arc<Buffer>]) {
        compute(self.readers(buffers));
    }

    fn readers(&self, buffers: &[Arc<Buffer>]) -> Vec<Weak<Value>> {
        let live = lock(&self.0.pending).live();
        let mut known: HashSet<*const Value> = HashSet::new();
        // In the order in which they were made, so that operands come before the values that are made of them.
        for value in &live {
            let reads = value.operands().is_some_and(|operands| {
                operands.iter().any(|operand| match operand.computed() {
                    Some(place) => buffers.iter().any(|buffer| Arc::ptr_eq(buffer, &place.buffer)),
                    None => known.contains(&Arc::as_ptr(operand)),
                })
            });
            if reads {
                known.insert(Arc::as_ptr(value));
            }
        }
        live.iter().filter(|value| known.contains(&Arc::as_ptr(value))).map(Arc::downgrade).collect()
    }

    /// Launches kernels that change the buffers `changed`, all kernels or none. Pending values that need the old
    /// elements are computed first.
    ///
    /// # Errors
    /// An error that a buffer of the launches carries, a limit, a pipeline that cannot be made, or the device's fault.
    /// Then nothing is written and no buffer is marked: the caller knows, and the old elements stay valid. Only if the
    /// driver loses a batch between two of the launches is the change half done, and then the buffers `changed` carry
    /// the error.
    pub(crate) fn change(&self, changed: &[Arc<Buffer>], launches: &[Launch]) -> Result<()> {
        self.unchanged(|| self.change_now(changed, launches))
    }

    /// Like `change`, for callers inside [`Gpu::unchanged`].
    pub(crate) fn change_now(&self, changed: &[Arc<Buffer>], launches: &[Launch]) -> Result<()> {
        let done = self.try_change(changed, launches);
        if let Err(error) = &done {
            recording::failed(self, error);
        }
        done
    }

    fn try_change(&self, changed: &[Arc<Buffer>], launches: &[Launch]) -> Result<()> {
        self.check()?;
        for buffer in changed {
            buffer.data()?;
        }
        if self.plan_number().is_some() {
            launches.iter().try_for_each(|launch| self.possible(launch))?;
            launches.iter().for_each(|launch| self.note_pass(launch));
            return Ok(());
        }
        let ready = launches.iter().map(|launch| self.prepare(launch)).collect::<Result<Vec<_>>>()?;
        self.settle(changed);
        self.nothing_waits(changed, &ready)?;
        for (i, (launch, prepared)) in launches.iter().zip(ready).enumerate() {
            if let Err(error) = self.encode(launch, prepared, changed) {
                changed.iter().filter(|_| i > 0).for_each(|buffer| buffer.fail(&error));
                return Err(error);
            }
        }
        recording::changes(self, changed);
        changed.iter().for_each(|buffer| buffer.touch());
        Ok(())
    }

    /// Waits for the compiler, so that a change is not half done, nor made of what was never computed.
    fn nothing_waits(&self, changed: &[Arc<Buffer>], ready: &[Prepared]) -> Result<()> {
        for prepared in ready {
            prepared.pipeline.wait()?.as_ref().map_err(|error| self.raise(error.clone()))?;
        }
        self.compiled()?;
        changed.iter().try_for_each(|buffer| buffer.data().map(drop))
    }

    /// Waits for the compiler, so that all that cannot be computed carries its error.
    ///
    /// # Errors
    /// The device's fault, if one stands, or [`Error::Timeout`](crate::Error::Timeout).
    pub(crate) fn compiled(&self) -> Result<()> {
        lock(&self.0.recorder).finish(self)?;
        self.check()
    }

    /// Writes bytes at places of buffers in use, for callers inside [`Gpu::unchanged`]. Recorded and pending work sees
    /// the old elements, later work the new ones. A tensor whose contents were lost is valid again.
    ///
    /// # Errors
    /// If a buffer has no memory, or the device's fault, if one stands. Then nothing is written.
    pub(crate) fn overwrite_now(&self, writes: &[(Place, &[u8])]) -> Result<()> {
        recording::refuse(self, "a write from the host")?;
        let buffers: Vec<_> = writes.iter().map(|(place, _)| place.buffer.clone()).collect();
        // Checked before pending values are computed, because a fault would lose them.
        self.check()?;
        // The host writes even if dispatches are only planned.
        plan::aside(|| self.settle(&buffers));
        let raws = buffers.iter().map(|buffer| buffer.memory()).collect::<Result<Vec<_>>>()?;
        let mut recorder = lock(&self.0.recorder);
        // The queue runs writes before every command of the next submit. So the open batch must be submitted first, and
        // nothing may be recorded in between.
        recorder.submit(self)?;
        self.check()?;
        for (raw, (place, bytes)) in raws.iter().zip(writes) {
            self.write_words(raw, place.offset, bytes);
            place.buffer.heal();
            place.buffer.touch();
        }
        Ok(())
    }

    /// Runs `work` while nobody else changes a tensor in place, so that all that it copies is of one moment.
    pub(crate) fn unchanged<T>(&self, work: impl FnOnce() -> T) -> T {
        let _changing = lock(&self.0.changing);
        work()
    }

    /// Copies `bytes` bytes from one place to another. If that cannot be done, the target carries the error. The copy
    /// is not part of a recorded step.
    pub(crate) fn copy(&self, from: &Place, to: &Place, bytes: u64) {
        let mut recorder = lock(&self.0.recorder);
        // Its kernel may be refused.
        let copied = recorder.finish(self).and_then(|()| recorder.copy(self, from, to, bytes));
        drop(recorder);
        if let Err(error) = copied {
            to.buffer.fail(&error);
        }
    }

    /// Copies elements to buffers that these fill, each with its bytes, all of them or none. A target whose contents
    /// were lost is valid again. The copies are not part of a recorded step.
    ///
    /// # Errors
    /// The error of a tensor that is copied, missing memory, or the device's fault. Then the targets are as they were.
    pub(crate) fn copy_all(&self, copies: &[(Place, Place, u64)]) -> Result<()> {
        let mut recorder = lock(&self.0.recorder);
        // The kernels of what is copied may be refused.
        recorder.finish(self)?;
        self.check()?;
        for (from, to, _) in copies {
            from.buffer.data()?;
            to.buffer.memory()?;
        }
        for (from, to, bytes) in copies {
            to.buffer.heal();
            recorder.copy(self, from, to, *bytes)?;
        }
        Ok(())
    }
}

impl Recorder {
    /// Encodes a copy. Nothing may be waiting.
    fn copy(&mut self, gpu: &Gpu, from: &Place, to: &Place, bytes: u64) -> Result<()> {
        let (a, b) = (from.buffer.data()?, to.buffer.memory()?);
        if bytes > 0 {
            self.writes([&to.buffer]);
            self.encoder(gpu)?.copy_buffer_to_buffer(a, from.offset, b, to.offset, bytes);
        }
        Ok(())
    }
}
