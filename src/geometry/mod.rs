//! Point clouds in space: networks on positions and orientations that are equivariant under rigid motions.
//!
//! [`Ponita`] shares one kernel over all pairs of points that a motion maps onto each other: the kernel is a function of
//! a few [`invariants`] of the pair, without spherical harmonics. Orientations are sampled on a [`Grid`]. A [`Graph`]
//! lists the pairs of points that exchange messages.

mod atoms;
mod network;
mod space;

pub use crate::ops::points::bonds::Bonds;
pub use crate::ops::points::edges::Edges;
pub use atoms::calculator::{Calculator, Nearest, Properties};
pub use atoms::forces::EnergyForces;
pub use atoms::potential::{Atoms, Batch, Potential, PotentialLoss};
pub use atoms::{dynamics, elements, nbody, xyz};
pub use network::config::PonitaConfig;
pub use network::conv::{Basis, Conv, Field, FieldConfig, Route};
pub use network::ponita::{Ponita, PonitaInput, PonitaLayer, PonitaOutput};
pub use network::tables::Tables;
pub use space::graph::Graph;
pub use space::grid::Grid;
pub use space::neighbours::{Cell, Clouds};
pub use space::{invariants, vectors};
