//! Diagonals of Fisher matrices of any model that is scored on tasks: what `tiebeam fisher` computes.
//!
//! For a network, gradients of all samples of a batch are computed at once. A zero is added to the output of every layer, and its
//! gradient is the layer's output gradient `g_n` of each sample `n`; with the layer's input `x_n`, the squared gradient of the weight
//! of sample `n` is `(g_n x_n^T)^2`. For a language model a sample is a window of tokens, with one backward pass each.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::merge::Weights;
use crate::merge::evaluation::architecture::Architecture;
use crate::merge::evaluation::evaluate::{Task, TaskData};
use crate::models::network::{Conv, Network, NormStep, Seen, Step};
use crate::nn::Conv2dConfig;
use crate::rng::Rng;
use crate::setters::setters;
use crate::store::Tracked;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// Which labels the gradients are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Labels {
    /// The exact sum over classes, `sum_y p(y|x) (d log p(y|x))^2`.
    Exact,
    /// One label for each prediction, drawn from the model's own distribution.
    Sampled,
    /// The labels of the data: the empirical Fisher matrix.
    Given,
}

/// Settings of [`fisher_of`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FisherOptions {
    /// Which labels the gradients are of. `None` is exact for networks and sampled for language models.
    pub labels: Option<Labels>,
    /// Samples at most, from the first one on: rows of a network, windows of a text.
    pub samples: usize,
    /// Rows of a network at a time.
    pub batch: usize,
    /// Seed of the labels that are drawn.
    pub seed: u64,
}

setters!(FisherOptions { labels: Option<Labels>, samples: usize, batch: usize, seed: u64 });

impl Default for FisherOptions {
    /// Up to 4096 samples, 64 rows at a time.
    fn default() -> FisherOptions {
        FisherOptions { labels: None, samples: 4096, batch: 64, seed: 0 }
    }
}

/// Called with the samples done and all of them.
pub type On<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// Computes the diagonal of the Fisher matrix of a model on a task, for every tensor of its weights. Running statistics, which no
/// gradient reaches, get 1, so that a merge by Fisher diagonals averages them.
///
/// Source: Matena & Raffel, arXiv 2111.09832.
///
/// # Errors
/// When model and task do not fit, for exact labels of a language model, when the device fails; what `on` returns.
pub fn fisher_of(
    gpu: &Gpu,
    architecture: &Architecture,
    weights: &dyn Weights,
    task: &Task,
    options: &FisherOptions,
    on: &mut On,
) -> Result<BTreeMap<String, Tensor>> {
    architecture.check(weights, task)?;
    let samples = architecture.samples(task).min(options.samples);
    if samples == 0 || options.batch == 0 {
        return Err(Error::config("fisher: there are no samples"));
    }
    let mut sums = match architecture {
        Architecture::Network(network) => {
            let job = OfNetwork { gpu, network, weights, task, options, samples };
            job.run(on)?
        }
        _ => of_language_model(gpu, architecture, weights, task, samples, options, on)?,
    };
    for (name, sum) in &sums {
        if sum.count() > 0 && sum.non_finite().to_vec::<u32>()?[0] > 0 {
            return Err(Error::config(format!(
                "fisher: that of `{name}` is NaN or infinite; the model's weights or the task's inputs are no numbers"
            )));
        }
    }
    for name in weights.float_names() {
        if !sums.contains_key(&name) {
            sums.insert(name.clone(), Tensor::ones(gpu, &weights.shape(&name)?[..]));
        }
    }
    Ok(sums)
}

/// Draws a label from each row's distribution.
fn drawn(logits: &Tensor, rng: &mut Rng) -> Result<Vec<u32>> {
    let classes = logits.shape()[1];
    let p = no_grad(|| logits.detach().softmax(1)).to_vec::<f32>()?;
    let mut draws = vec![0.0; p.len() / classes];
    rng.fill_uniform(&mut draws);
    let one = |(row, &draw): (&[f32], &f32)| {
        let mut rest = f64::from(draw) * row.iter().map(|&x| f64::from(x)).sum::<f64>();
        let found = row.iter().position(|&x| {
            rest -= f64::from(x);
            rest < 0.0
        });
        found.unwrap_or(classes - 1) as u32
    };
    Ok(p.chunks(classes).zip(&draws).map(one).collect())
}

