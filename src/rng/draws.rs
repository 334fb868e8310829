//! Generators that recorded steps draw from.
//!
//! A replay draws what the step's code would draw if it ran again: from each generator as it is then. For that a recording
//! notes on its thread which generators are drawn from, which are copies of others made on the way, and which begin in the
//! recorded code itself and so give the same streams in every run.

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

    /// A generator that begins at a state.
    pub fn begin(state: [u64; 2]) -> Arc<Counter> {
        let counter = Counter::new(state);
        recording(|notes| notes.origins.insert(counter.number, Origin::Here));
        counter
    }

    /// Another generator at the same state, independent from here on.
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

    /// Takes the number of the next draw, with the seed.
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
    /// At a generator from before the recording, by its place among the roots.
    Root(usize),
    /// In the recorded code.
    Here,
}

/// A generator from before the recording.
struct Root {
    counter: Arc<Counter>,
    /// Draws before the step's first.
    first: u64,
    /// Draws of one run: up to its last, where other threads draw in between.
    count: u64,
}

/// What a step draws from random generators.
#[derive(Default)]
pub(crate) struct Drawn {
    roots: Vec<Root>,
    origins: HashMap<u64, Origin>,
}

impl Drawn {
    /// Where the draws of a generator begin that is at draw `now`.
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

    /// Takes from every generator what one more run takes.
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

/// How far the streams of a replay are from the recorded ones.
pub(crate) struct Shifts<'a> {
    drawn: &'a Drawn,
    /// The seed now, and the draws since the recorded run.
    roots: Vec<(u64, u64)>,
}

impl Shifts<'_> {
    /// The stream that stands for the recorded draw `id` of this generator; `None` where every run draws the same, as from a seed
    /// in the code, or what was drawn before it, such as the mask of a graph from outside.
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

/// Notes what this thread draws from here on.
pub(crate) fn draw_from_here() {
    NOTES.set(Some(Drawn::default()));
}

/// Ends the notes.
pub(crate) fn drawn() -> Drawn {
    NOTES.take().unwrap_or_default()
}
