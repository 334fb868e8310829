//! Layer norm and RMS norm over the last axis.
//!
//! The methods are [`Tensor::layer_norm`] and [`Tensor::rms_norm`], and [`plan`] says which kernels a layer norm takes. As layers they
//! are [`nn::Norm`](crate::nn::Norm).

use super::columns::Columns;
use super::softmax::{WALK, groups, lanes, turns, walks};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, Work, grid};
use crate::gpu::plan::Pass;
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::reduction::reduce;
use crate::ops::stored;
use crate::ops::timed::{Want, When};
use crate::precision::{Precision, autocast, precision};
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

#[derive(Clone, Copy, PartialEq)]
pub(in crate::ops) enum NormKind {
    Layer,
    Rms,
}

impl NormKind {
    fn name(self) -> &'static str {
        match self {
            NormKind::Layer => "layer_norm",
            NormKind::Rms => "rms_norm",
        }
    }

    fn source(self, lanes: u32, piece: usize) -> Source {
        let source = Source::file("norm").bool("CENTRED", self == NormKind::Layer).u32("LANES", lanes);
        in_pieces(source, piece)
    }
}

fn in_pieces(source: Source, piece: usize) -> Source {
    source.slot("piece", if piece == 4 { "piece_4" } else { "piece_1" })
}

/// A kernel over rows.
struct RowsPlan {
    source: Source,
    grid: [u32; 3],
    turns: usize,
}

