//! Sums by index: the adjoint of lookups, which adds up in a fixed order.
//!
//! They are the gradients of [`Tensor::embedding`], [`Tensor::index_select`] and [`Tensor::gather`], and the op
//! [`Tensor::index_sum`]. [`plan`] says which kernels such a gradient takes.

use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::plan::Pass;
use crate::gpu::shader::Source;
use crate::shape::Shape;
use crate::tape::Destination;
use crate::tensor::Tensor;

const OP: &str = "embedding";
/// Threads of a workgroup of `embedding_sum.wgsl`.
const THREADS: usize = 256;
/// Loads that a thread of it has under way.
const AHEAD: usize = 8;
/// The numbers that a workgroup of `order` can sort, and the most ids for which it does.
const LISTS: [usize; 3] = [1024, 4096, 8192];
/// The most rows of a workgroup of `order`, whose numbers are packed with 13 bits of a place.
const MOST_ROWS: usize = 1 << 18;
/// Vectors of the table that each thread clears, if there are workgroups enough.
const CLEARED: usize = 16;
/// The number of places in `order` that a thread of `embedding.wgsl`'s `sum_runs` walks.
const CHUNK: usize = 32;

/// The sizes of a sum: `count` rows of `inner` vectors or elements are added to `rows` rows, `outer` times over.
#[derive(Clone, Copy)]
struct Sums {
    outer: usize,
    rows: usize,
    inner: usize,
    count: usize,
    /// Whether `inner` counts vectors of four.
    wide: bool,
    accumulate: bool,
}

impl Sums {
    fn of([outer, rows, width]: [usize; 3], count: usize, accumulate: bool) -> Sums {
        let wide = width.is_multiple_of(4);
        Sums { outer, rows, inner: if wide { width / 4 } else { width }, count, wide, accumulate }
    }

    fn alias(&self) -> &'static str {
        if self.wide { "vec4<f32>" } else { "f32" }
    }
}

/// The three dispatches on a GPU.
struct GpuPlan {
    sums: Sums,
    /// The length of the list in workgroup memory that holds all ids, or `None` if they are sorted beforehand.
    list: Option<usize>,
    /// Workgroups of the first dispatch that have rows, and the rows of each.
    tiles: usize,
    tile: usize,
    /// Workgroups of the first dispatch, and what each of them clears.
    first: usize,
    cleared: usize,
    chunk: usize,
    /// Of a workgroup that joins: columns, as a power of 2, and lanes.
    shift: u32,
    lanes: usize,
}

impl GpuPlan {
    fn of(class: &DeviceClass, sums: Sums) -> GpuPlan {
        let Sums { outer, rows, inner, count, .. } = sums;
        // Beside the list, a workgroup joins a vector of each thread.
        let memory = |list: usize| 4 * list + 16 * THREADS;
        let fits = |list: &usize| count <= *list && memory(*list) <= class.workgroup_memory as usize;
        let list = LISTS.into_iter().find(fits);
        let tiles = rows.min(4 * class.width as usize).max(rows.div_ceil(MOST_ROWS));
        let tile = rows.div_ceil(tiles.max(1)).max(1);
        let tiles = rows.div_ceil(tile);
        let vectors = outer * rows * inner;
        let first = if list.is_some() { tiles } else { count.div_ceil(THREADS) };
        let first = if sums.accumulate { first } else { first.max(vectors.div_ceil(CLEARED * THREADS)) };
        // Chunks are longer if there are many places, so that the rest of a run is not too many sums. But there should
        // be threads enough.
        let busy = outer * count * inner / class.in_flight();
        let chunk = (count / 4096).min(busy).clamp(AHEAD, 256);
        let shift = inner.next_power_of_two().min(32).trailing_zeros();
        let lanes = (THREADS >> shift).min(16);
        let cleared = vectors.div_ceil(first.max(1));
        GpuPlan { sums, list, tiles, tile, first, cleared, chunk, shift, lanes }
    }

    fn chunks(&self) -> usize {
        self.sums.count.div_ceil(self.chunk)
    }

    /// Workgroups of the dispatch that joins.
    fn joining(&self) -> usize {
        let slots = (THREADS >> self.shift) / self.lanes;
        (self.sums.outer * self.chunks()).div_ceil(slots) * self.sums.inner.div_ceil(1 << self.shift)
    }

