//! Functions of one element. They are pending expressions, so a chain of them is one kernel.

use crate::dtype::DType;
use crate::gpu::value::fuse::Scalar;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::timed::{Want, When};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// `y = f(x)` with `dx = dy * f'`. In the template of the derivative, `$0 = x` and `$1 = dy`.
struct Unary {
    name: &'static str,
    derivative: &'static str,
    x: Saved,
}

impl Op for Unary {
    fn name(&self) -> &'static str {
        self.name
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let x = self.x.get(self.name);
        sink.add(0, Tensor::lazy(self.name, self.derivative, DType::F32, *x.shape(), &[x, dy]));
    }
}

impl Tensor {
    #[track_caller]
    fn unary(&self, name: &'static str, template: &'static str, derivative: &'static str) -> Tensor {
        assert!(self.dtype().is_float(), "{name}: needs floats, got {}; cast first", self.dtype());
        let y = Tensor::lazy(name, template, self.dtype(), *self.shape(), &[self]);
        y.made_by(&[self], || Box::new(Unary { name, derivative, x: Saved::new(self) }))
    }

    /// The square root with a derivative of 0 at 0, where a sum of squares has no slope in any direction.
    #[track_caller]
    pub(in crate::ops) fn root(&self) -> Tensor {
        let slope = "pick4(0.5 * $1 * rsqrt_of($0), vec4<f32>(0.0), is_equal($0, vec4<f32>(0.0)))";
        self.unary("sqrt", "sqrt_of($0)", slope)
    }
}

struct ScaleGradient {
    factor: Saved,
}

impl Op for ScaleGradient {
    fn name(&self) -> &'static str {
        "scale_gradient"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            sink.add(0, dy.mul(self.factor.get(self.name())));
        }
    }
}

struct Cast;

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        // The sink converts it to the type of the input's gradient.
        if let Some(dy) = &dy[0] {
            sink.add(0, dy.clone());
        }
    }
}

impl Tensor {
    /// Returns this tensor, with its gradient multiplied by `factor`, whose shape is the same or broadcasts to it. For
    /// parameters whose step size must differ from their gradient's, see [`crate::share::hashed::Draw::stabilizer`].
    ///
    /// # Panics
    /// If the shapes do not fit, for integers, or if the tensors are on different devices.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let half = Tensor::scalar(&gpu, 0.5);
    /// let y = x.scale_gradient(&half);
    /// assert_eq!(y.to_vec::<f32>()?, [1.0, 2.0]);
    /// let grads = y.sum_all().backward()?;
    /// assert_eq!(grads.get(&x).unwrap().to_vec::<f32>()?, [0.5, 0.5]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn scale_gradient(&self, factor: &Tensor) -> Tensor {
        same_gpu("scale_gradient", &[self, factor]);
        let fits = factor.expand(*self.shape()).shape() == self.shape();
        assert!(fits && self.dtype().is_float(), "scale_gradient: {} of {}", self.shape(), self.dtype());
        self.detach().made_by(&[self], || Box::new(ScaleGradient { factor: Saved::new(factor) }))
    }

    /// Converts the elements to another type. Floats to integers truncate towards zero and saturate, and NaN gives 0.
    /// f32 to f16 or bf16 rounds to nearest even. The gradient passes between floats.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::DType;
    /// let x = Tensor::from_slice(&gpu, &[1.9f32, -1.9, 300.0], [3]);
    /// assert_eq!(x.cast(DType::I32).to_vec::<i32>()?, [1, -1, 300]);
    /// assert_eq!(x.cast(DType::U32).to_vec::<u32>()?, [1, 0, 300]); // below 0 is 0
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn cast(&self, dtype: DType) -> Tensor {
        if dtype == self.dtype() {
            return self.clone();
        }
        let template = match (self.dtype(), dtype) {
            (a, b) if a.is_float() && b.is_float() => "$0",
            (a, DType::U32) if a.is_float() => "u32_saturated($0)",
            (a, DType::I32) if a.is_float() => "i32_saturated($0)",
            (_, DType::F32 | DType::F16 | DType::Bf16) => "vec4<f32>($0)",
            (_, DType::U32) => "vec4<u32>($0)",
            (_, DType::I32) => "vec4<i32>($0)",
        };
        let y = Tensor::lazy("cast", template, dtype, *self.shape(), &[self]);
        if !(self.dtype().is_float() && dtype.is_float()) {
            return y;
        }
        y.made_by(&[self], || Box::new(Cast))
    }
}