impl RowsPlan {
    /// The kernel that reads and writes its slots in these types.
    fn stored(self, slots: &[(&'static str, DType)]) -> RowsPlan {
        RowsPlan { source: stored::set(self.source, slots), ..self }
    }
}

/// What kernels bind in place of a gain or shift that is not there, which they do not use.
fn absent(x: &Tensor, width: usize) -> Tensor {
    if x.dtype() == DType::F32 { x.clone() } else { Tensor::empty(x.gpu(), "norm", [width], DType::F32) }
}

/// What all kernels of one call have in common.
#[derive(Clone, Copy)]
pub(in crate::ops) struct NormPlan {
    kind: NormKind,
    rows: usize,
    width: usize,
    eps: f32,
    weighted: bool,
    biased: bool,
}

impl NormPlan {
    /// The number of elements per load.
    fn piece(&self) -> usize {
        super::softmax::piece(self.width)
    }

    /// Plans a kernel over rows. A GPU holds a row in the registers of the threads that share it, if they are at most
    /// 256. Longer rows are walked, and so are all rows where barriers are dear.
    fn over_rows(&self, class: &DeviceClass) -> RowsPlan {
        let (rows, pieces) = (self.rows, self.width / self.piece());
        let held = if pieces <= 4 * 256 { 4 } else { 8 };
        if class.has_dear_barriers() || pieces > held * 256 {
            let lanes = lanes(class, pieces, 1, rows);
            let source = self.kind.source(lanes, self.piece());
            return RowsPlan { source, grid: groups(rows, lanes), turns: turns(pieces, lanes, 3) };
        }
        // A warp's loads should be of neighbouring pieces as far as a row has them.
        let lanes = pieces.div_ceil(held).next_power_of_two().max(pieces.next_power_of_two().min(8));
        let source = Source::file("norm_rows").bool("CENTRED", self.kind == NormKind::Layer);
        let source = source.u32("LANES", lanes as u32).u32("HELD", held as u32);
        let grid = grid(rows.div_ceil((64 / lanes).max(1)));
        RowsPlan { source: in_pieces(source, self.piece()), grid, turns: 64 }
    }

    /// Makes a launch over rows of `x`.
    fn launch<'a>(&self, plan: &'a RowsPlan, entry: &'a str) -> Launch<'a> {
        let launch = self.launch_any(&plan.source, entry, plan.grid).turns(plan.turns);
        let launch = launch.set("eps", self.eps).set("weighted", self.weighted).set("biased", self.biased);
        if plan.source.name() == "norm" { launch.set("span", 0usize) } else { launch }
    }

    fn launch_any<'a>(&self, source: &'a Source, entry: &'a str, grid: [u32; 3]) -> Launch<'a> {
        Launch::new(self.kind.name(), source, entry, grid)
            .set("rows", self.rows)
            .set("width", self.width)
            .reuse(2)
    }

    /// Workgroups side by side over the columns.
    fn across(&self) -> usize {
        (self.width / self.piece()).div_ceil(64)
    }

    /// For the sums over rows, returns the number of parts and the rows per part. There are as many parts as keep the
    /// device busy, but each is long enough that the second pass is small beside the first, and short enough for a
    /// thread to walk.
    fn parts(&self, class: &DeviceClass) -> [usize; 2] {
        let wanted = class.wanted(64, 8.0 * (self.rows * self.width) as f64, 0.0);
        let busy = wanted.div_ceil(self.across().max(1)).min(self.rows.div_ceil(16));
        let span = self.rows.div_ceil(busy.max(self.rows.div_ceil(WALK)).max(1)).max(1);
        [self.rows.div_ceil(span), span]
    }

    /// Whether a kernel can walk rows of this width. Longer rows are computed by other ops.
    fn walks(&self) -> bool {
        walks(self.width / self.piece())
    }

    /// Computes the result and the statistics by other ops.
    fn long(&self, x: &Tensor, g: &Tensor, b: &Tensor) -> [Tensor; 2] {
        let x = x.reshape([self.rows, self.width]);
        let mean = match self.kind {
            NormKind::Layer => x.mean(1),
            NormKind::Rms => Tensor::zeros(x.gpu(), [self.rows]),
        };
        let d = x.sub(&mean.unsqueeze(1));
        let variance = d.square().mean(1).affine(1.0, self.eps);
        // If the variance overflows, 1 / sqrt(infinity) would silently make the row 0, so it becomes NaN.
        let (root, op) = (variance.rsqrt(), self.kind.name());
        let r = match self.kind {
            NormKind::Layer => {
                Tensor::lazy(op, "finite_or_nan4($0, $1)", DType::F32, *root.shape(), &[&root, &variance])
            }
            // If the row itself holds an infinity, its finite elements become 0, as in norm.wgsl.
            NormKind::Rms => {
                let seen = x.scale(2f32.powi(-100)).sum(1);
                let template = "pick4(finite_or_nan4($0, $1), $0, !finite4($2))";
                Tensor::lazy(op, template, DType::F32, *root.shape(), &[&root, &variance, &seen])
            }
        };
        let unit = d.mul(&r.unsqueeze(1));
        let scaled = if self.weighted { unit.mul(g) } else { unit };
        let y = if self.biased { scaled.add(b) } else { scaled };
        let rest = Tensor::zeros(x.gpu(), [self.rows]);
        [y, Tensor::stack(&[&mean, &r, &rest], 1).contiguous()]
    }

    fn long_gradient(&self, x: &Tensor, weight: Option<&Tensor>, statistics: &Tensor, dy: &Tensor) -> Tensor {
        let [x, dy] = [x, dy].map(|t| t.reshape([self.rows, self.width]));
        let of_row = |i: usize| statistics.slice(1, i..i + 1);
        let unit = x.sub(&of_row(0)).mul(&of_row(1)).add(&of_row(2));
        let h = weight.map_or(dy.clone(), |g| dy.mul(g));
        let along = h.sub(&unit.mul(&h.mul(&unit).mean(1).unsqueeze(1)));
        let centred = if self.kind == NormKind::Layer { along.sub(&h.mean(1).unsqueeze(1)) } else { along };
        centred.mul(&of_row(1))
    }

    /// A layer norm with gain and shift, for ops that contain one.
    pub(in crate::ops) fn layer(rows: usize, width: usize, eps: f32) -> NormPlan {
        NormPlan { kind: NormKind::Layer, rows, width, eps, weighted: true, biased: true }
    }

    /// Computes `dx` in this type from the input, the weight, the statistics of the forward pass and `dy`.
    pub(in crate::ops) fn gradient(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        statistics: &Tensor,
        dy: &Tensor,
        dtype: DType,
    ) -> Tensor {
        if !self.walks() {
            return self.long_gradient(x, weight, statistics, dy).reshape(*x.shape());
        }
        let dx = Tensor::empty(x.gpu(), self.kind.name(), x.shape(), dtype);
        let weight = weight.map_or_else(|| absent(x, self.width), |w| w.cast(DType::F32).contiguous());
        let plan = self.over_rows(x.gpu().class());
        let plan = plan.stored(&[("in", x.dtype()), ("grad", dy.dtype()), ("out", dtype)]);
        let launch = self.launch(&plan, "backward").bind("x", x).bind("weight", &weight);
        let launch = launch.bind("statistics", statistics).bind("dy", dy).bind_mut("dx", &dx);
        x.gpu().launch(launch);
        dx
    }

    /// How a GPU's workgroups share the sums over rows. `None` where a thread walks a column alone.
    fn shared(&self, class: &DeviceClass) -> Option<Columns> {
        let piece = self.piece();
        let of = || Columns::of(class, [1, self.rows, self.width / piece], piece == 4, 2);
        (!class.has_dear_barriers()).then(of)
    }

    /// Returns `[2, width]`: the sums over rows of `dy x^` and of `dy`, where `x^` is the normalised `x`. They are the
    /// gradients of gain and shift.
    pub(in crate::ops) fn sums(&self, x: &Tensor, statistics: &Tensor, dy: &Tensor) -> Tensor {
        let (op, width, class) = (self.kind.name(), self.width, x.gpu().class());
        let empty = |parts: usize| Tensor::empty(x.gpu(), op, [parts, 2, width], DType::F32);
        let partial = if let Some(columns) = self.shared(class) {
            let partial = empty(columns.parts);
            let source = in_pieces(Source::file("norm_columns"), self.piece());
            let source = stored::set(source, &[("in", x.dtype()), ("grad", dy.dtype())]);
            let launch = columns.set(self.launch_any(&source, "columns", columns.grid()));
            let work = Work { flops: 0.0, parts: columns.parts };
            let launch = launch.bind("x", x).bind("statistics", statistics).bind("dy", dy);
            x.gpu().launch(launch.bind_mut("partial", &partial).work(work));
            partial
        } else {
            let [parts, span] = self.parts(class);
            let (partial, source) = (empty(parts), self.kind.source(64, self.piece()));
            let source = stored::set(source, &[("in", x.dtype()), ("grad", dy.dtype())]);
            let launch = self.launch_any(&source, "columns", grid(parts * self.across()));
            let launch =
                launch.set("span", span).set("eps", 0.0f32).set("weighted", false).set("biased", false);
            let work = Work { flops: 0.0, parts };
            let launch = launch.bind("x", x).bind("statistics", statistics).bind("dy", dy);
            x.gpu().launch(launch.bind_mut("partial", &partial).turns(turns(span, 1, 1)).work(work));
            partial
        };
        if partial.shape()[0] == 1 { partial.reshape([2, width]) } else { partial.sum(0) }
    }
}

/// Returns the passes of a layer norm of `[rows, width]`: those of the forward pass, and those of the sums over rows
/// for the gradients of gain and shift.
pub fn plan(class: &DeviceClass, [rows, width]: [usize; 2]) -> [Vec<Pass>; 2] {
    let plan = NormPlan::layer(rows, width, 1e-5);
    let pass = |source, entry: &str, grid, parts: usize, elements: usize| {
        let (entry, bytes) = (entry.to_string(), 4.0 * elements as f64);
        Pass { op: "layer_norm".into(), source, entry, grid, parts, bytes, flops: 0.0 }
    };
    let elements = 2 * rows * width + 2 * width + 3 * rows;
    let RowsPlan { source, grid: over, .. } = plan.over_rows(class);
    // Longer rows are computed by other ops.
    let forward = if plan.walks() { vec![pass(source, "forward", over, 1, elements)] } else { vec![] };
    let (source, over, parts) = match plan.shared(class) {
        Some(columns) => (Source::file("norm_columns"), columns.grid(), columns.parts),
        None => {
            let [parts, _] = plan.parts(class);
            (Source::file("norm").bool("CENTRED", true).u32("LANES", 64), grid(parts * plan.across()), parts)
        }
    };
    let elements = 2 * rows * width + 3 * rows + 2 * parts * width;
    let mut sums = vec![pass(in_pieces(source, plan.piece()), "columns", over, parts, elements)];
    if parts > 1 {
        sums.extend(reduce::plan(class, [1, parts, 2 * width]));
    }
    [forward, sums]
}

/// The rows of [`NormPlan::sums`] that are the gradients of gain and shift.
pub(in crate::ops) const GAIN: usize = 0;
pub(in crate::ops) const SHIFT: usize = 1;

/// Returns one of the two rows of [`NormPlan::sums`].
pub(in crate::ops) fn row_of(sums: &Tensor, i: usize) -> Tensor {
    sums.slice(0, i..i + 1).squeeze(0)
}

struct Norm {
    plan: NormPlan,
    /// The input as given. 16 bits take half the memory and are converted again in the backward pass.
    x: Saved,
    weight: Option<Saved>,
    /// `[rows, 3]`: mean, reciprocal standard deviation, and a correction for the rounding of the mean.
    statistics: Saved,
    /// Which inputs of the node are the weight and the bias.
    weight_input: usize,
    bias_input: usize,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        self.plan.kind.name()
    }
    fn takes_half(&self) -> bool {
        true
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let op = self.name();
        let (plan, statistics) = (self.plan, self.statistics.get(op));
        // A kernel packs in one way, and only whole vectors.
        let half = Some(dy.dtype()).filter(|dtype| dtype.is_half() && plan.walks());
        let x = stored::readable(self.x.get(op), half, plan.width);
        let dy = stored::readable(dy, half, plan.width);
        if sink.needs(0) {
            let weight = self.weight.as_ref().map(|w| w.get(op));
            let dtype = if x.dtype() == sink.dtype(0) { x.dtype() } else { DType::F32 };
            sink.add(0, plan.gradient(&x, weight, statistics, &dy, dtype));
        }
        let wants: Vec<(usize, usize)> =
            [(plan.weighted, self.weight_input, GAIN), (plan.biased, self.bias_input, SHIFT)]
                .into_iter()
                .filter(|&(given, input, _)| given && sink.needs(input))
                .map(|(_, input, part)| (input, part))
                .collect();
        if wants.is_empty() {
            return;
        }
        let sums = plan.sums(&x, statistics, &dy);
        for (input, part) in wants {
            sink.add(input, row_of(&sums, part));
        }
    }
}

impl Tensor {
    #[track_caller]
    fn normed(&self, kind: NormKind, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Tensor {
        let op = kind.name();
        let axes = self.shape().len();
        assert!(axes > 0, "{op}: a scalar has no axis to normalise");
        let width = self.shape()[axes - 1];
        assert!(width > 0, "{op}: the last axis of {} is empty", self.shape());
        let mut inputs = vec![self];
        for (name, part) in [("weight", weight), ("bias", bias)] {
            let Some(part) = part else { continue };
            assert!(
                part.shape()[..] == [width],
                "{op}: the {name} must have shape [{width}] for x {}, got {}",
                self.shape(),
                part.shape()
            );
            inputs.push(part);
        }
        same_gpu(op, &inputs);
        assert!(self.dtype().is_float(), "{op}: needs floats, got {}; cast first", self.dtype());
        let rows = self.count() / width;
        let plan = NormPlan { kind, rows, width, eps, weighted: weight.is_some(), biased: bias.is_some() };
        // In a scope, the kernel reads and writes its type.
        let half = Some(precision().dtype()).filter(|dtype| dtype.is_half() && plan.walks());
        let x = stored::readable(&self.detach(), half, width);
        let float = |part: Option<&Tensor>| {
            part.map_or_else(|| absent(&x, width), |t| crate::ops::float(op, t).detach().contiguous())
        };
        let (g, b) = (float(weight), float(bias));
        let [y, statistics] = if plan.walks() {
            let dtype = half.filter(|_| width.is_multiple_of(4)).unwrap_or(DType::F32);
            let y = Tensor::empty(x.gpu(), op, x.shape(), dtype);
            let statistics = Tensor::empty(x.gpu(), op, [rows, 3], DType::F32);
            let rows = plan.over_rows(x.gpu().class()).stored(&[("in", x.dtype()), ("out", dtype)]);
            let launch = plan.launch(&rows, "forward").bind("x", &x).bind("weight", &g);
            x.gpu().launch(launch.bind("bias", &b).bind_mut("y", &y).bind_mut("made", &statistics));
            [y, statistics]
        } else {
            let [y, statistics] = plan.long(&x, &g, &b);
            [y.reshape(*x.shape()), statistics]
        };
        let y = if precision().dtype().is_half() { y.cast(precision().dtype()) } else { y };
        y.made_by(&inputs, || {
            Box::new(Norm {
                plan,
                x: Saved::new(if self.dtype() == DType::F32 { &x } else { self }),
                weight: weight.map(Saved::new),
                statistics: Saved::new(&statistics),
                weight_input: 1,
                bias_input: inputs.len() - 1,
            })
        })
    }

    /// `y = (x - mean) / sqrt(var + eps) * weight + bias` over the last axis, in f32 or a scope's type, where `var` is the mean of `(x -
    /// mean)^2`. `weight` and `bias` have the size of the last axis. Their defaults are 1 and 0. A row whose `var`
    /// overflows f32 is NaN.
    ///
    /// Source: Ba, Kiros & Hinton 2016, "Layer Normalization".
    ///
    /// # Panics
    /// If the last axis is missing or empty, if `weight` or `bias` has another size, or if any of the three has
    /// integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 3.0, 20.0, 40.0], [2, 2]);
    /// let y = x.layer_norm(None, None, 1e-5).to_vec2::<f32>()?;
    /// // Each row has mean 0 and variance 1.
    /// assert!((y[0][0] + 1.0).abs() < 1e-4 && (y[0][1] - 1.0).abs() < 1e-4);
    /// assert!((y[1][0] + 1.0).abs() < 1e-4 && (y[1][1] - 1.0).abs() < 1e-4);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn layer_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Tensor {
        self.normed(NormKind::Layer, weight, bias, eps)
    }

