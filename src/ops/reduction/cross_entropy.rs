//! Cross-entropy of logits against class indices. It is fused, so probabilities are never stored.
//!
//! The method is [`Tensor::cross_entropy`], and [`plan`] says which kernels it takes.

use super::softmax::{by_pieces, groups, lanes, log_softmax64, piece, turns, walks};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::plan::Pass;
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::moves::check_ids::check_ids;
use crate::ops::stored;
use crate::ops::timed::{Want, When};
use crate::shape::Shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

pub(super) const OP: &str = "cross_entropy";

fn source(class: &DeviceClass, lanes: u32, piece: usize) -> Source {
    by_pieces(class, Source::file("cross_entropy").u32("LANES", lanes), piece)
}

/// The kernels' parameters, without the grid.
#[derive(Clone, Copy)]
pub(super) struct CrossEntropyPlan {
    pub rows: usize,
    pub classes: usize,
    /// The ignored target's bits.
    pub ignored: Option<u32>,
}

impl CrossEntropyPlan {
    /// Checks the arguments of `op`.
    #[track_caller]
    pub fn new(op: &str, logits: &Tensor, targets: &Tensor, ignore: Option<i64>) -> CrossEntropyPlan {
        same_gpu(op, &[logits, targets]);
        let axes = logits.shape().len();
        assert!(axes > 0, "{op}: logits of shape {} have no axis of classes", logits.shape());
        let classes = logits.shape()[axes - 1];
        assert!(
            *targets.shape() == logits.shape().without(axes - 1),
            "{op}: targets must have the logits' shape without the last axis: logits {}, targets {}",
            logits.shape(),
            targets.shape()
        );
        let ignored = match targets.dtype() {
            DType::U32 => ignore.and_then(|i| u32::try_from(i).ok()),
            DType::I32 => ignore.and_then(|i| i32::try_from(i).ok()).map(i32::cast_unsigned),
            other => panic!("{op}: targets must be u32 or i32, got {other}"),
        };
        // A negative i32 is a large u32, so one comparison in the kernel finds targets outside on either side.
        assert!(classes > 0 && classes <= i32::MAX as usize, "{op}: {classes} classes in {}", logits.shape());
        assert!(logits.dtype().is_float(), "{op}: needs floats, got {}; cast first", logits.dtype());
        CrossEntropyPlan { rows: targets.count(), classes, ignored }
    }

    /// Returns logits as the kernels read them: those of 16 bits as they are, except by the ops that long rows take.
    pub fn readable(&self, logits: &Tensor) -> Tensor {
        let half = Some(logits.dtype()).filter(|dtype| dtype.is_half() && self.walks());
        stored::readable(&logits.detach(), half, self.classes)
    }

    /// Whether a kernel can walk rows of this many classes.
    pub fn walks(&self) -> bool {
        walks(self.classes / piece(self.classes))
    }

    fn launch<'a>(&self, source: &'a Source, entry: &'a str, grid: [u32; 3]) -> Launch<'a> {
        Launch::new(OP, source, entry, grid)
            .set("rows", self.rows)
            .set("classes", self.classes)
            .set("ignores", self.ignored.is_some())
            .set("ignored", self.ignored.unwrap_or(0))
            .set("nan", f32::NAN)
            .reuse(2)
    }

