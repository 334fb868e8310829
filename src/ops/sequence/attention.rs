//! Scaled dot-product attention with grouped key heads, by online softmax. The forward pass stores no `[tokens, tokens]`
//! array, and the backward pass only that of some heads at a time, where this is faster than computing scores again.
//!
//! The methods are [`Tensor::attention`] and [`Tensor::attention_scaled`], with a [`Mask`], and [`plan`] says which kernels they take.
//! As a layer it is [`nn::Attention`](crate::nn::Attention), and with a cache it is [`KvCache`](super::cache::KvCache).

mod backward;
mod cases;
mod kernels;
mod matrices;
mod pass;
mod plan;
mod sizes;
mod units;

use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, Work, grid};
use crate::gpu::shader::Source;
use crate::ops::stored;
use crate::precision::precision;
use crate::shape::{self, Shape};
use crate::tape::Saved;
use crate::tensor::{Tensor, same_gpu};
use backward::{Attention, Nothing};
use kernels::{Kernel, Kernels};
use matrices::Matrices;
use pass::Pass;
use sizes::{Places, Sizes, readable, room, steps, storage};
use std::ops::Range;

pub(in crate::ops) use cases::cases;
pub use plan::plan;
pub use units::for_matrix_units;

/// Which keys a query sees.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::nn::Mask;
/// let (q, k) = (Tensor::ones(&gpu, [1, 1, 1, 4]), Tensor::ones(&gpu, [1, 1, 2, 4]));
/// let v = Tensor::from_slice(&gpu, &[1f32, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0], [1, 1, 2, 4]);
/// let hide_first = Tensor::from_slice(&gpu, &[f32::NEG_INFINITY, 0.0], [1, 1, 1, 2]);
/// let y = q.attention(&k, &v, &Mask::Additive(hide_first));
/// assert_eq!(y.to_vec::<f32>()?, [5.0; 4]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
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

impl Tensor {
    /// `softmax(q k^T / sqrt(head_dim) + mask) v` for each head, without storing the scores.
    ///
    /// `self` is q `[batch, heads, tokens_q, head_dim]`, while k and v are `[batch, kv_heads, tokens_k, head_dim]`.
    /// Head `j` reads key head `j / (heads / kv_heads)`. A query that sees no key gives zeros. The result has q's
    /// shape, in f32, or in the type of a scope of 16 bits ([`autocast`](crate::autocast)). Heads may be views of
    /// `[batch, tokens, width]` or of one product for q, k and v: they are read where they lie, and the result lies in
    /// the order of q's tokens and heads, unless it takes several dispatches. Values that are not finite may also reach
    /// queries that do not see them. Sources: Dao 2023, "FlashAttention-2"; Ainslie et al. 2023 (grouped queries).
    ///
    /// # Panics
    /// If the shapes do not fit, `head_dim` is above 256, or the mask is part of a graph.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::nn::Mask;
    /// // One sequence, one head, two tokens whose keys are equal: each sees the mean of its values.
    /// let k = Tensor::ones(&gpu, [1, 1, 2, 4]);
    /// let v = Tensor::from_slice(&gpu, &[0f32, 0.0, 0.0, 0.0, 2.0, 4.0, 6.0, 8.0], [1, 1, 2, 4]);
    /// let y = k.attention(&k, &v, &Mask::Causal).reshape([2, 4]).to_vec2::<f32>()?;
    /// assert_eq!(y, [[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn attention(&self, k: &Tensor, v: &Tensor, mask: &Mask) -> Tensor {
        let head_dim = self.shape().last().copied().unwrap_or(1).max(1);
        self.attention_scaled(k, v, mask, 1.0 / (head_dim as f32).sqrt())
    }

    /// [`Tensor::attention`] with scores `scale q k^T + mask`.
    ///
    /// # Panics
    /// As for [`Tensor::attention`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::nn::Mask;
    /// let q = Tensor::ones(&gpu, [1, 2, 3, 4]); // [batch, heads, tokens, head_dim]
    /// let kv = Tensor::ones(&gpu, [1, 1, 5, 4]); // one head of keys for both
    /// let y = q.attention_scaled(&kv, &kv, &Mask::None, 0.1);
    /// assert_eq!(y.shape()[..], [1, 2, 3, 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn attention_scaled(&self, k: &Tensor, v: &Tensor, mask: &Mask, scale: f32) -> Tensor {
        // Sizes that do not fit are refused below, with a message.
        let size = |x: &Tensor, axis: usize| x.shape().get(axis).copied().unwrap_or(1);
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
        attend([self, k, v], mask, scale, Forced::default())
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

