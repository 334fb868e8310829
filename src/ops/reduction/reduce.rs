//! The kernels that reduce an axis by sum, product, max or min. The order depends on the sizes and the device's class
//! only, so the bits are the same every time. The methods that use them are [`Tensor::sum`], [`Tensor::mean`],
//! [`Tensor::max`], [`Tensor::prod`] and those beside them in [`reduction`](super). [`plan`] says which kernels a sum takes.

use super::columns::{self, Columns};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, Work, grid};
use crate::gpu::plan::Pass;
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::stored;
use crate::ops::timed::{Want, When};
use crate::shape::Shape;
use crate::tape::Sink;
use crate::tensor::Tensor;

/// The most elements of an axis that a thread adds up: 1024 in each of its four running sums, in blocks of 32. Longer
/// axes are reduced in several passes, so that the sums form a tree.
const SPAN: usize = 4096;
/// The most elements of an axis that a workgroup adds up. Each thread has a 64th of them.
const SHARED_SPAN: usize = 16 * SPAN;
/// On a GPU, axes that are shorter and adjacent in memory are walked by a thread each. The elements of a row are then
/// in few cache lines, which neighbouring threads share.
const SHORT: usize = 16;
/// On a GPU, rows from this length on are shared by 256 threads if they are not whole vectors.
const LONG: usize = 1024;

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Reduction {
    Sum,
    Product,
    Max,
    Min,
}

impl Reduction {
    fn fragment(self) -> &'static str {
        match self {
            Reduction::Sum => "reduce_sum",
            Reduction::Product => "reduce_product",
            Reduction::Max => "reduce_max",
            Reduction::Min => "reduce_min",
        }
    }
}

fn source(kind: Reduction) -> Source {
    Source::file("reduce").slot("combine", kind.fragment())
}

/// A thread of a GPU has four vectors under way. A CPU driver's threads wait for each load anyway.
fn source_rows(class: &DeviceClass, kind: Reduction, lanes: u32) -> Source {
    let ahead = if class.has_dear_barriers() { 1 } else { 4 };
    let source = Source::file("reduce_rows").u32("LANES", lanes).u32("AHEAD", ahead);
    source.slot("combine", kind.fragment())
}

fn in_vectors(source: Source) -> Source {
    source.alias("Elem", "vec4<f32>").alias("Bits", "vec4<u32>")
}

/// The fewest elements of the axis in a part.
const LEAST: usize = 32;

/// How the axis is walked.
#[derive(Clone, Copy)]
enum Walk {
    /// By threads that share a row of vectors.
    Vectors,
    /// By 64 threads for each row.
    Row,
    /// By one thread for each result.
    Column,
    /// By workgroups of a GPU that share columns.
    Columns(Columns),
}

fn walk(class: &DeviceClass, [outer, size, inner]: [usize; 3]) -> Walk {
    let vectors = inner.is_multiple_of(4);
    let inner = if vectors { inner / 4 } else { inner };
    let shared = || Walk::Columns(Columns::of(class, [outer, size, inner], vectors, 1));
    let is_cpu = class.has_dear_barriers();
    if inner == 1 && !vectors {
        return match size {
            _ if size.is_multiple_of(4) && size >= 16 => Walk::Vectors,
            0..SHORT if !is_cpu => Walk::Column,
            LONG.. if !is_cpu => shared(),
            _ => Walk::Row,
        };
    }
    // A workgroup that shares columns must have work for all of its threads.
    let works = size >= 32 && size.next_power_of_two() * inner.next_power_of_two() >= columns::THREADS;
    if works && !is_cpu && outer * inner < class.in_flight() { shared() } else { Walk::Column }
}

/// Returns the number of parts of the axis in one pass: as many as the length of a thread's walk requires, or more if
/// there are too few results to fill the device.
fn parts(class: &DeviceClass, [outer, size, inner]: [usize; 3]) -> usize {
    let shared = inner == 1 && !class.has_dear_barriers();
    let walked = size.div_ceil(if shared { SHARED_SPAN } else { SPAN });
    let threads = match inner {
        1 => 64 * outer,
        _ if inner.is_multiple_of(4) => outer * inner / 4,
        _ => outer * inner,
    };
    // A GPU's threads that share a row should have a few turns each, however few bytes that is for a workgroup: one
    // that has 64 KiB for 64 threads takes 16 trips to memory, one after the other.
    let wanted = match shared {
        true => class.in_flight().div_ceil(64),
        false => class.wanted(64, 4.0 * (outer * size * inner) as f64, 0.0),
    };
    // Results of parts are written and read again. With at least LEAST terms in each, this traffic is at most a
    // sixteenth of what is summed.
    let least = if shared { 2 * LONG } else { LEAST };
    let filling = if threads.div_ceil(64) < wanted { (64 * wanted).div_ceil(threads.max(1)) } else { 1 };
    walked.max(filling.min(size / least))
}

