//! Adapters on frozen weights, made of parameters that many places of a model share.
//!
//! * [`ShardPool`] (mixture of shards, arXiv 2410.00938): the rows of `A_k` and `B_k` of each layer's low-rank part are
//!   assembled from shards of two pools, by fixed random indices.
//! * [`Miss`] (MiSS, the cheap form of Bone, arXiv 2409.15371): `W' = W + tile(d)`, where one matrix `d` is repeated along the
//!   inputs, so that `y += (sum over blocks of x) d`.
//! * [`Bone`] (block affine, or bat, of the same paper): `W' = W + W_blocks B + B`, with one `r x r` block per row of blocks.

mod bone;
mod miss;

pub use bone::Bone;
pub use miss::Miss;

use super::base::Base;
use super::tied::{dense, linear64};
use super::{LeafGrads, Load, Site, Tied};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::case::{Array, Case, Input};
use crate::ops::moves::embedding_sum::sum_by_index;
use crate::ops::product::matmul::{Epilogue, outer};
use crate::rng::Rng;
use crate::setters::setters;
use crate::tape::Destination;
use crate::tensor::Tensor;
use std::sync::Arc;

/// How a mixture of shards is laid out, in the terms of the paper (arXiv 2410.00938) and of its authors' code.
///
/// A model has one [`ShardPool`] for each kind of projection, such as all of its query projections. Its parameters are as many as
/// those of LoRA with the rank [`budget`](ShardConfig::budget): with an eighth of the rank of the LoRA that it replaces, an eighth.
/// The authors report savings of about that size at results like LoRA's.
///
/// ```
/// use tiebeam::share::ShardConfig;
/// // Rank 16, with the parameters of LoRA of rank 2. Each vector has 4 shards, and one rank of each layer is its own.
/// let config = ShardConfig::new(16, 2).shards(4).private(1);
/// assert_eq!(config.alpha, 16.0); // as in the authors' scripts; the factor is alpha / rank
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ShardConfig {
    /// `r`: the rank of each layer's part, which may exceed the budget because layers share shards.
    pub rank: usize,
    /// `e`: the rank of LoRA with as many parameters.
    pub budget: usize,
    /// `l`: shards of which a vector consists. 1 shares whole vectors.
    pub shards: usize,
    /// Vectors of each layer's A and B that are its own, out of the budget. 0 shares everything.
    pub private: usize,
    /// The low-rank part is multiplied by `alpha / rank`.
    pub alpha: f32,
}

impl ShardConfig {
    /// Shards of whole vectors, none of them private, and alpha 16.
    pub fn new(rank: usize, budget: usize) -> ShardConfig {
        ShardConfig { rank, budget, shards: 1, private: 0, alpha: 16.0 }
    }
}

setters!(ShardConfig { rank: usize, budget: usize, shards: usize, private: usize, alpha: f32 });

/// The shards from which the low-rank parts of many layers are assembled.
///
/// Row j of `A_k [rank, in]` is the shards `pool_a[index_a[k][l j .. l j + l]]`, one after the other, and row j of `B_k^T [rank,
/// out]` those of `pool_b` by `index_b`. [`ShardPool::new`] makes pools for a model. The fields make one by hand:
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::{Rng, share::{ShardPool, Site}};
/// let mut rng = Rng::new(1);
/// // 3 layers of rank 2. Each row of A and B is made of 2 shards, from 4 public ones and 1 per layer.
/// let mut draw = || ShardPool::draw(3, 2, 2, [4, 1], &mut rng);
/// let (index_a, index_b) = (draw(), draw());
/// let [pool_a, pool_b] = [3, 2].map(|width| Tensor::ones(&gpu, [4 + 3, width]).requires_grad());
/// let pool = ShardPool { pool_a, pool_b, index_a, index_b, rank: 2, scale: 1.0 };
/// let weight = pool.site(0, &Tensor::zeros(&gpu, [4, 6])); // [out, in]
/// assert_eq!(weight.expand().to_vec2::<f32>()?, [[2.0; 6]; 4]); // ones, summed over the rank
/// assert_eq!(weight.leaf_names(), ["weight", "pool_a", "pool_b"]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct ShardPool {
    /// `[shards, in / l]`
    pub pool_a: Tensor,
    /// `[shards, out / l]`
    pub pool_b: Tensor,
    /// For each layer, `rank * l` rows of `pool_a`.
    pub index_a: Vec<Vec<u32>>,
    /// For each layer, `rank * l` rows of `pool_b`.
    pub index_b: Vec<Vec<u32>>,
    /// Rank of the low-rank parts: the number of rows of A.
    pub rank: usize,
    /// Constant factor.
    pub scale: f32,
}

