//! Named tensors that are read one at a time, from memory or from a file.

use super::File;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::ops::Range;

/// Named tensors that are read one at a time, so only one has to be in memory.
pub trait Weights {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// The sizes of a tensor's axes.
    ///
    /// # Errors
    /// When there is no tensor of this name.
    fn shape(&self, name: &str) -> Result<Vec<usize>>;

    /// Whether a tensor has floats, which [`Weights::read`] reads. Files may have counters and the like beside them.
    fn is_float(&self, name: &str) -> bool {
        let _ = name;
        true
    }

    /// The names of the tensors of floats, sorted.
    fn float_names(&self) -> Vec<String> {
        self.names().into_iter().filter(|name| self.is_float(name)).collect()
    }

    /// Reads a tensor as f32 on the device, without gradient tracking.
    ///
    /// # Errors
    /// When there is no float tensor of this name, or the file or the device fails.
    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor>;

    /// Reads all tensors of floats: [`Weights::read`] of each of [`Weights::float_names`].
    ///
    /// # Errors
    /// As [`Weights::read`].
    fn read_all(&self, gpu: &Gpu) -> Result<BTreeMap<String, Tensor>> {
        let one = |name: String| self.read(gpu, &name).map(|x| (name, x));
        self.float_names().into_iter().map(one).collect()
    }

    /// Reads a range of a tensor's elements in row-major order, as a flat tensor. Callers use it to read a tensor in parts.
    ///
    /// # Errors
    /// As [`Weights::read`].
    ///
    /// # Panics
    /// When the tensor has fewer elements.
    fn read_range(&self, gpu: &Gpu, name: &str, range: Range<usize>) -> Result<Tensor> {
        let x = self.read(gpu, name)?;
        Ok(x.reshape([x.count()]).slice(0, range))
    }

    /// Reads pieces of `length` elements that begin at `starts` to the host, one after the other, for estimates. `None` if these
    /// weights are not there already, which is the default.
    ///
    /// # Errors
    /// As [`Weights::read`], and when a piece is not inside of the tensor.
    fn sample(&self, name: &str, length: usize, starts: &[usize]) -> Result<Option<Vec<f32>>> {
        let _ = (name, length, starts);
        Ok(None)
    }
}

impl Weights for BTreeMap<String, Tensor> {
    fn names(&self) -> Vec<String> {
        self.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.get(name).map(|x| x.shape().to_vec()).ok_or_else(|| missing(name))
    }

    fn read(&self, _: &Gpu, name: &str) -> Result<Tensor> {
        self.get(name).map(|x| x.detach().cast(DType::F32)).ok_or_else(|| missing(name))
    }
}

/// Weights in memory that stay what they are: those that are tracked are tracked by whatever reads them, so that a model that runs on
/// them trains what they were computed from.
///
/// ```
/// use std::collections::BTreeMap;
/// use tiebeam::store::{Tracked, Weights};
/// use tiebeam::{Gpu, Tensor};
/// let gpu = Gpu::open()?;
/// let scale = Tensor::scalar(&gpu, 2.0).requires_grad();
/// let weights = BTreeMap::from([("w".to_string(), Tensor::ones(&gpu, [3]).mul(&scale))]);
/// let loss = Tracked(&weights).read(&gpu, "w")?.sum_all();
/// assert_eq!(loss.backward()?.get(&scale).expect("a gradient").item()?, 3.0);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct Tracked<'a>(pub &'a BTreeMap<String, Tensor>);

impl Weights for Tracked<'_> {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.0.shape(name)
    }

    fn read(&self, _: &Gpu, name: &str) -> Result<Tensor> {
        self.0.get(name).map(|x| x.cast(DType::F32)).ok_or_else(|| missing(name))
    }
}

impl<W: Weights + ?Sized> Weights for &W {
    fn names(&self) -> Vec<String> {
        (**self).names()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        (**self).shape(name)
    }

    fn is_float(&self, name: &str) -> bool {
        (**self).is_float(name)
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        (**self).read(gpu, name)
    }

    fn read_range(&self, gpu: &Gpu, name: &str, range: Range<usize>) -> Result<Tensor> {
        (**self).read_range(gpu, name, range)
    }

    fn sample(&self, name: &str, length: usize, starts: &[usize]) -> Result<Option<Vec<f32>>> {
        (**self).sample(name, length, starts)
    }
}

fn missing(name: &str) -> Error {
    Error::config(format!("there is no tensor `{name}` in these weights"))
}

impl Weights for File {
    fn names(&self) -> Vec<String> {
        File::names(self).map(String::from).collect()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        Ok(self.info(name)?.shape.clone())
    }

    fn is_float(&self, name: &str) -> bool {
        self.info(name).is_ok_and(|info| info.dtype.is_float())
    }

    fn read(&self, gpu: &Gpu, name: &str) -> Result<Tensor> {
        Ok(Tensor::from_slice(gpu, &self.tensor_f32(name)?, &self.info(name)?.shape[..]))
    }
}
