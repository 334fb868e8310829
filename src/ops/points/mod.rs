//! Point clouds: edges between points, kernels on positions and orientations, convolutions over edges and fibers.

pub mod bonds;
pub mod edges;
pub mod fiber_conv;
pub mod fiber_norm;
pub mod kernel_basis;
pub mod mlp;
pub mod neighbours;
pub mod spatial_conv;
pub mod table_conv;

crate::ops::listed!(edges, neighbours, kernel_basis, mlp, spatial_conv, table_conv, fiber_conv, fiber_norm);
