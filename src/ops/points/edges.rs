//! Directed edges between nodes, ordered by destination, and the differences of positions along them.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, MOST_TURNS, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::tape::{Op, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::ops::Range;
use std::sync::Arc;

/// Directed edges `source -> destination` of a graph, sorted by destination, then source. Cloning is cheap.
///
/// Sums over a node's edges follow this order, so results do not depend on the order in which edges were given. Only
/// edges with the same two ends keep their given order.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::geometry::Edges;
/// let edges = Edges::new(&gpu, 3, &[2, 0, 1], &[1, 1, 0])?; // 2 -> 1, 0 -> 1, 1 -> 0
/// assert_eq!(edges.destinations(), [0, 1, 1]); // sorted by destination, then source
/// assert_eq!(edges.sources(), [1, 0, 2]);
/// assert_eq!(edges.order(), [2, 1, 0]); // where each was in the lists
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Edges(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    nodes: usize,
    sources: Vec<u32>,
    destinations: Vec<u32>,
    order: Vec<u32>,
    source_ids: Tensor,
    destination_ids: Tensor,
    by_destination: Rows,
    by_source: Rows,
}

/// For each node, the edges that end (or start) there, and the node at the other end of each.
#[derive(Clone)]
pub(crate) struct Rows {
    /// `[nodes + 1]`: where each node's entries begin.
    pub starts: Tensor,
    /// `[entries, 2]`: edge, other node.
    pub pairs: Tensor,
    /// The most entries of a node.
    pub most: usize,
}

impl Edges {
    /// Makes the edges `sources[i] -> destinations[i]` among `nodes` nodes, given in any order. Self-loops and repeated
    /// edges are allowed.
    ///
    /// # Errors
    /// When the lists differ in length, name a node outside `0..nodes`, or are too long for one binding.
    pub fn new(gpu: &Gpu, nodes: usize, sources: &[u32], destinations: &[u32]) -> Result<Edges> {
        if sources.len() != destinations.len() {
            let (a, b) = (sources.len(), destinations.len());
            return Err(Error::config(format!(
                "edges: {a} sources and {b} destinations; give one of each an edge"
            )));
        }
        if let Some(&node) = sources.iter().chain(destinations).find(|&&n| n as usize >= nodes) {
            return Err(Error::config(format!("edges: node {node} of {nodes}; nodes count from 0")));
        }
        let most = gpu.limits().max_storage_buffer_binding_size;
        if sources.len() as u64 * 8 > most.min(u32::MAX as u64) {
            let need = sources.len() as u64 * 8;
            return Err(Error::Limit { what: "edges: bytes of one list".into(), need, have: most });
        }
        let mut order: Vec<u32> = (0..sources.len() as u32).collect();
        order.sort_by_key(|&e| (destinations[e as usize], sources[e as usize]));
        let take = |from: &[u32]| order.iter().map(|&e| from[e as usize]).collect::<Vec<u32>>();
        let (sources, destinations) = (take(sources), take(destinations));
        let list = |ids: &[u32]| Tensor::from_slice(gpu, ids, [ids.len()]);
        Ok(Edges(Arc::new(Inner {
            gpu: gpu.clone(),
            nodes,
            source_ids: list(&sources),
            destination_ids: list(&destinations),
            by_destination: rows(gpu, nodes, &destinations, &sources),
            by_source: rows(gpu, nodes, &sources, &destinations),
            sources,
            destinations,
            order,
        })))
    }

    /// Number of edges.
    pub fn len(&self) -> usize {
        self.0.sources.len()
    }

    /// Whether there is no edge.
    pub fn is_empty(&self) -> bool {
        self.0.sources.is_empty()
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.0.nodes
    }

    /// The source of each edge, in order.
    pub fn sources(&self) -> &[u32] {
        &self.0.sources
    }

    /// The destination of each edge, in rising order.
    pub fn destinations(&self) -> &[u32] {
        &self.0.destinations
    }

    /// The position of each edge in the lists that were given.
    pub fn order(&self) -> &[u32] {
        &self.0.order
    }

    /// [`Edges::sources`] on the device.
    pub fn source_ids(&self) -> &Tensor {
        &self.0.source_ids
    }

    /// [`Edges::destinations`] on the device.
    pub fn destination_ids(&self) -> &Tensor {
        &self.0.destination_ids
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    pub(crate) fn by_destination(&self) -> &Rows {
        &self.0.by_destination
    }

    pub(crate) fn by_source(&self) -> &Rows {
        &self.0.by_source
    }
}

/// Lists the edges by node. `own[e]` is the node of edge `e` by which it is listed, `other[e]` the node at its other end.
fn rows(gpu: &Gpu, nodes: usize, own: &[u32], other: &[u32]) -> Rows {
    let mut starts = vec![0u32; nodes + 1];
    own.iter().for_each(|&n| starts[n as usize + 1] += 1);
    let most = starts.iter().copied().max().unwrap_or(0) as usize;
    for i in 0..nodes {
        starts[i + 1] += starts[i];
    }
    let mut next = starts.clone();
    let mut pairs = vec![0u32; 2 * own.len()];
    for (edge, (&n, &m)) in own.iter().zip(other).enumerate() {
        let at = &mut next[n as usize];
        pairs[2 * *at as usize..][..2].copy_from_slice(&[edge as u32, m]);
        *at += 1;
    }
    let starts = Tensor::from_slice(gpu, &starts, [starts.len()]);
    Rows { starts, pairs: Tensor::from_slice(gpu, &pairs, [own.len(), 2]), most }
}

/// Splits the nodes' lists, which have up to `most` entries, into ranges of entries, one per launch, so that no thread
/// takes too many turns. An entry takes `turns` turns. The first launch writes and the others add. There is always at
/// least one range.
pub(crate) fn walks(most: usize, turns: usize) -> impl Iterator<Item = Range<usize>> {
    let span = (MOST_TURNS / turns.max(1)).max(1);
    (0..most.max(1)).step_by(span).map(move |first| first..most.min(first + span))
}

impl std::fmt::Debug for Edges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Edges({} among {} nodes)", self.len(), self.nodes())
    }
}

