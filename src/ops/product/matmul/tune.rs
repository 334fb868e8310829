//! Measures the kernels of a class of products, and tests cooperative matrices.

use super::core::{Core, Problem, tiled};
use super::parts::Cut;
use super::product::{Product, Right};
use super::table::coop;
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::{CoopMatrices, DeviceClass, Gpu};
use crate::rng::Rng;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::time::{Duration, Instant};

/// Time for all candidates of one class together, per round.
const BUDGET: Duration = Duration::from_millis(250);
/// In each round a kernel must be faster than the table's by this factor to replace it.
const GAIN: f64 = 1.03;

/// The most time to warm up: for a clock that comes up from idle, and for one that fell while kernels were compiled.
const WARM_FIRST: Duration = Duration::from_secs(2);
const WARM: Duration = Duration::from_millis(500);

/// The most seconds that a product may take at the device's rate. Its slowest kernel takes several times as long.
const LONGEST: f64 = 0.1;

/// Whether the problem can be rebuilt from its class: a product of tensors that does not take long on this device.
pub(super) fn measurable(class: &DeviceClass, problem: &Problem) -> bool {
    let operand = |name: &str| name.ends_with("_plain") || name.ends_with("_transposed");
    let short = class.seconds(problem.operand_bytes(), problem.flops()) < LONGEST;
    operand(problem.left) && operand(problem.right) && short
}

/// Makes operands of a problem, with the layouts that it names.
fn operands(gpu: &Gpu, problem: &Problem) -> [Tensor; 2] {
    let Problem { m, n, k, batch, .. } = *problem;
    let mut rng = Rng::new(7);
    let mut make = |rows: usize, cols: usize, transposed: bool| {
        let size = if transposed { [batch, cols, rows] } else { [batch, rows, cols] };
        let mut data = vec![0.0f32; batch * rows * cols];
        rng.fill_normal(&mut data);
        let x = Tensor::from_slice(gpu, &data, size);
        let x = x.cast(problem.dtype);
        if transposed { x.transpose(1, 2) } else { x }
    };
    [make(m, k, problem.left == "lhs_transposed"), make(k, n, problem.right == "rhs_transposed")]
}

/// Computes a product in one dispatch of a kernel, whatever its inner axis. Choices are made per part, so nothing is cut
/// here.
fn whole(a: &Tensor, b: &Tensor, core: Core) -> Tensor {
    let [batch, m, n] = [a.shape()[0], a.shape()[1], b.shape()[2]];
    let y = Tensor::empty(a.gpu(), "matmul", [batch, m, n], DType::F32);
    let product = Product::new("matmul", a, Right::Tensor(b));
    product.dispatch(&y, &product.prepare(y.shape()), core);
    y
}

/// Measures kernels on one problem, on a device handle that nothing else uses.
struct Trial<'a> {
    gpu: &'a Gpu,
    inputs: [Tensor; 2],
}

impl Trial<'_> {
    fn run(&self, core: Core) -> Tensor {
        no_grad(|| whole(&self.inputs[0], &self.inputs[1], core))
    }

    /// Compiles the kernel and runs it once. If the kernel cannot do it, the result carries the error; measured, it would
    /// seem to take no time.
    fn first(&self, core: Core) -> Result<()> {
        self.run(core).check()?;
        self.gpu.synchronize()
    }

    /// Returns the seconds per call, averaged over `count` calls.
    fn sample(&self, core: Core, count: usize) -> Result<f64> {
        let work = || (0..count).for_each(|_| drop(self.run(core)));
        if self.gpu.has_own_clock() {
            return Ok(self.gpu.time(work)? / count as f64);
        }
        self.gpu.synchronize()?;
        let start = Instant::now();
        work();
        self.gpu.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / count as f64)
    }

    /// Returns the least seconds per call of each kernel. Kernels take turns, so that a clock that rises or falls affects
    /// all of them alike. A kernel that is twice as slow as the fastest is not tried again.
    fn round(&self, cores: &[Core], budget: Duration) -> Result<Vec<f64>> {
        let mut best = vec![f64::INFINITY; cores.len()];
        let started = Instant::now();
        for turn in 0.. {
            let fastest = best.iter().copied().fold(f64::INFINITY, f64::min);
            for (core, best) in cores.iter().zip(&mut best) {
                if turn == 0 || *best < 2.0 * fastest {
                    // Short kernels run several times per submission, so that its cost does not hide theirs.
                    let count = if *best < 2e-3 { 4 } else { 1 };
                    *best = best.min(self.sample(*core, count)?);
                }
            }
            if started.elapsed() >= budget {
                break;
            }
        }
        Ok(best)
    }

    /// Runs until the clock has come up: a GPU that was idle starts at a fifth of its rate. Ends when two samples in a
    /// row take the same time, or after `most`.
    fn warm_up(&self, core: Core, most: Duration) -> Result<()> {
        let started = Instant::now();
        let count = (2e-2 / self.sample(core, 1)?.max(1e-6)).clamp(1.0, 1000.0) as usize;
        let mut last = f64::INFINITY;
        while started.elapsed() < most {
            let now = self.sample(core, count)?;
            if (now / last - 1.0).abs() < 0.02 {
                break;
            }
            last = now;
        }
        Ok(())
    }
}

