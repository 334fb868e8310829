//! Adapters on frozen weights, made of parameters that many layers share.
//!
//! * [`ShardPool`] (mixture of shards, arXiv 2410.00938): the rows of `A_k` and `B_k` of each layer's low-rank part are
//!   assembled from shards of two pools, by fixed random indices.
//! * [`Miss`] (MiSS, the cheap form of Bone, arXiv 2409.15371): `W' = W + tile(d)`, where one matrix `d [r, out]` is
//!   repeated along the inputs, so that `y += (sum over blocks of x) d`.
//! * [`block_affine`] (Bone): `W' = W + W_blocks B + B`, with one `r x r` block per row of blocks.

use super::tied::dense;
use super::{LeafGrads, Load, LowRank, Site};
use crate::ops::case::{Array, Case, Input};
use crate::ops::product::matmul::Epilogue;
use crate::rng::Rng;
use crate::tensor::Tensor;
use std::sync::Arc;

/// The shards from which the low-rank parts of many layers are assembled.
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
    /// Draws random indices. There are `public` shards for all layers, followed by `private` ones for each layer, which
    /// only it reads. Every vector of the low-rank part consists of `shards` shards. Each layer reads each of its private
    /// shards once and draws the rest from the public ones.
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
            let own = (0..private).map(|i| (public + k * private + i) as u32);
            let mut all: Vec<u32> = own.collect();
            let mut draws = vec![0.0f32; need - private];
            rng.fill_uniform(&mut draws);
            all.extend(draws.iter().map(|x| ((x * public as f32) as u32).min(public as u32 - 1)));
            rng.shuffle(&mut all);
            all
        };
        (0..layers).map(layer).collect()
    }

    /// Returns `A [rank, in]` and `B^T [rank, out]` of layer `k`. Gradients of the shards are added in a fixed order.
    fn factors(&self, k: usize) -> [Tensor; 2] {
        [(&self.pool_a, &self.index_a[k]), (&self.pool_b, &self.index_b[k])].map(|(pool, index)| {
            let ids = Tensor::from_slice(pool.gpu(), index, [index.len()]);
            pool.index_select(0, &ids).reshape([self.rank, index.len() / self.rank * pool.shape()[1]])
        })
    }

    /// Returns the weight `W + scale B_k A_k` of layer `k`. The pools are the leaves; add them to a model's parameters
    /// once.
    ///
    /// # Panics
    /// When the sizes do not fit.
    #[track_caller]
    pub fn site(&self, k: usize, weight: &Tensor) -> Arc<dyn Site> {
        let [a, b] = self.factors(k);
        LowRank::new(weight, &a, &b.t().contiguous(), self.scale).shared()
    }

    /// Returns the low-rank part alone: `scale (x A_k^T) B_k`.
    #[track_caller]
    pub fn forward(&self, k: usize, x: &Tensor) -> Tensor {
        let [a, b] = self.factors(k);
        x.matmul(&a.t()).matmul(&b).scale(self.scale)
    }
}

/// `W[i, j] + d[j mod r, i]`, with `W [out, in]` usually frozen and `d [r, out]` trained.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Miss, Site};
/// let w = Tensor::zeros(&gpu, [2, 4]); // [out, in]
/// let d = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]); // [r, out]
/// let site = Miss::new(&w, &d);
/// assert_eq!(site.expand().to_vec2::<f32>()?, [[1.0, 3.0, 1.0, 3.0], [2.0, 4.0, 2.0, 4.0]]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Miss {
    weight: Tensor,
    shard: Tensor,
}

impl Miss {
    /// Makes the site of a weight and its shard.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub fn new(weight: &Tensor, shard: &Tensor) -> Miss {
        let (w, d) = (weight.shape(), shard.shape());
        let fits = w.len() == 2 && d.len() == 2 && d[1] == w[0] && d[0] > 0 && d[0] <= w[1];
        assert!(fits, "miss: weight {w}, shard {d}; the shard must be [r, out] with r up to in");
        Miss { weight: weight.clone(), shard: shard.clone() }
    }

    /// Sums `x [rows, in]` over its blocks of r columns: `[rows, r]`.
    fn blocks(&self, x: &Tensor) -> Tensor {
        let (r, k) = (self.shard.shape()[0], x.shape()[1]);
        let blocks = k.div_ceil(r);
        x.pad(1, 0, blocks * r - k).reshape([x.shape()[0], blocks, r]).sum(1)
    }
}

