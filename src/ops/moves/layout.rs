//! Views (reshape, permute, slice, expand), which move no element, and concat, stack, split and pad.

mod cases;

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::shape::{self, MAX_AXES, Shape};
use crate::tape::{Op, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::ops::RangeBounds;

pub(super) use cases::cases;

/// A view or copy whose gradient is another layout op.
struct Layout<F> {
    name: &'static str,
    back: F,
}

impl<F: Fn(&Tensor) -> Tensor + Send + Sync> Op for Layout<F> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            sink.add(0, (self.back)(dy));
        }
    }
}

impl Tensor {
    /// Records `view`, which has the elements of this tensor, with `back` for its gradient.
    pub(in crate::ops) fn viewed(
        &self,
        name: &'static str,
        view: Tensor,
        back: impl Fn(&Tensor) -> Tensor + Send + Sync + 'static,
    ) -> Tensor {
        Tensor { edge: None, ..view }.made_by(&[self], || Box::new(Layout { name, back }))
    }

    /// The same elements, in row-major order, with another shape. A view if this tensor is contiguous, else a copy.
    ///
    /// # Panics
    /// If the element counts differ.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 6.0, 1.0);
    /// let rows = x.reshape([2, 3]);
    /// assert_eq!(rows.to_vec2::<f32>()?, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "view")]
    #[track_caller]
    pub fn reshape(&self, shape: impl Into<Shape>) -> Tensor {
        let (to, from) = (shape.into(), *self.shape());
        assert!(
            to.count() == from.count(),
            "reshape: {from} has {} elements, {to} {}",
            from.count(),
            to.count()
        );
        let dense = if self.is_contiguous() { self.clone() } else { self.contiguous() };
        let view = Tensor { shape: to, strides: to.strides(), ..dense.clone() };
        dense.viewed("reshape", view, move |dy| dy.reshape(from))
    }

