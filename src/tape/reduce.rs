//! The sum of gradients over ranks.

use super::{Arena, ArenaLayout, Grads, Scaled, Scaling};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::capture::Tap;
use crate::gpu::readback::Reading;
use crate::gpu::value::Place;
use crate::ranks::{Ranks, known, together};
use crate::tensor::Tensor;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use twox_hash::XxHash3_128;

/// Bytes that are read, summed and written at a time: while one part is with the other ranks, the next ones come from the device and the
/// ones before go back to it. Large enough that the latency of an exchange does not count.
const PART: u64 = 16 << 20;
/// Parts that are on their way to the host at a time.
const AHEAD: usize = 4;
/// Gaps between gradients that are sent rather than made a part of their own.
const GAP: u64 = 4096;

/// What is summed in one exchange: a piece of an arena, or the gradient of a leaf that is in none.
pub(crate) struct Part {
    gpu: Gpu,
    /// `None` for a leaf that is in no arena.
    at: Option<Place>,
    bytes: u64,
    /// The leaf, or the first one of the arena.
    leaf: u64,
    /// The number of commands of a recorded step that make it, `usize::MAX` if it is not known.
    pub after: usize,
}

impl Part {
    /// Whether a gradient at this place of the same arena belongs to the same part: it is near, and both are small.
    fn takes(&self, at: &Place, bytes: u64) -> bool {
        self.at.as_ref().is_some_and(|own| {
            let end = own.offset + self.bytes;
            Arc::ptr_eq(&own.buffer, &at.buffer)
                && (end..=end + GAP).contains(&at.offset)
                && at.offset + bytes - own.offset <= PART
        })
    }

    /// Cuts a large gradient.
    fn cut(self) -> Vec<Part> {
        let Some(at) = self.at.clone() else { return vec![self] };
        let piece = |from: u64| Part {
            gpu: self.gpu.clone(),
            at: Some(Place { buffer: at.buffer.clone(), offset: at.offset + from }),
            bytes: PART.min(self.bytes - from),
            leaf: self.leaf,
            after: self.after,
        };
        (0..self.bytes).step_by(PART as usize).map(piece).collect()
    }

    /// What begins to read it in the middle of a replay. `None` for a leaf that is in no arena.
    pub fn tap(&self) -> Option<Tap> {
        Some(Tap { after: self.after, place: self.at.clone()?, bytes: self.bytes })
    }
}

impl Grads {
    /// Replaces every gradient by its sum over the ranks, in their order: the same bits on all of them. A leaf that is used in many places
    /// has one gradient, and is sent once.
    ///
    /// Where an optimizer has made arenas, these are read back, summed and written in pieces of 16 MiB, which overlap. For the mean, scale
    /// each rank's loss by one over their number, or these gradients.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, ranks::Alone};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let mut grads = w.square().sum_all().backward()?;
    /// grads.all_reduce(&Alone)?; // or the world of `tiebeam-mpi`
    /// assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [2.0, 4.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the ranks have gradients of different leaves, on every rank; when a rank or the device fails.
    pub fn all_reduce(&mut self, ranks: &dyn Ranks) -> Result<()> {
        if ranks.size() == 1 {
            return Ok(());
        }
        let all = together(ranks, Ok(self.signature()))?;
        known(ranks, same_leaves(&all))?;
        self.sum_over(ranks)
    }

    /// Bytes that a rank gives to one [`Grads::all_reduce`].
    pub fn bytes(&self) -> u64 {
        self.in_order().iter().map(|gradient| 4 * gradient.count() as u64).sum()
    }

    /// The number of leaves and of elements, and a hash of the shapes and of the pieces that are summed, by which ranks see whether they
    /// have the same gradients in the same pieces: 32 bytes. Adapters with other limits have other arenas.
    pub(crate) fn signature(&self) -> Vec<u8> {
        let mut hasher = XxHash3_128::new();
        let all = self.in_order();
        for size in all
            .iter()
            .flat_map(|gradient| [gradient.rank()].into_iter().chain(gradient.shape().iter().copied()))
        {
            hasher.write(&(size as u64).to_le_bytes());
        }
        for part in self.parts() {
            hasher.write(&part.bytes.to_le_bytes());
        }
        let counts = [all.len() as u64, self.bytes() / 4].map(u64::to_le_bytes);
        [&counts.concat()[..], &hasher.finish_128().to_le_bytes()].concat()
    }

    /// [`Grads::all_reduce`] of ranks that are known to have gradients of the same leaves.
    pub(crate) fn sum_over(&mut self, ranks: &dyn Ranks) -> Result<()> {
        let parts = self.parts();
        self.sum_parts(ranks, &parts, VecDeque::new())
    }

    /// Sums parts in their order, the same on every rank. `coming` are readings of the first of them that have begun.
    pub(crate) fn sum_parts(
        &mut self,
        ranks: &dyn Ranks,
        parts: &[Part],
        mut coming: VecDeque<Reading>,
    ) -> Result<()> {
        let (mut started, mut numbers) = (coming.len(), Vec::new());
        for part in parts {
            while coming.len() < AHEAD
                && let Some(next) = parts.get(started)
            {
                coming.push_back(match &next.at {
                    Some(at) => next.gpu.start_read(&at.buffer, at.offset, next.bytes)?,
                    None => self.by_leaf[&next.leaf].read::<f32>()?,
                });
                started += 1;
            }
            let Some(reading) = coming.pop_front() else { break };
            reading.wait_into(&mut numbers)?;
            ranks.sum(&mut numbers)?;
            match &part.at {
                Some(at) => {
                    let write = [(at.clone(), bytemuck::cast_slice(&numbers))];
                    part.gpu.unchanged(|| part.gpu.overwrite_now(&write))?;
                }
                None => {
                    let old = &self.by_leaf[&part.leaf];
                    let new = Tensor::from_slice(old.gpu(), &numbers, *old.shape());
                    self.by_leaf.insert(part.leaf, new);
                }
            }
        }
        Ok(())
    }

