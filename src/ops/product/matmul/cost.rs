//! How long a kernel of a product takes on a GPU, by count. The numbers are rough, but what is compared are kernels of
//! one product on one device: whether a tile leaves multiprocessors without work, waits for memory, or reads operands
//! too often.

use super::core::{Coop, Core, Problem};
use crate::gpu::DeviceClass;

/// Seconds from a load to its use, if the last cache has it and if it comes from memory. The loads of one step of the
/// inner axis are in flight together, and steps follow each other.
const LATENCY: [f64; 2] = [0.4e-6, 0.8e-6];
/// Seconds that a workgroup's threads wait for each other at a step in workgroup memory. Other workgroups of the
/// multiprocessor compute meanwhile.
const BARRIER: f64 = 0.05e-6;
/// The share of what runs at the same time as something longer that still adds to its time.
const HIDDEN: f64 = 0.25;
/// How much more a device's last cache delivers than its memory.
const CACHE: f64 = 2.0;
/// The time of an element that is read from workgroup memory or a cache, in multiply-adds of the same thread.
const READ: f64 = 1.5;

impl Core {
    /// 32-bit registers of a thread: two sums for each result, what one step reads, blocks of the next tile, and about 24
    /// for addresses.
    fn registers(&self) -> usize {
        match *self {
            Core::Direct { thread: [tm, tn], .. } => 2 * tm * tn + 4 * (tm + tn) + 24,
            Core::Tiled { thread: [tm, tn], .. } => 2 * tm * tn + tm + tn + 16 * self.fills() + 24,
            Core::Coop(_) => 160,
            Core::Packed { thread: [tm, tn], .. } => 8 * tm * tn + 4 * tm + 12 * tn + 24,
        }
    }

    /// The share of the device's multiply-adds that a thread's reads of its operands leave.
    fn share(&self) -> f64 {
        let of = |[tm, tn]: [usize; 2]| 1.0 / (1.0 + READ * (tm + tn) as f64 / (tm * tn) as f64);
        match *self {
            Core::Direct { thread, .. } | Core::Tiled { thread, .. } => of(thread),
            // Besides the multiply-adds of its rows, a weight takes three and a half instructions to unpack.
            Core::Packed { thread: [tm, _], .. } => 1.0 / (1.0 + 3.5 / tm as f64),
            // Matrix units do about ten times as many as other units, of which reading matrices leaves about half.
            Core::Coop(Coop { part: [m, n], .. }) => 10.0 / (1.0 + 24.0 * (m + n) as f64 / (m * n) as f64),
        }
    }

    /// Seconds of one dispatch of this kernel on a GPU of this class.
    pub(super) fn seconds(&self, class: &DeviceClass, problem: &Problem) -> f64 {
        let ([tm, tn], threads, depth) = (self.tile(), self.threads(class.lanes), self.depth());
        let steps = problem.k.div_ceil(depth) as f64;
        let (groups, width) = (self.groups(problem), class.width as usize);
        // Workgroups of the multiprocessor that has the most, and how many of them run at a time.
        let most = groups.div_ceil(width);
        let file = class.threads as usize * class.registers as usize;
        let side_by_side = (file / (threads * self.registers())).max(1);
        let rounds = most.div_ceil(side_by_side) as f64;
        // One step of one workgroup: its sums, if it had the multiprocessor for itself, and what it takes if it is alone.
        // The next tile is read meanwhile, but not all of the waiting is hidden.
        let rate = class.flops_s / class.width as f64 * self.share();
        let computed = (2 * tm * tn * depth) as f64 / rate;
        let thin = matches!(self, Core::Direct { .. } | Core::Packed { .. });
        let barrier = if thin { 0.0 } else { BARRIER };
        // What several workgroups read comes from memory once. The short operand of a thin product stays in the nearest
        // cache.
        let size = problem.dtype.size() as f64;
        let reads = groups as f64 * steps * size * (depth * (tm + tn)) as f64;
        let first = if thin { 1.0 } else { (problem.operand_bytes() / reads).min(1.0) };
        let latency = LATENCY[0] + first * (LATENCY[1] - LATENCY[0]);
        let cached = if thin { 0.0 } else { reads / (CACHE * class.bytes_s) };
        let alone = latency.max(computed) + HIDDEN * latency.min(computed) + barrier;
        // Few threads have too little under way for the memory's whole rate.
        let reading = if thin { groups * threads } else { class.in_flight() };
        let rate = class.bytes_s * (reading as f64 / class.in_flight() as f64).min(1.0);
        let moved = (problem.operand_bytes() + problem.result_bytes()) / rate;
        let busy = most as f64 * steps * computed;
        class.dispatch + busy.max(rounds * steps * alone).max(moved).max(cached) + HIDDEN * cached
    }
}

/// The least seconds of a dispatch that reads the operands of a product.
pub(super) fn read(class: &DeviceClass, problem: &Problem) -> f64 {
    class.dispatch + problem.operand_bytes() / class.bytes_s
}

/// Seconds of the pass that adds up `parts` results of a product.
pub(super) fn join(class: &DeviceClass, problem: &Problem, parts: usize) -> f64 {
    class.dispatch + LATENCY[1] + problem.result_bytes() * (2 * parts + 1) as f64 / class.bytes_s
}