/// One pass: its kernel and the sizes that it walks.
struct ReducePlan {
    source: Source,
    entry: &'static str,
    grid: [u32; 3],
    results: usize,
    /// Elements of the axis and of the axes inside it. They are counted in vectors of four if the kernel reads vectors.
    axis: usize,
    inner: usize,
    parts: usize,
    /// The length of a part along the axis.
    span: usize,
    turns: usize,
    columns: Option<Columns>,
}

/// Returns how many threads share a row of this many vectors.
fn lanes(class: &DeviceClass, vectors: usize, results: usize) -> u32 {
    if class.has_dear_barriers() {
        return if results >= 16 { 1 } else { 64 };
    }
    // On a GPU, neighbouring threads should read neighbouring elements, whatever a barrier costs.
    match vectors {
        0..=32 => 8,
        _ => 64,
    }
}

fn plan_pass(class: &DeviceClass, sizes: [usize; 3], kind: Reduction) -> ReducePlan {
    let [outer, size, inner] = sizes;
    let walk = walk(class, sizes);
    let parts = if let Walk::Columns(columns) = walk { columns.parts } else { parts(class, sizes) };
    let results = outer * parts * inner;
    let vectors = inner.is_multiple_of(4);
    let lanes = lanes(class, size.div_ceil(parts) / 4, results);
    let wide = |source: Source| if vectors { in_vectors(source) } else { source };
    let (results, inner) = if vectors { (results / 4, inner / 4) } else { (results, inner) };
    let (source, entry, groups, threads) = match walk {
        Walk::Vectors => {
            (source_rows(class, kind, lanes), "rows", results.div_ceil(64 / lanes as usize), lanes as usize)
        }
        Walk::Row => (source(kind), "rows", results, 64),
        // Each thread has four columns if their number allows.
        Walk::Column => (wide(source(kind)), "columns", results.div_ceil(64), 1),
        Walk::Columns(columns) => {
            let source = Source::file("reduce_columns").slot("combine", kind.fragment());
            (wide(source), "columns", columns.groups, 1)
        }
    };
    let size = if let Walk::Vectors = walk { size / 4 } else { size };
    let grid = grid(groups);
    let columns = if let Walk::Columns(columns) = walk { Some(columns) } else { None };
    let span = columns.map_or(size.div_ceil(parts), |columns| columns.span);
    // One turn for each of the thread's elements, and one for each block of them.
    let turns = columns.map_or(span.div_ceil(threads) + SPAN / 32, |columns| columns.turns);
    ReducePlan { source, entry, grid, results, axis: size, inner, parts, span, turns, columns }
}

/// Returns the passes of a sum over the middle one of these axes.
pub fn plan(class: &DeviceClass, sizes: [usize; 3]) -> Vec<Pass> {
    let [outer, size, inner] = sizes;
    let ReducePlan { source, entry, grid, parts, .. } = plan_pass(class, sizes, Reduction::Sum);
    let bytes = 4.0 * (outer * inner * (size + parts)) as f64;
    let first = Pass { op: "sum".into(), source, entry: entry.into(), grid, parts, bytes, flops: 0.0 };
    let rest = if parts > 1 { plan(class, [outer, parts, inner]) } else { vec![] };
    std::iter::once(first).chain(rest).collect()
}

/// The type of sums of this type.
fn summed(dtype: DType) -> DType {
    if dtype.is_half() { DType::F32 } else { dtype }
}

/// Returns `x` for [`reduce`] over `axis`: elements of 16 bits as they are where a kernel reads columns in whole vectors,
/// such as the gradient of a bias, else in f32.
#[track_caller]
fn readable(op: &str, x: &Tensor, axis: usize) -> Tensor {
    let sizes = x.shape().split_at_axis(axis);
    let walk = walk(x.gpu().class(), [sizes.0, sizes.1, sizes.2]);
    let columns = sizes.2.is_multiple_of(4) && matches!(walk, Walk::Column | Walk::Columns(_));
    if x.dtype().is_half() && columns { x.detach() } else { crate::ops::float(op, x).detach() }
}

