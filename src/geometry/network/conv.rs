//! The separable convolution on positions and orientations.
//!
//! `x1[n,a,c] = sum over edges e into n of k[e,a,c] h[s_e,a,c]`, then `x2[n,p,c] = 1/O sum_a f[p,a,c] x1[n,a,c]`, with
//! kernels `k = B Wk^T` and `f = F Wf^T`. All layers share the bases: `B [E,O,K]` is a small network of the invariants of
//! an edge, times the envelope, and `F [O,O,K]` is one of `o_p . o_a`.

use super::tables::{TablePlaces, Tables};
use crate::error::{Error, Result};
use crate::geometry::space::graph::Graph;
use crate::geometry::space::grid::Grid;
use crate::geometry::space::invariants;
use crate::nn::{Activation, Epilogue};
use crate::ops::points::bonds::Bonds;
pub use crate::ops::points::kernel_basis::Basis;
use crate::ops::points::kernel_basis::EdgeFeatures;
use crate::ops::product::site::Site;
use crate::share::Tied;
use crate::tensor::Tensor;

/// How the convolution is computed. The first two routes give the same numbers up to rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Route {
    /// General ops of the engine one after the other, with arrays of edges x orientations x channels. Tests compare the
    /// other routes with this one.
    Plain,
    /// Specialised kernels, whose memory does not grow with edges x orientations x channels.
    #[default]
    Fused,
    /// Tables of the kernels, made by [`crate::geometry::Ponita::tabulate`]: approximate, and for inference. A network
    /// without tables panics on this route.
    Tabulated,
}

impl Basis {
    /// Applies the network: `f [.., features] -> [.., basis]`.
    ///
    /// # Panics
    /// When the last axis of `f` does not hold the features.
    #[track_caller]
    pub fn forward(&self, f: &Tensor) -> Tensor {
        let z = linear(f, &self.w1, Some(&self.b1), Activation::Gelu, None);
        linear(&z, &self.w2, Some(&self.b2), Activation::Gelu, None)
    }
}

/// Returns `act(x W^T + b) + residual`, with a stored weight.
#[track_caller]
pub(in crate::geometry) fn linear(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Tensor {
    let site = Tied::new(w).shared();
    x.linear(&site, Epilogue { bias, activation, residual })
}

/// The settings of a [`Field`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FieldConfig {
    /// Degree of the polynomial features.
    pub degree: usize,
    /// Radius at which the envelope ends, if there is one.
    pub radius: Option<f32>,
    /// Number of layers that will use the field. A basis that only one layer uses is not kept.
    pub layers: usize,
    /// How the convolutions are computed.
    pub route: Route,
}

/// The edges of a graph and the bases of the kernels on them, which all layers of a network share.
pub struct Field {
    bonds: Bonds,
    spatial: Spatial,
    /// `[O, O, K]`. `None` without orientations.
    fiber: Option<Tensor>,
}

enum Spatial {
    /// The basis of every edge, `[E, O, K]`, times the envelope, for general ops.
    Plain(Tensor),
    /// The basis of the rows of the bonds, `[R, O, K]`, for the fused kernels. K is a multiple of 4.
    Stored(Tensor),
    /// The inputs of the basis, which is recomputed for each chunk of rows.
    Recomputed(Box<Recomputed>),
    /// The place of each edge in the kernels' tables.
    Tabulated(TablePlaces),
}

struct Recomputed {
    d: Tensor,
    envelope: Option<Tensor>,
    sight: EdgeFeatures,
    basis: Basis,
}

/// The largest basis, in bytes, that is computed once for all layers. This saves half of the arithmetic of a network of
/// many layers. A larger basis is recomputed, so that memory does not depend on the number of edges.
const STORED: usize = 16 << 20;

