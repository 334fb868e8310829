//! The sizes of a language model, what its parts are, and what its depths share.

use super::scaling::RopeScaling;
use crate::error::{Error, Result};
use crate::models::sharing::Sharing;
use crate::nn::Activation;
use crate::ops::sequence::rope::Pairing;
use crate::setters::setters;

/// How the residual stream is normalised before a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormKind {
    /// RMS norm, without biases. `rms`
    Rms,
    /// Layer norm, with biases. `layer`
    Layer,
}

/// How a model knows where its tokens are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Positions {
    /// Queries and keys are rotated by angles. `rotary`
    Rotary,
    /// A learned vector for each place is added to the token's. `learned`
    Learned,
    /// It does not. `none`
    None,
}

/// The layers after attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MlpKind {
    /// `down(silu(gate x) * up x)`. `swiglu`
    SwiGlu,
    /// `down(gelu(up x))`, with the approximation by tanh as in GPT-2. `gelu`
    Gelu,
}

impl MlpKind {
    /// The function between its matrices.
    pub fn activation(self) -> Activation {
        match self {
            MlpKind::SwiGlu => Activation::Silu,
            MlpKind::Gelu => Activation::GeluTanh,
        }
    }
}

/// Experts in the place of each MLP, of which a token uses the best few. `8 top 2 capacity 1.25 balance 0.01`
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// Number of experts.
    pub count: usize,
    /// Experts of a token.
    pub top: usize,
    /// Rows that an expert takes in training, as a multiple of its even share.
    pub capacity: f32,
    /// The factor of the balance loss in training.
    pub balance: f32,
}

/// Sizes, kinds of parts, and what the depths share.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LmConfig {
    /// Number of distinct tokens.
    pub vocab: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; must divide `heads`.
    pub kv_heads: usize,
    /// Width of a head, if it is not `width / heads`.
    pub head_width: Option<usize>,
    /// Width of the MLP, or of each expert.
    pub hidden: usize,
    /// Number of times that a block is applied.
    pub depth: usize,
    /// Number of blocks at the start and at the end that share nothing.
    pub ends: [usize; 2],
    /// The most tokens in a sequence.
    pub context: usize,
    /// The kind of norms.
    pub norm: NormKind,
    /// Added to the variance in norms.
    pub eps: f32,
    /// Whether depths that use the same matrix for their queries use the same norms too. Otherwise each has its own.
    pub shared_norms: bool,
    /// How positions come in.
    pub positions: Positions,
    /// Base of the rotary angles.
    pub rope_base: f64,
    /// How the rotary angles differ from the plain ones.
    pub rope_scaling: RopeScaling,
    /// Which elements of a head are rotated together.
    pub pairing: Pairing,
    /// A query sees this many keys, the last ones, if that is less than all.
    pub window: Option<usize>,
    /// The first block that has the window.
    pub window_from: usize,
    /// The kind of MLPs.
    pub mlp: MlpKind,
    /// Experts in their place.
    pub experts: Option<ExpertsConfig>,
    /// Which linear layers have biases: `q k v o gate up down`.
    pub biases: [bool; 7],
    /// Whether the output head is the table of token vectors.
    pub tied_head: bool,
    /// What the depths share.
    pub sharing: Sharing,
}

setters!(LmConfig {
    vocab: usize,
    width: usize,
    heads: usize,
    kv_heads: usize,
    head_width: Option<usize>,
    hidden: usize,
    depth: usize,
    ends: [usize; 2],
    context: usize,
    norm: NormKind,
    eps: f32,
    shared_norms: bool,
    positions: Positions,
    rope_base: f64,
    rope_scaling: RopeScaling,
    pairing: Pairing,
    window: Option<usize>,
    window_from: usize,
    mlp: MlpKind,
    experts: Option<ExpertsConfig>,
    biases: [bool; 7],
    tied_head: bool,
    sharing: Sharing,
});

