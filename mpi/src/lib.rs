//! Tiebeam on many machines, over the MPI that a cluster has.
//!
//! [`World`] is this process among those that `mpirun` has started. It implements [`Ranks`], which is what the library trains, measures and
//! merges with: see [`Trainer::ranks`](tiebeam::train::Trainer::ranks) and [`Training::ranks`](tiebeam::language::Training::ranks).
//!
//! ```no_run
//! use std::process::ExitCode;
//! use tiebeam::optim::{Group, Sgd, SgdConfig};
//! use tiebeam::ranks::Ranks;
//! use tiebeam::{Gpu, Options, Tensor};
//!
//! fn main() -> ExitCode {
//!     tiebeam_mpi::run(|world| {
//!         let adapter = Gpu::adapter_of(world.local(), &Options::default())?;
//!         let gpu = Gpu::open_with(Options::default().adapter(Some(adapter.index.to_string())))?;
//!         let w = Tensor::from_slice(&gpu, &[1f32, 2.0], [2]).requires_grad();
//!         let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default())?;
//!         let mean = 1.0 / world.size() as f32;
//!         let mut grads = w.scale(world.rank() as f32).sum_all().scale(mean).backward()?;
//!         world.all_reduce(&mut grads)?; // the same bits on every rank
//!         sgd.step(&grads, 0.1)?;
//!         Ok(())
//!     })
//! }
//! ```
//!
//! # Sums
//!
//! MPI leaves the order of a reduction to the library, which chooses by size, version and network. [`World`] sums in the order of the ranks
//! instead: an all-to-all of chunks, the sum of each chunk on one rank, an all-gather. The bytes are those of a ring. So a run has the same
//! bits on any MPI, for the same number of ranks.
//!
//! # Failure
//!
//! MPI ends all processes when one dies. One that only returns would wait in `MPI_Finalize` for the others, and they for it; so a program's
//! `main` is [`run`], which ends the job when a rank returns an error that the others do not know of. A rank that panics ends it too. What
//! fails in an exchange of the library fails on all ranks, and is said once.

mod sum;

use mpi::collective::CommunicatorCollectives;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::point_to_point::{Destination, Source};
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Root};
use mpi::{Count, Threading};
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tiebeam::error::ErrorKind;
use tiebeam::ranks::Ranks;
use tiebeam::{Error, Grads, Result};

/// The most bytes of one message. MPI counts elements in 31 bits.
const MOST: usize = 1 << 30;
/// Bytes of a small message, which takes one exchange.
const SMALL: usize = 256;

/// This process among those of an MPI job. One is made in a process, and the last [`Arc`] of it is to be dropped on the thread that made it,
/// since that ends MPI.
pub struct World {
    inner: Mutex<Inner>,
    rank: usize,
    size: usize,
    local: usize,
    /// Whether the last exchange told every rank of a failure.
    all_failed: AtomicBool,
}

struct Inner {
    comm: SimpleCommunicator,
    /// What arrives in a sum.
    room: Vec<f32>,
    /// Ends MPI when it is dropped.
    _universe: Universe,
}

// SAFETY: MPI was initialised with `MPI_THREAD_SERIALIZED` or more, and every call is made under the lock of `World::inner`.
unsafe impl Send for Inner {}

/// Whether this process is a rank among others, for the hook of panics.
static AMONG_OTHERS: OnceLock<()> = OnceLock::new();

/// Runs a program on this rank of the job, and returns the exit status: the `main` of a program of many ranks.
///
/// When `work` fails, [`World::failed`] says so and, if the others do not know of it, ends the job.
pub fn run(work: impl FnOnce(Arc<World>) -> Result<()>) -> ExitCode {
    let world = match World::init() {
        Ok(world) => world,
        Err(error) => {
            say(&format!("error: {error}\n"));
            return ExitCode::FAILURE;
        }
    };
    match work(world.clone()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => world.failed(&error),
    }
}

/// Writes to stderr. `eprint` would panic if it is closed.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Ends the processes of all ranks. It waits for no lock, since another thread may be in an exchange that never ends.
fn end_all(status: u8) -> ! {
    // SAFETY: only called when MPI was initialised, and the call ends the process.
    unsafe { mpi::ffi::MPI_Abort(mpi::ffi::RSMPI_COMM_WORLD, status.into()) };
    std::process::exit(status.into())
}

