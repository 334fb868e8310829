//! Operands of products in a scope of 16 bits ([`autocast`](crate::autocast)).

use crate::dtype::DType;
use crate::gpu::recording;
use crate::precision::{converted, precision};
use crate::tensor::Tensor;

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
    let flat = match keep {
        // What is only planned is never computed, so no other call may get it.
        true if x.gpu().only_plans() => converted(&x, u64::MAX, convert),
        true => converted(&x, recording::number(x.gpu()), convert),
        false => convert(),
    };
    Tensor { shape: x.shape, strides: x.strides, offset: 0, ..flat }
}
