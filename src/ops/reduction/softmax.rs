//! Softmax and log-softmax along any axis, with gradients computed from the result alone.
//!
//! The methods are [`Tensor::softmax`] and [`Tensor::log_softmax`], and [`plan_rows`] says which kernels one takes. With `y` the
//! softmax, `dx = y (dy - sum over axis of dy y)`, and with `y` its logarithm, `dx = dy - e^y sum over axis of dy`.

use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::plan::Pass;
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::timed::{Want, When};
use crate::shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

/// The most pieces of a row that one thread walks, in blocks of 64. Longer rows are shared by more threads, and rows
/// that are too long for 64 threads are computed by other ops.
pub(in crate::ops) const WALK: usize = 4096;

/// Whether a kernel can walk rows of this many pieces.
pub(in crate::ops) fn walks(pieces: usize) -> bool {
    pieces <= 64 * WALK
}

/// Turns of a thread if `lanes` threads walk a row of this many pieces together, `times` times over.
pub(in crate::ops) fn turns(pieces: usize, lanes: u32, times: usize) -> usize {
    times * (pieces.div_ceil(lanes as usize) + WALK / 64 + 1)
}

/// Returns how many threads share a row of `axis` elements that lie `inner` apart, if there are `rows` of them.
pub(in crate::ops) fn lanes(class: &DeviceClass, axis: usize, inner: usize, rows: usize) -> u32 {
    // Measured on llvmpipe, a barrier costs as much as a hundred elements, so sharing only pays if rows are few and
    // long.
    if class.has_dear_barriers() && axis <= WALK && (axis < 128 || rows >= 128) {
        return 1;
    }
    if !class.has_dear_barriers() && inner == 1 {
        // A GPU's threads should have a few vectors each, whose loads are under way together.
        return match axis {
            0..=4 => 1,
            5..=32 => 8,
            33..=64 if 8 * rows >= class.in_flight() => 8,
            33..1024 => 64,
            _ => 256,
        };
    }
    match axis {
        0..16 => 1,
        // Neighbouring threads on neighbouring rows read whole cache lines, but too few rows would leave the device
        // idle.
        _ if inner > 1 && rows >= 1024 && axis <= WALK => 1,
        16..256 => 8,
        _ => 64,
    }
}

/// Returns the grid for `rows` rows with this many lanes each.
pub(in crate::ops) fn groups(rows: usize, lanes: u32) -> [u32; 3] {
    grid(rows.div_ceil((64 / lanes as usize).max(1)))
}

/// The number of elements per load of a contiguous row.
pub(in crate::ops) fn piece(size: usize) -> usize {
    if size.is_multiple_of(4) { 4 } else { 1 }
}

/// Sets the fragments for loads of this many elements. A GPU's threads load several vectors in a turn.
pub(in crate::ops) fn by_pieces(class: &DeviceClass, source: Source, piece: usize) -> Source {
    let ahead = if piece == 4 && !class.has_dear_barriers() { 4 } else { 1 };
    source
        .u32("AHEAD", ahead)
        .slot("piece", if piece == 4 { "piece_4" } else { "piece_1" })
        .slot("row", if piece == 4 { "row_4" } else { "row_1" })
}

fn source(class: &DeviceClass, log: bool, lanes: u32, piece: usize) -> Source {
    by_pieces(class, Source::file("softmax").bool("LOG", log).u32("LANES", lanes), piece)
}

fn name(log: bool) -> &'static str {
    if log { "log_softmax" } else { "softmax" }
}

struct Softmax {
    log: bool,
    axis: usize,
    y: Saved,
}

/// A kernel's file, its grid, its sizes and its turns.
struct SoftmaxPlan {
    source: Source,
    grid: [u32; 3],
    rows: usize,
    axis: usize,
    inner: usize,
    turns: usize,
}

/// Plans the kernel. `None` for rows that are too long for one.
fn plan(class: &DeviceClass, log: bool, shape: &shape::Shape, axis: usize) -> Option<SoftmaxPlan> {
    let (outer, size, inner) = shape.split_at_axis(axis);
    let rows = outer * inner;
    let piece = if inner == 1 { piece(size) } else { 1 };
    let lanes = lanes(class, size / piece, inner, rows);
    let grid = groups(rows, lanes);
    let turns = turns(size / piece, lanes, 2);
    walks(size / piece).then(|| SoftmaxPlan {
        source: source(class, log, lanes, piece),
        grid,
        rows,
        axis: size,
        inner,
        turns,
    })
}

impl SoftmaxPlan {
    fn launch<'a>(&'a self, op: &'a str, entry: &'a str) -> Launch<'a> {
        Launch::new(op, &self.source, entry, self.grid)
            .set("rows", self.rows)
            .set("axis", self.axis)
            .set("inner", self.inner)
            .turns(self.turns)
            .reuse(2)
    }
}

