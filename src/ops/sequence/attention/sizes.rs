//! The sizes of one call, and where its heads lie.

use super::kernels::{Choice, Kernel, Kernels, kept_bytes};
use super::pass::Pass;
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, Part, grid};
use crate::gpu::shader::Source;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Sizes of one call. A pair is one key head of one batch entry, and the query heads that share this key head are laid
/// end to end.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub pairs: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub tokens_q: usize,
    pub tokens_k: usize,
    pub head_dim: usize,
    pub shift: i32,
    pub scale: f32,
    /// Strides over `[batch, heads, tokens_q, tokens_k]`.
    pub mask: [usize; 4],
    /// The number of parts of the keys, each with its own result, and the number of keys per part.
    pub cut: [usize; 2],
    /// Rows of the cache, if the keys are in one.
    pub cache_rows: usize,
    /// In the backward pass, the first key or query that a launch walks, and the end.
    pub walk: [usize; 2],
    /// In a launch over some pairs, the first one.
    pub first_pair: usize,
    /// Where q, k, v, y, dy, dq, and dk and dv lie.
    pub places: Places,
}

/// How heads lie in their storage, as [`steps`] says.
#[derive(Clone, Copy, Default)]
pub(super) struct Places {
    pub q: [usize; 4],
    pub k: [usize; 4],
    pub v: [usize; 4],
    pub y: [usize; 4],
    pub dy: [usize; 4],
    pub dq: [usize; 4],
    pub dk: [usize; 4],
}

/// The fewest keys in a part: with fewer, it is not worth the pass that joins the parts.
const LEAST_KEYS: usize = 64;

impl Sizes {
    /// Sizes for `[batch, heads, key heads, queries, keys, head]`, where every query sees every key, in one part.
    pub fn new([batch, heads, kv_heads, tokens_q, tokens_k, head_dim]: [usize; 6], scale: f32) -> Sizes {
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
            first_pair: 0,
            places: Places::default(),
        };
        sizes.cut(1, 4)
    }

    pub fn rows(&self) -> usize {
        self.group * self.tokens_q
    }

    /// The kernels for these sizes on a device of this class.
    pub fn kernels(&self, class: &DeviceClass, masked: bool) -> Kernels {
        let Sizes { pairs, tokens_k: keys, head_dim, group, .. } = *self;
        Kernels::of(class, Choice { pairs, rows: self.rows(), keys, head_dim, group, masked })
    }

    /// Returns how many of `size` keys or queries one launch should walk so that it does not take longer than
    /// `DeviceClass::LONGEST`.
    pub fn longest(&self, class: &DeviceClass, pass: Pass, size: usize) -> usize {
        let seconds = self.flops(pass.products()) / class.flops_s;
        if seconds > DeviceClass::LONGEST {
            (size as f64 * DeviceClass::LONGEST / seconds) as usize
        } else {
            usize::MAX
        }
    }

    /// Divides the keys into at most `splits` parts of whole steps.
    pub fn cut(self, splits: usize, step: usize) -> Sizes {
        let chunk = self.tokens_k.div_ceil(splits).next_multiple_of(step);
        Sizes { cut: [self.tokens_k.div_ceil(chunk), chunk], ..self }
    }

    /// Divides the keys into as many parts as keep the device busy if there are few rows.
    pub fn cut_for(self, class: &DeviceClass, forward: Kernel) -> Sizes {
        let threads = match forward {
            Kernel::Rows(split) => self.pairs * self.rows().div_ceil(split.each) * split.parts,
            _ => forward.threads() * self.pairs * self.rows().div_ceil(forward.rows()),
        };
        let busy = class.in_flight();
        // The parts' results are written and read again. This traffic is at most a quarter of the operands.
        let rows = (self.pairs * self.rows()).max(1);
        let affordable = (rows + 2 * self.pairs * self.tokens_k) / (8 * rows);
        let wanted = (busy / threads.max(1)).min(affordable).clamp(1, (self.tokens_k / LEAST_KEYS).max(1));
        let fewest = self.tokens_k.div_ceil(forward.most(Pass::Forward, self.head_dim));
        self.cut(wanted.max(fewest), forward.step())
    }

    /// Padded rows of queries of a pair, which kernels of kept slopes have.
    pub fn padded_rows(&self) -> usize {
        self.group * self.tokens_q.next_multiple_of(4)
    }

    /// Divides the pairs into as many as are given, or else by what may be kept in memory at a time. Also returns the
    /// elements that are kept.
    pub fn by_kept(self, class: &DeviceClass, most: Option<usize>) -> impl Iterator<Item = (Sizes, usize)> {
        let bytes = kept_bytes(self.tokens_k, self.tokens_q, self.group);
        let most = most.unwrap_or(class.chunk as usize / bytes).clamp(1, self.pairs);
        (0..self.pairs).step_by(most).map(move |first_pair| {
            let pairs = most.min(self.pairs - first_pair);
            (Sizes { first_pair, pairs, ..self }, pairs * bytes / 4)
        })
    }

    /// Operations of this many products over all pairs of a query and a key.
    pub fn flops(&self, products: f64) -> f64 {
        2.0 * products * (self.pairs * self.rows()) as f64 * (self.tokens_k * self.head_dim) as f64
    }

    /// Operations of this many products over the pairs that a causal mask leaves. Kernels skip the others.
    pub fn seen_flops(&self, products: f64) -> f64 {
        let (q, k) = (self.tokens_q as f64, self.tokens_k as f64);
        let seen = match self.shift {
            shift if shift >= self.tokens_k as i32 => q * k,
            _ if q <= k => q * k - q * (q - 1.0) / 2.0,
            _ => k * (k + 1.0) / 2.0,
        };
        self.flops(products) * seen / (q * k).max(1.0)
    }

    /// Returns the number of workgroups per pair, in kernels with tiles per part of the keys, and the grid for all
    /// pairs, over `items` rows or keys.
    pub fn grid(&self, kernel: Kernel, items: usize) -> (usize, [u32; 3]) {
        let splits = self.cut[0];
        match kernel {
            // A workgroup may have rows of two parts.
            Kernel::Rows(split) => {
                let blocks = (items.next_multiple_of(split.each) * splits).div_ceil(kernel.rows());
                (blocks, grid(blocks * self.pairs))
            }
            _ => {
                let blocks = items.div_ceil(kernel.rows());
                (blocks, grid(blocks * splits * self.pairs))
            }
        }
    }

    /// Makes a launch over `grid`, with `blocks` workgroups per pair.
    pub fn launch<'a>(
        &self,
        source: &'a Source,
        entry: &'a str,
        grid: [u32; 3],
        blocks: usize,
    ) -> Launch<'a> {
        let Places { q, k, v, y, dy, dq, dk } = self.places;
        Launch::new("attention", source, entry, grid)
            .set("q_steps", q)
            .set("k_steps", k)
            .set("v_steps", v)
            .set("y_steps", y)
            .set("dy_steps", dy)
            .set("dq_steps", dq)
            .set("dk_steps", dk)
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
            .set("first_pair", self.first_pair)
    }

    /// Makes a launch over the `items` rows or keys of every pair, where each thread walks `walked` keys or queries.
    pub fn launch_over<'a>(
        &self,
        source: &'a Source,
        pass: Pass,
        kernel: Kernel,
        (items, walked): (usize, usize),
    ) -> Launch<'a> {
        let (blocks, grid) = self.grid(kernel, items);
        let launch = self.launch(source, pass.entry(), grid, blocks);
        let row_blocks = if let Kernel::Rows(split) = kernel { items.div_ceil(split.each) } else { 0 };
        launch.set("row_blocks", row_blocks).turns(kernel.turns(pass, self.head_dim, walked)).reuse(16)
    }
}

