//! Tests all cases of the op list: compares forward and gradient with an f64 reference, checks that a second run gives the same
//! bits, and checks accumulation. `make test-discrete` does the same with the kernels of a GPU's class of devices.
//!
//! The forward bound per element is `ulps u |ref| + 4 u sqrt(K) s`, where `s` is the root of the sum of squares of the terms
//! `x_j dy/dx_j`, and K is their number. For a dot product this is exactly `4 u sqrt(K) ||a*b||_2`. f16 adds its output rounding.
//! The gradient bound is the same with the terms `dy_j dy_j/dx_i`, from central differences of the f64 reference.

mod matrix_units;
mod pytorch;
mod special;
#[path = "../support/mod.rs"]
mod support;
mod vectors;

use libtest_mimic::{Arguments, Failed, Trial};
use std::sync::Arc;
use support::*;
use tiebeam::ops::case::{Array, Case, Input};
use tiebeam::ops::timed::Timed;
use tiebeam::{DType, Error, Gpu, Rng, Shape, Tensor};

/// If a case's Jacobian takes more reference evaluations than this, it is omitted, and the bound uses only the output's scale.
const MOST: usize = 300_000_000;

fn main() {
    let args = Arguments::from_args();
    let mut trials = Vec::new();
    for (op, cases) in tiebeam::ops::cases().into_iter().chain(tiebeam::share::cases()) {
        for case in cases.into_iter().filter(Case::is_test) {
            let name = format!("{op}::{}", case.name.replace(' ', "_"));
            let case = Arc::new(case);
            trials.push(Trial::test(name, move || check(gpu(), &case)));
        }
    }
    let kernels = "matmul::every_kernel_that_could_make_a_product";
    trials.push(Trial::test(kernels, || every_kernel(DType::F32, &[gpu(), other_kernels()])));
    // Exact in f16, so cooperative matrices, if the adapter has them, must agree in every bit.
    let halves = if gpu().has_coop_matrices() { "" } else { "_but_this_adapter_has_no_cooperative_matrices" };
    trials.push(Trial::test(format!("{kernels}_of_f16{halves}"), || {
        every_kernel(DType::F16, &[gpu(), other_kernels()])
    }));
    trials.extend(matrix_units::trials());
    trials.extend(pytorch::trials());
    trials.extend(special::trials());
    trials.extend(vectors::trials());
    libtest_mimic::run(&args, trials).exit();
}