/// What tests ask for in place of the device's choice.
#[derive(Clone, Copy, Default)]
struct Forced {
    kernels: Option<Kernels>,
    /// Parts of the keys in the forward pass.
    splits: Option<usize>,
    /// Keys or queries that a launch of the backward pass walks.
    span: Option<usize>,
    /// Pairs whose slopes are kept at a time.
    pairs: Option<usize>,
}

#[track_caller]
fn attend([q, k, v]: [&Tensor; 3], mask: &Mask, scale: f32, forced: Forced) -> Tensor {
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
        let y = Tensor::zeros(q.gpu(), qs).made_by(&[q, k, v], || Box::new(Nothing([qs, ks, ks])));
        return y.cast(precision().dtype());
    }
    let mut sizes = Sizes::new([batch, heads, kv_heads, tokens_q, tokens_k, head_dim], scale);
    let scope = precision().dtype();
    let kernels = forced.kernels.or_else(|| on_matrix_units([q, k, v], &sizes, scope));
    let kernels = kernels.unwrap_or_else(|| sizes.kernels(q.gpu().class(), mask.is_some()));
    // Padding with zeros changes no score, and the columns that it adds to the result are cut off.
    let extra = head_dim.next_multiple_of(kernels.multiple()) - head_dim;
    let dtype = kernels.forward.dtype();
    let [q, k, v] = [q, k, v].map(|x| {
        assert!(x.dtype().is_float(), "{op}: needs floats, got {}; cast first", x.dtype());
        readable(&x.cast(dtype).pad(3, 0, extra))
    });
    sizes.head_dim += extra;
    if causal {
        sizes.shift -= tokens_q as i32;
    }
    sizes.mask.copy_from_slice(&strides[..4]);
    // Kernels for f32 have no other results, which are converted at the end.
    let stored = if dtype == scope { scope } else { DType::F32 };
    let y = room(op, &q, stored);
    let lse = forward([&q, &k, &v], mask.as_ref(), None, sizes, kernels.forward, forced.splits, &y);
    let saved = y.clone();
    let y = y.made_by(&[&q, &k, &v], || {
        Box::new(Attention {
            sizes,
            kernels,
            span: forced.span,
            pairs: forced.pairs,
            q: Saved::new(&q),
            k: Saved::new(&k),
            v: Saved::new(&v),
            y: Saved::new(&saved),
            lse,
            mask: mask.as_ref().map(Saved::new),
        })
    });
    let y = if extra == 0 { y } else { y.slice(3, 0..head_dim) };
    match scope {
        DType::F32 => y,
        // In the order of memory, so that heads which lie by tokens are joined without a copy.
        _ if y.strides[1] < y.strides[2] => y.transpose(1, 2).cast(scope).transpose(1, 2),
        _ => y.cast(scope),
    }
}

/// The kernels for the device's matrix units, if it has any and they may be used: in a scope of f16, and for results
/// without gradient of operands that are all f16. The weights are then rounded to f16, which a loss scale of a scope
/// allows for.
fn on_matrix_units(operands: [&Tensor; 3], sizes: &Sizes, scope: DType) -> Option<Kernels> {
    let stored = operands.iter().all(|x| x.dtype() == DType::F16 && !x.is_tracked());
    if scope != DType::F16 && !(stored && scope == DType::F32) {
        return None;
    }
    let gpu = operands[0].gpu();
    let matrices = gpu.coop_matrices()?;
    let kernels = Matrices::kernels(gpu.class(), matrices.size as usize, sizes)?;
    // The first call on a device tests its matrix units.
    gpu.coop().map(|_| kernels)
}

/// Attention on the device's matrix units, whether or not these passed their test, for the tests. `None` if the device has
/// none or the sizes are not for them. Programs call [`Tensor::attention`], which chooses.
pub fn by_matrices([q, k, v]: [&Tensor; 3], mask: &Mask, splits: Option<usize>) -> Option<Tensor> {
    let ([batch, heads, tokens_q, head_dim], [_, kv_heads, tokens_k, _]) = (four(q.shape()), four(k.shape()));
    let scale = 1.0 / (head_dim as f32).sqrt();
    let sizes = Sizes::new([batch, heads, kv_heads, tokens_q, tokens_k, head_dim], scale);
    let size = q.gpu().coop_matrices()?.size as usize;
    let kernels = Matrices::kernels(q.gpu().class(), size, &sizes)?;
    Some(attend([q, k, v], mask, scale, Forced { kernels: Some(kernels), splits, ..Forced::default() }))
}

