//! Order along an axis: argsort, sort, and the largest k. The order is stable, and the bits are the same every time.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::reduction::arg::order64;
use crate::shape::{self, Shape};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;
use std::cmp::Ordering;

/// The number of elements that fit in 16 KiB of workgroup memory as pairs of key and index.
const TILE: usize = 2048;
/// The smallest tile, with one exchange per thread and step.
const LEAST: usize = 128;
/// The largest k for which long rows keep only the best k of each tile, which at least halves the pairs. For larger k,
/// whole rows are sorted by merging.
const MOST_KEPT: usize = TILE / 2;

fn source(tile: usize) -> Source {
    Source::file("sort").u32("TILE", tile as u32)
}

/// The kernel's parameters. Sizes that an entry does not read stay 0.
#[derive(Clone, Copy, Default)]
struct Params {
    rows: usize,
    size: usize,
    inner: usize,
    k: usize,
    in_row: usize,
    out_row: usize,
    keep: usize,
    tiles: usize,
    pad: usize,
    flip: bool,
    kind: u32,
    run: usize,
    accumulate: bool,
}

impl Params {
    /// Makes a launch of an entry of the `source` with this tile.
    fn launch<'a>(
        &self,
        op: &'a str,
        (source, tile): (&'a Source, usize),
        entry: &'a str,
        groups: usize,
    ) -> Launch<'a> {
        // A number of steps over the tile that is quadratic in its logarithm, and loops that read and write the tile.
        let (steps, each) = (tile.ilog2() as usize, tile / 64);
        let turns = steps * (steps + 1) / 2 * (each / 2 + 1) + 2 * each;
        Launch::new(op, source, entry, grid(groups))
            .set("rows", self.rows)
            .set("size", self.size)
            .set("inner", self.inner)
            .set("k", self.k)
            .set("in_row", self.in_row)
            .set("out_row", self.out_row)
            .set("keep", self.keep)
            .set("tiles", self.tiles)
            .set("pad", self.pad)
            .set("flip", if self.flip { u32::MAX } else { 0 })
            .set("kind", self.kind)
            .set("run", self.run)
            .set("accumulate", self.accumulate)
            .turns(turns)
    }
}

/// Keys and indices, `[rows, row]`.
struct Pairs {
    keys: Tensor,
    ids: Tensor,
    row: usize,
}

impl Pairs {
    fn empty(x: &Tensor, op: &'static str, rows: usize, row: usize) -> Pairs {
        let array = || Tensor::empty(x.gpu(), op, [rows, row], DType::U32);
        Pairs { keys: array(), ids: array(), row }
    }
}