    fn source(&self) -> Source {
        let list = self.list.unwrap_or(LISTS[0]) as u32;
        let source = Source::file("embedding_sum").alias("Elem", self.sums.alias());
        source.u32("PLACES", list).bool("ACCUMULATE", self.sums.accumulate)
    }

    /// The entries with their grids, in workgroups.
    fn passes(&self) -> Vec<(&'static str, usize)> {
        let Sums { outer, inner, .. } = self.sums;
        let threads = outer * self.chunks() * inner;
        let mut all = vec![
            (if self.list.is_some() { "order" } else { "describe" }, self.first),
            ("runs", threads.div_ceil(THREADS)),
        ];
        if self.chunks() > 1 {
            all.push(("join", self.joining()));
        }
        all
    }

    /// The turns of the entry's loops.
    fn turns(&self, entry: &str) -> usize {
        let log = self.sums.count.next_power_of_two().ilog2() as usize + 1;
        match entry {
            "order" => {
                let list = self.list.unwrap_or(0);
                let (scans, each) = (4 * (list / (AHEAD * THREADS) + 2), list / THREADS + 1);
                scans + self.cleared / THREADS + log * (log + 1) / 2 * (each + 2) + each * (2 * log + 4) + 64
            }
            "describe" => self.cleared / THREADS + 2 * log + 4,
            "runs" => self.chunk / AHEAD + 1,
            _ => {
                let turns = self.chunks().div_ceil(AHEAD * self.lanes);
                turns + turns / 32 + 10
            }
        }
    }

    fn launch<'a>(&self, source: &'a Source, (entry, groups): (&'static str, usize)) -> Launch<'a> {
        let Sums { outer, rows, inner, count, .. } = self.sums;
        let n = if entry == "runs" { outer * self.chunks() * inner } else { groups };
        Launch::new(OP, source, entry, grid(groups))
            .set("n", n)
            .set("rows", rows)
            .set("inner", inner)
            .set("count", count)
            .set("outer", outer)
            .set("chunk", self.chunk)
            .set("chunks", self.chunks())
            .set("tiles", self.tiles)
            .set("tile", self.tile)
            .set("cleared", self.cleared)
            .set("shift", self.shift)
            .set("lanes", self.lanes)
            .turns(self.turns(entry))
    }

    fn run(&self, dy: &Tensor, ids: &Tensor, dx: &Tensor) {
        let (gpu, source, passes) = (dy.gpu(), self.source(), self.passes());
        let Sums { outer, count, inner, wide, .. } = self.sums;
        let places = Tensor::empty(gpu, OP, [count, 4], DType::U32);
        let first = self.launch(&source, passes[0]).bind_mut("made", &places).bind_mut("dx", dx);
        if self.list.is_some() {
            gpu.launch(first.bind("ids", ids));
        } else {
            let (ids, sorted) = ids.sort(0, false);
            gpu.launch(first.bind("ids", &ids).bind("sorted", &sorted));
        }
        let width = if wide { 4 * inner } else { inner };
        let rest = Tensor::empty(gpu, OP, [outer, self.chunks(), 2, width], DType::F32);
        let runs = self.launch(&source, passes[1]).bind("places", &places).bind("dy", dy);
        gpu.launch(runs.bind_mut("rest", &rest).bind_mut("dx", dx));
        if let Some(&join) = passes.get(2) {
            let join = self.launch(&source, join).bind("places", &places);
            // Most of the rest is not read, if few ids repeat.
            gpu.launch(join.bind("left", &rest).bind_mut("dx", dx).reuse(0));
        }
    }
}

/// `dx [shape]` with `dx[.., ids[i], ..] = sum dy[.., i, ..]` for u32 `ids`, summed in a fixed order: the adjoint of a
/// lookup along `axis`.
pub(crate) fn sum_by_index(
    dy: &Tensor,
    axis: usize,
    shape: Shape,
    ids: &Tensor,
    into: Destination,
) -> Tensor {
    let (outer, rows, inner) = shape.split_at_axis(axis);
    let (dx, accumulate) = into.output(dy.gpu(), OP, shape);
    let sums = Sums::of([outer, rows, inner], ids.count(), accumulate);
    let class = dy.gpu().class();
    if class.has_dear_barriers() || ids.count() == 0 {
        sum_runs(sums, &dy.contiguous(), ids, &dx);
    } else if dx.count() > 0 {
        GpuPlan::of(class, sums).run(&dy.contiguous(), ids, &dx);
    }
    dx
}

fn source(sums: &Sums) -> Source {
    let elem = if sums.wide { "vec4<u32>" } else { "u32" };
    Source::file("embedding").alias("Elem", elem).alias("Float", sums.alias())
}

fn runs(sums: &Sums, folded: bool) -> Source {
    let source = source(sums).u32("CHUNK", CHUNK as u32);
    source.bool("FOLDED", folded).bool("ACCUMULATE", sums.accumulate)
}

/// Makes a launch of a kernel of `embedding.wgsl` for `count` ids.
fn launch<'a>(
    sums: &Sums,
    source: &'a Source,
    entry: &'static str,
    threads: usize,
    count: usize,
) -> Launch<'a> {
    Launch::new(OP, source, entry, grid(threads.div_ceil(64)))
        .set("n", threads)
        .set("rows", sums.rows)
        .set("inner", sums.inner)
        .set("count", count)
        .set("chunks", count.div_ceil(CHUNK))
        .turns(CHUNK)
}

