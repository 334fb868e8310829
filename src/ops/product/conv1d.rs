//! Convolution over sequences: [`conv2d`](super::conv) over images of height 1.

use super::conv::{Conv2dConfig, conv64};
use crate::ops::case::{Array, Case, Input};
use crate::setters::setters;
use crate::tensor::Tensor;

/// How the windows of a convolution lie on a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Conv1dConfig {
    /// Steps between windows.
    pub stride: usize,
    /// Zeros added at each end.
    pub padding: usize,
    /// Distance between the elements of a window.
    pub dilation: usize,
    /// Number of equal parts of the channels that do not mix.
    pub groups: usize,
}

setters!(Conv1dConfig { stride: usize, padding: usize, dilation: usize, groups: usize });

impl Default for Conv1dConfig {
    /// Stride 1, no padding, no dilation, one group.
    fn default() -> Conv1dConfig {
        Conv1dConfig { stride: 1, padding: 0, dilation: 1, groups: 1 }
    }
}

impl Conv1dConfig {
    /// The same windows on an image of height 1.
    fn flat(self) -> Conv2dConfig {
        let Conv1dConfig { stride, padding, dilation, groups } = self;
        Conv2dConfig { stride: [1, stride], padding: [0, padding], dilation: [1, dilation], groups }
    }
}

impl Tensor {
    /// Returns `y[b, o, i] = bias[o] + sum over c, v of x[b, c, i s - p + v d] weight[o, c, v]`, where `c` runs over the
    /// channels of `o`'s group and elements outside the sequence are 0. This is a cross-correlation, as in
    /// [`conv2d`](Self::conv2d), whose kernels compute it.
    ///
    /// Sequence `[batch, in, length]`, weight `[out, in / groups, size]`, bias `[out]`; the result is `[batch, out, (length +
    /// 2 p - d (size - 1) - 1) / s + 1]`, in f32.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, nn::Conv1dConfig};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 2.0, 4.0, 8.0], [1, 1, 4]);
    /// let weight = Tensor::from_slice(&gpu, &[1.0f32, 1.0], [1, 1, 2]);
    /// let y = x.conv1d(&weight, None, Conv1dConfig::default().stride(2));
    /// assert_eq!(y.to_vec::<f32>()?, [3.0, 12.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// When shapes, groups or windows do not fit, or an operand has integers.
    #[track_caller]
    pub fn conv1d(&self, weight: &Tensor, bias: Option<&Tensor>, conv: Conv1dConfig) -> Tensor {
        let (x, w, Conv1dConfig { stride, padding, dilation, groups }) =
            (*self.shape(), *weight.shape(), conv);
        assert!(x.len() == 3, "conv1d: the sequence must be [batch, in, length], got {x}");
        assert!(w.len() == 3, "conv1d: the weight must be [out, in / groups, size], got {w}");
        assert!(
            groups > 0 && w[0].is_multiple_of(groups) && x[1] == w[1] * groups,
            "conv1d: {groups} groups do not fit sequence {x} and weight {w}; in must be groups times the weight's axis 1, \
             out a multiple of groups"
        );
        assert!(stride > 0 && dilation > 0, "conv1d: stride and dilation must be above 0: {conv:?}");
        let (reach, room) = (dilation * w[2].saturating_sub(1) + 1, x[2] + 2 * padding);
        assert!(
            w[2] > 0 && room >= reach,
            "conv1d: weight {w} reaches over {reach} elements, sequence {x} with its padding has {room}"
        );
        if let Some(bias) = bias {
            assert!(bias.shape()[..] == [w[0]], "conv1d: bias {} for weight {w}", bias.shape());
        }
        self.unsqueeze(2).conv2d(&weight.unsqueeze(2), bias, conv.flat()).squeeze(2)
    }
}

pub(super) fn cases() -> Vec<Case> {
    let plain = Conv1dConfig::default();
    let rows = [
        ("one element", [1, 1, 1], [1, 1, 1], plain),
        ("padded", [2, 3, 11], [5, 3, 3], Conv1dConfig { padding: 1, ..plain }),
        (
            "strided and dilated",
            [2, 3, 17],
            [2, 3, 3],
            Conv1dConfig { stride: 2, padding: 3, dilation: 2, groups: 1 },
        ),
        ("depthwise", [1, 5, 8], [5, 1, 4], Conv1dConfig { groups: 5, padding: 2, ..plain }),
    ];
    let case = |(name, x, w, conv): (&str, [usize; 3], [usize; 3], Conv1dConfig)| {
        let inputs = vec![Input::normal(x), Input::normal(w), Input::normal([w[0]])];
        let reference = move |x: &[Array]| {
            let flat = |a: &Array| {
                let [b, c, n] = [a.shape[0], a.shape[1], a.shape[2]];
                Array { shape: [b, c, 1, n].into(), data: a.data.clone() }
            };
            let y = conv64(&[flat(&x[0]), flat(&x[1]), x[2].clone()], conv.flat());
            Array { shape: [y.shape[0], y.shape[1], y.shape[3]].into(), data: y.data }
        };
        Case::new(name, inputs, move |x| x[0].conv1d(&x[1], Some(&x[2]), conv), reference)
    };
    rows.into_iter().map(case).collect()
}
