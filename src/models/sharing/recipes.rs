//! The recipes of depth: blocks in turn, stages, dictionaries, low rank.

use super::made::Made;
use super::recipe::{Matrix, Recipe, Sites, Stack};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::Init;
use crate::ops::product::site::Site;
use crate::rng::Rng;
use crate::share::{CoefficientNet, Dictionary, Factored, LowRank, Tied};
use crate::tensor::Tensor;
use std::sync::Arc;

/// Draws the matrices of one block.
fn drawn(gpu: &Gpu, matrices: &[Matrix], rng: &mut Rng) -> Vec<Tensor> {
    matrices.iter().map(|matrix| Init::Normal(matrix.std).leaf(gpu, matrix.size, rng)).collect()
}

fn tied(theta: &Tensor) -> Arc<dyn Site> {
    Tied::new(theta).shared()
}

/// Makes a site of `theta` with a low-rank part that is initially zero.
fn lora(gpu: &Gpu, theta: &Tensor, rank: usize, scale: f32, rng: &mut Rng) -> Arc<dyn Site> {
    let (out, inner) = (theta.shape()[0], theta.shape()[1]);
    let rank = rank.min(out).min(inner);
    let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [rank, inner], rng);
    let b = Init::Zeros.leaf(gpu, [out, rank], rng);
    LowRank::new(theta, &a, &b, scale).shared()
}

/// The projections of attention, whose weights MASA makes of dictionaries.
pub(crate) const PROJECTIONS: [&str; 4] = ["q", "k", "v", "o"];

impl Stack<'_> {
    /// Whether a recipe of attention shares this matrix: q, k, v and, if `output`, o, or others that were named for it.
    fn shares(&self, matrix: &Matrix, output: bool) -> bool {
        let is_output = matrix.name == "o";
        (output || !is_output) && (self.named || PROJECTIONS.contains(&matrix.name))
    }
}

/// The rank of a projection's own part in [`MasaGroups`]: more rank helps q and o most.
pub(crate) fn own_rank(rank: usize, name: &str) -> usize {
    if matches!(name, "q" | "o") { rank } else { rank.div_ceil(2) }
}

pub struct Untied;

impl Recipe for Untied {
    fn text(&self) -> String {
        "none".into()
    }
    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let block = |_| drawn(gpu, stack.matrices, rng).iter().map(tied).collect();
        Ok(Sites { by_depth: (0..stack.depth).map(block).collect(), ..Sites::default() })
    }
}

/// Blocks used in turn, of which `tied` and `tied-lora` have one.
pub struct Cycle {
    pub blocks: usize,
    pub rank: usize,
    /// The factor of the low-rank parts of `tied-lora`, which is the only one that names it.
    pub lora: Option<f32>,
}

impl Recipe for Cycle {
    fn text(&self) -> String {
        match (self.lora, self.blocks, self.rank) {
            (Some(scale), _, rank) => format!("tied-lora rank {rank} scale {scale}"),
            (None, 1, 0) => "tied".into(),
            (None, blocks, rank) => format!("cycle {blocks} rank {rank}"),
        }
    }
    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let depth = stack.depth;
        if self.blocks == 0 || !depth.is_multiple_of(self.blocks) {
            let fits: Vec<usize> = (1..=depth).filter(|blocks| depth.is_multiple_of(*blocks)).collect();
            let message = format!("{} blocks do not divide {depth} depths; use one of {fits:?}", self.blocks);
            return Err(Error::config(message));
        }
        let mut stored: Vec<Vec<Tensor>> = Vec::new();
        let block = |t: usize| {
            if t < self.blocks {
                stored.push(drawn(gpu, stack.matrices, rng));
            }
            let site = |theta: &Tensor| match self.rank {
                0 => tied(theta),
                rank => lora(gpu, theta, rank, self.lora.unwrap_or(1.0), rng),
            };
            stored[t % self.blocks].iter().map(site).collect()
        };
        Ok(Sites { by_depth: (0..depth).map(block).collect(), ..Sites::default() })
    }
}

