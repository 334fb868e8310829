//! Test cases: inputs, call, f64 reference and error bound of an op, so that one harness can test and time every op.

pub use super::array::Array;
use super::timed::{Timed, Want, When};
use crate::dtype::DType;
use crate::rng::Rng;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// How an input is filled.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Fill {
    /// Normal with this standard deviation.
    Normal(f64),
    /// Uniform in `[low, high)`.
    Uniform(f64, f64),
    /// Integers in `[low, high)`, exact in f32.
    Integers(i64, i64),
    /// These values, repeated as needed.
    Values(Vec<f64>),
    /// A permutation of `0, spacing, 2 spacing, ...`, centred about zero: no two elements are closer than `spacing`,
    /// and none is 0.
    Distinct(f64),
}

/// One input of a case.
#[derive(Clone, Debug)]
pub struct Input {
    /// Sizes of the axes.
    pub shape: Shape,
    /// Stored type.
    pub dtype: DType,
    /// Contents.
    pub fill: Fill,
    /// Whether the gradient with respect to it is tested.
    pub grad: bool,
}

impl Input {
    /// A differentiable f32 input, standard normal.
    pub fn normal(shape: impl Into<Shape>) -> Input {
        Input { shape: shape.into(), dtype: DType::F32, fill: Fill::Normal(1.0), grad: true }
    }

    /// Integers in `[low, high)` of this type, without a gradient.
    pub fn integers(shape: impl Into<Shape>, dtype: DType, low: i64, high: i64) -> Input {
        Input { shape: shape.into(), dtype, fill: Fill::Integers(low, high), grad: false }
    }

    /// Returns this input with another filling.
    pub fn fill(mut self, fill: Fill) -> Input {
        self.fill = fill;
        self
    }

    /// Returns this input with another stored type.
    pub fn dtype(mut self, dtype: DType) -> Input {
        self.dtype = dtype;
        self
    }

    /// Returns this input without a gradient.
    pub fn fixed(mut self) -> Input {
        self.grad = false;
        self
    }

    /// The elements as stored (rounded to the dtype), drawn from `rng`.
    pub fn draw(&self, rng: &mut Rng) -> Array {
        let n = self.shape.count();
        let mut unit = vec![0.0f32; n];
        let data: Vec<f64> = match &self.fill {
            Fill::Normal(scale) => {
                rng.fill_normal(&mut unit);
                unit.iter().map(|&x| x as f64 * scale).collect()
            }
            Fill::Uniform(low, high) => {
                rng.fill_uniform(&mut unit);
                unit.iter().map(|&x| low + x as f64 * (high - low)).collect()
            }
            Fill::Integers(low, high) => {
                rng.fill_uniform(&mut unit);
                unit.iter()
                    .map(|&x| (*low as f64 + (x as f64 * (high - low) as f64).floor()).trunc())
                    .collect()
            }
            Fill::Values(values) => (0..n).map(|i| values[i % values.len()]).collect(),
            Fill::Distinct(spacing) => {
                let mut order: Vec<usize> = (0..n).collect();
                rng.shuffle(&mut order);
                order.iter().map(|&i| (i as f64 - n as f64 / 2.0 + 0.25) * spacing).collect()
            }
        };
        let stored = |x: f64| match self.dtype {
            DType::F32 => x as f32 as f64,
            DType::F16 => half::f16::from_f64(x).to_f64(),
            DType::Bf16 => half::bf16::from_f64(x).to_f64(),
            DType::U32 | DType::I32 => x,
        };
        Array { shape: self.shape, data: data.into_iter().map(stored).collect() }
    }
}

/// The call under test.
pub type Forward = Box<dyn Fn(&[Tensor]) -> Tensor + Send + Sync>;
/// The same in f64, by plain loops.
pub type Reference = Box<dyn Fn(&[Array]) -> Array + Send + Sync>;

