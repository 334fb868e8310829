//! Recipes: a merge as a configuration says it, its methods, and the run from files to a file.

pub mod aligned;
pub mod config;
pub mod global;
pub mod job;
pub mod method;
pub mod methods;
pub mod run;
mod setting;
#[cfg(feature = "cli")]
pub mod yaml;