    /// Returns `[2, rows]`, which holds the losses and a 1 or 0 per row for the count, and the statistics for the
    /// backward pass.
    fn forward(&self, x: &Tensor, targets: &Tensor) -> [Tensor; 2] {
        let (gpu, rows, piece) = (x.gpu(), self.rows, piece(self.classes));
        let losses = Tensor::empty(gpu, OP, [2, rows], DType::F32);
        if walks(self.classes / piece) {
            let statistics = Tensor::empty(gpu, OP, [rows, 2], DType::F32);
            let lanes = lanes(gpu.class(), self.classes / piece, 1, rows);
            let source = stored::set(source(gpu.class(), lanes, piece), &[("in", x.dtype())]);
            let launch = self.launch(&source, "forward", groups(rows, lanes));
            let launch = launch.bind("x", x).bind("targets", targets).bind_mut("losses", &losses);
            let turns = turns(self.classes / piece, lanes, 1);
            gpu.launch(launch.bind_mut("made", &statistics).turns(turns));
            return [losses, statistics];
        }
        let [most, sum] = self.long(x);
        let pairs = |second: &Tensor| Tensor::stack(&[&most, second], 1).contiguous();
        let source = source(gpu.class(), 1, piece);
        let launch = self.launch(&source, "long_rows", grid(rows.div_ceil(64)));
        let launch = launch.bind("x", x).bind("targets", targets).bind_mut("losses", &losses);
        gpu.launch(launch.bind("statistics", &pairs(&sum)).turns(0));
        [losses, pairs(&sum.recip())]
    }
}

impl CrossEntropyPlan {
    /// Returns the largest logit `m` of each row and the sum of `exp(x - m)`, computed by other ops.
    pub fn long(&self, x: &Tensor) -> [Tensor; 2] {
        let all = x.reshape([self.rows, self.classes]);
        let most = all.max(1);
        let sum = all.sub(&most.unsqueeze(1)).exp().sum(1);
        [most, sum]
    }

    /// Returns `-x[target]` of each row with 1 or 0 for the count, as [`CrossEntropyPlan::total`] adds them up.
    pub fn picked(&self, x: &Tensor, targets: &Tensor) -> Tensor {
        let (gpu, rows) = (x.gpu(), self.rows);
        let losses = Tensor::empty(gpu, OP, [2, rows], DType::F32);
        // With m = 0 and s = 1 the loss `m + log(s) - x[target]` is what is wanted.
        let sums = Tensor::stack(&[&Tensor::zeros(gpu, [rows]), &Tensor::ones(gpu, [rows])], 1).contiguous();
        let source = source(gpu.class(), 1, piece(self.classes));
        let launch = self.launch(&source, "long_rows", grid(rows.div_ceil(64)));
        let launch = launch.bind("x", x).bind("targets", targets).bind_mut("losses", &losses);
        gpu.launch(launch.bind("statistics", &sums).turns(0));
        losses
    }
}

/// The most rows whose losses one workgroup adds up, in 32 turns.
const ROWS: usize = 32 * 8 * 256;

impl CrossEntropyPlan {
    /// Returns the sum of the losses with the count of rows, and their quotient.
    pub fn total(&self, losses: &Tensor) -> [Tensor; 2] {
        let gpu = losses.gpu();
        let scalar = Shape::new(&[]);
        if self.rows > ROWS {
            let totals = losses.sum(1);
            let mean = totals.slice(0, 0..1).div(&totals.slice(0, 1..2)).reshape(scalar);
            return [totals, mean];
        }
        let totals = Tensor::empty(gpu, OP, [2], DType::F32);
        let mean = Tensor::empty(gpu, OP, scalar, DType::F32);
        let source = source(gpu.class(), 64, 1);
        let launch = self.launch(&source, "total", [1, 1, 1]).bind("terms", losses);
        let launch = launch.bind_mut("summed", &totals).bind_mut("mean", &mean);
        gpu.launch(launch.turns(self.rows.div_ceil(8 * 256)));
        [totals, mean]
    }
}

/// Returns the passes of the loss of `[rows, classes]`. Empty if it is computed by other ops.
pub fn plan(class: &DeviceClass, [rows, classes]: [usize; 2]) -> Vec<Pass> {
    let piece = piece(classes);
    if !walks(classes / piece) || rows > ROWS {
        return vec![];
    }
    let pass = |source, entry: &str, grid, elements: usize| {
        let (entry, bytes) = (entry.to_string(), 4.0 * elements as f64);
        Pass { op: OP.into(), source, entry, grid, parts: 1, bytes, flops: 0.0 }
    };
    let lanes = lanes(class, classes / piece, 1, rows);
    let forward = source(class, lanes, piece);
    vec![
        pass(forward, "forward", groups(rows, lanes), rows * classes + 5 * rows),
        pass(source(class, 64, 1), "total", [1, 1, 1], 2 * rows),
    ]
}

