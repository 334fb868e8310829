//! Evaluates models: scores on tasks, and losses along the segment between two models.

pub(super) mod architecture;
pub(super) mod barrier;
pub mod evaluate;
#[cfg(feature = "plot")]
pub mod plot;
