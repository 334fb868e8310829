//! Scaled dot-product attention with grouped key heads, by online softmax: neither pass stores a `[tokens, tokens]`
//! array.

mod cases;
mod plan;

use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, MOST_TURNS, Work, grid};
use crate::gpu::shader::Source;
use crate::shape::{self, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::ops::Range;

pub(in crate::ops) use cases::cases;
pub use plan::plan;

/// Which keys a query sees.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Mask {
    /// All.
    None,
    /// Keys up to the query's own position, where positions are aligned at the end: query `i` sees keys `j <= i +
    /// tokens_k - tokens_q`.
    Causal,
    /// All, with this tensor added to the scaled scores. Any of its axes `[batch, heads, tokens_q, tokens_k]` may be 1.
    /// If the sum is -1e30 or less (minus infinity is), the key is hidden. The mask gets no gradient.
    Additive(Tensor),
}

/// Sizes of one call. A pair is one key head of one batch entry, and the query heads that share this key head are laid
/// end to end.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Sizes {
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
    /// The number of parts of the keys, each with its own result, and the number of keys per part.
    cut: [usize; 2],
    /// Rows of the cache, if the keys are in one.
    cache_rows: usize,
    /// In the backward pass, the first key or query that a launch walks, and the end.
    walk: [usize; 2],
}

impl Sizes {
    /// Sizes for `[batch, heads, key heads, queries, keys, head]`, where every query sees every key, in one part.
    fn new([batch, heads, kv_heads, tokens_q, tokens_k, head_dim]: [usize; 6], scale: f32) -> Sizes {
        let sizes = Sizes {
            pairs: batch * kv_heads,
            kv_heads,
            group: heads / kv_heads,
            tokens_q,
            tokens_k,
            head_dim,
            shift: tokens_k as i32,
            scale,
            mask: [0; 4],
            cut: [1, 0],
            cache_rows: 0,
            walk: [0; 2],
        };
        sizes.cut(1)
    }

    fn rows(&self) -> usize {
        self.group * self.tokens_q
    }

    /// Returns how many of `size` keys or queries one launch should walk, in a pass with this many products, so that it
    /// does not take longer than `DeviceClass::LONGEST`.
    fn longest(&self, class: &DeviceClass, products: f64, size: usize) -> usize {
        let seconds = self.flops(products) / class.flops_s;
        if seconds > DeviceClass::LONGEST {
            (size as f64 * DeviceClass::LONGEST / seconds) as usize
        } else {
            usize::MAX
        }
    }

    /// Divides the keys into at most `splits` parts.
    fn cut(self, splits: usize) -> Sizes {
        let chunk = self.tokens_k.div_ceil(splits).next_multiple_of(4);
        Sizes { cut: [self.tokens_k.div_ceil(chunk), chunk], ..self }
    }

    /// Divides the keys into as many parts as keep the device busy if there are few rows.
    fn cut_for(self, class: &DeviceClass, forward: Split) -> Sizes {
        let threads = self.pairs * self.rows().div_ceil(forward.each as usize) * forward.parts as usize;
        let busy = class.in_flight();
        // The parts' results are written and read again. This traffic is at most a quarter of the operands.
        let rows = (self.pairs * self.rows()).max(1);
        let affordable = (rows + 2 * self.pairs * self.tokens_k) / (8 * rows);
        let wanted = (busy / threads.max(1)).min(affordable).clamp(1, (self.tokens_k / LEAST_KEYS).max(1));
        self.cut(wanted.max(self.tokens_k.div_ceil(forward.most())))
    }

    /// Operations of this many products over all pairs of a query and a key.
    fn flops(&self, products: f64) -> f64 {
        2.0 * products * (self.pairs * self.rows()) as f64 * (self.tokens_k * self.head_dim) as f64
    }

