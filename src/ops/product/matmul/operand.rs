//! How a product reads its operands: in place where the layout allows vectors, else element by element or from a copy.

use crate::dtype::DType;
use crate::gpu::kernel::Part;
use crate::shape::{self, Shape};
use crate::tensor::Tensor;

/// One operand as the kernel reads it.
pub(super) struct Operand {
    pub fragment: &'static str,
    /// How its elements are stored.
    pub dtype: DType,
    pub part: Part,
    /// Offset, stride of the axis that is not contiguous, outer batch step, inner batch step.
    pub words: [usize; 4],
    /// Stride of the other axis, for `*_any`.
    pub any: usize,
}

impl Operand {
    /// What the kernel needs to read these elements, if they are not f32.
    pub fn word(dtype: DType, right: bool) -> Option<(&'static str, &'static str)> {
        match (dtype, right) {
            (DType::F16, false) => Some(("lhs_word", "lhs_f16")),
            (DType::F16, true) => Some(("rhs_word", "rhs_f16")),
            (DType::Bf16, false) => Some(("lhs_word", "lhs_bf16")),
            (DType::Bf16, true) => Some(("rhs_word", "rhs_bf16")),
            _ => None,
        }
    }
}

/// Sizes and steps of a tensor `[batch.., rows, cols]` in a product whose batches are (outer, inner).
struct Layout {
    words: [usize; 4],
    any: usize,
    by_rows: bool,
    vectors: bool,
}

impl Layout {
    fn of(x: &Tensor, [outer, inner]: [usize; 2]) -> Layout {
        let axes = x.shape().len();
        let (rows, cols) = (x.shape()[axes - 2], x.shape()[axes - 1]);
        let (row_step, col_step) = (x.strides[axes - 2], x.strides[axes - 1]);
        let by_rows = col_step == 1 || cols == 1;
        let (along, step, unit) =
            if by_rows { (cols, row_step, col_step) } else { (rows, col_step, row_step) };
        let vectors = unit == 1 && [along, step, outer, inner, x.offset].iter().all(|v| v % 4 == 0);
        Layout { words: [x.offset, step, outer, inner], any: col_step, by_rows, vectors }
    }
}

impl Layout {
    /// The fragment that reads this layout.
    fn fragment(&self, right: bool) -> &'static str {
        match (right, self.vectors, self.by_rows) {
            (false, true, true) => "lhs_plain",
            (false, true, false) => "lhs_transposed",
            (false, false, _) => "lhs_any",
            (true, true, true) => "rhs_plain",
            (true, true, false) => "rhs_transposed",
            (true, false, _) => "rhs_any",
        }
    }
}

/// Prepares `x` to be read as `[batch.., rows, cols]`, on the left side (`cols` = k) or, if `right`, on the right side
/// (`rows` = k).
pub(super) fn operand(x: &Tensor, batch: &Shape, right: bool) -> Operand {
    let mut x = x.clone();
    let axes = x.shape().len();
    let mut steps = steps(&x, batch);
    if steps.is_none() || (x.strides[axes - 1] != 1 && x.strides[axes - 2] != 1 && x.count() > 0) {
        x = x.contiguous();
        steps = self::steps(&x, batch);
    }
    if steps.is_none() {
        // Batch axes that do not merge into two are expanded in memory.
        let mut sizes = batch.to_vec();
        sizes.extend(&x.shape()[axes - 2..]);
        x = x.expand(&sizes[..]).contiguous();
        steps = self::steps(&x, batch);
    }
    let layout = Layout::of(&x, steps.expect("contiguous batches merge"));
    let dtype = x.dtype();
    if dtype.is_half() && !layout.vectors {
        return operand(&x.cast(DType::F32), batch, right);
    }
    let fragment = layout.fragment(right);
    let Layout { mut words, mut any, .. } = layout;
    if !layout.vectors {
        // In `*_any` the first stride is that of m or n, the other that of k.
        let (row_step, col_step) = (x.strides[x.shape().len() - 2], any);
        (words[1], any) = if right { (col_step, row_step) } else { (row_step, col_step) };
    }
    let part = x.value.place().part(x.dtype().buffer_bytes(x.value.count));
    Operand { fragment, dtype, part, words, any }
}

/// Returns the steps of the outer and inner batch, if the batch axes merge into two.
fn steps(x: &Tensor, batch: &Shape) -> Option<[usize; 2]> {
    let axes = x.shape().len();
    let own = Shape::new(&x.shape()[..axes - 2]);
    let strides = shape::expand_strides("matmul", &own, &x.strides, batch);
    match batch.len() {
        0 => Some([0, 0]),
        1 => Some([0, strides[0]]),
        2 => Some([strides[0], strides[1]]),
        _ => {
            let last = strides[batch.len() - 1];
            let (sizes, merged) = shape::collapse(&Shape::new(&batch[..batch.len() - 1]), &[strides]);
            match sizes.len() {
                0 => Some([0, last]),
                1 => Some([merged[0][0], last]),
                _ => None,
            }
        }
    }
}
