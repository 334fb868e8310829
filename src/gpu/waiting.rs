//! Commands whose pipelines the driver still compiles, and all that were recorded after them. Their order never changes.
//!
//! A kernel that the driver refuses leaves out what depends on it, and nothing else. Who depends on it is found by the
//! buffers that commands name. They are held weakly, so that memory goes back to the pool as if nothing waited.

use super::buffer::Buffer;
use super::command::Command;
use super::kernel::Launch;
use crate::error::{Error, Result};
use std::collections::VecDeque;
use std::sync::{Arc, Weak};

/// A buffer that a command reads or writes.
#[derive(Clone)]
pub(super) struct Named {
    own: Weak<Buffer>,
    /// The buffer that it is a part of.
    whole: Option<Weak<Buffer>>,
}

impl Named {
    pub fn of(buffer: &Arc<Buffer>) -> Named {
        Named { own: Arc::downgrade(buffer), whole: buffer.whole.as_ref().map(Arc::downgrade) }
    }

    /// Whether a loss marks it. What nobody holds any more may have been read.
    fn can_be_lost(&self) -> bool {
        self.own.upgrade().is_none_or(|buffer| !buffer.is_spared())
    }

    /// Whether the two have elements in common. The weak handles keep the places from being taken by other buffers.
    fn meets(&self, other: &Named) -> bool {
        let is = |whole: &Option<Weak<Buffer>>, own: &Weak<Buffer>| {
            whole.as_ref().is_some_and(|whole| Weak::ptr_eq(whole, own))
        };
        Weak::ptr_eq(&self.own, &other.own) || is(&self.whole, &other.own) || is(&other.whole, &self.own)
    }
}

/// A command that waits.
pub(super) struct Entry {
    pub command: Command,
    reads: Vec<Named>,
    writes: Vec<Named>,
    /// Buffers of the change in place that it belongs to.
    changed: Vec<Weak<Buffer>>,
}

impl Entry {
    /// A command of a launch in a change of these buffers. `None` for one that writes no tensor.
    pub fn new(command: Command, launch: Option<&Launch>, changed: &[Arc<Buffer>]) -> Entry {
        let named = |write: bool| {
            let binds = launch.iter().flat_map(|launch| &launch.binds);
            binds.filter(|bind| bind.write == write).map(|bind| Named::of(&bind.part.buffer)).collect()
        };
        let changed = changed.iter().map(Arc::downgrade).collect();
        Entry { command, reads: named(false), writes: named(true), changed }
    }

    /// The buffers that are out of date if its batch is lost.
    pub fn at_stake(&self) -> impl Iterator<Item = &Weak<Buffer>> {
        self.writes.iter().map(|named| &named.own).chain(&self.changed)
    }

    /// Marks what it was to write with the error.
    fn fail(&self, error: &Error) {
        let written = self.writes.iter().filter_map(|named| named.own.upgrade());
        written.filter(|buffer| !buffer.is_spared()).for_each(|buffer| buffer.fail(error));
    }
}

/// What became of the command at the front.
pub(super) enum Next {
    /// It can be encoded.
    Ready(Entry),
    /// The driver refused its kernel.
    Refused(Error),
    /// It depends on what was not computed.
    LeftOut,
}

/// The commands that wait, in order.
#[derive(Default)]
pub(super) struct Waiting {
    entries: VecDeque<Entry>,
    /// Buffers that were not computed since commands wait, and why.
    lost: Vec<(Named, Error)>,
}

impl Waiting {
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn push(&mut self, entry: Entry) {
        self.entries.push_back(entry);
    }

    /// Notes that buffers lost their elements while commands wait that may read them.
    pub fn lose<'a>(&mut self, buffers: impl Iterator<Item = &'a Arc<Buffer>>, error: &Error) {
        if !self.is_empty() {
            self.lost.extend(buffers.map(|buffer| (Named::of(buffer), error.clone())));
        }
    }

    /// Takes the command at the front. `None` if there is none, or, unless it may `wait`, while the driver is at work on
    /// its kernel.
    ///
    /// # Errors
    /// [`Error::Timeout`] if it has waited too long. The command stays where it is.
    pub fn next(&mut self, wait: bool) -> Result<Option<Next>> {
        let made = match self.entries.front().map(|entry| &entry.command) {
            None => return Ok(None),
            Some(Command::Dispatch(dispatch)) if wait => Some(dispatch.pipeline.wait()?),
            Some(Command::Dispatch(dispatch)) => match dispatch.pipeline.made() {
                None => return Ok(None),
                made => made,
            },
            Some(_) => None,
        };
        let refused = made.and_then(|made| made.as_ref().err().cloned());
        Ok(self.entries.pop_front().map(|entry| self.judge(entry, refused)))
    }

    /// Says what becomes of a command whose kernel was compiled or refused.
    fn judge(&mut self, entry: Entry, refused: Option<Error>) -> Next {
        let depends = || {
            let mut uses = entry.reads.iter().chain(&entry.writes);
            uses.find_map(|named| {
                self.lost.iter().find(|(lost, _)| lost.meets(named)).map(|(_, error)| error.clone())
            })
        };
        let next = match (refused, self.lost.is_empty()) {
            (Some(error), _) => Some((error, true)),
            (None, true) => None,
            (None, false) => depends().map(|error| (error, false)),
        };
        let next = match next {
            None => Next::Ready(entry),
            Some((error, refused)) => {
                let lost = entry.writes.iter().filter(|named| named.can_be_lost());
                self.lost.extend(lost.map(|named| (named.clone(), error.clone())));
                entry.fail(&error);
                if refused { Next::Refused(error) } else { Next::LeftOut }
            }
        };
        if self.is_empty() {
            // From here on, launches look at the buffers that they are given.
            self.lost.clear();
        }
        next
    }
}
