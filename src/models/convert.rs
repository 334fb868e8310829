//! Converts a stack of layers to shared ones: which layer replaces many, and what each keeps of its own.
//!
//! Sources: relaxed recursive transformers, arXiv 2410.20672 (CYCLE, the three selections, LoRA from truncated SVD); learngene
//! by stage-wise sharing (SWS), IJCAI 2024 (expansion by a layer map).

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::linalg;
use crate::models::lm::{FeedForward, Lm, LmBlock, LmConfig, TokenTable, copied_norm, copy, is_attention};
use crate::models::sharing::{Hash, HashMapping, Sharing};
use crate::nn::{Linear, Parameters, SiteEmbedding};
use crate::ops::product::site::Site;
use crate::setters::setters;
use crate::share::{Hashed, LowRank, Tied};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::sync::Arc;

/// The layers from which the stored blocks are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Selection {
    /// Layers at even distances, with the first and the last among them. Best without low-rank parts.
    Stepwise,
    /// Each block is the mean of the layers that will use it. Best with low-rank parts.
    Average,
    /// The first layers.
    Lower,
}

/// Returns the layers from which block `k` of `blocks` is made, if `layers` use the blocks in turn (CYCLE). If there are
/// several, the block is their mean.
fn sources(layers: usize, blocks: usize, k: usize, selection: Selection) -> Vec<usize> {
    match selection {
        Selection::Stepwise if blocks == 1 => vec![0],
        Selection::Stepwise => vec![(k * (layers - 1) + (blocks - 1) / 2) / (blocks - 1)],
        Selection::Average => (k..layers).step_by(blocks).collect(),
        Selection::Lower => vec![k],
    }
}

/// Returns factors `B [out, rank]` and `A [rank, in]` of the best approximation of `w [out, in]` of this rank. If
/// `out <= in`, `B` has orthonormal columns and `A = B^T w`. Otherwise `A` has orthonormal rows and `B = w A^T`. At the
/// rank of the shorter side, `B A` is `w` up to rounding.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When `w` is not a matrix, or the rank is 0 or above its shorter side.
#[track_caller]
pub fn low_rank(w: &Tensor, rank: usize) -> Result<[Tensor; 2]> {
    check_rank("low_rank", w, rank);
    let w = w.detach().cast(DType::F32);
    let wide = w.shape()[0] <= w.shape()[1];
    let gram = if wide { w.matmul_f32(&w.t()) } else { w.t().matmul_f32(&w) };
    let first = eigenvectors(&gram, rank)?;
    let [b, a] =
        if wide { [first.t().contiguous(), first.matmul_f32(&w)] } else { [w.matmul_f32(&first.t()), first] };
    b.evaluate();
    a.evaluate();
    Ok([b, a])
}

/// Returns factors `B [out, rank]` and `A [rank, in]` whose product has the least error on inputs that were seen: they
/// minimise `||(w - B A) X^T||` for inputs `X` with `seen [in, in]` `= X^T X`. `B` has orthonormal columns, the first
/// eigenvectors of `w seen w^T`, and `A = B^T w`. MASA (arXiv 2508.04581, section 3.3) whitens the residual with a
/// Cholesky factor of `seen`, which gives the same.
///
/// # Errors
/// When the device fails.
///
/// # Panics
/// When the sizes do not fit, or the rank is 0 or above the shorter side of `w`.
#[track_caller]
pub fn low_rank_seen(w: &Tensor, seen: &Tensor, rank: usize) -> Result<[Tensor; 2]> {
    check_rank("low_rank_seen", w, rank);
    let inner = w.shape()[1];
    assert!(**seen.shape() == [inner, inner], "low_rank_seen: {} seen for {}", seen.shape(), w.shape());
    let w = w.detach().cast(DType::F32);
    let first = eigenvectors(&w.matmul_f32(&seen.detach()).matmul_f32(&w.t()), rank)?;
    let [b, a] = [first.t().contiguous(), first.matmul_f32(&w)];
    b.evaluate();
    a.evaluate();
    Ok([b, a])
}

#[track_caller]
fn check_rank(op: &str, w: &Tensor, rank: usize) {
    let most = w.shape().iter().copied().min().unwrap_or(0);
    assert!(
        w.shape().len() == 2 && rank > 0 && rank <= most,
        "{op}: rank {rank} of {}; use 1 to {most}",
        w.shape()
    );
}

