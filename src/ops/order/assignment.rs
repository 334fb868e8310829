//! Linear assignment of a matrix on the device. An auction there finds prices, and
//! [`linalg::assignment`](crate::linalg::assignment) makes the result exact and proves it. Not differentiable.

use crate::dtype::{DType, Element};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, MOST_TURNS, grid};
use crate::gpu::shader::Source;
use crate::linalg::assignment::{Assignment, Cost, Goal, assign, assign_from};
use crate::ops::case::{Array, Case, Fill, Input};
use crate::tensor::Tensor;

/// The most rows and columns of a problem that one workgroup solves. Its prices and bids fill 7 KiB of workgroup
/// memory.
const SMALL: usize = 256;
/// Rounds between two checks whether the auction has ended.
const LOOK: usize = 16;
/// The most rounds of an auction. Independent entries and products of full rank need 20 to 115 at n = 512..2048.
/// Products of rank 32, whose last rows outbid each other for a long time, need 600 to 50000, and prices from fewer
/// rounds save the host nothing.
const MOST: usize = 160;
/// The most rounds for a small problem, for which many rounds are one dispatch.
const MOST_SMALL: usize = 1024;

fn source() -> Source {
    Source::file("assignment")
}

/// Whether prices should come from the device. An auction takes about 100 rounds of four dispatches, each of a few
/// microseconds, so for n up to 512 the host alone is as fast: at n = 512 it takes 0.5 to 11 ms on one core of an EPYC.
/// Small problems are only worth a dispatch and a readback in batches of 64 or more. A driver that runs on the CPU
/// never gains: llvmpipe took 20 to 260 times as long as the host.
fn worthwhile(gpu: &Gpu, batch: Option<usize>, n: usize) -> bool {
    !gpu.class().is_cpu()
        && match batch {
            Some(batch) if n <= SMALL => batch >= 64,
            _ => n > 512,
        }
}

