//! A transformer language model whose depth is a number of uses, not of blocks: one block stored, applied R times, with
//! norms and low-rank parts of each depth's own.
//!
//! `x = emb[tokens] + pos`, R times the pre-norm block, `logits = norm(x) emb^T`.
//! Source: relaxed recursive transformers, arXiv 2410.20672.

use crate::gpu::Gpu;
use crate::nn::{
    Activation, Attention, Block, Embedding, Init, Linear, Mask, Mlp, Module, Norm, Parameters, join,
};
use crate::ops::site::Site;
use crate::rng::Rng;
use crate::share::{LowRank, Tied};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the depths have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sharing {
    /// Nothing: an ordinary transformer.
    None,
    /// All matrices.
    Tied,
    /// All matrices, beside a low-rank part `scale * B A` of each depth's own.
    TiedLora {
        /// Rows of A.
        rank: usize,
        /// Constant factor.
        scale: f32,
    },
}

/// Sizes and kinds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Distinct tokens.
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Attention heads; must divide `width`.
    pub heads: usize,
    /// Width between the MLP's two matrices.
    pub hidden: usize,
    /// Most tokens in a sequence.
    pub context: usize,
    /// Times that a block is applied.
    pub depth: usize,
    /// What the depths share.
    pub sharing: Sharing,
}

impl Config {
    /// The settings as text, for a checkpoint's metadata: two models fit when these are equal.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let sharing = match self.sharing {
            Sharing::None => "none".to_string(),
            Sharing::Tied => "tied".to_string(),
            Sharing::TiedLora { rank, scale } => format!("tied-lora rank {rank} scale {scale}"),
        };
        let sizes = [
            ("vocab", self.vocab),
            ("width", self.width),
            ("heads", self.heads),
            ("hidden", self.hidden),
            ("context", self.context),
            ("depth", self.depth),
        ];
        let mut all: BTreeMap<String, String> =
            sizes.iter().map(|(name, size)| (name.to_string(), size.to_string())).collect();
        all.insert("sharing".into(), sharing);
        all
    }
}

/// The model. Blocks of a shared model are handles on the same leaves.
pub struct Recursive {
    /// Sizes and kinds.
    pub config: Config,
    /// Token vectors; also the output head.
    pub embedding: Embedding,
    /// `[context, width]`, added to the token vectors.
    pub positions: Tensor,
    /// One block a depth.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: Norm,
}

/// `q k v o up down`, as stored once.
type Matrices = [Tensor; 6];

fn matrices(gpu: &Gpu, c: &Config, rng: &mut Rng) -> Matrices {
    // GPT-2's start: 0.02-like for width 768, scaled with width; what is added to the stream shrinks with its length.
    let std = (0.4 / c.width as f32).sqrt();
    let added = std / (2.0 * c.depth as f32).sqrt();
    let (d, f) = (c.width, c.hidden);
    [
        Init::Normal(std).leaf(gpu, [d, d], rng),
        Init::Normal(std).leaf(gpu, [d, d], rng),
        Init::Normal(std).leaf(gpu, [d, d], rng),
        Init::Normal(added).leaf(gpu, [d, d], rng),
        Init::Normal(std).leaf(gpu, [f, d], rng),
        Init::Normal(added).leaf(gpu, [d, f], rng),
    ]
}

fn block(gpu: &Gpu, c: &Config, stored: &Matrices, rng: &mut Rng) -> Block {
    let mut site = |theta: &Tensor| -> Linear {
        let site: Arc<dyn Site> = match c.sharing {
            Sharing::TiedLora { rank, scale } => {
                let (out, inner) = (theta.shape()[0], theta.shape()[1]);
                let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [rank, inner], rng);
                let b = Init::Zeros.leaf(gpu, [out, rank], rng);
                Arc::new(LowRank::new(theta, &a, &b, scale))
            }
            _ => Arc::new(Tied::new(theta)),
        };
        Linear::from_site(site, None)
    };
    let [q, k, v, o, up, down] = stored;
    Block {
        norm1: Norm::rms(gpu, c.width, 1e-5),
        attention: Attention {
            q: site(q),
            k: site(k),
            v: site(v),
            o: site(o),
            heads: c.heads,
            kv_heads: c.heads,
        },
        norm2: Norm::rms(gpu, c.width, 1e-5),
        mlp: Mlp { up: site(up), down: site(down), activation: Activation::GeluTanh },
    }
}

impl Recursive {
    /// A new model with norms of each depth's own, drawn from `rng`.
    ///
    /// # Panics
    /// When `heads` does not divide `width`, or a size is 0.
    #[track_caller]
    pub fn new(gpu: &Gpu, config: Config, rng: &mut Rng) -> Recursive {
        let c = &config;
        assert!(
            c.heads > 0 && c.width.is_multiple_of(c.heads),
            "recursive: {} heads for width {}",
            c.heads,
            c.width
        );
        assert!(c.depth > 0 && c.vocab > 0 && c.context > 0, "recursive: a size is 0: {c:?}");
        let embedding =
            Embedding::new(gpu, c.vocab, c.width, Init::Normal((1.0 / c.width as f32).sqrt()), rng);
        let positions = Init::Normal(0.02).leaf(gpu, [c.context, c.width], rng);
        let shared = matrices(gpu, c, rng);
        let blocks = (0..c.depth)
            .map(|depth| match c.sharing {
                Sharing::None if depth > 0 => block(gpu, c, &matrices(gpu, c, rng), rng),
                _ => block(gpu, c, &shared, rng),
            })
            .collect();
        Recursive { config, embedding, positions, blocks, norm: Norm::rms(gpu, config.width, 1e-5) }
    }

    /// The residual stream after each depth, for `tokens [batch, tokens]`.
    ///
    /// # Panics
    /// When there are more tokens than the context.
    #[track_caller]
    pub fn hidden(&self, tokens: &Tensor) -> Vec<Tensor> {
        let length = tokens.shape()[1];
        assert!(length <= self.config.context, "recursive: {length} tokens, context {}", self.config.context);
        let positions = if length == self.config.context {
            self.positions.clone()
        } else {
            self.positions.slice(0, 0..length)
        };
        let mut x = self.embedding.forward(tokens).add(&positions);
        self.blocks
            .iter()
            .map(|block| {
                x = block.forward(&x, &Mask::Causal);
                x.clone()
            })
            .collect()
    }

    /// Scores of the next token at every position: `[batch, tokens, vocab]`.
    #[track_caller]
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        let hidden = self.hidden(tokens);
        self.head(&hidden[hidden.len() - 1])
    }

    /// Scores from the last depth's stream.
    pub fn head(&self, x: &Tensor) -> Tensor {
        self.embedding.logits(&self.norm.forward(x))
    }

    /// Mean cross-entropy in nats of `targets` given `tokens`, both `[batch, tokens]`.
    #[track_caller]
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Tensor {
        self.forward(tokens).cross_entropy(targets, None)
    }
}

impl Module for Recursive {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        self.embedding.parameters(&join(path, "embedding"), all);
        all.add(join(path, "positions"), &self.positions);
        for (depth, block) in self.blocks.iter().enumerate() {
            block.parameters(&join(path, &format!("blocks.{depth}")), all);
        }
        self.norm.parameters(&join(path, "norm"), all);
    }
}
