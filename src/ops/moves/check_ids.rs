//! Checks ids before an op that uses them, on devices that check. An id outside its table is safe to use, but still a
//! mistake.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, MOST_TURNS, Part};
use crate::gpu::shader::Source;
use crate::ops::case::Case;
use crate::tape::no_grad;
use crate::tensor::Tensor;

fn source() -> Source {
    Source::file("check_ids")
}

/// On a device that checks, makes the next readback report if some of `ids`, u32 or i32, are not in `0..size`. Ids with
/// the bits `ignored` may have any value. On other devices nothing is launched.
pub(in crate::ops) fn check_ids(op: &'static str, ids: &Tensor, size: usize, ignored: Option<u32>) {
    let gpu = ids.gpu();
    if !gpu.is_checked() || ids.count() == 0 || ids.dtype().is_float() {
        return;
    }
    let signed = ids.dtype() == DType::I32;
    let ids = no_grad(|| ids.detach().contiguous());
    ids.compute();
    // Ids that were never computed have no values, and must not spoil the table of findings.
    if gpu.check().is_err() || ids.check().is_err() {
        return;
    }
    let (table, slot) = gpu.findings_slot(op, size as u64, signed);
    // The most ids that the loops of one workgroup's 256 threads may check.
    const SPAN: usize = 256 * (MOST_TURNS / 2);
    for first in (0..ids.count()).step_by(SPAN) {
        let end = ids.count().min(first + SPAN);
        let found = Part::whole(&table);
        gpu.launch(
            Launch::new("check_ids", &source(), "main", [1, 1, 1])
                .bind("ids", &ids)
                .bind_mut("found", found)
                .set("first", first)
                .set("n", end)
                .set("size", size)
                .set("slot", slot)
                .set("ignores", ignored.is_some())
                .set("ignored", ignored.unwrap_or_default())
                .turns((end - first).div_ceil(256)),
        );
    }
    gpu.findings_written();
}

/// No cases: those of the ops that call it include ids outside their tables.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
