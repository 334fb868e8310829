//! The case list: every kernel family at sizes that grow, with an f64 reference of a few elements each.

use super::{Check, Row, train};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::nn::Mask;
use crate::ops::matmul::tune::chosen;
use crate::optim::{AdamW, AdamWConfig, Group};
use crate::rng::Rng;
use crate::step::Step;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::cell::RefCell;

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Under three minutes on two cores.
    Quick,
    /// Every size.
    Full,
}

const U: f64 = 1.0 / (1u64 << 24) as f64;

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut data = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut data);
    data
}

/// Standard normal arrays of these shapes, and as many copies on the device as a cache cannot hold.
struct Inputs {
    host: Vec<Vec<f32>>,
    sets: Vec<Vec<Tensor>>,
}

impl Inputs {
    fn new(gpu: &Gpu, shapes: &[&[usize]]) -> Inputs {
        let count = |s: &[usize]| s.iter().product::<usize>();
        let host: Vec<Vec<f32>> = shapes.iter().zip(1..).map(|(s, seed)| normal(count(s), seed)).collect();
        let first: Vec<Tensor> =
            host.iter().zip(shapes).map(|(x, s)| Tensor::from_slice(gpu, x, *s)).collect();
        let bytes: usize = host.iter().map(|x| 4 * x.len()).sum();
        let beyond_caches = if gpu.adapter().is_software() { 64 << 20 } else { 256 << 20 };
        let copy = |x: &Tensor| {
            let y = x.affine(1.0, 0.0);
            y.evaluate();
            y
        };
        let more = (beyond_caches / bytes).min(7);
        let mut sets: Vec<Vec<Tensor>> = (0..more).map(|_| first.iter().map(copy).collect()).collect();
        sets.insert(0, first);
        Inputs { host, sets }
    }

    /// The same, stored as f16.
    fn round(&mut self) {
        for x in self.host.iter_mut().flatten() {
            *x = half::f16::from_f32(*x).to_f32();
        }
        for x in self.sets.iter_mut().flatten() {
            *x = x.cast(DType::F16);
            x.evaluate();
        }
    }

    fn row(
        self,
        family: &'static str,
        shape: String,
        work: [f64; 2],
        checks: Vec<Check>,
        run: impl Fn(&[Tensor]) -> Tensor + 'static,
    ) -> Row {
        let sets = self.sets;
        let count = sets.len();
        let run = Box::new(move |i: usize| no_grad(|| run(&sets[i])));
        Row { sets: count, checks, ..Row::new(family, shape, work, run) }
    }
}

fn matmul(gpu: &Gpu, [batch, m, n, k]: [usize; 4], half: bool) -> Row {
    let (a, b) = (vec![batch, m, k], vec![batch, k, n]);
    let skip = (batch == 1) as usize;
    let mut inputs = Inputs::new(gpu, &[&a[skip..], &b[skip..]]);
    if half {
        inputs.round();
    }
    let checks = [(0, 0, 0), (batch / 2, m / 2, n / 3), (batch - 1, m - 1, n - 1)]
        .iter()
        .map(|&(q, row, col)| {
            let [a, b] = [&inputs.host[0], &inputs.host[1]];
            let term = |i: usize| a[(q * m + row) * k + i] as f64 * b[(q * k + i) * n + col] as f64;
            let norm = (0..k).map(|i| term(i).powi(2)).sum::<f64>().sqrt();
            let bound = 4.0 * U * (k as f64).sqrt() * norm;
            Check { at: (q * m + row) * n + col, want: (0..k).map(term).sum(), bound }
        })
        .collect();
    let shape = if batch > 1 { format!("{batch}x({m}x{k}x{n})") } else { format!("{m}x{k}x{n}") };
    let size = if half { 2 } else { 4 };
    let bytes = (batch * (size * (m * k + k * n) + 4 * m * n)) as f64;
    let constants = chosen(&inputs.sets[0][0], &inputs.sets[0][1]);
    let work = [bytes, 2.0 * (batch * m * n * k) as f64];
    let family = if half { "matmul f16" } else { "matmul" };
    Row { half, constants, ..inputs.row(family, shape, work, checks, |x| x[0].matmul(&x[1])) }
}

