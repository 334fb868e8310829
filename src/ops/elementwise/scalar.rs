//! Operators between a tensor and one number, on either side, the minus sign, and the sum of an iterator.

use super::binary::of_floats;
use crate::dtype::DType;
use crate::gpu::value::fuse::Scalar;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

/// `y = x / number`.
struct Divided {
    number: f32,
}

impl Op for Divided {
    fn name(&self) -> &'static str {
        "div"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            let number = [Scalar::F32(self.number)];
            sink.add(0, Tensor::lazy_with("div", "$0 / $1", DType::F32, *dy.shape(), &[dy], &number));
        }
    }
}

/// `y = number / x`, with `dx = -(dy / x) (number / x)`, which avoids `x^2`.
struct Divides {
    number: f32,
    x: Saved,
}

impl Op for Divides {
    fn name(&self) -> &'static str {
        "div"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (x, number) = (self.x.get("div"), [Scalar::F32(self.number)]);
        let slope = "(-kept($1 / $0, vec4<u32>(p.groups_x >> 31u)) * ($2 / $0))";
        sink.add(0, Tensor::lazy_with("div", slope, DType::F32, *dy.shape(), &[x, dy], &number));
    }
}

fn divided(x: &Tensor, number: f32) -> Tensor {
    let y = Tensor::lazy_with("div", "$0 / $1", x.dtype(), *x.shape(), &[x], &[Scalar::F32(number)]);
    y.made_by(&[x], || Box::new(Divided { number }))
}

fn divides(number: f32, x: &Tensor) -> Tensor {
    let y = Tensor::lazy_with("div", "$1 / $0", x.dtype(), *x.shape(), &[x], &[Scalar::F32(number)]);
    y.made_by(&[x], || Box::new(Divides { number, x: Saved::new(x) }))
}

/// Columns: trait, method, `tensor op number`, `number op tensor`.
macro_rules! operators {
    ($($trait:ident $method:ident: |$x:ident, $c:ident| $right:expr, $left:expr;)*) => {
        $(impl std::ops::$trait<f32> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, $c: f32) -> Tensor {
                let $x = of_floats(stringify!($method), self);
                $right
            }
        }
        impl std::ops::$trait<f32> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, number: f32) -> Tensor {
                std::ops::$trait::$method(&self, number)
            }
        }
        impl std::ops::$trait<&Tensor> for f32 {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, x: &Tensor) -> Tensor {
                let ($x, $c) = (of_floats(stringify!($method), x), self);
                $left
            }
        }
        impl std::ops::$trait<Tensor> for f32 {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, x: Tensor) -> Tensor {
                std::ops::$trait::$method(self, &x)
            }
        })*
    };
}

operators! {
    Add add: |x, c| x.affine(1.0, c), x.affine(1.0, c);
    Sub sub: |x, c| x.affine(1.0, -c), x.affine(-1.0, c);
    Mul mul: |x, c| x.scale(c), x.scale(c);
    Div div: |x, c| divided(x, c), divides(c, x);
}

impl std::ops::Neg for &Tensor {
    type Output = Tensor;
    #[track_caller]
    fn neg(self) -> Tensor {
        Tensor::neg(self)
    }
}

impl std::ops::Neg for Tensor {
    type Output = Tensor;
    #[track_caller]
    fn neg(self) -> Tensor {
        Tensor::neg(&self)
    }
}

/// The sum of all tensors, in their order, whose shapes broadcast.
///
/// # Panics
/// Without a tensor, because a zero needs a device to be on.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let losses = [1f32, 2.0, 3.0].map(|value| Tensor::scalar(&gpu, value));
/// let total: Tensor = losses.iter().sum();
/// assert_eq!(total.item()?, 6.0);
/// # Ok::<(), tiebeam::Error>(())
/// ```
impl std::iter::Sum for Tensor {
    #[track_caller]
    fn sum<I: Iterator<Item = Tensor>>(tensors: I) -> Tensor {
        let sum = tensors.reduce(|a, b| a.add(&b));
        sum.unwrap_or_else(|| panic!("sum: an iterator without tensors has no device to make a zero on"))
    }
}

