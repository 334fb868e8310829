//! Tensors of batches: items of one shape side by side.

use std::ops::Deref;

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::shape::{MAX_AXES, Shape};
use crate::tensor::Tensor;

/// Items that can be put side by side into tensors, with a new first axis for the batch, as PyTorch's `default_collate` does.
///
/// | item | batch of `n` |
/// |---|---|
/// | a number: `f32`, `f16`, `bf16`, `u32`, `i32` | a tensor of shape `[n]` |
/// | an array `[E; K]`, or a `Vec` of length `K` | a tensor of shape `[n, K]` |
/// | a [`Row`] of shape `S` | a tensor of shape `[n, S]` |
/// | a tuple of up to four of these | a tuple of their batches |
///
/// ```
/// # use tiebeam::{Gpu, data::Stack};
/// # let gpu = Gpu::open()?;
/// let (x, class) = Stack::stack(&gpu, vec![([1f32, 2.0], 0u32), ([3.0, 4.0], 1)])?;
/// assert_eq!(x.to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0]]);
/// assert_eq!(class.to_vec::<u32>()?, [0, 1]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub trait Stack: Sized {
    /// What a list of items becomes.
    type Batch;

    /// Puts the items side by side.
    ///
    /// # Errors
    /// [`Error::Config`] when the items differ in shape, or a batch has more axes or elements than a tensor may have.
    fn stack(gpu: &Gpu, items: Vec<Self>) -> Result<Self::Batch>;
}

/// An array on the host, whose shape is known when the program runs: one item, such as an image. It reads as a slice of its elements,
/// row-major.
///
/// ```
/// # use tiebeam::data::Row;
/// let image = Row::new(vec![0f32; 12], [3, 2, 2]);
/// assert_eq!((image.shape()[0], image.len()), (3, 12));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Row<E> {
    values: Vec<E>,
    shape: Shape,
}

impl<E> Row<E> {
    /// An array of these elements, row-major.
    ///
    /// # Panics
    /// If `values.len()` is not the shape's element count.
    #[track_caller]
    pub fn new(values: Vec<E>, shape: impl Into<Shape>) -> Row<E> {
        let shape = shape.into();
        assert!(values.len() == shape.count(), "row: {} elements for shape {shape}", values.len());
        Row { values, shape }
    }

    /// The sizes of the axes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }
}

impl<E> Deref for Row<E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        &self.values
    }
}

/// Makes the tensor of `values`, which belong to `items` items of shape `one`.
fn side_by_side<E: Element>(gpu: &Gpu, values: &[E], items: usize, one: &[usize]) -> Result<Tensor> {
    let sizes = [&[items], one].concat();
    let shape = Shape::checked(&sizes).ok_or_else(|| {
        Error::config(format!("stack: a batch of {items} items of shape {one:?} has more than {MAX_AXES} axes or 2^32 - 1 elements"))
    })?;
    let tensor = Tensor::from_slice(gpu, values, shape);
    tensor.check()?;
    Ok(tensor)
}

/// Compares the items' shapes with the first one's, which is returned. Without items there is no shape: the batch is `[0]`.
fn same<'a>(mut shapes: impl Iterator<Item = &'a [usize]>) -> Result<&'a [usize]> {
    let first = shapes.next().unwrap_or(&[]);
    match shapes.enumerate().find(|(_, shape)| *shape != first) {
        Some((i, other)) => Err(Error::config(format!(
            "stack: item {} of the batch has shape {other:?}, the first one has {first:?}; make them equal, or give the loader a \
             function of your own with DataLoader::with_collate",
            i + 1
        ))),
        None => Ok(first),
    }
}

impl<E: Element> Stack for E {
    type Batch = Tensor;

    fn stack(gpu: &Gpu, items: Vec<E>) -> Result<Tensor> {
        side_by_side(gpu, &items, items.len(), &[])
    }
}

impl<E: Element, const K: usize> Stack for [E; K] {
    type Batch = Tensor;

    fn stack(gpu: &Gpu, items: Vec<[E; K]>) -> Result<Tensor> {
        side_by_side(gpu, items.as_flattened(), items.len(), &[K])
    }
}

impl<E: Element> Stack for Vec<E> {
    type Batch = Tensor;

    fn stack(gpu: &Gpu, items: Vec<Vec<E>>) -> Result<Tensor> {
        let lengths: Vec<[usize; 1]> = items.iter().map(|item| [item.len()]).collect();
        let one = same(lengths.iter().map(|length| &length[..]))?;
        side_by_side(gpu, &items.concat(), items.len(), one)
    }
}

impl<E: Element> Stack for Row<E> {
    type Batch = Tensor;

    fn stack(gpu: &Gpu, items: Vec<Row<E>>) -> Result<Tensor> {
        let one = same(items.iter().map(|item| &item.shape[..]))?;
        let values: Vec<E> = items.iter().flat_map(|item| item.values.iter().copied()).collect();
        side_by_side(gpu, &values, items.len(), one)
    }
}

macro_rules! tuples {
    ($(($($name:ident $field:tt),*))*) => { $(
        impl<$($name: Stack),*> Stack for ($($name,)*) {
            type Batch = ($($name::Batch,)*);

            fn stack(gpu: &Gpu, items: Vec<Self>) -> Result<Self::Batch> {
                let columns: ($(Vec<$name>,)*) = items.into_iter().collect();
                Ok(($($name::stack(gpu, columns.$field)?,)*))
            }
        }
    )* };
}
tuples!((A 0, B 1) (A 0, B 1, C 2) (A 0, B 1, C 2, D 3));
