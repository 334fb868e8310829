//! Reverse-mode differentiation: a graph of nodes made as ops run, walked backwards once.
//!
//! The tape knows the trait `Op` and no op. A gradient adds: an op hands its input gradients to a `Sink`, which
//! either lets the op's own kernel accumulate into the buffer that is there, or adds as a pending expression. A weight
//! used R times has one gradient buffer, not R.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::buffer::Buffer;
use crate::gpu::value::Place;
use crate::gpu::{Gpu, lock};
use crate::shape::Shape;
use crate::tensor::{Tensor, same_gpu};
use std::cell::Cell;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The backward half of an op: what it saved, and how gradients of its outputs become gradients of its inputs.
pub(crate) trait Op: Send + Sync {
    fn name(&self) -> &'static str;
    /// `dy` has one entry an output, `None` where no gradient arrived.
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink);
}

/// A step of the recorded graph, or a leaf.
pub(crate) struct Node {
    /// Rises with every node, so descending ids are a topological order.
    id: u64,
    leaf: bool,
    /// What a backward pass needs, until one has used it up; a leaf has none.
    work: Mutex<Option<Arc<Work>>>,
    /// Where an optimizer wants this leaf's gradient, or an op those of its outputs.
    home: Mutex<Option<Home>>,
}

/// An op with what it saved, and where its gradients go.
struct Work {
    op: Box<dyn Op>,
    inputs: Vec<Input>,
}

struct Input {
    edge: Option<Edge>,
    shape: Shape,
}

/// One output of a node.
#[derive(Clone)]
pub(crate) struct Edge {
    pub node: Arc<Node>,
    pub output: usize,
}

/// A leaf's part of a gradient arena, or the arena of an op's outputs.
#[derive(Clone)]
pub(crate) struct Home {
    pub arena: Arc<ArenaLayout>,
    /// Of the first output, in bytes.
    pub offset: u64,
    /// From output to output.
    pub step: u64,
}

/// The size of one gradient arena; each backward pass takes its buffer from the pool.
pub(crate) struct ArenaLayout {
    gpu: Gpu,
    pub bytes: u64,
    /// Whether nobody wants gradients there any more.
    left: AtomicBool,
}

impl ArenaLayout {
    pub fn new(gpu: &Gpu, bytes: u64) -> Arc<ArenaLayout> {
        Arc::new(ArenaLayout { gpu: gpu.clone(), bytes, left: AtomicBool::new(false) })
    }

    fn arena(self: &Arc<ArenaLayout>) -> Arena {
        Arena { layout: self.clone(), buffer: self.gpu.alloc("gradients", self.bytes) }
    }

    /// Frees the leaves that have their home here: the optimizer is gone, or was never made.
    pub fn leave(&self) {
        self.left.store(true, Ordering::Release);
    }
}

static NEXT: AtomicU64 = AtomicU64::new(1);

fn next_id() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

thread_local! {
    static PAUSED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` without recording: nothing in it can be differentiated, nothing is kept for a backward pass.
///
/// ```no_run
/// # use tiebeam::{Gpu, Tensor, no_grad};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1.0f32, 2.0], [2]).requires_grad();
/// let y = no_grad(|| w.mul(&w));
/// assert!(!y.is_tracked());
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn no_grad<T>(work: impl FnOnce() -> T) -> T {
    set_paused(true, work)
}

fn set_paused<T>(paused: bool, work: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            PAUSED.set(self.0);
        }
    }
    let _restore = Restore(PAUSED.replace(paused));
    work()
}

/// Whether ops on this thread are being recorded.
pub fn is_recording() -> bool {
    !PAUSED.get()
}

impl Node {
    pub fn leaf() -> Arc<Node> {
        Arc::new(Node { id: next_id(), leaf: true, work: Mutex::default(), home: Mutex::default() })
    }

    fn of(op: Box<dyn Op>, inputs: &[&Tensor]) -> Arc<Node> {
        let inputs = inputs.iter().map(|t| Input { edge: t.edge.clone(), shape: t.shape }).collect();
        let work = Mutex::new(Some(Arc::new(Work { op, inputs })));
        Arc::new(Node { id: next_id(), leaf: false, work, home: Mutex::default() })
    }

