//! Networks for images and rows of numbers, as a list of steps that name their weights. A network runs on any [`Weights`]: on
//! files, on means of models, and on weights that are computed from something else and tracked.

mod find;
mod shapes;

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{BatchNorm, Buffer, Conv2d, Conv2dConfig, GroupNorm, Linear, Norm};
use crate::share::{Site, Tied};
use crate::store::Weights;
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A convolution of a [`Network`]: `name.weight [out, in / groups, height, width]`, and `name.bias` if there is one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conv {
    /// The layer's name.
    pub name: String,
    /// Steps between windows.
    #[serde(default = "one")]
    pub stride: usize,
    /// Zeros added at each side.
    #[serde(default)]
    pub padding: usize,
    /// Number of equal parts of the channels that do not mix.
    #[serde(default = "one")]
    pub groups: usize,
}

/// A norm of a [`Network`]: `name.weight` and `name.bias`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormStep {
    /// The layer's name.
    pub name: String,
    /// Added to the variance.
    #[serde(default = "eps")]
    pub eps: f32,
    /// Number of groups of channels, for a group norm.
    #[serde(default = "one")]
    pub groups: usize,
}

/// Windows of a pool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Height and width of a window.
    pub size: usize,
    /// Steps between windows, by default `size`.
    #[serde(default)]
    pub stride: Option<usize>,
    /// Elements added at each side.
    #[serde(default)]
    pub padding: usize,
}

/// A step of a [`Network`]. In a file: `"relu"`, `{"linear": "fc"}`, `{"conv": {"name": "conv1", "padding": 1}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Step {
    /// `x W^T + b` with `name.weight [out, in]`, and `name.bias` if there is one.
    Linear(String),
    /// A convolution.
    Conv(Conv),
    /// A batch norm with its running statistics.
    BatchNorm(NormStep),
    /// A group norm. One group is a layer norm of images.
    GroupNorm(NormStep),
    /// A layer norm over the last axis.
    LayerNorm(NormStep),
    /// `max(x, 0)`.
    Relu,
    /// `x Phi(x)`.
    Gelu,
    /// The largest element of each window.
    MaxPool(Pool),
    /// The mean of each window.
    AvgPool(Pool),
    /// The mean of each channel, `[batch, channels]`.
    GlobalPool,
    /// All axes behind the batch become one.
    Flatten,
    /// `body(x) + shortcut(x)`. No steps are the identity.
    Residual {
        /// The steps of the branch.
        body: Vec<Step>,
        /// The steps beside it.
        #[serde(default)]
        shortcut: Vec<Step>,
    },
}

fn one() -> usize {
    1
}

fn eps() -> f32 {
    1e-5
}

/// What a run of a [`Network`] shows.
#[non_exhaustive]
pub enum Seen<'a> {
    /// A step with weights has been computed.
    Layer {
        /// The step.
        step: &'a Step,
        /// Its name.
        name: &'a str,
        /// What it got.
        input: &'a Tensor,
        /// What it gave.
        output: &'a Tensor,
    },
    /// A nonlinearity has been computed of what this layer gave, or of a sum that it is a part of.
    Active {
        /// The last layer before it.
        name: &'a str,
        /// Its value.
        output: &'a Tensor,
    },
}

/// Sees a run. What it returns takes the place of what it saw.
pub type See<'a> = dyn FnMut(Seen) -> Option<Tensor> + 'a;

/// A network without loops, as steps that name their weights.
///
/// ```
/// use std::collections::BTreeMap;
/// use tiebeam::models::network::Network;
/// use tiebeam::{Gpu, Rng, Tensor};
/// let gpu = Gpu::open()?;
/// let text = r#"{"input": [1, 8, 8], "steps": [{"conv": {"name": "conv", "padding": 1}}, "relu", "global_pool", {"linear": "fc"}]}"#;
/// let network = Network::from_json(text)?;
/// let mut rng = Rng::new(1);
/// let weights: BTreeMap<String, Tensor> = [("conv.weight", vec![4, 1, 3, 3]), ("fc.weight", vec![10, 4])]
///     .map(|(name, shape)| (name.to_string(), Tensor::randn(&gpu, &shape[..], &mut rng)))
///     .into();
/// let images = Tensor::ones(&gpu, [5, 64]); // each row is an image of 1 channel
/// assert_eq!(network.logits(&gpu, &weights, &images)?.shape()[..], [5, 10]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The sizes of one input, if rows are to be read as something else: channels, height, width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Vec<usize>>,
    /// The steps, in order.
    pub steps: Vec<Step>,
}

/// The name of a file beside a model's weights that describes its [`Network`].
pub const NETWORK: &str = "network.json";

