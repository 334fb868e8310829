//! Weights tied in depth: the same matrix at many sites, alone or with a private low-rank part.

use super::base::Base;
use super::{LeafGrads, Load, Site};
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::product::lookup::lookup;
use crate::ops::product::matmul::{Activation, Epilogue};
use crate::precision::{Precision, autocast};
use crate::tensor::Tensor;
use std::sync::Arc;

/// `W = theta`, at every site that has a clone. All sites accumulate their gradients in one buffer.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Site, Tied};
/// let theta = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]).requires_grad();
/// let site = Tied::new(&theta).shared(); // clones of it go to every layer
/// let x = Tensor::ones(&gpu, [1, 2]);
/// let y = x.linear(&site, Default::default()).add(&x.linear(&site, Default::default()));
/// let grads = y.sum_all().backward()?;
/// assert_eq!(grads.get(&theta).unwrap().to_vec::<f32>()?, [2.0; 4]); // 1 from each use
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Tied {
    theta: Tensor,
}

impl Tied {
    /// Makes the site of a stored matrix `[out, in]`.
    ///
    /// # Panics
    /// When `theta` is not a matrix of floats.
    #[track_caller]
    pub fn new(theta: &Tensor) -> Tied {
        assert!(
            theta.shape().len() == 2 && theta.dtype().is_float(),
            "tied: needs a matrix of floats, got {} of {}",
            theta.shape(),
            theta.dtype()
        );
        Tied { theta: theta.clone() }
    }
}

impl Site for Tied {
    fn name(&self) -> &'static str {
        "tied"
    }

    fn size(&self) -> [usize; 2] {
        [self.theta.shape()[0], self.theta.shape()[1]]
    }

    fn leaves(&self) -> Vec<Tensor> {
        vec![self.theta.clone()]
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &["weight"]
    }

    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(Tied::new(&leaves[0]))
    }

    fn load(&self) -> Load {
        Load::stored(dense(&self.theta))
    }

    fn stored(&self) -> Option<Tensor> {
        Some(self.theta.detach().contiguous())
    }

    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        grads.add(0, dw.clone());
    }

    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        grads.add_outer(0, dy, x);
    }
}

/// `W = theta + scale * B A`, where `theta [out, in]` is shared, and `A [rank, in]` and `B [out, rank]` belong to this
/// site.
///
/// Source: relaxed recursive transformers, arXiv 2410.20672, section 2.2; the low-rank form is LoRA, arXiv 2106.09685.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{LowRank, Site};
/// let theta = Tensor::zeros(&gpu, [2, 3]);
/// let a = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [1, 3]); // [rank, in]
/// let b = Tensor::from_slice(&gpu, &[1f32, 10.0], [2, 1]); // [out, rank]
/// let site = LowRank::new(&theta, &a, &b, 2.0);
/// assert_eq!(site.expand().to_vec2::<f32>()?, [[2.0, 4.0, 6.0], [20.0, 40.0, 60.0]]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct LowRank {
    base: Base,
    a: Tensor,
    b: Tensor,
    scale: f32,
}

impl LowRank {
    /// Makes the site of these three matrices.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub fn new(theta: &Tensor, a: &Tensor, b: &Tensor, scale: f32) -> LowRank {
        LowRank::over(&Tied::new(theta).shared(), a, b, scale)
    }

    /// Adds the low-rank part to a weight of any kind, such as a packed one. Leaves of that weight get their gradients as
    /// before.
    ///
    /// A stored and a packed weight are read in the same load as the part. Any other is written down for each product.
    ///
    /// # Panics
    /// When the shapes do not fit.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::share::{Factored, LowRank, Site};
    /// let [a, b] = [[1, 3], [2, 1]].map(|s| Tensor::ones(&gpu, s).requires_grad());
    /// let base = Factored::new(&a, &b).shared(); // all ones
    /// let site = LowRank::over(&base, &Tensor::ones(&gpu, [1, 3]), &Tensor::ones(&gpu, [2, 1]), 0.5);
    /// assert_eq!(site.leaf_names(), ["a", "b", "lora_a", "lora_b"]);
    /// assert_eq!(site.expand().to_vec2::<f32>()?, [[1.5; 3]; 2]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn over(base: &Arc<dyn Site>, a: &Tensor, b: &Tensor, scale: f32) -> LowRank {
        let [out, inner] = base.size();
        let fits = a.shape().len() == 2 && a.shape()[1] == inner && **b.shape() == [out, a.shape()[0]];
        assert!(fits, "low_rank: a {}, b {} for a weight [{out}, {inner}]", a.shape(), b.shape());
        LowRank { base: Base(base.clone()), a: a.clone(), b: b.clone(), scale }
    }
}

