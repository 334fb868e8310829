//! Products along axes, and cumulative products. Their gradients are products of the other elements, so they are right where
//! elements are 0.

use super::axes::{over64, terms, without};
use super::cumsum::{Scan, scan};
use super::reduce::{Reduction, reduce_axes};
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::{self, Axes, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

/// For each element, the product of those before it along the axis, or of those after it.
fn exclusive(x: &Tensor, axis: usize, after: bool) -> Tensor {
    let (at, n) = (axis as isize, x.shape()[axis]);
    let one = Tensor::ones(x.gpu(), x.shape().with(axis, 1));
    if n == 1 {
        return one;
    }
    let rest = if after { x.slice(at, 1..n) } else { x.slice(at, 0..n - 1) };
    let rest = scan("prod", Scan::Product, &rest, axis, after);
    Tensor::concat(&if after { [&rest, &one] } else { [&one, &rest] }, at)
}

/// The elements `distance` further along the axis, and 0 beyond its end.
fn shifted(x: &Tensor, axis: usize, distance: usize) -> Tensor {
    let (at, n) = (axis as isize, x.shape()[axis]);
    if distance >= n { x.zeros_like() } else { x.slice(at, distance..n).pad(at, 0, distance) }
}

struct Prod {
    axis: usize,
    x: Saved,
}

impl Op for Prod {
    fn name(&self) -> &'static str {
        "prod"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let x = self.x.get("prod");
        let others = exclusive(x, self.axis, false).mul(&exclusive(x, self.axis, true));
        sink.add(0, others.mul(&dy.unsqueeze(self.axis)));
    }
}

struct Cumprod {
    axis: usize,
    x: Saved,
}

impl Op for Cumprod {
    fn name(&self) -> &'static str {
        "cumprod"
    }
    /// `dx[k] = (x[0] .. x[k - 1]) s[k]` with `s[k] = dy[k] + x[k + 1] s[k + 1]`. The sums `s` cover one element at first, and
    /// in every round twice as many: `s[k] + a[k] s[k + reach]`, where `a[k] = x[k + 1] .. x[k + reach]`.
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (x, axis) = (self.x.get("cumprod"), self.axis);
        let mut sums = dy.clone();
        let mut factors = shifted(x, axis, 1);
        let mut reach = 1;
        while reach < x.shape()[axis] {
            sums = sums.add(&factors.mul(&shifted(&sums, axis, reach)));
            factors = factors.mul(&shifted(&factors, axis, reach));
            reach *= 2;
        }
        sink.add(0, exclusive(x, axis, false).mul(&sums));
    }
}

impl Tensor {
    /// The product over one or several axes, which disappear. f16 and bf16 are multiplied and returned in f32. The product of
    /// no elements is 1.
    ///
    /// The gradient of an element is the product of the others, from both ends and without a division, so it is right where
    /// elements are 0.
    ///
    /// # Panics
    /// When an axis is out of range or named twice, none is named, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[2f32, 0.0, 5.0], [3]).requires_grad();
    /// let y = x.prod(0);
    /// assert_eq!(y.item()?, 0.0);
    /// assert_eq!(y.backward()?.get(&x).unwrap().to_vec::<f32>()?, [0.0, 10.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn prod(&self, axes: impl Into<Axes>) -> Tensor {
        let axes = axes.into().of("prod", self.shape());
        let x = crate::ops::float("prod", self);
        let (to, count) = (without(x.shape(), &axes), terms(x.shape(), &axes));
        if x.count() == 0 {
            return Tensor::ones(x.gpu(), to);
        }
        // Axes that are not adjacent are brought to the end, so that they become one.
        let first = axes[0];
        let is_run = axes[axes.len() - 1] == first + axes.len() - 1;
        let free: Vec<usize> = (0..x.shape().len()).filter(|a| !axes.contains(a)).collect();
        let axis = if is_run { first } else { free.len() };
        let x = if is_run { x } else { x.permute(&[&free[..], &axes].concat()) };
        let mut sizes = to.to_vec();
        sizes.insert(axis, count);
        let x = if axes.len() == 1 { x } else { x.reshape(&sizes[..]) };
        let y = reduce_axes("prod", &x, &[axis], Reduction::Product, 1.0);
        y.made_by(&[&x], || Box::new(Prod { axis, x: Saved::new(&x) }))
    }

    /// The product of all elements, a scalar. See [`Tensor::prod`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.prod_all().item()?, 24.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn prod_all(&self) -> Tensor {
        self.reshape([self.count()]).prod(0)
    }

    /// `y[i] = x[0] x[1] .. x[i]` along `axis`. f16 and bf16 are multiplied and returned in f32. Integers wrap.
    ///
    /// `dx[k] = sum over i >= k of dy[i] times the product of x[0] .. x[i] without x[k]`, computed without a division, so it is
    /// right where elements are 0.
    ///
    /// # Panics
    /// When the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[2f32, 3.0, -1.0], [3]);
    /// assert_eq!(x.cumprod(0).to_vec::<f32>()?, [2.0, 6.0, -6.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn cumprod(&self, axis: isize) -> Tensor {
        let axis = shape::axis("cumprod", axis, self.shape());
        if !self.dtype().is_float() {
            return scan("cumprod", Scan::Product, self, axis, false);
        }
        let x = crate::ops::float("cumprod", self);
        let y = scan("cumprod", Scan::Product, &x.detach(), axis, false);
        y.made_by(&[&x], || Box::new(Cumprod { axis, x: Saved::new(&x) }))
    }
}

