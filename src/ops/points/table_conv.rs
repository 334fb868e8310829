//! The spatial half of a separable convolution with kernels that are read from a table: for networks whose weights are fixed.

use super::edges::{Edges, Rows, walks};
use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::ops::Range;

const OP: &str = "table_conv";

/// One function of one or two numbers per channel, as a uniform cubic B-spline: twice continuously differentiable.
///
/// `S_c(x, r) = sum_ij b(x / step - i) b(r / step - j) T[i,j,c]`, with `x` and `r` counted from `low`. Beyond its cells a
/// table is constant.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::ops::points::table_conv::SplineTable;
/// // 5 cells for a function of one number, for 4 channels, from 0 in steps of 0.2.
/// let table = SplineTable::new(&Tensor::ones(&gpu, [8, 1, 4]), [0.0, 0.0], [0.2, 0.2]);
/// assert_eq!(table.channels(), 4);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SplineTable {
    coefficients: Tensor,
    low: [f32; 2],
    step: [f32; 2],
    /// The most numbers that the parts of one pass of the backward pass may hold, unless one block alone has more.
    parts: usize,
}

impl SplineTable {
    /// Makes a table of coefficients `[cells + 3, cells + 3, C]`, or `[cells + 3, 1, C]` for functions of one number.
    /// `low` is where the first cell begins, at the second coefficient, and `step` is the size of a cell. The
    /// coefficients get no gradient.
    ///
    /// # Panics
    /// When the coefficients have another shape or type, C is 0 or not a multiple of 4, a number is not finite, or a step
    /// is not above 0.
    pub fn new(coefficients: &Tensor, low: [f32; 2], step: [f32; 2]) -> SplineTable {
        let shape = coefficients.shape();
        let fits = shape.len() == 3 && shape[0] > 3 && (shape[1] > 3 || shape[1] == 1);
        assert!(
            fits && shape[2] > 0 && shape[2].is_multiple_of(4) && coefficients.dtype() == DType::F32,
            "{OP}: a table {shape} of {}; it must be [cells + 3, cells + 3 or 1, C] in f32, C a multiple of 4 above 0",
            coefficients.dtype()
        );
        let finite = low.iter().chain(&step).all(|x| x.is_finite()) && step.iter().all(|s| *s > 0.0);
        assert!(finite, "{OP}: a table from {low:?} in steps of {step:?}");
        SplineTable { coefficients: coefficients.detach().contiguous(), low, step, parts: 16 << 20 }
    }

    /// `[cells + 3, cells + 3 or 1, C]`
    pub fn coefficients(&self) -> &Tensor {
        &self.coefficients
    }

    /// Number of channels.
    pub fn channels(&self) -> usize {
        self.coefficients.shape()[2]
    }

    /// Splits the blocks of channels into passes. The parts of one pass are in memory together, `count` numbers per
    /// block.
    fn passes(&self, blocks: usize, count: usize) -> Vec<Range<usize>> {
        let most = (self.parts / count.max(1)).max(1);
        (0..blocks).step_by(most).map(|first| first..blocks.min(first + most)).collect()
    }

    /// Number of coefficients along the second axis that a cell needs.
    fn rows(&self) -> usize {
        if self.coefficients.shape()[1] == 1 { 1 } else { 4 }
    }
}

#[derive(Clone, Copy)]
struct Variant {
    rows: usize,
    /// Vectors of channels per thread.
    channels: usize,
}

impl Variant {
    fn of(table: &SplineTable, backward: bool) -> Variant {
        // In the forward pass a GPU's thread owns fewer vectors, as it has about 100 registers to spend. In the backward
        // pass wide blocks are worth 5 registers of vectors for each: they keep the parts few.
        let most = if backward || table.coefficients.gpu().class().has_many_registers() { 4 } else { 2 };
        Variant { rows: table.rows(), channels: (table.channels() / 4).clamp(1, most) }
    }

