//! Tests every op with NaN, infinities, -0 and subnormals against the f64 references. Also tests the bounds in the docs of
//! functions of one and two elements, on arguments of all sizes.
//!
//! Values: a special number is put at the first, a middle and the last place of each float input. The result must be NaN exactly
//! where the reference is, have the same infinities, and be within the case's bound elsewhere. Adapters may read a subnormal
//! number as zero, so the reference at zero is accepted too.
//!
//! Gradients: with NaN at x_s, the gradient at e must be NaN if the reference's derivative by e depends on x_s, and unchanged if
//! it does not. At kinks both are accepted. At -0 and subnormals it must be the reference's derivative if its one-sided
//! derivatives agree.

use crate::support::*;
use libtest_mimic::{Failed, Trial};
use std::sync::Arc;
use tiebeam::ops::case::{Array, Case, Input};
use tiebeam::ops::check::Jacobian;
use tiebeam::{DType, Gpu, Rng, Tensor};

const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;
const SPECIAL: [f64; 5] = [NAN, INF, -INF, -0.0, 1e-40];

/// Limits on a case's elements. Small shapes suffice to reach every kernel's edges, and the references run often.
const MOST_INPUTS: usize = 100;
const MOST_OUTPUTS: usize = 2000;

/// Families that have separate kernels for CPU drivers. They are tested with both, not only with those that the adapter uses.
const CHOOSES: [&str; 11] = [
    "tied",
    "routed",
    "matmul",
    "attention",
    "norm",
    "softmax",
    "cross_entropy",
    "cross_entropy_with",
    "reduce",
    "axes",
    "prod",
];

const NANS: &[&str] = &["NaN"];
const INFINITIES: &[&str] = &["inf", "-inf"];
const NOT_FINITE: &[&str] = &["NaN", "inf", "-inf"];
const ZEROS: &[&str] = &["-0e0", "1e-40"];
const ANY: &[&str] = &[""];

