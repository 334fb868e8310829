//! Continuous depth-wise batching. Depths of a model that uses blocks in turn have the same matrices, so tokens in different
//! loops over the blocks can go through the same products. A slot whose token leaves early takes the next one at once,
//! whatever loop the others are in.
//!
//! A tick is one loop over the blocks for every slot. Tokens leave only at the end of a loop, so all slots meet a block at the
//! same time, and each block is one set of products in a tick. Blocks at the ends of the model that are not repeated are passed
//! by the slots whose tokens are in their first or last loop. A token that leaves before its last loop does not pass the last
//! ones: its scores are those of the head after its loop, as [`Lm::exit_loss`] trains them.
//!
//! Keys and values are kept per (depth, slot). A token that leaves early has none at the depths that it did not reach, so
//! later tokens that go deeper do not see it there. Rotary angles are those of a token's place in its sequence. Source: relaxed
//! recursive transformers, arXiv 2410.20672, section 2.4.

mod stage;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::lm::{FeedForward, Lm};
use crate::tape::no_grad;
use crate::tensor::Tensor;
use stage::{Rows, Stage};
use std::collections::VecDeque;
use std::ops::Range;

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
    /// At the first exit ([`Lm::exits`]) where its probability is this or more. Above 1, it leaves at the last depth.
    Confidence(f32),
    /// At the first exit from a depth on that is known beforehand. This measures the worth of a schedule apart from how it is
    /// found.
    Oracle(Oracle),
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

