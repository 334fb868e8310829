//! Reverse-mode differentiation: ops record a graph of nodes as they run, and a backward pass walks it once.
//!
//! The tape knows the trait `Op`, but no particular op. The gradients of a tensor that is used several times add up: an
//! op hands its input gradients to a `Sink`, which either lets the op's own kernel accumulate into the existing buffer,
//! or adds by a pending expression. So a weight used R times has one gradient buffer, not R.

mod checkpoint;
mod grads;
mod reduce;

pub use checkpoint::checkpoint;
pub use grads::Grads;
pub(crate) use grads::{Scaled, Scaling};
pub(crate) use reduce::{Frame, Part, same_leaves};

use crate::dtype::DType;
use crate::gpu::buffer::Buffer;
use crate::gpu::recording;
use crate::gpu::value::{Place, Value};
use crate::gpu::{Gpu, lock};
use crate::precision;
use crate::shape::Shape;
use crate::tensor::Tensor;
use std::cell::Cell;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The backward half of an op: what it saved, and how gradients of its outputs become gradients of its inputs. The module
/// [`op`](crate::op) has an example.
pub trait Op: Send + Sync {
    /// The op's name, for messages.
    fn name(&self) -> &'static str;
    /// Hands the gradients of the inputs to `sink`. `dy` has one entry per output up to the last that got a gradient, `None` if
    /// none arrived there. A `dy` may be strided: call [`contiguous`](Tensor::contiguous) before a kernel binds it. Nothing in
    /// here is recorded.
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink);
    /// Whether `dy` may have 16 bits. Otherwise it is converted to f32 first.
    fn takes_half(&self) -> bool {
        false
    }
}

/// An op of the recorded graph, or a leaf.
pub(crate) struct Node {
    /// Increases with every node, so descending ids are a topological order.
    id: u64,
    leaf: bool,
    /// What a backward pass needs, until one has used it up. A leaf has none.
    work: Mutex<Option<Arc<Work>>>,
    /// The place in an arena where an optimizer wants this leaf's gradient, or an op the gradients of its outputs.
    home: Mutex<Option<ArenaPlace>>,
}

/// An op with what it saved, and the inputs that its gradients go to.
struct Work {
    op: Box<dyn Op>,
    inputs: Vec<Input>,
}

struct Input {
    edge: Option<Edge>,
    shape: Shape,
    /// The type of its gradient.
    dtype: DType,
}

impl Input {
    /// A gradient is f32, except that of an activation of 16 bits in a scope of this precision.
    fn of(tensor: &Tensor) -> Input {
        let scope = precision::precision().dtype();
        let half = tensor.dtype().is_half() && tensor.dtype() == scope && !tensor.is_leaf();
        let dtype = if half { scope } else { DType::F32 };
        Input { edge: tensor.edge.clone(), shape: tensor.shape, dtype }
    }
}

/// One output of a node.
#[derive(Clone)]
pub(crate) struct Edge {
    pub node: Arc<Node>,
    pub output: usize,
}

/// A leaf's part of a gradient arena, or the arena of an op's outputs.
#[derive(Clone)]
pub(crate) struct ArenaPlace {
    pub arena: Arc<ArenaLayout>,
    /// Offset of the first output, in bytes.
    pub offset: u64,
    /// Bytes from output to output.
    pub step: u64,
}

/// The layout of one gradient arena. Each backward pass takes its buffer from the pool.
pub(crate) struct ArenaLayout {
    gpu: Gpu,
    pub bytes: u64,
    /// Whether the arena's owner is gone, so that nobody wants gradients there.
    left: AtomicBool,
}

impl ArenaLayout {
    pub fn new(gpu: &Gpu, bytes: u64) -> Arc<ArenaLayout> {
        Arc::new(ArenaLayout { gpu: gpu.clone(), bytes, left: AtomicBool::new(false) })
    }

    fn arena(self: &Arc<ArenaLayout>) -> Arena {
        Arena { layout: self.clone(), buffer: self.gpu.alloc("gradients", self.bytes) }
    }

