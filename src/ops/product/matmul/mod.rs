//! Matrix products: 2-D and batched with broadcasting, any strides. Linear layers build on them, in `linear.rs`.
//!
//! There is one core with a slot for each operand and one for the store (`shaders/product/matmul.wgsl`, and
//! `matmul_direct.wgsl` for CPU drivers). Gradients use the same core: `dx = dy W`, and `dW = dy^T x`, which is added
//! into the weight's one gradient buffer.
//!
//! The methods are [`Tensor::matmul`] and those of [`product`](super). [`Activation`] and [`Epilogue`] are what a linear layer does to
//! a result before it is stored. [`plan`] says which kernels a product takes on a class of devices, [`table`] chooses among them by
//! count, and [`tune`] by measurement.

mod choose;
mod core;
mod cost;
pub(crate) mod gathered;
pub mod load;
mod operand;
mod parts;
pub mod plan;
pub(super) mod product;
pub mod table;
pub mod tune;
mod write;

use self::product::{Product, Right};
use super::narrow;
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::timed::{Want, When};
use crate::precision::precision;
use crate::setters::setters;
use crate::shape::{self, Shape};
use crate::tape::{Destination, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// The activation that a linear layer applies to `x W^T + bias` as it stores it.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::nn::Activation;
/// let x = Tensor::from_slice(&gpu, &[-1f32, 2.0], [2]);
/// assert_eq!(Activation::Relu.apply(&x).to_vec::<f32>()?, [0.0, 2.0]);
/// assert_eq!(Activation::None.apply(&x).to_vec::<f32>()?, [-1.0, 2.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// `max(x, 0)`
    Relu,
    /// Exact GELU.
    Gelu,
    /// GELU's tanh form.
    GeluTanh,
    /// `x sigmoid(x)`
    Silu,
}

impl Activation {
    /// Applies the activation as a separate op.
    pub fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Activation::None => x.clone(),
            Activation::Relu => x.relu(),
            Activation::Gelu => x.gelu(),
            Activation::GeluTanh => x.gelu_tanh(),
            Activation::Silu => x.silu(),
        }
    }
}

/// The operations that follow a product inside its kernel.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::nn::{Activation, Epilogue};
/// use tiebeam::share::{Site, Tied};
/// let w = Tied::new(&Tensor::from_slice(&gpu, &[1f32, -1.0], [2, 1])).shared();
/// let bias = Tensor::from_slice(&gpu, &[0.5f32, 0.5], [2]);
/// let after = Epilogue::default().bias(Some(&bias)).activation(Activation::Relu);
/// let y = Tensor::from_slice(&gpu, &[3f32], [1, 1]).linear(&w, after);
/// assert_eq!(y.to_vec::<f32>()?, [3.5, 0.0]); // relu(3 + 0.5), relu(-3 + 0.5)
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct Epilogue<'a> {
    /// Added to every row: `[n]`.
    pub bias: Option<&'a Tensor>,
    /// Applied after the bias.
    pub activation: Activation,
    /// Added last, in the shape of the result. It cannot be combined with an activation.
    pub residual: Option<&'a Tensor>,
}

setters!(Epilogue<'a> {
    bias: Option<&'a Tensor>,
    activation: Activation,
    residual: Option<&'a Tensor>,
});

/// Multiplies batches of matrices into the f32 tensor that `into` says.
fn multiply(op: &'static str, lhs: &Tensor, rhs: &Tensor, into: Destination) -> Tensor {
    let to = shape::matmul(op, lhs.shape(), rhs.shape());
    let (y, accumulate) = into.output(lhs.gpu(), op, to);
    Product { accumulate, ..Product::new(op, lhs, Right::Tensor(rhs)) }.write(&y);
    y
}

/// Multiplies batches of matrices into a new tensor of this type.
fn made(op: &'static str, lhs: &Tensor, rhs: &Tensor, dtype: DType) -> Tensor {
    let y = Tensor::empty(lhs.gpu(), op, shape::matmul(op, lhs.shape(), rhs.shape()), dtype);
    Product::new(op, lhs, Right::Tensor(rhs)).write(&y);
    y
}

/// Returns `a^T b` of `a [rows, m]` and `b [rows, n]`: the gradient of a weight.
pub(crate) fn outer(op: &'static str, a: &Tensor, b: &Tensor, into: Destination) -> Tensor {
    multiply(op, &a.t(), b, into)
}