    /// `y = x / sqrt(mean(x^2) + eps) * weight` over the last axis, in f32 or a scope's type. `weight` has the size of the last axis. Its
    /// default is 1. A row whose mean square overflows f32 is NaN.
    ///
    /// Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".
    ///
    /// # Panics
    /// If the last axis is missing or empty, if `weight` has another size, or if one of the two has integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[3f32, 3.0, -3.0, 3.0], [1, 4]);
    /// let gain = Tensor::full(&gpu, [4], 2.0);
    /// let y = x.rms_norm(Some(&gain), 0.0).to_vec::<f32>()?;
    /// assert!((y[0] - 2.0).abs() < 1e-5 && (y[2] + 2.0).abs() < 1e-5);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn rms_norm(&self, weight: Option<&Tensor>, eps: f32) -> Tensor {
        self.normed(NormKind::Rms, weight, None, eps)
    }
}

/// `(x - mean) / sqrt(var + eps)` of every row, with mean 0 for RMS norm.
pub(in crate::ops) fn unit64(x: &Array, kind: NormKind, eps: f32) -> Array {
    let width = x.shape[x.shape.len() - 1];
    let mut y = x.clone();
    for row in y.data.chunks_mut(width) {
        let mean = if kind == NormKind::Layer { row.iter().sum::<f64>() / width as f64 } else { 0.0 };
        let var = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / width as f64;
        row.iter_mut().for_each(|v| *v = (*v - mean) / (var + eps as f64).sqrt());
    }
    y
}

