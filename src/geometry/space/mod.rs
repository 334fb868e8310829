//! Space: vectors, orientations, points and which of them see each other, what of a pair no motion changes.

pub(super) mod graph;
pub(super) mod grid;
pub mod invariants;
pub(super) mod neighbours;
pub mod vectors;
