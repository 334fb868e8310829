//! Sum, mean, max and min over one or several axes, and whether any or all elements are set. Each run of adjacent axes
//! is one reduction by the kernels of [`reduce`](super::reduce).

use super::reduce::{Reduction, max64, reduce_axes};
use crate::dtype::DType;
use crate::gpu::value::fuse::Scalar;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::{self, Axes, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

/// Puts reduced axes, in increasing order, back with size 1. A view.
pub(super) fn kept(y: &Tensor, axes: &[usize]) -> Tensor {
    axes.iter().fold(y.clone(), |y, &axis| y.unsqueeze(axis as isize))
}

/// The shape without these axes.
pub(super) fn without(shape: &Shape, axes: &[usize]) -> Shape {
    let sizes: Vec<usize> = (0..shape.len()).filter(|a| !axes.contains(a)).map(|a| shape[a]).collect();
    Shape::new(&sizes)
}

/// How many elements of this shape have one result.
pub(super) fn terms(shape: &Shape, axes: &[usize]) -> usize {
    axes.iter().map(|&axis| shape[axis]).product()
}

struct Sum {
    axes: Vec<usize>,
    shape: Shape,
    /// 1, or the number of elements for a mean.
    divisor: f32,
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            let count = [Scalar::F32(self.divisor)];
            let dy = match self.divisor {
                1.0 => dy.clone(),
                _ => Tensor::lazy_with("mean", "$0 / $1", DType::F32, *dy.shape(), &[dy], &count),
            };
            sink.add(0, kept(&dy, &self.axes).expand(self.shape));
        }
    }
}

struct Extreme {
    axes: Vec<usize>,
    x: Saved,
    y: Saved,
}

impl Op for Extreme {
    fn name(&self) -> &'static str {
        "max"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let x = self.x.get("max");
        let hits = x.eq(&kept(self.y.get("max"), &self.axes)).cast(DType::F32);
        // Ties share the gradient equally.
        let share = dy.div(&reduce_axes("sum", &hits, &self.axes, Reduction::Sum, 1.0));
        sink.add(0, hits.mul(&kept(&share, &self.axes)));
    }
}

impl Tensor {
    /// The sum over axes in increasing order, divided by a number.
    #[track_caller]
    pub(super) fn sum_divided(&self, op: &'static str, axes: &[usize], divisor: f32) -> Tensor {
        let shape = *self.shape();
        let y = match shape.count() {
            0 => Tensor::zeros(self.gpu(), without(&shape, axes)),
            _ => reduce_axes(op, self, axes, Reduction::Sum, divisor),
        };
        y.made_by(&[self], || Box::new(Sum { axes: axes.to_vec(), shape, divisor }))
    }

    #[track_caller]
    fn averaged(&self, op: &'static str, axes: &[usize]) -> Tensor {
        let count = terms(self.shape(), axes);
        assert!(count > 0, "{op}: axes {axes:?} of {} are empty", self.shape());
        self.sum_divided(op, axes, count as f32)
    }

    #[track_caller]
    fn extreme(&self, op: &'static str, axes: &[usize], kind: Reduction) -> Tensor {
        assert!(terms(self.shape(), axes) > 0, "{op}: axes {axes:?} of {} are empty", self.shape());
        let y = reduce_axes(op, self, axes, kind, 1.0);
        let saved = y.clone();
        y.made_by(&[self], || {
            Box::new(Extreme { axes: axes.to_vec(), x: Saved::new(self), y: Saved::new(&saved) })
        })
    }