fn source() -> Source {
    Source::file("edges")
}

/// Returns a launch that computes `y` from `x`. `walk` is the range of entries that it takes from each node's lists.
fn launch<'a>(source: &'a Source, entry: &'a str, walk: Range<usize>, x: &Tensor, y: &Tensor) -> Launch<'a> {
    let threads = y.count();
    Launch::new("edge_vectors", source, entry, grid(threads.div_ceil(64)))
        .bind("x", x)
        .bind_mut("y", y)
        .set("n", threads)
        .set("width", y.shape()[1])
        .set("first", walk.start)
        .set("last", walk.end)
        .turns(2 * walk.len())
}

impl Tensor {
    /// Returns `d[e] = x[source of e] - x[destination of e]`, `[E, D]`, where `self` is the positions `x [N, D]`. The
    /// differences are taken before anything else, so the choice of the origin changes only the rounding of the input.
    /// The gradient of a node is the sum over the edges that start there minus the sum over those that end there, both in
    /// order.
    ///
    /// # Panics
    /// When `self` is not `[nodes, D]` in f32.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::geometry::Edges;
    /// let edges = Edges::new(&gpu, 2, &[0, 1], &[1, 0])?;
    /// let x = Tensor::from_slice(&gpu, &[0f32, 0.0, 3.0, 4.0], [2, 2]); // [nodes, D]
    /// assert_eq!(x.edge_vectors(&edges).to_vec2::<f32>()?, [[3.0, 4.0], [-3.0, -4.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn edge_vectors(&self, edges: &Edges) -> Tensor {
        let op = "edge_vectors";
        same_gpu(op, &[self, edges.source_ids()]);
        let fits = self.shape().len() == 2 && self.shape()[0] == edges.nodes() && self.dtype() == DType::F32;
        assert!(
            fits,
            "{op}: {} of {} for {edges:?}; positions must be [nodes, D] in f32",
            self.shape(),
            self.dtype()
        );
        let (x, width) = (self.detach().contiguous(), self.shape()[1]);
        let y = Tensor::empty(self.gpu(), op, [edges.len(), width], DType::F32);
        let (source, from, to) = (source(), edges.source_ids(), edges.destination_ids());
        self.gpu().launch(launch(&source, "forward", 0..0, &x, &y).bind("s", from).bind("t", to));
        y.made_by(&[self], || Box::new(EdgeVectors { edges: edges.clone(), width }))
    }
}

struct EdgeVectors {
    edges: Edges,
    width: usize,
}

impl Op for EdgeVectors {
    fn name(&self) -> &'static str {
        "edge_vectors"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (dy, inner) = (dy.contiguous(), &self.edges.0);
        let dx = Tensor::empty(dy.gpu(), self.name(), [inner.nodes, self.width], DType::F32);
        let (out, into) = (&inner.by_source, &inner.by_destination);
        let source = source();
        for walk in walks(out.most.max(into.most), 2) {
            dy.gpu().launch(
                launch(&source, "backward", walk, &dy, &dx)
                    .bind("s", &out.starts)
                    .bind("t", &into.starts)
                    .bind("outgoing", &out.pairs)
                    .bind("incoming", &into.pairs),
            );
        }
        sink.add(0, dx);
    }
}

/// Makes edges for tests: some nodes have none, some pairs go one way, node 0 has a self-loop.
pub(crate) fn example(nodes: usize, count: usize) -> [Vec<u32>; 2] {
    let pick =
        |i: usize, step: usize| (i * step % nodes.max(2).next_multiple_of(2) / 2 * 2 % nodes.max(1)) as u32;
    [(0..count).map(|i| pick(i, 7)).collect(), (0..count).map(|i| (i * 5 % nodes.max(1)) as u32).collect()]
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (nodes, width, count) in [(1, 3, 1), (5, 2, 13), (7, 3, 0), (67, 3, 200), (3, 1, 300)] {
        let [from, to] = example(nodes, count);
        let lists = [from.clone(), to.clone()];
        let forward = move |x: &[Tensor]| {
            x[0].edge_vectors(&Edges::new(x[0].gpu(), nodes, &lists[0], &lists[1]).expect("edges in range"))
        };
        let reference = move |x: &[Array]| {
            let mut ends: Vec<[u32; 2]> = to.iter().zip(&from).map(|(&d, &s)| [d, s]).collect();
            ends.sort_unstable();
            Array::from_fn([count, width], |i| {
                let [d, s] = ends[i / width].map(|n| n as usize * width + i % width);
                x[0].data[s] - x[0].data[d]
            })
        };
        let name = format!("vectors of {count} edges among {nodes} nodes, {width} wide");
        all.push(Case::new(name, vec![Input::normal([nodes, width])], forward, reference));
    }
    all
}
