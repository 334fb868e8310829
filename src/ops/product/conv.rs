//! Direct convolution over images. The sizes alone determine the order of every sum.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, MOST_TURNS, Work, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::setters::setters;
use crate::shape::Shape;
use crate::tape::{Destination, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::ops::Range;

/// The most positions that a thread of the weights' gradient adds up, in blocks of 64.
const SPAN: usize = 4096;

/// How the windows of a convolution lie on an image; rows before columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Conv2dConfig {
    /// Steps between windows.
    pub stride: [usize; 2],
    /// Zeros added at each side.
    pub padding: [usize; 2],
    /// Distance between the elements of a window.
    pub dilation: [usize; 2],
    /// Number of equal parts of the channels that do not mix. As many groups as channels make a depthwise convolution.
    pub groups: usize,
}

setters!(Conv2dConfig { stride: [usize; 2], padding: [usize; 2], dilation: [usize; 2], groups: usize });

impl Default for Conv2dConfig {
    /// Stride 1, no padding, no dilation, one group.
    fn default() -> Conv2dConfig {
        Conv2dConfig { stride: [1, 1], padding: [0, 0], dilation: [1, 1], groups: 1 }
    }
}

/// Sizes of one call.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub conv: Conv2dConfig,
    pub x: Shape,
    pub w: Shape,
    pub y: Shape,
}

/// Channels per block. The part of a block beyond the last channel is wasted work, so a single channel is a block by
/// itself.
fn block(channels: usize) -> usize {
    if channels == 1 { 1 } else { 4 }
}

fn source(channels: usize, spread: bool) -> Source {
    Source::file("conv")
        .u32("CHANNELS", block(channels) as u32)
        .slot("tap", if spread { "conv_spread" } else { "conv_gather" })
}

/// Splits `0..size` into ranges of at most `most`. An empty range is one piece.
fn pieces(size: usize, most: usize) -> Vec<Range<usize>> {
    (0..size.max(1)).step_by(most.max(1)).map(|first| first..size.min(first + most.max(1))).collect()
}

/// Returns the ranges of tap rows, tap columns and channels of each launch, so that no thread takes too many turns, with
/// the turns of the launch.
fn windows([rows, columns]: [usize; 2], channels: usize) -> Vec<([Range<usize>; 3], usize)> {
    // A tap takes two turns, since it may be skipped, and one for its loop over blocks. Each channel takes one, and each
    // block of 64 channels two for the ends of loops. A row of taps takes two.
    let tap = |channels: usize| 3 + channels + 2 * channels.div_ceil(64);
    let own = channels.min(MOST_TURNS / 2);
    let across = columns.min((MOST_TURNS - 2) / tap(own));
    let down = rows.min(MOST_TURNS / (2 + across * tap(own)));
    let mut all = Vec::new();
    for u in pieces(rows, down) {
        for v in pieces(columns, across) {
            all.extend(pieces(channels, own).into_iter().map(|c| {
                let turns = u.len() * (2 + v.len() * tap(c.len()));
                ([u.clone(), v.clone(), c], turns)
            }));
        }
    }
    all
}

fn weights_source(out: usize, input: usize) -> Source {
    Source::file("conv_weights").u32("OUT", block(out) as u32).u32("IN", block(input) as u32)
}

impl Sizes {
    #[track_caller]
    fn new(x: Shape, w: Shape, conv: Conv2dConfig) -> Sizes {
        assert!(x.len() == 4, "conv2d: the image must be [batch, in, height, width], got {x}");
        assert!(w.len() == 4, "conv2d: the weight must be [out, in / groups, rows, columns], got {w}");
        let Conv2dConfig { stride, padding, dilation, groups } = conv;
        assert!(
            groups > 0 && w[0].is_multiple_of(groups) && x[1] == w[1] * groups,
            "conv2d: {groups} groups do not fit image {x} and weight {w}; in must be groups times the weight's axis 1, \
             out a multiple of groups"
        );
        assert!(
            stride.iter().chain(&dilation).all(|&s| s > 0),
            "conv2d: stride and dilation must be above 0: {conv:?}"
        );
        let out = [0, 1].map(|a| {
            let reach = dilation[a] * w[2 + a].saturating_sub(1) + 1;
            let room = x[2 + a] + 2 * padding[a];
            assert!(
                w[2 + a] > 0 && room >= reach,
                "conv2d: weight {w} reaches over {reach} elements, image {x} with its padding has {room}"
            );
            (room - reach) / stride[a] + 1
        });
        Sizes { conv, x, w, y: [x[0], w[0], out[0], out[1]].into() }
    }

