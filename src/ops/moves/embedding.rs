//! Elements by index: embedding, index_select and gather. Their adjoints are in `embedding_sum`.

use super::check_ids::check_ids;
use super::embedding_sum::sum_by_index;
use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::timed::{Want, When};
use crate::shape::{self, Shape};
use crate::tape::{Destination, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// Returns the ids as a flat u32 list. A negative id becomes larger than any axis, so that it is outside.
#[track_caller]
fn flat(op: &str, ids: &Tensor) -> Tensor {
    assert!(!ids.dtype().is_float(), "{op}: ids must be u32 or i32, got {}", ids.dtype());
    ids.detach().cast(DType::U32).reshape([ids.count()]).contiguous()
}

fn source(wide: bool) -> Source {
    let [elem, float] = if wide { ["vec4<u32>", "vec4<f32>"] } else { ["u32", "f32"] };
    Source::file("embedding").alias("Elem", elem).alias("Float", float)
}

/// The sizes that the kernels walk: `rows` along the axis of x, `inner` elements per row, `count` ids.
#[derive(Clone, Copy)]
struct Sizes {
    rows: usize,
    inner: usize,
    count: usize,
}

impl Sizes {
    /// Makes a launch of this many threads, each with one element, or four if the source is `wide`.
    fn launch<'a>(&self, source: &'a Source, entry: &'a str, wide: bool, threads: usize) -> Launch<'a> {
        Launch::new("embedding", source, entry, grid(threads.div_ceil(64)))
            .set("n", threads)
            .set("rows", self.rows)
            .set("inner", if wide { self.inner / 4 } else { self.inner })
            .set("count", self.count)
            .set("chunks", 0usize)
            .turns(0)
    }
}

/// Returns `x` in a type in which `inner` elements fill whole words, so that a kernel can move them as words.
fn whole_words(x: &Tensor, inner: usize) -> Tensor {
    let odd = x.dtype().is_half() && !inner.is_multiple_of(2);
    if odd { x.cast(DType::F32).contiguous() } else { x.contiguous() }
}

/// `y[o, i, c] = x[o, ids[i], c]`, not recorded in the graph.
fn select(x: &Tensor, axis: usize, ids: &Tensor) -> Tensor {
    let (_, rows, inner) = x.shape().split_at_axis(axis);
    let stored = whole_words(x, inner);
    let y = Tensor::empty(x.gpu(), "embedding", x.shape().with(axis, ids.count()), stored.dtype());
    let sizes = Sizes { rows, inner: inner * stored.dtype().size() / 4, count: ids.count() };
    let wide = sizes.inner.is_multiple_of(4);
    let words = y.count() * y.dtype().size() / 4;
    let source = source(wide);
    let launch = sizes.launch(&source, "select_rows", wide, if wide { words / 4 } else { words });
    // Only some rows of a table are loaded, and the table may be large.
    y.gpu().launch(launch.bind("x", &stored).bind("ids", ids).bind_mut("y", &y).reuse(0));
    y.cast(x.dtype())
}

struct Select {
    axis: usize,
    shape: Shape,
    ids: Saved,
}

impl Op for Select {
    fn name(&self) -> &'static str {
        "index_select"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let ids = self.ids.get(self.name());
        sink.add_with(0, |into| sum_by_index(dy, self.axis, self.shape, ids, into));
    }
}

struct IndexSum {
    axis: usize,
    ids: Saved,
}

impl Op for IndexSum {
    fn name(&self) -> &'static str {
        "index_sum"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            sink.add(0, select(dy, self.axis, self.ids.get(self.name())));
        }
    }
}

struct Gather {
    axis: usize,
    shape: Shape,
    index: Saved,
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let index = self.index.get(self.name());
        let (gpu, n) = (dy.gpu(), index.count());
        let count = dy.shape()[self.axis];
        let dy = dy.contiguous();
        let (_, rows, inner) = self.shape.split_at_axis(self.axis);
        let cells = Tensor::empty(gpu, "gather", [n], DType::U32);
        let (source, sizes) = (source(false), Sizes { rows, inner, count });
        gpu.launch(sizes.launch(&source, "cells", false, n).bind("ids", index).bind_mut("found", &cells));
        // This is a sum by index into single elements.
        let flat = Shape::new(&[self.shape.count()]);
        let dx = sum_by_index(&dy.reshape([n]), 0, flat, &cells, Destination::New);
        sink.add(0, dx.reshape(self.shape));
    }
}

