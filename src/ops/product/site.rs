//! The trait through which a sharing kind takes the place of a weight.
//!
//! A site is a place where a weight `W_s = S_s(theta)` is used, computed from the stored leaves `theta`. A kind supplies
//! one WGSL function that returns four elements of the weight. As matmul's load, this function gives a fused kernel that
//! never stores `W_s`. In a copy kernel, it gives [`Site::expand`]. The adjoint is [`Site::reduce`].

pub use super::matmul::load::Load;
use super::matmul::outer;
use crate::dtype::DType;
use crate::ops::case::Case;
use crate::tape::{Destination, Sink};
use crate::tensor::Tensor;
use std::fmt;
use std::sync::Arc;

/// A weight `[out, in]` that is computed from stored leaves.
///
/// A kind of your own implements [`name`](Site::name), [`size`](Site::size), [`leaves`](Site::leaves),
/// [`leaf_names`](Site::leaf_names), [`with_tensors`](Site::with_tensors), [`load`](Site::load) and [`reduce`](Site::reduce).
/// Then every layer and model takes it, with a fused product, files and optimizers. [`share::check_law`](crate::share::check_law)
/// tests it in one call, and the guide has a worked example.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Factored, Site};
/// let [a, b] = [[1, 3], [2, 1]].map(|s| Tensor::ones(&gpu, s).requires_grad());
/// let site = Factored::new(&a, &b).shared();
/// assert_eq!((site.name(), site.size()), ("factored", [2, 3]));
/// assert_eq!(site.leaf_names().len(), site.leaves().len());
/// assert_eq!(site.expand().to_vec2::<f32>()?, [[1.0; 3]; 2]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub trait Site: Send + Sync {
    /// The kind's name, for errors.
    fn name(&self) -> &'static str;

    /// `[out, in]`.
    fn size(&self) -> [usize; 2];

    /// The stored leaves. Gradients are addressed by position in this list.
    fn leaves(&self) -> Vec<Tensor>;

    /// Names of the leaves, for files, in the order of [`Site::leaves`].
    fn leaf_names(&self) -> &'static [&'static str];

    /// What is stored beside the leaves and never trained, such as packed levels, with names for files.
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        Vec::new()
    }

    /// Returns a site like this one with other leaves and buffers, of the same shapes and in the same order: how a model is
    /// frozen, cast or moved to another device.
    fn with_tensors(&self, leaves: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site>;

    /// How kernels read the weight.
    fn load(&self) -> Load;

    /// Returns the weight itself if it is stored in the form in which it is used, so that nothing has to be computed.
    fn stored(&self) -> Option<Tensor> {
        None
    }

    /// Whether the stored form is to be kept for decoding, because reading it takes less time than reading the weight: packed
    /// weights, as against those that cost arithmetic over several stored numbers.
    fn is_compact(&self) -> bool {
        false
    }

    /// The product with `x [rows, in]` in two parts, for a weight that is another one with something small added: that weight, and the
    /// product with what is added, `[rows, out]`. Where a compact weight is decoded with, the two are computed apart, so that it is read
    /// as fast as alone.
    fn apart(&self, _x: &Tensor) -> Option<(Arc<dyn Site>, Tensor)> {
        None
    }

    /// The adjoint: adds `S^T dW` to the leaves' gradients.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads);

    /// Adds the gradients from a product `y = x W^T`: the adjoint for `dW = dy^T x`. Kinds override it if they need not
    /// store `dW`. In a scope of 16 bits `x` and `dy` may have them: tensor ops take both, a kernel of your own needs
    /// [`cast`](Tensor::cast).
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        self.reduce(&outer(self.name(), dy, x, Destination::New), grads);
    }

    /// This site as layers hold it, which all clones share.
    fn shared(self) -> Arc<dyn Site>
    where
        Self: Sized + 'static,
    {
        Arc::new(self)
    }

    /// Materialises the weight in f32. This is not differentiable; [`Tensor::linear`] is.
    fn expand(&self) -> Tensor {
        self.expand_as(DType::F32)
    }

    /// Materialises the weight in f32, f16 or bf16, as products in a scope of 16 bits read it
    /// ([`autocast`](crate::autocast)). Kinds override it if they have a better way than their load.
    ///
    /// # Panics
    /// When the type has no floats.
    #[track_caller]
    fn expand_as(&self, dtype: DType) -> Tensor {
        let name = self.name();
        assert!(dtype.is_float(), "{name}: a weight has floats, and {dtype} does not");
        self.load().expand(name, self.size(), dtype)
    }
}

/// Receives the gradients of a site's leaves.
pub struct LeafGrads<'a, 'b> {
    sink: &'a mut Sink<'b>,
    first: usize,
}

impl<'a, 'b> LeafGrads<'a, 'b> {
    pub(crate) fn new(sink: &'a mut Sink<'b>, first: usize) -> Self {
        LeafGrads { sink, first }
    }

    /// Whether leaf `i` needs a gradient.
    #[track_caller]
    pub fn needs(&self, i: usize) -> bool {
        self.sink.needs(self.first + i)
    }

    /// Adds `d` to the gradient of leaf `i`.
    ///
    /// # Panics
    /// When `d` has another shape than the leaf, or no floats. The message counts the leaf among the inputs of the product.
    #[track_caller]
    pub fn add(&mut self, i: usize, d: Tensor) {
        self.sink.add(self.first + i, d);
    }

    /// Adds the gradient of leaf `i`, which `write` puts at the given destination and returns.
    ///
    /// # Panics
    /// When the returned tensor has another shape, or is not that of the destination.
    #[track_caller]
    pub fn add_with(&mut self, i: usize, write: impl FnOnce(Destination) -> Tensor) {
        self.sink.add_with(self.first + i, write);
    }

    /// Adds `a^T b` to the gradient of leaf `i`, accumulating in its buffer: `a [rows, m]`, `b [rows, n]`, leaf `[m, n]`.
    pub fn add_outer(&mut self, i: usize, a: &Tensor, b: &Tensor) {
        if self.needs(i) {
            self.sink.add_with(self.first + i, |into| outer("linear", a, b, into));
        }
    }
}

/// The kind and the weight's size: `low_rank [64, 16]`.
impl fmt::Debug for dyn Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?}", self.name(), self.size())
    }
}

/// The sharing kinds bring their own cases: see [`crate::share`].
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