/// Returns the first `k` elements along `axis` of a contiguous `x` in order, and their indices.
fn first(op: &'static str, x: &Tensor, axis: usize, k: usize, descending: bool) -> (Tensor, Tensor) {
    let gpu = x.gpu();
    let (outer, size, inner) = x.shape().split_at_axis(axis);
    let shape = x.shape().with(axis, k);
    let values = Tensor::empty(gpu, op, shape, x.dtype());
    let indices = Tensor::empty(gpu, op, shape, DType::U32);
    if shape.count() == 0 {
        return (values, indices);
    }
    let rows = outer * inner;
    let kind = match x.dtype() {
        DType::U32 => 1,
        DType::I32 => 2,
        DType::F32 | DType::F16 | DType::Bf16 => 0,
    };
    let all = Params { rows, size, inner, k, pad: TILE, flip: descending, kind, ..Params::default() };
    if size <= TILE {
        let pad = size.next_power_of_two();
        let tile = pad.max(LEAST);
        let source = source(tile);
        let launch = Params { pad, ..all }.launch(op, (&source, tile), "rows", rows.div_ceil(tile / pad));
        gpu.launch(launch.bind("x", x).bind_mut("y", &values).bind_mut("ids", &indices));
        return (values, indices);
    }

    let source = source(TILE);
    let best_only = k <= MOST_KEPT;
    let tiles = size.div_ceil(TILE);
    let keep = if best_only { k } else { TILE };
    let mut pairs = Pairs::empty(x, op, rows, if best_only { tiles * k } else { size });
    let params = Params { tiles, keep, out_row: pairs.row, ..all };
    let launch = params.launch(op, (&source, TILE), "tiles", rows * tiles);
    gpu.launch(launch.bind("x", x).bind_mut("y", &pairs.keys).bind_mut("ids", &pairs.ids));

    let step = |entry: &str, pairs: &Pairs, next: Pairs, params: Params, groups: usize| {
        let params = Params { in_row: pairs.row, out_row: next.row, ..params };
        let launch = params.launch(op, (&source, TILE), entry, groups);
        let launch = launch.bind("keys_in", &pairs.keys).bind("ids_in", &pairs.ids);
        gpu.launch(launch.bind_mut("y", &next.keys).bind_mut("ids", &next.ids));
        next
    };
    if best_only {
        while pairs.row > k {
            let tiles = pairs.row.div_ceil(TILE);
            let next = Pairs::empty(x, op, rows, tiles * k);
            pairs = step("again", &pairs, next, Params { tiles, keep, ..all }, rows * tiles);
        }
    } else {
        let mut run = TILE;
        while run < size {
            let next = Pairs::empty(x, op, rows, size);
            pairs = step("merge", &pairs, next, Params { run, ..all }, (rows * size).div_ceil(64));
            run *= 2;
        }
    }
    let (params, groups) = (Params { in_row: pairs.row, ..all }, shape.count().div_ceil(64));
    let launch = params.launch(op, (&source, TILE), "finish", groups).bind("x", x).bind("ids_in", &pairs.ids);
    gpu.launch(launch.bind_mut("y", &values).bind_mut("ids", &indices));
    (values, indices)
}

struct Sorted {
    name: &'static str,
    axis: usize,
    shape: Shape,
    indices: Saved,
}

impl Op for Sorted {
    fn name(&self) -> &'static str {
        self.name
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let dy = dy.contiguous();
        let indices = self.indices.get(self.name);
        let (outer, size, inner) = self.shape.split_at_axis(self.axis);
        let k = dy.shape()[self.axis];
        sink.add_with(0, |into| {
            let (dx, accumulate) = into.output(dy.gpu(), self.name, self.shape);
            let params = Params { rows: outer * inner, size, inner, k, accumulate, ..Params::default() };
            let source = source(TILE);
            let launch = |entry: &'static str, threads: usize| {
                params.launch(self.name, (&source, TILE), entry, threads.div_ceil(64)).bind_mut("dx", &dx)
            };
            // A full sort writes every element, so nothing must be cleared.
            if !accumulate && k < size {
                dx.gpu().launch(launch("clear", dx.count()));
            }
            dx.gpu().launch(launch("scatter", dy.count()).bind("x", &dy).bind("ids_in", indices));
            dx
        });
    }
}

impl Tensor {
    #[track_caller]
    fn ordered(&self, op: &'static str, axis: usize, k: usize, descending: bool) -> (Tensor, Tensor) {
        let x = if self.dtype().is_float() { crate::ops::float(op, self) } else { self.clone() };
        let (values, indices) = first(op, &x.detach().contiguous(), axis, k, descending);
        if !self.dtype().is_float() {
            return (values, indices);
        }
        let saved = indices.clone();
        let values = values.made_by(&[self], || {
            Box::new(Sorted { name: op, axis, shape: *self.shape(), indices: Saved::new(&saved) })
        });
        (values, indices)
    }