    /// Returns a launch with the parameters that both kernels have: groups, the size of the window and how it moves.
    fn launch<'a>(&self, source: &'a Source, entry: &'a str, grid: [u32; 3]) -> Launch<'a> {
        let Conv2dConfig { stride, padding, dilation, groups } = self.conv;
        Launch::new("conv2d", source, entry, grid)
            .set("groups", groups)
            .set("kernel_y", self.w[2])
            .set("kernel_x", self.w[3])
            // Signed, because the kernels compute with positions before the start of the image.
            .set("stride_y", stride[0] as i32)
            .set("stride_x", stride[1] as i32)
            .set("pad_y", padding[0] as i32)
            .set("pad_x", padding[1] as i32)
            .set("dilation_y", dilation[0] as i32)
            .set("dilation_x", dilation[1] as i32)
            .reuse(8)
            .work(self.work())
    }

    /// Runs the forward pass from x to y or, if `spread`, the gradient from dy to dx.
    pub fn run(
        &self,
        spread: bool,
        from: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        to: &Tensor,
        accumulate: bool,
    ) {
        let groups = self.conv.groups;
        let (a, b) = if spread { (self.y, self.x) } else { (self.x, self.y) };
        let (from_channels, to_channels) = (a[1] / groups, b[1] / groups);
        let taps = self.w[2] * self.w[3];
        let strides = if spread { [self.w[1] * taps, taps] } else { [taps, self.w[1] * taps] };
        let positions = b[0] * b[2] * b[3];
        let grid = grid(positions.div_ceil(256) * groups * to_channels.div_ceil(block(to_channels)));
        let source = source(to_channels, spread);
        for (i, (window, turns)) in windows([self.w[2], self.w[3]], from_channels).into_iter().enumerate() {
            let [u, v, c] = window;
            to.gpu().launch(
                self.launch(&source, "forward", grid)
                    .bind("x", from)
                    .bind("w", w)
                    // The binding must be filled even if no bias is read.
                    .bind("bias", bias.unwrap_or(w))
                    .bind_mut("y", to)
                    .set("positions", positions)
                    .set("plane", b[2] * b[3])
                    .set("width", b[3])
                    .set("x_height", a[2])
                    .set("x_width", a[3])
                    .set("x_channels", from_channels)
                    .set("y_channels", to_channels)
                    .set("w_x", strides[0])
                    .set("w_y", strides[1])
                    .set("has_bias", bias.is_some() && i == 0)
                    .set("accumulate", accumulate || i > 0)
                    .set("first_u", u.start)
                    .set("last_u", u.end)
                    .set("first_v", v.start)
                    .set("last_v", v.end)
                    .set("first_c", c.start)
                    .set("last_c", c.end)
                    .turns(turns),
            );
        }
    }

    /// The arithmetic of the forward pass, which each gradient has too.
    fn work(&self) -> Work {
        Work::flops(2.0 * self.y.count() as f64 * (self.w.count() / self.w[0].max(1)) as f64)
    }