impl Tensor {
    /// `y[.., c] = table[ids[..], c]`: looks up rows of this table `[rows, width]` by u32 or i32 `ids` of any shape.
    /// The result is f32.
    ///
    /// An id outside the table gives zeros and gets no gradient, and a checked device reports it at the next readback
    /// ([`Error::Outside`](crate::Error::Outside)). The gradient of a row is the sum over the places that used it, in a
    /// fixed order, so its bits are the same every time.
    ///
    /// # Panics
    /// If this is not a matrix of floats or `ids` are not integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let table = Tensor::from_slice(&gpu, &[0f32, 0.5, 10.0, 10.5, 20.0, 20.5], [3, 2]);
    /// let ids = Tensor::from_slice(&gpu, &[2u32, 0], [2]); // `[2]` of ids gives `[2, 2]`
    /// assert_eq!(table.embedding(&ids).to_vec2::<f32>()?, [[20.0, 20.5], [0.0, 0.5]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn embedding(&self, ids: &Tensor) -> Tensor {
        assert!(self.shape().len() == 2, "embedding: the table must be [rows, width], got {}", self.shape());
        assert!(self.dtype().is_float(), "embedding: needs floats, got {}; cast first", self.dtype());
        let mut sizes = ids.shape().to_vec();
        sizes.push(self.shape()[1]);
        check_ids("embedding", ids, self.shape()[0], None);
        self.selected("embedding", 0, ids).reshape(&sizes[..]).cast(DType::F32)
    }

    /// `y[.., i, ..] = x[.., ids[i], ..]` along `axis`, for a one-dimensional list of u32 or i32 ids. Any dtype.
    ///
    /// An id outside the axis gives zeros and gets no gradient, and a checked device reports it at the next readback
    /// ([`Error::Outside`](crate::Error::Outside)). If an element is selected several times, its gradients are summed
    /// in a fixed order.
    ///
    /// # Panics
    /// If the axis is out of range, or `ids` are not a one-dimensional list of integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 6.0, 1.0).reshape([2, 3]);
    /// let ids = Tensor::from_slice(&gpu, &[2u32, 0, 2], [3]);
    /// assert_eq!(x.index_select(1, &ids).to_vec2::<f32>()?, [[2.0, 0.0, 2.0], [5.0, 3.0, 5.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn index_select(&self, axis: isize, ids: &Tensor) -> Tensor {
        check_ids("index_select", ids, self.shape()[shape::axis("index_select", axis, self.shape())], None);
        self.index_select_padded(axis, ids)
    }

    /// [`Tensor::index_select`] for lists that are padded with ids outside the axis, which are not a mistake.
    #[track_caller]
    pub(crate) fn index_select_padded(&self, axis: isize, ids: &Tensor) -> Tensor {
        let axis = shape::axis("index_select", axis, self.shape());
        assert!(ids.shape().len() == 1, "index_select: ids must have one axis, got {}", ids.shape());
        self.selected("index_select", axis, ids)
    }

    #[track_caller]
    fn selected(&self, op: &'static str, axis: usize, ids: &Tensor) -> Tensor {
        same_gpu(op, &[self, ids]);
        let ids = flat(op, ids);
        let y = select(&self.detach(), axis, &ids);
        if !self.dtype().is_float() {
            return y;
        }
        y.made_by(&[self], || Box::new(Select { axis, shape: *self.shape(), ids: Saved::new(&ids) }))
    }

    /// `y[.., r, ..] = sum over i with ids[i] = r of x[.., i, ..]` along `axis`, whose size becomes `size`. The result
    /// is f32, summed in increasing order of `i`. This and [`Tensor::index_select`] are each other's adjoints. It pools
    /// the nodes of graphs, for example.
    ///
    /// An element whose id is outside `0..size` is not summed and gets no gradient, and a checked device reports the id
    /// at the next readback ([`Error::Outside`](crate::Error::Outside)).
    ///
    /// # Panics
    /// If the axis is out of range, if `ids` are not a list of integers of the axis' length, or if the elements are
    /// integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// // Nodes 0 and 2 belong to graph 1, node 1 to graph 0.
    /// let nodes = Tensor::from_slice(&gpu, &[1f32, 10.0, 100.0], [3]);
    /// let graph = Tensor::from_slice(&gpu, &[1u32, 0, 1], [3]);
    /// assert_eq!(nodes.index_sum(0, &graph, 2).to_vec::<f32>()?, [10.0, 101.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "scatter_add")]
    #[track_caller]
    pub fn index_sum(&self, axis: isize, ids: &Tensor, size: usize) -> Tensor {
        let op = "index_sum";
        same_gpu(op, &[self, ids]);
        let axis = shape::axis(op, axis, self.shape());
        let fits = ids.shape()[..] == [self.shape()[axis]];
        assert!(fits, "{op}: ids {} for axis {axis} of {}", ids.shape(), self.shape());
        check_ids(op, ids, size, None);
        let (ids, x) = (flat(op, ids), crate::ops::float(op, self));
        let y = sum_by_index(&x.detach(), axis, x.shape().with(axis, size), &ids, Destination::New);
        y.made_by(&[self], || Box::new(IndexSum { axis, ids: Saved::new(&ids) }))
    }

    /// `y[i, j, k] = x[index[i, j, k], j, k]` for `axis` 0 of three, and likewise for other axes. Any dtype.
    ///
    /// `index`, u32 or i32, has as many axes as this tensor and the shape of the result. Only along `axis` may it be
    /// longer than this tensor. An index outside the axis gives zeros and gets no gradient, and a checked device
    /// reports it at the next readback ([`Error::Outside`](crate::Error::Outside)). If an element is gathered several
    /// times, its gradients are summed in a fixed order.
    ///
    /// # Panics
    /// If the axis is out of range, the shapes do not fit, or `index` does not have integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// // The score of each row's target.
    /// let scores = Tensor::arange(&gpu, 0.0, 6.0, 1.0).reshape([2, 3]);
    /// let targets = Tensor::from_slice(&gpu, &[2u32, 0], [2, 1]);
    /// assert_eq!(scores.gather(1, &targets).to_vec2::<f32>()?, [[2.0], [3.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn gather(&self, axis: isize, index: &Tensor) -> Tensor {
        same_gpu("gather", &[self, index]);
        check_ids("gather", index, self.shape()[shape::axis("gather", axis, self.shape())], None);
        self.gather_padded(axis, index)
    }

    /// [`Tensor::gather`] for lists that are padded with indices outside the axis, which are not a mistake.
    #[track_caller]
    pub(crate) fn gather_padded(&self, axis: isize, index: &Tensor) -> Tensor {
        let op = "gather";
        same_gpu(op, &[self, index]);
        let axis = shape::axis(op, axis, self.shape());
        let (from, to) = (*self.shape(), *index.shape());
        let fits = from.len() == to.len() && (0..from.len()).all(|a| a == axis || to[a] <= from[a]);
        assert!(fits, "{op}: index {to} does not lie in {from} outside axis {axis}");
        let shorter = (0..from.len()).filter(|&a| a != axis && to[a] < from[a]);
        let x = shorter.fold(self.clone(), |x, a| x.slice(a as isize, 0..to[a]));
        let index = flat(op, index);
        let (_, rows, inner) = x.shape().split_at_axis(axis);
        // Single elements are moved, so f16 and bf16 are always converted to f32.
        let stored = whole_words(&x.detach(), 1);
        let y = Tensor::empty(x.gpu(), op, to, stored.dtype());
        let (source, sizes) = (source(false), Sizes { rows, inner, count: to[axis] });
        let launch = sizes.launch(&source, op, false, y.count()).bind("x", &stored);
        y.gpu().launch(launch.bind("ids", &index).bind_mut("y", &y));
        let y = y.cast(self.dtype());
        if !self.dtype().is_float() {
            return y;
        }
        y.made_by(&[&x], || Box::new(Gather { axis, shape: *x.shape(), index: Saved::new(&index) }))
    }
}

