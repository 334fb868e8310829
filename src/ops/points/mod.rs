//! Point clouds: edges between points, kernels on positions and orientations, convolutions over edges and fibers. Sizes are `N` nodes,
//! `E` edges, `O` orientations, `C` channels. The layers over them are in [`geometry`](crate::geometry).
//!
//! | what | formula | |
//! |---|---|---|
//! | edges and rows of kernels | | [`edges::Edges`], [`bonds::Bonds`] |
//! | differences along edges | `d[e] = x[source] - x[destination]` | [`edge_vectors`](crate::Tensor::edge_vectors) |
//! | invariants of edges, and their products | | [`edge_features`](crate::Tensor::edge_features) |
//! | basis functions of kernels | `envelope gelu(gelu(f w1^T + b1) w2^T + b2)` | [`kernel_basis`](crate::Tensor::kernel_basis) |
//! | convolution over edges | `y[n,a,c] = sum over e into n of k[e,a,c] h[s_e,a,c]` | [`edge_conv`](crate::Tensor::edge_conv), [`spatial_conv`](crate::Tensor::spatial_conv), [`table_conv`](crate::Tensor::table_conv) |
//! | convolution over orientations | `y[n,p,c] = 1/O sum_a kernel[p,a,c] x[n,a,c]` | [`fiber_conv`](crate::Tensor::fiber_conv), [`fiber_norm`](crate::Tensor::fiber_norm) |
//! | two layers at each point | `gelu(x w1^T + b1) w2^T + b2` | [`mlp`](crate::Tensor::mlp) |
//!
//! ```
//! # use tiebeam::{Gpu, Tensor};
//! # let gpu = Gpu::open()?;
//! use tiebeam::geometry::Edges;
//! let edges = Edges::new(&gpu, 2, &[0, 1], &[1, 0])?; // 0 -> 1 and 1 -> 0
//! let x = Tensor::from_slice(&gpu, &[0f32, 0.0, 3.0, 4.0], [2, 2]);
//! let length = x.edge_vectors(&edges).norm(1); // the distance, seen from both ends
//! assert!(length.sub(&Tensor::scalar(&gpu, 5.0)).abs().max(0).item()? < 1e-5);
//! # Ok::<(), tiebeam::Error>(())
//! ```

pub mod bonds;
pub mod edges;
mod fiber_conv;
mod fiber_norm;
pub mod kernel_basis;
mod mlp;
pub(crate) mod neighbours;
mod spatial_conv;
pub mod table_conv;

crate::ops::listed!(edges, neighbours, kernel_basis, mlp, spatial_conv, table_conv, fiber_conv, fiber_norm);
