//! The ops. Each family has one file with its shapes, launch, gradient, f64 reference and test cases.
//!
//! Ops are methods of [`Tensor`]. The pages of the rooms list them by what they do, with formulas:
//!
//! | room | ops |
//! |---|---|
//! | [`elementwise`] | functions of one and of two tensors, comparisons, conversions, random numbers |
//! | [`moves`] | ranges and constants, shapes and slices, rows gathered by ids |
//! | [`reduction`] | sums, means, extremes, scans, softmax, losses, norms |
//! | [`product`] | matrix products, linear layers of shared weights, convolutions of images |
//! | [`sequence`] | attention, its cache, rotary positions |
//! | [`order`] | sorting, ranks, assignments |
//! | [`points`] | convolutions over points in space |
//!
//! The remaining modules are what tests and benchmark know of an op: its cases ([`case`], [`timed`]), their reference arrays
//! ([`mod@array`]) and the comparison ([`check`]). An op of your own, outside of the crate, is in [`op`](crate::op).
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

/// Every test case of every op, with the op's name, for the tests and the benchmark.
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
