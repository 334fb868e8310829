//! Variances, norms and the logarithm of a sum of exponentials, over one or several axes.

use super::axes::{kept, over64, terms};
use super::reduce::{Reduction, reduce_axes};
use crate::dtype::DType;
use crate::gpu::value::fuse::Scalar;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::{Axes, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

/// `y = (sum |x|^p)^(1/p)`, with `dx = dy sign(x) (|x| / y)^(p - 1)`. This is 0 where `x` is 0, and where `y` is.
struct Norm {
    p: f32,
    axes: Vec<usize>,
    x: Saved,
    y: Saved,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (x, y) = (self.x.get("norm"), kept(self.y.get("norm"), &self.axes));
        let (args, numbers) = ([x, &y, &kept(dy, &self.axes)], [Scalar::F32(self.p - 1.0)]);
        let square = "pick4($2 * ($0 / $1), vec4<f32>(0.0), is_equal($1, vec4<f32>(0.0)))";
        // The sum of small elements to a high power can be 0, though none of them is.
        let other = "pick4($2 * sign($0) * power(magnitude($0) / $1, $3), vec4<f32>(0.0), \
                     is_equal($0, vec4<f32>(0.0)) | is_equal($1, vec4<f32>(0.0)))";
        sink.add(
            0,
            match self.p {
                2.0 => Tensor::lazy("norm", square, DType::F32, *x.shape(), &args),
                _ => Tensor::lazy_with("norm", other, DType::F32, *x.shape(), &args, &numbers),
            },
        );
    }
}

/// `y = log(sum of exp(x))`, with `dx = dy exp(x - y)`.
struct LogSumExp {
    axes: Vec<usize>,
    x: Saved,
    y: Saved,
}

impl Op for LogSumExp {
    fn name(&self) -> &'static str {
        "logsumexp"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (x, y) = (self.x.get("logsumexp"), kept(self.y.get("logsumexp"), &self.axes));
        // A row that is all -infinity has no slope. Its y is -infinity, and -infinity minus that would be NaN.
        let slope =
            "$2 * exp_of($0 - pick4($1, vec4<f32>(0.0), bitcast<vec4<u32>>($1) == vec4<u32>(0xff800000u)))";
        let args = [x, &y, &kept(dy, &self.axes)];
        sink.add(0, Tensor::lazy("logsumexp", slope, DType::F32, *x.shape(), &args));
    }
}

impl Tensor {
    #[track_caller]
    fn variance(&self, op: &'static str, axes: &[usize], correction: usize) -> Tensor {
        let count = terms(self.shape(), axes);
        assert!(
            count > correction,
            "{op}: {count} elements along axes {axes:?} of {} with correction {correction}: there must be more \
             elements than that; correction 0 divides by their number",
            self.shape()
        );
        let x = crate::ops::float(op, self);
        let mean = kept(&x.detach().sum_divided(op, axes, count as f32), axes);
        // The gradient through the mean is a sum of deviations from it, which is 0.
        x.sub(&mean).square().sum_divided(op, axes, (count - correction) as f32)
    }

