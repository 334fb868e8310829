//! A long inner axis in parts, where the tiles of the result alone would leave the device idle. Each part is a product by
//! itself, and a second pass adds up the parts in order.

use super::core::{Core, FULL, Problem};
use crate::gpu::DeviceClass;

/// An inner axis in parts of length `len`. The remainder behind them is added to the first part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cut {
    pub parts: usize,
    pub len: usize,
}

/// Parts shorter than this are not worth a pass that adds them up.
const LEAST: usize = 256;
/// More parts than this would take longer to add up than to compute.
const MOST: usize = 1024;

impl Cut {
    /// Chooses as many parts as keep the device busy. Writing and reading the parts may cost at most a quarter of the
    /// operands' bytes. `None` if one part is best.
    pub fn of(class: &DeviceClass, problem: &Problem) -> Option<Cut> {
        let Problem { m, n, k, .. } = *problem;
        let (bytes, flops) = (problem.operand_bytes(), problem.flops());
        let part = |parts: usize| {
            // A multiple of every kernel's step.
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
        // Numbers of parts are 2, 3, 4, 6, 8, 12 and so on: few to try, and the same for similar sizes.
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