/// Computes attention of `q [batch, heads, tokens_q, head_dim]` to the filled part of rows of a cache `[rows, kv_heads,
/// context, head_dim]`. Heads are padded to [`cache_width`].
pub(in crate::ops) fn cached(q: &Tensor, [k, v]: [&Tensor; 2], listed: [&Tensor; 2], scale: f32) -> Tensor {
    let ([batch, heads, tokens_q, head_dim], [cache_rows, kv_heads, context, _]) =
        (four(q.shape()), four(k.shape()));
    if q.count() == 0 {
        return Tensor::zeros(q.gpu(), *q.shape());
    }
    // The sizes hide no key. The lengths say which keys a query sees.
    let sizes = Sizes::new([batch, heads, kv_heads, tokens_q, context, head_dim], scale);
    let sizes = Sizes { cache_rows, ..sizes };
    let kernels = sizes.kernels(q.gpu().class(), false);
    debug_assert!(head_dim.is_multiple_of(kernels.forward.multiple()));
    let q = readable(q);
    let y = room("attention", &q, DType::F32);
    let _ = forward([&q, k, v], None, Some(listed), sizes, kernels.forward, None, &y);
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

/// Computes `y` and returns the log-sum-exps of its rows. The keys are cut into `splits` parts if given, else into as many
/// as suit the device.
fn forward(
    [q, k, v]: [&Tensor; 3],
    mask: Option<&Tensor>,
    listed: Option<[&Tensor; 2]>,
    sizes: Sizes,
    kernel: Kernel,
    splits: Option<usize>,
    y: &Tensor,
) -> Tensor {
    let (gpu, op) = (q.gpu(), "attention");
    let sizes = match splits {
        Some(splits) => sizes.cut(splits, kernel.step()),
        None => sizes.cut_for(gpu.class(), kernel),
    };
    let ([splits, chunk], rows) = (sizes.cut, sizes.pairs * sizes.rows());
    let lse = |parts: usize| Tensor::empty(gpu, op, [parts * rows], DType::F32);
    let whole = [y.clone(), lse(1)];
    let parts = (splits > 1)
        .then(|| [Tensor::empty(gpu, op, [splits * rows, sizes.head_dim], DType::F32), lse(splits)]);
    let [to, logs] = parts.as_ref().unwrap_or(&whole);
    let places = Places { q: steps(q), k: steps(k), v: steps(v), y: steps(y), ..Places::default() };
    let sizes = Sizes { places, ..sizes };
    let mut source = kernel.source(Pass::Forward, sizes.head_dim, mask.is_some());
    if listed.is_some() {
        source = source.slot("keys", "keys_listed");
    }
    // Matrix units have loads of their own, and a cache may be stored in f16.
    let source = match listed {
        Some(_) => stored::set(source, &[("in", k.dtype()), ("out", to.dtype())]),
        None => stored::set(source, &[("out", to.dtype())]),
    };
    let walked = chunk.min(sizes.tokens_k);
    let launch = sizes.launch_over(&source, Pass::Forward, kernel, (sizes.rows(), walked));
    gpu.launch(
        launch
            .bind("q", storage(q))
            .bind("k", storage(k))
            .bind("v", storage(v))
            .bind_some("mask", mask)
            .bind_some("rows", listed.map(|[rows, _]| rows))
            .bind_some("lengths", listed.map(|[_, lengths]| lengths))
            .bind_mut("y", storage(to))
            .bind_mut("lse", logs)
            .work(Work { flops: sizes.seen_flops(Pass::Forward.products()), parts: splits }),
    );
    if let Some(parts) = parts {
        join(&sizes, &parts, &whole);
    }
    let [_, lse] = whole;
    lse
}

/// Joins the results of the keys' parts.
fn join(sizes: &Sizes, [y, logs]: &[Tensor; 2], [whole, lse]: &[Tensor; 2]) {
    let width = sizes.head_dim / 4;
    let grid = grid((sizes.pairs * sizes.rows() * width).div_ceil(64));
    let source = stored::set(Source::file("attention_combine"), &[("out", whole.dtype())]);
    whole.gpu().launch(
        Launch::new("attention", &source, "main", grid)
            .bind("parts", y)
            .bind("logs", logs)
            .bind_mut("y", storage(whole))
            .bind_mut("lse", lse)
            .set("y_steps", sizes.places.y)
            .set("pairs", sizes.pairs)
            .set("rows", sizes.rows())
            .set("tokens_q", sizes.tokens_q)
            .set("group", sizes.group)
            .set("kv_heads", sizes.kv_heads)
            .set("splits", sizes.cut[0])
            .set("width", width)
            .turns(2 * sizes.cut[0]),
    );
}
