//! Batch norm, group norm and instance norm over images and other arrays `[batch, channels, ..]`.

use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::precision::{Precision, autocast, precision};
use crate::shape::Shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// The axes of `[batch, channels, ..]`, with those from 2 on as one.
#[derive(Clone, Copy)]
struct Axes {
    batch: usize,
    channels: usize,
    inner: usize,
}

impl Axes {
    /// Checks `x` and the tensors that have a number for each channel.
    #[track_caller]
    fn of(op: &str, x: &Tensor, parts: &[(&str, Option<&Tensor>)]) -> Axes {
        let shape = x.shape();
        assert!(shape.len() >= 2, "{op}: x must be [batch, channels, ..], got {shape}");
        assert!(shape.count() > 0, "{op}: x {shape} has no elements to average");
        assert!(x.dtype().is_float(), "{op}: needs floats, got {}; cast first", x.dtype());
        for (name, part) in parts.iter().filter_map(|&(name, part)| Some((name, part?))) {
            same_gpu(op, &[x, part]);
            assert!(
                part.shape()[..] == [shape[1]] && part.dtype().is_float(),
                "{op}: the {name} must be [{}] of floats, one number for each channel of {shape}, got {} of {}",
                shape[1],
                part.shape(),
                part.dtype()
            );
        }
        Axes { batch: shape[0], channels: shape[1], inner: shape[2..].iter().product() }
    }

    fn shape(self) -> Shape {
        [self.batch, self.channels, self.inner].into()
    }

    /// `[channels]` as it broadcasts to [`Axes::shape`].
    fn column(self, part: &Tensor) -> Tensor {
        part.reshape([1, self.channels, 1])
    }

    /// The mean of every channel, `[channels]`. All parts of a mean have the same size.
    fn mean(self, x: &Tensor) -> Tensor {
        if self.inner == 1 { x.reshape([self.batch, self.channels]).mean(0) } else { x.mean(2).mean(0) }
    }

    /// `y = x weight + bias` in every channel.
    fn scaled(self, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Tensor {
        let x = weight.map_or_else(|| x.clone(), |w| x.mul(&self.column(w)));
        bias.map_or_else(|| x.clone(), |b| x.add(&self.column(b)))
    }
}

/// The type of a result: f32, or that of a scope of half precision.
fn scoped(y: Tensor) -> Tensor {
    if precision().dtype().is_half() { y.cast(precision().dtype()) } else { y }
}

struct BatchNorm {
    axes: Axes,
    /// The input as given. 16 bits take half the memory.
    x: Saved,
    /// `[channels]`: the mean, and the reciprocal standard deviation.
    mean: Saved,
    root: Saved,
    weight: Option<Saved>,
    /// Which inputs of the node are the weight and the bias.
    weight_input: Option<usize>,
    bias_input: Option<usize>,
}

const OP: &str = "batch_norm";

impl Op for BatchNorm {
    fn name(&self) -> &'static str {
        OP
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let axes = self.axes;
        let (x, dy) = (self.x.get(OP).reshape(axes.shape()), dy.reshape(axes.shape()));
        let (mean, root) = (axes.column(self.mean.get(OP)), axes.column(self.root.get(OP)));
        let over = |template: &'static str, args: &[&Tensor]| {
            Tensor::lazy(OP, template, DType::F32, axes.shape(), args)
        };
        // The means of dy and of dy times the normalised x.
        let (shift, gain) =
            (axes.mean(&dy), axes.mean(&over("$1 * ($0 - $2) * $3", &[&x, &dy, &mean, &root])));
        let count = (axes.batch * axes.inner) as f32;
        for (input, part) in [(self.weight_input, &gain), (self.bias_input, &shift)] {
            if let Some(input) = input.filter(|&input| sink.needs(input)) {
                sink.add(input, part.scale(count));
            }
        }
        if sink.needs(0) {
            let shape = [axes.channels].into();
            let factor = match &self.weight {
                None => self.root.get(OP).clone(),
                Some(w) => Tensor::lazy(OP, "$0 * $1", DType::F32, shape, &[self.root.get(OP), w.get(OP)]),
            };
            let (shift, gain, factor) = (axes.column(&shift), axes.column(&gain), axes.column(&factor));
            let dx = over(
                "($1 - $4 - ($0 - $2) * $3 * $5) * $6",
                &[&x, &dy, &mean, &root, &shift, &gain, &factor],
            );
            sink.add(0, dx.reshape(*self.x.get(OP).shape()));
        }
    }
}