/// A request that is being served.
struct Slot {
    request: Request,
    /// Number of tokens of prompt and answer that went in so far, including the current one.
    place: usize,
    /// The depths of the loop that its token is in.
    span: Range<usize>,
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

/// The slots that meet a block in one tick, and at which of its depths each is.
struct Met {
    stage: usize,
    slots: Vec<usize>,
    turns: Vec<usize>,
}

/// A model with loops over its blocks that serves many requests at once.
///
/// The depths use one block, or several in turn, each depth with or without a low-rank part, norms and biases of its own. Blocks
/// at the ends of the model may be used once. A token leaves at the end of a loop over the blocks that are used in turn, and
/// never within one; [`Lm::exits`] lists these depths. One that leaves early does not pass the blocks at the end.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::Rng;
/// use tiebeam::decode::{DepthBatch, Exit, Request, Scheduling};
/// use tiebeam::models::lm::{Lm, LmConfig};
/// use tiebeam::models::sharing::Sharing;
/// // Two blocks in the form of Llama, which are used in turn three times.
/// let sizes = LmConfig::default().vocab(8).width(8).hidden(8).heads(2).kv_heads(1).context(8).depth(6);
/// let model = Lm::new(&gpu, sizes.sharing(Sharing::cycle(2, 1)), &mut Rng::new(1));
/// // The first token of an answer may leave from depth 3 on, and others from depth 1 on.
/// let exit = Exit::Oracle(Box::new(|_request, token| if token == 0 { 3 } else { 1 }));
/// let mut batch = DepthBatch::new(&model, 2, exit, Scheduling::Continuous)?;
/// batch.push(Request { id: 7, prompt: vec![1, 2], count: 3 })?;
/// let depths: Vec<usize> = batch.run()?.iter().map(|token| token.depth).collect();
/// assert_eq!(depths, [4, 2, 2]); // the ends of loops
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct DepthBatch<'a> {
    gpu: Gpu,
    model: &'a Lm,
    stages: Vec<Stage>,
    /// Where loops end, counted from 1.
    exits: Vec<usize>,
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
    /// [`Error::Config`] when there is no slot, when depths have stored matrices neither in common nor in turn, or low-rank
    /// parts of different ranks or factors, and for experts or a window of attention.
    pub fn new(model: &'a Lm, slots: usize, exit: Exit, scheduling: Scheduling) -> Result<DepthBatch<'a>> {
        let (c, gpu) = (&model.config, model.gpu().clone());
        let refused = |what: String| Err(Error::config(format!("depth-wise batching: {what}")));
        if slots == 0 {
            return refused("requests are served in slots, and there are none".into());
        }
        if model.blocks.iter().any(|block| matches!(block.mlp, FeedForward::Experts(_))) {
            return refused("models with experts are not served".into());
        }
        if let Some(window) = c.window.filter(|&window| window < c.context) {
            return refused(format!(
                "a window of {window} of {} tokens is not served, as tokens see all before them",
                c.context
            ));
        }
        let (turns, exits) = (model.turns(), model.exits());
        let repeated = exits.len() > 1 || model.blocks.len() == 1;
        let stages = turns.into_iter().filter(|_| repeated).map(|depths| Stage::of(model, depths, slots));
        let stages = stages.collect::<Option<Vec<_>>>().filter(|stages| !stages.is_empty());
        let Some(stages) = stages else {
            return refused(format!(
                "the depths must share one block, or several in turn, of stored matrices with or without low-rank parts of \
                 one rank and factor, not {:?}",
                c.sharing
            ));
        };
        Ok(DepthBatch {
            x: Tensor::zeros(&gpu, [slots, c.width]),
            slots: (0..slots).map(|_| None).collect(),
            waiting: VecDeque::new(),
            gpu,
            model,
            stages,
            exits,
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

    /// Number of ticks so far. A tick is a loop over the blocks for all slots.
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

    /// Passes the blocks over every slot, each in its own loop, and returns the tokens that left. `None` if no request is left.
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
            let Range { end: depth, .. } = slot.span;
            slot.lengths[slot.span.clone()].iter_mut().for_each(|length| *length += 1);
            let found = scores.iter().find(|found| found.slot == s);
            let sure = |found: &Best| match self.exit {
                Exit::Confidence(threshold) => found.confidence >= threshold,
                Exit::Oracle(_) => true,
            };
            match found {
                Some(found) if depth == last || sure(found) => {
                    slot.token = found.token;
                    slot.answered += 1;
                    emitted.push(Emitted { id: slot.request.id, token: found.token, depth });
                }
                None if depth == last => slot.token = slot.request.prompt[slot.place],
                _ => {
                    let next = self.exits.iter().find(|&&exit| exit > depth);
                    slot.span = depth..next.copied().unwrap_or(last);
                    continue;
                }
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
                *slot =
                    Some(Slot { request, place: 0, span: 0..0, lengths, answered: 0, waits: true, token });
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
            slot.span = 0..self.exits[0];
            slot.waits = false;
        }
        no_grad(|| {
            let lists = self.lists(&[tokens, places, fresh]);
            let [tokens, places, fresh] = [0, 1, 2].map(|i| &lists[i]);
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

    /// The blocks that the active slots meet in this tick, in order.
    fn meetings(&self, active: &[usize]) -> Vec<Met> {
        let turn = |stage: &Stage, s: usize| {
            let span = &self.slots[s].as_ref()?.span;
            stage.depths.iter().position(|depth| span.contains(depth))
        };
        let met = |(i, stage): (usize, &Stage)| {
            let all = active.iter().filter_map(|&s| Some((s, turn(stage, s)?)));
            let (slots, turns): (Vec<_>, Vec<_>) = all.unzip();
            Met { stage: i, slots, turns }
        };
        self.stages.iter().enumerate().map(met).filter(|met| !met.slots.is_empty()).collect()
    }

    /// Applies the blocks to the active slots. Returns the best next token of those that may leave here.
    fn pass(&mut self, active: &[usize]) -> Result<Vec<Best>> {
        let (count, c) = (self.slots.len(), &self.model.config);
        let slot = |s: usize| self.slots[s].as_ref().expect("an active slot");
        let asks = |&s: &usize| self.exit.asks(slot(s), slot(s).span.end, c.depth);
        let asked: Vec<usize> = active.iter().copied().filter(asks).collect();
        let met = self.meetings(active);
        let mut lists = vec![asked.clone()];
        // Blocks that the same slots meet follow each other without a gather.
        for run in met.chunk_by(|a, b| a.slots == b.slots) {
            let slots = &run[0].slots;
            // Rows go back to their slots. Slots that rest keep their rows.
            let place_of = |s: usize| slots.iter().position(|&own| own == s);
            lists.extend([
                slots.clone(),
                slots.iter().map(|&s| slot(s).place - 1).collect(),
                (0..count).map(|s| place_of(s).unwrap_or(slots.len())).collect(),
                (0..count).map(|s| place_of(s).is_some() as usize).collect(),
            ]);
            for Met { stage, turns, .. } in run {
                let own = |of: &dyn Fn(usize, usize) -> usize| {
                    slots.iter().zip(turns).map(|(&s, &turn)| of(s, turn)).collect::<Vec<_>>()
                };
                let length = |s: usize, turn: usize| slot(s).lengths[self.stages[*stage].depths[turn]];
                lists.extend([
                    turns.clone(),
                    own(&|s, turn| turn * count + s),
                    own(&length),
                    own(&|s, turn| length(s, turn) + 1),
                ]);
            }
        }
        let mut lists = self.lists(&lists).into_iter();
        let mut next = || lists.next().expect("as many lists as were made");
        let asking = next();
        for run in met.chunk_by(|a, b| a.slots == b.slots) {
            let [ids, places, place_of, moved] = [(); 4].map(|()| next());
            let rows = run[0].slots.len();
            // With no slot at rest, rows are already where they belong.
            let all = rows == count;
            let mut x = if all { self.x.clone() } else { self.x.index_select(0, &ids) };
            let places = places.reshape([rows, 1]);
            let rope = self.model.rope.as_ref().map(|rope| (rope, &places));
            for met in run {
                let [turns, cached, places, lengths] = [(); 4].map(|()| next());
                let at = Rows { turns, cached, places, lengths };
                x = self.stages[met.stage].forward(&x, &at, rope)?;
            }
            self.x = if all {
                x
            } else {
                let moved = moved.unsqueeze(1).expand([count, c.width]);
                x.index_select_padded(0, &place_of).where_mask(&moved, &self.x)
            };
        }
        self.x.evaluate();
        if asked.is_empty() {
            // Nothing has to be read back, so the next tick is recorded behind this one.
            return Ok(Vec::new());
        }
        let leaving = if asked.len() == count { self.x.clone() } else { self.x.index_select(0, &asking) };
        let scores = self.model.logits(&leaving);
        // The highest score has the highest probability, which nobody asks for if depths are known beforehand.
        let scores = if matches!(self.exit, Exit::Oracle(_)) { scores } else { scores.softmax(-1) };
        let (best, token) = scores.topk(1, 1);
        let [best, token] = [best.read::<f32>()?, token.read::<u32>()?];
        let best: Vec<f32> = bytemuck::pod_collect_to_vec(&best.wait()?);
        let token: Vec<u32> = bytemuck::pod_collect_to_vec(&token.wait()?);
        let row =
            |(i, (&confidence, &token)): (usize, (&f32, &u32))| Best { slot: asked[i], token, confidence };
        Ok(best.iter().zip(&token).enumerate().map(row).collect())
    }

    /// Uploads lists of numbers together, each at an offset that kernels can bind.
    fn lists(&self, lists: &[Vec<usize>]) -> Vec<Tensor> {
        let align = self.gpu.limits().min_storage_buffer_offset_alignment as usize / 4;
        let step = self.slots.len().next_multiple_of(align.max(1));
        let mut all = vec![0u32; lists.len() * step];
        for (list, to) in lists.iter().zip(all.chunks_mut(step)) {
            list.iter().zip(to).for_each(|(&from, to)| *to = from as u32);
        }
        let all = Tensor::from_slice(&self.gpu, &all, [lists.len() * step]);
        lists.iter().enumerate().map(|(i, list)| all.slice(0, i * step..i * step + list.len())).collect()
    }
}
