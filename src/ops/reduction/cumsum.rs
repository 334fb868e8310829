//! Cumulative sums along an axis, from either end, and the scan that cumulative products use too. The order depends on the sizes only, so the bits are
//! the same every time.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::shape;
use crate::tape::{Op, Sink};
use crate::tensor::Tensor;

/// Rows up to this length are cheaper with one thread each than with a workgroup.
const SHORT: usize = 32;

/// What a scan does with the elements.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scan {
    Sum,
    Product,
}

fn source(dtype: DType, kind: Scan) -> Source {
    let fragment = if kind == Scan::Sum { "reduce_sum" } else { "reduce_product" };
    // Integers wrap, so signed sums and products have the same bits as unsigned ones.
    let elem = if dtype.is_float() { "f32" } else { "u32" };
    Source::file("cumsum").alias("Elem", elem).slot("combine", fragment)
}

/// Returns the number of parts to cut an axis into: enough to fill a device, each long enough to be worth its own pass,
/// but no longer than a workgroup's 16 rounds or a thread's 32 blocks.
fn pieces(size: usize, results: usize, rows: bool) -> usize {
    let (enough, least, most) = if rows { (256, 4096, 16 * 256) } else { (4096, 256, 32 * 32) };
    (enough / results.max(1)).min(size / least).max(size.div_ceil(most)).max(1)
}

/// The sums or products of all elements up to each one along the axis, or from each one on if `reverse`.
pub(super) fn scan(op: &'static str, kind: Scan, x: &Tensor, axis: usize, reverse: bool) -> Tensor {
    let gpu = x.gpu();
    let x = x.contiguous();
    let (outer, size, inner) = x.shape().split_at_axis(axis);
    let y = Tensor::empty(gpu, op, x.shape(), x.dtype());
    if y.count() == 0 {
        return y;
    }
    let rows = inner == 1 && size > SHORT;
    let parts = pieces(size, outer * inner, rows);
    let results = outer * parts * inner;
    let grid = grid(if rows { results } else { results.div_ceil(64) });
    let source = source(x.dtype(), kind);
    let launch = |entry: &'static str, y: &Tensor| {
        let span = size.div_ceil(parts);
        // A round has six steps over the lanes. A thread's elements come in blocks of 32.
        let turns = if rows { span.div_ceil(256) * 8 } else { span + span / 32 + 1 };
        Launch::new(op, &source, entry, grid)
            .bind("x", &x)
            .bind_mut("y", y)
            .set("results", results)
            .set("axis", size)
            .set("inner", inner)
            .set("parts", parts)
            .set("span", span)
            .set("reverse", reverse)
            .turns(turns)
    };
    let [total, run] = if rows { ["row_totals", "rows"] } else { ["column_totals", "columns"] };
    // `x` is bound in place of the totals, which a single part does not read.
    let mut before = x.clone();
    if parts > 1 {
        // The totals are in the order of summation, so their own sum goes forward.
        let totals = Tensor::empty(gpu, op, [outer, parts, inner], x.dtype());
        gpu.launch(launch(total, &totals));
        before = scan(op, kind, &totals, 1, false);
    }
    gpu.launch(launch(run, &y).bind("totals", &before));
    y
}

struct Cumsum {
    axis: usize,
    reverse: bool,
}

impl Op for Cumsum {
    fn name(&self) -> &'static str {
        "cumsum"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            sink.add(0, scan("cumsum", Scan::Sum, dy, self.axis, !self.reverse));
        }
    }
}

impl Tensor {
    #[track_caller]
    fn cumulative(&self, op: &'static str, axis: isize, reverse: bool) -> Tensor {
        let axis = shape::axis(op, axis, self.shape());
        if !self.dtype().is_float() {
            return scan(op, Scan::Sum, self, axis, reverse);
        }
        let y = scan(op, Scan::Sum, &crate::ops::float(op, self).detach(), axis, reverse);
        y.made_by(&[self], || Box::new(Cumsum { axis, reverse }))
    }

    /// `y[i] = x[0] + .. + x[i]` along `axis`. f16 and bf16 are summed and returned in f32. Integers wrap.
    ///
    /// # Panics
    /// When the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.cumsum(1).to_vec2::<f32>()?, [[1.0, 3.0], [3.0, 7.0]]);
    /// assert_eq!(x.cumsum(0).to_vec2::<f32>()?, [[1.0, 2.0], [4.0, 6.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn cumsum(&self, axis: isize) -> Tensor {
        self.cumulative("cumsum", axis, false)
    }

    /// `y[i] = x[i] + .. + x[n - 1]` along `axis`, the adjoint of [`Tensor::cumsum`]. f16 and bf16 are summed and returned in
    /// f32. Integers wrap.
    ///
    /// # Panics
    /// When the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3]);
    /// assert_eq!(x.cumsum_reverse(0).to_vec::<f32>()?, [6.0, 5.0, 3.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn cumsum_reverse(&self, axis: isize) -> Tensor {
        self.cumulative("cumsum_reverse", axis, true)
    }
}

fn cumsum64(x: &Array, axis: usize, reverse: bool) -> Array {
    let (outer, size, inner) = x.shape.split_at_axis(axis);
    let mut y = x.clone();
    for row in 0..outer * inner {
        let mut sum = 0.0;
        for i in 0..size {
            let i = if reverse { size - 1 - i } else { i };
            let at = row / inner * size * inner + i * inner + row % inner;
            sum += x.data[at];
            y.data[at] = sum;
        }
    }
    y
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (shape, axis) in
        [(&[1][..], 0), (&[7, 13], 1), (&[7, 13], 0), (&[2, 65], 1), (&[2, 257], 1), (&[2, 67, 3], 1)]
    {
        for reverse in [false, true] {
            let name = format!("{shape:?} axis {axis}{}", if reverse { " reversed" } else { "" });
            let call = move |x: &[Tensor]| match reverse {
                false => x[0].cumsum(axis as isize),
                true => x[0].cumsum_reverse(axis as isize),
            };
            let input = vec![Input::normal(shape)];
            all.push(Case::new(name, input, call, move |x| cumsum64(&x[0], axis, reverse)));
        }
    }
    // Sums of up to 24 bits, in one part and in several. Equality shows that no term is lost, doubled or rounded.
    for (shape, axis) in
        [(&[3, 4000][..], 1), (&[3, 9001], 1), (&[1, 70001], 1), (&[2, 1283, 3], 1), (&[3001, 5], 0)]
    {
        for (dtype, reverse) in
            [(DType::F32, false), (DType::F32, true), (DType::U32, false), (DType::I32, true)]
        {
            let name =
                format!("integers {shape:?} axis {axis} {dtype}{}", if reverse { " reversed" } else { "" });
            let call = move |x: &[Tensor]| match reverse {
                false => x[0].cumsum(axis as isize),
                true => x[0].cumsum_reverse(axis as isize),
            };
            let input = vec![Input::integers(shape, dtype, if dtype == DType::U32 { 0 } else { -150 }, 200)];
            all.push(Case::new(name, input, call, move |x| cumsum64(&x[0], axis, reverse)).exact());
        }
    }
    for dtype in [DType::F16, DType::Bf16] {
        all.push(Case::new(
            format!("{dtype} of a transpose"),
            vec![Input::normal([37, 3]).dtype(dtype).fixed()],
            |x| x[0].t().cumsum(-1),
            |x| cumsum64(&Array::from_fn([3, 37], |i| x[0].data[i % 37 * 3 + i / 37]), 1, false),
        ));
    }
    all
}
