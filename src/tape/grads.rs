//! The gradients that a backward pass returns.

use super::{Arena, ArenaLayout, Walk, no_grad};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::buffer::Buffer;
use crate::gpu::value::Place;
use crate::precision::{Precision, autocast};
use crate::tensor::{Tensor, same_gpu};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// A loss scale: its state on the device, and how a step changes it.
pub(crate) struct Scaling {
    /// The scale, 1 / scale, the number of finite steps since it changed, and nothing.
    pub state: Tensor,
    pub growth: f32,
    pub backoff: f32,
    /// Number of finite steps in a row that raise the scale, 0 for a scale that stays.
    pub interval: u32,
    /// Steps that may have changed the scale.
    pub steps: AtomicU64,
}

/// The scale by which gradients are too large. A later step may have changed the loss scale since.
#[derive(Clone)]
pub(crate) struct Scaled {
    pub scaling: Arc<Scaling>,
    /// The scaling's state as the backward pass used it.
    pub own: Tensor,
    /// The scaling's steps at that time.
    pub steps: u64,
}

/// Gradients of a backward pass, by leaf.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let [w, b] = [3.0, 1.0].map(|value| Tensor::full(&gpu, [2], value).requires_grad());
/// let unused = Tensor::ones(&gpu, [2]).requires_grad();
/// let grads = w.mul(&b).sum_all().backward()?;
/// assert_eq!(grads.get(&b).unwrap().to_vec::<f32>()?, [3.0, 3.0]);
/// assert!(grads.get(&unused).is_none());
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Default)]
pub struct Grads {
    pub(super) by_leaf: HashMap<u64, Tensor>,
    /// The scale by which all of them are too large.
    pub(super) scaled: Option<Scaled>,
    pub(super) arenas: HashMap<*const ArenaLayout, Arena>,
    /// In a recorded step, the number of commands that make a leaf's gradient. Unknown for those that were computed from others.
    pub(super) ready: HashMap<u64, usize>,
}

// SAFETY: the raw pointers are only keys and never followed. The `Arc` beside each keeps its address in use.
unsafe impl Send for Grads {}
// SAFETY: as above.
unsafe impl Sync for Grads {}

impl Grads {
    /// The gradient of `leaf`, in f32 and of the leaf's shape. `None` if the result does not depend on it. If a
    /// [`LossScale`](crate::optim::LossScale) made it, it is the gradient times the scale.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.by_leaf.get(&leaf.edge.as_ref()?.node.id)
    }

    /// The numbers of the leaves that got a gradient ([`Tensor::leaf_id`]), with their gradients, in no particular order.
    pub fn leaves(&self) -> impl Iterator<Item = (u64, &Tensor)> {
        self.by_leaf.iter().map(|(&id, gradient)| (id, gradient))
    }

    /// Number of leaves that got a gradient.
    pub fn len(&self) -> usize {
        self.by_leaf.len()
    }

    /// Whether no leaf got a gradient.
    pub fn is_empty(&self) -> bool {
        self.by_leaf.is_empty()
    }

    /// Returns these gradients with the scale of their loss.
    pub(crate) fn scaled_by(self, scaled: Scaled) -> Grads {
        Grads { scaled: Some(scaled), ..self }
    }

    pub(crate) fn scaled(&self) -> Option<&Scaled> {
        self.scaled.as_ref()
    }

    pub(crate) fn arena(&self, layout: &Arc<ArenaLayout>) -> Option<&Arc<Buffer>> {
        self.arenas.get(&Arc::as_ptr(layout)).map(|a| {
            debug_assert!(Arc::ptr_eq(&a.layout, layout));
            &a.buffer
        })
    }
}

impl Grads {
    /// Adds these gradients and `other`'s, leaf by leaf, such as those of the micro-batches of one step. A leaf that
    /// only one of the two has keeps that gradient.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, optim::{Group, Sgd, SgdConfig}};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
    /// let first = w.sum_all().backward()?;
    /// let both = first.add(&w.scale(2.0).sum_all().backward()?);
    /// sgd.step(&both.scale(0.5), 0.1)?; // their mean, 1.5
    /// assert_eq!(w.to_vec::<f32>()?, [0.85, 1.85]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// If the two are on different devices, or have different loss scales: also if a step came between their backward
    /// passes, which may have changed the scale.
    #[track_caller]
    pub fn add(&self, other: &Grads) -> Grads {
        if let (Some(a), Some(b)) = (self.by_leaf.values().next(), other.by_leaf.values().next()) {
            same_gpu("gradients", &[a, b]);
        }
        let scale = |grads: &Grads| grads.scaled.as_ref().map(|of| (Arc::as_ptr(&of.scaling), of.steps));
        assert!(
            scale(self) == scale(other),
            "gradients: only one has a loss scale, or they have two, or a step came between that may have changed it"
        );
        Grads::made_of(&[self, other], |parts| match parts {
            [a, b] => a.add(b),
            one => one[0].clone(),
        })
    }