struct CrossEntropy {
    plan: CrossEntropyPlan,
    /// The logits as given. 16-bit logits take half the memory and are read again in the backward pass.
    logits: Saved,
    targets: Saved,
    /// `[rows, 2]`: the largest logit `m` and `1 / sum exp(x - m)`.
    statistics: Saved,
    /// The sum of the losses and the count of rows.
    totals: Saved,
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (logits, dy) = (self.logits.get(OP), dy.contiguous());
        let half = Some(logits.dtype()).filter(|dtype| dtype.is_half());
        let x = stored::readable(logits, half, self.plan.classes);
        let dtype = if x.dtype() == sink.dtype(0) { x.dtype() } else { DType::F32 };
        let dx = Tensor::empty(x.gpu(), OP, x.shape(), dtype);
        let piece = piece(self.plan.classes);
        let grid = grid((x.count() / piece).div_ceil(64));
        let source = stored::set(source(x.gpu().class(), 64, piece), &[("in", x.dtype()), ("out", dtype)]);
        x.gpu().launch(
            self.plan
                .launch(&source, "backward", grid)
                .bind("x", &x)
                .bind("targets", self.targets.get(OP))
                .bind("statistics", self.statistics.get(OP))
                .bind("totals", self.totals.get(OP))
                .bind("dy", &dy)
                .bind_mut("dx", &dx)
                .turns(0),
        );
        sink.add(0, dx);
    }
}

impl Tensor {
    /// The mean over all rows of `-log softmax(logits)[target]`, a scalar. Logits are `[.., classes]`, targets `[..]`.
    ///
    /// Rows whose target is `ignore` count neither in the sum nor in the mean. If all rows are ignored, the mean is
    /// NaN. Any other target outside `0..classes` makes the loss and that row's gradient NaN and reads nothing out of
    /// bounds. A checked device reports it at the next readback ([`Error::Outside`](crate::Error::Outside)). An
    /// `ignore` that the targets' type cannot hold never matches. f16 and bf16 logits are converted to f32.
    ///
    /// ```no_run
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let logits = Tensor::from_slice(&gpu, &[2.0f32, 0.0, -1.0, 0.0, 3.0, 0.0], [2, 3]).requires_grad();
    /// let targets = Tensor::from_slice(&gpu, &[0i32, -100], [2]);
    /// let loss = logits.cross_entropy(&targets, Some(-100));
    /// let grads = loss.backward()?;
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// If the targets are floats, if their shape is not the logits' without the last axis, if the logits are integers,
    /// or if there is no class.
    #[track_caller]
    pub fn cross_entropy(&self, targets: &Tensor, ignore: Option<i64>) -> Tensor {
        let plan = CrossEntropyPlan::new(OP, self, targets, ignore);
        let x = plan.readable(self);
        let targets = targets.contiguous();
        check_ids(OP, &targets, plan.classes, plan.ignored);
        let [losses, statistics] = plan.forward(&x, &targets);
        let [totals, y] = plan.total(&losses);
        y.made_by(&[self], || {
            Box::new(CrossEntropy {
                plan,
                logits: Saved::new(if self.dtype() == DType::F32 { &x } else { self }),
                targets: Saved::new(&targets),
                statistics: Saved::new(&statistics),
                totals: Saved::new(&totals),
            })
        })
    }
}

