//! Models as sets of named weights: aligning and merging them.

pub mod global;
pub mod methods;
pub mod pleas;
mod weights;

pub use weights::{Checkpoint, Weights};