/// Columns: docs, name, elements of the documentation's example and what they become, WGSL of the value, WGSL of `dx`
/// from `$0 = x` and `$1 = dy`, the value in f64, the test inputs, and the allowed error.
macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident [$from:literal => $to:literal]: $value:literal, $dx:literal, |$x:ident| $reference:expr, $fill:expr, $ulps:expr;)*) => {
        impl Tensor {
            $($(#[$doc])*
            ///
            /// # Panics
            /// If the elements are integers.
            ///
            /// ```
            /// # use tiebeam::{Gpu, Tensor};
            /// # let gpu = Gpu::open()?;
            #[doc = concat!("let x = Tensor::from_slice(&gpu, &[", $from, "], [3]);")]
            #[doc = concat!("for (y, expected) in x.", stringify!($name), "().to_vec::<f32>()?.iter().zip([", $to, "]) {")]
            ///     assert!((y - expected).abs() < 1e-4);
            /// }
            /// # Ok::<(), tiebeam::Error>(())
            /// ```
            #[track_caller]
            pub fn $name(&self) -> Tensor {
                self.unary(stringify!($name), $value, $dx)
            })*
        }

        fn table() -> Vec<(&'static str, fn(&Tensor) -> Tensor, fn(f64) -> f64, Fill, f64)> {
            vec![$((stringify!($name), Tensor::$name, |$x: f64| $reference, $fill, $ulps)),*]
        }
    };
}