/// A row over `arrays` of `[rows, width]` whose reference is a function of one row of each.
fn wise(
    gpu: &Gpu,
    family: &'static str,
    [rows, width]: [usize; 2],
    arrays: usize,
    run: impl Fn(&[Tensor]) -> Tensor + 'static,
    reference: impl Fn(&[&[f32]], usize) -> f64,
) -> Row {
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
    inputs.row(family, format!("{rows}x{width}"), [bytes, 0.0], checks, run)
}

fn softmax(gpu: &Gpu, size: [usize; 2]) -> Row {
    wise(
        gpu,
        "softmax",
        size,
        1,
        |x| x[0].softmax(-1),
        |x, i| (x[0][i] as f64).exp() / x[0].iter().map(|&v| (v as f64).exp()).sum::<f64>(),
    )
}

fn layer_norm(gpu: &Gpu, size: [usize; 2]) -> Row {
    let [gain, bias] = [Tensor::ones(gpu, [size[1]]), Tensor::zeros(gpu, [size[1]])];
    wise(
        gpu,
        "layer_norm",
        size,
        1,
        move |x| x[0].layer_norm(Some(&gain), Some(&bias), 1e-5),
        |x, i| {
            let n = x[0].len() as f64;
            let mean = x[0].iter().map(|&v| v as f64).sum::<f64>() / n;
            let variance = x[0].iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / n;
            (x[0][i] as f64 - mean) / (variance + 1e-5).sqrt()
        },
    )
}

fn chain(gpu: &Gpu, n: usize) -> Row {
    let run = |x: &[Tensor]| x[0].mul(&x[1]).add(&x[2]).gelu_tanh();
    wise(gpu, "gelu(x*y+z)", [n / 1024, 1024], 3, run, |x, i| {
        let v = x[0][i] as f64 * x[1][i] as f64 + x[2][i] as f64;
        0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh())
    })
}

fn transpose(gpu: &Gpu, n: usize) -> Row {
    let inputs = Inputs::new(gpu, &[&[n, n]]);
    let at = n + 2;
    let checks = vec![Check { at, want: inputs.host[0][2 * n + 1] as f64, bound: 0.0 }];
    inputs
        .row("transpose", format!("{n}x{n}"), [8.0 * (n * n) as f64, 0.0], checks, |x| x[0].t().contiguous())
}

/// Sums of all elements and along the slow axis.
fn sums(gpu: &Gpu, rows: usize, width: usize, axis: Option<isize>) -> Row {
    let inputs = Inputs::new(gpu, &[&[rows, width]]);
    let x = &inputs.host[0];
    let terms: Vec<f64> = match axis {
        None => x.iter().map(|&v| v as f64).collect(),
        Some(_) => (0..rows).map(|r| x[r * width] as f64).collect(),
    };
    let norm = terms.iter().map(|t| t * t).sum::<f64>().sqrt();
    let bound = 4.0 * U * (terms.len() as f64).sqrt() * norm;
    let checks = vec![Check { at: 0, want: terms.iter().sum(), bound }];
    let results = if axis.is_some() { width } else { 1 };
    let shape = if axis.is_some() { format!("{rows}x{width} down") } else { format!("{}", rows * width) };
    let bytes = 4.0 * (rows * width + results) as f64;
    inputs.row("sum", shape, [bytes, 0.0], checks, move |x| match axis {
        None => x[0].sum_all(),
        Some(axis) => x[0].sum(axis),
    })
}

fn cross_entropy(gpu: &Gpu, rows: usize, classes: usize) -> Row {
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
    let shape = format!("{rows}x{classes}");
    inputs.row("cross_entropy", shape, [bytes, 0.0], checks, move |x| x[0].cross_entropy(&targets, None))
}

