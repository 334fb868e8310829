//! Arrays of the crate [ndarray](https://docs.rs/ndarray), version 0.17, to tensors and back.

use super::Tensor;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::shape::{MAX_AXES, Shape};
use ::ndarray::{ArrayBase, ArrayD, ArrayRef, Data, Dimension, IxDyn};

impl Tensor {
    /// Makes a tensor of an array or a view of the crate ndarray, with the same shape and elements. Any layout is read: transposed,
    /// sliced, reversed and broadcast views too. Needs the feature `ndarray`.
    ///
    /// An array of `f64` becomes one of f32 by `array.mapv(|x| x as f32)`.
    ///
    /// # Panics
    /// If the array has more than [`MAX_AXES`] axes or 2^32 - 1 elements. The conversions by `TryFrom` return this as an error.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let array = ndarray::array![[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]];
    /// let x = Tensor::from_ndarray(&gpu, &array.t());
    /// assert_eq!(x.to_vec2::<f32>()?, [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn from_ndarray<E: Element, D: Dimension>(gpu: &Gpu, array: &ArrayRef<E, D>) -> Tensor {
        with_shape(gpu, array, Shape::new(array.shape()))
    }

    /// Reads the elements into an array of the crate ndarray. Waits for the device. Needs the feature `ndarray`.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    ///
    /// # Panics
    /// If `E` is not this tensor's dtype. The conversion by `TryFrom` returns this as an error.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1u32, 2, 3, 4], [2, 2]);
    /// assert_eq!(x.to_ndarray::<u32>()?, ndarray::array![[1, 2], [3, 4]].into_dyn());
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn to_ndarray<E: Element>(&self) -> Result<ArrayD<E>> {
        let values = self.to_vec()?;
        // A tensor has as many elements as its shape says, so this does not fail.
        ArrayD::from_shape_vec(IxDyn(self.shape()), values)
            .map_err(|e| Error::config(format!("to_ndarray: {e}")))
    }
}

fn with_shape<E: Element, D: Dimension>(gpu: &Gpu, array: &ArrayRef<E, D>, shape: Shape) -> Tensor {
    match array.as_slice() {
        Some(rows) => Tensor::from_slice(gpu, rows, shape),
        None => Tensor::from_slice(gpu, &array.iter().copied().collect::<Vec<E>>(), shape),
    }
}

fn try_from<E: Element, D: Dimension>(gpu: &Gpu, array: &ArrayRef<E, D>) -> Result<Tensor> {
    let shape = Shape::checked(array.shape()).ok_or_else(|| {
        let sizes = array.shape();
        Error::config(format!("from_ndarray: {sizes:?} has more than {MAX_AXES} axes or 2^32 - 1 elements"))
    })?;
    let tensor = with_shape(gpu, array, shape);
    tensor.check()?;
    Ok(tensor)
}

/// Makes a tensor on a device, as [`Tensor::from_ndarray`], of an array or a view.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let array = ndarray::array![[1i32, 2], [3, 4]];
/// let x = Tensor::try_from((&gpu, array.view()))?;
/// assert_eq!(x.to_vec::<i32>()?, [1, 2, 3, 4]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
impl<E: Element, S: Data<Elem = E>, D: Dimension> TryFrom<(&Gpu, ArrayBase<S, D>)> for Tensor {
    type Error = Error;

    fn try_from((gpu, array): (&Gpu, ArrayBase<S, D>)) -> Result<Tensor> {
        try_from(gpu, &array)
    }
}

/// Makes a tensor on a device, as [`Tensor::from_ndarray`], of a borrowed array.
impl<E: Element, S: Data<Elem = E>, D: Dimension> TryFrom<(&Gpu, &ArrayBase<S, D>)> for Tensor {
    type Error = Error;

    fn try_from((gpu, array): (&Gpu, &ArrayBase<S, D>)) -> Result<Tensor> {
        try_from(gpu, array)
    }
}

/// Reads a tensor, as [`Tensor::to_ndarray`]. Another dtype than that of the array is an error.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let array: ndarray::ArrayD<f32> = (&Tensor::ones(&gpu, [2, 3])).try_into()?;
/// assert_eq!(array.shape(), [2, 3]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
impl<E: Element> TryFrom<&Tensor> for ArrayD<E> {
    type Error = Error;

    fn try_from(tensor: &Tensor) -> Result<ArrayD<E>> {
        if E::DTYPE != tensor.dtype() {
            let message = format!(
                "to_ndarray: asked for {} of a tensor of {}; cast it first",
                E::DTYPE,
                tensor.dtype()
            );
            return Err(Error::config(message));
        }
        tensor.to_ndarray()
    }
}