    /// Operations of this many products over the pairs that a causal mask leaves. Kernels skip the others.
    fn seen_flops(&self, products: f64) -> f64 {
        let (q, k) = (self.tokens_q as f64, self.tokens_k as f64);
        let seen = match self.shift {
            shift if shift >= self.tokens_k as i32 => q * k,
            _ if q <= k => q * k - q * (q - 1.0) / 2.0,
            _ => k * (k + 1.0) / 2.0,
        };
        self.flops(products) * seen / (q * k).max(1.0)
    }

    /// Returns the number of workgroups per pair, and the grid for all pairs, over `items` rows or keys.
    fn grid(&self, items: usize, split: Split) -> (usize, [u32; 3]) {
        let blocks = items.div_ceil((64 / split.parts * split.each) as usize);
        (blocks, grid(blocks * self.pairs))
    }

    /// Makes a launch over `grid`, with `blocks` workgroups per pair.
    fn launch<'a>(&self, source: &'a Source, entry: &'a str, grid: [u32; 3], blocks: usize) -> Launch<'a> {
        Launch::new("attention", source, entry, grid)
            .set("pairs", self.pairs)
            .set("blocks", blocks)
            .set("rows", self.rows())
            .set("tokens_q", self.tokens_q)
            .set("tokens_k", self.tokens_k)
            .set("group", self.group)
            .set("kv_heads", self.kv_heads)
            .set("shift", self.shift)
            .set("scale", self.scale)
            .set("mask_batch", self.mask[0])
            .set("mask_head", self.mask[1])
            .set("mask_query", self.mask[2])
            .set("mask_key", self.mask[3])
            .set("splits", self.cut[0])
            .set("chunk", self.cut[1])
            .set("cache_rows", self.cache_rows)
            .set("first", self.walk[0])
            .set("end", self.walk[1])
    }

    /// Makes a launch over the `items` rows or keys of every pair, where each thread walks `walked` keys or queries.
    fn launch_over<'a>(
        &self,
        source: &'a Source,
        entry: &'a str,
        (items, walked): (usize, usize),
        split: Split,
    ) -> Launch<'a> {
        let (blocks, grid) = self.grid(items, split);
        let launch = self.launch(source, entry, grid, blocks);
        let row_blocks = self.rows().div_ceil(split.each as usize);
        launch.set("row_blocks", row_blocks).turns(split.turns(walked)).reuse(16)
    }
}

/// The fewest keys in a part: with fewer, it is not worth the pass that joins the parts.
const LEAST_KEYS: usize = 64;

/// How a kernel divides work: a thread has `each` rows (or keys), which it shares with `parts - 1` other threads.
#[derive(Clone, Copy)]
struct Split {
    each: u32,
    parts: u32,
}

impl Split {
    /// Turns of a thread that walks this many keys or queries, four at a time. If several threads share a head, every
    /// four also take two joins per row.
    fn turns(self, walked: usize) -> usize {
        walked.div_ceil(4) * self.each_four()
    }

    fn each_four(self) -> usize {
        1 + if self.parts > 1 { 2 * self.each * (self.parts + 1) } else { 0 } as usize
    }

    /// The most keys or queries that a thread may walk, a multiple of 4.
    fn most(self) -> usize {
        MOST_TURNS / self.each_four() * 4
    }
}

