//! The separable convolution on positions and orientations.
//!
//! `x1[n,a,c] = sum over edges e into n of k[e,a,c] h[s_e,a,c]`, then `x2[n,p,c] = 1/O sum_a f[p,a,c] x1[n,a,c]`, with
//! kernels `k = B Wk^T` and `f = F Wf^T` from bases that all layers share: `B [E,O,K]` is a small network of the invariants of
//! an edge, times the window; `F [O,O,K]` one of `o_p . o_a`.

use super::graph::Graph;
use super::grid::Grid;
use super::invariants;
use crate::nn::{Activation, Epilogue};
use crate::ops::edges::Edges;
use crate::ops::site::Site;
use crate::share::Tied;
use crate::tensor::Tensor;
use std::sync::Arc;

/// How the convolution is computed. Both give the same numbers up to rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Route {
    /// Ops of the engine one after the other, with arrays of edges x orientations x channels: the oracle.
    Plain,
    /// Kernels of their own, whose memory does not grow with edges x orientations x channels.
    #[default]
    Fused,
}

/// `gelu(gelu(f W1^T + b1) W2^T + b2)`: the functions that kernels are combinations of.
#[derive(Clone)]
pub struct Basis {
    /// `[hidden, features]`
    pub w1: Tensor,
    /// `[hidden]`
    pub b1: Tensor,
    /// `[basis, hidden]`
    pub w2: Tensor,
    /// `[basis]`
    pub b2: Tensor,
}

impl Basis {
    /// `f [.., features] -> [.., basis]`
    ///
    /// # Panics
    /// When the last axis is not the features.
    #[track_caller]
    pub fn forward(&self, f: &Tensor) -> Tensor {
        let z = linear(f, &self.w1, Some(&self.b1), Activation::Gelu, None);
        linear(&z, &self.w2, Some(&self.b2), Activation::Gelu, None)
    }
}

/// `act(x W^T + b) + residual`, with a stored weight.
#[track_caller]
pub(super) fn linear(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Tensor {
    let site: Arc<dyn Site> = Arc::new(Tied::new(w));
    x.linear(&site, Epilogue { bias, activation, residual })
}

/// What all layers of a network see of a graph: edges, and the bases of the kernels on them.
pub struct Field {
    edges: Edges,
    spatial: Spatial,
    /// `[O, O, K]`; none without orientations.
    fiber: Option<Tensor>,
}

enum Spatial {
    /// `[E, O, K]`, with the window.
    Stored(Tensor),
}

impl Field {
    /// The bases of `graph` on `grid`: `degree` of the polynomial features, `radius` of the window if there is one.
    ///
    /// # Panics
    /// When the graph's dimension is not the grid's, or a basis has another number of features; when the grid has orientations
    /// and there is no fiber basis.
    #[track_caller]
    pub fn new(
        graph: &Graph,
        grid: &Grid,
        basis: &Basis,
        fiber: Option<&Basis>,
        degree: usize,
        radius: Option<f32>,
        _route: Route,
    ) -> Field {
        let (gpu, d) = (graph.gpu(), graph.vectors());
        assert!(
            graph.dimension() == grid.dimension(),
            "ponita: positions in {} dimensions, the grid in {}",
            graph.dimension(),
            grid.dimension()
        );
        let ori = grid.is_oriented().then(|| grid.tensor(gpu));
        assert!(ori.is_none() || fiber.is_some(), "ponita: orientations need a fiber basis");
        let attributes = match &ori {
            Some(ori) => invariants::spatial(&d, ori),
            None => invariants::distance(&d).unsqueeze(1),
        };
        let b = basis.forward(&invariants::polynomial(&attributes, degree));
        let b = match radius {
            Some(radius) => {
                b.mul(&invariants::window(&invariants::norm(&d), radius).reshape([graph.edges.len(), 1, 1]))
            }
            None => b,
        };
        let fiber = ori
            .zip(fiber)
            .map(|(ori, basis)| basis.forward(&invariants::polynomial(&invariants::fiber(&ori), degree)));
        Field { edges: graph.edges.clone(), spatial: Spatial::Stored(b), fiber }
    }
}

/// One depthwise separable convolution.
#[derive(Clone)]
pub struct Conv {
    /// `[channels, basis]`
    pub kernel: Tensor,
    /// `[channels, basis]`; none without orientations.
    pub fiber_kernel: Option<Tensor>,
    /// `[channels]`
    pub bias: Tensor,
}

impl Conv {
    /// `h [N, O, C] -> [N, O, C]`
    ///
    /// # Panics
    /// When the shapes do not fit the field.
    #[track_caller]
    pub fn forward(&self, field: &Field, h: &Tensor) -> Tensor {
        self.fiber(field, &self.spatial(field, h)).add(&self.bias)
    }

    /// The sum over neighbours, `x1 [N, O, C]`.
    ///
    /// # Panics
    /// As [`Conv::forward`].
    #[track_caller]
    pub fn spatial(&self, field: &Field, h: &Tensor) -> Tensor {
        let edges = &field.edges;
        let Spatial::Stored(basis) = &field.spatial;
        let kernel = linear(basis, &self.kernel, None, Activation::None, None);
        let messages = h.index_select(0, edges.source_ids()).mul(&kernel);
        messages.index_sum(0, edges.destination_ids(), edges.nodes())
    }

    /// The mean over orientations with the fiber kernel, `x2 [N, O, C]`, before the bias; `x1` itself without orientations.
    ///
    /// # Panics
    /// As [`Conv::forward`].
    #[track_caller]
    pub fn fiber(&self, field: &Field, x1: &Tensor) -> Tensor {
        let (Some(basis), Some(kernel)) = (&field.fiber, &self.fiber_kernel) else { return x1.clone() };
        let kernel = linear(basis, kernel, None, Activation::None, None);
        let count = kernel.shape()[0];
        x1.unsqueeze(1).mul(&kernel.unsqueeze(0)).sum(2).scale(1.0 / count as f32)
    }

    /// Scales both kernels so that `x1` and `x2` have the standard deviation of `h`, as measured on this batch; gives the three
    /// deviations from before. Data-dependent initialisation: without it two layers of default weights all but erase a signal.
    ///
    /// # Errors
    /// The device's fault; a deviation that is 0 or not finite, which no factor can mend.
    pub fn calibrate(&mut self, field: &Field, h: &Tensor) -> crate::Result<[f32; 3]> {
        crate::no_grad(|| {
            let x1 = self.spatial(field, h);
            let x2 = self.fiber(field, &x1);
            let deviations = [deviation(h)?, deviation(&x1)?, deviation(&x2)?];
            if deviations.iter().any(|s| !s.is_finite() || *s == 0.0) {
                let message = format!(
                    "calibrate: the standard deviations before, between and after are {deviations:?}; use a batch with \
                     more than one node and features that differ"
                );
                return Err(crate::Error::Config { message });
            }
            let [before, between, after] = deviations;
            self.kernel = self.kernel.detach().scale(before / between).contiguous().requires_grad();
            if let Some(kernel) = &mut self.fiber_kernel {
                *kernel = kernel.detach().scale(between / after).contiguous().requires_grad();
            }
            Ok(deviations)
        })
    }
}

/// The standard deviation of all elements, divisor count - 1, in f64.
fn deviation(x: &Tensor) -> crate::Result<f32> {
    let data = x.detach().to_vec::<f32>()?;
    let n = data.len() as f64;
    let mean = data.iter().map(|&v| v as f64).sum::<f64>() / n;
    let square = data.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>();
    Ok((square / (n - 1.0)).sqrt() as f32)
}
