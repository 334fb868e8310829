//! The orientation half of a separable convolution: a depthwise mix of the few orientations of each node.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, Work, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::ops::reduction::reduce::add_sum;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

const OP: &str = "fiber_conv";
/// Nodes and orientations per thread.
const TILE: [usize; 2] = [4, 4];
/// The most nodes in one part of the sum for the kernel's gradient.
const SPAN: usize = 4096;

fn source(turned: bool) -> Source {
    Source::file(OP).u32("NODES", TILE[0] as u32).u32("POINTS", TILE[1] as u32).bool("TURNED", turned)
}

#[derive(Clone, Copy)]
struct Sizes {
    nodes: usize,
    o: usize,
    c: usize,
}

impl Sizes {
    fn of(x: &Tensor) -> Sizes {
        Sizes { nodes: x.shape()[0], o: x.shape()[1], c: x.shape()[2] }
    }

    /// `span` is the number of nodes per part.
    fn launch<'a>(
        self,
        source: &'a Source,
        entry: &'a str,
        threads: usize,
        span: usize,
        biased: bool,
    ) -> Launch<'a> {
        Launch::new(OP, source, entry, grid(threads.div_ceil(64)))
            .set("n", threads)
            .set("nodes", self.nodes)
            .set("o", self.o)
            .set("c", self.c / 4)
            .set("blocks", self.o.div_ceil(TILE[1]))
            .set("span", span)
            .set("scale", 1.0 / self.o as f32)
            .set("biased", biased)
            // A forward thread loops over orientations. A thread of the kernel's gradient loops over the nodes of a part,
            // with one more turn per block of 64 nodes.
            .turns(self.o + span + span / 64)
            .reuse(4)
            .work(Work::flops(2.0 * (self.nodes * self.c) as f64 * (self.o * self.o) as f64))
    }
}

/// Checks the shapes of the features, the kernel and the bias.
#[track_caller]
pub(in crate::ops) fn check(op: &str, x: &Tensor, kernel: &Tensor, bias: Option<&Tensor>) {
    let (x, k) = (x.shape(), kernel.shape());
    let fits = x.len() == 3 && k[..] == [x[1], x[1], x[2]] && x[2].is_multiple_of(4) && x[1] > 0;
    let fits = fits && bias.is_none_or(|b| b.shape()[..] == [x[2]]);
    assert!(
        fits,
        "{op}: features {x}, kernel {k}, bias {:?}; they must be [N, O, C], [O, O, C] and [C], C a multiple of 4",
        bias.map(|b| b.shape())
    );
}

/// Returns the mix `y [N, O, C]` of `x`. If `turned`, the two orientation axes of the kernel are exchanged.
pub(in crate::ops) fn mix(x: &Tensor, kernel: &Tensor, bias: Option<&Tensor>, turned: bool) -> Tensor {
    let sizes = Sizes::of(x);
    let y = Tensor::empty(x.gpu(), OP, x.shape(), DType::F32);
    let threads = sizes.nodes.div_ceil(TILE[0]) * sizes.o.div_ceil(TILE[1]) * sizes.c / 4;
    let source = source(turned);
    let launch = sizes.launch(&source, "forward", threads, 0, bias.is_some());
    // The binding must be filled even if no bias is read.
    let launch = launch.bind("x", x).bind("k", kernel).bind("bias", bias.unwrap_or(kernel));
    x.gpu().launch(launch.bind_mut("y", &y));
    y
}

pub(in crate::ops) fn kernel_gradient(x: &Tensor, dy: &Tensor) -> Tensor {
    let sizes = Sizes::of(x);
    let Sizes { nodes, o, c } = sizes;
    let blocks = o.div_ceil(TILE[1]);
    let tiles = blocks * blocks * c / 4;
    // There are enough threads for a large device, and parts are long enough that adding them up is cheap by comparison.
    let parts = (16384 / tiles.max(1)).clamp(1, nodes.div_ceil(32).max(1)).max(nodes.div_ceil(SPAN));
    let span = nodes.div_ceil(parts);
    let dk = Tensor::empty(x.gpu(), OP, [parts, o, o, c], DType::F32);
    let source = source(false);
    let launch = sizes.launch(&source, "weights", parts * tiles, span, false);
    x.gpu().launch(launch.bind("x", x).bind("dy", dy).bind_mut("dk", &dk));
    dk.sum(0)
}

