//! Dropout whose mask is drawn again in the backward pass from a counter, and never stored.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, Live, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::rng::{Draw, Rng};
use crate::tape::{Op, Sink};
use crate::tensor::Tensor;

#[derive(Clone, Copy)]
struct Dropout {
    rate: f32,
    draw: Draw,
}

impl Dropout {
    fn apply(&self, x: &Tensor) -> Tensor {
        let x = x.contiguous();
        let y = Tensor::empty(x.gpu(), "dropout", x.shape(), DType::F32);
        let n = x.count();
        let grid = grid(n.div_ceil(4).div_ceil(64));
        // At rate 1 nothing is kept, and `1 / (1 - rate)` would be infinite.
        let scale = if self.rate == 1.0 { 0.0 } else { 1.0 / (1.0 - self.rate) };
        x.gpu().launch(
            Launch::new("dropout", &Source::file("dropout"), "forward", grid)
                .bind("x", &x)
                .bind_mut("y", &y)
                .set("n", n)
                .set("key", self.draw.stream.key)
                .set("stream", self.draw.stream.id)
                .set("rate", self.rate)
                .set("scale", scale)
                .turns(0)
                .live(Live::Stream { generator: self.draw.generator }),
        );
        y
    }
}

impl Op for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            sink.add(0, self.apply(dy));
        }
    }
}

impl Tensor {
    /// Sets each element to 0 with probability `p` and to `x / (1 - p)` otherwise. The result is f32. A dropped element
    /// is 0 even if it was NaN or infinite.
    ///
    /// Takes one stream of `rng` for any `p`, and keeps element `i` if that stream's uniform draw `i` is at least `p`.
    /// With `p = 0` the elements are unchanged. With `p = 1` the result and the gradient are 0. Source: Srivastava et
    /// al. 2014, "Dropout".
    ///
    /// # Panics
    /// If `p` is outside `[0, 1]` or the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Rng;
    /// let mut rng = Rng::new(1);
    /// let y = Tensor::ones(&gpu, [100]).dropout(0.5, &mut rng).to_vec::<f32>()?;
    /// assert!(y.iter().all(|&y| y == 0.0 || y == 2.0)); // what is kept is divided by 1 - p
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn dropout(&self, p: f32, rng: &mut Rng) -> Tensor {
        assert!((0.0..=1.0).contains(&p), "dropout: probability {p} is outside [0, 1]");
        let x = crate::ops::float("dropout", self);
        let op = Dropout { rate: p, draw: rng.draw() };
        if p == 0.0 {
            return x;
        }
        op.apply(&x.detach()).made_by(&[&x], || Box::new(op))
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let sizes = [(&[1][..], 0.5f32), (&[7, 13], 0.1), (&[257], 0.9), (&[5, 67], 0.0), (&[5, 67], 1.0)];
    for (shape, p) in sizes {
        let forward = move |x: &[Tensor]| x[0].dropout(p, &mut Rng::new(23));
        let reference = move |x: &[Array]| {
            let mut draws = vec![0.0; x[0].data.len()];
            Rng::new(23).fill_uniform(&mut draws);
            Array::from_fn(x[0].shape, |i| if draws[i] >= p { x[0].data[i] / (1.0 - p as f64) } else { 0.0 })
        };
        all.push(Case::new(format!("{shape:?} at {p}"), vec![Input::normal(shape)], forward, reference));
    }
    let odd =
        Input::normal([67]).fill(Fill::Values(vec![f64::NAN, f64::INFINITY, 1.0, f64::NEG_INFINITY])).fixed();
    let nothing = |x: &[Array]| Array::from_fn(x[0].shape, |_| 0.0);
    let all_dropped = |x: &[Tensor]| x[0].dropout(1.0, &mut Rng::new(23));
    all.push(Case::new("of what is not finite at 1", vec![odd], all_dropped, nothing).exact());
    all
}
