//! Tests products on the adapter's matrix units with every load and store, on a device that may round f32 to f16. Whole numbers
//! are exact in f16 and so are their sums, so the results must have the bits of a device that does not round.

use crate::support::*;
use libtest_mimic::{Failed, Trial};
use std::sync::{Arc, OnceLock};
use tiebeam::ops::case::Input;
use tiebeam::ops::product::matmul::{Activation, Epilogue};
use tiebeam::share::{Factored, Site, Tied};
use tiebeam::{DType, Error, Gpu, Options, Precision, Rng, Tensor, autocast};

/// A device that uses matrix units wherever it can. A software driver emulates them, and uses them only as a GPU.
fn rounding() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    let options = Options::default().round_products(true);
    let software = gpu().adapter().is_software();
    let options = if software { options.device(Some("discrete".into())) } else { options };
    GPU.get_or_init(|| Gpu::open_with(options).expect("the adapter opened before"))
}

/// Makes tensors of whole numbers, the same on every device.
struct Whole<'a> {
    gpu: &'a Gpu,
    rng: Rng,
}

impl Whole<'_> {
    fn draw<const N: usize>(&mut self, most: i64, shape: [usize; N]) -> Tensor {
        let drawn = Input::integers(shape, DType::F32, -most, most + 1).draw(&mut self.rng);
        let data: Vec<f32> = drawn.data.iter().map(|&x| x as f32).collect();
        Tensor::from_slice(self.gpu, &data, shape)
    }
}

type Results = Vec<(&'static str, Tensor)>;
/// A function that computes results of products of these sizes.
type Work = fn(&mut Whole, [usize; 3]) -> Results;

/// Products of tensors: every layout, with a batch and without.
fn layouts(x: &mut Whole, [m, n, k]: [usize; 3]) -> Results {
    let (a, b) = (x.draw(8, [m, k]), x.draw(8, [k, n]));
    let (at, bt) = (x.draw(8, [k, m]), x.draw(8, [n, k]));
    let (batch, one) = (x.draw(8, [3, m, k]), x.draw(8, [3, k, n]));
    vec![
        ("plain", a.matmul(&b)),
        ("left transposed", at.t().matmul(&b)),
        ("right transposed", a.matmul(&bt.t())),
        ("batch", batch.matmul(&one)),
    ]
}

/// Layers with their epilogues, on some rows only, and with a weight that is computed as it is read.
fn layers(x: &mut Whole, [m, n, k]: [usize; 3]) -> Results {
    let (input, bias, residual) = (x.draw(8, [m, k]), x.draw(8, [n]), x.draw(8, [m, n]));
    let tied: Arc<dyn Site> = Arc::new(Tied::new(&x.draw(8, [n, k])));
    let made: Arc<dyn Site> = Arc::new(Factored::new(&x.draw(2, [2, k]), &x.draw(2, [n, 2])));
    let plain = Epilogue::default();
    // All differ, because 7 divides none of the sizes + 2.
    let rows: Vec<u32> = (0..m as u32).map(|i| (i * 7 + 3) % (m as u32 + 2)).collect();
    let rows = Tensor::from_slice(x.gpu, &rows, [m]);
    vec![
        ("bias", input.linear(&tied, plain.bias(Some(&bias)))),
        ("relu", input.linear(&tied, plain.bias(Some(&bias)).activation(Activation::Relu))),
        ("residual", input.linear(&tied, plain.bias(Some(&bias)).residual(Some(&residual)))),
        ("gathered", input.linear_gathered(&rows, &tied)),
        ("scattered", residual.add_linear_scattered(&input, &rows, &x.draw(2, [m]), &tied)),
        ("site", input.linear(&made, plain)),
        ("site of 64 rows", input.slice(0, 0..64).linear(&made, plain)),
    ]
}

/// Gradients of a layer that is used twice, so that the second use adds to the gradient of the first.
fn gradients(x: &mut Whole, [m, n, k]: [usize; 3]) -> Results {
    let weight = x.draw(4, [n, k]).requires_grad();
    let tied: Arc<dyn Site> = Arc::new(Tied::new(&weight));
    let (a, b) = (x.draw(4, [m, k]).requires_grad(), x.draw(4, [64, k]).requires_grad());
    let (a_up, b_up) = (x.draw(4, [m, n]), x.draw(4, [64, n]));
    let plain = Epilogue::default();
    let loss = a.linear(&tied, plain).mul(&a_up).sum_all().add(&b.linear(&tied, plain).mul(&b_up).sum_all());
    let grads = loss.backward().expect("a graph");
    let of = |leaf: &Tensor| grads.get(leaf).expect("a gradient").clone();
    vec![("weight", of(&weight)), ("first input", of(&a)), ("second input", of(&b))]
}

/// The same in a scope of f16, whose results are rounded once, from sums that are exact on either device.
fn in_f16(x: &mut Whole, sizes: [usize; 3]) -> Results {
    let all = autocast(Precision::F16, || {
        layouts(x, sizes).into_iter().chain(layers(x, sizes)).collect::<Vec<_>>()
    });
    assert!(all.iter().all(|(_, y)| y.dtype() == DType::F16));
    all.into_iter().map(|(name, y)| (name, y.cast(DType::F32))).collect()
}

fn same(work: Work) -> Result<(), Failed> {
    // Multiples of every tile, multiples of a vector, and neither.
    for sizes in [[128, 128, 128], [132, 76, 36], [67, 65, 33]] {
        let [want, got] = [gpu(), rounding()].map(|gpu| work(&mut Whole { gpu, rng: Rng::new(11) }, sizes));
        for ((name, want), (_, got)) in want.iter().zip(&got) {
            let [want, got] = [want, got].map(|y| y.to_vec::<f32>());
            let (want, got): (Vec<f32>, Vec<f32>) = (want?, got.map_err(|e: Error| format!("{name}: {e}"))?);
            if let Some(at) = (0..want.len()).find(|&i| want[i] != got[i]) {
                return Err(format!("{name} {sizes:?} at {at}: {}, not {}", got[at], want[at]).into());
            }
        }
    }
    Ok(())
}

pub fn trials() -> Vec<Trial> {
    let all: [(&str, Work); 4] =
        [("layouts", layouts), ("layers", layers), ("gradients", gradients), ("in_f16", in_f16)];
    let present = gpu().has_coop_matrices();
    let missing = if present { "" } else { "_but_this_adapter_has_no_cooperative_matrices" };
    let trial = |(name, work): (&str, Work)| {
        let trial = Trial::test(format!("matrix_units::{name}{missing}"), move || same(work));
        trial.with_ignored_flag(!present)
    };
    all.into_iter().map(trial).collect()
}
