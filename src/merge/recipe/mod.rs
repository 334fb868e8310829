//! Recipes: the configuration of a merge, the methods, and the run from input files to output files.

mod adapters;
pub mod aligned;
mod arguments;
mod card;
pub mod config;
mod fit;
pub mod global;
mod inputs;
pub mod job;
pub mod learn;
pub mod method;
pub mod methods;
mod model;
pub mod run;
mod setting;
mod settings;
mod table;
pub mod written;
#[cfg(feature = "yaml")]
pub mod yaml;
