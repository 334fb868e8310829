//! Functions of two elements, which broadcast like NumPy's, and `where`. They are pending expressions, like
//! [`unary`](super::unary).

use crate::dtype::DType;
use crate::gpu::value::fuse::Scalar;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::{self, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Operand, Tensor, same_gpu};

/// `y = f(a, b)`. In the templates of the derivatives, `$0 = a`, `$1 = b` and `$2 = dy`.
struct Binary {
    name: &'static str,
    da: &'static str,
    db: &'static str,
    a: Saved,
    b: Side,
}

/// The right-hand side, as it is saved.
enum Side {
    Tensor(Saved),
    Number(f32),
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        self.name
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let a = self.a.get(self.name);
        let b = match &self.b {
            Side::Tensor(b) => Operand::Tensor(b.get(self.name)),
            Side::Number(number) => Operand::Number(*number),
        };
        let shapes = [Some(a.shape()), b.tensor().map(Tensor::shape)];
        for (i, (template, to)) in [self.da, self.db].into_iter().zip(shapes).enumerate() {
            if let Some(to) = to.filter(|_| sink.needs(i)) {
                let dx = if template == "$2" {
                    dy.clone()
                } else {
                    let all = [Operand::Tensor(a), b, Operand::Tensor(dy)];
                    Tensor::lazy_of(self.name, template, DType::F32, *dy.shape(), &all)
                };
                sink.add(i, dx.sum_to(*to));
            }
        }
    }
}

/// The template for integers, if it differs from the one for floats.
fn of_integers(name: &str, dtype: DType) -> Option<&'static str> {
    match (name, dtype) {
        ("div", DType::U32) => Some("quotient_u32($0, $1)"),
        ("div", _) => Some("quotient_i32($0, $1)"),
        ("maximum", _) => Some("max($0, $1)"),
        ("minimum", _) => Some("min($0, $1)"),
        _ => None,
    }
}

/// Refuses a number with integers, whose type it has not.
#[track_caller]
pub(super) fn of_floats<'a>(op: &str, x: &'a Tensor) -> &'a Tensor {
    assert!(
        x.dtype().is_float(),
        "{op}: a number is f32, but the tensor {} is {}; cast it, or make the number a tensor of integers with full_like",
        x.shape(),
        x.dtype()
    );
    x
}

impl Tensor {
    #[track_caller]
    fn binary<'a>(
        &'a self,
        rhs: impl Into<Operand<'a>>,
        name: &'static str,
        template: &'static str,
        [da, db]: [&'static str; 2],
    ) -> Tensor {
        let rhs = rhs.into();
        let (dtype, shape) = self.with(rhs, name);
        let rhs = if name == "pow" { rhs } else { rhs.rounded(dtype) };
        assert!(name != "pow" || dtype.is_float(), "pow: needs floats, got {dtype}; cast first");
        let template = if dtype.is_float() { template } else { of_integers(name, dtype).unwrap_or(template) };
        let y = Tensor::lazy_of(name, template, dtype, shape, &[Operand::Tensor(self), rhs]);
        if !dtype.is_float() {
            return y;
        }
        let record = |b| Box::new(Binary { name, da, db, a: Saved::new(self), b });
        match rhs {
            Operand::Tensor(rhs) => y.made_by(&[self, rhs], || record(Side::Tensor(Saved::new(rhs)))),
            Operand::Number(number) => y.made_by(&[self], || record(Side::Number(number))),
        }
    }

    /// Type and shape of the result with a right-hand side that broadcasts.
    #[track_caller]
    fn with(&self, rhs: Operand, name: &str) -> (DType, Shape) {
        match rhs {
            Operand::Tensor(rhs) => {
                same_gpu(name, &[self, rhs]);
                (self.common(rhs, name), shape::broadcast(name, self.shape(), rhs.shape()))
            }
            Operand::Number(_) => (of_floats(name, self).dtype(), *self.shape()),
        }
    }

