//! Values: elements at a place in memory, or a pending expression over other values.
//!
//! A value belongs to the recorded step in whose code it was made, or to none. What is pending outside a step is computed
//! outside of it, whoever asks; what is pending in a step's code is computed by a kernel of that step, even where another
//! thread had to compute it ahead, because it was about to change what the expression reads.

pub mod fuse;
pub(super) mod text;

use super::buffer::Buffer;
use super::kernel::Part;
use super::{Gpu, lock, recording};
use crate::dtype::DType;
use crate::error::Error;
use fuse::Expr;
use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

/// Where a value's elements lie.
#[derive(Clone)]
pub(crate) struct Place {
    pub buffer: Arc<Buffer>,
    /// In bytes; a multiple of every adapter's binding alignment.
    pub offset: u64,
}

impl Place {
    /// `size` bytes from here on, for a kernel.
    pub fn part(&self, size: u64) -> Part {
        Part { buffer: self.buffer.clone(), offset: self.offset, size }
    }

    fn is(&self, other: &Place) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer) && self.offset == other.offset
    }
}

/// `count` elements in row-major order, computed or still to be.
pub(crate) struct Value {
    pub gpu: Gpu,
    pub dtype: DType,
    pub count: usize,
    /// The step in whose code it was made, 0 for none.
    pub recording: u64,
    state: Mutex<State>,
}

enum State {
    /// With the buffer's count of writes from which changes of these elements are counted.
    Ready(Place, u64),
    Pending(Arc<Expr>),
    /// Computed by another thread while the step of this value is recorded, whose kernel is still to come.
    Ahead(Place, Arc<Expr>),
}

impl State {
    /// Elements just written.
    fn made(place: Place) -> State {
        let writes = place.buffer.version.load(Relaxed);
        State::Ready(place, writes)
    }
}

impl Value {
    pub fn ready(gpu: &Gpu, dtype: DType, count: usize, place: Place) -> Arc<Value> {
        let recording = recording::number(gpu);
        Arc::new(Value { gpu: gpu.clone(), dtype, count, recording, state: Mutex::new(State::made(place)) })
    }

    /// The value of an elementwise operation, computed later.
    pub fn later(gpu: &Gpu, dtype: DType, expr: Expr) -> Arc<Value> {
        let value = Arc::new(Value::of(gpu, dtype, &Arc::new(expr)));
        lock(&gpu.0.pending).push(&value);
        value
    }

    fn of(gpu: &Gpu, dtype: DType, expr: &Arc<Expr>) -> Value {
        let (recording, count) = (recording::number(gpu), expr.shape().count());
        Value { gpu: gpu.clone(), dtype, count, recording, state: Mutex::new(State::Pending(expr.clone())) }
    }

    /// Writes the elements of an elementwise operation to `place`, or adds them to what is there. No other thread meets the
    /// operation.
    pub fn write(gpu: &Gpu, dtype: DType, expr: Expr, place: &Place, accumulate: bool) {
        let expr = Arc::new(expr);
        expr.run(&Value::of(gpu, dtype, &expr), place, accumulate);
    }

    /// Whether this thread runs the code in which the value was made.
    fn is_here(&self) -> bool {
        recording::number(&self.gpu) == self.recording
    }

    /// The place of this value's elements, computing them now if they are pending.
    pub fn place(&self) -> Place {
        let mut state = lock(&self.state);
        let expr = match &*state {
            State::Pending(expr) => expr.clone(),
            State::Ahead(_, expr) if self.is_here() => expr.clone(),
            State::Ready(place, _) | State::Ahead(place, _) => return place.clone(),
        };
        let compute = || {
            let buffer = self.gpu.alloc(expr.op(), self.dtype.buffer_bytes(self.count));
            let place = Place { buffer, offset: 0 };
            expr.run(self, &place, false);
            place
        };
        let place = if self.is_here() { compute() } else { recording::aside(compute) };
        *state = self.computed_as(&state, place.clone(), expr);
        place
    }