/// An allowed difference from the reference: op, beginning of the case's name, part of the test, special numbers, and the reason.
type Exception = (&'static str, &'static str, &'static str, &'static [&'static str], &'static str);
const EXCEPTIONS: &[Exception] = &[
    ("reduce", "max [1, 1]", "gradients", NANS, "NaN goes to the NaN itself; both are right"),
    ("reduce", "min [1, 1]", "gradients", NANS, "NaN goes to the NaN itself; both are right"),
    (
        "attention",
        "one token",
        "values",
        INFINITIES,
        "a value that is infinite meets the zero weights of the keys that fill a vector",
    ),
    (
        "attention",
        "one token",
        "gradients",
        NANS,
        "a score that is NaN has no weight, of a single key either",
    ),
    ("axes", "gradient of max at ties", "values", ANY, "the reference knows its data"),
    ("moments", "gradient of", "values", ANY, "the reference knows its data"),
    ("prod", "cumprod at zeros", "gradients", NANS, "NaN times the zero before it"),
    ("einsum", "ij,kl->i", "values", INFINITIES, "sums of infinities in another order"),
    ("einsum", "ij,jk,kl->il", "values", INFINITIES, "sums of infinities in another order"),
    ("einsum", "a,b,ab,bc->c", "values", INFINITIES, "sums of infinities in another order"),
    ("pool", "max gradient at ties", "values", ANY, "the reference knows its data"),
    ("pool", "max of NaN and infinities", "values", ANY, "the reference knows its data"),
    (
        "dictionary",
        "rows of three layers",
        "values",
        INFINITIES,
        "infinity times the zeros of unused weights",
    ),
    ("mixed", "", "values", ANY, "NaN and infinity times the zeros of unused weights"),
    ("combine", "two layers of four", "gradients", NANS, "NaN times the zero gradient of an unused layer"),
    (
        "conv1d",
        "depthwise",
        "values",
        NOT_FINITE,
        "a weight that is not finite times the zeros of the padding",
    ),
    ("conv1d", "depthwise", "gradients", NANS, "NaN times the zeros of the padding"),
    (
        "conv_transpose",
        "",
        "values",
        NOT_FINITE,
        "a weight that is not finite times the zeros between elements",
    ),
    ("conv_transpose", "", "gradients", NANS, "NaN times the zeros between elements"),
    (
        "tied",
        "low rank lookup",
        "gradients",
        NANS,
        "NaN times the zero gradient of a row that is not looked up",
    ),
    ("conv", "depthwise with two", "values", ANY, "NaN or infinity times the zeros of the padding"),
    ("conv", "depthwise with two", "gradients", NANS, "NaN times the zeros of the padding"),
    ("kernel_basis", "", "gradients", ZEROS, "directions must have length 1"),
    ("spatial_conv", "", "values", INFINITIES, "sums of infinities in another order"),
    ("spatial_conv", "basis made", "gradients", NANS, "features lose NaN, and NaN meets zeros"),
    ("spatial_conv", "basis made", "gradients", ZEROS, "directions must have length 1"),
    ("table_conv", "1 edges", "values", INFINITIES, "sums of infinities in another order"),
    ("table_conv", "1 edges", "values", NANS, "a distance that is NaN falls into a cell"),
    ("table_conv", "1 edges", "gradients", NANS, "NaN times the zeros of other cells"),
    ("dictionary", "made 5 7 3", "gradients", NANS, "NaN times the zero gradient of an unused layer"),
    ("mixed", "", "gradients", NANS, "NaN times the zeros of unused weights"),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    // Assignment refuses NaN with an error.
    let families = tiebeam::ops::cases().into_iter().chain(tiebeam::share::cases());
    for (op, cases) in families.filter(|(op, _)| *op != "assignment") {
        for case in cases.into_iter().filter(is_small) {
            let case = Arc::new(case);
            let mut add = |part: &'static str, what: &str, test: fn(&Case) -> Vec<String>| {
                let (name, case) =
                    (format!("special::{op}::{}::{what}", case.name.replace(' ', "_")), case.clone());
                trials.push(Trial::test(name, move || {
                    let wrong =
                        test(&case).into_iter().filter(|line| !is_excepted(op, &case.name, part, line));
                    verdict(wrong.collect())
                }));
            };
            add("values", "values", |case| values(gpu(), case));
            if CHOOSES.contains(&op) {
                add("values", "values_of_other_kernels", |case| values(other_kernels(), case));
            }
            if case.inputs.iter().any(|input| input.grad) {
                add("gradients", "gradients", gradients);
            }
        }
    }
    trials.extend(stated_bounds());
    trials.push(Trial::test("quotients_without_overflow", quotients_without_overflow));
    trials
}

/// Lines start with the special number.
fn is_excepted(op: &str, case: &str, part: &str, line: &str) -> bool {
    EXCEPTIONS.iter().any(|&(o, c, p, specials, _)| {
        let special = specials.iter().any(|s| s.is_empty() || line.starts_with(&format!("{s} at")));
        o == op && case.starts_with(c) && p == part && special
    })
}

fn verdict(wrong: Vec<String>) -> Result<(), Failed> {
    if wrong.is_empty() {
        return Ok(());
    }
    Err(format!("{} wrong:\n{}", wrong.len(), wrong[..wrong.len().min(12)].join("\n")).into())
}

fn is_small(case: &Case) -> bool {
    let inputs: usize = case.inputs.iter().map(|input| input.shape.count()).sum();
    let floats = case.inputs.iter().any(|input| input.dtype.is_float());
    floats && inputs <= MOST_INPUTS && (case.reference)(&case.draw()).data.len() <= MOST_OUTPUTS
}

/// Returns input and element of each place that gets a special number.
fn places(case: &Case) -> Vec<(usize, usize)> {
    let mut all = Vec::new();
    for (i, input) in case.inputs.iter().enumerate().filter(|(_, input)| input.dtype.is_float()) {
        let count = input.shape.count();
        let mut at: Vec<usize> = [0, count / 2, count - 1].into_iter().filter(|&e| e < count).collect();
        at.dedup();
        all.extend(at.into_iter().map(|e| (i, e)));
    }
    all
}