/// Looks up `x[outer, rows, inner]` along the middle axis at `count` ids `id(o, i, c)`. Ids outside give 0.
fn look(
    x: &Array,
    axis: usize,
    count: usize,
    shape: Shape,
    id: impl Fn(usize, usize, usize) -> f64,
) -> Array {
    let (_, rows, inner) = x.shape.split_at_axis(axis);
    Array::from_fn(shape, |at| {
        let (o, i, c) = (at / inner / count, at / inner % count, at % inner);
        let id = id(o, i, c);
        let inside = id >= 0.0 && id < rows as f64;
        if inside { x.data[(o * rows + id as usize) * inner + c] } else { 0.0 }
    })
}

fn embedding64(x: &[Array]) -> Array {
    let mut sizes = x[1].shape.to_vec();
    sizes.push(x[0].shape[1]);
    look(&x[0], 0, x[1].data.len(), Shape::new(&sizes), |_, i, _| x[1].data[i])
}

fn select64(x: &[Array], axis: usize) -> Array {
    let count = x[1].data.len();
    look(&x[0], axis, count, x[0].shape.with(axis, count), |_, i, _| x[1].data[i])
}

fn sum64(x: &[Array], axis: usize, size: usize) -> Array {
    let (_, count, inner) = x[0].shape.split_at_axis(axis);
    let mut y = Array::from_fn(x[0].shape.with(axis, size), |_| 0.0);
    for (at, value) in x[0].data.iter().enumerate() {
        let (o, id, c) = (at / inner / count, x[1].data[at / inner % count], at % inner);
        if id >= 0.0 && id < size as f64 {
            y.data[(o * size + id as usize) * inner + c] += value;
        }
    }
    y
}

