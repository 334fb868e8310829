//! One product for tokens at different depths: the shared matrix is read once, and each row adds the low-rank part of its
//! depth.

use super::Site;
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::product::matmul::Epilogue;
use crate::ops::product::mixed;
use crate::ops::product::narrow::stored;
use crate::tape;
use crate::tensor::Tensor;
use std::sync::Arc;

/// The low-rank parts of all depths, stacked.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{DepthLora, Site, Tied};
/// let w = Tied::new(&Tensor::zeros(&gpu, [1, 2])).shared(); // what all depths share
/// let a = Tensor::from_slice(&gpu, &[1f32, 0.0, 0.0, 1.0], [2, 1, 2]); // [depths, rank, in]
/// let b = Tensor::ones(&gpu, [2, 1, 1]); // [depths, out, rank]
/// let x = Tensor::from_slice(&gpu, &[5f32, 7.0, 5.0, 7.0], [2, 2]);
/// let depths = Tensor::from_slice(&gpu, &[1u32, 0], [2]); // row 0 is at depth 1
/// let y = DepthLora::new(&a, &b, 1.0).linear(&x, &w, &depths);
/// assert_eq!(y.to_vec::<f32>()?, [7.0, 5.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct DepthLora {
    /// `[depths * rank, in]`
    into: Tensor,
    /// `[out, depths * rank]`
    back: Tensor,
    /// The same as `[depths, rank, out]`, without a graph.
    apart: Tensor,
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
            back: b.permute([1, 0, 2]).reshape([b.shape()[1], count * rank]),
            apart: b.detach().transpose(1, 2).contiguous(),
            columns: Tensor::from_slice(a.gpu(), &columns, [1, count * rank]),
            scale,
        }
    }

    /// Returns `y[i] = x[i] W^T + scale x[i] A_d^T B_d^T` with `d = depths[i]`, for rows `x [rows, in]` and
    /// `depths [rows]` of u32.
    ///
    /// Without a tape and on a GPU, one product computes `x W^T` and, as `depths * rank` further columns, `x A^T` of all depths. A second
    /// pass maps the columns of each row's depth back and adds them. This takes two dispatches, however many depths there
    /// are. Otherwise the low-rank parts are products of their own.
    ///
    /// A row at a depth that does not exist has the shared part only.
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
        let plain = weight.stored().filter(|w| w.dtype() == DType::F32 && x.dtype() == DType::F32);
        let tracked =
            tape::tracks(&[x, &self.into, &self.back]) || weight.leaves().iter().any(|w| tape::tracks(&[w]));
        if let Some(w) = plain.filter(|_| !tracked && mixed::takes_rows(x.gpu().class(), rows)) {
            let own = mixed::Parts { into: &self.into, back: &self.apart, scale: self.scale };
            return stored(&mixed::depths("mixed_depth", &x.detach(), &w, own, depths));
        }
        let own = depths.reshape([rows, 1]).eq(&self.columns).cast(DType::F32);
        let low = x.matmul(&self.into.t()).mul(&own).scale(self.scale).matmul(&self.back.t());
        x.linear(weight, Epilogue { residual: Some(&low), ..Epilogue::default() })
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    // Without a tape, GPUs have another kernel. Whole numbers, whose sums are exact, show that no term is lost.
    let small = [(5, 4, 6, 2), (1, 3, 8, 1), (70, 5, 4, 3)].map(|sizes| (sizes, true));
    let long = [(9, 12, 640, 4), (3, 8, 516, 70), (33, 20, 132, 5)].map(|sizes| (sizes, false));
    for ((rows, n, k, rank), small) in small.into_iter().chain(long) {
        let depths: Vec<f64> = (0..rows).map(|i| (i * i % 3) as f64).collect();
        let drawn = |shape: &[usize]| match small {
            true => Input::normal(shape),
            false => Input::integers(shape, DType::F32, -6, 7),
        };
        let inputs = vec![
            drawn(&[rows, k]),
            drawn(&[n, k]),
            drawn(&[3, rank, k]),
            drawn(&[3, n, rank]),
            Input::integers([rows], DType::U32, 0, 3).fill(Fill::Values(depths)),
        ];
        let forward = |x: &[Tensor]| {
            let weight = super::Tied::new(&x[1]).shared();
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
        let name = format!("{rows} {n} {k} {rank}");
        let alone = move |x: &[Tensor]| tape::no_grad(|| forward(x));
        let fixed = inputs.iter().cloned().map(Input::fixed).collect();
        let case = Case::new(format!("without a tape {name}"), fixed, alone, reference).ulps(32.0, 64.0);
        all.push(if small { case } else { case.exact() });
        if small {
            all.push(Case::new(name, inputs, forward, reference).ulps(32.0, 64.0));
        }
    }
    all
}
