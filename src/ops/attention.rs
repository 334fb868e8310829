//! Scaled dot-product attention with grouped key heads, by online softmax: no `[tokens, tokens]` array either way.

use super::case::{Array, Case, Fill, Input};
use super::words;
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Bind, Launch, MOST_TURNS, grid};
use crate::gpu::shader::Source;
use crate::shape::{self, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// Which keys a query sees.
#[derive(Clone, Debug)]
pub enum Mask {
    /// All.
    None,
    /// Those up to its own place, counted from the end: query `i` sees keys `j <= i + tokens_k - tokens_q`.
    Causal,
    /// All, with this tensor added to the scaled scores. Any of its axes `[batch, heads, tokens_q, tokens_k]` may be 1.
    /// Where the score comes to -1e30 or less (minus infinity is) the key is hidden. It gets no gradient.
    Additive(Tensor),
}

/// Sizes of one call, with heads that share a key head laid end to end: a pair is one key head of one batch entry.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pairs: usize,
    kv_heads: usize,
    group: usize,
    tokens_q: usize,
    tokens_k: usize,
    head_dim: usize,
    shift: i32,
    scale: f32,
    /// Strides over `[batch, heads, tokens_q, tokens_k]`.
    mask: [usize; 4],
    /// Parts of the keys, each a result of its own, and keys of a part.
    cut: [usize; 2],
    /// Rows of a cache, where keys are in one.
    cache_rows: usize,
    /// Of the backward pass, the keys or queries that a launch walks.
    walk: [usize; 2],
}

impl Sizes {
    fn rows(&self) -> usize {
        self.group * self.tokens_q
    }

    /// With the keys in `splits` parts.
    fn cut(self, splits: usize) -> Sizes {
        let chunk = self.tokens_k.div_ceil(splits).next_multiple_of(4);
        Sizes { cut: [self.tokens_k.div_ceil(chunk), chunk], ..self }
    }

    /// With as many parts as it takes to keep the device busy where rows are few.
    fn cut_for(self, gpu: &Gpu, forward: Split) -> Sizes {
        let threads = self.pairs * self.rows().div_ceil(forward.each as usize) * forward.parts as usize;
        // Eight workgroups for the cores of a CPU, a few hundred for a GPU.
        let busy = 64 * if gpu.is_software() { 8 } else { 256 };
        let wanted = (busy / threads).clamp(1, (self.tokens_k / LEAST_KEYS).max(1));
        self.cut(wanted.max(self.tokens_k.div_ceil(forward.most())))
    }

    /// The kernels' `Params` for a grid of `blocks` workgroups a pair.
    fn params(&self, grid: [u32; 3], blocks: usize, row_blocks: usize) -> Vec<u32> {
        let sizes =
            [self.pairs, blocks, self.rows(), self.tokens_q, self.tokens_k, self.group, self.kv_heads];
        let mut all = vec![grid[0]];
        all.extend(sizes.map(|v| v as u32));
        all.extend([self.shift as u32, self.scale.to_bits()]);
        all.extend(self.mask.map(|v| v as u32));
        all.extend([row_blocks, self.cut[0], self.cut[1], self.cache_rows].map(|v| v as u32));
        all.extend(self.walk.map(|v| v as u32));
        all
    }

    /// One dispatch over the `items` rows or keys of every pair, of which a thread walks so many keys or queries.
    fn launch(
        &self,
        gpu: &Gpu,
        source: &Source,
        entry: &str,
        binds: Vec<Bind>,
        (items, walked): (usize, usize),
        split: Split,
    ) {
        let row_blocks = self.rows().div_ceil(split.each as usize);
        let blocks = items.div_ceil((64 / split.parts * split.each) as usize);
        let grid = grid(blocks * self.pairs);
        gpu.launch(Launch {
            op: "attention",
            source,
            entry,
            binds,
            params: words(&self.params(grid, blocks, row_blocks)),
            grid,
            turns: split.turns(walked),
            reuse: 16,
        });
    }
}

/// Keys below which a part of them is not worth the pass that joins the parts.
const LEAST_KEYS: usize = 64;

/// How a kernel divides work: a thread has `each` rows (or keys), or `parts` threads have one together.
#[derive(Clone, Copy)]
struct Split {
    each: u32,
    parts: u32,
}

