//! Products along axes, and cumulative products. Their gradients divide by the element, and are products of the others where that
//! cannot be done.

use super::axes::{over64, terms, without};
use super::cumsum::{Scan, scan};
use super::reduce::{Reduction, reduce_axes};
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::{self, Axes, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

/// Where a number is 0, subnormal, infinite or NaN, and where it is finite: by the exponent's bits.
const STRANGE: &str = "vec4<u32>((((bitcast<vec4<u32>>($0) >> vec4<u32>(23u)) + vec4<u32>(1u)) & vec4<u32>(0xfeu)) == vec4<u32>(0u))";
const FINITE: &str = "vec4<u32>((bitcast<vec4<u32>>($0) & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u))";

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

/// The gradient of a product by division, which only rounds twice. In rows where an element of `x` or of the product `y` is 0, tiny
/// or not finite it is by products of the others instead, unless these overflow.
fn by_division(x: &Tensor, y: &Tensor, axis: usize, divided: &Tensor, others: &Tensor) -> Tensor {
    let mask =
        |x: &Tensor, template: &'static str| Tensor::lazy("prod", template, DType::U32, *x.shape(), &[x]);
    let strange = |x: &Tensor| mask(x, STRANGE).any(axis as isize).unsqueeze(axis as isize);
    let others_are_right = strange(x).logical_or(&strange(y)).logical_and(&mask(others, FINITE));
    others.where_mask(&others_are_right, divided)
}

struct Prod {
    axis: usize,
    x: Saved,
    y: Saved,
}

impl Op for Prod {
    fn name(&self) -> &'static str {
        "prod"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (x, axis) = (self.x.get("prod"), self.axis);
        let others = exclusive(x, axis, false).mul(&exclusive(x, axis, true));
        let y = self.y.get("prod").unsqueeze(axis as isize);
        let slope = by_division(x, &y, axis, &y.div(x), &others);
        sink.add(0, slope.mul(&dy.unsqueeze(axis as isize)));
    }
}

struct Cumprod {
    axis: usize,
    x: Saved,
    y: Saved,
}

impl Op for Cumprod {
    fn name(&self) -> &'static str {
        "cumprod"
    }
    /// `dx[k] = (sum over i >= k of dy[i] y[i]) / x[k]`. In a row with a 0, `dx[k] = (x[0] .. x[k - 1]) s[k]` with
    /// `s[k] = dy[k] + x[k + 1] s[k + 1]`. The sums `s` cover one element at first, and in every round twice as many:
    /// `s[k] + a[k] s[k + reach]`, where `a[k] = x[k + 1] .. x[k + reach]`.
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (x, axis) = (self.x.get("cumprod"), self.axis);
        if x.count() == 0 {
            return sink.add(0, Tensor::zeros(dy.gpu(), *x.shape()));
        }
        let (at, n) = (axis as isize, x.shape()[axis]);
        let (mut sums, mut factors, mut reach) = (dy.clone(), x.slice(at, 1..), 1);
        while reach < n {
            // Without what lies beyond the end: 0 times an infinite factor would be NaN.
            let more = factors.mul(&sums.slice(at, reach..)).add(&sums.slice(at, ..n - reach));
            sums = Tensor::concat(&[&more, &sums.slice(at, n - reach..)], at);
            if n > 2 * reach {
                factors = factors.slice(at, ..n - 2 * reach).mul(&factors.slice(at, reach..));
            }
            reach *= 2;
        }
        let exact = exclusive(x, axis, false).mul(&sums);
        let y = self.y.get("cumprod");
        let divided = dy.mul(y).cumsum_reverse(at).div(x);
        sink.add(0, by_division(x, y, axis, &divided, &exact));
    }
}

impl Tensor {
    /// The product over one or several axes, which disappear. f16 and bf16 are multiplied and returned in f32. The product of
    /// no elements is 1.
    ///
    /// The gradient of an element is `y / x`. Where the product or an element is 0, subnormal or not finite, it is the product of the
    /// others, from both ends.
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
            // The sum of nothing keeps the graph.
            return x.sum_divided("prod", &axes, 1.0).add(&Tensor::ones(x.gpu(), to));
        }
        // Axes that are not adjacent are brought to the end, so that they become one.
        let first = axes[0];
        let is_run = axes[axes.len() - 1] == first + axes.len() - 1;
        let free: Vec<usize> = (0..x.shape().len()).filter(|a| !axes.contains(a)).collect();
        let axis = if is_run { first } else { free.len() };
        let x = if is_run { x } else { x.permute([&free[..], &axes].concat()) };
        let mut sizes = to.to_vec();
        sizes.insert(axis, count);
        let x = if axes.len() == 1 { x } else { x.reshape(&sizes[..]) };
        let y = reduce_axes("prod", &x, &[axis], Reduction::Product, 1.0);
        let saved = y.clone();
        y.made_by(&[&x], || Box::new(Prod { axis, x: Saved::new(&x), y: Saved::new(&saved) }))
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
    /// `dx[k] = sum over i >= k of dy[i] times the product of x[0] .. x[i] without x[k]`, computed by a division by `x[k]`, and
    /// without one where an element or a product along the axis is 0, subnormal or not finite.
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
        let saved = y.clone();
        y.made_by(&[&x], || Box::new(Cumprod { axis, x: Saved::new(&x), y: Saved::new(&saved) }))
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
