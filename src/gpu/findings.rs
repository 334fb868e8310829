//! Findings: ids outside their range, which kernels note on the device and the next readback reports.
//!
//! Each pair of an op and a size has a slot of 16 bytes in a table on the device: how many ids were outside, the first
//! such place, and the id there. A readback copies the tables and clears them. The readback that finds the copy on the
//! host reports its contents, once.

use super::buffer::Buffer;
use super::record::Recorder;
use super::{Gpu, lock};
use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Release};
use std::sync::mpsc::{Receiver, TryRecvError, channel};

/// Slots of one table.
const SLOTS: usize = 64;
const SLOT_BYTES: u64 = 16;
const TABLE_BYTES: u64 = SLOTS as u64 * SLOT_BYTES;

/// The op and the size whose findings a slot holds.
#[derive(Clone, Copy, PartialEq)]
struct Site {
    op: &'static str,
    size: u64,
    /// Whether ids are i32.
    signed: bool,
}

/// A copy of all tables on its way to the host.
struct Coming {
    staging: wgpu::Buffer,
    receiver: Receiver<Result<(), wgpu::BufferAsyncError>>,
}

/// The tables and their copies.
#[derive(Default)]
pub(crate) struct Findings {
    sites: Vec<Site>,
    tables: Vec<Arc<Buffer>>,
    coming: Vec<Coming>,
}

impl Gpu {
    /// Returns the table, and the slot in it, for findings in ids of `op`, which must be in `0..size`.
    pub(crate) fn findings_slot(&self, op: &'static str, size: u64, signed: bool) -> (Arc<Buffer>, u32) {
        let site = Site { op, size, signed };
        let mut findings = lock(&self.0.findings);
        let at = findings.sites.iter().position(|s| *s == site).unwrap_or_else(|| {
            findings.sites.push(site);
            findings.sites.len() - 1
        });
        let (table, slot) = (at / SLOTS, at % SLOTS);
        // Uploaded rather than allocated, because an upload never uses the memory of a recorded step, which replays
        // overwrite.
        let fresh = || {
            let table = self.upload("check_ids", &[0; TABLE_BYTES as usize], TABLE_BYTES);
            table.spare();
            table
        };
        match findings.tables.get(table) {
            None => findings.tables.push(fresh()),
            Some(old) if old.data().is_err() => findings.tables[table] = fresh(),
            Some(_) => {}
        }
        (findings.tables[table].clone(), slot as u32)
    }

    /// Notes that a kernel which writes findings was recorded. Every replay of it notes this again.
    pub(crate) fn findings_written(&self) {
        self.0.findings_written.store(true, Release);
        let written = self.0.findings_written.clone();
        self.each_replay(move || written.store(true, Release));
    }

    /// Records `work` and submits everything, with a copy of the findings if there may be new ones.
    pub(super) fn submit_with_findings(
        &self,
        work: impl FnOnce(&mut Recorder) -> Result<()>,
    ) -> Result<wgpu::SubmissionIndex> {
        let written = self.0.findings_written.swap(false, AcqRel);
        let tables = if written { lock(&self.0.findings).tables.clone() } else { vec![] };
        let mut recorder = lock(&self.0.recorder);
        // From here on nothing waits for the compiler, so that nothing of this is done by half.
        if let Err(error) = recorder.finish(self).and_then(|()| work(&mut recorder)) {
            self.0.findings_written.fetch_or(written, Release);
            return Err(error);
        }
        let staging = (!tables.is_empty()).then(|| self.copy_findings(&mut recorder, &tables)).flatten();
        if written && staging.is_none() {
            // No memory for the copy now: the next readback tries again.
            self.0.findings_written.store(true, Release);
        }
        let index = recorder.submit(self);
        drop(recorder);
        if let Some(staging) = staging {
            let (sender, receiver) = channel();
            staging.map_async(wgpu::MapMode::Read, .., move |result| {
                let _ = sender.send(result);
            });
            lock(&self.0.findings).coming.push(Coming { staging, receiver });
        }
        index
    }

    fn copy_findings(&self, recorder: &mut Recorder, tables: &[Arc<Buffer>]) -> Option<wgpu::Buffer> {
        let staging = self.create_readable("findings", tables.len() as u64 * TABLE_BYTES)?;
        let encoder = recorder.encoder(self).ok()?;
        for (at, table) in tables.iter().enumerate() {
            if let Ok(raw) = table.data() {
                encoder.copy_buffer_to_buffer(raw, 0, &staging, at as u64 * TABLE_BYTES, TABLE_BYTES);
                encoder.clear_buffer(raw, 0, Some(TABLE_BYTES));
            }
        }
        Some(staging)
    }

    /// Returns the first finding that has arrived on the host, as `Err`. All that have arrived are then forgotten.
    pub(super) fn findings(&self) -> Result<()> {
        let Findings { sites, coming, .. } = &mut *lock(&self.0.findings);
        let mut first = None;
        coming.retain(|copy| match copy.receiver.try_recv() {
            Err(TryRecvError::Empty) => true,
            Ok(Ok(())) => {
                first = first.take().or(copy.first(sites));
                false
            }
            // A lost device is reported as its fault.
            Ok(Err(_)) | Err(TryRecvError::Disconnected) => false,
        });
        first.map_or(Ok(()), Err)
    }
}

impl Coming {
    fn first(&self, sites: &[Site]) -> Option<Error> {
        let view = self.staging.get_mapped_range(..).ok()?;
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&view[..]);
        let (slots, _) = words.as_chunks::<4>();
        sites.iter().zip(slots).find_map(|(site, &[count, place, id, _])| {
            let id = if site.signed { i64::from(id.cast_signed()) } else { i64::from(id) };
            (count > 0).then(|| Error::Outside {
                op: site.op.into(),
                place: place.into(),
                id,
                size: site.size,
                count: count.into(),
            })
        })
    }
}