impl Tensor {
    /// Returns `y[n,p,c] = 1/O sum_a kernel[p,a,c] x[n,a,c] + bias[c]`, where `self` is `x [N, O, C]`, `kernel` is
    /// `[O, O, C]` and `bias` is `[C]`.
    ///
    /// Derivatives: `dx` is the same mix of `dy` with the kernel's orientations exchanged;
    /// `dkernel[p,a,c] = 1/O sum_n dy[n,p,c] x[n,a,c]`, added up in a fixed order. Source: Bekkers et al. 2024, arXiv
    /// 2310.02970.
    ///
    /// # Panics
    /// When the shapes do not fit, C is not a multiple of 4, or a type is not a float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::ones(&gpu, [2, 3, 4]); // [nodes, orientations, channels]
    /// let kernel = Tensor::full(&gpu, [3, 3, 4], 2.0);
    /// let y = x.fiber_conv(&kernel, Some(&Tensor::ones(&gpu, [4])));
    /// assert_eq!(y.shape(), x.shape());
    /// assert!((y.mean_all().item()? - 3.0).abs() < 1e-5); // a mean over orientations, plus the bias
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn fiber_conv(&self, kernel: &Tensor, bias: Option<&Tensor>) -> Tensor {
        check(OP, self, kernel, bias);
        // In a scope of half precision, layers before this one return 16 bits.
        let [x, k] = [self, kernel].map(|x| crate::ops::float(OP, x));
        let bias = bias.map(|b| crate::ops::float(OP, b));
        let (mut inputs, bias) = (vec![&x, &k], bias.as_ref());
        inputs.extend(bias);
        same_gpu(OP, &inputs);
        let [x, k] = [&x, &k].map(|x| x.detach().contiguous());
        let y = mix(&x, &k, bias.map(|b| b.detach().contiguous()).as_ref(), false);
        y.made_by(&inputs, || {
            Box::new(FiberConv { x: Saved::new(&x), kernel: Saved::new(&k), bias: bias.is_some() })
        })
    }
}

struct FiberConv {
    x: Saved,
    kernel: Saved,
    bias: bool,
}

impl Op for FiberConv {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = dy[0].as_ref().map(Tensor::contiguous) else { return };
        if sink.needs(0) {
            sink.add(0, mix(&dy, self.kernel.get(OP), None, true));
        }
        if sink.needs(1) {
            sink.add(1, kernel_gradient(self.x.get(OP), &dy));
        }
        if self.bias && sink.needs(2) {
            let c = dy.shape()[2];
            add_sum(sink, 2, &dy.reshape([dy.count() / c.max(1), c]), 0);
        }
    }
}

/// The mix in f64.
pub(in crate::ops) fn mix64(x: &Array, kernel: &Array, bias: Option<&Array>) -> Array {
    let [o, c] = [x.shape[1], x.shape[2]];
    Array::from_fn(x.shape, |i| {
        let (n, p, c1) = (i / (o * c), i / c % o, i % c);
        let term = |a: usize| kernel.data[(p * o + a) * c + c1] * x.data[(n * o + a) * c + c1];
        (0..o).map(term).sum::<f64>() / o as f64 + bias.map_or(0.0, |b| b.data[c1])
    })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (nodes, o, c, biased) in [
        (1, 1, 4, true),
        (5, 3, 8, false),
        (7, 5, 4, true),
        (67, 2, 4, true),
        (2, 13, 4, false),
        (0, 3, 4, true),
    ] {
        let mut inputs = vec![Input::normal([nodes, o, c]), Input::normal([o, o, c])];
        inputs.extend(biased.then(|| Input::normal([c])));
        let reference = |x: &[Array]| mix64(&x[0], &x[1], x.get(2));
        let name = format!("{nodes} nodes, {o} orientations, {c} channels, bias {biased}");
        all.push(Case::new(name, inputs, |x| x[0].fiber_conv(&x[1], x.get(2)), reference).ulps(8.0, 16.0));
    }
    all
}