/// The splits of the three kernels.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Tile {
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

    fn of(class: &DeviceClass, head_dim: usize, rows: usize, keys: usize) -> Tile {
        if !class.has_many_registers() {
            // One row, or part of one, fills a GPU thread's registers.
            return Tile::of_splits(match head_dim {
                0..=32 => [[1, 1], [1, 1], [1, 1]],
                33..=64 => [[1, 1], [1, 1], [1, 2]],
                65..=128 => [[1, 2], [1, 2], [1, 4]],
                _ => [[1, 4], [1, 4], [1, 8]],
            });
        }
        // On a CPU driver a load costs far more than spilled registers, so threads have many rows. Even more rows would
        // take long to compile. For short sequences threads have fewer rows, because some lanes would have none.
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

    /// Heads are padded to a multiple of this, so that every part consists of whole `vec4`s.
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
    /// `self` is q `[batch, heads, tokens_q, head_dim]`, while k and v are `[batch, kv_heads, tokens_k, head_dim]`.
    /// Head `j` reads key head `j / (heads / kv_heads)`. A query that sees no key gives zeros. The result has q's
    /// shape, in f32. Sources: Dao 2023, "FlashAttention-2"; Ainslie et al. 2023 (grouped queries).
    ///
    /// # Panics
    /// If the shapes do not fit, `head_dim` is above 256, or the mask is part of a graph.
    #[track_caller]
    pub fn attention(&self, k: &Tensor, v: &Tensor, mask: &Mask) -> Tensor {
        let head_dim = self.shape().last().copied().unwrap_or(1).max(1);
        self.attention_scaled(k, v, mask, 1.0 / (head_dim as f32).sqrt())
    }

    /// [`Tensor::attention`] with scores `scale q k^T + mask`.
    ///
    /// # Panics
    /// As for [`Tensor::attention`].
    #[track_caller]
    pub fn attention_scaled(&self, k: &Tensor, v: &Tensor, mask: &Mask, scale: f32) -> Tensor {
        let head_dim = self.shape().last().copied().unwrap_or(0);
        // Sizes that do not fit are refused below, with a message.
        let size = |x: &Tensor, axis: usize| x.shape().get(axis).copied().unwrap_or(1);
        let rows = size(self, 2) * (size(self, 1) / size(k, 1).max(1)).max(1);
        let pairs = (self.count() * size(k, 2)) as f64;
        if 4.0 * pairs / self.gpu().class().flops_s > DeviceClass::LONGEST
            && self.shape().len() == 4
            && k.shape().len() == 4
            && k.shape() == v.shape()
        {
            // A dispatch of seconds would trigger a driver's watchdog, so the halves are computed one after the other.
            let [batch, kv_heads] = [size(k, 0), size(k, 1)];
            let axis = if batch > 1 { 0 } else { 1 };
            if self.shape()[0] == batch
                && (batch > 1 || kv_heads > 1 && self.shape()[1].is_multiple_of(kv_heads))
            {
                return self.attention_in_halves([k, v], mask, scale, axis);
            }
        }
        attend([self, k, v], mask, scale, Tile::of(self.gpu().class(), head_dim, rows, size(k, 2)), None)
    }
}

impl Tensor {
    /// Computes half of the batch's entries or of the key heads, then the other half.
    #[track_caller]
    fn attention_in_halves(&self, [k, v]: [&Tensor; 2], mask: &Mask, scale: f32, axis: usize) -> Tensor {
        if let Mask::Additive(mask) = mask {
            // Checked before the mask is cut, because a mask that does not fit may seem to fit in halves.
            let scores = Shape::new(&[self.shape()[0], self.shape()[1], self.shape()[2], k.shape()[2]]);
            shape::expand_strides("attention", mask.shape(), &mask.shape().strides(), &scores);
        }
        let size = k.shape()[axis];
        let half = |own: Range<usize>| {
            let of = |x: &Tensor| {
                let each = x.shape()[axis] / size;
                x.slice(axis as isize, own.start * each..own.end * each)
            };
            let mask = match mask {
                Mask::Additive(mask) => {
                    // An axis that the mask lacks, or that has size 1, is the same for both halves.
                    let at = (mask.shape().len() + axis).checked_sub(4);
                    let whole = at.is_none_or(|at| mask.shape()[at] == 1);
                    let each = at.map_or(0, |at| mask.shape()[at] / size);
                    let part = || mask.slice(at.unwrap_or(0) as isize, own.start * each..own.end * each);
                    Mask::Additive(if whole { mask.clone() } else { part() })
                }
                other => other.clone(),
            };
            of(self).attention_scaled(&of(k), &of(v), &mask, scale)
        };
        Tensor::concat(&[&half(0..size / 2), &half(size / 2..size)], axis as isize)
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
            Some(crate::ops::float(op, mask).contiguous())
        }
        _ => None,
    };
    let scores = Shape::new(&[batch, heads, tokens_q, tokens_k]);
    let strides = match &mask {
        Some(mask) => shape::expand_strides(op, mask.shape(), &mask.shape().strides(), &scores),
        None => Default::default(),
    };
    if qs.count() == 0 || ks.count() == 0 {
        // Without queries or keys, the result is zeros, and so are the gradients.
        return Tensor::zeros(q.gpu(), qs).made_by(&[q, k, v], || Box::new(Nothing([qs, ks, ks])));
    }
    // Padding with zeros changes no score, and the columns that it adds to the result are cut off.
    let extra = head_dim.next_multiple_of(tile.step()) - head_dim;
    let [q, k, v] = [q, k, v].map(|x| crate::ops::float(op, x).pad(3, 0, extra).contiguous());
    let mut sizes = Sizes::new([batch, heads, kv_heads, tokens_q, tokens_k, head_dim + extra], scale);
    if causal {
        sizes.shift -= tokens_q as i32;
    }
    sizes.mask.copy_from_slice(&strides[..4]);
    let cut = splits.map_or_else(|| sizes.cut_for(q.gpu().class(), tile.forward), |splits| sizes.cut(splits));
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