/// Returns `gelu(x w^T + bias)` of `x [rows, k]` and `w [n, k]`, written to `y` if given, without recording on the tape:
/// a layer inside another op. The input of the activation is written to `before` if given.
pub(crate) fn gelu_layer(
    op: &'static str,
    x: &Tensor,
    [w, bias]: [&Tensor; 2],
    y: Option<&Tensor>,
    before: Option<&Tensor>,
) -> Tensor {
    let new = || Tensor::empty(x.gpu(), op, [x.shape()[0], w.shape()[0]], DType::F32);
    let y = y.cloned().unwrap_or_else(new);
    let epilogue = Epilogue { bias: Some(bias), activation: Activation::Gelu, residual: None };
    Product { epilogue, before, ..Product::new(op, x, Right::Tensor(&w.t())) }.write(&y);
    y
}

/// Returns `(a b) gelu'(before)`, element by element: the gradient of a GELU's input.
pub(crate) fn product_slope(op: &'static str, a: &Tensor, b: &Tensor, before: &Tensor) -> Tensor {
    let y = Tensor::empty(a.gpu(), op, before.shape(), DType::F32);
    Product { slope: Some(before), ..Product::new(op, a, Right::Tensor(b)) }.write(&y);
    y
}

/// Returns `a b` of `a [rows, k]` and `b [k, n]`, written where `into` says.
pub(crate) fn product(op: &'static str, a: &Tensor, b: &Tensor, into: Destination) -> Tensor {
    multiply(op, a, b, into)
}

/// Writes `x w^T + bias + residual` of `x [rows, k]` and `w [n, k]` to `y`, without recording on the tape.
pub(crate) fn biased(
    op: &'static str,
    x: &Tensor,
    [w, bias]: [&Tensor; 2],
    residual: Option<&Tensor>,
    y: &Tensor,
) {
    let epilogue = Epilogue { bias: Some(bias), activation: Activation::None, residual };
    Product { epilogue, ..Product::new(op, x, Right::Tensor(&w.t())) }.write(y);
}

struct Matmul {
    lhs: Saved,
    rhs: Saved,
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (a, b) = (self.lhs.get("matmul"), self.rhs.get("matmul"));
        if sink.needs(0) {
            gradient(sink, 0, a.shape(), dy, &b.t());
        }
        if sink.needs(1) {
            gradient(sink, 1, b.shape(), &a.t(), dy);
        }
    }
}

/// Adds `lhs rhs`, summed over broadcast batches, to the gradient of input `i`.
fn gradient(sink: &mut Sink, i: usize, shape: &Shape, lhs: &Tensor, rhs: &Tensor) {
    let same = shape::matmul("matmul", lhs.shape(), rhs.shape()) == *shape;
    if same && sink.dtype(i).is_half() {
        sink.add(i, made("matmul", lhs, rhs, sink.dtype(i)));
    } else if same {
        sink.add_with(i, |into| multiply("matmul", lhs, rhs, into));
    } else {
        sink.add(i, multiply("matmul", lhs, rhs, Destination::New).sum_to(shape));
    }
}

