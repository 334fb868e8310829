//! Batches of a dataset: in order or shuffled, made ahead on a thread.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::batches::{Batches, Collate, Maker};
use super::dataset::Dataset;
use super::stack::Stack;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::rng::Rng;

/// The first stream of a seed from which orders are drawn. Generators count their draws from 0, so a generator with the same seed
/// that makes a model's weights does not draw the same numbers.
const ORDERS: u64 = 1 << 63;

/// Takes the items of a [`Dataset`] in batches, as PyTorch's `DataLoader`.
///
/// Batches are made on a thread of their own, at most [`DataLoader::prefetch`] before they are asked for, so that the device need
/// not wait for files. Dataset and function run on that thread, and scopes such as [`autocast`](crate::autocast) of the calling
/// thread do not reach them. Batches and their order are the same without the thread.
///
/// The order of a shuffled epoch is a function of seed, number of the epoch and number of items. It has the same bits on every
/// platform: the shuffle of Fisher and Yates with the counter-based generator of [`rng`](crate::rng).
///
/// ```
/// # use tiebeam::{Gpu, data::DataLoader};
/// # let gpu = Gpu::open()?;
/// let (x, y): (Vec<f32>, Vec<u32>) = (vec![0.5, 1.5, 2.5], vec![0, 1, 0]);
/// let loader = DataLoader::new(&gpu, (x, y)).batch_size(2);
/// let batches = loader.iter(0).collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(batches[0].0.to_vec::<f32>()?, [0.5, 1.5]);
/// assert_eq!(batches[1].1.to_vec::<u32>()?, [0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub struct DataLoader<D: Dataset, B> {
    dataset: Arc<D>,
    collate: Arc<Collate<D::Item, B>>,
    batch_size: usize,
    shuffle: Option<u64>,
    drop_last: bool,
    prefetch: usize,
}

impl<D> DataLoader<D, <D::Item as Stack>::Batch>
where
    D: Dataset,
    D::Item: Stack,
{
    /// A loader that puts the items of a batch side by side into tensors, as [`Stack`] says. A batch is one item until
    /// [`DataLoader::batch_size`] says otherwise.
    pub fn new(gpu: &Gpu, dataset: D) -> Self {
        let gpu = gpu.clone();
        DataLoader::with_collate(dataset, move |items| Stack::stack(&gpu, items))
    }
}

impl<D: Dataset, B> DataLoader<D, B> {
    /// A loader that makes batches by a function of the items, such as one that pads texts to equal length.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor, data::DataLoader};
    /// # let gpu = Gpu::open()?;
    /// let texts = vec![vec![5u32], vec![6, 7]];
    /// let loader = DataLoader::with_collate(texts, move |items: Vec<Vec<u32>>| {
    ///     let width = items.iter().map(Vec::len).max().unwrap_or(0);
    ///     let padded: Vec<u32> = items.iter().flat_map(|t| t.iter().copied().chain([0; 8]).take(width)).collect();
    ///     Ok(Tensor::from_slice(&gpu, &padded, [items.len(), width]))
    /// });
    /// let batch = loader.batch_size(2).iter(0).next().unwrap()?;
    /// assert_eq!(batch.to_vec2::<u32>()?, [[5, 0], [6, 7]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn with_collate(
        dataset: D,
        collate: impl Fn(Vec<D::Item>) -> Result<B> + Send + Sync + 'static,
    ) -> Self {
        DataLoader {
            dataset: Arc::new(dataset),
            collate: Arc::new(collate),
            batch_size: 1,
            shuffle: None,
            drop_last: false,
            prefetch: 2,
        }
    }

    /// Returns this loader with another number of items in a batch. By default 1.
    ///
    /// # Panics
    /// If it is 0.
    #[must_use]
    #[track_caller]
    pub fn batch_size(mut self, items: usize) -> Self {
        assert!(items > 0, "data: a batch of 0 items; give at least 1");
        self.batch_size = items;
        self
    }

    /// Returns this loader with the items of each epoch in an order of its own, drawn from `seed` and the epoch's number. By
    /// default they are in the dataset's order.
    #[must_use]
    pub fn shuffle(mut self, seed: u64) -> Self {
        self.shuffle = Some(seed);
        self
    }

    /// Returns this loader with or without a last batch that is smaller than the others. By default it is not dropped.
    #[must_use]
    pub fn drop_last(mut self, drop: bool) -> Self {
        self.drop_last = drop;
        self
    }

    /// Returns this loader with another number of batches that are made before they are asked for, by default 2. 0 makes each
    /// batch in the calling thread when it is asked for. Every batch takes memory while it waits.
    #[must_use]
    pub fn prefetch(mut self, batches: usize) -> Self {
        self.prefetch = batches;
        self
    }

    /// The dataset.
    pub fn dataset(&self) -> &D {
        &self.dataset
    }

    /// The number of batches of an epoch.
    ///
    /// ```
    /// # use tiebeam::{Gpu, data::DataLoader};
    /// # let gpu = Gpu::open()?;
    /// let loader = DataLoader::new(&gpu, vec![0f32; 10]).batch_size(4);
    /// assert_eq!(loader.len(), 3);
    /// assert_eq!(loader.drop_last(true).len(), 2);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn len(&self) -> usize {
        let items = self.dataset.len();
        if self.drop_last { items / self.batch_size } else { items.div_ceil(self.batch_size) }
    }

    /// Whether an epoch has no batches.
    #[track_caller]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The items of an epoch in their order. `None` for that of the dataset.
    fn order(&self, epoch: u64, items: usize) -> Option<Vec<usize>> {
        let seed = self.shuffle?;
        let mut order: Vec<usize> = (0..items).collect();
        Rng::from_state([seed, ORDERS.wrapping_add(epoch)]).shuffle(&mut order);
        Some(order)
    }
}