fn with(arrays: &[Array], (input, element): (usize, usize), value: f64) -> Vec<Array> {
    let mut changed = arrays.to_vec();
    changed[input].data[element] = value;
    changed
}

/// Uploads the arrays. Inputs with gradients become leaves.
fn leaves(gpu: &Gpu, case: &Case, arrays: &[Array]) -> Vec<Tensor> {
    let one = |(array, input): (&Array, &Input)| {
        let x = array.upload(gpu, input.dtype);
        if input.grad { x.requires_grad() } else { x }
    };
    arrays.iter().zip(&case.inputs).map(one).collect()
}

/// Rounds a number to a type. A number beyond its largest becomes infinite.
fn stored(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => x as f32 as f64,
        DType::F16 => half::f16::from_f64(x).to_f64(),
        DType::Bf16 => half::bf16::from_f64(x).to_f64(),
        DType::U32 | DType::I32 => x,
        other => panic!("no test knows how {other:?} is stored"),
    }
}

fn is_same(got: f64, want: f64, bound: f64) -> bool {
    got == want || got.is_nan() && want.is_nan() || (got - want).abs() <= bound
}

/// Returns the scale of each output's rounding: the root of the sum of squares of `x_j dy/dx_j`, by central differences.
fn scales(case: &Case, arrays: &[Array]) -> Vec<f64> {
    let jacobian = Jacobian::of(case, arrays, |input| input.dtype.is_float());
    let outputs = (case.reference)(arrays).data.len();
    let mut sum = vec![0.0; outputs];
    for (array, columns) in arrays.iter().zip(&jacobian.columns) {
        for (x, column) in array.data.iter().zip(columns.iter().flatten()) {
            for (s, d) in sum.iter_mut().zip(column) {
                let term = x * d;
                *s += if term.is_finite() { term * term } else { 0.0 };
            }
        }
    }
    let terms: usize = arrays.iter().map(|a| a.data.len()).sum();
    sum.into_iter().map(|s: f64| (s * terms as f64).sqrt()).collect()
}

fn values(gpu: &Gpu, case: &Case) -> Vec<String> {
    let arrays = case.draw();
    gpu.take_fault();
    let usual = scales(case, &arrays);
    let mut wrong = Vec::new();
    for place in places(case) {
        let zeroed = with(&arrays, place, 0.0);
        let small = scales(case, &zeroed);
        for special in SPECIAL {
            let special = stored(special, case.inputs[place.0].dtype);
            let changed = with(&arrays, place, special);
            let y = (case.forward)(&leaves(gpu, case, &changed));
            let got = download(&y);
            let wants: Vec<Array> = match special {
                s if s != 0.0 && s.abs() < 1e-30 => [s, 0.0, -0.0].to_vec(),
                s => vec![s],
            }
            .into_iter()
            .map(|s| (case.reference)(&with(&arrays, place, s)))
            .collect();
            let tiny = special.abs() < 1e-30;
            let unit = y.dtype().roundoff();
            for i in 0..got.len() {
                let is_right = wants.iter().any(|want| {
                    let want = stored(want.data[i], y.dtype());
                    let rounding = if unit > U { unit * want.abs() + 3e-8 } else { 1e-37 };
                    let scale = if tiny { small[i] } else { usual[i] };
                    let bound = case.ulps * U * want.abs() + 4.0 * U * scale + rounding;
                    is_same(got[i], want, if case.exact { 0.0 } else { bound })
                });
                if !is_right {
                    let want = wants[0].data[i];
                    wrong.push(format!("{special:e} at {place:?}: y[{i}] is {:e}, not {want:e}", got[i]));
                }
            }
        }
    }
    wrong
}

/// The sum of `dy_j y_j` in the reference.
fn loss(case: &Case, arrays: &[Array], dy: &[f32]) -> f64 {
    (case.reference)(arrays)
        .data
        .iter()
        .zip(dy)
        .map(|(y, &g)| if g == 0.0 { 0.0 } else { y * g as f64 })
        .sum()
}

