//! A cache of keys and values of earlier tokens, for decoding. Each of its rows is filled up to its own length.

use super::attention::{self, Mask};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::tensor::{Tensor, same_gpu};

/// Keys and values of `rows` sequences, each with up to `context` tokens. A model that runs a layer at several depths
/// has a row per sequence and depth.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::ops::sequence::cache::KvCache;
/// let mut cache = KvCache::new(&gpu, 2, 1, 8, 4); // 2 rows, 1 head, 8 tokens, 4 elements
/// let ids = |list: &[u32]| Tensor::from_slice(&gpu, list, [list.len()]);
/// let kv = Tensor::ones(&gpu, [1, 3, 1, 4]); // [batch, tokens, kv_heads, head_dim]
/// cache.append(&kv, &kv.scale(2.0), &ids(&[1]), &ids(&[0]))?; // row 1, from token 0 on
/// let q = Tensor::ones(&gpu, [1, 1, 1, 4]); // [batch, heads, tokens, head_dim]
/// let y = cache.attend(&q, &ids(&[1]), &ids(&[3])); // to the first 3 tokens of row 1
/// assert_eq!(y.to_vec::<f32>()?, [2.0; 4]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct KvCache {
    k: Tensor,
    v: Tensor,
    head_dim: usize,
}

impl KvCache {
    /// Makes an empty cache: keys and values of `[rows, kv_heads, context, head_dim]` each.
    ///
    /// # Panics
    /// If `head_dim` is above 256, or a size is 0.
    #[track_caller]
    pub fn new(gpu: &Gpu, rows: usize, kv_heads: usize, context: usize, head_dim: usize) -> KvCache {
        KvCache::with_dtype(gpu, rows, kv_heads, context, head_dim, DType::F32)
    }

    /// [`KvCache::new`] with keys and values stored in f32 or f16. f16 takes half the memory and rounds them.
    ///
    /// # Panics
    /// As [`KvCache::new`], and for another type.
    #[track_caller]
    pub fn with_dtype(
        gpu: &Gpu,
        rows: usize,
        kv_heads: usize,
        context: usize,
        head_dim: usize,
        dtype: DType,
    ) -> KvCache {
        assert!(matches!(dtype, DType::F32 | DType::F16), "kv cache: keys in {dtype}; f32 and f16 are kept");
        let sizes = [rows, kv_heads, context, attention::cache_width(head_dim)];
        assert!(
            ![rows, kv_heads, context, head_dim].contains(&0) && head_dim <= 256,
            "kv cache: [{rows}, {kv_heads}, {context}, {head_dim}]; heads are 1 to 256 wide, no size is 0"
        );
        let [k, v] = [(); 2].map(|()| {
            let zeros = Tensor::zeros(gpu, sizes).cast(dtype);
            zeros.evaluate();
            zeros
        });
        KvCache { k, v, head_dim }
    }

    /// The most tokens in a row.
    pub fn context(&self) -> usize {
        self.k.shape()[2]
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        2 * self.k.dtype().size() * self.k.count()
    }

