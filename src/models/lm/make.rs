//! New models, drawn from a generator.

use super::config::{ExpertsConfig, LmConfig, MlpKind, NormKind, Positions, is_attention};
use super::table::TokenTable;
use super::{FeedForward, Lm, LmBlock};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::experts::Experts;
use crate::models::sharing::{Hash, Made, Matrix, Sharing, Sites, Stack};
use crate::nn::{Attention, Embedding, Init, Linear, Mlp, Norm, SiteEmbedding};
use crate::ops::product::site::Site;
use crate::ops::sequence::rope::Rope;
use crate::rng::Rng;
use crate::share::{Draw, Tied};
use std::sync::Arc;

/// Initial standard deviations of most matrices, and of those whose results are added to the residual stream. As in
/// GPT-2, the first is about 0.02 at width 768 and scales with the width, and the second also shrinks with the depth.
fn stds(c: &LmConfig) -> [f32; 2] {
    let std = (0.4 / c.width as f32).sqrt();
    [std, std / (2.0 * c.depth as f32).sqrt()]
}

impl LmConfig {
    /// The matrices of a block, in the order in which [`LmBlock`]s take them: attention's, then the MLP's, or the router and each
    /// expert's.
    fn matrices(&self) -> Vec<Matrix> {
        let [std, added] = stds(self);
        let matrix = |(name, size): (&'static str, [usize; 2])| Matrix {
            name,
            size,
            std: if matches!(name, "o" | "down") { added } else { std },
        };
        let (attention, mlp): (Vec<_>, Vec<_>) =
            self.linears().into_iter().partition(|(name, _)| is_attention(name));
        let mut all: Vec<Matrix> = attention.into_iter().map(matrix).collect();
        let count = self.experts.map_or(1, |experts| experts.count);
        if self.experts.is_some() {
            all.push(Matrix { name: "router", size: [count, self.width], std });
        }
        all.extend((0..count).flat_map(|_| mlp.clone()).map(matrix));
        all
    }

