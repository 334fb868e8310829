//! Tiebeam: a GPU tensor engine for models that store fewer weights than they use.
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]

pub mod dtype;
pub mod error;
pub mod gpu;
pub mod ops;
pub mod rng;
pub mod shape;
pub mod tape;
pub mod tensor;

pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use gpu::{Gpu, Options};
pub use rng::Rng;
pub use shape::Shape;
pub use tape::{Grads, checkpoint, no_grad};
pub use tensor::Tensor;
