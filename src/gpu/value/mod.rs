//! Values: a value is either elements at a place in memory, or a pending expression over other values.
//!
//! A value belongs to the recorded step in whose code it was made, or to none. A pending value of no step is computed
//! outside of steps, even if a step's code needs it. A pending value of a step is computed by a kernel of that step.
//! This holds even if another thread had to compute it ahead, because that thread was about to change what the
//! expression reads.

pub mod fuse;
pub(super) mod text;

use super::buffer::Buffer;
use super::kernel::Part;
use super::{Gpu, lock, plan, recording};
use crate::dtype::DType;
use crate::error::Error;
use fuse::Expr;
use std::collections::HashSet;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};

/// Where a value's elements lie.
#[derive(Clone)]
pub(crate) struct Place {
    pub buffer: Arc<Buffer>,
    /// In bytes. A multiple of the adapter's binding alignment.
    pub offset: u64,
}

impl Place {
    /// Returns the `size` bytes from here on, for a kernel to bind.
    pub fn part(&self, size: u64) -> Part {
        Part { buffer: self.buffer.clone(), offset: self.offset, size, dtype: None }
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
    /// The number of the step in whose code it was made, 0 for none.
    pub recording: u64,
    state: Mutex<State>,
}

enum State {
    /// The elements' place, and the buffer's version from which changes of these elements are counted.
    Ready(Place, u64),
    Pending(Arc<Expr>),
    /// Another thread has computed the elements while this value's step is recorded. The step's own kernel is still to
    /// come.
    Ahead(Place, Arc<Expr>),
    /// The kernel was planned, and has not run. The place counts for the plan of this number, and for no one else.
    Planned(Place, Arc<Expr>, u64),
}

impl State {
    /// The state of elements that were just written.
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

    /// Returns a pending value, the result of an elementwise operation.
    pub fn later(gpu: &Gpu, dtype: DType, expr: Expr) -> Arc<Value> {
        let value = Arc::new(Value::of(gpu, dtype, &Arc::new(expr)));
        lock(&gpu.0.pending).push(&value);
        value
    }

    fn of(gpu: &Gpu, dtype: DType, expr: &Arc<Expr>) -> Value {
        let (recording, count) = (recording::number(gpu), expr.shape().count());
        Value { gpu: gpu.clone(), dtype, count, recording, state: Mutex::new(State::Pending(expr.clone())) }
    }

    /// Computes an elementwise operation into `place`, or adds it to the elements there. No other thread sees the
    /// operation.
    pub fn write(gpu: &Gpu, dtype: DType, expr: Expr, place: &Place, accumulate: bool) {
        let expr = Arc::new(expr);
        expr.run(&Value::of(gpu, dtype, &expr), place, accumulate);
    }

    /// Whether this thread runs the code in which the value was made.
    fn is_here(&self) -> bool {
        recording::number(&self.gpu) == self.recording
    }

    /// The state as this thread sees it. What another plan than this thread's has planned is still to be computed.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        if let State::Planned(_, expr, plan) = &*state
            && Some(*plan) != self.gpu.plan_number()
        {
            *state = State::Pending(expr.clone());
        }
        state
    }

