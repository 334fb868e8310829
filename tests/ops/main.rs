//! Tests all cases of the op list: compares forward and gradient with an f64 reference, checks that a second run gives the same
//! bits, and checks accumulation. `make test-discrete` does the same with the kernels of a GPU's class of devices.
//!
//! [`Case::check`] has the bounds.

mod matrix_units;
mod pytorch;
mod special;
#[path = "../support/mod.rs"]
mod support;
mod vectors;

use libtest_mimic::{Arguments, Failed, Trial};
use std::sync::Arc;
use support::*;
use tiebeam::ops::case::{Case, Input};
use tiebeam::ops::check::bits;
use tiebeam::{DType, Gpu, Rng, Tensor};

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
    if case.outside {
        case.check(&checked_gpu())?;
        if gpu.is_checked() {
            return Ok(());
        }
    }
    case.check(gpu)?;
    // Texture reads are checked only on software drivers, for which they are meant. Elsewhere compilers may contract the
    // different source text differently.
    if gpu.adapter().is_software() && bits(&case.outputs(gpu)?) != bits(&case.outputs(texel_gpu())?) {
        return Err(
            format!("{}: a run that reads operands through textures gave other bits", case.name).into()
        );
    }
    Ok(())
}
