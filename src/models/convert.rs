//! Converts a stack of layers to shared ones: which layer replaces many, and what each keeps of its own.
//!
//! Sources: relaxed recursive transformers, arXiv 2410.20672 (CYCLE, the three selections, LoRA from truncated SVD); learngene
//! by stage-wise sharing (SWS), IJCAI 2024 (expansion by a layer map).

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::linalg;
use crate::models::recursive::{Recursive, RecursiveConfig, Sharing};
use crate::nn::{Block, Linear, Norm, Parameters};
use crate::ops::product::site::Site;
use crate::share::{LowRank, Tied};
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

/// The six linear layers of a block, in a fixed order.
fn linears(block: &mut Block) -> [&mut Linear; 6] {
    let Block { attention: a, mlp, .. } = block;
    [&mut a.q, &mut a.k, &mut a.v, &mut a.o, &mut mlp.up, &mut mlp.down]
}

/// Makes a new leaf with the same content.
fn copy(x: &Tensor) -> Tensor {
    let y = x.detach().affine(1.0, 0.0);
    y.evaluate();
    y.requires_grad()
}

fn own_norm(norm: &Norm) -> Norm {
    Norm { gain: copy(&norm.gain), bias: norm.bias.as_ref().map(copy), eps: norm.eps }
}

/// Copies a block. Every site's weight is materialised as a leaf of its own, and norms are copied.
fn own_block(block: &Block) -> Block {
    let mut new = block.clone();
    new.norm1 = own_norm(&block.norm1);
    new.norm2 = own_norm(&block.norm2);
    for layer in linears(&mut new) {
        let w = layer.weight.expand();
        w.evaluate();
        layer.weight = Tied::new(&w.requires_grad()).shared();
        layer.bias = layer.bias.as_ref().map(copy);
    }
    new
}

impl Recursive {
    /// Returns this model with its matrices tied in turn: `blocks` blocks are stored, each depth has a low-rank part of
    /// `rank` (0 for none), and norms are kept. With a rank as large as the matrices, the result computes what this model
    /// does.
    ///
    /// # Errors
    /// [`Error::Config`] when `blocks` does not divide the depth; when the device fails.
    pub fn recursive(&self, blocks: usize, rank: usize, selection: Selection) -> Result<Recursive> {
        check_cycle(self.blocks.len(), blocks)?;
        let mut new: Vec<Block> = self.blocks_now().iter().map(own_block).collect();
        for i in 0..6 {
            let weights: Vec<Tensor> =
                new.iter_mut().map(|block| linears(block)[i].weight.leaves().remove(0)).collect();
            let sites = recursive_sites(&weights, blocks, rank, selection)?;
            for (block, site) in new.iter_mut().zip(sites) {
                linears(block)[i].weight = site;
            }
        }
        // A rank above the matrices' shorter side was reduced to it.
        Ok(self.with(new, Sharing::cycle(blocks, rank.min(self.config.width))))
    }

    /// Returns this model with separate blocks: depth `i` of the result starts from depth `map[i]` of this one.
    /// `0..depth` unties a model; a longer map makes a deeper model from the stages of a tied one.
    ///
    /// # Errors
    /// [`Error::Config`] when the map is empty or names a depth that does not exist.
    pub fn untied(&self, map: &[usize]) -> Result<Recursive> {
        let depth = self.blocks.len();
        if map.is_empty() || map.iter().any(|&l| l >= depth) {
            return Err(Error::config(format!(
                "untie: map {map:?} of {depth} depths; name depths below {depth}"
            )));
        }
        let blocks = self.blocks_now();
        Ok(self.with(map.iter().map(|&l| own_block(&blocks[l])).collect(), Sharing::none()))
    }

    fn with(&self, blocks: Vec<Block>, sharing: Sharing) -> Recursive {
        let mut embedding = self.embedding.clone();
        embedding.table = copy(&embedding.table);
        Recursive {
            config: RecursiveConfig { depth: blocks.len(), sharing, ..self.config },
            dictionaries: Vec::new(),
            embedding,
            positions: copy(&self.positions),
            blocks,
            norm: own_norm(&self.norm),
        }
    }
}

/// Returns where each leaf of an untied model comes from: `(its name, the name in the tied model)`. With this, optimizer
/// state can be carried over. `tied` must be the model that was untied by `map`, and must store every matrix in the form
/// in which it is used.
pub fn untied_names(tied: &Recursive, map: &[usize]) -> Vec<(String, String)> {
    let listed = Parameters::of(tied);
    // A shared leaf is listed under the first depth that uses it.
    let name_of = |leaf: &Tensor| {
        let found = listed.named().iter().find(|(_, other)| other.leaf_id() == leaf.leaf_id());
        found.map(|(name, _)| name.clone()).unwrap_or_default()
    };
    const NAMES: [&str; 6] =
        ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"];
    let mut all: Vec<(String, String)> =
        ["embedding.table", "positions", "norm.gain"].map(|name| (name.into(), name.into())).to_vec();
    for (new, &old) in map.iter().enumerate() {
        let mut block = tied.blocks[old].clone();
        for (name, layer) in NAMES.iter().zip(linears(&mut block)) {
            let leaf = layer.weight.leaves().remove(0);
            all.push((format!("blocks.{new}.{name}.weight"), name_of(&leaf)));
        }
        for (name, norm) in [("norm1", &block.norm1), ("norm2", &block.norm2)] {
            all.push((format!("blocks.{new}.{name}.gain"), name_of(&norm.gain)));
        }
    }
    all
}
