//! Energies with forces as their exact gradient, and training on forces with a first-order tape.

use crate::error::Result;
use crate::geometry::network::ponita::{Ponita, PonitaInput};
use crate::geometry::space::graph::Graph;
use crate::tape::Grads;
use crate::tensor::Tensor;

/// Energies and forces of a batch of graphs, on the host.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct EnergyForces {
    /// The energy of each graph: the sum over its nodes, in f64.
    pub energies: Vec<f64>,
    /// The energy of each node.
    pub node_energies: Vec<f32>,
    /// `[nodes, D]` row-major: the negative gradient of the energy.
    pub forces: Vec<f32>,
    /// `[D, D]` row-major: the derivative of the sum of all energies with respect to the strain of a [`Graph::strained`], or
    /// `[graphs, D, D]` for that of a [`Graph::strained_each`].
    pub strain: Option<Vec<f32>>,
}

impl Ponita {
    /// Computes the first output scalar of each node as its energy, and the forces `F = -dE/dx` of their sum. It does not
    /// matter whether the network pools.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// As [`Ponita::forward`], and when the network has no output scalar.
    #[track_caller]
    pub fn energy_forces(&self, graph: &Graph, input: &PonitaInput) -> Result<EnergyForces> {
        self.energy_forces_of(graph, input, graph.nodes())
    }

    /// [`Ponita::energy_forces`] of the energies of the first `own` nodes alone. Those of the others are there without meaning.
    #[track_caller]
    pub(in crate::geometry) fn energy_forces_of(
        &self,
        graph: &Graph,
        input: &PonitaInput,
        own: usize,
    ) -> Result<EnergyForces> {
        // Weights need no gradients here.
        let fixed = self.mapped(&Tensor::detach);
        let graph = graph.track();
        let each = fixed.node_energies(&graph, input).slice(0, 0..own);
        let node_energies = each.to_vec::<f32>()?;
        let mut energies = vec![0.0; graph.graphs()];
        for (&g, &e) in graph.batch().iter().zip(&node_energies) {
            energies[g as usize] += e as f64;
        }
        // Without edges nothing depends on the positions.
        let grads = if each.is_tracked() { each.sum_all().backward()? } else { Grads::default() };
        let read = |leaf: &Tensor, sign: f32| match grads.get(leaf) {
            Some(d) => d.scale(sign).to_vec::<f32>(),
            None => Ok(vec![0.0; leaf.count()]),
        };
        let forces = read(graph.positions(), -1.0)?;
        let strain = graph.strain.as_ref().map(|strain| read(strain, 1.0)).transpose()?;
        Ok(EnergyForces { energies, node_energies, forces, strain })
    }

    #[track_caller]
    pub(in crate::geometry) fn node_energies(&self, graph: &Graph, input: &PonitaInput) -> Tensor {
        assert!(self.config.out_scalars > 0, "energy_forces: the network has no scalar output");
        self.per_node(graph, input).scalars.slice(1, 0..1).squeeze(1)
    }

    /// Returns a scalar whose gradient with respect to the parameters is that of `sum(F . u)`, for any `u [nodes, D]`.
    /// Add it to a loss and call `backward` once. Training on forces needs it with `u = dL/dF`. Its value is
    /// `sum(F . u)`, approximately.
    ///
    /// `sum(F . u) = -(E(x + step v) - E(x - step v)) / (2 step) s` with `v = u / s` and `s` the root mean square of `u`.
    /// This is a central difference along one direction: it gives a second-order gradient with a first-order tape, for
    /// two passes. `step` is in units of the positions: 1e-3 to 3e-3 of a bond length gives gradients with a relative error of
    /// about 1e-3 in f32, see [`Ponita::FORCE_STEP`]. Positions get no gradient from it.
    ///
    /// # Panics
    /// When `u` has another shape than the positions, or the network uses tables (see [`Ponita::tabulate`]); as
    /// [`Ponita::energy_forces`].
    #[track_caller]
    pub fn force_product(&self, graph: &Graph, input: &PonitaInput, u: &Tensor, step: f32) -> Tensor {
        self.trainable("force_product").unwrap_or_else(|e| panic!("{e}"));
        let positions = graph.positions().detach();
        assert!(
            u.shape() == positions.shape(),
            "force_product: u {} for positions {}",
            u.shape(),
            positions.shape()
        );
        let u = u.detach();
        let scale = u.square().mean_all().sqrt().clamp(1e-30, f32::MAX);
        let shift = u.div(&scale).scale(step);
        let energy = |positions: &Tensor| self.node_energies(&graph.at(positions), input).sum_all();
        let difference = energy(&positions.add(&shift)).sub(&energy(&positions.sub(&shift)));
        difference.mul(&scale).scale(-0.5 / step)
    }

    /// A step for [`Ponita::force_product`] that suits distances of the order of 1.
    pub const FORCE_STEP: f32 = 2e-3;
}
