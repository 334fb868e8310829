//! Which edges share a row of kernels, and the chunks of rows that are in memory together.

use super::edges::Edges;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::tensor::Tensor;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The rows of kernels of a graph's edges: one row per edge, or one row for both directions of a pair.
///
/// The invariants of an edge `d` seen from orientation `o` equal those of `-d` seen from `-o`. On a grid where every
/// orientation has an opposite, `k[reverse of e, a] = k[e, opposite of a]`. A *bond* is an edge together with its
/// reverse: its kernels are computed once. Cloning is cheap.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::geometry::{Bonds, Edges};
/// let edges = Edges::new(&gpu, 2, &[0, 1], &[1, 0])?;
/// assert_eq!(Bonds::single(&edges).len(), 2); // a row of kernels for each direction
/// let pair = Bonds::paired(&edges, &[Some(1), Some(0)], &[1, 0])?; // 2 orientations, opposite
/// assert_eq!(pair.len(), 1);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Bonds {
    list: Arc<List>,
    /// `[O]`: the opposite of each orientation. `None` if every edge has a row of its own.
    opposite: Option<Tensor>,
}

/// The part of the bonds that does not depend on the grid of orientations.
pub(crate) struct List {
    edges: Edges,
    /// The edge of each row, and its reverse if the reverse shares the row.
    rows: Vec<(u32, Option<u32>)>,
    /// The edge of each row, on the device. `None` if every edge has a row of its own.
    ids: Option<Tensor>,
    /// The chunks made so far, keyed by their number of rows.
    chunks: Mutex<BTreeMap<usize, Arc<Vec<Chunk>>>>,
    /// A limit on the rows per chunk, with which tests exercise the ends of chunks.
    most: OnceLock<usize>,
}

/// Rows whose kernels are in memory together.
pub(crate) struct Chunk {
    pub rows: Range<usize>,
    /// The range of nodes that the chunk's edges touch. The chunk's lists count nodes from its start. If the order of the
    /// nodes keeps neighbours together, only a small part of an array over nodes has to be bound. The range starts at a
    /// multiple of 64, so that such a part can be bound.
    pub nodes: Range<usize>,
    gpu: Gpu,
    list: Vec<[u32; 3]>,
    ends: OnceLock<Tensor>,
    into: OnceLock<Incidence>,
    from: OnceLock<Incidence>,
}

/// The nodes at which a chunk's edges end (or start), each with these edges. Other nodes are left out.
pub(crate) struct Incidence {
    /// `[nodes + 1, 2]`: the node, and where its entries in `pairs` begin. The last row marks the end of `pairs`.
    pub nodes: Tensor,
    /// `[entries, 2]`: twice the edge's row, counted from the chunk's first, plus 1 for a reverse; then the node at its
    /// other end.
    pub pairs: Tensor,
    /// The most entries of a node.
    pub most: usize,
}

impl List {
    /// Gives every edge a row of its own.
    pub(crate) fn single(edges: &Edges) -> Arc<List> {
        List::new(edges, (0..edges.len() as u32).map(|e| (e, None)).collect())
    }

    /// Lets an edge and its reverse share a row: `reverse[e]` is the reverse of edge `e`, in the order of `edges`.
    pub(crate) fn paired(edges: &Edges, reverse: &[Option<u32>]) -> Arc<List> {
        let first = |(e, r): (usize, &Option<u32>)| match *r {
            Some(r) if (r as usize) < e => None,
            Some(r) if r as usize == e => Some((e as u32, None)),
            r => Some((e as u32, r)),
        };
        List::new(edges, reverse.iter().enumerate().filter_map(first).collect())
    }

    fn new(edges: &Edges, rows: Vec<(u32, Option<u32>)>) -> Arc<List> {
        let ids: Vec<u32> = rows.iter().map(|row| row.0).collect();
        let ids = (rows.len() < edges.len()).then(|| Tensor::from_slice(edges.gpu(), &ids, [ids.len()]));
        Arc::new(List { edges: edges.clone(), rows, ids, chunks: Mutex::default(), most: OnceLock::new() })
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }
}