    /// Writes `k` and `v [batch, tokens, kv_heads, head_dim]` to the rows `rows [batch]`, from the positions `places
    /// [batch]` on. `rows` and `places` are u32, and all rows must differ. Tokens past the end of a row are dropped.
    ///
    /// # Errors
    /// An error that one of these tensors carries, or the device's fault. The cache is then unchanged, so that its
    /// other rows stay valid.
    ///
    /// # Panics
    /// When the sizes do not fit.
    #[track_caller]
    pub fn append(&mut self, k: &Tensor, v: &Tensor, rows: &Tensor, places: &Tensor) -> Result<()> {
        let [count, heads, context, width] = [0, 1, 2, 3].map(|i| self.k.shape()[i]);
        let (shape, batch) = (k.shape(), rows.count());
        assert!(
            shape.len() == 4
                && shape == v.shape()
                && [shape[0], shape[2], shape[3]] == [batch, heads, self.head_dim],
            "kv cache: k {shape}, v {} for {batch} rows of [{heads}, {context}, {}]",
            v.shape(),
            self.head_dim
        );
        assert!(
            [rows, places].iter().all(|x| x.dtype() == DType::U32 && **x.shape() == [batch]),
            "kv cache: rows {} and places {} must be lists of u32",
            rows.shape(),
            places.shape()
        );
        let parts = [k, v, rows, places];
        same_gpu("kv cache", &[&self.k, k, v, rows, places]);
        parts.iter().try_for_each(|part| part.check())?;
        let tokens = shape[1];
        let threads = batch * tokens * heads * width / 4;
        let grid = grid(threads.div_ceil(64));
        let [rows, places] = [rows, places].map(Tensor::contiguous);
        let dtype = self.k.dtype();
        let source = Source::file("cache");
        // Both sides hold the same type, which is moved in words.
        let source = if dtype.is_half() { source.alias("Elem", "vec2<u32>") } else { source };
        let launches = [(&self.k, k), (&self.v, v)].map(|(cache, x)| {
            let x = crate::ops::float("kv cache", &x.detach()).pad(3, 0, width - self.head_dim);
            let x = x.cast(dtype).contiguous();
            Launch::new("kv cache", &source, "main", grid)
                .bind("x", &x)
                .bind("rows", &rows)
                .bind("places", &places)
                .bind_mut("cache", cache)
                .set("count", threads)
                .set("tokens", tokens)
                .set("heads", heads)
                .set("width", width / 4)
                .set("rows", count)
                .set("context", context)
                .turns(0)
        });
        self.k.gpu().change(&[self.k.place().buffer, self.v.place().buffer], &launches)
    }

    /// Computes attention of `q [batch, heads, tokens, head_dim]` to the first `lengths [batch]` tokens of the rows
    /// `rows [batch]`. The last query sees all of these tokens, and each earlier query sees one less. Query head `j`
    /// reads key head `j / (heads / kv_heads)`.
    ///
    /// # Panics
    /// When the sizes do not fit.
    #[track_caller]
    pub fn attend(&self, q: &Tensor, rows: &Tensor, lengths: &Tensor) -> Tensor {
        let (shape, cache, batch) = (q.shape(), self.k.shape(), rows.count());
        assert!(
            shape.len() == 4
                && shape[0] == batch
                && shape[3] == self.head_dim
                && shape[1].is_multiple_of(cache[1]),
            "kv cache: q {shape} for {batch} rows of {cache}"
        );
        assert!(
            [rows, lengths].iter().all(|x| x.dtype() == DType::U32 && **x.shape() == [batch]),
            "kv cache: rows {} and lengths {} must be lists of u32",
            rows.shape(),
            lengths.shape()
        );
        same_gpu("kv cache", &[&self.k, q, rows, lengths]);
        let extra = cache[3] - self.head_dim;
        let q = crate::ops::float("kv cache", &q.detach()).pad(3, 0, extra);
        let [rows, lengths] = [rows, lengths].map(Tensor::contiguous);
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let y = attention::cached(&q, [&self.k, &self.v], [&rows, &lengths], scale);
        if extra == 0 { y } else { y.slice(3, 0..self.head_dim) }
    }
}

impl KvCache {
    /// Computes attention of `q [1, heads, tokens, head_dim]` to the first places of a cache with one row, with `mask [tokens,
    /// places]` added to the scores: minus infinity hides a place. For sequences that do not lie in order, as with a window.
    ///
    /// # Panics
    /// When the sizes do not fit, or there are several rows.
    #[track_caller]
    pub fn attend_masked(&self, q: &Tensor, mask: &Tensor) -> Tensor {
        let (shape, cache) = (q.shape(), self.k.shape());
        assert!(
            cache[0] == 1
                && shape.len() == 4
                && shape[3] == self.head_dim
                && mask.shape().len() == 2
                && mask.shape()[0] == shape[2]
                && mask.shape()[1] <= cache[2],
            "kv cache: q {shape} and mask {} for {cache}",
            mask.shape()
        );
        let extra = cache[3] - self.head_dim;
        let q = crate::ops::float("kv cache", &q.detach()).pad(3, 0, extra);
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let [k, v] = [&self.k, &self.v].map(|x| x.slice(2, 0..mask.shape()[1]));
        let y = q.attention_scaled(&k, &v, &Mask::Additive(mask.clone()), scale);
        if extra == 0 { y } else { y.slice(3, 0..self.head_dim) }
    }
}

