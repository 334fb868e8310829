//! Decodes answers in one batch, while they are at different depths of a tied model.

use super::wide;
use crate::bench::{Check, Entry, Row, carried};
use crate::decode::{DepthBatch, Exit, Request, Scheduling};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::models::lm::{Lm, LmConfig};
use crate::nn::Module;
use crate::ops::elementwise::unary::gelu_tanh64;
use crate::rng::Rng;
use crate::tensor::Tensor;

const WIDTH: usize = 256;
const HEADS: usize = 4;
const DEPTH: usize = 3;
const VOCAB: usize = 256;
const ANSWERS: usize = 32;
const COUNT: usize = 24;
const SLOTS: usize = 16;

/// The depth at which an answer's `i`-th token exits: 3 for every fourth token and 1 for the others, so 1.5 on average.
fn exit(id: usize, i: usize) -> usize {
    if (id + i) % 4 == 3 { DEPTH } else { 1 }
}

/// The row that decodes all answers. Its result is their tokens, answer by answer.
pub(super) fn entry() -> Entry {
    let shape = format!("{ANSWERS}x{COUNT} d{WIDTH}, exit 1.5 of {DEPTH}, {SLOTS} slots");
    Entry::new("depth_batch", shape, |gpu| {
        let sizes = LmConfig::small().vocab(VOCAB).width(WIDTH).heads(HEADS).kv_heads(HEADS);
        let sizes = sizes.hidden(4 * WIDTH).context(64).depth(DEPTH);
        let model = Lm::new(gpu, sizes, &mut Rng::new(1));
        let host = Host::new(&model)?;
        let token = |(id, i, token): (usize, usize, usize)| Check {
            at: id * COUNT + i,
            want: token as f64,
            bound: 0.0,
        };
        let own = |id: usize| host.answer(id).into_iter().enumerate().map(move |(i, t)| (id, i, t));
        let checks = own(0).chain(own(ANSWERS - 1)).map(token).collect();
        let device = gpu.clone();
        let run = move |_| carried(&device, serve(&device, &model));
        // Every token passes the block 1.5 times on average, and the head once. One tick of all slots reads the weights once.
        let passes = (0..ANSWERS).map(|id| (0..COUNT).map(|i| exit(id, i)).sum::<usize>()).sum::<usize>();
        let (block, head) = (12 * WIDTH * WIDTH, VOCAB * WIDTH);
        let bytes = 4.0 * (passes.div_ceil(SLOTS) * (block + head)) as f64;
        let flops = 2.0 * (passes * block + ANSWERS * COUNT * head) as f64;
        Ok(Row { checks, ..Row::new([bytes, flops], run) })
    })
}

fn serve(gpu: &Gpu, model: &Lm) -> Result<Tensor> {
    let leaves = Exit::Oracle(Box::new(|id, i| exit(id as usize, i)));
    let mut batch = DepthBatch::new(model, SLOTS, leaves, Scheduling::Continuous)?;
    for id in 0..ANSWERS as u64 {
        batch.push(Request { id, prompt: vec![id as u32], count: COUNT })?;
    }
    let mut answers = vec![Vec::new(); ANSWERS];
    for emitted in batch.run()? {
        answers[emitted.id as usize].push(emitted.token as f32);
    }
    let all = answers.concat();
    Ok(Tensor::from_slice(gpu, &all, [all.len()]))
}

/// The reference: the model in f64, one token at a time.
struct Host {
    table: Vec<f64>,
    positions: Vec<f64>,
    /// `q k v o up down`, each `[out, in]`.
    weights: Vec<Vec<f64>>,
}

fn times(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
}

/// RMS normalisation without gains, because the gains of a new model are 1.
fn norm(x: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    x.iter().map(|v| v / (mean + 1e-5).sqrt()).collect()
}

impl Host {
    fn new(model: &Lm) -> Result<Host> {
        let layers = ["q", "k", "v", "o", "up", "down"].map(|name| model.blocks[0].linear(name));
        let weights =
            layers.map(|layer| wide(&layer.weight.leaves()[0])).into_iter().collect::<Result<_>>()?;
        let all = model.parameters();
        let leaf = |name: &str| {
            let found = all.named().iter().find(|(own, _)| own == name);
            wide(&found.expect("a model with learned positions").1)
        };
        Ok(Host { table: leaf("embedding.table")?, positions: leaf("positions")?, weights })
    }

    /// Returns the tokens after a prompt of one token, each with the highest logit at its exit. At each depth, attention sees only
    /// the tokens that reached that depth.
    fn answer(&self, id: usize) -> Vec<usize> {
        let mut caches: Vec<Vec<[Vec<f64>; 2]>> = vec![Vec::new(); DEPTH];
        let (mut token, mut all) = (id, Vec::new());
        for i in 0..COUNT {
            let at = |table: &[f64], row: usize| table[row * WIDTH..][..WIDTH].to_vec();
            let mut x = at(&self.table, token);
            x.iter_mut().zip(at(&self.positions, i)).for_each(|(x, p)| *x += p);
            for cache in &mut caches[..exit(id, i)] {
                self.block(&mut x, cache);
            }
            let scores = times(&self.table, &norm(&x));
            token = (0..VOCAB).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap_or(0);
            all.push(token);
        }
        all
    }

    fn block(&self, x: &mut [f64], cache: &mut Vec<[Vec<f64>; 2]>) {
        let [q, k, v, o, up, down] = [0, 1, 2, 3, 4, 5].map(|i| &self.weights[i]);
        let normed = norm(x);
        cache.push([times(k, &normed), times(v, &normed)]);
        let q = times(q, &normed);
        let size = WIDTH / HEADS;
        let mut y = vec![0.0; WIDTH];
        for head in (0..WIDTH).step_by(size) {
            let score = |key: &[f64]| {
                let dot: f64 = (head..head + size).map(|d| q[d] * key[d]).sum();
                (dot / (size as f64).sqrt()).exp()
            };
            let weights: Vec<f64> = cache.iter().map(|[key, _]| score(key)).collect();
            let sum: f64 = weights.iter().sum();
            for (weight, [_, value]) in weights.iter().zip(cache.iter()) {
                (head..head + size).for_each(|d| y[d] += weight / sum * value[d]);
            }
        }
        x.iter_mut().zip(times(o, &y)).for_each(|(x, y)| *x += y);
        let hidden: Vec<f64> = times(up, &norm(x)).into_iter().map(gelu_tanh64).collect();
        x.iter_mut().zip(times(down, &hidden)).for_each(|(x, y)| *x += y);
    }
}
