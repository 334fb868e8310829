//! Operands of products in a scope of 16 bits ([`autocast`](crate::autocast)).

use crate::dtype::DType;
use crate::gpu::recording;
use crate::precision::{kept, precision};
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
        // With its source, whose address can then not be another's.
        (flat, x.detach())
    };
    let (flat, _) = match keep {
        true => {
            let address = Arc::as_ptr(&x.value) as usize as u64;
            kept([address, x.value.changes(), recording::number(x.gpu())], convert)
        }
        false => convert(),
    };
    Tensor { shape: x.shape, strides: x.strides, offset: 0, ..flat }
}