/// Neighbouring depths that use one block. The sizes of the stages are given, or all are of one size but the last.
pub enum Stages {
    Sizes(Vec<usize>),
    Every(usize),
}

impl Stages {
    /// The stage of each depth.
    fn of(&self, depth: usize) -> Result<Vec<usize>> {
        let sizes = match self {
            Stages::Every(0) => return Err(Error::config("a group has at least one depth")),
            Stages::Every(group) => return Ok((0..depth).map(|t| t / group).collect()),
            Stages::Sizes(sizes) => sizes,
        };
        if sizes.contains(&0) || sizes.iter().fold(0usize, |sum, &n| sum.saturating_add(n)) != depth {
            return Err(Error::config(format!(
                "stages of {sizes:?} depths, and the model has {depth}; write sizes that add up to it, `stages 1 {}`",
                depth.saturating_sub(1).max(1)
            )));
        }
        Ok(sizes.iter().enumerate().flat_map(|(stage, &size)| vec![stage; size]).collect())
    }
}

impl Recipe for Stages {
    fn text(&self) -> String {
        match self {
            Stages::Every(group) => format!("fold {group}"),
            Stages::Sizes(sizes) => {
                let sizes: Vec<String> = sizes.iter().map(ToString::to_string).collect();
                format!("stages {}", sizes.join(" "))
            }
        }
    }
    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let of = self.of(stack.depth)?;
        let count = of.last().map_or(0, |last| last + 1);
        let stored: Vec<_> = (0..count).map(|_| drawn(gpu, stack.matrices, rng)).collect();
        let block = |stage: &usize| stored[*stage].iter().map(tied).collect();
        Ok(Sites { by_depth: of.iter().map(block).collect(), ..Sites::default() })
    }
}

pub struct Masa {
    pub atoms: usize,
    pub output: bool,
    /// Whether a small network makes the coefficients in training, as in the paper.
    pub net: bool,
}

/// Width of a layer's vector, and of the network that makes its coefficients.
const NET: [usize; 2] = [16, 32];

/// Makes a network that adds little to coefficients `base [L, S]` at first.
fn coefficient_net(gpu: &Gpu, base: &Tensor, rng: &mut Rng) -> CoefficientNet {
    let ([layers, atoms], [embedding, hidden]) = ([base.shape()[0], base.shape()[1]], NET);
    let mut layer =
        |out, inner| [Init::XavierNormal.leaf(gpu, [out, inner], rng), Init::Zeros.leaf(gpu, [out], rng)];
    let parts = [layer(hidden, embedding), layer(hidden, hidden), layer(atoms, hidden)];
    let embedding = Init::Normal(0.1).leaf(gpu, [layers, embedding], rng);
    CoefficientNet { embedding, layers: parts, base: Some(base.clone()) }
}

impl Recipe for Masa {
    fn text(&self) -> String {
        let net = if self.net { " net" } else { "" };
        format!("dictionary {} output {}{net}", self.atoms, self.output)
    }
    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let (atoms, depth) = (self.atoms, stack.depth);
        if atoms == 0 || atoms > depth {
            return Err(Error::config(format!("{atoms} atoms for {depth} depths; use 1 to {depth}")));
        }
        // The matrices that the dictionaries replace are drawn too, so that the others are those of a model without.
        let mut made = Untied.sites(gpu, stack, rng)?;
        for (i, matrix) in stack.matrices.iter().enumerate() {
            if !stack.shares(matrix, self.output) {
                continue;
            }
            let dictionary = Dictionary::random(gpu, depth, atoms, matrix.size, matrix.std, rng);
            let net = self.net.then(|| coefficient_net(gpu, &dictionary.coefficients, rng));
            made.put(i, Made { matrix: matrix.name, layers: 0..depth, dictionary, net, own: Vec::new() });
        }
        Ok(made)
    }
}

