//! Other arrangements of the same elements: reversed, rolled, repeated, cut into chunks, every other one, axes joined and
//! parted. They are made of the views and copies in [`layout`](super::layout).

use crate::dtype::DType;
use crate::ops::case::{Array, Case, Input};
use crate::shape::{self, Axes, Shape};
use crate::tensor::Tensor;
use std::ops::RangeBounds;

impl Tensor {
    /// Views of `n` consecutive pieces of equal size along `axis`, as in PyTorch: each has `ceil(size / n)` elements of the
    /// axis, the last one has the rest, and there may be fewer than `n`.
    ///
    /// # Panics
    /// If `n` is 0 or the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let parts = Tensor::arange(&gpu, 0.0, 5.0, 1.0).chunk(2, 0);
    /// assert_eq!(parts[0].to_vec::<f32>()?, [0.0, 1.0, 2.0]);
    /// assert_eq!(parts[1].to_vec::<f32>()?, [3.0, 4.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn chunk(&self, n: usize, axis: isize) -> Vec<Tensor> {
        assert!(n > 0, "chunk: into 0 pieces of {}", self.shape());
        let size = self.shape()[shape::axis("chunk", axis, self.shape())];
        let each = size.div_ceil(n).max(1);
        // An empty axis has one piece, which is empty.
        let starts = (0..size.max(1)).step_by(each);
        starts.map(|start| self.slice(axis, start..size.min(start + each))).collect()
    }

    /// The elements in reversed order along one or several axes. A copy. Its gradient is reversed in the same way. Any dtype.
    ///
    /// # Panics
    /// When an axis is out of range or named twice, or none is named.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.flip(-1).to_vec::<f32>()?, [2.0, 1.0, 4.0, 3.0]);
    /// assert_eq!(x.flip([0, 1]).to_vec::<f32>()?, [4.0, 3.0, 2.0, 1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn flip(&self, axes: impl Into<Axes>) -> Tensor {
        let axes = axes.into().of("flip", self.shape());
        let y = axes.iter().fold(self.detach(), |x, &axis| {
            let n = x.shape()[axis];
            if n < 2 {
                return x;
            }
            let positions = Tensor::positions(x.gpu(), n);
            x.index_select(axis as isize, &positions.slice(0, n - 1..n).sub(&positions))
        });
        let back: Vec<isize> = axes.iter().map(|&axis| axis as isize).collect();
        self.viewed("flip", y, move |dy| dy.flip(&back[..]))
    }

    /// The elements moved by `shift` places towards the end of `axis`, where those beyond the end come back at the start. A
    /// negative shift moves them towards the start. A copy. Any dtype.
    ///
    /// # Panics
    /// If the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 4.0, 1.0);
    /// assert_eq!(x.roll(1, 0).to_vec::<f32>()?, [3.0, 0.0, 1.0, 2.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn roll(&self, shift: isize, axis: isize) -> Tensor {
        let n = self.shape()[shape::axis("roll", axis, self.shape())];
        let shift = if n == 0 { 0 } else { shift.rem_euclid(n as isize) as usize };
        if shift == 0 {
            return self.clone();
        }
        let x = self.detach();
        let y = Tensor::concat(&[&x.slice(axis, n - shift..n), &x.slice(axis, 0..n - shift)], axis);
        self.viewed("roll", y, move |dy| dy.roll(-(shift as isize), axis))
    }

    /// This tensor side by side with itself: `times[a]` times along each axis `a`. More numbers than axes add new axes in
    /// front. A copy; [`Tensor::expand`] is a view for axes of size 1. The gradient is summed over the repetitions.
    ///
    /// # Panics
    /// With fewer numbers than axes.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]);
    /// let y = x.repeat([2, 2]);
    /// assert_eq!(y.to_vec::<f32>()?, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
    /// assert_eq!(y.shape()[..], [2, 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn repeat(&self, times: impl AsRef<[usize]>) -> Tensor {
        let times = times.as_ref();
        let axes = self.shape().len();
        assert!(
            times.len() >= axes,
            "repeat: {} has {axes} axes, but {times:?} says how often for {}",
            self.shape(),
            times.len()
        );
        let mut sizes = vec![1; times.len() - axes];
        sizes.extend(&self.shape()[..]);
        let all = self.reshape(&sizes[..]);
        (0..times.len()).filter(|&axis| times[axis] != 1).fold(all, |x, axis| {
            let (outer, size, inner) = x.shape().split_at_axis(axis);
            let to = x.shape().with(axis, size * times[axis]);
            x.reshape([outer, 1, size * inner]).expand([outer, times[axis], size * inner]).reshape(to)
        })
    }

    /// Every element of `axis` `times` times, one after the other. A copy. The gradient is summed over the repetitions.
    ///
    /// # Panics
    /// If the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]);
    /// assert_eq!(x.repeat_interleave(2, 0).to_vec::<f32>()?, [1.0, 1.0, 2.0, 2.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn repeat_interleave(&self, times: usize, axis: isize) -> Tensor {
        let axis = shape::axis("repeat_interleave", axis, self.shape());
        let (outer, size, inner) = self.shape().split_at_axis(axis);
        let to = self.shape().with(axis, size * times);
        self.reshape([outer * size, 1, inner]).expand([outer * size, times, inner]).reshape(to)
    }

    /// The axes from `start` to `end`, both included, as one. A view where [`Tensor::reshape`] is one. `flatten(0, -1)` gives
    /// a list of all elements.
    ///
    /// # Panics
    /// If an axis is out of range or `end` is before `start`.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 3, 4]);
    /// assert_eq!(x.flatten(1, -1).shape()[..], [2, 12]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn flatten(&self, start: isize, end: isize) -> Tensor {
        if self.shape().is_empty() {
            return self.reshape([1]);
        }
        let [first, last] = [start, end].map(|axis| shape::axis("flatten", axis, self.shape()));
        assert!(first <= last, "flatten: axis {start} is behind axis {end} of {}", self.shape());
        let mut sizes = self.shape()[..first].to_vec();
        sizes.push(self.shape()[first..=last].iter().product());
        sizes.extend(&self.shape()[last + 1..]);
        self.reshape(&sizes[..])
    }

    /// `axis` as several axes of these sizes. The inverse of [`Tensor::flatten`].
    ///
    /// # Panics
    /// If the axis is out of range or the product of the sizes is not its size.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 12]);
    /// assert_eq!(x.unflatten(-1, [3, 4]).shape()[..], [2, 3, 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn unflatten(&self, axis: isize, sizes: impl AsRef<[usize]>) -> Tensor {
        let sizes = sizes.as_ref();
        let axis = shape::axis("unflatten", axis, self.shape());
        let count: usize = sizes.iter().product();
        assert!(
            count == self.shape()[axis],
            "unflatten: {sizes:?} has {count} elements, axis {axis} of {} not",
            self.shape()
        );
        let to = [&self.shape()[..axis], sizes, &self.shape()[axis + 1..]].concat();
        self.reshape(&to[..])
    }

    /// Every `step`-th element of a range along `axis`, from its start on, as `x[start:end:step]` in Python. A view. The gradient
    /// of all other elements is zero. Elements in reversed order are made by [`Tensor::flip`].
    ///
    /// # Panics
    /// If `step` is 0 or the range does not lie in the axis.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 8.0, 1.0);
    /// assert_eq!(x.slice_step(0, 1..8, 3).to_vec::<f32>()?, [1.0, 4.0, 7.0]);
    /// assert_eq!(x.slice_step(0, .., 4).to_vec::<f32>()?, [0.0, 4.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn slice_step(&self, axis: isize, range: impl RangeBounds<usize>, step: usize) -> Tensor {
        assert!(step > 0, "slice_step: a step of 0 on {}", self.shape());
        let part = self.slice(axis, range);
        let axis = shape::axis("slice_step", axis, self.shape());
        let size = part.shape()[axis];
        // A larger step takes the first element too.
        let step = step.min(size.max(1));
        let mut view = part.clone();
        view.shape = part.shape().with(axis, size.div_ceil(step));
        view.strides[axis] *= step;
        let from = *part.shape();
        part.viewed("slice_step", view, move |dy| spread(dy, axis, step, from))
    }
}

