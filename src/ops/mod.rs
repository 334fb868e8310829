//! The ops: one file a family, with shapes, launch, gradient, f64 reference and test cases together.
//!
//! # To add an op
//! 1. `shaders/NAME.wgsl`: header with the formula and its derivative; constants with defaults.
//! 2. `src/ops/NAME.rs`: the method on [`Tensor`], `impl Op`, `variants()`, `cases()` with an f64 reference.
//! 3. One line in the list below. Tests, shader checks and benches walk it.

pub mod bonds;
pub mod case;

use crate::gpu::shader::Source;
use crate::tensor::Tensor;
use case::Case;

macro_rules! ops {
    ($($name:ident),* $(,)?) => {
        $(pub mod $name;)*

        /// Every test case of every op, with the op's name.
        #[doc(hidden)]
        pub fn cases() -> Vec<(&'static str, Vec<Case>)> {
            vec![$((stringify!($name), $name::cases())),*]
        }

        /// Every variant of every kernel file, for the shader checks.
        #[doc(hidden)]
        pub fn shader_variants() -> Vec<Source> {
            let mut all = Vec::new();
            $(all.extend($name::variants());)*
            all
        }
    };
}

ops! { unary, binary, layout, reduce, matmul, site, combine, softmax, cross_entropy, norm, attention, cache, rope, embedding, sort, rank, bf16, arg, cumsum, conv, pool, random, dropout, edges, kernel_basis, spatial_conv, fiber_conv, fiber_norm, table_conv, mlp, neighbours, assignment, check_ids }

/// The bytes of a kernel's parameters.
pub(crate) fn words(params: &[u32]) -> &[u8] {
    bytemuck::cast_slice(params)
}

/// A float tensor as f32, for kernels that read only that.
pub(crate) fn float(op: &str, x: &Tensor) -> Tensor {
    assert!(x.dtype().is_float(), "{op}: needs floats, got {}; cast first", x.dtype());
    x.cast(crate::DType::F32)
}
