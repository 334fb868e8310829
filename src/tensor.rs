//! `Tensor`: a cheap handle on elements, with a shape and the op in the graph that made it.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, Part};
use crate::gpu::recording;
use crate::gpu::shader::Name;
use crate::gpu::transpose::Transpose;
use crate::gpu::value::fuse::Expr;
use crate::gpu::value::{Place, Value};
use crate::shape::{self, Shape, Strides};
use crate::tape::{self, Edge, Node, Op};
use std::any::Any;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;

mod host;
#[cfg(feature = "ndarray")]
mod ndarray;
mod operand;
mod print;

pub use operand::Operand;

/// An n-dimensional array on one device.
///
/// Cloning copies the handle, not the elements: the clone of a parameter follows its training, while [`Tensor::copy`]
/// keeps the present elements. Tensors are values: ops return new ones. Elementwise ops are recorded as pending
/// expressions and run, fused, when something needs their elements.
///
/// A tensor that depends on a leaf holds the graph from there to itself, with what each op saved for the backward pass,
/// until a [`Tensor::backward`] has used that up. A loss kept afterwards holds only its one element. [`Tensor::detach`]
/// returns a handle without the graph.
///
/// Threads may share tensors. An op reads each operand as it is when the op is called. But a chain of elementwise ops
/// sees operands of one moment only if nobody changes an operand while the chain is written down. While another thread
/// trains, read parameters through [`Gpu::snapshot`], which copies all of them at one moment.
///
/// ```no_run
/// use tiebeam::{Gpu, Tensor};
/// let gpu = Gpu::open()?;
/// let x = Tensor::from_slice(&gpu, &[1.0f32, 2.0, 3.0], [3]).requires_grad();
/// let loss = x.mul(&x).sum_all();
/// let grads = loss.backward()?;
/// assert_eq!(grads.get(&x).unwrap().to_vec::<f32>()?, [2.0, 4.0, 6.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[must_use = "ops return new tensors, and change none"]
pub struct Tensor {
    pub(crate) value: Arc<Value>,
    pub(crate) shape: Shape,
    pub(crate) strides: Strides,
    /// The first element's index in the value.
    pub(crate) offset: usize,
    pub(crate) edge: Option<Edge>,
}