impl<D, B> DataLoader<D, B>
where
    D: Dataset + Send + Sync + 'static,
    B: Send + 'static,
{
    /// Returns the batches of an epoch. Epochs are counted by the caller, and need not be asked for in order.
    #[track_caller]
    pub fn iter(&self, epoch: u64) -> Batches<B> {
        self.iter_from(epoch, 0)
    }

    /// Returns the batches of an epoch from number `batch` on, without reading those before it. A run that was stopped after
    /// `batch` batches of the epoch goes on with this.
    ///
    /// # Panics
    /// If the epoch has fewer batches. Equal to their number is allowed, and gives none.
    ///
    /// ```
    /// # use tiebeam::{Gpu, data::DataLoader};
    /// # let gpu = Gpu::open()?;
    /// let loader = DataLoader::new(&gpu, (0..6).collect::<Vec<i32>>()).batch_size(2).shuffle(3);
    /// let all = loader.iter(5).map(|x| x?.to_vec::<i32>()).collect::<Result<Vec<_>, _>>()?;
    /// let rest = loader.iter_from(5, 1).map(|x| x?.to_vec::<i32>()).collect::<Result<Vec<_>, _>>()?;
    /// assert_eq!(rest, all[1..]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn iter_from(&self, epoch: u64, batch: usize) -> Batches<B> {
        let (items, batches) = (self.dataset.len(), self.len());
        assert!(
            batch <= batches,
            "data: batch {batch} of an epoch of {batches}; continue a run with its dataset, batch size and drop_last"
        );
        let maker = Maker {
            dataset: self.dataset.clone(),
            collate: self.collate.clone(),
            order: self.order(epoch, items),
            batch_size: self.batch_size,
            items: if self.drop_last { batches * self.batch_size } else { items },
            next: batch.saturating_mul(self.batch_size),
            stop: Arc::new(AtomicBool::new(false)),
        };
        Batches::new(maker, batches - batch, self.prefetch)
    }

    /// Returns the batches of a training run from `step` on, without end: batch `step % len` of epoch `step / len`, and then one after
    /// another. A run that was stopped goes on with the step that it had reached. There are none if an epoch has none.
    ///
    /// ```
    /// # use tiebeam::{Gpu, data::DataLoader};
    /// # let gpu = Gpu::open()?;
    /// let loader = DataLoader::new(&gpu, (0..5).collect::<Vec<i32>>()).batch_size(2).shuffle(3);
    /// let read = |x: tiebeam::Result<tiebeam::Tensor>| x?.to_vec::<i32>();
    /// let all = loader.steps_from(0).take(7).map(read).collect::<Result<Vec<_>, _>>()?;
    /// assert_eq!(all[3..6], loader.iter(1).map(read).collect::<Result<Vec<_>, _>>()?);
    /// assert_eq!(all[5..], loader.steps_from(5).take(2).map(read).collect::<Result<Vec<_>, _>>()?);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn steps_from(&self, step: u64) -> impl Iterator<Item = Result<B>> {
        let len = self.len() as u64;
        let epoch = step.checked_div(len).unwrap_or(0);
        let batch = (step - epoch * len) as usize;
        // Epochs without a batch would be looked through without end.
        let epochs = if len == 0 { 0..0 } else { epoch..u64::MAX };
        epochs.flat_map(move |at| self.iter_from(at, if at == epoch { batch } else { 0 }))
    }
}
