//! How kernels read and write elements of 16 bits: the fragments for the slots `in`, `grad` and `out`, whose defaults are
//! those for f32.

use crate::dtype::DType;
use crate::gpu::shader::Source;
use crate::tensor::Tensor;

/// Returns the fragments by which a kernel reads or writes its slots in these types. All that have 16 bits must have the
/// same type, because a kernel has one way to pack.
pub(crate) fn fragments(slots: &[(&'static str, DType)]) -> Vec<(&'static str, &'static str)> {
    let halves = || slots.iter().filter(|(_, dtype)| dtype.is_half());
    let of = |(slot, dtype): &(&'static str, DType)| {
        let fragment = match (*slot, *dtype == DType::Bf16) {
            ("in", false) => "in_f16",
            ("in", true) => "in_bf16",
            ("grad", false) => "grad_f16",
            ("grad", true) => "grad_bf16",
            ("out", false) => "out_f16",
            ("out", true) => "out_bf16",
            other => unreachable!("no fragments for {other:?}"),
        };
        (*slot, fragment)
    };
    let mut all: Vec<_> = halves().map(of).collect();
    let first = halves().next().map(|(_, dtype)| *dtype);
    debug_assert!(halves().all(|(_, dtype)| Some(*dtype) == first), "{slots:?}");
    all.extend(first.map(|dtype| ("packed", if dtype == DType::Bf16 { "bf16" } else { "f16" })));
    all
}

/// Returns the source of a kernel whose slots are of these types.
pub(crate) fn set(source: Source, slots: &[(&'static str, DType)]) -> Source {
    fragments(slots).into_iter().fold(source, |source, (slot, fragment)| source.slot(slot, fragment))
}

/// Returns `x` for a kernel over rows of `width` elements: as it is stored if it is f32 or of the type `half` in whole
/// vectors, else in f32. Contiguous.
pub(crate) fn readable(x: &Tensor, half: Option<DType>, width: usize) -> Tensor {
    let as_stored = Some(x.dtype()) == half && width.is_multiple_of(4);
    if as_stored { x.contiguous() } else { x.cast(DType::F32).contiguous() }
}
