//! How a GPU's workgroups share sums over columns: the plan of `reduce_columns.wgsl` and of the gradients of norms.

use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, grid};

/// Threads of a workgroup.
pub(super) const THREADS: usize = 256;
/// Loads that a thread has under way.
const LOADS: usize = 8;
/// Turns that take no longer than a second pass, which costs about as much as four trips to memory.
const SHORT: usize = 4;
/// The most turns in which a thread adds up, in blocks of 32.
const MOST: usize = 32 * 32;

/// How workgroups are laid over `[outer, axis, inner]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Columns {
    /// A workgroup has 2^shift neighbouring columns and 256 / 2^shift lanes for each.
    shift: u32,
    /// Parts of the axis, each with its own result.
    pub parts: usize,
    /// The length of a part.
    pub span: usize,
    pub groups: usize,
    /// The most turns of a thread, apart from those of the tree.
    pub turns: usize,
}

impl Columns {
    /// Returns the plan for sums over the middle axis, with `inner` counted in vectors of four if `vectors`. `arrays`
    /// says how many arrays of this size are read; a thread takes 8 elements of one array in a turn, or 4 of two.
    ///
    /// One pass is best if it fills the device or has few turns. Its workgroups are as narrow as 64 bytes then, which is
    /// as little as memory hands out without waste. Otherwise the axis is cut into parts, in workgroups that read 512
    /// neighbouring bytes. A second pass joins the parts, which are few enough for one pass.
    pub fn of(
        class: &DeviceClass,
        [outer, size, inner]: [usize; 3],
        vectors: bool,
        arrays: usize,
    ) -> Columns {
        let bytes = (outer * size * inner * arrays) as f64 * if vectors { 16.0 } else { 4.0 };
        let ahead = LOADS / arrays;
        let busy = class.in_flight().div_ceil(THREADS);
        // More lanes than elements would be idle.
        let deep = (THREADS / size.next_power_of_two().clamp(1, THREADS)).max(1);
        let widest = inner.next_power_of_two().min(THREADS);
        let most = widest.min(deep.max(if vectors { 32 } else { 64 }));
        let least = most.min(deep.max(if vectors { 4 } else { 16 }));
        let groups = |wide: usize| outer * inner.div_ceil(wide);
        let turns = |wide: usize| size.div_ceil(THREADS / wide * ahead);
        let one = |wide: usize| Columns {
            shift: wide.trailing_zeros(),
            parts: 1,
            span: size,
            groups: groups(wide),
            turns: turns(wide) + turns(wide) / 32 + 1,
        };
        let widths = || (least.trailing_zeros()..=most.trailing_zeros()).rev().map(|shift| 1 << shift);
        let within = |wide: &usize| turns(*wide) <= MOST;
        if let Some(wide) = widths().filter(within).find(|&wide| groups(wide) >= busy) {
            return one(wide);
        }
        if turns(least) <= SHORT {
            return one(least);
        }
        // Elements in a turn of all lanes of a column.
        let turn = THREADS / most * ahead;
        let wanted = class.wanted(THREADS, bytes, 0.0).div_ceil(groups(most));
        // A part has whole turns, and at least two of them, so that the traffic of the second pass is small.
        let parts = wanted.min(size.div_ceil(2 * turn)).max(size.div_ceil(MOST * turn));
        let span = size.div_ceil(parts).next_multiple_of(turn);
        let (parts, turns) = (size.div_ceil(span), span / turn);
        Columns {
            shift: most.trailing_zeros(),
            parts,
            span,
            groups: groups(most) * parts,
            turns: turns + turns / 32 + 1,
        }
    }

    pub fn grid(&self) -> [u32; 3] {
        grid(self.groups)
    }

    /// Sets the parameters that describe the plan.
    pub fn set<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        launch.set("groups", self.groups).set("span", self.span).set("shift", self.shift).turns(self.turns)
    }
}
