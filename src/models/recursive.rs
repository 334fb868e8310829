//! A transformer language model whose depth counts uses and not blocks: one block is stored and applied R times, and each
//! depth has its own norms and low-rank parts.
//!
//! `x = emb[tokens] + pos`, R times the pre-norm block, `logits = norm(x) emb^T`.
//! Source: relaxed recursive transformers, arXiv 2410.20672.

use super::sharing::Matrix;
pub use super::sharing::Sharing;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{
    Activation, Attention, Block, Embedding, Init, Linear, Mask, Mlp, Module, Norm, Visit, VisitMut, stored,
};
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::setters::setters;
use crate::share::Dictionary;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Sizes, and the kind of sharing.
#[derive(Clone, Debug, PartialEq)]
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
        let sharing = Sharing::tied();
        RecursiveConfig { vocab: 256, width: 128, heads: 4, hidden: 512, context: 64, depth: 6, sharing }
    }
}

impl RecursiveConfig {
    /// Returns the settings as text, for a checkpoint's metadata. Two models fit each other if these are equal.
    pub fn metadata(&self) -> BTreeMap<String, String> {
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
        all.insert("sharing".into(), self.sharing.text());
        all
    }

    /// Reads what [`RecursiveConfig::metadata`] wrote. A sharing kind from outside must be [registered](Sharing::register).
    ///
    /// # Errors
    /// [`Error::Config`] when a size is missing or no number, or the kind is not known.
    pub fn from_metadata(metadata: &BTreeMap<String, String>) -> Result<RecursiveConfig> {
        let text = |name: &str| {
            let missing = || Error::config(format!("the settings of the model lack `{name}`"));
            metadata.get(name).ok_or_else(missing)
        };
        let size = |name: &str| {
            let text = text(name)?;
            text.parse().map_err(|_| Error::config(format!("the model's `{name}` is '{text}', no size")))
        };
        Ok(RecursiveConfig {
            vocab: size("vocab")?,
            width: size("width")?,
            heads: size("heads")?,
            hidden: size("hidden")?,
            context: size("context")?,
            depth: size("depth")?,
            sharing: Sharing::named(text("sharing")?)?,
        })
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

/// Initial standard deviations of most matrices, and of those whose results are added to the residual stream. As in
/// GPT-2, the first is about 0.02 at width 768 and scales with the width, and the second also shrinks with the depth.
fn stds(c: &RecursiveConfig) -> [f32; 2] {
    let std = (0.4 / c.width as f32).sqrt();
    [std, std / (2.0 * c.depth as f32).sqrt()]
}

fn matrices(c: &RecursiveConfig) -> [Matrix; 6] {
    let [std, added] = stds(c);
    let (d, f) = (c.width, c.hidden);
    let matrix = |name, size, std| Matrix { name, size, std };
    [
        matrix("q", [d, d], std),
        matrix("k", [d, d], std),
        matrix("v", [d, d], std),
        matrix("o", [d, d], added),
        matrix("up", [f, d], std),
        matrix("down", [d, f], added),
    ]
}

fn block(gpu: &Gpu, c: &RecursiveConfig, sites: Vec<Arc<dyn Site>>) -> Block {
    let sites: [Arc<dyn Site>; 6] = sites.try_into().expect("a site for each matrix");
    let [q, k, v, o, up, down] = sites.map(|site| Linear::from_site(site, None));
    Block {
        norm1: Norm::rms(gpu, c.width, 1e-5),
        attention: Attention { q, k, v, o, heads: c.heads, kv_heads: c.heads },
        norm2: Norm::rms(gpu, c.width, 1e-5),
        mlp: Mlp { up, down, activation: Activation::GeluTanh },
    }
}

impl Recursive {
    /// Makes a new model, drawn from `rng`. Each depth has its own norms.
    ///
    /// # Panics
    /// When `heads` does not divide `width`, a size is 0, or the kind of sharing does not fit the sizes.
    #[track_caller]
    pub fn new(gpu: &Gpu, config: RecursiveConfig, rng: &mut Rng) -> Recursive {
        Recursive::try_new(gpu, config, rng).unwrap_or_else(|error| panic!("{error}"))
    }

    /// [`Recursive::new`] for settings of a file or a user, which may not fit.
    ///
    /// # Errors
    /// [`Error::Config`] for what makes [`Recursive::new`] panic.
    pub fn try_new(gpu: &Gpu, config: RecursiveConfig, rng: &mut Rng) -> Result<Recursive> {
        let c = &config;
        if c.heads == 0 || !c.width.is_multiple_of(c.heads) {
            return Err(Error::config(format!("recursive: {} heads for width {}", c.heads, c.width)));
        }
        if [c.width, c.depth, c.vocab, c.context, c.hidden].contains(&0) {
            return Err(Error::config(format!("recursive: a size is 0: {c:?}")));
        }
        let embedding =
            Embedding::new(gpu, c.vocab, c.width, Init::Normal((1.0 / c.width as f32).sqrt()), rng);
        let positions = Init::Normal(0.02).leaf(gpu, [c.context, c.width], rng);
        let matrices = matrices(c);
        let wrong = |what: &dyn std::fmt::Display| {
            Error::config(format!("recursive: {:?} for depth {}: {what}", c.sharing, c.depth))
        };
        let made = c.sharing.sites(gpu, c.depth, &matrices, rng).map_err(|error| wrong(&error))?;
        made.fit(c.depth, &matrices).map_err(|what| wrong(&what))?;
        let blocks = made.by_depth.into_iter().map(|sites| block(gpu, c, sites)).collect();
        let norm = Norm::rms(gpu, config.width, 1e-5);
        let dictionaries = made.dictionaries;
        Ok(Recursive { dictionaries, config, embedding, positions, blocks, norm })
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
    fn visit(&self, visit: &mut Visit) {
        visit.field("embedding", &self.embedding);
        visit.field("positions", &self.positions);
        for (name, dictionary) in ["q", "k", "v", "o"].iter().zip(&self.dictionaries) {
            visit.field(&format!("dictionary.{name}"), dictionary);
        }
        visit.field("blocks", &self.blocks);
        visit.field("norm", &self.norm);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.embedding);
        visit.field(&mut self.positions);
        visit.field(&mut self.dictionaries);
        visit.field(&mut self.blocks);
        visit.field(&mut self.norm);
    }
}