impl Tensor {
    /// Finds the best assignment of this matrix `[n, m]`, which has `min(n, m)` pairs, with potentials that prove it in
    /// f64.
    ///
    /// Square matrices of more than 512 rows get their prices from an auction on the device. With a software driver, or
    /// if the auction takes long, the host solves the problem alone, which is faster. The result is exact for the
    /// elements as stored, be they f16, bf16, f32 or i32. Waits for the device.
    ///
    /// Source: Bertsekas 1988, "The auction algorithm". [`assign_from`] does the rest.
    ///
    /// # Errors
    /// As for [`assign`], and the device's fault, if one stands.
    ///
    /// # Panics
    /// If this is not a matrix, or has u32 elements.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::linalg::assignment::Goal;
    /// // The cost of worker `i` at task `j`.
    /// let cost = Tensor::from_slice(&gpu, &[4f32, 1.0, 3.0, 2.0, 0.0, 5.0, 3.0, 2.0, 2.0], [3, 3]);
    /// let best = cost.assignment(Goal::Minimize)?;
    /// assert_eq!(best.columns, [Some(1), Some(0), Some(2)]);
    /// assert_eq!(best.value, 5.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn assignment(&self, goal: Goal) -> Result<Assignment> {
        assert!(self.shape().len() == 2, "assignment: needs [n, m], got {}", self.shape());
        let device = worthwhile(self.gpu(), None, self.shape()[0]);
        Ok(self.assignments_by(goal, device)?.swap_remove(0))
    }

    /// Finds the best assignment of each matrix of `[batch, n, m]`, like [`Tensor::assignment`]. If it is worthwhile,
    /// one workgroup solves each square matrix of at most 256 rows, all in one dispatch.
    ///
    /// # Errors
    /// As for [`Tensor::assignment`].
    ///
    /// # Panics
    /// If this does not have three axes, or has u32 elements.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::linalg::assignment::Goal;
    /// let gains = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 5.0, 9.0, 1.0, 1.0, 9.0], [2, 2, 2]);
    /// let best = gains.assignments(Goal::Maximize)?;
    /// assert_eq!(best[0].columns, [Some(0), Some(1)]);
    /// assert_eq!([best[0].value, best[1].value], [6.0, 18.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn assignments(&self, goal: Goal) -> Result<Vec<Assignment>> {
        assert!(self.shape().len() == 3, "assignments: needs [batch, n, m], got {}", self.shape());
        let device = worthwhile(self.gpu(), Some(self.shape()[0]), self.shape()[1]);
        self.assignments_by(goal, device)
    }

    /// [`Tensor::assignment`] of a matrix, or [`Tensor::assignments`] of a batch, where `device` says whether prices come
    /// from the device. Tests and benchmarks compare the two ways; programs need not choose.
    ///
    /// # Errors
    /// As for [`Tensor::assignment`].
    ///
    /// # Panics
    /// If the tensor has u32 elements or fewer than two axes.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::linalg::assignment::Goal;
    /// let cost = Tensor::from_slice(&gpu, &[4f32, 1.0, 2.0, 3.0], [2, 2]);
    /// let [host, device] = [false, true].map(|device| cost.assignments_by(Goal::Minimize, device));
    /// assert_eq!(host?[0].columns, device?[0].columns);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn assignments_by(&self, goal: Goal, device: bool) -> Result<Vec<Assignment>> {
        let cost = self.detach();
        match self.dtype() {
            DType::I32 => solve::<i32>(&cost.contiguous(), goal, device),
            _ => solve::<f32>(&crate::ops::float("assignment", &cost).contiguous(), goal, device),
        }
    }

    /// Returns the device's part of the work of [`Tensor::assignments`], for tests: the potentials of the columns of each
    /// `[n, n]`, or `None` if its auction was given up.
    ///
    /// # Errors
    /// As for [`Tensor::assignment`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::linalg::assignment::Goal;
    /// let cost = Tensor::from_slice(&gpu, &[4f32, 1.0, 2.0, 3.0], [1, 2, 2]);
    /// let prices = cost.assignment_prices(Goal::Minimize)?;
    /// assert!(prices[0].as_ref().is_none_or(|prices| prices.len() == 2));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn assignment_prices(&self, goal: Goal) -> Result<Vec<Option<Vec<f64>>>> {
        prices(&self.detach().contiguous(), goal)
    }
}

/// Solves each matrix `[rows, columns]` of a contiguous tensor.
fn solve<E: Cost + Element>(cost: &Tensor, goal: Goal, device: bool) -> Result<Vec<Assignment>> {
    let axes = cost.shape().len();
    let size = [cost.shape()[axes - 2], cost.shape()[axes - 1]];
    let batch = if axes == 3 { cost.shape()[0] } else { 1 };
    let area = size[0] * size[1];
    // The entries are read back while the auction runs.
    let reading = cost.read::<E>()?;
    let device = device && size[0] == size[1] && area > 0;
    let prices = if device { prices(cost, goal)? } else { vec![None; batch] };
    let entries = bytemuck::pod_collect_to_vec::<u8, E>(&reading.wait()?);
    let one = |b: usize| {
        let cost = &entries[b * area..][..area];
        match &prices[b] {
            Some(prices) => assign_from(cost, size, goal, prices),
            None => assign(cost, size, goal),
        }
    };
    (0..batch).map(one).collect()
}

/// Returns the potentials of the columns of each `[n, n]` from the device. `None` if its auction did not end.
fn prices(cost: &Tensor, goal: Goal) -> Result<Vec<Option<Vec<f64>>>> {
    let cost = cost.cast(DType::F32).contiguous();
    let n = cost.shape()[cost.shape().len() - 1];
    let batch = cost.count() / (n * n);
    let flip = if goal == Goal::Minimize { 0 } else { 1 << 31 };
    let sign = if goal == Goal::Minimize { -1.0 } else { 1.0 };
    let potentials = |raw: &[f32]| raw.iter().map(|&p| sign * p as f64).collect::<Vec<f64>>();
    if cost.shape().len() == 3 && n <= SMALL {
        let raw = small(&cost, flip)?;
        // Entries that are not finite, which the host will report, may lead to any prices. Such prices are dropped.
        let sound = |one: &[f32]| one.iter().all(|p| p.abs() < FAR).then(|| potentials(one));
        return Ok(raw.chunks_exact(n).map(sound).collect());
    }
    let all = cost.reshape([batch, n, n]);
    let one = |b: usize| large(&all.slice(0, b..b + 1).contiguous(), n, flip);
    (0..batch)
        .map(|b| Ok(one(b)?.filter(|p| p.iter().all(|p| p.abs() < FAR)).map(|p| potentials(&p))))
        .collect()
}

