//! Energies and forces of a system that is too large for one graph, part by part.
//!
//! The energy of an atom depends on the atoms within as many radii as the network has layers. So the energies of a part of the atoms,
//! and their gradient, follow from a graph of the part with these atoms around it. The sum over all parts is the whole: no
//! approximation is made, and the atoms around the parts are computed more than once.

use super::potential::{Joined, Potential};
use crate::error::Result;
use crate::geometry::network::ponita::PonitaInput;
use crate::geometry::space::graph::Graph;

/// The sums over all parts, in the network's units.
pub(super) struct Sums {
    pub node_energies: Vec<f32>,
    /// `[nodes, 3]`
    pub forces: Vec<f64>,
    /// `[3, 3]`, zero unless asked.
    pub strain: [f64; 9],
}

/// Computes a graph in parts of at most `most` atoms, which are near each other. Before each part it asks whether to `go_on`.
pub(super) fn in_parts(
    potential: &Potential,
    joined: &Joined,
    species: &[u8],
    most: usize,
    strained: bool,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Sums> {
    let Joined { graph, positions, .. } = joined;
    let n = graph.nodes();
    let mut sums = Sums { node_energies: vec![0.0; n], forces: vec![0.0; 3 * n], strain: [0.0; 9] };
    let mut order: Vec<u32> = (0..n as u32).collect();
    let mut parts = Vec::new();
    split(positions, &mut order, most.max(1), &mut parts);
    let mut around = Around::new(graph);
    let mut first = 0;
    for size in parts {
        go_on()?;
        let own = &order[first..first + size];
        first += size;
        let (part, input) = around.part(potential, joined, species, own)?;
        let part = if strained { part.strained() } else { part };
        let found = potential.net.energy_forces_of(&part, &input, own.len())?;
        for (&i, e) in own.iter().zip(found.node_energies) {
            sums.node_energies[i as usize] = e;
        }
        for (&i, f) in around.nodes.iter().zip(found.forces.chunks_exact(3)) {
            (0..3).for_each(|k| sums.forces[3 * i as usize + k] += f[k] as f64);
        }
        for (sum, s) in sums.strain.iter_mut().zip(found.strain.iter().flatten()) {
            *sum += *s as f64;
        }
    }
    Ok(sums)
}

/// Sorts atoms so that parts of at most `most` follow each other, by halves along the longest side.
fn split(positions: &[f32], order: &mut [u32], most: usize, parts: &mut Vec<usize>) {
    if order.len() <= most {
        parts.push(order.len());
        return;
    }
    let at = |i: u32, k: usize| positions[3 * i as usize + k];
    let side = |k: usize| {
        let bounds = order
            .iter()
            .fold([f32::INFINITY, f32::NEG_INFINITY], |b, &i| [b[0].min(at(i, k)), b[1].max(at(i, k))]);
        bounds[1] - bounds[0]
    };
    let axis = (0..3).max_by(|&a, &b| side(a).total_cmp(&side(b))).unwrap_or(0);
    // Half of the parts to either side, so that all parts have about as many atoms.
    let count = order.len().div_ceil(most);
    let half = order.len() * (count / 2) / count;
    order.select_nth_unstable_by(half, |&a, &b| at(a, axis).total_cmp(&at(b, axis)).then(a.cmp(&b)));
    let (low, high) = order.split_at_mut(half);
    split(positions, low, most, parts);
    split(positions, high, most, parts);
}

/// The atoms of a part and around it.
struct Around {
    /// Where the edges into each node begin.
    starts: Vec<usize>,
    /// The place of each node in `nodes`, or `NONE`.
    places: Vec<u32>,
    /// The nodes of the part, then those around it by the number of edges between.
    nodes: Vec<u32>,
}

const NONE: u32 = u32::MAX;

impl Around {
    fn new(graph: &Graph) -> Around {
        let mut starts = vec![0; graph.nodes() + 1];
        graph.edges().destinations().iter().for_each(|&d| starts[d as usize + 1] += 1);
        (0..graph.nodes()).for_each(|i| starts[i + 1] += starts[i]);
        Around { starts, places: vec![NONE; graph.nodes()], nodes: Vec::new() }
    }

    /// Returns the graph on which the energies of `own` are those of the whole graph.
    fn part(
        &mut self,
        potential: &Potential,
        of: &Joined,
        species: &[u8],
        own: &[u32],
    ) -> Result<(Graph, PonitaInput)> {
        let Joined { graph, positions, .. } = of;
        self.nodes.drain(..).for_each(|i| self.places[i as usize] = NONE);
        let (mut sources, mut destinations, mut shifts) = (vec![], vec![], vec![]);
        own.iter().for_each(|&i| self.add(i));
        let mut first = 0;
        // Each layer carries messages along one more edge.
        for _ in 0..potential.net.layers.len() {
            let end = self.nodes.len();
            for at in first..end {
                let node = self.nodes[at] as usize;
                for e in self.starts[node]..self.starts[node + 1] {
                    let source = graph.edges().sources()[e];
                    self.add(source);
                    sources.push(self.places[source as usize]);
                    destinations.push(at as u32);
                    if let Some(shift) = graph.shifts().get(3 * e..3 * e + 3) {
                        shifts.extend_from_slice(shift);
                    }
                }
            }
            first = end;
        }
        let near: Vec<f32> =
            self.nodes.iter().flat_map(|&i| positions[3 * i as usize..][..3].to_vec()).collect();
        let kinds: Vec<u8> = self.nodes.iter().map(|&i| species[i as usize]).collect();
        let part = Graph::new(graph.gpu(), &near, 3, &sources, &destinations, &[])?;
        let part = if graph.shifts().is_empty() { part } else { part.with_shifts(&shifts)? };
        Ok((part, potential.input(&kinds)?))
    }

    fn add(&mut self, node: u32) {
        let place = &mut self.places[node as usize];
        if *place == NONE {
            *place = self.nodes.len() as u32;
            self.nodes.push(node);
        }
    }
}
