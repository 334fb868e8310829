//! The launches of a product, computed without a device.

use super::core::{Core, Problem};
use super::parts::{Cut, Join};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::plan::Pass;

/// A product of two tensors, for [`plan`].
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProductKind {
    /// Both are tensors.
    #[default]
    Tensors,
    /// The right side is a weight that the loads compute. Its bytes are counted as if it were stored, which is an upper
    /// bound.
    Site,
    /// The right side is a packed weight with so many bits for each element, scales included.
    Packed(u32),
    /// Rows are added to those rows of the result that a list names.
    Scattered,
}

/// Returns the passes of a product of two matrices or of batches, with the table's kernel and not the measured one. If
/// the inner axis is longer than one launch may take, or a dispatch would take seconds, more dispatches run.
pub fn plan(class: &DeviceClass, sizes: Sizes) -> Vec<Pass> {
    let Sizes { batch, m, n, k, turned: [left, right], half, coop, kind } = sizes;
    let dtype = if half { DType::F16 } else { DType::F32 };
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
        _ if right && matches!(kind, ProductKind::Packed(_)) => "rhs_packed",
        _ if matches!(kind, ProductKind::Site | ProductKind::Packed(_)) => {
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
    let bits = if let ProductKind::Packed(bits) = kind { Some(bits as f64) } else { None };
    let problem = Problem { m, n, k, batch, left, right, dtype, coop: None, bits }.with(|| coop);
    let cut = Cut::of(class, &problem).unwrap_or(Cut { parts: 1, len: k });
    let part = cut.part_of(&problem);
    let core = Core::by_table(class, &part);
    let (grid, source) = (core.grid(&part).map(|v| v as u32), core.source(class));
    let (results, op) = (problem.result_bytes(), "matmul".to_string());
    let bytes = problem.operand_bytes() + cut.parts as f64 * results;
    let entry = "main".to_string();
    let first = Pass { op, source, entry, grid, parts: cut.parts, bytes, flops: problem.flops() };
    if cut.parts == 1 {
        return vec![first];
    }
    let join = Join::of(class, [batch, m, n], cut.parts);
    let (source, grid) = (join.source(n), join.grid);
    let bytes = (cut.parts + 1) as f64 * results;
    let join = Pass { source, grid, parts: 1, bytes, flops: 0.0, ..first.clone() };
    vec![first, join]
}