/// One test of one op.
pub struct Case {
    /// What distinguishes the case, such as its sizes.
    pub name: String,
    /// The inputs, in order.
    pub inputs: Vec<Input>,
    /// The op.
    pub forward: Forward,
    /// The reference that the op is compared with.
    pub reference: Reference,
    /// Allowed error of the forward pass, relative to the result, in units of f32 roundoff. It covers what WGSL leaves
    /// open.
    pub ulps: f64,
    /// The same for gradients.
    pub grad_ulps: f64,
    /// Allowed absolute error of gradients, in units of f32 roundoff: the scale of intermediate sums that cancel.
    pub grad_floor: f64,
    /// Whether the result must equal the reference exactly.
    pub exact: bool,
    /// Whether some ids are outside their table. A device that checks ids reports them, any other gives the reference's
    /// values.
    pub outside: bool,
    /// What the benchmark needs, if it times this case.
    pub timed: Option<Timed>,
}

impl Case {
    /// A case with the default bounds: 4 roundoffs for values, 8 for gradients.
    pub fn new(
        name: impl Into<String>,
        inputs: Vec<Input>,
        forward: impl Fn(&[Tensor]) -> Tensor + Send + Sync + 'static,
        reference: impl Fn(&[Array]) -> Array + Send + Sync + 'static,
    ) -> Case {
        Case {
            name: name.into(),
            inputs,
            forward: Box::new(forward),
            reference: Box::new(reference),
            ulps: 4.0,
            grad_ulps: 8.0,
            grad_floor: 0.0,
            exact: false,
            outside: false,
            timed: None,
        }
    }

    /// Draws the inputs, from a seed that depends on the case's name.
    pub fn draw(&self) -> Vec<Array> {
        let seed = self.name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b as u64));
        let mut rng = Rng::new(seed);
        self.inputs.iter().map(|input| input.draw(&mut rng)).collect()
    }

    /// Returns this case with other bounds for values and gradients.
    pub fn ulps(mut self, ulps: f64, grad_ulps: f64) -> Case {
        (self.ulps, self.grad_ulps) = (ulps, grad_ulps);
        self
    }

    /// Returns this case with an absolute bound for gradients.
    pub fn grad_floor(mut self, roundoffs: f64) -> Case {
        self.grad_floor = roundoffs;
        self
    }

    /// Returns this case, marked as having ids outside their table.
    pub fn outside(mut self) -> Case {
        self.outside = true;
        self
    }

    /// Returns this case, with exact equality required.
    pub fn exact(mut self) -> Case {
        self.exact = true;
        self
    }

    /// Returns this case with the data that the benchmark needs. It stays a test, which checks `element` too, until
    /// [`Case::when`] makes it a row of the benchmark.
    pub fn timed(
        mut self,
        family: &'static str,
        elements: impl Into<Vec<usize>>,
        element: impl Fn(&[Array], usize) -> Want + Send + Sync + 'static,
    ) -> Case {
        let (elements, element) = (elements.into(), Box::new(element));
        self.timed = Some(Timed { family, when: [When::Never; 2], gradient: None, elements, element });
        self
    }

    /// Returns this case such that the benchmark times the gradient of an input. `work` is the bytes that must move for it, and
    /// the operations.
    ///
    /// # Panics
    /// If the case is not [timed](Case::timed).
    #[track_caller]
    pub fn gradient_of(mut self, input: usize, work: [f64; 2]) -> Case {
        self.timed.as_mut().expect("a timed case").gradient = Some((input, work));
        self
    }

    /// Returns this case as a row of the benchmark, in these suites on a CPU driver and on a GPU.
    ///
    /// # Panics
    /// If the case is not [timed](Case::timed).
    #[track_caller]
    pub fn when(mut self, cpu: When, gpu: When) -> Case {
        self.timed.as_mut().expect("a timed case").when = [cpu, gpu];
        self
    }

    /// Whether the tests run this case, because it is small enough for a full reference. Otherwise only the benchmark runs it.
    pub fn is_test(&self) -> bool {
        self.timed.as_ref().is_none_or(|timed| timed.when == [When::Never; 2])
    }
}