impl World {
    /// Joins the job. A process that `mpirun` has not started is one rank by itself.
    ///
    /// # Errors
    /// [`Error::Config`] when a world was made before, when the MPI library does not let threads take turns in calling it
    /// (`MPI_THREAD_SERIALIZED`), or when it sees one rank where another MPI's `mpirun`, or Slurm, has started several.
    pub fn init() -> Result<Arc<World>> {
        let (universe, threading) =
            mpi::initialize_with_threading(Threading::Serialized).ok_or_else(|| {
                Error::config("MPI: a world was made before in this process; make one and share it")
            })?;
        if threading < Threading::Serialized {
            return Err(Error::config(format!(
                "MPI: this library lets only one thread call it ({threading:?}), and Tiebeam needs MPI_THREAD_SERIALIZED; use an MPI that \
                 was built with threads"
            )));
        }
        let comm = universe.world();
        let (rank, size) = (comm.rank() as usize, comm.size() as usize);
        if let Some(started) = started().filter(|&started| size == 1 && started > 1) {
            return Err(Error::config(format!(
                "MPI: this process was started as one of {started}, and the MPI library takes it for the only one: mpirun or srun is of \
                 another MPI than this program. `mpirun --version` and `ldd` of the program tell which; under Slurm, `srun --mpi=list` and \
                 SLURM_MPI_TYPE"
            )));
        }
        let local = comm.split_shared(comm.rank()).rank() as usize;
        if size > 1 && AMONG_OTHERS.set(()).is_ok() {
            abort_on_panic(rank);
        }
        let inner = Mutex::new(Inner { comm, room: Vec::new(), _universe: universe });
        Ok(Arc::new(World { inner, rank, size, local, all_failed: AtomicBool::new(false) }))
    }

    /// Replaces every gradient by its sum over the ranks: [`Grads::all_reduce`].
    ///
    /// # Errors
    /// As [`Grads::all_reduce`].
    pub fn all_reduce(&self, grads: &mut Grads) -> Result<()> {
        grads.all_reduce(self)
    }

    /// Sums over the ranks as the MPI library adds them, in an order of its choice. It is here to be compared with [`Ranks::sum`].
    ///
    /// # Panics
    /// When there are not as many sums as numbers.
    pub fn library_sum(&self, numbers: &[f32], sums: &mut [f32]) {
        assert!(numbers.len() == sums.len(), "library_sum: {} sums of {} numbers", sums.len(), numbers.len());
        self.enter().comm.all_reduce_into(numbers, sums, mpi::collective::SystemOperation::sum());
    }

    /// Waits until all ranks are here.
    pub fn barrier(&self) {
        self.enter().comm.barrier();
    }

    /// Ends the processes of all ranks.
    pub fn abort(&self, status: u8) -> ! {
        end_all(status)
    }

    /// Says an error, and returns the exit status of this process: 130 for [`Error::Stopped`], else 1. An error that all ranks know of is
    /// said by rank 0 alone. One that only this rank knows of ends the processes of all.
    pub fn failed(&self, error: &Error) -> ExitCode {
        let status = if error.kind() == ErrorKind::Stopped { 130 } else { 1 };
        let (is_known, text) = (self.all_failed.load(Ordering::SeqCst), error.to_string());
        match self.rank {
            0 if is_known || self.size == 1 => say(&format!("error: {text}\n")),
            _ if is_known => {}
            // What another rank has told has its number.
            _ if text.starts_with("rank ") => say(&format!("error: {text}\n")),
            rank => say(&format!("error: rank {rank}: {text}\n")),
        }
        if self.size > 1 && !is_known {
            self.abort(status);
        }
        ExitCode::from(status)
    }