    /// The result's type: equal types are kept, two different floats give f32.
    #[track_caller]
    fn common(&self, rhs: &Tensor, name: &str) -> DType {
        match (self.dtype(), rhs.dtype()) {
            (a, b) if a == b => a,
            (a, b) if a.is_float() && b.is_float() => DType::F32,
            (a, b) => panic!("{name}: dtypes differ: lhs {a}, rhs {b}; cast one"),
        }
    }

    #[track_caller]
    fn compare(&self, rhs: Operand, name: &'static str, [floats, integers]: [&'static str; 2]) -> Tensor {
        let (dtype, shape) = self.with(rhs, name);
        let template = if dtype.is_float() { floats } else { integers };
        Tensor::lazy_of(name, template, DType::U32, shape, &[Operand::Tensor(self), rhs.rounded(dtype)])
    }

    /// `x * scale`, with one number for all elements.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, -2.0], [2]);
    /// assert_eq!(x.scale(3.0).to_vec::<f32>()?, [3.0, -6.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn scale(&self, scale: f32) -> Tensor {
        self.affine(scale, 0.0)
    }

    /// `x * scale + shift`, with one pair of numbers for all elements.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, -2.0], [2]);
    /// assert_eq!(x.affine(3.0, 0.5).to_vec::<f32>()?, [3.5, -5.5]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn affine(&self, scale: f32, shift: f32) -> Tensor {
        assert!(self.dtype().is_float(), "affine: needs floats, got {}", self.dtype());
        let numbers = [Scalar::F32(scale), Scalar::F32(shift)];
        let y = match shift {
            0.0 => Tensor::lazy_with("scale", "$0 * $1", self.dtype(), *self.shape(), &[self], &numbers[..1]),
            _ => Tensor::lazy_with("affine", "$0 * $1 + $2", self.dtype(), *self.shape(), &[self], &numbers),
        };
        y.made_by(&[self], || Box::new(Affine { scale }))
    }

    /// `self` where `mask` is not 0, else `other`, a tensor or a number. All broadcast. The gradient goes to the chosen side.
    ///
    /// # Panics
    /// If the shapes do not broadcast or `mask` is not an integer tensor; for a number, if `self` has integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, -2.0, 3.0], [3]);
    /// assert_eq!(x.where_mask(&x.gt(0.0), 0.0).to_vec::<f32>()?, [1.0, 0.0, 3.0]);
    /// assert_eq!(x.where_mask(&x.gt(0.0), &x.scale(0.5)).to_vec::<f32>()?, [1.0, -1.0, 3.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "where")]
    #[track_caller]
    pub fn where_mask<'a>(&'a self, mask: &'a Tensor, other: impl Into<Operand<'a>>) -> Tensor {
        let other = other.into();
        same_gpu("where", &[self, mask]);
        assert!(!mask.dtype().is_float(), "where: the mask must be u32 or i32, got {}", mask.dtype());
        let (dtype, shape) = self.with(other, "where");
        let shape = shape::broadcast("where", &shape, mask.shape());
        let mask = mask.cast(DType::U32);
        let template = match dtype.is_float() {
            true => "pick4($2, $1, $0 != vec4<u32>(0u))",
            false => "select($2, $1, $0 != vec4<u32>(0u))",
        };
        let all = [Operand::Tensor(&mask), Operand::Tensor(self), other];
        let y = Tensor::lazy_of("where", template, dtype, shape, &all);
        if !dtype.is_float() {
            return y;
        }
        let sides: Vec<&Tensor> = [Some(self), other.tensor()].into_iter().flatten().collect();
        let shapes = sides.iter().map(|side| *side.shape()).collect();
        y.made_by(&sides, || Box::new(Where { mask: Saved::new(&mask), shapes }))
    }
}

struct Affine {
    scale: f32,
}

impl Op for Affine {
    fn name(&self) -> &'static str {
        "affine"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            let scale = [Scalar::F32(self.scale)];
            sink.add(0, Tensor::lazy_with("scale", "$0 * $1", DType::F32, *dy.shape(), &[dy], &scale));
        }
    }
}

struct Where {
    mask: Saved,
    /// The shapes of the sides that are tensors.
    shapes: Vec<Shape>,
}

