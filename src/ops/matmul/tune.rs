//! Measuring the kernels of a class of products, and the test that cooperative matrices must pass.

use super::core::{Core, Problem, choose, coop};
use super::operand::operand;
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::{CoopMatrices, Gpu};
use crate::rng::Rng;
use crate::shape::Shape;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::time::{Duration, Instant};

/// Time for all candidates of one class together.
const BUDGET: Duration = Duration::from_millis(400);

/// Whether the problem can be made again from its class: products of tensors, of a size that does not take long.
pub(super) fn measurable(problem: &Problem) -> bool {
    let operand = |name: &str| name.ends_with("_plain") || name.ends_with("_transposed");
    operand(problem.left)
        && operand(problem.right)
        && problem.m * problem.n * problem.k * problem.batch < 1 << 34
}

/// Operands of a problem, laid out as it says.
fn operands(gpu: &Gpu, problem: &Problem) -> [Tensor; 2] {
    let Problem { m, n, k, batch, .. } = *problem;
    let mut rng = Rng::new(7);
    let mut make = |rows: usize, cols: usize, transposed: bool| {
        let size = if transposed { [batch, cols, rows] } else { [batch, rows, cols] };
        let mut data = vec![0.0f32; batch * rows * cols];
        rng.fill_normal(&mut data);
        let x = Tensor::from_slice(gpu, &data, size);
        let x = if problem.half { x.cast(DType::F16) } else { x };
        if transposed { x.transpose(1, 2) } else { x }
    };
    [make(m, k, problem.left == "lhs_transposed"), make(k, n, problem.right == "rhs_transposed")]
}

/// Seconds of a product with this kernel: the best of several, after one that also compiles. One that is twice as slow as
/// `rival` is not tried for long.
fn seconds(
    gpu: &Gpu,
    problem: &Problem,
    core: Core,
    [a, b]: &[Tensor; 2],
    budget: Duration,
    rival: f64,
) -> Result<f64> {
    gpu.choose(problem.key(), core.to_string());
    let run = || no_grad(|| a.matmul(b)).compute();
    // What this kernel cannot do is carried by its result, and would take no time.
    let first = no_grad(|| a.matmul(b));
    first.compute();
    first.check()?;
    gpu.synchronize()?;
    let started = Instant::now();
    let mut best = f64::INFINITY;
    while best == f64::INFINITY || (started.elapsed() < budget && best < 2.0 * rival) {
        let start = Instant::now();
        // Several to a submit, so that its cost does not hide the kernel's.
        let count = if best < 2e-3 { 4 } else { 1 };
        (0..count).for_each(|_| run());
        gpu.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / count as f64);
    }
    Ok(best)
}

/// What measuring a class of products found.
#[derive(Clone, Debug)]
pub struct Tuned {
    /// The class: types, layouts, sizes up to the next power of two, batches.
    pub class: String,
    /// The kernel that the table would choose.
    pub table: String,
    /// The fastest kernel.
    pub best: String,
    /// Time of the table's kernel over that of the fastest.
    pub gain: f64,
}

/// Measures the kernels of this class and keeps the fastest for this process and for later ones.
fn tune(gpu: &Gpu, problem: &Problem) -> (Core, Tuned) {
    let beside = gpu.beside();
    let inputs = operands(&beside, problem);
    let candidates = Core::candidates(gpu, problem);
    let budget = BUDGET / candidates.len() as u32;
    let table = candidates[0];
    let mut best = (f64::INFINITY, table);
    let mut first = f64::INFINITY;
    for core in candidates {
        match seconds(&beside, problem, core, &inputs, budget, best.0) {
            Ok(time) => {
                tracing::debug!(class = problem.key(), %core, ms = time * 1e3, "measured");
                if core == table {
                    first = time;
                }
                if time < best.0 {
                    best = (time, core);
                }
            }
            Err(error) => {
                tracing::warn!(%core, %error, "left out");
                beside.take_fault();
            }
        }
    }
    gpu.choose(problem.key(), best.1.to_string());
    if let Err(error) = gpu.save_choices() {
        tracing::warn!(%error, "the choice is not kept");
    }
    let [table, name] = [table, best.1].map(|core| core.to_string());
    (best.1, Tuned { class: problem.key(), table, best: name, gain: first / best.0 })
}

/// The fastest kernel for this class.
pub(super) fn measure(gpu: &Gpu, problem: &Problem) -> Core {
    tune(gpu, problem).0
}

/// The classes that `tiebeam tune` measures: linear layers forward and backward, from one row to many.
fn classes(gpu: &Gpu) -> Vec<Problem> {
    let (lp, lt, rp, rt) = ("lhs_plain", "lhs_transposed", "rhs_plain", "rhs_transposed");
    let mut all = Vec::new();
    let rows: &[usize] = if gpu.is_software() { &[1024, 128, 1, 8] } else { &[4096, 1024, 128, 1, 8] };
    for &tokens in rows {
        for (width, inner) in [(1024, 1024), (256, 256), (4096, 1024), (1024, 4096)] {
            for half in [false, true] {
                let class = |m, n, k, left, right| Problem { m, n, k, batch: 1, left, right, half };
                if half && gpu.coop().is_none() {
                    continue;
                }
                // y = x W^T, dx = dy W, dW = dy^T x
                all.push(class(tokens, width, inner, lp, rt));
                all.push(class(tokens, inner, width, lp, rp));
                if tokens > 8 {
                    all.push(class(width, inner, tokens, lt, rp));
                }
            }
        }
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|problem| measurable(problem) && seen.insert(problem.key()));
    all
}

