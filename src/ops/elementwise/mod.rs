//! Elementwise ops: functions of one and of two tensors, operators with numbers, losses, conversions, random numbers.
//!
//! They compute nothing when they are called, and write down an expression. A chain of them is one kernel, which runs when an op of
//! another kind, a readback or [`Tensor::evaluate`] needs the elements. Shapes of two tensors broadcast as in PyTorch: aligned at the
//! last axis, with sizes equal or 1.
//!
//! | of one tensor `x` | |
//! |---|---|
//! | `-x`, `x^2`, `1 / x`, `\|x\|` | [`neg`](crate::Tensor::neg), [`square`](crate::Tensor::square), [`recip`](crate::Tensor::recip), [`abs`](crate::Tensor::abs) |
//! | `sqrt(x)`, `1 / sqrt(x)` | [`sqrt`](crate::Tensor::sqrt), [`rsqrt`](crate::Tensor::rsqrt) |
//! | `e^x`, `ln x`, `sin x`, `cos x`, `erf x` | [`exp`](crate::Tensor::exp), [`log`](crate::Tensor::log), [`sin`](crate::Tensor::sin), [`cos`](crate::Tensor::cos), [`erf`](crate::Tensor::erf) |
//! | `e^x - 1`, `ln(1 + x)` | [`expm1`](crate::Tensor::expm1), [`log1p`](crate::Tensor::log1p) |
//! | activations | [`relu`](crate::Tensor::relu), [`gelu`](crate::Tensor::gelu), [`gelu_tanh`](crate::Tensor::gelu_tanh), [`silu`](crate::Tensor::silu), [`sigmoid`](crate::Tensor::sigmoid), [`tanh`](crate::Tensor::tanh), [`elu`](crate::Tensor::elu), [`softplus`](crate::Tensor::softplus), [`leaky_relu`](crate::Tensor::leaky_relu) |
//! | `min(max(x, low), high)` | [`clamp`](crate::Tensor::clamp) |
//! | another type of elements | [`cast`](crate::Tensor::cast), [`from_bf16`](crate::Tensor::from_bf16), [`read_bf16`](crate::Tensor::read_bf16) |
//! | the same elements, another gradient | [`scale_gradient`](crate::Tensor::scale_gradient) |
//!
//! | of two, or of a tensor and numbers | |
//! |---|---|
//! | `a + b`, `a - b`, `a * b`, `a / b` | [`add`](crate::Tensor::add), [`sub`](crate::Tensor::sub), [`mul`](crate::Tensor::mul), [`div`](crate::Tensor::div), and the operators `+ - * /` also with a number on either side |
//! | `a^b`, the larger, the smaller | [`pow`](crate::Tensor::pow), [`maximum`](crate::Tensor::maximum), [`minimum`](crate::Tensor::minimum) |
//! | `x s`, `x s + t` with numbers `s`, `t` | [`scale`](crate::Tensor::scale), [`affine`](crate::Tensor::affine) |
//! | comparisons, which give 1 or 0 as u32 | [`eq`](crate::Tensor::eq), [`ne`](crate::Tensor::ne), [`lt`](crate::Tensor::lt), [`le`](crate::Tensor::le), [`gt`](crate::Tensor::gt), [`ge`](crate::Tensor::ge) |
//! | a choice by such a mask; masks together | [`where_mask`](crate::Tensor::where_mask); [`logical_and`](crate::Tensor::logical_and), [`logical_or`](crate::Tensor::logical_or), [`logical_not`](crate::Tensor::logical_not) |
//!
//! | losses, the mean over all elements | |
//! |---|---|
//! | of numbers | [`mse_loss`](crate::Tensor::mse_loss), [`l1_loss`](crate::Tensor::l1_loss), [`huber_loss`](crate::Tensor::huber_loss) |
//! | of logits, of distributions | [`bce_with_logits`](crate::Tensor::bce_with_logits), [`kl_div`](crate::Tensor::kl_div) |
//!
//! | random | |
//! |---|---|
//! | uniform in `[0, 1)`, standard normal | [`rand`](crate::Tensor::rand), [`randn`](crate::Tensor::randn) |
//! | elements dropped with probability `p` | [`dropout`](crate::Tensor::dropout) |
//!
//! ```
//! # use tiebeam::{Gpu, Tensor};
//! # let gpu = Gpu::open()?;
//! let x = Tensor::from_slice(&gpu, &[-1f32, 0.0, 2.0], [3]);
//! let y = (&x * 2.0 + 1.0).relu(); // one kernel
//! assert_eq!(y.to_vec::<f32>()?, [0.0, 1.0, 5.0]);
//! # Ok::<(), tiebeam::Error>(())
//! ```
//!
//! [`Tensor::evaluate`]: crate::Tensor::evaluate

mod bf16;
mod binary;
mod dropout;
mod logical;
pub(crate) mod losses;
pub(crate) mod random;
mod scalar;
pub(crate) mod unary;

crate::ops::listed!(unary, binary, scalar, logical, bf16, random, dropout, losses);