    pub fn is_leaf(&self) -> bool {
        self.leaf
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    /// Gives this leaf's gradients a home; false if it has one already that somebody wants.
    pub fn settle(&self, home: Home) -> bool {
        let mut now = lock(&self.home);
        if now.as_ref().is_some_and(|now| !now.arena.left.load(Ordering::Acquire)) {
            return false;
        }
        *now = Some(home);
        true
    }

    fn home(&self) -> Option<Home> {
        lock(&self.home).clone().filter(|home| !home.arena.left.load(Ordering::Acquire))
    }

    /// What the op saved; where `retain` is false it is gone when the caller lets go.
    fn work(&self, retain: bool) -> Option<Arc<Work>> {
        let mut work = lock(&self.work);
        if retain { work.clone() } else { work.take() }
    }
}

impl Drop for Work {
    /// Takes the graph apart without recursion: a chain of a hundred thousand ops must not overflow the stack.
    fn drop(&mut self) {
        // What ops saved holds tensors outside the graph; the graph is in the edges.
        let nodes =
            |inputs: &mut Vec<Input>| inputs.drain(..).filter_map(|i| Some(i.edge?.node)).collect::<Vec<_>>();
        let mut rest = nodes(&mut self.inputs);
        while let Some(node) = rest.pop() {
            let Some(work) = Arc::into_inner(node).and_then(|node| node.work(false)) else { continue };
            if let Some(mut work) = Arc::into_inner(work) {
                rest.extend(nodes(&mut work.inputs));
            }
        }
    }
}

/// Records `op` as the maker of `outputs`, if recording is on and an input is tracked.
pub(crate) fn record(outputs: &mut [Tensor], inputs: &[&Tensor], op: impl FnOnce() -> Box<dyn Op>) {
    if !tracks(inputs) {
        return;
    }
    let node = Node::of(op(), inputs);
    for (output, tensor) in outputs.iter_mut().enumerate() {
        tensor.edge = Some(Edge { node: node.clone(), output });
    }
}

/// The same for outputs of one shape whose gradients shall lie side by side, so that the op's backward half reads them as
/// one array: see [`Sink::joined`].
pub(crate) fn record_parts(outputs: &mut [Tensor], inputs: &[&Tensor], op: impl FnOnce() -> Box<dyn Op>) {
    record(outputs, inputs, op);
    let (gpu, step) = (outputs[0].gpu().clone(), DType::F32.buffer_bytes(outputs[0].count()));
    if let Some(edge) = &outputs[0].edge
        && step.is_multiple_of(gpu.limits().min_storage_buffer_offset_alignment as u64)
    {
        let arena = ArenaLayout::new(&gpu, step * outputs.len() as u64);
        edge.node.settle(Home { arena, offset: 0, step });
    }
}

/// Whether an op on these inputs will be recorded: kernels that can skip saving ask this first.
pub(crate) fn tracks(inputs: &[&Tensor]) -> bool {
    is_recording() && inputs.iter().any(|t| t.edge.is_some())
}

/// A tensor kept for the backward pass, with a check that nobody changed it in place meanwhile.
pub(crate) struct Saved {
    tensor: Tensor,
    /// Changes in place before.
    changes: u64,
}

impl Saved {
    pub fn new(tensor: &Tensor) -> Saved {
        let tensor = tensor.detach();
        let changes = tensor.value.changes();
        Saved { tensor, changes }
    }

    /// # Panics
    /// When the value was changed in place since.
    pub fn get(&self, op: &str) -> &Tensor {
        assert!(
            self.changes == self.tensor.value.changes(),
            "{op}: a tensor {} saved for backward was changed in place (by an optimizer step?); \
             call backward before the change",
            self.tensor.shape()
        );
        &self.tensor
    }
}

/// Where a kernel writes an input's gradient.
pub(crate) enum Into {
    /// A new tensor.
    New,
    /// This tensor, whose contents are arbitrary.
    Write(Tensor),
    /// This tensor, adding to what it holds.
    Add(Tensor),
}

impl Into {
    /// The f32 tensor to write and whether to add.
    pub fn output(self, gpu: &Gpu, op: &'static str, shape: Shape) -> (Tensor, bool) {
        match self {
            Into::New => (Tensor::empty(gpu, op, shape, DType::F32), false),
            Into::Write(tensor) => (tensor, false),
            Into::Add(tensor) => (tensor, true),
        }
    }
}

struct Slot {
    sum: Tensor,
    /// Nobody else holds this memory: kernels may accumulate into it.
    owned: bool,
}

#[derive(Default)]
struct Walk {
    /// Whether the graph can be walked again.
    retain: bool,
    /// An op that an earlier walk used up.
    used_up: bool,
    heap: BinaryHeap<Entry>,
    queued: HashSet<u64>,
    slots: HashMap<(u64, usize), Slot>,
    leaves: HashMap<u64, Arc<Node>>,
    arenas: HashMap<*const ArenaLayout, Arena>,
}

struct Arena {
    layout: Arc<ArenaLayout>,
    buffer: Arc<Buffer>,
}

struct Entry(Arc<Node>);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.id.cmp(&other.0.id)
    }
}

