//! Batches of datasets: their order, where an epoch is continued, errors, and the thread that reads ahead.

use crate::support::gpu;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tiebeam::data::{DataLoader, Dataset, Row, Rows, Stack};
use tiebeam::error::ErrorKind;
use tiebeam::{Error, Result, Tensor};

/// Long enough for any thread to do what it is about to do, on a machine with other work.
const PATIENCE: Duration = Duration::from_secs(60);

/// A loader whose batches are the items as they are.
fn plain<D: Dataset<Item: 'static>>(dataset: D) -> DataLoader<D, Vec<D::Item>> {
    DataLoader::with_collate(dataset, Ok)
}

fn numbers(n: u32) -> Vec<u32> {
    (0..n).collect()
}

fn all<T>(batches: impl Iterator<Item = Result<T>>) -> Vec<T> {
    batches.collect::<Result<_>>().unwrap()
}

#[test]
fn batches_are_in_order_and_the_last_one_is_smaller() {
    for prefetch in [0, 1, 2, 9] {
        let loader = plain(numbers(7)).batch_size(3).prefetch(prefetch);
        assert_eq!((loader.len(), loader.iter(0).len()), (3, 3));
        assert_eq!(all(loader.iter(4)), [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
        let loader = loader.drop_last(true);
        assert_eq!((loader.len(), loader.iter(0).len()), (2, 2));
        assert_eq!(all(loader.iter(0)), [[0, 1, 2], [3, 4, 5]]);
        // A batch may be larger than the dataset, and a dataset may be empty.
        let loader = plain(numbers(2)).batch_size(5).prefetch(prefetch);
        assert_eq!(all(loader.iter(0)), [[0, 1]]);
        assert!(loader.drop_last(true).iter(0).next().is_none());
        let empty = plain(numbers(0)).shuffle(1).prefetch(prefetch);
        assert!(empty.is_empty() && empty.iter(0).next().is_none());
    }
}

/// The orders are those of a program in Python that shares nothing with this crate. They are the same on every platform, and a
/// later version that changed them would let runs continue with other batches.
#[test]
fn the_order_is_a_function_of_seed_and_epoch() {
    let order = |seed, epoch| all(plain(numbers(8)).batch_size(8).shuffle(seed).iter(epoch)).concat();
    let known: [(u64, u64, [u32; 8]); 4] = [
        (0, 0, [1, 4, 5, 2, 6, 3, 7, 0]),
        (0, 1, [2, 4, 6, 3, 0, 1, 5, 7]),
        (7, 0, [6, 3, 2, 4, 1, 0, 7, 5]),
        (u64::MAX, 1 << 40, [7, 6, 0, 2, 4, 5, 1, 3]),
    ];
    for (seed, epoch, want) in known {
        assert_eq!(order(seed, epoch), want, "seed {seed}, epoch {epoch}");
    }
    for (seed, epoch) in [(1, 0), (1, 1), (2, 0)] {
        let mut sorted = order(seed, epoch);
        assert_ne!(sorted, numbers(8));
        sorted.sort();
        assert_eq!(sorted, numbers(8));
    }
}

#[test]
fn reading_ahead_changes_no_batch_and_an_epoch_is_continued() {
    let of = |prefetch| plain(numbers(50)).batch_size(4).shuffle(9).prefetch(prefetch);
    for epoch in [0, 1, u64::MAX] {
        let want = all(of(0).iter(epoch));
        for prefetch in [1, 2, 20] {
            let loader = of(prefetch);
            assert_eq!(all(loader.iter(epoch)), want);
            for batch in 0..=want.len() {
                assert_eq!(all(loader.iter_from(epoch, batch)), want[batch..]);
            }
        }
    }
}

#[test]
#[should_panic(expected = "data: batch 4 of an epoch of 3")]
fn a_batch_behind_the_epoch_panics() {
    plain(numbers(7)).batch_size(3).iter_from(0, 4);
}

#[test]
#[should_panic(expected = "data: a batch of 0 items")]
fn batches_of_nothing_panic() {
    let _ = plain(numbers(7)).batch_size(0);
}

#[test]
#[should_panic(expected = "columns of [3, 2] items")]
fn columns_of_unequal_length_panic() {
    plain((vec![1, 2, 3], vec![1, 2])).iter(0);
}

/// Item 3 is an error and item 5 a panic.
struct Broken;

impl Dataset for Broken {
    type Item = usize;

    fn len(&self) -> usize {
        8
    }

    fn get(&self, index: usize) -> Result<usize> {
        match index {
            3 => Err(Error::format("item", "is broken")),
            5 => panic!("item {index} is worse"),
            _ => Ok(index),
        }
    }
}

#[test]
fn errors_and_panics_of_the_dataset_take_the_place_of_the_batch() {
    for prefetch in [0, 2] {
        let batches: Vec<_> = plain(Broken).batch_size(2).prefetch(prefetch).iter(0).collect();
        assert_eq!(batches.len(), 4);
        let kinds: Vec<_> =
            batches.iter().map(|batch| batch.as_ref().map_err(Error::kind).cloned()).collect();
        assert_eq!(kinds, [Ok(vec![0, 1]), Err(ErrorKind::Format), Err(ErrorKind::Config), Ok(vec![6, 7])]);
        let message = batches[2].as_ref().unwrap_err().to_string();
        assert!(message.contains("items 4 to 5") && message.contains("item 5 is worse"), "{message}");
        let collate = |_: Vec<u32>| -> Result<()> { panic!("no batch") };
        let loader = DataLoader::with_collate(numbers(1), collate).prefetch(prefetch);
        assert!(loader.iter(0).next().unwrap().unwrap_err().to_string().contains("no batch"));
    }
}

/// Tells of every item that is read, and waits for a permission before it is returned.
struct Gated {
    read: Mutex<Sender<usize>>,
    permit: Mutex<Receiver<()>>,
    alive: Arc<AtomicUsize>,
}

impl Gated {
    fn new() -> (Gated, Receiver<usize>, Sender<()>, Arc<AtomicUsize>) {
        let ((read, reads), (permits, permit)) = (channel(), channel());
        let alive = Arc::new(AtomicUsize::new(1));
        let gated = Gated { read: Mutex::new(read), permit: Mutex::new(permit), alive: alive.clone() };
        (gated, reads, permits, alive)
    }
}

impl Drop for Gated {
    fn drop(&mut self) {
        self.alive.store(0, Ordering::SeqCst);
    }
}

impl Dataset for Gated {
    type Item = usize;

    fn len(&self) -> usize {
        100
    }

    fn get(&self, index: usize) -> Result<usize> {
        // A test that has ended listens no more.
        let _ = self.read.lock().unwrap().send(index);
        let _ = self.permit.lock().unwrap().recv();
        Ok(index)
    }
}

/// Batches are made while nobody asks for them, and no more than the queue holds.
#[test]
fn batches_are_made_ahead_and_the_queue_is_bounded() {
    let (gated, reads, permits, _) = Gated::new();
    let mut batches = plain(gated).prefetch(3).iter(0);
    (0..100).for_each(|_| permits.send(()).unwrap());
    // Without one call of `next`, three batches of one item are made.
    let first: Vec<usize> = (0..3).map(|_| reads.recv_timeout(PATIENCE).expect("read ahead")).collect();
    assert_eq!(first, [0, 1, 2]);
    // The thread now waits. Should it not, it has all the time of this pause to read a fourth one.
    assert!(reads.recv_timeout(Duration::from_millis(200)).is_err(), "more than three batches wait");
    assert_eq!(batches.next().unwrap().unwrap(), [0]);
    assert_eq!(reads.recv_timeout(PATIENCE), Ok(3), "one batch was taken, so one more is made");
    assert!(reads.recv_timeout(Duration::from_millis(200)).is_err());
}

/// Waits until the dataset is dropped, which its thread holds as long as it runs.
fn ended(alive: &AtomicUsize) -> bool {
    let polls = PATIENCE.as_millis() / 5;
    (0..polls).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        alive.load(Ordering::SeqCst) == 0
    })
}

