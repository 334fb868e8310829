//! One language model, whatever its depths share: token vectors, a stack of pre-norm blocks, a head.
//!
//! `x += attn(norm1(x))`, then `x += mlp(norm2(x))`, `depth` times, and `logits = norm(x) head^T`. Every linear layer is a site, so any
//! kind of sharing can supply its weight. [`LmConfig`] says what the parts are: RMS or layer norms, rotary or learned positions,
//! grouped-query attention, SwiGLU or GELU or experts, and what the depths have in common ([`Sharing`](crate::models::sharing::Sharing)).
//! Llama, Mistral, Qwen2 and SmolLM have this form ([`models::llama`](crate::models::llama) reads them), and so has GPT-2 with RMS norms.

mod config;
mod exits;
mod file;
mod make;
mod measure;
mod metadata;
mod scaling;
mod session;
mod table;

pub use config::{ExpertsConfig, LINEARS, LmConfig, MlpKind, NormKind, Positions};
pub use file::Saved;
pub use measure::{evaluate, evaluate_on};
pub use scaling::RopeScaling;
pub use session::{Session, SessionOptions};
pub use table::TokenTable;

pub(crate) use config::is_attention;

use crate::dtype::DType;
use crate::models::experts::Experts;
use crate::models::sharing::Made;
use crate::nn::{
    Activation, Attention, Block, Linear, Mask, Mlp, Module, Norm, Visit, VisitMut, module, stored,
};
use crate::ops::product::site::Site;
use crate::ops::sequence::rope::Rope;
use crate::rng::Rng;
use crate::share::Tied;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::sync::Arc;

/// What comes after attention.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "a model has one a block, and they are moved once")]
pub enum FeedForward {
    /// One MLP.
    Dense(Mlp),
    /// Several, of which each token uses the best.
    Experts(Experts),
}

/// One block, as one depth uses it.
#[derive(Clone, Debug)]
pub struct LmBlock {
    /// Before attention.
    pub norm1: Norm,
    /// Attention.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: Norm,
    /// The MLP.
    pub mlp: FeedForward,
}

impl LmBlock {
    /// The linear layers with their names in [`LINEARS`], attention's first. With experts these are attention's and then each
    /// expert's.
    pub fn linears(&self) -> Vec<(&'static str, &Linear)> {
        let a = &self.attention;
        let mut all = vec![("q", &a.q), ("k", &a.k), ("v", &a.v), ("o", &a.o)];
        let mlps = match &self.mlp {
            FeedForward::Dense(mlp) => std::slice::from_ref(mlp),
            FeedForward::Experts(experts) => &experts.experts,
        };
        for mlp in mlps {
            all.extend(mlp.gate.iter().map(|gate| ("gate", gate)));
            all.extend([("up", &mlp.up), ("down", &mlp.down)]);
        }
        all
    }

