//! Pooling over windows of images: the largest element or the mean.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, MOST_TURNS, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::reduction::reduce::max64;
use crate::shape::Shape;
use crate::tape::{self, Op, Saved, Sink};
use crate::tensor::Tensor;

fn source() -> Source {
    Source::file("pool")
}

/// Sizes of one call; rows before columns.
#[derive(Clone, Copy)]
struct Pool {
    op: &'static str,
    x: Shape,
    y: Shape,
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
}

impl Pool {
    #[track_caller]
    fn new(op: &'static str, x: Shape, kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]) -> Pool {
        assert!(x.len() == 4, "{op}: the image must be [batch, channels, height, width], got {x}");
        assert!(
            kernel.iter().chain(&stride).all(|&s| s > 0),
            "{op}: kernel {kernel:?} and stride {stride:?} must be above 0"
        );
        let out = [0, 1].map(|a| {
            assert!(
                2 * padding[a] <= kernel[a],
                "{op}: padding {padding:?} is more than half of kernel {kernel:?}: windows would hold nothing else"
            );
            let room = x[2 + a] + 2 * padding[a];
            assert!(room >= kernel[a], "{op}: kernel {kernel:?} is larger than {x} with padding {padding:?}");
            (room - kernel[a]) / stride[a] + 1
        });
        Pool { op, x, y: [x[0], x[1], out[0], out[1]].into(), kernel, stride, padding }
    }

    fn launch<'a>(
        &'a self,
        source: &'a Source,
        entry: &'a str,
        result: &Tensor,
        accumulate: bool,
    ) -> Launch<'a> {
        Launch::new(self.op, source, entry, grid(result.count().div_ceil(64)))
            .set("n", result.count())
            .set("height", self.x[2])
            .set("width", self.x[3])
            .set("out_height", self.y[2])
            .set("out_width", self.y[3])
            .set("kernel_y", self.kernel[0])
            .set("kernel_x", self.kernel[1])
            .set("stride_y", self.stride[0])
            .set("stride_x", self.stride[1])
            .set("pad_y", self.padding[0])
            .set("pad_x", self.padding[1])
            .set("accumulate", accumulate)
            .turns(self.turns())
            .reuse(2)
    }

    /// A turn per element of the window (or per window that holds the element), and two more per row of them.
    fn turns(&self) -> usize {
        self.kernel[0] * (self.kernel[1] + 2)
    }

    /// Splits a window that is too large for one thread into two poolings, along rows and then along columns. For the
    /// largest element this keeps the order of rows, and means stay the same.
    fn in_two(&self) -> Option<[[[usize; 2]; 3]; 2]> {
        let [[ky, kx], [sy, sx], [py, px]] = [self.kernel, self.stride, self.padding];
        (self.turns() > MOST_TURNS && ky > 1 && kx > 1)
            .then_some([[[1, kx], [1, sx], [0, px]], [[ky, 1], [sy, 1], [py, 0]]])
    }

    fn output(&self, x: &Tensor, dtype: DType) -> Tensor {
        Tensor::empty(x.gpu(), self.op, self.y, dtype)
    }
}

struct Pooled {
    pool: Pool,
    /// The position of each window's largest element. `None` for means.
    winners: Option<Saved>,
}

impl Op for Pooled {
    fn name(&self) -> &'static str {
        self.pool.op
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let dy = dy.contiguous();
        sink.add_with(0, |into| {
            let (dx, accumulate) = into.output(dy.gpu(), self.pool.op, self.pool.x);
            let winners = self.winners.as_ref().map(|winners| winners.get(self.pool.op));
            let entry = if winners.is_some() { "max_backward" } else { "avg_backward" };
            let source = source();
            let launch = self.pool.launch(&source, entry, &dx, accumulate).bind_some("winners", winners);
            dy.gpu().launch(launch.bind("x", &dy).bind_mut("y", &dx));
            dx
        });
    }
}