impl Field {
    /// Computes the bases of `graph` on `grid`.
    ///
    /// # Panics
    /// When graph and grid differ in dimension, a basis has another number of features, the grid has orientations and
    /// there is no fiber basis, or a gradient of the basis is wanted while the route uses tables.
    #[track_caller]
    pub fn new(
        graph: &Graph,
        grid: &Grid,
        basis: &Basis,
        fiber: Option<&Basis>,
        config: FieldConfig,
    ) -> Field {
        let FieldConfig { degree, radius, layers, route } = config;
        let gpu = graph.gpu();
        let bonds = match route {
            Route::Plain | Route::Tabulated => graph.single(),
            Route::Fused => graph.bonds(grid),
        };
        let d = bonds.select(&graph.vectors());
        assert!(
            graph.dimension() == grid.dimension(),
            "ponita: positions in {} dimensions, the grid in {}",
            graph.dimension(),
            grid.dimension()
        );
        let ori = grid.is_oriented().then(|| grid.tensor(gpu));
        assert!(ori.is_none() || fiber.is_some(), "ponita: orientations need a fiber basis");
        let envelope = radius.map(|radius| invariants::envelope(&invariants::norm(&d), radius));
        let fiber = ori
            .as_ref()
            .zip(fiber.filter(|_| route != Route::Tabulated))
            .map(|(ori, basis)| basis.forward(&invariants::polynomial(&invariants::fiber(ori), degree)));
        let spatial = match route {
            Route::Plain => {
                let attributes = match &ori {
                    Some(ori) => invariants::spatial(&d, ori),
                    None => invariants::distance(&d).unsqueeze(1),
                };
                let b = basis.forward(&invariants::polynomial(&attributes, degree));
                let wide = [bonds.len(), 1, 1];
                Spatial::Plain(envelope.map_or(b.clone(), |envelope| b.mul(&envelope.reshape(wide))))
            }
            Route::Fused => {
                let (sight, basis) = (EdgeFeatures { orientations: ori, degree }, basis.whole());
                let bytes = 4 * bonds.len() * grid.len() * basis.b2.count();
                match layers > 1 && bytes <= STORED {
                    true => Spatial::Stored(d.kernel_basis(envelope.as_ref(), &sight, &basis)),
                    false => Spatial::Recomputed(Box::new(Recomputed { d, envelope, sight, basis })),
                }
            }
            Route::Tabulated => Spatial::Tabulated(TablePlaces::new(&d, ori, envelope.as_ref(), basis)),
        };
        Field { bonds, spatial, fiber }
    }

    pub(in crate::geometry) fn is_fused(&self) -> bool {
        !matches!(self.spatial, Spatial::Plain(_))
    }
}

/// Pads `x` with zeros to a multiple of 4 along an axis, because kernels move whole vectors.
pub(in crate::geometry) fn whole(x: &Tensor, axis: usize) -> Tensor {
    let size = x.shape()[axis];
    match size.next_multiple_of(4) - size {
        0 => x.clone(),
        more => x.pad(axis as isize, 0, more),
    }
}

impl Basis {
    /// Pads the widths of these weights to whole vectors. The added outputs stay zero, as `gelu(0) = 0`.
    fn whole(&self) -> Basis {
        Basis {
            w1: whole(&whole(&self.w1, 0), 1),
            b1: whole(&self.b1, 0),
            w2: whole(&whole(&self.w2, 0), 1),
            b2: whole(&self.b2, 0),
        }
    }
}

/// Added to the variance in a block's norm.
const EPS: f32 = 1e-5;

/// One depthwise separable convolution.
#[derive(Clone)]
pub struct Conv {
    /// `[channels, basis]`
    pub kernel: Tensor,
    /// `[channels, basis]`. `None` without orientations.
    pub fiber_kernel: Option<Tensor>,
    /// `[channels]`
    pub bias: Tensor,
    /// The tables that replace the kernels in a network for inference.
    pub tables: Option<Tables>,
}

impl Conv {
    /// `h [N, O, C] -> [N, O, C]`
    ///
    /// # Panics
    /// When the shapes do not fit the field.
    #[track_caller]
    pub fn forward(&self, field: &Field, h: &Tensor) -> Tensor {
        self.mix(field, &self.spatial(field, h), Some(&self.bias))
    }

    /// Computes [`Conv::forward`] and the layer norm that follows it in a block, in one kernel where possible.
    #[track_caller]
    pub(in crate::geometry) fn normed(
        &self,
        field: &Field,
        h: &Tensor,
        [gain, shift]: [&Tensor; 2],
    ) -> Tensor {
        let x1 = self.spatial(field, h);
        match self.fiber_weights(field) {
            // Channels added as padding would change the norm.
            Some(kernel) if field.is_fused() && h.shape()[2].is_multiple_of(4) => {
                x1.fiber_norm(&kernel, &self.bias, [gain, shift], EPS)
            }
            _ => self.mix(field, &x1, Some(&self.bias)).layer_norm(Some(gain), Some(shift), EPS),
        }
    }

    /// Returns the fiber kernel `f [O, O, C]`, if there are orientations.
    fn fiber_weights(&self, field: &Field) -> Option<Tensor> {
        if let (Spatial::Tabulated(_), Some(kernel)) = (&field.spatial, self.table_of_fiber()) {
            return Some(kernel.clone());
        }
        let (basis, kernel) = field.fiber.as_ref().zip(self.fiber_kernel.as_ref())?;
        Some(linear(basis, kernel, None, Activation::None, None))
    }