impl ShardPool {
    /// Makes the pools for weights `[out, in]` of so many layers, as the authors do: `budget * layers * l` shards in each pool.
    /// Those of A are uniform within `1 / sqrt(in)`, as LoRA's A, and those of B are 0, so that weights are as before at first.
    /// The indices of A and of B are drawn apart by [`ShardPool::draw`]. Everything follows from the state of `rng`.
    ///
    /// # Errors
    /// [`Error::Config`] when `l` does not divide both sides of the weight, or the budget does not suffice: the public shards of
    /// all layers must be at least as many as one layer draws, so that it draws none twice.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::{Rng, share::{ShardConfig, ShardPool, Site}};
    /// let config = ShardConfig::new(4, 2).shards(2).private(1);
    /// let pool = ShardPool::new(&gpu, 6, [8, 12], config, &mut Rng::new(1))?;
    /// assert_eq!(pool.pool_a.count() + pool.pool_b.count(), 6 * 2 * (8 + 12)); // as LoRA of rank 2
    /// assert_eq!(pool.index_a[5].len(), 4 * 2);
    /// let weight = Tensor::ones(&gpu, [8, 12]);
    /// assert_eq!(pool.site(5, &weight).expand().to_vec::<f32>()?, [1.0; 96]); // B is 0
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn new(
        gpu: &Gpu,
        layers: usize,
        [out, inner]: [usize; 2],
        config: ShardConfig,
        rng: &mut Rng,
    ) -> Result<ShardPool> {
        let ShardConfig { rank, budget, shards, private, alpha } = config;
        let wrong = |what: String| Err(Error::config(format!("shards: {what}")));
        if [layers, rank, budget, shards, out, inner].contains(&0) {
            return wrong(format!(
                "{layers} layers of [{out}, {inner}] with {config:?}: none of these may be 0"
            ));
        }
        if !out.is_multiple_of(shards) || !inner.is_multiple_of(shards) {
            return wrong(format!("{shards} shards a vector do not divide both sides of [{out}, {inner}]"));
        }
        if private > budget.min(rank) {
            return wrong(format!(
                "{private} private vectors a layer exceed the budget {budget} or the rank {rank}"
            ));
        }
        if rank - private > (budget - private) * layers {
            let has = (budget - private) * layers;
            return wrong(format!(
                "a layer draws {} public vectors of {has}; use a lower rank, or a larger budget",
                rank - private
            ));
        }
        let sizes = [(budget - private) * layers * shards, private * shards];
        let [index_a, index_b] = [(); 2].map(|()| ShardPool::draw(layers, rank, shards, sizes, rng));
        let count = budget * layers * shards;
        let mut data = vec![0.0f32; count * (inner / shards)];
        rng.fill_uniform(&mut data);
        // PyTorch's Kaiming bound with the slope sqrt(5). The fan-in is that of the whole vector and not of the shard.
        let bound = 1.0 / (inner as f32).sqrt();
        data.iter_mut().for_each(|x| *x = (2.0 * *x - 1.0) * bound);
        let pool_a = Tensor::from_slice(gpu, &data, [count, inner / shards]).requires_grad();
        let pool_b = Tensor::zeros(gpu, [count, out / shards]).requires_grad();
        Ok(ShardPool { pool_a, pool_b, index_a, index_b, rank, scale: alpha / rank as f32 })
    }

    /// Draws random indices as the authors do. There are `public` shards for all layers, followed by `private` ones for each layer,
    /// which only it reads. Every vector of the low-rank part consists of `shards` shards. Each layer reads public ones, none of
    /// them again before it has read all, and then each of its private ones in their order.
    ///
    /// # Panics
    /// When a layer has more private shards than it needs, or needs public ones and there are none.
    #[track_caller]
    pub fn draw(
        layers: usize,
        rank: usize,
        shards: usize,
        [public, private]: [usize; 2],
        rng: &mut Rng,
    ) -> Vec<Vec<u32>> {
        let need = rank * shards;
        assert!(
            private <= need && (public > 0 || private == need),
            "shards: a layer needs {need}, has {private} of its own and {public} public ones to draw from"
        );
        let layer = |k: usize| {
            let mut all = Vec::with_capacity(need);
            while all.len() < need - private {
                let mut deck: Vec<u32> = (0..public as u32).collect();
                rng.shuffle(&mut deck);
                deck.truncate(need - private - all.len());
                all.extend(deck);
            }
            all.extend((0..private).map(|i| (public + k * private + i) as u32));
            all
        };
        (0..layers).map(layer).collect()
    }