// The last column is the allowed error in roundoffs (2^-24 of the result). Functions that WGSL leaves less accurate
// than this are computed by our own code in shaders/lib. All of them return NaN for NaN.
unary! {
    /// `-x`
    neg ["1f32, -2.0, 0.5" => "-1.0, 2.0, -0.5"]: "-$0", "-$1", |x| -x, Fill::Normal(1.0), 1.0;
    /// `e^x`, within 3 roundoffs (2^-24 of the result) on every adapter. It is infinite above 88.72. Below -87.33 it is
    /// subnormal, or 0 on adapters that flush subnormal numbers.
    exp ["0f32, 1.0, -1.0" => "1.0, 2.7183, 0.3679"]: "exp_of($0)", "$1 * exp_of($0)", |x| x.exp(), Fill::Normal(2.0), 3.0;
    /// Natural logarithm, within 2 roundoffs on every adapter, also for subnormal numbers. -infinity at 0 and -0, NaN
    /// below.
    log ["1f32, 10.0, 0.5" => "0.0, 2.3026, -0.6931"]: "log_of($0)", "$1 / $0", |x| x.ln(), Fill::Uniform(0.05, 8.0), 2.0;
    /// `e^x - 1`, within 4 roundoffs on every adapter, also near 0, where `exp` less 1 would lose its digits.
    expm1 ["0f32, 1.0, -1.0" => "0.0, 1.7183, -0.6321"]: "expm1_of($0)", "$1 * exp_of($0)", |x| x.exp_m1(), Fill::Normal(1.0), 4.0;
    /// `ln(1 + x)`, within 5 roundoffs on every adapter, also near 0, where `1 + x` would lose the digits of `x`.
    /// -infinity at -1, NaN below.
    log1p ["0f32, 1.0, -0.5" => "0.0, 0.6931, -0.6931"]: "log1p_of($0)", "$1 / (1.0 + $0)", |x| x.ln_1p(), Fill::Uniform(-0.9, 4.0), 5.0;
    /// Square root, within 2 roundoffs on every adapter, also for subnormal numbers. -0 at -0, NaN below. The
    /// derivative is `0.5 / sqrt(x)`, infinite at 0.
    sqrt ["0f32, 2.0, 9.0" => "0.0, 1.4142, 3.0"]: "sqrt_of($0)", "0.5 * $1 * rsqrt_of($0)", |x| x.sqrt(), Fill::Uniform(0.05, 8.0), 2.0;
    /// `1 / sqrt(x)`, within 2 ulp (4 roundoffs). Infinite at 0, -infinity at -0, NaN below. The derivative is `-0.5
    /// x^(-3/2)`.
    rsqrt ["1f32, 4.0, 0.25" => "1.0, 0.5, 2.0"]: "rsqrt_of($0)", "-0.5 * $1 * rsqrt_of($0) * rsqrt_of($0) * rsqrt_of($0)", |x| 1.0 / x.sqrt(), Fill::Uniform(0.05, 8.0), 4.0;
    /// `1 / x`, within 2.5 ulp for `|x|` from 2^-126 to 2^126, and outside this range with the adapter's own accuracy.
    /// The derivative is `-1/x / x`, which avoids x^2 because it may be 0 or infinite in f32.
    recip ["1f32, -4.0, 0.25" => "1.0, -0.25, 4.0"]: "(1.0 / $0)", "(-kept($1 / $0, vec4<u32>(p.groups_x >> 31u)) / $0)", |x| 1.0 / x, Fill::Uniform(0.3, 4.0), 5.0;
    /// `x^2`
    square ["0f32, -3.0, 0.5" => "0.0, 9.0, 0.25"]: "$0 * $0", "2.0 * $0 * $1", |x| x * x, Fill::Normal(1.0), 2.0;
    /// Hyperbolic tangent, within 12 roundoffs. Derivative `4 e / (1 + e)^2` with `e = e^(-2|x|)`.
    tanh ["0f32, 1.0, -1.0" => "0.0, 0.7616, -0.7616"]: "tanh_of($0)", "$1 * dtanh($0)", |x| x.tanh(), Fill::Normal(1.0), 12.0;
    /// `1 / (1 + e^-x)`, within 12 roundoffs. Derivative `e / (1 + e)^2` with `e = e^-|x|`.
    sigmoid ["0f32, 2.0, -2.0" => "0.5, 0.8808, 0.1192"]: "sigmoid($0)", "$1 * dsigmoid($0)", |x| 1.0 / (1.0 + (-x).exp()), Fill::Normal(2.0), 12.0;
    /// Error function, within 12 roundoffs. Derivative `2/sqrt(pi) e^(-x^2)`.
    erf ["0f32, 1.0, -1.0" => "0.0, 0.8427, -0.8427"]: "erf($0)", "$1 * 1.1283791670955126 * exp_of(-$0 * $0)", |x| erf64(x), Fill::Normal(1.0), 12.0;
    /// Gaussian error linear unit, in its exact form `x Phi(x)`. The left tail is computed from erfc, not from `1 +
    /// erf`. NaN at -infinity, where the formula is 0 times infinity. Source: Hendrycks & Gimpel 2016.
    gelu ["0f32, 1.0, -1.0" => "0.0, 0.8413, -0.1587"]: "gelu($0)", "$1 * dgelu($0)", |x| 0.5 * x * (1.0 + erf64(x * std::f64::consts::FRAC_1_SQRT_2)), Fill::Normal(1.0), 64.0;
    /// GELU's tanh form: `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`. NaN at -infinity.
    gelu_tanh ["0f32, 1.0, -1.0" => "0.0, 0.8412, -0.1588"]: "gelu_tanh($0)", "$1 * dgelu_tanh($0)",
        |x| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()), Fill::Normal(1.0), 64.0;
    /// `x sigmoid(x)`. NaN at -infinity.
    silu ["0f32, 1.0, -1.0" => "0.0, 0.7311, -0.2689"]: "silu($0)", "$1 * dsilu($0)", |x| x / (1.0 + (-x).exp()), Fill::Normal(2.0), 16.0;
    /// `ln(1 + e^x)`, a smooth form of [`relu`](Self::relu), within 10 roundoffs. It neither overflows for large x nor
    /// loses digits for negative x. The derivative is [`sigmoid`](Self::sigmoid). Source: Dugas et al. 2001.
    softplus ["0f32, 200.0, -200.0" => "0.6931, 200.0, 0.0"]: "softplus_of($0)", "$1 * sigmoid($0)", |x| if x.is_nan() { x } else { x.max(0.0) + (-x.abs()).exp().ln_1p() },
        Fill::Normal(2.0), 10.0;
    /// Exponential linear unit: `x` above 0, else `e^x - 1`, within 4 roundoffs. The derivative is 1 above 0 and `e^x`
    /// elsewhere. Source: Clevert et al., arXiv 1511.07289, with alpha = 1.
    elu ["0f32, 2.0, -200.0" => "0.0, 2.0, -1.0"]: "elu_of($0)", "delu($0, $1)", |x| if x > 0.0 { x } else { x.exp_m1() }, Fill::Normal(1.0), 4.0;
    /// `max(x, 0)`. The derivative at 0 is 0. NaN gives NaN, also for the derivative.
    relu ["0f32, 3.0, -3.0" => "0.0, 3.0, 0.0"]: "relu($0)", "drelu($0, $1)", |x| if x.is_nan() { x } else { x.max(0.0) }, Fill::Distinct(0.05), 1.0;
    /// Sine, with x in radians, within 4 roundoffs of the result for every x on every adapter, also near the zeros. NaN
    /// at infinity.
    sin ["0f32, 1.0, -1.0" => "0.0, 0.8415, -0.8415"]: "sin_of($0)", "$1 * cos_of($0)", |x| x.sin(), Fill::Normal(2.0), 4.0;
    /// Cosine, with x in radians, within 4 roundoffs of the result for every x on every adapter, also near the zeros.
    /// NaN at infinity.
    cos ["0f32, 1.0, -1.0" => "1.0, 0.5403, 0.5403"]: "cos_of($0)", "-$1 * sin_of($0)", |x| x.cos(), Fill::Normal(2.0), 4.0;
    /// `|x|`. The derivative is 0 at 0 and NaN at NaN.
    abs ["0f32, 3.0, -3.0" => "0.0, 3.0, 3.0"]: "magnitude($0)", "dmagnitude($0, $1)", |x| x.abs(), Fill::Distinct(0.05), 1.0;
}

