//! A transformer language model whose depth counts uses and not blocks: one block is stored and applied R times, and each
//! depth has its own norms and low-rank parts.
//!
//! `x = emb[tokens] + pos`, R times the pre-norm block, `logits = norm(x) emb^T`.
//! Source: relaxed recursive transformers, arXiv 2410.20672.

use crate::gpu::Gpu;
use crate::nn::{
    Activation, Attention, Block, Embedding, Init, Linear, Mask, Mlp, Module, Norm, Parameters, join, stored,
};
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::setters::setters;
use crate::share::{Dictionary, Factored, LowRank, Tied};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the depths share.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Sharing {
    /// Nothing: an ordinary transformer.
    None,
    /// All matrices.
    Tied,
    /// All matrices. Each depth adds a low-rank part `scale * B A` of its own.
    TiedLora {
        /// Rank of the low-rank parts: the rows of A.
        rank: usize,
        /// Constant factor.
        scale: f32,
    },
    /// The matrices of `blocks` blocks, used in turn (CYCLE): depth `t` uses those of block `t mod blocks`. With `rank`
    /// above 0, each depth has a low-rank part of its own.
    Cycle {
        /// Number of stored blocks, which must divide the depth.
        blocks: usize,
        /// Rank of the low-rank parts, or 0 for none.
        rank: usize,
    },
    /// Matrices that groups of `group` neighbouring depths share (FoldGPT): depth `t` uses those of group `t / group`.
    Fold {
        /// Number of depths that share. The last group may be smaller.
        group: usize,
    },
    /// A dictionary of `atoms` atoms for each projection of attention (MASA). Each depth has its own other matrices.
    Dictionary {
        /// Atoms of each projection.
        atoms: usize,
        /// Whether the output projection comes from a dictionary too (QKVO), or is each depth's own (QKV).
        output: bool,
    },
    /// Nothing, but the attention matrices of each depth have this rank.
    LowRank {
        /// Inner size of the two factors.
        rank: usize,
    },
}

/// Sizes, and the kind of sharing.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct RecursiveConfig {
    /// Number of distinct tokens.
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Attention heads; must divide `width`.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub hidden: usize,
    /// The most tokens in a sequence.
    pub context: usize,
    /// Number of times that a block is applied.
    pub depth: usize,
    /// What the depths share.
    pub sharing: Sharing,
}

setters!(RecursiveConfig {
    vocab: usize,
    width: usize,
    heads: usize,
    hidden: usize,
    context: usize,
    depth: usize,
    sharing: Sharing,
});

impl Default for RecursiveConfig {
    /// A small model of bytes: width 128, 4 heads, an MLP of 512, 64 bytes of context, one block used at 6 depths.
    fn default() -> RecursiveConfig {
        let sharing = Sharing::Tied;
        RecursiveConfig { vocab: 256, width: 128, heads: 4, hidden: 512, context: 64, depth: 6, sharing }
    }
}