/// The sum of all tensors. See [the sum of owned tensors](#impl-Sum-for-Tensor).
impl<'a> std::iter::Sum<&'a Tensor> for Tensor {
    #[track_caller]
    fn sum<I: Iterator<Item = &'a Tensor>>(tensors: I) -> Tensor {
        tensors.cloned().sum()
    }
}

pub(super) fn cases() -> Vec<Case> {
    type Row = (&'static str, fn(&Tensor) -> Tensor, fn(f64) -> f64, f64);
    let rows: [Row; 13] = [
        ("x + c", |x| x + 0.75, |x| x + 0.75, 1.0),
        ("c + x", |x| 0.75 + x, |x| 0.75 + x, 1.0),
        ("x - c", |x| x - 0.75, |x| x - 0.75, 1.0),
        ("c - x", |x| 0.75 - x, |x| 0.75 - x, 1.0),
        ("x * c", |x| x * -3.5, |x| x * -3.5, 1.0),
        ("c * x", |x| -3.5 * x, |x| x * -3.5, 1.0),
        ("x / c", |x| x / 3.0, |x| x / 3.0, 5.0),
        ("c / x", |x| -3.0 / x, |x| -3.0 / x, 5.0),
        ("-x", |x| -x, |x| -x, 1.0),
        ("x ^ c", |x| x.pow(2.5), |x| x.powf(2.5), 8.0),
        ("maximum(x, c)", |x| x.maximum(1.5), |x| if x.is_nan() { x } else { x.max(1.5) }, 1.0),
        ("minimum(x, c)", |x| x.minimum(1.5), |x| if x.is_nan() { x } else { x.min(1.5) }, 1.0),
        // Operators take tensors by value as well, and a chain is one kernel.
        ("chain", |x| 2.0 / (1.0 + -(x.clone() * 0.25) - 4.0), |x| 2.0 / (-3.0 - 0.25 * x), 16.0),
    ];
    let mut all = Vec::new();
    for (name, forward, reference, ulps) in rows {
        // Each op of a chain rounds to f16.
        let half = if name == "chain" { DType::F32 } else { DType::F16 };
        for (dtype, shape) in [(DType::F32, [1, 1]), (DType::F32, [7, 13]), (half, [3, 8])] {
            let input = Input::normal(shape).fill(Fill::Uniform(0.4, 3.0)).dtype(dtype);
            let input = if dtype == DType::F32 { input } else { input.fixed() };
            let want = move |x: &[Array]| Array::from_fn(x[0].shape, |i| reference(x[0].data[i]));
            let case =
                Case::new(format!("{name} {dtype} {shape:?}"), vec![input], move |x| forward(&x[0]), want);
            all.push(case.ulps(ulps, 2.0 * ulps + 4.0));
        }
    }
    for dtype in [DType::F32, DType::F16] {
        let input =
            Input::normal([5, 3]).fill(Fill::Values(vec![1.0, 1.5, 2.0, f64::NAN])).dtype(dtype).fixed();
        // Each comparison is a digit.
        let forward = |x: &[Tensor]| {
            let all = [x[0].eq(1.5), x[0].ne(1.5), x[0].lt(1.5), x[0].le(1.5), x[0].gt(1.5), x[0].ge(1.5)];
            let digits = all.iter().map(|mask| mask.cast(DType::F32));
            digits.reduce(|number, digit| number * 2.0 + digit).expect("six masks")
        };
        let bits = |x: f64| [x == 1.5, x != 1.5, x < 1.5, x <= 1.5, x > 1.5, x >= 1.5];
        let number = move |x: f64| bits(x).iter().fold(0.0, |number, &bit| 2.0 * number + bit as u8 as f64);
        let want = move |x: &[Array]| Array::from_fn(x[0].shape, |i| number(x[0].data[i]));
        all.push(
            Case::new(format!("comparisons with a number, {dtype}"), vec![input], forward, want).exact(),
        );
    }
    let inputs = || vec![Input::normal([3, 5]), Input::normal([5]), Input::normal([3, 1])];
    let want = |x: &[Array]| Array::from_fn([3, 5], |i| x[0].data[i] + x[1].data[i % 5] + x[2].data[i / 5]);
    all.push(Case::new("sum of tensors", inputs(), |x| x.iter().cloned().sum(), want));
    all.push(Case::new("sum of references", inputs(), |x| x.iter().sum(), want));
    all
}
