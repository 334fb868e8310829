//! The launches of a product, computed without a device.

use super::core::{Core, Problem};
use super::parts::Cut;
use crate::gpu::DeviceClass;
use crate::gpu::plan::Pass;
use crate::ops::reduction::reduce;

/// A product of two tensors, for [`plan`].
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Number of products in the batch.
    pub batch: usize,
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the inner axis.
    pub k: usize,
    /// Whether the left and the right operand are stored transposed.
    pub turned: [bool; 2],
    /// Whether both operands are f16.
    pub half: bool,
    /// The size of the adapter's cooperative matrices, if it has any.
    pub coop: Option<usize>,
    /// The kind of the right side and of the result.
    pub kind: ProductKind,
}

/// Where a product's right side comes from and its result goes to.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProductKind {
    /// Both are tensors. Only here may the inner axis be cut.
    #[default]
    Tensors,
    /// The right side is a weight that the loads compute. Its bytes are counted as if it were stored, which is an upper
    /// bound.
    Site,
    /// Rows are added to those rows of the result that a list names.
    Scattered,
}

/// Returns the passes of a product of two matrices or of batches, with the table's kernel and not the measured one. If
/// the inner axis is longer than one launch may take, or a dispatch would take seconds, more dispatches run.
#[doc(hidden)]
pub fn plan(class: &DeviceClass, sizes: Sizes) -> Vec<Pass> {
    let Sizes { batch, m, n, k, turned: [left, right], half, coop, kind } = sizes;
    // Operands are read in vectors if their rows are whole vectors, else element by element.
    let left = match (if left { m } else { k }).is_multiple_of(4) {
        true => {
            if left {
                "lhs_transposed"
            } else {
                "lhs_plain"
            }
        }
        false => "lhs_any",
    };
    let right = match (if right { k } else { n }).is_multiple_of(4) {
        _ if kind == ProductKind::Site => {
            if right {
                "rhs_site_transposed"
            } else {
                "rhs_site"
            }
        }
        true => {
            if right {
                "rhs_transposed"
            } else {
                "rhs_plain"
            }
        }
        false => "rhs_any",
    };
    let problem = Problem { m, n, k, batch, left, right, half, coop: None }.with(|| coop);
    let one = |problem: &Problem, parts: usize| {
        let core = Core::by_table(class, problem);
        let bytes = problem.operand_bytes() + 4.0 * (problem.batch * m * n) as f64;
        let (grid, source) = (core.grid(problem).map(|v| v as u32), core.source(class.lanes));
        Pass { op: "matmul".into(), source, entry: "main".into(), grid, parts, bytes, flops: problem.flops() }
    };
    let cut = Cut::of(class, &problem).filter(|_| batch == 1 && kind == ProductKind::Tensors);
    let Some(Cut { parts, len }) = cut else { return vec![one(&problem, 1)] };
    let mut all = vec![one(&Problem { k: len, batch: parts, ..problem }, parts)];
    if parts * len < k {
        all.push(one(&Problem { k: k - parts * len, ..problem }, 1));
    }
    all.extend(reduce::plan(class, [1, parts, m * n]));
    all
}
