//! The look at ids before an op that takes them, on devices that check: what is outside a table is safe to run and still a mistake.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, MOST_TURNS, Part};
use crate::gpu::shader::Source;
use crate::ops::case::Case;
use crate::tape::no_grad;
use crate::tensor::Tensor;

fn source() -> Source {
    Source::file("check_ids")
}

/// On a device that checks, the next readback says when some of `ids`, u32 or i32, are not in `0..size`; those whose bits are
/// `ignored` may be anywhere. Elsewhere nothing is launched.
pub(in crate::ops) fn check_ids(op: &'static str, ids: &Tensor, size: usize, ignored: Option<u32>) {
    let gpu = ids.gpu();
    if !gpu.is_checked() || ids.count() == 0 || ids.dtype().is_float() {
        return;
    }
    let signed = ids.dtype() == DType::I32;
    let ids = no_grad(|| ids.detach().contiguous());
    ids.compute();
    // What was never computed has no ids, and must not spoil the table of findings.
    if gpu.check().is_err() || ids.check().is_err() {
        return;
    }
    let (table, slot) = gpu.findings_slot(op, size as u64, signed);
    // As many as the loops of one workgroup's 256 threads may see.
    const SPAN: usize = 256 * (MOST_TURNS / 2);
    for first in (0..ids.count()).step_by(SPAN) {
        let end = ids.count().min(first + SPAN);
        let found = Part { buffer: table.clone(), offset: 0, size: table.size };
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

/// None of its own: cases of the ops that call it hold ids outside their tables.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
