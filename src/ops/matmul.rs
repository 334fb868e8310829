//! Matrix products: 2-D and batched with broadcasting, any strides, and linear layers whose weight is a [`Site`].
//!
//! One core with a slot for each operand and one for the store (`shaders/matmul.wgsl`, and `matmul_direct.wgsl` for CPU
//! drivers). Gradients are the same core: `dx = dy W`, `dW = dy^T x`, the latter added into the weight's one buffer.

use super::case::{Array, Case, Fill, Input};
use super::site::{LeafGrads, Load, Site};
use super::words;
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::fuse::Target;
use crate::gpu::kernel::{Bind, Launch};
use crate::gpu::shader::Source;
use crate::shape::{self, Shape};
use crate::tape::{self, Into, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::sync::Arc;

/// What a linear layer applies to `x W^T + bias` as it stores it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// `max(x, 0)`
    Relu,
    /// Exact GELU.
    Gelu,
    /// GELU's tanh form.
    GeluTanh,
    /// `x sigmoid(x)`
    Silu,
}

impl Activation {
    /// The activation as an op of its own.
    pub fn apply(self, x: &Tensor) -> Tensor {
        match self {
            Activation::None => x.clone(),
            Activation::Relu => x.relu(),
            Activation::Gelu => x.gelu(),
            Activation::GeluTanh => x.gelu_tanh(),
            Activation::Silu => x.silu(),
        }
    }
}

/// What follows a product inside its kernel.
#[derive(Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Added to every row: `[n]`.
    pub bias: Option<&'a Tensor>,
    /// Applied after the bias.
    pub activation: Activation,
    /// Added last: the shape of the result. Not together with an activation.
    pub residual: Option<&'a Tensor>,
}

/// One operand as the kernel reads it.
struct Operand {
    fragment: &'static str,
    bind: Bind,
    /// Offset, stride of the axis that is not contiguous, outer batch step, inner batch step.
    words: [usize; 4],
    /// Stride of the other axis, for `*_any`.
    any: usize,
}

/// `x` as `[batch.., rows, cols]` for the left side (`cols` = k), or with `right`, for the right side (`rows` = k).
fn operand(x: &Tensor, batch: &Shape, right: bool) -> Operand {
    let mut x = x.clone();
    let axes = x.shape().len();
    let mut steps = steps(&x, batch);
    if steps.is_none() || (x.strides[axes - 1] != 1 && x.strides[axes - 2] != 1 && x.count() > 0) {
        x = x.contiguous();
        steps = self::steps(&x, batch);
    }
    if steps.is_none() {
        // Batch axes that do not merge into two: spelled out in memory.
        let mut sizes = batch.to_vec();
        sizes.extend(&x.shape()[axes - 2..]);
        x = x.expand(&sizes[..]).contiguous();
        steps = self::steps(&x, batch);
    }
    let [_, outer, inner] = steps.expect("contiguous batches merge");
    let axes = x.shape().len();
    let (rows, cols) = (x.shape()[axes - 2], x.shape()[axes - 1]);
    let (row_step, col_step) = (x.strides[axes - 2], x.strides[axes - 1]);
    let by_rows = col_step == 1 || cols == 1;
    let (along, step) = if by_rows { (cols, row_step) } else { (rows, col_step) };
    let vectors = [along, step, outer, inner, x.offset].iter().all(|v| v % 4 == 0)
        && (if by_rows { col_step } else { row_step }) == 1;
    let place = x.value.place();
    let size = DType::F32.buffer_bytes(x.value.count);
    let bind = Bind { binding: right as u32, buffer: place.buffer, offset: place.offset, size, write: false };
    // In `*_any` the first stride is that of m or n, the other that of k.
    let (fragment, stride, any) = match (right, vectors, by_rows) {
        (false, true, true) => ("lhs_plain", row_step, 0),
        (false, true, false) => ("lhs_transposed", col_step, 0),
        (false, false, _) => ("lhs_any", row_step, col_step),
        (true, true, true) => ("rhs_plain", row_step, 0),
        (true, true, false) => ("rhs_transposed", col_step, 0),
        (true, false, _) => ("rhs_any", col_step, row_step),
    };
    Operand { fragment, bind, words: [x.offset, stride, outer, inner], any }
}

