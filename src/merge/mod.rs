//! Models as sets of named weights: aligning and merging them.

pub mod config;
pub mod evaluate;
pub mod global;
pub mod job;
pub mod method;
pub mod methods;
pub mod pleas;
pub mod run;
mod weights;
#[cfg(feature = "cli")]
pub mod yaml;

pub use config::Config;
pub use job::Job;
pub use weights::{Checkpoint, Weights};