impl Site for LowRank {
    fn name(&self) -> &'static str {
        "low_rank"
    }

    fn size(&self) -> [usize; 2] {
        self.base.0.size()
    }

    fn leaves(&self) -> Vec<Tensor> {
        self.base.leaves([&self.a, &self.b])
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        self.base.names(&["lora_a", "lora_b"])
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.base.0.buffers()
    }

    fn with_tensors(&self, leaves: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site> {
        let (base, [own, _]) = self.base.split(leaves, buffers);
        Arc::new(LowRank::over(&base.0, &own[0], &own[1], self.scale))
    }

    fn load(&self) -> Load {
        self.base.load().with_low_rank([&dense(&self.a), &dense(&self.b)], self.scale)
    }

    fn is_compact(&self) -> bool {
        self.base.0.is_compact()
    }

    fn apart(&self, x: &Tensor) -> Option<(Arc<dyn Site>, Tensor)> {
        let y = x.matmul(&self.a.detach().t()).scale(self.scale).matmul(&self.b.detach().t());
        Some((self.base.0.clone(), y))
    }

    /// `dtheta += dW`, `dA += scale B^T dW`, `dB += scale dW A^T`.
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        let (first, scaled) = (self.base.first(), dw.scale(self.scale));
        grads.add_outer(first, &dense(&self.b), &scaled);
        if grads.needs(first + 1) {
            grads.add(first + 1, scaled.matmul(&self.a.detach().t()));
        }
        self.base.reduce(dw, grads);
    }

    /// Avoids storing `dW`: `dtheta += dy^T x`, `dA += (scale dy B)^T x`, `dB += dy^T (scale x A^T)`.
    ///
    /// For `rows` of x the low-rank parts cost `4 rows rank (in + out)` flops and need no `[out, in]` buffer.
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        self.base.backward(x, dy, grads);
        let first = self.base.first();
        if grads.needs(first) {
            grads.add_outer(first, &dy.matmul(&self.b.detach()).scale(self.scale), x);
        }
        if grads.needs(first + 1) {
            grads.add_outer(first + 1, dy, &x.matmul(&self.a.detach().t()).scale(self.scale));
        }
    }
}

/// `W = B A` with `A [rank, in]`, `B [out, rank]`: a matrix of low rank and nothing else.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Factored, Site};
/// let a = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [1, 3]); // [rank, in]
/// let b = Tensor::from_slice(&gpu, &[1f32, 10.0], [2, 1]); // [out, rank]
/// let site = Factored::new(&a, &b);
/// assert_eq!(site.size(), [2, 3]);
/// assert_eq!(site.expand().to_vec2::<f32>()?, [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Factored {
    a: Tensor,
    b: Tensor,
}

impl Factored {
    /// Makes the site of these two matrices.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub fn new(a: &Tensor, b: &Tensor) -> Factored {
        let fits = a.shape().len() == 2 && b.shape().len() == 2 && b.shape()[1] == a.shape()[0];
        assert!(fits, "factored: a {}, b {} do not fit", a.shape(), b.shape());
        Factored { a: a.clone(), b: b.clone() }
    }
}