fn cumprod64(x: &Array, axis: usize) -> Array {
    let (_, size, inner) = x.shape.split_at_axis(axis);
    Array::from_fn(x.shape, |i| {
        let (at, base) = (i / inner % size, i / (size * inner) * size * inner + i % inner);
        (0..=at).map(|j| x.data[base + j * inner]).product()
    })
}

/// Numbers near 1 in magnitude, so that long products stay in range.
fn near_one() -> Fill {
    Fill::Values(
        (0..97).map(|i| (0.7 + 0.6 * ((i * 37 % 97) as f64 / 97.0)) * [1.0, -1.0][i % 3 % 2]).collect(),
    )
}

/// Rows without a zero, with one and with two.
fn with_zeros() -> Fill {
    Fill::Values(vec![1.5, -0.5, 2.0, 1.25, -1.0, 0.0, 3.0, 0.5, 1.75, 2.5, 0.0, -2.0, 0.0, 1.5, -1.5])
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let product = |all: &[f64]| all.iter().product::<f64>();
    let shapes: [(&[usize], &[isize]); 9] = [
        (&[1, 1], &[0]),
        (&[7, 13], &[1]),
        (&[7, 13], &[0]),
        (&[5, 16], &[-1]),
        (&[3, 5, 8], &[1]),
        (&[2, 3, 4], &[1, 2]),
        (&[2, 3, 4], &[-1, 0]),
        (&[3, 1031], &[1]),
        (&[1031, 4], &[0]),
    ];
    for (shape, axes) in shapes {
        let at = Axes::from(axes).of("test", &Shape::new(shape));
        let input = Input::normal(shape).fill(near_one());
        let large = input.shape.count() > 1000;
        let case = Case::new(
            format!("prod {shape:?} axes {axes:?}"),
            vec![if large { input.fixed() } else { input }],
            move |x| x[0].prod(axes),
            move |x| over64(&x[0], &at, product),
        );
        // Every factor rounds once.
        let roundings = terms(&Shape::new(shape), &Axes::from(axes).of("test", &Shape::new(shape))) as f64;
        all.push(case.ulps(4.0 + roundings, 8.0 + roundings));
    }
    for (shape, axis) in
        [(&[1][..], 0), (&[7, 13], 1), (&[7, 13], 0), (&[2, 65], 1), (&[2, 17, 3], 1), (&[2, 257], 1)]
    {
        let case = Case::new(
            format!("cumprod {shape:?} axis {axis}"),
            vec![Input::normal(shape).fill(near_one())],
            move |x| x[0].cumprod(axis as isize),
            move |x| cumprod64(&x[0], axis),
        );
        let roundings = shape[axis] as f64;
        all.push(case.ulps(4.0 + roundings, 8.0 + roundings));
    }
    let zeros = || vec![Input::normal([3, 5]).fill(with_zeros())];
    all.push(Case::new("prod at zeros", zeros(), |x| x[0].prod(1), move |x| over64(&x[0], &[1], product)));
    all.push(Case::new(
        "prod of all at zeros",
        zeros(),
        |x| x[0].prod_all(),
        |x| Array::from_fn([], |_| x[0].data.iter().product()),
    ));
    all.push(Case::new("cumprod at zeros", zeros(), |x| x[0].cumprod(1), |x| cumprod64(&x[0], 1)));
    for dtype in [DType::F16, DType::Bf16] {
        let input = vec![Input::normal([5, 8]).fill(near_one()).dtype(dtype).fixed()];
        let case = Case::new(
            format!("prod of {dtype}"),
            input,
            |x| x[0].t().prod(-1),
            move |x| over64(&x[0], &[0], product),
        );
        all.push(case.ulps(9.0, 0.0));
    }
    // Products below 2^24 in whole numbers, in one part and in several.
    let small =
        Fill::Values([vec![1.0; 700], vec![2.0], vec![1.0; 900], vec![-3.0], vec![1.0; 350]].concat());
    for (shape, axis) in [(&[2, 9001][..], 1), (&[3001, 3], 0)] {
        for dtype in [DType::F32, DType::I32] {
            let input = vec![Input::normal(shape).dtype(dtype).fill(small.clone()).fixed()];
            let name = format!("cumprod of whole {dtype} {shape:?}");
            let want = move |x: &[Array]| cumprod64(&x[0], axis);
            all.push(Case::new(name, input, move |x| x[0].cumprod(axis as isize), want).exact());
        }
    }
    let nothing = vec![Input::integers([2, 0], DType::F32, 0, 1)];
    all.push(
        Case::new("prod of nothing", nothing, |x| x[0].prod(1), |_| Array::from_fn([2], |_| 1.0)).exact(),
    );
    all
}
