//! Arrays on the host, with which the references of ops compute.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// A host array in f64, with which references compute. Integers are stored as their values.
#[derive(Clone, Debug)]
pub struct Array {
    /// Sizes of the axes.
    pub shape: Shape,
    /// Elements, row-major.
    pub data: Vec<f64>,
}

impl Array {
    /// An array of this shape whose element at flat index `i` is `f(i)`.
    pub fn from_fn(shape: impl Into<Shape>, f: impl FnMut(usize) -> f64) -> Array {
        let shape = shape.into();
        Array { shape, data: (0..shape.count()).map(f).collect() }
    }

    /// A part of the elements, row-major, in another shape.
    pub fn part(&self, shape: impl Into<Shape>, from: usize) -> Array {
        let shape = shape.into();
        Array { shape, data: self.data[from..][..shape.count()].to_vec() }
    }

    /// Reads the elements of a tensor of any type.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    pub fn read(x: &Tensor) -> Result<Array> {
        let data = match x.dtype() {
            DType::F32 => x.to_vec::<f32>()?.into_iter().map(f64::from).collect(),
            DType::F16 => x.to_vec::<half::f16>()?.into_iter().map(f64::from).collect(),
            DType::Bf16 => x.to_vec::<half::bf16>()?.into_iter().map(f64::from).collect(),
            DType::U32 => x.to_vec::<u32>()?.into_iter().map(f64::from).collect(),
            DType::I32 => x.to_vec::<i32>()?.into_iter().map(f64::from).collect(),
        };
        Ok(Array { shape: *x.shape(), data })
    }

    /// Uploads the array in the given type.
    pub fn upload(&self, gpu: &Gpu, dtype: DType) -> Tensor {
        fn as_type<T: crate::Element>(gpu: &Gpu, array: &Array, convert: impl Fn(f64) -> T) -> Tensor {
            let data: Vec<T> = array.data.iter().map(|&x| convert(x)).collect();
            Tensor::from_slice(gpu, &data, array.shape)
        }
        match dtype {
            DType::F32 => as_type(gpu, self, |x| x as f32),
            DType::F16 => as_type(gpu, self, half::f16::from_f64),
            DType::Bf16 => as_type(gpu, self, half::bf16::from_f64),
            DType::U32 => as_type(gpu, self, |x| x as u32),
            DType::I32 => as_type(gpu, self, |x| x as i32),
        }
    }
}
