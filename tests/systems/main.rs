//! Systems built on the engine: models, point clouds and atoms, matching and merging, the benchmark and its command.

#[cfg(feature = "cli")]
mod bench;
mod geometry;
mod llama;
mod matching;
#[cfg(feature = "cli")]
mod merge;
#[cfg(feature = "cli")]
mod merge_errors;
#[cfg(feature = "cli")]
mod merge_learned;
#[cfg(feature = "cli")]
mod merges;
mod potential;
#[path = "../support/mod.rs"]
mod support;
mod tables;
