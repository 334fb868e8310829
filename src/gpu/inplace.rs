//! Changes in place: parameters and optimizer state are the only memory that is written twice.
//!
//! A pending expression reads its operands when it is computed, not when it was written down. Whoever changes a buffer
//! that tensors hold computes first what still wants the old elements.

use super::buffer::Buffer;
use super::fuse::Value;
use super::{Gpu, lock};
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

    /// Those that are pending still; the others are forgotten.
    fn live(&mut self) -> Vec<Arc<Value>> {
        let mut live = Vec::new();
        self.values.retain(|value| match value.upgrade() {
            Some(value) if value.computed().is_none() => {
                live.push(value);
                true
            }
            _ => false,
        });
        live
    }
}

/// Computes values that were listed in the order of making.
fn compute(values: Vec<Weak<Value>>) {
    // Latest first: an expression computes what it inlines, and what only it held is gone when its turn comes. For
    // the same reason no handle is kept over the loop: a value that looks held is stored.
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

    /// Computes every pending value of this device.
    pub(crate) fn settle_all(&self) {
        let live = lock(&self.0.pending).live().iter().map(Arc::downgrade).collect();
        compute(live);
    }

    fn readers(&self, buffers: &[Arc<Buffer>]) -> Vec<Weak<Value>> {
        let live = lock(&self.0.pending).live();
        let mut known: HashSet<*const Value> = HashSet::new();
        // In the order of making, so that operands are known before what is made of them.
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

    /// Writes `bytes` at `offset` of a buffer in use: what is recorded or pending sees the old elements, what comes
    /// later the new ones.
    ///
    /// # Errors
    /// What the buffer carries; the device's fault, if one stands.
    pub(crate) fn overwrite(&self, buffer: &Arc<Buffer>, offset: u64, bytes: &[u8]) -> Result<()> {
        super::capture::refuse(self, "a write from the host")?;
        self.settle(std::slice::from_ref(buffer));
        self.check()?;
        let raw = buffer.data()?;
        let mut recorder = lock(&self.0.recorder);
        // The queue runs writes before every command of the next submit: the open batch must go first, and nothing
        // may be recorded in between.
        recorder.submit(self);
        self.write_words(raw, offset, bytes);
        buffer.touch();
        drop(recorder);
        self.check()
    }
}