impl Tensor {
    /// Matrix product `[.., m, k] x [.., k, n] -> [.., m, n]`; leading axes broadcast.
    ///
    /// Transposed views are read in place. f16 and bf16 operands are multiplied and summed in f32, and the result is f32.
    /// Matrix units multiply f16 only; bf16 is never rounded to it, because f16 has not its range. In a scope of 16 bits
    /// ([`autocast`](crate::autocast)), operands are converted to its type, which the result has as well.
    /// Derivatives: `da = dy b^T`, `db = a^T dy`.
    ///
    /// # Panics
    /// When an operand has fewer than two axes, the inner sizes differ, or a type is not a float.
    ///
    /// ```no_run
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let a = Tensor::from_slice(&gpu, &[1.0f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(a.matmul(&a.t()).to_vec::<f32>()?, [5.0, 11.0, 11.0, 25.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "mm")]
    #[track_caller]
    pub fn matmul(&self, rhs: &Tensor) -> Tensor {
        same_gpu("matmul", &[self, rhs]);
        let to = shape::matmul("matmul", self.shape(), rhs.shape());
        // With one matrix on the right, a batch merely adds rows, and the weight's gradient is one product.
        if rhs.shape().len() == 2 && self.shape().len() > 2 {
            let k = self.shape()[self.shape().len() - 1];
            let rows: usize = to[..to.len() - 1].iter().product();
            return self.reshape([rows, k]).matmul(rhs).reshape(to);
        }
        for x in [self, rhs] {
            assert!(x.dtype().is_float(), "matmul: needs floats, got {}; cast first", x.dtype());
        }
        let (a, b) = (narrow::operand(self), narrow::operand(rhs));
        let y = made("matmul", &a, &b, precision().dtype());
        y.made_by(&[self, rhs], || Box::new(Matmul { lhs: Saved::new(&a), rhs: Saved::new(&b) }))
    }
}

/// The reference: three loops per batch, in f64.
pub(crate) fn matmul64(a: &Array, b: &Array) -> Array {
    let to = shape::matmul("reference", &a.shape, &b.shape);
    let (m, n, k) = (to[to.len() - 2], to[to.len() - 1], a.shape[a.shape.len() - 1]);
    let batch = Shape::new(&to[..to.len() - 2]);
    let start = |x: &Array, flat: usize| {
        let own = Shape::new(&x.shape[..x.shape.len() - 2]);
        let strides = shape::expand_strides("reference", &own, &own.strides(), &batch);
        let plain = batch.strides();
        let at: usize = (0..batch.len()).map(|axis| flat / plain[axis] % batch[axis] * strides[axis]).sum();
        at * x.shape[x.shape.len() - 2] * x.shape[x.shape.len() - 1]
    };
    Array::from_fn(to, |i| {
        let (b0, row, col) = (i / (m * n), i / n % m, i % n);
        let (a0, b0) = (start(a, b0), start(b, b0));
        (0..k).map(|q| a.data[a0 + row * k + q] * b.data[b0 + q * n + col]).sum()
    })
}

/// A product `[batch, m, n, k]` of two arrays of this type.
fn sized([batch, m, n, k]: [usize; 4], dtype: DType) -> Case {
    let family = match dtype {
        DType::F16 => "matmul f16",
        DType::Bf16 => "matmul bf16",
        _ => "matmul",
    };
    let name = if batch > 1 { format!("{batch}x({m}x{k}x{n})") } else { format!("{m}x{k}x{n}") };
    let input = |rows, columns| {
        let axes = [batch, rows, columns];
        let input = Input::normal(Shape::new(&axes[(batch == 1) as usize..])).dtype(dtype);
        if dtype == DType::F32 { input } else { input.fixed() }
    };
    let inputs = vec![input(m, k), input(k, n)];
    let elements = [(0, 0, 0), (batch / 2, m / 2, n / 3), (batch - 1, m - 1, n - 1)];
    let elements = elements.map(|(item, row, column)| (item * m + row) * n + column);
    let reference = |x: &[Array]| matmul64(&x[0], &x[1]);
    Case::new(name, inputs, |x| x[0].matmul(&x[1]), reference).timed(family, elements, move |x, at| {
        let (row, column) = (x[0].part([1, k], at / n * k), at / (m * n) * k * n + at % n);
        let column = Array::from_fn([k, 1], |i| x[1].data[column + i * n]);
        let norm = (0..k).map(|i| (row.data[i] * column.data[i]).powi(2)).sum::<f64>().sqrt();
        let bound = 4.0 * DType::F32.roundoff() * (k as f64).sqrt() * norm;
        Want { value: matmul64(&row, &column).data[0], bound }
    })
}

/// The rows of the benchmark, and small ones for tests.
fn timed() -> Vec<Case> {
    let rows = tune::BENCHED.into_iter().map(|size| {
        let (cpu, gpu) = match size[1].min(size[2]) {
            2048 => (When::Full, When::Quick),
            4096 => (When::Never, When::Full),
            _ => (When::Quick, When::Quick),
        };
        sized(size, DType::F32).when(cpu, gpu)
    });
    let mut all: Vec<Case> = rows.collect();
    all.push(sized([1, 1024, 1024, 1024], DType::F16).when(When::Quick, When::Quick));
    all.push(sized([1, 4096, 4096, 4096], DType::F16).when(When::Never, When::Quick));
    all.extend([sized([1, 5, 3, 7], DType::F32), sized([3, 4, 12, 8], DType::F32)]);
    all.extend([DType::F16, DType::Bf16].map(|dtype| sized([1, 8, 12, 16], dtype)));
    all
}

/// Products of operands of 16 bits: those that are cast first, sizes in whole vectors, for which the kernel unpacks them as
/// it loads, products with a short side, and operands of two types.
fn halves() -> Vec<Case> {
    let (f16, bf16) = (DType::F16, DType::Bf16);
    let mut all = Vec::new();
    for [left, right] in [[f16, f16], [bf16, bf16], [f16, bf16], [bf16, DType::F32]] {
        let types = if left == right { left.to_string() } else { format!("{left} and {right}") };
        for (m, n, k) in [(5, 9, 12), (12, 20, 8), (36, 68, 20), (4, 72, 132), (72, 8, 132)] {
            let half = |shape: [usize; 2], dtype| Input::normal(shape).dtype(dtype).fixed();
            let inputs = || vec![half([m, k], left), half([k, n], right)];
            let turned = |x: &Tensor| x.transpose(0, 1).contiguous().t();
            let reference = |x: &[Array]| matmul64(&x[0], &x[1]);
            all.push(Case::new(
                format!("{types} operands {m} {n} {k}"),
                inputs(),
                |x| x[0].matmul(&x[1]),
                reference,
            ));
            all.push(Case::new(
                format!("{types} transposed {m} {n} {k}"),
                inputs(),
                move |x| turned(&x[0]).matmul(&turned(&x[1])),
                reference,
            ));
        }
    }
    all
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = timed();
    let shapes: [(&[usize], &[usize]); 8] = [
        (&[1, 1], &[1, 1]),
        (&[4, 8], &[8, 12]),
        (&[7, 13], &[13, 5]),
        (&[67, 5], &[5, 3]),
        (&[2, 3, 5], &[5, 7]),
        (&[2, 1, 3, 4], &[5, 4, 8]),
        (&[3, 5, 6], &[3, 6, 4]),
        (&[2, 2, 2, 3, 2], &[2, 1, 2, 2, 3]),
    ];
    for (a, b) in shapes {
        let inputs = vec![Input::normal(a), Input::normal(b)];
        all.push(Case::new(
            format!("{a:?} {b:?}"),
            inputs,
            |x| x[0].matmul(&x[1]),
            |x| matmul64(&x[0], &x[1]),
        ));
    }
    // Operands that are stored transposed: the views are read in place, in vectors along the other axis.
    let t64 = |x: &Array| {
        Array::from_fn([x.shape[1], x.shape[0]], |i| x.data[i % x.shape[0] * x.shape[1] + i / x.shape[0]])
    };
    for (m, n, k) in [(8, 12, 4), (9, 7, 5), (68, 36, 20)] {
        let fixed = |x: Input| if m > 60 { x.fixed() } else { x };
        let inputs = vec![fixed(Input::normal([k, m])), fixed(Input::normal([n, k]))];
        all.push(Case::new(
            format!("transposed {m} {n} {k}"),
            inputs,
            |x| x[0].t().matmul(&x[1].t()),
            move |x| matmul64(&t64(&x[0]), &t64(&x[1])),
        ));
    }
    // Sizes above every tile, with integers whose sums need 20 bits. Equality shows that no term is lost and none is f16.
    // Batches with a long inner axis, which GPUs cut into parts.
    let whole = |shape: &[usize]| Input::integers(shape, DType::F32, -60, 61);
    all.push(
        Case::new(
            "integers 2 3 5 7 516",
            vec![whole(&[2, 3, 5, 516]), whole(&[3, 516, 7])],
            |x| x[0].matmul(&x[1]),
            |x| matmul64(&x[0], &x[1]),
        )
        .exact(),
    );
    for (m, n, k) in [(130, 140, 68), (129, 133, 67), (200, 3, 500), (20, 24, 2048), (7, 5, 1540)] {
        let whole = |shape: [usize; 2]| Input::integers(shape, DType::F32, -60, 61);
        let inputs = vec![whole([m, k]), whole([k, n])];
        all.push(
            Case::new(
                format!("integers {m} {n} {k}"),
                inputs,
                |x| x[0].matmul(&x[1]),
                |x| matmul64(&x[0], &x[1]),
            )
            .exact(),
        );
    }
    all.extend(halves());
    for (m, n, k) in [(1, 68, 260), (7, 132, 516), (68, 5, 260), (132, 8, 36), (3, 132, 12), (200, 8, 8)] {
        let whole = |shape: [usize; 2]| Input::integers(shape, DType::F32, -60, 61);
        let inputs = vec![whole([m, k]), whole([k, n])];
        all.push(
            Case::new(
                format!("thin {m} {n} {k}"),
                inputs.clone(),
                |x| x[0].matmul(&x[1]),
                |x| matmul64(&x[0], &x[1]),
            )
            .exact(),
        );
        let cast = |x: &Tensor| x.transpose(0, 1).contiguous().t();
        all.push(
            Case::new(
                format!("thin transposed {m} {n} {k}"),
                inputs,
                move |x| cast(&x[0]).matmul(&cast(&x[1])),
                |x| matmul64(&x[0], &x[1]),
            )
            .exact(),
        );
    }
    let slices = vec![Input::normal([9, 10]).fill(Fill::Normal(1.0)), Input::normal([4, 6])];
    all.push(Case::new(
        "slices",
        slices,
        |x| x[0].slice(1, 3..7).matmul(&x[1].slice(1, 1..6)),
        |x| {
            let a = Array::from_fn([9, 4], |i| x[0].data[i / 4 * 10 + 3 + i % 4]);
            let b = Array::from_fn([4, 5], |i| x[1].data[i / 5 * 6 + 1 + i % 5]);
            matmul64(&a, &b)
        },
    ));
    all
}