/// The most rows that are computed at a time.
pub(super) const ROWS: usize = 512;

impl Network {
    /// Reads a description from JSON.
    ///
    /// # Errors
    /// When the text is not JSON, or has unknown or missing fields. The message names line and column.
    pub fn from_json(text: &str) -> Result<Network> {
        let network: Network = serde_json::from_str(text)
            .map_err(|e| Error::config(format!("no valid description of a network: {e}")))?;
        match network.steps.is_empty() {
            true => Err(Error::config("a description of a network needs steps")),
            false => Ok(network),
        }
    }

    /// Reads a description from a file.
    ///
    /// # Errors
    /// As [`Network::from_json`], and when the file cannot be read.
    pub fn read(path: impl AsRef<Path>) -> Result<Network> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Network::from_json(&text).map_err(|e| Error::format(path, e.to_string()).because_of(e))
    }

    /// The description as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("names and numbers always become JSON") + "\n"
    }

    /// Visits every step, those of branches too.
    pub fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Step)) {
        each(&self.steps, visit);
    }

    /// A network of changed steps.
    pub fn changed(&self, change: &mut dyn FnMut(&mut Step)) -> Network {
        fn all(steps: &mut [Step], change: &mut dyn FnMut(&mut Step)) {
            for step in steps {
                change(step);
                if let Step::Residual { body, shortcut } = step {
                    all(body, change);
                    all(shortcut, change);
                }
            }
        }
        let mut network = self.clone();
        all(&mut network.steps, change);
        network
    }

    /// The names of the layers with a matrix or convolution, in the order of the walk.
    pub fn layers(&self) -> Vec<&str> {
        let mut all = Vec::new();
        each(&self.steps, &mut |step| match step {
            Step::Linear(name) | Step::Conv(Conv { name, .. }) => all.push(name.as_str()),
            _ => {}
        });
        all
    }

    /// Refuses a network in which a layer's weights are used twice, where each use counts by itself.
    ///
    /// # Errors
    /// With the name of the layer.
    pub fn check_once(&self, what: &str) -> Result<()> {
        let mut seen = std::collections::BTreeSet::new();
        let mut twice = None;
        self.each(&mut |step| {
            if let Some(name) = step.name().filter(|name| !seen.insert(*name)) {
                twice = Some(name);
            }
        });
        match twice {
            None => Ok(()),
            Some(name) => Err(Error::config(format!(
                "{what}: `{name}` is used twice in the network, which is not computed here"
            ))),
        }
    }

    /// The names of the batch norms, in the order of the walk.
    pub fn batch_norms(&self) -> Vec<&str> {
        let mut all = Vec::new();
        each(&self.steps, &mut |step| {
            if let Step::BatchNorm(NormStep { name, .. }) = step {
                all.push(name.as_str());
            }
        });
        all
    }

    /// Computes the logits for `x [batch, ..]`, some hundreds of rows at a time. Weights that are tracked are tracked here.
    ///
    /// # Errors
    /// When a tensor is missing or has other sizes than a step asks for; the message names the step.
    pub fn logits(&self, gpu: &Gpu, weights: &dyn Weights, x: &Tensor) -> Result<Tensor> {
        let rows = x.shape().first().copied().unwrap_or(0);
        let at_once = self.rows_at_once(gpu, weights, x.shape(), false)?;
        if rows <= at_once {
            return self.run(gpu, weights, x, &mut |_| None);
        }
        let part = |first: usize| {
            self.run(gpu, weights, &x.slice(0, first..(first + at_once).min(rows)), &mut |_| None)
        };
        let parts = (0..rows).step_by(at_once).map(part).collect::<Result<Vec<Tensor>>>()?;
        Ok(Tensor::concat(&parts.iter().collect::<Vec<_>>(), 0))
    }

    /// The value of every nonlinearity for `x [batch, ..]`, in the order of the run, and then the logits.
    ///
    /// # Errors
    /// As [`Network::logits`].
    pub fn activations(&self, gpu: &Gpu, weights: &dyn Weights, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut all = Vec::new();
        let logits = self.run(gpu, weights, x, &mut |seen| {
            if let Seen::Active { output, .. } = seen {
                all.push(output.clone());
            }
            None
        })?;
        all.push(logits);
        Ok(all)
    }

    /// [`Network::logits`] of all rows at once, which shows `see` every layer.
    ///
    /// # Errors
    /// As [`Network::logits`].
    pub fn run(&self, gpu: &Gpu, weights: &dyn Weights, x: &Tensor, see: &mut See) -> Result<Tensor> {
        self.output(weights, x.shape())?;
        let mut run = Run { gpu, weights, see, last: String::new() };
        run.steps(&self.steps, &self.placed(x))
    }

    /// Inputs in the shape that the first step reads.
    fn placed(&self, x: &Tensor) -> Tensor {
        let shape = self.placed_shape(x.shape());
        if **x.shape() == shape[..] { x.clone() } else { x.reshape(&shape[..]) }
    }
}

