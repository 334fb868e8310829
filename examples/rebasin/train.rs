//! Trains a multilayer perceptron.

use crate::data::Set;
use crate::precision::report;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::nn::{Activation, Init, Linear};
use tiebeam::optim::{Group, LossScale, Schedule, Sgd, SgdConfig};
use tiebeam::share::Tied;
use tiebeam::{Error, Gpu, Precision, Result, Rng, Step, Tensor, autocast};

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

/// Trains a ReLU network with these sizes by SGD with momentum and a cosine schedule.
///
/// # Errors
/// When the device fails, and when `stop` is set.
pub fn train(
    gpu: &Gpu,
    set: &Set,
    sizes: &[usize],
    recipe: &Recipe,
    seed: u64,
    stop: &AtomicBool,
) -> Result<BTreeMap<String, Tensor>> {
    let mut rng = Rng::new(seed);
    let leaves = leaves(gpu, sizes, &mut rng);
    let layers: Vec<Linear> = leaves
        .chunks(2)
        .map(|pair| Linear::from_site(Arc::new(Tied::new(&pair[0].1)), Some(pair[1].1.clone())))
        .collect();
    let group = Group::new(leaves.iter().map(|(name, leaf)| (name.clone(), leaf)));
    let config = SgdConfig::default().lr(recipe.lr).momentum(MOMENTUM);
    let mut optimizer = Sgd::new(gpu, vec![group], config)?;
    let scale = LossScale::of(gpu, recipe.precision)?;
    let labels = Tensor::from_slice(gpu, &set.labels, [set.labels.len()]);
    let batches = set.labels.len() / recipe.batch;
    let total = (recipe.epochs * batches) as u64;
    let schedule = Schedule::WarmupCosine { warmup: 0, total, floor: 0.0 };
    let style = "{bar:24} {pos}/{len} steps of a network of width {msg}, about {eta} to go";
    let bar = ProgressBar::new(total).with_message(sizes[1].to_string());
    bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
    let mut order: Vec<u32> = (0..set.labels.len() as u32).collect();
    let mut recorded: Option<Step> = None;
    for step in 0..total as usize {
        if step % batches == 0 {
            rng.shuffle(&mut order);
        }
        let rows = &order[step % batches * recipe.batch..][..recipe.batch];
        let rows = Tensor::from_slice(gpu, rows, [recipe.batch]);
        let lr = schedule.lr(recipe.lr, step as u64);
        match &mut recorded {
            Some(recorded) => {
                recorded.set_lr(lr);
                recorded.run(&[&rows])?;
            }
            None => {
                let first = Step::record(gpu, &[&rows], |inputs| {
                    let loss = autocast(recipe.precision, || {
                        let mut h = set.x.index_select(0, &inputs[0]);
                        for (i, layer) in layers.iter().enumerate() {
                            let last = i + 1 == layers.len();
                            let activation = if last { Activation::None } else { Activation::Relu };
                            h = layer.forward_with(&h, activation, None);
                        }
                        h.cross_entropy(&labels.index_select(0, &inputs[0]), None)
                    });
                    optimizer.step(&scale.backward(&loss)?, lr)?;
                    Ok(vec![loss])
                })?;
                recorded = Some(first);
            }
        }
        bar.inc(1);
        let stopped = stop.load(Ordering::Relaxed);
        if step % 100 == 99 || step + 1 == total as usize || stopped {
            report(&bar, &format!("width {} seed {seed}:", sizes[1]), optimizer.watch()?)?;
        }
        if stopped {
            return Err(Error::stopped("stopped before the networks were trained"));
        }
    }
    bar.finish_and_clear();
    Ok(leaves.into_iter().map(|(name, leaf)| (name, leaf.detach())).collect())
}