    /// Returns these gradients times `factor`.
    pub fn scale(&self, factor: f32) -> Grads {
        self.map(|gradient| gradient.scale(factor))
    }

    /// Returns the mean of the gradients of micro-batches: gradient accumulation. Each is computed when its turn comes and
    /// added to the sum, so that only one graph is held at a time, and the memory of three gradients is needed.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Grads, Tensor, optim::{Group, Sgd, SgdConfig}};
    /// # let gpu = Gpu::open()?;
    /// # let micro_batches = [1f32, 2.0, 6.0].map(|x| Tensor::full(&gpu, [2], x));
    /// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
    /// let losses = micro_batches.iter().map(|x| w.mul(x).sum_all());
    /// let grads = Grads::mean_of(losses.map(|loss| loss.backward()))?;
    /// assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [3.0, 3.0]);
    /// sgd.step(&grads, 0.5)?;
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// It is the gradient of the mean of the losses. That is the loss of the whole batch if each loss is a mean over equally
    /// many examples. A leaf that some losses do not depend on has a gradient of 0 from these.
    ///
    /// # Errors
    /// The first error of `parts`.
    ///
    /// # Panics
    /// If there are no parts, or as [`Grads::add`].
    #[track_caller]
    pub fn mean_of(parts: impl IntoIterator<Item = Result<Grads>>) -> Result<Grads> {
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else { panic!("gradients: the mean of none; give at least one") };
        let (mut sum, mut count) = (first?, 1);
        for part in parts {
            sum = sum.add(&part?);
            count += 1;
        }
        Ok(if count == 1 { sum } else { sum.scale((1.0 / f64::from(count)) as f32) })
    }

    /// Returns these gradients with `change` applied to each.
    pub(crate) fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Grads {
        Grads::made_of(&[self], |parts| change(parts[0]))
    }

    /// All gradients, in the order in which their leaves were made.
    pub(crate) fn in_order(&self) -> Vec<&Tensor> {
        let by_id: BTreeMap<u64, &Tensor> =
            self.by_leaf.iter().map(|(id, gradient)| (*id, gradient)).collect();
        by_id.into_values().collect()
    }

    /// Applies `make` to the gradients that each leaf has in `sources`. Where an optimizer wants gradients in an arena,
    /// the results are written to an arena.
    fn made_of(sources: &[&Grads], make: impl Fn(&[&Tensor]) -> Tensor) -> Grads {
        let mut all = Grads { scaled: sources[0].scaled.clone(), ..Grads::default() };
        let ids: BTreeSet<u64> = sources.iter().flat_map(|grads| grads.by_leaf.keys().copied()).collect();
        for id in ids {
            let parts: Vec<&Tensor> = sources.iter().filter_map(|grads| grads.by_leaf.get(&id)).collect();
            let made = make(&parts);
            let home = sources.iter().find_map(|grads| all.home_as_in(grads, parts[0], id));
            let gradient = match home {
                Some(home) => {
                    made.write_to("gradient", &home, false);
                    home
                }
                None => {
                    made.evaluate();
                    made
                }
            };
            all.by_leaf.insert(id, gradient);
        }
        all
    }

    /// If the gradient of leaf `id` lies in an arena of `other`, returns the same place in an arena of `self`.
    fn home_as_in(&mut self, other: &Grads, like: &Tensor, id: u64) -> Option<Tensor> {
        let place = other.by_leaf.get(&id)?.value.computed()?;
        let arena = other.arenas.values().find(|arena| Arc::ptr_eq(&arena.buffer, &place.buffer))?;
        let layout = &arena.layout;
        let own = self.arenas.entry(Arc::as_ptr(layout)).or_insert_with(|| layout.arena());
        let place = Place { buffer: own.buffer.clone(), offset: place.offset };
        Some(Tensor::from_place(like.gpu(), *like.shape(), DType::F32, place))
    }
}