/// Inner batch size and the steps of the outer and inner batch, when the batch axes merge into two.
fn steps(x: &Tensor, batch: &Shape) -> Option<[usize; 3]> {
    let axes = x.shape().len();
    let own = Shape::new(&x.shape()[..axes - 2]);
    let strides = shape::expand_strides("matmul", &own, &x.strides, batch);
    match batch.len() {
        0 => Some([1, 0, 0]),
        1 => Some([batch[0], 0, strides[0]]),
        2 => Some([batch[1], strides[0], strides[1]]),
        _ => {
            let inner = batch[batch.len() - 1];
            let (sizes, merged) = shape::collapse(&Shape::new(&batch[..batch.len() - 1]), &[strides]);
            match sizes.len() {
                0 => Some([inner, 0, strides[batch.len() - 1]]),
                1 => Some([inner, merged[0][0], strides[batch.len() - 1]]),
                _ => None,
            }
        }
    }
}

/// Threads of a workgroup of `matmul_direct`.
const DIRECT_THREADS: usize = 32;

/// Lanes along a row of `y`, and rows and columns of a thread.
struct Direct {
    wide: usize,
    thread: [usize; 2],
}

/// Registers of a CPU driver are wide: the largest thread tile that pads the matrix least. Lanes lie along a row of
/// `y`, but not past its end, and all of them where there are few rows.
fn direct(m: usize, n: usize, k: usize) -> Direct {
    let wide = match m {
        0..=4 => 32,
        5..=8 => 16,
        _ => n.div_ceil(4).next_power_of_two().min(8),
    };
    let thread = |size: usize, lanes: usize| {
        let padded = |t: usize| size.div_ceil(lanes * t) * lanes * t;
        // A tile of 16 by 16 is a quarter faster than 8 by 8 and takes four times as long to compile: not for small products.
        let most = if m * n * k < 1 << 21 { 8 } else { 16 };
        [16, 12, 8, 4].into_iter().filter(|&t| t <= most).min_by_key(|&t| padded(t)).unwrap_or(4)
    };
    Direct { wide, thread: [thread(m, DIRECT_THREADS / wide), thread(n, wide)] }
}

fn direct_source(tile: &Direct) -> Source {
    let Direct { wide, thread: [tm, tn] } = *tile;
    [("THREAD_M", tm), ("THREAD_N", tn), ("WIDE", wide), ("HIGH", DIRECT_THREADS / wide)]
        .iter()
        .fold(Source::file("matmul_direct"), |s, (name, v)| s.u32(*name, *v as u32))
}

/// The tile for these sizes: the largest that still leaves the device busy.
fn core(gpu: &Gpu, m: usize, n: usize, k: usize) -> (Source, [usize; 2]) {
    if gpu.is_software() {
        let tile = direct(m, n, k);
        let [tm, tn] = tile.thread;
        return (direct_source(&tile), [DIRECT_THREADS / tile.wide * tm, tile.wide * tn]);
    }
    // About four tiles of 64 x 64 for each of a small device's units; below that, tiles of 32 x 32.
    if m.div_ceil(64) * n.div_ceil(64) >= 64 {
        return (Source::file("matmul"), [64, 64]);
    }
    let small = [("TILE_M", 32), ("TILE_N", 32), ("THREAD_M", 4), ("THREAD_N", 4)];
    (small.iter().fold(Source::file("matmul"), |s, (name, v)| s.u32(*name, *v)), [32, 32])
}