/// The result of measuring a class of products.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Tuned {
    /// The class: types, layouts, sizes up to the next power of two, batches.
    pub class: String,
    /// The kernel that the table would choose.
    pub table: String,
    /// The kernel to use: the table's, unless another one was clearly faster.
    pub best: String,
    /// Time of the table's kernel divided by that of the kernel to use.
    pub gain: f64,
}

/// Returns the index of the kernel to use, and its gain. `rounds` has the times of all kernels in each of several rounds,
/// the table's kernel first. Another kernel must have been faster by [`GAIN`] in every round.
fn best_of(rounds: &[Vec<f64>]) -> (usize, f64) {
    let gain = |i: usize| rounds.iter().map(|round| round[0] / round[i]).fold(f64::INFINITY, f64::min);
    let others = (1..rounds[0].len()).map(|i| (i, gain(i))).filter(|(_, gain)| *gain >= GAIN);
    others.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 1.0))
}

/// Measures the kernels of this class, and keeps the one to use for this process and for later ones.
///
/// # Errors
/// When the device or a measurement fails. Nothing is kept then.
fn tune(gpu: &Gpu, class: &DeviceClass, problem: &Problem) -> Result<(Core, Tuned)> {
    let beside = gpu.beside();
    let trial = Trial { gpu: &beside, inputs: operands(&beside, problem) };
    let all = Core::candidates(class, problem);
    let table = all[0];
    trial.first(table)?;
    let mut cores = vec![table];
    for &core in &all[1..] {
        match trial.first(core) {
            Ok(()) => cores.push(core),
            Err(error) => {
                tracing::warn!(%core, %error, "left out");
                beside.take_fault();
            }
        }
    }
    trial.warm_up(table, WARM)?;
    let rounds = [trial.round(&cores, BUDGET)?, trial.round(&cores, BUDGET)?];
    tracing::debug!(class = problem.key(), ?cores, ?rounds, "measured");
    let (at, gain) = best_of(&rounds);
    let best = cores[at];
    gpu.choose(problem.key(), best.to_string());
    if let Err(error) = gpu.save_choices() {
        tracing::warn!(%error, "the choice is not kept");
    }
    let [table, name] = [table, best].map(|core| core.to_string());
    Ok((best, Tuned { class: problem.key(), table, best: name, gain }))
}

/// Returns the kernel to use for this class, or the table's if the class cannot be measured.
pub(super) fn measure(gpu: &Gpu, problem: &Problem) -> Core {
    tune(gpu, gpu.class(), problem).map(|(core, _)| core).unwrap_or_else(|error| {
        tracing::warn!(class = problem.key(), %error, "not measured");
        Core::by_table(gpu.class(), problem)
    })
}

/// Products that the benchmark measures: batch, m, n, k.
pub(crate) const BENCHED: [[usize; 4]; 11] = [
    [1, 256, 256, 256],
    [1, 512, 512, 512],
    [1, 1024, 1024, 1024],
    [1, 2048, 768, 768],
    [32, 128, 128, 64],
    [1, 1, 2048, 2048],
    [1, 8, 2048, 2048],
    [1, 2048, 8, 2048],
    [1, 64, 64, 16384],
    [1, 2048, 2048, 2048],
    [1, 4096, 4096, 4096],
];