    fn source(self, [accumulate, features, seen]: [bool; 3]) -> Source {
        Source::file(OP)
            .u32("ROWS", self.rows as u32)
            .u32("CHANNELS", self.channels as u32)
            .bool("ACCUMULATE", accumulate)
            .bool("FEATURES", features)
            .bool("SEEN", seen)
    }

    fn blocks(self, channels: usize) -> usize {
        (channels / 4).div_ceil(self.channels)
    }
}

/// Returns a launch for the blocks of `pass` and for `seen [E, O, 4]`. Each of the `threads` threads takes the range
/// `walk` of its node's edges.
fn launch<'a>(
    table: &SplineTable,
    seen: &Tensor,
    kind: Variant,
    (source, entry): (&'a Source, &'a str),
    pass: &Range<usize>,
    (threads, walk): (usize, Range<usize>),
) -> Launch<'a> {
    let (shape, [rows, o]) = (table.coefficients.shape(), [seen.count() / 4, seen.shape()[1]]);
    let ([low_x, low_r], per) = (table.low, table.step.map(|step| (1.0 / step as f64) as f32));
    // How often a coefficient is read on average. With few edges, most of a table is not read.
    let reuse = rows * 4 * table.rows() / (shape[0] * shape[1]);
    Launch::new(OP, source, entry, grid(threads.div_ceil(64)))
        .set("n", threads)
        .set("orientations", o)
        .set("channels", shape[2] / 4)
        .set("blocks", kind.blocks(shape[2]))
        .set("rows", rows)
        .set("cells_x", shape[0] - 3)
        .set("cells_r", shape[1].saturating_sub(3).max(1))
        .set("low_x", low_x)
        .set("low_r", low_r)
        .set("per_x", per[0])
        .set("per_r", per[1])
        .set("first", pass.start)
        .set("span", pass.len())
        .set("begin", walk.start)
        .set("end", walk.end)
        // The loop runs over edges or, in `gather`, over the blocks whose parts are added up.
        .turns(walk.len().max(pass.len()))
        .reuse(reuse.min(1 << 16) as u32)
}

/// Binds what `forward` and `backward` share: the invariants seen along the edges, the values at their other ends, and
/// the sums `y`.
fn walking<'a>(
    launch: Launch<'a>,
    table: &SplineTable,
    [seen, v]: [&Tensor; 2],
    rows: &Rows,
    y: &Tensor,
) -> Launch<'a> {
    let launch = launch.bind("seen", seen).bind("table", &table.coefficients).bind("v", v);
    launch.bind("starts", &rows.starts).bind("pairs", &rows.pairs).bind_mut("y", y)
}