    /// Returns the sum over neighbours, `x1 [N, O, C]`.
    ///
    /// # Panics
    /// As [`Conv::forward`].
    #[track_caller]
    pub fn spatial(&self, field: &Field, h: &Tensor) -> Tensor {
        let bonds = &field.bonds;
        let wide = || (whole(h, 2), whole(&whole(&self.kernel, 0), 1));
        let y = match &field.spatial {
            Spatial::Plain(basis) => {
                let edges = bonds.edges();
                let kernel = linear(basis, &self.kernel, None, Activation::None, None);
                let messages = h.index_select(0, edges.source_ids()).mul(&kernel);
                return messages.index_sum(0, edges.destination_ids(), edges.nodes());
            }
            Spatial::Stored(basis) => {
                let (h, kernel) = wide();
                h.edge_conv(basis, &kernel, bonds)
            }
            Spatial::Recomputed(of) => {
                let (h, kernel) = wide();
                h.spatial_conv(&of.d, of.envelope.as_ref(), &of.sight, &of.basis, &kernel, bonds)
            }
            Spatial::Tabulated(seen) => {
                let kernels = [Some(&self.kernel), self.fiber_kernel.as_ref()];
                seen.conv(&whole(h, 2), kernels, self.tables.as_ref(), bonds.edges())
            }
        };
        y.slice(2, 0..h.shape()[2])
    }

    /// Returns the mean over orientations weighted by the fiber kernel, `x2 [N, O, C]`, without the bias. Without
    /// orientations it is `x1` itself.
    ///
    /// # Panics
    /// As [`Conv::forward`].
    #[track_caller]
    pub fn fiber(&self, field: &Field, x1: &Tensor) -> Tensor {
        self.mix(field, x1, None)
    }

    #[track_caller]
    fn mix(&self, field: &Field, x1: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let with_bias = |x2: Tensor| bias.map_or(x2.clone(), |bias| x2.add(bias));
        let Some(kernel) = self.fiber_weights(field) else { return with_bias(x1.clone()) };
        if !field.is_fused() {
            let scale = 1.0 / kernel.shape()[0] as f32;
            return with_bias(x1.unsqueeze(1).mul(&kernel.unsqueeze(0)).sum(2).scale(scale));
        }
        let bias = bias.map(|bias| whole(bias, 0));
        whole(x1, 2).fiber_conv(&whole(&kernel, 2), bias.as_ref()).slice(2, 0..x1.shape()[2])
    }

    /// Scales both kernels so that `x1` and `x2` have the standard deviation of `h` on this batch, and returns the three
    /// deviations from before. Without this data-dependent initialisation, two layers of default weights all but erase a
    /// signal.
    ///
    /// # Errors
    /// When the device fails, a deviation is 0 or not finite, or the convolution uses tables.
    pub fn calibrate(&mut self, field: &Field, h: &Tensor) -> Result<[f32; 3]> {
        self.trainable("calibrate")?;
        crate::no_grad(|| {
            let x1 = self.spatial(field, h);
            let x2 = self.fiber(field, &x1);
            let deviations = [deviation(h)?, deviation(&x1)?, deviation(&x2)?];
            if deviations.iter().any(|s| !s.is_finite() || *s == 0.0) {
                let message = format!(
                    "calibrate: the standard deviations before, between and after are {deviations:?}; use a batch with \
                     more than one node and features that differ"
                );
                return Err(Error::config(message));
            }
            let [before, between, after] = deviations;
            self.kernel = self.kernel.detach().scale(before / between).contiguous().requires_grad();
            if let Some(kernel) = &mut self.fiber_kernel {
                *kernel = kernel.detach().scale(between / after).contiguous().requires_grad();
            }
            Ok(deviations)
        })
    }

    pub(in crate::geometry) fn table_of_fiber(&self) -> Option<&Tensor> {
        self.tables.as_ref()?.fiber.as_ref()
    }

    /// # Errors
    /// When the convolution uses tables.
    pub(in crate::geometry) fn trainable(&self, what: &str) -> Result<()> {
        match self.tables {
            None => Ok(()),
            Some(_) => Err(Error::config(format!(
                "{what}: this network is a copy by tables, for inference; use the one that it was made of"
            ))),
        }
    }
}

/// The standard deviation of all elements, with divisor count - 1, in f64.
fn deviation(x: &Tensor) -> Result<f32> {
    let data = x.detach().to_vec::<f32>()?;
    let n = data.len() as f64;
    let mean = data.iter().map(|&v| v as f64).sum::<f64>() / n;
    let square = data.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>();
    Ok((square / (n - 1.0)).sqrt() as f32)
}
