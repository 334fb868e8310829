//! Datasets: items by number.

use std::sync::Arc;

use super::stack::Row;
use crate::dtype::Element;
use crate::error::Result;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// Items by number, as PyTorch's `Dataset` of the kind that is indexed.
///
/// It is implemented for a `Vec` of anything that can be cloned, for [`Rows`], for tuples of two to four datasets of equal length (whose
/// items are tuples, as those of PyTorch's `TensorDataset`), and for an `Arc` of a dataset, which several loaders share.
///
/// An item should depend on its number only. Then every epoch can be repeated, and a loader gives the same batches whether it reads
/// ahead or not.
///
/// ```
/// use tiebeam::data::Dataset;
/// use tiebeam::{Error, Result};
///
/// /// One text file for each item.
/// struct Files(Vec<std::path::PathBuf>);
///
/// impl Dataset for Files {
///     type Item = String;
///     fn len(&self) -> usize {
///         self.0.len()
///     }
///     fn get(&self, index: usize) -> Result<String> {
///         std::fs::read_to_string(&self.0[index]).map_err(|e| Error::io(&self.0[index], e))
///     }
/// }
/// assert!(Files(vec!["no/such/file".into()]).get(0).is_err());
/// ```
pub trait Dataset {
    /// One item, such as an image and its class.
    type Item;

    /// The number of items.
    fn len(&self) -> usize;

    /// Whether there are no items.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns item `index`, which is below [`Dataset::len`].
    ///
    /// # Errors
    /// Whatever keeps the item from being read. The loader passes it on in the place of the batch.
    fn get(&self, index: usize) -> Result<Self::Item>;
}

impl<T: Clone> Dataset for Vec<T> {
    type Item = T;

    fn len(&self) -> usize {
        Vec::len(self)
    }

    fn get(&self, index: usize) -> Result<T> {
        Ok(self[index].clone())
    }
}

impl<D: Dataset + ?Sized> Dataset for Arc<D> {
    type Item = D::Item;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn get(&self, index: usize) -> Result<D::Item> {
        (**self).get(index)
    }
}

macro_rules! tuples {
    ($(($($name:ident $field:tt),*))*) => { $(
        /// Items are tuples of the columns' items.
        ///
        /// # Panics
        /// [`Dataset::len`] panics if the columns differ in length.
        impl<$($name: Dataset),*> Dataset for ($($name,)*) {
            type Item = ($($name::Item,)*);

            #[track_caller]
            fn len(&self) -> usize {
                let lengths = [$(self.$field.len()),*];
                assert!(
                    lengths.iter().all(|&length| length == lengths[0]),
                    "dataset: columns of {lengths:?} items; each item needs its part in every column"
                );
                lengths[0]
            }

            fn get(&self, index: usize) -> Result<Self::Item> {
                Ok(($(self.$field.get(index)?,)*))
            }
        }
    )* };
}
tuples!((A 0, B 1) (A 0, B 1, C 2) (A 0, B 1, C 2, D 3));

/// An array on the host whose first axis counts the items. An item is a [`Row`], an array of the other axes.
///
/// ```
/// # use tiebeam::data::{Dataset, Rows};
/// let images = Rows::new(vec![0u32; 5 * 12], [5, 3, 2, 2]);
/// assert_eq!(images.len(), 5);
/// assert_eq!(images.get(4)?.shape()[..], [3, 2, 2]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Rows<E> {
    values: Vec<E>,
    rows: usize,
    row: Shape,
}

impl<E: Element> Rows<E> {
    /// An array of these elements, row-major.
    ///
    /// # Panics
    /// If the shape has no axis, or `values.len()` is not its element count.
    #[track_caller]
    pub fn new(values: Vec<E>, shape: impl Into<Shape>) -> Rows<E> {
        let shape = shape.into();
        let [rows, row @ ..] = &shape[..] else { panic!("rows: a scalar has no axis that counts its items") };
        assert!(values.len() == shape.count(), "rows: {} elements for shape {shape}", values.len());
        Rows { values, rows: *rows, row: row.into() }
    }

    /// Reads a tensor from its device, such as one of a file. Waits for the device.
    ///
    /// # Errors
    /// As [`Tensor::to_vec`].
    ///
    /// # Panics
    /// If the tensor has no axis, or `E` is not its dtype.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, data::{Dataset, Rows}};
    /// # let gpu = Gpu::open()?;
    /// let rows = Rows::<f32>::from_tensor(&Tensor::eye(&gpu, 3))?;
    /// assert_eq!(rows.get(1)?[..], [0.0, 1.0, 0.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn from_tensor(tensor: &Tensor) -> Result<Rows<E>> {
        let values = tensor.to_vec()?;
        Ok(Rows::new(values, tensor.shape()))
    }
}

impl<E: Element> Dataset for Rows<E> {
    type Item = Row<E>;

    fn len(&self) -> usize {
        self.rows
    }

    fn get(&self, index: usize) -> Result<Row<E>> {
        let size = self.row.count();
        Ok(Row::new(self.values[index * size..][..size].to_vec(), self.row))
    }
}