impl Default for LmConfig {
    /// SmolLM 135M's sizes (<https://huggingface.co/HuggingFaceTB/SmolLM-135M>), nothing shared.
    fn default() -> LmConfig {
        LmConfig {
            vocab: 49152,
            width: 576,
            heads: 9,
            kv_heads: 3,
            head_width: None,
            hidden: 1536,
            depth: 30,
            ends: [0, 0],
            context: 2048,
            norm: NormKind::Rms,
            eps: 1e-5,
            shared_norms: false,
            positions: Positions::Rotary,
            rope_base: 10000.0,
            rope_scaling: RopeScaling::None,
            pairing: Pairing::Halves,
            window: None,
            window_from: 0,
            mlp: MlpKind::SwiGlu,
            experts: None,
            biases: [false; 7],
            tied_head: true,
            sharing: Sharing::none(),
        }
    }
}

/// Names of the linear layers that a block may have, attention's first. A plain MLP has no `gate`.
pub const LINEARS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

impl LmConfig {
    /// A small model of bytes in the form of GPT-2, with RMS norms: width 128, 4 heads, an MLP of 512, 64 bytes of context, one block
    /// used at 6 depths.
    pub fn small() -> LmConfig {
        LmConfig::default()
            .vocab(256)
            .width(128)
            .heads(4)
            .kv_heads(4)
            .hidden(512)
            .context(64)
            .depth(6)
            .positions(Positions::Learned)
            .mlp(MlpKind::Gelu)
            .sharing(Sharing::tied())
    }

    /// Whether the number of tokens is that of a learned table.
    pub fn has_learned_positions(&self) -> bool {
        self.positions == Positions::Learned
    }

