//! Copies that change the fastest axis, block by block. Element by element, one side would touch a cache line per
//! element.

use super::kernel::Launch;
use super::shader::Source;
use super::value::{Place, Value};
use crate::dtype::DType;
use crate::shape::{Shape, Strides, collapse};

/// A copy `[batch, rows, cols]` of an array in which `rows` is the fastest axis.
pub(crate) struct Transpose {
    batch: usize,
    rows: usize,
    cols: usize,
    /// Offsets in the array: of its first element, between batches, and between columns.
    steps: [usize; 3],
}

impl Transpose {
    /// Returns the copy that makes `shape` contiguous, if it is such a transpose of 32-bit elements and all sizes and
    /// steps are multiples of four.
    pub fn of(dtype: DType, shape: &Shape, strides: &Strides, offset: usize) -> Option<Transpose> {
        let (sizes, merged) = collapse(shape, std::slice::from_ref(strides));
        let (sizes, steps) = (&sizes[..], &merged[0][..]);
        let (batch, batch_step, sizes, steps) = match sizes.len() {
            2 => (1, 0, sizes, steps),
            3 => (sizes[0], steps[0], &sizes[1..], &steps[1..]),
            _ => return None,
        };
        let whole = [offset, batch_step, steps[1], sizes[0], sizes[1]].iter().all(|v| v.is_multiple_of(4));
        let fits = dtype.size() == 4
            && steps[0] == 1
            && steps[1] > 0
            && whole
            && batch < 1 << 16
            && sizes[0].max(sizes[1]) <= 32 * 65535;
        let [rows, cols] = [sizes[0], sizes[1]];
        fits.then_some(Transpose { batch, rows, cols, steps: [offset, batch_step, steps[1]] })
    }

    /// Copies from `x` to `y`.
    pub fn run(&self, x: &Value, y: &Place) {
        let from = x.place();
        let bytes = x.dtype.buffer_bytes(x.count);
        let to = x.dtype.buffer_bytes(self.batch * self.rows * self.cols);
        let [rows, cols, offset, batch_step, row_step] =
            [self.rows, self.cols, self.steps[0], self.steps[1], self.steps[2]].map(|v| v / 4);
        let groups = |size: usize| size.div_ceil(32) as u32;
        let grid = [groups(self.rows), groups(self.cols), self.batch as u32];
        x.gpu.launch(
            Launch::new("transpose", &Source::file("transpose"), "main", grid)
                .bind("x", from.part(bytes))
                .bind_mut("y", y.part(to))
                .set("rows", rows)
                .set("cols", cols)
                .set("offset", offset)
                .set("batch_step", batch_step)
                .set("row_step", row_step)
                .turns(0),
        );
    }
}