/// Returns the derivatives of the loss by every element with a gradient: forward, backward and central differences.
fn slopes(case: &Case, arrays: &[Array], dy: &[f32]) -> Vec<[f64; 3]> {
    let middle = loss(case, arrays, dy);
    let mut all = Vec::new();
    let mut at = arrays.to_vec();
    for (i, input) in case.inputs.iter().enumerate().filter(|(_, input)| input.grad) {
        for e in 0..input.shape.count() {
            let x = arrays[i].data[e];
            let h = 2e-5 * x.abs().max(0.5);
            at[i].data[e] = x + h;
            let up = loss(case, &at, dy);
            at[i].data[e] = x - h;
            let down = loss(case, &at, dy);
            at[i].data[e] = x;
            all.push([(up - middle) / h, (middle - down) / h, (up - down) / (2.0 * h)]);
        }
    }
    all
}

/// The device's gradients, in the order of [`slopes`].
fn device_slopes(case: &Case, arrays: &[Array], dy: &[f32]) -> Vec<f64> {
    let inputs = leaves(gpu(), case, arrays);
    let y = (case.forward)(&inputs);
    let seed = Tensor::from_slice(gpu(), dy, *y.shape());
    let grads = y.backward_with(&seed).expect("backward");
    let wanted = inputs.iter().zip(&case.inputs).filter(|(_, input)| input.grad);
    wanted.flat_map(|(x, _)| download(grads.get(x).expect("a gradient"))).collect()
}

fn gradients(case: &Case) -> Vec<String> {
    let arrays = case.draw();
    gpu().take_fault();
    let mut dy = vec![0.0f32; (case.reference)(&arrays).data.len()];
    Rng::new(99).fill_normal(&mut dy);
    let mut wrong = Vec::new();
    for place in places(case) {
        wrong.extend(nan_gradients(case, &arrays, &dy, place));
        wrong.extend(zero_gradients(case, &arrays, &dy, place));
    }
    wrong
}

fn nan_gradients(case: &Case, arrays: &[Array], dy: &[f32], place: (usize, usize)) -> Vec<String> {
    let x = arrays[place.0].data[place.1];
    let usual = slopes(case, arrays, dy);
    let scale = usual.iter().map(|s| s[2].abs()).fold(0.0, f64::max);
    // Small steps show whether the derivative depends on x_s at all, and large ones show kinks in between.
    let moved: Vec<Vec<[f64; 3]>> = [0.004, -0.004, 0.4, -0.3, 5.0, -7.0]
        .into_iter()
        .map(|step| slopes(case, &with(arrays, place, x + step), dy))
        .collect();
    let changed = with(arrays, place, NAN);
    let got = device_slopes(case, &changed, dy);
    // An op that selects elements may not select the NaN.
    let reaches = (case.reference)(&changed).data.iter().any(|y| y.is_nan());
    let mut wrong = Vec::new();
    for (e, &got) in got.iter().enumerate() {
        let change = |s: &Vec<[f64; 3]>| (s[e][2] - usual[e][2]).abs();
        let depends = reaches && change(&moved[0]) > 2e-4 * scale && change(&moved[1]) > 2e-4 * scale;
        // A derivative of 0 may be a product with 0, which becomes NaN, so it is not checked.
        let never =
            usual[e][2].abs() > 1e-6 * scale && moved.iter().all(|s| change(s) <= 1e-7 * scale.max(1.0));
        let bound = 1e-4 * scale.max(1e-3);
        if depends && !got.is_nan() || never && !is_same(got, usual[e][2], bound) {
            let want = if depends { NAN } else { usual[e][2] };
            wrong.push(format!("NaN at {place:?}: gradient {e} is {got:e}, not {want:e}"));
        }
    }
    wrong
}