/// Returns the first `count` eigenvectors of a symmetric matrix, one per row.
fn eigenvectors(gram: &Tensor, count: usize) -> Result<Tensor> {
    let n = gram.shape()[0];
    let values: Vec<f64> = gram.to_vec::<f32>()?.into_iter().map(f64::from).collect();
    let (_, vectors) = linalg::symmetric_eigen(&values, n);
    let first: Vec<f32> = vectors[..count * n].iter().map(|&x| x as f32).collect();
    Ok(Tensor::from_slice(gram.gpu(), &first, [count, n]))
}

/// Makes sites for the matrices of a stack that use `blocks` stored ones in turn. Each has a low-rank part of `rank`
/// (none for 0), from the truncated SVD of its difference to the stored matrix. The rank is limited to the matrix's
/// shorter side; then every site gives the matrix that it replaces.
///
/// # Errors
/// [`Error::Config`] when `blocks` does not divide the number of layers; when the device fails.
pub fn recursive_sites(
    weights: &[Tensor],
    blocks: usize,
    rank: usize,
    selection: Selection,
) -> Result<Vec<Arc<dyn Site>>> {
    let layers = weights.len();
    check_cycle(layers, blocks)?;
    let stored: Vec<Tensor> = (0..blocks)
        .map(|k| {
            let from = sources(layers, blocks, k, selection);
            let sum =
                from[1..].iter().fold(weights[from[0]].detach(), |sum, &l| sum.add(&weights[l].detach()));
            let mean = sum.scale(1.0 / from.len() as f32);
            mean.evaluate();
            mean.requires_grad()
        })
        .collect();
    weights
        .iter()
        .enumerate()
        .map(|(l, w)| -> Result<Arc<dyn Site>> {
            let theta = &stored[l % blocks];
            if rank == 0 {
                return Ok(Tied::new(theta).shared());
            }
            let lacks = w.detach().sub(&theta.detach());
            let [b, a] = low_rank(&lacks, rank.min(w.shape()[0]).min(w.shape()[1]))?;
            Ok(LowRank::new(theta, &a.requires_grad(), &b.requires_grad(), 1.0).shared())
        })
        .collect()
}

fn check_cycle(layers: usize, blocks: usize) -> Result<()> {
    if blocks == 0 || !layers.is_multiple_of(blocks) {
        let fits: Vec<usize> = (1..=layers).filter(|b| layers.is_multiple_of(*b)).collect();
        return Err(Error::config(format!(
            "conversion: {blocks} blocks in turn do not divide {layers} layers; use one of {fits:?}"
        )));
    }
    Ok(())
}

/// How the layers of a model are tied in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecursivePlan {
    /// Blocks that are stored and used in turn; they must divide the number of those that are converted.
    pub blocks: usize,
    /// Rank of each depth's low-rank part, 0 for none.
    pub rank: usize,
    /// From which layers the stored blocks are made.
    pub selection: Selection,
    /// Blocks at the start and at the end that are kept.
    pub ends: [usize; 2],
}

setters!(RecursivePlan { blocks: usize, rank: usize, selection: Selection, ends: [usize; 2] });

impl Default for RecursivePlan {
    /// One block, of the mean of all layers, without low-rank parts.
    fn default() -> RecursivePlan {
        RecursivePlan { blocks: 1, rank: 0, selection: Selection::Average, ends: [0, 0] }
    }
}

/// Copies a block. Every site's weight is materialised as a leaf of its own, and norms are copied.
fn own_block(block: &LmBlock) -> LmBlock {
    let mut new = block.clone();
    new.norm1 = copied_norm(&block.norm1);
    new.norm2 = copied_norm(&block.norm2);
    for (_, layer) in new.linears_mut() {
        let w = layer.weight.expand();
        w.evaluate();
        layer.weight = Tied::new(&w.requires_grad()).shared();
        layer.bias = layer.bias.as_ref().map(copy);
    }
    if let FeedForward::Experts(experts) = &mut new.mlp {
        experts.router = Tied::new(&copy(&experts.router.expand())).shared();
    }
    new
}

