//! Recipes: the configuration of a merge, the methods, and the run from input files to output files.

mod adapters;
pub mod aligned;
mod arguments;
mod card;
mod choice;
pub mod config;
mod fit;
pub mod global;
mod heads;
mod inputs;
pub mod job;
pub mod learn;
pub mod method;
pub mod methods;
mod model;
mod node;
mod rows;
pub mod run;
mod setting;
mod settings;
mod table;
mod tables;
mod tokenizer;
mod tokens;
mod vocabulary;
pub mod written;
#[cfg(feature = "yaml")]
pub mod yaml;