fn zero_gradients(case: &Case, arrays: &[Array], dy: &[f32], place: (usize, usize)) -> Vec<String> {
    let want = slopes(case, &with(arrays, place, 0.0), dy);
    let finite = want.iter().map(|s| s[2].abs()).filter(|s| s.is_finite());
    let scale = finite.fold(1e-3, f64::max);
    let mut wrong = Vec::new();
    for special in [-0.0, 1e-40] {
        let got = device_slopes(case, &with(arrays, place, special), dy);
        for (e, (&got, [up, down, central])) in got.iter().zip(&want).enumerate() {
            let smooth = (up - down).abs() < 1e-3 * scale;
            if smooth && !is_same(got, *central, 2e-4 * scale) {
                wrong.push(format!("{special:e} at {place:?}: gradient {e} is {got:e}, not {central:e}"));
            }
        }
    }
    wrong
}

/// Returns numbers of all sizes: random bits, which include NaN and subnormals, and numbers near multiples of pi/2.
fn all_sizes(count: usize) -> Vec<f32> {
    let mut state = 5u64;
    let mut all: Vec<f32> = (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            f32::from_bits((state >> 32) as u32)
        })
        .collect();
    let turns = (0..count as i64 / 4).map(|k| (k as f64 * std::f64::consts::FRAC_PI_2) as f32);
    all.extend(turns.flat_map(|x| [x, f32::from_bits(x.to_bits() + 1), -x]));
    // Also the range of most arguments in practice.
    all.extend((0..count as i64).map(|k| (k as f32 / count as f32 - 0.5) * 60.0));
    all
}

/// Returns all results that are wrong. A normal number may be off by `allowed` roundoffs. NaN, infinities and small numbers must
/// agree.
fn errors(
    what: &str,
    got: &[f32],
    want: impl Fn(usize) -> f64,
    allowed: impl Fn(usize) -> f64,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for (i, &got) in got.iter().enumerate() {
        let want = want(i);
        let least = f32::MIN_POSITIVE as f64;
        // Near the limits of the range, rounding may give either of two results.
        let bound = allowed(i) * U * want.abs();
        let is_right = match want.abs() {
            w if w.is_nan() => got.is_nan(),
            w if w < least => (got as f64).abs() <= least * (1.0 + 1e-6) && (w != 0.0 || got == 0.0),
            w if w > f32::MAX as f64 * (1.0 - allowed(i) * U) => {
                (got as f64).abs() >= f32::MAX as f64 * (1.0 - 2.0 * allowed(i) * U)
            }
            _ => is_same(got as f64, want, bound),
        };
        let sign = want.is_nan() || got.is_sign_negative() == want.is_sign_negative();
        if !(is_right && sign) {
            let off = (got as f64 - want).abs() / (U * want.abs());
            wrong.push(format!(
                "{what} element {i}: {got:e}, not {want:e}: {off:.1} roundoffs, {:.1} allowed",
                allowed(i)
            ));
        }
    }
    wrong
}