impl Site for Factored {
    fn name(&self) -> &'static str {
        "factored"
    }

    fn size(&self) -> [usize; 2] {
        [self.b.shape()[0], self.a.shape()[1]]
    }

    fn leaves(&self) -> Vec<Tensor> {
        vec![self.a.clone(), self.b.clone()]
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &["a", "b"]
    }

    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(Factored::new(&leaves[0], &leaves[1]))
    }

    /// Loads the materialised product. Otherwise every tile would read the factors again, and ranks are large here.
    fn load(&self) -> Load {
        Load::stored(self.expand())
    }

    /// A product in this type, in whatever scope it is asked for.
    fn expand_as(&self, dtype: DType) -> Tensor {
        let precision = match dtype {
            DType::F16 => Precision::F16,
            DType::Bf16 => Precision::Bf16,
            _ => Precision::F32,
        };
        autocast(precision, || self.b.detach().matmul(&self.a.detach())).cast(dtype)
    }

    /// `dA = B^T dW`, `dB = dW A^T`
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        grads.add_outer(0, &dense(&self.b), dw);
        if grads.needs(1) {
            grads.add(1, dw.matmul(&self.a.detach().t()));
        }
    }

    /// Avoids storing `dW`: `dA = (dy B)^T x`, `dB = dy^T (x A^T)`.
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        if grads.needs(0) {
            grads.add_outer(0, &dy.matmul(&self.b.detach()), x);
        }
        if grads.needs(1) {
            grads.add_outer(1, dy, &x.matmul(&self.a.detach().t()));
        }
    }
}

/// Returns `x` in a form that a kernel can bind: f32, contiguous, detached from the tape.
pub(super) fn dense(x: &Tensor) -> Tensor {
    x.detach().cast(DType::F32).contiguous()
}

/// `x W^T` in f64.
pub(super) fn linear64(x: &Array, w: &Array) -> Array {
    let (rows, k, n) = (x.shape[0], x.shape[1], w.shape[0]);
    Array::from_fn([rows, n], |i| (0..k).map(|q| x.data[i / n * k + q] * w.data[i % n * k + q]).sum())
}

