//! Whole training steps of a tied block. A small one has the initial values and tokens that the programs of other engines use, so
//! all of them must reach the same loss. The others compare a first loss with an f64 reference, and go up to a real size.

use crate::bench::{Check, Entry, Row, carried};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::nn::{Activation, Attention, Block, Linear, Mask, Mlp, Module, Norm, Parameters, module, stored};
use crate::ops::elementwise::unary::gelu_tanh64;
use crate::optim::{AdamW, AdamWConfig, Group, LossScale};
use crate::precision::{Precision, autocast};
use crate::share::{Site, Tied};
use crate::step::Step;
use crate::tensor::Tensor;
use std::cell::{Cell, RefCell};

const VOCAB: usize = 128;
const WIDTH: usize = 128;
const HEADS: usize = 4;
const TOKENS: usize = 128;
const BATCH: usize = 8;
const DEPTH: usize = 4;

/// The loss that every engine reaches after 50 steps.
const LOSS_50: f64 = 0.07775;

/// Uniform in `[-a, a)` by splitmix64.
fn uniform(n: usize, seed: u64, a: f32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| (next() * 2.0 - 1.0) * a).collect()
}

/// Makes a layer from columns `first` to `first + count` of a matrix that is drawn as `[inner, out]`.
fn linear(
    gpu: &Gpu,
    drawn: &[f32],
    [inner, out]: [usize; 2],
    first: usize,
    count: usize,
    bias: bool,
) -> Linear {
    let transposed: Vec<f32> =
        (0..count * inner).map(|i| drawn[i % inner * out + first + i / inner]).collect();
    let weight = Tensor::from_slice(gpu, &transposed, [count, inner]).requires_grad();
    let bias = bias.then(|| Tensor::zeros(gpu, [count]).requires_grad());
    Linear::from_site(Tied::new(&weight).shared(), bias)
}

struct Model {
    tokens: Tensor,
    positions: Tensor,
    block: Block,
    norm: Norm,
    head: Linear,
}

module!(Model { block, norm, head, tokens, positions });

impl Model {
    fn new(gpu: &Gpu) -> Model {
        let near = 1.0 / (WIDTH as f32).sqrt();
        let (d, f) = (WIDTH, 4 * WIDTH);
        let drawn = |place: u64, n: usize, a: f32| uniform(n, 1000 + place, a);
        let table = |place, rows: usize| {
            Tensor::from_slice(gpu, &drawn(place, rows * d, 0.1), [rows, d]).requires_grad()
        };
        let qkv = drawn(4, d * 3 * d, near);
        let part = |i: usize| linear(gpu, &qkv, [d, 3 * d], i * d, d, true);
        let attention = Attention {
            q: part(0),
            k: part(1),
            v: part(2),
            o: linear(gpu, &drawn(6, d * d, near), [d, d], 0, d, true),
            heads: HEADS,
            kv_heads: HEADS,
        };
        let mlp = Mlp {
            gate: None,
            up: linear(gpu, &drawn(10, d * f, near), [d, f], 0, f, true),
            down: linear(gpu, &drawn(12, f * d, 1.0 / (f as f32).sqrt()), [f, d], 0, d, true),
            activation: Activation::Gelu,
        };
        let norm = || Norm::layer(gpu, d, 1e-5);
        Model {
            tokens: table(0, VOCAB),
            positions: table(1, TOKENS),
            block: Block { norm1: norm(), attention, norm2: norm(), mlp },
            norm: norm(),
            head: linear(gpu, &drawn(16, d * VOCAB, near), [d, VOCAB], 0, VOCAB, false),
        }
    }

    fn loss(&self, x: &Tensor, y: &Tensor) -> Tensor {
        let start = self.tokens.embedding(x).add(&self.positions);
        let h = (0..DEPTH).fold(start, |h, _| self.block.forward(&h, &Mask::Causal));
        let logits = self.head.forward(&self.norm.forward(&h));
        logits.reshape([BATCH * TOKENS, VOCAB]).cross_entropy(y, None)
    }

    fn leaves(&self) -> Vec<(String, Tensor)> {
        self.parameters().trainable()
    }
}

/// Returns inputs and targets: sequences `x' = 5 x + 17 mod 128`, each row from another start.
fn text() -> [Vec<u32>; 2] {
    let mut all = [Vec::new(), Vec::new()];
    for row in 0..BATCH as u32 {
        let mut token = (row * 13 + 1) % VOCAB as u32;
        for _ in 0..TOKENS {
            all[0].push(token);
            token = (token * 5 + 17) % VOCAB as u32;
            all[1].push(token);
        }
    }
    all
}

