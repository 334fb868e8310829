//! Compares a case with its f64 reference on a device: values, gradients, bits of a second run.

use super::array::Array;
use super::case::{Case, Input};
use super::timed::Timed;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::rng::Rng;
use crate::shape::Shape;
use crate::tensor::Tensor;
use std::fmt;

/// f32 unit roundoff.
pub const U: f64 = 1.0 / (1u64 << 24) as f64;

/// If a case's Jacobian takes more reference evaluations than this, it is omitted, and the bound uses only the output's scale.
const MOST: usize = 300_000_000;

/// A difference that a check found, in words. Both of its texts are the same, so that `unwrap` shows it well.
#[derive(Clone, PartialEq, Eq)]
pub struct Mismatch(String);

impl Mismatch {
    /// A difference, described by this sentence.
    pub fn new(message: impl Into<String>) -> Mismatch {
        Mismatch(message.into())
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Mismatch {}

impl From<Error> for Mismatch {
    fn from(error: Error) -> Mismatch {
        Mismatch(error.to_string())
    }
}

/// Derivatives of every output with respect to every element of every float input, by central differences in f64.
pub struct Jacobian {
    /// `columns[input][element][output]`; `None` for inputs that are not differentiated.
    pub columns: Vec<Option<Vec<Vec<f64>>>>,
}

impl Jacobian {
    /// Differentiates a case's reference at `inputs`, for the inputs that are `wanted`.
    pub fn of(case: &Case, inputs: &[Array], wanted: impl Fn(&Input) -> bool) -> Jacobian {
        let mut at = inputs.to_vec();
        let mut column = |i: usize, e: usize| {
            let x = inputs[i].data[e];
            let h = 2e-5 * x.abs().max(0.5);
            at[i].data[e] = x + h;
            let up = (case.reference)(&at).data;
            at[i].data[e] = x - h;
            let down = (case.reference)(&at).data;
            at[i].data[e] = x;
            up.iter().zip(&down).map(|(u, d)| (u - d) / (2.0 * h)).collect()
        };
        let columns = (0..inputs.len())
            .map(|i| {
                wanted(&case.inputs[i]).then(|| (0..inputs[i].data.len()).map(|e| column(i, e)).collect())
            })
            .collect();
        Jacobian { columns }
    }
}

/// For each output element, the root of the sum of squares of its terms `x_j dy/dx_j`: the scale of its rounding error.
///
/// The terms of a dot product are its products, so the scale is `||a * b||_2`. A function of one element has one term.
struct Spread {
    norm: Vec<f64>,
    /// The number of terms that are not zero, of each element.
    terms: Vec<f64>,
}

impl Spread {
    fn of(arrays: &[Array], jacobian: &Jacobian, outputs: usize) -> Spread {
        let mut spread = Spread { norm: vec![0.0; outputs], terms: vec![1.0; outputs] };
        for (array, columns) in arrays.iter().zip(&jacobian.columns) {
            for (x, column) in array.data.iter().zip(columns.iter().flatten()) {
                for (j, d) in column.iter().enumerate() {
                    // An infinite input, as in a mask, adds nothing to the scale of rounding.
                    let term = if (x * d).is_finite() { x * d } else { 0.0 };
                    spread.norm[j] += term * term;
                    spread.terms[j] += (term.abs() > 1e-12) as u8 as f64;
                }
            }
        }
        spread.norm.iter_mut().for_each(|s| *s = s.sqrt());
        spread
    }
}

/// Checks that every element is within its bound.
///
/// # Errors
/// If one is not, or the lengths differ. The message names the worst element.
pub fn within(what: &str, got: &[f64], want: &[f64], bound: impl Fn(usize) -> f64) -> Result<(), Mismatch> {
    if got.len() != want.len() {
        return Err(Mismatch(format!("{what}: {} elements, want {}", got.len(), want.len())));
    }
    let excess = |i: usize| {
        if got[i].is_nan() && want[i].is_nan() || got[i] == want[i] {
            return 0.0;
        }
        let over = (got[i] - want[i]).abs() / bound(i);
        if over.is_nan() { f64::INFINITY } else { over }
    };
    let worst = (0..got.len()).max_by(|&a, &b| excess(a).total_cmp(&excess(b)));
    let Some(i) = worst.filter(|&i| excess(i) > 1.0) else { return Ok(()) };
    let (off, bound) = ((got[i] - want[i]).abs(), bound(i));
    let (got, want, times) = (got[i], want[i], excess(i));
    Err(Mismatch(format!(
        "{what}: element {i}: got {got:e}, want {want:e}, off by {off:e}, bound {bound:e} ({times:.1} times)"
    )))
}

impl Case {
    /// Compares the op with its reference on a device. The result must be within the case's bound, its gradients within
    /// theirs of central differences of the reference, the gradients of two uses must add up, and a second run must give the
    /// same bits.
    ///
    /// The bound of an element of the result is `ulps u |ref| + 4 u sqrt(K) s`, where u is 2^-24, `s` is the root of the sum of
    /// squares of the terms `x_j dy/dx_j`, and K is their number. For a dot product this is `4 u sqrt(K) ||a*b||_2`. Types of 16
    /// bits add their output's rounding. The bound of a gradient is the same with the terms `dy_j dy_j/dx_i`.
    ///
    /// Of a case that is [exact](Case::exact), values and bits are compared and no gradients.
    ///
    /// The time grows with the elements of the inputs times those of the result, so cases are small.
    ///
    /// # Errors
    /// The first difference, with the element that is farthest off; the device's fault.
    pub fn check(&self, gpu: &Gpu) -> Result<(), Mismatch> {
        // A fault of another case must not fail this one.
        gpu.take_fault();
        let arrays = self.draw();
        let want = (self.reference)(&arrays);
        let inputs = self.place(gpu, &arrays);
        let y = self.run(&inputs)?;
        if *y.shape() != want.shape {
            return Err(self.wrong(format!("the shape is {}, not {}", y.shape(), want.shape)));
        }
        let got = Array::read(&y)?.data;
        if self.exact {
            within(&self.name, &got, &want.data, |_| 0.0)?;
            return self.repeats(gpu);
        }
        let elements: usize = arrays.iter().map(|a| a.data.len()).sum();
        let affordable = elements * (want.data.len() + elements) < MOST;
        let jacobian =
            Jacobian::of(self, &arrays, |input| input.dtype.is_float() && (affordable || input.grad));
        let spread = Spread::of(&arrays, &jacobian, want.data.len());
        let rounding = y.dtype().roundoff();
        within(&self.name, &got, &want.data, |i| {
            let output = if rounding > U { rounding * want.data[i].abs() + 3e-8 } else { 0.0 };
            let sum = 4.0 * U * spread.terms[i].sqrt() * spread.norm[i];
            self.ulps * U * want.data[i].abs() + sum + output + 1e-37
        })?;
        self.repeats(gpu)?;
        if self.has_gradient() {
            self.check_gradients(&inputs, &y, &want, &jacobian)?;
        }
        match &self.timed {
            Some(timed) => self.check_elements(timed, &inputs, &y, arrays),
            None => Ok(()),
        }
    }

    /// The result and then the gradients of the inputs that have one, on a device.
    ///
    /// # Errors
    /// The device's fault.
    pub fn outputs(&self, gpu: &Gpu) -> Result<Vec<Array>, Mismatch> {
        let inputs = self.place(gpu, &self.draw());
        let y = self.run(&inputs)?;
        let mut all = vec![Array::read(&y)?];
        if self.has_gradient() {
            let grads = y.backward_with(&seed(gpu, y.shape()))?;
            for gradient in inputs.iter().filter_map(|input| grads.get(input)) {
                all.push(Array::read(gradient)?);
            }
        }
        Ok(all)
    }

    fn wrong(&self, what: impl fmt::Display) -> Mismatch {
        Mismatch(format!("{}: {what}", self.name))
    }

    fn has_gradient(&self) -> bool {
        self.inputs.iter().any(|input| input.grad)
    }

    /// Uploads inputs, those with a gradient as leaves.
    fn place(&self, gpu: &Gpu, arrays: &[Array]) -> Vec<Tensor> {
        let one = |(array, input): (&Array, &Input)| {
            let x = array.upload(gpu, input.dtype);
            if input.grad { x.requires_grad() } else { x }
        };
        arrays.iter().zip(&self.inputs).map(one).collect()
    }

    /// Calls the op. If the case has ids outside of their table, a device that checks ids must report them, once.
    fn run(&self, inputs: &[Tensor]) -> Result<Tensor, Mismatch> {
        let y = (self.forward)(inputs);
        if self.outside && y.gpu().is_checked() {
            match y.gpu().synchronize() {
                Err(Error::Outside { .. }) => y.gpu().synchronize()?,
                told => return Err(self.wrong(format!("ids are outside of the table, and it told {told:?}"))),
            }
        }
        Ok(y)
    }

    fn repeats(&self, gpu: &Gpu) -> Result<(), Mismatch> {
        match bits(&self.outputs(gpu)?) == bits(&self.outputs(gpu)?) {
            true => Ok(()),
            false => Err(self.wrong("a second run gave other bits")),
        }
    }

    fn check_gradients(
        &self,
        inputs: &[Tensor],
        y: &Tensor,
        want: &Array,
        jacobian: &Jacobian,
    ) -> Result<(), Mismatch> {
        let seed = seed(y.gpu(), &want.shape);
        let dy: Vec<f32> = seed.to_vec()?;
        if !y.is_tracked() {
            return Err(
                self.wrong("the result has no gradient: was it recorded, as by made_by, with its inputs?")
            );
        }
        let grads = y.backward_with(&seed)?;
        // Uses the leaves twice. Their gradients must be accumulated to one sum.
        let twice = self.run(inputs)?.add(&self.run(inputs)?).backward_with(&seed)?;
        for (i, input) in inputs.iter().enumerate().filter(|(i, _)| self.inputs[*i].grad) {
            let columns = jacobian.columns[i].as_deref().unwrap_or(&[]);
            let terms = |e: usize| columns[e].iter().zip(&dy).map(|(d, &g)| d * g as f64);
            let want: Vec<f64> = (0..columns.len()).map(|e| terms(e).sum()).collect();
            let bound = |e: usize| {
                let norm = terms(e).map(|t| t * t).sum::<f64>().sqrt();
                let count = terms(e).filter(|t| t.abs() > 1e-12).count().max(1) as f64;
                // Central differences in f64 have an error of about 1e-9.
                let differences = 2e-9 * norm.max(1.0);
                self.grad_ulps * U * (want[e].abs() + norm)
                    + 4.0 * U * count.sqrt() * norm
                    + differences
                    + self.grad_floor * U
            };
            let name = format!("{}: gradient of input {i}", self.name);
            let none = || Mismatch(format!("{name}: there is none"));
            within(&name, &Array::read(grads.get(input).ok_or_else(none)?)?.data, &want, bound)?;
            let doubled: Vec<f64> = want.iter().map(|w| 2.0 * w).collect();
            let got = Array::read(twice.get(input).ok_or_else(none)?)?.data;
            within(&format!("{name}, used twice"), &got, &doubled, |e| 2.0 * bound(e))?;
        }
        Ok(())
    }

    /// The reference of single elements, which the benchmark uses at sizes whose whole reference would take too long.
    fn check_elements(
        &self,
        timed: &Timed,
        inputs: &[Tensor],
        y: &Tensor,
        mut arrays: Vec<Array>,
    ) -> Result<(), Mismatch> {
        let got = match timed.gradient {
            None => Array::read(y)?,
            Some((input, _)) => {
                let y = self.run(inputs)?;
                let dy = Input::normal(*y.shape()).draw(&mut Rng::new(11));
                let grads = y.backward_with(&dy.upload(y.gpu(), DType::F32))?;
                arrays.push(dy);
                Array::read(grads.get(&inputs[input]).ok_or_else(|| self.wrong("no gradient"))?)?
            }
        };
        let wants: Vec<_> = (0..got.data.len()).map(|at| (timed.element)(&arrays, at)).collect();
        let scale = (wants.iter().map(|want| want.value.powi(2)).sum::<f64>() / wants.len() as f64).sqrt();
        for (at, (got, want)) in got.data.iter().zip(&wants).enumerate() {
            // Written so that a NaN on either side fails.
            let is_right = (got - want.value).abs() <= want.bound;
            // An element that is off by a thousandth of their scale must not pass.
            let is_tight = want.bound <= 1e-3 * scale;
            if !is_right || !is_tight {
                return Err(self.wrong(format!("element {at} is {got}, not {want:?}, of scale {scale}")));
            }
        }
        match timed.elements.iter().find(|&&at| at >= got.data.len()) {
            Some(at) => Err(self.wrong(format!("the result has no element {at}"))),
            None => Ok(()),
        }
    }
}

/// The bits of arrays, which tell what `==` does not: signs of zeros, and NaN.
pub fn bits(arrays: &[Array]) -> Vec<Vec<u64>> {
    arrays.iter().map(|array| array.data.iter().map(|x| x.to_bits()).collect()).collect()
}

/// An incoming gradient.
fn seed(gpu: &Gpu, shape: &Shape) -> Tensor {
    let mut dy = vec![0.0f32; shape.count()];
    Rng::new(99).fill_normal(&mut dy);
    Tensor::from_slice(gpu, &dy, *shape)
}