impl Tensor {
    /// Limits each element to `[low, high]`. The gradient passes inside this range and at its ends. NaN gives NaN, also
    /// for the gradient.
    ///
    /// # Panics
    /// If `low > high` or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[-3f32, 0.5, 3.0], [3]);
    /// assert_eq!(x.clamp(-1.0, 1.0).to_vec::<f32>()?, [-1.0, 0.5, 1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn clamp(&self, low: f32, high: f32) -> Tensor {
        assert!(low <= high, "clamp: low {low} is above high {high}");
        assert!(self.dtype().is_float(), "clamp: needs floats, got {}", self.dtype());
        let limits = [Scalar::F32(low), Scalar::F32(high)];
        let y =
            Tensor::lazy_with("clamp", "limited($0, $1, $2)", self.dtype(), *self.shape(), &[self], &limits);
        y.made_by(&[self], || Box::new(Clamp { low, high, x: Saved::new(self) }))
    }
}

impl Tensor {
    /// `x` above 0, else `slope x`. The derivative is 1 above 0 and `slope` elsewhere, 0 included. NaN gives NaN, also for
    /// the gradient. Source: Maas et al. 2013, "Rectifier Nonlinearities Improve Neural Network Acoustic Models", where
    /// the slope is 0.01.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[2.0f32, 0.0, -4.0], [3]);
    /// assert_eq!(x.leaky_relu(0.25).to_vec::<f32>()?, [2.0, 0.0, -1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// If the elements are integers.
    #[track_caller]
    pub fn leaky_relu(&self, slope: f32) -> Tensor {
        assert!(self.dtype().is_float(), "leaky_relu: needs floats, got {}; cast first", self.dtype());
        let (template, number) = ("leaky_relu_of($0, $1)", [Scalar::F32(slope)]);
        let y = Tensor::lazy_with("leaky_relu", template, self.dtype(), *self.shape(), &[self], &number);
        y.made_by(&[self], || Box::new(LeakyRelu { slope, x: Saved::new(self) }))
    }
}

