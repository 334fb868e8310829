//! Models as sets of named weights: aligning and merging them.

mod align;
mod evaluation;
mod recipe;
mod research;

pub use crate::store::{Shards, Weights};
pub use align::activations::{ActivationMatch, ActivationMatching, Similarity};
pub use align::analysis::singular_alignment;
pub use align::builders::{Builder, LayerNames, TransformerNames};
pub use align::many::{ManyMatching, Mean, match_many};
pub use align::matching::{
    GroupCosts, MatchOptions, Matching, Visit, VisitOrder, group_costs, match_weights, match_weights_with,
};
pub use align::networks::{match_activations, repair_network};
pub use align::permutation::{Permutation, Permuted};
pub use align::repair::{Outputs, repair, reset_statistics};
pub use align::spec::{Axis, Group, GroupKind, Heads, Spec};
pub use align::straight_through::{MidpointLoss, StraightThrough, StraightThroughOptions, straight_through};
pub use evaluation::architecture::Architecture;
pub use evaluation::barrier::{Barrier, Evaluation, Interpolated, LossPath, distance};
pub use evaluation::evaluate;
#[cfg(feature = "plot")]
pub use evaluation::plot;
#[cfg(feature = "yaml")]
pub use recipe::yaml;
pub use recipe::{
    aligned, config, config::MergeConfig, global, job, job::Job, learn as learning, method, methods, run,
    written,
};
pub use research::store::{REVERSIBLE, ReversibleModels};
pub use research::{
    cma, extract, fisher, learn, learned, map, pareto, partial, pleas, reversible, signature,
};
