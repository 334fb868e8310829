//! Tests products on the adapter's matrix units with every load and store, on a device that may round f32 to f16. Whole numbers
//! are exact in f16 and so are their sums, so the results must have the bits of a device that does not round.

use crate::support::*;
use libtest_mimic::{Failed, Trial};
use std::sync::OnceLock;
use tiebeam::nn::Mask;
use tiebeam::ops::case::Input;
use tiebeam::ops::product::matmul::{Activation, Epilogue};
use tiebeam::ops::sequence::attention;
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
    let tied = Tied::new(&x.draw(8, [n, k])).shared();
    let made = Factored::new(&x.draw(2, [2, k]), &x.draw(2, [n, 2])).shared();
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
    let tied = Tied::new(&weight).shared();
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

/// A call of attention: [batch, heads, key heads, queries, keys, head], whether it is causal, the shape of a mask, how far scores
/// grow from the first key to the last, and parts of the keys.
struct Attended(&'static str, [usize; 6], bool, Option<[usize; 4]>, f32, Option<usize>);

const ATTENDED: [Attended; 9] = [
    Attended("all keys", [1, 2, 2, 32, 32, 32], false, None, 0.0, None),
    Attended("causal", [1, 1, 1, 70, 70, 20], true, None, 0.0, None),
    Attended("causal grouped", [2, 4, 2, 37, 37, 32], true, None, 0.0, None),
    Attended("earlier keys, a head of two blocks", [1, 2, 1, 35, 75, 64], true, None, 0.0, None),
    Attended("rows that see nothing", [1, 2, 2, 39, 17, 24], true, None, 0.0, None),
    Attended("a mask", [1, 2, 1, 33, 45, 32], false, Some([1, 2, 33, 45]), 0.0, None),
    Attended("scores that grow", [1, 1, 1, 40, 130, 36], false, None, 90.0, None),
    Attended("keys in parts", [1, 2, 2, 20, 150, 32], true, None, 30.0, Some(3)),
    Attended("the largest head", [1, 1, 1, 33, 33, 128], true, None, 0.0, None),
];

/// Computes attention and its gradients, for q, k, v and dy by tokens as a block's products give them. `units` says whether on
/// matrix units.
fn attended(gpu: &Gpu, call: &Attended, units: bool) -> Result<Vec<(&'static str, Vec<f32>)>, Error> {
    let Attended(_, [batch, heads, kv_heads, queries, keys, size], causal, mask, grows, splits) = *call;
    let mut rng = Rng::new(5);
    let mut draw = |heads: usize, tokens: usize| {
        let shape = [batch, tokens, heads, size];
        let drawn = Input::normal(shape).draw(&mut rng).data;
        let data: Vec<f32> = drawn.iter().map(|&x| x as f32).collect();
        (data, shape)
    };
    let [q, mut k, v, dy] =
        [draw(heads, queries), draw(kv_heads, keys), draw(kv_heads, keys), draw(heads, queries)];
    // The score with every query grows with the key, because all queries have a large first element.
    let mut q = q;
    if grows > 0.0 {
        q.0.iter_mut().step_by(size).for_each(|x| *x = (size as f32).sqrt());
        let step = grows / keys as f32;
        k.0.iter_mut().step_by(size).enumerate().for_each(|(i, x)| *x = (i / kv_heads % keys) as f32 * step);
    }
    // All operands are rounded to f16, so both ways have the same.
    let tensor = |(data, shape): &(Vec<f32>, [usize; 4])| {
        let x = Tensor::from_slice(gpu, data, *shape).cast(DType::F16);
        if units { x } else { x.cast(DType::F32) }.requires_grad()
    };
    let [q, k, v, dy] = [&q, &k, &v, &dy].map(tensor);
    let mask = match mask {
        Some(shape) => {
            let drawn = Input::normal(shape).draw(&mut rng).data;
            // A tenth of the keys is hidden.
            let value = |x: f64| if x < -1.3 { f32::NEG_INFINITY } else { x as f32 };
            let data: Vec<f32> = drawn.into_iter().map(value).collect();
            Mask::Additive(Tensor::from_slice(gpu, &data, shape))
        }
        None if causal => Mask::Causal,
        None => Mask::None,
    };
    let by_head = [&q, &k, &v].map(|x| x.transpose(1, 2));
    let [a, b, c] = [&by_head[0], &by_head[1], &by_head[2]];
    let y = match units {
        true => autocast(Precision::F16, || attention::by_matrices([a, b, c], &mask, splits)),
        false => Some(a.attention(b, c, &mask)),
    };
    // The adapter's subgroups or its workgroup memory are not for these kernels.
    let Some(y) = y else { return Ok(vec![]) };
    assert_eq!(y.dtype(), q.dtype());
    let grads = y.backward_with(&dy.detach().cast(DType::F32).transpose(1, 2))?;
    let of = |leaf: &Tensor| grads.get(leaf).expect("a gradient").clone();
    let all = [("y", y.detach()), ("dq", of(&q)), ("dk", of(&k)), ("dv", of(&v))];
    all.into_iter().map(|(name, x)| Ok((name, x.cast(DType::F32).to_vec::<f32>()?))).collect()
}

/// Attention on matrix units against the kernels for f32. Weights, their gradients and results are rounded to f16.
fn attention_agrees(call: &Attended) -> Result<(), Failed> {
    let (want, got) = (attended(gpu(), call, false)?, attended(rounding(), call, true)?);
    for ((name, want), (_, got)) in want.iter().zip(&got) {
        let most = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        // Sums of weights that have an error of 2^-11 each. For queries, they are multiplied by the keys, which grow.
        let slack = if *name == "dq" { 2e-3 + 2e-4 * call.4 } else { 2e-3 };
        for (at, (want, got)) in want.iter().zip(got).enumerate() {
            if (want - got).abs() > slack * most || got.is_nan() {
                return Err(format!("{name} at {at}: {got}, not {want}, of {most}").into());
            }
        }
    }
    let bits = |all: Vec<(&str, Vec<f32>)>| -> Vec<u32> {
        all.into_iter().flat_map(|(_, x)| x).map(f32::to_bits).collect()
    };
    assert!(bits(attended(rounding(), call, true)?) == bits(got), "a second run has other bits");
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
    let attention = ATTENDED.iter().map(|call| {
        let name = format!("matrix_units::attention_{}{missing}", call.0.replace(' ', "_"));
        Trial::test(name, move || attention_agrees(call)).with_ignored_flag(!present)
    });
    all.into_iter().map(trial).chain(attention).collect()
}