const EPS: f32 = 1e-5;

/// The layer norm of each row, with weight and bias.
fn sized([rows, width]: [usize; 2]) -> Case {
    let inputs = vec![Input::normal([rows, width]), Input::normal([width]), Input::normal([width])];
    let with = |unit: f64, x: &[Array], column: usize| unit * x[1].data[column] + x[2].data[column];
    let reference = move |x: &[Array]| {
        let unit = unit64(&x[0], NormKind::Layer, EPS);
        Array::from_fn(unit.shape, |i| with(unit.data[i], x, i % width))
    };
    let elements = [0, rows * width / 2, rows * width - 1];
    Case::new(
        format!("{rows}x{width}"),
        inputs,
        |x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), EPS),
        reference,
    )
    .ulps(16.0, 32.0)
    .timed("layer_norm", elements, move |x, at| {
        let unit = unit64(&x[0].part([1, width], at / width * width), NormKind::Layer, EPS);
        let value = with(unit.data[at % width], x, at % width);
        Want { value, bound: 1e-4 * value.abs() + 1e-6 }
    })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all: Vec<Case> = [256, 1024].map(|rows| sized([rows, 768]).when(When::Full, When::Full)).into();
    all.push(sized([4096, 768]).when(When::Quick, When::Quick));
    all.push(sized([7, 12]));
    let case = |name: String, x: Input, kind: NormKind, weighted: bool, biased: bool| {
        let width = x.shape[x.shape.len() - 1];
        // For a row of one element and a small eps, `y` hardly depends on `x`, so its gradient would be nothing but
        // rounding.
        let eps = if width == 1 { 0.5 } else { EPS };
        let mut inputs = vec![x];
        inputs.extend((0..weighted as usize + biased as usize).map(|_| Input::normal([width])));
        Case::new(
            format!("{} {name}", kind.name()),
            inputs,
            move |x| {
                let (weight, bias) = (weighted.then(|| &x[1]), biased.then(|| &x[x.len() - 1]));
                match kind {
                    NormKind::Layer => x[0].layer_norm(weight, bias, eps),
                    NormKind::Rms => x[0].rms_norm(weight, eps),
                }
            },
            move |x| {
                let unit = unit64(&x[0], kind, eps);
                Array::from_fn(unit.shape, |i| {
                    let weight = if weighted { x[1].data[i % width] } else { 1.0 };
                    unit.data[i] * weight + if biased { x[x.len() - 1].data[i % width] } else { 0.0 }
                })
            },
        )
        .ulps(16.0, 32.0)
    };
    for kind in [NormKind::Layer, NormKind::Rms] {
        let layer = kind == NormKind::Layer;
        let shapes: [&[usize]; 11] = [
            &[5, 4],
            &[67, 8],
            &[3, 68],
            &[2, 1],
            &[1, 7],
            &[7, 13],
            &[67, 5],
            &[3, 67],
            &[9, 131],
            &[2, 3, 65],
            &[2, 263],
        ];
        for shape in shapes {
            all.push(case(format!("{shape:?}"), Input::normal(shape), kind, true, layer));
        }
        all.push(case("bare".into(), Input::normal([5, 33]), kind, false, false));
        for dtype in [DType::F16, DType::Bf16] {
            all.push(case(dtype.to_string(), Input::normal([5, 33]).dtype(dtype), kind, true, layer));
        }
        // Several parts of rows in the weight gradient, the last one shorter.
        all.push(case("many rows".into(), Input::normal([323, 9]), kind, true, layer));
        // A mean far above the standard deviation, where E[x^2] - mean^2 in f32 would lose the variance.
        for mean in [100.0, 1000.0] {
            let x = Input::normal([3, 77]).fill(Fill::Uniform(mean - 2.0, mean + 2.0));
            // The steps of central differences grow with x. At 1000 they are too large for the gradient of x.
            let x = if mean > 100.0 { x.fixed() } else { x };
            all.push(case(format!("mean {mean}"), x, kind, true, layer));
        }
    }
    for precision in [Precision::F16, Precision::Bf16] {
        for (kind, shape) in [NormKind::Layer, NormKind::Rms]
            .into_iter()
            .flat_map(|kind| [[5, 68], [67, 8], [3, 33], [2, 1032]].map(|shape| (kind, shape)))
        {
            let x = Input::normal(shape).dtype(precision.dtype());
            let layer = kind == NormKind::Layer;
            let inside = case(format!("in {precision} {shape:?}"), x, kind, true, layer);
            let Case { forward, .. } = inside;
            let forward = move |x: &[Tensor]| autocast(precision, || forward(x));
            all.push(Case { forward: Box::new(forward), ..inside });
        }
    }
    all.push(case("weight only".into(), Input::normal([5, 33]), NormKind::Layer, true, false));
    all.push(case("bias only".into(), Input::normal([5, 33]), NormKind::Layer, false, true));
    // One weight is used at two places, so its gradient is a sum.
    all.push(
        Case::new(
            "tied weight",
            vec![Input::normal([4, 21]), Input::normal([21])],
            |x| x[0].rms_norm(Some(&x[1]), EPS).rms_norm(Some(&x[1]), EPS),
            |x| {
                let scaled = |a: Array| Array::from_fn(a.shape, |i| a.data[i] * x[1].data[i % 21]);
                scaled(unit64(&scaled(unit64(&x[0], NormKind::Rms, EPS)), NormKind::Rms, EPS))
            },
        )
        .ulps(64.0, 128.0),
    );
    all
}
