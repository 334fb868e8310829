//! The ops. Each family has one file with its shapes, launch, gradient, f64 reference and test cases.
//!
//! # To add an op
//! 1. `shaders/ROOM/NAME.wgsl`: a header with the formula and its derivative, and constants with defaults.
//! 2. `src/ops/ROOM/NAME.rs`: the method on [`Tensor`], `impl Op`, `cases()` with an f64 reference.
//! 3. `src/ops/ROOM/mod.rs`: the module, and its name in the room's list, which tests and benches walk. Then record the
//!    kernel's variants: `make variants`.

pub mod array;
pub mod case;
pub mod check;
pub mod elementwise;
pub mod moves;
pub mod order;
pub mod points;
pub mod product;
pub mod reduction;
pub mod sequence;
pub(crate) mod stored;
pub mod timed;

use crate::tensor::Tensor;
use case::Case;

/// Lists a room's ops: their test cases, with the op's name.
macro_rules! listed {
    ($($name:ident),* $(,)?) => {
        pub(super) fn cases() -> Vec<(&'static str, Vec<crate::ops::case::Case>)> {
            vec![$((stringify!($name), $name::cases())),*]
        }
    };
}
use listed;

/// Every test case of every op, with the op's name.
#[doc(hidden)]
pub fn cases() -> Vec<(&'static str, Vec<Case>)> {
    let rooms = [
        elementwise::cases(),
        moves::cases(),
        reduction::cases(),
        product::cases(),
        sequence::cases(),
        order::cases(),
        points::cases(),
    ];
    rooms.into_iter().flatten().collect()
}

/// Converts a float tensor to f32, for kernels that read only f32.
#[track_caller]
pub(crate) fn float(op: &str, x: &Tensor) -> Tensor {
    assert!(x.dtype().is_float(), "{op}: needs floats, got {}; cast first", x.dtype());
    x.cast(crate::DType::F32)
}
