//! Threads on which drivers compile kernels while the host goes on recording.
//!
//! They start with the first kernels and end with the last handle of the device. Where no thread can be started, as on
//! wasm, the caller compiles.

use super::driver_cache::DriverCache;
use super::lock;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
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
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when a job arrives or the threads are to end.
    changed: Condvar,
    cache: Option<DriverCache>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads that wait for a job.
    idle: usize,
    ended: bool,
    /// Whether a job was done since the driver's cache was last written.
    unsaved: bool,
}

impl Compiler {
    pub fn new(cache: Option<DriverCache>) -> Compiler {
        let shared = Arc::new(Shared { cache, ..Shared::default() });
        Compiler { shared, threads: Mutex::default() }
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

    /// Starts a thread, unless there are enough.
    fn start(&self) {
        let mut threads = lock(&self.threads);
        if threads.len() >= thread::available_parallelism().map_or(1, usize::from).min(MOST) {
            return;
        }
        let shared = self.shared.clone();
        let builder = thread::Builder::new().name("tiebeam compiler".into()).stack_size(STACK);
        match builder.spawn(move || shared.work()) {
            Ok(thread) => threads.push(thread),
            Err(why) if threads.is_empty() => {
                tracing::debug!(%why, "no threads; kernels are compiled in place");
                while let Some(job) = self.shared.next_job() {
                    job();
                }
            }
            Err(why) => tracing::debug!(%why, "no further thread"),
        }
    }
}

impl Shared {
    fn next_job(&self) -> Option<Job> {
        lock(&self.state).jobs.pop_front()
    }

    /// Runs jobs until the device is gone.
    fn work(&self) {
        let mut state = lock(&self.state);
        while !state.ended {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A job reports its own panic. This thread goes on with the others.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = lock(&self.state);
                state.unsaved = self.cache.is_some();
                continue;
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
            state.idle -= 1;
            if quiet && state.jobs.is_empty() && std::mem::take(&mut state.unsaved) {
                drop(state);
                self.save();
                state = lock(&self.state);
            }
        }
    }

    fn save(&self) {
        if let Some(cache) = &self.cache {
            cache.save();
        }
    }
}

impl Drop for Compiler {
    /// Ends the threads. Jobs that did not begin are left out: nobody is left to wait for them. A job that has begun is
    /// waited for, because a process must not end while a thread is inside its driver.
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.ended = true;
        let left = std::mem::take(&mut state.jobs);
        drop(state);
        drop(left);
        self.shared.changed.notify_all();
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            let _ = thread.join();
        }
        if lock(&self.shared.state).unsaved {
            self.shared.save();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn jobs_run_on_other_threads_until_the_end() {
        let compiler = Compiler::new(None);
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
}
