//! Rows with more than one op: the cost of small ops, an optimizer's step, training steps, a network's layer, decoding.

mod adamw;
mod adds;
mod depth_batch;
mod perturb;
mod ponita;
mod train_step;

use super::Entry;
use crate::error::Result;
use crate::rng::Rng;
use crate::tensor::Tensor;

/// Returns the rows, for a CPU driver or for a GPU.
pub(super) fn entries(cpu: bool) -> Vec<Entry> {
    let mut all: Vec<Entry> = adds::entries().into();
    all.push(adamw::entry(1 << 22));
    all.push(perturb::entry(1 << 20, 4));
    all.extend(train_step::entries(cpu));
    all.extend(ponita::entries(cpu));
    all.push(depth_batch::entry());
    all
}

/// Reads a tensor's elements as f64.
fn wide(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.to_vec::<f32>()?.into_iter().map(f64::from).collect())
}

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut data = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut data);
    data
}