/// Rows of a table, and the adjoint that sums gradients by sorted index.
fn embedding(gpu: &Gpu, [rows, width, count]: [usize; 3], backward: bool) -> Row {
    let inputs = Inputs::new(gpu, &[&[rows, width], &[count, width]]);
    let ids: Vec<u32> = (0..count).map(|i| (i * 7919 % rows) as u32).collect();
    let (table, dy) = (&inputs.host[0], &inputs.host[1]);
    let want = if backward {
        let hits = (0..count).filter(|&i| ids[i] == ids[1]).map(|i| dy[i * width + 3] as f64);
        Check { at: ids[1] as usize * width + 3, want: hits.sum(), bound: 1e-5 }
    } else {
        Check { at: width + 3, want: table[ids[1] as usize * width + 3] as f64, bound: 0.0 }
    };
    let ids = Tensor::from_slice(gpu, &ids, [count]);
    let shape = format!("{count} of {rows}x{width}");
    // Forward reads the rows that it takes; backward reads as much and writes the whole table's gradient.
    let bytes = 4.0 * (width * if backward { count + rows } else { 2 * count }) as f64;
    if !backward {
        return inputs.row("embedding", shape, [bytes, 0.0], vec![want], move |x| x[0].embedding(&ids));
    }
    let sets = inputs.sets;
    let graphs: Vec<_> = sets.iter().map(|x| (x[0].requires_grad(), x[1].clone())).collect();
    let graphs: Vec<_> = graphs.into_iter().map(|(t, dy)| (t.embedding(&ids), t, dy)).collect();
    let run = move |i: usize| {
        let (y, table, dy) = &graphs[i];
        gradient(y, dy, table)
    };
    let (family, sets) = ("embedding backward", sets.len());
    Row { sets, checks: vec![want], ..Row::new(family, shape, [bytes, 0.0], Box::new(run)) }
}

/// The gradient of a leaf; a fault of the device comes out where the result is read.
fn gradient(y: &Tensor, dy: &Tensor, leaf: &Tensor) -> Tensor {
    let grads = y.backward_with_retain_graph(dy).ok();
    grads.and_then(|g| g.get(leaf).cloned()).unwrap_or_else(|| Tensor::full(y.gpu(), [1], f32::NAN))
}

fn adamw(gpu: &Gpu, n: usize) -> Row {
    let [p, g] = [normal(n, 1), normal(n, 2)];
    let (lr, decay) = (1e-3f64, 0.01f64);
    let at = n / 3;
    // The first step's corrected moments are g and g^2.
    let want = p[at] as f64 * (1.0 - lr * decay) - lr * (g[at] as f64).signum();
    let checks = vec![Check { at, want, bound: 1e-6 }];
    let theta = Tensor::from_slice(gpu, &p, [n]).requires_grad();
    let group = Group::new([("theta", &theta)]).weight_decay(decay as f32);
    let optimizer = RefCell::new(AdamW::new(gpu, vec![group], AdamWConfig::default()));
    let grads = theta.mul(&Tensor::from_slice(gpu, &g, [n])).sum_all().backward();
    let run = move |_| {
        if let (Ok(optimizer), Ok(grads)) = (optimizer.borrow_mut().as_mut(), &grads) {
            // A fault stays on the device and comes out where the result is read.
            let _ = optimizer.step(grads, lr as f32);
        }
        theta.clone()
    };
    let bytes = 7.0 * 4.0 * n as f64;
    Row { checks, ..Row::new("adamw", n.to_string(), [bytes, 0.0], Box::new(run)) }
}

