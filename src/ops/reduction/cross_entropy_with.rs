//! Cross-entropy with weights of classes and smoothed targets, and the loss of each row. It is fused like the plain
//! [`cross_entropy`](super::cross_entropy), whose checks and sums it uses.

use super::cross_entropy::{CrossEntropyPlan, OP};
use super::softmax::{by_pieces, groups, lanes, log_softmax64, piece, turns};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::moves::check_ids::check_ids;
use crate::ops::stored;
use crate::setters::setters;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

/// Options of [`Tensor::cross_entropy_with`] and [`Tensor::cross_entropy_each`]. The default ignores no row, smooths
/// nothing, and weighs all classes alike.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct CrossEntropy<'a> {
    /// The target that marks a row without a loss, such as -100.
    pub ignore: Option<i64>,
    /// The part `e` of a target's probability that all classes share equally, from 0 to 1. The class of the target keeps
    /// the rest. Source: Szegedy et al., arXiv 1512.00567.
    pub smoothing: f32,
    /// The weight of each class, `[classes]`. It gets no gradient.
    pub weight: Option<&'a Tensor>,
}

setters!(CrossEntropy<'a> { ignore: Option<i64>, smoothing: f32, weight: Option<&'a Tensor> });

/// What all kernels of one call have in common.
#[derive(Clone, Copy)]
struct ClassPlan {
    rows: CrossEntropyPlan,
    /// The factors of the target's own loss and of the sum over classes.
    own: f32,
    share: f32,
    /// Whether each row has its own loss, so that there is no mean.
    each: bool,
}

/// `[2, rows]` of losses and targets' weights, and `[rows, 4]` for the backward pass.
type Made = [Tensor; 2];

impl ClassPlan {
    fn source(&self, class: &DeviceClass, lanes: u32) -> Source {
        let source =
            Source::file("cross_entropy_classes").u32("LANES", lanes).bool("SMOOTH", self.share != 0.0);
        by_pieces(class, source, piece(self.rows.classes))
    }

    fn launch<'a>(&self, source: &'a Source, entry: &'a str, grid: [u32; 3]) -> Launch<'a> {
        let ignored = self.rows.ignored;
        Launch::new(OP, source, entry, grid)
            .set("rows", self.rows.rows)
            .set("classes", self.rows.classes)
            .set("ignores", ignored.is_some())
            .set("ignored", ignored.unwrap_or(0))
            .set("nan", f32::NAN)
            .set("own", self.own)
            .set("share", self.share)
            .reuse(2)
    }

    fn forward(&self, x: &Tensor, targets: &Tensor, weight: &Tensor) -> Made {
        let (gpu, CrossEntropyPlan { rows, classes, .. }) = (x.gpu(), self.rows);
        let losses = Tensor::empty(gpu, OP, [2, rows], DType::F32);
        let made = Tensor::empty(gpu, OP, [rows, 4], DType::F32);
        let whole = weight.sum(0);
        if self.rows.walks() {
            let pieces = classes / piece(classes);
            let lanes = lanes(gpu.class(), pieces, 1, rows);
            let source = stored::set(self.source(gpu.class(), lanes), &[("in", x.dtype())]);
            let launch = self.launch(&source, "forward", groups(rows, lanes)).bind("x", x);
            let launch = launch.bind("targets", targets).bind("weight", weight).bind("whole", &whole);
            let launch = launch.bind_mut("losses", &losses).bind_mut("made", &made);
            gpu.launch(launch.turns(turns(pieces, lanes, 2)));
            return [losses, made];
        }
        let [most, sum] = self.rows.long(x);
        let level = most.unsqueeze(1).sub(&x.reshape([rows, classes])).add(&sum.log().unsqueeze(1));
        let rests = level.mul(weight).sum(1);
        let sums = Tensor::stack(&[&most, &sum], 1).contiguous();
        let source = self.source(gpu.class(), 1);
        let launch = self.launch(&source, "long_rows", grid(rows.div_ceil(64))).bind("x", x);
        let launch = launch.bind("targets", targets).bind("weight", weight).bind("whole", &whole);
        let launch = launch.bind("sums", &sums).bind("rests", &rests).bind_mut("losses", &losses);
        gpu.launch(launch.bind_mut("made", &made).turns(0));
        [losses, made]
    }
}

