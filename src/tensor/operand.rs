//! Elementwise expressions over tensors and numbers, and right-hand sides that are a tensor or one number.

use super::{Tensor, same_gpu};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::value::Value;
use crate::gpu::value::fuse::{Arg, Expr, Scalar};
use crate::shape::{self, Shape};

/// A tensor, or one number in the place of every element. Both convert to it, so ops that take `impl Into<Operand>` take both. The number
/// is rounded to the other side's type, except as an exponent.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let x = Tensor::from_slice(&gpu, &[1f32, -2.0, 3.0], [3]);
/// assert_eq!(x.gt(0.0).to_vec::<u32>()?, [1, 0, 1]);
/// assert_eq!(x.maximum(0.5).to_vec::<f32>()?, [1.0, 0.5, 3.0]);
/// assert_eq!(x.pow(2.0).to_vec::<f32>()?, [1.0, 4.0, 9.0]);
/// assert_eq!(x.pow(&x).to_vec::<f32>()?, [1.0, 0.25, 27.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// A tensor, which broadcasts.
    Tensor(&'a Tensor),
    /// A number, for tensors of floats.
    Number(f32),
}

impl<'a> Operand<'a> {
    /// A number as a tensor of this type would hold it, so that 0.1 equals what `full(0.1)` has.
    pub(crate) fn rounded(self, dtype: DType) -> Operand<'a> {
        match (self, dtype) {
            (Operand::Number(x), DType::F16) => Operand::Number(half::f16::from_f32(x).to_f32()),
            (Operand::Number(x), DType::Bf16) => Operand::Number(half::bf16::from_f32(x).to_f32()),
            _ => self,
        }
    }

    pub(crate) fn tensor(&self) -> Option<&'a Tensor> {
        match *self {
            Operand::Tensor(x) => Some(x),
            Operand::Number(_) => None,
        }
    }
}

impl<'a> From<&'a Tensor> for Operand<'a> {
    fn from(x: &'a Tensor) -> Operand<'a> {
        Operand::Tensor(x)
    }
}

impl From<f32> for Operand<'_> {
    fn from(number: f32) -> Self {
        Operand::Number(number)
    }
}

impl Tensor {
    /// Returns a pending elementwise result over `shape`, to which every argument broadcasts. Not recorded in the
    /// graph.
    #[track_caller]
    pub(crate) fn lazy(
        op: &'static str,
        template: &'static str,
        dtype: DType,
        shape: Shape,
        args: &[&Tensor],
    ) -> Tensor {
        Tensor::lazy_with(op, template, dtype, shape, args, &[])
    }

    /// Like [`Tensor::lazy`], with scalars that are numbered after the tensors.
    #[track_caller]
    pub(crate) fn lazy_with(
        op: &'static str,
        template: &'static str,
        dtype: DType,
        shape: Shape,
        args: &[&Tensor],
        scalars: &[Scalar],
    ) -> Tensor {
        same_gpu(op, args);
        let operands = args.iter().map(|t| t.operand(op, &shape));
        let all = operands.chain(scalars.iter().map(|&s| Arg::Scalar(s))).collect();
        Tensor::expressed(args[0].gpu(), op, template, dtype, shape, all)
    }

    fn expressed(
        gpu: &Gpu,
        op: &'static str,
        template: &'static str,
        dtype: DType,
        shape: Shape,
        args: Vec<Arg>,
    ) -> Tensor {
        let expr = Expr::new(gpu, op, template, shape, args);
        Tensor::from_value(Value::later(gpu, dtype, expr), shape)
    }

    /// These elements as an argument of an elementwise op over `shape`.
    #[track_caller]
    pub(super) fn operand(&self, op: &str, shape: &Shape) -> Arg {
        let strides = shape::expand_strides(op, &self.shape, &self.strides, shape);
        Arg::Operand { value: self.value.clone(), strides, offset: self.offset }
    }

    /// Like [`Tensor::lazy`], with tensors and scalars in any order. The first is a tensor, and all are on its device.
    #[track_caller]
    pub(crate) fn lazy_of(
        op: &'static str,
        template: &'static str,
        dtype: DType,
        shape: Shape,
        args: &[Operand],
    ) -> Tensor {
        let gpu = args[0].tensor().expect("the first operand is a tensor").gpu();
        let arg = |operand: &Operand| match *operand {
            Operand::Tensor(x) => x.operand(op, &shape),
            Operand::Number(number) => Arg::Scalar(Scalar::F32(number)),
        };
        Tensor::expressed(gpu, op, template, dtype, shape, args.iter().map(arg).collect())
    }
}
