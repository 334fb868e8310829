//! The orientation half of a separable convolution with its bias and the layer norm that follows, in one pass.

use super::fiber_conv::{self, kernel_gradient, mix};
use crate::dtype::DType;
use crate::gpu::kernel::Launch;
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::ops::reduction::norm::{self, NormPlan, unit64};
use crate::ops::reduction::reduce::add_sum;
use crate::ops::reduction::softmax::{groups, lanes};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

const OP: &str = "fiber_norm";
/// Nodes and orientations per block of rows.
const TILE: [usize; 2] = [4, 4];
/// Above these sizes a thread of the fused kernel would take too many turns, so the two ops run one after the other.
const MOST_CHANNELS: usize = 16_384;
const MOST_ORIENTATIONS: usize = 512;

fn source(lanes: u32) -> Source {
    Source::file(OP).u32("NODES", TILE[0] as u32).u32("LANES", lanes)
}

impl Tensor {
    /// Returns `y = layer_norm(fiber_conv(x) + bias) gain + shift`, normalised over the channels. `self` is
    /// `x [N, O, C]`, `kernel` is `[O, O, C]`, the others are `[C]`. See [`Tensor::fiber_conv`] and
    /// [`Tensor::layer_norm`].
    ///
    /// The result of the convolution takes no memory of its own and is not kept. The backward pass recomputes it as one
    /// array of this size. Of the activations, only `x` and three numbers per row are kept for the backward pass.
    ///
    /// # Panics
    /// When the shapes do not fit, C is 0 or not a multiple of 4, or a type is not a float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Rng;
    /// let x = Tensor::randn(&gpu, [2, 3, 4], &mut Rng::new(1));
    /// let (kernel, one) = (Tensor::ones(&gpu, [3, 3, 4]), Tensor::ones(&gpu, [4]));
    /// let y = x.fiber_norm(&kernel, &one, [&one, &one], 1e-5);
    /// let parts = x.fiber_conv(&kernel, Some(&one)).layer_norm(Some(&one), Some(&one), 1e-5);
    /// assert!(y.sub(&parts).abs().max([0, 1, 2]).item()? < 1e-4);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn fiber_norm(
        &self,
        kernel: &Tensor,
        bias: &Tensor,
        [gain, shift]: [&Tensor; 2],
        eps: f32,
    ) -> Tensor {
        fiber_conv::check(OP, self, kernel, Some(bias));
        let c = self.shape()[2];
        assert!(
            c > 0 && gain.shape()[..] == [c] && shift.shape()[..] == [c],
            "{OP}: gain {} and shift {} for features {}; they must be [C], C not 0",
            gain.shape(),
            shift.shape(),
            self.shape()
        );
        // In a scope of half precision, layers before this one return 16 bits.
        let inputs = [self, kernel, bias, gain, shift].map(|x| crate::ops::float(OP, x));
        let inputs = inputs.each_ref();
        same_gpu(OP, &inputs);
        if c > MOST_CHANNELS || self.shape()[1] > MOST_ORIENTATIONS {
            let [x, kernel, bias, gain, shift] = inputs;
            return x.fiber_conv(kernel, Some(bias)).layer_norm(Some(gain), Some(shift), eps);
        }
        let own = inputs.map(|x| x.detach().contiguous());
        let [nodes, o] = [self.shape()[0], self.shape()[1]];
        let y = Tensor::empty(self.gpu(), OP, self.shape(), DType::F32);
        let statistics = Tensor::empty(self.gpu(), OP, [nodes * o, 3], DType::F32);
        let blocks = o.div_ceil(TILE[1]);
        let count = nodes.div_ceil(TILE[0]) * blocks;
        // Each thread adds up its vectors in one chain. This choice keeps a chain at 64 vectors or fewer.
        let lanes = if c / 4 > 64 { 64 } else { lanes(self.gpu().class(), c / 4, 1, count) };
        let turns = (c / 4).div_ceil(lanes as usize) * (o + 3);
        let [x, kernel, bias, gain, shift] = &own;
        self.gpu().launch(
            Launch::new(OP, &source(lanes), "forward", groups(count, lanes))
                .bind("x", x)
                .bind("k", kernel)
                .bind("bias", bias)
                .bind("gain", gain)
                .bind("shift", shift)
                .bind_mut("y", &y)
                .bind_mut("made", &statistics)
                .set("n", count)
                .set("nodes", nodes)
                .set("o", o)
                .set("c", c / 4)
                .set("blocks", blocks)
                .set("scale", 1.0 / o as f32)
                .set("eps", eps)
                .turns(turns)
                .reuse(4),
        );
        y.made_by(&inputs, || {
            let saved = own.each_ref().map(Saved::new);
            Box::new(FiberNorm { saved, statistics: Saved::new(&statistics), eps })
        })
    }
}

struct FiberNorm {
    /// Features, kernel, bias, gain, shift.
    saved: [Saved; 5],
    statistics: Saved,
    eps: f32,
}

impl Op for FiberNorm {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = dy[0].as_ref().map(Tensor::contiguous) else { return };
        let [x, kernel, bias, gain, _] = [0, 1, 2, 3, 4].map(|i| self.saved[i].get(OP));
        let statistics = self.statistics.get(OP);
        let c = x.shape()[2];
        let plan = NormPlan::layer(x.count() / c, c, self.eps);
        let between = mix(x, kernel, Some(bias), false);
        let wants = [3, 4].map(|i| sink.needs(i));
        if wants != [false; 2] {
            let sums = plan.sums(&between, statistics, &dy);
            for (i, part) in [(3, norm::GAIN), (4, norm::SHIFT)] {
                if sink.needs(i) {
                    sink.add(i, norm::row_of(&sums, part));
                }
            }
        }
        if ![0, 1, 2].iter().any(|&i| sink.needs(i)) {
            return;
        }
        let dx = plan.gradient(&between, Some(gain), statistics, &dy, DType::F32);
        drop(between);
        if sink.needs(0) {
            sink.add(0, mix(&dx, kernel, None, true));
        }
        if sink.needs(1) {
            sink.add(1, kernel_gradient(x, &dx));
        }
        if sink.needs(2) {
            add_sum(sink, 2, &dx.reshape([dx.count() / c, c]), 0);
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (nodes, o, c) in [(1, 1, 4), (5, 3, 8), (7, 5, 12), (67, 2, 4), (2, 13, 4), (0, 3, 4), (1, 1, 576)] {
        let vector = || Input::normal([c]);
        let inputs =
            vec![Input::normal([nodes, o, c]), Input::normal([o, o, c]), vector(), vector(), vector()];
        let reference = move |x: &[Array]| {
            let between = fiber_conv::mix64(&x[0], &x[1], Some(&x[2]));
            let unit = unit64(&between, norm::NormKind::Layer, 1e-2);
            Array::from_fn(unit.shape, |i| unit.data[i] * x[3].data[i % c] + x[4].data[i % c])
        };
        let name = format!("{nodes} nodes, {o} orientations, {c} channels");
        let forward = |x: &[Tensor]| x[0].fiber_norm(&x[1], &x[2], [&x[3], &x[4]], 1e-2);
        all.push(Case::new(name, inputs, forward, reference).ulps(64.0, 256.0).grad_floor(64.0));
    }
    all
}