    /// What is summed, in an order that is the same on every rank: by the first leaf of an arena, then by places in it.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let mut ids: Vec<u64> = self.by_leaf.keys().copied().collect();
        ids.sort_unstable();
        let mut first: HashMap<*const (), u64> = HashMap::new();
        let mut spans: Vec<Part> = Vec::new();
        for id in ids {
            let gradient = &self.by_leaf[&id];
            let gpu = gradient.gpu().clone();
            let (bytes, after) =
                (4 * gradient.count() as u64, self.ready.get(&id).copied().unwrap_or(usize::MAX));
            let is_in = |at: &Place| self.arenas.values().any(|arena| Arc::ptr_eq(&arena.buffer, &at.buffer));
            let at = gradient.value.computed().filter(is_in);
            if bytes == 0 {
                continue;
            }
            let leaf =
                at.as_ref().map_or(id, |at| *first.entry(Arc::as_ptr(&at.buffer).cast()).or_insert(id));
            spans.push(Part { gpu, at, bytes, leaf, after });
        }
        let offset = |part: &Part| part.at.as_ref().map_or(0, |at| at.offset);
        spans.sort_by_key(|part| (part.leaf, offset(part)));
        let mut parts: Vec<Part> = Vec::new();
        for span in spans {
            match (&span.at, parts.last_mut()) {
                (Some(at), Some(last)) if last.takes(at, span.bytes) => {
                    last.bytes = at.offset + span.bytes - last.at.as_ref().map_or(0, |at| at.offset);
                    last.after = last.after.max(span.after);
                }
                _ => parts.extend(span.cut()),
            }
        }
        parts
    }

    /// What these gradients are apart from their elements.
    pub(crate) fn frame(&self) -> Frame {
        let arena_of = |gradient: &Tensor| {
            let place = gradient.value.computed()?;
            let arena = self.arenas.values().find(|arena| Arc::ptr_eq(&arena.buffer, &place.buffer))?;
            Some(arena.layout.clone())
        };
        let mut leaves: Vec<_> =
            self.by_leaf.iter().map(|(&id, gradient)| (id, arena_of(gradient))).collect();
        leaves.sort_unstable_by_key(|(id, _)| *id);
        let scaling = self.scaled.as_ref().map(|scaled| (scaled.scaling.clone(), scaled.steps));
        Frame { leaves, scaling, ready: self.ready.clone() }
    }

    /// All tensors that these gradients are made of, which [`Frame::with`] takes.
    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let gradients = self.in_order().into_iter().cloned();
        gradients.chain(self.scaled.as_ref().map(|scaled| scaled.own.clone())).collect()
    }
}

/// Gradients without their elements: what a recorded step keeps of them, since each run writes the elements anew.
pub(crate) struct Frame {
    /// The leaves in the order in which they were made, and the arenas in which an optimizer wants their gradients.
    leaves: Vec<(u64, Option<Arc<ArenaLayout>>)>,
    scaling: Option<(Arc<Scaling>, u64)>,
    ready: HashMap<u64, usize>,
}

impl Frame {
    /// The gradients of these elements. Those of one arena lie in one buffer.
    pub fn with(&self, tensors: &[Tensor]) -> Grads {
        let mut grads = Grads { ready: self.ready.clone(), ..Grads::default() };
        for ((id, layout), gradient) in self.leaves.iter().zip(tensors) {
            if let Some(layout) = layout {
                let buffer = gradient.place().buffer;
                let arena = || Arena { layout: layout.clone(), buffer };
                grads.arenas.entry(Arc::as_ptr(layout)).or_insert_with(arena);
            }
            grads.by_leaf.insert(*id, gradient.clone());
        }
        let own = tensors.get(self.leaves.len());
        grads.scaled = self.scaling.as_ref().zip(own).map(|((scaling, steps), own)| Scaled {
            scaling: scaling.clone(),
            own: own.clone(),
            steps: *steps,
        });
        grads
    }
}

/// Checks that every rank's [`Grads::signature`] are the same.
pub(crate) fn same_leaves(all: &[Vec<u8>]) -> Result<()> {
    let count = |bytes: &[u8]| {
        let words = bytes.as_chunks::<8>().0;
        [0, 1].map(|i| words.get(i).map_or(0, |word| u64::from_le_bytes(*word)))
    };
    match all.iter().position(|bytes| *bytes != all[0]) {
        None => Ok(()),
        Some(rank) => {
            let ([here, numbers], [first, others]) = (count(&all[rank]), count(&all[0]));
            if [here, numbers] == [first, others] {
                return Err(Error::config(format!(
                    "rank {rank} has gradients of other shapes than rank 0, or an adapter with other limits, on which they lie in other \
                     pieces: give all ranks the same model, and adapters of one kind"
                )));
            }
            Err(Error::config(format!(
                "rank {rank} has gradients of {here} leaves with {numbers} numbers, and rank 0 of {first} with {others}: in each step, all \
                 ranks must use the same parameters; add 0 times a parameter that only some ranks use"
            )))
        }
    }
}