/// Reduces `[outer, axis, inner]` in passes until one element of the axis is left, and divides it by `divisor`.
fn reduce(op: &'static str, x: &Tensor, axis: usize, kind: Reduction, divisor: f32) -> Tensor {
    let y = Tensor::empty(x.gpu(), op, x.shape().without(axis), summed(x.dtype()));
    reduce_into(op, x, axis, kind, Store { divisor, add: false }, &y);
    y
}

/// Adds the sum of `x` over `axis` to the gradient of input `i`, without a pass of its own for the addition.
pub(in crate::ops) fn add_sum(sink: &mut Sink, i: usize, x: &Tensor, axis: usize) {
    if x.count() == 0 {
        return sink.add(i, x.sum(axis as isize));
    }
    sink.add_with(i, |to| {
        let x = readable("sum", x, axis);
        let (y, add) = to.output(x.gpu(), "sum", x.shape().without(axis));
        reduce_into("sum", &x, axis, Reduction::Sum, Store { divisor: 1.0, add }, &y);
        y
    });
}

/// What becomes of a result.
#[derive(Clone, Copy)]
struct Store {
    /// The count of a mean, else 1.
    divisor: f32,
    /// Whether it is added to what is there.
    add: bool,
}

fn reduce_into(op: &'static str, x: &Tensor, axis: usize, kind: Reduction, store: Store, y: &Tensor) {
    let (outer, size, inner) = x.shape().split_at_axis(axis);
    let plan = plan_pass(x.gpu().class(), [outer, size, inner], kind);
    if plan.parts <= 1 {
        return pass(op, x, &plan, store, y);
    }
    let partial = Tensor::empty(x.gpu(), op, [outer, plan.parts, inner], summed(x.dtype()));
    pass(op, x, &plan, Store { divisor: 1.0, add: false }, &partial);
    reduce_into(op, &partial, 1, kind, store, y);
}

fn pass(op: &'static str, x: &Tensor, plan: &ReducePlan, store: Store, y: &Tensor) {
    let x = x.contiguous();
    let source = stored::set(plan.source.clone(), &[("in", x.dtype())]);
    let launch = Launch::new(op, &source, plan.entry, plan.grid)
        .bind("x", &x)
        .bind_mut("y", y)
        .set("axis", plan.axis)
        .set("inner", plan.inner)
        .set("parts", plan.parts)
        .set("divisor", store.divisor)
        .set("add", store.add)
        .work(Work { flops: 0.0, parts: plan.parts });
    x.gpu().launch(match &plan.columns {
        Some(columns) => columns.set(launch),
        None => launch.set("results", plan.results).set("span", plan.span).turns(plan.turns),
    });
}

/// Reduces over several axes, in increasing order, and divides by `divisor`. Each run of adjacent axes is one reduction,
/// the last run first.
#[track_caller]
pub(super) fn reduce_axes(
    op: &'static str,
    x: &Tensor,
    axes: &[usize],
    kind: Reduction,
    divisor: f32,
) -> Tensor {
    let to = axes.iter().rev().fold(*x.shape(), |shape, &axis| shape.without(axis));
    if to.count() == 0 {
        return Tensor::zeros(x.gpu(), to);
    }
    let (mut y, mut left) = (x.detach(), axes.to_vec());
    while let Some(last) = left.pop() {
        let mut first = last;
        while first > 0 && left.last() == Some(&(first - 1)) {
            left.pop();
            first -= 1;
        }
        if first < last {
            let mut sizes = y.shape()[..first].to_vec();
            sizes.push(y.shape()[first..=last].iter().product());
            sizes.extend(&y.shape()[last + 1..]);
            y = y.reshape(&sizes[..]);
        }
        let of = if kind == Reduction::Sum { readable(op, &y, first) } else { crate::ops::float(op, &y) };
        y = reduce(op, &of, first, kind, if left.is_empty() { divisor } else { 1.0 });
    }
    y
}

/// The reference of every reduction: applies `fold` along the axis, then `done` with the axis' size.
pub(crate) fn reduce64(
    x: &Array,
    axis: usize,
    first: f64,
    fold: fn(f64, f64) -> f64,
    done: fn(f64, usize) -> f64,
) -> Array {
    let (_, size, inner) = x.shape.split_at_axis(axis);
    Array::from_fn(x.shape.without(axis), |i| {
        let base = i / inner * size * inner + i % inner;
        done((0..size).fold(first, |s, a| fold(s, x.data[base + a * inner])), size)
    })
}