    /// The variance over one or several axes, which disappear: `sum of (x - mean)^2 / (n - correction)` for `n` elements, in
    /// f32. `correction` 1 is PyTorch's default, the unbiased estimate from a sample, and 0 is the variance of the elements
    /// themselves.
    ///
    /// The mean is subtracted before anything is squared, so a large mean costs no more accuracy than its own rounding. The
    /// derivative is `2 (x - mean) / (n - correction)`.
    ///
    /// # Panics
    /// When there are not more elements than `correction`, an axis is out of range or named twice, none is named, or the
    /// elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 3.0, 5.0, 5.0], [2, 2]);
    /// assert_eq!(x.var(1, 1).to_vec::<f32>()?, [2.0, 0.0]);
    /// assert_eq!(x.var(1, 0).to_vec::<f32>()?, [1.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn var(&self, axes: impl Into<Axes>, correction: usize) -> Tensor {
        self.variance("var", &axes.into().of("var", self.shape()), correction)
    }

    /// The standard deviation, the square root of [`Tensor::var`]. Its gradient is 0 where all elements are equal.
    ///
    /// # Panics
    /// As [`Tensor::var`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 3.0, 5.0, 5.0], [2, 2]);
    /// assert_eq!(x.std(-1, 0).to_vec::<f32>()?, [1.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn std(&self, axes: impl Into<Axes>, correction: usize) -> Tensor {
        self.variance("std", &axes.into().of("std", self.shape()), correction).root()
    }

    /// The 2-norm over one or several axes, which disappear: `sqrt(sum of x^2)`, in f32. The derivative is `x / y`, and 0 where
    /// all elements are 0. Squares are not scaled, so elements above 1.8e19 give infinity and those below 1e-23 give 0.
    ///
    /// # Panics
    /// When an axis is out of range or named twice, none is named, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[3f32, 4.0, 0.0, -2.0], [2, 2]);
    /// assert_eq!(x.norm(1).to_vec::<f32>()?, [5.0, 2.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn norm(&self, axes: impl Into<Axes>) -> Tensor {
        self.norm_p(2.0, axes)
    }

    /// The p-norm over one or several axes, which disappear: `(sum of |x|^p)^(1/p)`, in f32. For infinite `p` it is the largest
    /// `|x|`, for `-infinity` the smallest, and for 0 the number of elements that are not 0.
    ///
    /// The derivative is `sign(x) (|x| / y)^(p - 1)`, and 0 for elements that are 0. For infinite `p`, ties share it equally,
    /// and for 0 there is none.
    ///
    /// # Panics
    /// When `p` is NaN, or negative and finite; when an axis is out of range or named twice, none is named, or the elements are
    /// integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[3f32, -4.0, 0.0], [3]);
    /// assert_eq!(x.norm_p(1.0, 0).item()?, 7.0);
    /// assert_eq!(x.norm_p(f32::INFINITY, 0).item()?, 4.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn norm_p(&self, p: f32, axes: impl Into<Axes>) -> Tensor {
        assert!(p >= 0.0 || p == f32::NEG_INFINITY, "norm: p is {p}; it must be 0, positive or infinite");
        let axes = axes.into().of("norm", self.shape());
        let x = crate::ops::float("norm", self);
        let signed: Vec<isize> = axes.iter().map(|&axis| axis as isize).collect();
        let number = |value: f32, like: &Tensor| Tensor::full(like.gpu(), *like.shape(), value);
        let detached = x.detach();
        let sum = |x: Tensor| x.sum_divided("norm", &axes, 1.0);
        let y = match p {
            f32::INFINITY => return x.abs().max(&signed[..]),
            f32::NEG_INFINITY => return x.abs().min(&signed[..]),
            0.0 => return sum(detached.ne(&number(0.0, &x)).cast(DType::F32)),
            1.0 => return sum(x.abs()),
            2.0 => sum(detached.square()).sqrt(),
            _ => {
                let total = sum(detached.abs().pow(&number(p, &x)));
                total.pow(&number(1.0 / p, &total))
            }
        };
        let saved = y.clone();
        y.made_by(&[&x], || Box::new(Norm { p, axes, x: Saved::new(&x), y: Saved::new(&saved) }))
    }

    /// `y = log(sum of exp(x))` over one or several axes, which disappear, in f32. The largest element is subtracted first, so
    /// nothing overflows. Elements that are all `-infinity` give `-infinity`.
    ///
    /// The derivative is [`Tensor::softmax`], and 0 for elements that are all `-infinity`.
    ///
    /// # Panics
    /// When an axis is out of range, empty or named twice, none is named, or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1000f32, 1000.0], [2]);
    /// let y = x.logsumexp(0).item()?;
    /// assert!((y - 1000.0 - 2f32.ln()).abs() < 1e-4);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn logsumexp(&self, axes: impl Into<Axes>) -> Tensor {
        let op = "logsumexp";
        let axes = axes.into().of(op, self.shape());
        assert!(terms(self.shape(), &axes) > 0, "{op}: axes {axes:?} of {} are empty", self.shape());
        let x = crate::ops::float(op, self);
        let detached = x.detach();
        let most = reduce_axes(op, &detached, &axes, Reduction::Max, 1.0);
        // An infinity minus itself would be NaN. Without a shift, exp and log give the right infinity.
        let finite = "pick4($0, vec4<f32>(0.0), (bitcast<vec4<u32>>($0) & vec4<u32>(0x7fffffffu)) == vec4<u32>(0x7f800000u))";
        let shift = Tensor::lazy(op, finite, DType::F32, *most.shape(), &[&most]);
        let total = detached.sub(&kept(&shift, &axes)).exp().sum_divided(op, &axes, 1.0);
        let y = total.log().add(&shift);
        let saved = y.clone();
        y.made_by(&[&x], || Box::new(LogSumExp { axes, x: Saved::new(&x), y: Saved::new(&saved) }))
    }
}