    /// Returns the weight `W + scale B_k A_k` of layer `k`, with the leaves `weight`, `pool_a` and `pool_b`. The pools are the same
    /// leaves at all sites. The layer's indices are buffers of its site, so that files have them; loading one changes the site and
    /// not the lists of this pool.
    ///
    /// # Panics
    /// When the sizes do not fit.
    #[track_caller]
    pub fn site(&self, k: usize, weight: &Tensor) -> Arc<dyn Site> {
        self.over(k, &Tied::new(weight).shared())
    }

    /// Adds the low-rank part of layer `k` to a weight of any kind, such as a packed one.
    ///
    /// A stored and a packed weight are read in the same load as the part. Any other is written down for each product.
    ///
    /// # Panics
    /// When the sizes do not fit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::{Rng, share::{Packed, Packing, Scales, ShardConfig, ShardPool, Site}};
    /// let packing = Packing::new(4, 16, Scales::Affine)?;
    /// let base = Packed::new(&gpu, packing, [2, 16], &vec![0; 2 * packing.row_words(16)])?.shared();
    /// let pool = ShardPool::new(&gpu, 3, [2, 16], ShardConfig::new(2, 1), &mut Rng::new(1))?;
    /// let weight = pool.over(0, &base);
    /// assert_eq!(weight.leaf_names(), ["pool_a", "pool_b"]); // the packed weight is frozen
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn over(&self, k: usize, base: &Arc<dyn Site>) -> Arc<dyn Site> {
        let index = |all: &[Vec<u32>], pool: &Tensor| {
            let list = &all[k];
            let fits = self.rank > 0 && !list.is_empty() && list.len().is_multiple_of(self.rank);
            assert!(fits, "shards: {} indices of layer {k} for the rank {}", list.len(), self.rank);
            Tensor::from_slice(pool.gpu(), list, [self.rank, list.len() / self.rank])
        };
        let index = [index(&self.index_a, &self.pool_a), index(&self.index_b, &self.pool_b)];
        let pools = [self.pool_a.clone(), self.pool_b.clone()];
        Shards::new(Base(base.clone()), pools, index, self.scale).shared()
    }

    /// Returns the low-rank part alone: `scale (x A_k^T) B_k`.
    #[track_caller]
    pub fn forward(&self, k: usize, x: &Tensor) -> Tensor {
        let factor = |pool: &Tensor, list: &[u32]| {
            assembled(pool, &Tensor::from_slice(pool.gpu(), list, [self.rank, list.len() / self.rank]))
        };
        let [a, b] = [factor(&self.pool_a, &self.index_a[k]), factor(&self.pool_b, &self.index_b[k])];
        x.matmul(&a.t()).matmul(&b).scale(self.scale)
    }
}

/// The vectors `[rank, l width]` that consist of the shards `index [rank, l]` of a pool `[shards, width]`.
fn assembled(pool: &Tensor, index: &Tensor) -> Tensor {
    let [rank, shards] = [index.shape()[0], index.shape()[1]];
    pool.index_select(0, &index.reshape([rank * shards])).reshape([rank, shards * pool.shape()[1]])
}

/// `W + scale B A`, where the rows of `A` and of `B^T` are assembled from the shards of pools that many sites read.
#[derive(Clone)]
struct Shards {
    base: Base,
    /// Of A and of B.
    pools: [Tensor; 2],
    /// `[rank, l]` rows of each pool.
    index: [Tensor; 2],
    scale: f32,
}

impl Shards {
    #[track_caller]
    fn new(base: Base, pools: [Tensor; 2], index: [Tensor; 2], scale: f32) -> Shards {
        let [out, inner] = base.0.size();
        let fits = |which: usize, length: usize| {
            let (pool, index) = (pools[which].shape(), index[which].shape());
            pool.len() == 2 && index.len() == 2 && index[1] * pool[1] == length
        };
        assert!(
            fits(0, inner) && fits(1, out) && index[0].shape()[0] == index[1].shape()[0],
            "shards: pools {} and {} with indices {} and {} for a weight [{out}, {inner}]",
            pools[0].shape(),
            pools[1].shape(),
            index[0].shape(),
            index[1].shape()
        );
        Shards { base, pools, index, scale }
    }