fn of_language_model(
    gpu: &Gpu,
    architecture: &Architecture,
    weights: &dyn Weights,
    task: &Task,
    samples: usize,
    options: &FisherOptions,
    on: &mut On,
) -> Result<BTreeMap<String, Tensor>> {
    if options.labels == Some(Labels::Exact) {
        return Err(Error::config(
            "fisher: a language model has too many classes for exact labels; use sampled ones",
        ));
    }
    let leaf = |name: String| Ok((name.clone(), weights.read(gpu, &name)?.detach().requires_grad()));
    let leaves: BTreeMap<String, Tensor> =
        weights.float_names().into_iter().map(leaf).collect::<Result<_>>()?;
    let mut sums: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut rng = Rng::new(options.seed);
    for sample in 0..samples {
        let (logits, given) = architecture.scores(gpu, &Tracked(&leaves), task, &[sample as u32])?;
        let labels = if options.labels == Some(Labels::Given) { given } else { drawn(&logits, &mut rng)? };
        let targets = Tensor::from_slice(gpu, &labels, [labels.len()]);
        // The gradient is of the sum over the window's tokens.
        let loss = logits.cross_entropy(&targets, None).scale(labels.len() as f32);
        let grads = loss.backward()?;
        for (name, leaf) in &leaves {
            let Some(gradient) = grads.get(leaf) else { continue };
            let square = gradient.square().scale(1.0 / samples as f32);
            let sum = sums.remove(name).map_or(square.clone(), |sum| sum.add(&square));
            sum.evaluate();
            sums.insert(name.clone(), sum);
        }
        on(sample + 1, samples)?;
    }
    Ok(sums)
}

/// A layer of a batch: its step, input, and the zero that was added to its output.
struct Probe {
    step: Step,
    input: Tensor,
    zero: Tensor,
}

struct OfNetwork<'a> {
    gpu: &'a Gpu,
    network: &'a Network,
    weights: &'a dyn Weights,
    task: &'a Task,
    options: &'a FisherOptions,
    samples: usize,
}