/// The variance of these elements.
fn var64(all: &[f64], correction: f64) -> f64 {
    let n = all.len() as f64;
    let mean = all.iter().sum::<f64>() / n;
    all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - correction)
}

fn norm64(all: &[f64], p: f64) -> f64 {
    let sizes = all.iter().map(|x| x.abs());
    if all.iter().any(|x| x.is_nan()) {
        return f64::NAN;
    }
    match p {
        f64::INFINITY => sizes.fold(0.0, f64::max),
        f64::NEG_INFINITY => sizes.fold(f64::INFINITY, f64::min),
        _ => sizes.map(|x| x.powf(p)).sum::<f64>().powf(1.0 / p),
    }
}

fn logsumexp64(all: &[f64]) -> f64 {
    let most = all.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let shift = if most.is_infinite() { 0.0 } else { most };
    shift + all.iter().map(|x| (x - shift).exp()).sum::<f64>().ln()
}

pub(super) fn cases() -> Vec<Case> {
    type Row = (&'static str, fn(&Tensor, &[isize]) -> Tensor, fn(&[f64]) -> f64, Fill, f64);
    let normal = || Fill::Normal(1.0);
    let rows: [Row; 9] = [
        ("var", |x, axes| x.var(axes, 1), |all| var64(all, 1.0), normal(), 8.0),
        ("var of all", |x, axes| x.var(axes, 0), |all| var64(all, 0.0), normal(), 8.0),
        ("std", |x, axes| x.std(axes, 1), |all| var64(all, 1.0).sqrt(), normal(), 8.0),
        ("norm", |x, axes| x.norm(axes), |all| norm64(all, 2.0), normal(), 4.0),
        ("norm 1", |x, axes| x.norm_p(1.0, axes), |all| norm64(all, 1.0), Fill::Distinct(0.05), 4.0),
        ("norm 3", |x, axes| x.norm_p(3.0, axes), |all| norm64(all, 3.0), normal(), 24.0),
        ("norm 1.5", |x, axes| x.norm_p(1.5, axes), |all| norm64(all, 1.5), Fill::Distinct(0.05), 24.0),
        (
            "norm inf",
            |x, axes| x.norm_p(f32::INFINITY, axes),
            |all| norm64(all, f64::INFINITY),
            Fill::Distinct(0.05),
            1.0,
        ),
        ("logsumexp", |x, axes| x.logsumexp(axes), logsumexp64, normal(), 8.0),
    ];
    let shapes: [(&[usize], &[isize]); 4] =
        [(&[7, 13], &[1]), (&[5, 4], &[0]), (&[3, 5, 4], &[0, -1]), (&[2, 3, 8], &[1, 2])];
    let mut all = Vec::new();
    for (name, forward, reference, fill, ulps) in rows {
        for (shape, axes) in shapes {
            let at = Axes::from(axes).of("test", &Shape::new(shape));
            let case = Case::new(
                format!("{name} {shape:?} axes {axes:?}"),
                vec![Input::normal(shape).fill(fill.clone())],
                move |x| forward(&x[0], axes),
                move |x| over64(&x[0], &at, reference),
            );
            all.push(case.ulps(ulps, 4.0 * ulps));
        }
    }
    all.extend(special());
    all
}

/// Large means, zeros and infinities.
fn special() -> Vec<Case> {
    let values =
        |shape: [usize; 2], all: Vec<f64>| vec![Input::normal(shape).fill(Fill::Values(all)).fixed()];
    let far = (0..12).map(|i| 1e4 + (i * 5 % 7) as f64).collect();
    let lows = vec![f64::NEG_INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY, 0.0, f64::NEG_INFINITY, 0.0];
    // Gradients where the formula would divide by zero.
    let at_zero = |name: &str, forward: fn(&Tensor) -> Tensor| {
        let input =
            vec![Input::normal([2, 3]).fill(Fill::Values(vec![0.0, 0.0, 0.0, 0.0, 4.0, 0.0])).fixed()];
        let slopes = move |x: &[Tensor]| {
            let leaf = x[0].requires_grad();
            let grads = forward(&leaf).sum_all().backward().expect("backward");
            grads.get(&leaf).expect("a gradient").clone()
        };
        Case::new(format!("gradient of {name} at zero"), input, slopes, |x| {
            Array::from_fn([2, 3], |i| (x[0].data[i] != 0.0) as u8 as f64)
        })
    };
    let same = vec![Input::normal([2, 3]).fill(Fill::Values(vec![0.5, 0.5, 0.5, 2.0, 2.0, 2.0])).fixed()];
    vec![
        Case::new(
            "var far from 0",
            values([2, 6], far),
            |x| x[0].var(1, 1),
            |x| over64(&x[0], &[1], |all| var64(all, 1.0)),
        ),
        Case::new(
            "norm 0",
            values([2, 3], vec![0.0, 2.0, -0.0, 1.0, 1e-30, -3.0]),
            |x| x[0].norm_p(0.0, 1),
            |x| over64(&x[0], &[1], |all| all.iter().filter(|x| **x != 0.0).count() as f64),
        )
        .exact(),
        Case::new(
            "norm -inf",
            values([2, 3], vec![0.5, 2.0, -0.25, 1.0, 7.0, -3.0]),
            |x| x[0].norm_p(f32::NEG_INFINITY, 1),
            |x| over64(&x[0], &[1], |all| norm64(all, f64::NEG_INFINITY)),
        )
        .exact(),
        at_zero("norm", |x| x.norm(1)),
        at_zero("norm 3", |x| x.norm_p(3.0, 1)),
        at_zero("norm 0.5", |x| x.norm_p(0.5, 1)),
        Case::new(
            "gradient of std at zero",
            same,
            |x| {
                let leaf = x[0].requires_grad();
                let grads = leaf.std(1, 1).sum_all().backward().expect("backward");
                grads.get(&leaf).expect("a gradient").clone()
            },
            |x| Array::from_fn(x[0].shape, |_| 0.0),
        )
        .exact(),
        Case::new(
            "logsumexp of -inf",
            values([2, 3], lows),
            |x| x[0].logsumexp(1),
            |x| over64(&x[0], &[1], logsumexp64),
        ),
        Case::new(
            "logsumexp far",
            vec![Input::normal([3, 7]).fill(Fill::Uniform(400.0, 402.0))],
            |x| x[0].logsumexp(1),
            |x| over64(&x[0], &[1], logsumexp64),
        )
        .ulps(4.0, 1000.0),
        Case::new(
            "gradient of logsumexp of -inf",
            values([2, 3], vec![f64::NEG_INFINITY; 6]),
            |x| {
                let leaf = x[0].requires_grad();
                let grads = leaf.logsumexp(1).sum_all().backward().expect("backward");
                grads.get(&leaf).expect("a gradient").clone()
            },
            |x| Array::from_fn(x[0].shape, |_| 0.0),
        )
        .exact(),
    ]
}