/// The reference of gather, as torch.gather.
fn gather64(x: &[Array], axis: usize) -> Array {
    let (from, to) = (x[0].shape, x[1].shape);
    Array::from_fn(to, |at| {
        let id = x[1].data[at];
        if !(id >= 0.0 && id < from[axis] as f64) {
            return 0.0;
        }
        let place = |a: usize| at / to[a + 1..].iter().product::<usize>() % to[a];
        let place = |a: usize| if a == axis { id as usize } else { place(a) };
        x[0].data[(0..from.len()).fold(0, |flat, a| flat * from[a] + place(a))]
    })
}

/// Ids from one below `0..size` to one above it, not sorted. The first one is outside.
fn around(shape: &[usize], size: usize) -> Input {
    let ids = (0..2 * size + 3).map(|i| ((5 * i) % (size + 2)) as f64 - 1.0);
    Input::integers(shape, DType::I32, 0, 1).fill(Fill::Values(ids.collect()))
}

/// A table and ids that visit its rows in no order.
fn scattered([rows, width, count]: [usize; 3]) -> Vec<Input> {
    let ids = (0..count).map(|i| (i * 7919 % rows) as f64).collect();
    vec![Input::normal([rows, width]), Input::integers([count], DType::U32, 0, 1).fill(Fill::Values(ids))]
}

/// Rows of a table.
fn sized(of: [usize; 3]) -> Case {
    let [rows, width, count] = of;
    let name = format!("{count} of {rows}x{width}");
    Case::new(name, scattered(of), |x| x[0].embedding(&x[1]), embedding64).timed(
        "embedding",
        [width + 3 % width],
        move |x, at| {
            let value = x[0].data[x[1].data[at / width] as usize * width + at % width];
            Want { value, bound: 0.0 }
        },
    )
}

/// The gradient of a table of which rows were taken: sums by sorted ids.
fn sized_gradient(
    family: &'static str,
    of: [usize; 3],
    take: impl Fn(&[Tensor]) -> Tensor + Send + Sync + 'static,
) -> Case {
    let [rows, width, count] = of;
    // The kernels read the gradient of what was taken, and write that of the whole table.
    let bytes = 4.0 * (width * (count + rows)) as f64;
    Case::new(format!("{count} of {rows}x{width}"), scattered(of), take, embedding64)
        .timed(family, [7919 % rows * width + 3 % width, rows * width - 1], move |x, at| {
            let (row, column) = (at / width, at % width);
            let hits = (0..count).filter(|&i| x[1].data[i] as usize == row);
            let terms: Vec<f64> = hits.map(|i| x[2].data[i * width + column]).collect();
            let norm = terms.iter().map(|t| t * t).sum::<f64>().sqrt();
            let bound = 4.0 * DType::F32.roundoff() * (terms.len() as f64).sqrt() * norm;
            Want { value: terms.iter().sum(), bound }
        })
        .gradient_of(0, [bytes, 0.0])
}

