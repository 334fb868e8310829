//! The two networks: on positions and orientations, and on distances alone.

use std::path::Path;
use tiebeam::geometry::{Graph, Grid, Ponita, PonitaConfig, PonitaInput, invariants};
use tiebeam::nn::{Init, Module, Visit, VisitMut};
use tiebeam::{Gpu, Precision, Result, Rng, Tensor, autocast};

/// A network from charges and velocities to displacements.
pub enum Net {
    /// The input is the velocity and the output the displacement, both as vectors on the sphere.
    Oriented(Ponita),
    /// The input is the speed and the output `sum_j w_ij (x_j - x_i) + r_i v_i`, where `w_ij` is a kernel of the distance,
    /// applied to the features of j. The kernel is normalised over channels, since it contains powers of the distance that would
    /// otherwise be huge for far particles.
    Distances {
        net: Ponita,
        /// `[channels, basis]`
        pair: Tensor,
    },
}

impl Net {
    pub fn new(gpu: &Gpu, name: &str, sizes: &PonitaConfig, grid: Grid, rng: &mut Rng) -> Result<Net> {
        if name == "oriented" {
            let config = sizes.clone().in_vectors(1).out_scalars(0).out_vectors(1);
            return Ok(Net::Oriented(Ponita::new(gpu, config, grid, rng)?));
        }
        let config = sizes.clone().in_scalars(2);
        let (shape, bound) = ([config.channels, config.basis], 1.0 / (config.basis as f32).sqrt());
        let net = Ponita::new(gpu, config, Grid::positions(3), rng)?;
        Ok(Net::Distances { net, pair: Init::Uniform(bound).leaf(gpu, shape, rng) })
    }

    fn input(&self, charge: &Tensor, velocity: &Tensor) -> PonitaInput {
        match self {
            Net::Oriented(_) => {
                PonitaInput { scalars: Some(charge.clone()), vectors: Some(velocity.unsqueeze(1)) }
            }
            Net::Distances { .. } => {
                let speed = velocity.square().sum(1).sqrt().unsqueeze(1);
                PonitaInput::scalars(&Tensor::concat(&[charge, &speed], 1))
            }
        }
    }

    /// Scales the kernels by their outputs on a first batch.
    pub fn calibrate(&mut self, graph: &Graph, charge: &Tensor, velocity: &Tensor) -> Result<()> {
        let input = self.input(charge, velocity);
        match self {
            Net::Oriented(net) | Net::Distances { net, .. } => net.calibrate(graph, &input),
        }
    }

    /// Predicts the displacement of each particle, `[nodes, 3]`, from `charge [nodes, 1]` and `velocity [nodes, 3]`.
    pub fn displacement(&self, graph: &Graph, charge: &Tensor, velocity: &Tensor) -> Tensor {
        let input = self.input(charge, velocity);
        match self {
            // The mean of (v . o) o over a sphere is v / 3.
            Net::Oriented(net) => net.per_node(graph, &input).vectors.squeeze(1).scale(3.0),
            Net::Distances { net, pair } => {
                let hidden = net.hidden(graph, &input);
                let along = net.readout(&hidden).squeeze(1).mul(velocity);
                let (edges, d) = (graph.edges(), graph.vectors());
                let features = invariants::polynomial(&invariants::distance(&d), net.config.degree);
                // Such powers are beyond f16, so these products are in f32 whatever the scope, as those in PONITA are.
                let kernel = autocast(Precision::F32, || {
                    net.basis.forward(&features).matmul(&pair.t()).layer_norm(None, None, 1e-5)
                });
                let senders = hidden[hidden.len() - 1].squeeze(1).index_select(0, edges.source_ids());
                let pull = kernel.mul(&senders).sum(1).unsqueeze(1).mul(&d);
                pull.index_sum(0, edges.destination_ids(), edges.nodes()).add(&along)
            }
        }
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        match self {
            Net::Oriented(net) | Net::Distances { net, .. } => net.save(path),
        }
    }
}

impl Module for Net {
    fn visit(&self, visit: &mut Visit) {
        match self {
            Net::Oriented(net) => net.visit(visit),
            Net::Distances { net, pair } => {
                net.visit(visit);
                visit.field("pair", pair);
            }
        }
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        match self {
            Net::Oriented(net) => net.visit_mut(visit),
            Net::Distances { net, pair } => {
                net.visit_mut(visit);
                visit.field(pair);
            }
        }
    }
}
