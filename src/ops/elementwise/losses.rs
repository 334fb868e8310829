//! Losses that compare predictions with targets of the same shape, element by element. The losses of all elements are one
//! kernel, whose result is then averaged, and the gradient is one kernel, which reads the predictions and the targets again.

use crate::dtype::DType;
use crate::gpu::value::fuse::Scalar;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// WGSL of a loss and of its derivatives. In `value`, the inputs are numbered first and then the numbers. In `derivatives`,
/// one for each input, the inputs come first, then `dy`, then the numbers.
#[derive(Clone, Copy)]
struct Formula {
    name: &'static str,
    value: &'static str,
    derivatives: &'static [&'static str],
}

const MSE: Formula = Formula {
    name: "mse_loss",
    value: "($0 - $1) * ($0 - $1)",
    derivatives: &["2.0 * ($0 - $1) * $2", "-2.0 * ($0 - $1) * $2"],
};
const L1: Formula = Formula {
    name: "l1_loss",
    value: "magnitude($0 - $1)",
    derivatives: &["dmagnitude($0 - $1, $2)", "-dmagnitude($0 - $1, $2)"],
};
const HUBER: Formula = Formula {
    name: "huber_loss",
    value: "huber_of($0 - $1, $2)",
    derivatives: &["$2 * limited($0 - $1, -$3, $3)", "-$2 * limited($0 - $1, -$3, $3)"],
};
const BCE: Formula = Formula {
    name: "bce_with_logits",
    value: "bce_of($0, $1, vec4<f32>(1.0))",
    derivatives: &["$2 * dbce_logit($0, $1, vec4<f32>(1.0))", "-$2 * $0"],
};
const WEIGHTED_BCE: Formula = Formula {
    name: "bce_with_logits",
    value: "bce_of($0, $1, $2)",
    derivatives: &["$3 * dbce_logit($0, $1, $2)", "$3 * dbce_target($0, $2)", "$3 * $1 * softplus_of(-$0)"],
};
const KL: Formula =
    Formula { name: "kl_div", value: "kl_of($0, $1)", derivatives: &["-$2 * $1", "dkl_target($0, $1, $2)"] };

struct Loss {
    formula: Formula,
    inputs: Vec<Saved>,
    numbers: Vec<Scalar>,
}

impl Op for Loss {
    fn name(&self) -> &'static str {
        self.formula.name
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let name = self.formula.name;
        let inputs: Vec<&Tensor> = self.inputs.iter().map(|input| input.get(name)).collect();
        let given: Vec<&Tensor> = inputs.iter().copied().chain([dy]).collect();
        for (i, derivative) in self.formula.derivatives.iter().enumerate() {
            if !sink.needs(i) {
                continue;
            }
            let dx = Tensor::lazy_with(name, derivative, DType::F32, *dy.shape(), &given, &self.numbers);
            sink.add(i, dx.sum_to(*inputs[i].shape()));
        }
    }
}

impl Formula {
    /// Returns the loss of each element, in f32. The first two inputs have the same shape, to which the third broadcasts.
    #[track_caller]
    fn each(self, inputs: &[&Tensor], numbers: &[f32]) -> Tensor {
        let (name, x, target) = (self.name, inputs[0], inputs[1]);
        same_gpu(name, inputs);
        assert!(
            x.shape() == target.shape(),
            "{name}: the target must have the shape of the predictions: predictions {}, target {}; expand one",
            x.shape(),
            target.shape()
        );
        assert!(x.count() > 0, "{name}: predictions {} have no elements to average", x.shape());
        for (what, t) in [("predictions", x), ("targets", target)]
            .into_iter()
            .chain(inputs.get(2).map(|&t| ("weights", t)))
        {
            assert!(t.dtype().is_float(), "{name}: the {what} must be floats, got {}; cast first", t.dtype());
        }
        let numbers: Vec<Scalar> = numbers.iter().map(|&number| Scalar::F32(number)).collect();
        let y = Tensor::lazy_with(name, self.value, DType::F32, *x.shape(), inputs, &numbers);
        y.made_by(inputs, || {
            let inputs = inputs.iter().map(|input| Saved::new(input)).collect();
            Box::new(Loss { formula: self, inputs, numbers })
        })
    }
}

impl Tensor {
    /// The mean of `(x - target)^2` over all elements, a scalar in f32. Both get gradients.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 2.0], [2]);
    /// let target = Tensor::from_slice(&gpu, &[1.0f32, 4.0], [2]);
    /// assert_eq!(x.mse_loss(&target).item()?, 2.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// If the shapes differ, since losses do not broadcast, if there are no elements, or if one of the two has integers.
    #[track_caller]
    pub fn mse_loss(&self, target: &Tensor) -> Tensor {
        MSE.each(&[self, target], &[]).mean_all()
    }

