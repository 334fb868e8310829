//! Tensors of the host's elements and of constants, and elements read back.

use super::Tensor;
use crate::dtype::{DType, Element};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::readback::Reading;
use crate::gpu::value::fuse::{Arg, Expr, Scalar};
use crate::gpu::value::{Place, Value};
use crate::shape::Shape;
use crate::tape::no_grad;

impl Tensor {
    /// Makes a tensor of these elements, row-major.
    ///
    /// # Panics
    /// If `data.len()` is not the shape's element count.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]);
    /// assert_eq!(x.to_vec2::<f32>()?, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
    /// let ids = Tensor::from_slice(&gpu, &[7u32, 8], [2]); // the type follows from the elements
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn from_slice<E: Element>(gpu: &Gpu, data: &[E], shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        assert!(data.len() == shape.count(), "from_slice: {} elements for shape {shape}", data.len());
        let padded = E::DTYPE.buffer_bytes(data.len());
        let buffer = gpu.upload("from_slice", bytemuck::cast_slice(data), padded);
        Tensor::from_place(gpu, shape, E::DTYPE, Place { buffer, offset: 0 })
    }

    /// Makes a tensor from its elements' bytes, little-endian and row-major, aligned or not.
    ///
    /// # Panics
    /// If the number of `bytes` does not match `shape`.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::DType;
    /// let x = Tensor::from_bytes(&gpu, DType::U32, &[1, 0, 0, 0, 0, 1, 0, 0], [2]);
    /// assert_eq!(x.to_vec::<u32>()?, [1, 256]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn from_bytes(gpu: &Gpu, dtype: DType, bytes: &[u8], shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let n = shape.count();
        assert!(bytes.len() == n * dtype.size(), "from_bytes: {} bytes for {dtype} {shape}", bytes.len());
        let buffer = gpu.upload("from_bytes", bytes, dtype.buffer_bytes(n));
        Tensor::from_place(gpu, shape, dtype, Place { buffer, offset: 0 })
    }

    /// [`Tensor::from_bytes`] for what stays on the device, in a buffer that is no larger.
    pub(crate) fn resident(gpu: &Gpu, dtype: DType, bytes: &[u8], shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let n = shape.count();
        assert!(bytes.len() == n * dtype.size(), "resident: {} bytes for {dtype} {shape}", bytes.len());
        let buffer = gpu.upload_resident("from_bytes", bytes, dtype.buffer_bytes(n));
        Tensor::from_place(gpu, shape, dtype, Place { buffer, offset: 0 })
    }

    /// A scalar tensor.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let half = Tensor::scalar(&gpu, 0.5);
    /// assert_eq!(half.rank(), 0);
    /// assert_eq!(Tensor::ones(&gpu, [3]).mul(&half).to_vec::<f32>()?, [0.5; 3]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn scalar(gpu: &Gpu, value: f32) -> Tensor {
        Tensor::full(gpu, [], value)
    }

    /// An f32 tensor with all elements `value`. Nothing is stored until needed.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::full(&gpu, [2, 3], 7.0);
    /// assert_eq!(x.to_vec2::<f32>()?, [[7.0; 3]; 2]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn full(gpu: &Gpu, shape: impl Into<Shape>, value: f32) -> Tensor {
        let shape = shape.into();
        let arg = Arg::Scalar(Scalar::F32(value));
        let expr = Expr::new(gpu, "full", "$0", shape, vec![arg]);
        Tensor::from_value(Value::later(gpu, DType::F32, expr), shape)
    }

    /// An f32 tensor of zeros.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// assert_eq!(Tensor::zeros(&gpu, [2, 2]).to_vec::<f32>()?, [0.0; 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn zeros(gpu: &Gpu, shape: impl Into<Shape>) -> Tensor {
        Tensor::full(gpu, shape, 0.0)
    }

    /// An f32 tensor of ones.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// assert_eq!(Tensor::ones(&gpu, [2, 2]).to_vec::<f32>()?, [1.0; 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn ones(gpu: &Gpu, shape: impl Into<Shape>) -> Tensor {
        Tensor::full(gpu, shape, 1.0)
    }

    /// Reads the elements to the host, row-major. Waits for the device.
    ///
    /// # Errors
    /// An error that this tensor carries, such as a limit that an op on which it depends would exceed, or the device's
    /// fault, if one stands.
    ///
    /// # Panics
    /// If `E` is not this tensor's dtype. Use [`Tensor::cast`] first.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    /// assert_eq!(x.t().to_vec::<f32>()?, [1.0, 3.0, 2.0, 4.0]); // the order of the view's own rows
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[doc(alias = "tolist")]
    #[track_caller]
    pub fn to_vec<E: Element>(&self) -> Result<Vec<E>> {
        let reading = self.read::<E>()?;
        Ok(bytemuck::pod_collect_to_vec(&reading.wait()?))
    }

    /// Starts to read the elements' bytes, without waiting for them.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    ///
    /// # Panics
    /// If `E` is not this tensor's dtype.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1u32, 256], [2]);
    /// let reading = x.read::<u32>()?; // the host may go on to other work here
    /// assert_eq!(reading.wait()?, [1, 0, 0, 0, 0, 1, 0, 0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn read<E: Element>(&self) -> Result<Reading> {
        assert!(E::DTYPE == self.dtype(), "to_vec: asked for {} of a tensor of {}", E::DTYPE, self.dtype());
        let dense = self.contiguous();
        let place = dense.place();
        let bytes = (self.count() * self.dtype().size()) as u64;
        self.gpu().start_read(&place.buffer, place.offset, bytes)
    }

    /// Copies the elements to another device, by way of the host. On its own device this is a [`copy`](Tensor::copy). The result is
    /// outside of the graph.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let other = Gpu::open()?; // usually another adapter: see `Gpu::open_with`
    /// let x = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]);
    /// let y = x.to_gpu(&other)?;
    /// assert_eq!(y.scale(3.0).to_vec::<f32>()?, [3.0, 6.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn to_gpu(&self, gpu: &Gpu) -> Result<Tensor> {
        let x = self.detach();
        if x.gpu() == gpu {
            return Ok(x.copy());
        }
        fn through<E: Element>(x: &Tensor, gpu: &Gpu) -> Result<Tensor> {
            Ok(Tensor::from_slice(gpu, &x.to_vec::<E>()?, x.shape))
        }
        match x.dtype() {
            DType::F32 => through::<f32>(&x, gpu),
            DType::F16 => through::<half::f16>(&x, gpu),
            DType::Bf16 => through::<half::bf16>(&x, gpu),
            DType::U32 => through::<u32>(&x, gpu),
            DType::I32 => through::<i32>(&x, gpu),
        }
    }

    /// Reads the elements of a tensor of two axes, one list for each row. Waits for the device.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    ///
    /// # Panics
    /// If there are not two axes, or `E` is not this tensor's dtype.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1u32, 2, 3, 4], [2, 2]);
    /// assert_eq!(x.to_vec2::<u32>()?, [[1, 2], [3, 4]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn to_vec2<E: Element>(&self) -> Result<Vec<Vec<E>>> {
        let [rows, columns] = self.shape[..] else {
            panic!("to_vec2: {} has not two axes; reshape it, or read a list with to_vec", self.shape)
        };
        let all = self.to_vec::<E>()?;
        Ok((0..rows).map(|row| all[row * columns..(row + 1) * columns].to_vec()).collect())
    }

    /// Reads the element of a tensor of floats that has one element. An integer is read by `to_vec::<u32>()?[0]`.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    ///
    /// # Panics
    /// If there is not exactly one element, or it is an integer.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let loss = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3]).mean_all();
    /// assert_eq!(loss.item()?, 2.0);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn item(&self) -> Result<f32> {
        assert!(self.count() == 1, "item: shape {} has {} elements", self.shape, self.count());
        let dtype = self.dtype();
        assert!(dtype.is_float(), "item: the tensor is {dtype}; read it by to_vec::<{dtype}>()?[0]");
        let x = if dtype.is_half() { no_grad(|| self.cast(DType::F32)) } else { self.clone() };
        Ok(x.to_vec::<f32>()?[0])
    }
}