impl Split {
    /// Turns of a thread for so many keys or queries: four at a time, and where a head is shared two joins for each row.
    fn turns(self, walked: usize) -> usize {
        walked.div_ceil(4) * self.each_four()
    }

    fn each_four(self) -> usize {
        1 + if self.parts > 1 { 2 * self.each * (self.parts + 1) } else { 0 } as usize
    }

    /// Keys or queries that a thread may walk, a multiple of 4.
    fn most(self) -> usize {
        MOST_TURNS / self.each_four() * 4
    }
}

/// The splits of the three kernels.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    forward: Split,
    queries: Split,
    keys: Split,
}

impl Tile {
    const fn of_splits(splits: [[u32; 2]; 3]) -> Tile {
        let [f, q, k] = splits;
        Tile {
            forward: Split { each: f[0], parts: f[1] },
            queries: Split { each: q[0], parts: q[1] },
            keys: Split { each: k[0], parts: k[1] },
        }
    }

    fn of(gpu: &Gpu, head_dim: usize, rows: usize, keys: usize) -> Tile {
        if !gpu.is_software() {
            // One row, or part of one, fills a GPU thread's registers.
            return Tile::of_splits(match head_dim {
                0..=32 => [[1, 1], [1, 1], [1, 1]],
                33..=64 => [[1, 1], [1, 1], [1, 2]],
                65..=128 => [[1, 2], [1, 2], [1, 4]],
                _ => [[1, 4], [1, 4], [1, 8]],
            });
        }
        // On a CPU driver a load costs far more than spilled registers, so threads have many rows; more than these take
        // long to compile. Short sequences would leave lanes without any.
        let (forward, backward, parts) = match head_dim {
            0..=64 => (8, 4, 1),
            65..=128 => (4, 2, 2),
            _ => (4, 2, 4),
        };
        let each = |most: u32, items: usize| most.min((items / 8).max(1).next_power_of_two() as u32);
        Tile::of_splits([
            [each(forward, rows), parts],
            [each(backward, rows), parts],
            [each(backward, keys), parts],
        ])
    }

    /// Heads are padded to this: every part is made of whole `vec4`s.
    fn step(self) -> usize {
        4 * self.forward.parts.max(self.queries.parts).max(self.keys.parts) as usize
    }
}

impl Split {
    fn source(self, file: &'static str, each: &'static str, head_dim: usize, masked: bool) -> Source {
        Source::file(file)
            .u32("HEAD_DIM", head_dim as u32)
            .u32(each, self.each)
            .u32("PARTS", self.parts)
            .u32("SLOTS", 2 * self.each)
            .slot("parts", if self.parts == 1 { "parts_one" } else { "parts_many" })
            .slot("mask", if masked { "mask_add" } else { "mask_none" })
    }

    fn forward(self, head_dim: usize, masked: bool) -> Source {
        self.source("attention", "ROWS", head_dim, masked)
    }

    fn queries(self, head_dim: usize, masked: bool) -> Source {
        self.source("attention_backward", "ROWS", head_dim, masked)
    }

    fn keys(self, head_dim: usize, masked: bool) -> Source {
        self.source("attention_backward", "COLUMNS", head_dim, masked)
    }
}

impl Tensor {
    /// `softmax(q k^T / sqrt(head_dim) + mask) v` for each head, without storing the scores.
    ///
    /// `self` is q `[batch, heads, tokens_q, head_dim]`; k and v are `[batch, kv_heads, tokens_k, head_dim]`. Head `j`
    /// reads key head `j / (heads / kv_heads)`. A query that sees no key gives zeros. The result has q's shape, in f32.
    /// Sources: Dao 2023, "FlashAttention-2"; Ainslie et al. 2023 (grouped queries).
    ///
    /// # Panics
    /// When the shapes do not fit, `head_dim` is above 256, or the mask is part of a graph.
    #[track_caller]
    pub fn attention(&self, k: &Tensor, v: &Tensor, mask: &Mask) -> Tensor {
        let head_dim = self.shape().last().copied().unwrap_or(1).max(1);
        self.attention_scaled(k, v, mask, 1.0 / (head_dim as f32).sqrt())
    }