impl Op for Where {
    fn name(&self) -> &'static str {
        "where"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let mask = self.mask.get("where");
        let chosen = [
            "pick4(vec4<f32>(0.0), $1, $0 != vec4<u32>(0u))",
            "pick4(vec4<f32>(0.0), $1, $0 == vec4<u32>(0u))",
        ];
        for (i, (template, shape)) in chosen.into_iter().zip(&self.shapes).enumerate() {
            if sink.needs(i) {
                let dx = Tensor::lazy("where", template, DType::F32, *dy.shape(), &[mask, dy]);
                sink.add(i, dx.sum_to(*shape));
            }
        }
    }
}

/// Columns: docs, name, what it takes, the result of the documentation's example, WGSL of the value, WGSL of both gradients from
/// `$0 = a`, `$1 = b` and `$2 = dy`.
macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident($rhs:ty) [$result:literal]: $value:literal, [$da:literal, $db:literal];)*) => {
        impl Tensor {
            $($(#[$doc])*
            ///
            /// # Panics
            /// If the shapes do not broadcast or the dtypes differ; with a number and integers.
            ///
            /// ```
            /// # use tiebeam::{Gpu, Tensor};
            /// # let gpu = Gpu::open()?;
            /// let a = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
            /// let b = Tensor::from_slice(&gpu, &[2f32, 3.0], [2]); // used for each row of `a`
            #[doc = concat!("for (y, expected) in a.", stringify!($name), "(&b).to_vec::<f32>()?.iter().zip([", $result, "]) {")]
            ///     assert!((y - expected).abs() < 1e-4);
            /// }
            /// # Ok::<(), tiebeam::Error>(())
            /// ```
            #[track_caller]
            pub fn $name<'a>(&'a self, rhs: $rhs) -> Tensor {
                self.binary(rhs, stringify!($name), $value, [$da, $db])
            })*
        }
    };
}