/// Returns the classes that `tiebeam tune` measures: those of the benchmark, then linear layers forward and backward,
/// with one row to many.
fn classes(class: &DeviceClass, coop: Option<usize>) -> Vec<Problem> {
    let (lp, lt, rp, rt) = ("lhs_plain", "lhs_transposed", "rhs_plain", "rhs_transposed");
    let mut all = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let of = |batch, [m, n, k]: [usize; 3], left, right| {
            Problem { m, n, k, batch, left, right, dtype, coop: None, bits: None }.with(|| coop)
        };
        if dtype == DType::Bf16 || dtype == DType::F16 && coop.is_none() {
            // Without matrix units, 16 bits only save bytes, so two of the benchmark's sizes are enough.
            all.extend([1024, 4096].map(|size| of(1, [size; 3], lp, rp)));
            continue;
        }
        all.extend(BENCHED.iter().map(|&[batch, m, n, k]| of(batch, [m, n, k], lp, rp)));
        let rows: &[usize] = if class.is_cpu() { &[1024, 128, 1, 8] } else { &[4096, 1024, 128, 1, 8] };
        for &tokens in rows {
            for (width, inner) in [(1024, 1024), (256, 256), (4096, 1024), (1024, 4096)] {
                // y = x W^T, dx = dy W, dW = dy^T x
                all.push(of(1, [tokens, width, inner], lp, rt));
                all.push(of(1, [tokens, inner, width], lp, rp));
                if tokens > 8 {
                    all.push(of(1, [width, inner, tokens], lt, rp));
                }
            }
        }
    }
    // If the inner axis is cut, the kernel computes a part.
    for problem in &mut all {
        if let Some(cut) = Cut::of(class, problem) {
            *problem = cut.part_of(problem);
        }
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|problem| measurable(class, problem) && seen.insert(problem.key()));
    all
}

/// The progress of [`tune_all`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Classes of products that were measured.
    pub done: usize,
    /// Classes that could not be measured, each with a warning.
    pub failed: usize,
    /// Number of classes.
    pub of: usize,
}

/// Measures class after class, the common ones first, until all are done or `budget` is spent. `each` is called when a
/// class begins and, with its result, when it is done. If measuring ends early, the results so far are kept. `class` is
/// the class that later runs will assume for the device, such as the one from [`Gpu::measure_class`]. It decides into
/// which parts a product is cut, and therefore what is measured.
///
/// # Errors
/// [`crate::Error::Io`] when the choices cannot be written; when the device fails.
pub fn tune_all(
    gpu: &Gpu,
    class: &DeviceClass,
    budget: Duration,
    mut each: impl FnMut(Progress, Option<&Tuned>),
) -> Result<Progress> {
    let started = Instant::now();
    let classes = classes(class, gpu.coop().map(|matrices| matrices.size as usize));
    let mut at = Progress { done: 0, failed: 0, of: classes.len() };
    for problem in &classes {
        if started.elapsed() >= budget {
            break;
        }
        each(at, None);
        match tune(gpu, class, problem) {
            Ok((_, tuned)) => {
                at.done += 1;
                each(at, Some(&tuned));
            }
            Err(error) => {
                gpu.check()?;
                tracing::warn!(class = problem.key(), %error, "not measured");
                at.failed += 1;
            }
        }
    }
    gpu.save_choices()?;
    Ok(at)
}

