//! Norms over batches and groups of channels.

use super::{Buffer, module};
use crate::gpu::Gpu;
use crate::ops::moves::running::move_towards;
use crate::tensor::Tensor;

/// Batch norm over `[batch, channels, ..]`: in training with the statistics of the batch, which also move the running ones; in
/// evaluation with the running ones.
///
/// ```text
/// training:    y = (x - mean) / sqrt(var + eps) * weight + bias,  mean and var of the batch
///              running += momentum (mean or var n / (n - 1) - running),  n elements of a channel
/// evaluation:  y = (x - running_mean) / sqrt(running_var + eps) * weight + bias
/// ```
///
/// Source: Ioffe & Szegedy, arXiv 1502.03167, with PyTorch's momentum.
///
/// ```
/// # use tiebeam::nn::BatchNorm;
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let norm = BatchNorm::new(&gpu, 1).momentum(0.5).eps(0.0);
/// let x = Tensor::from_slice(&gpu, &[1f32, 3.0], [2, 1]);
/// norm.train(&x);
/// assert_eq!(norm.running_mean.to_vec::<f32>()?, [1.0]); // halfway from 0 to 2
/// assert_eq!(norm.running_var.to_vec::<f32>()?, [1.5]); // halfway from 1 to 2
/// let y = norm.forward(&x).to_vec::<f32>()?; // by the running statistics, which stay
/// assert!((y[0] - 0.0).abs() < 1e-6 && (y[1] - 2.0 / 1.5f32.sqrt()).abs() < 1e-6);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// `[channels]`
    pub weight: Tensor,
    /// `[channels]`
    pub bias: Tensor,
    /// `[channels]`, at first 0.
    pub running_mean: Buffer,
    /// `[channels]`, at first 1.
    pub running_var: Buffer,
    /// Added to the variance.
    pub eps: f32,
    /// The part of the way that running statistics go to those of a batch.
    pub momentum: f32,
}

module!(BatchNorm { weight, bias, running_mean, running_var, eps: _, momentum: _ });

impl BatchNorm {
    /// A layer with weight 1, bias 0, eps 1e-5 and momentum 0.1.
    pub fn new(gpu: &Gpu, channels: usize) -> BatchNorm {
        let full = |value| Tensor::full(gpu, [channels], value);
        BatchNorm {
            weight: full(1.0).requires_grad(),
            bias: full(0.0).requires_grad(),
            running_mean: Buffer(full(0.0)),
            running_var: Buffer(full(1.0)),
            eps: 1e-5,
            momentum: 0.1,
        }
    }

    /// Sets the part of the way that running statistics go to those of a batch.
    pub fn momentum(self, momentum: f32) -> BatchNorm {
        BatchNorm { momentum, ..self }
    }

    /// Sets what is added to the variance.
    pub fn eps(self, eps: f32) -> BatchNorm {
        BatchNorm { eps, ..self }
    }

    /// `x [batch, channels, ..]` with the running statistics.
    ///
    /// # Panics
    /// As [`Tensor::batch_norm_with`].
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (mean, var) = (&self.running_mean, &self.running_var);
        x.batch_norm_with(mean, var, Some(&self.weight), Some(&self.bias), self.eps)
    }

    /// `x [batch, channels, ..]` with the statistics of this batch. The running ones move, in place, so that a recorded step moves
    /// them at every replay, and [`checkpoint`](crate::checkpoint), which runs its code twice, twice. Statistics of a batch that are not
    /// finite, as where f16 overflows, are left out of the running ones. If they cannot move, the result carries the error.
    ///
    /// # Panics
    /// As [`Tensor::batch_norm`], and when a channel has only one element, which has no variance.
    #[track_caller]
    pub fn train(&self, x: &Tensor) -> Tensor {
        let n = x.count() / self.weight.count();
        assert!(n != 1, "batch_norm: x {} has one element for each channel, and so no variance", x.shape());
        let (y, mean, var) = x.batch_norm(Some(&self.weight), Some(&self.bias), self.eps);
        let unbiased = var.scale(n as f32 / (n - 1) as f32);
        let pairs = [(&*self.running_mean, &mean), (&*self.running_var, &unbiased)];
        if let Err(error) = move_towards(&pairs, self.momentum) {
            // Whoever reads the result learns that the statistics stayed.
            y.fail(&error);
        }
        y
    }
}

/// Group norm over `[batch, channels, ..]`: each of `groups` equal runs of channels of a sample is normalised over its channels and
/// all further axes. One group is a layer norm of images, as many as channels an instance norm: [`Tensor::group_norm`].
///
/// ```
/// # use tiebeam::nn::GroupNorm;
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let norm = GroupNorm::new(&gpu, 2, 4);
/// let y = norm.forward(&Tensor::from_slice(&gpu, &[1f32, 3.0, 10.0, 30.0], [1, 4])).to_vec::<f32>()?;
/// assert!((y[0] + 1.0).abs() < 1e-4 && (y[3] - 1.0).abs() < 1e-4);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GroupNorm {
    /// `[channels]`
    pub weight: Tensor,
    /// `[channels]`
    pub bias: Tensor,
    /// Number of runs of channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
}

module!(GroupNorm { weight, bias, eps: _, groups: _ });

impl GroupNorm {
    /// A layer with weight 1, bias 0 and eps 1e-5.
    ///
    /// # Panics
    /// When the groups do not divide the channels.
    #[track_caller]
    pub fn new(gpu: &Gpu, groups: usize, channels: usize) -> GroupNorm {
        let fits = groups > 0 && channels.is_multiple_of(groups);
        assert!(fits, "group_norm: {groups} groups do not divide {channels} channels");
        let full = |value| Tensor::full(gpu, [channels], value).requires_grad();
        GroupNorm { weight: full(1.0), bias: full(0.0), groups, eps: 1e-5 }
    }

    /// `x [batch, channels, ..]` to the same shape.
    ///
    /// # Panics
    /// As [`Tensor::group_norm`].
    #[track_caller]
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps)
    }
}