    /// `y = sum over axes of x`. The axes, one such as `1` or several such as `[0, 2]`, disappear. f16 and bf16 are summed
    /// and returned in f32. The derivative is 1 for each element.
    ///
    /// # Panics
    /// When an axis is out of range or named twice, none is named, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.sum(-1).to_vec::<f32>()?, [3.0, 7.0]);
    /// assert_eq!(x.sum([0, 1]).item()?, 10.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn sum(&self, axes: impl Into<Axes>) -> Tensor {
        self.sum_divided("sum", &axes.into().of("sum", self.shape()), 1.0)
    }

    /// [`Tensor::sum`] that keeps the axes with size 1, so that the result broadcasts against this tensor.
    ///
    /// # Panics
    /// As [`Tensor::sum`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 3.0, 2.0, 6.0], [2, 2]);
    /// let share = x.div(&x.sum_keepdim(1));
    /// assert_eq!(share.to_vec::<f32>()?, [0.25, 0.75, 0.25, 0.75]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn sum_keepdim(&self, axes: impl Into<Axes>) -> Tensor {
        let axes = axes.into().of("sum", self.shape());
        kept(&self.sum_divided("sum", &axes, 1.0), &axes)
    }

    /// The mean over one or several axes, which disappear: the sum, divided once by the number of its terms. f16 and bf16 are
    /// summed and returned in f32.
    ///
    /// # Panics
    /// When an axis is out of range, empty or named twice, none is named, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 6.0], [2, 2]);
    /// assert_eq!(x.mean(0).to_vec::<f32>()?, [2.0, 4.0]);
    /// assert_eq!(x.mean([0, 1]).item()?, 3.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn mean(&self, axes: impl Into<Axes>) -> Tensor {
        self.averaged("mean", &axes.into().of("mean", self.shape()))
    }

    /// [`Tensor::mean`] that keeps the axes with size 1, so that the result broadcasts against this tensor.
    ///
    /// # Panics
    /// As [`Tensor::mean`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 3.0, 2.0, 6.0], [2, 2]);
    /// let centred = x.sub(&x.mean_keepdim(-1));
    /// assert_eq!(centred.to_vec::<f32>()?, [-1.0, 1.0, -2.0, 2.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn mean_keepdim(&self, axes: impl Into<Axes>) -> Tensor {
        let axes = axes.into().of("mean", self.shape());
        kept(&self.averaged("mean", &axes), &axes)
    }

    /// The sum of all elements, a scalar.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.sum_all().item()?, 10.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn sum_all(&self) -> Tensor {
        self.reshape([self.count()]).sum(0)
    }

    /// The mean of all elements, a scalar.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.mean_all().item()?, 2.5);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn mean_all(&self) -> Tensor {
        self.reshape([self.count()]).mean(0)
    }

    /// The largest element along one or several axes, which disappear. NaN if one of the elements is NaN. Ties share the
    /// gradient equally.
    ///
    /// # Panics
    /// When an axis is out of range, empty or named twice, none is named, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 5.0, 3.0, 2.0], [2, 2]);
    /// assert_eq!(x.max(0).to_vec::<f32>()?, [3.0, 5.0]);
    /// assert_eq!(x.max([0, 1]).item()?, 5.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn max(&self, axes: impl Into<Axes>) -> Tensor {
        self.extreme("max", &axes.into().of("max", self.shape()), Reduction::Max)
    }

    /// [`Tensor::max`] that keeps the axes with size 1, so that the result broadcasts against this tensor.
    ///
    /// # Panics
    /// As [`Tensor::max`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 5.0, 3.0, 2.0], [2, 2]);
    /// assert_eq!(x.sub(&x.max_keepdim(1)).to_vec::<f32>()?, [-4.0, 0.0, 0.0, -1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn max_keepdim(&self, axes: impl Into<Axes>) -> Tensor {
        let axes = axes.into().of("max", self.shape());
        kept(&self.extreme("max", &axes, Reduction::Max), &axes)
    }

    /// The smallest element along one or several axes, which disappear. NaN if one of the elements is NaN. Ties share the
    /// gradient equally.
    ///
    /// # Panics
    /// When an axis is out of range, empty or named twice, none is named, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 5.0, 3.0, 2.0], [2, 2]);
    /// assert_eq!(x.min(-1).to_vec::<f32>()?, [1.0, 2.0]);
    /// assert_eq!(x.min([0, 1]).item()?, 1.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn min(&self, axes: impl Into<Axes>) -> Tensor {
        self.extreme("min", &axes.into().of("min", self.shape()), Reduction::Min)
    }

    /// [`Tensor::min`] that keeps the axes with size 1, so that the result broadcasts against this tensor.
    ///
    /// # Panics
    /// As [`Tensor::min`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 5.0, 3.0, 2.0], [2, 2]);
    /// assert_eq!(x.sub(&x.min_keepdim(1)).to_vec::<f32>()?, [0.0, 4.0, 1.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn min_keepdim(&self, axes: impl Into<Axes>) -> Tensor {
        let axes = axes.into().of("min", self.shape());
        kept(&self.extreme("min", &axes, Reduction::Min), &axes)
    }

    /// Reduces 1 for each element that is not 0, by max or by min.
    #[track_caller]
    fn set(&self, op: &'static str, axes: &[usize], kind: Reduction) -> Tensor {
        if self.count() == 0 {
            let none = if kind == Reduction::Min { 1.0 } else { 0.0 };
            return Tensor::full(self.gpu(), without(self.shape(), axes), none).cast(DType::U32);
        }
        let set = self.detach().ne(&self.zeros_like()).cast(DType::F32);
        reduce_axes(op, &set, axes, kind, 1.0).cast(DType::U32)
    }

    /// 1 where at least one element along the axes is not 0, else 0, as u32: a mask for [`Tensor::where_mask`]. The axes
    /// disappear. NaN is not 0. Any dtype. Without elements it is 0.
    ///
    /// # Panics
    /// When an axis is out of range or named twice, or none is named.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[0f32, 0.5, 0.0, 0.0], [2, 2]);
    /// assert_eq!(x.any(1).to_vec::<u32>()?, [1, 0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn any(&self, axes: impl Into<Axes>) -> Tensor {
        self.set("any", &axes.into().of("any", self.shape()), Reduction::Max)
    }

    /// 1 where no element along the axes is 0, else 0, as u32: a mask for [`Tensor::where_mask`]. The axes disappear. NaN is
    /// not 0. Any dtype. Without elements it is 1.
    ///
    /// # Panics
    /// When an axis is out of range or named twice, or none is named.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[7u32, 1, 2, 0], [2, 2]);
    /// assert_eq!(x.all(1).to_vec::<u32>()?, [1, 0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn all(&self, axes: impl Into<Axes>) -> Tensor {
        self.set("all", &axes.into().of("all", self.shape()), Reduction::Min)
    }

    /// Sums this tensor down to `shape`, from which its own shape was broadcast. This is the adjoint of
    /// [`Tensor::expand`].
    ///
    /// # Panics
    /// If `shape` does not broadcast to this tensor's shape.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.sum_to([2]).to_vec::<f32>()?, [4.0, 6.0]);
    /// assert_eq!(x.sum_to([2, 1]).to_vec2::<f32>()?, [[3.0], [7.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn sum_to(&self, shape: impl Into<Shape>) -> Tensor {
        let to = shape.into();
        if to == *self.shape() {
            return self.clone();
        }
        shape::expand_strides("sum_to", &to, &to.strides(), self.shape());
        let shift = self.shape().len() - to.len();
        let is_repeated = |&a: &usize| a < shift || (to[a - shift] == 1 && self.shape()[a] != 1);
        let repeated: Vec<usize> = (0..self.shape().len()).filter(is_repeated).collect();
        self.sum_divided("sum", &repeated, 1.0).reshape(to)
    }
}