    /// `A [rank, in]` and `B^T [rank, out]`.
    fn factors(&self) -> [Tensor; 2] {
        [0, 1].map(|which| dense(&assembled(&self.pools[which].detach(), &self.index[which])))
    }

    /// Adds the gradient of `A` or of `B^T`, shard by shard in a fixed order.
    fn add(&self, which: usize, grads: &mut LeafGrads, d: impl FnOnce() -> Tensor) {
        let leaf = self.base.first() + which;
        if grads.needs(leaf) {
            let (pool, ids) =
                (*self.pools[which].shape(), self.index[which].reshape([self.index[which].count()]));
            let d = d().cast(DType::F32).reshape([ids.count(), pool[1]]);
            grads.add_with(leaf, |into| sum_by_index(&d, 0, pool, &ids, into));
        }
    }
}

impl Site for Shards {
    fn name(&self) -> &'static str {
        "shards"
    }

    fn size(&self) -> [usize; 2] {
        self.base.0.size()
    }

    fn leaves(&self) -> Vec<Tensor> {
        self.base.leaves([&self.pools[0], &self.pools[1]])
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        self.base.names(&["pool_a", "pool_b"])
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        let own = [("index_a", self.index[0].clone()), ("index_b", self.index[1].clone())];
        self.base.0.buffers().into_iter().chain(own).collect()
    }

    fn with_tensors(&self, leaves: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site> {
        let (base, [pools, index]) = self.base.split(leaves, buffers);
        let two = |x: &[Tensor]| [x[0].clone(), x[1].clone()];
        Arc::new(Shards::new(base, two(pools), two(index), self.scale))
    }

    fn load(&self) -> Load {
        let [a, b] = self.factors();
        self.base.load().with_low_rank([&a, &b.t().contiguous()], self.scale)
    }

    fn is_compact(&self) -> bool {
        self.base.0.is_compact()
    }

    fn apart(&self, x: &Tensor) -> Option<(Arc<dyn Site>, Tensor)> {
        let [a, b] = self.factors();
        Some((self.base.0.clone(), x.matmul(&a.t()).scale(self.scale).matmul(&b)))
    }

    /// `dA = scale B^T dW` and `dB^T = scale A dW^T`, which are summed by index.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        let [a, b] = self.factors();
        self.add(0, grads, || b.matmul(dw).scale(self.scale));
        self.add(1, grads, || a.matmul(&dw.t()).scale(self.scale));
        self.base.reduce(dw, grads);
    }

    /// Avoids storing `dW`: `dA = (scale dy B)^T x` and `dB^T = (scale x A^T)^T dy`, which are summed by index.
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        let [a, b] = self.factors();
        let product = |left: &Tensor, right: &Tensor| outer("shards", left, right, Destination::New);
        self.add(0, grads, || product(&dy.matmul(&b.t()).scale(self.scale), x));
        self.add(1, grads, || product(&x.matmul(&a.t()).scale(self.scale), dy));
        self.base.backward(x, dy, grads);
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = miss::cases();
    all.extend(bone::cases());
    let inputs = vec![
        Input::normal([5, 6]),
        Input::normal([4, 6]).fixed(),
        Input::normal([5, 3]),
        Input::normal([5, 2]),
    ];
    let (index_a, index_b) = (vec![0u32, 3, 3, 1], vec![4u32, 0, 2, 2]);
    let pool = move |x: &[Tensor]| ShardPool {
        pool_a: x[2].clone(),
        pool_b: x[3].clone(),
        index_a: vec![index_a.clone()],
        index_b: vec![index_b.clone()],
        rank: 2,
        scale: 0.5,
    };
    let forward = move |x: &[Tensor]| x[0].linear(&pool(x).site(0, &x[1]), Epilogue::default());
    let reference = move |x: &[Array]| {
        let a = |j: usize, c: usize| x[2].data[[0, 3, 3, 1][2 * j + c / 3] * 3 + c % 3];
        let b = |j: usize, c: usize| x[3].data[[4, 0, 2, 2][2 * j + c / 2] * 2 + c % 2];
        let w = Array::from_fn([4, 6], |i| {
            x[1].data[i] + (0..2).map(|j| 0.5 * b(j, i / 6) * a(j, i % 6)).sum::<f64>()
        });
        linear64(&x[0], &w)
    };
    all.push(Case::new("shards of two pools", inputs, forward, reference).ulps(16.0, 32.0));
    all
}
