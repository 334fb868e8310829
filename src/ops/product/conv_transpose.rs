//! Transposed convolution over images: the adjoint of [`conv2d`](super::conv). Its forward pass is the kernel of that op's
//! gradient with respect to the image, and its gradients are the kernels of that op's forward pass and weight.

use super::conv::{Conv2dConfig, Sizes, products64};
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Input};
use crate::setters::setters;
use crate::shape::Shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

const OP: &str = "conv_transpose2d";

/// How a transposed convolution lays its windows on the result; rows before columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConvTranspose2dConfig {
    /// Steps between the windows of neighbouring elements.
    pub stride: [usize; 2],
    /// Rows and columns that are cut off at each side of the result.
    pub padding: [usize; 2],
    /// Rows and columns that are added at the end of the result, below the stride or the dilation. A stride above 1 has
    /// several sizes of the result, of which this chooses one.
    pub output_padding: [usize; 2],
    /// Distance between the elements of a window.
    pub dilation: [usize; 2],
    /// Number of equal parts of the channels that do not mix.
    pub groups: usize,
}

setters!(ConvTranspose2dConfig {
    stride: [usize; 2],
    padding: [usize; 2],
    output_padding: [usize; 2],
    dilation: [usize; 2],
    groups: usize,
});

impl Default for ConvTranspose2dConfig {
    /// Stride 1, no padding, no dilation, one group.
    fn default() -> ConvTranspose2dConfig {
        ConvTranspose2dConfig {
            stride: [1, 1],
            padding: [0, 0],
            output_padding: [0, 0],
            dilation: [1, 1],
            groups: 1,
        }
    }
}

impl ConvTranspose2dConfig {
    /// Returns the sizes of the convolution whose adjoint this is: from the image `y` that is made here to `x`.
    #[track_caller]
    fn sizes(self, x: Shape, w: Shape) -> Sizes {
        let ConvTranspose2dConfig { stride, padding, output_padding, dilation, groups } = self;
        assert!(x.len() == 4, "{OP}: the image must be [batch, in, height, width], got {x}");
        assert!(w.len() == 4, "{OP}: the weight must be [in, out / groups, rows, columns], got {w}");
        assert!(
            groups > 0 && w[0].is_multiple_of(groups) && x[1] == w[0],
            "{OP}: {groups} groups do not fit image {x} and weight {w}; in must be the weight's axis 0 and a multiple of groups"
        );
        assert!(
            stride.iter().chain(&dilation).all(|&s| s > 0),
            "{OP}: stride and dilation must be above 0: {self:?}"
        );
        let out = [0, 1].map(|a| {
            let most = stride[a].max(dilation[a]);
            assert!(
                output_padding[a] < most,
                "{OP}: output padding must be below stride or dilation: {self:?}"
            );
            assert!(x[2 + a] > 0 && w[2 + a] > 0, "{OP}: image {x} or weight {w} is empty");
            let whole = (x[2 + a] - 1) * stride[a] + dilation[a] * (w[2 + a] - 1) + output_padding[a] + 1;
            assert!(
                whole > 2 * padding[a],
                "{OP}: padding {padding:?} cuts off all {whole} rows or columns of the result"
            );
            whole - 2 * padding[a]
        });
        let y = [x[0], w[1] * groups, out[0], out[1]].into();
        Sizes { conv: Conv2dConfig { stride, padding, dilation, groups }, x: y, w, y: x }
    }
}

struct ConvTranspose {
    /// Of the convolution from `y` to `x`.
    sizes: Sizes,
    x: Saved,
    w: Saved,
    has_bias: bool,
}

impl Op for ConvTranspose {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let dy = dy.contiguous();
        let Sizes { x: y, y: x, .. } = self.sizes;
        sink.add_with(0, |into| {
            let w = crate::ops::float(OP, self.w.get(OP)).contiguous();
            let (dx, accumulate) = into.output(dy.gpu(), OP, x);
            self.sizes.run(false, &dy, &w, None, &dx, accumulate);
            dx
        });
        sink.add_with(1, |into| {
            let x = crate::ops::float(OP, self.x.get(OP)).contiguous();
            self.sizes.weights(&dy, &x, into)
        });
        if self.has_bias && sink.needs(2) {
            sink.add(2, dy.reshape([y[0], y[1], y[2] * y[3]]).sum(2).sum(0));
        }
    }
}

