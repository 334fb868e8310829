//! Two layers with a GELU between them. The wide hidden layer is materialised for one chunk of rows at a time.

use super::kernel_basis::{chunks, part};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::elementwise::unary::erf64;
use crate::ops::product::matmul::gathered::LayerSums;
use crate::ops::product::matmul::{biased, gelu_layer, product, product_slope};
use crate::tape::{Destination, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

const OP: &str = "mlp";

/// Rows per chunk: the hidden layer of a chunk fits a CPU's cache, or takes little of a GPU's memory. A multiple of 64,
/// so that parts of arrays can be bound.
fn chunk(gpu: &Gpu, hidden: usize) -> usize {
    (gpu.class().chunk as usize / (4 * hidden.max(1)) / 64 * 64).clamp(64, 1 << 20)
}

impl Tensor {
    /// Returns `y = gelu(x w1^T + b1) w2^T + b2 + residual`, where `self` is `x [.., C]`, `weights` are `w1 [H, C]`,
    /// `b1 [H]`, `w2 [D, H]` and `b2 [D]`, and `residual` is `[.., D]`.
    ///
    /// The wide `gelu(x w1^T + b1)` is materialised for one chunk of rows at a time, and the backward pass recomputes it:
    /// both passes together take seven products instead of six. Of the activations, only `x` is kept for the backward
    /// pass.
    ///
    /// # Panics
    /// When the shapes do not fit, or a type is not a float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let ones = |shape: &[usize]| Tensor::ones(&gpu, shape);
    /// let (w1, b1, w2, b2) = (ones(&[8, 4]), ones(&[8]), ones(&[4, 8]), ones(&[4]));
    /// let x = Tensor::zeros(&gpu, [2, 3, 4]);
    /// let y = x.mlp([&w1, &b1, &w2, &b2], None);
    /// assert!((y.mean_all().item()? - (8.0 * 0.8413 + 1.0)).abs() < 1e-3); // gelu(1) is 0.8413
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn mlp(&self, weights: [&Tensor; 4], residual: Option<&Tensor>) -> Tensor {
        self.mlp_by(chunk(self.gpu(), weights[1].count()), weights, residual)
    }

    #[track_caller]
    fn mlp_by(&self, chunk: usize, weights: [&Tensor; 4], residual: Option<&Tensor>) -> Tensor {
        let [w1, b1, w2, b2] = weights;
        let axes = self.shape().len();
        let matrices = axes > 0 && w1.shape().len() == 2 && w2.shape().len() == 2;
        let fits = matrices
            && self.shape()[axes - 1] == w1.shape()[1]
            && w1.shape()[1] > 0
            && b1.shape()[..] == [w1.shape()[0]]
            && w2.shape()[1] == w1.shape()[0]
            && b2.shape()[..] == [w2.shape()[0]];
        assert!(
            fits,
            "{OP}: x {}, weights {}, {}, {}, {}; they must be [.., C], [H, C], [H], [D, H], [D], C above 0",
            self.shape(),
            w1.shape(),
            b1.shape(),
            w2.shape(),
            b2.shape()
        );
        let shape = self.shape().with(axes - 1, w2.shape()[0]);
        assert!(residual.is_none_or(|r| *r.shape() == shape), "{OP}: a residual that is not {shape}");
        let float = |x: &Tensor| crate::ops::float(OP, x);
        // In a scope of half precision, layers before this one return 16 bits.
        let (x, weights, residual) = (float(self), weights.map(float), residual.map(float));
        let mut inputs = vec![&x];
        inputs.extend(&weights);
        inputs.extend(&residual);
        same_gpu(OP, &inputs);
        let (x, own) = (rows(inputs[0]), weights.each_ref().map(|w| w.detach().contiguous()));
        let residual = residual.as_ref().map(rows);
        let y = Tensor::empty(self.gpu(), OP, [x.shape()[0], shape[axes - 1]], DType::F32);
        for chunk in chunks(x.shape()[0], chunk) {
            let z = gelu_layer(OP, &part(&x, &chunk), [&own[0], &own[1]], None, None);
            let residual = residual.as_ref().map(|r| part(r, &chunk));
            biased(OP, &z, [&own[2], &own[3]], residual.as_ref(), &y.slice(0, chunk));
        }
        y.reshape(shape).made_by(&inputs, || {
            let weights = own.each_ref().map(Saved::new);
            Box::new(MlpOp { x: Saved::new(&x), weights, residual: residual.is_some(), chunk })
        })
    }
}

/// Returns `x` as a matrix of rows, detached from the tape.
fn rows(x: &Tensor) -> Tensor {
    let width = x.shape()[x.shape().len() - 1];
    let rows = x.shape()[..x.shape().len() - 1].iter().product::<usize>();
    x.detach().contiguous().reshape([rows, width])
}

struct MlpOp {
    x: Saved,
    weights: [Saved; 4],
    residual: bool,
    chunk: usize,
}

impl Op for MlpOp {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(full) = &dy[0] else { return };
        let (x, dy) = (self.x.get(OP), rows(full));
        let [w1, b1, w2, _] = [0, 1, 2, 3].map(|i| self.weights[i].get(OP));
        let wants: [bool; 4] = std::array::from_fn(|i| sink.needs(1 + i));
        let deeper = sink.needs(0) || wants[0] || wants[1];
        let dx = sink.needs(0).then(|| Tensor::empty(x.gpu(), OP, *x.shape(), DType::F32));
        let mut layers: [LayerSums; 2] = Default::default();
        for chunk in chunks(x.shape()[0], self.chunk) {
            let (x, dy) = (part(x, &chunk), part(&dy, &chunk));
            let before = Tensor::empty(x.gpu(), OP, [chunk.len(), b1.count()], DType::F32);
            // Forces at fixed weights need `dx` alone, which depends on the inputs of the GELU and not on its outputs.
            let z = wants[2].then(|| gelu_layer(OP, &x, [w1, b1], None, Some(&before)));
            if z.is_none() {
                biased(OP, &x, [w1, b1], None, &before);
            }
            layers[1].add(OP, &dy, z.as_ref().unwrap_or(&before), &wants[2..]);
            if deeper {
                let dz = product_slope(OP, &dy, w2, &before);
                layers[0].add(OP, &dz, &x, &wants[..2]);
                if let Some(dx) = &dx {
                    let _ = product(OP, &dz, w1, Destination::Write(dx.slice(0, chunk)));
                }
            }
        }
        if let Some(dx) = dx {
            let axes = full.shape().len();
            sink.add(0, dx.reshape(full.shape().with(axes - 1, x.shape()[1])));
        }
        for (i, sum) in layers.into_iter().flat_map(LayerSums::sums).enumerate() {
            if wants[i] {
                sink.add(
                    1 + i,
                    sum.unwrap_or_else(|| Tensor::zeros(x.gpu(), *self.weights[i].get(OP).shape())),
                );
            }
        }
        if self.residual {
            sink.add(5, full.clone());
        }
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // Chunks have 64 rows here, so the last one is short.
    for (shape, h, d, residual) in [
        (&[1, 1][..], 1, 1, false),
        (&[5, 4], 8, 4, true),
        (&[2, 3, 7], 13, 5, true),
        (&[131, 4], 5, 4, true),
        (&[0, 4], 8, 4, true),
    ] {
        let (axes, rows) = (shape.len(), shape[..shape.len() - 1].iter().product::<usize>());
        let (c, mut to) = (shape[axes - 1], shape.to_vec());
        to[axes - 1] = d;
        // Far below 0, GELU is a difference of nearly equal numbers. These weights keep its inputs away from there.
        let scale = 1.0 / (h as f64).sqrt();
        let small = |shape: &[usize], s: f64| Input::normal(shape).fill(Fill::Normal(s));
        let mut inputs = vec![Input::normal(shape), small(&[h, c], 0.3), small(&[h], 0.3)];
        inputs.extend([small(&[d, h], scale), small(&[d], 0.3)]);
        inputs.extend(residual.then(|| Input::normal(to.as_slice())));
        let reference = move |x: &[Array]| {
            let layer = |from: &[f64], w: &Array, b: &Array, i: usize| {
                let k = w.shape[1];
                b.data[i] + (0..k).map(|q| from[q] * w.data[i * k + q]).sum::<f64>()
            };
            let gelu = |v: f64| 0.5 * v * (1.0 + erf64(v * std::f64::consts::FRAC_1_SQRT_2));
            let mut y = Vec::with_capacity(rows * d);
            for row in 0..rows {
                let own = &x[0].data[row * c..(row + 1) * c];
                let z: Vec<f64> = (0..h).map(|i| gelu(layer(own, &x[1], &x[2], i))).collect();
                y.extend(
                    (0..d)
                        .map(|i| layer(&z, &x[3], &x[4], i) + x.get(5).map_or(0.0, |r| r.data[row * d + i])),
                );
            }
            Array::from_fn(to.as_slice(), |i| y[i])
        };
        let name = format!("{shape:?} through {h} to {d}, residual {residual}");
        let forward = |x: &[Tensor]| x[0].mlp_by(64, [&x[1], &x[2], &x[3], &x[4]], x.get(5));
        all.push(Case::new(name, inputs, forward, reference).ulps(128.0, 256.0).grad_floor(512.0));
    }
    all
}