/// Returns the reverse of each edge if it has one: an edge from its destination to its source, with the opposite shift.
/// `shifts [E, width]` are in the order of the edges and may be empty.
pub(crate) fn reverses(edges: &Edges, shifts: &[f32], width: usize) -> Vec<Option<u32>> {
    let (from, to) = (edges.sources(), edges.destinations());
    let shift = |e: usize| shifts.get(e * width..(e + 1) * width).unwrap_or(&[]);
    // Adding 0 turns -0 into 0, so both are the same shift.
    let bits = |x: f32| (x + 0.0).to_bits();
    let key = |s: u32, t: u32, e: usize, sign: f32| {
        let shift: [u32; 3] = std::array::from_fn(|k| shift(e).get(k).map_or(0, |&x| bits(sign * x)));
        (s, t, shift)
    };
    let mut found = vec![None; edges.len()];
    // Edges whose reverse has not come yet, keyed by what the reverse must be, first come first served.
    let mut waiting: HashMap<_, VecDeque<u32>> = HashMap::new();
    for e in 0..edges.len() {
        let own = key(from[e], to[e], e, 1.0);
        match waiting.get_mut(&own).and_then(VecDeque::pop_front) {
            Some(r) => (found[e], found[r as usize]) = (Some(r), Some(e as u32)),
            None => waiting.entry(key(to[e], from[e], e, -1.0)).or_default().push_back(e as u32),
        }
    }
    found
}

impl Bonds {
    /// Gives every edge a row of kernels of its own.
    pub fn single(edges: &Edges) -> Bonds {
        Bonds { list: List::single(edges), opposite: None }
    }

    /// Gives every edge without a reverse a row of kernels, and every pair of an edge and its reverse one row for both.
    /// `reverse[e]` is the reverse of edge `e` in the order of [`Edges::sources`], `opposite[a]` is the opposite of
    /// orientation `a`.
    ///
    /// # Errors
    /// When `reverse` has another length than the edges, `reverse` or `opposite` is not its own inverse, or the two edges
    /// of a pair do not join the same two nodes.
    pub fn paired(edges: &Edges, reverse: &[Option<u32>], opposite: &[u32]) -> Result<Bonds> {
        let (from, to) = (edges.sources(), edges.destinations());
        let mutual = |e: usize| match reverse[e] {
            None => true,
            Some(r) => {
                let back = reverse.get(r as usize).copied().flatten();
                back == Some(e as u32) && from[e] == to[r as usize] && to[e] == from[r as usize]
            }
        };
        let returns = |a: u32| opposite.get(a as usize).and_then(|&b| opposite.get(b as usize)) == Some(&a);
        let wrong = reverse.len() != edges.len() || !(0..edges.len()).all(mutual);
        if wrong || !(0..opposite.len() as u32).all(returns) {
            return Err(Error::config(
                "bonds: two lists of pairs; `reverse` and `opposite` must undo themselves",
            ));
        }
        Ok(Bonds::of(List::paired(edges, reverse), Some(opposite)))
    }

    /// Makes bonds of a list. `opposite` is needed where edges share rows.
    pub(crate) fn of(list: Arc<List>, opposite: Option<&[u32]>) -> Bonds {
        let gpu = list.edges.gpu();
        let opposite = opposite.map(|ids| Tensor::from_slice(gpu, ids, [ids.len()]));
        Bonds { list, opposite }
    }

    /// Number of rows of kernels.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are no edges.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The edges.
    pub fn edges(&self) -> &Edges {
        &self.list.edges
    }

    pub(crate) fn opposite(&self) -> Option<&Tensor> {
        self.opposite.as_ref()
    }

    /// Returns the part of `x [E, ..]`, an array over edges, that belongs to the rows of kernels: one edge per row.
    ///
    /// # Panics
    /// When the first axis of `x` does not count the edges.
    #[track_caller]
    pub fn select(&self, x: &Tensor) -> Tensor {
        assert!(x.shape()[0] == self.edges().len(), "bonds: {} for {:?}", x.shape(), self.edges());
        self.list.ids.as_ref().map_or(x.clone(), |ids| x.index_select(0, ids))
    }