struct LeakyRelu {
    slope: f32,
    x: Saved,
}

impl Op for LeakyRelu {
    fn name(&self) -> &'static str {
        "leaky_relu"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (x, slope) = (self.x.get("leaky_relu"), [Scalar::F32(self.slope)]);
        let template = "dleaky_relu($0, $1, $2)";
        sink.add(0, Tensor::lazy_with("leaky_relu", template, DType::F32, *x.shape(), &[x, dy], &slope));
    }
}

struct Clamp {
    low: f32,
    high: f32,
    x: Saved,
}

impl Op for Clamp {
    fn name(&self) -> &'static str {
        "clamp"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let x = self.x.get("clamp");
        let template = "dlimited($0, $1, $2, $3)";
        let limits = [Scalar::F32(self.low), Scalar::F32(self.high)];
        sink.add(0, Tensor::lazy_with("clamp", template, DType::F32, *x.shape(), &[x, dy], &limits));
    }
}

/// erf in f64 to about 1e-15: by its series below 3, and by a continued fraction of erfc above.
pub(crate) fn erf64(x: f64) -> f64 {
    let a = x.abs();
    if a > 6.0 {
        return x.signum();
    }
    if a < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        return sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let mut f = a;
    for n in (1..200).rev() {
        f = a + n as f64 / 2.0 / f;
    }
    x.signum() * (1.0 - (-a * a).exp() / f / std::f64::consts::PI.sqrt())
}

