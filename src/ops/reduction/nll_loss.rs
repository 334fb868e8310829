//! The negative log-likelihood of classes, for predictions that are logarithms of probabilities already.

use super::cross_entropy::CrossEntropyPlan;
use crate::dtype::DType;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::moves::check_ids::check_ids;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

const OP: &str = "nll_loss";

struct NllLoss {
    targets: Saved,
    /// `[2, rows]`: the losses, and a 1 or 0 per row for the count.
    losses: Saved,
    /// The sum of the losses and the count of rows.
    totals: Saved,
    shape: crate::Shape,
}

impl Op for NllLoss {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (targets, classes) = (self.targets.get(OP), self.shape[self.shape.len() - 1]);
        let counts = self.losses.get(OP).slice(0, 1..2).squeeze(0);
        let share = dy.div(&self.totals.get(OP).slice(0, 1..2));
        // By select, not by multiplication: if no row counts, the share is infinite.
        let chosen = "pick4($1, vec4<f32>(0.0), is_equal($0, vec4<f32>(0.0)))";
        let of_row = Tensor::lazy(OP, chosen, DType::F32, *counts.shape(), &[&counts, &share]).unsqueeze(1);
        let places = Tensor::positions(dy.gpu(), classes);
        let rows = targets.reshape([targets.count(), 1]).cast(DType::U32);
        let template = "pick4(vec4<f32>(0.0), -$2, $0 == $1)";
        let shape = [targets.count(), classes].into();
        let dx = Tensor::lazy(OP, template, DType::F32, shape, &[&places, &rows, &of_row]);
        sink.add(0, dx.reshape(self.shape));
    }
}

impl Tensor {
    /// The mean over all rows of `-x[target]`, a scalar in f32: the negative log-likelihood of classes whose logarithms of
    /// probabilities are given, such as by [`log_softmax`](Self::log_softmax). `x` is `[.., classes]`, targets are `[..]`.
    ///
    /// Rows whose target is `ignore` count neither in the sum nor in the mean. If all rows are ignored, the mean is NaN. Any
    /// other target outside `0..classes` makes the loss NaN and gets no gradient. For logits, use
    /// [`cross_entropy`](Self::cross_entropy), which stores no probabilities; it has weights of classes too.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[-0.5f32, -1.5, -3.0, -0.25], [2, 2]);
    /// let targets = Tensor::from_slice(&gpu, &[1u32, 0], [2]);
    /// assert_eq!(x.nll_loss(&targets, None).item()?, (1.5 + 3.0) / 2.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Panics
    /// If the targets are floats, if their shape is not that of `x` without the last axis, if `x` has integers, or if there
    /// is no class.
    #[track_caller]
    pub fn nll_loss(&self, targets: &Tensor, ignore: Option<i64>) -> Tensor {
        let plan = CrossEntropyPlan::new(OP, self, targets, ignore);
        let x = crate::ops::float(OP, self).detach().contiguous();
        let targets = targets.contiguous();
        check_ids(OP, &targets, plan.classes, plan.ignored);
        let losses = plan.picked(&x, &targets);
        let [totals, y] = plan.total(&losses);
        y.made_by(&[self], || {
            Box::new(NllLoss {
                targets: Saved::new(&targets),
                losses: Saved::new(&losses),
                totals: Saved::new(&totals),
                shape: *self.shape(),
            })
        })
    }
}

fn reference(x: &[Array], ignored: Option<f64>) -> Array {
    let classes = x[0].shape[x[0].shape.len() - 1];
    let (mut sum, mut count) = (0.0, 0.0);
    for (row, &target) in x[1].data.iter().enumerate().filter(|(_, t)| Some(**t) != ignored) {
        let inside = target >= 0.0 && target < classes as f64;
        sum -= if inside { x[0].data[row * classes + target as usize] } else { f64::NAN };
        count += 1.0;
    }
    Array::from_fn([], |_| sum / count)
}

pub(super) fn cases() -> Vec<Case> {
    let case = |name: &str, x: Input, targets: Input, ignore: Option<i64>| {
        let forward = move |x: &[Tensor]| x[0].nll_loss(&x[1], ignore);
        Case::new(name, vec![x, targets], forward, move |x| reference(x, ignore.map(|i| i as f64)))
    };
    let values =
        |dtype, values: &[f64]| Input::integers([2, 3], dtype, 0, 1).fill(Fill::Values(values.to_vec()));
    let mut all = Vec::new();
    for [rows, classes] in [[1, 1], [5, 7], [67, 12]] {
        let targets = Input::integers([rows], DType::U32, 0, classes as i64);
        all.push(case(&format!("{rows} rows of {classes}"), Input::normal([rows, classes]), targets, None));
    }
    let x = || Input::normal([2, 3, 7]);
    for dtype in [DType::F16, DType::Bf16] {
        let targets = values(DType::U32, &[3.0, 6.0, 0.0]);
        all.push(case(&dtype.to_string(), x().dtype(dtype).fixed(), targets, None));
    }
    let some = values(DType::I32, &[3.0, -100.0, 6.0, 0.0, -100.0, 2.0]);
    all.push(case("ignore -100", x(), some, Some(-100)));
    all.push(case("ignore a class", x(), values(DType::U32, &[3.0, 5.0, 6.0]), Some(5)));
    let outside = values(DType::U32, &[7.0, 3.0]);
    all.push(case("target past the end", x().fixed(), outside, None).outside());
    all
}