impl Tensor {
    /// Returns `y[n,a,c] = sum over edges e into n of w_ea S_c(x_ea, r_ea) h[s_e,a,c]`, where `self` is `h [N, O, C]`.
    /// `seen [E, O, 4]` holds `x, r, w` and one unused number, in the order of `edges`. `S` is the table, which ignores
    /// `r` if its functions have one argument. `y` has the shape of `h`. This is for inference: the table gets no
    /// gradient.
    ///
    /// Derivatives: `dh` is the same sum over outgoing edges. With `m = dy[t_e] h[s_e]` and sums over channels,
    /// `dx = w sum m dS/dx`, `dr = w sum m dS/dr`, `dw = sum m S`. Sums run in the order of `edges`, so every run gives
    /// the same bits. Beside its results, the backward pass needs as much memory as `seen` or 64 MiB, whichever is more.
    ///
    /// # Panics
    /// When the shapes do not fit, or a type is not a float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::geometry::Edges;
    /// use tiebeam::ops::points::table_conv::SplineTable;
    /// let table = SplineTable::new(&Tensor::ones(&gpu, [8, 1, 4]), [0.0, 0.0], [0.2, 0.2]);
    /// let edges = Edges::new(&gpu, 2, &[0, 1], &[1, 0])?;
    /// let seen = Tensor::full(&gpu, [2, 1, 4], 0.5); // x, r, weight and an unused number
    /// let y = Tensor::ones(&gpu, [2, 1, 4]).table_conv(&seen, &table, &edges);
    /// assert!((y.mean_all().item()? - 0.5).abs() < 1e-5); // splines of equal coefficients are constant
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn table_conv(&self, seen: &Tensor, table: &SplineTable, edges: &Edges) -> Tensor {
        same_gpu(OP, &[self, seen, &table.coefficients, edges.source_ids()]);
        let (h, s) = (self.shape(), seen.shape());
        let fits = h.len() == 3 && h[0] == edges.nodes() && h[1] > 0 && h[2] == table.channels();
        let fits = fits && s[..] == [edges.len(), h[1], 4];
        assert!(
            fits,
            "{OP}: features {h}, seen {s}, {} channels for {edges:?}; they must be [nodes, O, C], [edges, O, 4] and C",
            table.channels()
        );
        let inputs = [self, seen].map(|x| crate::ops::float(OP, x));
        let [h, seen_] = inputs.each_ref().map(|x| x.detach().contiguous());
        let y = Tensor::empty(self.gpu(), OP, self.shape(), DType::F32);
        let kind = Variant::of(table, false);
        let blocks = kind.blocks(table.channels());
        let (source, rows) = (kind.source([false, true, true]), edges.by_destination());
        let threads = h.shape()[0] * h.shape()[1] * blocks;
        for walk in walks(rows.most, 1) {
            let launch = launch(table, &seen_, kind, (&source, "forward"), &(0..blocks), (threads, walk));
            self.gpu().launch(walking(launch, table, [&seen_, &h], rows, &y));
        }
        y.made_by(&inputs.each_ref(), || {
            let saved = [&h, &seen_].map(Saved::new);
            Box::new(TableConv { edges: edges.clone(), table: table.clone(), saved })
        })
    }
}

struct TableConv {
    edges: Edges,
    table: SplineTable,
    /// Features and `seen`.
    saved: [Saved; 2],
}

impl Op for TableConv {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(g) = dy[0].as_ref().map(Tensor::contiguous) else { return };
        let ([h, seen], table) = ([0, 1].map(|i| self.saved[i].get(OP)), &self.table);
        let (kind, wants) = (Variant::of(table, true), [0, 1].map(|i| sink.needs(i)));
        let passes = table.passes(kind.blocks(table.channels()), seen.count());
        // An output binding needs a buffer of its own even if nothing is written to it.
        let or_little = |wanted: bool, shape: &[usize]| {
            let shape = if wanted { shape } else { &[4] };
            Tensor::empty(h.gpu(), OP, shape, DType::F32)
        };
        let dh = or_little(wants[0], h.shape());
        let walked = |dseen: Option<(&Tensor, bool)>| {
            for (i, pass) in passes.iter().enumerate() {
                let parts = or_little(wants[1], &[pass.len(), seen.count()]);
                let rows = self.edges.by_source();
                let threads = h.shape()[0] * h.shape()[1] * pass.len();
                let source = kind.source([false, wants[0], wants[1]]);
                for walk in walks(rows.most, 1) {
                    let launch = launch(table, seen, kind, (&source, "backward"), pass, (threads, walk));
                    let launch = walking(launch, table, [seen, &g], rows, &dh);
                    h.gpu().launch(launch.bind("own", h).bind_mut("parts", &parts));
                }
                if let Some((dseen, accumulate)) = dseen {
                    let source = kind.source([accumulate || i > 0, true, true]);
                    let threads = (seen.count() / 4, 0..0);
                    let launch = launch(table, seen, kind, (&source, "gather"), pass, threads);
                    h.gpu().launch(launch.bind("v", &parts).bind_mut("y", dseen));
                }
            }
        };
        if wants[1] {
            sink.add_with(1, |into| {
                let (dseen, accumulate) = into.output(h.gpu(), OP, *seen.shape());
                walked(Some((&dseen, accumulate)));
                dseen
            });
        } else {
            walked(None);
        }
        if wants[0] {
            sink.add(0, dh);
        }
    }
}