    /// Releases the leaves that have their home here, because the optimizer is gone or was never made.
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

/// Runs `work` without recording. Nothing in it can be differentiated, and nothing is kept for a backward pass.
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
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::{no_grad, tape::is_recording};
/// assert!(is_recording());
/// assert!(!no_grad(is_recording));
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn is_recording() -> bool {
    !PAUSED.get()
}

impl Node {
    pub fn leaf() -> Arc<Node> {
        Arc::new(Node { id: next_id(), leaf: true, work: Mutex::default(), home: Mutex::default() })
    }

    fn of(op: Box<dyn Op>, inputs: &[&Tensor]) -> Arc<Node> {
        let inputs = inputs.iter().map(|t| Input::of(t)).collect();
        let work = Mutex::new(Some(Arc::new(Work { op, inputs })));
        Arc::new(Node { id: next_id(), leaf: false, work, home: Mutex::default() })
    }

    pub fn is_leaf(&self) -> bool {
        self.leaf
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    /// Gives this leaf's gradients a home. Returns false if they already have one that is still in use.
    pub fn settle(&self, home: ArenaPlace) -> bool {
        let mut now = lock(&self.home);
        if now.as_ref().is_some_and(|now| !now.arena.left.load(Ordering::Acquire)) {
            return false;
        }
        *now = Some(home);
        true
    }

    fn home(&self) -> Option<ArenaPlace> {
        lock(&self.home).clone().filter(|home| !home.arena.left.load(Ordering::Acquire))
    }

    /// Returns the op and what it saved. Unless `retain` is set, they are freed when the caller drops them.
    fn work(&self, retain: bool) -> Option<Arc<Work>> {
        let mut work = lock(&self.work);
        if retain { work.clone() } else { work.take() }
    }
}

impl Drop for Work {
    /// Drops the graph without recursion, because a chain of a hundred thousand ops must not overflow the stack.
    fn drop(&mut self) {
        // The tensors that ops saved are detached. The graph is in the edges.
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

/// Records `op` as the op that made `outputs`, if recording is on and an input is tracked. For an op of one output there is
/// [`Tensor::made_by`].
pub fn record(outputs: &mut [Tensor], inputs: &[&Tensor], op: impl FnOnce() -> Box<dyn Op>) {
    if !tracks(inputs) {
        return;
    }
    let node = Node::of(op(), inputs);
    for (output, tensor) in outputs.iter_mut().enumerate() {
        tensor.edge = Some(Edge { node: node.clone(), output });
    }
}

/// Like `record`, for outputs of one shape whose gradients should lie side by side, so that the op's backward half can
/// read them as one array: see [`Sink::joined`].
pub(crate) fn record_parts(outputs: &mut [Tensor], inputs: &[&Tensor], op: impl FnOnce() -> Box<dyn Op>) {
    record(outputs, inputs, op);
    let (gpu, step) = (outputs[0].gpu().clone(), DType::F32.buffer_bytes(outputs[0].count()));
    if let Some(edge) = &outputs[0].edge
        && step.is_multiple_of(gpu.limits().min_storage_buffer_offset_alignment as u64)
    {
        let arena = ArenaLayout::new(&gpu, step * outputs.len() as u64);
        edge.node.settle(ArenaPlace { arena, offset: 0, step });
    }
}

/// Whether an op on these inputs will be recorded. Ops that can skip saving ask this first.
pub(crate) fn tracks(inputs: &[&Tensor]) -> bool {
    is_recording() && inputs.iter().any(|t| t.edge.is_some())
}

/// A tensor kept for the backward pass, with a check that nobody has changed it in place in the meantime. It holds the elements
/// and not the graph.
pub struct Saved {
    tensor: Tensor,
    /// The number of changes in place before it was saved.
    changes: u64,
}

impl Saved {
    /// Keeps the elements of `tensor`.
    pub fn new(tensor: &Tensor) -> Saved {
        let tensor = tensor.detach();
        let changes = tensor.value.changes();
        Saved { tensor, changes }
    }

    /// Returns the tensor. `op` is the op's name for the message.
    ///
    /// # Panics
    /// If the value was changed in place since, as by an optimizer's step.
    #[track_caller]
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
pub enum Destination {
    /// A new tensor.
    New,
    /// This tensor, whose contents are overwritten.
    Write(Tensor),
    /// This tensor, adding to what it holds.
    Add(Tensor),
}

impl Destination {
    /// What identifies the tensor to be written, if it is given.
    fn place(&self) -> Option<*const Value> {
        match self {
            Destination::New => None,
            Destination::Write(tensor) | Destination::Add(tensor) => Some(Arc::as_ptr(&tensor.value)),
        }
    }

    /// Returns the f32 tensor to write, and whether to add to what it holds.
    pub fn output(self, gpu: &Gpu, op: &'static str, shape: Shape) -> (Tensor, bool) {
        match self {
            Destination::New => (Tensor::empty(gpu, op, shape, DType::F32), false),
            Destination::Write(tensor) => (tensor, false),
            Destination::Add(tensor) => (tensor, true),
        }
    }
}

struct Slot {
    sum: Tensor,
    /// Whether nobody else holds this memory, so that kernels may accumulate into it.
    owned: bool,
}

#[derive(Default)]
struct Walk {
    /// Whether the graph can be walked again.
    retain: bool,
    /// Whether the walk met an op that an earlier walk has used up.
    used_up: bool,
    heap: BinaryHeap<Entry>,
    queued: HashSet<u64>,
    slots: HashMap<(u64, usize), Slot>,
    leaves: HashMap<u64, Arc<Node>>,
    arenas: HashMap<*const ArenaLayout, Arena>,
    /// In a recorded step, the number of commands after the last one that adds to a leaf's gradient.
    ready: HashMap<u64, usize>,
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

/// Takes the input gradients of one op. Inputs are counted from 0, in the order in which they were recorded.
pub struct Sink<'a> {
    walk: &'a mut Walk,
    op: &'static str,
    node: &'a Node,
    inputs: &'a [Input],
}

impl Sink<'_> {
    /// Whether input `i` wants a gradient.
    pub fn needs(&self, i: usize) -> bool {
        self.inputs[i].edge.is_some()
    }

    /// Adds `dx` to the gradient of input `i`, if it wants one.
    ///
    /// # Panics
    /// When `dx` has another shape than the input, or no floats.
    #[track_caller]
    pub fn add(&mut self, i: usize, dx: Tensor) {
        let input = &self.inputs[i];
        if let Some(edge) = &input.edge {
            fits(self.op, i, input, &dx);
            self.walk.add(edge, converted(dx, input.dtype));
        }
    }

    /// The type in which the gradient of input `i` is kept: f32, or 16 bits for an activation of a scope.
    pub fn dtype(&self, i: usize) -> DType {
        self.inputs[i].dtype
    }

    /// Lets `write` put the gradient of input `i` where it belongs, in f32, and return that tensor. A kernel that accumulates
    /// saves a buffer and a pass.
    ///
    /// # Panics
    /// When the returned tensor has another shape than the input.
    #[track_caller]
    pub fn add_with(&mut self, i: usize, write: impl FnOnce(Destination) -> Tensor) {
        let input = &self.inputs[i];
        match &input.edge {
            Some(edge) if input.dtype == DType::F32 => self.walk.add_with(self.op, i, edge, input, write),
            Some(edge) => {
                let dx = write(Destination::New);
                fits(self.op, i, input, &dx);
                self.walk.add(edge, converted(dx, input.dtype));
            }
            None => {}
        }
    }

    /// Returns the gradients of all `count` outputs as one array `[count, ..]`, if [`record_parts`] could place them
    /// so. Those that did not arrive are zeros.
    pub(crate) fn joined(&mut self, dy: &[Option<Tensor>], count: usize) -> Option<Tensor> {
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

    /// Differentiates a graph that was just recorded inside this backward pass, and returns the gradients of `leaves`.
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
        // Nobody else has this graph, so it is not retained.
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
        let gpu = edge.node.is_leaf().then(|| dx.gpu().clone());
        self.sum(edge, dx);
        self.note(edge, gpu.as_ref());
    }

    /// Notes that a leaf's gradient has changed.
    fn note(&mut self, edge: &Edge, gpu: Option<&Gpu>) {
        if let Some(position) = gpu.and_then(recording::position) {
            self.ready.insert(edge.node.id, position);
        }
    }

    fn sum(&mut self, edge: &Edge, dx: Tensor) {
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
                let dtype = if slot.sum.dtype() == dx.dtype() { dx.dtype() } else { DType::F32 };
                let sum = Tensor::lazy("add", "$0 + $1", dtype, *dx.shape(), &[&slot.sum, &dx]);
                // A leaf may get many gradients, so its sum is materialised in one buffer that later arrivals
                // accumulate into.
                if leaf {
                    sum.compute();
                }
                self.slots.insert(key, Slot { sum, owned: leaf });
            }
        }
    }