/// Returns the pass of a softmax over the last axis of `[rows, width]`. Empty if it is computed by other ops.
pub fn plan_rows(class: &DeviceClass, [rows, width]: [usize; 2]) -> Vec<Pass> {
    let plan = plan(class, false, &shape::Shape::new(&[rows, width]), 1);
    let bytes = 8.0 * (rows * width) as f64;
    let pass = |SoftmaxPlan { source, grid, .. }| Pass {
        op: "softmax".into(),
        source,
        entry: "forward".into(),
        grid,
        parts: 1,
        bytes,
        flops: 0.0,
    };
    plan.map(pass).into_iter().collect()
}

/// Computes the same values by other ops, for rows that are too long for a kernel.
fn long(log: bool, x: &Tensor, axis: isize) -> Tensor {
    let d = x.sub(&x.max(axis).unsqueeze(axis));
    let e = d.exp();
    let sum = e.sum(axis).unsqueeze(axis);
    if log { d.sub(&sum.log()) } else { e.div(&sum) }
}

fn long_backward(log: bool, y: &Tensor, dy: &Tensor, axis: isize) -> Tensor {
    let total = |terms: &Tensor| terms.sum(axis).unsqueeze(axis);
    if log { dy.sub(&y.exp().mul(&total(dy))) } else { y.mul(&dy.sub(&total(&y.mul(dy)))) }
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        name(self.log)
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (op, y, dy) = (name(self.log), self.y.get(name(self.log)), dy.contiguous());
        let Some(plan) = plan(y.gpu().class(), self.log, y.shape(), self.axis) else {
            return sink.add(0, long_backward(self.log, y, &dy, self.axis as isize));
        };
        let dx = Tensor::empty(y.gpu(), op, y.shape(), DType::F32);
        y.gpu().launch(plan.launch(op, "backward").bind("out", y).bind("dy", &dy).bind_mut("dx", &dx));
        sink.add(0, dx);
    }
}

impl Tensor {
    #[track_caller]
    fn softmaxed(&self, log: bool, axis: isize) -> Tensor {
        let op = name(log);
        let axis = shape::axis(op, axis, self.shape());
        let x = crate::ops::float(op, self).detach().contiguous();
        let y = match plan(x.gpu().class(), log, x.shape(), axis) {
            None => long(log, &x, axis as isize),
            Some(plan) => {
                let y = Tensor::empty(x.gpu(), op, x.shape(), DType::F32);
                x.gpu().launch(plan.launch(op, "forward").bind("x", &x).bind_mut("y", &y));
                y
            }
        };
        let saved = y.clone();
        y.made_by(&[self], || Box::new(Softmax { log, axis, y: Saved::new(&saved) }))
    }

    /// `y = exp(x) / sum over axis of exp(x)`, in f32. The maximum is subtracted first, so nothing overflows.
    ///
    /// Elements of -inf get 0. A row that is all -inf, or that holds NaN or +inf, is NaN throughout, and so is its
    /// gradient.
    ///
    /// # Panics
    /// When the axis is out of range or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[0f32, 0.0, 1000.0, 1000.0], [2, 2]);
    /// assert_eq!(x.softmax(-1).to_vec2::<f32>()?, [[0.5, 0.5], [0.5, 0.5]]); // no overflow
    /// assert_eq!(x.softmax(0).to_vec2::<f32>()?, [[0.0, 0.0], [1.0, 1.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn softmax(&self, axis: isize) -> Tensor {
        self.softmaxed(false, axis)
    }

    /// `y = x - log(sum over axis of exp(x))`, in f32: the logarithm of [`Tensor::softmax`] without its underflow.
    ///
    /// # Panics
    /// When the axis is out of range or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[0f32, 0.0, 0.0, -1000.0], [2, 2]);
    /// let y = x.log_softmax(1).to_vec2::<f32>()?;
    /// assert!((y[0][0] + std::f32::consts::LN_2).abs() < 1e-6);
    /// assert_eq!(y[1], [0.0, -1000.0]); // the logarithm of softmax would be minus infinity
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn log_softmax(&self, axis: isize) -> Tensor {
        self.softmaxed(true, axis)
    }
}

/// `log softmax` in f64. Its exponential is softmax.
pub(crate) fn log_softmax64(x: &Array, axis: usize) -> Array {
    let (outer, size, inner) = x.shape.split_at_axis(axis);
    let mut y = x.clone();
    for row in 0..outer * inner {
        let at = |i: usize| row / inner * size * inner + i * inner + row % inner;
        let most = (0..size).map(|i| x.data[at(i)]).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = (0..size).map(|i| (x.data[at(i)] - most).exp()).sum();
        for i in 0..size {
            y.data[at(i)] = x.data[at(i)] - most - sum.ln();
        }
    }
    y
}