binary! {
    /// `a + b`
    add(&'a Tensor) ["3.0, 5.0, 5.0, 7.0"]: "$0 + $1", ["$2", "$2"];
    /// `a - b`
    sub(&'a Tensor) ["-1.0, -1.0, 1.0, 1.0"]: "$0 - $1", ["$2", "-$2"];
    /// `a * b`
    mul(&'a Tensor) ["2.0, 6.0, 6.0, 12.0"]: "$0 * $1", ["$2 * $1", "$2 * $0"];
    /// `a / b`, within 2.5 ulp for `|b|` from 2^-126 to 2^126, and outside this range with the adapter's own accuracy.
    /// The gradients are `dy/b` and `-(dy/b)(a/b)`, which avoid b^2 because it may be 0 or infinite in f32. Integers
    /// truncate, `x / 0` is 0, and the least i32 divided by -1 is itself.
    div(&'a Tensor) ["0.5, 0.6667, 1.5, 1.3333"]: "$0 / $1", ["($2 / $1)", "(-kept($2 / $1, vec4<u32>(p.groups_x >> 31u)) * ($0 / $1))"];
    /// `a ^ b`, with a tensor or a number `b`, as in IEEE 754: `x^0` and `1^x` are 1 even for NaN, a negative base needs a
    /// whole exponent and is NaN otherwise, and zeros and infinities follow their limits. Floats only.
    ///
    /// Within `4 + 0.15 |b ln a|` roundoffs (2^-24 of the result) on every adapter, so within 17. The gradients are `b
    /// a^(b-1)`, which is 0 for exponent 0, and `a^b ln a`, which is 0 at base 0 with an exponent of at least 0, and
    /// NaN for a negative base.
    pow(impl Into<Operand<'a>>) ["1.0, 8.0, 9.0, 64.0"]: "power($0, $1)", ["dpower_base($0, $1, $2)", "dpower_exponent($0, $1, $2)"];
    /// The larger element, of two tensors or of a tensor and a number, NaN if either is NaN. At a tie a tensor gets half of the
    /// gradient, where that of [`Tensor::clamp`] at its limit has all of it.
    maximum(impl Into<Operand<'a>>) ["2.0, 3.0, 3.0, 4.0"]: "max_nan($0, $1)", ["dmax($0, $1, $2)", "dmax($1, $0, $2)"];
    /// The smaller element, of two tensors or of a tensor and a number, NaN if either is NaN. At a tie a tensor gets half of
    /// the gradient.
    minimum(impl Into<Operand<'a>>) ["1.0, 2.0, 2.0, 3.0"]: "min_nan($0, $1)", ["dmax($1, $0, $2)", "dmax($0, $1, $2)"];
}

/// Columns: name, sign, the result where an element is NaN, the result of the documentation's example, WGSL for floats and
/// for integers.
macro_rules! compare {
    ($($name:ident $sign:literal $nan:literal [$result:literal]: $floats:literal, $integers:literal;)*) => {
        impl Tensor {
            $(#[doc = concat!("1 where `a ", $sign, " b`, with a tensor or a number `b`, else 0, as u32: a mask for [`Tensor::where_mask`]. ", $nan, " where either is NaN.")]
            ///
            /// # Panics
            /// If the shapes do not broadcast or the dtypes differ; with a number and integers.
            ///
            /// ```
            /// # use tiebeam::{Gpu, Tensor};
            /// # let gpu = Gpu::open()?;
            /// let a = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3]);
            /// let b = Tensor::from_slice(&gpu, &[2f32, 2.0, 2.0], [3]);
            #[doc = concat!("assert_eq!(a.", stringify!($name), "(&b).to_vec::<u32>()?, [", $result, "]); // a ", $sign, " b")]
            #[doc = concat!("assert_eq!(a.", stringify!($name), "(2.0).to_vec::<u32>()?, [", $result, "]);")]
            /// # Ok::<(), tiebeam::Error>(())
            /// ```
            #[track_caller]
            pub fn $name<'a>(&'a self, rhs: impl Into<Operand<'a>>) -> Tensor {
                let templates = [concat!("vec4<u32>(", $floats, ")"), concat!("vec4<u32>(", $integers, ")")];
                self.compare(rhs.into(), stringify!($name), templates)
            })*
        }
    };
}

compare! {
    eq "==" 0 ["0, 1, 0"]: "is_equal($0, $1)", "$0 == $1";
    ne "!=" 1 ["1, 0, 1"]: "!is_equal($0, $1)", "$0 != $1";
    lt "<" 0 ["1, 0, 0"]: "is_less($0, $1)", "$0 < $1";
    le "<=" 0 ["1, 1, 0"]: "is_most($0, $1)", "$0 <= $1";
    gt ">" 0 ["0, 0, 1"]: "is_less($1, $0)", "$0 > $1";
    ge ">=" 0 ["0, 1, 1"]: "is_most($1, $0)", "$0 >= $1";
}

macro_rules! operator {
    ($($trait:ident $method:ident;)*) => {
        $(impl std::ops::$trait<&Tensor> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, rhs: &Tensor) -> Tensor {
                Tensor::$method(self, rhs)
            }
        }
        impl std::ops::$trait<Tensor> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, rhs: Tensor) -> Tensor {
                Tensor::$method(&self, &rhs)
            }
        }
        impl std::ops::$trait<&Tensor> for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, rhs: &Tensor) -> Tensor {
                Tensor::$method(&self, rhs)
            }
        }
        impl std::ops::$trait<Tensor> for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, rhs: Tensor) -> Tensor {
                Tensor::$method(self, &rhs)
            }
        })*
    };
}

operator! { Add add; Sub sub; Mul mul; Div div; }

/// Applies `f` to two arrays that are broadcast against each other.
pub(crate) fn broadcast64(a: &Array, b: &Array, f: impl Fn(f64, f64) -> f64) -> Array {
    let shape = shape::broadcast("reference", &a.shape, &b.shape);
    let index = |x: &Array, flat: usize| {
        let strides = shape::expand_strides("reference", &x.shape, &x.shape.strides(), &shape);
        let plain = shape.strides();
        (0..shape.len()).map(|axis| flat / plain[axis] % shape[axis] * strides[axis]).sum::<usize>()
    };
    Array::from_fn(shape, |i| f(a.data[index(a, i)], b.data[index(b, i)]))
}