/// The reference of [`Tensor::gelu_tanh`].
pub(crate) fn gelu_tanh64(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// A chain that the engine computes in one kernel.
fn sized(n: usize) -> Case {
    let (rows, width) = (n.div_ceil(1024), n.min(1024));
    let one = |x: &[Array], i: usize| {
        let v = x[0].data[i] * x[1].data[i] + x[2].data[i];
        gelu_tanh64(v)
    };
    Case::new(
        format!("{rows}x{width}"),
        (0..3).map(|_| Input::normal([rows, width]).fill(Fill::Uniform(-1.0, 1.0))).collect(),
        |x| x[0].mul(&x[1]).add(&x[2]).gelu_tanh(),
        move |x| Array::from_fn([rows, width], |i| one(x, i)),
    )
    // Near -2 the factor 1 + tanh is a difference of nearly equal numbers.
    .ulps(256.0, 512.0)
    .timed("gelu(x*y+z)", [0, n / 2, n - 1], move |x, at| {
        let value = one(x, at);
        Want { value, bound: 1e-4 * value.abs() + 1e-6 }
    })
}

pub(super) fn cases() -> Vec<Case> {
    let map = |f: fn(f64) -> f64| move |x: &[Array]| Array::from_fn(x[0].shape, |i| f(x[0].data[i]));
    let mut all: Vec<Case> = [20, 22].map(|bits| sized(1 << bits).when(When::Quick, When::Quick)).into();
    all.extend([sized(1 << 16).when(When::Full, When::Full), sized(67)]);
    for (name, forward, reference, fill, ulps) in table() {
        for shape in [[1, 1], [7, 13], [3, 67]] {
            let input = Input::normal(shape).fill(fill.clone());
            let case =
                Case::new(format!("{name} {shape:?}"), vec![input], move |x| forward(&x[0]), map(reference));
            all.push(case.ulps(ulps, 2.0 * ulps));
        }
        for dtype in [DType::F16, DType::Bf16] {
            let input = Input::normal([5, 9]).fill(fill.clone()).dtype(dtype).fixed();
            let name = format!("{name} {dtype}");
            let case = Case::new(name, vec![input], move |x| forward(&x[0]), map(reference));
            all.push(case.ulps(ulps, ulps));
        }
    }
    all.extend(far_cases());
    let input = vec![Input::normal([4, 11]).fill(Fill::Distinct(0.1))];
    all.push(Case::new(
        "clamp",
        input,
        |x| x[0].clamp(-0.93, 1.07),
        map(|x| x.clamp(-0.93f32 as f64, 1.07f32 as f64)),
    ));
    let leaky = |slope: f32| {
        let reference = move |x: f64| if x > 0.0 { x } else { slope as f64 * x };
        let input = vec![Input::normal([5, 13]).fill(Fill::Distinct(0.05))];
        let want = move |x: &[Array]| Array::from_fn(x[0].shape, |i| reference(x[0].data[i]));
        Case::new(format!("leaky_relu {slope}"), input, move |x| x[0].leaky_relu(slope), want)
    };
    all.extend([0.01, -0.3, 2.0].map(leaky));
    let values = vec![
        0.0, 1e-8, 5.96e-8, 6.1e-5, 0.333, 1.0, 2049.0, 2051.0, 65504.0, 65519.0, 65520.0, 1e30, -0.1,
        -3.5e-7,
    ];
    let input = vec![Input::normal([14]).fill(Fill::Values(values)).fixed()];
    let half = |x: &[Array]| Array::from_fn(x[0].shape, |i| half::f16::from_f64(x[0].data[i]).to_f64());
    all.push(
        Case::new("cast to f16 and back", input, |x| x[0].cast(DType::F16).cast(DType::F32), half).exact(),
    );
    all
}

/// Arguments where range reduction, overflow and underflow matter.
fn far_cases() -> Vec<Case> {
    use std::f64::consts::{FRAC_PI_2, PI};
    let turns = [1.0, -1.0, 2.0, 3.0, -7.0, 161.0, 1000.0, 2607.0, 1e6].map(|k| k * FRAC_PI_2);
    let large = [4095.9, 4096.0, -1e4, 1e5, 1e6, -1e8, 1e10, 1e20, 1e30, -3.4e38, PI, 1e-30];
    let exponents =
        vec![88.0, 88.7, -87.3, -87.0, 80.5, -80.5, 0.34657, -0.34658, 1e-6, -1e-10, 104.0, -110.0, 0.0];
    // Includes subnormal numbers and powers of two.
    let positive = vec![
        1e-45,
        1.2e-44,
        1e-40,
        5.9e-39,
        1.1754942e-38,
        1.1754944e-38,
        1e-20,
        0.99999994,
        1.0,
        1.0000001,
        2.0,
        3.4e38,
    ];
    let near_one = [-0.29, -0.2929, -0.293, 0.41, 0.4142, 0.4143, -0.99999994, -1e-30, 0.0];
    type Row = (&'static str, fn(&Tensor) -> Tensor, fn(f64) -> f64, Vec<f64>, f64);
    let rows: [Row; 9] = [
        (
            "expm1 far",
            Tensor::expm1,
            |x| x.exp_m1() as f32 as f64,
            [&exponents[..], &[3.99, 4.01, -4.1]].concat(),
            4.0,
        ),
        ("log1p far", Tensor::log1p, f64::ln_1p, [&positive[..], &near_one].concat(), 5.0),
        (
            "softplus far",
            Tensor::softplus,
            |x| x.max(0.0) + (-x.abs()).exp().ln_1p(),
            [&exponents[..9], &[1e30, -20.0, 20.0]].concat(),
            10.0,
        ),
        ("sin far", Tensor::sin, f64::sin, [&turns[..], &large].concat(), 4.0),
        ("cos far", Tensor::cos, f64::cos, [&turns[..], &large].concat(), 4.0),
        // The reference is rounded to f32, so that it is infinite above 88.72.
        ("exp far", Tensor::exp, |x| x.exp() as f32 as f64, exponents, 4.0),
        ("log far", Tensor::log, f64::ln, positive.clone(), 2.0),
        ("sqrt far", Tensor::sqrt, f64::sqrt, positive.clone(), 2.0),
        ("rsqrt far", Tensor::rsqrt, |x| 1.0 / x.sqrt(), positive, 4.0),
    ];
    let case = |(name, forward, reference, values, ulps): Row| {
        let input = vec![Input::normal([values.len()]).fill(Fill::Values(values)).fixed()];
        let want = move |x: &[Array]| Array::from_fn(x[0].shape, |i| reference(x[0].data[i]));
        Case::new(name, input, move |x| forward(&x[0]), want).ulps(ulps, ulps)
    };
    rows.into_iter().map(case).collect()
}