/// Multiplies whole numbers, whose sums are exact, with each kernel, at sizes with and without edges, in every layout.
fn every_kernel(dtype: DType, gpus: &[&Gpu]) -> Result<(), Failed> {
    for gpu in gpus {
        for [m, n, k] in [[128, 128, 64], [132, 68, 100], [4, 136, 72], [136, 8, 72]] {
            let whole = |rows: usize, cols: usize, turn: bool| {
                let shape = if turn { [cols, rows] } else { [rows, cols] };
                let data = Input::integers(shape, DType::F32, -16, 17).draw(&mut Rng::new(7));
                let data: Vec<f32> = data.data.iter().map(|&x| x as f32).collect();
                let x = Tensor::from_slice(gpu, &data, shape).cast(dtype);
                if turn { x.t() } else { x }
            };
            for turns in [0, 3] {
                let (a, b) = (whole(m, k, turns & 1 > 0), whole(k, n, turns & 2 > 0));
                let [a64, b64] = [&a, &b].map(|x| x.cast(DType::F32).to_vec::<f32>().expect("readable"));
                for (name, y) in tiebeam::ops::product::matmul::tune::by_each_kernel(&a, &b) {
                    let y = y.to_vec::<f32>().map_err(|e| format!("{name}: {e}"))?;
                    for (i, &got) in y.iter().enumerate() {
                        let want: f32 = (0..k).map(|q| a64[i / n * k + q] * b64[q * n + i % n]).sum();
                        if got != want {
                            let place = [i / n, i % n];
                            return Err(format!(
                                "{name} {m}x{k}x{n} {turns} at {place:?}: {got}, not {want}"
                            )
                            .into());
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// Checks a case. If it has ids outside the range, a device that checks ids must also report them, once per run.
fn check(gpu: &Gpu, case: &Case) -> Result<(), Failed> {
    if !case.outside {
        return agrees(gpu, case);
    }
    agrees(&checked_gpu(), case)?;
    if gpu.is_checked() { Ok(()) } else { agrees(gpu, case) }
}

fn forward(case: &Case, inputs: &[Tensor]) -> Tensor {
    let y = (case.forward)(inputs);
    if case.outside && y.gpu().is_checked() {
        let told = y.gpu().synchronize().expect_err("ids are outside");
        assert!(matches!(told, Error::Outside { .. }), "{}: {told}", case.name);
        y.gpu().synchronize().expect("it is told once");
    }
    y
}

fn agrees(gpu: &Gpu, case: &Case) -> Result<(), Failed> {
    // A fault of another case must not fail this one.
    gpu.take_fault();
    let arrays = case.draw();
    let want = (case.reference)(&arrays);
    let inputs = place(gpu, case, &arrays);
    let y = forward(case, &inputs);
    assert_eq!(*y.shape(), want.shape, "{}: shape", case.name);
    let got = download(&y);
    if case.exact {
        within(&case.name, &got, &want.data, |_| 0.0);
        return same_bits(gpu, case, &arrays);
    }
    let elements: usize = arrays.iter().map(|a| a.data.len()).sum();
    let affordable = elements * (want.data.len() + elements) < MOST;
    let jacobian = jacobian(case, &arrays, |input| input.dtype.is_float() && (affordable || input.grad));
    let spread = forward_spread(&arrays, &jacobian, &want);
    let rounding = y.dtype().roundoff();
    within(&case.name, &got, &want.data, |i| {
        let output = if rounding > U { rounding * want.data[i].abs() + 3e-8 } else { 0.0 };
        case.ulps * U * want.data[i].abs()
            + 4.0 * U * spread.terms[i].sqrt() * spread.norm[i]
            + output
            + 1e-37
    });
    same_bits(gpu, case, &arrays)?;
    if case.inputs.iter().any(|i| i.grad) {
        gradients(case, &inputs, &y, &want, &jacobian);
    }
    match &case.timed {
        Some(timed) => check_elements(case, timed, inputs, y, arrays),
        None => Ok(()),
    }
}

/// The reference of single elements, which the benchmark uses at sizes whose whole reference would take too long.
fn check_elements(
    case: &Case,
    timed: &Timed,
    inputs: Vec<Tensor>,
    y: Tensor,
    mut arrays: Vec<Array>,
) -> Result<(), Failed> {
    let got = match timed.gradient {
        None => download(&y),
        Some((input, _)) => {
            let y = forward(case, &inputs);
            let dy = Input::normal(*y.shape()).draw(&mut Rng::new(11));
            let grads = y.backward_with(&dy.upload(y.gpu(), DType::F32)).map_err(|e| e.to_string())?;
            arrays.push(dy);
            download(grads.get(&inputs[input]).ok_or("no gradient")?)
        }
    };
    let wants: Vec<_> = (0..got.len()).map(|at| (timed.element)(&arrays, at)).collect();
    let scale = (wants.iter().map(|want| want.value.powi(2)).sum::<f64>() / wants.len() as f64).sqrt();
    for (at, (got, want)) in got.iter().zip(&wants).enumerate() {
        // Written so that a NaN on either side fails.
        let is_right = (got - want.value).abs() <= want.bound;
        // An element that is off by a thousandth of their scale must not pass.
        let is_tight = want.bound <= 1e-3 * scale;
        if !is_right || !is_tight {
            return Err(
                format!("{}: element {at} is {got}, not {want:?}, of scale {scale}", case.name).into()
            );
        }
    }
    match timed.elements.iter().find(|&&at| at >= got.len()) {
        Some(at) => Err(format!("{}: the result has no element {at}", case.name).into()),
        None => Ok(()),
    }
}

fn forward_spread(arrays: &[Array], jacobian: &Jacobian, want: &Array) -> Spread {
    let n = want.data.len();
    let mut spread = Spread { norm: vec![0.0; n], terms: vec![1.0; n] };
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

/// Output and gradients of a case on a device.
fn outputs(gpu: &Gpu, case: &Case, arrays: &[Array]) -> Vec<Vec<f64>> {
    let inputs = place(gpu, case, arrays);
    let y = forward(case, &inputs);
    let mut all = vec![download(&y)];
    if case.inputs.iter().any(|i| i.grad) {
        let grads = y.backward_with(&seed(gpu, y.shape())).expect("backward");
        all.extend(inputs.iter().filter_map(|input| grads.get(input)).map(download));
    }
    all
}

fn same_bits(gpu: &Gpu, case: &Case, arrays: &[Array]) -> Result<(), Failed> {
    let bits =
        |all: Vec<Vec<f64>>| all.into_iter().map(|x| x.into_iter().map(f64::to_bits).collect()).collect();
    let first: Vec<Vec<u64>> = bits(outputs(gpu, case, arrays));
    // Texture reads are checked only on software drivers, for which they are meant. Elsewhere compilers may contract the
    // different source text differently.
    let textures = (gpu.adapter().is_software() && self::gpu() == gpu)
        .then(|| ("a run that reads operands through textures", texel_gpu()));
    for (what, gpu) in [("a second run", gpu)].into_iter().chain(textures) {
        if bits(outputs(gpu, case, arrays)) != first {
            return Err(format!("{}: {what} gave other bits", case.name).into());
        }
    }
    Ok(())
}

/// An incoming gradient.
fn seed(gpu: &Gpu, shape: &Shape) -> Tensor {
    let mut dy = vec![0.0f32; shape.count()];
    Rng::new(99).fill_normal(&mut dy);
    Tensor::from_slice(gpu, &dy, *shape)
}

fn place(gpu: &Gpu, case: &Case, arrays: &[Array]) -> Vec<Tensor> {
    let one = |(array, input): (&Array, &Input)| {
        let x = array.upload(gpu, input.dtype);
        if input.grad { x.requires_grad() } else { x }
    };
    arrays.iter().zip(&case.inputs).map(one).collect()
}

fn gradients(case: &Case, inputs: &[Tensor], y: &Tensor, want: &Array, jacobian: &Jacobian) {
    let gpu = y.gpu();
    let seed = seed(gpu, &want.shape);
    let dy: Vec<f32> = seed.to_vec().expect("readback");
    let grads = y.backward_with(&seed).expect("backward");
    // Uses the leaves twice. Their gradients must be accumulated to one sum.
    let twice = forward(case, inputs).add(&forward(case, inputs)).backward_with(&seed).expect("backward");
    for (i, input) in inputs.iter().enumerate().filter(|(i, _)| case.inputs[*i].grad) {
        let columns = jacobian.columns[i].as_ref().expect("differentiated");
        let terms = |e: usize| columns[e].iter().zip(&dy).map(|(d, &g)| d * g as f64);
        let want: Vec<f64> = (0..columns.len()).map(|e| terms(e).sum()).collect();
        let bound = |e: usize| {
            let norm = terms(e).map(|t| t * t).sum::<f64>().sqrt();
            let count = terms(e).filter(|t| t.abs() > 1e-12).count().max(1) as f64;
            // Central differences in f64 have an error of about 1e-9.
            case.grad_ulps * U * (want[e].abs() + norm)
                + 4.0 * U * count.sqrt() * norm
                + 2e-9 * norm.max(1.0)
                + case.grad_floor * U
        };
        let name = format!("{}: gradient of input {i}", case.name);
        let got = download(grads.get(input).unwrap_or_else(|| panic!("{name}: none")));
        within(&name, &got, &want, bound);
        let doubled: Vec<f64> = want.iter().map(|w| 2.0 * w).collect();
        let got = download(twice.get(input).unwrap_or_else(|| panic!("{name}: none")));
        within(&format!("{name}, twice"), &got, &doubled, |e| 2.0 * bound(e));
    }
}