pub(super) fn cases() -> Vec<Case> {
    type Both = (&'static str, fn(&Tensor, &Tensor) -> Tensor, fn(f64, f64) -> f64, Fill, f64);
    let table: Vec<Both> = vec![
        ("add", |a, b| a.add(b), |a, b| a + b, Fill::Normal(1.0), 1.0),
        ("sub", |a, b| a.sub(b), |a, b| a - b, Fill::Normal(1.0), 1.0),
        ("mul", |a, b| a.mul(b), |a, b| a * b, Fill::Normal(1.0), 1.0),
        ("div", |a, b| a.div(b), |a, b| a / b, Fill::Uniform(0.4, 3.0), 5.0),
        ("pow", |a, b| a.pow(b), f64::powf, Fill::Uniform(0.4, 3.0), 8.0),
        (
            "maximum",
            |a, b| a.maximum(b),
            |a, b| if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) },
            Fill::Distinct(0.07),
            1.0,
        ),
        (
            "minimum",
            |a, b| a.minimum(b),
            |a, b| if a.is_nan() || b.is_nan() { f64::NAN } else { a.min(b) },
            Fill::Distinct(0.05),
            1.0,
        ),
    ];
    let mut all = Vec::new();
    let shapes: [(&[usize], &[usize]); 6] = [
        (&[1], &[1]),
        (&[7, 13], &[7, 13]),
        (&[5, 68], &[68]),
        (&[3, 1, 5], &[4, 1]),
        (&[9], &[2, 3, 1]),
        (&[6, 4], &[6, 1]),
    ];
    for (name, forward, reference, fill, ulps) in table {
        for (a, b) in shapes {
            let second = match &fill {
                Fill::Distinct(spacing) => Fill::Distinct(spacing * 1.37),
                other => other.clone(),
            };
            let inputs = vec![Input::normal(a).fill(fill.clone()), Input::normal(b).fill(second)];
            let case = Case::new(
                format!("{name} {a:?} {b:?}"),
                inputs,
                move |x| forward(&x[0], &x[1]),
                move |x| broadcast64(&x[0], &x[1], reference),
            );
            all.push(case.ulps(ulps, 2.0 * ulps + 4.0));
        }
    }
    type Test = (&'static str, fn(&Tensor, &Tensor) -> Tensor, fn(&f64, &f64) -> bool);
    let tests: [Test; 6] = [
        ("eq", |a, b| a.eq(b), f64::eq),
        ("ne", |a, b| a.ne(b), f64::ne),
        ("lt", |a, b| a.lt(b), f64::lt),
        ("le", |a, b| a.le(b), f64::le),
        ("gt", |a, b| a.gt(b), f64::gt),
        ("ge", |a, b| a.ge(b), f64::ge),
    ];
    for (name, forward, reference) in tests {
        let inputs =
            vec![Input::integers([5, 7], DType::F32, -3, 3), Input::integers([7], DType::F32, -3, 3)];
        all.push(
            Case::new(
                name,
                inputs,
                move |x| forward(&x[0], &x[1]),
                move |x| broadcast64(&x[0], &x[1], |a, b| reference(&a, &b) as u8 as f64),
            )
            .exact(),
        );
    }
    all.extend(special_powers());
    all.extend(quotients());
    let inputs = vec![Input::integers([5, 1], DType::U32, 0, 2), Input::normal([5, 9]), Input::normal([9])];
    all.push(Case::new(
        "where",
        inputs,
        |x| x[1].where_mask(&x[0], &x[2]),
        |x| {
            let other = broadcast64(&x[1], &x[2], |_, b| b);
            let mask = broadcast64(&x[1], &x[0], |_, m| m);
            Array::from_fn(x[1].shape, |i| if mask.data[i] != 0.0 { x[1].data[i] } else { other.data[i] })
        },
    ));
    let chain = |x: &[Tensor]| x[0].mul(&x[1]).add(&x[2]).gelu();
    let inputs = vec![Input::normal([6, 10]), Input::normal([6, 10]), Input::normal([10])];
    all.push(
        Case::new("gelu(x*y+z)", inputs, chain, |x| {
            let sum = broadcast64(&broadcast64(&x[0], &x[1], |a, b| a * b), &x[2], |a, b| a + b);
            Array::from_fn(sum.shape, |i| {
                0.5 * sum.data[i] * (1.0 + super::unary::erf64(sum.data[i] * std::f64::consts::FRAC_1_SQRT_2))
            })
        })
        .ulps(256.0, 256.0),
    );
    let inputs = vec![Input::normal([6, 10])];
    all.push(Case::new(
        "affine",
        inputs,
        |x| x[0].affine(0.5, -3.0),
        |x| Array::from_fn(x[0].shape, |i| 0.5 * x[0].data[i] - 3.0),
    ));
    all
}

