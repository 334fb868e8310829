//! Models as sets of named weights: aligning and merging them.

pub use crate::store::{Shards as Checkpoint, Weights};