    /// [`Tensor::attention`] with scores `scale q k^T + mask`.
    ///
    /// # Panics
    /// As [`Tensor::attention`].
    #[track_caller]
    pub fn attention_scaled(&self, k: &Tensor, v: &Tensor, mask: &Mask, scale: f32) -> Tensor {
        let head_dim = self.shape().last().copied().unwrap_or(0);
        // Sizes that do not fit are found below, with a sentence.
        let size = |x: &Tensor, axis: usize| x.shape().get(axis).copied().unwrap_or(1);
        let rows = size(self, 2) * (size(self, 1) / size(k, 1).max(1)).max(1);
        attend([self, k, v], mask, scale, Tile::of(self.gpu(), head_dim, rows, size(k, 2)), None)
    }
}

#[track_caller]
fn attend([q, k, v]: [&Tensor; 3], mask: &Mask, scale: f32, tile: Tile, splits: Option<usize>) -> Tensor {
    let op = "attention";
    same_gpu(op, &[q, k, v]);
    let (qs, ks) = (*q.shape(), *k.shape());
    assert!(
        qs.len() == 4 && ks.len() == 4,
        "{op}: q and k need 4 axes [batch, heads, tokens, head_dim]: q {qs}, k {ks}"
    );
    assert!(ks == *v.shape(), "{op}: k {ks} and v {} differ", v.shape());
    assert!(qs[0] == ks[0] && qs[3] == ks[3], "{op}: batch and head_dim must agree: q {qs}, k {ks}");
    assert!(
        ks[1] > 0 && qs[1].is_multiple_of(ks[1]),
        "{op}: q's heads must be a multiple of k's: q {qs}, k {ks}"
    );
    let [batch, kv_heads, tokens_k, head_dim] = [ks[0], ks[1], ks[2], ks[3]];
    let (heads, tokens_q) = (qs[1], qs[2]);
    assert!(head_dim <= 256, "{op}: head_dim {head_dim} is above 256");
    let causal = matches!(mask, Mask::Causal);
    let mask = match mask {
        Mask::Additive(mask) => {
            same_gpu(op, &[q, mask]);
            assert!(!mask.is_tracked(), "{op}: the mask gets no gradient; detach it");
            Some(super::float(op, mask).contiguous())
        }
        _ => None,
    };
    let scores = Shape::new(&[batch, heads, tokens_q, tokens_k]);
    let strides = match &mask {
        Some(mask) => shape::expand_strides(op, mask.shape(), &mask.shape().strides(), &scores),
        None => Default::default(),
    };
    if qs.count() == 0 || ks.count() == 0 {
        // Nobody looks, or there is nothing to see: zeros that depend on nothing.
        return Tensor::zeros(q.gpu(), qs).made_by(&[q, k, v], || Box::new(Nothing([qs, ks, ks])));
    }
    // Zeros change no score, and the columns that they add to the result are cut off.
    let extra = head_dim.next_multiple_of(tile.step()) - head_dim;
    let [q, k, v] = [q, k, v].map(|x| super::float(op, x).pad(3, 0, extra).contiguous());
    let sizes = Sizes {
        pairs: batch * kv_heads,
        kv_heads,
        group: heads / kv_heads,
        tokens_q,
        tokens_k,
        head_dim: head_dim + extra,
        shift: if causal { tokens_k as i32 - tokens_q as i32 } else { tokens_k as i32 },
        scale,
        mask: [strides[0], strides[1], strides[2], strides[3]],
        cut: [1, 0],
        cache_rows: 0,
        walk: [0; 2],
    };
    let sizes = sizes.cut(1);
    let cut = splits.map_or_else(|| sizes.cut_for(q.gpu(), tile.forward), |splits| sizes.cut(splits));
    let [y, lse] = forward([&q, &k, &v], mask.as_ref(), None, cut, tile.forward);
    let saved = y.clone();
    let y = y.made_by(&[&q, &k, &v], || {
        Box::new(Attention {
            sizes,
            tile,
            q: Saved::new(&q),
            k: Saved::new(&k),
            v: Saved::new(&v),
            y: Saved::new(&saved),
            lse,
            mask: mask.as_ref().map(Saved::new),
        })
    });
    if extra == 0 { y } else { y.slice(3, 0..head_dim) }
}

