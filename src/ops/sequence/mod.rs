//! Ops of transformers over tokens: attention, its cache of keys and values, rotary positions. Tensors are `[batch, heads, tokens,
//! head_dim]`.
//!
//! | what | formula | |
//! |---|---|---|
//! | attention | `softmax(q k^T / sqrt(head_dim) + mask) v` | [`attention`](crate::Tensor::attention), [`attention_scaled`](crate::Tensor::attention_scaled), with a [`Mask`](crate::nn::Mask) |
//! | keys and values of earlier tokens | | [`cache::KvCache`] |
//! | rotary positions | pairs of elements are rotated by `position / base^(2 i / head_dim)` | [`rope`](crate::Tensor::rope), [`rope_at`](crate::Tensor::rope_at), with a [`rope::Rope`] |
//!
//! ```
//! # use tiebeam::{Gpu, Tensor};
//! # let gpu = Gpu::open()?;
//! use tiebeam::nn::Mask;
//! use tiebeam::ops::sequence::rope::{Pairing, Rope};
//! let rope = Rope::new(&gpu, 16, 4, 10000.0, Pairing::Halves); // 16 positions, heads of 4
//! let x = Tensor::ones(&gpu, [1, 2, 3, 4]);
//! let y = x.rope(&rope, 0).attention(&x.rope(&rope, 0), &x, &Mask::Causal);
//! assert_eq!(y.shape(), x.shape());
//! # Ok::<(), tiebeam::Error>(())
//! ```

pub mod attention;
pub mod cache;
pub mod rope;

crate::ops::listed!(attention, cache, rope);
