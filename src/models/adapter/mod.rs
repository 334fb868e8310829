//! Adapters: small trained parts on the frozen weights of a language model, made, applied, and kept in the files of PEFT.

mod config;
mod file;
mod lora;

pub use config::{AdapterConfig, AdapterKind, SETTINGS};
pub use file::{Base, WEIGHTS};
pub use lora::{Lora, Pair, write_lora};

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::Lm;
use crate::nn::{Init, Module, Visit, VisitMut};
use crate::ops::product::site::Site;
use crate::ops::sequence::rope::Pairing;
use crate::rng::Rng;
use crate::share::{Bone, LowRank, Miss, ShardPool};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The trained part of one layer.
#[derive(Clone)]
enum Part {
    /// `A [rank, in]` and `B [out, rank]`.
    Lora([Tensor; 2]),
    /// `[rank, out]`, or fewer columns that are repeated.
    Miss(Tensor),
    /// `[out / rank, rank, rank]`
    Bone(Tensor),
    /// The layer's number among those that read the pools of its projection.
    Shards(usize),
}

/// The trained parts of an adapter, by depth and layer.
#[derive(Clone)]
pub struct Adapter {
    config: AdapterConfig,
    parts: BTreeMap<(usize, &'static str), Part>,
    /// The pools of each projection, of a mixture of shards.
    pools: BTreeMap<&'static str, ShardPool>,
}

impl Adapter {
    /// Makes an adapter that changes nothing yet: A is uniform within `1 / sqrt(in)`, and B, shards and blocks are 0.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Rng, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::models::adapter::{Adapter, AdapterConfig, AdapterKind};
    /// use tiebeam::models::lm::{Lm, LmConfig};
    /// use tiebeam::nn::Module;
    /// let config = LmConfig::small().width(16).heads(2).kv_heads(2).hidden(32).context(8);
    /// let model = Lm::new(&gpu, config, &mut Rng::new(1));
    /// let lora = AdapterKind::Lora { rank: 2, alpha: 4.0, rslora: false };
    /// let adapter = Adapter::new(&model, AdapterConfig::new(lora, &["q", "v"])?, &mut Rng::new(2))?;
    /// let tuned = adapter.apply(&model)?; // its only leaves are the adapter's
    /// assert_eq!(tuned.parameters().trainable().len(), 2 * 2 * 6); // A and B of q and v at 6 depths
    /// let tokens = Tensor::from_slice(&gpu, &[1u32, 2, 3], [1, 3]);
    /// assert_eq!(tuned.forward(&tokens).to_vec::<f32>()?, model.forward(&tokens).to_vec::<f32>()?);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] when a layer does not exist, or its sizes do not go with the rank; for models of experts.
    pub fn new(model: &Lm, config: AdapterConfig, rng: &mut Rng) -> Result<Adapter> {
        model.check_dense("adapter")?;
        let turned = model.config.pairing == Pairing::Neighbours
            && config.targets.iter().any(|name| matches!(*name, "q" | "k"));
        if turned && matches!(config.kind, AdapterKind::Bone { .. }) {
            return Err(Error::config(
                "adapter: Bone on q and k of a GGUF file, whose rows are in another order than in PEFT's files; leave out these targets, \
                 or take the folder from which the file was made",
            ));
        }
        let gpu = model.gpu();
        let (mut parts, mut pools) = (BTreeMap::new(), BTreeMap::new());
        for &name in &config.targets {
            let size = size_of(model, name)?;
            for depth in 0..model.blocks.len() {
                parts.insert((depth, name), drawn(gpu, &config, (name, size, depth), rng)?);
            }
            if let AdapterKind::Mos(shards) = config.kind {
                pools.insert(name, ShardPool::new(gpu, model.blocks.len(), size, shards, rng)?);
            }
        }
        Ok(Adapter { config, parts, pools })
    }

    /// The kind, and the layers.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Returns the model with this adapter on its weights, which rest. Packed weights stay packed.
    ///
    /// # Errors
    /// [`Error::Config`] when the model lacks a layer or has it in another size, and for Bone on packed weights.
    pub fn apply(&self, model: &Lm) -> Result<Lm> {
        model.check_dense("adapter")?;
        let mut new = model.clone();
        new.blocks = no_grad(|| model.blocks_now());
        new.made.clear();
        new.freeze(|_| true);
        for (&(depth, name), part) in &self.parts {
            let blocks = new.blocks.len();
            let block = new.blocks.get_mut(depth).ok_or_else(|| {
                Error::config(format!("an adapter of block {depth}, and the model has {blocks} blocks"))
            })?;
            let found = block.linears_mut().into_iter().find(|(own, _)| *own == name);
            let (_, linear) = found.ok_or_else(|| {
                Error::config(format!("an adapter of `{name}`, which the model's blocks do not have"))
            })?;
            self.check_size(part, (depth, name), linear.weight.size())?;
            linear.weight = self.over(part, name, &linear.weight)?;
        }
        Ok(new)
    }