    /// The width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_width.unwrap_or(self.width / self.heads.max(1))
    }

    /// Name and `[out, in]` of each linear layer of a block.
    pub fn linears(&self) -> Vec<(&'static str, [usize; 2])> {
        let [q, kv] = [self.heads, self.kv_heads].map(|heads| heads * self.head_dim());
        let (d, f) = (self.width, self.hidden);
        let sizes = [[q, d], [kv, d], [kv, d], [d, q], [f, d], [f, d], [d, f]];
        let all = LINEARS.into_iter().zip(sizes);
        all.filter(|(name, _)| *name != "gate" || self.mlp == MlpKind::SwiGlu).collect()
    }

    /// Whether this linear layer has a bias.
    pub(super) fn is_biased(&self, name: &str) -> bool {
        LINEARS.iter().position(|own| *own == name).is_some_and(|i| self.biases[i])
    }

    /// The window of a block, if sequences of this length are longer.
    pub(super) fn window_of(&self, layer: usize, length: usize) -> Option<usize> {
        self.window.filter(|&window| layer >= self.window_from && window < length)
    }

    /// Refuses sizes that no model has before anything is made of them. `name` says where they are from.
    pub(crate) fn check(&self, name: &str) -> Result<()> {
        let wrong = |what: String| Err(Error::config(format!("{name}: {what}")));
        let sizes = [
            ("tokens", self.vocab),
            ("the width", self.width),
            ("heads", self.heads),
            ("key and value heads", self.kv_heads),
            ("the width of the MLP", self.hidden),
            ("blocks", self.depth),
            ("the context", self.context),
        ];
        if let Some((what, size)) = sizes.iter().find(|(_, size)| *size == 0 || *size >= 1 << 31) {
            return wrong(format!("{size} for {what}; it must be above 0 and below 2^31"));
        }
        let (heads, kv, dim) = (self.heads, self.kv_heads, self.head_dim());
        if self.head_width.is_none() && !self.width.is_multiple_of(heads) {
            return wrong(format!("a width of {} is no multiple of {heads} heads", self.width));
        }
        if !heads.is_multiple_of(kv) {
            return wrong(format!("{heads} heads are no multiple of {kv} key and value heads"));
        }
        let rotary = self.positions == Positions::Rotary;
        if rotary && (!(2..=256).contains(&dim) || !dim.is_multiple_of(2)) {
            return wrong(format!("heads of width {dim}; even widths from 2 to 256 are computed"));
        }
        if dim > 256 {
            return wrong(format!("heads of width {dim}; widths to 256 are computed"));
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return wrong(format!("the norms add {}; it must be 0 or above", self.eps));
        }
        let [first, last] = self.ends;
        let own = first.saturating_add(last);
        if own > self.depth || own == self.depth && self.sharing != Sharing::none() {
            return wrong(format!(
                "{first} first and {last} last blocks of {} share nothing, which leaves none for {:?}",
                self.depth, self.sharing
            ));
        }
        if self.window == Some(0) {
            return wrong("a window of 0 hides every key; leave it out for none".into());
        }
        self.check_memory().or_else(wrong)?;
        self.check_experts().or_else(wrong)?;
        match rotary {
            true => self.check_angles().or_else(wrong),
            false => Ok(()),
        }
    }

    /// Refuses sizes of which each alone is possible and that together are no model.
    fn check_memory(&self) -> Result<(), String> {
        let tables = [[self.vocab, self.width], [self.context, self.width.max(self.head_dim())]];
        let mut sizes = self.linears().into_iter().map(|(_, size)| size).chain(tables);
        if let Some([out, inner]) = sizes.find(|[out, inner]| *out as u128 * *inner as u128 >= 1 << 30) {
            return Err(format!("a matrix of [{out}, {inner}], which is more than 2^30 numbers"));
        }
        match self.used_at_most() < 1 << 40 {
            true => Ok(()),
            false => Err(format!("{} weights in all, which is more than 2^40", self.used_at_most())),
        }
    }

    /// Number of weights that are used, if every expert counts.
    pub(super) fn used_at_most(&self) -> u128 {
        let count = |[out, inner]: [usize; 2]| out as u128 * inner as u128;
        let (attention, mlp): (Vec<_>, Vec<_>) =
            self.linears().into_iter().partition(|(name, _)| is_attention(name));
        let sum = |all: Vec<(&str, [usize; 2])>| all.into_iter().map(|(_, size)| count(size)).sum::<u128>();
        let experts = self.experts.map_or(1, |experts| experts.count) as u128;
        let tables = if self.tied_head { 1 } else { 2 };
        self.depth as u128 * (sum(attention) + experts * sum(mlp)) + tables * count([self.vocab, self.width])
    }

    fn check_experts(&self) -> Result<(), String> {
        let Some(ExpertsConfig { count, top, capacity, balance }) = self.experts else { return Ok(()) };
        if top == 0 || top > count || count > 1 << 16 {
            return Err(format!("the {top} best of {count} experts; use 1 or more, and up to {count}"));
        }
        let fits = capacity.is_finite() && capacity > 0.0 && balance.is_finite() && balance >= 0.0;
        let biased = LINEARS.iter().zip(self.biases).any(|(name, has)| has && !is_attention(name));
        match (fits, biased) {
            (true, false) => Ok(()),
            (true, true) => Err("layers of experts have no biases".into()),
            _ => Err(format!("experts of capacity {capacity}, balance {balance}; both are positive numbers")),
        }
    }

    fn check_angles(&self) -> Result<(), String> {
        if !(self.rope_base.is_finite() && self.rope_base > 1.0) {
            return Err(format!("the base of the rotary angles is {}; it must be above 1", self.rope_base));
        }
        let (frequencies, factor) = self.rope_scaling.frequencies(self.head_dim(), self.rope_base);
        match frequencies.into_iter().chain([factor]).all(|x| x.is_finite() && x > 0.0) {
            true => Ok(()),
            false => Err(format!(
                "rotary angles that are scaled by {:?} are no positive numbers",
                self.rope_scaling
            )),
        }
    }
}

/// Whether a linear layer is one of attention's.
pub(crate) fn is_attention(name: &str) -> bool {
    LINEARS[..4].contains(&name)
}
