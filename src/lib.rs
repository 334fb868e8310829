//! Tiebeam: a GPU tensor engine for models that store fewer weights than they use.
//!
//! Ops return tensors, not `Result`s. A tensor that cannot be made, because it is larger than the adapter allows,
//! carries the [`Error`] and passes it to every tensor computed from it. All other work goes on. The error is returned
//! where elements are needed ([`Tensor::to_vec`], [`Tensor::check`]), by [`Tensor::backward`], by a step of an
//! optimizer or a recorded [`Step`], and when a file is written. If the device itself fails, such as by losing a batch
//! of work or a pipeline, the fault stays on the [`Gpu`] until [`Gpu::take_fault`], and every op is skipped until then.
// rustdoc follows wgpu's types all the way down to see which are Send and Sync.
#![recursion_limit = "256"]

#[cfg(feature = "bench")]
pub mod bench;
#[cfg(feature = "capi")]
pub mod capi;
pub mod decode;
pub mod dtype;
pub mod error;
pub mod exit;
pub mod files;
pub mod geometry;
pub mod gpu;
pub mod linalg;
pub mod merge;
pub mod models;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod precision;
pub mod rng;
mod setters;
pub mod shape;
pub mod share;
pub mod step;
pub mod store;
pub mod tape;
pub mod tensor;

pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use gpu::{Feature, Gpu, Options};
pub use precision::{Precision, autocast};
pub use rng::Rng;
pub use shape::Shape;
pub use step::Step;
pub use tape::{Grads, checkpoint, no_grad};
pub use tensor::Tensor;

/// The README's program compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