    /// The same, mutable, so that a weight can be exchanged.
    pub fn linears_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let a = &mut self.attention;
        let mut all = vec![("q", &mut a.q), ("k", &mut a.k), ("v", &mut a.v), ("o", &mut a.o)];
        let mlps = match &mut self.mlp {
            FeedForward::Dense(mlp) => std::slice::from_mut(mlp),
            FeedForward::Experts(experts) => &mut experts.experts,
        };
        for mlp in mlps {
            all.extend(mlp.gate.iter_mut().map(|gate| ("gate", gate)));
            all.extend([("up", &mut mlp.up), ("down", &mut mlp.down)]);
        }
        all
    }

    /// All weights, in the order in which recipes make them: attention's, the router of experts, the MLP's or each expert's.
    pub(crate) fn sites(&self) -> Vec<Arc<dyn Site>> {
        let mut all: Vec<Arc<dyn Site>> =
            self.linears().into_iter().map(|(_, linear)| linear.weight.clone()).collect();
        if let FeedForward::Experts(experts) = &self.mlp {
            all.insert(4, experts.router.clone());
        }
        all
    }

    /// The same, to be exchanged.
    pub(crate) fn sites_mut(&mut self) -> Vec<&mut Arc<dyn Site>> {
        let a = &mut self.attention;
        let mut all = vec![&mut a.q.weight, &mut a.k.weight, &mut a.v.weight, &mut a.o.weight];
        let mlps = match &mut self.mlp {
            FeedForward::Dense(mlp) => std::slice::from_mut(mlp),
            FeedForward::Experts(experts) => {
                all.push(&mut experts.router);
                &mut experts.experts
            }
        };
        for mlp in mlps {
            all.extend(mlp.gate.iter_mut().map(|gate| &mut gate.weight));
            all.extend([&mut mlp.up.weight, &mut mlp.down.weight]);
        }
        all
    }

    /// The linear layer of this name.
    ///
    /// # Panics
    /// When the block has none.
    #[track_caller]
    pub fn linear(&self, name: &str) -> &Linear {
        let found = self.linears().into_iter().find(|(own, _)| *own == name);
        found.unwrap_or_else(|| panic!("lm: a block has no linear layer `{name}`")).1
    }

    /// The same, mutable.
    ///
    /// # Panics
    /// When the block has none.
    #[track_caller]
    pub fn linear_mut(&mut self, name: &str) -> &mut Linear {
        let found = self.linears_mut().into_iter().find(|(own, _)| *own == name);
        found.unwrap_or_else(|| panic!("lm: a block has no linear layer `{name}`")).1
    }

    /// The block by itself, with the same leaves, which knows no positions. `None` with experts.
    pub fn dense(&self) -> Option<Block> {
        let FeedForward::Dense(mlp) = &self.mlp else { return None };
        let (norm1, attention) = (self.norm1.clone(), self.attention.clone());
        Some(Block { norm1, attention, norm2: self.norm2.clone(), mlp: mlp.clone() })
    }

    /// `x + mlp(norm2(x))`, and the balance loss of experts.
    fn feed_forward(&self, x: &Tensor, training: Option<&mut Rng>) -> (Tensor, Option<Tensor>) {
        let normed = self.norm2.forward(x);
        match &self.mlp {
            FeedForward::Dense(mlp) => (mlp.forward(&normed, Some(x)), None),
            FeedForward::Experts(experts) => {
                let width = x.shape()[x.shape().len() - 1];
                let routed = experts.forward(&normed.reshape([x.count() / width, width]), training);
                (x.add(&routed.output.reshape(*x.shape())), Some(routed.balance_loss.reshape([1])))
            }
        }
    }
}

/// The model. Blocks that share weights hold handles on the same leaves.
#[derive(Clone)]
pub struct Lm {
    /// Weights that are computed in every pass, of many blocks at once, and replace those in `blocks`.
    pub made: Vec<Made>,
    /// Sizes, kinds of parts, and what the depths share.
    pub config: LmConfig,
    /// Token vectors, and the output head if `head` is `None`.
    pub embedding: TokenTable,
    /// `[context, width]`, added to the token vectors, if positions are learned.
    pub positions: Option<Tensor>,
    /// One block per depth.
    pub blocks: Vec<LmBlock>,
    /// Before the head.
    pub norm: Norm,
    /// The output head, if it is not the table of token vectors.
    pub head: Option<Linear>,
    pub(crate) rope: Option<Rope>,
}

/// The tensors of a block that [`Lm::hidden_with`] shows, each `[batch, tokens, width]`.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct BlockOutputs<'a> {
    /// The residual stream before the block.
    pub before: &'a Tensor,
    /// The input of q, k and v.
    pub normed: &'a Tensor,
    /// The input of o.
    pub mixed: &'a Tensor,
    /// The residual stream after the block.
    pub stream: &'a Tensor,
}

/// What a pass of the stack may do besides: choose what goes on behind each block, and train.
struct Pass<'a> {
    behind: &'a mut dyn FnMut(usize, BlockOutputs) -> Tensor,
    training: Option<&'a mut Rng>,
}

impl Lm {
    /// The device that the model is on.
    pub fn gpu(&self) -> &crate::gpu::Gpu {
        self.norm.gain.gpu()
    }

    /// Returns a model that computes the same and has no leaf in common with this one. Every weight is stored in the form
    /// in which it is used. Training one model does not change the other.
    pub fn copied(&self) -> Lm {
        let linear = |l: &Linear| {
            Linear::from_site(Tied::new(&copy(&l.weight.expand())).shared(), l.bias.as_ref().map(copy))
        };
        let mut blocks = no_grad(|| self.blocks_now());
        for block in &mut blocks {
            block.norm1 = copied_norm(&block.norm1);
            block.norm2 = copied_norm(&block.norm2);
            block.linears_mut().into_iter().for_each(|(_, layer)| *layer = linear(layer));
            if let FeedForward::Experts(experts) = &mut block.mlp {
                experts.router = Tied::new(&copy(&experts.router.expand())).shared();
            }
        }
        Lm {
            made: Vec::new(),
            config: self.config.clone().sharing(crate::models::sharing::Sharing::none()),
            embedding: self.embedding.copied(copy),
            positions: self.positions.as_ref().map(copy),
            blocks,
            norm: copied_norm(&self.norm),
            head: self.head.as_ref().map(linear),
            rope: self.rope.clone(),
        }
    }