impl Tensor {
    /// The sizes of the axes.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 3]);
    /// assert_eq!(x.shape()[..], [2, 3]);
    /// let [rows, columns] = x.shape()[..] else { unreachable!() };
    /// assert_eq!((rows, columns), (2, 3));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The number of axes, 0 for a scalar.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// assert_eq!(Tensor::zeros(&gpu, [2, 3]).rank(), 2);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// The size of one axis. A negative axis counts from the end.
    ///
    /// # Panics
    /// If the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// assert_eq!(Tensor::zeros(&gpu, [2, 3]).size(-1), 3);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn size(&self, axis: isize) -> usize {
        self.shape[shape::axis("size", axis, &self.shape)]
    }

    /// The element type.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::DType;
    /// assert_eq!(Tensor::zeros(&gpu, [2]).dtype(), DType::F32);
    /// assert_eq!(Tensor::from_slice(&gpu, &[1u32], [1]).dtype(), DType::U32);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn dtype(&self) -> DType {
        self.value.dtype
    }

    /// Number of elements.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// assert_eq!(Tensor::zeros(&gpu, [2, 3]).count(), 6);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "numel")]
    pub fn count(&self) -> usize {
        self.shape.count()
    }

    /// The device that holds this tensor.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2]);
    /// let like = Tensor::ones(x.gpu(), [2]); // where `x` is
    /// assert!(like.gpu() == &gpu);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "device")]
    pub fn gpu(&self) -> &Gpu {
        &self.value.gpu
    }

    /// Returns this tensor as a leaf, for which backward passes compute a gradient. It shares the elements of `self`.
    ///
    /// For a leaf, the same leaf is returned. A tensor computed from leaves becomes a new leaf, without a path back to
    /// them. To make another leaf on the elements of a leaf, use `w.detach().requires_grad()`.
    ///
    /// # Panics
    /// If the tensor has integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[3f32, 4.0], [2]).requires_grad();
    /// let grads = w.square().sum_all().backward()?;
    /// assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [6.0, 8.0]); // 2 w
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn requires_grad(&self) -> Tensor {
        assert!(self.dtype().is_float(), "requires_grad: {} has no gradient", self.dtype());
        if self.is_leaf() {
            return self.clone();
        }
        Tensor { edge: Some(Edge { node: Node::leaf(), output: 0 }), ..self.clone() }
    }

    /// Returns a handle on the same elements, outside the graph.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[3f32], [1]).requires_grad();
    /// let y = w.mul(&w.detach()); // the second factor counts as a constant
    /// assert_eq!(y.sum_all().backward()?.get(&w).unwrap().item()?, 3.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn detach(&self) -> Tensor {
        Tensor { edge: None, ..self.clone() }
    }

    /// Whether a backward pass from here reaches a leaf.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::ones(&gpu, [2]).requires_grad();
    /// assert!(w.scale(2.0).is_tracked());
    /// assert!(!w.detach().is_tracked());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn is_tracked(&self) -> bool {
        self.edge.is_some()
    }

    /// Whether this tensor is a leaf made by [`Tensor::requires_grad`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::ones(&gpu, [2]).requires_grad();
    /// assert!(w.is_leaf());
    /// assert!(!w.scale(2.0).is_leaf());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn is_leaf(&self) -> bool {
        self.edge.as_ref().is_some_and(|e| e.node.is_leaf())
    }

    /// Computes pending elements now, without waiting for the device.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let y = Tensor::ones(&gpu, [2]).scale(2.0).exp(); // an expression that waits
    /// y.evaluate(); // computed once here, and not in each op that reads it
    /// assert_eq!(y.div(&y).to_vec::<f32>()?, [1.0, 1.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn evaluate(&self) {
        self.compute();
    }

    /// A number that is unique to this leaf. `None` if the tensor is not a leaf.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let [w, b] = [1.0, 0.0].map(|value| Tensor::full(&gpu, [2], value).requires_grad());
    /// assert!(w.leaf_id().is_some() && w.leaf_id() != b.leaf_id());
    /// assert_eq!(w.clone().leaf_id(), w.leaf_id());
    /// assert_eq!(w.scale(2.0).leaf_id(), None);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn leaf_id(&self) -> Option<u64> {
        self.edge.as_ref().filter(|e| e.node.is_leaf()).map(|e| e.node.id())
    }

    /// Whether the elements lie in row-major order without gaps.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::zeros(&gpu, [2, 3]);
    /// assert!(x.is_contiguous());
    /// assert!(!x.t().is_contiguous());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn is_contiguous(&self) -> bool {
        let plain = self.shape.strides();
        (0..self.shape.len()).all(|a| self.shape[a] == 1 || self.strides[a] == plain[a])
    }

    /// Whether it has elements of its own, all of them, in row-major order: what can be changed in place.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_contiguous() && self.offset == 0 && self.count() == self.value.count
    }

    /// Whether a kernel can bind the elements as they are.
    fn is_bindable(&self) -> bool {
        let align = self.gpu().limits().min_storage_buffer_offset_alignment as usize;
        self.is_contiguous() && (self.offset * self.dtype().size()).is_multiple_of(align)
    }

    /// Returns this tensor with its elements in row-major order, at a place that kernels can bind: the tensor itself if
    /// it is already so, else a copy.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// let turned = x.t().contiguous();
    /// assert!(turned.is_contiguous());
    /// assert_eq!(turned.to_vec2::<f32>()?, [[1.0, 3.0], [2.0, 4.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn contiguous(&self) -> Tensor {
        if self.is_bindable() {
            return self.clone();
        }
        let turned = Transpose::of(self.dtype(), &self.shape, &self.strides, self.offset);
        let mut copy = [match turned {
            Some(turned) => {
                let y = Tensor::empty(self.gpu(), "transpose", self.shape, self.dtype());
                turned.run(&self.value, &y.place());
                y
            }
            None => Tensor::lazy("contiguous", "$0", self.dtype(), self.shape, &[self]),
        }];
        tape::record(&mut copy, &[self], || Box::new(Identity));
        let [copy] = copy;
        copy
    }

    /// Copies the elements to new memory and keeps the graph. An optimizer or a recorded step that changes `self` later
    /// does not change the copy. This is PyTorch's `clone`, whereas [`Clone`] copies the handle.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, optim::{Group, Sgd, SgdConfig}};
    /// # let gpu = Gpu::open()?;
    /// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
    /// let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
    /// let (best, same) = (w.detach().copy(), w.clone());
    /// sgd.step(&w.sum_all().backward()?, 0.5)?;
    /// assert_eq!(best.to_vec::<f32>()?, [1.0, 2.0]);
    /// assert_eq!(same.to_vec::<f32>()?, [0.5, 1.5]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn copy(&self) -> Tensor {
        Tensor::lazy("copy", "$0", self.dtype(), self.shape, &[self]).made_by(&[self], || Box::new(Identity))
    }

    /// Checks whether these elements can be computed, as far as is known without waiting for the device. Computes
    /// nothing.
    ///
    /// # Errors
    /// The error that the tensor carries: an op on which it depends would exceed a limit of this adapter, or was
    /// skipped because the device had a fault. Only tensors that depend on that op carry the error. All other work goes
    /// on.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::ones(&gpu, [2, 2]);
    /// x.matmul(&x).check()?; // no error so far, and nothing has been read back
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn check(&self) -> Result<()> {
        self.value.error().map_or(Ok(()), Err)
    }

    /// Makes this tensor carry an error.
    pub(crate) fn fail(&self, error: &crate::error::Error) {
        self.place().buffer.fail(error);
    }

    // Building blocks of ops.

    pub(crate) fn from_value(value: Arc<Value>, shape: Shape) -> Tensor {
        Tensor { value, strides: shape.strides(), shape, offset: 0, edge: None }
    }

    pub(crate) fn from_place(gpu: &Gpu, shape: Shape, dtype: DType, place: Place) -> Tensor {
        Tensor::from_value(Value::ready(gpu, dtype, shape.count(), place), shape)
    }

    /// A tensor with arbitrary contents, for a kernel of your own to write. `op` is the op's name for errors. A kernel that does
    /// not write every element leaves what was in that memory before. See [`op`](crate::op).
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::DType;
    /// let y = Tensor::empty(&gpu, "times", [2, 3], DType::F32); // for a kernel to fill
    /// assert_eq!((y.rank(), y.dtype()), (2, DType::F32));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn empty(gpu: &Gpu, op: &'static str, shape: impl Into<Shape>, dtype: DType) -> Tensor {
        let shape = shape.into();
        let buffer = gpu.alloc(op, dtype.buffer_bytes(shape.count()));
        Tensor::from_place(gpu, shape, dtype, Place { buffer, offset: 0 })
    }

    /// A tensor of this shape and dtype, for a kernel to write.
    pub(crate) fn room_for_copy(&self) -> Tensor {
        Tensor::empty(self.gpu(), "snapshot", self.shape, self.dtype())
    }

    /// Writes these elements to `target`, a contiguous tensor of the same shape, or adds them to its elements. Pending
    /// elements are computed directly into `target`.
    pub(crate) fn write_to(self, op: &'static str, target: &Tensor, accumulate: bool) {
        assert!(
            self.shape == target.shape && target.is_contiguous(),
            "{op}: {} to {}",
            self.shape,
            target.shape
        );
        let args = vec![self.operand(op, &self.shape)];
        let shape = self.shape;
        // The expression is now the only holder, so that nothing is stored twice.
        drop(self);
        let expr = Expr::new(target.gpu(), op, "$0", shape, args);
        Value::write(target.gpu(), target.dtype(), expr, &target.place(), accumulate);
    }

    /// Returns this tensor with `op` recorded as what made it of `inputs`, if recording is on and a gradient can reach an input.
    /// Only then is `op` called, so what it saves costs nothing otherwise. See [`op`](crate::op).
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::{no_grad, op::{Op, Sink}};
    /// struct Twice;
    /// impl Op for Twice {
    ///     fn name(&self) -> &'static str { "twice" }
    ///     fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
    ///         if let Some(dy) = &dy[0] { sink.add(0, dy.scale(2.0)) }
    ///     }
    /// }
    /// let x = Tensor::ones(&gpu, [2]).requires_grad();
    /// let y = no_grad(|| x.scale(2.0)).made_by(&[&x], || Box::new(Twice));
    /// assert_eq!(y.sum_all().backward()?.get(&x).unwrap().to_vec::<f32>()?, [2.0, 2.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn made_by(self, inputs: &[&Tensor], op: impl FnOnce() -> Box<dyn Op>) -> Tensor {
        let mut outputs = [self];
        tape::record(&mut outputs, inputs, op);
        let [output] = outputs;
        output
    }

    /// Returns the place of the elements, and computes them now if they are pending. Only for contiguous tensors.
    pub(crate) fn place(&self) -> Place {
        let mut place = self.value.place();
        if self.count() == 0 {
            // An empty view may start at the buffer's end, where nothing can be bound.
            return place;
        }
        place.offset += (self.offset * self.dtype().size()) as u64;
        place
    }

    /// Computes pending elements now.
    pub(crate) fn compute(&self) {
        self.value.place();
    }
}

