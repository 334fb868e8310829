//! Sliced recursive transformer: a block applied several times, with attention inside groups of tokens.
//!
//! Every residual has two learned scalars, `c1 x + c2 f(norm(x))`. After every application comes a small projection of
//! its own, `a x + b mlp(norm(x))`. Attention sees only a group of neighbours. From the second application on, the tokens
//! are in a random order, which is undone afterwards, so that other tokens meet in a group. Source: arXiv 2111.05297.

use crate::gpu::Gpu;
use crate::nn::{
    Activation, Attention, Block, Init, Linear, Mask, Mlp, Module, Norm, Visit, VisitMut, module,
};
use crate::rng::Rng;
use crate::tensor::Tensor;

/// The projection that follows an application of the block.
pub struct Projection {
    /// `a` and `b`: `[2]`, initially 1.
    pub scales: Tensor,
    /// Before the MLP.
    pub norm: Norm,
    /// A small MLP.
    pub mlp: Mlp,
}

/// One application of the block, with its own scalars and projection.
pub struct Application {
    /// `c1, c2` of the attention residual, then of the MLP residual: `[4]`, initially 1.
    pub scales: Tensor,
    /// Follows the block.
    pub projection: Projection,
    /// Number of groups of tokens. Attention stays within a group.
    pub groups: usize,
}

/// A block and its applications.
pub struct Sliced {
    /// The block, with the same weights at every application.
    pub block: Block,
    /// The applications in order.
    pub applications: Vec<Application>,
}

/// Returns element `i` of `scales`, in a shape to multiply with.
fn scalar(scales: &Tensor, i: usize) -> Tensor {
    scales.slice(0, i..i + 1).reshape([1, 1, 1])
}

/// `c[i] x + c[i + 1] y`
fn residual(scales: &Tensor, i: usize, x: &Tensor, y: &Tensor) -> Tensor {
    x.mul(&scalar(scales, i)).add(&y.mul(&scalar(scales, i + 1)))
}

impl Sliced {
    /// Makes a block of this width that is applied once for each entry of `groups`.
    ///
    /// # Panics
    /// When `heads` does not divide the width, or there is no application.
    #[track_caller]
    pub fn new(
        gpu: &Gpu,
        width: usize,
        heads: usize,
        hidden: usize,
        groups: &[usize],
        rng: &mut Rng,
    ) -> Sliced {
        assert!(heads > 0 && width.is_multiple_of(heads), "sliced: {heads} heads for width {width}");
        assert!(
            !groups.is_empty() && !groups.contains(&0),
            "sliced: groups {groups:?}; one number an application"
        );
        let std = (0.4 / width as f32).sqrt();
        let mut linear = |inner, out| Linear::new(gpu, inner, out, false, Init::Normal(std), rng);
        let [q, k, v, o] = [0; 4].map(|_| linear(width, width));
        let mlp = |up, down| Mlp { gate: None, up, down, activation: Activation::GeluTanh };
        let block = Block {
            norm1: Norm::layer(gpu, width, 1e-5),
            attention: Attention { q, k, v, o, heads, kv_heads: heads },
            norm2: Norm::layer(gpu, width, 1e-5),
            mlp: mlp(linear(width, hidden), linear(hidden, width)),
        };
        let ones = |n: usize| Tensor::ones(gpu, [n]).requires_grad();
        let applications = groups
            .iter()
            .map(|&groups| Application {
                scales: ones(4),
                projection: Projection {
                    scales: ones(2),
                    norm: Norm::layer(gpu, width, 1e-5),
                    mlp: mlp(linear(width, width), linear(width, width)),
                },
                groups,
            })
            .collect();
        Sliced { block, applications }
    }

    /// Returns `x [batch, tokens, width]` after all applications. The first sees the tokens in their order. Each later
    /// one with several groups sees them in a random order drawn from `rng`, which is undone afterwards.
    ///
    /// # Panics
    /// When an application's groups do not divide the tokens.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, rng: &mut Rng) -> Tensor {
        let tokens = x.shape()[1];
        let mut x = x.clone();
        for (i, application) in self.applications.iter().enumerate() {
            if i == 0 || application.groups == 1 {
                x = self.apply(application, &x);
                continue;
            }
            let mut order: Vec<u32> = (0..tokens as u32).collect();
            rng.shuffle(&mut order);
            let mut back = vec![0u32; tokens];
            order.iter().enumerate().for_each(|(to, &from)| back[from as usize] = to as u32);
            let [order, back] = [order, back].map(|list| Tensor::from_slice(x.gpu(), &list, [tokens]));
            x = self.apply(application, &x.index_select(1, &order)).index_select(1, &back);
        }
        x
    }

    /// Applies the block once, to tokens in the given order.
    #[track_caller]
    pub fn apply(&self, application: &Application, x: &Tensor) -> Tensor {
        let (block, shape, groups) = (&self.block, *x.shape(), application.groups);
        let [batch, tokens, width] = [shape[0], shape[1], shape[2]];
        assert!(tokens.is_multiple_of(groups), "sliced: {groups} groups of {tokens} tokens");
        let sliced = block.norm1.forward(x).reshape([batch * groups, tokens / groups, width]);
        let y = block.attention.forward(&sliced, &Mask::None, None).reshape(shape);
        let x = residual(&application.scales, 0, x, &y);
        let y = block.mlp.forward(&block.norm2.forward(&x), None);
        let x = residual(&application.scales, 2, &x, &y);
        let Projection { scales, norm, mlp } = &application.projection;
        residual(scales, 0, &x, &mlp.forward(&norm.forward(&x), None))
    }
}

impl Module for Sliced {
    fn visit(&self, visit: &mut Visit) {
        visit.field("block", &self.block);
        for (i, application) in self.applications.iter().enumerate() {
            visit.field(&format!("applications.{i}"), application);
            // The block's weights are used once more.
            if i > 0 {
                visit.field(&format!("applications.{i}.block"), &self.block);
            }
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.block);
        visit.field(&mut self.applications);
    }
}

module!(Application { scales, projection, groups: _ });
module!(Projection { scales, norm, mlp });