/// The rows of the benchmark, and small ones for tests.
fn timed() -> Vec<Case> {
    let table = |of| sized_gradient("embedding backward", of, |x| x[0].embedding(&x[1]));
    // Features that many edges read from few nodes, 64 edges per node.
    let edges = |count: usize, nodes| {
        sized_gradient("index_select backward", [nodes, 64, count], |x| x[0].index_select(0, &x[1]))
    };
    vec![
        sized([8192, 512, 4096]).when(When::Quick, When::Quick),
        table([8192, 512, 4096]).when(When::Quick, When::Quick),
        edges(1 << 15, 512).when(When::Quick, When::Never),
        edges(1 << 17, 2048).when(When::Never, When::Quick),
        sized([7, 5, 9]),
        table([7, 5, 19]),
        edges(130, 5),
    ]
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = timed();
    for (rows, width, ids) in
        [(1, 1, &[1][..]), (7, 13, &[3, 5]), (5, 67, &[131]), (3, 8, &[2, 3, 2]), (67, 4, &[])]
    {
        let inputs = vec![Input::normal([rows, width]), Input::integers(ids, DType::U32, 0, rows as i64)];
        let name = format!("{rows} {width} {ids:?}");
        all.push(Case::new(name, inputs, |x| x[0].embedding(&x[1]), embedding64));
    }
    for width in [3, 4] {
        let inputs = vec![Input::normal([5, width]), Input::integers([40], DType::I32, -3, 9)];
        let name = format!("ids outside the table, width {width}");
        all.push(Case::new(name, inputs, |x| x[0].embedding(&x[1]), embedding64).outside());
    }
    for (dtype, width) in [DType::F16, DType::Bf16].into_iter().flat_map(|d| [5, 6, 8].map(|w| (d, w))) {
        let inputs = vec![Input::normal([5, width]).dtype(dtype), around(&[7], 5)];
        let name = format!("{dtype}, width {width}");
        all.push(Case::new(name, inputs, |x| x[0].embedding(&x[1]), embedding64).outside());
    }
    // More ids than one tile of the sort.
    let many = vec![Input::normal([67, 1]), Input::integers([2500], DType::U32, 0, 67)];
    all.push(Case::new("gradient of many ids", many, |x| x[0].embedding(&x[1]), embedding64));
    // One id at most places, so that its run crosses many chunks, and more ids than a workgroup's list.
    for (count, width) in [(300, 4), (2100, 3), (9001, 1)] {
        let ids = (0..count).map(|i| if i % 5 == 3 { (i % 7) as f64 } else { 5.0 }).collect();
        let ids = Input::integers([count], DType::U32, 0, 1).fill(Fill::Values(ids));
        let name = format!("gradient of one id at most of {count} places, width {width}");
        let inputs = vec![Input::normal([11, width]), ids];
        all.push(Case::new(name, inputs, |x| x[0].embedding(&x[1]), embedding64));
    }

    for (shape, axis, count) in
        [(&[4][..], 0, 9), (&[3, 5, 4], 1, 7), (&[3, 5, 3], 1, 7), (&[2, 13], 1, 67), (&[6, 2, 2], 0, 1)]
    {
        let inputs = vec![Input::normal(shape), around(&[count], shape[axis])];
        let at = axis as isize;
        let name = format!("index_select {count} of {shape:?} axis {axis}");
        let forward = move |x: &[Tensor]| x[0].index_select(at, &x[1]);
        all.push(Case::new(name, inputs, forward, move |x| select64(x, axis)).outside());
    }
    for (shape, axis, size) in
        [(&[9][..], 0, 4), (&[3, 7, 4], 1, 5), (&[3, 7, 3], 1, 1), (&[67, 5], 0, 13), (&[0, 4], 0, 3)]
    {
        let inputs = vec![Input::normal(shape), around(&[shape[axis]], size)];
        let at = axis as isize;
        let name = format!("index_sum of {shape:?} axis {axis} to {size}");
        let forward = move |x: &[Tensor]| x[0].index_sum(at, &x[1], size);
        let case = Case::new(name, inputs, forward, move |x| sum64(x, axis, size));
        all.push(if shape[axis] > 0 { case.outside() } else { case });
    }
    for (shape, axis, index) in [
        (&[1][..], 0, &[1][..]),
        (&[5], 0, &[131]),
        (&[7, 13], 1, &[7, 1]),
        (&[7, 13], 0, &[3, 11]),
        (&[3, 5, 4], 1, &[3, 9, 4]),
        (&[3, 5, 4], 1, &[2, 3, 2]),
    ] {
        let inputs = vec![Input::normal(shape), around(index, shape[axis])];
        let at = axis as isize;
        let name = format!("gather {index:?} of {shape:?} axis {axis}");
        let forward = move |x: &[Tensor]| x[0].gather(at, &x[1]);
        all.push(Case::new(name, inputs, forward, move |x| gather64(x, axis)).outside());
    }
    for dtype in [DType::F16, DType::Bf16, DType::I32] {
        let input = || vec![Input::integers([5, 3], dtype, -9, 9), Input::integers([5, 2], DType::U32, 0, 3)];
        let name = format!("gather of {dtype}");
        all.push(Case::new(name, input(), |x| x[0].gather(1, &x[1]), |x| gather64(x, 1)).exact());
        let input = vec![Input::integers([5, 3], dtype, -9, 9), Input::integers([8], DType::U32, 0, 5)];
        let name = format!("index_select of {dtype}");
        all.push(Case::new(name, input, |x| x[0].index_select(0, &x[1]), |x| select64(x, 0)).exact());
    }
    all
}