impl Lm {
    /// Returns this model with its matrices tied in turn: `blocks` blocks are stored, each depth has a low-rank part of
    /// `rank` (0 for none), and norms and biases are kept. With a rank as large as the matrices, the result computes what this model
    /// does.
    ///
    /// # Errors
    /// [`Error::Config`] when `blocks` does not divide the depths between the ends, and for models of experts; when the device fails.
    pub fn recursive(&self, plan: RecursivePlan) -> Result<Lm> {
        let RecursivePlan { blocks, rank, selection, ends: [first, last] } = plan;
        let depth = self.blocks.len();
        let middle = depth.checked_sub(first.saturating_add(last)).filter(|&middle| middle > 0);
        let middle = middle.ok_or_else(|| {
            Error::config(format!("conversion: {first} first and {last} last blocks are kept of {depth}"))
        })?;
        check_cycle(middle, blocks)?;
        self.check_dense("conversion")?;
        let mut new: Vec<LmBlock> = no_grad(|| self.blocks_now()).iter().map(own_block).collect();
        for (name, _) in self.config.linears() {
            let range = &mut new[first..first + middle];
            let weights: Vec<Tensor> =
                range.iter().map(|block| block.linear(name).weight.leaves().remove(0)).collect();
            let sites = recursive_sites(&weights, blocks, rank, selection)?;
            for (block, site) in range.iter_mut().zip(sites) {
                block.linear_mut(name).weight = site;
            }
        }
        let config = self.config.clone().ends(plan.ends).shared_norms(false);
        Ok(self.with(new, config.sharing(Sharing::cycle(blocks, rank))))
    }

    /// Returns this model with separate blocks: depth `i` of the result starts from depth `map[i]` of this one.
    /// `0..depth` unties a model; a longer map makes a deeper model from the stages of a tied one.
    ///
    /// # Errors
    /// [`Error::Config`] when the map is empty or names a depth that does not exist.
    pub fn untied(&self, map: &[usize]) -> Result<Lm> {
        let depth = self.blocks.len();
        if map.is_empty() || map.iter().any(|&l| l >= depth) {
            return Err(Error::config(format!(
                "untie: map {map:?} of {depth} depths; name depths below {depth}"
            )));
        }
        let blocks = no_grad(|| self.blocks_now());
        let config = self.config.clone().ends([0, 0]).shared_norms(false).sharing(Sharing::none());
        let config = config.window_from(self.window_behind(map)?);
        Ok(self.with(map.iter().map(|&l| own_block(&blocks[l])).collect(), config))
    }

    /// The first block that has a window of attention once the depths of `map` are taken.
    fn window_behind(&self, map: &[usize]) -> Result<usize> {
        let first = self.config.window_from;
        let whole = map.iter().take_while(|&&l| l < first).count();
        match self.config.window.is_some() && map[whole..].iter().any(|&l| l < first) {
            true => Err(Error::config(format!(
                "untie: in the order {map:?} blocks without a window of attention, those before {first}, stand behind ones that have it"
            ))),
            false => Ok(if self.config.window.is_some() { whole } else { first }),
        }
    }

    /// Returns this model without the blocks in `removed`. The others form groups of `group` neighbours that share the
    /// matrices of the first, and each keeps its own norms and biases (FoldGPT).
    ///
    /// # Errors
    /// [`Error::Config`] when no block would remain, a removed block does not exist, or `group` is 0; for models of experts.
    pub fn folded(&self, removed: &[usize], group: usize) -> Result<Lm> {
        let depth = self.blocks.len();
        let kept: Vec<usize> = (0..depth).filter(|l| !removed.contains(l)).collect();
        if kept.is_empty() || group == 0 || removed.iter().any(|&l| l >= depth) {
            let message = format!(
                "fold: {removed:?} removed of {depth} blocks, groups of {group}; keep a block, group 1 or more"
            );
            return Err(Error::config(message));
        }
        self.check_dense("fold")?;
        let mut folded = self.untied(&kept)?;
        for i in 0..folded.blocks.len() {
            let first = folded.blocks[i / group * group].clone();
            for ((_, to), (_, from)) in folded.blocks[i].linears_mut().into_iter().zip(first.linears()) {
                to.weight = from.weight.clone();
            }
        }
        folded.config.sharing = Sharing::fold(group);
        Ok(folded)
    }