    /// Returns the gradient of the weight from the image and the gradient of the result.
    pub fn weights(&self, x: &Tensor, dy: &Tensor, into: Destination) -> Tensor {
        let gpu = x.gpu();
        let (dw, accumulate) = into.output(gpu, "conv2d", self.w);
        let groups = self.conv.groups;
        let [out, input] = [self.w[0] / groups, self.w[1]];
        let positions = self.y[0] * self.y[2] * self.y[3];
        let blocks = groups * out.div_ceil(block(out)) * input.div_ceil(block(input)) * self.w[2] * self.w[3];
        // If there are few weights and many positions, the positions are cut into enough parts to fill a device, each
        // worth a workgroup's sum.
        let parts = (1024 / blocks.max(1)).min(positions / 512).max(positions.div_ceil(64 * SPAN)).max(1);
        let partial = (parts > 1).then(|| Tensor::empty(gpu, "conv2d", [parts, self.w.count()], DType::F32));
        let source = weights_source(out, input);
        let launch = |entry, accumulate: bool, groups| {
            self.launch(&source, entry, grid(groups))
                .set("positions", positions)
                .set("plane", self.y[2] * self.y[3])
                .set("width", self.y[3])
                .set("x_height", self.x[2])
                .set("x_width", self.x[3])
                .set("x_channels", input)
                .set("y_channels", out)
                .set("count", self.w.count())
                .set("parts", parts)
                .set("span", positions.div_ceil(parts))
                .set("accumulate", accumulate)
        };
        // A thread takes its share of a part's positions, a turn for each block of them, and the sums of the other
        // threads.
        let turns = positions.div_ceil(parts * 64) + SPAN / 64 + 64;
        let first = launch("weights", accumulate && parts == 1, blocks * parts).bind("x", x).bind("dy", dy);
        gpu.launch(first.bind_mut("dw", partial.as_ref().unwrap_or(&dw)).turns(turns));
        match partial {
            None => dw,
            // A few parts are added up by `fold`, many by a tree.
            Some(partial) if parts <= 64 => {
                let fold = launch("fold", accumulate, dw.count().div_ceil(64)).bind("x", &partial);
                gpu.launch(fold.bind_mut("dw", &dw).turns(parts));
                dw
            }
            Some(partial) => {
                partial.sum(0).reshape(*dw.shape()).write_to("conv2d", &dw, accumulate);
                dw
            }
        }
    }
}

struct Conv {
    sizes: Sizes,
    x: Saved,
    w: Saved,
    has_bias: bool,
}

impl Op for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let dy = dy.contiguous();
        let Sizes { x, y, .. } = self.sizes;
        let w = || crate::ops::float("conv2d", self.w.get("conv2d")).contiguous();
        sink.add_with(0, |into| {
            let (dx, accumulate) = into.output(dy.gpu(), "conv2d", x);
            self.sizes.run(true, &dy, &w(), None, &dx, accumulate);
            dx
        });
        sink.add_with(1, |into| {
            let x = crate::ops::float("conv2d", self.x.get("conv2d")).contiguous();
            self.sizes.weights(&x, &dy, into)
        });
        if self.has_bias && sink.needs(2) {
            sink.add(2, dy.reshape([y[0], y[1], y[2] * y[3]]).sum(2).sum(0));
        }
    }
}