impl Tensor {
    /// Returns the largest element of each window of `[batch, channels, height, width]`. Padding is never chosen.
    ///
    /// Among equal elements, the first gets the gradient. NaN counts as larger than infinity. The result has
    /// `(height + 2 padding - kernel) / stride + 1` rows. f16 comes back as f32.
    ///
    /// # Panics
    /// When `self` does not have four axes, the kernel does not fit, the padding exceeds half of it, or the type is not a
    /// float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 16.0, 1.0).reshape([1, 1, 4, 4]);
    /// let y = x.max_pool2d([2, 2], [2, 2], [0, 0]);
    /// assert_eq!(y.shape()[..], [1, 1, 2, 2]);
    /// assert_eq!(y.to_vec::<f32>()?, [5.0, 7.0, 13.0, 15.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn max_pool2d(&self, kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]) -> Tensor {
        let pool = Pool::new("max_pool2d", *self.shape(), kernel, stride, padding);
        if let Some(both) = pool.in_two() {
            return both
                .iter()
                .fold(self.clone(), |x, &[kernel, stride, padding]| x.max_pool2d(kernel, stride, padding));
        }
        let x = crate::ops::float(pool.op, self).detach().contiguous();
        let y = pool.output(&x, DType::F32);
        let (gpu, source) = (x.gpu(), source());
        if !tape::tracks(&[self]) {
            gpu.launch(pool.launch(&source, "max_forward", &y, false).bind("x", &x).bind_mut("y", &y));
            return y;
        }
        let winners = pool.output(&x, DType::U32);
        let launch = pool.launch(&source, "max_chosen", &y, false).bind("x", &x).bind_mut("y", &y);
        gpu.launch(launch.bind_mut("chosen", &winners));
        y.made_by(&[self], || Box::new(Pooled { pool, winners: Some(Saved::new(&winners)) }))
    }

    /// Returns the mean of each window of `[batch, channels, height, width]`; padding counts as zeros (PyTorch's
    /// `count_include_pad = true`).
    ///
    /// The result has `(height + 2 padding - kernel) / stride + 1` rows. f16 comes back as f32.
    ///
    /// # Panics
    /// When `self` does not have four axes, the kernel does not fit, the padding exceeds half of it, or the type is not a
    /// float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 16.0, 1.0).reshape([1, 1, 4, 4]);
    /// let y = x.avg_pool2d([2, 2], [2, 2], [0, 0]);
    /// assert_eq!(y.to_vec::<f32>()?, [2.5, 4.5, 10.5, 12.5]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn avg_pool2d(&self, kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]) -> Tensor {
        let pool = Pool::new("avg_pool2d", *self.shape(), kernel, stride, padding);
        if let Some(both) = pool.in_two() {
            return both
                .iter()
                .fold(self.clone(), |x, &[kernel, stride, padding]| x.avg_pool2d(kernel, stride, padding));
        }
        let x = crate::ops::float(pool.op, self).detach().contiguous();
        let y = pool.output(&x, DType::F32);
        let source = source();
        let launch = pool.launch(&source, "avg_forward", &y, false);
        x.gpu().launch(launch.bind("x", &x).bind_mut("y", &y));
        y.made_by(&[self], || Box::new(Pooled { pool, winners: None }))
    }

    /// Returns the mean over the last two axes: `[batch, channels, height, width]` becomes `[batch, channels]`.
    ///
    /// # Panics
    /// When there are fewer than two axes, the last two are empty, or the type is not a float.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::arange(&gpu, 0.0, 8.0, 1.0).reshape([1, 2, 2, 2]);
    /// assert_eq!(x.global_avg_pool2d().to_vec2::<f32>()?, [[1.5, 5.5]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn global_avg_pool2d(&self) -> Tensor {
        let axes = self.shape().len();
        assert!(axes >= 2, "global_avg_pool2d: needs rows and columns, got {}", self.shape());
        let mut sizes = self.shape()[..axes - 2].to_vec();
        sizes.push(self.shape()[axes - 2..].iter().product());
        self.reshape(&sizes[..]).mean(-1)
    }
}

