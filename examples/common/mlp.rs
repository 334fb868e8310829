//! Trains a multilayer perceptron.
#![allow(dead_code, reason = "each example uses what it needs")]

use crate::digits::Set;
use crate::terminal;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tiebeam::nn::{Activation, Init, Linear};
use tiebeam::optim::{Group, LossScale, Schedule, Sgd, SgdConfig};
use tiebeam::share::{Site, Tied};
use tiebeam::train::Trainer;
use tiebeam::{Error, Gpu, Precision, Result, Rng, Tensor, autocast};

/// Settings of the training, the same for all networks.
pub struct Recipe {
    pub epochs: usize,
    pub batch: usize,
    pub lr: f32,
    pub precision: Precision,
}

const MOMENTUM: f32 = 0.9;

/// Creates the named leaves of a network with these sizes, drawn uniformly within `1 / sqrt(inputs)`.
fn leaves(gpu: &Gpu, sizes: &[usize], rng: &mut Rng) -> Vec<(String, Tensor)> {
    let layer = |(i, pair): (usize, &[usize])| {
        let bound = Init::Uniform(1.0 / (pair[0] as f32).sqrt());
        let weight = (format!("fc{i}.weight"), bound.leaf(gpu, [pair[1], pair[0]], rng));
        [weight, (format!("fc{i}.bias"), bound.leaf(gpu, [pair[1]], rng))]
    };
    sizes.windows(2).enumerate().flat_map(layer).collect()
}

/// Trains a ReLU network with these sizes, from the weights `start` or new ones, by SGD with momentum and a cosine schedule.
///
/// # Errors
/// When the device fails, and when `stop` is set.
pub fn train(
    gpu: &Gpu,
    set: &Set,
    (sizes, start): (&[usize], Option<&BTreeMap<String, Tensor>>),
    recipe: &Recipe,
    seed: u64,
    stop: &Arc<AtomicBool>,
) -> Result<BTreeMap<String, Tensor>> {
    let mut rng = Rng::new(seed);
    let leaves = match start {
        None => leaves(gpu, sizes, &mut rng),
        Some(start) => start.iter().map(|(name, x)| (name.clone(), x.copy().requires_grad())).collect(),
    };
    let named = |name: String| leaves.iter().find(|(own, _)| *own == name).map(|(_, leaf)| leaf.clone());
    let layer = |i: usize| Some(Tied::new(&named(format!("fc{i}.weight"))?).shared());
    let layers: Vec<Linear> =
        (0..).map_while(|i| Some(Linear::from_site(layer(i)?, named(format!("fc{i}.bias"))))).collect();
    let group = Group::new(leaves.iter().map(|(name, leaf)| (name, leaf)));
    let config = SgdConfig::default().lr(recipe.lr).momentum(MOMENTUM);
    let batches = set.labels.len() / recipe.batch;
    let total = (recipe.epochs * batches) as u64;
    let mut trainer = Trainer::new(Sgd::new(gpu, vec![group], config)?)
        .schedule(Schedule::WarmupCosine { warmup: 0, total, floor: 0.0 })
        .scale(LossScale::of(gpu, recipe.precision)?)
        .rng(rng)
        .report_every(100)
        .stop(stop.clone());
    let style = "{bar:24} {pos}/{len} steps of a network of width {msg}, about {eta} to go";
    let bar = terminal::bar(style, 0, total).with_message(sizes[1].to_string());
    let labels = Tensor::from_slice(gpu, &set.labels, [set.labels.len()]);
    let mut order: Vec<u32> = (0..set.labels.len() as u32).collect();
    let batch = |step: u64, rng: &mut Rng| {
        let i = step as usize % batches;
        if i == 0 {
            rng.shuffle(&mut order);
        }
        Ok(vec![Tensor::from_slice(gpu, &order[i * recipe.batch..][..recipe.batch], [recipe.batch])])
    };
    let loss = |inputs: &[Tensor], _: &mut Rng| {
        Ok(autocast(recipe.precision, || {
            let mut h = set.x.index_select(0, &inputs[0]);
            for (i, layer) in layers.iter().enumerate() {
                let activation = if i + 1 == layers.len() { Activation::None } else { Activation::Relu };
                h = layer.forward_with(&h, activation, None);
            }
            h.cross_entropy(&labels.index_select(0, &inputs[0]), None)
        }))
    };
    let done = trainer.train_recorded(total, batch, loss, |report| {
        terminal::events(&bar, &format!("width {} seed {seed}:", sizes[1]), report);
        bar.set_position(report.step);
        Ok(())
    })?;
    if !done {
        return Err(Error::stopped("stopped before the networks were trained"));
    }
    bar.finish_and_clear();
    Ok(leaves.into_iter().map(|(name, leaf)| (name, leaf.detach())).collect())
}