    /// Returns the place of this value's elements. Computes them now if they are pending.
    pub fn place(&self) -> Place {
        let mut state = self.state();
        let expr = match &*state {
            State::Pending(expr) => expr.clone(),
            State::Ahead(_, expr) if self.is_here() => expr.clone(),
            State::Ready(place, _) | State::Ahead(place, _) | State::Planned(place, ..) => {
                return place.clone();
            }
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

    /// Returns this value's new state, after its elements were written at `place`.
    fn computed_as(&self, old: &State, place: Place, expr: Arc<Expr>) -> State {
        match (old, self.gpu.plan_number()) {
            // A plan does not know what the step will overwrite, so the elements from before the change stay.
            (State::Ahead(ahead, _), Some(_)) => State::Ahead(ahead.clone(), expr),
            (_, Some(plan)) => State::Planned(place, expr, plan),
            // Replays need the kernel that was just launched. This run needs the elements from before the change in
            // place, so they overwrite the kernel's result.
            (State::Ahead(ahead, _), None) if self.is_here() => {
                self.gpu.copy(ahead, &place, self.dtype.buffer_bytes(self.count));
                State::made(place)
            }
            (_, None) if !self.is_here() && self.gpu.is_recording(self.recording) => {
                State::Ahead(place, expr)
            }
            (_, None) => State::made(place),
        }
    }

    /// Takes over the elements that another expression's kernel has written at `place`, unless this value was computed
    /// in the meantime.
    pub(super) fn store(&self, place: Place) {
        let mut state = self.state();
        if let State::Pending(expr) = &*state {
            *state = self.computed_as(&state, place, expr.clone());
        }
    }

    /// Moves the elements to `place`. Every tensor that shares them follows.
    pub fn move_to(&self, place: &Place) {
        loop {
            // Elements that are moved must be there, even if other kernels are only planned.
            let old = plan::aside(|| self.place());
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

    /// The elements' place, if they are already computed as far as this thread is concerned.
    pub fn computed(&self) -> Option<Place> {
        match &*self.state() {
            State::Ready(place, _) | State::Planned(place, ..) => Some(place.clone()),
            State::Ahead(place, _) if !self.is_here() => Some(place.clone()),
            State::Pending(_) | State::Ahead(..) => None,
        }
    }

    /// Whether no thread has anything left to compute for this value.
    pub(super) fn is_settled(&self) -> bool {
        let mut state = self.state();
        // A recording that has ended needs no kernel any more.
        if let State::Ahead(place, _) = &*state
            && !self.gpu.is_recording(self.recording)
        {
            *state = State::made(place.clone());
        }
        matches!(&*state, State::Ready(..))
    }

    /// How often the elements were changed in place since they were made. A pending value counts as unchanged.
    pub fn changes(&self) -> u64 {
        match &*self.state() {
            State::Ready(place, made) => place.buffer.version.load(Relaxed).wrapping_sub(*made),
            State::Pending(_) | State::Ahead(..) | State::Planned(..) => 0,
        }
    }

    /// The error that the elements carry, or that they would carry once computed: an operand's error, or a size above
    /// the limit. Computes nothing.
    pub fn error(&self) -> Option<Error> {
        let own = || self.gpu.fits(self.pending()?.op(), self.dtype.buffer_bytes(self.count)).err();
        self.operands_error(&mut HashSet::new()).or_else(own)
    }

    /// The first error among the operands, through pending values, each of which is visited once.
    fn operands_error(&self, seen: &mut HashSet<*const Value>) -> Option<Error> {
        let expr = match &*self.state() {
            State::Ready(place, _) | State::Ahead(place, _) => return place.buffer.data().err(),
            State::Pending(expr) | State::Planned(_, expr, _) => expr.clone(),
        };
        let mut operands = expr.operands();
        operands.find_map(|value| seen.insert(Arc::as_ptr(value)).then(|| value.operands_error(seen))?)
    }

    /// The values from which this thread would compute this one. `None` if it is computed.
    pub(super) fn operands(&self) -> Option<Vec<Arc<Value>>> {
        Some(self.expr()?.operands().cloned().collect())
    }

    /// The expression by which this thread would compute the elements. `None` if they are computed.
    pub(super) fn expr(&self) -> Option<Arc<Expr>> {
        match &*self.state() {
            State::Pending(expr) => Some(expr.clone()),
            State::Ahead(_, expr) if self.is_here() => Some(expr.clone()),
            State::Ready(..) | State::Ahead(..) | State::Planned(..) => None,
        }
    }

    /// The expression of the elements, if no thread has computed them yet. Another kernel may then inline it.
    pub(super) fn pending(&self) -> Option<Arc<Expr>> {
        match &*self.state() {
            State::Pending(expr) => Some(expr.clone()),
            State::Ready(..) | State::Ahead(..) | State::Planned(..) => None,
        }
    }
}