    /// Returns this model with all of its matrices and tables read from one store of `1 / factor` as many numbers (STABLE-RPS). Each
    /// number is the one with the least squared error over the weights that read it. That keeps about `1 / factor` of the weights' squared
    /// norm, or more where their deviations differ: the model has to be trained after it.
    ///
    /// # Errors
    /// [`Error::Config`] when the factor is below 1; when the device fails.
    pub fn hashed(&self, factor: f64) -> Result<Lm> {
        let config = self.config.clone().ends([0, 0]).shared_norms(false).sharing(Sharing::hashed(factor));
        let hash = Hash { factor, mapping: HashMapping::Stable };
        let draws = config.draws(&hash)?;
        let source = self.copied();
        let mut weights: Vec<Arc<dyn Site>> = vec![source.embedding.weight()];
        weights.extend(source.head.iter().map(|head| head.weight.clone()));
        for block in &source.blocks {
            weights.extend(block.sites());
        }
        let stored = draws[0].stored;
        let (mut sums, mut squares) = (vec![0.0f32; stored], vec![0.0f32; stored]);
        for (weight, draw) in weights.iter().zip(&draws) {
            let values = weight.expand().to_vec::<f32>()?;
            for ((at, sign), value) in draw.positions().into_iter().zip(draw.signs()).zip(values) {
                sums[at as usize] += draw.scale * sign * value;
                squares[at as usize] += draw.scale * draw.scale;
            }
        }
        let values: Vec<f32> = sums
            .iter()
            .zip(&squares)
            .map(|(sum, square)| if *square > 0.0 { sum / square } else { 0.0 })
            .collect();
        let omega = Tensor::from_slice(self.gpu(), &values, [stored]).requires_grad();
        let mut sites = draws.into_iter().map(|draw| -> Arc<dyn Site> { Hashed::new(&omega, draw).shared() });
        let mut next = || sites.next().expect("a draw for each weight");
        let mut new = Lm { config, ..source };
        new.embedding = TokenTable::Made(SiteEmbedding::new(next()));
        new.head = new.head.map(|head| Linear { weight: next(), ..head });
        for block in &mut new.blocks {
            block.sites_mut().into_iter().for_each(|site| *site = next());
        }
        Ok(new)
    }

    /// Refuses a model of experts, whose matrices have no one name.
    pub(crate) fn check_dense(&self, what: &str) -> Result<()> {
        match self.config.experts {
            Some(_) => Err(Error::config(format!("{what}: models of experts are not converted"))),
            None => Ok(()),
        }
    }

    /// These blocks under copies of the rest of this model.
    pub(crate) fn with(&self, blocks: Vec<LmBlock>, config: LmConfig) -> Lm {
        let head = self.head.as_ref().map(|head| {
            let weight = Tied::new(&copy(&head.weight.expand())).shared();
            Linear::from_site(weight, head.bias.as_ref().map(copy))
        });
        Lm {
            made: Vec::new(),
            config: config.depth(blocks.len()),
            embedding: self.embedding.copied(copy),
            positions: self.positions.as_ref().map(copy),
            blocks,
            norm: copied_norm(&self.norm),
            head,
            rope: self.rope.clone(),
        }
    }
}

/// Returns where each leaf of an untied model comes from: `(its name, the name in the tied model)`. With this, optimizer
/// state can be carried over. `tied` must be the model that was untied by `map`, and must store every matrix in the form
/// in which it is used.
pub fn untied_names(tied: &Lm, map: &[usize]) -> Vec<(String, String)> {
    let listed = Parameters::of(tied);
    // A shared leaf is listed under the first depth that uses it.
    let name_of = |leaf: &Tensor| {
        let found = listed.named().iter().find(|(_, other)| other.leaf_id() == leaf.leaf_id());
        found.map(|(name, _)| name.clone()).unwrap_or_default()
    };
    let blocks = listed.named().iter().filter(|(name, _)| !name.starts_with("blocks."));
    let mut all: Vec<(String, String)> = blocks.map(|(name, _)| (name.clone(), name.clone())).collect();
    for (new, &old) in map.iter().enumerate() {
        let block = &tied.blocks[old];
        for (name, layer) in block.linears() {
            let room = if is_attention(name) { "attention" } else { "mlp" };
            let leaf = layer.weight.leaves().remove(0);
            all.push((format!("blocks.{new}.{room}.{name}.weight"), name_of(&leaf)));
        }
        for (name, norm) in [("norm1", &block.norm1), ("norm2", &block.norm2)] {
            all.push((format!("blocks.{new}.{name}.gain"), name_of(&norm.gain)));
        }
    }
    all
}