/// The same where barriers are dear: threads walk chunks of the sorted list, pass after pass.
fn sum_runs(sums: Sums, dy: &Tensor, ids: &Tensor, dx: &Tensor) {
    let gpu = dy.gpu();
    let Sums { outer, rows, inner, .. } = sums;
    if !sums.accumulate {
        let source = source(&sums);
        gpu.launch(launch(&sums, &source, "clear", outer * rows * inner, ids.count()).bind_mut("dx", dx));
    }
    if dx.count() == 0 || ids.count() == 0 {
        return;
    }
    let order = ids.argsort(0, false).contiguous();
    let (mut ids, mut dy, mut folded) = (ids.clone(), dy.clone(), false);
    loop {
        let count = ids.count();
        let chunks = count.div_ceil(CHUNK);
        let width = if sums.wide { 4 * inner } else { inner };
        let found = Tensor::empty(gpu, OP, [2 * chunks], DType::U32);
        let rest = Tensor::empty(gpu, OP, [outer, 2 * chunks, width], DType::F32);
        let source = runs(&sums, folded);
        gpu.launch(
            launch(&sums, &source, "sum_runs", outer * chunks * inner, count)
                .bind("ids", &ids)
                // Not read if the places are already in order.
                .bind("order", if folded { &ids } else { &order })
                .bind("dy", &dy)
                .bind_mut("found", &found)
                .bind_mut("rest", &rest)
                .bind_mut("dx", dx),
        );
        if chunks == 1 {
            return;
        }
        (ids, dy, folded) = (found, rest, true);
    }
}

/// Returns the passes of the gradient of `count` rows that were looked up in a table `[rows, width]`, but for those
/// that sort more ids than a workgroup can.
pub fn plan(class: &DeviceClass, [rows, width, count]: [usize; 3]) -> Vec<Pass> {
    let sums = Sums::of([1, rows, width], count, false);
    let pass = |source, entry: &str, groups: usize, elements: usize| {
        let (grid, entry, bytes) = (grid(groups), entry.to_string(), 4.0 * elements as f64);
        Pass { op: OP.into(), source, entry, grid, parts: 1, bytes, flops: 0.0 }
    };
    // Only the rows of the table that were looked up are written.
    let summed = (count + count.min(rows)) * width;
    if !class.has_dear_barriers() && count > 0 {
        let plan = GpuPlan::of(class, sums);
        let elements = |entry: &str| match entry {
            "order" | "describe" => 5 * count + rows * width,
            "runs" => 4 * count + summed,
            // What it reads depends on the ids.
            _ => 4 * plan.chunks(),
        };
        let passes = plan.passes().into_iter();
        return passes.map(|(entry, groups)| pass(plan.source(), entry, groups, elements(entry))).collect();
    }
    let groups = |threads: usize| threads.div_ceil(64);
    let mut all = vec![pass(source(&sums), "clear", groups(rows * sums.inner), rows * width)];
    let (mut count, mut folded) = (count, false);
    while count > 0 {
        let chunks = count.div_ceil(CHUNK);
        let lists = if folded { count } else { 2 * count } + 2 * chunks;
        let elements = (count + count.min(rows) + 2 * chunks) * width + lists;
        all.push(pass(runs(&sums, folded), "sum_runs", groups(chunks * sums.inner), elements));
        if chunks == 1 {
            break;
        }
        (count, folded) = (2 * chunks, true);
    }
    all
}