    /// Returns the blocks with weights computed from the dictionaries as they are now, each dictionary in one pass.
    pub fn blocks_now(&self) -> Vec<LmBlock> {
        let mut blocks = self.blocks.clone();
        for made in &self.made {
            for (block, site) in blocks[made.layers.clone()].iter_mut().zip(made.sites()) {
                block.linear_mut(made.matrix).weight = site;
            }
        }
        blocks
    }

    /// Returns the residual stream before the first block: token vectors, plus positions if they are learned.
    ///
    /// # Panics
    /// When there are more tokens than the context.
    #[track_caller]
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        self.embed_from(tokens, 0)
    }

    /// [`Lm::embed`] of tokens `[batch, tokens]` whose first has this place.
    #[track_caller]
    fn embed_from(&self, tokens: &Tensor, start: usize) -> Tensor {
        let (length, context) = (tokens.shape()[1], self.config.context);
        assert!(start + length <= context, "lm: {} tokens, context {context}", start + length);
        let x = self.embedding.forward(tokens);
        match &self.positions {
            None => x,
            Some(all) if length == context => stored(&x.add(all)),
            Some(all) => stored(&x.add(&all.slice(0, start..start + length))),
        }
    }

    /// Returns the residual stream before the final norm, for `tokens [batch, tokens]`.
    ///
    /// # Panics
    /// When there are more tokens than the context.
    #[track_caller]
    pub fn hidden(&self, tokens: &Tensor) -> Tensor {
        self.hidden_with(tokens, |_, _| {})
    }

    /// Returns the residual stream after each depth.
    ///
    /// # Panics
    /// As [`Lm::hidden`].
    #[track_caller]
    pub fn streams(&self, tokens: &Tensor) -> Vec<Tensor> {
        let mut all = Vec::new();
        let _ = self.hidden_with(tokens, |_, seen| all.push(seen.stream.clone()));
        all
    }

    /// [`Lm::hidden`], which also shows `see` the inner tensors of each block.
    ///
    /// # Panics
    /// As [`Lm::hidden`].
    #[track_caller]
    pub fn hidden_with(&self, tokens: &Tensor, mut see: impl FnMut(usize, BlockOutputs)) -> Tensor {
        self.hidden_through(tokens, |t, seen| {
            see(t, seen);
            seen.stream.clone()
        })
    }

    /// [`Lm::hidden`], in which the residual stream goes on from what `behind` returns for each block, such as a gated sum.
    ///
    /// # Panics
    /// As [`Lm::hidden`].
    #[track_caller]
    pub fn hidden_through(
        &self,
        tokens: &Tensor,
        mut behind: impl FnMut(usize, BlockOutputs) -> Tensor,
    ) -> Tensor {
        self.pass(tokens, Pass { behind: &mut behind, training: None }).0
    }

    /// The residual stream, and the sum of the balance losses.
    #[track_caller]
    fn pass(&self, tokens: &Tensor, mut pass: Pass) -> (Tensor, Option<Tensor>) {
        let c = &self.config;
        let length = tokens.shape()[1];
        let mut x = self.embed(tokens);
        // Blocks with a window share its mask.
        let window = c.window.filter(|&window| window < length).map(|window| self.banded(length, window));
        let mut balance: Option<Tensor> = None;
        for (t, block) in self.blocks_now().iter().enumerate() {
            let normed = block.norm1.forward(&x);
            let [q, k, v] = self.project(block, &normed, 0);
            let mask = window.as_ref().filter(|_| t >= c.window_from).unwrap_or(&Mask::Causal);
            let mixed = Attention::merge(&q.attention(&k, &v, mask));
            let attended = block.attention.o.forward_with(&mixed, Activation::None, Some(&x));
            let (stream, loss) = block.feed_forward(&attended, pass.training.as_deref_mut());
            let outputs = BlockOutputs { before: &x, normed: &normed, mixed: &mixed, stream: &stream };
            x = (pass.behind)(t, outputs);
            balance = match (balance, loss) {
                (Some(sum), Some(loss)) => Some(sum.add(&loss)),
                (sum, loss) => loss.or(sum),
            };
        }
        (x, balance)
    }

    /// Queries, keys and values of tokens whose first has this place.
    fn project(&self, block: &LmBlock, normed: &Tensor, start: usize) -> [Tensor; 3] {
        let [q, k, v] = block.attention.project(normed);
        match &self.rope {
            Some(rope) => [q.rope(rope, start), k.rope(rope, start), v],
            None => [q, k, v],
        }
    }

    /// Hides from each query what comes after it, and what comes before the last `window` tokens.
    fn banded(&self, length: usize, window: usize) -> Mask {
        let seen = |i: usize, j: usize| j <= i && i - j < window;
        let all: Vec<f32> = (0..length * length)
            .map(|at| if seen(at / length, at % length) { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        Mask::Additive(Tensor::from_slice(self.gpu(), &all, [length, length]))
    }

    /// Scores of the next token from the residual stream.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        let x = self.norm.forward(x);
        match &self.head {
            Some(head) => head.forward(&x),
            None => self.embedding.logits(&x),
        }
    }

    /// Scores of the next token at every position: `[batch, tokens, vocab]`.
    #[track_caller]
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        self.logits(&self.hidden(tokens))
    }

    /// Mean cross-entropy in nats of `targets` given `tokens`, both `[batch, tokens]`. Targets of i32 may be [`IGNORED`], which do not
    /// count.
    #[track_caller]
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Tensor {
        entropy(&self.forward(tokens), targets)
    }

    /// The loss of a training step: [`Lm::loss`], and with experts their capacity, noise from `rng` and `balance` times the sum of
    /// their balance losses.
    #[track_caller]
    pub fn training_loss(&self, tokens: &Tensor, targets: &Tensor, rng: &mut Rng) -> Tensor {
        let mut behind = |_: usize, seen: BlockOutputs| seen.stream.clone();
        let (x, balance) = self.pass(tokens, Pass { behind: &mut behind, training: Some(rng) });
        let loss = entropy(&self.logits(&x), targets);
        match (balance, self.config.experts) {
            (Some(balance), Some(experts)) => loss.add(&balance.scale(experts.balance).sum_all()),
            _ => loss,
        }
    }
}

