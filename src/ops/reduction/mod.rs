//! Ops over whole rows: sums, products and extremes, moments, scans, softmax, losses and norms.
//!
//! An axis that is reduced disappears, and stays with size 1 in the methods that end in `_keepdim`. Negative axes are counted from the
//! end. Sums of f16 and bf16 are f32. The order of every sum is fixed by the sizes and the device, so every run gives the same bits.
//!
//! | what | |
//! |---|---|
//! | sums | [`sum`](crate::Tensor::sum), [`sum_keepdim`](crate::Tensor::sum_keepdim), [`sum_all`](crate::Tensor::sum_all), [`sum_to`](crate::Tensor::sum_to) |
//! | means | [`mean`](crate::Tensor::mean), [`mean_keepdim`](crate::Tensor::mean_keepdim), [`mean_all`](crate::Tensor::mean_all) |
//! | extremes, and where they are | [`max`](crate::Tensor::max), [`max_keepdim`](crate::Tensor::max_keepdim), [`min`](crate::Tensor::min), [`min_keepdim`](crate::Tensor::min_keepdim), [`argmax`](crate::Tensor::argmax), [`argmin`](crate::Tensor::argmin) |
//! | whether any or all are not 0 | [`any`](crate::Tensor::any), [`all`](crate::Tensor::all) |
//! | products | [`prod`](crate::Tensor::prod), [`prod_all`](crate::Tensor::prod_all) |
//! | moments and lengths | [`var`](crate::Tensor::var), [`std`](crate::Tensor::std), [`norm`](crate::Tensor::norm), [`norm_p`](crate::Tensor::norm_p), [`logsumexp`](crate::Tensor::logsumexp) |
//! | scans, which keep the axis | [`cumsum`](crate::Tensor::cumsum), [`cumsum_reverse`](crate::Tensor::cumsum_reverse), [`cumprod`](crate::Tensor::cumprod) |
//! | `e^x / sum e^x`, and its logarithm | [`softmax`](crate::Tensor::softmax), [`log_softmax`](crate::Tensor::log_softmax) |
//! | loss of scores against classes | [`cross_entropy`](crate::Tensor::cross_entropy), [`cross_entropy_with`](crate::Tensor::cross_entropy_with), [`cross_entropy_each`](crate::Tensor::cross_entropy_each), [`nll_loss`](crate::Tensor::nll_loss) |
//! | rows of mean 0 and variance 1, or of mean square 1 | [`layer_norm`](crate::Tensor::layer_norm), [`rms_norm`](crate::Tensor::rms_norm) |
//! | the same of channels and their groups | [`batch_norm`](crate::Tensor::batch_norm), [`batch_norm_with`](crate::Tensor::batch_norm_with), [`group_norm`](crate::Tensor::group_norm), [`instance_norm`](crate::Tensor::instance_norm) |
//!
//! ```
//! # use tiebeam::{Gpu, Tensor};
//! # let gpu = Gpu::open()?;
//! let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]);
//! assert_eq!(x.sum(1).to_vec::<f32>()?, [6.0, 15.0]); // `[2, 3]` without axis 1 is `[2]`
//! assert_eq!(x.mean(0).to_vec::<f32>()?, [2.5, 3.5, 4.5]);
//! # Ok::<(), tiebeam::Error>(())
//! ```

pub(crate) mod arg;
mod axes;
mod batch_norm;
mod columns;
pub mod cross_entropy;
pub(crate) mod cross_entropy_with;
mod cumsum;
mod moments;
mod nll_loss;
pub mod norm;
mod prod;
pub mod reduce;
pub mod softmax;

crate::ops::listed!(
    reduce,
    axes,
    prod,
    moments,
    arg,
    cumsum,
    softmax,
    cross_entropy,
    cross_entropy_with,
    nll_loss,
    norm,
    batch_norm
);
