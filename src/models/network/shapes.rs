//! The sizes of a network's steps, checked before anything is computed.

use super::{Conv, Network, NormStep, Pool, ROWS, Step};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::store::Weights;

impl Network {
    /// The shape in which inputs of this shape are read: as `input` says, as one row if the first step is linear, or as images of one
    /// channel if they have no axis for channels.
    pub(super) fn placed_shape(&self, x: &[usize]) -> Vec<usize> {
        let rows = x.first().copied().unwrap_or(0);
        let behind: usize = x.iter().skip(1).product();
        match (&self.input, self.steps.first()) {
            (Some(input), _) if input.iter().product::<usize>() == behind => [&[rows], &input[..]].concat(),
            (None, Some(Step::Linear(_))) if x.len() > 2 => vec![rows, behind],
            (None, Some(Step::Conv(_))) if x.len() == 3 => vec![rows, 1, x[1], x[2]],
            _ => x.to_vec(),
        }
    }

    /// The shape of the logits for inputs of this shape.
    ///
    /// # Errors
    /// When a tensor is missing, or has other sizes than a step asks for; the message names the step.
    pub fn output(&self, weights: &dyn Weights, input: &[usize]) -> Result<Vec<usize>> {
        walk(&self.steps, weights, self.placed_shape(input))
    }

    /// How many rows can be computed at a time without a tensor that is too large for the device. `patches` is whether the windows of
    /// convolutions are held as rows too.
    ///
    /// # Errors
    /// As [`Network::output`].
    pub fn rows_at_once(
        &self,
        gpu: &Gpu,
        weights: &dyn Weights,
        input: &[usize],
        patches: bool,
    ) -> Result<usize> {
        let mut one = input.to_vec();
        if let Some(rows) = one.first_mut() {
            *rows = 1;
        }
        let mut most = one.iter().product::<usize>().max(1);
        let mut seen = |step: &Step, x: &[usize], y: &[usize]| {
            most = most.max(y.iter().product());
            if let (Step::Conv(conv), true) = (step, patches) {
                let window: usize = weights
                    .shape(&format!("{}.weight", conv.name))
                    .map_or(1, |shape| shape.iter().skip(2).product());
                let positions: usize = y.iter().skip(2).product();
                most = most.max(x.get(1).copied().unwrap_or(1) * window * positions);
            }
        };
        walk_seen(&self.steps, weights, self.placed_shape(&one), &mut seen)?;
        // Half of the largest binding, because a result is read beside its operands.
        let room = (gpu.adapter().max_binding / 8) as usize;
        Ok((room / most).clamp(1, ROWS))
    }

    /// Checks that the network reads inputs of this shape, and that the labels are among its outputs.
    ///
    /// # Errors
    /// As [`Network::output`], and when the outputs are not `[rows, classes]` with a class for each label.
    pub fn check(&self, weights: &dyn Weights, input: &[usize], labels: &[u32]) -> Result<()> {
        let output = self.output(weights, input)?;
        let &[_, classes] = &output[..] else {
            return Err(Error::config(format!("the network gives {output:?}; [rows, classes] is needed")));
        };
        match labels.iter().position(|&label| label as usize >= classes) {
            Some(row) => Err(Error::config(format!(
                "label {} of row {row} is none of the network's {classes}",
                labels[row]
            ))),
            None => Ok(()),
        }
    }
}

/// Is shown each step with the shapes of what it gets and gives.
type Shapes<'a> = dyn FnMut(&Step, &[usize], &[usize]) + 'a;

fn walk(steps: &[Step], weights: &dyn Weights, x: Vec<usize>) -> Result<Vec<usize>> {
    walk_seen(steps, weights, x, &mut |_, _, _| ())
}

fn walk_seen(steps: &[Step], weights: &dyn Weights, x: Vec<usize>, seen: &mut Shapes) -> Result<Vec<usize>> {
    steps.iter().try_fold(x, |x, step| {
        let y = step.output(weights, x.clone(), seen)?;
        seen(step, &x, &y);
        Ok(y)
    })
}