/// The larger of two numbers, or NaN if one of them is NaN.
pub(in crate::ops) fn max64(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// The sum of all elements, or the sums of all columns.
fn sized([rows, width]: [usize; 2], down: bool) -> Case {
    let name = if down { format!("{rows}x{width} down") } else { (rows * width).to_string() };
    let terms = move |x: &Array, column: usize| -> Vec<f64> {
        if down { (0..rows).map(|row| x.data[row * width + column]).collect() } else { x.data.clone() }
    };
    let shape = if down { Shape::new(&[width]) } else { Shape::new(&[]) };
    let elements = if down { vec![0, width - 1] } else { vec![0] };
    Case::new(
        name,
        vec![Input::normal([rows, width])],
        move |x| if down { x[0].sum(0) } else { x[0].sum_all() },
        move |x| Array::from_fn(shape, |column| terms(&x[0], column).iter().sum()),
    )
    .timed("sum", elements, move |x, column| {
        let terms = terms(&x[0], column);
        let norm = terms.iter().map(|t| t * t).sum::<f64>().sqrt();
        let bound = 4.0 * DType::F32.roundoff() * (terms.len() as f64).sqrt() * norm;
        Want { value: terms.iter().sum(), bound }
    })
}

/// The rows of the benchmark, and small ones for tests.
fn timed() -> Vec<Case> {
    let quick = |case: Case| case.when(When::Quick, When::Quick);
    vec![
        quick(sized([1 << 10, 1024], false)),
        quick(sized([1 << 14, 1024], false)),
        sized([1 << 15, 1024], false).when(When::Full, When::Full),
        // The gradients of a layer norm's bias, and of a bias that many narrow rows share.
        quick(sized([4096, 1024], true)),
        quick(sized([131_072, 64], true)),
        sized([5, 7], false),
        sized([5, 8], true),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = timed();
    for (shape, axis) in [
        (&[1, 1][..], 0),
        (&[7, 13], 1),
        (&[7, 13], 0),
        (&[3, 67, 5], 1),
        (&[2, 4801], 1),
        (&[4801, 2], 0),
        (&[20, 68], 1),
        (&[3, 16], 1),
        (&[2, 4804], 1),
        (&[3, 67, 8], 1),
        (&[601, 12], 0),
    ] {
        let big = shape.iter().product::<usize>() > 1000;
        let input = |fill: Fill| {
            let input = Input::normal(shape).fill(fill);
            vec![if big { input.fixed() } else { input }]
        };
        let at = axis as isize;
        all.push(Case::new(
            format!("sum {shape:?} axis {axis}"),
            input(Fill::Normal(1.0)),
            move |x| x[0].sum(at),
            move |x| reduce64(&x[0], axis, 0.0, |a, b| a + b, |s, _| s),
        ));
        all.push(Case::new(
            format!("mean {shape:?} axis {axis}"),
            input(Fill::Normal(1.0)),
            move |x| x[0].mean(at),
            move |x| reduce64(&x[0], axis, 0.0, |a, b| a + b, |s, n| s / n as f64),
        ));
        all.push(Case::new(
            format!("max {shape:?} axis {axis}"),
            input(Fill::Distinct(0.03)),
            move |x| x[0].max(at),
            move |x| reduce64(&x[0], axis, f64::NEG_INFINITY, max64, |s, _| s),
        ));
        all.push(Case::new(
            format!("min {shape:?} axis {axis}"),
            input(Fill::Distinct(0.03)),
            move |x| x[0].min(at),
            move |x| reduce64(&x[0], axis, f64::INFINITY, |a, b| -max64(-a, -b), |s, _| s),
        ));
    }
    // Columns in whole vectors are read as they are stored, others in f32.
    for dtype in [DType::F16, DType::Bf16] {
        for (shape, axis) in
            [(&[67, 8][..], 0), (&[3, 40, 12], 1), (&[601, 12], 0), (&[9, 7], 0), (&[5, 64], 1)]
        {
            all.push(Case::new(
                format!("sum of {dtype} {shape:?} axis {axis}"),
                vec![Input::normal(shape).dtype(dtype).fixed()],
                move |x| x[0].sum(axis as isize),
                move |x| reduce64(&x[0], axis, 0.0, |a, b| a + b, |s, _| s),
            ));
        }
    }
    // Partial sums need up to 23 bits. Equality shows that no term is lost or rounded.
    let whole = vec![Input::integers([3, 8200], DType::F32, 0, 1000)];
    all.push(
        Case::new(
            "sum of integers",
            whole,
            |x| x[0].sum(1),
            |x| reduce64(&x[0], 1, 0.0, |a, b| a + b, |s, _| s),
        )
        .exact(),
    );
    all
}
