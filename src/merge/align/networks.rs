//! Aligns and repairs networks of which the steps are known: the spec, the activations and the statistics follow from the
//! description.

use super::activations::{ActivationMatch, ActivationMatching, Similarity};
use super::builders::Builder;
use super::repair::{repair, reset_statistics};
use super::spec::{Group, GroupKind, Spec};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::models::network::{Conv, Network, Seen, Step};
use crate::store::Weights;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

impl Spec {
    /// The spec of any [`Network`]. Every layer that writes new units begins a group of its name; what is added to units belongs to
    /// their group; the outputs of the last layer stay where they are.
    ///
    /// # Errors
    /// When a layer is missing, or the units that one layer writes are not those that another reads.
    pub fn network(weights: &dyn Weights, network: &Network) -> Result<Spec> {
        network.check_once("permutation spec")?;
        let mut walk = Walk { spec: Builder::new(weights)?, units: None };
        walk.steps(&network.steps, Target::Fixed)?;
        Ok(walk.spec.build())
    }
}

/// Where the last layer of some steps writes to.
#[derive(Clone)]
enum Target {
    /// To outputs that do not move.
    Fixed,
    /// To the units of this group.
    Group(String),
}

/// Units that move: their group and their number.
#[derive(Clone, PartialEq)]
struct Units {
    group: String,
    count: usize,
}

struct Walk<'a> {
    spec: Builder<'a>,
    /// The units of what the next step reads. `None` does not move.
    units: Option<Units>,
}

/// Whether a convolution has a group for each of its channels.
fn is_depthwise(conv: &Conv, shape: &[usize]) -> bool {
    conv.groups > 1 && shape.get(1) == Some(&1) && shape.first() == Some(&conv.groups)
}

impl Walk<'_> {
    fn steps(&mut self, steps: &[Step], target: Target) -> Result<()> {
        let writes = |step: &Step| matches!(step, Step::Linear(_) | Step::Residual { .. } | Step::Conv(_));
        let last = steps.iter().rposition(writes);
        for (i, step) in steps.iter().enumerate() {
            let own = if Some(i) == last { Some(target.clone()) } else { None };
            self.step(step, own)?;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step, target: Option<Target>) -> Result<()> {
        match step {
            Step::Linear(name) => self.layer(name, target),
            Step::Conv(conv) => {
                let shape = self.spec.weight(&conv.name)?.to_vec();
                match &self.units {
                    Some(units) if is_depthwise(conv, &shape) && units.count == shape[0] => {
                        let group = units.group.clone();
                        self.spec.writes(&group, &conv.name);
                        Ok(())
                    }
                    _ if conv.groups > 1 => Err(Error::config(format!(
                        "`{}`: the units of a convolution with {} groups cannot be permuted",
                        conv.name, conv.groups
                    ))),
                    _ => self.layer(&conv.name, target),
                }
            }
            Step::BatchNorm(norm) | Step::GroupNorm(norm) | Step::LayerNorm(norm) => {
                if matches!(step, Step::GroupNorm(_)) && norm.groups > 1 && self.units.is_some() {
                    let message =
                        format!("`{}`: units of several groups of a norm cannot be permuted", norm.name);
                    return Err(Error::config(message));
                }
                match &self.units {
                    Some(units) => {
                        let group = units.group.clone();
                        self.spec.norm(&group, &norm.name);
                    }
                    None => {
                        for part in ["weight", "bias", "running_mean", "running_var"] {
                            self.spec.fixed(&format!("{}.{part}", norm.name));
                        }
                    }
                }
                Ok(())
            }
            Step::Residual { body, shortcut } => self.residual(step, body, shortcut, target),
            _ => Ok(()),
        }
    }

    /// A layer that reads the present units and writes new ones.
    fn layer(&mut self, name: &str, target: Option<Target>) -> Result<()> {
        let shape = self.spec.weight(name)?.to_vec();
        let [out, inner] = [0, 1].map(|axis| shape.get(axis).copied().unwrap_or(0));
        if let Some(units) = self.units.take() {
            if units.count == 0 || !inner.is_multiple_of(units.count) {
                return Err(Error::config(format!(
                    "layer `{name}` {shape:?} does not read the {} units of `{}`",
                    units.count, units.group
                )));
            }
            self.spec.reads(&units.group, name, inner / units.count);
        }
        match target {
            Some(Target::Fixed) => {
                self.spec.fixed(&format!("{name}.bias"));
                let axes = self.spec.axes(&format!("{name}.weight"));
                if axes == 0 {
                    self.spec.fixed(&format!("{name}.weight"));
                }
            }
            Some(Target::Group(group)) => self.write(group, name, out),
            None => self.write(name.to_string(), name, out),
        }
        Ok(())
    }

    fn write(&mut self, group: String, layer: &str, count: usize) {
        self.spec.writes(&group, layer);
        self.units = Some(Units { group, count });
    }

    fn residual(
        &mut self,
        step: &Step,
        body: &[Step],
        shortcut: &[Step],
        target: Option<Target>,
    ) -> Result<()> {
        let before = self.units.clone();
        let target = match (shortcut.is_empty(), &before, target) {
            // What is added to units is a part of them.
            (true, Some(units), _) => Target::Group(units.group.clone()),
            (true, None, _) => Target::Fixed,
            (false, _, Some(target)) => target,
            (false, ..) => Target::Group(last_of_shortcut(step).unwrap_or_default()),
        };
        self.steps(body, target.clone())?;
        let after = std::mem::replace(&mut self.units, before);
        self.steps(shortcut, target)?;
        if self.units != after {
            return Err(Error::config("a branch does not write the units of the steps beside it"));
        }
        Ok(())
    }
}