    fn enter(&self) -> std::sync::MutexGuard<'_, Inner> {
        // What is known of an earlier failure does not hold for what comes.
        self.all_failed.store(false, Ordering::SeqCst);
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many processes mpirun has started, by what Open MPI and MPICH set, or else Slurm. Under mpirun, Slurm's number is of its daemons.
fn started() -> Option<usize> {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    number("OMPI_COMM_WORLD_SIZE").or_else(|| number("PMI_SIZE")).or_else(|| number("SLURM_STEP_NUM_TASKS"))
}

/// After the message of a panic, ends all ranks: they would wait for this one for ever.
fn abort_on_panic(rank: usize) {
    let shown = std::panic::take_hook();
    let main = std::thread::current().id();
    std::panic::set_hook(Box::new(move |info| {
        shown(info);
        // A thread that a caller watches may panic without ending the program.
        if std::thread::current().id() == main {
            say(&format!("error: rank {rank} panicked; all ranks end\n"));
            end_all(101);
        }
    }));
}

fn count(n: usize) -> Count {
    Count::try_from(n).expect("messages are cut to fit")
}

/// Where each of these many things begins, if they follow each other.
fn starts(counts: &[Count]) -> Vec<Count> {
    let mut at = 0;
    let mut place = |n: &Count| {
        at += n;
        at - n
    };
    counts.iter().map(&mut place).collect()
}

impl Inner {
    /// Every rank's bytes on every rank.
    fn gather(&mut self, bytes: &[u8], size: usize) -> Result<Vec<Vec<u8>>> {
        // The length and the beginning of all messages travel together. Most are no longer.
        let mut own = [0u8; SMALL];
        own[..8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        let head = bytes.len().min(SMALL - 8);
        own[8..8 + head].copy_from_slice(&bytes[..head]);
        let mut all = vec![0u8; SMALL * size];
        self.comm.all_gather_into(&own[..], &mut all[..]);
        let heads: Vec<&[u8; SMALL]> = all.as_chunks::<SMALL>().0.iter().collect();
        let length = |head: &[u8; SMALL]| u64::from_le_bytes(head[..8].try_into().expect("8 bytes")) as usize;
        let lengths: Vec<usize> = heads.iter().map(|head| length(head)).collect();
        let mut found: Vec<Vec<u8>> =
            heads.iter().zip(&lengths).map(|(head, &n)| head[8..8 + n.min(SMALL - 8)].to_vec()).collect();
        let rest: Vec<usize> = lengths.iter().map(|n| n.saturating_sub(SMALL - 8)).collect();
        if rest.iter().sum::<usize>() > MOST {
            return Err(Error::config("MPI: the ranks tell each other more than 1 GiB at once"));
        }
        if rest.iter().any(|&n| n > 0) {
            let counts: Vec<Count> = rest.iter().map(|&n| count(n)).collect();
            let mut more = vec![0u8; rest.iter().sum()];
            let mut parts = PartitionMut::new(&mut more[..], &counts[..], starts(&counts));
            self.comm.all_gather_varcount_into(&bytes[head..], &mut parts);
            let mut at = 0;
            for (bytes, &n) in found.iter_mut().zip(&rest) {
                bytes.extend_from_slice(&more[at..at + n]);
                at += n;
            }
        }
        Ok(found)
    }

    fn send(&self, bytes: &[u8]) {
        let root = self.comm.process_at_rank(0);
        root.send(&[bytes.len() as u64][..]);
        bytes.chunks(MOST).for_each(|part| root.send(part));
    }

    fn receive(&self, from: usize) -> Vec<u8> {
        let from = self.comm.process_at_rank(count(from));
        let mut length = [0u64];
        from.receive_into(&mut length[..]);
        let mut bytes = vec![0u8; length[0] as usize];
        for part in bytes.chunks_mut(MOST) {
            from.receive_into(part);
        }
        bytes
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let root = self.comm.process_at_rank(0);
        let mut length = [bytes.len() as u64];
        root.broadcast_into(&mut length[..]);
        bytes.resize(length[0] as usize, 0);
        bytes.chunks_mut(MOST).for_each(|part| root.broadcast_into(part));
    }
}

impl Ranks for World {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local(&self) -> usize {
        self.local
    }

    fn all_failed(&self) {
        self.all_failed.store(true, Ordering::SeqCst);
    }

    fn sum(&self, numbers: &mut [f32]) -> Result<()> {
        let mut inner = self.enter();
        let Inner { comm, room, .. } = &mut *inner;
        sum::in_order(comm, numbers, room);
        Ok(())
    }

    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        // All ranks see the same lengths.
        self.enter().gather(bytes, self.size).inspect_err(|_| self.all_failed())
    }

    fn gather_equal(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        if bytes.len() > MOST / self.size {
            return Ok(self.gather(bytes)?.concat());
        }
        let mut all = vec![0; bytes.len() * self.size];
        self.enter().comm.all_gather_into(bytes, &mut all[..]);
        Ok(all)
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        self.enter().send(bytes);
        Ok(())
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        Ok(self.enter().receive(from))
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) -> Result<()> {
        self.enter().broadcast(bytes);
        Ok(())
    }
}
