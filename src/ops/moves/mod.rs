//! Ops that make or only move elements: patterns of positions, layouts, rows gathered by ids, and the check of ids.
//!
//! Axes are counted from 0, and negative ones from the end. A *view* shares the elements of its tensor and costs nothing. What is no
//! view is a copy. Ids are u32 or i32.
//!
//! | made without data | |
//! |---|---|
//! | numbers in order | [`arange`](crate::Tensor::arange), [`linspace`](crate::Tensor::linspace), [`positions`](crate::Tensor::positions) |
//! | constants like another tensor | [`zeros_like`](crate::Tensor::zeros_like), [`ones_like`](crate::Tensor::ones_like), [`full_like`](crate::Tensor::full_like) |
//! | the identity, one-hot rows, triangles, a mask's constant | [`eye`](crate::Tensor::eye), [`one_hot`](crate::Tensor::one_hot), [`tril`](crate::Tensor::tril), [`triu`](crate::Tensor::triu), [`masked_fill`](crate::Tensor::masked_fill) |
//!
//! | layout | |
//! |---|---|
//! | the same elements in another shape | [`reshape`](crate::Tensor::reshape), [`flatten`](crate::Tensor::flatten), [`unflatten`](crate::Tensor::unflatten), [`squeeze`](crate::Tensor::squeeze), [`unsqueeze`](crate::Tensor::unsqueeze) |
//! | axes in another order | [`permute`](crate::Tensor::permute), [`transpose`](crate::Tensor::transpose), [`t`](crate::Tensor::t) |
//! | parts along an axis | [`slice`](crate::Tensor::slice), [`select`](crate::Tensor::select), [`slice_step`](crate::Tensor::slice_step), [`split`](crate::Tensor::split), [`chunk`](crate::Tensor::chunk) |
//! | tensors put together | [`concat`](crate::Tensor::concat), [`stack`](crate::Tensor::stack), [`pad`](crate::Tensor::pad) |
//! | repeated or moved around | [`expand`](crate::Tensor::expand), [`repeat`](crate::Tensor::repeat), [`repeat_interleave`](crate::Tensor::repeat_interleave), [`flip`](crate::Tensor::flip), [`roll`](crate::Tensor::roll) |
//!
//! | by ids | |
//! |---|---|
//! | `y[.., c] = table[ids[..], c]` | [`embedding`](crate::Tensor::embedding) |
//! | `y[.., i, ..] = x[.., ids[i], ..]` | [`index_select`](crate::Tensor::index_select) |
//! | `y[.., r, ..]`: the sum of `x[.., i, ..]` over the `i` with `ids[i] = r` | [`index_sum`](crate::Tensor::index_sum) |
//! | `y[i, j] = x[index[i, j], j]` | [`gather`](crate::Tensor::gather) |
//!
//! ```
//! # use tiebeam::{Gpu, Tensor};
//! # let gpu = Gpu::open()?;
//! let x = Tensor::arange(&gpu, 0.0, 6.0, 1.0).reshape([2, 3]);
//! let last_first = Tensor::from_slice(&gpu, &[2u32, 0], [2]);
//! assert_eq!(x.index_select(1, &last_first).t().to_vec2::<f32>()?, [[2.0, 5.0], [0.0, 3.0]]);
//! # Ok::<(), tiebeam::Error>(())
//! ```

pub(crate) mod check_ids;
mod create;
mod embedding;
pub mod embedding_sum;
mod layout;
mod rearrange;
pub(crate) mod running;

crate::ops::listed!(layout, create, rearrange, embedding, check_ids);
