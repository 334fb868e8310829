//! Continuous depth-wise batching. Every depth of a tied model uses the same matrices, so tokens at different depths can
//! go through the same products. A slot whose token leaves early takes the next one at once, whatever depth the others
//! are at.
//!
//! Keys and values are kept per (depth, slot). A token that leaves early has none at the depths that it did not reach, so
//! later tokens that go deeper do not see it there. Source: relaxed recursive transformers, arXiv 2410.20672, section
//! 2.4.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{FeedForward, Lm, LmBlock, Positions};
use crate::nn::{Linear, Norm};
use crate::ops::product::site::Site;
use crate::ops::sequence::cache::KvCache;
use crate::share::{DepthLora, Tied};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::VecDeque;
use std::sync::Arc;

/// A prompt, and the number of tokens to add to it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The caller's identifier.
    pub id: u64,
    /// The prompt: at least one token.
    pub prompt: Vec<u32>,
    /// Number of tokens to add.
    pub count: usize,
}

/// A token of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Emitted {
    /// The identifier of the request.
    pub id: u64,
    /// The token.
    pub token: u32,
    /// The depth at which it left, counted from 1.
    pub depth: usize,
}

/// When slots take their next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scheduling {
    /// As soon as their own token has left.
    Continuous,
    /// When the tokens of all slots have left: those that leave early wait for the deepest. A framework without shared
    /// weights can do this.
    LockStep,
}

/// Gives the depth, counted from 1, at which answer token `.1` of request `.0` leaves.
pub type Oracle = Box<dyn Fn(u64, usize) -> usize + Send>;

/// When a token of an answer leaves.
#[non_exhaustive]
pub enum Exit {
    /// At the first depth where its probability is this or more. Above 1, it leaves at the last depth.
    Confidence(f32),
    /// At a depth known beforehand. This measures the worth of a schedule apart from how it is found.
    Oracle(Oracle),
}

/// One linear layer of all depths: the matrix that they share, and the low-rank part of each, if any.
struct DepthwiseLayer {
    weight: Arc<dyn Site>,
    own: Option<DepthLora>,
}

impl Exit {
    /// Whether the scores of a token's row must be computed, because the token may leave here. `depth` counts from 1.
    fn asks(&self, slot: &Slot, depth: usize, last: usize) -> bool {
        let asks = match self {
            Exit::Confidence(threshold) => *threshold <= 1.0,
            Exit::Oracle(leaves) => depth >= leaves(slot.request.id, slot.answered),
        };
        !slot.in_prompt() && (asks || depth == last)
    }
}

impl DepthwiseLayer {
    /// The layer of all depths. `None` unless they have one matrix in common, alone or with low-rank parts of one factor.
    fn of(layers: &[&Linear]) -> Option<DepthwiseLayer> {
        let leaves: Vec<Vec<Tensor>> = layers.iter().map(|l| l.weight.leaves()).collect();
        let scale = low_rank_scale(&*layers[0].weight)?;
        let alike = |(layer, own): (&&Linear, &Vec<Tensor>)| {
            let (theta, first) = (&own[0], &leaves[0][0]);
            let stored = Arc::ptr_eq(&theta.value, &first.value)
                && (theta.offset, theta.strides) == (first.offset, first.strides);
            low_rank_scale(&*layer.weight) == Some(scale) && stored && own.len() == leaves[0].len()
        };
        if !layers.iter().zip(&leaves).all(alike) {
            return None;
        }
        let weight = Tied::new(&leaves[0][0].detach()).shared();
        let stack = |i: usize| {
            let all: Vec<Tensor> = leaves.iter().map(|l| l[i].detach()).collect();
            Tensor::stack(&all.iter().collect::<Vec<_>>(), 0)
        };
        let own = (leaves[0].len() == 3).then(|| DepthLora::new(&stack(1), &stack(2), scale));
        Some(DepthwiseLayer { weight, own })
    }