/// Attention of `q [batch, heads, tokens_q, head_dim]` to the filled part of rows of a cache `[rows, kv_heads, context, head_dim]`.
/// Heads are padded to [`cache_width`].
pub(super) fn cached(q: &Tensor, [k, v]: [&Tensor; 2], listed: [&Tensor; 2], scale: f32) -> Tensor {
    let ([batch, heads, tokens_q, head_dim], [cache_rows, kv_heads, context, _]) =
        (four(q.shape()), four(k.shape()));
    let group = heads / kv_heads;
    let tile = Tile::of(q.gpu(), head_dim, group * tokens_q, context);
    debug_assert!(head_dim.is_multiple_of(4 * tile.forward.parts as usize));
    let sizes = Sizes {
        pairs: batch * kv_heads,
        kv_heads,
        group,
        tokens_q,
        tokens_k: context,
        head_dim,
        // Every key is in reach: the lengths say which are there.
        shift: context as i32,
        scale,
        mask: [0; 4],
        cut: [1, 0],
        cache_rows,
        walk: [0; 2],
    };
    let [y, _] = forward([q, k, v], None, Some(listed), sizes.cut_for(q.gpu(), tile.forward), tile.forward);
    y
}

/// What heads in a cache are padded to: whole vectors for each of the threads that may share one, on every adapter.
pub(super) fn cache_width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(match head_dim {
        0..=64 => 4,
        65..=128 => 8,
        _ => 16,
    })
}

fn four(shape: &Shape) -> [usize; 4] {
    [shape[0], shape[1], shape[2], shape[3]]
}

/// `y` and the log-sum-exps of its rows.
fn forward(
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    listed: Option<[&Tensor; 2]>,
    sizes: Sizes,
    split: Split,
) -> [Tensor; 2] {
    let (gpu, op, [splits, _]) = (q.gpu(), "attention", sizes.cut);
    let rows = sizes.pairs * sizes.rows();
    let make = |splits: usize| {
        let y = Tensor::empty(gpu, op, [splits * rows, sizes.head_dim], DType::F32);
        [y, Tensor::empty(gpu, op, [splits * rows], DType::F32)]
    };
    let [y, lse] = make(splits);
    let mut binds = vec![q.bind(0), k.bind(1), v.bind(2), y.bind_mut(3), lse.bind_mut(4)];
    binds.extend(mask.map(|m| m.bind(10)));
    let mut source = split.forward(sizes.head_dim, mask.is_some());
    if let Some([rows, lengths]) = listed {
        binds.extend([rows.bind(11), lengths.bind(12)]);
        source = source.slot("keys", "keys_listed");
    }
    let items = sizes.rows().next_multiple_of(split.each as usize) * splits;
    sizes.launch(gpu, &source, "forward", binds, (items, sizes.cut[1].min(sizes.tokens_k)), split);
    if splits == 1 {
        return [y.reshape(*q.shape()), lse];
    }
    let [whole, whole_lse] = make(1);
    let width = sizes.head_dim / 4;
    let grid = grid((rows * width).div_ceil(64));
    let params = [grid[0] as usize, sizes.pairs, sizes.rows(), splits, width].map(|v| v as u32);
    gpu.launch(Launch {
        op,
        source: &Source::file("attention_combine"),
        entry: "main",
        binds: vec![y.bind(0), lse.bind(1), whole.bind_mut(2), whole_lse.bind_mut(3)],
        params: words(&params),
        grid,
        turns: 2 * splits,
        reuse: 1,
    });
    [whole.reshape(*q.shape()), whole_lse]
}

/// Attention without queries or keys, with the shapes of its inputs.
struct Nothing([Shape; 3]);

impl Op for Nothing {
    fn name(&self) -> &'static str {
        "attention"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        self.0.iter().enumerate().for_each(|(i, shape)| sink.add(i, Tensor::zeros(dy.gpu(), *shape)));
    }
}

