//! The look at ids before an op that takes them, on devices that check: what is outside a table is safe to run and still a mistake.

use crate::dtype::DType;
use crate::gpu::kernel::{Bind, Launch, MOST_TURNS, Work};
use crate::gpu::shader::Source;
use crate::ops::case::Case;
use crate::ops::words;
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
    let rest = [size as u32, slot, ignored.is_some() as u32, ignored.unwrap_or_default()];
    // As many as the loops of one workgroup's 256 threads may see.
    const SPAN: usize = 256 * (MOST_TURNS / 2);
    for first in (0..ids.count()).step_by(SPAN) {
        let end = ids.count().min(first + SPAN);
        let params = [&[first as u32, end as u32], &rest[..]].concat();
        let bind = Bind { binding: 1, size: table.size, buffer: table.clone(), offset: 0, write: true };
        gpu.launch(Launch {
            op: "check_ids",
            source: &source(),
            entry: "main",
            binds: vec![ids.bind(0), bind],
            params: words(&params),
            grid: [1, 1, 1],
            turns: (end - first).div_ceil(256),
            reuse: 1,
            work: Work::MOVES,
        });
    }
    gpu.findings_written();
}

pub(super) fn variants() -> Vec<Source> {
    vec![source()]
}

/// None of its own: cases of the ops that call it hold ids outside their tables.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