/// The name of the last layer that a step's shortcut writes with, which names the group of the sum.
fn last_of_shortcut(step: &Step) -> Option<String> {
    let Step::Residual { shortcut, .. } = step else { return None };
    shortcut.iter().rev().find_map(|step| match step {
        Step::Linear(name) | Step::Conv(Conv { name, .. }) => Some(name.clone()),
        _ => None,
    })
}

/// Puts the units last, with a row for each position of an image: `[rows, units]`.
pub(in crate::merge) fn rows_of(x: &Tensor) -> Tensor {
    let units = x.shape().get(1).copied().unwrap_or(1);
    match x.shape().len() {
        4 => x.permute([0, 2, 3, 1]).reshape([x.count() / units.max(1), units]),
        3 => x.reshape([x.shape()[0] * x.shape()[1], x.shape()[2]]),
        _ => x.clone(),
    }
}

/// Rows whose activations are held at a time.
const ROWS: usize = 256;

/// Matches the units of two networks by their activations behind each nonlinearity. `on` is told how many rows are done of how many.
///
/// # Errors
/// When networks and inputs do not fit, activations are not finite, or the device fails; what `on` returns.
pub fn match_activations(
    gpu: &Gpu,
    network: &Network,
    spec: &Spec,
    [a, b]: [&dyn Weights; 2],
    inputs: &Tensor,
    similarity: Similarity,
    on: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<ActivationMatch> {
    let mut matching = ActivationMatching::new(spec, a, b, similarity)?;
    let rows = inputs.shape().first().copied().unwrap_or(0);
    let at_once = network.rows_at_once(gpu, a, inputs.shape(), false)?.min(ROWS);
    for first in (0..rows).step_by(at_once) {
        let x = inputs.slice(0, first..(first + at_once).min(rows));
        let of = |weights: &dyn Weights| activations(gpu, network, weights, &x);
        let [of_a, of_b] = [of(a)?, of(b)?];
        for ((layer, x), (_, y)) in of_a.iter().zip(&of_b) {
            if let Some(group) = group_of(spec, layer) {
                matching.add(&group.name, x, y)?;
            }
        }
        on((first + at_once).min(rows), rows)?;
    }
    matching.solve()
}

/// The value of each nonlinearity as rows, with the layer before it.
fn activations(
    gpu: &Gpu,
    network: &Network,
    weights: &dyn Weights,
    x: &Tensor,
) -> Result<Vec<(String, Tensor)>> {
    let mut all = Vec::new();
    no_grad(|| {
        network.run(gpu, weights, x, &mut |seen| {
            if let Seen::Active { name, output } = seen {
                all.push((name.to_string(), rows_of(output)));
            }
            None
        })
    })
    .map(drop)?;
    Ok(all)
}

/// The group whose units a layer or norm writes.
pub(in crate::merge) fn group_of<'a>(spec: &'a Spec, layer: &str) -> Option<&'a Group> {
    let tensor = format!("{layer}.weight");
    spec.groups.iter().find(|group| match &group.kind {
        GroupKind::Units(axes) => axes.iter().any(|axis| axis.tensor == tensor && axis.axis == 0),
        GroupKind::Heads(_) => false,
    })
}

/// Repairs a network that lies between two: its batch norms get the statistics of the data, and a network without any is rescaled
/// layer by layer ([`repair`]). `b` must be aligned.
///
/// # Errors
/// As [`repair`] and [`reset_statistics`].
pub fn repair_network(
    gpu: &Gpu,
    network: &Network,
    [a, b]: [&dyn Weights; 2],
    t: f64,
    merged: &dyn Weights,
    inputs: &Tensor,
) -> Result<BTreeMap<String, Tensor>> {
    let norms = network.batch_norms();
    if !norms.is_empty() {
        return reset_statistics(gpu, merged, &norms, &mut |weights, norm| {
            shown(gpu, network, weights, inputs, norm, false)
        });
    }
    let layers = network.layers();
    let hidden = &layers[..layers.len().saturating_sub(1)];
    let is_whole = |layer: &&&str| merged.shape(&format!("{layer}.bias")).is_ok();
    let repaired: Vec<&str> = hidden.iter().filter(is_whole).copied().collect();
    repair(gpu, [a, b], t, merged, &repaired, &mut |weights, layer| {
        shown(gpu, network, weights, inputs, layer, true)
    })
}

/// What a layer gets or gives, as rows.
pub(in crate::merge) fn shown(
    gpu: &Gpu,
    network: &Network,
    weights: &dyn Weights,
    inputs: &Tensor,
    layer: &str,
    is_output: bool,
) -> Result<Tensor> {
    // Statistics of as many rows as go through at a time, spread over all.
    let rows = inputs.shape().first().copied().unwrap_or(0);
    let at_once = network.rows_at_once(gpu, weights, inputs.shape(), false)?;
    let inputs = &spread(inputs, at_once.max(2).min(rows));
    let mut found = None;
    no_grad(|| {
        network.run(gpu, weights, inputs, &mut |seen| {
            if let Seen::Layer { name, input, output, .. } = seen
                && name == layer
            {
                found = Some(rows_of(if is_output { output } else { input }));
            }
            None
        })
    })
    .map(drop)?;
    found.ok_or_else(|| Error::config(format!("the network has no layer `{layer}`")))
}

/// So many rows of a tensor, evenly spread.
fn spread(x: &Tensor, count: usize) -> Tensor {
    let rows = x.shape().first().copied().unwrap_or(0);
    if count >= rows {
        return x.clone();
    }
    let places: Vec<u32> = (0..count).map(|i| (i * rows / count) as u32).collect();
    x.index_select(0, &Tensor::from_slice(x.gpu(), &places, [count]))
}