struct OfClasses {
    plan: ClassPlan,
    /// The logits as given. 16-bit logits take half the memory and are read again in the backward pass.
    logits: Saved,
    targets: Saved,
    weight: Saved,
    /// `[rows, 4]`: the largest logit, `1 / sum exp(x - m)`, and the factors of the target's and of all classes' parts.
    statistics: Saved,
    /// The sum of the losses and what it was divided by. Any number if there is no mean.
    totals: Saved,
}

impl Op for OfClasses {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (logits, dy, plan) = (self.logits.get(OP), dy.contiguous(), self.plan);
        let x = stored::readable(logits, Some(logits.dtype()).filter(|d| d.is_half()), plan.rows.classes);
        let dtype = if x.dtype() == sink.dtype(0) { x.dtype() } else { DType::F32 };
        let dx = Tensor::empty(x.gpu(), OP, x.shape(), dtype);
        let grid = grid((x.count() / piece(plan.rows.classes)).div_ceil(64));
        let source = plan.source(x.gpu().class(), 64).bool("EACH", plan.each);
        let source = stored::set(source, &[("in", x.dtype()), ("out", dtype)]);
        let launch = plan.launch(&source, "backward", grid).bind("x", &x);
        let launch = launch.bind("targets", self.targets.get(OP)).bind("weight", self.weight.get(OP));
        let launch = launch.bind("statistics", self.statistics.get(OP)).bind("totals", self.totals.get(OP));
        x.gpu().launch(launch.bind("dy", &dy).bind_mut("dx", &dx).turns(0));
        sink.add(0, dx);
    }
}

impl Tensor {
    #[track_caller]
    fn cross_entropy_of(&self, op: &str, targets: &Tensor, options: CrossEntropy, each: bool) -> Tensor {
        let CrossEntropy { ignore, smoothing, weight } = options;
        let rows = CrossEntropyPlan::new(op, self, targets, ignore);
        assert!((0.0..=1.0).contains(&smoothing), "{op}: smoothing must be from 0 to 1, got {smoothing}");
        let weight = match weight {
            None => Tensor::ones(self.gpu(), [rows.classes]),
            Some(weight) => {
                same_gpu(op, &[self, weight]);
                assert!(
                    weight.shape()[..] == [rows.classes],
                    "{op}: the weight must be [{}], one number for each class of logits {}, got {}",
                    rows.classes,
                    self.shape(),
                    weight.shape()
                );
                crate::ops::float(op, weight).detach().contiguous()
            }
        };
        let plan = ClassPlan { rows, own: 1.0 - smoothing, share: smoothing / rows.classes as f32, each };
        let (x, ids) = (rows.readable(self), targets.contiguous());
        check_ids(OP, &ids, rows.classes, rows.ignored);
        let [losses, statistics] = plan.forward(&x, &ids, &weight);
        let [totals, y] = if each {
            [losses.clone(), losses.slice(0, 0..1).reshape(*targets.shape())]
        } else {
            rows.total(&losses)
        };
        y.made_by(&[self], || {
            Box::new(OfClasses {
                plan,
                logits: Saved::new(if self.dtype() == DType::F32 { &x } else { self }),
                targets: Saved::new(&ids),
                weight: Saved::new(&weight),
                statistics: Saved::new(&statistics),
                totals: Saved::new(&totals),
            })
        })
    }

