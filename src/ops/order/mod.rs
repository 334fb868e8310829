//! Ops that compare elements: sorting, ranks and assignments. NaN counts as larger than infinity, and equal elements keep their order,
//! so every result is determined.
//!
//! | what | |
//! |---|---|
//! | elements along an axis in order, and where they came from | [`sort`](crate::Tensor::sort), [`argsort`](crate::Tensor::argsort), [`topk`](crate::Tensor::topk) |
//! | the best pairs of rows and columns of a matrix | [`assignment`](crate::Tensor::assignment), [`assignments`](crate::Tensor::assignments) |
//! | elements by rank without sorting, over many tensors | [`rank::select`], [`rank::keep_ranks`] |
//! | how many elements are NaN or infinite | [`non_finite`](crate::Tensor::non_finite) |
//!
//! The index of the largest element of each row is [`argmax`](crate::Tensor::argmax), among the [reductions](super::reduction).
//!
//! ```
//! # use tiebeam::{Gpu, Tensor};
//! # let gpu = Gpu::open()?;
//! let x = Tensor::from_slice(&gpu, &[3f32, 1.0, 2.0], [3]);
//! let (values, ids) = x.topk(2, 0);
//! assert_eq!(values.to_vec::<f32>()?, [3.0, 2.0]);
//! assert_eq!(ids.to_vec::<u32>()?, [0, 2]);
//! # Ok::<(), tiebeam::Error>(())
//! ```

mod assignment;
pub(crate) mod consensus;
pub(crate) mod narrow;
pub mod rank;
mod sort;

crate::ops::listed!(sort, rank, narrow, consensus, assignment);
