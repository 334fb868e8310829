//! One block of a model, for rows that use it at different depths.

use crate::dtype::DType;
use crate::error::Result;
use crate::models::lm::{FeedForward, Lm, LmBlock};
use crate::nn::{Activation, Linear, Norm};
use crate::ops::product::site::Site;
use crate::ops::sequence::cache::KvCache;
use crate::ops::sequence::rope::Rope;
use crate::share::{DepthLora, Tied};
use crate::tensor::Tensor;
use std::sync::Arc;

/// Stacks what each depth has of its own. `None` when some have it and others do not.
fn stacked(parts: &[Option<&Tensor>]) -> Option<Option<Tensor>> {
    let all: Vec<Tensor> = parts.iter().flatten().map(|part| part.detach()).collect();
    let alike = all.iter().all(|part| part.shape() == all[0].shape());
    match all.len() {
        0 => Some(None),
        count if count == parts.len() && alike => {
            Some(Some(Tensor::stack(&all.iter().collect::<Vec<_>>(), 0)))
        }
        _ => None,
    }
}

/// One linear layer of all depths: the matrix that they share, and the low-rank part and bias of each, if any.
struct DepthwiseLayer {
    weight: Arc<dyn Site>,
    own: Option<DepthLora>,
    /// `[depths, out]`
    biases: Option<Tensor>,
}

impl DepthwiseLayer {
    /// The layer of all depths. `None` unless they have one matrix in common, alone or with low-rank parts of one factor and
    /// rank.
    fn of(layers: &[&Linear]) -> Option<DepthwiseLayer> {
        let leaves: Vec<Vec<Tensor>> = layers.iter().map(|l| l.weight.leaves()).collect();
        let scale = low_rank_scale(&*layers.first()?.weight)?;
        let alike = |(layer, own): (&&Linear, &Vec<Tensor>)| {
            let (theta, first) = (own.first()?, &leaves[0][0]);
            let stored = Arc::ptr_eq(&theta.value, &first.value)
                && (theta.offset, theta.strides) == (first.offset, first.strides);
            let same = low_rank_scale(&*layer.weight) == Some(scale) && own.len() == leaves[0].len();
            (same && stored).then_some(())
        };
        layers.iter().zip(&leaves).try_for_each(|pair| alike(pair).ok_or(())).ok()?;
        let weight = Tied::new(&leaves[0][0].detach()).shared();
        let stack = |i: usize| stacked(&leaves.iter().map(|own| own.get(i)).collect::<Vec<_>>());
        let own = match (stack(1)?, stack(2)?) {
            (Some(a), Some(b)) => Some(DepthLora::new(&a, &b, scale)),
            _ => None,
        };
        let biases = stacked(&layers.iter().map(|layer| layer.bias.as_ref()).collect::<Vec<_>>())?;
        Some(DepthwiseLayer { weight, own, biases })
    }

    fn forward(&self, x: &Tensor, turns: &Tensor) -> Tensor {
        let y = match &self.own {
            Some(own) => own.linear(x, &self.weight, turns),
            None => x.linear(&self.weight, Default::default()),
        };
        match &self.biases {
            Some(biases) => y.add(&biases.index_select(0, turns)),
            None => y,
        }
    }
}

/// The factor of a site's low-rank part, 1 for a matrix alone, `None` for any other kind.
fn low_rank_scale(site: &dyn Site) -> Option<f32> {
    // By how it is read, since a kind from anywhere may have any name. What it reads beside its leaves, such as the indices of
    // shards, decides about the weight too.
    let (load, leaves) = (site.load(), site.leaves());
    let own = load.wgsl.is_none() && load.fragment == "site_tied" && load.constants.is_empty();
    let own = own && site.buffers().is_empty();
    let theta = leaves.first().filter(|theta| own && theta.shape()[..] == site.size())?;
    let read = &load.tensors[0].1;
    if theta.dtype() == DType::F32 && theta.is_contiguous() && !Arc::ptr_eq(&read.value, &theta.value) {
        return None;
    }
    match (load.private, leaves.len()) {
        (None, 1) => Some(1.0),
        (Some("private_low_rank"), 3) => Some(f32::from_bits(load.params[3])),
        _ => None,
    }
}

/// The norms of all depths, with gains and biases `[depths, width]`. Each row uses those of its own depth.
struct Norms {
    gains: Tensor,
    biases: Option<Tensor>,
    eps: f32,
}

impl Norms {
    /// `None` when some are layer norms and others RMS norms.
    fn of(norms: &[&Norm]) -> Option<Norms> {
        let gains = stacked(&norms.iter().map(|norm| Some(&norm.gain)).collect::<Vec<_>>())??;
        let biases = stacked(&norms.iter().map(|norm| norm.bias.as_ref()).collect::<Vec<_>>())?;
        Some(Norms { gains, biases, eps: norms[0].eps })
    }