    /// The weight with the part on it.
    fn over(&self, part: &Part, name: &str, base: &Arc<dyn Site>) -> Result<Arc<dyn Site>> {
        Ok(match (part, self.config.kind) {
            (Part::Lora([a, b]), AdapterKind::Lora { alpha, rslora, .. }) => {
                let rank = a.shape()[0] as f32;
                let scale = if rslora { alpha / rank.sqrt() } else { alpha / rank };
                LowRank::over(base, a, b, scale).shared()
            }
            (Part::Miss(shard), _) => Miss::over(base, shard).shared(),
            (Part::Bone(blocks), _) => Bone::over(base, blocks)?.shared(),
            (Part::Shards(layer), _) => self.pools[name].over(*layer, base),
            (Part::Lora(_), _) => return Err(Error::config("an adapter with parts of another kind")),
        })
    }

    fn check_size(&self, part: &Part, (depth, name): (usize, &str), [out, inner]: [usize; 2]) -> Result<()> {
        let fits = match part {
            Part::Lora([a, b]) => {
                a.shape()[1] == inner && b.shape()[0] == out && a.shape()[0] == b.shape()[1]
            }
            Part::Miss(d) => d.shape()[0] <= inner && d.shape()[1] > 0 && out.is_multiple_of(d.shape()[1]),
            Part::Bone(b) => b.shape()[0] * b.shape()[1] == out && inner.is_multiple_of(b.shape()[1]),
            Part::Shards(layer) => {
                let pool = &self.pools[name];
                let side = |index: &[Vec<u32>], pool: &Tensor| {
                    index[*layer].len() / self.config.rank() * pool.shape()[1]
                };
                side(&pool.index_a, &pool.pool_a) == inner && side(&pool.index_b, &pool.pool_b) == out
            }
        };
        match fits {
            true => Ok(()),
            false => Err(Error::config(format!(
                "the adapter's part of `{name}` in block {depth} is for another size than [{out}, {inner}]; it is of another model"
            ))),
        }
    }
}

/// The size of a layer.
fn size_of(model: &Lm, name: &str) -> Result<[usize; 2]> {
    let found = model.config.linears().into_iter().find(|(own, _)| *own == name);
    found
        .map(|(_, size)| size)
        .ok_or_else(|| Error::config(format!("adapter: the model's blocks have no `{name}`")))
}

/// Draws the part of one layer.
fn drawn(
    gpu: &Gpu,
    config: &AdapterConfig,
    (name, [out, inner], depth): (&str, [usize; 2], usize),
    rng: &mut Rng,
) -> Result<Part> {
    let wrong =
        |what: String| Err(Error::config(format!("adapter: `{name}` is [{out}, {inner}], and {what}")));
    let zeros = |shape: &[usize]| Init::Zeros.leaf(gpu, shape, &mut Rng::new(0));
    match config.kind {
        AdapterKind::Lora { rank, .. } if rank > out.min(inner) => {
            wrong(format!("the rank {rank} exceeds it"))
        }
        AdapterKind::Lora { rank, .. } => {
            let bound = 1.0 / (inner as f32).sqrt();
            Ok(Part::Lora([Init::Uniform(bound).leaf(gpu, [rank, inner], rng), zeros(&[out, rank])]))
        }
        AdapterKind::Miss { rank } if rank > inner => wrong(format!("the rank {rank} exceeds its inputs")),
        AdapterKind::Miss { rank } => Ok(Part::Miss(zeros(&[rank, out]))),
        AdapterKind::Bone { rank } if !out.is_multiple_of(rank) || !inner.is_multiple_of(rank) => {
            wrong(format!("blocks of {rank} do not divide both sides"))
        }
        AdapterKind::Bone { rank } => Ok(Part::Bone(zeros(&[out / rank, rank, rank]))),
        AdapterKind::Mos(_) => Ok(Part::Shards(depth)),
    }
}

/// The parts by the names of PEFT's files, and the pools of a mixture of shards.
impl Module for Adapter {
    fn visit(&self, visit: &mut Visit) {
        for (&(depth, name), part) in &self.parts {
            let path = config::path(depth, name);
            match part {
                Part::Lora([a, b]) => {
                    visit.store(&format!("{path}.lora_A.weight"), a);
                    visit.store(&format!("{path}.lora_B.weight"), b);
                }
                Part::Miss(x) | Part::Bone(x) => visit.store(&format!("{path}.miss_block"), x),
                Part::Shards(_) => {}
            }
        }
        for (name, pool) in &self.pools {
            visit.field(&format!("mos.{name}"), pool);
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        for part in self.parts.values_mut() {
            match part {
                Part::Lora(pair) => visit.field(pair),
                Part::Miss(x) | Part::Bone(x) => visit.field(x),
                Part::Shards(_) => {}
            }
        }
        self.pools.values_mut().for_each(|pool| visit.field(pool));
    }
}
