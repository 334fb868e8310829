//! Models as sets of named weights: aligning and merging them.

mod activations;
pub mod align;
mod analysis;
mod barrier;
mod builders;
pub mod config;
pub mod evaluate;
pub mod global;
mod heads;
pub mod job;
pub mod learned;
mod many;
mod matching;
pub mod method;
pub mod methods;
mod mlp;
mod pairing;
pub mod pareto;
mod permutation;
mod plan;
pub mod pleas;
#[cfg(feature = "cli")]
pub mod plot;
mod repair;
pub mod reversible;
pub mod run;
pub mod signature;
mod spec;
mod straight_through;
#[cfg(feature = "cli")]
pub mod yaml;

pub use crate::store::{Shards, Weights};
pub use activations::{ActivationMatch, ActivationMatching, Similarity};
pub use analysis::singular_alignment;
pub use barrier::{Barrier, Evaluation, Interpolated, LossPath, distance};
pub use builders::{Builder, Layer, TransformerNames};
pub use config::Config;
pub use job::Job;
pub use many::{ManyMatching, Mean, match_many};
pub use matching::{
    GroupCosts, MatchOptions, Matching, Visit, VisitOrder, group_costs, match_weights, match_weights_with,
};
pub use mlp::Mlp;
pub use permutation::{Permutation, Permuted};
pub use repair::{Outputs, repair, reset_statistics};
pub use spec::{Axis, Group, Heads, Kind, Spec};
pub use straight_through::{MidpointLoss, StraightThrough, StraightThroughOptions, straight_through};