/// The adjoint of every `step`-th element: zeros of this shape with `dy` at every `step`-th place.
fn spread(dy: &Tensor, axis: usize, step: usize, shape: Shape) -> Tensor {
    let (outer, count, inner) = dy.shape().split_at_axis(axis);
    if count == 0 {
        return Tensor::zeros(dy.gpu(), shape);
    }
    let all = dy.reshape([outer, count, inner]).pad(2, 0, (step - 1) * inner);
    let all = all.reshape([outer, count * step, inner]);
    all.slice(1, 0..shape[axis]).reshape(shape)
}

/// A case of which element `i` of the result is element `source(i)` of the input, in every type.
fn moved(
    name: &str,
    [input, output]: [&[usize]; 2],
    forward: fn(&Tensor) -> Tensor,
    source: fn(usize) -> usize,
) -> Vec<Case> {
    let output = Shape::new(output);
    let want = move |x: &[Array]| Array::from_fn(output, |i| x[0].data[source(i)]);
    let case = |name: String, input: Input| Case::new(name, vec![input], move |x| forward(&x[0]), want);
    let mut all = vec![case(name.into(), Input::normal(input)).ulps(4.0, 16.0)];
    for dtype in [DType::F16, DType::Bf16, DType::I32] {
        all.push(case(format!("{name} of {dtype}"), Input::integers(input, dtype, -99, 99)).exact());
    }
    all
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(moved("flip of one", [&[1], &[1]], |x| x.flip(0), |i| i));
    all.extend(moved("flip", [&[3, 7], &[3, 7]], |x| x.flip(-1), |i| i / 7 * 7 + 6 - i % 7));
    all.extend(moved("flip of rows", [&[5, 8], &[5, 8]], |x| x.flip(0), |i| (4 - i / 8) * 8 + i % 8));
    all.extend(moved(
        "flip of two axes",
        [&[3, 5, 4], &[3, 5, 4]],
        |x| x.flip([-1, 0]),
        |i| (2 - i / 20) * 20 + i / 4 % 5 * 4 + 3 - i % 4,
    ));
    all.extend(moved("roll", [&[3, 7], &[3, 7]], |x| x.roll(2, 1), |i| i / 7 * 7 + (i % 7 + 5) % 7));
    all.extend(moved("roll back", [&[5, 8], &[5, 8]], |x| x.roll(-7, 0), |i| (i / 8 + 2) % 5 * 8 + i % 8));
    all.extend(moved("repeat", [&[2, 3], &[2, 4, 6]], |x| x.repeat([2, 2, 2]), |i| i / 6 % 2 * 3 + i % 3));
    all.extend(moved("repeat of rows", [&[3, 4], &[9, 4]], |x| x.repeat([3, 1]), |i| i % 12));
    all.extend(moved("repeat_interleave", [&[2, 3], &[2, 6]], |x| x.repeat_interleave(2, -1), |i| i / 2));
    all.extend(moved(
        "repeat_interleave of rows",
        [&[2, 5], &[6, 5]],
        |x| x.repeat_interleave(3, 0),
        |i| i / 15 * 5 + i % 5,
    ));
    all.extend(moved("flatten", [&[2, 3, 5], &[2, 15]], |x| x.flatten(1, -1), |i| i));
    all.extend(moved(
        "flatten of a transpose",
        [&[3, 5], &[15]],
        |x| x.t().flatten(0, -1),
        |i| i % 3 * 5 + i / 3,
    ));
    all.extend(moved("unflatten", [&[3, 10], &[3, 2, 5]], |x| x.unflatten(1, [2, 5]), |i| i));
    all.extend(moved(
        "chunk",
        [&[2, 7], &[2, 7]],
        |x| {
            let parts = x.chunk(3, 1);
            Tensor::concat(&[&parts[2], &parts[1], &parts[0]], 1)
        },
        |i| i / 7 * 7 + [6, 3, 4, 5, 0, 1, 2][i % 7],
    ));
    all.extend(moved(
        "slice_step",
        [&[3, 11], &[3, 3]],
        |x| x.slice_step(1, 1..10, 4),
        |i| i / 3 * 11 + 1 + i % 3 * 4,
    ));
    all.extend(moved(
        "slice_step to the end",
        [&[2, 9], &[2, 5]],
        |x| x.slice_step(-1, 0..9, 2),
        |i| i / 5 * 9 + i % 5 * 2,
    ));
    all.extend(moved(
        "slice_step of rows",
        [&[9, 4], &[3, 4]],
        |x| x.slice_step(0, 2..9, 3),
        |i| (2 + i / 4 * 3) * 4 + i % 4,
    ));
    all.extend(moved(
        "slice_step of a transpose",
        [&[5, 8], &[4, 5]],
        |x| x.t().slice_step(0, 0..8, 2),
        |i| i % 5 * 8 + i / 5 * 2,
    ));
    // A product reads such a view with its strides.
    all.push(Case::new(
        "slice_step in a product",
        vec![Input::normal([8, 4]), Input::normal([4, 6])],
        |x| x[0].slice_step(0, 0..8, 2).matmul(&x[1].slice_step(1, 1..6, 2)),
        |x| {
            let term = |i: usize, k: usize| x[0].data[i / 3 * 8 + k] * x[1].data[k * 6 + 1 + i % 3 * 2];
            Array::from_fn([4, 3], |i| (0..4).map(|k| term(i, k)).sum())
        },
    ));
    all
}
