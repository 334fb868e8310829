//! The op beside the same of other ops: `cargo bench --package swiglu`.

use swiglu::swiglu;
use tiebeam::Gpu;
use tiebeam::ops::case::{Array, Case, Input};
use tiebeam::ops::timed::Want;

fn main() -> tiebeam::Result<()> {
    let gpu = Gpu::open()?;
    let rows = if gpu.class().is_cpu() { 1024 } else { 16384 };
    let inputs = || vec![Input::normal([rows, 1024]), Input::normal([rows, 1024])];
    let value = |x: &[Array], i: usize| x[0].data[i] / (1.0 + (-x[0].data[i]).exp()) * x[1].data[i];
    let all = move |x: &[Array]| Array::from_fn(x[0].shape, |i| value(x, i));
    // Bytes of two operands, of the incoming gradient and of two gradients.
    let backward = [20.0 * (rows * 1024) as f64, 0.0];
    let mut cases = Vec::new();
    for (family, forward) in [
        ("swiglu", (|x| swiglu(&x[0], &x[1])) as fn(&[tiebeam::Tensor]) -> tiebeam::Tensor),
        ("silu and product", |x| x[0].silu().mul(&x[1])),
    ] {
        let timed = |name: String, element: fn(&[Array], usize) -> f64| {
            Case::new(name, inputs(), forward, all).timed(family, [0, rows * 512], move |x, i| {
                let value = element(x, i);
                Want { value, bound: 1e-5 * value.abs() + 1e-6 }
            })
        };
        cases.push(timed(format!("{rows}x1024"), value));
        let dup = |x: &[Array], i: usize| x[0].data[i] / (1.0 + (-x[0].data[i]).exp()) * x[2].data[i];
        cases.push(timed(format!("{rows}x1024 backward"), dup).gradient_of(1, backward));
    }
    print!("{}", tiebeam::bench::outside::cases(&gpu, cases)?);
    Ok(())
}