/// The elements, for a kernel that reads or writes them. The tensor must be [`contiguous`](Tensor::contiguous).
impl From<&Tensor> for Part {
    #[track_caller]
    fn from(x: &Tensor) -> Part {
        assert!(
            x.is_bindable(),
            "bind: {} is strided or begins inside of another tensor; call contiguous()",
            x.shape
        );
        Part { dtype: Some(x.dtype()), ..x.place().part(x.dtype().buffer_bytes(x.count())) }
    }
}

impl Launch<'_> {
    /// Binds the tensor that the kernel writes as `name`: one that was just made, by [`Tensor::empty`], by
    /// [`Tensor::zeros`] for a kernel that adds to it, or by [`Destination::output`](tape::Destination::output) in a
    /// backward pass.
    ///
    /// # Panics
    /// When other handles on the tensor's elements exist, here or at the launch, because tensors are values: nobody may see them
    /// change. When the tensor was made outside of the recorded step that would write it.
    #[track_caller]
    pub fn output(self, name: impl Into<Name>, y: &Tensor) -> Self {
        let alone = Arc::strong_count(&y.value) == 1 && y.edge.is_none();
        assert!(alone, "{}: {} is in use elsewhere; write to a tensor that was just made", self.op, y.shape);
        assert!(
            y.value.recording == recording::number(y.gpu()),
            "{}: {} was made outside of the recorded step that would write it; make it inside",
            self.op,
            y.shape
        );
        let launch = self.bind_mut(name, y);
        let held: Arc<dyn Any + Send + Sync> = y.value.clone();
        let outputs = launch.outputs.into_iter().chain([held]).collect();
        Launch { outputs, ..launch }
    }
}

