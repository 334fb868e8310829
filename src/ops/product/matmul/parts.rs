//! A long inner axis in parts: each part a product of its own, added up in order by a second pass, where the tiles of the result
//! alone would leave the device idle.

use super::core::{Core, FULL, Problem};
use super::product::{Product, Right};
use crate::gpu::DeviceClass;
use crate::tensor::Tensor;

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

/// `x` of two axes as a view `[parts, ..]`: parts of `len` along `axis`, from `first` on.
fn view(x: &Tensor, axis: usize, first: usize, Cut { parts, len }: Cut) -> Tensor {
    let mut sizes = [parts, x.shape()[0], x.shape()[1]];
    let mut strides = x.strides;
    (strides[0], strides[1], strides[2]) = (len * x.strides[axis], x.strides[0], x.strides[1]);
    sizes[axis + 1] = len;
    let offset = x.offset + first * x.strides[axis];
    Tensor { shape: sizes.into(), strides, offset, edge: None, ..x.clone() }
}

impl Product<'_> {
    /// The product of each part, into `to [parts, m, n]`.
    pub fn write_parts(&self, right: &Tensor, cut: Cut, to: &Tensor, accumulate: bool) {
        let whole = cut.parts * cut.len;
        // Those of equal length in one dispatch. What is left is added to the first: a place that every adapter can bind.
        let left = Cut { parts: 1, len: right.shape()[0] - whole };
        for (first, piece) in [(0, cut), (whole, left)].into_iter().filter(|(_, piece)| piece.len > 0) {
            let of = |x: &Tensor, axis: usize| view(x, axis, first, piece);
            let (lhs, rhs) = (of(self.lhs, 1), of(right, 0));
            let (own, accumulate) = (to.slice(0, 0..piece.parts), accumulate || first > 0);
            let new = Product::new(self.op, &lhs, Right::Tensor(&rhs));
            let one = Product { rows: self.rows, accumulate, parts: piece.parts, ..new };
            one.launch(&own);
        }
    }
}