pub(super) fn entries(cpu: bool) -> Vec<Entry> {
    let real = Sizes { width: 768, depth: 12, batch: 8, tokens: 1024 };
    let mut all = vec![small(false), small(true)];
    for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
        all.push(tied(Sizes { width: 256, depth: 4, batch: 2, tokens: 128 }, precision));
        all.push(Entry { asked: cpu, ..tied(real, precision) });
    }
    all
}

/// Returns the operations of a step. A product with a weight counts once forward and twice backward. Attention counts two products
/// forward and five backward, each over half of all pairs because of the causal mask.
fn flops(rows: usize, tokens: usize, width: usize, depth: usize, vocab: usize) -> f64 {
    let matrices = (12 * width * width * depth + width * vocab) as f64;
    let pairs = (rows * depth * tokens / 2 * width) as f64;
    6.0 * rows as f64 * matrices + 14.0 * pairs
}

fn optimizer(gpu: &Gpu, leaves: Vec<(String, Tensor)>) -> Result<RefCell<AdamW>> {
    let group = Group::new(leaves.iter().map(|(name, leaf)| (name.clone(), leaf))).weight_decay(0.01);
    Ok(RefCell::new(AdamW::new(gpu, vec![group], AdamWConfig::default())?))
}

/// Forward, backward and AdamW. The result is the loss. The step runs as code, or is recorded once and replayed.
fn small(replayed: bool) -> Entry {
    let shape = format!("V128 d128 h4 T128 B8 tied x4{}", if replayed { ", replayed" } else { "" });
    Entry::new("train_step", shape, move |gpu| {
        let model = Model::new(gpu);
        let optimizer = optimizer(gpu, model.leaves())?;
        let [x, y] = text();
        let x = Tensor::from_slice(gpu, &x, [BATCH, TOKENS]);
        let y = Tensor::from_slice(gpu, &y, [BATCH * TOKENS]);
        let once = move |x: &[Tensor]| -> Result<Vec<Tensor>> {
            let loss = model.loss(&x[0], &x[1]);
            let grads = loss.backward()?;
            optimizer.borrow_mut().step(&grads, 1e-3)?;
            Ok(vec![loss])
        };
        let recorded: RefCell<Option<Step>> = RefCell::new(None);
        let device = gpu.clone();
        let run = move |_| {
            if !replayed {
                return carried(&device, once(&[x.clone(), y.clone()]).map(|all| all[0].clone()));
            }
            let mut recorded = recorded.borrow_mut();
            let step = match recorded.as_mut() {
                Some(step) => step.run(&[&x, &y]).map(|all| all[0].clone()),
                None => Step::record(&device, &[&x, &y], &once)
                    .map(|step| recorded.insert(step).outputs()[0].clone()),
            };
            carried(&device, step)
        };
        let checks = vec![Check { at: 0, want: LOSS_50, bound: 2e-4 }];
        let work = [0.0, flops(BATCH * TOKENS, TOKENS, WIDTH, DEPTH, VOCAB)];
        Ok(Row { before: 50, checks, ..Row::new(work, run) })
    })
}

/// The sizes of a step with heads of width 64 and tokens that are bytes.
#[derive(Clone, Copy)]
struct Sizes {
    width: usize,
    depth: usize,
    batch: usize,
    tokens: usize,
}

/// The weights, drawn as other engines draw theirs. Matrices are `[inner, out]`.
struct Drawn {
    table: Vec<f32>,
    qkv: Vec<f32>,
    o: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    head: Vec<f32>,
}

/// The number of tokens of [`tied`].
const BYTES: usize = 256;
/// The epsilon that the norms of [`tied`] add to the mean square.
const EPS: f32 = 1.1920929e-7;

impl Drawn {
    fn new(d: usize) -> Drawn {
        let drawn = |seed, inner: usize, out| uniform(inner * out, seed, 1.0 / (inner as f32).sqrt());
        Drawn {
            table: uniform(BYTES * d, 2000, 1.7),
            qkv: drawn(2001, d, 3 * d),
            o: drawn(2002, d, d),
            up: drawn(2003, d, 4 * d),
            down: drawn(2004, 4 * d, d),
            head: drawn(2005, d, BYTES),
        }
    }