/// Tests the error bounds in the docs of functions of one element and of pow.
fn stated_bounds() -> Vec<Trial> {
    type Row = (&'static str, fn(&Tensor) -> Tensor, fn(f64) -> f64, f64);
    let softplus = |x: f64| if x.is_nan() { x } else { x.max(0.0) + (-x.abs()).exp().ln_1p() };
    let rows: [Row; 14] = [
        ("expm1", Tensor::expm1, f64::exp_m1, 4.0),
        ("log1p", Tensor::log1p, f64::ln_1p, 5.0),
        ("softplus", Tensor::softplus, softplus, 10.0),
        ("elu", Tensor::elu, |x| if x > 0.0 { x } else { x.exp_m1() }, 4.0),
        ("exp", Tensor::exp, f64::exp, 3.0),
        ("log", Tensor::log, f64::ln, 2.0),
        ("sin", Tensor::sin, f64::sin, 4.0),
        ("cos", Tensor::cos, f64::cos, 4.0),
        ("sqrt", Tensor::sqrt, f64::sqrt, 2.0),
        ("rsqrt", Tensor::rsqrt, |x| 1.0 / x.sqrt(), 4.0),
        ("tanh", Tensor::tanh, f64::tanh, 12.0),
        ("sigmoid", Tensor::sigmoid, |x| 1.0 / (1.0 + (-x).exp()), 12.0),
        ("abs", Tensor::abs, f64::abs, 0.0),
        ("relu", Tensor::relu, |x| if x.is_nan() { x } else { x.max(0.0) }, 0.0),
    ];
    let one = |(name, forward, want, allowed): Row| {
        Trial::test(format!("bound_of_{name}"), move || {
            let x = all_sizes(1 << 16);
            let y = forward(&Tensor::from_slice(gpu(), &x, [x.len()])).to_vec::<f32>().expect("readback");
            verdict(errors(name, &y, |i| want(x[i] as f64), |_| allowed))
        })
    };
    let mut trials: Vec<Trial> = rows.into_iter().map(one).collect();
    trials.push(Trial::test("bound_of_pow", || verdict(pow_errors())));
    trials
}

fn pow_errors() -> Vec<String> {
    let special =
        [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -3.0, 1e-40, -1e38, 16777215.0, 33554432.0];
    let (mut a, mut b): (Vec<f32>, Vec<f32>) = Default::default();
    for x in special {
        a.extend(special.map(|_| x as f32));
        b.extend(special.map(|y| y as f32));
    }
    let mut normal = vec![0.0f32; 1 << 16];
    Rng::new(3).fill_normal(&mut normal);
    for (i, &z) in normal.iter().enumerate() {
        // Numbers near 1 to large powers, numbers of any size to small powers, and whole powers.
        let (x, y) = match i % 3 {
            0 => (1.0 + 0.01 * z, 3000.0 * normal[(i + 7) % normal.len()]),
            1 => ((20.0 * z).exp(), normal[(i + 7) % normal.len()]),
            _ => (10.0 * z, (20.0 * normal[(i + 7) % normal.len()]).round()),
        };
        a.push(x);
        b.push(y);
    }
    let up = |x: &[f32]| Tensor::from_slice(gpu(), x, [x.len()]);
    let y = up(&a).pow(&up(&b)).to_vec::<f32>().expect("readback");
    let allowed = |i: usize| {
        let exponent = (b[i] as f64 * (a[i] as f64).abs().ln()).abs();
        4.0 + if exponent.is_finite() { 0.15 * exponent } else { 0.0 }
    };
    errors("pow", &y, |i| (a[i] as f64).powf(b[i] as f64), allowed)
}

/// Tests gradients of quotients and roots whose squares are outside the range of f32.
fn quotients_without_overflow() -> Result<(), Failed> {
    let up = |x: &[f32]| Tensor::from_slice(gpu(), x, [x.len()]).requires_grad();
    let (a, b) = ([1e20, 1e-25, 3e30, 1e-20, 0.0, 2.0], [1e20, 1e-25, 1e25, 1e-25, 1e-25, 1e20]);
    let (x, y) = (up(&a), up(&b));
    let ones = Tensor::from_slice(gpu(), &[1.0f32; 6], [6]);
    let at = |i: usize| (a[i] as f64, b[i] as f64);
    let mut wrong = Vec::new();
    let mut compare = |what: &str, y: Tensor, x: &Tensor, want: &dyn Fn(usize) -> f64| {
        let dx = download(y.backward_with(&ones).expect("backward").get(x).expect("a gradient"));
        let dx: Vec<f32> = dx.into_iter().map(|g| g as f32).collect();
        wrong.extend(errors(what, &dx, want, |_| 24.0));
    };
    compare("d(a/b)/da", x.div(&y), &x, &|i| 1.0 / at(i).1);
    compare("d(a/b)/db", x.div(&y), &y, &|i| -at(i).0 / at(i).1 / at(i).1);
    compare("d(1/b)/db", y.recip(), &y, &|i| -1.0 / at(i).1 / at(i).1);
    compare("d rsqrt(b)/db", y.rsqrt(), &y, &|i| -0.5 * at(i).1.powf(-1.5));
    compare("d sqrt(b)/db", y.sqrt(), &y, &|i| 0.5 / at(i).1.sqrt());
    verdict(wrong)
}
