//! Point clouds in space: networks on positions and orientations that are equivariant under rigid motions.
//!
//! [`Ponita`] shares one kernel over all pairs of points that a motion maps onto each other: the kernel is a function of a few
//! [`invariants`] of the pair, with no spherical harmonics. Orientations are sampled on a [`Grid`]; a [`Graph`] says which
//! points see each other.

mod calculator;
mod config;
mod conv;
pub mod dynamics;
pub mod elements;
mod forces;
mod graph;
mod grid;
mod import;
pub mod invariants;
pub mod nbody;
mod neighbours;
mod ponita;
mod potential;
mod tables;
pub mod vectors;
pub mod xyz;

pub use crate::ops::bonds::Bonds;
pub use crate::ops::edges::Edges;
pub use calculator::{Calculator, Properties};
pub use config::PonitaConfig;
pub use conv::{Basis, Conv, Field, FieldConfig, Route};
pub use forces::EnergyForces;
pub use graph::Graph;
pub use grid::Grid;
pub use neighbours::{Cell, Clouds};
pub use ponita::{Layer, Ponita, PonitaInput, PonitaOutput};
pub use potential::{Atoms, Batch, Potential, PotentialLoss};
pub use tables::Tables;