    /// The mean of `|x - target|` over all elements, a scalar in f32. Both get gradients, which are 0 where they are equal.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 2.0], [2]);
    /// let target = Tensor::from_slice(&gpu, &[1.0f32, 4.0], [2]);
    /// assert_eq!(x.l1_loss(&target).item()?, 1.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`mse_loss`](Self::mse_loss).
    #[track_caller]
    pub fn l1_loss(&self, target: &Tensor) -> Tensor {
        L1.each(&[self, target], &[]).mean_all()
    }

    /// The mean over all elements of `d^2 / 2` where `d = |x - target|` is at most `delta`, and of `delta (d - delta / 2)`
    /// elsewhere: a square near 0 whose gradient never exceeds `delta`. A scalar in f32. Both get gradients.
    ///
    /// PyTorch's `smooth_l1_loss` with `beta` is this loss with `delta = beta`, divided by `beta`. Source: Huber 1964,
    /// "Robust Estimation of a Location Parameter".
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 2.0], [2]);
    /// let target = Tensor::from_slice(&gpu, &[0.0f32, 6.0], [2]);
    /// assert_eq!(x.huber_loss(&target, 1.0).item()?, (0.5 + 3.5) / 2.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`mse_loss`](Self::mse_loss), and if `delta` is not above 0.
    #[track_caller]
    pub fn huber_loss(&self, target: &Tensor, delta: f32) -> Tensor {
        assert!(delta > 0.0, "huber_loss: delta must be above 0, got {delta}");
        HUBER.each(&[self, target], &[delta]).mean_all()
    }

    /// Binary cross-entropy of logits: the mean over all elements of `-w t ln p - (1 - t) ln(1 - p)` with `p =
    /// sigmoid(x)`, where `t` is the target, a probability, and `w` is `pos_weight`, by default 1. A scalar in f32.
    ///
    /// It is computed from the logits as `w t (max(-x, 0) + s) + (1 - t) (max(x, 0) + s)` with `s = ln(1 + e^-|x|)`, so that
    /// no logit makes it infinite and small losses keep their digits. `pos_weight` broadcasts to the logits. It weighs
    /// classes on the last axis if its shape is `[classes]`. All three get gradients.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[0.0f32, 500.0], [2]);
    /// let target = Tensor::from_slice(&gpu, &[1.0f32, 1.0], [2]);
    /// let loss = x.bce_with_logits(&target, None).item()?;
    /// assert!((loss - 0.5 * 0.6931472).abs() < 1e-6);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`mse_loss`](Self::mse_loss), and if `pos_weight` does not broadcast to the logits.
    #[track_caller]
    pub fn bce_with_logits(&self, target: &Tensor, pos_weight: Option<&Tensor>) -> Tensor {
        match pos_weight {
            None => BCE.each(&[self, target], &[]).mean_all(),
            Some(weight) => WEIGHTED_BCE.each(&[self, target, weight], &[]).mean_all(),
        }
    }

    /// The Kullback-Leibler divergence `KL(target || p)` of each distribution, averaged over the first axis: the sum over
    /// all elements of `t (ln t - x)`, divided by the size of the first axis. A scalar in f32, in nats.
    ///
    /// `self` has logarithms of probabilities, such as from [`log_softmax`](Self::log_softmax), and `target` has
    /// probabilities. An element whose target is 0 does not count (`0 ln 0 = 0`) and its target gets no gradient. Both get
    /// gradients. It is PyTorch's `F.kl_div(x, target, reduction="batchmean")`. Source: Kullback & Leibler 1951.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[0.5f32, 0.5], [1, 2]).log();
    /// let target = Tensor::from_slice(&gpu, &[1.0f32, 0.0], [1, 2]);
    /// assert!((x.kl_div(&target).item()? - 0.6931472).abs() < 1e-6);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`mse_loss`](Self::mse_loss), and if there is no axis.
    #[track_caller]
    pub fn kl_div(&self, target: &Tensor) -> Tensor {
        assert!(!self.shape().is_empty(), "kl_div: a scalar has no batch axis to average over");
        let batch = self.shape()[0] as f32;
        KL.each(&[self, target], &[]).sum_all().scale(1.0 / batch)
    }
}

