//! The batches of an epoch, made in the calling thread or ahead of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use super::dataset::Dataset;
use crate::error::{Error, Result, panic_text};

/// Makes a batch of items.
pub(super) type Collate<T, B> = dyn Fn(Vec<T>) -> Result<B> + Send + Sync;

/// What makes the batches of an epoch, one after another.
pub(super) struct Maker<D: Dataset, B> {
    pub dataset: Arc<D>,
    pub collate: Arc<Collate<D::Item, B>>,
    /// The items in their order. `None` for that of the dataset.
    pub order: Option<Vec<usize>>,
    pub batch_size: usize,
    /// How many items the epoch has.
    pub items: usize,
    /// The place of the next item.
    pub next: usize,
    /// Set when nobody waits for batches any more.
    pub stop: Arc<AtomicBool>,
}

impl<D: Dataset, B> Maker<D, B> {
    fn batch(&self, places: std::ops::Range<usize>) -> Result<Option<B>> {
        let mut items = Vec::with_capacity(places.len());
        for place in places {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            items.push(self.dataset.get(self.order.as_ref().map_or(place, |order| order[place]))?);
        }
        (self.collate)(items).map(Some)
    }
}

impl<D: Dataset, B> Iterator for Maker<D, B> {
    type Item = Result<B>;

    fn next(&mut self) -> Option<Result<B>> {
        let start = self.next;
        if start >= self.items {
            return None;
        }
        self.next = self.items.min(start + self.batch_size);
        let places = start..self.next;
        // What a panic leaves behind is dropped with the items. The dataset is shared, and knows itself how it survives one.
        match catch_unwind(AssertUnwindSafe(|| self.batch(places.clone()))) {
            Ok(batch) => batch.transpose(),
            Err(panic) => Some(Err(Error::config(format!(
                "data: items {} to {} of the epoch: the dataset or the collate function panicked: {}",
                places.start,
                places.end - 1,
                panic_text(&*panic)
            )))),
        }
    }
}

/// The batches of an epoch, which [`DataLoader::iter`](super::DataLoader::iter) returns.
///
/// A batch that cannot be made is an error in its place, and the next one follows it. A panic of the dataset or of the function
/// that makes batches is such an error too, with its message. Dropping this returns at once: the thread that reads ahead ends
/// after the item that it is reading.
pub struct Batches<B> {
    source: Source<B>,
    left: usize,
    stop: Arc<AtomicBool>,
}

enum Source<B> {
    Here(Box<dyn Iterator<Item = Result<B>> + Send>),
    Ahead(Receiver<Result<B>>),
}

impl<B: Send + 'static> Batches<B> {
    /// Begins with the next batch of `maker`, of which `left` are left. At most `ahead` are made before they are asked for, on a
    /// thread of their own.
    pub(super) fn new<D>(maker: Maker<D, B>, left: usize, ahead: usize) -> Batches<B>
    where
        D: Dataset + Send + Sync + 'static,
    {
        let stop = maker.stop.clone();
        let source =
            if ahead == 0 || left == 0 { Source::Here(Box::new(maker)) } else { read_ahead(maker, ahead) };
        Batches { source, left, stop }
    }
}

fn read_ahead<D, B>(mut maker: Maker<D, B>, ahead: usize) -> Source<B>
where
    D: Dataset + Send + Sync + 'static,
    B: Send + 'static,
{
    // One batch waits in the thread's hands, the others in the queue.
    let (sender, receiver) = sync_channel(ahead - 1);
    let work = move || {
        // A batch that cannot be sent has nobody who waits for it.
        while let Some(batch) = maker.next()
            && sender.send(batch).is_ok()
        {}
    };
    match thread::Builder::new().name("tiebeam data".into()).spawn(work) {
        Ok(_) => Source::Ahead(receiver),
        Err(e) => {
            let message = format!("data: the system has no thread for reading ahead ({e}); set prefetch(0)");
            Source::Here(Box::new(std::iter::once(Err(Error::config(message).because_of(e)))))
        }
    }
}

impl<B> Iterator for Batches<B> {
    type Item = Result<B>;

    fn next(&mut self) -> Option<Result<B>> {
        self.left = self.left.checked_sub(1)?;
        match &mut self.source {
            Source::Here(maker) => maker.next(),
            Source::Ahead(receiver) => Some(receiver.recv().unwrap_or_else(|_| {
                self.left = 0;
                Err(Error::device("data: the thread that reads ahead has ended before its last batch"))
            })),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<B> ExactSizeIterator for Batches<B> {}

impl<B> Drop for Batches<B> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