/// Every pair of the values that IEEE 754 names for pow, then negative bases, with gradients, and extreme results.
fn special_powers() -> Vec<Case> {
    let inf = f64::INFINITY;
    let special = vec![
        f64::NAN,
        inf,
        -inf,
        0.0,
        -0.0,
        1.0,
        -1.0,
        2.0,
        -2.0,
        0.5,
        -0.5,
        3.0,
        -3.0,
        1e38,
        16777215.0,
        33554432.0,
    ];
    let n = special.len();
    let pow = |name: &str, a: Input, b: Input| {
        let reference = |x: &[Array]| broadcast64(&x[0], &x[1], |a, b| a.powf(b));
        // 1e38^2 is infinite in f32.
        let stored = move |x: &[Array]| {
            let y = reference(x);
            Array::from_fn(y.shape, |i| {
                if y.data[i].abs() > 3.5e38 { y.data[i].signum() * inf } else { y.data[i] }
            })
        };
        Case::new(name, vec![a, b], |x| x[0].pow(&x[1]), stored).ulps(18.0, 36.0)
    };
    let values = |shape: &[usize], values: &[f64]| Input::normal(shape).fill(Fill::Values(values.to_vec()));
    vec![
        pow("pow of specials", values(&[n, 1], &special).fixed(), values(&[n], &special).fixed()),
        pow(
            "pow of negatives",
            values(&[3, 1], &[-0.7, -1.3, -2.1]),
            values(&[6], &[-3.0, -1.0, 0.0, 1.0, 2.0, 5.0]).fixed(),
        ),
        pow(
            "pow far",
            values(&[6, 1], &[1.0001, 0.999, 1e-40, 1e-20, 3e38, 2.5]).fixed(),
            values(&[6], &[800.0, -700.0, 0.9, -0.9, 1.9, 0.001]).fixed(),
        ),
    ]
}

/// Integer quotients with a zero, and the quotient that overflows.
fn quotients() -> Vec<Case> {
    let case = |name: &str, dtype: DType, a: &[f64], b: &[f64], low: f64| {
        let values = |shape: &[usize], values: &[f64]| {
            Input::normal(shape).fill(Fill::Values(values.to_vec())).dtype(dtype).fixed()
        };
        let inputs = vec![values(&[a.len(), 1], a), values(&[b.len()], b)];
        let quotient = move |a: f64, b: f64| match b == 0.0 {
            true => 0.0,
            // The negative of the least number overflows to itself.
            false => {
                if a / b == -low {
                    low
                } else {
                    (a / b).trunc()
                }
            }
        };
        Case::new(name, inputs, |x| x[0].div(&x[1]), move |x| broadcast64(&x[0], &x[1], quotient)).exact()
    };
    let low = i32::MIN as f64;
    let (a, b) = ([low, low + 1.0, -7.0, 0.0, 9.0, 2147483647.0], [0.0, -1.0, 1.0, 2.0, -3.0, low]);
    let large = [0.0, 1.0, 7.0, 4294967295.0];
    vec![case("div i32", DType::I32, &a, &b, low), case("div u32", DType::U32, &large, &large, f64::NAN)]
}
