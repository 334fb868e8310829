//! Aligns models: the specs of what may be permuted, the search for the permutation that brings one model nearest to another,
//! and the repair of a merged model's activations.

pub(super) mod activations;
pub(super) mod analysis;
pub(super) mod builders;
mod heads;
pub(super) mod many;
pub(super) mod matching;
pub(super) mod networks;
mod pairing;
pub(super) mod permutation;
mod plan;
pub(super) mod repair;
pub(super) mod spec;
pub(super) mod straight_through;
