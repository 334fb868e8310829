//! Weights that are Kronecker products, as a sharing kind outside of Tiebeam.
//!
//! `W = A (x) B`, so `W[i, j] = A[i / p, j / q] B[i mod p, j mod q]` with `A [a, c]`, `B [p, q]` and `W [a p, c q]`. A matrix of
//! 512 x 512 from two of 16 x 32 and 32 x 16 stores 1 number in 256. Source: hypercomplex layers, arXiv 2102.08597, whose weights
//! are sums of such products.
//!
//! What the kind needs is this file and `kronecker.wgsl`: how a weight is read, and its adjoint. Products fused with the load,
//! gradients, files, optimizers and models come from the library.

use std::sync::Arc;
use tiebeam::models::sharing::{Matrix, Recipe, Sharing, Sites, Stack};
use tiebeam::nn::Init;
use tiebeam::share::{LeafGrads, Load, Site};
use tiebeam::{Error, Gpu, Result, Rng, Tensor};

/// `W = A (x) B`.
#[derive(Clone)]
pub struct Kronecker {
    a: Tensor,
    b: Tensor,
}

impl Kronecker {
    /// Makes the site of two matrices of floats.
    ///
    /// # Panics
    /// When one is no matrix.
    #[track_caller]
    pub fn new(a: &Tensor, b: &Tensor) -> Kronecker {
        let fits = [a, b].iter().all(|x| x.shape().len() == 2 && x.dtype().is_float() && x.count() > 0);
        assert!(fits, "kronecker: needs two matrices of floats, got {} and {}", a.shape(), b.shape());
        Kronecker { a: a.clone(), b: b.clone() }
    }

    /// Draws both factors, so that the weight `[out, in]` has the standard deviation `std`. `B` is `[p, q]`.
    ///
    /// # Errors
    /// [`Error::Config`] when p does not divide `out`, or q does not divide `in`.
    pub fn random(
        gpu: &Gpu,
        [out, inner]: [usize; 2],
        [p, q]: [usize; 2],
        std: f32,
        rng: &mut Rng,
    ) -> Result<Kronecker> {
        if p == 0 || q == 0 || !out.is_multiple_of(p) || !inner.is_multiple_of(q) {
            let message = format!("kronecker: blocks of {p} x {q} do not divide [{out}, {inner}]");
            return Err(Error::config(message));
        }
        // The product of two independent numbers has the product of their variances.
        let init = Init::Normal(std.sqrt());
        let a = init.leaf(gpu, [out / p, inner / q], rng);
        Ok(Kronecker::new(&a, &init.leaf(gpu, [p, q], rng)))
    }

    /// `[a, c, p, q]`
    fn sizes(&self) -> [usize; 4] {
        let (a, b) = (self.a.shape(), self.b.shape());
        [a[0], a[1], b[0], b[1]]
    }
}

impl Site for Kronecker {
    fn name(&self) -> &'static str {
        "kronecker"
    }

    fn size(&self) -> [usize; 2] {
        let [a, c, p, q] = self.sizes();
        [a * p, c * q]
    }

    fn leaves(&self) -> Vec<Tensor> {
        vec![self.a.clone(), self.b.clone()]
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &["kronecker_a", "kronecker_b"]
    }

    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(Kronecker::new(&leaves[0], &leaves[1]))
    }

    fn load(&self) -> Load {
        let [.., p, q] = self.sizes().map(|n| n as u32);
        let tensors = [("a", &self.a), ("b", &self.b)];
        Load::wgsl("kronecker", include_str!("kronecker.wgsl"), &tensors, self.size(), [p, q])
    }

    /// `dA[r, s] = sum over u, v of dW[r p + u, s q + v] B[u, v]`, and `dB` likewise with `A`. In the order `[a c, p q]` of the
    /// gradient both are one product.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        let [a, c, p, q] = self.sizes();
        let blocks = dw.reshape([a, p, c, q]).permute([0, 2, 1, 3]).reshape([a * c, p * q]);
        if grads.needs(0) {
            let b = self.b.detach().reshape([p * q, 1]);
            grads.add(0, blocks.matmul(&b).reshape([a, c]));
        }
        if grads.needs(1) {
            let a = self.a.detach().reshape([1, a * c]);
            grads.add(1, a.matmul(&blocks).reshape([p, q]));
        }
    }
}

/// Every matrix of every depth is a Kronecker product of its own, with blocks of `block x block`.
pub struct Recipes {
    /// Rows and columns of `B`.
    pub block: usize,
}

impl Recipes {
    /// Lets models and files name this kind: `kronecker 8`.
    pub fn register() {
        Sharing::register("kronecker", |words| {
            let block = match words {
                [block] => block.parse().ok(),
                _ => None,
            };
            let wrong = || Error::config("write `kronecker 8`, with the rows and columns of B");
            block.map(|block| Sharing::new(Recipes { block })).ok_or_else(wrong)
        });
    }
}

impl Recipe for Recipes {
    fn text(&self) -> String {
        format!("kronecker {}", self.block)
    }

    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let mut made = Sites::default();
        for _ in 0..stack.depth {
            let mut site = |matrix: &Matrix| -> Result<Arc<dyn Site>> {
                let block = [self.block, self.block];
                Ok(Kronecker::random(gpu, matrix.size, block, matrix.std, rng)?.shared())
            };
            made.by_depth.push(stack.matrices.iter().map(&mut site).collect::<Result<_>>()?);
        }
        Ok(made)
    }
}
