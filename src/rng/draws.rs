//! Generators that recorded steps draw from.
//!
//! A replay draws what the step's code would draw if it ran again, from each generator in its present state. For this,
//! a recording notes on its thread which generators are drawn from, which are copies of others made in the recorded
//! code, and which are made in the recorded code from a seed, and so give the same streams in every run.

use super::Stream;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The seed of a generator and its count of draws, which recorded steps share with the host.
pub(super) struct Counter {
    pub number: u64,
    state: Mutex<[u64; 2]>,
}

impl Counter {
    fn new(state: [u64; 2]) -> Arc<Counter> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Counter { number: NEXT.fetch_add(1, Ordering::Relaxed), state: Mutex::new(state) })
    }

    /// Makes a generator that begins at a state.
    pub fn begin(state: [u64; 2]) -> Arc<Counter> {
        let counter = Counter::new(state);
        recording(|notes| notes.origins.insert(counter.number, Origin::Here));
        counter
    }

    /// Makes another generator at the same state, which is independent from here on.
    pub fn copy(self: &Arc<Counter>) -> Arc<Counter> {
        let copy = Counter::new(self.state());
        recording(|notes| {
            let origin = notes.origin(self, copy.state()[1]);
            notes.origins.insert(copy.number, origin)
        });
        copy
    }

    pub fn state(&self) -> [u64; 2] {
        *self.lock()
    }

    pub fn set(&self, state: [u64; 2]) {
        *self.lock() = state;
    }

    /// Takes the number of the next draw, and returns it with the seed.
    pub fn next(self: &Arc<Counter>) -> [u64; 2] {
        let mut state = self.lock();
        let now = *state;
        state[1] = now[1].wrapping_add(1);
        drop(state);
        recording(|notes| notes.draw(self, now[1]));
        now
    }

    fn lock(&self) -> MutexGuard<'_, [u64; 2]> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a generator's draws begin.
#[derive(Clone, Copy)]
enum Origin {
    /// At a generator that was made before the recording, given by its index among the roots.
    Root(usize),
    /// In the recorded code.
    Here,
}

/// A generator that was made before the recording.
struct Root {
    counter: Arc<Counter>,
    /// The number of the step's first draw.
    first: u64,
    /// The number of draws in one run, up to the step's last one, including those of other threads in between.
    count: u64,
}

/// The draws of a step from random generators.
#[derive(Default)]
pub(crate) struct Drawn {
    roots: Vec<Root>,
    origins: HashMap<u64, Origin>,
}

impl Drawn {
    /// Returns the origin of a generator whose next draw has the number `now`.
    fn origin(&mut self, counter: &Arc<Counter>, now: u64) -> Origin {
        *self.origins.entry(counter.number).or_insert_with(|| {
            self.roots.push(Root { counter: counter.clone(), first: now, count: 0 });
            Origin::Root(self.roots.len() - 1)
        })
    }

    /// Notes that draw `id` was taken.
    fn draw(&mut self, counter: &Arc<Counter>, id: u64) {
        if let Origin::Root(root) = self.origin(counter, id)
            && let root = &mut self.roots[root]
            && root.counter.number == counter.number
        {
            root.count = id.wrapping_sub(root.first).wrapping_add(1);
        }
    }

    /// Advances every generator by the draws of one more run.
    pub fn again(&self) -> Shifts<'_> {
        let take = |root: &Root| {
            let mut state = root.counter.lock();
            let now = *state;
            state[1] = now[1].wrapping_add(root.count);
            (now[0], now[1].wrapping_sub(root.first))
        };
        Shifts { drawn: self, roots: self.roots.iter().map(take).collect() }
    }
}

/// How far the streams of a replay are ahead of the recorded ones.
pub(crate) struct Shifts<'a> {
    drawn: &'a Drawn,
    /// For each root: its present seed, and by how many draws it is ahead of the recorded run.
    roots: Vec<(u64, u64)>,
}

impl Shifts<'_> {
    /// Returns the stream that replaces the recorded draw `id` of this generator. `None` if every run uses the same
    /// stream: the generator is made from a seed in the recorded code, or the draw was made before the recording, as
    /// for the mask of a graph from outside.
    pub fn stream(&self, generator: u64, id: u64) -> Option<Stream> {
        let Some(&Origin::Root(root)) = self.drawn.origins.get(&generator) else { return None };
        let (seed, shift) = self.roots[root];
        (id >= self.drawn.roots[root].first).then(|| Stream::numbered(seed, id.wrapping_add(shift)))
    }
}

thread_local! {
    static NOTES: RefCell<Option<Drawn>> = const { RefCell::new(None) };
}

fn recording<T>(note: impl FnOnce(&mut Drawn) -> T) -> Option<T> {
    NOTES.with_borrow_mut(|notes| notes.as_mut().map(note))
}

/// Whether this thread records a step.
pub(super) fn is_recording() -> bool {
    NOTES.with_borrow(Option::is_some)
}

/// Begins to note the draws of this thread.
pub(crate) fn draw_from_here() {
    NOTES.set(Some(Drawn::default()));
}

/// Ends the notes and returns them.
pub(crate) fn drawn() -> Drawn {
    NOTES.take().unwrap_or_default()
}
