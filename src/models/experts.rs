//! A mixture of experts: several MLPs, of which each token uses the best few.
//!
//! Sources: "Go Wider Instead of Deeper" (WideNet), arXiv 2107.11817, whose depths share one such layer and have norms of their own;
//! balance loss: Switch transformers, arXiv 2101.03961.

use crate::dtype::DType;
use crate::nn::{Mlp, Module, Visit, VisitMut};
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::tensor::Tensor;
use std::sync::Arc;

/// A set of experts. Each token uses the `top` best of them.
#[derive(Clone, Debug)]
pub struct Experts {
    /// `[experts, width]`
    pub router: Arc<dyn Site>,
    /// The experts, whose layers have no biases.
    pub experts: Vec<Mlp>,
    /// Number of experts per token.
    pub top: usize,
    /// Rows that an expert takes in training, as a multiple of its even share `rows * top / experts`. A full expert skips later
    /// tokens. At evaluation every token has its experts, so that what a token becomes does not depend on others.
    pub capacity: f32,
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
    /// Passes `x [rows, width]` through the experts. Gradients treat the choice as constant and flow through the gates, which are the
    /// chosen probabilities of the softmax over all experts.
    ///
    /// `training` brings the capacity, and draws normal numbers of deviation `1 / experts` that are added to the router's scores, so
    /// that experts that are nearly as good get tokens too.
    ///
    /// # Panics
    /// When `top` is 0 or above the number of experts.
    #[track_caller]
    pub fn forward(&self, x: &Tensor, training: Option<&mut Rng>) -> Routed {
        let (gpu, rows, count) = (x.gpu(), x.shape()[0], self.experts.len());
        assert!(self.top > 0 && self.top <= count, "experts: the {} best of {count}", self.top);
        let capacity = match training {
            // Rounding in f64 keeps whole products whole.
            Some(_) => (rows * self.top) as f64 / count as f64 * f64::from(self.capacity),
            None => rows as f64,
        };
        let capacity = (capacity.ceil() as usize).clamp(1, rows);
        let scores = x.linear(&self.router, Default::default());
        let scores = match training {
            Some(rng) => scores.add(&Tensor::randn(gpu, *scores.shape(), rng).scale(1.0 / count as f32)),
            None => scores,
        };
        let p = scores.softmax(-1);
        let (_, best) = p.detach().topk(self.top, 1);
        let experts = Tensor::positions(gpu, count).reshape([1, 1, count]);
        let chosen = best.unsqueeze(2).eq(&experts).cast(DType::F32).sum(1);
        let gates = p.mul(&chosen);
        let share = chosen.mean(0).scale(1.0 / self.top as f32);
        let balance_loss = share.mul(&p.mean(0)).sum_all().scale(count as f32);

        // Earlier tokens have higher priority. 0 means that a token did not choose the expert.
        let order: Vec<f32> = (0..rows).map(|i| (rows - i) as f32).collect();
        let priority = chosen.mul(&Tensor::from_slice(gpu, &order, [rows, 1]));
        let nobody = Tensor::from_slice(gpu, &vec![rows as u32; capacity], [capacity]);
        let mut output = Tensor::zeros(gpu, *x.shape());
        let mut lists = Vec::new();
        for (e, mlp) in self.experts.iter().enumerate() {
            let (value, row) = priority.slice(1, e..e + 1).reshape([rows]).topk(capacity, 0);
            let taken = value.gt(&Tensor::zeros(gpu, [capacity]));
            let list = row.where_mask(&taken, &nobody).contiguous();
            let gate = gates.slice(1, e..e + 1).reshape([rows]).gather_padded(0, &list);
            let up = x.linear_gathered(&list, &mlp.up.weight);
            let hidden = match &mlp.gate {
                Some(own) => mlp.activation.apply(&x.linear_gathered(&list, &own.weight)).mul(&up),
                None => mlp.activation.apply(&up),
            };
            output = output.add_linear_scattered(&hidden, &list, &gate, &mlp.down.weight);
            lists.push(list);
        }
        Routed { output, balance_loss, rows: lists }
    }
}

/// The experts are named by their numbers: `0.up.weight`.
impl Module for Experts {
    fn visit(&self, visit: &mut Visit) {
        visit.field("router", &self.router);
        visit.field("", &self.experts);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.router);
        visit.field(&mut self.experts);
    }
}