/// The right side of a product: a tensor, or a site read as `W` or as `W^T`.
enum Right<'a> {
    Tensor(&'a Tensor),
    Site { load: &'a Load, transposed: bool },
}

fn store(epilogue: &Epilogue, accumulate: bool) -> (&'static str, u32) {
    let activation = epilogue.activation as u32;
    let fragment = match (accumulate, epilogue.bias, epilogue.residual) {
        (true, ..) => "store_accumulate",
        (_, None, None) if activation == 0 => "store_plain",
        (_, None, None) => "store_activation",
        (_, Some(_), None) => "store_bias",
        (_, None, Some(_)) => "store_residual",
        (_, Some(_), Some(_)) => "store_bias_residual",
    };
    (fragment, activation)
}

/// Launches `y [batch, m, n] = lhs rhs`.
fn product(op: &'static str, lhs: &Tensor, rhs: Right, n: usize, epilogue: &Epilogue, y: &Tensor, accumulate: bool) {
    let gpu = y.gpu();
    let axes = y.shape().len();
    let batch = Shape::new(&y.shape()[..axes - 2]);
    let (m, k) = (y.shape()[axes - 2], lhs.shape()[lhs.shape().len() - 1]);
    if y.count() == 0 {
        return;
    }
    if k == 0 {
        // An empty sum: only the epilogue is left, as elementwise ops.
        if !accumulate {
            let sum = Tensor::zeros(gpu, y.shape());
            let sum = epilogue.bias.map_or(sum.clone(), |bias| sum.add(&bias.detach()));
            let sum = epilogue.activation.apply(&sum);
            let last = epilogue.residual.map_or(sum.clone(), |r| sum.add(&r.detach().reshape(*y.shape())));
            last.value.realize(Some(Target { place: y.place(), accumulate: false }));
        }
        return;
    }
    let left = operand(lhs, &batch, false);
    let (source, tile) = core(gpu, m, n, k);
    let (store, activation) = store(epilogue, accumulate);
    let mut source = source.slot("lhs", left.fragment).slot("store", store);
    let mut binds = vec![left.bind];
    let (mut right_words, mut any, mut site) = ([0; 4], 0, [0u32; 4]);
    match rhs {
        Right::Tensor(rhs) => {
            let right = operand(rhs, &batch, true);
            source = source.slot("rhs", right.fragment);
            (right_words, any) = (right.words, right.any);
            binds.push(right.bind);
        }
        Right::Site { load, transposed } => {
            source = source.slot("rhs", if transposed { "rhs_site_transposed" } else { "rhs_site" });
            source = source.slot("site", load.fragment);
            site = load.params;
            binds.extend(load.tensors.iter().zip(1..).map(|(t, binding)| t.bind(binding)));
        }
    }
    binds.push(y.bind_mut(4));
    if let Some(bias) = epilogue.bias {
        binds.push(bias.contiguous().bind(5));
    }
    if let Some(residual) = epilogue.residual {
        binds.push(residual.contiguous().bind(6));
    }
    if n.is_multiple_of(4) {
        source = source.slot("pieces", "pieces_of_4");
    }
    if matches!(store, "store_bias" | "store_activation") {
        source = source.u32("ACTIVATION", activation);
    }
    let inner = if batch.is_empty() { 1 } else { batch[batch.len() - 1] };
    let params: Vec<u32> = [m, n, k, inner]
        .iter()
        .chain(&left.words)
        .chain(&right_words)
        .chain(&[left.any, any, 0, 0])
        .map(|&v| v as u32)
        .chain(site)
        .collect();
    let grid = [n.div_ceil(tile[1]), m.div_ceil(tile[0]), batch.count()].map(|v| v as u32);
    let reuse = (m.min(n) / 8).max(1) as u32;
    gpu.launch(Launch { op, source: &source, entry: "main", binds, params: words(&params), grid, reuse });
}

/// Parts of a long inner axis that become products of their own, added up in order by a second pass: where the result's
/// tiles alone would leave the device idle.
fn split(gpu: &Gpu, m: usize, n: usize, k: usize) -> Option<usize> {
    let (_, tile) = core(gpu, m, n, k);
    let tiles = m.div_ceil(tile[0]) * n.div_ceil(tile[1]);
    let busy = if gpu.is_software() { 4 } else { 128 };
    // The second pass reads the parts once more: a part must be long beside that.
    let fits = |parts: &usize| k.is_multiple_of(4 * parts) && k / parts >= 256;
    [2, 4, 8, 16].into_iter().filter(fits).take_while(|parts| tiles * parts <= busy).last()
}

/// Batched product of tensors into a new f32 tensor, or where `into` says.
fn multiply(op: &'static str, lhs: &Tensor, rhs: &Tensor, into: Into) -> Tensor {
    let to = shape::matmul(op, lhs.shape(), rhs.shape());
    let (y, accumulate) = into.output(lhs.gpu(), op, to);
    if let [m, n] = *to
        && let Some(parts) = split(lhs.gpu(), m, n, lhs.shape()[1])
    {
        let k = lhs.shape()[1] / parts;
        let lhs = lhs.reshape([m, parts, k]).permute(&[1, 0, 2]);
        let sum = multiply(op, &lhs, &rhs.reshape([parts, k, n]), Into::New).sum(0);
        sum.affine(1.0, 0.0).value.realize(Some(Target { place: y.place(), accumulate }));
        return y;
    }
    product(op, lhs, Right::Tensor(rhs), to[to.len() - 1], &Epilogue::default(), &y, accumulate);
    y
}

/// `a^T b` of `[rows, m]` and `[rows, n]`: the gradient of a weight.
pub(crate) fn outer(op: &'static str, a: &Tensor, b: &Tensor, into: Into) -> Tensor {
    multiply(op, &a.t(), b, into)
}

struct Matmul {
    lhs: Saved,
    rhs: Saved,
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (a, b) = (self.lhs.get("matmul"), self.rhs.get("matmul"));
        let (fa, fb) = (super::float("matmul", a), super::float("matmul", b));
        if sink.needs(0) {
            gradient(sink, 0, a.shape(), dy, &fb.t());
        }
        if sink.needs(1) {
            gradient(sink, 1, b.shape(), &fa.t(), dy);
        }
    }
}