    /// Returns the indices that put `axis` in order, as u32 of this tensor's shape: `x[argsort(x)[i]]` is the i-th
    /// element.
    ///
    /// The order is stable in both directions: equal elements keep their order. NaN counts as larger than infinity, and
    /// `-0` ties with `+0`. Any dtype. Rows of up to 2048 elements are sorted in workgroup memory in one pass, longer
    /// ones by merging sorted runs of that length. Source: Batcher 1968, "Sorting networks and their applications"
    /// (bitonic sort).
    ///
    /// # Panics
    /// When the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[3f32, 1.0, 2.0, 1.0], [4]);
    /// assert_eq!(x.argsort(0, false).to_vec::<u32>()?, [1, 3, 2, 0]);
    /// assert_eq!(x.argsort(0, true).to_vec::<u32>()?, [0, 2, 1, 3]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn argsort(&self, axis: isize, descending: bool) -> Tensor {
        let axis = shape::axis("argsort", axis, self.shape());
        self.detach().ordered("argsort", axis, self.shape()[axis], descending).1
    }

    /// Returns the elements along `axis` in order, and their indices as [`Tensor::argsort`] gives them.
    ///
    /// f16 is returned as f32. The gradient of a value goes to the element that it came from.
    ///
    /// # Panics
    /// When the axis is out of range.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[3f32, 1.0, 2.0, 6.0, 5.0, 4.0], [2, 3]);
    /// let (values, ids) = x.sort(-1, false);
    /// assert_eq!(values.to_vec2::<f32>()?, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
    /// assert_eq!(ids.to_vec2::<u32>()?, [[1, 2, 0], [2, 1, 0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn sort(&self, axis: isize, descending: bool) -> (Tensor, Tensor) {
        let axis = shape::axis("sort", axis, self.shape());
        self.ordered("sort", axis, self.shape()[axis], descending)
    }

    /// Returns the `k` largest elements along `axis`, largest first, and their indices as u32. In both results the axis
    /// has size `k`.
    ///
    /// Ties go to the lower index. NaN counts as larger than infinity. f16 is returned as f32. The gradient of a value
    /// goes to the element that it came from.
    ///
    /// # Panics
    /// If the axis is out of range or shorter than `k`.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[3f32, 1.0, 2.0, 6.0, 5.0, 4.0], [2, 3]);
    /// let (values, ids) = x.topk(2, 1);
    /// assert_eq!(values.to_vec2::<f32>()?, [[3.0, 2.0], [6.0, 5.0]]);
    /// assert_eq!(ids.to_vec2::<u32>()?, [[0, 2], [0, 1]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn topk(&self, k: usize, axis: isize) -> (Tensor, Tensor) {
        let axis = shape::axis("topk", axis, self.shape());
        assert!(k <= self.shape()[axis], "topk: {k} of axis {axis} of {}", self.shape());
        self.ordered("topk", axis, k, true)
    }
}

/// Returns values and indices of the first `k` elements along `axis`, by the standard library's stable sort.
fn first64(x: &Array, axis: usize, k: usize, order: fn(f64, f64) -> Ordering) -> (Array, Array) {
    let (outer, size, inner) = x.shape.split_at_axis(axis);
    let shape = x.shape.with(axis, k);
    let mut values = Array::from_fn(shape, |_| 0.0);
    let mut indices = values.clone();
    for row in 0..outer * inner {
        let at = |i: usize| row / inner * size * inner + i * inner + row % inner;
        let mut all: Vec<usize> = (0..size).collect();
        all.sort_by(|&a, &b| order(x.data[at(a)], x.data[at(b)]));
        for (i, &id) in all[..k].iter().enumerate() {
            let to = row / inner * k * inner + i * inner + row % inner;
            (values.data[to], indices.data[to]) = (x.data[at(id)], id as f64);
        }
    }
    (values, indices)
}

fn descending(a: f64, b: f64) -> Ordering {
    order64(b, a)
}