/// Takes the input gradients of one op.
pub(crate) struct Sink<'a> {
    walk: &'a mut Walk,
    node: &'a Node,
    inputs: &'a [Input],
}

impl Sink<'_> {
    /// Whether input `i` wants a gradient.
    pub fn needs(&self, i: usize) -> bool {
        self.inputs[i].edge.is_some()
    }

    /// Adds `dx` to the gradient of input `i`.
    pub fn add(&mut self, i: usize, dx: Tensor) {
        let input = &self.inputs[i];
        if let Some(edge) = &input.edge {
            debug_assert_eq!(dx.shape(), &input.shape, "gradient of input {i}");
            self.walk.add(edge, dx);
        }
    }

    /// Lets `write` put input `i`'s gradient where it belongs: accumulating kernels save a buffer and a pass.
    pub fn add_with(&mut self, i: usize, write: impl FnOnce(Into) -> Tensor) {
        let input = &self.inputs[i];
        if let Some(edge) = &input.edge {
            self.walk.add_with(edge, &input.shape, write);
        }
    }

    /// The gradients of all `count` outputs as one array `[count, ..]`, where [`record_parts`] could place them so; zeros for
    /// those that did not arrive.
    pub fn joined(&mut self, dy: &[Option<Tensor>], count: usize) -> Option<Tensor> {
        let shape = *dy.iter().flatten().next()?.shape();
        let arena = self.node.home()?.arena;
        for output in 0..count {
            if !matches!(dy.get(output), Some(Some(_))) {
                let home = self.walk.home(self.node, output, &shape)?;
                Tensor::zeros(home.gpu(), shape).write_to("gradient", &home, false);
            }
        }
        let first = self.walk.home(self.node, 0, &shape)?.place();
        let mut sizes = vec![count];
        sizes.extend(&*shape);
        Some(Tensor::from_place(&arena.gpu, Shape::new(&sizes), DType::F32, first))
    }

    /// Differentiates a graph recorded just now, inside this backward pass, and returns the gradients of `leaves`.
    fn inner(
        &mut self,
        outputs: &[Tensor],
        dy: &[Option<Tensor>],
        leaves: &[Tensor],
        floor: u64,
    ) -> Vec<Option<Tensor>> {
        for (y, dy) in outputs.iter().zip(dy) {
            if let (Some(edge), Some(dy)) = (&y.edge, dy) {
                self.walk.add(edge, dy.clone());
            }
        }
        // Nobody else has this graph.
        let retain = std::mem::replace(&mut self.walk.retain, false);
        self.walk.run(floor);
        self.walk.retain = retain;
        leaves
            .iter()
            .map(|leaf| {
                let id = leaf.edge.as_ref()?.node.id;
                self.walk.leaves.remove(&id);
                Some(self.walk.slots.remove(&(id, 0))?.sum)
            })
            .collect()
    }
}

impl Walk {
    fn queue(&mut self, node: &Arc<Node>) {
        if node.is_leaf() {
            self.leaves.entry(node.id).or_insert_with(|| node.clone());
        } else if self.queued.insert(node.id) {
            self.heap.push(Entry(node.clone()));
        }
    }

    fn home(&mut self, node: &Node, output: usize, shape: &Shape) -> Option<Tensor> {
        let home = node.home()?;
        let arena = self.arenas.entry(Arc::as_ptr(&home.arena)).or_insert_with(|| home.arena.arena());
        let offset = home.offset + home.step * output as u64;
        let place = Place { buffer: arena.buffer.clone(), offset };
        Some(Tensor::from_place(&home.arena.gpu, *shape, DType::F32, place))
    }