/// Adds `lhs rhs`, summed over broadcast batches, to the gradient of input `i`.
fn gradient(sink: &mut Sink, i: usize, shape: &Shape, lhs: &Tensor, rhs: &Tensor) {
    if shape::matmul("matmul", lhs.shape(), rhs.shape()) == *shape {
        sink.add_with(i, |into| multiply("matmul", lhs, rhs, into));
    } else {
        sink.add(i, multiply("matmul", lhs, rhs, Into::New).sum_to(shape));
    }
}

impl Tensor {
    /// Matrix product `[.., m, k] x [.., k, n] -> [.., m, n]`; leading axes broadcast.
    ///
    /// Transposed views are read in place. f16 operands are multiplied and summed in f32, and the result is f32.
    /// Derivatives: `da = dy b^T`, `db = a^T dy`.
    ///
    /// # Panics
    /// With fewer than two axes a side, when the inner sizes differ or for integers.
    ///
    /// ```no_run
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let a = Tensor::from_slice(&gpu, &[1.0f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(a.matmul(&a.t()).to_vec::<f32>()?, [5.0, 11.0, 11.0, 25.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn matmul(&self, rhs: &Tensor) -> Tensor {
        same_gpu("matmul", &[self, rhs]);
        let to = shape::matmul("matmul", self.shape(), rhs.shape());
        // One matrix on the right: the batch is only more rows, and the weight's gradient is one product.
        if rhs.shape().len() == 2 && self.shape().len() > 2 {
            let k = self.shape()[self.shape().len() - 1];
            let rows: usize = to[..to.len() - 1].iter().product();
            return self.reshape([rows, k]).matmul(rhs).reshape(to);
        }
        let (a, b) = (super::float("matmul", self), super::float("matmul", rhs));
        let y = multiply("matmul", &a.detach(), &b.detach(), Into::New);
        y.made_by(&[self, rhs], || Box::new(Matmul { lhs: Saved::new(self), rhs: Saved::new(rhs) }))
    }

    /// `y = act(x W^T + bias) + residual` with `x [.., in]`, `W [out, in]` from any [`Site`]: for few rows the
    /// sharing kind's load is fused into the product, above 64 rows `W` is made once for this product and let go.
    ///
    /// Derivatives: `dx = dy W` with the same load, `dbias` the sum over rows, and the site's own rule for what it
    /// stores. While a graph is recorded the activation runs as its own op, because its derivative needs its input.
    ///
    /// # Panics
    /// When the sizes do not fit, for integers, or with both an activation and a residual.
    #[track_caller]
    pub fn linear(&self, weight: &Arc<dyn Site>, epilogue: Epilogue) -> Tensor {
        let [n, k] = weight.size();
        let axes = self.shape().len();
        assert!(
            axes >= 1 && self.shape()[axes - 1] == k,
            "linear: input {} for a weight [{n}, {k}]",
            self.shape()
        );
        assert!(
            epilogue.residual.is_none() || epilogue.activation == Activation::None,
            "linear: a residual is added after the layer, an activation comes before it: use one"
        );
        let to = self.shape().with(axes - 1, n);
        if let Some(bias) = epilogue.bias {
            assert!(**bias.shape() == [n], "linear: bias {} for {n} outputs", bias.shape());
        }
        if let Some(residual) = epilogue.residual {
            assert!(*residual.shape() == to, "linear: residual {} for output {to}", residual.shape());
        }
        let leaves = weight.leaves();
        let mut inputs: Vec<&Tensor> = vec![self];
        inputs.extend(epilogue.bias);
        inputs.extend(epilogue.residual);
        inputs.extend(&leaves);
        same_gpu("linear", &inputs);
        let tracked = tape::tracks(&inputs);
        let fused = Epilogue { activation: if tracked { Activation::None } else { epilogue.activation }, ..epilogue };
        let rows: usize = self.shape()[..axes - 1].iter().product();
        let x = super::float("linear", self).reshape([rows, k]);
        let y = Tensor::empty(self.gpu(), "linear", [x.shape()[0], n], DType::F32);
        weighted(&x.detach(), &**weight, true, &fused, &y);
        let y = y.reshape(to).made_by(&inputs, || {
            Box::new(Linear {
                x: Saved::new(&x),
                shape: *self.shape(),
                leaves: leaves.iter().map(Saved::new).collect(),
                weight: weight.clone(),
                bias: epilogue.bias.is_some(),
                residual: epilogue.residual.is_some(),
            })
        });
        if tracked { epilogue.activation.apply(&y) } else { y }
    }
}

/// Rows above which a site's weight is made once instead of in every tile's load. Fused, a tile of rows makes each weight
/// anew: with more than a few tiles that costs more than writing `[out, in]` once and reading it back as vectors.
const FUSED_ROWS: usize = 64;

/// `y = x W^T` or, not `transposed`, `y = x W`, for a site's `W`.
fn weighted(x: &Tensor, weight: &dyn Site, transposed: bool, epilogue: &Epilogue, y: &Tensor) {
    let n = y.shape()[1];
    let whole = weight.stored().or_else(|| (x.shape()[0] > FUSED_ROWS).then(|| weight.expand()));
    if let Some(w) = whole {
        let w = if transposed { w.t() } else { w };
        product("linear", x, Right::Tensor(&w), n, epilogue, y, false);
    } else {
        product("linear", x, Right::Site { load: &weight.load(), transposed }, n, epilogue, y, false);
    }
}

struct Linear {
    x: Saved,
    shape: Shape,
    leaves: Vec<Saved>,
    weight: Arc<dyn Site>,
    bias: bool,
    residual: bool,
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(full) = &dy[0] else { return };
        let x = self.x.get("linear");
        // The site reads its leaves itself: this only checks that they are what they were.
        for leaf in &self.leaves {
            leaf.get("linear");
        }
        let [n, k] = self.weight.size();
        let dy = full.reshape([x.shape()[0], n]).contiguous();
        if sink.needs(0) {
            let dx = Tensor::empty(dy.gpu(), "linear", [x.shape()[0], k], DType::F32);
            weighted(&dy, &*self.weight, false, &Epilogue::default(), &dx);
            sink.add(0, dx.reshape(self.shape));
        }
        let mut next = 1;
        if self.bias {
            if sink.needs(next) {
                sink.add(next, dy.sum(0));
            }
            next += 1;
        }
        if self.residual {
            sink.add(next, full.clone());
            next += 1;
        }
        if (0..self.leaves.len()).any(|i| sink.needs(next + i)) {
            self.weight.backward(x, &dy, &mut LeafGrads::new(sink, next));
        }
    }
}

pub(super) fn variants() -> Vec<Source> {
    let left = ["lhs_plain", "lhs_transposed", "lhs_any"];
    let right = ["rhs_plain", "rhs_transposed", "rhs_any"];
    let stores = ["store_plain", "store_accumulate", "store_bias", "store_activation", "store_residual", "store_bias_residual"];
    let mut all = Vec::new();
    for file in ["matmul", "matmul_direct"] {
        for l in left {
            all.extend(right.map(|r| Source::file(file).slot("lhs", l).slot("rhs", r)));
        }
        for pieces in ["pieces_of_1", "pieces_of_4"] {
            all.extend(stores.map(|s| Source::file(file).slot("store", s).slot("pieces", pieces)));
        }
        for site in super::site::FRAGMENTS {
            for r in ["rhs_site", "rhs_site_transposed"] {
                all.push(Source::file(file).slot("rhs", r).slot("site", site));
            }
        }
    }
    let small = Source::file("matmul").u32("TILE_M", 32).u32("TILE_N", 32).u32("THREAD_M", 4).u32("THREAD_N", 4);
    all.push(small);
    for (m, n) in [(1, 96), (6, 40), (16, 3), (96, 96), (128, 128)] {
        all.push(direct_source(&direct(m, n, 4096)));
    }
    all
}

/// The reference: three loops a batch, in f64.
pub(crate) fn matmul64(a: &Array, b: &Array) -> Array {
    let to = shape::matmul("reference", &a.shape, &b.shape);
    let (m, n, k) = (to[to.len() - 2], to[to.len() - 1], a.shape[a.shape.len() - 1]);
    let batch = Shape::new(&to[..to.len() - 2]);
    let start = |x: &Array, flat: usize| {
        let own = Shape::new(&x.shape[..x.shape.len() - 2]);
        let strides = shape::expand_strides("reference", &own, &own.strides(), &batch);
        let plain = batch.strides();
        let at: usize = (0..batch.len()).map(|axis| flat / plain[axis] % batch[axis] * strides[axis]).sum();
        at * x.shape[x.shape.len() - 2] * x.shape[x.shape.len() - 1]
    };
    Array::from_fn(to, |i| {
        let (b0, row, col) = (i / (m * n), i / n % m, i % n);
        let (a0, b0) = (start(a, b0), start(b, b0));
        (0..k).map(|q| a.data[a0 + row * k + q] * b.data[b0 + q * n + col]).sum()
    })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let shapes: [(&[usize], &[usize]); 8] = [
        (&[1, 1], &[1, 1]),
        (&[4, 8], &[8, 12]),
        (&[7, 13], &[13, 5]),
        (&[67, 5], &[5, 3]),
        (&[2, 3, 5], &[5, 7]),
        (&[2, 1, 3, 4], &[5, 4, 8]),
        (&[3, 5, 6], &[3, 6, 4]),
        (&[2, 2, 2, 3, 2], &[2, 1, 2, 2, 3]),
    ];
    for (a, b) in shapes {
        let inputs = vec![Input::normal(a), Input::normal(b)];
        all.push(Case::new(format!("{a:?} {b:?}"), inputs, |x| x[0].matmul(&x[1]), |x| matmul64(&x[0], &x[1])));
    }
    // Stored transposed: the views are read in place, vectors along the other axis.
    let t64 = |x: &Array| Array::from_fn([x.shape[1], x.shape[0]], |i| x.data[i % x.shape[0] * x.shape[1] + i / x.shape[0]]);
    for (m, n, k) in [(8, 12, 4), (9, 7, 5), (68, 36, 20)] {
        let fixed = |x: Input| if m > 60 { x.fixed() } else { x };
        let inputs = vec![fixed(Input::normal([k, m])), fixed(Input::normal([n, k]))];
        all.push(Case::new(format!("transposed {m} {n} {k}"), inputs, |x| x[0].t().matmul(&x[1].t()), move |x| {
            matmul64(&t64(&x[0]), &t64(&x[1]))
        }));
    }
    // Above every tile, whole numbers whose sums need 20 bits: equality shows that no term is lost and none is f16.
    for (m, n, k) in [(130, 140, 68), (129, 133, 67), (200, 3, 500), (20, 24, 2048), (7, 5, 1540)] {
        let whole = |shape: [usize; 2]| Input::integers(shape, DType::F32, -60, 61);
        let inputs = vec![whole([m, k]), whole([k, n])];
        all.push(Case::new(format!("integers {m} {n} {k}"), inputs, |x| x[0].matmul(&x[1]), |x| matmul64(&x[0], &x[1])).exact());
    }
    let inputs = vec![Input::normal([5, 12]).dtype(DType::F16).fixed(), Input::normal([12, 9]).dtype(DType::F16).fixed()];
    all.push(Case::new("f16 operands", inputs, |x| x[0].matmul(&x[1]), |x| matmul64(&x[0], &x[1])));
    let slices = vec![Input::normal([9, 10]).fill(Fill::Normal(1.0)), Input::normal([4, 6])];
    all.push(Case::new("slices", slices, |x| x[0].slice(1, 3..7).matmul(&x[1].slice(1, 1..6)), |x| {
        let a = Array::from_fn([9, 4], |i| x[0].data[i / 4 * 10 + 3 + i % 4]);
        let b = Array::from_fn([4, 5], |i| x[1].data[i / 5 * 6 + 1 + i % 5]);
        matmul64(&a, &b)
    }));
    all
}
