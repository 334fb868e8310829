//! Work by rows and by elements: norms, sums, chains, optimizers.

use super::{Inputs, U, normal};
use crate::bench::{Case, Check, Row};
use crate::gpu::Gpu;
use crate::optim::{AdamW, AdamWConfig, Group};
use crate::step::Step;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::cell::RefCell;

pub(super) fn cases(full: bool) -> Vec<Case> {
    let mut all = Vec::new();
    for &rows in if full { &[256, 1024, 4096][..] } else { &[4096] } {
        all.push(softmax([rows, 1024]));
        all.push(layer_norm([rows, 768]));
    }
    all.extend(if full { &[16, 20, 22][..] } else { &[20, 22] }.iter().map(|&bits| chain(1 << bits)));
    let lengths = if full { &[1 << 10, 1 << 14, 1 << 15][..] } else { &[1 << 10, 1 << 14] };
    all.extend(lengths.iter().map(|&rows| sum([rows, 1024], None)));
    // The gradient of a layer norm's bias, and of a bias behind many narrow rows.
    all.extend([[4096, 1024], [131_072, 64]].map(|size| sum(size, Some(0))));
    all.push(cross_entropy(4096, 1024));
    all.push(adamw(1 << 22));
    all
}

/// A row over `arrays` of `[rows, width]` whose reference is a function of one row of each.
fn wise(
    family: &'static str,
    [rows, width]: [usize; 2],
    arrays: usize,
    run: impl Fn(&[Tensor]) -> Tensor + 'static,
    reference: impl Fn(&[&[f32]], usize) -> f64 + 'static,
) -> Case {
    Case::new(family, format!("{rows}x{width}"), move |gpu| {
        let inputs = Inputs::new(gpu, &vec![&[rows, width][..]; arrays]);
        let checks = [0, rows * width / 2, rows * width - 1]
            .iter()
            .map(|&at| {
                let of = |x: &'_ Vec<f32>| -> Vec<f32> { x[at / width * width..][..width].to_vec() };
                let own: Vec<Vec<f32>> = inputs.host.iter().map(of).collect();
                let want = reference(&own.iter().map(Vec::as_slice).collect::<Vec<_>>(), at % width);
                Check { at, want, bound: 1e-4 * want.abs() + 1e-6 }
            })
            .collect();
        let bytes = 4.0 * (rows * width * (arrays + 1)) as f64;
        Ok(inputs.row([bytes, 0.0], checks, run))
    })
}

fn softmax(size: [usize; 2]) -> Case {
    wise(
        "softmax",
        size,
        1,
        |x| x[0].softmax(-1),
        |x, i| (x[0][i] as f64).exp() / x[0].iter().map(|&v| (v as f64).exp()).sum::<f64>(),
    )
}

fn layer_norm(size: [usize; 2]) -> Case {
    let vectors = RefCell::new(None);
    let run = move |x: &[Tensor]| {
        let make = || [Tensor::ones(x[0].gpu(), [size[1]]), Tensor::zeros(x[0].gpu(), [size[1]])];
        let mut vectors = vectors.borrow_mut();
        let [gain, bias] = vectors.get_or_insert_with(make);
        x[0].layer_norm(Some(gain), Some(bias), 1e-5)
    };
    wise("layer_norm", size, 1, run, |x, i| {
        let n = x[0].len() as f64;
        let mean = x[0].iter().map(|&v| v as f64).sum::<f64>() / n;
        let variance = x[0].iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / n;
        (x[0][i] as f64 - mean) / (variance + 1e-5).sqrt()
    })
}

fn chain(n: usize) -> Case {
    let run = |x: &[Tensor]| x[0].mul(&x[1]).add(&x[2]).gelu_tanh();
    wise("gelu(x*y+z)", [n / 1024, 1024], 3, run, |x, i| {
        let v = x[0][i] as f64 * x[1][i] as f64 + x[2][i] as f64;
        0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh())
    })
}

