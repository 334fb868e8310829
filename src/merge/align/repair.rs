//! Repairs the activations of averaged models. Averaging lowers their variance, and norms keep statistics of other weights.

use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::store::Weights;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::collections::BTreeMap;

/// A closure that runs a model on the data and returns the outputs `[rows, units]` of the layer with this name, before its
/// nonlinearity. Each position of a convolution is a row.
pub type Outputs<'a> = dyn FnMut(&dyn Weights, &str) -> Result<Tensor> + 'a;

/// Mean and variance of each unit.
struct Statistics {
    rows: usize,
    mean: Tensor,
    variance: Tensor,
}

fn statistics(x: &Tensor, layer: &str) -> Result<Statistics> {
    let &[rows, units] = &x.shape()[..] else {
        return Err(Error::config(format!(
            "outputs of `{layer}` are {}; give rows [rows, units]",
            x.shape()
        )));
    };
    if rows < 2 || units == 0 {
        return Err(Error::config(format!(
            "outputs of `{layer}` are {}; statistics need two rows",
            x.shape()
        )));
    }
    no_grad(|| {
        let x = x.detach().cast(crate::DType::F32);
        let mean = x.mean(0);
        let variance = x.sub(&mean).square().mean(0);
        Ok(Statistics { rows, mean, variance })
    })
}

/// Rescales layers of an interpolated model so that each unit's mean and deviation before the nonlinearity are the interpolated
/// ones of the two ends:
///
/// ```text
/// W *= s, bias = (bias - mean) s + mean',  s = deviation' / deviation
/// mean' = (1 - t) mean_a + t mean_b,  deviation' = (1 - t) deviation_a + t deviation_b
/// ```
///
/// Layers are repaired in the order of `layers` (names without `.weight` and `.bias`). `outputs` is called again for each,
/// because a repaired layer changes the inputs of later ones. `b` must already be permuted. Source: Jordan et al. 2022, "REPAIR:
/// REnormalizing Permuted Activations for Interpolation Repair", arXiv 2211.08403.
///
/// # Errors
/// When a layer has no weight or bias or its outputs are not `[rows, units]`, and the errors of `outputs`.
pub fn repair(
    gpu: &Gpu,
    [a, b]: [&dyn Weights; 2],
    t: f64,
    merged: &dyn Weights,
    layers: &[&str],
    outputs: &mut Outputs,
) -> Result<BTreeMap<String, Tensor>> {
    let mut weights = merged.read_all(gpu)?;
    for layer in layers {
        let now = statistics(&outputs(&weights, layer)?, layer)?;
        let [a, b] = [statistics(&outputs(a, layer)?, layer)?, statistics(&outputs(b, layer)?, layer)?];
        let names = ["weight", "bias"].map(|part| format!("{layer}.{part}"));
        let [Some(weight), Some(bias)] = names.each_ref().map(|name| weights.get(name)) else {
            return Err(Error::config(format!("repair: `{layer}` needs `{}` and `{}`", names[0], names[1])));
        };
        if weight.shape().first() != Some(&now.mean.count()) || bias.count() != now.mean.count() {
            return Err(Error::config(format!(
                "repair: outputs of `{layer}` have {} units, its weight is {}",
                now.mean.count(),
                weight.shape()
            )));
        }
        let (weight, bias) = no_grad(|| {
            let blend = |a: &Tensor, b: &Tensor| a.scale((1.0 - t) as f32).add(&b.scale(t as f32));
            let deviation = blend(&a.variance.sqrt(), &b.variance.sqrt());
            let own = now.variance.sqrt();
            // A constant unit has no deviation to rescale.
            let still = own.eq(&Tensor::zeros(gpu, [1]));
            let scale = Tensor::ones(gpu, [1]).where_mask(&still, &deviation.div(&own));
            let rest: usize = weight.shape()[1..].iter().product();
            let rows = weight.reshape([own.count(), rest]).mul(&scale.unsqueeze(1));
            let bias = bias.sub(&now.mean).mul(&scale).add(&blend(&a.mean, &b.mean));
            (rows.reshape(*weight.shape()), bias)
        });
        weight.evaluate();
        bias.evaluate();
        let [weight_name, bias_name] = names;
        weights.insert(weight_name, weight);
        weights.insert(bias_name, bias);
    }
    Ok(weights)
}

/// Sets the running mean and variance of batch norms to those of the data, norm by norm. The variance is the unbiased one
/// (`n / (n - 1)`), as PyTorch keeps it.
///
/// `inputs` returns the inputs of a norm, `[rows, channels]`. It is called again for each norm, because a norm that is reset
/// changes the inputs of later ones. Without this, a merged network with batch norm normalises by statistics of other weights, and
/// its outputs are useless.
///
/// # Errors
/// When a norm has no running statistics or its inputs are not `[rows, channels]`, and the errors of `inputs`.
pub fn reset_statistics(
    gpu: &Gpu,
    merged: &dyn Weights,
    norms: &[&str],
    inputs: &mut Outputs,
) -> Result<BTreeMap<String, Tensor>> {
    let mut weights = merged.read_all(gpu)?;
    for norm in norms {
        let now = statistics(&inputs(&weights, norm)?, norm)?;
        let unbiased = now.rows as f32 / (now.rows - 1) as f32;
        let values =
            [("running_mean", now.mean.clone()), ("running_var", no_grad(|| now.variance.scale(unbiased)))];
        for (part, value) in values {
            let name = format!("{norm}.{part}");
            match weights.get(&name) {
                Some(old) if old.shape() == value.shape() => {}
                Some(old) => {
                    let message =
                        format!("`{name}` is {}, inputs of the norm give {}", old.shape(), value.shape());
                    return Err(Error::config(message));
                }
                None => return Err(Error::config(format!("reset: the model has no `{name}`"))),
            }
            value.evaluate();
            weights.insert(name, value);
        }
    }
    Ok(weights)
}