impl Clone for Tensor {
    /// Returns another handle on the same elements, at the same place in the graph. A clone of a parameter shows every
    /// later step. To keep elements, such as the best weights so far, use [`Tensor::copy`].
    fn clone(&self) -> Tensor {
        Tensor { value: self.value.clone(), edge: self.edge.clone(), ..*self }
    }
}

impl Gpu {
    /// Copies these tensors at one moment, outside the graph: between two optimizer steps or replays of other threads,
    /// never in the middle of one. The other threads wait until the copies are recorded, but not for the device.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// # let [w, bias] = [1f32, 2.0].map(|v| Tensor::full(&gpu, [2], v));
    /// // Beside a thread that trains `w` and `bias`:
    /// let now = gpu.snapshot(&[&w, &bias])?;
    /// assert_eq!(now[0].scale(2.0).sub(&now[0]).sub(&now[0]).sum_all().item()?, 0.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// An error that one of them carries, missing memory for the copies, or the device's fault.
    ///
    /// # Panics
    /// If a tensor is on another device.
    #[track_caller]
    pub fn snapshot(&self, tensors: &[&Tensor]) -> Result<Vec<Tensor>> {
        for x in tensors {
            assert!(x.gpu() == self, "snapshot: {} is on {:?}, not on {self:?}", x.shape(), x.gpu());
        }
        let copies: Vec<Tensor> = tensors.iter().map(|x| x.room_for_copy()).collect();
        copies.iter().try_for_each(Tensor::check)?;
        self.fill_snapshot(tensors, &copies.iter().collect::<Vec<_>>())?;
        Ok(copies)
    }

    /// Writes the elements of `tensors` at one moment to `copies` of the same shapes and dtypes.
    pub(crate) fn fill_snapshot(&self, tensors: &[&Tensor], copies: &[&Tensor]) -> Result<()> {
        self.check()?;
        self.unchanged(|| {
            for (x, copy) in tensors.iter().zip(copies) {
                x.detach().write_to("snapshot", copy, false);
            }
        });
        self.check()?;
        copies.iter().try_for_each(|copy| copy.check())
    }
}

/// # Panics
/// If two of the tensors live on different devices.
#[track_caller]
pub(crate) fn same_gpu(op: &str, tensors: &[&Tensor]) {
    for t in &tensors[1..] {
        assert!(
            t.gpu() == tensors[0].gpu(),
            "{op}: tensors of two devices: {:?} and {:?}; copy one over with to_vec and from_slice",
            tensors[0].gpu(),
            t.gpu()
        );
    }
}

/// The op of copies and of views that keep the shape. Its gradient passes through unchanged.
pub(crate) struct Identity;

impl Op for Identity {
    fn name(&self) -> &'static str {
        "identity"
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut tape::Sink) {
        if let Some(dy) = &dy[0] {
            sink.add(0, dy.clone());
        }
    }
}

// Ops never change a tensor's elements, and what changes them in place is recorded whole or not at all.
impl UnwindSafe for Tensor {}
impl RefUnwindSafe for Tensor {}