/// Causal attention of `[batch, heads, tokens, size]`, forward or backward.
fn attention(gpu: &Gpu, [batch, heads, tokens, size]: [usize; 4], backward: bool) -> Row {
    let shape = [batch, heads, tokens, size];
    let inputs = Inputs::new(gpu, &[&shape[..]; 4]);
    let [q, k, v, dy] = [0, 1, 2, 3].map(|i| &inputs.host[i]);
    let weights = |i: usize| -> Vec<f64> {
        let score = |j: usize| {
            let dot = (0..size).map(|d| q[i * size + d] as f64 * k[j * size + d] as f64).sum::<f64>();
            (dot / (size as f64).sqrt()).exp()
        };
        let all: Vec<f64> = (0..=i).map(score).collect();
        let sum: f64 = all.iter().sum();
        all.into_iter().map(|s| s / sum).collect()
    };
    let name = format!("{batch}x{heads}x{tokens}x{size} causal");
    let array = 4.0 * shape.iter().product::<usize>() as f64;
    // Half of the pairs are masked: two products forward, five backward.
    let pairs = (batch * heads * tokens * tokens / 2 * size) as f64;
    if !backward {
        let at = (tokens - 1) * size + 3;
        let want = weights(tokens - 1).iter().enumerate().map(|(j, w)| w * v[j * size + 3] as f64).sum();
        let checks = vec![Check { at, want, bound: 1e-5 }];
        let work = [4.0 * array, 4.0 * pairs];
        return inputs.row("attention", name, work, checks, |x| x[0].attention(&x[1], &x[2], &Mask::Causal));
    }
    let key = tokens / 2;
    let want = (key..tokens).map(|i| weights(i)[key] * dy[i * size + 3] as f64).sum();
    let checks = vec![Check { at: key * size + 3, want, bound: 1e-5 }];
    let graphs: Vec<_> = inputs
        .sets
        .iter()
        .map(|x| {
            let leaves = [0, 1, 2].map(|i| x[i].requires_grad());
            (leaves[0].attention(&leaves[1], &leaves[2], &Mask::Causal), leaves, x[3].clone())
        })
        .collect();
    let sets = graphs.len();
    let run = Box::new(move |i: usize| {
        let (y, leaves, dy) = &graphs[i];
        gradient(y, dy, &leaves[2])
    });
    Row { sets, checks, ..Row::new("attention backward", name, [8.0 * array, 10.0 * pairs], run) }
}

/// One query a head against many keys: `[batch, heads, key heads, keys, size]`.
fn decode(gpu: &Gpu, [batch, heads, kv_heads, keys, size]: [usize; 5]) -> Row {
    let (q, kv) = ([batch, heads, 1, size], [batch, kv_heads, keys, size]);
    let inputs = Inputs::new(gpu, &[&q[..], &kv, &kv]);
    let [q, k, v] = [0, 1, 2].map(|i| &inputs.host[i]);
    let score = |j: usize| {
        let dot = (0..size).map(|d| q[d] as f64 * k[j * size + d] as f64).sum::<f64>();
        (dot / (size as f64).sqrt()).exp()
    };
    let total: f64 = (0..keys).map(score).sum();
    let want = (0..keys).map(|j| score(j) * v[j * size + 3] as f64).sum::<f64>() / total;
    let checks = vec![Check { at: 3, want, bound: 1e-5 }];
    let bytes = 4.0 * (2 * batch * (kv_heads * keys + heads) * size) as f64;
    let work = [bytes, 4.0 * (batch * heads * keys * size) as f64];
    let shape = format!("{batch}x{heads}/{kv_heads}x{keys}x{size}");
    let run = |x: &[Tensor]| x[0].attention(&x[1], &x[2], &Mask::Causal);
    inputs.row("attention, one query", shape, work, checks, run)
}

/// A thousand dependent small additions: a kernel each, or as one chain the engine may fuse.
fn adds(gpu: &Gpu, fused: bool) -> Row {
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
    let family = if fused { "adds in a chain" } else { "adds, a kernel each" };
    Row { ops: 1000, checks, ..Row::new(family, "1000 of 1024".into(), [0.0, 0.0], Box::new(run)) }
}

