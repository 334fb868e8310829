//! Models as sets of named weights: aligning and merging them.

mod weights;

pub use weights::{Checkpoint, Weights};
