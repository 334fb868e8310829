//! Point clouds: positions, edges between them, and which graph of a batch each point is in.

use super::grid::Grid;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::points::bonds::{Bonds, List, reverses};
use crate::ops::points::edges::Edges;
use crate::tensor::Tensor;
use std::sync::{Arc, OnceLock};

/// A batch of disjoint graphs of points in space or in the plane. Its lists lie in the device's memory, so make it again
/// after the device has failed.
///
/// Positions may be tracked: [`Graph::track`] makes them a leaf. The gradient of an energy with respect to it is the
/// negative force.
#[derive(Clone, Debug)]
pub struct Graph {
    pub(crate) edges: Edges,
    /// `[nodes, D]`
    pub(crate) positions: Tensor,
    /// `[edges, D]`: added to the position of the source minus that of the destination.
    pub(crate) shifts: Option<Tensor>,
    /// `[D, D]`: all differences of positions are multiplied by it. `[graphs, D, D]`: those of each graph by its own.
    pub(crate) strain: Option<Tensor>,
    /// The graph that each node is in.
    batch: Vec<u32>,
    pub(crate) batch_ids: Tensor,
    graphs: usize,
    lists: Arc<Lists>,
}

/// The lists of edges that share kernels, made once per graph when they are first needed.
#[derive(Default)]
struct Lists {
    /// The shifts of the graph, on the host.
    shifts: Vec<f32>,
    single: OnceLock<Arc<List>>,
    paired: OnceLock<Arc<List>>,
}

impl std::fmt::Debug for Lists {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lists")
    }
}

impl Graph {
    /// Makes a graph with these edges, given in any order. `positions` is `[nodes, dimension]` row-major. `batch` is the
    /// graph of each node, and empty if all are in one graph.
    ///
    /// # Errors
    /// When lists do not fit each other, a position is not finite, or an edge names a node that does not exist or joins
    /// two graphs.
    pub fn new(
        gpu: &Gpu,
        positions: &[f32],
        dimension: usize,
        sources: &[u32],
        destinations: &[u32],
        batch: &[u32],
    ) -> Result<Graph> {
        let nodes = checked(positions, dimension)?;
        let batch = if batch.is_empty() { vec![0; nodes] } else { batch.to_vec() };
        if batch.len() != nodes {
            return Err(Error::config(format!(
                "graph: {} entries of `batch` for {nodes} nodes",
                batch.len()
            )));
        }
        let edges = Edges::new(gpu, nodes, sources, destinations)?;
        let graph_of = |n: u32| batch[n as usize];
        let crosses =
            edges.sources().iter().zip(edges.destinations()).find(|&(&s, &d)| graph_of(s) != graph_of(d));
        if let Some((s, d)) = crosses {
            return Err(Error::config(format!("graph: the edge {s} -> {d} joins two graphs of the batch")));
        }
        let graphs = batch.iter().max().map_or(0, |&g| g as usize + 1);
        Ok(Graph {
            positions: Tensor::from_slice(gpu, positions, [nodes, dimension]),
            batch_ids: Tensor::from_slice(gpu, &batch, [nodes]),
            edges,
            shifts: None,
            strain: None,
            batch,
            graphs,
            lists: Arc::default(),
        })
    }