    fn forward(&self, x: &Tensor, depths: &Tensor) -> Tensor {
        match &self.own {
            Some(own) => own.linear(x, &self.weight, depths),
            None => x.linear(&self.weight, Default::default()),
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

/// The norms of all depths, with gains `[depths, width]`. Each token uses the gain of its own depth.
struct Norms {
    gains: Tensor,
    eps: f32,
}

impl Norms {
    fn of(norms: &[&Norm]) -> Norms {
        let gains: Vec<Tensor> = norms.iter().map(|n| n.gain.detach()).collect();
        Norms { gains: Tensor::stack(&gains.iter().collect::<Vec<_>>(), 0), eps: norms[0].eps }
    }

    fn forward(&self, x: &Tensor, depths: &Tensor) -> Tensor {
        x.rms_norm(None, self.eps).mul(&self.gains.index_select(0, depths))
    }
}

/// A request that is being served.
struct Slot {
    request: Request,
    /// Number of tokens of prompt and answer that went in so far, including the current one.
    place: usize,
    depth: usize,
    /// Number of tokens that went through each depth.
    lengths: Vec<usize>,
    answered: usize,
    /// Its token has left, and the next one has not gone in. In lock-step it waits for the other slots.
    waits: bool,
    /// The token that goes in next.
    token: u32,
}

impl Slot {
    /// Whether the prompt gives the token after the current one.
    fn in_prompt(&self) -> bool {
        self.place < self.request.prompt.len()
    }
}

/// The best next token of a slot.
struct Best {
    slot: usize,
    token: u32,
    /// Its probability, unless depths are known beforehand.
    confidence: f32,
}

/// A tied model that serves many requests at once.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::decode::{DepthBatch, Exit, Request, Scheduling};
/// use tiebeam::models::lm::{Lm, LmConfig};
/// let sizes = LmConfig::small().vocab(8).width(8).hidden(8).heads(2).kv_heads(2).context(8).depth(2);
/// let model = Lm::new(&gpu, sizes, &mut Rng::new(1));
/// let mut batch = DepthBatch::new(&model, 2, Exit::Confidence(2.0), Scheduling::Continuous)?;
/// batch.push(Request { id: 7, prompt: vec![1, 2], count: 3 })?;
/// let answer = batch.run()?;
/// assert_eq!(answer.len(), 3);
/// assert!(answer.iter().all(|token| token.id == 7 && token.depth == 2));
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct DepthBatch<'a> {
    gpu: Gpu,
    model: &'a Lm,
    norms: [Norms; 2],
    /// `q k v o up down`
    layers: [DepthwiseLayer; 6],
    cache: KvCache,
    slots: Vec<Option<Slot>>,
    waiting: VecDeque<Request>,
    /// `[slots, width]`
    x: Tensor,
    exit: Exit,
    scheduling: Scheduling,
    ticks: u64,
}

impl<'a> DepthBatch<'a> {
    /// Makes a batch that serves `slots` requests at a time. Tokens leave as `exit` says. Tokens of a prompt go through
    /// all depths, as the tokens after them are given.
    ///
    /// # Errors
    /// [`Error::Config`] when the model's depths do not all share their matrices, norms or linear layers have biases,
    /// heads are wider than 256, or there is no slot.
    pub fn new(model: &'a Lm, slots: usize, exit: Exit, scheduling: Scheduling) -> Result<DepthBatch<'a>> {
        let (c, gpu) = (&model.config, model.gpu().clone());
        let plain = model.blocks.iter().all(|b| b.norm1.bias.is_none() && b.norm2.bias.is_none());
        let bare = model.blocks.iter().flat_map(LmBlock::linears).all(|(_, linear)| linear.bias.is_none());
        let learned = c.positions == Positions::Learned && c.window.is_none();
        let dense = matches!(&model.blocks[0].mlp, FeedForward::Dense(mlp) if mlp.gate.is_none());
        let head_dim = c.head_dim();
        if !plain || !bare || !learned || !dense || c.kv_heads != c.heads || slots == 0 || head_dim > 256 {
            let message = format!(
                "depth-wise batching: {slots} slots, heads of {head_dim}; served are models with learned positions, a key head for each \
                 query head, RMS norms, plain MLPs and no biases, and heads up to 256"
            );
            return Err(Error::config(message));
        }
        let layers = ["q", "k", "v", "o", "up", "down"]
            .map(|name| DepthwiseLayer::of(&model.blocks.iter().map(|b| b.linear(name)).collect::<Vec<_>>()));
        let [Some(q), Some(k), Some(v), Some(o), Some(up), Some(down)] = layers else {
            let sharing = &c.sharing;
            let message = format!(
                "depth-wise batching: the depths must share one block, with or without low-rank parts, not {sharing:?}"
            );
            return Err(Error::config(message));
        };
        let layers = [q, k, v, o, up, down];
        let norms = [
            Norms::of(&model.blocks.iter().map(|b| &b.norm1).collect::<Vec<_>>()),
            Norms::of(&model.blocks.iter().map(|b| &b.norm2).collect::<Vec<_>>()),
        ];
        Ok(DepthBatch {
            cache: KvCache::new(&gpu, c.depth * slots, c.heads, c.context, head_dim),
            x: Tensor::zeros(&gpu, [slots, c.width]),
            slots: (0..slots).map(|_| None).collect(),
            waiting: VecDeque::new(),
            gpu,
            model,
            norms,
            layers,
            exit,
            scheduling,
            ticks: 0,
        })
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// [`Error::Config`] when the prompt is empty, has tokens that are not in the vocabulary, or exceeds the context
    /// together with the answer.
    pub fn push(&mut self, request: Request) -> Result<()> {
        let c = &self.model.config;
        let length = request.prompt.len() + request.count;
        let known = request.prompt.iter().all(|&t| (t as usize) < c.vocab);
        if request.prompt.is_empty() || !known || length > c.context + 1 {
            return Err(Error::config(format!(
                "request {}: a prompt of {} tokens below {} and {} more must fit the context of {}",
                request.id,
                request.prompt.len(),
                c.vocab,
                request.count,
                c.context
            )));
        }
        if request.count > 0 {
            self.waiting.push_back(request);
        }
        Ok(())
    }

    /// Number of ticks so far. A tick is a pass of the block over all slots.
    pub fn ticks(&self) -> u64 {
        self.ticks
    }

    /// Serves until no request is left. Returns the tokens in the order in which they left.
    ///
    /// # Errors
    /// When the device fails.
    pub fn run(&mut self) -> Result<Vec<Emitted>> {
        let mut all = Vec::new();
        while let Some(some) = self.tick()? {
            all.extend(some);
        }
        Ok(all)
    }

    /// Passes the block over every slot, each at its own depth, and returns the tokens that left. `None` if no request is
    /// left.
    ///
    /// # Errors
    /// When the device fails.
    pub fn tick(&mut self) -> Result<Option<Vec<Emitted>>> {
        self.admit();
        let active: Vec<usize> = (0..self.slots.len())
            .filter(|&s| self.slots[s].as_ref().is_some_and(|slot| !slot.waits))
            .collect();
        if active.is_empty() {
            return Ok(None);
        }
        self.ticks += 1;
        let scores = no_grad(|| self.pass(&active))?;
        let last = self.model.config.depth;
        let mut emitted = Vec::new();
        for &s in &active {
            let Some(slot) = &mut self.slots[s] else { continue };
            slot.lengths[slot.depth] += 1;
            slot.depth += 1;
            let found = scores.iter().find(|found| found.slot == s);
            let sure = |found: &Best| match self.exit {
                Exit::Confidence(threshold) => found.confidence >= threshold,
                Exit::Oracle(_) => true,
            };
            match found {
                Some(found) if slot.depth == last || sure(found) => {
                    slot.token = found.token;
                    slot.answered += 1;
                    emitted.push(Emitted { id: slot.request.id, token: found.token, depth: slot.depth });
                }
                None if slot.depth == last => slot.token = slot.request.prompt[slot.place],
                _ => continue,
            }
            slot.waits = true;
            if slot.answered == slot.request.count {
                self.slots[s] = None;
            }
        }
        Ok(Some(emitted))
    }

    /// Gives free slots a request, and slots whose token has left the next token.
    fn admit(&mut self) {
        let depth = self.model.config.depth;
        for slot in &mut self.slots {
            if slot.is_none()
                && let Some(request) = self.waiting.pop_front()
            {
                let token = request.prompt[0];
                let lengths = vec![0; depth];
                *slot = Some(Slot { request, place: 0, depth: 0, lengths, answered: 0, waits: true, token });
            }
        }
        let all_wait = self.slots.iter().flatten().all(|slot| slot.waits);
        if self.scheduling == Scheduling::LockStep && !all_wait {
            return;
        }
        let starts: Vec<usize> = (0..self.slots.len())
            .filter(|&s| self.slots[s].as_ref().is_some_and(|slot| slot.waits))
            .collect();
        if starts.is_empty() {
            return;
        }
        let [mut tokens, mut places, mut fresh] = [(); 3].map(|()| vec![0; self.slots.len()]);
        for &s in &starts {
            let Some(slot) = &mut self.slots[s] else { continue };
            (tokens[s], places[s], fresh[s]) = (slot.token as usize, slot.place, 1);
            slot.place += 1;
            slot.depth = 0;
            slot.waits = false;
        }
        no_grad(|| {
            let [tokens, places, fresh] = &self.lists([tokens, places, fresh]);
            let token = self.model.embedding.forward(tokens);
            let new = match &self.model.positions {
                Some(positions) => token.add(&positions.index_select(0, places)),
                None => token,
            };
            let fresh = fresh.unsqueeze(1).expand(*new.shape());
            self.x = new.where_mask(&fresh, &self.x);
            self.x.evaluate();
        });
    }

    /// Applies the block to the active slots. Returns the best next token of those that may leave here.
    fn pass(&mut self, active: &[usize]) -> Result<Vec<Best>> {
        let (rows, count) = (active.len(), self.slots.len());
        let c = &self.model.config;
        let slot = |s: usize| self.slots[s].as_ref().expect("an active slot");
        let asked: Vec<usize> = (0..rows)
            .filter(|&i| {
                let slot = slot(active[i]);
                self.exit.asks(slot, slot.depth + 1, c.depth)
            })
            .collect();
        // Rows go back to their slots. Slots that rest keep their rows.
        let place_of = |s: usize| active.iter().position(|&a| a == s);
        let length = |s: usize| slot(s).lengths[slot(s).depth];
        let own = |of: &dyn Fn(usize) -> usize| active.iter().map(|&s| of(s)).collect::<Vec<_>>();
        let lists = self.lists([
            own(&|s| s),
            own(&|s| slot(s).depth),
            own(&|s| slot(s).depth * count + s),
            own(&length),
            own(&|s| length(s) + 1),
            (0..count).map(|s| place_of(s).unwrap_or(rows)).collect(),
            (0..count).map(|s| place_of(s).is_some() as usize).collect(),
            asked.clone(),
        ]);
        let [ids, depths, cached, places, lengths, place_of, moved, asking] = &lists;

        let heads = [rows, 1, c.heads, c.head_dim()];
        // With no slot at rest, rows are already where they belong.
        let all = rows == count;
        let x = if all { self.x.clone() } else { self.x.index_select(0, ids) };
        let [q, k, v, o, up, down] = &self.layers;
        let normed = self.norms[0].forward(&x, depths);
        let [q, k, v] = [q, k, v].map(|layer| layer.forward(&normed, depths).reshape(heads));
        self.cache.append(&k, &v, cached, places)?;
        let q = q.permute([0, 2, 1, 3]);
        let y = self.cache.attend(&q, cached, lengths).permute([0, 2, 1, 3]).reshape([rows, c.width]);
        let x = x.add(&o.forward(&y, depths));
        let hidden = up.forward(&self.norms[1].forward(&x, depths), depths);
        let hidden = c.mlp.activation().apply(&hidden);
        let x = x.add(&down.forward(&hidden, depths));
        self.x = if all {
            x.clone()
        } else {
            let moved = moved.unsqueeze(1).expand([count, c.width]);
            x.index_select_padded(0, place_of).where_mask(&moved, &self.x)
        };
        self.x.evaluate();
        if asked.is_empty() {
            // Nothing has to be read back, so the next tick is recorded behind this one.
            return Ok(Vec::new());
        }
        let leaving = if asked.len() == rows { x } else { x.index_select(0, asking) };
        let scores = self.model.logits(&leaving);
        // The highest score has the highest probability, which nobody asks for if depths are known beforehand.
        let scores = if matches!(self.exit, Exit::Oracle(_)) { scores } else { scores.softmax(-1) };
        let (best, token) = scores.topk(1, 1);
        let [best, token] = [best.read::<f32>()?, token.read::<u32>()?];
        let best: Vec<f32> = bytemuck::pod_collect_to_vec(&best.wait()?);
        let token: Vec<u32> = bytemuck::pod_collect_to_vec(&token.wait()?);
        let row = |(i, (&confidence, &token)): (usize, (&f32, &u32))| Best {
            slot: active[asked[i]],
            token,
            confidence,
        };
        Ok(best.iter().zip(&token).enumerate().map(row).collect())
    }

    /// Uploads lists of numbers together, each at an offset that kernels can bind.
    fn lists<const N: usize>(&self, lists: [Vec<usize>; N]) -> [Tensor; N] {
        let align = self.gpu.limits().min_storage_buffer_offset_alignment as usize / 4;
        let step = self.slots.len().next_multiple_of(align.max(1));
        let mut all = vec![0u32; N * step];
        for (i, list) in lists.iter().enumerate() {
            list.iter().zip(&mut all[i * step..]).for_each(|(&from, to)| *to = from as u32);
        }
        let all = Tensor::from_slice(&self.gpu, &all, [N * step]);
        std::array::from_fn(|i| all.slice(0, i * step..i * step + lists[i].len()))
    }
}
