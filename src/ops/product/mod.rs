//! Sums of products: matrices, sums over named axes, the weights of sharing sites, combinations of atoms, convolutions and the windows
//! of images.
//!
//! | what | formula | |
//! |---|---|---|
//! | matrix product | `y[.., i, j] = sum_k a[.., i, k] b[.., k, j]` | [`matmul`](crate::Tensor::matmul), [`bmm`](crate::Tensor::bmm) |
//! | sum over named axes | `"bik,bkj->bij"` | [`einsum`](crate::Tensor::einsum) |
//! | linear layer with any weight | `y = act(x W^T + bias) + residual` | [`linear`](crate::Tensor::linear), whose weight is a [`site::Site`] |
//! | the same of some rows | `y[i] = x[rows[i]] W^T` | [`linear_gathered`](crate::Tensor::linear_gathered), [`add_linear_scattered`](crate::Tensor::add_linear_scattered) |
//! | combinations of atoms | `w[l] = sum_s c[l, s] atoms[s]` | [`combine`](crate::Tensor::combine) |
//! | rows of any weight by ids | `y[.., c] = W[ids[..], c]` | [`nn::lookup`](crate::nn::lookup) |
//! | a whole weight, for ops that take tensors | `W` | [`nn::materialise`](crate::nn::materialise) |
//! | convolution of images, of sequences | cross-correlation | [`conv2d`](crate::Tensor::conv2d), [`conv1d`](crate::Tensor::conv1d) |
//! | its adjoint | | [`conv_transpose2d`](crate::Tensor::conv_transpose2d) |
//! | windows of images | the largest element, or the mean | [`max_pool2d`](crate::Tensor::max_pool2d), [`avg_pool2d`](crate::Tensor::avg_pool2d), [`global_avg_pool2d`](crate::Tensor::global_avg_pool2d) |
//!
//! ```
//! # use tiebeam::{Gpu, Tensor};
//! # let gpu = Gpu::open()?;
//! let a = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
//! let column = Tensor::from_slice(&gpu, &[1f32, 10.0], [2, 1]);
//! assert_eq!(a.matmul(&column).to_vec2::<f32>()?, [[21.0], [43.0]]);
//! assert_eq!(Tensor::einsum("ij,jk->k", &[&a, &column]).item()?, 64.0);
//! # Ok::<(), tiebeam::Error>(())
//! ```

mod combine;
pub mod conv;
pub mod conv1d;
pub mod conv_transpose;
mod einsum;
mod linear;
pub(crate) mod lookup;
pub(crate) mod materialise;
pub mod matmul;
pub(crate) mod mixed;
pub mod narrow;
mod pool;
pub(crate) mod routed;
pub mod site;
pub(crate) mod weight;

crate::ops::listed!(matmul, einsum, weight, site, combine, conv, conv1d, conv_transpose, pool);
