//! Operands of products in a scope of 16 bits ([`autocast`]).

use crate::dtype::DType;
use crate::gpu::recording;
use crate::precision::{Precision, autocast, kept, precision};
use crate::tensor::Tensor;
use std::sync::Arc;

/// Returns an operand of a product as this thread's scope wants it, detached. Outside of a scope it is `x` itself.
pub(super) fn operand(x: &Tensor) -> Tensor {
    narrowed(x, precision().dtype(), x.is_leaf())
}

/// Returns `x` in this type if that has 16 bits. If `keep`, the scope keeps the result for further calls, as for weights.
pub(super) fn narrowed(x: &Tensor, dtype: DType, keep: bool) -> Tensor {
    let x = x.detach();
    if !dtype.is_half() || x.dtype() == dtype {
        return x;
    }
    // The elements are converted in their order in memory, so that a transposed view is still read in place.
    let whole = x.offset == 0 && x.count() == x.value.count;
    if !whole {
        return x.cast(dtype);
    }
    let convert = || {
        let flat = Tensor::from_value(x.value.clone(), [x.value.count].into()).cast(dtype);
        if keep {
            // Computed at once: a change of the weight in place would compute it anyway.
            flat.evaluate();
        }
        flat
    };
    let flat = if keep { kept_conversion(&x, convert) } else { convert() };
    Tensor { shape: x.shape, strides: x.strides, offset: 0, ..flat }
}

/// Returns what this thread's scope keeps for `x`, as long as that does not change, or converts it.
fn kept_conversion(x: &Tensor, convert: impl FnOnce() -> Tensor) -> Tensor {
    // With its source, whose address can then not be another's.
    type Conversion = (Tensor, Tensor, u64);
    // Counted before, so that a change by another thread meanwhile is noticed.
    let changes = x.value.changes();
    let (flat, ..) = kept(
        (Arc::as_ptr(&x.value) as usize, recording::number(x.gpu())),
        // A conversion that failed, because there was no memory or because it was only planned, may succeed now.
        |(flat, x, changes): &Conversion| x.value.changes() == *changes && flat.check().is_ok(),
        |(_, x, _)| Arc::strong_count(&x.value) > 1,
        || (convert(), x.clone(), changes),
    );
    flat
}

/// Returns `x` as this thread's scope stores activations ([`autocast`]): in 16 bits, or unchanged outside of such a scope.
/// For what begins a residual stream, and for results of ops that return f32.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::{DType, Precision, autocast, nn::stored};
/// let x = Tensor::ones(&gpu, [2]);
/// assert_eq!(stored(&x).dtype(), DType::F32);
/// assert_eq!(autocast(Precision::Bf16, || stored(&x)).dtype(), DType::Bf16);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn stored(x: &Tensor) -> Tensor {
    let dtype = precision().dtype();
    if dtype.is_half() { x.cast(dtype) } else { x.clone() }
}

impl Tensor {
    /// [`Tensor::matmul`] in f32, whatever this thread's scope. For numerics of the library, which are no activations.
    #[track_caller]
    pub(crate) fn matmul_f32(&self, rhs: &Tensor) -> Tensor {
        autocast(Precision::F32, || self.matmul(rhs))
    }
}
