//! The recorded step whose code a thread runs: which it is, where its memory comes from, what it has launched.
//!
//! While a thread records, its commands run as ever and are kept too. What kernels write comes from a pool of the step's own,
//! so that nobody else is given memory that a replay writes; uploads come from the device's pool, because a replay does
//! not repeat them. What is bound from outside the own pool is held. What the thread computes for others, or made before, is no
//! part of it: that runs [`aside`].

use super::Gpu;
use super::buffer::{Buffer, Pool};
use super::command::Command;
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::sync::{Arc, Mutex};

/// What a thread has launched since it began to record.
pub(super) struct Recording {
    gpu: Gpu,
    /// Which recording it is, above 0.
    number: u64,
    pub commands: Vec<Command>,
    pool: Arc<Mutex<Pool>>,
    /// Buffers of other pools that replays read or write: from before, or uploaded in between.
    pub outside: Vec<Arc<Buffer>>,
    /// Tensors that replays change in place.
    pub changed: Vec<Arc<Buffer>>,
    pub refused: Option<Error>,
    /// The learning rates of optimizer steps, in order.
    pub rates: Vec<f32>,
    /// What must hold before a replay.
    pub conditions: Vec<Condition>,
}

pub(super) type Condition = Box<dyn Fn() -> Result<()> + Send>;

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

/// Begins a recording of this thread, in memory of `pool`.
///
/// # Errors
/// When the thread records already.
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
        conditions: vec![],
    }));
    Ok(Guard)
}

/// Ends it, with what it holds.
pub(super) fn end(_guard: Guard) -> Option<Recording> {
    RECORDING.take()
}

/// Puts the thread's recording back.
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

/// The thread's recording on this device, if it records.
fn with<T>(gpu: &Gpu, work: impl FnOnce(&mut Recording) -> T) -> Option<T> {
    RECORDING.with_borrow_mut(|recording| recording.as_mut().filter(|r| r.gpu == *gpu).map(work))
}

/// The pool that the thread's buffers come from and go back to.
pub(super) fn pool(gpu: &Gpu) -> Arc<Mutex<Pool>> {
    with(gpu, |recording| recording.pool.clone()).unwrap_or_else(|| gpu.0.pool.clone())
}

/// Fails while recording: what the host does once in the middle of a step would be missing from its replays.
pub(crate) fn refuse(gpu: &Gpu, what: &str) -> Result<()> {
    let error = || Error::config(format!("Step: {what} inside a recorded step; do it before or after"));
    match with(gpu, |recording| recording.refused.get_or_insert_with(error).clone()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// A launch of this thread was skipped: its replays would lack it, so a recording must not go on.
pub(super) fn failed(gpu: &Gpu, error: &Error) {
    with(gpu, |recording| {
        recording.refused.get_or_insert_with(|| error.clone());
    });
}

/// Keeps a command that was just encoded.
pub(super) fn command(gpu: &Gpu, command: Command) {
    with(gpu, |recording| recording.commands.push(command));
}

/// Holds what the kernels just recorded bind from outside.
pub(super) fn binds<'a>(gpu: &Gpu, buffers: impl Iterator<Item = &'a Arc<Buffer>>) {
    with(gpu, |recording| {
        for buffer in buffers.filter(|buffer| !buffer.is_of(&recording.pool)) {
            push_once(&mut recording.outside, buffer);
        }
    });
}

/// The kernels just recorded change these tensors, and will at every replay.
pub(super) fn changes(gpu: &Gpu, changed: &[Arc<Buffer>]) {
    with(gpu, |recording| {
        // What the step made itself is no tensor's any more in a replay.
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
    /// Every replay of what this thread records now runs `hook` at this place; nothing when it does not record.
    pub(crate) fn each_replay(&self, hook: impl Fn() + Send + 'static) {
        command(self, Command::Hook(Box::new(hook)));
    }

    /// Before every replay of what this thread records now, `condition` is asked; where it fails nothing is run.
    pub(crate) fn before_replays(&self, condition: impl Fn() -> Result<()> + Send + 'static) {
        with(self, |recording| recording.conditions.push(Box::new(condition)));
    }

    /// The place among a step's rates of an optimizer that steps at `rate` now; 0 when this thread records nothing.
    pub(crate) fn note_rate(&self, rate: f32) -> usize {
        let note = |recording: &mut Recording| {
            recording.rates.push(rate);
            recording.rates.len() - 1
        };
        with(self, note).unwrap_or(0)
    }
}
