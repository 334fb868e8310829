//! Cross-entropy of logits against class indices, fused: probabilities are never stored.

use super::case::{Array, Case, Fill, Input};
use super::words;
use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::shape::Shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

struct CrossEntropy {
    x: Saved,
    targets: Saved,
    lse: Saved,
    count: Saved,
    shape: Shape,
    ignore: Option<i64>,
}

fn params(groups_x: u32, shape: &Shape, ignore: Option<i64>) -> [u32; 6] {
    let (rows, classes) = rows(shape);
    [groups_x, rows as u32, classes as u32, ignore.is_some() as u32, ignore.unwrap_or(0) as u32, f32::NAN.to_bits()]
}

fn rows(shape: &Shape) -> (usize, usize) {
    let classes = shape[shape.len() - 1];
    (shape.count() / classes.max(1), classes)
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let op = "cross_entropy";
        let (x, targets, lse) = (self.x.get(op), self.targets.get(op), self.lse.get(op));
        let gpu = x.gpu();
        let scale = dy.div(self.count.get(op)).contiguous();
        let dx = Tensor::empty(gpu, op, self.shape, DType::F32);
        let grid = grid(rows(&self.shape).0);
        gpu.launch(Launch {
            op,
            source: &Source::file(op),
            entry: "backward",
            binds: vec![x.bind(0), targets.bind(1), lse.bind(2), scale.bind(3), dx.bind_mut(7)],
            params: words(&params(grid[0], &self.shape, self.ignore)),
            grid,
        });
        sink.add(0, dx);
    }
}

impl Tensor {
    /// Mean over the rows that are not ignored of `-log softmax(x)[target]`, a scalar, in nats.
    ///
    /// `self` is `[.., classes]`, `targets` the leading axes in u32 or i32. Rows whose target is `ignore` count neither
    /// in the sum nor in the mean; with no row left the result is NaN, as 0 / 0. A target outside the classes that is not
    /// ignored makes the result NaN. Derivative: `(softmax(x) - onehot) / rows`.
    ///
    /// # Panics
    /// When the shapes do not fit or `targets` are floats.
    #[track_caller]
    pub fn cross_entropy(&self, targets: &Tensor, ignore: Option<i64>) -> Tensor {
        let op = "cross_entropy";
        same_gpu(op, &[self, targets]);
        let axes = self.shape().len();
        assert!(
            axes >= 1 && self.shape()[..axes - 1] == targets.shape()[..],
            "cross_entropy: logits {} for targets {}",
            self.shape(),
            targets.shape()
        );
        assert!(!targets.dtype().is_float(), "cross_entropy: targets must be u32 or i32, got {}", targets.dtype());
        let gpu = self.gpu();
        let x = super::float(op, &self.detach()).contiguous();
        // i32 -1 and u32 4294967295 are the same word, so negative targets are outside the classes.
        let targets = targets.detach().cast(DType::U32).contiguous();
        let (rows, _) = rows(self.shape());
        let [loss, kept, lse] = [(); 3].map(|()| Tensor::empty(gpu, op, [rows], DType::F32));
        let grid = grid(rows);
        gpu.launch(Launch {
            op,
            source: &Source::file(op),
            entry: "forward",
            binds: vec![x.bind(0), targets.bind(1), loss.bind_mut(4), kept.bind_mut(5), lse.bind_mut(6)],
            params: words(&params(grid[0], self.shape(), ignore)),
            grid,
        });
        let count = kept.sum(0);
        let y = loss.sum(0).div(&count);
        y.made_by(&[self], || {
            Box::new(CrossEntropy {
                x: Saved::new(&x),
                targets: Saved::new(&targets),
                lse: Saved::new(&lse),
                count: Saved::new(&count),
                shape: *self.shape(),
                ignore,
            })
        })
    }
}

pub(super) fn variants() -> Vec<Source> {
    vec![Source::file("cross_entropy")]
}

/// Plain loops: the mean of `log sum exp - x[target]`.
fn cross_entropy64(x: &[Array], ignore: Option<i64>) -> Array {
    let classes = x[0].shape[x[0].shape.len() - 1];
    let (mut sum, mut count) = (0.0, 0.0);
    for (row, &target) in x[0].data.chunks(classes).zip(&x[1].data) {
        if Some(target as i64) != ignore {
            let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = top + row.iter().map(|v| (v - top).exp()).sum::<f64>().ln();
            sum += row.get(target as usize).map_or(f64::NAN, |v| lse - v);
            count += 1.0;
        }
    }
    Array::from_fn([], |_| sum / count)
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (lead, classes) in [(&[1][..], 1), (&[7], 13), (&[3, 5], 67), (&[2], 300)] {
        let mut shape = lead.to_vec();
        shape.push(classes);
        let inputs = vec![
            Input::normal(&shape[..]).fill(Fill::Normal(2.0)),
            Input::integers(lead, DType::U32, 0, classes as i64),
        ];
        let forward = |x: &[Tensor]| x[0].cross_entropy(&x[1], None);
        all.push(Case::new(format!("{shape:?}"), inputs, forward, |x| cross_entropy64(x, None)).ulps(32.0, 64.0));
    }
    let inputs = vec![Input::normal([9, 5]), Input::integers([9], DType::I32, -1, 5)];
    let forward = |x: &[Tensor]| x[0].cross_entropy(&x[1], Some(-1));
    all.push(Case::new("ignored rows", inputs, forward, |x| cross_entropy64(x, Some(-1))).ulps(32.0, 64.0));
    // Far from zero the exponentials would overflow without the maximum.
    let inputs = vec![Input::normal([6, 11]).fill(Fill::Uniform(900.0, 905.0)).fixed(), Input::integers([6], DType::U32, 0, 11)];
    all.push(Case::new("large logits", inputs, |x| x[0].cross_entropy(&x[1], None), |x| cross_entropy64(x, None)).ulps(4096.0, 64.0));
    let inputs = vec![Input::normal([2, 3]).fixed(), Input::integers([2], DType::U32, 3, 9)];
    all.push(Case::new("targets outside", inputs, |x| x[0].cross_entropy(&x[1], None), |x| cross_entropy64(x, None)));
    all
}