pub(super) fn cases() -> Vec<Case> {
    let specials =
        Fill::Values(vec![-0.0, 0.0, 1.5, f64::INFINITY, -2.0, f64::NAN, f64::NEG_INFINITY, 1e-41, 0.0]);
    let few = Fill::Integers(-3, 3);
    let mut all = Vec::new();
    // One element, primes, sizes around those of the tiles, one and two merges, and merges of runs without a partner.
    for (shape, axis, fill) in [
        (&[1][..], 0, &few),
        (&[300, 3], 1, &few),
        (&[31, 7], 1, &specials),
        (&[7, 31], 0, &few),
        (&[3, 128], 1, &few),
        (&[3, 129], 1, &Fill::Normal(1.0)),
        (&[2, 67, 5], 1, &few),
        (&[2, 2048], 1, &few),
        (&[2, 2049], 1, &few),
        (&[4099, 3], 0, &few),
        (&[3, 10007], 1, &Fill::Normal(1.0)),
    ] {
        let at = axis as isize;
        let name = format!(
            "{shape:?} axis {axis} of {}",
            if matches!(fill, Fill::Values(_)) { "specials" } else { "numbers" }
        );
        let input = || vec![Input::normal(shape).fill(fill.clone()).fixed()];
        all.push(Case::new(
            format!("argsort {name}"),
            input(),
            move |x| x[0].argsort(at, false),
            move |x| first64(&x[0], axis, x[0].shape[axis], order64).1,
        ));
        all.push(Case::new(
            format!("argsort down {name}"),
            input(),
            move |x| x[0].argsort(at, true),
            move |x| first64(&x[0], axis, x[0].shape[axis], descending).1,
        ));
        all.push(Case::new(
            format!("sort {name}"),
            input(),
            move |x| x[0].sort(at, false).0,
            move |x| first64(&x[0], axis, x[0].shape[axis], order64).0,
        ));
    }
    // Small and large k: in one tile, by keeping the best of each tile (with one and two further passes), and by
    // merging.
    for (shape, axis, k) in [
        (&[1][..], 0, 1),
        (&[37, 8], 1, 2),
        (&[5, 61, 3], 1, 7),
        (&[2, 5003], 1, 1),
        (&[4100, 3], 0, 50),
        (&[2, 9001], 1, 1024),
        (&[2, 9001], 1, 1025),
        (&[1, 43000], 1, 900),
    ] {
        let at = axis as isize;
        let input = || vec![Input::normal(shape).fill(Fill::Integers(-2000, 2000)).fixed()];
        let name = format!("topk {k} of {shape:?} axis {axis}");
        all.push(Case::new(
            format!("{name}, indices"),
            input(),
            move |x| x[0].topk(k, at).1,
            move |x| first64(&x[0], axis, k, descending).1,
        ));
        all.push(Case::new(
            format!("{name}, values"),
            input(),
            move |x| x[0].topk(k, at).0,
            move |x| first64(&x[0], axis, k, descending).0,
        ));
    }
    for dtype in [DType::U32, DType::I32] {
        let low = if dtype == DType::I32 { -70 } else { 0 };
        let input = vec![Input::integers([3, 301], dtype, low, 70)];
        all.push(Case::new(
            format!("argsort of {dtype}"),
            input,
            |x| x[0].argsort(1, false),
            |x| first64(&x[0], 1, 301, order64).1,
        ));
    }
    let mut all: Vec<Case> = all.into_iter().map(Case::exact).collect();
    // Distinct elements, so that finite differences of the reference do not change the order.
    for (shape, axis, k) in [(&[6, 13][..], 1, 4), (&[13, 6], 0, 5), (&[3, 67], 1, 67)] {
        let input = vec![Input::normal(shape).fill(Fill::Distinct(0.03))];
        let at = axis as isize;
        all.push(Case::new(
            format!("gradient of topk {k} of {shape:?}"),
            input,
            move |x| x[0].topk(k, at).0,
            move |x| first64(&x[0], axis, k, descending).0,
        ));
    }
    let input = vec![Input::normal([5, 11]).fill(Fill::Distinct(0.03))];
    all.push(Case::new(
        "gradient of sort of a transpose",
        input,
        |x| x[0].t().sort(0, false).0,
        |x| {
            let turned = Array::from_fn([11, 5], |i| x[0].data[i % 5 * 11 + i / 5]);
            first64(&turned, 0, 11, order64).0
        },
    ));
    all
}
