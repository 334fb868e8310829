//! Logic of masks.

use crate::dtype::DType;
use crate::ops::case::{Array, Case, Input};
use crate::shape;
use crate::tensor::{Tensor, same_gpu};

/// A mask as u32, for an op that takes no other.
#[track_caller]
fn mask(op: &str, x: &Tensor) -> Tensor {
    assert!(
        !x.dtype().is_float(),
        "{op}: a mask is u32 or i32, got {}; compare it with a number first",
        x.dtype()
    );
    x.cast(DType::U32)
}

impl Tensor {
    #[track_caller]
    fn logical(&self, rhs: &Tensor, name: &'static str, template: &'static str) -> Tensor {
        same_gpu(name, &[self, rhs]);
        let shape = shape::broadcast(name, self.shape(), rhs.shape());
        Tensor::lazy(name, template, DType::U32, shape, &[&mask(name, self), &mask(name, rhs)])
    }

    /// 1 where both masks are not 0, else 0, as u32. They broadcast.
    ///
    /// # Panics
    /// If the shapes do not broadcast, or one has floats.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[-1f32, 0.5, 3.0], [3]);
    /// assert_eq!(x.gt(0.0).logical_and(&x.lt(1.0)).to_vec::<u32>()?, [0, 1, 0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn logical_and(&self, rhs: &Tensor) -> Tensor {
        self.logical(rhs, "logical_and", "vec4<u32>(($0 != vec4<u32>(0u)) & ($1 != vec4<u32>(0u)))")
    }

    /// 1 where one of the masks is not 0, else 0, as u32. They broadcast.
    ///
    /// # Panics
    /// As [`Tensor::logical_and`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[-1f32, 0.5, 3.0], [3]);
    /// assert_eq!(x.lt(0.0).logical_or(&x.gt(1.0)).to_vec::<u32>()?, [1, 0, 1]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn logical_or(&self, rhs: &Tensor) -> Tensor {
        self.logical(rhs, "logical_or", "vec4<u32>(($0 != vec4<u32>(0u)) | ($1 != vec4<u32>(0u)))")
    }

    /// 1 where the mask is 0, else 0, as u32.
    ///
    /// # Panics
    /// If it has floats.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let mask = Tensor::from_slice(&gpu, &[1u32, 0, 7], [3]);
    /// assert_eq!(mask.logical_not().to_vec::<u32>()?, [0, 1, 0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn logical_not(&self) -> Tensor {
        let x = mask("logical_not", self);
        Tensor::lazy("logical_not", "vec4<u32>($0 == vec4<u32>(0u))", DType::U32, *self.shape(), &[&x])
    }
}

pub(super) fn cases() -> Vec<Case> {
    let inputs = |dtype| {
        let least = if dtype == DType::I32 { -1 } else { 0 };
        vec![Input::integers([5, 7], dtype, least, 3), Input::integers([7], dtype, least, 2)]
    };
    let is = |x: f64| x != 0.0;
    let mut all = Vec::new();
    for dtype in [DType::U32, DType::I32] {
        let and = move |x: &[Array]| {
            Array::from_fn([5, 7], |i| (is(x[0].data[i]) && is(x[1].data[i % 7])) as u8 as f64)
        };
        let or = move |x: &[Array]| {
            Array::from_fn([5, 7], |i| (is(x[0].data[i]) || is(x[1].data[i % 7])) as u8 as f64)
        };
        let not = move |x: &[Array]| Array::from_fn([5, 7], |i| !is(x[0].data[i]) as u8 as f64);
        all.push(Case::new(format!("logical_and {dtype}"), inputs(dtype), |x| x[0].logical_and(&x[1]), and));
        all.push(Case::new(format!("logical_or {dtype}"), inputs(dtype), |x| x[0].logical_or(&x[1]), or));
        all.push(Case::new(format!("logical_not {dtype}"), inputs(dtype), |x| x[0].logical_not(), not));
    }
    all.into_iter().map(Case::exact).collect()
}