/// A target that does not count, as in PyTorch.
pub const IGNORED: i32 = -100;

fn entropy(scores: &Tensor, targets: &Tensor) -> Tensor {
    let ignored = (targets.dtype() == DType::I32).then_some(i64::from(IGNORED));
    scores.cross_entropy(targets, ignored)
}

/// Makes a new leaf with the same content.
pub(crate) fn copy(x: &Tensor) -> Tensor {
    let y = x.detach().affine(1.0, 0.0);
    y.evaluate();
    y.requires_grad()
}

/// A norm with leaves of its own.
pub(crate) fn copied_norm(norm: &Norm) -> Norm {
    Norm { gain: copy(&norm.gain), bias: norm.bias.as_ref().map(copy), eps: norm.eps }
}

impl Module for Lm {
    fn visit(&self, visit: &mut Visit) {
        visit.field("embedding", &self.embedding);
        visit.field("positions", &self.positions);
        for made in &self.made {
            let alone = self.made.iter().filter(|other| other.matrix == made.matrix).count() == 1;
            let name = match alone {
                true => format!("dictionary.{}", made.matrix),
                false => format!("dictionary.{}.{}", made.matrix, made.layers.start),
            };
            visit.field(&name, made);
        }
        visit.field("blocks", &self.blocks);
        visit.field("norm", &self.norm);
        visit.field("head", &self.head);
        visit.field("rope", &self.rope);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.embedding);
        visit.field(&mut self.positions);
        visit.field(&mut self.made);
        visit.field(&mut self.blocks);
        visit.field(&mut self.norm);
        visit.field(&mut self.head);
        visit.field(&mut self.rope);
    }
}

module!(LmBlock { norm1, attention, norm2, mlp });

impl Module for FeedForward {
    fn visit(&self, visit: &mut Visit) {
        match self {
            FeedForward::Dense(mlp) => mlp.visit(visit),
            FeedForward::Experts(experts) => experts.visit(visit),
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        match self {
            FeedForward::Dense(mlp) => mlp.visit_mut(visit),
            FeedForward::Experts(experts) => experts.visit_mut(visit),
        }
    }
}
