//! The weight of a layer as its scope reads it ([`autocast`](crate::autocast)).

use super::matmul::Epilogue;
use super::matmul::product::Right;
use super::narrow::narrowed;
use super::site::{LeafGrads, Load, Site};
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::precision::{Precision, autocast, precision};
use crate::tensor::Tensor;
use std::sync::Arc;

/// A product's weight as a scope reads it, for the forward and the backward pass.
#[derive(Clone)]
pub(super) struct Weight {
    site: Arc<dyn Site>,
    dtype: DType,
    /// A stored weight, converted.
    stored: Option<Tensor>,
}

impl Weight {
    /// The weight of a site in this thread's scope.
    pub fn of(site: &Arc<dyn Site>) -> Weight {
        let dtype = precision().dtype();
        let stored = if dtype.is_half() { site.stored() } else { None };
        let stored = stored.map(|w| narrowed(&w, dtype, true));
        Weight { site: site.clone(), dtype, stored }
    }

    /// Runs `work` with this weight, or its transpose, as the right side of a product.
    pub fn multiply(&self, transposed: bool, work: impl FnOnce(Right)) {
        let (name, size) = (self.site.name(), self.site.size());
        // Kernels of products trust the sizes that they are given, and a kind may come from anywhere.
        let fits = |w: Tensor| {
            let right = w.shape()[..] == size && w.dtype().is_float();
            assert!(right, "{name}: its weight is {} {}, and its size is {size:?}", w.dtype(), w.shape());
            w
        };
        if let Some(w) = &self.stored {
            let w = fits(w.clone());
            return work(Right::Tensor(&if transposed { w.t() } else { w }));
        }
        match self.site.stored().map(fits) {
            Some(w) => work(Right::Tensor(&if transposed { w.t() } else { w })),
            None => {
                let whole = || fits(self.site.expand_as(self.dtype));
                let load = || {
                    let load = self.site.load();
                    let own = load.size();
                    assert!(own == size, "{name}: its load is of a weight {own:?}, and its size is {size:?}");
                    load
                };
                let compact = self.site.is_compact();
                work(Right::Made { load: &load, whole: &whole, transposed, compact });
            }
        }
    }
}

/// A layer in a scope. Its weight has whole numbers, which are exact in 16 bits, so only the result is rounded.
fn layer(precision: Precision, [rows, inner, out]: [usize; 3], residual: bool) -> Case {
    let dtype = precision.dtype();
    let weight = Input::normal([out, inner]).fill(Fill::Integers(-9, 10));
    let mut inputs = vec![Input::normal([rows, inner]).dtype(dtype), weight, Input::normal([out])];
    if residual {
        inputs.push(Input::normal([rows, out]).dtype(dtype));
    }
    let forward = move |x: &[Tensor]| {
        let site = Stored(x[1].clone()).shared();
        let epilogue = Epilogue { bias: Some(&x[2]), residual: x.get(3), ..Epilogue::default() };
        autocast(precision, || x[0].linear(&site, epilogue))
    };
    let reference = move |x: &[Array]| {
        let product = |i: usize| {
            let (x, w) = (&x[0].data[i / out * inner..], &x[1].data[i % out * inner..]);
            (0..inner).map(|q| x[q] * w[q]).sum::<f64>()
        };
        let rest = |i: usize| x[2].data[i % out] + x.get(3).map_or(0.0, |r| r.data[i]);
        Array::from_fn([rows, out], |i| product(i) + rest(i))
    };
    let rest = if residual { ", residual" } else { "" };
    Case::new(format!("layer in {precision} {rows} {inner} {out}{rest}"), inputs, forward, reference)
}

/// A stored weight, which sharing kinds have on a higher floor.
struct Stored(Tensor);

impl Site for Stored {
    fn name(&self) -> &'static str {
        "stored"
    }
    fn size(&self) -> [usize; 2] {
        [self.0.shape()[0], self.0.shape()[1]]
    }
    fn leaves(&self) -> Vec<Tensor> {
        vec![self.0.clone()]
    }
    fn leaf_names(&self) -> &'static [&'static str] {
        &["weight"]
    }
    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(Stored(leaves[0].clone()))
    }
    fn load(&self) -> Load {
        unreachable!("the weight is stored")
    }
    fn stored(&self) -> Option<Tensor> {
        Some(self.0.detach())
    }
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        grads.add(0, dw.clone());
    }
}

/// A product of batches in a scope, whose right side is read transposed.
fn product(precision: Precision, [batch, m, n, k]: [usize; 4]) -> Case {
    let input = |shape| Input::normal(shape).fill(Fill::Integers(-40, 41));
    Case::new(
        format!("product in {precision} {batch} {m} {n} {k}"),
        vec![input([batch, m, k]), input([batch, n, k])],
        move |x| autocast(precision, || x[0].matmul(&x[1].t())),
        move |x| {
            Array::from_fn([batch, m, n], |i| {
                let (b, row, column) = (i / (m * n), i / n % m, i % n);
                let (left, right) = ((b * m + row) * k, (b * n + column) * k);
                (0..k).map(|q| x[0].data[left + q] * x[1].data[right + q]).sum()
            })
        },
    )
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for precision in [Precision::F16, Precision::Bf16] {
        // Results in whole vectors and others, a long inner axis that is cut, and one that takes several launches.
        for sizes in [[5, 12, 8], [7, 6, 9], [70, 36, 68], [9, 516, 12]] {
            all.extend([false, true].map(|residual| layer(precision, sizes, residual)));
        }
        for sizes in [[1, 5, 4, 8], [2, 9, 7, 5], [3, 8, 12, 20], [1, 12, 8, 1028]] {
            all.push(product(precision, sizes));
        }
    }
    all
}