    /// Returns the loss, in f64, of a sequence that repeats `token`, with `token` as every target. There are no position
    /// embeddings, so all keys and all values of the sequence are equal. Attention then returns the value itself, and one position
    /// is enough.
    fn loss(&self, token: usize, depth: usize) -> f64 {
        let d = self.o.len().isqrt();
        let norm = |x: &[f64]| -> Vec<f64> {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / d as f64;
            x.iter().map(|v| v / (mean + EPS as f64).sqrt()).collect()
        };
        let times = |x: &[f64], w: &[f32], columns: usize, first: usize, count: usize| -> Vec<f64> {
            let mut y = vec![0.0; count];
            for (x, row) in x.iter().zip(w.chunks(columns)) {
                y.iter_mut().zip(&row[first..first + count]).for_each(|(y, &w)| *y += x * w as f64);
            }
            y
        };
        let mut h: Vec<f64> = self.table[token * d..][..d].iter().map(|&v| v as f64).collect();
        for _ in 0..depth {
            let value = times(&norm(&h), &self.qkv, 3 * d, 2 * d, d);
            let attended = times(&value, &self.o, d, 0, d);
            h.iter_mut().zip(attended).for_each(|(h, a)| *h += a);
            let wide: Vec<f64> =
                times(&norm(&h), &self.up, 4 * d, 0, 4 * d).into_iter().map(gelu_tanh64).collect();
            h.iter_mut().zip(times(&wide, &self.down, d, 0, d)).for_each(|(h, a)| *h += a);
        }
        let logits = times(&h, &self.head, BYTES, 0, BYTES);
        let most = logits.iter().copied().fold(f64::MIN, f64::max);
        most + logits.iter().map(|l| (l - most).exp()).sum::<f64>().ln() - logits[token]
    }

    fn block(&self, gpu: &Gpu) -> Block {
        let d = self.o.len().isqrt();
        let part = |i: usize| linear(gpu, &self.qkv, [d, 3 * d], i * d, d, false);
        let heads = d / 64;
        let o = linear(gpu, &self.o, [d, d], 0, d, false);
        let norm = || Norm::rms(gpu, d, EPS);
        Block {
            norm1: norm(),
            attention: Attention { q: part(0), k: part(1), v: part(2), o, heads, kv_heads: heads },
            norm2: norm(),
            mlp: Mlp {
                gate: None,
                up: linear(gpu, &self.up, [d, 4 * d], 0, 4 * d, false),
                down: linear(gpu, &self.down, [4 * d, d], 0, d, false),
                activation: Activation::GeluTanh,
            },
        }
    }
}

/// A step without biases, positions and last norm. In the first call, whose loss is checked, each sequence repeats one token. In
/// later calls all tokens are mixed.
fn tied(sizes: Sizes, precision: Precision) -> Entry {
    let Sizes { width, depth, batch, tokens } = sizes;
    let half = if precision == Precision::F32 { String::new() } else { format!(", {precision}") };
    Entry::new("train_step", format!("d{width} T{tokens} B{batch} tied x{depth}{half}"), move |gpu| {
        let drawn = Drawn::new(width);
        let own = |i: usize| i * 37 % BYTES;
        let want = (0..batch).map(|i| drawn.loss(own(i), depth)).sum::<f64>() / batch as f64;
        let near = match precision {
            Precision::F32 => 2e-5,
            _ => 4.0 * precision.dtype().roundoff(),
        };
        let checks = vec![Check { at: 0, want, bound: near * want }];
        let block = drawn.block(gpu);
        let table = Tensor::from_slice(gpu, &drawn.table, [BYTES, width]).requires_grad();
        let head = linear(gpu, &drawn.head, [width, BYTES], 0, BYTES, false);
        let all = Parameters::of_fields(&[("block", &block), ("head", &head), ("table", &table)]);
        let optimizer = optimizer(gpu, all.trainable())?;
        let scale = LossScale::of(gpu, precision)?;
        let count = batch * tokens;
        let upload = |ids: Vec<usize>| {
            let ids: Vec<u32> = ids.into_iter().map(|i| i as u32).collect();
            Tensor::from_slice(gpu, &ids, [batch, tokens])
        };
        let same = upload((0..count).map(|i| own(i / tokens)).collect());
        let mixed = upload((0..count).map(|i| (i * 7919 + i / 256) % BYTES).collect());
        let first = Cell::new(true);
        let run = move |_| {
            let x = if first.replace(false) { &same } else { &mixed };
            let loss = autocast(precision, || {
                let h = stored(&table.embedding(x));
                let h = (0..depth).fold(h, |h, _| block.forward(&h, &Mask::Causal));
                head.forward(&h).reshape([count, BYTES]).cross_entropy(&x.reshape([count]), None)
            });
            let stepped = scale.backward(&loss).and_then(|grads| optimizer.borrow_mut().step(&grads, 1e-3));
            carried(table.gpu(), stepped.map(|_| loss))
        };
        let work = [0.0, flops(count, tokens, width, depth, BYTES)];
        Ok(Row { checks, half: precision == Precision::F16, ..Row::new(work, run) })
    })
}
