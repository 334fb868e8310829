//! Layer norm and RMS norm over the last axis.

use super::case::{Array, Case, Fill, Input};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Bind, Launch, grid};
use crate::gpu::shader::Source;
use crate::shape::Shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

struct Norm {
    centered: bool,
    x: Saved,
    gain: Saved,
    stats: Saved,
    shape: Shape,
    /// Whether gain and bias are inputs.
    with: [bool; 2],
}

fn name(centered: bool) -> &'static str {
    if centered { "layer_norm" } else { "rms_norm" }
}

fn launch(gpu: &Gpu, centered: bool, entry: &'static str, binds: Vec<Bind>, grid: [u32; 3], sizes: [usize; 3], eps: f32) {
    let [rows, width, span] = sizes.map(|v| v as u32);
    let params = [grid[0], rows, width, span, eps.to_bits()];
    let source = Source::file("norm").bool("CENTERED", centered);
    gpu.launch(Launch { op: name(centered), source: &source, entry, binds, params: super::words(&params), grid });
}

fn sizes(shape: &Shape) -> [usize; 2] {
    let width = shape[shape.len() - 1];
    [shape.count() / width.max(1), width]
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        name(self.centered)
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let op = self.name();
        let (x, gain, stats) = (self.x.get(op), self.gain.get(op), self.stats.get(op));
        let (gpu, dy, [rows, width]) = (x.gpu(), dy.contiguous(), sizes(&self.shape));
        if sink.needs(0) {
            let dx = Tensor::empty(gpu, op, self.shape, DType::F32);
            let binds = vec![x.bind(0), gain.bind(1), dy.bind(3), stats.bind(4), dx.bind_mut(5)];
            launch(gpu, self.centered, "backward", binds, grid(rows), [rows, width, 0], 0.0);
            sink.add(0, dx);
        }
        let wanted: Vec<usize> = (1..=self.with.iter().filter(|w| **w).count()).filter(|&i| sink.needs(i)).collect();
        if wanted.is_empty() {
            return;
        }
        // Few enough rows a span that every column fills the device, few enough spans that their sum costs nothing.
        let span = rows.div_ceil(64).max(16);
        let spans = rows.div_ceil(span);
        let partial = [(); 2].map(|()| Tensor::empty(gpu, op, [spans, width], DType::F32));
        let binds =
            vec![x.bind(0), dy.bind(3), stats.bind(4), partial[0].bind_mut(5), partial[1].bind_mut(7)];
        let grid = [width.div_ceil(64) as u32, spans as u32, 1];
        launch(gpu, self.centered, "backward_parameters", binds, grid, [rows, width, span], 0.0);
        for i in wanted {
            let is_gain = self.with[0] && i == 1;
            sink.add(i, partial[!is_gain as usize].sum(0));
        }
    }
}