/// The value from which on the kernels treat a number as infinite.
const FAR: f32 = 3e38;

/// Makes a launch for `problems` matrices `[n, n]`, with at most `rounds` rounds of the auction.
fn launch<'a>(
    source: &'a Source,
    entry: &'a str,
    groups: usize,
    n: usize,
    flip: u32,
    (problems, rounds): (usize, usize),
) -> Launch<'a> {
    Launch::new("assignment", source, entry, grid(groups))
        .set("n", n)
        .set("flip", flip)
        .set("leave", n / 32)
        .set("rounds", rounds)
        .set("problems", problems)
}

/// Runs the auctions of `[batch, n, n]`, one workgroup per problem.
fn small(cost: &Tensor, flip: u32) -> Result<Vec<f32>> {
    let (gpu, batch, n) = (cost.gpu(), cost.shape()[0], cost.shape()[1]);
    let price = Tensor::empty(gpu, "assignment", [batch, n], DType::F32);
    let held = Tensor::empty(gpu, "assignment", [batch, 3 * n + 4], DType::U32);
    let source = source();
    // In a round, each of a lane's columns looks at all rows, and the lane walks its share of rows and columns three
    // times. Before and after the rounds, the whole matrix is walked.
    let each = n.div_ceil(64);
    let (round, around) = (each * (n + 9) + 12, n * each + each * (n + 8) + n + 64);
    let now = ((MOST_TURNS - around) / round).min(MOST_SMALL);
    for i in 0..MOST_SMALL.div_ceil(now) {
        gpu.launch(
            launch(&source, "small", batch, n, flip, (batch, MOST_SMALL))
                .bind("cost", cost)
                .bind_mut("price", &price)
                .bind_mut("held", &held)
                .set("now", now)
                .set("begins", i == 0)
                .turns(around + now * round)
                .reuse(64),
        );
    }
    price.to_vec()
}