    /// Adds the gradient of an op's input `i` that `make` writes where it is told to.
    #[track_caller]
    fn add_with(
        &mut self,
        op: &str,
        i: usize,
        edge: &Edge,
        input: &Input,
        make: impl FnOnce(Destination) -> Tensor,
    ) {
        self.queue(&edge.node);
        let key = (edge.node.id, edge.output);
        let (into, kept) = match self.slots.remove(&key) {
            None => match self.home(&edge.node, edge.output, &input.shape) {
                Some(home) => (Destination::Write(home), None),
                None => (Destination::New, None),
            },
            Some(slot) if slot.owned => (Destination::Add(slot.sum), None),
            kept => (Destination::New, kept),
        };
        let place = into.place();
        let sum = make(into);
        fits(op, i, input, &sum);
        let is_there = place.is_none_or(|place| place == Arc::as_ptr(&sum.value));
        assert!(
            is_there,
            "{op}: the gradient of input {i} must be returned in the tensor of its destination"
        );
        if let Some(slot) = kept {
            self.slots.insert(key, slot);
            return self.add(edge, converted(sum, DType::F32));
        }
        if edge.node.is_leaf() {
            self.note(edge, Some(&sum.gpu().clone()));
        }
        // Kernels may add to a tensor that nobody else holds.
        let alone = Arc::strong_count(&sum.value) == 1 && sum.dtype() == DType::F32 && sum.is_contiguous();
        let owned = place.is_some() || alone;
        self.slots.insert(key, Slot { sum: converted(sum, DType::F32), owned });
    }