    /// Limits all chunks to this many rows.
    pub(crate) fn limit_chunks(&self, most: usize) {
        self.list.most.get_or_init(|| most);
    }

    /// Returns the rows in order, in chunks of at most `most` rows.
    pub(crate) fn chunks(&self, most: usize) -> Arc<Vec<Chunk>> {
        let most = self.list.most.get().map_or(most, |&least| least.min(most));
        let mut made = self.list.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let ranges = || (0..self.len()).step_by(most.max(1)).map(|first| first..self.len().min(first + most));
        made.entry(most).or_insert_with(|| Arc::new(ranges().map(|rows| self.chunk(rows)).collect())).clone()
    }

    fn chunk(&self, rows: Range<usize>) -> Chunk {
        let (from, to) = (self.edges().sources(), self.edges().destinations());
        let own = &self.list.rows[rows.clone()];
        let touched = || own.iter().flat_map(|&(e, _)| [to[e as usize], from[e as usize]]);
        let first = touched().min().unwrap_or(0) / 64 * 64;
        let last = touched().max().map_or(first, |n| n + 1);
        let (to, from) = (|e: u32| to[e as usize] - first, |e: u32| from[e as usize] - first);
        let uses = own.iter().enumerate().flat_map(|(row, &(e, r))| {
            let code = 2 * row as u32;
            std::iter::once([e, code]).chain(r.map(|r| [r, code + 1]))
        });
        let list = uses.map(|[e, code]| [code, to(e), from(e)]).collect();
        let nodes = first as usize..last as usize;
        let gpu = self.edges().gpu().clone();
        Chunk { rows, nodes, gpu, list, ends: OnceLock::new(), into: OnceLock::new(), from: OnceLock::new() }
    }
}

impl Chunk {
    /// `[rows, 4]`: destination and source of each row's edge, and 1 where its reverse shares the row.
    pub fn ends(&self) -> &Tensor {
        self.ends.get_or_init(|| {
            let mut ends = vec![0u32; 4 * self.rows.len()];
            for &[code, to, from] in &self.list {
                let own = &mut ends[4 * (code as usize / 2)..][..4];
                match code % 2 {
                    0 => own[..2].copy_from_slice(&[to, from]),
                    _ => own[2] = 1,
                }
            }
            Tensor::from_slice(&self.gpu, &ends, [self.rows.len(), 4])
        })
    }

    /// The edges by the node where they end, over which a forward pass sums.
    pub fn into(&self) -> &Incidence {
        self.into.get_or_init(|| self.uses(1, 2))
    }

    /// The edges by the node where they start, which only a backward pass needs.
    pub fn from(&self) -> &Incidence {
        self.from.get_or_init(|| self.uses(2, 1))
    }

    fn uses(&self, own: usize, other: usize) -> Incidence {
        let mut list: Vec<[u32; 3]> =
            self.list.iter().map(|use_| [use_[own], use_[other], use_[0]]).collect();
        list.sort_unstable();
        let (mut nodes, mut pairs) = (Vec::<u32>::new(), Vec::with_capacity(2 * list.len()));
        for (at, &[own, other, code]) in list.iter().enumerate() {
            if at == 0 || list[at - 1][0] != own {
                nodes.extend([own, at as u32]);
            }
            pairs.extend([code, other]);
        }
        nodes.extend([0, list.len() as u32]);
        let starts = || nodes.chunks_exact(2).map(|node| node[1]);
        let most = starts().zip(starts().skip(1)).map(|(a, b)| b - a).max().unwrap_or(0) as usize;
        let gpu = &self.gpu;
        Incidence {
            nodes: Tensor::from_slice(gpu, &nodes, [nodes.len() / 2, 2]),
            pairs: Tensor::from_slice(gpu, &pairs, [list.len(), 2]),
            most,
        }
    }
}

impl std::fmt::Debug for Bonds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bonds({} rows of {:?})", self.len(), self.edges())
    }
}
