//! Space: vectors, orientations, points, their neighbours, and invariants of pairs of points.

pub(super) mod graph;
pub(super) mod grid;
pub mod invariants;
pub(super) mod neighbours;
pub mod vectors;