impl RecursiveConfig {
    /// Returns the settings as text, for a checkpoint's metadata. Two models fit each other if these are equal.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let sharing = match self.sharing {
            Sharing::None => "none".to_string(),
            Sharing::Tied => "tied".to_string(),
            Sharing::TiedLora { rank, scale } => format!("tied-lora rank {rank} scale {scale}"),
            Sharing::Cycle { blocks, rank } => format!("cycle {blocks} rank {rank}"),
            Sharing::Fold { group } => format!("fold {group}"),
            Sharing::Dictionary { atoms, output } => format!("dictionary {atoms} output {output}"),
            Sharing::LowRank { rank } => format!("low-rank {rank}"),
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

/// The model. Blocks that share weights hold handles on the same leaves.
pub struct Recursive {
    /// The dictionaries of q, k, v and o, if attention comes from dictionaries. The sites in `blocks` compute weights as
    /// they are read; a pass of the model computes all weights at once instead.
    pub dictionaries: Vec<Dictionary>,
    /// Sizes, and the kind of sharing.
    pub config: RecursiveConfig,
    /// Token vectors; also the output head.
    pub embedding: Embedding,
    /// `[context, width]`, added to the token vectors.
    pub positions: Tensor,
    /// One block per depth.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: Norm,
}

/// `q k v o up down`, as they are stored.
type Matrices = [Tensor; 6];

/// Initial standard deviations of most matrices, and of those whose results are added to the residual stream. As in
/// GPT-2, the first is about 0.02 at width 768 and scales with the width, and the second also shrinks with the depth.
fn stds(c: &RecursiveConfig) -> [f32; 2] {
    let std = (0.4 / c.width as f32).sqrt();
    [std, std / (2.0 * c.depth as f32).sqrt()]
}

fn matrices(gpu: &Gpu, c: &RecursiveConfig, rng: &mut Rng) -> Matrices {
    let [std, added] = stds(c);
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

/// Makes a site of `theta` with a low-rank part that is initially zero.
fn lora(gpu: &Gpu, theta: &Tensor, rank: usize, scale: f32, rng: &mut Rng) -> Arc<dyn Site> {
    let (out, inner) = (theta.shape()[0], theta.shape()[1]);
    let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [rank, inner], rng);
    let b = Init::Zeros.leaf(gpu, [out, rank], rng);
    Arc::new(LowRank::new(theta, &a, &b, scale))
}

/// Makes a product of two factors with the initial variance of `theta`.
fn factored(gpu: &Gpu, theta: &Tensor, std: f32, rank: usize, rng: &mut Rng) -> Arc<dyn Site> {
    let (out, inner) = (theta.shape()[0], theta.shape()[1]);
    let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [rank, inner], rng);
    let b = Init::Normal(std * (inner as f32 / rank as f32).sqrt()).leaf(gpu, [out, rank], rng);
    Arc::new(Factored::new(&a, &b))
}

fn block(gpu: &Gpu, c: &RecursiveConfig, stored: &Matrices, rng: &mut Rng) -> Block {
    let mut site = |i: usize| -> Linear {
        let theta = &stored[i];
        let site: Arc<dyn Site> = match c.sharing {
            Sharing::TiedLora { rank, scale } => lora(gpu, theta, rank, scale, rng),
            Sharing::Cycle { rank, .. } if rank > 0 => lora(gpu, theta, rank, 1.0, rng),
            Sharing::LowRank { rank } if i < 4 => factored(gpu, theta, stds(c)[(i == 3) as usize], rank, rng),
            _ => Arc::new(Tied::new(theta)),
        };
        Linear::from_site(site, None)
    };
    let [q, k, v, o, up, down] = [0, 1, 2, 3, 4, 5].map(&mut site);
    Block {
        norm1: Norm::rms(gpu, c.width, 1e-5),
        attention: Attention { q, k, v, o, heads: c.heads, kv_heads: c.heads },
        norm2: Norm::rms(gpu, c.width, 1e-5),
        mlp: Mlp { up, down, activation: Activation::GeluTanh },
    }
}

fn dictionaries(gpu: &Gpu, c: &RecursiveConfig, rng: &mut Rng) -> Vec<Dictionary> {
    let Sharing::Dictionary { atoms, output } = c.sharing else { return Vec::new() };
    let [std, added] = stds(c);
    let scales = [std, std, std, added];
    let wanted = if output { &scales[..] } else { &scales[..3] };
    wanted.iter().map(|&s| Dictionary::random(gpu, c.depth, atoms, [c.width, c.width], s, rng)).collect()
}

