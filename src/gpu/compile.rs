//! Threads on which drivers compile kernels while the host goes on recording.
//!
//! They start with the first kernels and end with the last handle of the device. Where no thread can be started, or the
//! backend has no use for one, the caller compiles.

use super::driver_cache::DriverCache;
use super::lock;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// More threads than this gain little, because the longest kernel takes as long as all others on so many threads.
const MOST: usize = 4;
/// As much as a process's first thread has. naga and drivers walk through expressions by recursion.
const STACK: usize = 8 << 20;
/// After so long without a new kernel, what the driver has compiled is written to disk.
const QUIET: Duration = Duration::from_secs(2);

type Job = Box<dyn FnOnce() + Send>;

/// The threads of a device, and what its driver keeps of the kernels that they compiled.
pub(crate) struct Compiler {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The most threads. Without any, callers run their jobs.
    most: usize,
    /// How long to wait at the end for what a driver compiles, if there is a limit.
    limit: Option<Duration>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when a job arrives, when the threads are to end, and when one has ended.
    changed: Condvar,
    cache: Option<DriverCache>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads that have not ended.
    threads: usize,
    /// Threads that wait for a job.
    idle: usize,
    ended: bool,
    /// Whether a job was done since the driver's cache was last written.
    unsaved: bool,
}

impl Compiler {
    /// A compiler for a device of this backend.
    ///
    /// wgpu has one context of OpenGL for all threads. Each thread waits for it a few seconds and panics after that, so
    /// that threads which compile would take submits and allocations of others along. Nor would they gain anything.
    pub fn new(backend: wgpu::Backend, cache: Option<DriverCache>, limit: Option<Duration>) -> Compiler {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let most = if backend == wgpu::Backend::Gl { 0 } else { cores.min(MOST) };
        let shared = Arc::new(Shared { cache, ..Shared::default() });
        Compiler { shared, threads: Mutex::default(), most, limit }
    }

    /// The driver's cache of kernels, if it has one for us.
    pub fn cache(&self) -> Option<&DriverCache> {
        self.shared.cache.as_ref()
    }

    /// Runs a job on one of the threads, in the order of the calls. A job says itself when it is done.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = lock(&self.shared.state);
        state.jobs.push_back(Box::new(job));
        let all_busy = state.jobs.len() > state.idle;
        drop(state);
        if all_busy {
            self.start();
        }
        self.shared.changed.notify_one();
    }

    /// Starts a thread, unless there are enough. If there is none at all, the jobs run here.
    fn start(&self) {
        let mut threads = lock(&self.threads);
        if threads.len() < self.most {
            let shared = self.shared.clone();
            let builder = thread::Builder::new().name("tiebeam compiler".into()).stack_size(STACK);
            lock(&self.shared.state).threads += 1;
            match builder.spawn(move || shared.work()) {
                Ok(thread) => threads.push(thread),
                Err(why) => {
                    lock(&self.shared.state).threads -= 1;
                    tracing::debug!(%why, threads = threads.len(), "no further thread for kernels");
                }
            }
        }
        if threads.is_empty() {
            drop(self.shared.jobs(lock(&self.shared.state)));
        }
    }
}

impl Shared {
    /// Runs the jobs that are there.
    fn jobs<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while let Some(job) = state.jobs.pop_front() {
            drop(state);
            // A job reports its own panic. The others are still to be done.
            let _ = catch_unwind(AssertUnwindSafe(job));
            state = lock(&self.state);
            state.unsaved = self.cache.is_some();
        }
        state
    }

    /// Runs jobs until the device is gone.
    fn work(&self) {
        let mut state = lock(&self.state);
        while !state.ended {
            state = self.jobs(state);
            if state.ended {
                break;
            }
            state.idle += 1;
            let quiet;
            if state.unsaved {
                let woken = self.changed.wait_timeout(state, QUIET).unwrap_or_else(PoisonError::into_inner);
                (state, quiet) = (woken.0, woken.1.timed_out());
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                quiet = false;
            }
            // While another thread is at work, there will soon be more to write.
            let all_idle = state.idle == state.threads;
            state.idle -= 1;
            if quiet && all_idle && state.jobs.is_empty() && std::mem::take(&mut state.unsaved) {
                drop(state);
                self.save();
                state = lock(&self.state);
            }
        }
        state.threads -= 1;
        drop(state);
        self.changed.notify_all();
    }

    /// Writes the driver's cache. Like a job, it may end in a panic of the driver's layer.
    fn save(&self) {
        if let Some(cache) = &self.cache {
            let _ = catch_unwind(AssertUnwindSafe(|| cache.save()));
        }
    }

    /// Waits until all threads have ended, as long as `limit` allows. Returns whether they have.
    fn wait_for_the_end(&self, limit: Option<Duration>) -> bool {
        let state = lock(&self.state);
        let goes_on = |state: &mut State| state.threads > 0;
        let state = match limit {
            Some(limit) => {
                let waited = self.changed.wait_timeout_while(state, limit, goes_on);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.changed.wait_while(state, goes_on).unwrap_or_else(PoisonError::into_inner),
        };
        state.threads == 0
    }
}

