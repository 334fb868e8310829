//! Systems built on the engine: models, point clouds and atoms, matching and merging, the benchmark and its command.

mod adapters;
mod bench;
mod functional;
mod geometry;
mod llama;
mod lm;
mod matching;
mod merge;
mod merge_adapters;
mod merge_cards;
mod merge_data;
mod merge_ends;
mod merge_errors;
mod merge_found;
mod merge_learned;
mod merge_limits;
mod merge_networks;
mod merge_vocab;
mod merges;
mod potential;
mod published;
mod ranks;
#[path = "../support/mod.rs"]
mod support;
mod tables;
mod text;
mod xyz;
