//! Aligning models: what may be permuted, the permutation that brings one model nearest to another, and what is repaired after.

pub(super) mod activations;
pub(super) mod analysis;
pub(super) mod builders;
mod heads;
pub(super) mod many;
pub(super) mod matching;
mod pairing;
pub(super) mod permutation;
mod plan;
pub(super) mod repair;
pub(super) mod spec;
pub(super) mod straight_through;