    /// Makes graphs in which every node is joined to every other of its graph, and to itself if `self_loops`. `sizes` are
    /// the numbers of nodes of the graphs, whose nodes lie one after the other.
    ///
    /// # Errors
    /// As [`Graph::new`]; when the sizes do not add up to the number of positions, or the list of edges exceeds one
    /// binding.
    pub fn full(
        gpu: &Gpu,
        positions: &[f32],
        dimension: usize,
        sizes: &[usize],
        self_loops: bool,
    ) -> Result<Graph> {
        let batch = batch_of(checked(positions, dimension)?, sizes)?;
        let count = sizes.iter().try_fold(0usize, |sum, &n| sum.checked_add(n.checked_mul(n)?));
        let have = gpu.limits().max_storage_buffer_binding_size;
        let count = count.filter(|&n| n as u64 <= have / 8).ok_or_else(|| Error::Limit {
            what: "full graph: bytes of one list of edges".into(),
            need: count.map_or(u64::MAX, |n| (n as u64).saturating_mul(8)),
            have,
        })?;
        let (mut from, mut to) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut first = 0;
        for &n in sizes {
            for (i, j) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
                if self_loops || i != j {
                    to.push((first + i) as u32);
                    from.push((first + j) as u32);
                }
            }
            first += n;
        }
        Graph::new(gpu, positions, dimension, &from, &to, &batch)
    }

    /// Adds `shifts [edges, D]` to the differences of positions along the edges, in the order in which edges were given:
    /// an edge with a shift starts at a periodic image.
    ///
    /// # Errors
    /// When there is not exactly one finite shift per edge.
    pub fn with_shifts(mut self, shifts: &[f32]) -> Result<Graph> {
        let width = self.dimension();
        if shifts.len() != width * self.edges.len() || shifts.iter().any(|x| !x.is_finite()) {
            let (got, need) = (shifts.len(), width * self.edges.len());
            return Err(Error::config(format!("graph: {got} numbers of shifts, need {need}, all finite")));
        }
        let ordered = self.edges.order().iter().flat_map(|&e| &shifts[e as usize * width..][..width]);
        let ordered: Vec<f32> = ordered.copied().collect();
        self.shifts = Some(Tensor::from_slice(self.gpu(), &ordered, [self.edges.len(), width]));
        self.lists = Arc::new(Lists { shifts: ordered, ..Lists::default() });
        Ok(self)
    }

    /// Returns a graph with the same edges at other positions `[nodes, D]`, which may be tracked.
    ///
    /// # Panics
    /// When the new positions have another shape.
    #[track_caller]
    pub fn at(&self, positions: &Tensor) -> Graph {
        let (old, new) = (self.positions.shape(), positions.shape());
        assert!(old == new, "graph: positions {new} for a graph of {old}");
        Graph { positions: positions.clone(), ..self.clone() }
    }

    /// Returns the same graph with its positions as a leaf.
    pub fn track(&self) -> Graph {
        self.at(&self.positions.detach().requires_grad())
    }

    /// Returns the same graph under a strain that is a leaf. It is the identity matrix, so it deforms nothing. The
    /// gradient of the energy with respect to it is volume times stress.
    pub fn strained(&self) -> Graph {
        let n = self.dimension();
        let one: Vec<f32> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
        Graph { strain: Some(Tensor::from_slice(self.gpu(), &one, [n, n]).requires_grad()), ..self.clone() }
    }

    /// Returns the same graph with a strain of its own for each graph of the batch, as a leaf `[graphs, D, D]` of identity
    /// matrices. The gradient of the sum of all energies with respect to it is volume times stress of each graph.
    pub fn strained_each(&self) -> Graph {
        let n = self.dimension();
        let one = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0f32 } else { 0.0 });
        let all: Vec<f32> = (0..self.graphs).flat_map(|_| one.clone()).collect();
        let strain = Tensor::from_slice(self.gpu(), &all, [self.graphs, n, n]).requires_grad();
        Graph { strain: Some(strain), ..self.clone() }
    }

    /// Returns `d [E, D]`: source minus destination along every edge, with shifts to periodic images and the strain
    /// applied.
    pub fn vectors(&self) -> Tensor {
        let d = self.positions.edge_vectors(&self.edges);
        let d = self.shifts.as_ref().map_or(d.clone(), |shift| d.add(shift));
        match &self.strain {
            None => d,
            Some(strain) if strain.shape().len() == 2 => d.matmul_f32(strain),
            Some(_) if self.edges.is_empty() => d,
            Some(strain) => {
                let n = self.dimension();
                let of: Vec<u32> =
                    self.edges.destinations().iter().map(|&i| self.batch[i as usize]).collect();
                let of = Tensor::from_slice(self.gpu(), &of, [of.len()]);
                let each = strain.reshape([self.graphs, n * n]).index_select(0, &of).reshape([
                    self.edges.len(),
                    n,
                    n,
                ]);
                d.unsqueeze(2).mul(&each).sum(1)
            }
        }
    }

    /// The shifts of the edges, in the order of the edges, on the host. Empty if there are none.
    pub(in crate::geometry) fn shifts(&self) -> &[f32] {
        &self.lists.shifts
    }

    /// Returns the shortest edge of each graph between two different points or images, as its length and its two nodes. `positions`
    /// are those of the graph, on the host.
    pub(in crate::geometry) fn shortest(&self, positions: &[f32]) -> Vec<Option<(f64, [u32; 2])>> {
        let n = self.dimension();
        let mut all: Vec<Option<(f64, [u32; 2])>> = vec![None; self.graphs];
        let shifts = &self.lists.shifts;
        for (e, (&s, &d)) in self.edges.sources().iter().zip(self.edges.destinations()).enumerate() {
            let shift = |k: usize| if shifts.is_empty() { 0.0 } else { shifts[e * n + k] as f64 };
            if s == d && (0..n).all(|k| shift(k) == 0.0) {
                continue;
            }
            let at = |node: u32, k: usize| positions[node as usize * n + k] as f64;
            let square: f64 = (0..n).map(|k| (at(s, k) - at(d, k) + shift(k)).powi(2)).sum();
            let best = &mut all[self.batch[d as usize] as usize];
            if best.is_none_or(|(length, _)| square < length) {
                *best = Some((square, [s.min(d), s.max(d)]));
            }
        }
        all.into_iter().map(|best| best.map(|(square, nodes)| (square.sqrt(), nodes))).collect()
    }

    /// Returns which rows of kernels the edges use on this grid. An edge and its reverse share a row if every orientation
    /// has an opposite and sharing saves a quarter of the rows or more.
    pub fn bonds(&self, grid: &Grid) -> Bonds {
        let Lists { shifts, paired, .. } = &*self.lists;
        if let Some(opposite) = grid.antipodes() {
            let pairs = || List::paired(&self.edges, &reverses(&self.edges, shifts, self.dimension()));
            let list = paired.get_or_init(pairs);
            if 4 * list.len() <= 3 * self.edges.len() {
                let opposite: Vec<u32> = opposite.into_iter().map(|a| a as u32).collect();
                return Bonds::of(list.clone(), Some(&opposite));
            }
        }
        self.single()
    }

    /// Gives every edge a row of kernels of its own.
    pub(in crate::geometry) fn single(&self) -> Bonds {
        Bonds::of(self.lists.single.get_or_init(|| List::single(&self.edges)).clone(), None)
    }

    /// Sums `x [nodes, ..]` over the nodes of each graph: `[graphs, ..]`, zero for a graph without nodes.
    ///
    /// # Panics
    /// When the first axis of `x` does not count the nodes.
    #[track_caller]
    pub fn pool(&self, x: &Tensor) -> Tensor {
        x.index_sum(0, &self.batch_ids, self.graphs)
    }

    /// The edges, in the order in which sums take them.
    pub fn edges(&self) -> &Edges {
        &self.edges
    }

    /// `[nodes, D]`
    pub fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.edges.nodes()
    }

    /// Number of graphs: one above the largest entry of `batch`.
    pub fn graphs(&self) -> usize {
        self.graphs
    }

    /// The graph of each node.
    pub fn batch(&self) -> &[u32] {
        &self.batch
    }

    /// Dimension of the space, 2 or 3.
    pub fn dimension(&self) -> usize {
        self.positions.shape()[1]
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        self.positions.gpu()
    }
}

/// Checks a list of coordinates and returns the number of its points.
pub(in crate::geometry) fn checked(positions: &[f32], dimension: usize) -> Result<usize> {
    if !(2..=3).contains(&dimension) || !positions.len().is_multiple_of(dimension) {
        let n = positions.len();
        return Err(Error::config(format!(
            "graph: {n} coordinates in {dimension} dimensions; use 2 or 3 a point"
        )));
    }
    if let Some(i) = positions.iter().position(|x| !x.is_finite()) {
        return Err(Error::config(format!(
            "graph: the position of node {} is {}",
            i / dimension,
            positions[i]
        )));
    }
    Ok(positions.len() / dimension)
}

/// Returns the graph of each node, for graphs of these sizes one after the other.
pub(in crate::geometry) fn batch_of(nodes: usize, sizes: &[usize]) -> Result<Vec<u32>> {
    if sizes.iter().try_fold(0usize, |sum, &n| sum.checked_add(n)) != Some(nodes) {
        return Err(Error::config(format!("graph: sizes {sizes:?} do not add up to {nodes} nodes")));
    }
    Ok(sizes.iter().enumerate().flat_map(|(g, &n)| std::iter::repeat_n(g as u32, n)).collect())
}