impl Tensor {
    /// Returns `y[b, o, i, j] = bias[o] + sum over c, u, v of x[b, c, i s - p + u d, j s - p + v d] weight[o, c, u,
    /// v]`, where `c` runs over the channels of `o`'s group and elements outside the image are 0. This is a
    /// cross-correlation, as usual for convolutions in neural networks.
    ///
    /// Image `[batch, in, height, width]`, weight `[out, in / groups, rows, columns]`, bias `[out]`; the result is
    /// `[batch, out, (height + 2 p - d (rows - 1) - 1) / s + 1, ..]`. f16 and bf16 are computed and returned in f32.
    ///
    /// # Panics
    /// When shapes, groups or windows do not fit, or an operand has integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::ops::product::conv::Conv2dConfig;
    /// let x = Tensor::arange(&gpu, 0.0, 9.0, 1.0).reshape([1, 1, 3, 3]);
    /// let edge = Tensor::from_slice(&gpu, &[-1f32, 1.0], [1, 1, 1, 2]); // right minus left
    /// let y = x.conv2d(&edge, None, Conv2dConfig::default());
    /// assert_eq!(y.shape()[..], [1, 1, 3, 2]);
    /// assert_eq!(y.to_vec::<f32>()?, [1.0; 6]);
    /// let y = x.conv2d(&edge, None, Conv2dConfig::default().stride([2, 1]).padding([0, 1]));
    /// assert_eq!(y.shape()[..], [1, 1, 2, 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn conv2d(&self, weight: &Tensor, bias: Option<&Tensor>, conv: Conv2dConfig) -> Tensor {
        same_gpu("conv2d", &[self, weight]);
        let sizes = Sizes::new(*self.shape(), *weight.shape(), conv);
        let read = |t: &Tensor| crate::ops::float("conv2d", t).detach().contiguous();
        let y = Tensor::empty(self.gpu(), "conv2d", sizes.y, DType::F32);
        let mut inputs = vec![self, weight];
        if let Some(bias) = bias {
            same_gpu("conv2d", &[self, bias]);
            assert!(bias.shape()[..] == [sizes.w[0]], "conv2d: bias {} for weight {}", bias.shape(), sizes.w);
            inputs.push(bias);
        }
        sizes.run(false, &read(self), &read(weight), bias.map(read).as_ref(), &y, false);
        let has_bias = bias.is_some();
        y.made_by(&inputs, || Box::new(Conv { sizes, x: Saved::new(self), w: Saved::new(weight), has_bias }))
    }
}

/// Calls `f` with the flat indices of y, x and w of every product that the convolution sums.
pub(super) fn products64(sizes: &Sizes, mut f: impl FnMut(usize, usize, usize)) {
    let Sizes { conv, x, w, y } = sizes;
    let place = |i: usize, k: usize, a: usize| {
        let at = (i * conv.stride[a] + k * conv.dilation[a]).checked_sub(conv.padding[a])?;
        (at < x[2 + a]).then_some(at)
    };
    for yi in 0..y.count() {
        let (b, o, i, j) =
            (yi / (y[1] * y[2] * y[3]), yi / (y[2] * y[3]) % y[1], yi / y[3] % y[2], yi % y[3]);
        let group = o / (w[0] / conv.groups);
        for wi in o * w[1] * w[2] * w[3]..(o + 1) * w[1] * w[2] * w[3] {
            let (c, u, v) = (wi / (w[2] * w[3]) % w[1], wi / w[3] % w[2], wi % w[3]);
            if let (Some(row), Some(column)) = (place(i, u, 0), place(j, v, 1)) {
                f(yi, ((b * x[1] + group * w[1] + c) * x[2] + row) * x[3] + column, wi);
            }
        }
    }
}

pub(super) fn conv64(x: &[Array], conv: Conv2dConfig) -> Array {
    let sizes = Sizes::new(x[0].shape, x[1].shape, conv);
    let plane = sizes.y[2] * sizes.y[3];
    let mut y = Array::from_fn(sizes.y, |i| x.get(2).map_or(0.0, |bias| bias.data[i / plane % sizes.y[1]]));
    products64(&sizes, |yi, xi, wi| y.data[yi] += x[0].data[xi] * x[1].data[wi]);
    y
}