impl Recursive {
    /// Makes a new model, drawn from `rng`. Each depth has its own norms.
    ///
    /// # Panics
    /// When `heads` does not divide `width`, or a size is 0.
    #[track_caller]
    pub fn new(gpu: &Gpu, config: RecursiveConfig, rng: &mut Rng) -> Recursive {
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
        let distinct = match c.sharing {
            Sharing::Tied | Sharing::TiedLora { .. } => 1,
            Sharing::Cycle { blocks, .. } => blocks,
            Sharing::Fold { group } => c.depth.div_ceil(group.max(1)),
            _ => c.depth,
        };
        let fits = match c.sharing {
            Sharing::Fold { group } => group > 0,
            _ => distinct > 0 && c.depth.is_multiple_of(distinct),
        };
        assert!(fits, "recursive: {:?} for depth {}", c.sharing, c.depth);
        let stored_of = |depth: usize| match c.sharing {
            Sharing::Fold { group } => depth / group,
            _ => depth % distinct,
        };
        let mut stored: Vec<Matrices> = Vec::new();
        let mut blocks: Vec<Block> = (0..c.depth)
            .map(|depth| {
                if stored_of(depth) == stored.len() {
                    stored.push(matrices(gpu, c, rng));
                }
                block(gpu, c, &stored[stored_of(depth)], rng)
            })
            .collect();
        let norm = Norm::rms(gpu, config.width, 1e-5);
        let dictionaries = dictionaries(gpu, c, rng);
        // The matrices that the dictionaries replace are freed.
        for (i, dictionary) in dictionaries.iter().enumerate() {
            for (layer, block) in blocks.iter_mut().enumerate() {
                attention_layer(block, i).weight = dictionary.site(layer);
            }
        }
        Recursive { dictionaries, config, embedding, positions, blocks, norm }
    }

    /// Returns the residual stream before the first block: token vectors plus positions.
    ///
    /// # Panics
    /// When there are more tokens than the context.
    #[track_caller]
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        let length = tokens.shape()[1];
        assert!(length <= self.config.context, "recursive: {length} tokens, context {}", self.config.context);
        let positions = if length == self.config.context {
            self.positions.clone()
        } else {
            self.positions.slice(0, 0..length)
        };
        stored(&self.embedding.forward(tokens).add(&positions))
    }

    /// Returns the residual stream after each depth, for `tokens [batch, tokens]`.
    ///
    /// # Panics
    /// As [`Recursive::embed`].
    #[track_caller]
    pub fn hidden(&self, tokens: &Tensor) -> Vec<Tensor> {
        let mut x = self.embed(tokens);
        self.blocks_now()
            .iter()
            .map(|block| {
                x = block.forward(&x, &Mask::Causal);
                x.clone()
            })
            .collect()
    }

    /// Returns the blocks with weights computed from the dictionaries as they are now, all layers in one pass.
    pub fn blocks_now(&self) -> Vec<Block> {
        let mut blocks = self.blocks.clone();
        for (i, dictionary) in self.dictionaries.iter().enumerate() {
            for (block, weight) in blocks.iter_mut().zip(dictionary.weights()) {
                attention_layer(block, i).weight = weight;
            }
        }
        blocks
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

/// Returns the layer q, k, v or o.
fn attention_layer(block: &mut Block, i: usize) -> &mut Linear {
    let a = &mut block.attention;
    match i {
        0 => &mut a.q,
        1 => &mut a.k,
        2 => &mut a.v,
        _ => &mut a.o,
    }
}

impl Module for Recursive {
    fn parameters(&self, path: &str, all: &mut Parameters) {
        self.embedding.parameters(&join(path, "embedding"), all);
        all.add(join(path, "positions"), &self.positions);
        for (name, dictionary) in ["q", "k", "v", "o"].iter().zip(&self.dictionaries) {
            all.store(join(path, &format!("dictionary.{name}.atoms")), &dictionary.atoms);
            all.store(join(path, &format!("dictionary.{name}.coefficients")), &dictionary.coefficients);
        }
        for (depth, block) in self.blocks.iter().enumerate() {
            block.parameters(&join(path, &format!("blocks.{depth}")), all);
        }
        self.norm.parameters(&join(path, "norm"), all);
    }
}