/// Two rows of different lengths are filled in two steps, then several query tokens attend to them.
pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // Batch 2, with 4 query heads and 2 key heads.
    let sizes = [
        ([5usize, 2], 1usize, 8usize, 16usize),
        ([0, 3], 4, 4, 9),
        ([70, 3], 2, 32, 96),
        ([9, 4], 3, 90, 24),
        ([6, 0], 1, 6, 8),
        ([3, 1], 1, 72, 24),
        ([3, 1], 2, 36, 24),
        // More rows than the kernel for few rows takes.
        ([7, 0], 5, 20, 40),
    ];
    for ((before, tokens, head_dim, context), dtype) in
        sizes.iter().flat_map(|size| [DType::F32, DType::F16].map(|dtype| (*size, dtype)))
    {
        let most = before[0].max(before[1]);
        let list = |values: [usize; 2]| {
            Input::integers([2], DType::U32, 0, 1).fill(Fill::Values(values.map(|v| v as f64).to_vec()))
        };
        let inputs = vec![
            Input::normal([2, 4, tokens, head_dim]).fixed(),
            // What is stored in f16 has 16 bits already, so that the cache rounds nothing.
            Input::normal([2, most.max(1), 2, head_dim]).dtype(dtype).fixed(),
            Input::normal([2, tokens, 2, head_dim]).dtype(dtype).fixed(),
            list([2, 0]),
            list(before),
        ];
        let forward = move |x: &[Tensor]| {
            let gpu = x[0].gpu();
            let mut cache = KvCache::with_dtype(gpu, 3, 2, context, head_dim, dtype);
            let start = Tensor::from_slice(gpu, &[0u32, 0], [2]);
            // Both rows get the longer length. The surplus of the shorter row is hidden by its length, or overwritten
            // by the new tokens.
            let keep = |kept: Result<()>| kept.expect("inputs of the case");
            keep(cache.append(&x[1], &x[1].scale(0.5), &x[3], &start));
            keep(cache.append(&x[2], &x[2].scale(0.5), &x[3], &x[4]));
            let lengths: Vec<u32> = before.iter().map(|b| (b + tokens) as u32).collect();
            cache.attend(&x[0], &x[3], &Tensor::from_slice(gpu, &lengths, [2]))
        };
        let reference = move |x: &[Array]| {
            Array::from_fn([2, 4, tokens, head_dim], |i| {
                let (d, t, h, b) = (
                    i % head_dim,
                    i / head_dim % tokens,
                    i / head_dim / tokens % 4,
                    i / head_dim / tokens / 4,
                );
                let key = |j: usize, d: usize| {
                    if j < before[b] {
                        x[1].data[((b * most.max(1) + j) * 2 + h / 2) * head_dim + d]
                    } else {
                        x[2].data[((b * tokens + j - before[b]) * 2 + h / 2) * head_dim + d]
                    }
                };
                let q = &x[0].data[((b * 4 + h) * tokens + t) * head_dim..][..head_dim];
                let scale = (1.0 / (head_dim as f32).sqrt()) as f64;
                let seen = before[b] + t + 1;
                let scores: Vec<f64> =
                    (0..seen).map(|j| (0..head_dim).map(|d| q[d] * key(j, d)).sum::<f64>() * scale).collect();
                let top = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                (0..seen).map(|j| (scores[j] - top).exp() / total * 0.5 * key(j, d)).sum()
            })
        };
        let stored = if dtype == DType::F16 { ", in f16" } else { "" };
        let name = format!("{before:?} and {tokens} of {head_dim}{stored}");
        all.push(Case::new(name, inputs, forward, reference).ulps(64.0, 64.0));
    }
    all
}
