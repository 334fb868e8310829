//! Learning from another model's scores.

use crate::tensor::Tensor;

/// Returns `t^2 KL(teacher || student)` of the softmaxes of `scores / t`, averaged over rows, in nats. The factor makes
/// the size of the gradient independent of the temperature `t`. The teacher gets no gradient. A class that it excludes by
/// a score of negative infinity does not count. Source: Hinton et al., arXiv 1503.02531.
///
/// # Panics
/// When the shapes differ.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::nn::distillation;
/// let teacher = Tensor::from_slice(&gpu, &[2f32, 0.0, 0.0, 2.0], [2, 2]);
/// assert!(distillation(&teacher, &teacher, 2.0).item()?.abs() < 1e-6);
/// assert!(distillation(&teacher.neg(), &teacher, 2.0).item()? > 0.5);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[track_caller]
pub fn distillation(student: &Tensor, teacher: &Tensor, t: f32) -> Tensor {
    assert!(
        student.shape() == teacher.shape() && !student.shape().is_empty(),
        "distillation: scores {} and the teacher's {}",
        student.shape(),
        teacher.shape()
    );
    let goal = teacher.detach().scale(1.0 / t).log_softmax(-1);
    let own = student.scale(1.0 / t).log_softmax(-1);
    let rows = (goal.count() / goal.shape()[goal.shape().len() - 1]) as f32;
    let p = goal.exp();
    // 0 log 0 = 0: a class that the teacher excludes does not count.
    let zero = Tensor::zeros(p.gpu(), [1]);
    let difference = goal.sub(&own).where_mask(&p.gt(&zero), &zero);
    p.mul(&difference).sum_all().scale(t * t / rows)
}
