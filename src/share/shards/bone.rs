//! Blocks by which the blocks of a weight are multiplied.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::case::{Array, Case, Input};
use crate::ops::product::matmul::Epilogue;
use crate::precision::{Precision, autocast};
use crate::share::base::Base;
use crate::share::tied::{dense, linear64};
use crate::share::{LeafGrads, Load, Site, Tied};
use crate::tensor::Tensor;
use std::sync::Arc;

/// `W' = W + W_blocks B + B`: `W [out, in]`, usually frozen, is taken in blocks of `r x r`. `B [out / r, r, r]`, initially zero, has
/// one block for each row of blocks: `W'[n, c] = W[n, c] + W[n, c] B[n] + B[n]`, where `[n, c]` is a block. PEFT has it as MiSS with
/// the weights "bat".
///
/// In a product the weight is written down, since each of its elements is a sum over r others.
///
/// Source: Bone, arXiv 2409.15371, as in PEFT 0.21.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Bone, Site};
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]); // one block of 2 x 2
/// let b = Tensor::from_slice(&gpu, &[1f32, 0.0, 0.0, 1.0], [1, 2, 2]).requires_grad(); // the identity
/// let site = Bone::new(&w, &b);
/// assert_eq!(site.leaf_names(), ["weight", "blocks"]);
/// assert_eq!(site.expand().to_vec2::<f32>()?, [[3.0, 4.0], [6.0, 9.0]]); // W + W + 1
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Bone {
    base: Base,
    blocks: Tensor,
}

impl Bone {
    /// Makes the site of a weight and its blocks.
    ///
    /// # Panics
    /// When r does not divide both sides of the weight, or there is not one block for each row of blocks.
    #[track_caller]
    pub fn new(weight: &Tensor, blocks: &Tensor) -> Bone {
        Bone::made(Base(Tied::new(weight).shared()), blocks)
    }

    /// Multiplies the blocks of a weight of any kind that is not packed. Leaves of that weight get their gradients.
    ///
    /// # Errors
    /// [`Error::Config`] when the weight is kept in a compact form, as packed ones are: all of it would be unpacked for each product.
    ///
    /// # Panics
    /// As [`Bone::new`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Bone, Packed, Packing, Scales, Site, Tied};
    /// let blocks = Tensor::zeros(&gpu, [1, 2, 2]).requires_grad();
    /// let weight = Tied::new(&Tensor::ones(&gpu, [2, 16])).shared();
    /// assert_eq!(Bone::over(&weight, &blocks)?.expand().to_vec::<f32>()?, [1.0; 32]);
    /// let packing = Packing::new(4, 16, Scales::Affine)?;
    /// let packed = Packed::new(&gpu, packing, [2, 16], &vec![0; 2 * packing.row_words(16)])?.shared();
    /// assert!(Bone::over(&packed, &blocks).is_err());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn over(base: &Arc<dyn Site>, blocks: &Tensor) -> Result<Bone> {
        if base.is_compact() {
            return Err(Error::config(format!(
                "bone: it multiplies the elements of the weight, and one of the kind {} would be unpacked as a whole for each \
                 product; add Miss or LowRank to it instead",
                base.name()
            )));
        }
        Ok(Bone::made(Base(base.clone()), blocks))
    }

    #[track_caller]
    fn made(base: Base, blocks: &Tensor) -> Bone {
        let ([out, inner], b) = (base.0.size(), blocks.shape());
        let fits = b.len() == 3
            && b[1] == b[2]
            && b[1] > 0
            && b[0] * b[1] == out
            && inner.is_multiple_of(b[1])
            && blocks.dtype().is_float();
        assert!(fits, "bone: weight [{out}, {inner}], blocks {b}; they must be [n r, k r] and [n, r, r]");
        Bone { base, blocks: blocks.clone() }
    }

    /// Rows of blocks, the side of a block, and columns of blocks.
    fn counts(&self) -> [usize; 3] {
        let [n, r] = [self.blocks.shape()[0], self.blocks.shape()[1]];
        [n, r, self.size()[1] / r]
    }

    /// The rows of all blocks `[n, r k, r]` of a matrix `[n r, k r]`: its elements as they lie.
    fn rows(&self, w: &Tensor) -> Tensor {
        let [n, r, k] = self.counts();
        w.reshape([n, r * k, r])
    }

    /// The weight without what this site does to it.
    fn plain(&self) -> Tensor {
        dense(&self.base.0.stored().unwrap_or_else(|| self.base.0.expand()))
    }
}

impl Site for Bone {
    fn name(&self) -> &'static str {
        "bone"
    }

    fn size(&self) -> [usize; 2] {
        self.base.0.size()
    }

    fn leaves(&self) -> Vec<Tensor> {
        self.base.leaves([&self.blocks])
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        self.base.names(&["blocks"])
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.base.0.buffers()
    }

    fn with_tensors(&self, leaves: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site> {
        let (base, [own, _]) = self.base.split(leaves, buffers);
        Arc::new(Bone::made(base, &own[0]))
    }

    fn load(&self) -> Load {
        Load::stored(self.expand())
    }

    /// Computed in f32 in every scope, because the weight is added to a product with itself.
    fn expand_as(&self, dtype: DType) -> Tensor {
        let ([out, inner], [n, r, k]) = (self.size(), self.counts());
        let (w, b) = (self.plain(), dense(&self.blocks));
        let moved = autocast(Precision::F32, || self.rows(&w).matmul(&b));
        let moved = moved.reshape([n, r, k, r]).add(&b.unsqueeze(2));
        w.add(&moved.reshape([out, inner])).cast(dtype)
    }

    /// `dB[n] = sum over c of W[n, c]^T dW'[n, c] + dW'[n, c]` and `dW[n, c] = dW'[n, c] + dW'[n, c] B[n]^T`, with blocks `[n, c]`.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        let ([out, inner], [n, r, k]) = (self.size(), self.counts());
        let (first, rows) = (self.base.first(), self.rows(dw));
        if grads.needs(first) {
            let moved = self.rows(&self.plain()).t().matmul(&rows);
            grads.add(first, moved.add(&dw.reshape([n, r, k, r]).sum(2)));
        }
        if (0..first).any(|i| grads.needs(i)) {
            let moved = rows.matmul(&dense(&self.blocks).t()).reshape([out, inner]);
            self.base.reduce(&dw.add(&moved), grads);
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (rows, n, k, r) in [(3, 4, 6, 2), (5, 6, 12, 3), (70, 8, 4, 4), (2, 5, 3, 1)] {
        let inputs = vec![Input::normal([rows, k]), Input::normal([n, k]), Input::normal([n / r, r, r])];
        let forward = |x: &[Tensor]| x[0].linear(&Bone::new(&x[1], &x[2]).shared(), Epilogue::default());
        let reference = move |x: &[Array]| {
            let (w, b) = (&x[1].data, &x[2].data);
            let w = Array::from_fn([n, k], |i| {
                let (row, col) = (i / k, i % k);
                let (first, block, j) = (col / r * r, row / r * r * r, col % r);
                let moved: f64 = (0..r).map(|q| w[row * k + first + q] * b[block + q * r + j]).sum();
                w[i] + moved + b[block + row % r * r + j]
            });
            linear64(&x[0], &w)
        };
        all.push(Case::new(format!("bone {rows} {n} {k} {r}"), inputs, forward, reference).ulps(16.0, 32.0));
    }
    all
}