impl Tensor {
    /// Returns the gradients of this scalar with respect to every leaf that it depends on.
    ///
    /// This uses the graph up: the tensors that its ops saved are freed during the walk. A tensor that is kept
    /// afterwards, such as a loss for a learning curve, holds only its one element. To walk a graph, or a part that
    /// another loss shares, once more, use [`Tensor::backward_retain_graph`] first.
    ///
    /// # Errors
    /// An error that this tensor or one of the gradients carries ([`Tensor::check`]), or the device's fault, if one
    /// stands.
    ///
    /// # Panics
    /// If this is not a single element (use [`Tensor::backward_with`]), depends on no leaf, or its graph is used up.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let x = Tensor::from_slice(&gpu, &[10f32, 20.0], [2]);
    /// let grads = w.mul(&x).sum_all().backward()?;
    /// assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [10.0, 20.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn backward(&self) -> Result<Grads> {
        self.backward_from(&self.seed(), false)
    }

    /// Like [`Tensor::backward`], but keeps the graph, as PyTorch's `retain_graph` does.
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// As [`Tensor::backward`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[3f32], [1]).requires_grad();
    /// let loss = w.square().sum_all();
    /// let first = loss.backward_retain_graph()?;
    /// let second = loss.backward()?; // the last walk needs no graph afterwards
    /// assert_eq!(first.get(&w).unwrap().item()?, second.get(&w).unwrap().item()?);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn backward_retain_graph(&self) -> Result<Grads> {
        self.backward_from(&self.seed(), true)
    }

    /// Returns the gradients of `sum(self * seed)`. Uses the graph up, like [`Tensor::backward`].
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// If `seed` has another shape, is not f32 or lives on another device, if this tensor depends on no leaf, or if its
    /// graph is used up.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let seed = Tensor::from_slice(&gpu, &[1f32, 0.0], [2]); // the row of the Jacobian to take
    /// let grads = w.square().backward_with(&seed)?;
    /// assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [2.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn backward_with(&self, seed: &Tensor) -> Result<Grads> {
        self.backward_from(seed, false)
    }

    /// Like [`Tensor::backward_with`], but keeps the graph.
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// As [`Tensor::backward_with`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let y = w.square();
    /// let rows = [[1f32, 0.0], [0.0, 1.0]].map(|seed| Tensor::from_slice(&gpu, &seed, [2]));
    /// let jacobian = [y.backward_with_retain_graph(&rows[0])?, y.backward_with(&rows[1])?];
    /// assert_eq!(jacobian[0].get(&w).unwrap().to_vec::<f32>()?, [2.0, 0.0]);
    /// assert_eq!(jacobian[1].get(&w).unwrap().to_vec::<f32>()?, [0.0, 4.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn backward_with_retain_graph(&self, seed: &Tensor) -> Result<Grads> {
        self.backward_from(seed, true)
    }

    #[track_caller]
    fn seed(&self) -> Tensor {
        assert!(
            self.count() == 1,
            "backward: shape {} is not a scalar; reduce it to a loss or give a seed with backward_with",
            self.shape()
        );
        Tensor::full(self.gpu(), self.shape(), 1.0)
    }

    #[track_caller]
    fn backward_from(&self, seed: &Tensor, retain: bool) -> Result<Grads> {
        assert!(seed.shape() == self.shape(), "backward: seed {} for output {}", seed.shape(), self.shape());
        assert!(seed.dtype() == DType::F32, "backward: a seed of {}; gradients are f32", seed.dtype());
        same_gpu("backward", &[self, seed]);
        let Some(edge) = &self.edge else {
            panic!("backward: this tensor depends on no leaf; mark one with requires_grad, outside no_grad")
        };
        self.gpu().check()?;
        self.check()?;
        seed.check()?;
        let mut walk = Walk { retain, ..Walk::default() };
        // A scope of 16 bits counts for what it computes forward. Products of gradients are as they were recorded.
        autocast(Precision::F32, || {
            no_grad(|| {
                walk.add(edge, seed.detach());
                walk.run(0);
            });
        });
        assert!(
            !walk.used_up,
            "backward: an earlier backward has used up this graph or a part of it; call backward_retain_graph there"
        );
        let by_leaf: HashMap<u64, Tensor> = walk
            .leaves
            .keys()
            .filter_map(|&id| walk.slots.remove(&(id, 0)).map(|slot| (id, slot.sum)))
            .collect();
        self.gpu().check()?;
        by_leaf.values().try_for_each(Tensor::check)?;
        Ok(Grads { by_leaf, scaled: None, arenas: walk.arenas, ready: walk.ready })
    }
}