    /// [`cross_entropy`](Self::cross_entropy) with an ignored target, weights of classes and smoothed targets, a scalar.
    ///
    /// With weights `w`, by default 1, and `l = -log softmax(logits)`, the loss of a row with target `t` is `(1 - e) w[t]
    /// l[t] + e / classes * (sum over classes c of w[c] l[c])`, where `e` is the smoothing. The result is the sum over the
    /// rows that count, divided by the sum of their `w[t]`. This is PyTorch's definition. Logits are `[.., classes]`,
    /// targets `[..]`. Targets outside the classes are handled as there.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, nn::CrossEntropy};
    /// # let gpu = Gpu::open()?;
    /// let logits = Tensor::zeros(&gpu, [2, 4]);
    /// let targets = Tensor::from_slice(&gpu, &[3i32, -100], [2]);
    /// let weight = Tensor::from_slice(&gpu, &[1.0f32, 1.0, 1.0, 2.0], [4]);
    /// let options = CrossEntropy::default().ignore(Some(-100)).smoothing(0.1).weight(Some(&weight));
    /// let loss = logits.cross_entropy_with(&targets, options).item()?;
    /// let want = 4f32.ln() * (0.9 * 2.0 + 0.1 / 4.0 * 5.0) / 2.0;
    /// assert!((loss - want).abs() < 1e-5);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`cross_entropy`](Self::cross_entropy), and if the smoothing is not from 0 to 1, or if the weight is not
    /// `[classes]` of floats.
    #[track_caller]
    pub fn cross_entropy_with(&self, targets: &Tensor, options: CrossEntropy) -> Tensor {
        match options {
            CrossEntropy { ignore, smoothing: 0.0, weight: None } => self.cross_entropy(targets, ignore),
            _ => self.cross_entropy_of("cross_entropy_with", targets, options, false),
        }
    }

    /// The loss of each row as in [`cross_entropy_with`](Self::cross_entropy_with), in the shape of the targets, without
    /// a mean. Rows with the ignored target have loss 0.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, nn::CrossEntropy};
    /// # let gpu = Gpu::open()?;
    /// let logits = Tensor::zeros(&gpu, [2, 4]);
    /// let targets = Tensor::from_slice(&gpu, &[3i32, -100], [2]);
    /// let losses = logits.cross_entropy_each(&targets, CrossEntropy::default().ignore(Some(-100)));
    /// let losses = losses.to_vec::<f32>()?;
    /// assert!((losses[0] - 4f32.ln()).abs() < 1e-6 && losses[1] == 0.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// As [`cross_entropy_with`](Self::cross_entropy_with).
    #[track_caller]
    pub fn cross_entropy_each(&self, targets: &Tensor, options: CrossEntropy) -> Tensor {
        self.cross_entropy_of("cross_entropy_each", targets, options, true)
    }
}

/// Losses and targets' weights of all rows. `x` has logits, targets and, if there are three, weights.
fn rows64(x: &[Array], ignored: Option<f64>, smoothing: f64) -> Vec<[f64; 2]> {
    let log = log_softmax64(&x[0], x[0].shape.len() - 1);
    let classes = x[0].shape[x[0].shape.len() - 1];
    let weight = |class: usize| x.get(2).map_or(1.0, |w| w.data[class]);
    let row = |(row, &target): (usize, &f64)| {
        if Some(target) == ignored {
            return [0.0, 0.0];
        }
        if !(target >= 0.0 && target < classes as f64) {
            return [f64::NAN, 1.0];
        }
        let (log, own) = (&log.data[row * classes..(row + 1) * classes], target as usize);
        let all: f64 = log.iter().enumerate().map(|(class, l)| -weight(class) * l).sum();
        let shared = if smoothing == 0.0 { 0.0 } else { smoothing / classes as f64 * all };
        [(1.0 - smoothing) * weight(own) * -log[own] + shared, weight(own)]
    };
    x[1].data.iter().enumerate().map(row).collect()
}