/// Runs the auction of one `[n, n]`, with all rows at once in every round. The host checks every [`LOOK`] rounds
/// whether it has ended.
fn large(cost: &Tensor, n: usize, flip: u32) -> Result<Option<Vec<f32>>> {
    let gpu = cost.gpu();
    let empty =
        |name: &'static str, count: usize, dtype| (name, Tensor::empty(gpu, "assignment", [count], dtype));
    let [bids, top, owner] = ["bids", "top", "owner"].map(|name| empty(name, 2 * n, DType::U32));
    let (held, state) = (empty("held", n, DType::U32), empty("state", 6, DType::U32));
    let price = empty("price", n, DType::F32);
    let source = source();
    let run = |entry: &str, groups: usize, cost: Option<&Tensor>, uses: &[&(&'static str, Tensor)]| {
        let launch = launch(&source, entry, groups, n, flip, (1, MOST)).bind_some("cost", cost);
        let launch = uses.iter().fold(launch, |launch, (name, x)| launch.bind_mut(*name, x));
        // A thread walks a column of n elements, a workgroup a row of n. Most rounds read few rows.
        gpu.launch(launch.set("now", 0u32).set("begins", false).turns(n).reuse(0));
    };
    let each = n.div_ceil(64);
    run("columns", each, Some(cost), &[&bids]);
    run("begin", 1, None, &[&price, &bids, &top, &owner, &held, &state]);
    for _ in 0..MOST.div_ceil(LOOK) {
        for _ in 0..LOOK {
            run("bid", n, Some(cost), &[&price, &bids, &top, &held, &state]);
            run("claim", each, None, &[&bids, &top]);
            run("resolve", each, None, &[&price, &top, &owner, &held, &state]);
            run("step", 1, None, &[&state]);
        }
        match state.1.to_vec::<u32>()?[0] {
            0 => {}
            1 => return price.1.to_vec().map(Some),
            _ => break,
        }
    }
    Ok(None)
}

/// Returns the least sum of `cost[n, n]`, by a shortest augmenting path over all columns for each row (Kuhn 1955,
/// Munkres 1957).
fn least64(cost: &[f64], n: usize) -> f64 {
    // Column 0 means "none yet", so rows and columns count from 1.
    let (mut u, mut v, mut row_of) = (vec![0.0; n + 1], vec![0.0; n + 1], vec![0; n + 1]);
    for row in 1..=n {
        let (mut nearest, mut from, mut done) =
            (vec![f64::INFINITY; n + 1], vec![0; n + 1], vec![false; n + 1]);
        let mut column = 0;
        row_of[0] = row;
        while row_of[column] != 0 {
            done[column] = true;
            let (i, mut step, mut next) = (row_of[column], f64::INFINITY, 0);
            for j in (1..=n).filter(|&j| !done[j]) {
                let slack = cost[(i - 1) * n + j - 1] - u[i] - v[j];
                if slack < nearest[j] {
                    (nearest[j], from[j]) = (slack, column);
                }
                if nearest[j] < step {
                    (step, next) = (nearest[j], j);
                }
            }
            for j in 0..=n {
                if done[j] {
                    u[row_of[j]] += step;
                    v[j] -= step;
                } else {
                    nearest[j] -= step;
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[from[column]];
            column = from[column];
        }
    }
    (1..=n).map(|j| cost[(row_of[j] - 1) * n + j - 1]).sum()
}

/// Compares the values of the best assignments with the reference, and checks that each was proved.
fn case(shape: &[usize], goal: Goal, device: bool, dtype: DType, fill: Fill) -> Case {
    let sign = if goal == Goal::Minimize { 1.0 } else { -1.0 };
    let n = shape[shape.len() - 1];
    let batch = shape.iter().product::<usize>() / (n * n);
    let by = if device { "device" } else { "host" };
    Case::new(
        format!("{goal:?} {shape:?} of {dtype} by the {by}"),
        vec![Input::normal(shape).dtype(dtype).fill(fill).fixed()],
        move |x| {
            let found = x[0].assignments_by(goal, device).expect("every entry is a number");
            let rows = found.iter().map(|a| [a.value as f32, a.exact as u8 as f32]);
            Tensor::from_slice(x[0].gpu(), rows.collect::<Vec<_>>().as_flattened(), [batch, 2])
        },
        move |x| {
            let turned: Vec<f64> = x[0].data.iter().map(|c| sign * c).collect();
            Array::from_fn([batch, 2], |at| match at % 2 {
                0 => sign * least64(&turned[at / 2 * n * n..][..n * n], n),
                _ => 1.0,
            })
        },
    )
    .exact()
}

pub(super) fn cases() -> Vec<Case> {
    let shapes: [&[usize]; 9] = [
        &[1, 1],
        &[7, 7],
        &[64, 64],
        &[131, 131],
        &[1, 1, 1],
        &[5, 13, 13],
        &[70, 16, 16],
        &[3, 65, 65],
        &[2, 257, 257],
    ];
    let mut all = Vec::new();
    for (k, shape) in shapes.into_iter().enumerate() {
        let goal = [Goal::Minimize, Goal::Maximize][k % 2];
        let wide = Fill::Integers(-2000, 2000);
        all.push(case(shape, goal, true, DType::F32, wide.clone()));
        // Few different values, so that there are many ties.
        all.push(case(shape, goal, true, [DType::I32, DType::F16, DType::Bf16][k % 3], Fill::Integers(0, 4)));
        all.push(case(shape, goal, false, DType::F32, wide));
    }
    all
}
