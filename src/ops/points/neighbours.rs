//! The search for points within a radius, on the device. See [`crate::geometry::Graph::radius`], which it serves.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, MOST_TURNS, grid};
use crate::gpu::shader::Source;
use crate::ops::case::Case;
use crate::tensor::Tensor;
use std::ops::Range;

const OP: &str = "neighbours";

fn source(fill: bool) -> Source {
    Source::file(OP).bool("FILL", fill)
}

/// Points sorted into cells, as the kernel reads them.
#[derive(Default)]
pub(crate) struct Cells {
    /// Four numbers per point: its position, wrapped into its periodic cell and relative to the lowest corner, and 0.
    pub points: Vec<f32>,
    /// Four numbers per point: its cell along three axes, and its graph.
    pub places: Vec<u32>,
    /// The points sorted by cell, and where the points of each cell begin.
    pub members: Vec<u32>,
    pub starts: Vec<u32>,
    /// Eight numbers per graph: cells along the axes, the first cell, the reach along the axes, bits of periodic axes.
    pub grids: Vec<u32>,
    /// Twelve numbers per graph: three lattice vectors, each with a fourth number that is 0.
    pub lattice: Vec<f32>,
}

/// The points that each query found, and their images: those of query `i` are `starts[i]..starts[i + 1]`.
pub(crate) struct Found {
    pub starts: Vec<usize>,
    pub points: Vec<u32>,
    pub images: Vec<[i32; 3]>,
}

impl Cells {
    /// Returns the most lines of cells that a query looks at, and the turns that one line takes if all its cells are
    /// empty.
    fn lines(&self) -> [usize; 2] {
        let of_a_graph = |grid: &[u32]| {
            let [x, y, z] = [grid[4], grid[5], grid[6]].map(|reach| 2 * reach as usize + 1);
            [y * z, 2 + 3 * x]
        };
        let all = self.grids.chunks_exact(8).map(of_a_graph);
        all.fold([1, 1], |most, one| [most[0].max(one[0]), most[1].max(one[1])])
    }

    /// Splits the search into launches. Each looks at a range of lines of cells and a range of the members of each cell,
    /// short enough that no thread takes too many turns.
    fn parts(&self) -> Vec<[Range<usize>; 2]> {
        let ([lines, turns], members) = (self.lines(), self.most_members());
        // A member that is skipped counts twice.
        let at_once = (MOST_TURNS / (turns * (1 + 2 * members))).max(1);
        let span = (MOST_TURNS / turns).saturating_sub(1) / 2;
        let pieces = |size: usize, span: usize| {
            let span = span.max(1);
            (0..size.max(1)).step_by(span).map(move |first| first..size.min(first + span))
        };
        let members = || pieces(members, members.min(span));
        pieces(lines, at_once).flat_map(|line| members().map(move |m| [line.clone(), m])).collect()
    }

    fn most_members(&self) -> usize {
        self.starts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0) as usize
    }

    /// Finds the points nearer than `radius` to each query, the query itself excepted. They are counted first, then
    /// listed.
    ///
    /// # Errors
    /// When the list is too long for one binding, or the device fails.
    pub fn search(&self, gpu: &Gpu, queries: &[u32], radius: f32) -> Result<Found> {
        if queries.is_empty() {
            return Ok(Found { starts: vec![0], points: vec![], images: vec![] });
        }
        let vectors = |x: &[f32]| Tensor::from_slice(gpu, x, [x.len() / 4, 4]);
        let list = |x: &[u32]| Tensor::from_slice(gpu, x, [x.len()]);
        let (points, lattice) = (vectors(&self.points), vectors(&self.lattice));
        let (places, members) = (list(&self.places), list(&self.members));
        let (cells, grids) = (list(&self.starts), list(&self.grids));
        let turns = self.lines()[1];
        let run = |fill: bool, [lines, span]: &[Range<usize>; 2], starts: &[usize], found: &Tensor| {
            let pairs: Vec<u32> = queries.iter().zip(starts).flat_map(|(&q, &at)| [q, at as u32]).collect();
            gpu.launch(
                Launch::new(OP, &source(fill), "search", grid(queries.len().div_ceil(64)))
                    .bind("points", &points)
                    .bind("places", &places)
                    .bind("members", &members)
                    .bind("cells", &cells)
                    .bind("grids", &grids)
                    .bind("lattice", &lattice)
                    .bind("queries", &list(&pairs))
                    .bind_mut("found", found)
                    .set("n", queries.len())
                    .set("square", radius * radius)
                    .set("line", lines.start)
                    .set("lines", lines.end)
                    .set("first", span.start)
                    .set("last", span.end)
                    .turns(lines.len() * turns * (1 + 2 * span.len()))
                    .reuse(0),
            );
        };
        // The number of points that each query finds, for each part.
        let mut found_by: Vec<([Range<usize>; 2], Vec<u32>)> = Vec::new();
        for part in self.parts() {
            let counts = Tensor::empty(gpu, OP, [queries.len()], DType::U32);
            run(false, &part, &vec![0; queries.len()], &counts);
            found_by.push((part, counts.to_vec::<u32>()?));
        }
        let mut starts = vec![0usize];
        for q in 0..queries.len() {
            let count: usize = found_by.iter().map(|(_, counts)| counts[q] as usize).sum();
            starts.push(starts[q] + count);
        }
        let total = starts[queries.len()];
        let most = gpu.limits().max_storage_buffer_binding_size.min(u32::MAX as u64);
        if total as u64 * 8 > most {
            let what = format!("neighbours: bytes of the list at radius {radius}");
            return Err(Error::Limit { what, need: total as u64 * 8, have: most });
        }
        let found = Tensor::empty(gpu, OP, [total, 2], DType::U32);
        let mut next = starts.clone();
        for (part, counts) in &found_by {
            if total > 0 {
                run(true, part, &next, &found);
            }
            next.iter_mut().zip(counts).for_each(|(next, &count)| *next += count as usize);
        }
        let data = found.to_vec::<u32>()?;
        let image = |bits: u32| [0, 10, 20].map(|shift| (bits >> shift & 1023) as i32 - 512);
        Ok(Found {
            starts,
            points: data.chunks_exact(2).map(|pair| pair[0]).collect(),
            images: data.chunks_exact(2).map(|pair| image(pair[1])).collect(),
        })
    }
}

/// A list of neighbours has no gradient, so there are no cases here: `tests/systems/geometry/neighbours.rs` compares it
/// with a search over all pairs.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