impl Tensor {
    /// Lays each element of the image, times its window of weights, on the result and adds up what overlaps: for every `c`
    /// of `o`'s group, `x[b, c, i, j] weight[c, o, u, v]` is added to `y[b, o, i s - p + u d, j s - p + v d]`, which begins as
    /// `bias[o]`. It is the adjoint of [`conv2d`](Self::conv2d) with the same weight, also called a deconvolution. Each result
    /// is summed by one thread in a fixed order.
    ///
    /// Image `[batch, in, height, width]`, weight `[in, out / groups, rows, columns]`, bias `[out]`; the result is `[batch,
    /// out, (height - 1) s - 2 p + d (rows - 1) + output_padding + 1, ..]`, in f32. Source: Dumoulin & Visin, arXiv
    /// 1603.07285, chapter 4.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, nn::ConvTranspose2dConfig};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 2.0], [1, 1, 1, 2]);
    /// let weight = Tensor::from_slice(&gpu, &[1.0f32, 10.0, 100.0], [1, 1, 1, 3]);
    /// let y = x.conv_transpose2d(&weight, None, ConvTranspose2dConfig::default().stride([1, 2]));
    /// assert_eq!(y.to_vec::<f32>()?, [1.0, 10.0, 102.0, 20.0, 200.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// When shapes, groups or windows do not fit, when the padding leaves nothing, when the output padding is neither below
    /// the stride nor below the dilation, or when an operand has integers.
    #[track_caller]
    pub fn conv_transpose2d(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        conv: ConvTranspose2dConfig,
    ) -> Tensor {
        same_gpu(OP, &[self, weight]);
        let sizes = conv.sizes(*self.shape(), *weight.shape());
        let read = |t: &Tensor| crate::ops::float(OP, t).detach().contiguous();
        let y = Tensor::empty(self.gpu(), OP, sizes.x, DType::F32);
        let mut inputs = vec![self, weight];
        if let Some(bias) = bias {
            same_gpu(OP, &[self, bias]);
            assert!(bias.shape()[..] == [sizes.x[1]], "{OP}: bias {} for weight {}", bias.shape(), sizes.w);
            inputs.push(bias);
        }
        sizes.run(true, &read(self), &read(weight), bias.map(read).as_ref(), &y, false);
        let has_bias = bias.is_some();
        y.made_by(&inputs, || {
            Box::new(ConvTranspose { sizes, x: Saved::new(self), w: Saved::new(weight), has_bias })
        })
    }
}

fn transposed64(x: &[Array], conv: ConvTranspose2dConfig) -> Array {
    let sizes = conv.sizes(x[0].shape, x[1].shape);
    let (shape, plane) = (sizes.x, sizes.x[2] * sizes.x[3]);
    let mut y = Array::from_fn(shape, |i| x.get(2).map_or(0.0, |bias| bias.data[i / plane % shape[1]]));
    products64(&sizes, |from, to, wi| y.data[to] += x[0].data[from] * x[1].data[wi]);
    y
}

pub(super) fn cases() -> Vec<Case> {
    let plain = ConvTranspose2dConfig::default();
    let double = ConvTranspose2dConfig { stride: [2, 2], padding: [1, 1], output_padding: [1, 1], ..plain };
    let odd = ConvTranspose2dConfig {
        stride: [3, 1],
        padding: [1, 2],
        output_padding: [2, 1],
        dilation: [1, 2],
        groups: 1,
    };
    let mut all = Vec::new();
    for (name, x, w, conv) in [
        ("one element", [1, 1, 1, 1], [1, 1, 1, 1], plain),
        ("3x3", [2, 3, 4, 5], [3, 5, 3, 3], plain),
        ("doubled", [1, 3, 4, 3], [3, 2, 3, 3], double),
        ("uneven walk", [2, 2, 3, 5], [2, 3, 3, 2], odd),
        // An output padding of the stride and more, which only the dilation allows: rows that nothing is laid on.
        (
            "dilation above the stride",
            [1, 2, 3, 2],
            [2, 2, 2, 2],
            ConvTranspose2dConfig { dilation: [3, 3], output_padding: [2, 1], ..plain },
        ),
        ("groups", [1, 6, 3, 4], [6, 5, 2, 2], ConvTranspose2dConfig { groups: 2, ..double }),
        ("depthwise", [2, 5, 3, 3], [5, 1, 3, 3], ConvTranspose2dConfig { groups: 5, ..double }),
        (
            "gaps between windows",
            [1, 2, 3, 3],
            [2, 3, 2, 2],
            ConvTranspose2dConfig { stride: [3, 4], ..plain },
        ),
    ] {
        for bias in [false, true] {
            let mut inputs = vec![Input::normal(x), Input::normal(w)];
            if bias {
                inputs.push(Input::normal([w[1] * conv.groups]));
            }
            let name = format!("{name}{}", if bias { ", bias" } else { "" });
            let forward = move |x: &[Tensor]| x[0].conv_transpose2d(&x[1], x.get(2), conv);
            all.push(Case::new(name, inputs, forward, move |x| transposed64(x, conv)));
        }
    }
    let half = vec![Input::normal([2, 3, 4, 5]).dtype(DType::F16).fixed(), Input::normal([3, 2, 3, 3])];
    let forward = move |x: &[Tensor]| x[0].conv_transpose2d(&x[1], None, double);
    all.push(Case::new("f16", half, forward, move |x| transposed64(x, double)));
    // Equality at a larger size shows that no product is lost or counted twice at a block's edge.
    let whole = |shape: [usize; 4]| Input::integers(shape, DType::F32, -9, 10);
    let inputs = vec![whole([2, 9, 11, 13]), whole([9, 7, 3, 3])];
    let forward = move |x: &[Tensor]| x[0].conv_transpose2d(&x[1], None, double);
    all.push(Case::new("integers", inputs, forward, move |x| transposed64(x, double)).exact());
    all
}