/// Computes attention of `q [batch, heads, tokens_q, head_dim]` to the filled part of rows of a cache `[rows, kv_heads,
/// context, head_dim]`. Heads are padded to [`cache_width`].
pub(in crate::ops) fn cached(q: &Tensor, [k, v]: [&Tensor; 2], listed: [&Tensor; 2], scale: f32) -> Tensor {
    let ([batch, heads, tokens_q, head_dim], [cache_rows, kv_heads, context, _]) =
        (four(q.shape()), four(k.shape()));
    let group = heads / kv_heads;
    if q.count() == 0 {
        return Tensor::zeros(q.gpu(), *q.shape());
    }
    let tile = Tile::of(q.gpu().class(), head_dim, group * tokens_q, context);
    debug_assert!(head_dim.is_multiple_of(4 * tile.forward.parts as usize));
    // The sizes hide no key. The lengths say which keys a query sees.
    let sizes =
        Sizes { cache_rows, ..Sizes::new([batch, heads, kv_heads, tokens_q, context, head_dim], scale) };
    let [y, _] =
        forward([q, k, v], None, Some(listed), sizes.cut_for(q.gpu().class(), tile.forward), tile.forward);
    y
}

/// Returns the width to which heads in a cache are padded: whole vectors for each of the threads that may share a head,
/// on every adapter.
pub(in crate::ops) fn cache_width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(match head_dim {
        0..=64 => 4,
        65..=128 => 8,
        _ => 16,
    })
}

fn four(shape: &Shape) -> [usize; 4] {
    [shape[0], shape[1], shape[2], shape[3]]
}