fn mean64(x: &[Array], ignored: Option<f64>, smoothing: f64) -> Array {
    let rows = rows64(x, ignored, smoothing);
    let sum = |part: usize| rows.iter().map(|row| row[part]).sum::<f64>();
    Array::from_fn([], |_| sum(0) / sum(1))
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name: &str, inputs: Vec<Input>, ignore: Option<i64>, smoothing: f32, each: bool| {
        let forward = move |x: &[Tensor]| {
            let options = CrossEntropy { ignore, smoothing, weight: x.get(2) };
            match each {
                true => x[0].cross_entropy_each(&x[1], options),
                false => x[0].cross_entropy_with(&x[1], options),
            }
        };
        let reference = move |x: &[Array]| {
            let (ignored, smoothing) = (ignore.map(|i| i as f64), smoothing as f64);
            if !each {
                return mean64(x, ignored, smoothing);
            }
            let rows = rows64(x, ignored, smoothing);
            Array::from_fn(x[1].shape, |i| rows[i][0])
        };
        let name = format!("{name}{}", if each { ", each" } else { "" });
        // The parts of a gradient, each of the size of a weight, may cancel.
        Case::new(name, inputs, forward, reference).ulps(16.0, 64.0).grad_floor(1.0)
    };
    let weights = |classes: usize| Input::normal([classes]).fill(Fill::Uniform(0.2, 2.0)).fixed();
    let mut all = Vec::new();
    // Rows on both sides of what one thread, eight and 64 threads share, in vectors and not.
    for (rows, classes) in [(1, 1), (3, 7), (5, 12), (2, 67), (2, 132), (3, 257), (2, 1028), (130, 17)] {
        let targets = Input::integers([rows], DType::U32, 0, classes as i64);
        let logits = || Input::normal([rows, classes]);
        let name = format!("{rows} rows of {classes}");
        let weighted = || vec![logits(), targets.clone(), weights(classes)];
        all.push(case(&format!("{name}, smoothed"), vec![logits(), targets.clone()], None, 0.2, false));
        all.push(case(&format!("{name}, weighted"), weighted(), None, 0.0, false));
        if classes < 1000 {
            all.push(case(&format!("{name}, both"), weighted(), None, 0.1, false));
            all.push(case(&format!("{name}, both"), weighted(), None, 0.1, true));
        }
    }
    let values =
        |dtype, values: &[f64]| Input::integers([2, 3], dtype, 0, 1).fill(Fill::Values(values.to_vec()));
    for each in [false, true] {
        let some = || values(DType::I32, &[3.0, -100.0, 18.0, 0.0, -100.0, 5.0]);
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for classes in [19, 20] {
                let inputs = vec![Input::normal([2, 3, classes]).dtype(dtype), some(), weights(classes)];
                all.push(case(&format!("{dtype} {classes}"), inputs, Some(-100), 0.3, each));
            }
        }
        let plain = vec![Input::normal([2, 3, 19]), some()];
        all.push(case("ignore", plain, Some(-100), 0.0, each));
        // Zero weights, as for a class that is left out, and all of the smoothing.
        let zeros = weights(19).fill(Fill::Values(vec![0.0, 1.0, 0.5, 2.0]));
        all.push(case("zero weights", vec![Input::normal([2, 3, 19]), some(), zeros], Some(-100), 0.5, each));
        all.push(case("only the share", vec![Input::normal([2, 3, 19]), some()], Some(-100), 1.0, each));
        let outside = vec![Input::normal([2, 3, 19]).fixed(), values(DType::U32, &[19.0, 3.0]), weights(19)];
        all.push(case("target past the end", outside, None, 0.1, each).outside());
        let far = Input::normal([2, 3, 70]).fill(Fill::Uniform(400.0, 500.0));
        let ids = values(DType::U32, &[0.0, 69.0, 35.0]);
        all.push(case("far", vec![far, ids, weights(70)], None, 0.1, each).ulps(16.0, 300.0));
    }
    let nothing = vec![Input::normal([2, 3, 19]).fixed(), values(DType::I32, &[-100.0])];
    all.push(case("all ignored", nothing, Some(-100), 0.1, false));
    all
}