fn softplus64(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn bce64(x: f64, t: f64, w: f64) -> f64 {
    if x.is_nan() { x } else { w * t * softplus64(-x) + (1.0 - t) * softplus64(x) }
}

fn huber64(d: f64, delta: f64) -> f64 {
    if d.abs() <= delta || d.is_nan() { 0.5 * d * d } else { delta * (d.abs() - 0.5 * delta) }
}

fn kl64(x: f64, t: f64) -> f64 {
    if t == 0.0 && !x.is_nan() { 0.0 } else { t * (t.ln() - x) }
}

pub(super) fn cases() -> Vec<Case> {
    type Row = (&'static str, fn(&[Tensor]) -> Tensor, fn(f64, f64) -> f64, [Fill; 2]);
    let near = || [Fill::Distinct(0.07), Fill::Distinct(0.0437)];
    let logits = || [Fill::Normal(2.0), Fill::Uniform(0.0, 1.0)];
    let rows: [Row; 5] = [
        ("mse", |x| x[0].mse_loss(&x[1]), |x, t| (x - t) * (x - t), [Fill::Normal(1.0), Fill::Normal(1.0)]),
        ("l1", |x| x[0].l1_loss(&x[1]), |x, t| (x - t).abs(), near()),
        ("huber", |x| x[0].huber_loss(&x[1], 0.75), |x, t| huber64(x - t, 0.75), near()),
        ("bce", |x| x[0].bce_with_logits(&x[1], None), |x, t| bce64(x, t, 1.0), logits()),
        ("kl", |x| x[0].kl_div(&x[1]), kl64, [Fill::Uniform(-4.0, -0.1), Fill::Uniform(0.05, 1.0)]),
    ];
    let mean = |x: &[Array], count: usize, each: &dyn Fn(usize) -> f64| {
        let sum: f64 = (0..x[0].data.len()).map(each).sum();
        Array::from_fn([], |_| sum / count as f64)
    };
    let mut all = Vec::new();
    for (name, forward, reference, fills) in rows {
        for (shape, dtype) in [
            ([1, 1], DType::F32),
            ([3, 7], DType::F32),
            ([5, 12], DType::F32),
            ([5, 7], DType::F16),
            ([3, 8], DType::Bf16),
        ] {
            let inputs = fills.iter().map(|fill| Input::normal(shape).fill(fill.clone()).dtype(dtype));
            let inputs =
                inputs.map(|input| if dtype == DType::F32 { input } else { input.fixed() }).collect();
            let count = if name == "kl" { shape[0] } else { shape[0] * shape[1] };
            let want = move |x: &[Array]| mean(x, count, &|i| reference(x[0].data[i], x[1].data[i]));
            all.push(Case::new(format!("{name} {shape:?} {dtype}"), inputs, forward, want).ulps(16.0, 32.0));
        }
    }
    for weight in [&[7][..], &[1], &[3, 1]] {
        let inputs = vec![
            Input::normal([3, 7]).fill(Fill::Normal(2.0)),
            Input::normal([3, 7]).fill(Fill::Uniform(0.0, 1.0)),
            Input::normal(weight).fill(Fill::Uniform(0.5, 3.0)),
        ];
        let (down, across) = (weight.len() == 2, weight == [7]);
        let want = move |x: &[Array]| {
            let weight = |i: usize| {
                x[2].data[if down {
                    i / 7
                } else if across {
                    i % 7
                } else {
                    0
                }]
            };
            mean(x, 21, &|i| bce64(x[0].data[i], x[1].data[i], weight(i)))
        };
        let forward = |x: &[Tensor]| x[0].bce_with_logits(&x[1], Some(&x[2]));
        all.push(Case::new(format!("bce weighted {weight:?}"), inputs, forward, want).ulps(16.0, 32.0));
    }
    // Logits so far from 0 that e^x overflows, with certain targets: losses of 0, 90, 1e4 and 12.
    let far = vec![
        Input::normal([6]).fill(Fill::Values(vec![90.0, -90.0, 1e4, -1e4, 30.0, -12.0])),
        Input::normal([6]).fill(Fill::Values(vec![1.0, 1.0, 0.0, 0.0, 1.0, 1.0])).fixed(),
    ];
    let want = move |x: &[Array]| mean(x, 6, &|i| bce64(x[0].data[i], x[1].data[i], 1.0));
    all.push(Case::new("bce far", far, |x| x[0].bce_with_logits(&x[1], None), want).ulps(16.0, 32.0));
    // A class that the target excludes does not count, not even where the prediction excludes it too.
    let excluded = vec![
        Input::normal([2, 3]).fill(Fill::Values(vec![-1.0, f64::NEG_INFINITY, -0.5, -2.0, -3.0])).fixed(),
        Input::normal([2, 3]).fill(Fill::Values(vec![0.75, 0.0, 0.25, 0.5, 0.0])).fixed(),
    ];
    let want = move |x: &[Array]| mean(x, 2, &|i| kl64(x[0].data[i], x[1].data[i]));
    all.push(Case::new("kl excluded", excluded, |x| x[0].kl_div(&x[1]), want).ulps(16.0, 32.0));
    all
}