/// Measures class after class until all are done or `budget` is spent, the common ones first; `each` hears of the class at
/// hand (its place, how many there are) and, behind it, of what was found. What was found before an end is kept.
///
/// # Errors
/// [`crate::Error::Io`] when the choices cannot be written.
pub fn tune_all(
    gpu: &Gpu,
    budget: Duration,
    mut each: impl FnMut(usize, usize, Option<&Tuned>),
) -> Result<usize> {
    let classes = classes(gpu);
    let started = Instant::now();
    let mut done = 0;
    for problem in &classes {
        if started.elapsed() >= budget {
            break;
        }
        each(done, classes.len(), None);
        let (_, tuned) = tune(gpu, problem);
        done += 1;
        each(done, classes.len(), Some(&tuned));
    }
    gpu.save_choices()?;
    Ok(done)
}

impl Gpu {
    /// The matrix units, once they have shown on this device that they multiply as the plain kernel does, and on a GPU
    /// faster: tested at the first call, not in the course of what is being recorded.
    pub(crate) fn coop(&self) -> Option<CoopMatrices> {
        let matrices = self.coop_matrices()?;
        let proven = *self.0.coop_proven.get_or_init(|| {
            let beside = self.beside();
            // The kernels may be chosen there while they are on trial.
            let _ = beside.0.coop_proven.set(true);
            let passed = right(&beside, matrices.size as usize)
                .and_then(|right| Ok(right && (self.is_software() || fast(&beside, matrices.size as usize)?)));
            match &passed {
                Ok(true) => tracing::info!("cooperative matrices passed their test"),
                Ok(false) => tracing::warn!("cooperative matrices are wrong or slow here and not used"),
                Err(error) => tracing::warn!(%error, "cooperative matrices failed and are not used"),
            }
            passed.unwrap_or(false)
        });
        proven.then_some(matrices)
    }
}

const PLAIN: Core = Core::Tiled { tile: [32, 32], thread: 4 };

/// Whole numbers whose products and sums are exact both ways, at sizes with and without edges: every bit must agree.
fn right(gpu: &Gpu, size: usize) -> Result<bool> {
    let mut rng = Rng::new(3);
    for [m, n, k] in [[128, 128, 128], [132, 72, 100]] {
        let mut whole = |rows: usize, cols: usize| {
            let mut data = vec![0.0f32; rows * cols];
            rng.fill_uniform(&mut data);
            data.iter_mut().for_each(|x| *x = (*x * 33.0).floor() - 16.0);
            Tensor::from_slice(gpu, &data, [rows, cols]).cast(DType::F16)
        };
        let (a, b) = (whole(m, k), whole(k, n));
        let problem = Problem { m, n, k, batch: 1, left: "lhs_plain", right: "rhs_plain", half: true };
        let mut results = Vec::new();
        for core in [PLAIN].iter().chain(&coop(size)[gpu.is_software() as usize..]) {
            gpu.choose(problem.key(), core.to_string());
            results.push(no_grad(|| a.matmul(&b)).to_vec::<f32>()?);
        }
        if results.iter().any(|result| result != &results[0]) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether they beat the plain kernel at 1024^3, by so much that it comes out the same in every run: the two round differently.
fn fast(gpu: &Gpu, size: usize) -> Result<bool> {
    let [m, n, k] = [1024; 3];
    let problem = Problem { m, n, k, batch: 1, left: "lhs_plain", right: "rhs_plain", half: true };
    let inputs = operands(gpu, &problem);
    let time = |core| seconds(gpu, &problem, core, &inputs, Duration::from_millis(20), f64::INFINITY);
    Ok(1.5 * time(coop(size)[1])? < time(Core::Tiled { tile: [64, 64], thread: 8 })?)
}

/// The kernel that [`Tensor::matmul`] takes for these operands, before a long inner axis is split; for the benchmark.
#[doc(hidden)]
pub fn chosen(a: &Tensor, b: &Tensor) -> String {
    let axes = a.shape().len();
    let batch = Shape::new(&a.shape()[..axes - 2]);
    let (left, right) = (operand(a, &batch, false), operand(b, &batch, true));
    let [m, n, k] = [a.shape()[axes - 2], b.shape()[axes - 1], a.shape()[axes - 1]];
    let half = left.half && right.half || a.gpu().rounds_products();
    let (left, right) = (left.fragment, right.fragment);
    choose(a.gpu(), &Problem { m, n, k, batch: batch.count(), left, right, half }).to_string()
}

/// The product by every kernel that could make it, for the tests: name and result.
#[doc(hidden)]
pub fn by_each_kernel(a: &Tensor, b: &Tensor) -> Vec<(String, Tensor)> {
    let beside = a.gpu().beside();
    let _ = beside.0.coop_proven.set(true);
    let half = a.dtype() == DType::F16 && b.dtype() == DType::F16;
    let plain = |x: &Tensor| x.strides[1] == 1;
    let left = if plain(a) { "lhs_plain" } else { "lhs_transposed" };
    let right = if plain(b) { "rhs_plain" } else { "rhs_transposed" };
    let [m, n, k] = [a.shape()[0], b.shape()[1], a.shape()[1]];
    let problem = Problem { m, n, k, batch: 1, left, right, half };
    let copy = |x: &Tensor| {
        let from = if plain(x) { x.clone() } else { x.t() };
        let data = from.cast(DType::F32).to_vec::<f32>().expect("a tensor of the test");
        let y = Tensor::from_slice(&beside, &data, *from.shape()).cast(x.dtype());
        if plain(x) { y } else { y.t() }
    };
    let (a, b) = (copy(a), copy(b));
    let product = |core: &Core| {
        beside.choose(problem.key(), core.to_string());
        (core.to_string(), no_grad(|| a.matmul(&b)))
    };
    Core::candidates(&beside, &problem).iter().map(product).collect()
}
