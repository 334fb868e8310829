//! Products whose rows share a matrix, or atoms of which matrices are made, and differ in what is added or how atoms are
//! combined. One product has all rows, and what differs is part of the pass that adds up its parts. Nothing here is
//! recorded on the tape.

use super::matmul::product::{Product, Right};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, Work};
use crate::gpu::shader::Source;
use crate::ops::moves::check_ids::check_ids;
use crate::tensor::Tensor;

/// Low-rank parts of several depths.
pub(crate) struct Parts<'a> {
    /// `A` of all depths, one below the other: `[depths * rank, in]`.
    pub into: &'a Tensor,
    /// `B [depths, rank, out]`.
    pub back: &'a Tensor,
    pub scale: f32,
}

/// The most rows of a grid's second axis that every adapter launches.
const MOST_ROWS: usize = 65535;

/// Whether [`depths`] can compute this many rows and is faster than products of their own: on CPU drivers, which take both
/// sides of a branch, it is not.
pub(crate) fn takes_rows(class: &DeviceClass, rows: usize) -> bool {
    (1..=MOST_ROWS).contains(&rows) && !class.is_cpu()
}

/// Returns `y[i] = x[i] W^T + scale x[i] A_d^T B_d` with `d = depths[i]`, for `x [rows, in]`, `W [out, in]` and
/// `depths [rows]` of u32, in two dispatches (three if a thread's loops would be too long). A row at a depth that does
/// not exist has the shared part only.
///
/// `A` of all depths is computed beside `W`, as `depths * rank` further columns: with `rank` much below `out` that costs
/// little, and rows need not be sorted by depth.
pub(crate) fn depths(op: &'static str, x: &Tensor, w: &Tensor, own: Parts, depths: &Tensor) -> Tensor {
    let (rows, out) = (x.shape()[0], w.shape()[0]);
    let Parts { into, back, scale } = own;
    let [count, rank] = [back.shape()[0], back.shape()[1]];
    let columns = out + into.shape()[0];
    let (x, w) = (x.contiguous(), crate::ops::float(op, w).contiguous());
    let (into, back) = (crate::ops::float(op, into).contiguous(), crate::ops::float(op, back).contiguous());
    let (sums, parts) = Product::new(op, &x, Right::Stacked(&w, &into)).sums(&[rows, columns]);
    let four = out.is_multiple_of(4) && columns.is_multiple_of(4);
    let piece = if four { 4 } else { 1 };
    let source = Source::file("mixed_depth");
    let source = if four { source.alias("Elem", "vec4<f32>") } else { source };
    let y = Tensor::empty(x.gpu(), op, [rows, out], DType::F32);
    let grid = [(out / piece).div_ceil(64) as u32, rows as u32, 1];
    let launch = Launch::new(op, &source, "main", grid)
        .bind("sums", &sums)
        .bind("low", &sums)
        .bind("back", &back)
        .bind("depths", &depths.contiguous())
        .bind_mut("y", &y)
        .set("rows", rows)
        .set("out", out / piece)
        .set("width", columns / piece)
        .set("parts", parts)
        .set("depths", count)
        .set("rank", rank)
        .set("first", out)
        .set("columns", columns)
        .set("scale", scale)
        .turns(parts + rank.div_ceil(64) * (parts + 64 + 2))
        .work(Work::flops(2.0 * (rows * rank * out) as f64));
    x.gpu().launch(launch);
    y
}

/// Returns `y[i] = x[i] (sum over s of coefficients[layers[i], s] D_s)^T`, for `x [rows, in]`, `atoms D [S, out, in]`,
/// `coefficients [layers, S]` and `layers [rows]` of u32, in two dispatches. A row at a layer that does not exist is zero.
///
/// The products with all atoms are one batch whose results are added up as parts of an inner axis are, each row with
/// coefficients of its own. Atoms are read once, however many layers there are.
pub(crate) fn layers(
    op: &'static str,
    x: &Tensor,
    atoms: &Tensor,
    coefficients: &Tensor,
    layers: &Tensor,
) -> Tensor {
    let float = |x: &Tensor| crate::ops::float(op, x).contiguous();
    let (x, atoms, coefficients) = (float(x), float(atoms), float(coefficients));
    let ([count, out], rows) = ([atoms.shape()[0], atoms.shape()[1]], x.shape()[0]);
    let (batch, turned) = (x.unsqueeze(0), atoms.transpose(1, 2));
    check_ids(op, layers, coefficients.shape()[0], None);
    let product = Product::new(op, &batch, Right::Tensor(&turned));
    let (sums, parts) = product.sums(&[count, rows, out]);
    let y = Tensor::empty(x.gpu(), op, [rows, out], DType::F32);
    product.join_weighted(&sums, &y, parts, [&layers.contiguous(), &coefficients]);
    y
}