/// Folds the elements of each window in order, starting with `first`.
fn pool64(x: &Array, pool: Pool, first: f64, fold: fn(f64, f64) -> f64) -> Array {
    let Pool { y, kernel, stride, padding, .. } = pool;
    Array::from_fn(y, |at| {
        let (plane, i, j) = (at / (y[2] * y[3]), at / y[3] % y[2], at % y[3]);
        let mut value = first;
        for u in 0..kernel[0] {
            for v in 0..kernel[1] {
                let (row, column) = (i * stride[0] + u, j * stride[1] + v);
                let inside = |p: usize, a: usize| p >= padding[a] && p - padding[a] < pool.x[2 + a];
                if inside(row, 0) && inside(column, 1) {
                    let row = plane * pool.x[2] + row - padding[0];
                    value = fold(value, x.data[row * pool.x[3] + column - padding[1]]);
                }
            }
        }
        value
    })
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (shape, kernel, stride, padding) in [
        ([1, 1, 1, 1], [1, 1], [1, 1], [0, 0]),
        ([2, 3, 6, 8], [2, 2], [2, 2], [0, 0]),
        ([1, 2, 7, 7], [3, 3], [2, 2], [1, 1]),
        ([2, 1, 5, 9], [3, 2], [1, 3], [1, 0]),
        ([1, 3, 8, 5], [2, 4], [3, 1], [1, 2]),
        ([1, 2, 13, 11], [5, 5], [1, 1], [2, 2]),
    ] {
        let pool = Pool::new("pool", shape.into(), kernel, stride, padding);
        let name = format!("{shape:?} kernel {kernel:?} stride {stride:?} padding {padding:?}");
        let distinct = vec![Input::normal(shape).fill(Fill::Distinct(0.03))];
        all.push(Case::new(
            format!("max {name}"),
            distinct,
            move |x| x[0].max_pool2d(kernel, stride, padding),
            move |x| pool64(&x[0], pool, f64::NEG_INFINITY, max64),
        ));
        all.push(Case::new(
            format!("avg {name}"),
            vec![Input::normal(shape)],
            move |x| x[0].avg_pool2d(kernel, stride, padding),
            move |x| {
                let sums = pool64(&x[0], pool, 0.0, |a, b| a + b);
                Array::from_fn(sums.shape, |i| sums.data[i] / (kernel[0] * kernel[1]) as f64)
            },
        ));
    }
    // Without a leaf no winners are kept, and another entry point runs.
    all.push(
        Case::new(
            "max of constants, untracked",
            vec![Input::normal([2, 2, 9, 9]).fixed()],
            |x| x[0].max_pool2d([3, 3], [2, 2], [1, 1]),
            |x| {
                pool64(&x[0], Pool::new("pool", x[0].shape, [3, 3], [2, 2], [1, 1]), f64::NEG_INFINITY, max64)
            },
        )
        .exact(),
    );
    // All elements of a window are equal. The result here is the gradient, which goes to each window's first element.
    all.push(
        Case::new(
            "max gradient at ties",
            vec![Input::normal([1, 2, 4, 6]).fill(Fill::Values(vec![2.5])).fixed()],
            |x| {
                let leaf = x[0].requires_grad();
                let y = leaf.max_pool2d([2, 2], [2, 2], [0, 0]);
                y.sum_all().backward().ok().and_then(|g| g.get(&leaf).cloned()).expect("a gradient")
            },
            |x| Array::from_fn(x[0].shape, |i| if i / 6 % 2 == 0 && i % 2 == 0 { 1.0 } else { 0.0 }),
        )
        .exact(),
    );
    let odd =
        Fill::Values(vec![1.0, f64::NAN, -1.0, f64::NEG_INFINITY, f64::NEG_INFINITY, f64::NEG_INFINITY]);
    all.push(
        Case::new(
            "max of NaN and infinities",
            vec![Input::normal([1, 1, 1, 6]).fill(odd).fixed()],
            |x| x[0].max_pool2d([1, 3], [1, 3], [0, 0]),
            |x| Array::from_fn([1, 1, 1, 2], |i| if i == 0 { f64::NAN } else { x[0].data[3] }),
        )
        .exact(),
    );
    all.push(Case::new(
        "global avg",
        vec![Input::normal([2, 3, 5, 7])],
        |x| x[0].global_avg_pool2d(),
        |x| Array::from_fn([2, 3], |i| x[0].data[i * 35..(i + 1) * 35].iter().sum::<f64>() / 35.0),
    ));
    all
}
