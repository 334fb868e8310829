//! Gradients of a layer's weight and bias that arrive one chunk of rows at a time.

use super::product::{Product, Right};
use crate::dtype::DType;
use crate::tensor::Tensor;

/// The sum of `a^T b` over chunks of rows. If one product would leave the device idle, a chunk's rows are cut into parts,
/// each with its own sum over chunks. The parts are added up once, at the end.
#[derive(Default)]
pub(crate) struct Outer(Option<Tensor>);

impl Outer {
    /// Adds `a^T b` of `a [rows, m]` and `b [rows, n]`.
    pub fn add(&mut self, op: &'static str, a: &Tensor, b: &Tensor) {
        let ([rows, m], n) = ([a.shape()[0], a.shape()[1]], b.shape()[1]);
        if rows == 0 {
            return;
        }
        let (gpu, turned, b) = (a.gpu(), a.contiguous().t(), b.contiguous());
        let product = Product::new(op, &turned, Right::Tensor(&b));
        let prepared = product.prepare(&[m, n]);
        let accumulate = self.0.is_some();
        // A later chunk that is shorter has shorter parts, or fewer of them. If it has none, it goes to the first part.
        let (sums, cut) = match self.0.take() {
            Some(sums) => {
                let parts = sums.shape()[0];
                (sums, prepared.cut_into(parts, gpu).filter(|_| parts > 1))
            }
            None => {
                let cut = prepared.cut(gpu);
                let parts = cut.map_or(1, |(cut, _)| cut.parts);
                (Tensor::empty(gpu, op, [parts, m, n], DType::F32), cut)
            }
        };
        match cut {
            Some(cut) => product.write_parts(&prepared, cut, &sums.slice(0, 0..cut.0.parts), accumulate),
            None => Product { accumulate, ..product }.launch(&sums.slice(0, 0..1).squeeze(0)),
        }
        self.0 = Some(sums);
    }

    /// Returns the sum `[m, n]`, or `None` if nothing was added.
    pub fn sum(self) -> Option<Tensor> {
        self.0.map(|parts| if parts.shape()[0] == 1 { parts.squeeze(0) } else { parts.sum(0) })
    }
}

/// The sum of the rows of all chunks.
#[derive(Default)]
struct Columns(Vec<Tensor>);

impl Columns {
    /// When this many sums have been collected, they are added up.
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

/// The gradients of `w` and `bias` of a layer `x w^T + bias`, summed over chunks of rows: `dw = sum dy^T x`,
/// `dbias = sum dy`.
#[derive(Default)]
pub(crate) struct LayerSums {
    weight: Outer,
    bias: Columns,
}

impl LayerSums {
    /// Adds a chunk's share to the gradients that are wanted.
    pub fn add(&mut self, op: &'static str, dy: &Tensor, x: &Tensor, wants: &[bool]) {
        if wants[0] {
            self.weight.add(op, dy, x);
        }
        if wants[1] {
            self.bias.add(dy);
        }
    }

    /// Returns both gradients, `None` where nothing was added.
    pub fn sums(self) -> [Option<Tensor>; 2] {
        [self.weight.sum(), self.bias.sum()]
    }
}
