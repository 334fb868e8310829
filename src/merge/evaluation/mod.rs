//! Evaluates models: losses on data, and along the segment between two models.

pub(super) mod barrier;
pub mod evaluate;
pub(super) mod mlp;
#[cfg(feature = "plot")]
pub mod plot;
