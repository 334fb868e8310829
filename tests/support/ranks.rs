//! Ranks that are threads of one process, which share a device: what a training on several ranks does, without MPI.

use std::any::Any;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use tiebeam::Result;
use tiebeam::ranks::Ranks;

/// One thread among others.
pub struct Thread {
    rank: usize,
    all: Arc<All>,
}

struct All {
    barrier: Barrier,
    slots: Mutex<Vec<Vec<u8>>>,
    /// What each rank gives to rank 0.
    mail: Vec<Mail>,
}

type Mail = (Sender<Vec<u8>>, Mutex<Receiver<Vec<u8>>>);

impl Thread {
    /// What every rank puts in.
    fn exchange(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.all.slots.lock().unwrap()[self.rank] = bytes.to_vec();
        self.all.barrier.wait();
        let all = self.all.slots.lock().unwrap().clone();
        // Nobody puts something new in before all have read.
        self.all.barrier.wait();
        all
    }
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.all.slots.lock().unwrap().len()
    }
    fn sum(&self, numbers: &mut [f32]) -> Result<()> {
        let all = self.exchange(bytemuck::cast_slice(numbers));
        let all: Vec<Vec<f32>> = all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect();
        for (i, number) in numbers.iter_mut().enumerate() {
            *number = all[1..].iter().fold(all[0][i], |sum, other| sum + other[i]);
        }
        Ok(())
    }
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.exchange(bytes))
    }
    fn send(&self, bytes: &[u8]) -> Result<()> {
        self.all.mail[self.rank].0.send(bytes.to_vec()).unwrap();
        Ok(())
    }
    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        Ok(self.all.mail[from].1.lock().unwrap().recv().unwrap())
    }
    fn broadcast(&self, bytes: &mut Vec<u8>) -> Result<()> {
        *bytes = self.exchange(bytes).swap_remove(0);
        Ok(())
    }
}

/// A rank that notes how many numbers each of its sums has, and how many bytes each message of one length.
pub struct Noting {
    ranks: Arc<dyn Ranks>,
    pub sums: Mutex<Vec<usize>>,
    pub equal: Mutex<Vec<usize>>,
}

impl Noting {
    pub fn new(ranks: Arc<dyn Ranks>) -> Arc<Noting> {
        Arc::new(Noting { ranks, sums: Mutex::default(), equal: Mutex::default() })
    }
}

impl Ranks for Noting {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }
    fn size(&self) -> usize {
        self.ranks.size()
    }
    fn sum(&self, numbers: &mut [f32]) -> Result<()> {
        self.sums.lock().unwrap().push(numbers.len());
        self.ranks.sum(numbers)
    }
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.ranks.gather(bytes)
    }
    fn gather_equal(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        self.equal.lock().unwrap().push(bytes.len());
        self.ranks.gather_equal(bytes)
    }
    fn send(&self, bytes: &[u8]) -> Result<()> {
        self.ranks.send(bytes)
    }
    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        self.ranks.receive(from)
    }
    fn broadcast(&self, bytes: &mut Vec<u8>) -> Result<()> {
        self.ranks.broadcast(bytes)
    }
}

/// Runs `work` on so many ranks at once. Returns what each has found, in their order.
pub fn on_ranks<T: Send>(size: usize, work: impl Fn(Arc<dyn Ranks>) -> T + Sync) -> Vec<T> {
    let mail = (0..size).map(|_| channel()).map(|(to, from)| (to, Mutex::new(from))).collect();
    let slots = Mutex::new(vec![Vec::new(); size]);
    let all = Arc::new(All { barrier: Barrier::new(size), slots, mail });
    std::thread::scope(|scope| {
        let start = |rank| {
            let (ranks, work) = (Arc::new(Thread { rank, all: all.clone() }), &work);
            scope.spawn(move || {
                catch_unwind(AssertUnwindSafe(|| work(ranks))).unwrap_or_else(|panic| end(rank, &*panic))
            })
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("panics are caught")).collect()
    })
}

/// The other ranks would wait for one that has panicked, for ever.
fn end(rank: usize, panic: &dyn Any) -> ! {
    let text = panic.downcast_ref::<String>().map_or("no text", String::as_str);
    // Not `eprint`, which tests catch.
    let _ = std::io::stderr().write_all(format!("rank {rank} of a test panicked: {text}\n").as_bytes());
    std::process::exit(101)
}