#[test]
fn the_thread_ends_when_nobody_waits_for_its_batches() {
    // Inside a batch: only the item that is being read is still awaited.
    let (gated, reads, permits, alive) = Gated::new();
    let loader = plain(gated).batch_size(50);
    let batches = loader.iter(0);
    assert_eq!(reads.recv_timeout(PATIENCE), Ok(0));
    drop((batches, loader));
    permits.send(()).unwrap();
    assert!(ended(&alive), "the thread reads on");
    assert!(reads.try_recv().is_err(), "another item was read");
    // In front of a full queue.
    let (gated, reads, permits, alive) = Gated::new();
    (0..100).for_each(|_| permits.send(()).unwrap());
    let loader = plain(gated).prefetch(1);
    let mut batches = loader.iter(0);
    assert_eq!(batches.next().unwrap().unwrap(), [0]);
    assert_eq!([0, 1].map(|_| reads.recv_timeout(PATIENCE).unwrap()), [0, 1]);
    drop((batches, loader));
    assert!(ended(&alive), "the thread waits for somebody to take its batch");
}

/// Several loaders and epochs share a dataset.
#[test]
fn a_dataset_is_shared() {
    let data = Arc::new(numbers(6));
    let (a, b) = (plain(data.clone()).batch_size(2), plain(data).batch_size(3));
    let (first, second) = (a.iter(0), a.iter(1));
    assert_eq!(all(b.iter(0)), [[0, 1, 2], [3, 4, 5]]);
    assert_eq!(all(first), all(second));
    assert_eq!(a.dataset().len(), 6);
}

