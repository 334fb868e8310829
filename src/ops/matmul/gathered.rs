//! Gradients of a layer's weight and bias that arrive a run of rows at a time.

use super::product::{Product, Right};
use super::split;
use crate::dtype::DType;
use crate::tensor::Tensor;

/// The sum of `a^T b` over runs of rows. Where one product would leave the device idle it is in parts of the rows, each with a sum
/// of its own, and those are added up once, at the end.
#[derive(Default)]
pub(crate) struct Outer(Option<Tensor>);

impl Outer {
    /// Adds `a^T b` of `[rows, m]` and `[rows, n]`.
    pub fn add(&mut self, op: &'static str, a: &Tensor, b: &Tensor) {
        let ([rows, m], n) = ([a.shape()[0], a.shape()[1]], b.shape()[1]);
        let parts = split(a.gpu(), m, n, rows).unwrap_or(1);
        let new = || Tensor::empty(a.gpu(), op, [parts, m, n], DType::F32);
        let (to, accumulate, parts) = match self.0.take() {
            None => (new(), false, parts),
            Some(sum) if sum.shape()[0] == parts => (sum, true, parts),
            // A last run that is short: into the first part alone.
            Some(sum) => (sum, true, 1),
        };
        let cut = |x: &Tensor| x.contiguous().reshape([parts, rows / parts, x.shape()[1]]);
        let (turned, b) = (cut(a).transpose(1, 2), cut(b));
        Product { accumulate, ..Product::new(op, &turned, Right::Tensor(&b)) }.write(&to.slice(0, 0..parts));
        self.0 = Some(to);
    }

    /// `[m, n]`; none where nothing was added.
    pub fn sum(self) -> Option<Tensor> {
        self.0.map(|parts| if parts.shape()[0] == 1 { parts.squeeze(0) } else { parts.sum(0) })
    }
}

/// The sum of rows over runs.
#[derive(Default)]
struct Columns(Vec<Tensor>);

impl Columns {
    /// Sums that wait before they are added up.
    const MOST: usize = 32;

    fn add(&mut self, x: &Tensor) {
        let own = x.sum(0).unsqueeze(0);
        own.evaluate();
        self.0.push(own);
        if self.0.len() == Columns::MOST {
            let all = std::mem::take(self).sum().map(|sum| sum.unsqueeze(0));
            self.0.extend(all);
        }
    }

    fn sum(self) -> Option<Tensor> {
        let sum = match &self.0[..] {
            [] => return None,
            [one] => one.squeeze(0),
            all => Tensor::concat(&all.iter().collect::<Vec<_>>(), 0).sum(0),
        };
        sum.evaluate();
        Some(sum)
    }
}

/// The gradients of `w` and `bias` of a layer `x w^T + bias` over runs of rows: `dw = sum dy^T x`, `dbias = sum dy`.
#[derive(Default)]
pub(crate) struct LayerSums {
    weight: Outer,
    bias: Columns,
}

impl LayerSums {
    /// Adds a run's share of what is wanted of the two.
    pub fn add(&mut self, op: &'static str, dy: &Tensor, x: &Tensor, wants: &[bool]) {
        if wants[0] {
            self.weight.add(op, dy, x);
        }
        if wants[1] {
            self.bias.add(dy);
        }
    }

    /// Both; none where nothing was added.
    pub fn sums(self) -> [Option<Tensor>; 2] {
        [self.weight.sum(), self.bias.sum()]
    }
}