    fn add(&mut self, edge: &Edge, dx: Tensor) {
        self.queue(&edge.node);
        let key = (edge.node.id, edge.output);
        let leaf = edge.node.is_leaf();
        match self.slots.remove(&key) {
            None => {
                let slot = match self.home(&edge.node, edge.output, dx.shape()) {
                    Some(home) => Slot { sum: write(&dx, home, false), owned: true },
                    None => Slot { sum: dx, owned: false },
                };
                self.slots.insert(key, slot);
            }
            Some(slot) if slot.owned => {
                let sum = write(&dx, slot.sum, true);
                self.slots.insert(key, Slot { sum, owned: true });
            }
            Some(slot) => {
                let sum = Tensor::lazy("add", "$0 + $1", DType::F32, *dx.shape(), &[&slot.sum, &dx]);
                // A leaf may get many: its sum becomes one buffer that later arrivals accumulate into.
                if leaf {
                    sum.compute();
                }
                self.slots.insert(key, Slot { sum, owned: leaf });
            }
        }
    }

    fn add_with(&mut self, edge: &Edge, shape: &Shape, make: impl FnOnce(Into) -> Tensor) {
        self.queue(&edge.node);
        let key = (edge.node.id, edge.output);
        match self.slots.remove(&key) {
            None => {
                let into = match self.home(&edge.node, edge.output, shape) {
                    Some(home) => Into::Write(home),
                    None => Into::New,
                };
                self.slots.insert(key, Slot { sum: make(into), owned: true });
            }
            Some(slot) if slot.owned => {
                let sum = make(Into::Add(slot.sum));
                self.slots.insert(key, Slot { sum, owned: true });
            }
            Some(slot) => {
                let dx = make(Into::New);
                self.slots.insert(key, slot);
                self.add(edge, dx);
            }
        }
    }

    /// Walks every queued node whose id is above `floor`.
    fn run(&mut self, floor: u64) {
        while self.heap.peek().is_some_and(|entry| entry.0.id > floor) {
            let Some(Entry(node)) = self.heap.pop() else { break };
            let outputs = self.slots.keys().filter(|k| k.0 == node.id).map(|k| k.1 + 1).max().unwrap_or(0);
            let dy: Vec<Option<Tensor>> =
                (0..outputs).map(|o| self.slots.remove(&(node.id, o)).map(|s| s.sum)).collect();
            let Some(work) = node.work(self.retain) else {
                self.used_up = true;
                return;
            };
            let _span = tracing::trace_span!("backward", op = work.op.name()).entered();
            work.op.backward(&dy, &mut Sink { walk: self, node: &node, inputs: &work.inputs });
            // The gradients of an op's outputs are done with.
            if let Some(home) = node.home() {
                self.arenas.remove(&Arc::as_ptr(&home.arena));
            }
        }
    }
}

/// Writes `dx` into `home`, or adds it there.
fn write(dx: &Tensor, home: Tensor, accumulate: bool) -> Tensor {
    // A copy of its own, never `dx` itself: the same gradient may go to another leaf of the same arena, and one buffer
    // cannot be read and written by one kernel. A pending `dx` is inlined, so nothing is computed twice.
    dx.clone().write_to("gradient", &home, accumulate);
    home
}

/// Gradients of a backward pass, asked by leaf.
#[derive(Default)]
pub struct Grads {
    by_leaf: HashMap<u64, Tensor>,
    arenas: HashMap<*const ArenaLayout, Arena>,
}

// SAFETY: the raw pointers are keys only, never followed; the `Arc` beside each keeps the address taken.
unsafe impl Send for Grads {}
// SAFETY: as above.
unsafe impl Sync for Grads {}

impl Grads {
    /// The gradient of `leaf`, in f32 and of its shape; `None` when the result does not depend on it.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.by_leaf.get(&leaf.edge.as_ref()?.node.id)
    }

    /// Number of leaves that got a gradient.
    pub fn len(&self) -> usize {
        self.by_leaf.len()
    }

    /// Whether no leaf got a gradient.
    pub fn is_empty(&self) -> bool {
        self.by_leaf.is_empty()
    }

    pub(crate) fn arena(&self, layout: &Arc<ArenaLayout>) -> Option<&Arc<Buffer>> {
        self.arenas.get(&Arc::as_ptr(layout)).map(|a| {
            debug_assert!(Arc::ptr_eq(&a.layout, layout));
            &a.buffer
        })
    }
}

impl Grads {
    /// These gradients and `other`'s, added leaf by leaf: of the micro-batches of one step, for instance. A leaf that only one of
    /// them has keeps that one's.
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
    /// When the two are of different devices.
    #[track_caller]
    pub fn add(&self, other: &Grads) -> Grads {
        if let (Some(a), Some(b)) = (self.by_leaf.values().next(), other.by_leaf.values().next()) {
            same_gpu("gradients", &[a, b]);
        }
        Grads::made_of(&[self, other], |parts| match parts {
            [a, b] => a.add(b),
            one => one[0].clone(),
        })
    }