fn low_rank64(theta: &Array, a: &Array, b: &Array, scale: f64) -> Array {
    let (columns, rank) = (theta.shape[1], a.shape[0]);
    Array::from_fn(theta.shape, |i| {
        let (row, col) = (i / columns, i % columns);
        let low: f64 = (0..rank).map(|r| b.data[row * rank + r] * a.data[r * columns + col]).sum();
        theta.data[i] + scale * low
    })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let tied = |t: &Tensor| -> Arc<dyn Site> { Tied::new(t).shared() };
    let low = |x: &[Tensor]| -> Arc<dyn Site> { LowRank::new(&x[1], &x[2], &x[3], 0.5).shared() };
    // In the last sizes the inner axis, or that of the weight's gradient, is long: GPUs cut it into parts.
    for (rows, n, k) in [(1, 1, 1), (5, 7, 3), (9, 8, 12), (67, 5, 6), (12, 9, 516), (520, 4, 4)] {
        let inputs = vec![Input::normal([rows, k]), Input::normal([n, k])];
        all.push(Case::new(
            format!("tied {rows} {n} {k}"),
            inputs,
            move |x| x[0].linear(&tied(&x[1]), Epilogue::default()),
            |x| linear64(&x[0], &x[1]),
        ));
        let inputs = vec![
            Input::normal([rows, k]),
            Input::normal([n, k]),
            Input::normal([2, k]),
            Input::normal([n, 2]),
        ];
        let forward = move |x: &[Tensor]| x[0].linear(&low(x), Epilogue::default());
        all.push(
            Case::new(format!("low rank {rows} {n} {k}"), inputs, forward, |x| {
                linear64(&x[0], &low_rank64(&x[1], &x[2], &x[3], 0.5))
            })
            .ulps(16.0, 32.0),
        );
    }
    for rows in [3, 70] {
        let inputs = vec![Input::normal([rows, 6]), Input::normal([2, 6]), Input::normal([5, 2])];
        let forward = |x: &[Tensor]| x[0].linear(&Factored::new(&x[1], &x[2]).shared(), Epilogue::default());
        all.push(
            Case::new(format!("factored {rows}"), inputs, forward, |x| {
                let zero = Array::from_fn([5, 6], |_| 0.0);
                linear64(&x[0], &low_rank64(&zero, &x[1], &x[2], 1.0))
            })
            .ulps(16.0, 32.0),
        );
    }
    // Rows by ids, some of them twice, one outside.
    for (n, k) in [(5, 7), (9, 8), (1, 1)] {
        let inputs = vec![
            Input::normal([n, k]),
            Input::normal([2, k]),
            Input::normal([n, 2]),
            Input::integers([2, 3], DType::U32, 0, 1).fill(Fill::Values(vec![
                0.0,
                n as f64 - 1.0,
                0.0,
                99.0,
            ])),
        ];
        let rows = |x: &[Tensor]| lookup(&LowRank::new(&x[0], &x[1], &x[2], 0.5).shared(), &x[3]);
        let reference = move |x: &[Array]| {
            let w = low_rank64(&x[0], &x[1], &x[2], 0.5);
            let row = |i: usize| x[3].data[i / k] as usize;
            Array::from_fn([2, 3, k], |i| if row(i) < n { w.data[row(i) * k + i % k] } else { 0.0 })
        };
        all.push(
            Case::new(format!("low rank lookup {n} {k}"), inputs, rows, reference).ulps(8.0, 16.0).outside(),
        );
    }
    let inputs = vec![Input::normal([5, 6]), Input::normal([2, 6]), Input::normal([5, 2])];
    let expand = |x: &[Tensor]| LowRank::new(&x[0], &x[1], &x[2], 0.5).expand();
    let fixed: Vec<Input> = inputs.into_iter().map(Input::fixed).collect();
    all.push(Case::new("low rank expand", fixed, expand, |x| low_rank64(&x[0], &x[1], &x[2], 0.5)));
    // The same matrix at two depths, with a low-rank part at the first: its gradient is the sum of both.
    let inputs =
        vec![Input::normal([5, 6]), Input::normal([6, 6]), Input::normal([2, 6]), Input::normal([6, 2])];
    let twice = move |x: &[Tensor]| {
        let first = x[0].linear(&low(x), Epilogue::default());
        first.linear(&tied(&x[1]), Epilogue::default())
    };
    all.push(
        Case::new("two depths", inputs, twice, |x| {
            linear64(&linear64(&x[0], &low_rank64(&x[1], &x[2], &x[3], 0.5)), &x[1])
        })
        .ulps(64.0, 128.0),
    );
    // The second gradient of the bias is added to the first as it is summed.
    for rows in [5, 300] {
        let inputs = vec![Input::normal([rows, 4]), Input::normal([4, 4]), Input::normal([4])];
        let twice = move |x: &[Tensor]| {
            let with_bias = || Epilogue { bias: Some(&x[2]), ..Epilogue::default() };
            x[0].linear(&tied(&x[1]), with_bias()).linear(&tied(&x[1]), with_bias())
        };
        let layer64 = |x: &Array, w: &Array, bias: &Array| {
            let y = linear64(x, w);
            Array::from_fn(y.shape, |i| y.data[i] + bias.data[i % 4])
        };
        all.push(
            Case::new(format!("a bias at two depths, {rows} rows"), inputs, twice, move |x| {
                layer64(&layer64(&x[0], &x[1], &x[2]), &x[1], &x[2])
            })
            .ulps(64.0, 128.0),
        );
    }
    for (inner, long) in [(6, ""), (516, ", long")] {
        let bias = vec![
            Input::normal([12, inner]),
            Input::normal([9, inner]),
            Input::normal([9]),
            Input::normal([12, 9]),
        ];
        all.push(Case::new(
            format!("bias and residual{long}"),
            bias.clone(),
            move |x| {
                let epilogue = Epilogue { bias: Some(&x[2]), residual: Some(&x[3]), ..Epilogue::default() };
                x[0].linear(&tied(&x[1]), epilogue)
            },
            |x| {
                let y = linear64(&x[0], &x[1]);
                Array::from_fn(y.shape, |i| y.data[i] + x[2].data[i % 9] + x[3].data[i])
            },
        ));
        for (name, activation) in [("recorded", true), ("fused", false)] {
            let inputs = bias[..3].iter().cloned().map(|i| if activation { i } else { i.fixed() }).collect();
            all.push(
                Case::new(
                    format!("bias and silu, {name}{long}"),
                    inputs,
                    move |x| {
                        let epilogue = Epilogue {
                            bias: Some(&x[2]),
                            activation: Activation::Silu,
                            ..Epilogue::default()
                        };
                        x[0].linear(&tied(&x[1]), epilogue)
                    },
                    |x| {
                        let y = linear64(&x[0], &x[1]);
                        Array::from_fn(y.shape, |i| {
                            let v = y.data[i] + x[2].data[i % 9];
                            v / (1.0 + (-v).exp())
                        })
                    },
                )
                .ulps(64.0, 128.0),
            );
        }
    }
    all
}
