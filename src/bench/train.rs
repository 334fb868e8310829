//! A whole training step: one pre-norm block applied four times, with the start values and tokens that the programs of
//! other engines use, so that all of them must reach the same loss.

use super::{Check, Row};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::nn::{Activation, Attention, Block, Linear, Mask, Mlp, Module, Norm, Parameters};
use crate::optim::{AdamW, AdamWConfig, Group};
use crate::share::Tied;
use crate::step::Step;
use crate::tensor::Tensor;
use std::cell::RefCell;
use std::sync::Arc;

const VOCAB: usize = 128;
const WIDTH: usize = 128;
const HEADS: usize = 4;
const TOKENS: usize = 128;
const BATCH: usize = 8;
const DEPTH: usize = 4;

/// The loss that every engine has after 50 steps.
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

/// A layer from a matrix drawn as `[inner, out]`, its columns `columns` alone.
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
    Linear::from_site(Arc::new(Tied::new(&weight)), bias)
}

struct Model {
    tokens: Tensor,
    positions: Tensor,
    block: Block,
    norm: Norm,
    head: Linear,
}

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
        let mut all = Parameters::default();
        self.block.parameters("block", &mut all);
        self.norm.parameters("norm", &mut all);
        self.head.parameters("head", &mut all);
        all.add("tokens", &self.tokens);
        all.add("positions", &self.positions);
        all.named().to_vec()
    }
}

/// `x' = 5 x + 17 mod 128`, a row from each of several starts.
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

/// Forward, backward and AdamW; the loss is the result. Run as code, or recorded once and replayed.
pub fn step(gpu: &Gpu, replayed: bool) -> Row {
    let model = Model::new(gpu);
    let leaves = model.leaves();
    let group = Group::new(leaves.iter().map(|(name, leaf)| (name.clone(), leaf))).weight_decay(0.01);
    let optimizer = RefCell::new(AdamW::new(gpu, vec![group], AdamWConfig::default()));
    let [x, y] = text();
    let x = Tensor::from_slice(gpu, &x, [BATCH, TOKENS]);
    let y = Tensor::from_slice(gpu, &y, [BATCH * TOKENS]);
    let once = move |x: &[Tensor]| -> Result<Vec<Tensor>> {
        let loss = model.loss(&x[0], &x[1]);
        let grads = loss.backward()?;
        optimizer.borrow_mut().as_mut().map_err(|e| e.clone())?.step(&grads, 1e-3)?;
        Ok(vec![loss])
    };
    // A fault stays on the device and comes out where the loss is read.
    let nothing = Tensor::full(gpu, [1], f32::NAN);
    let recorded: RefCell<Option<Step>> = RefCell::new(None);
    let device = gpu.clone();
    let run = move |_| {
        if !replayed {
            return once(&[x.clone(), y.clone()]).map_or(nothing.clone(), |all| all[0].clone());
        }
        let mut recorded = recorded.borrow_mut();
        let step = match recorded.as_mut() {
            Some(step) => step.run(&[&x, &y]).map(|all| all[0].clone()),
            None => {
                Step::record(&device, &[&x, &y], &once).map(|step| recorded.insert(step).outputs()[0].clone())
            }
        };
        step.unwrap_or(nothing.clone())
    };
    // Forward; twice that backward. Attention's pairs are halved by the mask.
    let rows = (BATCH * TOKENS) as f64;
    let matrices = (12 * WIDTH * WIDTH * DEPTH + WIDTH * VOCAB) as f64;
    let pairs = (BATCH * DEPTH * TOKENS * TOKENS / 2 * WIDTH) as f64;
    let flops = 6.0 * rows * matrices + 14.0 * pairs;
    let checks = vec![Check { at: 0, want: LOSS_50, bound: 2e-4 }];
    let shape = format!("V128 d128 h4 T128 B8 tied x4{}", if replayed { ", replayed" } else { "" });
    Row { before: 50, checks, ..Row::new("train_step", shape, [0.0, flops], Box::new(run)) }
}