/// The sum of all elements, or sums along the slow axis.
fn sum([rows, width]: [usize; 2], axis: Option<isize>) -> Case {
    let shape = if axis.is_some() { format!("{rows}x{width} down") } else { format!("{}", rows * width) };
    Case::new("sum", shape, move |gpu| {
        let inputs = Inputs::new(gpu, &[&[rows, width]]);
        let x = &inputs.host[0];
        let columns = if axis.is_some() { vec![0, width - 1] } else { vec![0] };
        let checks = columns
            .into_iter()
            .map(|column| {
                let terms: Vec<f64> = match axis {
                    None => x.iter().map(|&v| v as f64).collect(),
                    Some(_) => (0..rows).map(|r| x[r * width + column] as f64).collect(),
                };
                let norm = terms.iter().map(|t| t * t).sum::<f64>().sqrt();
                let bound = 4.0 * U * (terms.len() as f64).sqrt() * norm;
                Check { at: column, want: terms.iter().sum(), bound }
            })
            .collect();
        let results = if axis.is_some() { width } else { 1 };
        let bytes = 4.0 * (rows * width + results) as f64;
        Ok(inputs.row([bytes, 0.0], checks, move |x| match axis {
            None => x[0].sum_all(),
            Some(axis) => x[0].sum(axis),
        }))
    })
}

fn cross_entropy(rows: usize, classes: usize) -> Case {
    Case::new("cross_entropy", format!("{rows}x{classes}"), move |gpu| {
        let inputs = Inputs::new(gpu, &[&[rows, classes]]);
        let targets: Vec<u32> = (0..rows).map(|r| (r * 7 % classes) as u32).collect();
        let loss = |r: usize| {
            let x = &inputs.host[0][r * classes..][..classes];
            x.iter().map(|&v| (v as f64).exp()).sum::<f64>().ln() - x[targets[r] as usize] as f64
        };
        let want = (0..rows).map(loss).sum::<f64>() / rows as f64;
        let checks = vec![Check { at: 0, want, bound: 1e-5 * want.abs() }];
        let targets = Tensor::from_slice(gpu, &targets, [rows]);
        let bytes = 4.0 * (rows * classes) as f64;
        Ok(inputs.row([bytes, 0.0], checks, move |x| x[0].cross_entropy(&targets, None)))
    })
}

fn adamw(n: usize) -> Case {
    Case::new("adamw", n.to_string(), move |gpu| {
        let [p, g] = [normal(n, 1), normal(n, 2)];
        let (lr, decay) = (1e-3f64, 0.01f64);
        let at = n / 3;
        // The first step's corrected moments are g and g^2.
        let want = p[at] as f64 * (1.0 - lr * decay) - lr * (g[at] as f64).signum();
        let checks = vec![Check { at, want, bound: 1e-6 }];
        let theta = Tensor::from_slice(gpu, &p, [n]).requires_grad();
        let group = Group::new([("theta", &theta)]).weight_decay(decay as f32);
        let optimizer = RefCell::new(AdamW::new(gpu, vec![group], AdamWConfig::default())?);
        let grads = theta.mul(&Tensor::from_slice(gpu, &g, [n])).sum_all().backward()?;
        let run = move |_| {
            // A fault stays on the device and comes out where the result is read.
            let _ = optimizer.borrow_mut().step(&grads, lr as f32);
            theta.clone()
        };
        Ok(Row { checks, ..Row::new([7.0 * 4.0 * n as f64, 0.0], run) })
    })
}

/// A thousand dependent small additions: a kernel each, as one chain that the engine may fuse, and from a recorded step.
pub(super) fn adds() -> [Case; 3] {
    [
        Case::new("adds, a kernel each", ADDS, |gpu| Ok(thousand(gpu, false))),
        Case::new("adds in a chain", ADDS, |gpu| Ok(thousand(gpu, true))),
        Case::new("adds, replayed", ADDS, |gpu| {
            let row = thousand(gpu, false);
            let step = RefCell::new(Step::record(gpu, &[], |_| Ok(vec![(row.run)(0)]))?);
            let nothing = Tensor::full(gpu, [1], f32::NAN);
            let run =
                move |_| step.borrow_mut().run(&[]).map_or_else(|_| nothing.clone(), |all| all[0].clone());
            Ok(Row { run: Box::new(run), ..row })
        }),
    ]
}

const ADDS: &str = "1000 of 1024";

fn thousand(gpu: &Gpu, fused: bool) -> Row {
    let host = normal(1024, 9);
    let y = Tensor::from_slice(gpu, &host, [1024]);
    let run = move |_| {
        no_grad(|| {
            (0..1000).fold(y.clone(), |x, _| {
                let z = x.add(&y);
                if !fused {
                    z.evaluate();
                }
                z
            })
        })
    };
    let want = 1001.0 * host[5] as f64;
    let checks = vec![Check { at: 5, want, bound: 1e-3 * want.abs() }];
    Row { ops: 1000, checks, ..Row::new([0.0, 0.0], run) }
}