    /// These gradients times `factor`.
    pub fn scale(&self, factor: f32) -> Grads {
        Grads::made_of(&[self], |parts| parts[0].scale(factor))
    }

    /// What `make` gives for each leaf of `sources`, from the gradients that it has there; where an optimizer wants them.
    fn made_of(sources: &[&Grads], make: impl Fn(&[&Tensor]) -> Tensor) -> Grads {
        let mut all = Grads::default();
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

    /// The place that the gradient of leaf `id` has in an arena of `other`, in an arena of this.
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
    /// Gradients of this scalar with respect to every leaf that it depends on.
    ///
    /// This uses the graph up: what its ops saved is freed as the walk passes, and the tensor that is kept, such as a loss for a
    /// curve, holds its one element. To walk a graph, or a part that another loss shares, once more, use
    /// [`Tensor::backward_retain_graph`] first.
    ///
    /// # Errors
    /// What this tensor or one of the gradients carries ([`Tensor::check`]); the device's fault, if one stands.
    ///
    /// # Panics
    /// When this is not a single element (use [`Tensor::backward_with`]), depends on no leaf, or its graph is used up.
    #[track_caller]
    pub fn backward(&self) -> Result<Grads> {
        self.backward_from(&self.seed(), false)
    }

    /// As [`Tensor::backward`], and the graph stays: PyTorch's `retain_graph`.
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// As [`Tensor::backward`].
    #[track_caller]
    pub fn backward_retain_graph(&self) -> Result<Grads> {
        self.backward_from(&self.seed(), true)
    }

    /// Gradients of `sum(self * seed)`; uses the graph up, as [`Tensor::backward`].
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// When `seed` has another shape, is not f32 or lives on another device, this tensor depends on no leaf, or its graph is used
    /// up.
    #[track_caller]
    pub fn backward_with(&self, seed: &Tensor) -> Result<Grads> {
        self.backward_from(seed, false)
    }

    /// As [`Tensor::backward_with`], and the graph stays.
    ///
    /// # Errors
    /// As [`Tensor::backward`].
    ///
    /// # Panics
    /// As [`Tensor::backward_with`].
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
        no_grad(|| {
            walk.add(edge, seed.detach());
            walk.run(0);
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
        Ok(Grads { by_leaf, arenas: walk.arenas })
    }
}

struct Checkpoint<F> {
    inputs: Vec<Saved>,
    tracked: Vec<bool>,
    work: F,
}

impl<F: Fn(&[Tensor]) -> Tensor + Send + Sync> Op for Checkpoint<F> {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let inputs: Vec<Tensor> = self
            .inputs
            .iter()
            .zip(&self.tracked)
            .map(|(saved, &tracked)| {
                let tensor = saved.get("checkpoint").clone();
                if tracked { tensor.requires_grad() } else { tensor }
            })
            .collect();
        let floor = next_id();
        let output = set_paused(false, || (self.work)(&inputs));
        let grads = sink.inner(&[output], dy, &inputs, floor);
        for (i, dx) in grads.into_iter().enumerate() {
            if let Some(dx) = dx {
                sink.add(i, dx);
            }
        }
    }
}

/// Runs `work` on `inputs` without keeping what lies between; the backward pass runs it again.
///
/// Memory for activations falls from the whole closure to its inputs, at the price of a second forward. `work` must
/// give the same result both times: random draws inside it come from a generator that it copies.
/// Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
pub fn checkpoint<F>(inputs: &[&Tensor], work: F) -> Tensor
where
    F: Fn(&[Tensor]) -> Tensor + Send + Sync + 'static,
{
    let detached: Vec<Tensor> = inputs.iter().map(|t| t.detach()).collect();
    if !is_recording() {
        return work(&detached);
    }
    let output = no_grad(|| work(&detached)).detach();
    let node = Checkpoint {
        inputs: inputs.iter().map(|t| Saved::new(t)).collect(),
        tracked: inputs.iter().map(|t| t.is_tracked()).collect(),
        work,
    };
    // Recorded even where no input is tracked: the closure may capture leaves.
    let node = Node::of(Box::new(node), inputs);
    Tensor { edge: Some(Edge { node, output: 0 }), ..output }
}