    /// The tables of token vectors and of scores.
    fn tables(&self) -> Vec<Matrix> {
        let (size, std) = ([self.vocab, self.width], (1.0 / self.width as f32).sqrt());
        let table = |name| Matrix { name, size, std };
        let names: &[&'static str] = if self.tied_head { &["embedding"] } else { &["embedding", "head"] };
        names.iter().copied().map(table).collect()
    }

    /// What each table and then each matrix of every depth reads of one store.
    pub(crate) fn draws(&self, hash: &Hash) -> Result<Vec<Draw>> {
        hash.draws(&Stack {
            depth: self.depth,
            matrices: &self.matrices(),
            tables: &self.tables(),
            named: false,
        })
    }

    /// A norm with gain 1.
    fn new_norm(&self, gpu: &Gpu) -> Norm {
        match self.norm {
            NormKind::Rms => Norm::rms(gpu, self.width, self.eps),
            NormKind::Layer => Norm::layer(gpu, self.width, self.eps),
        }
    }

    /// The rotary angles, if there are any.
    pub(crate) fn rope(&self, gpu: &Gpu) -> Option<Rope> {
        (self.positions == Positions::Rotary).then(|| {
            let (frequencies, factor) = self.rope_scaling.frequencies(self.head_dim(), self.rope_base);
            Rope::with_frequencies(gpu, self.context, &frequencies, factor, self.pairing)
        })
    }
}

/// Makes a block of sites in the order of [`LmConfig::matrices`].
fn block(gpu: &Gpu, c: &LmConfig, sites: Vec<Arc<dyn Site>>) -> LmBlock {
    let mut sites = sites.into_iter();
    let mut next = || sites.next().expect("a site for each matrix");
    let linear = |name: &str, site: Arc<dyn Site>| {
        let out = site.size()[0];
        Linear::from_site(site, c.is_biased(name).then(|| Init::Zeros.leaf(gpu, [out], &mut Rng::new(0))))
    };
    let [q, k, v, o] = ["q", "k", "v", "o"].map(|name| linear(name, next()));
    let router = c.experts.map(|_| next());
    let mut mlp = || {
        let gate = (c.mlp == MlpKind::SwiGlu).then(|| linear("gate", next()));
        let [up, down] = ["up", "down"].map(|name| linear(name, next()));
        Mlp { gate, up, down, activation: c.mlp.activation() }
    };
    let mlp = match (c.experts, router) {
        (Some(ExpertsConfig { count, top, capacity, .. }), Some(router)) => {
            let experts = (0..count).map(|_| mlp()).collect();
            FeedForward::Experts(Experts { router, experts, top, capacity })
        }
        _ => FeedForward::Dense(mlp()),
    };
    let attention = Attention { q, k, v, o, heads: c.heads, kv_heads: c.kv_heads };
    LmBlock { norm1: c.new_norm(gpu), attention, norm2: c.new_norm(gpu), mlp }
}

/// Makes the sites of all depths: those of the recipe, and at both ends blocks that share nothing.
fn sites(gpu: &Gpu, c: &LmConfig, rng: &mut Rng) -> Result<Sites> {
    let (matrices, tables, [first, last]) = (c.matrices(), c.tables(), c.ends);
    let own = |depth: usize, sharing: &Sharing, tables: &[Matrix], rng: &mut Rng| -> Result<Sites> {
        let stack = Stack { depth, matrices: &matrices, tables, named: false };
        let wrong = |what: &dyn std::fmt::Display| {
            Error::config(format!("lm: {sharing:?} for {depth} depths: {what}"))
        };
        if depth == 0 {
            return Ok(Sites::default());
        }
        let made = sharing.sites(gpu, &stack, rng).map_err(|error| wrong(&error))?;
        made.fit(&stack).map_err(|what| wrong(&what))?;
        Ok(made)
    };
    let start = own(first, &Sharing::none(), &[], rng)?;
    let middle = own(c.depth - first - last, &c.sharing, &tables, rng)?;
    let end = own(last, &Sharing::none(), &[], rng)?;
    let shifted = |made: Made| Made { layers: made.layers.start + first..made.layers.end + first, ..made };
    Ok(Sites {
        by_depth: [start.by_depth, middle.by_depth, end.by_depth].concat(),
        made: middle.made.into_iter().map(shifted).collect(),
        tables: middle.tables,
    })
}

/// Lets depths that use the same matrix for their queries use the norms of the first of them.
fn share_norms(blocks: &mut [LmBlock]) {
    // The matrix itself, alone or with a part of the depth's own, and not what many matrices are made of.
    let leaf = |block: &LmBlock| {
        let (site, first) =
            (&block.attention.q.weight, block.attention.q.weight.leaves().into_iter().next()?);
        (first.shape()[..] == site.size()).then(|| first.leaf_id())?
    };
    for t in 1..blocks.len() {
        let own = leaf(&blocks[t]);
        if let Some(first) = (0..t).find(|&s| own.is_some() && leaf(&blocks[s]) == own) {
            let norms = [blocks[first].norm1.clone(), blocks[first].norm2.clone()];
            [blocks[t].norm1, blocks[t].norm2] = norms;
        }
    }
}

impl Lm {
    /// Makes a new model, drawn from `rng`.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::models::lm::{Lm, LmConfig};
    /// use tiebeam::models::sharing::Sharing;
    /// use tiebeam::nn::Module;
    /// // The form of a small Llama: the first block is its own, and two blocks are used in turn three times.
    /// let config = LmConfig::default().vocab(256).width(32).heads(4).kv_heads(2).hidden(64).context(16);
    /// let config = config.depth(7).ends([1, 0]).sharing(Sharing::cycle(2, 4));
    /// let model = Lm::new(&gpu, config, &mut Rng::new(1));
    /// let tokens = Tensor::from_slice(&gpu, &[72u32, 101, 108, 108, 111], [1, 5]);
    /// assert_eq!(model.forward(&tokens).shape()[..], [1, 5, 256]);
    /// let all = model.parameters();
    /// assert!(all.used() > all.stored());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// When the sizes make no model, or the kind of sharing does not fit them.
    #[track_caller]
    pub fn new(gpu: &Gpu, config: LmConfig, rng: &mut Rng) -> Lm {
        Lm::try_new(gpu, config, rng).unwrap_or_else(|error| panic!("{error}"))
    }

    /// [`Lm::new`] for settings of a file or a user, which may not fit.
    ///
    /// # Errors
    /// [`Error::Config`] for what makes [`Lm::new`] panic.
    pub fn try_new(gpu: &Gpu, config: LmConfig, rng: &mut Rng) -> Result<Lm> {
        let c = &config;
        c.check("lm")?;
        let std = (1.0 / c.width as f32).sqrt();
        let table = Embedding::new(gpu, c.vocab, c.width, Init::Normal(std), rng);
        let learned = c.positions == Positions::Learned;
        let positions = learned.then(|| Init::Normal(0.02).leaf(gpu, [c.context, c.width], rng));
        let made = sites(gpu, c, rng)?;
        let mut blocks: Vec<LmBlock> = made.by_depth.into_iter().map(|sites| block(gpu, c, sites)).collect();
        if c.shared_norms {
            share_norms(&mut blocks);
        }
        let mut tables = made.tables.into_iter();
        let embedding = match tables.next() {
            Some(site) => TokenTable::Made(SiteEmbedding::new(site)),
            None => TokenTable::Stored(table),
        };
        let head = match tables.next() {
            Some(site) => Some(Linear::from_site(site, None)),
            None if c.tied_head => None,
            None => {
                let leaf = Init::Normal(std).leaf(gpu, [c.vocab, c.width], rng);
                Some(Linear::from_site(Tied::new(&leaf).shared(), None))
            }
        };
        let (norm, rope) = (c.new_norm(gpu), c.rope(gpu));
        Ok(Lm { made: made.made, embedding, positions, blocks, norm, head, rope, config })
    }
}
