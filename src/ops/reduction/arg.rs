//! The index of the largest or smallest element along an axis. Elements are compared by integer keys in a total order,
//! so there is no rounding and no undefined tie.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, MOST_TURNS, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape;
use crate::tensor::Tensor;
use std::cmp::Ordering;

/// Axes longer than this are searched in two passes, if there are few results or a thread's loop would be too long.
const SPAN: usize = 4096;

fn source() -> Source {
    Source::file("arg")
}

fn search(op: &'static str, x: &Tensor, axis: usize, smallest: bool) -> Tensor {
    let gpu = x.gpu();
    let (outer, size, inner) = x.shape().split_at_axis(axis);
    let to = x.shape().without(axis);
    let cut = size > SPAN && (outer * inner < 4096 || size > MOST_TURNS);
    let parts = if cut { size.div_ceil(SPAN) } else { 1 };
    let launch = |entry: &str, pieces: Option<&Tensor>, y: &Tensor, groups, turns| {
        let flip = if smallest { u32::MAX } else { 0 };
        gpu.launch(
            Launch::new(op, &source(), entry, grid(groups))
                .bind("x", x)
                .bind_some("pieces", pieces)
                .bind_mut("y", y)
                .set("results", y.count())
                .set("axis", size)
                .set("inner", inner)
                .set("parts", parts)
                .set("span", size.div_ceil(parts))
                .set("flip", flip)
                .turns(turns),
        );
    };
    let y = Tensor::empty(gpu, op, [outer, parts, inner], DType::U32);
    let results = y.count();
    let (entry, groups) = if inner == 1 { ("rows", results) } else { ("columns", results.div_ceil(64)) };
    launch(entry, None, &y, groups, size.div_ceil(parts));
    if parts == 1 {
        return y.reshape(to);
    }
    let best = Tensor::empty(gpu, op, to, DType::U32);
    launch("finish", Some(&y), &best, best.count().div_ceil(64), parts);
    best
}

impl Tensor {
    #[track_caller]
    fn arg(&self, op: &'static str, axis: isize, smallest: bool) -> Tensor {
        let axis = shape::axis(op, axis, self.shape());
        assert!(self.shape()[axis] > 0, "{op}: axis {axis} of {} is empty", self.shape());
        search(op, &crate::ops::float(op, self).detach().contiguous(), axis, smallest)
    }

    /// The index of the largest element along `axis`, as u32. The axis disappears. At ties it is the first index.
    ///
    /// NaN counts as larger than infinity, so the first NaN is found if there is one. `-0` ties with `+0`.
    ///
    /// # Panics
    /// When the axis is out of range or empty, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 5.0, 5.0, 9.0, 2.0, 3.0], [2, 3]);
    /// assert_eq!(x.argmax(1).to_vec::<u32>()?, [1, 0]); // of two equal ones, the first
    /// assert_eq!(x.argmax(0).to_vec::<u32>()?, [1, 0, 0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn argmax(&self, axis: isize) -> Tensor {
        self.arg("argmax", axis, false)
    }

    /// The index of the smallest element along `axis`, as u32. The axis disappears. At ties it is the first index.
    ///
    /// NaN counts as larger than infinity, so a NaN is only found if all elements are NaN. `-0` ties with `+0`.
    ///
    /// # Panics
    /// When the axis is out of range or empty, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 5.0, 5.0, 9.0, 2.0, 3.0], [2, 3]);
    /// assert_eq!(x.argmin(-1).to_vec::<u32>()?, [0, 1]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn argmin(&self, axis: isize) -> Tensor {
        self.arg("argmin", axis, true)
    }
}

/// The order used by arg and sort: NaN is above infinity, and `-0` equals `+0`.
pub(crate) fn order64(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

fn arg64(x: &Array, axis: usize, better: Ordering) -> Array {
    let (_, size, inner) = x.shape.split_at_axis(axis);
    Array::from_fn(x.shape.without(axis), |i| {
        let at = |a: usize| x.data[i / inner * size * inner + a * inner + i % inner];
        (1..size).fold(0, |best, a| if order64(at(a), at(best)) == better { a } else { best }) as f64
    })
}

pub(super) fn cases() -> Vec<Case> {
    let specials =
        || Fill::Values(vec![-0.0, 0.0, 1.5, f64::INFINITY, -2.0, f64::NAN, f64::NEG_INFINITY, 1e-41]);
    let mut all = Vec::new();
    for (shape, axis, fill) in [
        (&[1, 1][..], 0, Fill::Normal(1.0)),
        (&[7, 13], 1, Fill::Normal(1.0)),
        (&[3, 65], 1, Fill::Normal(1.0)),
        (&[65, 3], 0, Fill::Normal(1.0)),
        (&[5, 67, 3], 1, Fill::Integers(-3, 3)),
        (&[11, 300], 1, Fill::Integers(-3, 3)),
        (&[3, 8197], 1, Fill::Normal(1.0)),
        (&[2, 8197, 3], 1, Fill::Integers(-9, 9)),
        (&[9, 7], 1, specials()),
        (&[9, 2], 1, specials()),
        (&[7, 9], 0, specials()),
    ] {
        let at = axis as isize;
        let input = || vec![Input::normal(shape).fill(fill.clone()).fixed()];
        let name = format!("{shape:?} axis {axis} of {fill:?}").chars().take(60).collect::<String>();
        all.push(Case::new(
            format!("argmax {name}"),
            input(),
            move |x| x[0].argmax(at),
            move |x| arg64(&x[0], axis, Ordering::Greater),
        ));
        all.push(Case::new(
            format!("argmin {name}"),
            input(),
            move |x| x[0].argmin(at),
            move |x| arg64(&x[0], axis, Ordering::Less),
        ));
    }
    for dtype in [DType::F16, DType::Bf16] {
        all.push(Case::new(
            format!("argmax of {dtype} transposed"),
            vec![Input::normal([19, 5]).dtype(dtype).fixed()],
            |x| x[0].t().argmax(1),
            |x| arg64(&x[0], 0, Ordering::Greater),
        ));
    }
    all.into_iter().map(Case::exact).collect()
}