struct Attention {
    sizes: Sizes,
    tile: Tile,
    q: Saved,
    k: Saved,
    v: Saved,
    y: Saved,
    lse: Tensor,
    mask: Option<Saved>,
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (op, sizes) = (self.name(), &self.sizes);
        let dy = dy.contiguous();
        let [q, k, v, y] = [&self.q, &self.k, &self.v, &self.y].map(|saved| saved.get(op));
        let mask = self.mask.as_ref().map(|saved| saved.get(op));
        let gpu = q.gpu();
        let source = self.tile.queries.queries(sizes.head_dim, mask.is_some());
        let all = sizes.pairs * sizes.rows();
        let stats = Tensor::empty(gpu, op, [all, 2], DType::F32);
        // Rows of all pairs in one go: as many workgroups as the pairs' sizes make, each of 64 rows.
        let flat = grid(all.div_ceil(64));
        gpu.launch(Launch {
            op,
            source: &source,
            entry: "delta",
            binds: vec![y.bind(0), self.lse.bind(1), stats.bind_mut(2), dy.bind(3)],
            params: words(&sizes.params(flat, 1, 0)),
            grid: flat,
            turns: sizes.head_dim / 4,
            reuse: 1,
        });
        let inputs = || {
            let mut binds = vec![q.bind(0), k.bind(1), v.bind(2), dy.bind(3), stats.bind(4)];
            binds.extend(mask.iter().map(|m| m.bind(10)));
            binds
        };
        if sink.needs(0) {
            let dq = Tensor::empty(gpu, op, *q.shape(), DType::F32);
            let split = self.tile.queries;
            for walk in pieces(sizes.tokens_k, split.most()) {
                let mut binds = inputs();
                binds.push(dq.bind_mut(5));
                let sizes = Sizes { walk, ..*sizes };
                sizes.launch(gpu, &source, "queries", binds, (sizes.rows(), walk[1] - walk[0]), split);
            }
            sink.add(0, dq);
        }
        if sink.needs(1) || sink.needs(2) {
            let [dk, dv] = [(); 2].map(|()| Tensor::empty(gpu, op, *k.shape(), DType::F32));
            let split = self.tile.keys;
            let source = split.keys(sizes.head_dim, mask.is_some());
            for walk in pieces(sizes.tokens_q, split.most() / sizes.group) {
                let mut binds = inputs();
                binds.extend([dk.bind_mut(6), dv.bind_mut(7)]);
                let sizes = Sizes { walk, ..*sizes };
                // Every head of the group begins with a turn of its own.
                let walked = (walk[1] - walk[0] + 4) * sizes.group;
                sizes.launch(gpu, &source, "keys", binds, (sizes.tokens_k, walked), split);
            }
            sink.add(1, dk);
            sink.add(2, dv);
        }
    }
}

/// Where pieces of `size` begin and end, each a multiple of 4 long and at most `most`.
fn pieces(size: usize, most: usize) -> impl Iterator<Item = [usize; 2]> {
    // Two turns are for what comes around the walk.
    let span = (most.saturating_sub(8) / 4 * 4).max(4);
    (0..size).step_by(span).map(move |first| [first, size.min(first + span)])
}

/// One of each kind of split, for the tests: what an adapter picks by itself is only one of them.
const SINGLE: Tile = Tile::of_splits([[1, 1], [1, 1], [1, 1]]);
const SEVERAL: Tile = Tile::of_splits([[4, 1], [2, 1], [2, 1]]);
const SHARED: Tile = Tile::of_splits([[1, 2], [1, 4], [1, 8]]);
const BOTH: Tile = Tile::of_splits([[4, 4], [2, 2], [2, 4]]);

pub(super) fn variants() -> Vec<Source> {
    let mut all = vec![Source::file("attention_combine")];
    for masked in [false, true] {
        for (tile, head_dim) in
            [(SINGLE, 4), (SINGLE, 64), (SEVERAL, 64), (SHARED, 128), (SHARED, 256), (BOTH, 256)]
        {
            all.push(tile.forward.forward(head_dim, masked));
            all.push(tile.forward.forward(head_dim, masked).slot("keys", "keys_listed"));
            all.push(tile.queries.queries(head_dim, masked));
            all.push(tile.keys.keys(head_dim, masked));
        }
    }
    all
}

