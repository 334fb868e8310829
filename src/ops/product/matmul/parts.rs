//! A long inner axis in parts, where the tiles of the result alone would leave the device idle. One dispatch computes a
//! product of each part, and a second one adds them up in order and stores the result (`matmul_join.wgsl`).

use super::core::{Core, MOST_GROUPS, Problem};
use super::cost;
use crate::gpu::kernel::Launch;
use crate::gpu::shader::Source;
use crate::gpu::{DeviceClass, Tiles};
use crate::tensor::Tensor;

/// An inner axis in parts of length `len`, a multiple of 64. The last part may be shorter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cut {
    pub parts: usize,
    pub len: usize,
}

/// The share of a CPU's cores that must be busy.
const FULL: f64 = 0.875;
/// CPU drivers: parts shorter than this are not worth a pass that adds them up.
const LEAST: usize = 256;
/// A multiple of every kernel's step and of its block of terms.
const STEP: usize = 64;
/// The most parts: 64 lanes share those of one result, with 32 each.
const MOST: usize = 2048;
/// A gain below this is not worth more parts, whose bytes and rounding are certain while the gain is an estimate.
const GAIN: f64 = 0.97;

impl Cut {
    /// The cut of an inner axis of length `k` into at most `parts` parts of equal length.
    pub fn into(k: usize, parts: usize) -> Cut {
        Cut::with(k, k.div_ceil(parts.max(1)).next_multiple_of(STEP))
    }

    fn with(k: usize, len: usize) -> Cut {
        Cut { parts: k.div_ceil(len).max(1), len }
    }

    /// The product of one part, as the kernels are chosen for it.
    pub fn part_of(self, problem: &Problem) -> Problem {
        if self.parts == 1 {
            return *problem;
        }
        Problem { k: self.len, batch: problem.batch * self.parts, ..*problem }
    }

    /// Chooses the number of parts, `None` if one is best. On GPUs it is the one that takes the least time by count, with
    /// no more bytes in the parts than in the operands. On CPU drivers it is what keeps the cores busy.
    pub fn of(class: &DeviceClass, problem: &Problem) -> Option<Cut> {
        let on_cpu = class.tiles == Tiles::Registers;
        let sizes = [problem.batch, problem.m, problem.n];
        let affordable = |cut: &Cut| {
            let cost = 2.0 * cut.parts as f64 * problem.result_bytes();
            let share = if on_cpu { 4.0 } else { 1.0 };
            let short = on_cpu && cut.len < LEAST || cut.parts > MOST;
            !short && share * cost <= problem.operand_bytes() && Join::of(class, sizes, cut.parts).fits()
        };
        let seconds = |cut: &Cut| {
            let part = cut.part_of(problem);
            let core = Core::by_table(class, &part);
            if on_cpu {
                let (bytes, flops) = (problem.operand_bytes(), problem.flops());
                let wanted = class.wanted(core.threads(class.lanes), bytes, flops) as f64;
                return 1.0 / (core.groups(&part) as f64 / wanted).min(FULL);
            }
            let join = if cut.parts > 1 { cost::join(class, problem, cut.parts) } else { 0.0 };
            core.seconds(class, &part) + join
        };
        // Below this no number of parts from here on can be, as more parts take longer to add up.
        let least = |cut: &Cut| match on_cpu {
            true => 0.0,
            false => cost::read(class, problem) + cost::join(class, problem, cut.parts),
        };
        let whole = Cut { parts: 1, len: problem.k };
        let mut best = (seconds(&whole), whole);
        // Numbers of parts are 2, 3, 4, 6, 8, 12 and so on: few to try, and the same for similar sizes.
        for parts in (0..).map(|i| [2, 3][i % 2] << (i / 2)) {
            // On a GPU a short part more costs little, while parts that are an eighth longer cost an eighth.
            let nearest = ((problem.k + parts * STEP / 2) / (parts * STEP)).max(1) * STEP;
            let cut = if on_cpu { Cut::into(problem.k, parts) } else { Cut::with(problem.k, nearest) };
            let last = parts > 2 * problem.k.div_ceil(STEP);
            if last || least(&cut) >= GAIN * best.0 || !affordable(&cut) {
                break;
            }
            let took = seconds(&cut);
            if cut.parts > best.1.parts && took < GAIN * best.0 {
                best = (took, cut);
            }
        }
        (best.1.parts > 1).then_some(best.1)
    }
}

/// The pass that adds up parts: its grid, and how many lanes share the parts of one result.
pub(super) struct Join {
    pub deep: usize,
    pub grid: [u32; 3],
    parts: usize,
    batch: usize,
}

impl Join {
    /// At most 32 parts a lane, and more lanes where there are few results. A lane reads four parts at a time.
    pub fn of(class: &DeviceClass, [batch, m, n]: [usize; 3], parts: usize) -> Join {
        let pieces = m * n.div_ceil(4);
        let idle = class.in_flight() / (pieces * batch).max(1);
        let floor = |lanes: usize| 1 << lanes.max(1).ilog2();
        let deep = floor(idle.min(parts / 4)).max(parts.div_ceil(32).next_power_of_two()).min(64);
        let grid = [pieces.div_ceil(64 / deep) as u32, 1, batch as u32];
        Join { deep, grid, parts, batch }
    }

    /// The pass without its store.
    pub fn source(&self, n: usize) -> Source {
        let source = Source::file("matmul_join");
        let source = if n.is_multiple_of(4) { source.slot("sums", "sums_of_4") } else { source };
        if self.deep == 1 {
            return source;
        }
        source.u32("DEEP", self.deep as u32).slot("deep", "deep_many")
    }

    /// The launch without what its store and its weights need.
    pub fn launch<'a>(
        &self,
        op: &'static str,
        source: &'a Source,
        sums: &Tensor,
        [m, n]: [usize; 2],
    ) -> Launch<'a> {
        // As many parts as there are: their length no longer matters.
        Launch::new(op, source, "main", self.grid)
            .bind("sums_of_parts", sums)
            .set("m", m)
            .set("n", n)
            .set("k", self.parts)
            .set("part", 1usize)
            .set("batch_inner", 1usize)
            .set("rhs", [0u32; 4])
            .set("any", [0usize; 2])
            .turns(self.parts.div_ceil(4 * self.deep) + self.deep)
    }

    /// Whether every adapter can launch both passes.
    fn fits(&self) -> bool {
        self.grid[0] as usize <= MOST_GROUPS && self.parts * self.batch <= MOST_GROUPS
    }
}
