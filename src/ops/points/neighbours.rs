//! The search for points within a radius, on the device: see [`crate::geometry::Graph::radius`] for what it is for.

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
    /// Four numbers a point: where it is, moved into its cell.
    pub points: Vec<f32>,
    /// Its cell along three axes, and its graph.
    pub places: Vec<u32>,
    /// Points by cell, and where each cell's begin.
    pub members: Vec<u32>,
    pub starts: Vec<u32>,
    /// Eight numbers a graph: cells along the axes, the first cell, the reach along the axes, bits of periodic axes.
    pub grids: Vec<u32>,
    /// Twelve numbers a graph: three lattice vectors.
    pub lattice: Vec<f32>,
}

/// For each query the points found and their images, `starts[i]..starts[i + 1]`.
pub(crate) struct Found {
    pub starts: Vec<usize>,
    pub points: Vec<u32>,
    pub images: Vec<[i32; 3]>,
}

impl Cells {
    /// Lines of cells at which a query looks at most, and the turns for one of them where each cell is empty.
    fn lines(&self) -> [usize; 2] {
        let of_a_graph = |grid: &[u32]| {
            let [x, y, z] = [grid[4], grid[5], grid[6]].map(|reach| 2 * reach as usize + 1);
            [y * z, 2 + 3 * x]
        };
        let all = self.grids.chunks_exact(8).map(of_a_graph);
        all.fold([1, 1], |most, one| [most[0].max(one[0]), most[1].max(one[1])])
    }

    /// What each launch looks at: lines of cells, and members of a cell, so many that no thread walks too far.
    fn parts(&self) -> Vec<[Range<usize>; 2]> {
        let ([lines, turns], members) = (self.lines(), self.most_members());
        // A member that is passed over counts twice.
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

    /// Points nearer than `radius` to each query, itself excepted: counted, then listed.
    ///
    /// # Errors
    /// When there are more than one list can hold; the device's fault.
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
        // What every query finds in each part.
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

/// A list is no function of its inputs that has a gradient: `tests/geometry.rs` holds it against all pairs.
pub(super) fn cases() -> Vec<Case> {
    Vec::new()
}
