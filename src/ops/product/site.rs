//! The trait by which a sharing kind stands in for a weight.
//!
//! A site is a place where a weight `W_s = S_s(theta)` is used; `S_s` is linear in what is stored. A kind supplies one
//! WGSL function that returns four weights from what is stored. Put into matmul's load, it is the fused kernel that
//! never stores `W_s`; put into a copy kernel, it is [`Site::expand`]. Its adjoint is [`Site::reduce`].

pub use super::matmul::load::Load;
use super::matmul::outer;
use crate::ops::case::Case;
use crate::tape::{Destination, Sink};
use crate::tensor::Tensor;

/// A weight `[out, in]` that is made from stored leaves.
pub trait Site: Send + Sync {
    /// The kind's name, for errors.
    fn name(&self) -> &'static str;

    /// `[out, in]`.
    fn size(&self) -> [usize; 2];

    /// What is stored. Gradients are addressed by position in this list.
    fn leaves(&self) -> Vec<Tensor>;

    /// Names of the leaves, for files: `weight` first.
    fn leaf_names(&self) -> &'static [&'static str];

    /// How kernels read the weight.
    fn load(&self) -> Load;

    /// The weight itself where it is stored as it is used: then there is nothing to make.
    fn stored(&self) -> Option<Tensor> {
        None
    }

    /// The adjoint: adds `S^T dW` to the leaves' gradients.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads);

    /// Gradients from a product `y = x W^T`: the adjoint of `dW = dy^T x`. Kinds that can avoid storing `dW` do.
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        self.reduce(&outer(self.name(), dy, x, Destination::New), grads);
    }

    /// The weight, stored. Not differentiable: [`Tensor::linear`] is.
    fn expand(&self) -> Tensor {
        self.load().expand(self.name(), self.size())
    }
}

/// Takes the gradients of a site's leaves.
pub struct LeafGrads<'a, 'b> {
    sink: &'a mut Sink<'b>,
    first: usize,
}

impl<'a, 'b> LeafGrads<'a, 'b> {
    pub(crate) fn new(sink: &'a mut Sink<'b>, first: usize) -> Self {
        LeafGrads { sink, first }
    }

    /// Whether leaf `i` wants a gradient.
    pub fn needs(&self, i: usize) -> bool {
        self.sink.needs(self.first + i)
    }

    /// Adds `d` to the gradient of leaf `i`.
    pub fn add(&mut self, i: usize, d: Tensor) {
        self.sink.add(self.first + i, d);
    }

    /// Lets `write` put the gradient of leaf `i` where it belongs.
    pub(crate) fn add_with(&mut self, i: usize, write: impl FnOnce(Destination) -> Tensor) {
        self.sink.add_with(self.first + i, write);
    }

    /// Adds `a^T b` to the gradient of leaf `i`, accumulating in its buffer: `a [rows, m]`, `b [rows, n]`, leaf `[m, n]`.
    pub fn add_outer(&mut self, i: usize, a: &Tensor, b: &Tensor) {
        if self.needs(i) {
            self.sink.add_with(self.first + i, |into| outer("linear", a, b, into));
        }
    }
}

/// The kinds of sharing bring their cases: see [`crate::share`].
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