/// Elements to the largest multiple of what a binding's offset may be, at or before the first element of `x`.
fn start(x: &Tensor) -> usize {
    let align = x.gpu().limits().min_storage_buffer_offset_alignment as usize;
    let unit = align.max(16) / x.dtype().size();
    x.offset / unit * unit
}

/// Where the first element of `x [batch, heads, tokens, head_dim]` lies in [`storage`], and the steps from one batch
/// entry, head and token to the next, in vectors of four.
pub(super) fn steps(x: &Tensor) -> [usize; 4] {
    let step = |axis: usize| if x.shape()[axis] > 1 { x.strides[axis] / 4 } else { 0 };
    [(x.offset - start(x)) / 4, step(0), step(1), step(2)]
}

/// The storage of `x` from its first element to its last, as far as bindings can be cut.
pub(super) fn storage(x: &Tensor) -> Part {
    let last: usize = (0..x.shape().len()).map(|axis| (x.shape()[axis] - 1) * x.strides[axis]).sum();
    let first = start(x);
    let mut place = x.value.place();
    place.offset += (first * x.dtype().size()) as u64;
    place.part(x.dtype().buffer_bytes(x.offset + last + 1 - first))
}

/// Returns heads as kernels can read them, by vectors of four in any order of the other axes: `x` itself if it lies so,
/// else a copy. `head_dim` is a multiple of 4.
pub(super) fn readable(x: &Tensor) -> Tensor {
    let whole = |axis: usize| x.shape()[axis] <= 1 || x.strides[axis].is_multiple_of(4);
    let fits = x.strides[3] == 1 && x.offset.is_multiple_of(4) && (0..3).all(whole);
    if fits { x.clone() } else { x.contiguous() }
}

/// Returns a tensor for a kernel to write, with `like`'s shape and order of tokens and heads. So the result of
/// heads that were cut out of `[batch, tokens, width]` lies as `[batch, tokens, width]` too, and needs no copy to be
/// joined.
pub(super) fn room(op: &'static str, like: &Tensor, dtype: DType) -> Tensor {
    let shape = *like.shape();
    let [batch, heads, tokens, head_dim] = std::array::from_fn(|axis| shape[axis]);
    if like.strides[1] >= like.strides[2] {
        return Tensor::empty(like.gpu(), op, shape, dtype);
    }
    let by_tokens = Tensor::empty(like.gpu(), op, [batch, tokens, heads, head_dim], dtype);
    let mut strides = by_tokens.strides;
    strides.swap(1, 2);
    Tensor { shape: Shape::new(&shape), strides, ..by_tokens }
}