    /// What this value's state becomes, now that its elements were written at `place`.
    fn computed_as(&self, old: &State, place: Place, expr: Arc<Expr>) -> State {
        match old {
            // The kernel just launched is what replays need; this run keeps the elements from before the change.
            State::Ahead(ahead, _) if self.is_here() => {
                self.gpu.copy(ahead, &place, self.dtype.buffer_bytes(self.count));
                State::made(place)
            }
            _ if !self.is_here() && self.gpu.is_recording(self.recording) => State::Ahead(place, expr),
            _ => State::made(place),
        }
    }

    /// Takes the elements that another expression's kernel has written at `place`, unless it has some since.
    pub(super) fn store(&self, place: Place) {
        let mut state = lock(&self.state);
        if let State::Pending(expr) = &*state {
            *state = self.computed_as(&state, place, expr.clone());
        }
    }

    /// Moves the elements to `place`: every tensor that shares them follows.
    pub fn move_to(&self, place: &Place) {
        loop {
            let old = self.place();
            let mut state = lock(&self.state);
            // Another thread may have moved them between the two lines above.
            let made = match &*state {
                State::Ready(now, made) if now.is(&old) => *made,
                State::Ahead(now, _) if now.is(&old) => old.buffer.version.load(Relaxed),
                _ => continue,
            };
            if old.is(place) {
                return;
            }
            self.gpu.copy(&old, place, self.dtype.buffer_bytes(self.count));
            let changes = old.buffer.version.load(Relaxed).wrapping_sub(made);
            old.buffer.leave();
            *state = State::Ready(place.clone(), place.buffer.version.load(Relaxed).wrapping_sub(changes));
            return;
        }
    }

    /// The elements' place if, for this thread, they are computed already.
    pub fn computed(&self) -> Option<Place> {
        match &*lock(&self.state) {
            State::Ready(place, _) => Some(place.clone()),
            State::Ahead(place, _) if !self.is_here() => Some(place.clone()),
            State::Pending(_) | State::Ahead(..) => None,
        }
    }

    /// Whether there is nothing to compute any more, on any thread.
    pub(super) fn is_settled(&self) -> bool {
        let mut state = lock(&self.state);
        // A recording that is over asks for no kernel any more.
        if let State::Ahead(place, _) = &*state
            && !self.gpu.is_recording(self.recording)
        {
            *state = State::made(place.clone());
        }
        matches!(&*state, State::Ready(..))
    }

    /// How often the elements were changed in place since they were made; what is pending was not.
    pub fn changes(&self) -> u64 {
        match &*lock(&self.state) {
            State::Ready(place, made) => place.buffer.version.load(Relaxed).wrapping_sub(*made),
            State::Pending(_) | State::Ahead(..) => 0,
        }
    }

    /// The error that the elements carry or would carry once computed: that of what they are made of. Computes nothing.
    pub fn error(&self) -> Option<Error> {
        let own = || self.gpu.fits(self.pending()?.op(), self.dtype.buffer_bytes(self.count)).err();
        self.operands_error(&mut HashSet::new()).or_else(own)
    }

    /// The first error among what this is made of, through pending values, each of which is looked at once.
    fn operands_error(&self, seen: &mut HashSet<*const Value>) -> Option<Error> {
        let expr = match &*lock(&self.state) {
            State::Ready(place, _) | State::Ahead(place, _) => return place.buffer.data().err(),
            State::Pending(expr) => expr.clone(),
        };
        let mut operands = expr.operands();
        operands.find_map(|value| seen.insert(Arc::as_ptr(value)).then(|| value.operands_error(seen))?)
    }

    /// The values that, for this thread, this one will be computed from; `None` once it is.
    pub(super) fn operands(&self) -> Option<Vec<Arc<Value>>> {
        Some(self.expr()?.operands().cloned().collect())
    }

    /// What this thread would compute the elements by.
    pub(super) fn expr(&self) -> Option<Arc<Expr>> {
        match &*lock(&self.state) {
            State::Pending(expr) => Some(expr.clone()),
            State::Ahead(_, expr) if self.is_here() => Some(expr.clone()),
            State::Ready(..) | State::Ahead(..) => None,
        }
    }

    /// What the elements will be computed by, where nobody has computed them yet: another kernel may take it up.
    pub(super) fn pending(&self) -> Option<Arc<Expr>> {
        match &*lock(&self.state) {
            State::Pending(expr) => Some(expr.clone()),
            State::Ready(..) | State::Ahead(..) => None,
        }
    }
}
