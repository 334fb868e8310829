//! Convolutions with a weight and a bias.

use super::{Init, module};
use crate::gpu::Gpu;
use crate::ops::product::conv::Conv2dConfig;
use crate::ops::product::conv_transpose::ConvTranspose2dConfig;
use crate::ops::product::conv1d::Conv1dConfig;
use crate::rng::Rng;
use crate::tensor::Tensor;

/// `y = conv1d(x, W) + b` over sequences: [`Tensor::conv1d`].
///
/// ```
/// # use tiebeam::nn::{Conv1d, Conv1dConfig, Init};
/// # use tiebeam::{Gpu, Rng, Tensor};
/// # let gpu = Gpu::open()?;
/// let config = Conv1dConfig::default().padding(1);
/// let conv = Conv1d::new(&gpu, [3, 8], 3, config, true, Init::KaimingUniform, &mut Rng::new(1));
/// let y = conv.forward(&Tensor::ones(&gpu, [2, 3, 10]));
/// assert_eq!(y.shape()[..], [2, 8, 10]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv1d {
    /// `[out, in / groups, size]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
    /// How the windows lie.
    pub config: Conv1dConfig,
}

module!(Conv1d { weight, bias, config: _ });

impl Conv1d {
    /// Makes a layer from `channels = [in, out]` with windows of `size`, whose weight is drawn by `init` and whose bias is zero.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    #[track_caller]
    pub fn new(
        gpu: &Gpu,
        channels: [usize; 2],
        size: usize,
        config: Conv1dConfig,
        bias: bool,
        init: Init,
        rng: &mut Rng,
    ) -> Conv1d {
        let [inner, out] = checked("conv1d", channels, config.groups);
        let weight = init.leaf(gpu, [out, inner / config.groups, size], rng);
        Conv1d { weight, bias: bias.then(|| Init::Zeros.leaf(gpu, [out], rng)), config }
    }

    /// `x [batch, in, length]` to `[batch, out, ..]`.
    ///
    /// # Panics
    /// As [`Tensor::conv1d`].
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.conv1d(&self.weight, self.bias.as_ref(), self.config)
    }
}

/// `y = conv2d(x, W) + b` over images: [`Tensor::conv2d`].
///
/// ```
/// # use tiebeam::nn::{Conv2d, Conv2dConfig, Init};
/// # use tiebeam::{Gpu, Rng, Tensor};
/// # let gpu = Gpu::open()?;
/// let config = Conv2dConfig::default().stride([2, 2]).padding([1, 1]);
/// let conv = Conv2d::new(&gpu, [3, 8], [3, 3], config, true, Init::KaimingUniform, &mut Rng::new(1));
/// let y = conv.forward(&Tensor::ones(&gpu, [1, 3, 8, 8]));
/// assert_eq!(y.shape()[..], [1, 8, 4, 4]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Conv2d {
    /// `[out, in / groups, height, width]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
    /// How the windows lie.
    pub config: Conv2dConfig,
}

module!(Conv2d { weight, bias, config: _ });

impl Conv2d {
    /// Makes a layer from `channels = [in, out]` with windows of `size = [height, width]`, whose weight is drawn by `init` and
    /// whose bias is zero.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    #[track_caller]
    pub fn new(
        gpu: &Gpu,
        channels: [usize; 2],
        size: [usize; 2],
        config: Conv2dConfig,
        bias: bool,
        init: Init,
        rng: &mut Rng,
    ) -> Conv2d {
        let [inner, out] = checked("conv2d", channels, config.groups);
        let weight = init.leaf(gpu, [out, inner / config.groups, size[0], size[1]], rng);
        Conv2d { weight, bias: bias.then(|| Init::Zeros.leaf(gpu, [out], rng)), config }
    }

    /// `x [batch, in, height, width]` to `[batch, out, ..]`.
    ///
    /// # Panics
    /// As [`Tensor::conv2d`].
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.conv2d(&self.weight, self.bias.as_ref(), self.config)
    }
}

/// The adjoint of a convolution, with a bias: [`Tensor::conv_transpose2d`].
///
/// ```
/// # use tiebeam::nn::{ConvTranspose2d, ConvTranspose2dConfig, Init};
/// # use tiebeam::{Gpu, Rng, Tensor};
/// # let gpu = Gpu::open()?;
/// let config = ConvTranspose2dConfig::default().stride([2, 2]);
/// let conv = ConvTranspose2d::new(&gpu, [8, 3], [2, 2], config, true, Init::KaimingUniform, &mut Rng::new(1));
/// let y = conv.forward(&Tensor::ones(&gpu, [1, 8, 4, 4]));
/// assert_eq!(y.shape()[..], [1, 3, 8, 8]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConvTranspose2d {
    /// `[in, out / groups, height, width]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
    /// How the windows lie.
    pub config: ConvTranspose2dConfig,
}

module!(ConvTranspose2d { weight, bias, config: _ });

impl ConvTranspose2d {
    /// Makes a layer from `channels = [in, out]` with windows of `size = [height, width]`, whose weight is drawn by `init` and
    /// whose bias is zero.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    #[track_caller]
    pub fn new(
        gpu: &Gpu,
        channels: [usize; 2],
        size: [usize; 2],
        config: ConvTranspose2dConfig,
        bias: bool,
        init: Init,
        rng: &mut Rng,
    ) -> ConvTranspose2d {
        let [inner, out] = checked("conv_transpose2d", channels, config.groups);
        let weight = init.leaf(gpu, [inner, out / config.groups, size[0], size[1]], rng);
        ConvTranspose2d { weight, bias: bias.then(|| Init::Zeros.leaf(gpu, [out], rng)), config }
    }

    /// `x [batch, in, height, width]` to `[batch, out, ..]`.
    ///
    /// # Panics
    /// As [`Tensor::conv_transpose2d`].
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.conv_transpose2d(&self.weight, self.bias.as_ref(), self.config)
    }
}

#[track_caller]
fn checked(layer: &str, channels: [usize; 2], groups: usize) -> [usize; 2] {
    let fits = groups > 0 && channels.iter().all(|n| n.is_multiple_of(groups));
    assert!(fits, "{layer}: {groups} groups do not divide {channels:?} channels");
    channels
}
