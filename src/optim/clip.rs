//! Clipping apart from an optimizer, for programs that look at the clipped gradients or share one norm between optimizers.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::value::fuse::Scalar;
use crate::shape::Shape;
use crate::tape::Grads;
use crate::tensor::Tensor;

/// Scales all gradients together so that their norm is at most `most`. Returns them and the norm before:
///
/// ```text
/// norm = sqrt(sum of all g^2) / scale;  g *= min(1, most / (norm + 1e-6))
/// ```
///
/// `scale` is the loss scale of gradients that a [`LossScale`](super::LossScale) made, and 1 otherwise. So `most` and the norm
/// are those of the gradients without it, and an optimizer still divides the result by it. The norm is a scalar on the device,
/// and nothing is read back. Sums have a fixed order. If the norm is not finite, all gradients become NaN, and an optimizer's
/// step with them changes nothing, but its events name all parameters.
///
/// The `clip` of an optimizer's settings does the same to the gradients of its own parameters, in the three dispatches of its
/// step. This function takes about four dispatches for each tensor, and memory for another set of gradients.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, optim::clip_grad_norm};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
/// let c = Tensor::from_slice(&gpu, &[3f32, -4.0], [2]);
/// let (grads, norm) = clip_grad_norm(&w.mul(&c).sum_all().backward()?, 2.5)?;
/// assert_eq!(norm.item()?, 5.0);
/// let got = grads.get(&w).unwrap().to_vec::<f32>()?;
/// assert!((got[0] - 1.5).abs() < 1e-5 && (got[1] + 2.0).abs() < 1e-5);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// Source: Pascanu, Mikolov, Bengio 2013, "On the difficulty of training recurrent neural networks", in the form of PyTorch's
/// `clip_grad_norm_`.
///
/// # Errors
/// When `most` is not a finite number above 0, or a gradient carries an error.
///
/// # Panics
/// When `grads` is empty.
#[track_caller]
pub fn clip_grad_norm(grads: &Grads, most: f32) -> Result<(Grads, Tensor)> {
    check(grads, "clip_grad_norm", most)?;
    let mut sums: Vec<Tensor> =
        grads.in_order().into_iter().map(|gradient| gradient.square().sum_all()).collect();
    // A tree of a fixed shape. Its inner sums are computed, so that there is one kernel for four of them whatever their number.
    while sums.len() > 1 {
        let joined = |four: &[Tensor]| {
            let sum = four[1..].iter().fold(four[0].clone(), |sum, next| sum.add(next));
            sum.compute();
            sum
        };
        sums = sums.chunks(4).map(joined).collect();
    }
    let mut norm = sums.remove(0).sqrt();
    if let Some(scaled) = grads.scaled() {
        norm = norm.mul(&scaled.own.slice(0, 1..2).reshape([]));
    }
    norm.compute();
    // Which of its arguments WGSL's min returns for a NaN is not defined.
    let template = "finite_or_nan4(min(vec4<f32>(1.0), $1 / ($0 + vec4<f32>(1e-6))), $0)";
    let factor =
        Tensor::lazy_with("clip", template, DType::F32, Shape::new(&[]), &[&norm], &[Scalar::F32(most)]);
    factor.compute();
    let clipped = grads.map(|gradient| gradient.mul(&factor));
    clipped.in_order().into_iter().chain([&norm]).try_for_each(Tensor::check)?;
    Ok((clipped, norm))
}

/// Limits every element of the gradients to `[-most, most]`.
///
/// With a [`LossScale`](super::LossScale) the limit holds for the gradients without the scale, which the result still has. A
/// NaN or an infinity stays as it is, unlike in PyTorch, so that an optimizer's step still finds it, changes nothing and lowers
/// the loss scale. Takes one dispatch for each tensor.
///
/// ```
/// # use tiebeam::{Gpu, Tensor, optim::clip_grad_value};
/// # let gpu = Gpu::open()?;
/// let w = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3]).requires_grad();
/// let c = Tensor::from_slice(&gpu, &[3f32, -4.0, 0.5], [3]);
/// let grads = clip_grad_value(&w.mul(&c).sum_all().backward()?, 1.0)?;
/// assert_eq!(grads.get(&w).unwrap().to_vec::<f32>()?, [1.0, -1.0, 0.5]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// # Errors
/// When `most` is not a finite number above 0, or a gradient carries an error.
///
/// # Panics
/// When `grads` is empty.
#[track_caller]
pub fn clip_grad_value(grads: &Grads, most: f32) -> Result<Grads> {
    let gradient = check(grads, "clip_grad_value", most)?;
    let most = match grads.scaled() {
        Some(scaled) => scaled.own.slice(0, 0..1).reshape([]).scale(most),
        None => Tensor::scalar(gradient.gpu(), most),
    };
    most.compute();
    let clipped = grads.map(|gradient| {
        let template = "pick4($0, clamp($0, -$1, $1), finite4($0))";
        Tensor::lazy("clip", template, DType::F32, *gradient.shape(), &[gradient, &most])
    });
    clipped.in_order().into_iter().try_for_each(Tensor::check)?;
    Ok(clipped)
}

/// Checks the arguments, and returns one of the gradients.
#[track_caller]
fn check<'a>(grads: &'a Grads, op: &str, most: f32) -> Result<&'a Tensor> {
    if !(most.is_finite() && most > 0.0) {
        return Err(Error::config(format!("{op}: the limit is {most}; use a finite number above 0")));
    }
    let all = grads.in_order();
    assert!(!all.is_empty(), "{op}: there are no gradients; was the loss computed from leaves?");
    all.iter().try_for_each(|gradient| gradient.check())?;
    Ok(all[0])
}