impl OfNetwork<'_> {
    fn run(&self, on: &mut On) -> Result<BTreeMap<String, Tensor>> {
        // The gradient of a weight that is used twice is squared after its sum, not before.
        self.network.check_once("fisher")?;
        let mut sums = BTreeMap::new();
        let mut rng = Rng::new(self.options.seed);
        let mut first = 0;
        while first < self.samples {
            let end = (first + self.options.batch).min(self.samples);
            self.batch(first..end, &mut rng, &mut sums)?;
            first = end;
            on(first, self.samples)?;
        }
        Ok(sums)
    }

    fn batch(
        &self,
        rows: std::ops::Range<usize>,
        rng: &mut Rng,
        sums: &mut BTreeMap<String, Tensor>,
    ) -> Result<()> {
        let TaskData::Labelled(data) = &self.task.data else {
            return Err(Error::config("fisher: a network needs labelled rows"));
        };
        let mut probes = Vec::new();
        let x = data.inputs.slice(0, rows.clone());
        let logits = self.network.run(self.gpu, self.weights, &x, &mut |seen| match seen {
            Seen::Layer { step, input, output, .. } => {
                let zero = Tensor::zeros(self.gpu, *output.shape()).contiguous().requires_grad();
                probes.push(Probe { step: step.clone(), input: input.detach(), zero: zero.clone() });
                Some(output.add(&zero))
            }
            _ => None,
        })?;
        let logs = data.classes(logits).log_softmax(1);
        let (n, classes) = (rows.len(), logs.shape()[1]);
        let scale = 1.0 / self.samples as f32;
        let one_hot = |labels: &[u32]| {
            let mut values = vec![0.0f32; n * classes];
            labels.iter().enumerate().for_each(|(row, &label)| values[row * classes + label as usize] = 1.0);
            Tensor::from_slice(self.gpu, &values, [n, classes])
        };
        let mut add = |labels: &[u32], share: &Tensor| -> Result<()> {
            let grads = logs.backward_with_retain_graph(&one_hot(labels))?;
            for probe in &probes {
                let Some(g) = grads.get(&probe.zero) else { continue };
                for (name, square) in self.squares(probe, g, share)? {
                    let sum = sums.remove(&name).map_or(square.clone(), |sum: Tensor| sum.add(&square));
                    sum.evaluate();
                    sums.insert(name, sum);
                }
            }
            Ok(())
        };
        let even = Tensor::full(self.gpu, [n], scale);
        match self.options.labels.unwrap_or(Labels::Exact) {
            Labels::Given => add(&data.labels[rows], &even),
            Labels::Sampled => add(&drawn(&logs, rng)?, &even),
            Labels::Exact => (0..classes).try_for_each(|class| {
                let p = no_grad(|| logs.detach().exp().slice(1, class..class + 1).reshape([n]).scale(scale));
                add(&vec![class as u32; n], &p)
            }),
        }
    }

    /// The squared gradients of a layer's tensors, summed over samples that count by their `share [samples]`. `g` is the gradient of
    /// the layer's output.
    fn squares(&self, probe: &Probe, g: &Tensor, share: &Tensor) -> Result<Vec<(String, Tensor)>> {
        let (x, n) = (&probe.input, share.count());
        let g = g.detach();
        let weighted = |each: &Tensor| {
            // `each [samples, ..]`
            let rest: usize = each.shape()[1..].iter().product();
            let square = each.square().reshape([n, rest]);
            share.reshape([1, n]).matmul_f32(&square)
        };
        let biased = |name: &str, each: &Tensor, all: &mut Vec<(String, Tensor)>| {
            if self.weights.shape(&format!("{name}.bias")).is_ok() {
                all.push((format!("{name}.bias"), weighted(each).reshape([each.shape()[1]])));
            }
        };
        let mut all = Vec::new();
        match &probe.step {
            Step::Linear(name) if x.shape().len() == 2 => {
                let left = g.square().mul(&share.reshape([n, 1]));
                all.push((format!("{name}.weight"), left.t().matmul_f32(&x.square())));
                biased(name, &g, &mut all);
            }
            Step::Linear(name) => {
                let [out, inner] = [&g, x].map(|t| t.shape()[t.shape().len() - 1]);
                let [g, x] =
                    [g.reshape([n, g.count() / n / out, out]), x.reshape([n, x.count() / n / inner, inner])];
                let each = g.transpose(1, 2).matmul_f32(&x);
                all.push((format!("{name}.weight"), weighted(&each).reshape([out, inner])));
                biased(name, &g.sum(1), &mut all);
            }
            Step::Conv(conv) => {
                let shape = self.weights.shape(&format!("{}.weight", conv.name))?;
                let each = conv_gradients(conv, x, &g, &shape)?;
                all.push((format!("{}.weight", conv.name), weighted(&each).reshape(&shape[..])));
                biased(&conv.name, &g.flatten(2, -1).sum(2), &mut all);
            }
            Step::BatchNorm(norm) | Step::GroupNorm(norm) => {
                let plain = self.plain(&probe.step, norm, x)?;
                let rows = |t: &Tensor| if t.shape().len() > 2 { t.flatten(2, -1).sum(2) } else { t.clone() };
                let width = x.shape()[1];
                let of_weight = weighted(&rows(&g.mul(&plain))).reshape([width]);
                all.push((format!("{}.weight", norm.name), of_weight));
                biased(&norm.name, &rows(&g), &mut all);
            }
            Step::LayerNorm(norm) => {
                let plain = self.plain(&probe.step, norm, x)?;
                let width = x.shape()[x.shape().len() - 1];
                let rows = |t: &Tensor| t.reshape([n, t.count() / n / width, width]).sum(1);
                let of_weight = weighted(&rows(&g.mul(&plain))).reshape([width]);
                all.push((format!("{}.weight", norm.name), of_weight));
                biased(&norm.name, &rows(&g), &mut all);
            }
            _ => {}
        }
        Ok(all)
    }

    /// A norm's output without its gain and bias.
    fn plain(&self, step: &Step, norm: &NormStep, x: &Tensor) -> Result<Tensor> {
        let read = |part: &str| self.weights.read(self.gpu, &format!("{}.{part}", norm.name));
        Ok(match step {
            Step::BatchNorm(_) => {
                x.batch_norm_with(&read("running_mean")?, &read("running_var")?, None, None, norm.eps)
            }
            Step::GroupNorm(_) => x.group_norm(norm.groups, None, None, norm.eps),
            _ => x.layer_norm(None, None, norm.eps),
        })
    }
}

/// The gradient of a convolution's weight for each sample, `[samples, out, ..]`. The batch becomes groups of one image, so that one
/// backward pass gives all of them.
fn conv_gradients(conv: &Conv, x: &Tensor, g: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (n, out) = (x.shape()[0], shape[0]);
    let flat = |t: &Tensor| t.reshape([1, n * t.shape()[1], t.shape()[2], t.shape()[3]]);
    let config = Conv2dConfig::default().stride([conv.stride; 2]).padding([conv.padding; 2]);
    let config = config.groups(n * conv.groups);
    let own = Tensor::zeros(x.gpu(), [n * out, shape[1], shape[2], shape[3]]).contiguous().requires_grad();
    let grads = flat(x).conv2d(&own, None, config).backward_with(&flat(g))?;
    let each = grads.get(&own).ok_or_else(|| Error::config("fisher: a convolution without a gradient"))?;
    Ok(each.reshape([n, out * shape[1] * shape[2] * shape[3]]))
}
