//! Llama-type language models: RMS norms, rotary positions, grouped-query attention, a gated MLP.
//!
//! `x += attn(norm1(x))`, then `x += down(silu(gate(norm2(x))) * up(norm2(x)))`. Every linear layer is a site, so any
//! kind of sharing can supply its weight. Weights come from llama.cpp's GGUF files or from safetensors with the names of
//! Hugging Face ([`Published`]), as leaves in f32 or as they are stored: packed, or in 16 bits. Llama 2 and 3, Mistral, Qwen2
//! and SmolLM have this form. They differ in biases, in the width of heads, in how rotary angles are scaled, in which elements
//! of a head are rotated together, and in how far back attention reaches.

mod config;
mod convert;
mod gguf;
mod published;
mod read;
mod scaling;
mod session;
mod table;

pub use config::{LlamaConfig, LlamaSettings};
pub use published::Published;
pub use read::Form;
pub use scaling::RopeScaling;
pub use session::{Session, SessionOptions};
pub use table::TokenTable;

use crate::nn::{Activation, Linear, Mask, Module, Norm, Visit, VisitMut};
use crate::ops::product::site::Site;
use crate::ops::sequence::rope::Rope;
use crate::share::{Dictionary, LowRank, Tied};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// One block.
#[derive(Clone)]
pub struct LlamaLayer {
    /// Before attention.
    pub norm1: Norm,
    /// `q k v o`
    pub attention: [Linear; 4],
    /// Before the MLP.
    pub norm2: Norm,
    /// `gate up down`
    pub mlp: [Linear; 3],
}

/// Names of a block's linear layers, attention's first.
pub const LINEARS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

impl LlamaLayer {
    /// The linear layer at this position in [`LINEARS`].
    pub fn linear(&self, i: usize) -> &Linear {
        if i < 4 { &self.attention[i] } else { &self.mlp[i - 4] }
    }

    /// The same, mutable, so that its weight can be exchanged.
    pub fn linear_mut(&mut self, i: usize) -> &mut Linear {
        if i < 4 { &mut self.attention[i] } else { &mut self.mlp[i - 4] }
    }

    fn mlp(&self, x: &Tensor) -> Tensor {
        let [gate, up, down] = &self.mlp;
        let normed = self.norm2.forward(x);
        let hidden = gate.forward_with(&normed, Activation::Silu, None).mul(&up.forward(&normed));
        down.forward_with(&hidden, Activation::None, Some(x))
    }
}

/// One linear layer of neighbouring blocks, computed from a dictionary (MASA).
#[derive(Clone)]
#[non_exhaustive]
pub struct Made {
    /// Its position in [`LINEARS`].
    pub linear: usize,
    /// The blocks.
    pub layers: Range<usize>,
    /// The dictionary, which has one layer for each block.
    pub dictionary: Dictionary,
    /// `A [rank, in]` and `B [out, rank]` of each block, whose product is added. Empty if there are none.
    pub own: Vec<[Tensor; 2]>,
}

impl Made {
    /// Returns the weights of all blocks, computed in one pass.
    fn sites(&self) -> Vec<Arc<dyn Site>> {
        if self.own.is_empty() {
            return self.dictionary.weights();
        }
        let all = self.dictionary.atoms.combine(&self.dictionary.coefficients);
        let with = |(w, [a, b]): (&Tensor, &[Tensor; 2])| LowRank::new(w, a, b, 1.0).shared();
        all.iter().zip(&self.own).map(with).collect()
    }
}

/// The model.
#[derive(Clone)]
pub struct Llama {
    /// Layers whose weights are computed in every pass and replace those in `layers`.
    pub made: Vec<Made>,
    /// Sizes and constants.
    pub config: LlamaConfig,
    /// Token vectors, and the output head if `head` is `None`.
    pub embedding: TokenTable,
    /// The blocks in order.
    pub layers: Vec<LlamaLayer>,
    /// Before the head.
    pub norm: Norm,
    /// The output head, if it is not the table of token vectors.
    pub head: Option<Linear>,
    rope: Rope,
}

/// The tensors of a block that [`Llama::hidden_with`] shows, each `[batch, tokens, width]`.
#[non_exhaustive]
pub struct BlockOutputs<'a> {
    /// The input of q, k and v.
    pub normed: &'a Tensor,
    /// The input of o.
    pub mixed: &'a Tensor,
    /// The residual stream after the block.
    pub stream: &'a Tensor,
}

impl Llama {
    /// Returns a model that computes the same and has no leaf in common with this one. Every weight is stored in the form
    /// in which it is used. Training one model does not change the other.
    pub fn copied(&self) -> Llama {
        let copy = |x: &Tensor| {
            let y = x.detach().affine(1.0, 0.0);
            y.evaluate();
            y.requires_grad()
        };
        let linear = |l: &Linear| {
            Linear::from_site(Tied::new(&copy(&l.weight.expand())).shared(), l.bias.as_ref().map(copy))
        };
        let norm = |n: &Norm| Norm { gain: copy(&n.gain), bias: n.bias.as_ref().map(copy), eps: n.eps };
        let layers = no_grad(|| self.layers_now());
        let layer = |l: &LlamaLayer| LlamaLayer {
            norm1: norm(&l.norm1),
            attention: std::array::from_fn(|i| linear(&l.attention[i])),
            norm2: norm(&l.norm2),
            mlp: std::array::from_fn(|i| linear(&l.mlp[i])),
        };
        Llama {
            made: Vec::new(),
            embedding: self.embedding.copied(copy),
            layers: layers.iter().map(layer).collect(),
            norm: norm(&self.norm),
            head: self.head.as_ref().map(linear),
            ..self.clone()
        }
    }

