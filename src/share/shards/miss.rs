//! One shard that is repeated over a weight.

use crate::dtype::DType;
use crate::ops::case::{Array, Case, Input};
use crate::ops::product::matmul::Epilogue;
use crate::share::base::Base;
use crate::share::tied::{dense, linear64};
use crate::share::{LeafGrads, Load, Site, Tied};
use crate::tensor::Tensor;
use std::sync::Arc;

/// `W[i, j] + d[j mod r, i mod m]`, with `W [out, in]` usually frozen and the shard `d [r, m]` trained, initially zero.
///
/// With `m = out` it is the usual form. With a smaller `m`, which divides `out`, it is the one that PEFT calls "mini". The last
/// block is cut off where r does not divide `in`. There is no constant factor.
///
/// Source: MiSS, arXiv 2409.15371, as in PEFT 0.21.
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
    base: Base,
    shard: Tensor,
}

impl Miss {
    /// Makes the site of a weight and its shard.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub fn new(weight: &Tensor, shard: &Tensor) -> Miss {
        Miss::over(&Tied::new(weight).shared(), shard)
    }

    /// Adds the shard to a weight of any kind, such as a packed one.
    ///
    /// A stored and a packed weight are read in the same load as the shard. Any other is written down for each product.
    ///
    /// # Panics
    /// When the shapes do not fit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Miss, Packed, Packing, Scales, Site};
    /// let packing = Packing::new(4, 16, Scales::Affine)?;
    /// let base = Packed::new(&gpu, packing, [2, 16], &vec![0; 2 * packing.row_words(16)])?.shared(); // zeros
    /// let weight = Miss::over(&base, &Tensor::ones(&gpu, [4, 1])); // repeated over both outputs
    /// assert_eq!(weight.expand().to_vec::<f32>()?, [1.0; 32]);
    /// assert_eq!(weight.leaf_names(), ["shard"]); // the packed weight is frozen
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn over(base: &Arc<dyn Site>, shard: &Tensor) -> Miss {
        let ([out, inner], d) = (base.size(), shard.shape());
        let fits = d.len() == 2 && d[0] > 0 && d[0] <= inner && d[1] > 0 && out.is_multiple_of(d[1]);
        assert!(
            fits,
            "miss: weight [{out}, {inner}], shard {d}; the shard must be [r, m] with r up to in, and m a divisor of out"
        );
        Miss { base: Base(base.clone()), shard: shard.clone() }
    }

    /// Sums `x [rows, columns]` over its blocks of r columns: `[rows, r]`. The last block may be cut off.
    fn blocks(x: &Tensor, r: usize) -> Tensor {
        let columns = x.shape()[1];
        let blocks = columns.div_ceil(r);
        x.pad(1, 0, blocks * r - columns).reshape([x.shape()[0], blocks, r]).sum(1)
    }
}

impl Site for Miss {
    fn name(&self) -> &'static str {
        "miss"
    }

    fn size(&self) -> [usize; 2] {
        self.base.0.size()
    }

    fn leaves(&self) -> Vec<Tensor> {
        self.base.leaves([&self.shard])
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        self.base.names(&["shard"])
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.base.0.buffers()
    }

    fn with_tensors(&self, leaves: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site> {
        let (base, [own, _]) = self.base.split(leaves, buffers);
        Arc::new(Miss::over(&base.0, &own[0]))
    }

    fn load(&self) -> Load {
        let [r, m] = [self.shard.shape()[0], self.shard.shape()[1]].map(|n| n as u32);
        self.base.load().with_private("private_miss", [("shard", dense(&self.shard))], [r, m], 0)
    }

    fn is_compact(&self) -> bool {
        self.base.0.is_compact()
    }

    fn apart(&self, x: &Tensor) -> Option<(Arc<dyn Site>, Tensor)> {
        let ([r, m], out) = ([self.shard.shape()[0], self.shard.shape()[1]], self.size()[0]);
        let (rows, y) = (x.shape()[0], Miss::blocks(x, r).matmul(&self.shard.detach()));
        Some((self.base.0.clone(), y.unsqueeze(1).expand([rows, out / m, m]).reshape([rows, out])))
    }

    /// `dd[j, i] = sum of dW over the rows that are i mod m and the columns that are j mod r`
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        let first = self.base.first();
        if grads.needs(first) {
            let [r, m] = [self.shard.shape()[0], self.shard.shape()[1]];
            let columns = Miss::blocks(dw, r).t();
            grads
                .add(first, if m < dw.shape()[0] { Miss::blocks(&columns, m) } else { columns.contiguous() });
        }
        self.base.reduce(dw, grads);
    }

    /// Avoids storing `dW`: `dd = (sum of blocks of x)^T (sum of blocks of dy)`.
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        let first = self.base.first();
        if grads.needs(first) {
            let [r, m] = [self.shard.shape()[0], self.shard.shape()[1]];
            let x = Miss::blocks(&x.cast(DType::F32), r);
            if m < dy.shape()[1] {
                grads.add_outer(first, &x, &Miss::blocks(&dy.cast(DType::F32), m));
            } else {
                grads.add_outer(first, &x, dy);
            }
        }
        self.base.backward(x, dy, grads);
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (rows, n, k, r, m) in
        [(3, 4, 8, 4, 4), (5, 7, 10, 3, 7), (67, 5, 8, 8, 5), (6, 9, 11, 2, 3), (5, 6, 7, 5, 1)]
    {
        let inputs = vec![Input::normal([rows, k]), Input::normal([n, k]), Input::normal([r, m])];
        let forward = |x: &[Tensor]| {
            let site = Miss::new(&x[1], &x[2]).shared();
            x[0].linear(&site, Epilogue::default())
        };
        let reference = move |x: &[Array]| {
            let w = Array::from_fn([n, k], |i| x[1].data[i] + x[2].data[i % k % r * m + i / k % m]);
            linear64(&x[0], &w)
        };
        let name =
            if m == n { format!("miss {rows} {n} {k} {r}") } else { format!("miss {rows} {n} {k} {r} {m}") };
        all.push(Case::new(name, inputs, forward, reference).ulps(16.0, 32.0));
    }
    all
}