    fn forward(&self, x: &Tensor, turns: &Tensor) -> Tensor {
        let gains = self.gains.index_select(0, turns);
        match &self.biases {
            Some(biases) => {
                x.layer_norm(None, None, self.eps).mul(&gains).add(&biases.index_select(0, turns))
            }
            None => x.rms_norm(None, self.eps).mul(&gains),
        }
    }
}

/// Where each row of a pass is, as lists `[rows]` of u32.
pub(super) struct Rows {
    /// Which of the block's depths it is at.
    pub turns: Tensor,
    /// Its row of the cache: `turn * slots + slot`.
    pub cached: Tensor,
    /// The number of keys in this row.
    pub places: Tensor,
    /// The same with the row's own key.
    pub lengths: Tensor,
}

/// A block, what each of its depths has of its own, and their keys and values.
pub(super) struct Stage {
    /// The depths that use the block, counted from 0.
    pub depths: Vec<usize>,
    norms: [Norms; 2],
    /// `q k v o up down`
    layers: [DepthwiseLayer; 6],
    gate: Option<DepthwiseLayer>,
    activation: Activation,
    cache: KvCache,
    /// Heads of queries, and of keys and values.
    heads: [usize; 2],
}

impl Stage {
    /// The block that these depths of the model share, with room for the keys of this many slots. `None` unless they share
    /// its matrices, or if there are experts.
    pub fn of(model: &Lm, depths: Vec<usize>, slots: usize) -> Option<Stage> {
        let c = &model.config;
        let blocks: Vec<&LmBlock> = depths.iter().map(|&t| &model.blocks[t]).collect();
        let FeedForward::Dense(mlp) = &blocks.first()?.mlp else { return None };
        let layer = |name: &str| {
            let own = |block: &&LmBlock| {
                block.linears().into_iter().find(|(own, _)| *own == name).map(|(_, layer)| layer.clone())
            };
            let layers: Vec<Linear> = blocks.iter().filter_map(own).collect();
            let all = layers.len() == blocks.len();
            DepthwiseLayer::of(&layers.iter().filter(|_| all).collect::<Vec<_>>())
        };
        let norms = [
            Norms::of(&blocks.iter().map(|block| &block.norm1).collect::<Vec<_>>())?,
            Norms::of(&blocks.iter().map(|block| &block.norm2).collect::<Vec<_>>())?,
        ];
        Some(Stage {
            norms,
            layers: [layer("q")?, layer("k")?, layer("v")?, layer("o")?, layer("up")?, layer("down")?],
            gate: if mlp.gate.is_some() { Some(layer("gate")?) } else { None },
            activation: mlp.activation,
            cache: KvCache::new(model.gpu(), depths.len() * slots, c.kv_heads, c.context, c.head_dim()),
            heads: [c.heads, c.kv_heads],
            depths,
        })
    }

    /// Applies the block to `x [rows, width]`, each row at its own depth. Queries and keys are rotated by the row's place in
    /// its sequence, `[rows, 1]`.
    ///
    /// # Errors
    /// As [`KvCache::append`].
    pub fn forward(&mut self, x: &Tensor, at: &Rows, rope: Option<(&Rope, &Tensor)>) -> Result<Tensor> {
        let (rows, [heads, kv_heads]) = (x.shape()[0], self.heads);
        let turns = &at.turns;
        let [q, k, v, o, up, down] = &self.layers;
        let normed = self.norms[0].forward(x, turns);
        let split = |layer: &DepthwiseLayer, heads: usize| {
            let y = layer.forward(&normed, turns);
            let width = y.shape()[1];
            y.reshape([rows, heads, 1, width / heads])
        };
        let turned = |y: Tensor| match rope {
            Some((rope, places)) => y.rope_at(rope, places),
            None => y,
        };
        let (q, k, v) = (turned(split(q, heads)), turned(split(k, kv_heads)), split(v, kv_heads));
        // One token of each row: the axes of heads and tokens change places without a copy.
        let [k, v] = [k, v].map(|y| y.reshape([rows, 1, kv_heads, y.shape()[3]]));
        self.cache.append(&k, &v, &at.cached, &at.places)?;
        let y = self.cache.attend(&q, &at.cached, &at.lengths);
        let x = x.add(&o.forward(&y.reshape([rows, y.count() / rows]), turns));
        let normed = self.norms[1].forward(&x, turns);
        let hidden = up.forward(&normed, turns);
        let hidden = match &self.gate {
            Some(gate) => self.activation.apply(&gate.forward(&normed, turns)).mul(&hidden),
            None => self.activation.apply(&hidden),
        };
        Ok(x.add(&down.forward(&hidden, turns)))
    }
}