impl Sites {
    /// Puts matrix `i` of some depths in the place of what was there.
    fn put(&mut self, i: usize, made: Made) {
        for (l, sites) in self.by_depth[made.layers.clone()].iter_mut().enumerate() {
            sites[i] = made.place(l);
        }
        self.made.push(made);
    }
}

/// Dictionaries of groups of neighbouring depths, each depth with a low-rank part of its own: what a conversion of a pretrained model
/// makes. The rank of k and v is half of that of q and o.
pub struct MasaGroups {
    pub groups: Vec<usize>,
    pub atoms: Vec<usize>,
    pub rank: usize,
}

impl Recipe for MasaGroups {
    fn text(&self) -> String {
        let list = |all: &[usize]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        format!("masa groups {} atoms {} rank {}", list(&self.groups), list(&self.atoms), self.rank)
    }
    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let (groups, atoms) = (&self.groups, &self.atoms);
        let depths = groups.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
        let fits = groups.iter().zip(atoms).all(|(&size, &atoms)| atoms > 0 && atoms <= size);
        if depths != stack.depth || groups.len() != atoms.len() || !fits {
            let depth = stack.depth;
            let message =
                format!("groups of {groups:?} depths with {atoms:?} atoms, and the model has {depth} depths");
            return Err(Error::config(message));
        }
        let mut made = Untied.sites(gpu, stack, rng)?;
        for (i, matrix) in stack.matrices.iter().enumerate() {
            if !stack.shares(matrix, true) {
                continue;
            }
            let (mut start, [out, inner]) = (0, matrix.size);
            for (&size, &atoms) in groups.iter().zip(atoms) {
                let dictionary = Dictionary::random(gpu, size, atoms, matrix.size, matrix.std, rng);
                let rank = own_rank(self.rank, matrix.name).min(out).min(inner);
                let mut own = || {
                    let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [rank, inner], rng);
                    [a, Init::Zeros.leaf(gpu, [out, rank], rng)]
                };
                let own = (0..size).filter(|_| rank > 0).map(|_| own()).collect();
                let layers = start..start + size;
                made.put(i, Made { matrix: matrix.name, layers, dictionary, net: None, own });
                start += size;
            }
        }
        Ok(made)
    }
}

pub struct LowRankAttention {
    pub rank: usize,
}

impl Recipe for LowRankAttention {
    fn text(&self) -> String {
        format!("low-rank {}", self.rank)
    }
    fn sites(&self, gpu: &Gpu, stack: &Stack, rng: &mut Rng) -> Result<Sites> {
        let shared = stack.matrices.iter().filter(|matrix| stack.shares(matrix, true));
        let most = shared.map(|matrix| matrix.size[0].min(matrix.size[1])).min().unwrap_or(1);
        if self.rank == 0 || self.rank > most {
            return Err(Error::config(format!("a rank of {}; use 1 to {most}", self.rank)));
        }
        let mut block = |_| {
            let stored = drawn(gpu, stack.matrices, rng);
            let site = |(matrix, theta): (&Matrix, &Tensor)| {
                if !stack.shares(matrix, true) {
                    return tied(theta);
                }
                // Two factors with the initial variance of the matrix.
                let ([out, inner], std) = (matrix.size, matrix.std);
                let a = Init::Normal((1.0 / inner as f32).sqrt()).leaf(gpu, [self.rank, inner], rng);
                let std = std * (inner as f32 / self.rank as f32).sqrt();
                let b = Init::Normal(std).leaf(gpu, [out, self.rank], rng);
                Factored::new(&a, &b).shared()
            };
            stack.matrices.iter().zip(&stored).map(site).collect()
        };
        Ok(Sites { by_depth: (0..stack.depth).map(&mut block).collect(), ..Sites::default() })
    }
}