/// Visits every step, those of branches too.
fn each<'a>(steps: &'a [Step], visit: &mut dyn FnMut(&'a Step)) {
    for step in steps {
        visit(step);
        if let Step::Residual { body, shortcut } = step {
            each(body, visit);
            each(shortcut, visit);
        }
    }
}

/// A run of a network on some weights.
struct Run<'a, 'b> {
    gpu: &'a Gpu,
    weights: &'a dyn Weights,
    see: &'a mut See<'b>,
    /// The last layer with weights.
    last: String,
}

impl Run<'_, '_> {
    fn read(&self, name: &str, part: &str) -> Result<Tensor> {
        self.weights.read(self.gpu, &format!("{name}.{part}"))
    }

    /// A tensor that a layer may have.
    fn found(&self, name: &str, part: &str) -> Result<Option<Tensor>> {
        let is_there = self.weights.shape(&format!("{name}.{part}")).is_ok();
        is_there.then(|| self.read(name, part)).transpose()
    }

    fn steps(&mut self, steps: &[Step], x: &Tensor) -> Result<Tensor> {
        steps.iter().try_fold(x.clone(), |x, step| self.step(step, &x))
    }

    fn step(&mut self, step: &Step, x: &Tensor) -> Result<Tensor> {
        let y = match step {
            Step::Linear(name) => {
                let site = Tied::new(&self.read(name, "weight")?).shared();
                Linear::from_site(site, self.found(name, "bias")?).forward(x)
            }
            Step::Conv(Conv { name, stride, padding, groups }) => {
                let config = Conv2dConfig::default().stride([*stride; 2]).padding([*padding; 2]);
                let (weight, bias) = (self.read(name, "weight")?, self.found(name, "bias")?);
                Conv2d { weight, bias, config: config.groups(*groups) }.forward(x)
            }
            Step::BatchNorm(norm) => self.batch_norm(norm)?.forward(x),
            Step::GroupNorm(NormStep { name, eps, groups }) => {
                let [weight, bias] = [self.read(name, "weight")?, self.read(name, "bias")?];
                GroupNorm { weight, bias, groups: *groups, eps: *eps }.forward(x)
            }
            Step::LayerNorm(NormStep { name, eps, .. }) => {
                Norm { gain: self.read(name, "weight")?, bias: self.found(name, "bias")?, eps: *eps }
                    .forward(x)
            }
            Step::Relu => x.relu(),
            Step::Gelu => x.gelu(),
            Step::MaxPool(pool) => x.max_pool2d([pool.size; 2], [pool.stride(); 2], [pool.padding; 2]),
            Step::AvgPool(pool) => x.avg_pool2d([pool.size; 2], [pool.stride(); 2], [pool.padding; 2]),
            Step::GlobalPool => x.flatten(2, -1).mean(2),
            Step::Flatten => x.flatten(1, -1),
            Step::Residual { body, shortcut } => {
                let straight = self.steps(shortcut, x)?;
                self.steps(body, x)?.add(&straight)
            }
        };
        let seen = match (step, step.name()) {
            (_, Some(name)) => {
                self.last = name.to_string();
                (self.see)(Seen::Layer { step, name, input: x, output: &y })
            }
            (Step::Relu | Step::Gelu, None) => (self.see)(Seen::Active { name: &self.last, output: &y }),
            _ => None,
        };
        Ok(seen.unwrap_or(y))
    }

    fn batch_norm(&self, NormStep { name, eps, .. }: &NormStep) -> Result<BatchNorm> {
        Ok(BatchNorm {
            weight: self.read(name, "weight")?,
            bias: self.read(name, "bias")?,
            running_mean: Buffer(self.read(name, "running_mean")?),
            running_var: Buffer(self.read(name, "running_var")?),
            eps: *eps,
            momentum: 0.1,
        })
    }
}

impl Pool {
    fn stride(&self) -> usize {
        self.stride.unwrap_or(self.size)
    }
}

impl Step {
    /// The name of a step with weights.
    pub fn name(&self) -> Option<&str> {
        match self {
            Step::Linear(name) | Step::Conv(Conv { name, .. }) => Some(name),
            Step::BatchNorm(norm) | Step::GroupNorm(norm) | Step::LayerNorm(norm) => Some(&norm.name),
            _ => None,
        }
    }
}
