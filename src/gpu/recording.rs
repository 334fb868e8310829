//! The recording of a thread that runs a step's code: its number, its memory and the commands launched so far.
//!
//! While a thread records, its commands run as usual and are also kept. The buffers that kernels write come from the
//! step's own pool, so that nobody else is given memory that a replay writes. Uploads come from the device's pool,
//! because a replay does not repeat them. Buffers from outside the step's pool are kept alive. A value that was made
//! outside the step is computed outside the recording too ([`aside`]).

use super::Gpu;
use super::buffer::{Buffer, Pool};
use super::command::Command;
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::sync::{Arc, Mutex};

/// What a thread has launched since it began to record.
pub(super) struct Recording {
    gpu: Gpu,
    /// The recording's number, above 0.
    number: u64,
    pub commands: Vec<Command>,
    pool: Arc<Mutex<Pool>>,
    /// Buffers of other pools that replays read or write: made before the recording, or uploaded during it.
    pub outside: Vec<Arc<Buffer>>,
    /// Tensors that replays change in place.
    pub changed: Vec<Arc<Buffer>>,
    pub refused: Option<Error>,
    /// The learning rates of optimizer steps, in order.
    pub rates: Vec<f32>,
}

thread_local! {
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// Ends the thread's recording even when the recorded code panics.
pub(super) struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        RECORDING.take();
    }
}

/// Begins a recording on this thread, with memory from `pool`.
///
/// # Errors
/// If the thread records already.
pub(super) fn begin(gpu: &Gpu, number: u64, pool: Arc<Mutex<Pool>>) -> Result<Guard> {
    if RECORDING.with_borrow(Option::is_some) {
        return Err(Error::config(
            "Step: a step recorded inside a step; record the inner code in the outer step",
        ));
    }
    RECORDING.set(Some(Recording {
        gpu: gpu.clone(),
        number,
        commands: vec![],
        pool,
        outside: vec![],
        changed: vec![],
        refused: None,
        rates: vec![],
    }));
    Ok(Guard)
}

/// Ends the recording and returns it.
pub(super) fn end(_guard: Guard) -> Option<Recording> {
    RECORDING.take()
}

/// Restores the thread's recording when dropped.
struct Aside(Option<Recording>);

impl Drop for Aside {
    fn drop(&mut self) {
        RECORDING.set(self.0.take());
    }
}

/// Runs `work` outside the thread's recording, if there is one.
pub(super) fn aside<T>(work: impl FnOnce() -> T) -> T {
    let _aside = Aside(RECORDING.take());
    work()
}

/// The number of the recording whose code this thread runs on the device, 0 for none.
pub(crate) fn number(gpu: &Gpu) -> u64 {
    with(gpu, |recording| recording.number).unwrap_or(0)
}

/// The number of commands that this thread has recorded so far, if it records on this device.
pub(crate) fn position(gpu: &Gpu) -> Option<usize> {
    with(gpu, |recording| recording.commands.len())
}

/// Runs `work` on the thread's recording, if it records on this device.
fn with<T>(gpu: &Gpu, work: impl FnOnce(&mut Recording) -> T) -> Option<T> {
    RECORDING.with_borrow_mut(|recording| recording.as_mut().filter(|r| r.gpu == *gpu).map(work))
}

/// The pool that the thread's buffers come from and go back to.
pub(super) fn pool(gpu: &Gpu) -> Arc<Mutex<Pool>> {
    with(gpu, |recording| recording.pool.clone()).unwrap_or_else(|| gpu.0.pool.clone())
}

/// Fails if this thread records, because what the host does once in the middle of a step would be missing from its
/// replays.
pub(crate) fn refuse(gpu: &Gpu, what: &str) -> Result<()> {
    let error = || Error::config(format!("Step: {what} inside a recorded step; do it before or after"));
    match with(gpu, |recording| recording.refused.get_or_insert_with(error).clone()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Notes that a launch of this thread was skipped. Replays would lack it, so the recording is refused.
pub(super) fn failed(gpu: &Gpu, error: &Error) {
    with(gpu, |recording| {
        recording.refused.get_or_insert_with(|| error.clone());
    });
}

/// Keeps a command that is being recorded.
pub(super) fn command(gpu: &Gpu, command: impl FnOnce() -> Command) {
    with(gpu, |recording| recording.commands.push(command()));
}

/// Keeps the buffers alive that the kernels just recorded bind from outside.
pub(super) fn binds<'a>(gpu: &Gpu, buffers: impl Iterator<Item = &'a Arc<Buffer>>) {
    with(gpu, |recording| {
        for buffer in buffers.filter(|buffer| !buffer.is_of(&recording.pool)) {
            push_once(&mut recording.outside, buffer);
        }
    });
}

/// Notes that the kernels just recorded change these tensors, and that every replay will.
pub(super) fn changes(gpu: &Gpu, changed: &[Arc<Buffer>]) {
    with(gpu, |recording| {
        // Buffers of the step's own pool belong to no tensor in a replay.
        for buffer in changed.iter().filter(|buffer| !buffer.is_of(&recording.pool)) {
            push_once(&mut recording.changed, buffer);
        }
    });
}

fn push_once(list: &mut Vec<Arc<Buffer>>, buffer: &Arc<Buffer>) {
    if !list.iter().any(|b| Arc::ptr_eq(b, buffer)) {
        list.push(buffer.clone());
    }
}

impl Gpu {
    /// Makes every replay of this thread's recording run `hook` at this place. Does nothing if the thread does not
    /// record.
    pub(crate) fn each_replay(&self, hook: impl Fn() + Send + Sync + 'static) {
        command(self, || Command::Hook(Arc::new(hook)));
    }

    /// Notes that the kernels just recorded read these parts of a buffer, which is bound as a whole. A replay then refuses
    /// a part that carries an error or has moved.
    pub(crate) fn note_reads<'a>(&self, parts: impl Iterator<Item = &'a Arc<Buffer>>) {
        binds(self, parts);
    }

    /// Notes the rate of an optimizer's step, and returns its index among the rates of the recorded step. 0 if this
    /// thread does not record.
    pub(crate) fn note_rate(&self, rate: f32) -> usize {
        let note = |recording: &mut Recording| {
            recording.rates.push(rate);
            recording.rates.len() - 1
        };
        with(self, note).unwrap_or(0)
    }
}