impl Site for Miss {
    fn name(&self) -> &'static str {
        "miss"
    }

    fn size(&self) -> [usize; 2] {
        [self.weight.shape()[0], self.weight.shape()[1]]
    }

    fn leaves(&self) -> Vec<Tensor> {
        vec![self.weight.clone(), self.shard.clone()]
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &["weight", "shard"]
    }

    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(Miss::new(&leaves[0], &leaves[1]))
    }

    fn load(&self) -> Load {
        let [rows, columns] = self.size().map(|v| v as u32);
        let tensors = vec![("theta", dense(&self.weight)), ("shard", dense(&self.shard))];
        Load::new("site_miss", tensors, [rows, columns, self.shard.shape()[0] as u32, 0])
    }

    /// `dd[j, i] = sum over columns c = j mod r of dW[i, c]`
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        if grads.needs(1) {
            grads.add(1, self.blocks(dw).t().contiguous());
        }
        grads.add(0, dw.clone());
    }

    /// Avoids storing `dW`: `dd = (sum of blocks of x)^T dy`.
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        if grads.needs(1) {
            let x = self.blocks(&x.cast(crate::DType::F32));
            grads.add_outer(1, &x, dy);
        }
        grads.add_outer(0, dy, x);
    }
}

/// Returns `W' = W + W_blocks B + B`. `weight [out, in]` is taken in blocks of `r x r`. `blocks [out / r, r, r]`,
/// initially zero, has one block for each row of blocks. The result is the weight to use, and is tracked if `blocks` is.
///
/// # Panics
/// When r does not divide both sides of the weight.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::block_affine;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]); // one block of 2 x 2
/// let b = Tensor::from_slice(&gpu, &[1f32, 0.0, 0.0, 1.0], [1, 2, 2]); // the identity
/// assert_eq!(block_affine(&w, &b).to_vec2::<f32>()?, [[3.0, 4.0], [6.0, 9.0]]); // W + W + 1
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[track_caller]
pub fn block_affine(weight: &Tensor, blocks: &Tensor) -> Tensor {
    let (w, b) = (weight.shape(), blocks.shape());
    let fits = w.len() == 2
        && b.len() == 3
        && b[1] == b[2]
        && b[1] > 0
        && b[0] * b[1] == w[0]
        && w[1].is_multiple_of(b[1]);
    assert!(fits, "block_affine: weight {w}, blocks {b}; they must be [n r, k r] and [n, r, r]");
    let [n, r, k] = [b[0], b[1], w[1] / b[1]];
    let parts = weight.reshape([n, r, k, r]).permute([0, 2, 1, 3]);
    let moved = parts.matmul(&blocks.unsqueeze(1)).add(&blocks.unsqueeze(1));
    weight.add(&moved.permute([0, 2, 1, 3]).reshape([w[0], w[1]]))
}

pub(super) fn cases() -> Vec<Case> {
    let linear64 = |x: &Array, w: &Array| {
        let (n, k) = (w.shape[0], w.shape[1]);
        Array::from_fn([x.shape[0], n], |i| {
            (0..k).map(|q| x.data[i / n * k + q] * w.data[i % n * k + q]).sum()
        })
    };
    let mut all = Vec::new();
    for (rows, n, k, r) in [(3, 4, 8, 4), (5, 7, 10, 3), (67, 5, 8, 8)] {
        let inputs = vec![Input::normal([rows, k]), Input::normal([n, k]), Input::normal([r, n])];
        let forward = |x: &[Tensor]| {
            let site = Miss::new(&x[1], &x[2]).shared();
            x[0].linear(&site, Epilogue::default())
        };
        let reference = move |x: &[Array]| {
            let w = Array::from_fn([n, k], |i| x[1].data[i] + x[2].data[i % k % r * n + i / k]);
            linear64(&x[0], &w)
        };
        all.push(Case::new(format!("miss {rows} {n} {k} {r}"), inputs, forward, reference).ulps(16.0, 32.0));
    }
    let inputs = vec![Input::normal([4, 6]), Input::normal([2, 2, 2])];
    all.push(
        Case::new(
            "block affine",
            inputs,
            |x| block_affine(&x[0], &x[1]),
            |x| {
                let (w, b) = (&x[0].data, &x[1].data);
                Array::from_fn([4, 6], |i| {
                    let (row, col) = (i / 6, i % 6);
                    let (n, block, j) = (row / 2, col / 2, col % 2);
                    let moved: f64 = (0..2).map(|q| w[row * 6 + 2 * block + q] * b[n * 4 + q * 2 + j]).sum();
                    w[i] + moved + b[n * 4 + row % 2 * 2 + j]
                })
            },
        )
        .ulps(16.0, 32.0),
    );
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