/// The thousand kernels again, from a recorded step.
fn replayed_adds(gpu: &Gpu) -> Row {
    let row = adds(gpu, false);
    let step = RefCell::new(Step::record(gpu, &[], |_| Ok(vec![(row.run)(0)])));
    let nothing = Tensor::full(gpu, [1], f32::NAN);
    let run = move |_| match step.borrow_mut().as_mut() {
        Ok(step) => step.run(&[]).map_or(nothing.clone(), |all| all[0].clone()),
        Err(_) => nothing.clone(),
    };
    Row { family: "adds, replayed", run: Box::new(run), ..row }
}

type Make<'a> = Box<dyn FnOnce() -> Row + 'a>;

/// The rows for this adapter, each made when its turn comes: names to choose by, without the sizes.
pub fn rows(gpu: &Gpu, suite: Suite) -> Vec<(&'static str, Make<'_>)> {
    let (cpu, full) = (gpu.adapter().is_software(), suite == Suite::Full);
    let mut all: Vec<(&'static str, Make)> = Vec::new();
    let mut matmuls =
        vec![[1, 256, 256, 256], [1, 512, 512, 512], [1, 1024, 1024, 1024], [1, 2048, 768, 768]];
    matmuls.extend([
        [32, 128, 128, 64],
        [1, 1, 2048, 2048],
        [1, 8, 2048, 2048],
        [1, 2048, 8, 2048],
        [1, 64, 64, 16384],
    ]);
    if full || !cpu {
        matmuls.push([1, 2048, 2048, 2048]);
    }
    if full && !cpu {
        matmuls.push([1, 4096, 4096, 4096]);
    }
    for size in matmuls {
        all.push(("matmul", Box::new(move || matmul(gpu, size, false))));
    }
    for size in if cpu { vec![1024] } else { vec![1024, 4096] } {
        all.push(("matmul", Box::new(move || matmul(gpu, [1, size, size, size], true))));
    }
    for rows in if full { vec![256, 1024, 4096] } else { vec![4096] } {
        all.push(("softmax", Box::new(move || softmax(gpu, [rows, 1024]))));
        all.push(("layer_norm", Box::new(move || layer_norm(gpu, [rows, 768]))));
    }
    for bits in if full { vec![16, 20, 22] } else { vec![20, 22] } {
        all.push(("gelu(x*y+z)", Box::new(move || chain(gpu, 1 << bits))));
    }
    for rows in if full { vec![1 << 10, 1 << 14, 1 << 15] } else { vec![1 << 10, 1 << 14] } {
        all.push(("sum", Box::new(move || sums(gpu, rows, 1024, None))));
    }
    all.push(("sum", Box::new(|| sums(gpu, 4096, 1024, Some(0)))));
    all.push(("transpose", Box::new(|| transpose(gpu, 2048))));
    all.push(("cross_entropy", Box::new(|| cross_entropy(gpu, 4096, 1024))));
    for backward in [false, true] {
        all.push(("embedding", Box::new(move || embedding(gpu, [8192, 512, 4096], backward))));
    }
    all.push(("adamw", Box::new(|| adamw(gpu, 1 << 22))));
    let attentions = if cpu { vec![[4, 8, 512, 64]] } else { vec![[4, 8, 512, 64], [8, 16, 1024, 64]] };
    for size in attentions {
        for backward in [false, true] {
            all.push(("attention", Box::new(move || attention(gpu, size, backward))));
        }
    }
    all.push(("attention", Box::new(|| decode(gpu, [4, 32, 8, 2048, 64]))));
    for fused in [false, true] {
        all.push(("adds", Box::new(move || adds(gpu, fused))));
    }
    all.push(("adds", Box::new(|| replayed_adds(gpu))));
    for replayed in [false, true] {
        all.push(("train_step", Box::new(move || train::step(gpu, replayed))));
    }
    all
}