/// The cubic B-spline centred at 0, which is 0 from a distance of 2 on.
fn bell(x: f64) -> f64 {
    let third = |y: f64| y.max(0.0).powi(3) / 6.0;
    let x = x.abs();
    third(2.0 - x) - 4.0 * third(1.0 - x)
}

/// The convolution in f64 of `h [N, O, C]`, `seen [E, O, 4]` and `table [X, Y, C]`, with the edges' ends, as a sum over
/// all coefficients.
fn table64(x: &[Array], low: [f64; 2], step: [f64; 2], from: &[u32], to: &[u32]) -> Array {
    let (h, seen, table) = (&x[0], &x[1], &x[2]);
    let ([o, c], [nx, ny]) = ([h.shape[1], h.shape[2]], [table.shape[0], table.shape[1]]);
    let weight = |value: f64, axis: usize, size: usize, i: usize| {
        if size == 1 {
            return 1.0;
        }
        let u = ((value - low[axis]) / step[axis]).clamp(0.0, (size - 3) as f64);
        bell(u + 1.0 - i as f64)
    };
    let mut y = Array::from_fn(h.shape, |_| 0.0);
    for (e, (&s, &t)) in from.iter().zip(to).enumerate() {
        for a in 0..o {
            let own = &seen.data[(e * o + a) * 4..][..4];
            for (i, j) in (0..nx).flat_map(|i| (0..ny).map(move |j| (i, j))) {
                let w = own[2] * weight(own[0], 0, nx, i) * weight(own[1], 1, ny, j);
                for c1 in 0..c {
                    let term = w * table.data[(i * ny + j) * c + c1] * h.data[(s as usize * o + a) * c + c1];
                    y.data[(t as usize * o + a) * c + c1] += term;
                }
            }
        }
    }
    y
}

/// Makes edges for tests: sources and destinations, in the order in which [`Edges`] keeps them.
fn sorted(nodes: usize, count: usize) -> [Vec<u32>; 2] {
    let [from, to] = super::edges::example(nodes, count);
    let mut ends: Vec<(u32, u32)> = to.into_iter().zip(from).collect();
    ends.sort_unstable();
    [ends.iter().map(|e| e.1).collect(), ends.iter().map(|e| e.0).collect()]
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (nodes, count, o, c, cells) in [
        (1, 1, 1, 4, [1, 1]),
        (5, 13, 3, 8, [5, 3]),
        (4, 7, 7, 4, [3, 0]),
        (3, 0, 2, 4, [2, 2]),
        (2, 67, 1, 20, [2, 5]),
        (3, 5, 2, 36, [4, 0]),
    ] {
        let [from, to] = sorted(nodes, count);
        let ends = [from.clone(), to.clone()];
        let table = [cells[0] + 3, if cells[1] == 0 { 1 } else { cells[1] + 3 }, c];
        let (low, step) = ([-1.5, -0.25], [0.75, 0.5]);
        // Some numbers lie beyond the cells, but none so near the end of a table that rounding decides on which side it
        // is.
        let seen = Input::normal([count, o, 4]).fill(Fill::Normal(1.1));
        let inputs = vec![Input::normal([nodes, o, c]), seen, Input::normal(table).fixed()];
        let forward = move |x: &[Tensor]| {
            let edges = Edges::new(x[0].gpu(), nodes, &ends[0], &ends[1]).expect("edges in range");
            let table = SplineTable::new(&x[2], [-1.5, -0.25], [0.75, 0.5]);
            // A pass takes two blocks, so three blocks need several passes.
            x[0].table_conv(&x[1], &SplineTable { parts: 2 * x[1].count(), ..table }, &edges)
        };
        let reference = move |x: &[Array]| table64(x, low, step, &from, &to);
        let name =
            format!("{count} edges among {nodes} nodes, {o} orientations, {c} channels, cells {cells:?}");
        all.push(Case::new(name, inputs, forward, reference).ulps(64.0, 128.0).grad_floor(256.0));
    }
    all
}