impl Gpu {
    /// Returns the matrix units if they have passed a test on this device: they must give the plain kernel's results and
    /// be faster. The test runs at the first call, apart from anything that is being recorded. A CPU driver emulates
    /// matrices at a fraction of the rate of plain kernels, so it is not tested, and uses them only if the kernels of a
    /// GPU's class are asked for (`TIEBEAM_DEVICE=discrete`).
    pub(crate) fn coop(&self) -> Option<CoopMatrices> {
        let software = self.adapter().is_software();
        let matrices = self.coop_matrices().filter(|_| !software || !self.class().is_cpu())?;
        let proven = *self.0.coop_proven.get_or_init(|| {
            let beside = self.beside();
            // On the handle for the test, the kernels must be available before they have passed.
            let _ = beside.0.coop_proven.set(true);
            let passed = right(&beside, matrices.size as usize)
                .and_then(|right| Ok(right && (software || fast(&beside, matrices.size as usize)?)));
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

/// A product of f16 on which cooperative matrices are tested.
fn trial_of(m: usize, n: usize, k: usize, size: usize) -> Problem {
    Problem {
        m,
        n,
        k,
        batch: 1,
        left: "lhs_plain",
        right: "rhs_plain",
        dtype: DType::F16,
        coop: Some(size),
        bits: None,
    }
}

const PLAIN: Core = tiled([32, 32], [4, 4]);

/// Compares the kernels on integers whose products and sums are exact in all of them, at sizes with and without edges:
/// every bit must agree.
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
        let mut results = Vec::new();
        for core in [PLAIN].iter().chain(&coop(gpu.class(), size)) {
            results.push(no_grad(|| self::whole(&a.unsqueeze(0), &b.unsqueeze(0), *core)).to_vec::<f32>()?);
        }
        if results.iter().any(|result| result != &results[0]) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether they beat the plain kernel at 1024^3. The margin is wide, so that the answer is the same every time: the two
/// kernels round differently.
fn fast(gpu: &Gpu, size: usize) -> Result<bool> {
    let [m, n, k] = [1024; 3];
    let problem = trial_of(m, n, k, size);
    let trial = Trial { gpu, inputs: operands(gpu, &problem) };
    let Some(&smallest) = coop(gpu.class(), size).last() else { return Ok(false) };
    let cores = [smallest, tiled([64, 64], [8, 8])];
    cores.iter().try_for_each(|core| trial.first(*core))?;
    trial.warm_up(cores[1], WARM_FIRST)?;
    let times = trial.round(&cores, Duration::from_millis(40))?;
    Ok(1.5 * times[0] < times[1])
}

/// Computes the product with every kernel that can, and returns names and results, for the tests.
pub fn by_each_kernel(a: &Tensor, b: &Tensor) -> Vec<(String, Tensor)> {
    let beside = a.gpu().beside();
    let _ = beside.0.coop_proven.set(true);
    let dtype = Problem::operands([a.dtype(), b.dtype()], false);
    let plain = |x: &Tensor| x.strides[1] == 1;
    let left = if plain(a) { "lhs_plain" } else { "lhs_transposed" };
    let right = if plain(b) { "rhs_plain" } else { "rhs_transposed" };
    let [m, n, k] = [a.shape()[0], b.shape()[1], a.shape()[1]];
    let coop = beside.coop_matrices().map(|matrices| matrices.size as usize).filter(|_| dtype == DType::F16);
    let problem = Problem { m, n, k, batch: 1, left, right, dtype, coop, bits: None };
    let copy = |x: &Tensor| {
        let from = if plain(x) { x.clone() } else { x.t() };
        let data = from.cast(DType::F32).to_vec::<f32>().expect("a tensor of the test");
        let y = Tensor::from_slice(&beside, &data, *from.shape()).cast(x.dtype());
        if plain(x) { y } else { y.t() }
    };
    let (a, b) = (copy(a), copy(b));
    let product = |core: &Core| {
        (core.to_string(), no_grad(|| whole(&a.unsqueeze(0), &b.unsqueeze(0), *core).squeeze(0)))
    };
    Core::candidates(beside.class(), &problem).iter().map(product).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device is measured first and may be found wider than its row in the table says. What later runs ask for must
    /// have been measured.
    #[test]
    fn what_is_measured_is_what_the_measured_class_will_ask_for() {
        let row = DeviceClass::named("nvidia").unwrap();
        for class in
            [row.clone(), DeviceClass { width: 128, ..row.clone() }, DeviceClass { width: 16, ..row }]
        {
            let known: Vec<String> = classes(&class, None).iter().map(Problem::key).collect();
            for [batch, m, n, k] in BENCHED {
                let (left, right) = ("lhs_plain", "rhs_plain");
                let problem =
                    Problem { m, n, k, batch, left, right, dtype: DType::F32, coop: None, bits: None };
                let part = Cut::of(&class, &problem).map_or(problem, |cut| cut.part_of(&problem));
                assert!(!measurable(&class, &part) || known.contains(&part.key()), "{}", part.key());
            }
        }
    }
}
