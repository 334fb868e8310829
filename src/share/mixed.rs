//! One product for tokens at different depths: the shared matrix is read once, and each row adds the low-rank part of its
//! depth.

use super::Site;
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::product::matmul::Epilogue;
use crate::tensor::Tensor;
use std::sync::Arc;

/// The low-rank parts of all depths, stacked.
#[derive(Clone)]
pub struct DepthLora {
    /// `[depths * rank, in]`
    into: Tensor,
    /// `[out, depths * rank]`
    back: Tensor,
    /// The depth of each column of the product with `into`: `[1, depths * rank]`.
    columns: Tensor,
    scale: f32,
}

impl DepthLora {
    /// Stacks `A [depths, rank, in]` and `B [depths, out, rank]`; `scale` is a constant factor.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub fn new(a: &Tensor, b: &Tensor, scale: f32) -> DepthLora {
        let fits = a.shape().len() == 3
            && b.shape().len() == 3
            && [a.shape()[0], a.shape()[1]] == [b.shape()[0], b.shape()[2]]
            && a.count() * b.count() > 0;
        assert!(
            fits,
            "mixed depth: a {}, b {}; [depths, rank, in] and [depths, out, rank]",
            a.shape(),
            b.shape()
        );
        let [count, rank, inner] = [a.shape()[0], a.shape()[1], a.shape()[2]];
        let columns: Vec<u32> = (0..count * rank).map(|c| (c / rank) as u32).collect();
        DepthLora {
            into: a.reshape([count * rank, inner]),
            back: b.permute(&[1, 0, 2]).reshape([b.shape()[1], count * rank]),
            columns: Tensor::from_slice(a.gpu(), &columns, [1, count * rank]),
            scale,
        }
    }

    /// Returns `y[i] = x[i] W^T + scale x[i] A_d^T B_d^T` with `d = depths[i]`, for rows `x [rows, in]` and
    /// `depths [rows]` of u32.
    ///
    /// One product with `depths * rank` columns computes the low-rank parts of all depths, and each row keeps the columns
    /// of its depth. A second product maps them back, and the shared product adds the result as it stores. This takes
    /// four dispatches, however many depths there are.
    ///
    /// # Panics
    /// When the sizes do not fit.
    #[track_caller]
    pub fn linear(&self, x: &Tensor, weight: &Arc<dyn Site>, depths: &Tensor) -> Tensor {
        let ([out, inner], rows) = (weight.size(), depths.count());
        assert!(
            self.into.shape()[1] == inner && self.back.shape()[0] == out,
            "mixed depth: parts {} and {} for a weight [{out}, {inner}]",
            self.into.shape(),
            self.back.shape()
        );
        assert!(
            **x.shape() == [rows, inner] && depths.shape().len() == 1 && depths.dtype() == DType::U32,
            "mixed depth: rows {} at depths {} of {}",
            x.shape(),
            depths.shape(),
            depths.dtype()
        );
        let own = depths.reshape([rows, 1]).eq(&self.columns).cast(DType::F32);
        let low = x.matmul(&self.into.t()).mul(&own).scale(self.scale).matmul(&self.back.t());
        x.linear(weight, Epilogue { residual: Some(&low), ..Epilogue::default() })
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (rows, n, k, rank) in [(5, 4, 6, 2), (1, 3, 8, 1), (70, 5, 4, 3)] {
        let depths: Vec<f64> = (0..rows).map(|i| (i * i % 3) as f64).collect();
        let inputs = vec![
            Input::normal([rows, k]),
            Input::normal([n, k]),
            Input::normal([3, rank, k]),
            Input::normal([3, n, rank]),
            Input::integers([rows], DType::U32, 0, 3).fill(Fill::Values(depths)),
        ];
        let forward = |x: &[Tensor]| {
            let weight = Arc::new(super::Tied::new(&x[1])) as Arc<dyn Site>;
            DepthLora::new(&x[2], &x[3], 0.5).linear(&x[0], &weight, &x[4])
        };
        let reference = move |x: &[Array]| {
            Array::from_fn([rows, n], |i| {
                let (row, col) = (i / n, i % n);
                let depth = x[4].data[row] as usize;
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let own = &x[0].data[row * k..][..k];
                let low: f64 = (0..rank)
                    .map(|r| {
                        let a = &x[2].data[(depth * rank + r) * k..][..k];
                        dot(own, a) * x[3].data[(depth * n + col) * rank + r]
                    })
                    .sum();
                dot(own, &x[1].data[col * k..][..k]) + 0.5 * low
            })
        };
        all.push(Case::new(format!("{rows} {n} {k} {rank}"), inputs, forward, reference).ulps(32.0, 64.0));
    }
    all
}