pub(super) fn cases() -> Vec<Case> {
    let plain = Conv2dConfig::default();
    let padded = Conv2dConfig { padding: [1, 1], ..plain };
    let odd = Conv2dConfig { stride: [2, 1], padding: [1, 2], dilation: [1, 2], groups: 1 };
    let mut all = Vec::new();
    for (name, x, w, conv) in [
        ("one element", [1, 1, 1, 1], [1, 1, 1, 1], plain),
        ("3x3 padded", [2, 3, 5, 7], [5, 3, 3, 3], padded),
        ("uneven walk", [2, 3, 7, 6], [2, 3, 3, 2], odd),
        ("groups", [1, 6, 5, 4], [10, 3, 2, 2], Conv2dConfig { groups: 2, ..padded }),
        ("depthwise", [2, 5, 6, 5], [5, 1, 3, 3], Conv2dConfig { groups: 5, stride: [2, 2], ..padded }),
        (
            "depthwise with two results a channel",
            [1, 3, 5, 5],
            [6, 1, 3, 3],
            Conv2dConfig { groups: 3, ..padded },
        ),
        ("1x1", [3, 5, 3, 3], [7, 5, 1, 1], plain),
        ("stride above the kernel", [1, 2, 9, 8], [3, 2, 2, 2], Conv2dConfig { stride: [3, 4], ..plain }),
        ("more than a workgroup and a piece", [1, 1, 33, 33], [2, 1, 2, 2], plain),
    ] {
        for bias in [false, true] {
            let mut inputs = vec![Input::normal(x), Input::normal(w)];
            if bias {
                inputs.push(Input::normal([w[0]]));
            }
            let name = format!("{name}{}", if bias { ", bias" } else { "" });
            all.push(Case::new(
                name,
                inputs,
                move |x| x[0].conv2d(&x[1], x.get(2), conv),
                move |x| conv64(x, conv),
            ));
        }
    }
    for dtype in [DType::F16, DType::Bf16] {
        let strided = vec![Input::normal([5, 6, 2, 3]).dtype(dtype).fixed(), Input::normal([2, 3, 2, 4])];
        all.push(Case::new(
            format!("{dtype} and transposed operands"),
            strided,
            |x| x[0].permute([2, 3, 0, 1]).conv2d(&x[1].permute([3, 1, 0, 2]), None, Conv2dConfig::default()),
            |x| {
                let image = Array::from_fn([2, 3, 5, 6], |i| x[0].data[i % 30 * 6 + i / 30]);
                let weight = Array::from_fn([4, 3, 2, 2], |i| {
                    let (o, c, u, v) = (i / 12, i / 4 % 3, i / 2 % 2, i % 2);
                    x[1].data[((u * 3 + c) * 2 + v) * 4 + o]
                });
                conv64(&[image, weight], Conv2dConfig::default())
            },
        ));
    }
    // Larger sizes with integers, also for gradients. Equality shows that no product is lost or counted twice at a
    // block's edge.
    for (name, x, w, conv) in [
        ("integers", [3, 9, 17, 19], [13, 9, 3, 3], padded),
        ("integers strided", [2, 8, 23, 31], [6, 4, 3, 5], Conv2dConfig { groups: 2, ..odd }),
        (
            "integers depthwise",
            [2, 7, 31, 29],
            [7, 1, 5, 5],
            Conv2dConfig { groups: 7, padding: [2, 2], ..plain },
        ),
    ] {
        let sizes = Sizes::new(x.into(), w.into(), conv);
        let whole = |shape: Shape| Input::integers(shape, DType::F32, -9, 10);
        let inputs = || vec![whole(sizes.x), whole(sizes.w), whole(sizes.y)];
        let grads = move |x: &[Tensor]| {
            let leaves = [x[0].requires_grad(), x[1].requires_grad()];
            let grads = leaves[0].conv2d(&leaves[1], None, conv).backward_with(&x[2]);
            leaves.map(|leaf| grads.as_ref().ok().and_then(|g| g.get(&leaf)).expect("a gradient").clone())
        };
        let forward = move |x: &[Tensor]| x[0].conv2d(&x[1], None, conv);
        all.push(Case::new(name, inputs(), forward, move |x| conv64(&x[..2], conv)).exact());
        let [dx, dw] = [0, 1].map(|i| {
            Case::new(
                format!("{name}, {}", ["dx", "dw"][i]),
                inputs(),
                move |x: &[Tensor]| grads(x)[i].clone(),
                move |x: &[Array]| {
                    let mut d = [0, 1].map(|i| Array::from_fn(x[i].shape, |_| 0.0));
                    products64(&sizes, |yi, xi, wi| {
                        d[0].data[xi] += x[2].data[yi] * x[1].data[wi];
                        d[1].data[wi] += x[2].data[yi] * x[0].data[xi];
                    });
                    d[i].clone()
                },
            )
            .exact()
        });
        all.extend([dx, dw]);
    }
    all
}
