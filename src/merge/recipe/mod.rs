//! Recipes: the configuration of a merge, the methods, and the run from input files to output files.

pub mod aligned;
pub mod config;
mod fit;
pub mod global;
mod inputs;
pub mod job;
pub mod method;
pub mod methods;
pub mod run;
mod setting;
mod settings;
#[cfg(feature = "yaml")]
pub mod yaml;