/// The reference of a reduction over several axes: `done` of the elements of each result, in row-major order.
pub(super) fn over64(x: &Array, axes: &[usize], done: impl Fn(&[f64]) -> f64) -> Array {
    let to = without(&x.shape, axes);
    let mut all = vec![Vec::new(); to.count()];
    for (at, &value) in x.data.iter().enumerate() {
        let strides = x.shape.strides();
        let free = (0..x.shape.len()).filter(|a| !axes.contains(a));
        let place = free.fold(0, |flat, a| flat * x.shape[a] + at / strides[a] % x.shape[a]);
        all[place].push(value);
    }
    Array::from_fn(to, |i| done(&all[i]))
}

pub(super) fn cases() -> Vec<Case> {
    type Row = (&'static str, fn(&Tensor, &[isize]) -> Tensor, fn(&[f64]) -> f64);
    let rows: [Row; 4] = [
        ("sum", |x, axes| x.sum(axes), |all| all.iter().sum()),
        ("mean", |x, axes| x.mean(axes), |all| all.iter().sum::<f64>() / all.len() as f64),
        ("max", |x, axes| x.max(axes), |all| all.iter().fold(f64::NEG_INFINITY, |a, &b| max64(a, b))),
        ("min", |x, axes| x.min(axes), |all| all.iter().fold(f64::INFINITY, |a, &b| -max64(-a, -b))),
    ];
    let shapes: [(&[usize], &[isize]); 5] = [
        (&[3, 5, 4], &[-1, 1]),
        (&[3, 5, 4], &[2, 0]),
        (&[2, 3, 5, 3], &[0, 1, -1]),
        (&[2, 1, 7, 8], &[0, 1]),
        (&[7], &[0]),
    ];
    let mut all = Vec::new();
    for (name, forward, reference) in rows {
        for (shape, axes) in shapes {
            let fill = if name.starts_with("m") { Fill::Distinct(0.03) } else { Fill::Normal(1.0) };
            let at = Axes::from(axes).of("test", &Shape::new(shape));
            all.push(Case::new(
                format!("{name} {shape:?} axes {axes:?}"),
                vec![Input::normal(shape).fill(fill)],
                move |x| forward(&x[0], axes),
                move |x| over64(&x[0], &at, reference),
            ));
        }
    }
    all.extend(keepdims());
    all.extend(masks());
    for dtype in [DType::F16, DType::Bf16] {
        all.push(Case::new(
            format!("mean of {dtype} over two runs"),
            vec![Input::normal([3, 5, 2, 8]).dtype(dtype).fixed()],
            |x| x[0].mean([0, 2]),
            |x| over64(&x[0], &[0, 2], |all| all.iter().sum::<f64>() / all.len() as f64),
        ));
    }
    // The maximum of each result is there three times, in two rows.
    let ties = Fill::Values(vec![2.0, 2.0, -1.0, 0.5, 2.0, -3.0, 0.0]);
    let half = |x: f64| if x == 2.0 { 2.0 } else { 0.0 };
    all.push(Case::new(
        "gradient of max at ties",
        vec![Input::normal([7]).fill(ties).fixed()],
        |x| {
            let x = x[0].slice(0, 0..6).reshape([2, 1, 3]).requires_grad();
            let grads = x.max([0, 2]).scale(6.0).sum_all().backward().expect("backward");
            grads.get(&x).expect("a gradient").reshape([6])
        },
        move |x| Array::from_fn([6], |i| half(x[0].data[i])),
    ));
    all.push(Case::new(
        "sum_to",
        vec![Input::normal([3, 4, 5])],
        |x| x[0].sum_to([4, 1]),
        |x| Array::from_fn([4, 1], |i| (0..15).map(|j| x[0].data[j / 5 * 20 + i * 5 + j % 5]).sum()),
    ));
    all
}

fn keepdims() -> Vec<Case> {
    type Row = (&'static str, fn(&Tensor) -> Tensor, fn(&[f64]) -> f64);
    let rows: [Row; 4] = [
        ("sum", |x| x.sum_keepdim([0, 2]), |all| all.iter().sum()),
        ("mean", |x| x.mean_keepdim([0, 2]), |all| all.iter().sum::<f64>() / all.len() as f64),
        ("max", |x| x.max_keepdim([0, 2]), |all| all.iter().fold(f64::NEG_INFINITY, |a, &b| max64(a, b))),
        ("min", |x| x.min_keepdim([0, 2]), |all| all.iter().fold(f64::INFINITY, |a, &b| -max64(-a, -b))),
    ];
    let case = |(name, forward, reference): Row| {
        let input = vec![Input::normal([2, 3, 5]).fill(Fill::Distinct(0.1))];
        let want = move |x: &[Array]| {
            let y = over64(&x[0], &[0, 2], reference);
            Array { shape: [1, 3, 1].into(), ..y }
        };
        Case::new(format!("{name} keepdim"), input, move |x| forward(&x[0]), want)
    };
    rows.into_iter().map(case).collect()
}

/// Any and all of masks of every type.
fn masks() -> Vec<Case> {
    let is_set = |x: &f64| *x != 0.0;
    let mut all = Vec::new();
    let values = vec![0.0, 0.0, 0.0, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 0.0];
    for dtype in [DType::U32, DType::I32, DType::F32, DType::F16] {
        for (shape, axes) in [(&[5, 3][..], &[1][..]), (&[2, 5, 3], &[0, -1]), (&[4, 67], &[1])] {
            let at = Axes::from(axes).of("test", &Shape::new(shape));
            let to = at.clone();
            let input = || vec![Input::normal(shape).dtype(dtype).fill(Fill::Values(values.clone())).fixed()];
            let name = format!("{dtype} {shape:?} axes {axes:?}");
            all.push(Case::new(
                format!("any of {name}"),
                input(),
                move |x| x[0].any(axes),
                move |x| over64(&x[0], &to, |all| all.iter().any(is_set) as u8 as f64),
            ));
            all.push(Case::new(
                format!("all of {name}"),
                input(),
                move |x| x[0].all(axes),
                move |x| over64(&x[0], &at, |all| all.iter().all(is_set) as u8 as f64),
            ));
        }
    }
    all.push(Case::new(
        "any and all of nothing",
        vec![Input::integers([2, 0], DType::U32, 0, 1)],
        |x| Tensor::concat(&[&x[0].any(1), &x[0].all(1)], 0),
        |_| Array::from_fn([4], |i| (i / 2) as f64),
    ));
    all.into_iter().map(Case::exact).collect()
}