fn reference(x: &[Array], ignored: Option<f64>) -> Array {
    let log = log_softmax64(&x[0], x[0].shape.len() - 1);
    let classes = x[0].shape[x[0].shape.len() - 1];
    let (mut sum, mut count) = (0.0, 0.0);
    for (row, &target) in x[1].data.iter().enumerate().filter(|(_, t)| Some(**t) != ignored) {
        let inside = target >= 0.0 && target < classes as f64;
        sum -= if inside { log.data[row * classes + target as usize] } else { f64::NAN };
        count += 1.0;
    }
    Array::from_fn([], |_| sum / count)
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name: String, logits: Input, targets: Input, ignore: Option<i64>| {
        Case::new(
            name,
            vec![logits, targets],
            move |x| x[0].cross_entropy(&x[1], ignore),
            move |x| reference(x, ignore.map(|i| i as f64)),
        )
        .ulps(16.0, 32.0)
    };
    let sized = |rows: usize, classes: usize| {
        let ids = (0..rows).map(|row| (row * 7 % classes) as f64).collect();
        let targets = Input::integers([rows], DType::U32, 0, 1).fill(Fill::Values(ids));
        case(format!("{rows}x{classes}"), Input::normal([rows, classes]), targets, None).timed(
            "cross_entropy",
            [0],
            |x, _| {
                let value = reference(x, None).data[0];
                Want { value, bound: 1e-5 * value.abs() }
            },
        )
    };
    let values = |shape: &[usize], dtype, values: &[f64]| {
        Input::integers(shape, dtype, 0, 1).fill(Fill::Values(values.to_vec()))
    };
    let mut all = vec![sized(4096, 1024).when(When::Quick, When::Quick), sized(5, 12)];
    for (rows, classes) in [
        (1, 1),
        (1, 2),
        (67, 7),
        (65, 17),
        (3, 67),
        (9, 131),
        (5, 257),
        (2, 1031),
        (3, 4),
        (5, 132),
        (2, 1028),
    ] {
        let targets = Input::integers([rows], DType::U32, 0, classes as i64);
        all.push(case(format!("{rows} rows of {classes}"), Input::normal([rows, classes]), targets, None));
    }
    let shape = [2, 3, 19];
    let logits = || Input::normal(shape);
    let some = |dtype, ignored: f64| values(&[2, 3], dtype, &[3.0, ignored, 18.0, 0.0, ignored, ignored]);
    all.push(case("ignore -100".into(), logits(), some(DType::I32, -100.0), Some(-100)));
    all.push(case("ignore 5".into(), logits(), some(DType::U32, 5.0), Some(5)));
    all.push(case("ignore past the classes".into(), logits(), some(DType::U32, 4e9), Some(4_000_000_000)));
    all.push(case("ignore what u32 cannot hold".into(), logits(), some(DType::U32, 1.0), Some(-100)));
    for dtype in [DType::F16, DType::Bf16] {
        all.push(case(dtype.to_string(), logits().dtype(dtype), some(DType::U32, 5.0), None));
    }
    let far = Input::normal([3, 70]).fill(Fill::Uniform(400.0, 500.0));
    all.push(case("far".into(), far, values(&[3], DType::U32, &[0.0, 69.0, 35.0]), None).ulps(16.0, 300.0));
    // The loss is NaN, and nothing is read out of bounds: a target one past the end, a negative target, all rows
    // ignored.
    let fixed = || logits().fixed();
    all.push(
        case("target past the end".into(), fixed(), values(&[2, 3], DType::U32, &[19.0, 3.0]), None)
            .outside(),
    );
    all.push(
        case("target negative".into(), fixed(), values(&[2, 3], DType::I32, &[3.0, -1.0]), Some(-100))
            .outside(),
    );
    all.push(case("all ignored".into(), fixed(), values(&[2, 3], DType::I32, &[-100.0]), Some(-100)));
    // Strided logits, and an incoming gradient other than 1.
    all.push(
        Case::new(
            "transposed and scaled",
            vec![Input::normal([9, 5]), Input::integers([5], DType::U32, 0, 9)],
            |x| x[0].t().cross_entropy(&x[1], None).scale(-3.0),
            |x| {
                let turned = Array::from_fn([5, 9], |i| x[0].data[i % 9 * 5 + i / 9]);
                let loss = reference(&[turned, x[1].clone()], None);
                Array::from_fn([], |_| -3.0 * loss.data[0])
            },
        )
        .ulps(16.0, 32.0),
    );
    all
}