/// Computes `y` and the log-sum-exps of its rows.
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
    let mut source = split.forward(sizes.head_dim, mask.is_some());
    if listed.is_some() {
        source = source.slot("keys", "keys_listed");
    }
    let items = sizes.rows().next_multiple_of(split.each as usize) * splits;
    let walked = sizes.cut[1].min(sizes.tokens_k);
    let launch = sizes.launch_over(&source, "forward", (items, walked), split);
    gpu.launch(
        launch
            .bind("q", q)
            .bind("k", k)
            .bind("v", v)
            .bind_some("mask", mask)
            .bind_some("rows", listed.map(|[rows, _]| rows))
            .bind_some("lengths", listed.map(|[_, lengths]| lengths))
            .bind_mut("y", &y)
            .bind_mut("lse", &lse)
            .work(Work { flops: sizes.seen_flops(2.0), parts: splits }),
    );
    if splits == 1 {
        return [y.reshape(*q.shape()), lse];
    }
    let [whole, whole_lse] = make(1);
    let width = sizes.head_dim / 4;
    let grid = grid((rows * width).div_ceil(64));
    gpu.launch(
        Launch::new(op, &Source::file("attention_combine"), "main", grid)
            .bind("parts", &y)
            .bind("logs", &lse)
            .bind_mut("y", &whole)
            .bind_mut("lse", &whole_lse)
            .set("pairs", sizes.pairs)
            .set("rows", sizes.rows())
            .set("splits", splits)
            .set("width", width)
            .turns(2 * splits),
    );
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
        // The rows of all pairs together, 64 per workgroup.
        let flat = grid(all.div_ceil(64));
        let delta = sizes.launch(&source, "delta", flat, 1).set("row_blocks", 0u32);
        let delta = delta.bind("y", y).bind("lse", &self.lse).bind("dy", &dy).bind_mut("row_stats", &stats);
        gpu.launch(delta.turns(sizes.head_dim / 4));
        let inputs = [q, k, v, &dy, &stats];
        if sink.needs(0) {
            let dq = Tensor::empty(gpu, op, *q.shape(), DType::F32);
            let split = self.tile.queries;
            let most = sizes.longest(gpu.class(), 3.0, sizes.tokens_k).min(split.most());
            for walk in pieces(sizes.tokens_k, most) {
                let sizes = Sizes { walk, ..*sizes };
                let flops = sizes.seen_flops(3.0);
                let work = Work::flops(flops * (walk[1] - walk[0]) as f64 / sizes.tokens_k as f64);
                let over = (sizes.rows(), walk[1] - walk[0]);
                let launch = bind_inputs(sizes.launch_over(&source, "queries", over, split), inputs, mask);
                gpu.launch(launch.bind_mut("dq", &dq).work(work));
            }
            sink.add(0, dq);
        }
        if sink.needs(1) || sink.needs(2) {
            let [dk, dv] = [(); 2].map(|()| Tensor::empty(gpu, op, *k.shape(), DType::F32));
            let split = self.tile.keys;
            let source = split.keys(sizes.head_dim, mask.is_some());
            let most = sizes.longest(gpu.class(), 4.0, sizes.tokens_q).min(split.most() / sizes.group);
            for walk in pieces(sizes.tokens_q, most) {
                let sizes = Sizes { walk, ..*sizes };
                // Every head of the group takes one more turn (4 queries).
                let walked = (walk[1] - walk[0] + 4) * sizes.group;
                let work =
                    Work::flops(sizes.seen_flops(4.0) * (walk[1] - walk[0]) as f64 / sizes.tokens_q as f64);
                let launch = sizes.launch_over(&source, "keys", (sizes.tokens_k, walked), split);
                let launch = bind_inputs(launch, inputs, mask);
                gpu.launch(launch.bind_mut("dk", &dk).bind_mut("dv", &dv).work(work));
            }
            sink.add(1, dk);
            sink.add(2, dv);
        }
    }
}

/// Binds the tensors that both gradients read.
fn bind_inputs<'a>(
    launch: Launch<'a>,
    [q, k, v, dy, stats]: [&Tensor; 5],
    mask: Option<&Tensor>,
) -> Launch<'a> {
    let launch = launch.bind("q", q).bind("k", k).bind("v", v).bind("dy", dy).bind("stats", stats);
    launch.bind_some("mask", mask)
}

/// Cuts `size` into pieces and returns where each begins and ends. All but the last have the same length, a multiple of
/// 4 and at most `most`.
fn pieces(size: usize, most: usize) -> impl Iterator<Item = [usize; 2]> {
    // Leaves two turns (8 keys or queries) for the work around the walk.
    let span = (most.saturating_sub(8) / 4 * 4).max(4);
    (0..size).step_by(span).map(move |first| [first, size.min(first + span)])
}

/// One tile of each kind, for the tests, because an adapter by itself uses only one of them.
const SINGLE: Tile = Tile::of_splits([[1, 1], [1, 1], [1, 1]]);
const SEVERAL: Tile = Tile::of_splits([[4, 1], [2, 1], [2, 1]]);
const SHARED: Tile = Tile::of_splits([[1, 2], [1, 4], [1, 8]]);
const BOTH: Tile = Tile::of_splits([[4, 4], [2, 2], [2, 4]]);