#[test]
fn items_are_stacked() {
    let images = Rows::new((0..12).map(|i| i as f32).collect(), [3, 2, 2]);
    let half = half::f16::from_f32;
    let columns = (images, vec![[1u32, 2], [3, 4], [5, 6]], vec![7i32, 8, 9], vec![vec![half(1.0)]; 3]);
    let loader = DataLoader::new(gpu(), columns).batch_size(2);
    let batches = all(loader.iter(0));
    let (image, pairs, numbers, lists) = &batches[1];
    assert_eq!(image.shape()[..], [1, 2, 2]);
    assert_eq!(image.to_vec::<f32>().unwrap(), [8.0, 9.0, 10.0, 11.0]);
    assert_eq!(pairs.to_vec2::<u32>().unwrap(), [[5, 6]]);
    assert_eq!(numbers.to_vec::<i32>().unwrap(), [9]);
    assert_eq!(
        (lists.shape()[..].to_vec(), lists.to_vec::<half::f16>().unwrap()),
        (vec![1, 1], vec![half(1.0)])
    );
    assert_eq!(batches[0].0.shape()[..], [2, 2, 2]);
    let same = Rows::<f32>::from_tensor(&Tensor::from_slice(gpu(), &[1f32, 2.0], [2, 1])).unwrap();
    assert_eq!(same, Rows::new(vec![1.0, 2.0], [2, 1]));
    let message = |result: Result<Tensor>| result.unwrap_err().to_string();
    let rows = |shape: [usize; 2]| Row::new(vec![0f32; 4], shape);
    let unequal = message(Stack::stack(gpu(), vec![rows([2, 2]), rows([2, 2]), rows([4, 1])]));
    assert!(unequal.contains("item 2 of the batch has shape [4, 1], the first one has [2, 2]"), "{unequal}");
    assert!(
        message(Stack::stack(gpu(), vec![vec![1f32], vec![]])).contains("item 1 of the batch has shape [0]")
    );
    assert!(message(Stack::stack(gpu(), vec![Row::new(vec![1f32], [1; 6])])).contains("more than 6 axes"));
}

#[test]
#[should_panic(expected = "rows: 3 elements for shape [2, 2]")]
fn rows_of_another_size_panic() {
    Rows::new(vec![0f32; 3], [2, 2]);
}