    /// Returns the blocks with weights computed from the dictionaries as they are now, each dictionary in one pass.
    pub fn layers_now(&self) -> Vec<LlamaLayer> {
        let mut layers = self.layers.clone();
        for made in &self.made {
            for (layer, site) in layers[made.layers.clone()].iter_mut().zip(made.sites()) {
                layer.linear_mut(made.linear).weight = site;
            }
        }
        layers
    }

    /// Returns the residual stream before the final norm, for `tokens [batch, tokens]`.
    ///
    /// # Panics
    /// When there are more tokens than the context.
    #[track_caller]
    pub fn hidden(&self, tokens: &Tensor) -> Tensor {
        self.hidden_with(tokens, |_, _| {})
    }

    /// [`Llama::hidden`], which also shows `see` the inner tensors of each block.
    ///
    /// # Panics
    /// As [`Llama::hidden`].
    #[track_caller]
    pub fn hidden_with(&self, tokens: &Tensor, mut see: impl FnMut(usize, BlockOutputs)) -> Tensor {
        let c = &self.config;
        let (batch, length) = (tokens.shape()[0], tokens.shape()[1]);
        assert!(length <= c.context, "llama: {length} tokens, context {}", c.context);
        let mut x = self.embedding.forward(tokens);
        // Blocks with a window share its mask.
        let window = c.window.filter(|&window| window < length).map(|window| self.banded(length, window));
        for (l, layer) in self.layers_now().iter().enumerate() {
            let [q, k, v, o] = &layer.attention;
            let normed = layer.norm1.forward(&x);
            let split = |y: Tensor, heads: usize| {
                y.reshape([batch, length, heads, c.head_dim()]).permute([0, 2, 1, 3])
            };
            let q = split(q.forward(&normed), c.heads).rope(&self.rope, 0);
            let k = split(k.forward(&normed), c.kv_heads).rope(&self.rope, 0);
            let v = split(v.forward(&normed), c.kv_heads);
            let mask = window.as_ref().filter(|_| l >= c.window_from).unwrap_or(&Mask::Causal);
            let y = q.attention(&k, &v, mask).permute([0, 2, 1, 3]);
            let y = y.reshape([batch, length, c.heads * c.head_dim()]);
            x = layer.mlp(&o.forward_with(&y, Activation::None, Some(&x)));
            see(l, BlockOutputs { normed: &normed, mixed: &y, stream: &x });
        }
        x
    }

    /// Hides from each query what comes after it, and what comes before the last `window` tokens.
    fn banded(&self, length: usize, window: usize) -> Mask {
        let seen = |i: usize, j: usize| j <= i && i - j < window;
        let all: Vec<f32> = (0..length * length)
            .map(|at| if seen(at / length, at % length) { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        Mask::Additive(Tensor::from_slice(self.embedding.gpu(), &all, [length, length]))
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

    /// Mean cross-entropy in nats of `targets` given `tokens`, both `[batch, tokens]`.
    #[track_caller]
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Tensor {
        self.forward(tokens).cross_entropy(targets, None)
    }
}

impl Module for Llama {
    fn visit(&self, visit: &mut Visit) {
        visit.field("embedding", &self.embedding);
        for made in &self.made {
            visit.field(&format!("made.{}.{}", made.layers.start, LINEARS[made.linear]), made);
        }
        visit.field("layers", &self.layers);
        visit.field("norm", &self.norm);
        visit.field("head", &self.head);
        visit.field("rope", &self.rope);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.embedding);
        visit.field(&mut self.made);
        visit.field(&mut self.layers);
        visit.field(&mut self.norm);
        visit.field(&mut self.head);
        visit.field(&mut self.rope);
    }
}

impl Module for LlamaLayer {
    fn visit(&self, visit: &mut Visit) {
        visit.field("norm1", &self.norm1);
        for (i, name) in LINEARS.iter().enumerate() {
            visit.field(name, self.linear(i));
        }
        visit.field("norm2", &self.norm2);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.norm1);
        (0..LINEARS.len()).for_each(|i| visit.field(self.linear_mut(i)));
        visit.field(&mut self.norm2);
    }
}

/// Weights are made of the dictionary and of the low-rank parts, so these count as stored and not as used.
impl Module for Made {
    fn visit(&self, visit: &mut Visit) {
        self.dictionary.visit(visit);
        for (l, [a, b]) in self.own.iter().enumerate() {
            visit.store(&format!("{l}.a"), a);
            visit.store(&format!("{l}.b"), b);
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.dictionary);
        visit.field(&mut self.own);
    }
}