impl Tensor {
    /// Batch norm in training: `y = (x - mean) / sqrt(var + eps) * weight + bias` with the statistics of this batch. Returns
    /// `(y, mean, var)`.
    ///
    /// `x` is `[batch, channels, ..]`. Mean and variance of a channel are over all other axes, and `var` is the mean of `(x -
    /// mean)^2`. `y` has the shape of `x`, in f32 or a scope's type. `weight` and `bias` are `[channels]`, and their defaults
    /// are 1 and 0. The gradient of `y` goes through both statistics. The returned `mean` and `var`, `[channels]` in f32,
    /// carry no gradient. They are for running averages, which usually take the unbiased variance `var n / (n - 1)`, where
    /// `n` is the number of elements of a channel. A channel whose variance overflows f32 is NaN.
    ///
    /// The forward pass reads `x` three times, and writes and reads the squares of its deviations. The backward pass reads
    /// `x` twice and `dy` three times, and writes and reads one product of them. Source: Ioffe & Szegedy, arXiv 1502.03167.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 10.0, 3.0, 30.0], [2, 2]);
    /// let (y, mean, var) = x.batch_norm(None, None, 0.0);
    /// assert_eq!(mean.to_vec::<f32>()?, [2.0, 20.0]);
    /// assert_eq!(var.to_vec::<f32>()?, [1.0, 100.0]);
    /// assert!((y.to_vec::<f32>()?[3] - 1.0).abs() < 1e-6);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// If there are fewer than two axes or no elements, if `weight` or `bias` is not `[channels]`, or if any of the three
    /// has integers.
    #[track_caller]
    pub fn batch_norm(
        &self,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> (Tensor, Tensor, Tensor) {
        let axes = Axes::of(OP, self, &[("weight", weight), ("bias", bias)]);
        let x = self.detach().reshape(axes.shape());
        let mean = axes.mean(&x);
        let square = "($0 - $1) * ($0 - $1)";
        let var = axes.mean(&Tensor::lazy(OP, square, DType::F32, axes.shape(), &[&x, &axes.column(&mean)]));
        let root = var.affine(1.0, eps).rsqrt();
        // If the variance overflows, 1 / sqrt(infinity) would silently make the channel 0, so it becomes NaN.
        let root = Tensor::lazy(OP, "finite_or_nan4($0, $1)", DType::F32, *var.shape(), &[&root, &var]);
        let factor = weight.map_or_else(|| root.clone(), |w| root.mul(&w.detach()));
        let [centre, factor] = [&mean, &factor].map(|part| axes.column(part));
        let dtype = Some(precision().dtype()).filter(|dtype| dtype.is_half()).unwrap_or(DType::F32);
        let y = match bias {
            None => Tensor::lazy(OP, "($0 - $1) * $2", dtype, axes.shape(), &[&x, &centre, &factor]),
            Some(bias) => {
                let bias = axes.column(&bias.detach());
                Tensor::lazy(OP, "($0 - $1) * $2 + $3", dtype, axes.shape(), &[&x, &centre, &factor, &bias])
            }
        };
        let inputs: Vec<&Tensor> = [Some(self), weight, bias].into_iter().flatten().collect();
        let y = y.reshape(*self.shape()).made_by(&inputs, || {
            Box::new(BatchNorm {
                axes,
                x: Saved::new(self),
                mean: Saved::new(&mean),
                root: Saved::new(&root),
                weight: weight.map(Saved::new),
                weight_input: weight.map(|_| 1),
                bias_input: bias.map(|_| inputs.len() - 1),
            })
        });
        (y, mean, var)
    }

    /// Batch norm in evaluation: `y = (x - mean) / sqrt(var + eps) * weight + bias` with statistics that are given, such as
    /// running averages. `x` is `[batch, channels, ..]`, and all others are `[channels]`. The defaults of `weight` and `bias`
    /// are 1 and 0. The result is f32 or a scope's type. All five get gradients.
    ///
    /// It reads `x` and writes `y` once; where gradients are recorded, it also writes `x - mean`. Source: Ioffe & Szegedy,
    /// arXiv 1502.03167.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[3.0f32, 5.0], [1, 2]);
    /// let mean = Tensor::from_slice(&gpu, &[1.0f32, 2.0], [2]);
    /// let var = Tensor::from_slice(&gpu, &[4.0f32, 9.0], [2]);
    /// let y = x.batch_norm_with(&mean, &var, None, None, 0.0).to_vec::<f32>()?;
    /// assert!((y[0] - 1.0).abs() < 1e-6 && (y[1] - 1.0).abs() < 1e-6);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`batch_norm`](Self::batch_norm), and if `mean` or `var` is not `[channels]`.
    #[track_caller]
    pub fn batch_norm_with(
        &self,
        mean: &Tensor,
        var: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Tensor {
        let parts = [("mean", Some(mean)), ("var", Some(var)), ("weight", weight), ("bias", bias)];
        let axes = Axes::of("batch_norm_with", self, &parts);
        let root = var.cast(DType::F32).affine(1.0, eps).rsqrt();
        let factor = weight.map_or_else(|| root.clone(), |w| root.mul(w));
        let x = self.reshape(axes.shape()).sub(&axes.column(&mean.cast(DType::F32)));
        scoped(axes.scaled(&x, Some(&factor), bias).reshape(*self.shape()))
    }

    /// Group norm: the channels of `[batch, channels, ..]` are cut into `groups` equal runs, and each run of each sample is
    /// normalised over its channels and all further axes, `(x - mean) / sqrt(var + eps)`, with `var` the mean of `(x -
    /// mean)^2`. Then every channel is multiplied by its `weight` and its `bias` is added. Both are `[channels]`, with the
    /// defaults 1 and 0. The result is f32 or a scope's type.
    ///
    /// The norm is the kernel of [`layer_norm`](Self::layer_norm); weight and bias are one more kernel that reads and writes
    /// all elements. Source: Wu & He, arXiv 1803.08494.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 3.0, 10.0, 30.0], [1, 4]);
    /// let y = x.group_norm(2, None, None, 0.0).to_vec::<f32>()?;
    /// let want = [-1.0f32, 1.0, -1.0, 1.0];
    /// assert!(y.iter().zip(want).all(|(y, want)| (y - want).abs() < 1e-6));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// If there are fewer than two axes or no elements, if `groups` does not divide the channels, if `weight` or `bias` is
    /// not `[channels]`, or if any of the three has integers.
    #[track_caller]
    pub fn group_norm(
        &self,
        groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Tensor {
        self.normed_in_groups("group_norm", groups, weight, bias, eps)
    }

    /// Instance norm: [`group_norm`](Self::group_norm) with a group for each channel, so that every channel of every sample
    /// is normalised over the axes from 2 on. Source: Ulyanov et al., arXiv 1607.08022.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1.0f32, 3.0, 10.0, 30.0], [1, 2, 2]);
    /// let y = x.instance_norm(None, None, 0.0).to_vec::<f32>()?;
    /// assert!(y.iter().zip([-1.0f32, 1.0, -1.0, 1.0]).all(|(y, want)| (y - want).abs() < 1e-6));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`group_norm`](Self::group_norm).
    #[track_caller]
    pub fn instance_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Tensor {
        let channels = self.shape().get(1).copied().unwrap_or(1);
        self.normed_in_groups("instance_norm", channels, weight, bias, eps)
    }

    #[track_caller]
    fn normed_in_groups(
        &self,
        op: &'static str,
        groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Tensor {
        let axes = Axes::of(op, self, &[("weight", weight), ("bias", bias)]);
        assert!(
            groups > 0 && axes.channels.is_multiple_of(groups),
            "{op}: {groups} groups do not divide the {} channels of {}",
            axes.channels,
            self.shape()
        );
        let rows = self.reshape([axes.batch * groups, axes.channels / groups * axes.inner]);
        // In f32 also in a scope of half precision, so that only the result is rounded.
        let unit = autocast(Precision::F32, || rows.layer_norm(None, None, eps)).reshape(axes.shape());
        scoped(axes.scaled(&unit, weight, bias).reshape(*self.shape()))
    }
}

/// Normalises the elements of `x` that have the same key. `x` comes with the weight and the bias of the channels.
fn normed64(x: &[Array], eps: f32, key: impl Fn(usize, usize) -> usize) -> Array {
    let (channels, inner) = (x[0].shape[1], x[0].shape[2..].iter().product::<usize>());
    let place = |i: usize| (i / inner / channels, i / inner % channels);
    let mut y = x[0].clone();
    for wanted in 0..x[0].shape[0] * channels {
        let members = (0..y.data.len()).filter(|&i| key(place(i).0, place(i).1) == wanted);
        let members: Vec<usize> = members.collect();
        let values: Vec<f64> = members.iter().map(|&i| x[0].data[i]).collect();
        let (mean, var) = (mean64(&values), var64(&values));
        members.iter().for_each(|&i| y.data[i] = (x[0].data[i] - mean) / (var + eps as f64).sqrt());
    }
    let part = |which: usize, i: usize, default: f64| x.get(which).map_or(default, |p| p.data[place(i).1]);
    Array::from_fn(y.shape, |i| y.data[i] * part(1, i, 1.0) + part(2, i, 0.0))
}

/// `[channels]` of a statistic in f64.
fn statistic64(x: &Array, of: fn(&[f64]) -> f64) -> Array {
    let (channels, inner) = (x.shape[1], x.shape[2..].iter().product::<usize>());
    Array::from_fn([channels], |c| {
        let all: Vec<f64> =
            x.data.iter().enumerate().filter(|(i, _)| i / inner % channels == c).map(|(_, &v)| v).collect();
        of(&all)
    })
}

fn mean64(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

fn var64(x: &[f64]) -> f64 {
    let mean = mean64(x);
    x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / x.len() as f64
}

const EPS: f32 = 1e-3;

fn affine(shape: &[usize]) -> Vec<Input> {
    vec![Input::normal(shape), Input::normal([shape[1]]), Input::normal([shape[1]])]
}

fn batch(name: String, inputs: Vec<Input>) -> Case {
    // With two elements and a small eps, `y` hardly depends on `x`, so its gradient would be nothing but rounding.
    let eps = if inputs[0].shape.count() / inputs[0].shape[1] <= 2 { 0.5 } else { EPS };
    let forward = move |x: &[Tensor]| x[0].batch_norm(x.get(1), x.get(2), eps).0;
    Case::new(name, inputs, forward, move |x| normed64(x, eps, |_, channel| channel)).ulps(16.0, 32.0)
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let shapes: [&[usize]; 6] = [&[2, 1], &[5, 3], &[67, 4], &[3, 5, 7], &[2, 3, 2, 4], &[1, 2, 67]];
    for shape in shapes {
        all.push(batch(format!("{shape:?}"), affine(shape)));
        let inputs = affine(shape).into_iter().map(Input::fixed).take(1).collect::<Vec<_>>();
        all.push(Case::new(
            format!("mean {shape:?}"),
            inputs.clone(),
            |x| x[0].batch_norm(None, None, EPS).1,
            |x| statistic64(&x[0], mean64),
        ));
        all.push(Case::new(
            format!("var {shape:?}"),
            inputs,
            |x| x[0].batch_norm(None, None, EPS).2,
            |x| statistic64(&x[0], var64),
        ));
        let mut given = affine(shape);
        given.push(Input::normal([shape[1]]));
        given.push(Input::normal([shape[1]]).fill(Fill::Uniform(0.3, 2.0)));
        let forward = |x: &[Tensor]| x[0].batch_norm_with(&x[3], &x[4], Some(&x[1]), Some(&x[2]), EPS);
        let reference = |x: &[Array]| {
            let (channels, inner) = (x[0].shape[1], x[0].shape[2..].iter().product::<usize>());
            Array::from_fn(x[0].shape, |i| {
                let at = |part: usize| x[part].data[i / inner % channels];
                (x[0].data[i] - at(3)) / (at(4) + EPS as f64).sqrt() * at(1) + at(2)
            })
        };
        all.push(Case::new(format!("given {shape:?}"), given, forward, reference).ulps(16.0, 32.0));
    }
    all.push(batch("bare".into(), vec![Input::normal([4, 3, 5])]));
    all.push(batch("weight only".into(), affine(&[4, 3, 5]).into_iter().take(2).collect()));
    // A mean far above the standard deviation, where E[x^2] - mean^2 in f32 would lose the variance.
    let mut far = affine(&[5, 2, 9]);
    far[0] = Input::normal([5, 2, 9]).fill(Fill::Uniform(98.0, 102.0));
    all.push(batch("mean 100".into(), far));
    for dtype in [DType::F16, DType::Bf16] {
        let inputs = affine(&[3, 4, 8]).into_iter().enumerate();
        let inputs = inputs.map(|(i, input)| if i == 0 { input.dtype(dtype) } else { input }).collect();
        all.push(batch(dtype.to_string(), inputs));
    }
    let groups = |name: &str, shape: &'static [usize], groups: usize, parts: usize| {
        let inputs = affine(shape).into_iter().take(parts).collect();
        let size = shape[1] / groups;
        let forward = move |x: &[Tensor]| x[0].group_norm(groups, x.get(1), x.get(2), EPS);
        let reference = move |x: &[Array]| normed64(x, EPS, |b, c| b * groups + c / size);
        let name = format!("{name} {shape:?} of {groups}");
        Case::new(name, inputs, forward, reference).ulps(16.0, 32.0)
    };
    all.push(groups("groups", &[2, 6], 2, 3));
    all.push(groups("groups", &[2, 6, 5], 3, 3));
    all.push(groups("groups", &[1, 4, 3, 4], 1, 3));
    all.push(groups("groups, bare", &[2, 4, 7], 2, 1));
    let instance = |x: &[Tensor]| x[0].instance_norm(x.get(1), x.get(2), EPS);
    let reference = |x: &[Array]| normed64(x, EPS, |b, c| 3 * b + c);
    all.push(Case::new("instances", affine(&[2, 3, 2, 5]), instance, reference).ulps(16.0, 32.0));
    for scope in [Precision::F16, Precision::Bf16] {
        for name in ["batch", "group"] {
            let mut inputs = affine(&[3, 4, 8]);
            inputs[0] = inputs[0].clone().dtype(scope.dtype());
            let is_batch = name == "batch";
            let forward = move |x: &[Tensor]| {
                autocast(scope, || match is_batch {
                    true => x[0].batch_norm(Some(&x[1]), Some(&x[2]), EPS).0,
                    false => x[0].group_norm(2, Some(&x[1]), Some(&x[2]), EPS),
                })
            };
            let reference =
                move |x: &[Array]| normed64(x, EPS, move |b, c| if is_batch { c } else { 2 * b + c / 2 });
            all.push(Case::new(format!("{name} in {scope}"), inputs, forward, reference).ulps(16.0, 32.0));
        }
    }
    all
}
