//! A long inner axis in parts: each part a product of its own, added up in order by a second pass, where the tiles of the result
//! alone would leave the device idle.

use super::core::{Core, FULL, Problem};
use crate::gpu::DeviceClass;

/// An inner axis in parts of `len`; what is left behind them goes to the first one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cut {
    pub parts: usize,
    pub len: usize,
}

/// Shorter parts than this are not worth a pass that adds them up.
const LEAST: usize = 256;
/// More parts than this would be added up for longer than they are made.
const MOST: usize = 1024;

impl Cut {
    /// As many parts as keep the device busy, within what adding them up may cost: written and read they are at most a quarter of
    /// the operands.
    pub fn of(class: &DeviceClass, problem: &Problem) -> Option<Cut> {
        let Problem { m, n, k, .. } = *problem;
        let (bytes, flops) = (problem.operand_bytes(), problem.flops());
        let part = |parts: usize| {
            // Whole steps of every kernel.
            let len = (k / parts / 16 * 16).max(16);
            Cut { parts: k / len, len }
        };
        let affordable = |cut: &Cut| {
            let cost = 8.0 * (cut.parts * problem.batch * m * n) as f64;
            cut.len >= LEAST && cut.parts <= MOST && 4.0 * cost <= bytes
        };
        let busy = |cut: &Cut| {
            let one = Problem { k: cut.len, batch: problem.batch * cut.parts, ..*problem };
            let core = Core::by_table(class, &one);
            let wanted = class.wanted(core.threads(class.lanes), bytes, flops);
            (core.groups(&one) as f64 / wanted as f64).min(1.0)
        };
        let whole = Cut { parts: 1, len: k };
        let mut best = (busy(&whole), whole);
        // By halves of what there is: few steps, and the same for sizes that are near each other.
        for parts in (0..).map(|i| [2, 3][i % 2] << (i / 2)) {
            let cut = part(parts);
            if best.0 >= FULL || !affordable(&cut) {
                break;
            }
            let busy = busy(&cut);
            if cut.parts > best.1.parts && busy > best.0 {
                best = (busy, cut);
            }
        }
        (best.1.parts > 1).then_some(best.1)
    }
}
