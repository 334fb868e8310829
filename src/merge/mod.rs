//! Models as sets of named weights: aligning and merging them.

mod activations;
mod analysis;
mod barrier;
mod builders;
mod heads;
mod many;
mod matching;
mod mlp;
mod pairing;
mod permutation;
mod plan;
#[cfg(feature = "cli")]
pub mod plot;
mod repair;
mod spec;
mod straight_through;

pub use crate::store::{Shards as Checkpoint, Weights};
pub use activations::{ActivationMatch, ActivationMatching, Similarity};
pub use analysis::singular_alignment;
pub use barrier::{Barrier, Evaluation, Interpolated, LossPath, distance};
pub use builders::{Builder, Layer, TransformerNames};
pub use many::{ManyMatching, Mean, match_many};
pub use matching::{
    GroupCosts, MatchOptions, Matching, Visit, VisitOrder, group_costs, match_weights, match_weights_with,
};
pub use mlp::Mlp;
pub use permutation::{Permutation, Permuted};
pub use repair::{Outputs, repair, reset_statistics};
pub use spec::{Axis, Group, Heads, Kind, Spec};
pub use straight_through::{MidpointLoss, StraightThrough, StraightThroughOptions, straight_through};