    /// The axes in another order: axis `i` of the result is axis `order[i]` of this tensor. A view.
    ///
    /// # Panics
    /// If `order` is not a permutation of the axes.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 3, 5]);
    /// // Axis 0 of the result is axis 2 of `x`, then come axes 0 and 1.
    /// assert_eq!(x.permute([2, 0, 1]).shape()[..], [5, 2, 3]);
    /// let m = Tensor::arange(&gpu, 0.0, 6.0, 1.0).reshape([2, 3]);
    /// assert_eq!(m.permute([1, 0]).to_vec::<f32>()?, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn permute(&self, order: impl AsRef<[usize]>) -> Tensor {
        let order = order.as_ref();
        let axes = self.shape().len();
        let mut inverse = vec![usize::MAX; axes];
        for (i, &a) in order.iter().enumerate() {
            assert!(
                a < axes && inverse[a] == usize::MAX,
                "permute: {order:?} is no order of {}",
                self.shape()
            );
            inverse[a] = i;
        }
        assert!(order.len() == axes, "permute: {order:?} for shape {}", self.shape());
        let sizes: Vec<usize> = order.iter().map(|&a| self.shape[a]).collect();
        let mut strides = [0; MAX_AXES];
        order.iter().enumerate().for_each(|(i, &a)| strides[i] = self.strides[a]);
        let view = Tensor { shape: Shape::new(&sizes), strides, ..self.clone() };
        self.viewed("permute", view, move |dy| dy.permute(&inverse))
    }

    /// Exchanges two axes. Negative ones are counted from the end. A view.
    ///
    /// # Panics
    /// If an axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 3, 5]);
    /// assert_eq!(x.transpose(0, -1).shape()[..], [5, 3, 2]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn transpose(&self, a: isize, b: isize) -> Tensor {
        let (a, b) = (shape::axis("transpose", a, self.shape()), shape::axis("transpose", b, self.shape()));
        let mut order: Vec<usize> = (0..self.shape().len()).collect();
        order.swap(a, b);
        self.permute(&order)
    }

    /// Exchanges the last two axes. A view.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 6.0, 1.0).reshape([2, 3]);
    /// assert_eq!(x.t().to_vec2::<f32>()?, [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn t(&self) -> Tensor {
        self.transpose(-2, -1)
    }

    /// The elements of a range along `axis`: `1..3`, `1..`, `..3`. A view. The gradient of all other elements is zero.
    ///
    /// # Panics
    /// If the range does not lie in the axis.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 6.0, 1.0).reshape([2, 3]);
    /// assert_eq!(x.slice(1, 1..3).to_vec2::<f32>()?, [[1.0, 2.0], [4.0, 5.0]]);
    /// assert_eq!(x.slice(1, 1..).to_vec2::<f32>()?, [[1.0, 2.0], [4.0, 5.0]]);
    /// assert_eq!(x.slice(-2, ..1).shape()[..], [1, 3]); // the axis stays, with size 1
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "narrow")]
    #[track_caller]
    pub fn slice(&self, axis: isize, range: impl RangeBounds<usize>) -> Tensor {
        let axis = shape::axis("slice", axis, self.shape());
        let size = self.shape[axis];
        let range = shape::range("slice", range, axis, self.shape());
        let view = Tensor {
            shape: self.shape.with(axis, range.len()),
            offset: self.offset + range.start * self.strides[axis],
            ..self.clone()
        };
        let (before, after) = (range.start, size - range.end);
        self.viewed("slice", view, move |dy| dy.pad(axis as isize, before, after))
    }

    /// The elements at one place of `axis`, as `x[index]` or `x[:, index]` in PyTorch: a view without that axis. The gradient of all
    /// other elements is zero.
    ///
    /// # Panics
    /// If the place does not lie in the axis.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 6.0, 1.0).reshape([2, 3]);
    /// assert_eq!(x.select(0, 1).to_vec::<f32>()?, [3.0, 4.0, 5.0]);
    /// assert_eq!(x.select(-1, 2).to_vec::<f32>()?, [2.0, 5.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn select(&self, axis: isize, index: usize) -> Tensor {
        let at = shape::axis("select", axis, self.shape());
        let size = self.shape[at];
        assert!(index < size, "select: {index} is outside axis {at} of {}", self.shape());
        self.slice(axis, index..index + 1).squeeze(axis)
    }

    /// Repeats this tensor along axes of size 1 and new leading axes, up to `shape`. A view.
    ///
    /// # Panics
    /// If this tensor's shape does not broadcast to `shape`.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let row = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]);
    /// assert_eq!(row.expand([3, 2]).to_vec2::<f32>()?, [[1.0, 2.0]; 3]);
    /// let column = row.reshape([2, 1]);
    /// assert_eq!(column.expand([2, 3]).to_vec2::<f32>()?, [[1.0; 3], [2.0; 3]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn expand(&self, shape: impl Into<Shape>) -> Tensor {
        let (to, from) = (shape.into(), *self.shape());
        let strides = shape::expand_strides("expand", &from, &self.strides, &to);
        let view = Tensor { shape: to, strides, ..self.clone() };
        self.viewed("expand", view, move |dy| dy.sum_to(from))
    }

    /// Inserts an axis of size 1 at `axis`. A view.
    ///
    /// # Panics
    /// If `axis` is out of range: it counts the axes of the result, and -1 is a new last one.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 3]);
    /// assert_eq!(x.unsqueeze(0).shape()[..], [1, 2, 3]);
    /// assert_eq!(x.unsqueeze(-1).shape()[..], [2, 3, 1]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn unsqueeze(&self, axis: isize) -> Tensor {
        let mut sizes = self.shape.to_vec();
        let axes = sizes.len() as isize + 1;
        assert!((-axes..axes).contains(&axis), "unsqueeze: axis {axis} for shape {}", self.shape);
        let axis = axis.rem_euclid(axes) as usize;
        sizes.insert(axis, 1);
        let mut strides = self.strides;
        strides.copy_within(axis..MAX_AXES - 1, axis + 1);
        strides[axis] = 0;
        let from = self.shape;
        let view = Tensor { shape: Shape::new(&sizes), strides, ..self.clone() };
        self.viewed("unsqueeze", view, move |dy| dy.reshape(from))
    }

    /// Removes `axis`, which must have size 1. A view.
    ///
    /// # Panics
    /// If the axis has another size.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 1, 3]);
    /// assert_eq!(x.squeeze(1).shape()[..], [2, 3]);
    /// assert_eq!(x.squeeze(-2).shape()[..], [2, 3]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn squeeze(&self, axis: isize) -> Tensor {
        let axis = shape::axis("squeeze", axis, self.shape());
        assert!(self.shape[axis] == 1, "squeeze: axis {axis} of {} is not 1", self.shape);
        let mut strides = self.strides;
        strides.copy_within(axis + 1.., axis);
        let from = self.shape;
        let view = Tensor { shape: self.shape.without(axis), strides, ..self.clone() };
        self.viewed("squeeze", view, move |dy| dy.reshape(from))
    }

    /// Adds `before` and `after` zeros along `axis`. The gradient is the slice between them.
    ///
    /// # Panics
    /// If `axis` is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// let y = x.pad(1, 1, 2);
    /// assert_eq!(y.to_vec2::<f32>()?, [[0.0, 1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 4.0, 0.0, 0.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn pad(&self, axis: isize, before: usize, after: usize) -> Tensor {
        let axis = shape::axis("pad", axis, self.shape());
        if before == 0 && after == 0 {
            return self.clone();
        }
        let shape = self.shape.with(axis, before + self.shape[axis] + after);
        let y = self.moved("pad", axis, before, shape, None);
        let size = self.shape[axis];
        self.viewed("pad", y, move |dy| dy.slice(axis as isize, before..before + size))
    }

    /// Launches the kernel `concat`, which writes to `into`, or `pad`, which writes to a new tensor of `shape`.
    fn moved(
        &self,
        entry: &'static str,
        axis: usize,
        start: usize,
        shape: Shape,
        into: Option<&Tensor>,
    ) -> Tensor {
        let gpu = self.gpu();
        let inner = shape.split_at_axis(axis).2;
        // Rows are moved as words, so pairs of 16-bit elements must not be torn apart.
        let half = self.dtype().is_half();
        let torn = half && into.is_some_and(|y| y.dtype() != self.dtype());
        let sizes = [start, self.shape[axis], shape[axis]].map(|size| size * inner);
        let torn = torn || half && !sizes.iter().all(|size| size.is_multiple_of(2));
        let x = if torn { self.cast(DType::F32).contiguous() } else { self.contiguous() };
        let y = into.cloned().unwrap_or_else(|| Tensor::empty(gpu, entry, shape, x.dtype()));
        let words = |elements: usize| elements * x.dtype().size() / 4;
        let wide = sizes.iter().all(|&size| words(size).is_multiple_of(4));
        let pieces = |elements: usize| if wide { words(elements) / 4 } else { words(elements) };
        let n = pieces(if entry == "pad" { shape.count() } else { self.count() });
        let source = Source::file("concat").alias("Elem", if wide { "vec4<u32>" } else { "u32" });
        let [start, x_row, y_row] = sizes.map(pieces);
        gpu.launch(
            Launch::new(entry, &source, entry, grid(n.div_ceil(64)))
                .bind("x", &x)
                .bind_mut("y", &y)
                .set("n", n)
                .set("x_row", x_row)
                .set("y_row", y_row)
                .set("start", start)
                .turns(0),
        );
        if torn && into.is_none() { y.cast(self.dtype()) } else { y }
    }

    /// Concatenates the tensors along `axis`: another name of [`Tensor::concat`], that of PyTorch, candle and burn.
    ///
    /// # Panics
    /// As [`Tensor::concat`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let [a, b] = [[1f32, 2.0], [3.0, 4.0]].map(|row| Tensor::from_slice(&gpu, &row, [1, 2]));
    /// assert_eq!(Tensor::cat(&[&a, &b], 0).to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn cat(tensors: &[&Tensor], axis: isize) -> Tensor {
        Tensor::concat(tensors, axis)
    }

    /// Concatenates the tensors along `axis`. All other sizes must be equal.
    ///
    /// # Panics
    /// If there are no tensors, or shapes or dtypes do not fit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let [a, b] = [[1f32, 2.0], [3.0, 4.0]].map(|row| Tensor::from_slice(&gpu, &row, [1, 2]));
    /// assert_eq!(Tensor::concat(&[&a, &b], 0).to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0]]);
    /// assert_eq!(Tensor::concat(&[&a, &b], -1).to_vec2::<f32>()?, [[1.0, 2.0, 3.0, 4.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn concat(tensors: &[&Tensor], axis: isize) -> Tensor {
        assert!(!tensors.is_empty(), "concat: no tensors");
        same_gpu("concat", tensors);
        let first = tensors[0];
        let axis = shape::axis("concat", axis, first.shape());
        for t in tensors {
            assert!(
                t.shape.len() == first.shape.len() && t.shape.with(axis, 1) == first.shape.with(axis, 1),
                "concat: {} and {} differ outside axis {axis}",
                first.shape,
                t.shape
            );
            assert!(t.dtype() == first.dtype(), "concat: dtypes {} and {}", first.dtype(), t.dtype());
        }
        let sizes: Vec<usize> = tensors.iter().map(|t| t.shape[axis]).collect();
        let shape = first.shape.with(axis, sizes.iter().sum());
        // If a pair of 16-bit elements would be torn apart, all are moved as f32.
        let inner = first.shape.split_at_axis(axis).2;
        let odd = sizes.iter().any(|size| !(size * inner).is_multiple_of(2));
        let torn = first.dtype().is_half() && odd;
        let stored = if torn { DType::F32 } else { first.dtype() };
        let mut all = Tensor::empty(first.gpu(), "concat", shape, stored);
        let mut start = 0;
        for (t, &size) in tensors.iter().zip(&sizes) {
            let _ = t.moved("concat", axis, start, shape, Some(&all));
            start += size;
        }
        if torn {
            all = all.cast(first.dtype());
        }
        all.made_by(tensors, || Box::new(Concat { axis, sizes }))
    }

    /// Stacks the tensors along a new `axis`.
    ///
    /// # Panics
    /// If shapes or dtypes differ.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let [a, b] = [[1f32, 2.0], [3.0, 4.0]].map(|list| Tensor::from_slice(&gpu, &list, [2]));
    /// assert_eq!(Tensor::stack(&[&a, &b], 0).to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0]]);
    /// assert_eq!(Tensor::stack(&[&a, &b], 1).to_vec2::<f32>()?, [[1.0, 3.0], [2.0, 4.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn stack(tensors: &[&Tensor], axis: isize) -> Tensor {
        let all: Vec<Tensor> = tensors.iter().map(|t| t.unsqueeze(axis)).collect();
        Tensor::concat(&all.iter().collect::<Vec<_>>(), axis)
    }

    /// Returns views of consecutive pieces of these sizes along `axis`.
    ///
    /// # Panics
    /// If the sizes do not add up to the axis.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 5.0, 1.0);
    /// let parts = x.split(0, [2, 3]);
    /// assert_eq!(parts[0].to_vec::<f32>()?, [0.0, 1.0]);
    /// assert_eq!(parts[1].to_vec::<f32>()?, [2.0, 3.0, 4.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn split(&self, axis: isize, sizes: impl AsRef<[usize]>) -> Vec<Tensor> {
        let sizes = sizes.as_ref();
        let at = shape::axis("split", axis, self.shape());
        assert!(
            sizes.iter().sum::<usize>() == self.shape[at],
            "split: {sizes:?} do not add up to axis {at} of {}",
            self.shape
        );
        let mut start = 0;
        sizes
            .iter()
            .map(|&size| {
                start += size;
                self.slice(axis, start - size..start)
            })
            .collect()
    }
}

struct Concat {
    axis: usize,
    sizes: Vec<usize>,
}

impl Op for Concat {
    fn name(&self) -> &'static str {
        "concat"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let mut start = 0;
        for (i, &size) in self.sizes.iter().enumerate() {
            sink.add(i, dy.slice(self.axis as isize, start..start + size));
            start += size;
        }
    }
}