    /// Walks every queued node whose id is above `floor`.
    fn run(&mut self, floor: u64) {
        while self.heap.peek().is_some_and(|entry| entry.0.id > floor) {
            let Some(Entry(node)) = self.heap.pop() else { break };
            let outputs = self.slots.keys().filter(|k| k.0 == node.id).map(|k| k.1 + 1).max().unwrap_or(0);
            let Some(work) = node.work(self.retain) else {
                self.used_up = true;
                return;
            };
            let given = |dy: Tensor| if work.op.takes_half() { dy } else { converted(dy, DType::F32) };
            let dy: Vec<Option<Tensor>> =
                (0..outputs).map(|o| self.slots.remove(&(node.id, o)).map(|s| given(s.sum))).collect();
            let _span = tracing::trace_span!("backward", op = work.op.name()).entered();
            work.op.backward(
                &dy,
                &mut Sink { walk: self, op: work.op.name(), node: &node, inputs: &work.inputs },
            );
            // The gradients of the op's outputs are no longer needed.
            if let Some(home) = node.home() {
                self.arenas.remove(&Arc::as_ptr(&home.arena));
            }
        }
    }
}

/// Checks a gradient that an op made for its input `i`.
#[track_caller]
fn fits(op: &str, i: usize, input: &Input, dx: &Tensor) {
    let fits = *dx.shape() == input.shape && dx.dtype().is_float();
    let (shape, dtype) = (dx.shape(), dx.dtype());
    assert!(fits, "{op}: the gradient of input {i}, of shape {}, came as {shape} of {dtype}", input.shape);
}

/// Returns `x` in this type. `x` is given away, so that a pending one is not stored in both types.
fn converted(x: Tensor, dtype: DType) -> Tensor {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}

/// Writes `dx` into `home`, or adds it there.
fn write(dx: &Tensor, home: Tensor, accumulate: bool) -> Tensor {
    // Always a copy, never `dx` itself: the same gradient may go to another leaf of the same arena, and one kernel
    // cannot read and write one buffer. A pending `dx` is inlined, so nothing is computed twice.
    dx.clone().write_to("gradient", &home, accumulate);
    home
}
