//! Training the gates of FoldGPT, which tell what each block is worth.

use super::data::Data;
use crate::error::{Error, Result};
use crate::models::foldgpt::Gated;
use crate::models::lm::Lm;
use crate::nn::Module;
use crate::optim::{AdamW, AdamWConfig, Group};
use crate::rng::Rng;
use crate::train::{Report, Trainer};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Trains a gate for each block of a model, whose weights rest, on `steps` batches of one window: cross-entropy plus a
/// [penalty](Gated::penalty) that drives the gates to 0 or 1 with `removed` of them near 0. Returns the gates.
///
/// # Errors
/// [`Error::Config`] when no block would remain or the text is too short; [`Error::Stopped`] if the flag was set; what `on` returns; when the
/// device fails.
pub fn train_gates(
    model: &Lm,
    data: &dyn Data,
    (steps, removed): (u64, usize),
    stop: &Arc<AtomicBool>,
    on: &mut dyn FnMut(&Report) -> Result<()>,
) -> Result<Vec<f32>> {
    let depth = model.blocks.len();
    if removed >= depth {
        return Err(Error::config(format!("{removed} of {depth} blocks are to be removed; one must remain")));
    }
    data.check(&model.config)?;
    let mut resting = model.clone();
    resting.freeze(|_| true);
    let gated = Gated::new(resting);
    let (gpu, keep) = (model.gpu(), (depth - removed) as f32 / depth as f32);
    let named = gated.gates.iter().enumerate().map(|(i, gate)| (format!("gates.{i}"), gate.clone()));
    let group = Group::new(named.collect::<Vec<_>>());
    let optimizer = AdamW::new(gpu, vec![group], AdamWConfig::default().lr(RATE))?;
    let mut trainer = Trainer::new(optimizer).rng(Rng::new(1)).stop(stop.clone());
    let loss = |step, rng: &mut Rng| {
        let [tokens, targets] = data.batch(gpu, [1, model.config.context], step, rng);
        let loss = gated.forward(&tokens).cross_entropy(&targets, None);
        Ok(loss.add(&gated.penalty(POLARISATION, 1.0, keep)))
    };
    if !trainer.train(steps, loss, on)? {
        return Err(Error::stopped("stopped; nothing was written"));
    }
    gated.gates.iter().map(|gate| gate.clamp(0.0, 1.0).item()).collect()
}

/// Gates move from 1 to 0 within some 50 steps at this rate.
const RATE: f32 = 0.02;
/// The weight of the polarisation beside a loss of some nats.
const POLARISATION: f32 = 0.5;
