//! WideNet: all depths share one attention layer and one mixture-of-experts layer. Each depth has its own norms.
//!
//! Source: "Go Wider Instead of Deeper", arXiv 2107.11817. Balance loss: Switch transformers, arXiv 2101.03961.

use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::nn::{Activation, Attention, Init, Linear, Mask, Module, Norm, Visit, VisitMut, module};
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::Tied;
use crate::tensor::Tensor;
use std::sync::Arc;

/// A set of experts. Each token uses the `top` best of them.
pub struct Experts {
    /// `[experts, width]`
    pub router: Tensor,
    /// `[hidden, width]` and `[width, hidden]` for each expert.
    pub weights: Vec<[Arc<dyn Site>; 2]>,
    /// Number of experts per token.
    pub top: usize,
    /// Rows that an expert takes, as a multiple of its even share `rows * top / experts`. A full expert skips later
    /// tokens.
    pub capacity: f32,
    /// Applied between an expert's matrices.
    pub activation: Activation,
}

/// The result of routing.
pub struct Routed {
    /// `[rows, width]`: the gated sum of the experts' results.
    pub output: Tensor,
    /// `experts * sum_e f_e P_e`, where `f` is the share of choices and `P` the mean probability of each expert: 1 if all
    /// are used alike, up to the number of experts if one is always chosen.
    pub balance_loss: Tensor,
    /// Rows that each expert was given, padded with the number of rows: `[capacity]` of u32.
    pub rows: Vec<Tensor>,
}

impl Experts {
    /// Makes `count` experts, drawn from `rng`.
    ///
    /// # Panics
    /// When `top` is 0 or above `count`.
    #[track_caller]
    pub fn new(gpu: &Gpu, [width, hidden]: [usize; 2], [count, top]: [usize; 2], rng: &mut Rng) -> Experts {
        assert!(top > 0 && top <= count, "experts: the {top} best of {count}");
        let std = (0.4 / width as f32).sqrt();
        let mut site =
            |size| -> Arc<dyn Site> { Tied::new(&Init::Normal(std).leaf(gpu, size, rng)).shared() };
        let weights = (0..count).map(|_| [site([hidden, width]), site([width, hidden])]).collect();
        let router = Init::Normal(std).leaf(gpu, [count, width], rng);
        Experts { router, weights, top, capacity: 1.25, activation: Activation::GeluTanh }
    }

    /// Passes `x [rows, width]` through the experts. Gradients treat the choice as constant and flow through the gates:
    /// the chosen probabilities, divided by their sum if `top` is above 1.
    ///
    /// In training, `noise` draws normal numbers of deviation `1 / experts` that are added to the router's scores, so
    /// that experts that are nearly as good get tokens too.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, noise: Option<&mut Rng>) -> Routed {
        let (gpu, rows, count) = (x.gpu(), x.shape()[0], self.weights.len());
        let scores = x.matmul(&self.router.t());
        let scores = match noise {
            Some(rng) => scores.add(&Tensor::randn(gpu, *scores.shape(), rng).scale(1.0 / count as f32)),
            None => scores,
        };
        let p = scores.softmax(-1);
        let (_, best) = p.detach().topk(self.top, 1);
        let experts = Tensor::positions(gpu, count).reshape([1, 1, count]);
        let chosen = best.unsqueeze(2).eq(&experts).cast(DType::F32).sum(1);
        let gates = p.mul(&chosen);
        let gates = if self.top > 1 { gates.div(&gates.sum(1).unsqueeze(1)) } else { gates };
        let share = chosen.mean(0).scale(1.0 / self.top as f32);
        let balance_loss = share.mul(&p.mean(0)).sum_all().scale(count as f32);

        let capacity = ((rows * self.top) as f32 / count as f32 * self.capacity).ceil() as usize;
        let capacity = capacity.clamp(1, rows);
        // Earlier tokens have higher priority. 0 means that a token did not choose the expert.
        let order: Vec<f32> = (0..rows).map(|i| (rows - i) as f32).collect();
        let priority = chosen.mul(&Tensor::from_slice(gpu, &order, [rows, 1]));
        let nobody = Tensor::from_slice(gpu, &vec![rows as u32; capacity], [capacity]);
        let mut output = Tensor::zeros(gpu, *x.shape());
        let mut lists = Vec::new();
        for (e, [up, down]) in self.weights.iter().enumerate() {
            let (value, row) = priority.slice(1, e..e + 1).reshape([rows]).topk(capacity, 0);
            let taken = value.gt(&Tensor::zeros(gpu, [capacity]));
            let list = row.where_mask(&taken, &nobody).contiguous();
            let gate = gates.slice(1, e..e + 1).reshape([rows]).gather_padded(0, &list);
            let hidden = self.activation.apply(&x.linear_gathered(&list, up));
            output = output.add_linear_scattered(&hidden, &list, &gate, down);
            lists.push(list);
        }
        Routed { output, balance_loss, rows: lists }
    }
}

impl Module for Experts {
    fn visit(&self, visit: &mut Visit) {
        visit.field("router", &self.router);
        for (e, [up, down]) in self.weights.iter().enumerate() {
            visit.field(&format!("{e}.up"), up);
            visit.field(&format!("{e}.down"), down);
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.router);
        visit.field(&mut self.weights);
    }
}

/// The shared layers, and the norms of every depth.
pub struct WideNet {
    /// Used at every depth.
    pub attention: Attention,
    /// Used at every depth.
    pub experts: Experts,
    /// The norms before attention and before the experts, for each depth.
    pub norms: Vec<[Norm; 2]>,
}

impl WideNet {
    /// Makes a model of depth `depth` that uses one attention layer of `heads` heads and one layer of experts.
    ///
    /// # Panics
    /// When `heads` does not divide the width, or a size is 0.
    #[track_caller]
    pub fn new(
        gpu: &Gpu,
        width: usize,
        heads: usize,
        depth: usize,
        experts: Experts,
        rng: &mut Rng,
    ) -> WideNet {
        assert!(
            heads > 0 && width.is_multiple_of(heads) && depth > 0,
            "widenet: {heads} heads, width {width}, depth {depth}"
        );
        let std = (0.4 / width as f32).sqrt();
        let mut linear = || Linear::new(gpu, width, width, false, Init::Normal(std), rng);
        let [q, k, v, o] = [linear(), linear(), linear(), linear()];
        let attention = Attention { q, k, v, o, heads, kv_heads: heads };
        let norms =
            (0..depth).map(|_| [Norm::layer(gpu, width, 1e-5), Norm::layer(gpu, width, 1e-5)]).collect();
        WideNet { attention, experts, norms }
    }

    /// Returns `x [batch, tokens, width]` after all depths, and the sum of their balance losses. `noise` is as in
    /// [`Experts::forward`].
    #[track_caller]
    pub fn forward(&self, x: &Tensor, mask: &Mask, mut noise: Option<&mut Rng>) -> (Tensor, Tensor) {
        let shape = *x.shape();
        let (rows, width) = (shape[0] * shape[1], shape[2]);
        let mut x = x.clone();
        let mut balance = Tensor::zeros(x.gpu(), [1]);
        for [first, second] in &self.norms {
            x = self.attention.forward(&first.forward(&x), mask, Some(&x));
            let routed =
                self.experts.forward(&second.forward(&x).reshape([rows, width]), noise.as_deref_mut());
            x = x.add(&routed.output.reshape(shape));
            balance = balance.add(&routed.balance_loss.reshape([1]));
        }
        (x, balance)
    }
}

module!(WideNet { attention, experts, norms });