impl Step {
    fn output(&self, weights: &dyn Weights, x: Vec<usize>, seen: &mut Shapes) -> Result<Vec<usize>> {
        match self {
            Step::Linear(name) => linear(name, weights, x),
            Step::Conv(conv) => conv.output(weights, x),
            Step::BatchNorm(norm) => {
                let parts = ["weight", "bias", "running_mean", "running_var"];
                norm.output(weights, x, 1, &parts)
            }
            Step::GroupNorm(norm) => {
                let channels = x.get(1).copied().unwrap_or(0);
                match norm.groups > 0 && channels.is_multiple_of(norm.groups) {
                    true => norm.output(weights, x, 1, &["weight", "bias"]),
                    false => Err(Error::config(format!(
                        "`{}`: {} groups do not divide {channels} channels",
                        norm.name, norm.groups
                    ))),
                }
            }
            Step::LayerNorm(norm) => {
                let last = x.len().saturating_sub(1);
                norm.output(weights, x, last, &["weight", "bias"])
            }
            Step::Relu | Step::Gelu => Ok(x),
            Step::MaxPool(pool) | Step::AvgPool(pool) => pool.output(x),
            Step::GlobalPool => match x[..] {
                [rows, channels, _, ..] => Ok(vec![rows, channels]),
                _ => Err(Error::config(format!("a global pool reads [rows, channels, ..], not {x:?}"))),
            },
            Step::Flatten => Ok(vec![x.first().copied().unwrap_or(0), x.iter().skip(1).product()]),
            Step::Residual { body, shortcut } => {
                let a = walk_seen(body, weights, x.clone(), seen)?;
                let b = walk_seen(shortcut, weights, x, seen)?;
                match a == b {
                    true => Ok(a),
                    false => {
                        Err(Error::config(format!("a branch gives {a:?}, and the steps beside it {b:?}")))
                    }
                }
            }
        }
    }
}

/// The shape of a tensor of a layer.
fn shape(weights: &dyn Weights, name: &str, part: &str) -> Result<Vec<usize>> {
    weights.shape(&format!("{name}.{part}"))
}

/// Checks the bias that a layer may have.
fn bias(weights: &dyn Weights, name: &str, out: usize) -> Result<()> {
    match shape(weights, name, "bias") {
        Ok(bias) if bias != [out] => {
            Err(Error::config(format!("`{name}.bias` is {bias:?}, for {out} rows of `{name}.weight`")))
        }
        _ => Ok(()),
    }
}

fn linear(name: &str, weights: &dyn Weights, mut x: Vec<usize>) -> Result<Vec<usize>> {
    let weight = shape(weights, name, "weight")?;
    let last = x.last().copied().filter(|_| x.len() > 1);
    let &[out, inner] = &weight[..] else {
        return Err(Error::config(format!("`{name}.weight` is {weight:?}; a linear layer has [out, in]")));
    };
    if last != Some(inner) {
        return Err(Error::config(format!("`{name}` reads {inner} inputs, and gets {x:?}")));
    }
    bias(weights, name, out)?;
    *x.last_mut().expect("there are two axes") = out;
    Ok(x)
}

impl Conv {
    fn output(&self, weights: &dyn Weights, x: Vec<usize>) -> Result<Vec<usize>> {
        let Conv { name, stride, padding, groups } = self;
        let weight = shape(weights, name, "weight")?;
        let (&[out, inner, high, wide], &[rows, channels, height, width]) = (&weight[..], &x[..]) else {
            return Err(Error::config(format!(
                "`{name}.weight` {weight:?} reads images [rows, channels, height, width], and gets {x:?}"
            )));
        };
        if *groups == 0 || *stride == 0 || channels != inner * groups || !out.is_multiple_of(*groups) {
            return Err(Error::config(format!(
                "`{name}`: {groups} groups of {inner} channels to {out}, stride {stride}, on {channels} channels"
            )));
        }
        bias(weights, name, out)?;
        let windows = [(height, high), (width, wide)].map(|(n, k)| windows(n, k, *stride, *padding));
        match windows {
            [Some(height), Some(width)] => Ok(vec![rows, out, height, width]),
            _ => Err(Error::config(format!("`{name}`: windows of {high} x {wide} on {height} x {width}"))),
        }
    }
}

/// Number of windows of `k` elements on `n`.
fn windows(n: usize, k: usize, stride: usize, padding: usize) -> Option<usize> {
    (n + 2 * padding).checked_sub(k).filter(|_| k > 0 && stride > 0).map(|rest| rest / stride + 1)
}

impl Pool {
    fn output(&self, x: Vec<usize>) -> Result<Vec<usize>> {
        let one = |n: usize| windows(n, self.size, self.stride(), self.padding);
        match x[..] {
            [rows, channels, height, width] if 2 * self.padding <= self.size => {
                one(height).zip(one(width)).map(|(height, width)| vec![rows, channels, height, width])
            }
            _ => None,
        }
        .ok_or_else(|| Error::config(format!("a pool of windows of {} does not fit {x:?}", self.size)))
    }
}

impl NormStep {
    fn output(
        &self,
        weights: &dyn Weights,
        x: Vec<usize>,
        axis: usize,
        parts: &[&str],
    ) -> Result<Vec<usize>> {
        let width = x.get(axis).copied().filter(|_| x.len() > 1);
        for part in parts {
            let found = shape(weights, &self.name, part)?;
            if width.is_none_or(|width| found != [width]) {
                return Err(Error::config(format!("`{}.{part}` is {found:?}, on {x:?}", self.name)));
            }
        }
        Ok(x)
    }
}