impl Tensor {
    #[track_caller]
    fn normalized(&self, centered: bool, gain: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Tensor {
        let op = name(centered);
        assert!(!self.shape().is_empty(), "{op}: needs an axis to normalise over");
        let [rows, width] = sizes(self.shape());
        let gpu = self.gpu();
        let mut inputs = vec![self];
        for (what, t) in [("gain", gain), ("bias", bias)] {
            if let Some(t) = t {
                assert!(**t.shape() == [width], "{op}: {what} {} for width {width}", t.shape());
                inputs.push(t);
            }
        }
        same_gpu(op, &inputs);
        let dense = |t: Option<&Tensor>, other: f32| match t {
            Some(t) => super::float(op, &t.detach()).contiguous(),
            None => Tensor::full(gpu, [width], other),
        };
        let x = super::float(op, &self.detach()).contiguous();
        let (g, b) = (dense(gain, 1.0), dense(bias, 0.0));
        let y = Tensor::empty(gpu, op, self.shape(), DType::F32);
        let stats = Tensor::empty(gpu, op, [rows, 2], DType::F32);
        if self.count() > 0 {
            let binds = vec![x.bind(0), g.bind(1), b.bind(2), y.bind_mut(5), stats.bind_mut(6)];
            launch(gpu, centered, "forward", binds, grid(rows), [rows, width, 0], eps);
        }
        y.made_by(&inputs, || {
            Box::new(Norm {
                centered,
                x: Saved::new(&x),
                gain: Saved::new(&g),
                stats: Saved::new(&stats),
                shape: *self.shape(),
                with: [gain.is_some(), bias.is_some()],
            })
        })
    }

    /// `(x - mean) / sqrt(var + eps) * gain + bias` over the last axis, with the biased variance.
    ///
    /// Source: Ba, Kiros & Hinton 2016.
    ///
    /// # Panics
    /// When gain or bias are not `[width]`.
    #[track_caller]
    pub fn layer_norm(&self, gain: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Tensor {
        self.normalized(true, gain, bias, eps)
    }

    /// `x / sqrt(mean(x^2) + eps) * gain` over the last axis.
    ///
    /// Source: Zhang & Sennrich 2019.
    ///
    /// # Panics
    /// When gain is not `[width]`.
    #[track_caller]
    pub fn rms_norm(&self, gain: Option<&Tensor>, eps: f32) -> Tensor {
        self.normalized(false, gain, None, eps)
    }
}

pub(super) fn variants() -> Vec<Source> {
    [true, false].map(|centered| Source::file("norm").bool("CENTERED", centered)).to_vec()
}

fn norm64(x: &Array, centered: bool, eps: f64, gain: impl Fn(usize) -> f64, bias: impl Fn(usize) -> f64) -> Array {
    let width = x.shape[x.shape.len() - 1];
    let stats: Vec<(f64, f64)> = x
        .data
        .chunks(width)
        .map(|row| {
            let mean = if centered { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / width as f64;
            (mean, 1.0 / (var + eps).sqrt())
        })
        .collect();
    Array::from_fn(x.shape, |i| {
        let (mean, rstd) = stats[i / width];
        (x.data[i] - mean) * rstd * gain(i % width) + bias(i % width)
    })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let eps = 1e-5f32 as f64;
    for shape in [&[1, 1][..], &[7, 13], &[2, 3, 67], &[35, 4]] {
        let width = shape[shape.len() - 1];
        let inputs = vec![Input::normal(shape), Input::normal([width]), Input::normal([width])];
        let forward = |x: &[Tensor]| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5);
        all.push(
            Case::new(format!("layer_norm {shape:?}"), inputs.clone(), forward, move |x| {
                norm64(&x[0], true, eps, |c| x[1].data[c], |c| x[2].data[c])
            })
            .ulps(16.0, 64.0),
        );
        let forward = |x: &[Tensor]| x[0].rms_norm(Some(&x[1]), 1e-5);
        all.push(
            Case::new(format!("rms_norm {shape:?}"), inputs[..2].to_vec(), forward, move |x| {
                norm64(&x[0], false, eps, |c| x[1].data[c], |_| 0.0)
            })
            .ulps(16.0, 64.0),
        );
    }
    let plain = vec![Input::normal([5, 9])];
    all.push(Case::new("layer_norm without gain", plain, |x| x[0].layer_norm(None, None, 1e-5), move |x| {
        norm64(&x[0], true, eps, |_| 1.0, |_| 0.0)
    }).ulps(16.0, 64.0));
    // A mean of 100 with spread 1: E[x^2] - mean^2 would lose 13 bits of the variance.
    let far = vec![Input::normal([3, 130]).fill(Fill::Uniform(98.0, 102.0)).fixed()];
    all.push(Case::new("layer_norm far from zero", far, |x| x[0].layer_norm(None, None, 1e-5), move |x| {
        norm64(&x[0], true, eps, |_| 1.0, |_| 0.0)
    }).ulps(64.0, 64.0));
    all
}