/// `q, k, v` and possibly a mask broadcast over `[batch, heads, tokens_q, tokens_k]`, two passes over the keys.
fn attention64(x: &[Array], causal: bool, scale: f64) -> Array {
    let (q, k, v) = (&x[0], &x[1], &x[2]);
    let [heads, tokens_q, head_dim] = [q.shape[1], q.shape[2], q.shape[3]];
    let (kv_heads, tokens_k) = (k.shape[1], k.shape[2]);
    let mut y = Array::from_fn(q.shape, |_| 0.0);
    for row in 0..q.shape[0] * heads * tokens_q {
        let (b, h, i) = (row / tokens_q / heads, row / tokens_q % heads, row % tokens_q);
        let pair = b * kv_heads + h / (heads / kv_heads);
        let at = |j: usize| (pair * tokens_k + j) * head_dim;
        let scores: Vec<f64> = (0..tokens_k)
            .map(|j| {
                let dot: f64 = (0..head_dim).map(|d| q.data[row * head_dim + d] * k.data[at(j) + d]).sum();
                let bias = x.get(3).map_or(0.0, |m| {
                    let place = [b, h, i, j];
                    m.data[(0..4).fold(0, |at, a| at * m.shape[a] + place[a] % m.shape[a])]
                });
                let seen = !causal || j + tokens_q <= i + tokens_k;
                if seen { dot * scale + bias } else { f64::NEG_INFINITY }
            })
            .collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if most <= -1e30 && !scores.iter().any(|s| s.is_nan()) {
            continue;
        }
        let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
        for (j, s) in scores.iter().enumerate() {
            let p = (s - most).exp() / total;
            (0..head_dim).for_each(|d| y.data[row * head_dim + d] += p * v.data[at(j) + d]);
        }
    }
    y
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // [batch, heads, kv_heads, tokens_q, tokens_k, head_dim]
    let mut add = |name: &str,
                   [b, h, g, tq, tk, d]: [usize; 6],
                   mask: Option<Input>,
                   causal: bool,
                   tile: Option<Tile>,
                   splits: Option<usize>| {
        let mut inputs =
            vec![Input::normal([b, h, tq, d]), Input::normal([b, g, tk, d]), Input::normal([b, g, tk, d])];
        inputs.extend(mask);
        let scale = 1.0 / (d as f32).sqrt();
        let case = Case::new(
            format!("{name} {:?}", [b, h, g, tq, tk, d]),
            inputs,
            move |x| {
                let mask = match x.get(3) {
                    Some(mask) => Mask::Additive(mask.clone()),
                    None if causal => Mask::Causal,
                    None => Mask::None,
                };
                let tile = tile.unwrap_or_else(|| Tile::of(x[0].gpu(), d, x[0].shape()[2], x[1].shape()[2]));
                attend([&x[0], &x[1], &x[2]], &mask, scale, tile, splits)
            },
            move |x| attention64(x, causal, scale as f64),
        );
        // ds = p (dp - delta): both are dots of length d that nearly cancel, so their rounding is absolute.
        all.push(case.ulps(64.0, 64.0).grad_floor(4.0 * (d as f64).sqrt()));
    };
    let (single, several, shared, both) = (Some(SINGLE), Some(SEVERAL), Some(SHARED), Some(BOTH));
    add("one token", [1, 1, 1, 1, 1, 4], None, true, None, None);
    add("all keys", [2, 2, 2, 7, 7, 8], None, false, None, None);
    add("all keys", [1, 2, 1, 5, 13, 3], None, false, None, None);
    add("causal", [2, 1, 1, 11, 11, 5], None, true, None, None);
    add("causal over the tile", [1, 1, 1, 67, 67, 4], None, true, single, None);
    add("all keys over the tile", [1, 1, 1, 67, 67, 4], None, false, several, None);
    add("causal grouped", [1, 6, 2, 7, 7, 8], None, true, single, None);
    add("causal grouped", [2, 4, 2, 13, 13, 4], None, true, several, None);
    add("causal, earlier keys", [1, 2, 1, 3, 17, 8], None, true, None, None);
    add("causal, one query", [2, 4, 1, 1, 19, 8], None, true, None, None);
    add("causal, rows that see nothing", [1, 2, 2, 9, 4, 8], None, true, None, None);
    add("causal, shared rows", [1, 1, 1, 67, 67, 4], None, true, shared, None);
    add("causal grouped, shared rows", [2, 6, 2, 11, 13, 8], None, true, shared, None);
    add("causal, rows that see nothing, shared", [1, 2, 2, 9, 4, 8], None, true, shared, None);
    add("causal grouped, several shared rows", [2, 6, 2, 23, 27, 16], None, true, both, None);
    add("all keys, several shared rows", [1, 1, 1, 67, 71, 4], None, false, both, None);
    add(
        "mask, several shared rows",
        [2, 4, 2, 5, 7, 4],
        Some(Input::normal([2, 4, 5, 7]).fixed()),
        false,
        both,
        None,
    );
    let four = Some(4);
    add("one query, keys in parts", [2, 4, 1, 1, 67, 8], None, true, single, four);
    add("queries, keys in parts", [1, 6, 2, 3, 37, 8], None, true, single, four);
    add("queries, keys in parts", [1, 4, 2, 11, 27, 8], None, true, several, four);
    add("queries that see nothing, keys in parts", [1, 2, 2, 13, 6, 4], None, true, single, Some(2));
    add("shared rows, keys in parts", [2, 6, 2, 5, 43, 16], None, true, both, four);
    let mask = Some(Input::normal([2, 1, 5, 39]).fixed());
    add("mask, keys in parts", [2, 4, 2, 5, 39, 8], mask, false, shared, four);
    add("one query, many keys", [1, 3, 1, 1, 260, 8], None, true, None, None);
    add("mask, shared rows", [2, 4, 2, 5, 7, 4], Some(Input::normal([2, 4, 5, 7]).fixed()), false, shared, None);
    add("causal head_dim", [1, 1, 1, 3, 5, 64], None, true, None, None);
    add("wide head_dim", [1, 1, 1, 3, 4, 96], None, false, None, None);
    add("widest head_dim", [1, 1, 1, 3, 7, 254], None, false, None, None);
    for shape in [[2, 4, 5, 7], [1, 4, 5, 7], [2, 1, 1, 7], [1, 1, 5, 1]] {
        add(
            &format!("mask {shape:?}"),
            [2, 4, 2, 5, 7, 4],
            Some(Input::normal(shape).fixed()),
            false,
            single,
            None,
        );
        add(
            &format!("mask {shape:?}"),
            [2, 4, 2, 5, 7, 8],
            Some(Input::normal(shape).fixed()),
            false,
            several,
            None,
        );
    }
    // Row 0 sees keys 1 and 2, row 1 nothing, row 2 key 0.
    let low = f64::NEG_INFINITY;
    let hidden = vec![low, 0.5, -1.0, low, low, low, 0.25, -1e32, low];
    let hidden = Input::normal([1, 1, 3, 3]).fill(Fill::Values(hidden)).fixed();
    add("mask of minus infinity", [2, 2, 1, 3, 3, 4], Some(hidden), false, None, None);
    let views = vec![Input::normal([2, 5, 4, 8]), Input::normal([2, 7, 2, 8]), Input::normal([2, 7, 2, 8])];
    all.push(
        Case::new(
            "permuted views, own scale",
            views,
            |x| {
                let [q, k, v] = [0, 1, 2].map(|i| x[i].transpose(1, 2));
                q.attention_scaled(&k, &v, &Mask::Causal, 0.7).transpose(1, 2)
            },
            |x| {
                let turn = |x: &Array| {
                    let [b, t, h, d] = [x.shape[0], x.shape[1], x.shape[2], x.shape[3]];
                    let from =
                        move |i: usize| ((i / d / t / h * t + i / d % t) * h + i / d / t % h) * d + i % d;
                    Array::from_fn([b, h, t, d], |i| x.data[from(i)])
                };
                turn(&attention64(&[turn(&x[0]), turn(&x[1]), turn(&x[2])], true, 0.7f32 as f64))
            },
        )
        .ulps(64.0, 64.0)
        .grad_floor(16.0),
    );
    let half = [[1, 2, 5, 8], [1, 1, 6, 8], [1, 1, 6, 8]].map(|s| Input::normal(s).dtype(DType::F16));
    all.push(
        Case::new(
            "f16",
            half.to_vec(),
            |x| x[0].attention(&x[1], &x[2], &Mask::None),
            |x| attention64(x, false, (1.0 / 8f32.sqrt()) as f64),
        )
        .ulps(64.0, 64.0),
    );
    all
}