fn softmax64(x: &Array, axis: usize) -> Array {
    let log = log_softmax64(x, axis);
    Array::from_fn(log.shape, |i| log.data[i].exp())
}

/// The softmax of each row.
fn sized([rows, width]: [usize; 2]) -> Case {
    let inputs = vec![Input::normal([rows, width])];
    let elements = [0, rows * width / 2, rows * width - 1];
    Case::new(format!("{rows}x{width}"), inputs, |x| x[0].softmax(-1), |x| softmax64(&x[0], 1))
        .ulps(16.0, 32.0)
        .timed("softmax", elements, move |x, at| {
            let value = softmax64(&x[0].part([1, width], at / width * width), 1).data[at % width];
            Want { value, bound: 1e-4 * value.abs() + 1e-6 }
        })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all: Vec<Case> = [256, 1024].map(|rows| sized([rows, 1024]).when(When::Full, When::Full)).into();
    all.push(sized([4096, 1024]).when(When::Quick, When::Quick));
    all.push(sized([7, 12]));
    let shapes: [(&[usize], usize); 15] = [
        (&[5, 4], 1),
        (&[3, 68], 1),
        (&[2, 1028], 1),
        (&[1, 1], 1),
        (&[7, 13], 1),
        (&[3, 67], 1),
        (&[9, 131], 1),
        (&[2, 263], 1),
        (&[2, 523], 1),
        (&[7, 13], 0),
        (&[3, 67, 5], 1),
        (&[300, 2], 0),
        (&[2, 17, 33], 1),
        (&[2, 3, 5, 65], 2),
        (&[1100, 2], 1),
    ];
    for (shape, axis) in shapes {
        let input = |fill| {
            let input = Input::normal(shape).fill(fill);
            vec![if input.shape.count() > 1000 { input.fixed() } else { input }]
        };
        let at = axis as isize;
        let name = format!("softmax {shape:?} axis {axis}");
        let case = Case::new(
            name,
            input(Fill::Normal(1.0)),
            move |x| x[0].softmax(at),
            move |x| softmax64(&x[0], axis),
        );
        all.push(case.ulps(16.0, 32.0));
        // Inputs within 2 of each other, so that no result is near 0, where only the absolute error is small.
        let name = format!("log_softmax {shape:?} axis {axis}");
        let case = Case::new(
            name,
            input(Fill::Uniform(-1.0, 1.0)),
            move |x| x[0].log_softmax(at),
            move |x| log_softmax64(&x[0], axis),
        );
        all.push(case.ulps(16.0, 32.0));
    }
    for dtype in [DType::F16, DType::Bf16] {
        let half = vec![Input::normal([5, 70]).dtype(dtype)];
        let name = format!("softmax {dtype}");
        let case = Case::new(name, half, |x| x[0].softmax(-1), move |x| softmax64(&x[0], 1));
        all.push(case.ulps(16.0, 32.0));
    }
    // Logits that exp alone would turn into infinity. Rounding of the argument x costs |x| roundoffs of the result.
    let far = || vec![Input::normal([5, 70]).fill(Fill::Uniform(400.0, 500.0)).fixed()];
    all.push(
        Case::new("softmax far", far(), |x| x[0].softmax(-1), move |x| softmax64(&x[0], 1)).ulps(300.0, 0.0),
    );
    all.push(
        Case::new("log_softmax far", far(), |x| x[0].log_softmax(-1), |x| log_softmax64(&x[0], 1))
            .ulps(16.0, 0.0),
    );
    // Masked: -inf gets exactly 0, and the rest are as if it were not there.
    for (rows, width) in [(3, 7), (3, 69), (2, 301)] {
        let inputs = vec![
            Input::normal([rows, width]),
            Input::integers([rows, width], DType::U32, 0, 2)
                .fill(Fill::Values(vec![0.0, 0.0, 1.0, 0.0, 1.0])),
        ];
        let masked = Case::new(
            format!("softmax masked {width}"),
            inputs,
            |x| x[0].where_mask(&x[1], &Tensor::full(x[0].gpu(), [], f32::NEG_INFINITY)).softmax(-1),
            move |x| {
                let kept = |i: usize| if x[1].data[i] != 0.0 { x[0].data[i] } else { f64::NEG_INFINITY };
                softmax64(&Array::from_fn(x[0].shape, kept), 1)
            },
        );
        all.push(masked.ulps(16.0, 32.0));
    }
    all
}