impl Drop for Compiler {
    /// Ends the threads. Jobs that did not begin are left out: nobody is left to wait for them. A job that has begun is
    /// waited for, because a process must not end while a thread is inside its driver. If the driver hangs in it, the
    /// thread is left alone after a while.
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.ended = true;
        let left = std::mem::take(&mut state.jobs);
        drop(state);
        drop(left);
        self.shared.changed.notify_all();
        if !self.shared.wait_for_the_end(self.limit) {
            tracing::warn!("the driver still compiles a kernel; its thread is left alone");
            return;
        }
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            let _ = thread.join();
        }
        if lock(&self.shared.state).unsaved {
            self.shared.save();
        }
    }
}

#[cfg(test)]
impl super::Gpu {
    /// Keeps the compiler from beginning anything new until the sender is dropped. `None` if it has no threads.
    pub(crate) fn hold_compiler(&self) -> Option<std::sync::mpsc::Sender<()>> {
        let compiler = &self.0.compiler;
        let (sender, receiver) = std::sync::mpsc::channel();
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..compiler.most {
            let receiver = receiver.clone();
            compiler.run(move || {
                let _ = lock(&receiver).recv();
            });
        }
        (compiler.most > 0).then_some(sender)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn jobs_run_on_other_threads_until_the_end() {
        let compiler = Compiler::new(wgpu::Backend::Vulkan, None, None);
        let (sender, receiver) = channel();
        for i in 0..20 {
            let sender = sender.clone();
            compiler.run(move || {
                assert!(i != 3, "a job that panics, which takes no thread with it");
                sender.send((i, thread::current().id())).unwrap();
            });
        }
        let mut done: Vec<_> = (0..19).map(|_| receiver.recv().unwrap()).collect();
        assert!(done.iter().all(|(_, id)| *id != thread::current().id()));
        done.sort_by_key(|(i, _)| *i);
        assert_eq!(
            done.iter().map(|(i, _)| *i).collect::<Vec<_>>(),
            [&[0, 1, 2], &Vec::from_iter(4..20)[..]].concat()
        );
        assert!(lock(&compiler.threads).len() <= MOST);
        // One job that has begun on every thread, and one that nothing is left for.
        let (gate, closed) = channel::<()>();
        let closed = Arc::new(Mutex::new(closed));
        let begun = Arc::new(Mutex::new(0));
        for _ in 0..2 * MOST {
            let (closed, begun) = (closed.clone(), begun.clone());
            compiler.run(move || {
                *lock(&begun) += 1;
                let _ = lock(&closed).recv();
            });
        }
        while *lock(&begun) == 0 {
            thread::yield_now();
        }
        lock(&compiler.shared.state).jobs.clear();
        drop(gate);
        drop(compiler);
        assert!((1..=MOST).contains(&*lock(&begun)), "jobs that had not begun were left out");
    }

    #[test]
    fn without_threads_the_caller_runs_the_jobs() {
        let compiler = Compiler::new(wgpu::Backend::Gl, None, None);
        let done = Arc::new(Mutex::new(Vec::new()));
        for i in 0..3 {
            let of_job = done.clone();
            compiler.run(move || {
                lock(&of_job).push((i, thread::current().id()));
                assert!(i != 1, "a job that panics");
            });
            assert_eq!(lock(&done).last(), Some(&(i, thread::current().id())), "done at once");
        }
        assert!(lock(&compiler.threads).is_empty());
    }

    #[test]
    fn a_driver_that_hangs_does_not_keep_the_device() {
        let compiler = Compiler::new(wgpu::Backend::Vulkan, None, Some(Duration::from_millis(50)));
        let ((begun, has_begun), (gate, closed)) = (channel(), channel::<()>());
        compiler.run(move || {
            begun.send(()).unwrap();
            let _ = closed.recv();
        });
        has_begun.recv().unwrap();
        let shared = compiler.shared.clone();
        drop(compiler);
        assert_eq!(lock(&shared.state).threads, 1, "left alone");
        drop(gate);
        assert!(shared.wait_for_the_end(None));
    }
}
