//! Processes that work together, such as those of an MPI job, and the few exchanges that they need.
//!
//! A process of `N` is a *rank*, numbered from 0. What Tiebeam does with ranks is written against the trait [`Ranks`], so that the library
//! needs no MPI: the crate `tiebeam-mpi` implements it by MPI, and [`Alone`] is a process by itself. Everything that is computed from what
//! was exchanged is the same on every rank, and the same in every run with as many ranks.
//!
//! ```
//! use tiebeam::ranks::{Alone, Ranks, share};
//! let mut numbers = [1.0, 2.0];
//! Alone.sum(&mut numbers)?; // over one rank
//! assert_eq!(numbers, [1.0, 2.0]);
//! assert_eq!((share(10, 0, 3), share(10, 1, 3), share(10, 2, 3)), (0..4, 4..7, 7..10));
//! # Ok::<(), tiebeam::Error>(())
//! ```

use crate::error::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::ops::Range;

/// A process among others that run the same program. Sums, gathers and broadcasts are exchanges: every rank must call them, in the same
/// order.
pub trait Ranks: Send + Sync {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn size(&self) -> usize;

    /// The number of this process among those on its machine, from 0, by which it chooses an adapter.
    fn local(&self) -> usize {
        self.rank()
    }

    /// Called when every rank has come to know that one of them has failed, and returns an error. So whoever ends the processes knows
    /// that no other rank has to be ended from here.
    fn all_failed(&self) {}

    /// Replaces each number by its sum over the ranks, added in their order: `((x_0 + x_1) + x_2) + ..`. So the same number of ranks gives
    /// the same bits, on every rank and in every run.
    ///
    /// # Errors
    /// When the ranks cannot reach each other, or have slices of different lengths and the transport finds it.
    fn sum(&self, numbers: &mut [f32]) -> Result<()>;

    /// Returns what every rank gives, in their order. For small messages: every rank gets all of them.
    ///
    /// # Errors
    /// When the ranks cannot reach each other.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Gives bytes to rank 0, which takes them by [`Ranks::receive`]. Of any length, and waits until they are on their way. Not for
    /// rank 0 itself.
    ///
    /// # Errors
    /// When the ranks cannot reach each other.
    fn send(&self, bytes: &[u8]) -> Result<()>;

    /// Waits for the next bytes that a rank gives to rank 0, which calls this.
    ///
    /// # Errors
    /// When the ranks cannot reach each other.
    fn receive(&self, from: usize) -> Result<Vec<u8>>;

    /// [`Ranks::gather`] of messages of one length on all ranks, one behind the other, and nothing else is sent.
    ///
    /// # Errors
    /// As [`Ranks::gather`].
    fn gather_equal(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        Ok(self.gather(bytes)?.concat())
    }

    /// Replaces the bytes by those of rank 0.
    ///
    /// # Errors
    /// When the ranks cannot reach each other.
    fn broadcast(&self, bytes: &mut Vec<u8>) -> Result<()>;
}

/// One process by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn sum(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![bytes.to_vec()])
    }
    fn send(&self, _: &[u8]) -> Result<()> {
        Err(Error::config("one rank has no other to send to"))
    }
    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        Err(Error::config(format!("one rank has no rank {from} to receive from")))
    }
    fn broadcast(&self, _: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }
}

/// The part of `count` things that rank `rank` of `size` has: parts follow each other, and the first ones are larger by one if they cannot
/// be equal.
///
/// # Panics
/// When `rank` is not below `size`.
#[track_caller]
pub fn share(count: usize, rank: usize, size: usize) -> Range<usize> {
    assert!(rank < size, "share: rank {rank} of {size}");
    let (each, more) = (count / size, count % size);
    let first = rank * each + rank.min(more);
    first..first + each + usize::from(rank < more)
}

/// Checks that a step of `batch` things, such as rows, can be cut into `each` parts for each of `ranks` ranks.
///
/// # Errors
/// [`Error::Config`] when there are more parts than things.
pub fn check_parts(batch: usize, things: &str, ranks: usize, each: usize) -> Result<()> {
    let parts = ranks.saturating_mul(each);
    match batch >= parts {
        true => Ok(()),
        false => Err(Error::config(format!(
            "a step of {batch} {things} cannot be cut into {parts} parts ({ranks} ranks, {each} each); take a batch of at least {parts}, or \
             fewer ranks"
        ))),
    }
}

/// Checks that all ranks say the same of what must be the same, such as the settings of a run and the hash of its data.
///
/// # Errors
/// [`Error::Config`] on every rank, with the first rank that differs from rank 0 and in what; and those of [`Ranks::gather`].
pub fn agree(ranks: &dyn Ranks, said: &BTreeMap<String, String>) -> Result<()> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let text = serde_json::to_vec(said).map_err(|error| Error::config(error.to_string()))?;
    let all = ranks.gather(&text)?;
    let read = |bytes: &Vec<u8>| -> Result<BTreeMap<String, String>> {
        serde_json::from_slice(bytes).map_err(|error| Error::config(format!("a rank's settings: {error}")))
    };
    let first = read(&all[0])?;
    for (rank, bytes) in all.iter().enumerate().skip(1) {
        let other = read(bytes)?;
        let names = first.keys().chain(other.keys());
        let of = |map: &BTreeMap<String, String>, name: &str| {
            map.get(name).map_or("not said".to_string(), |value| format!("'{value}'"))
        };
        if let Some(name) = names.into_iter().find(|name| first.get(*name) != other.get(*name)) {
            let error = Error::config(format!(
                "rank {rank} is of another run than rank 0: `{name}` is {} there and {} on rank 0; start all ranks with the same program, \
                 settings and files",
                of(&other, name),
                of(&first, name)
            ));
            return known(ranks, Err(error));
        }
    }
    Ok(())
}

/// What the last byte of a message says of a rank's work.
const DONE: u8 = 0;
const STOPPED: u8 = 1;
const FAILED: u8 = 2;

/// A rank's result as a message, which [`unpacked`] takes apart.
pub(crate) fn packed(own: Result<Vec<u8>>) -> Vec<u8> {
    let (mut message, kind) = match own {
        Ok(bytes) => (bytes, DONE),
        Err(error) => {
            let kind = if error.kind() == ErrorKind::Stopped { STOPPED } else { FAILED };
            (error.to_string().into_bytes(), kind)
        }
    };
    message.push(kind);
    message
}

/// The result that a rank has told by [`packed`]. Its failure has its number, and is [`Error::Config`] or [`Error::Stopped`].
pub(crate) fn unpacked(rank: usize, mut message: Vec<u8>) -> Result<Vec<u8>> {
    let kind = message.pop();
    if kind == Some(DONE) {
        return Ok(message);
    }
    let said = format!("rank {rank}: {}", String::from_utf8_lossy(&message));
    Err(if kind == Some(STOPPED) { Error::stopped(said) } else { Error::config(said) })
}

/// Marks a failure that every rank finds in the same exchange, so that whoever ends the processes says it once.
pub(crate) fn known<T>(ranks: &dyn Ranks, found: Result<T>) -> Result<T> {
    if found.is_err() {
        ranks.all_failed();
    }
    found
}

/// Gives every rank's result to all: if one has failed, all fail. So no rank waits for another that has given up. `own` goes with a
/// success, and comes back from every rank, in their order.
///
/// # Errors
/// This rank's own failure, else that of the first rank that has one, with its number, as [`Error::Config`]. If ranks were stopped and
/// none has failed, [`Error::Stopped`]. So on all ranks it is the one or on all the other. Those of [`Ranks::gather`].
pub fn together(ranks: &dyn Ranks, own: Result<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
    if ranks.size() == 1 {
        return own.map(|bytes| vec![bytes]);
    }
    let told = ranks.gather(&packed(own.clone()))?;
    let (mut all, mut errors) = (Vec::new(), Vec::new());
    errors.extend(own.err());
    for (rank, message) in told.into_iter().enumerate() {
        match unpacked(rank, message) {
            Ok(bytes) => all.push(bytes),
            Err(error) => errors.push(error),
        }
    }
    // A failure says more than a stop, which others may have made of it.
    let failure = errors.iter().position(|error| error.kind() != ErrorKind::Stopped);
    match errors.is_empty() {
        true => Ok(all),
        false => known(ranks, Err(errors.swap_remove(failure.unwrap_or(0)))),
    }
}

/// [`together`] for a result that does not travel: this rank's own, if no rank has failed.
///
/// # Errors
/// As [`together`].
pub fn all_done<T>(ranks: &dyn Ranks, own: Result<T>) -> Result<T> {
    together(ranks, own.as_ref().map(|_| Vec::new()).map_err(Clone::clone))?;
    own
}

/// Returns what every rank gives, in their order, to rank 0, and nothing to the others. For messages of any length.
///
/// # Errors
/// Those of [`Ranks::send`] and [`Ranks::receive`].
pub fn collect(ranks: &dyn Ranks, own: Vec<u8>) -> Result<Vec<Vec<u8>>> {
    if ranks.rank() > 0 {
        return ranks.send(&own).map(|()| Vec::new());
    }
    std::iter::once(Ok(own)).chain((1..ranks.size()).map(|from| ranks.receive(from))).collect()
}

/// Does work on rank 0 only. Returns what it gave there, and `None` on the other ranks.
///
/// # Errors
/// The error of `work`, on every rank.
pub fn on_first<T>(ranks: &dyn Ranks, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    match ranks.rank() {
        0 => all_done(ranks, work().map(Some)),
        _ => all_done(ranks, Ok(None)),
    }
}

/// Does `count` pieces of work, of which each rank has every `size`-th, and returns the results of all of them in order, on every rank.
///
/// ```
/// use tiebeam::ranks::{Alone, spread};
/// assert_eq!(spread(&Alone, 3, |i| Ok(i as f64 / 2.0))?, [0.0, 0.5, 1.0]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// # Errors
/// The error of a piece, on every rank, and those of [`Ranks::gather`].
pub fn spread(ranks: &dyn Ranks, count: usize, work: impl FnMut(usize) -> Result<f64>) -> Result<Vec<f64>> {
    let size = ranks.size();
    let own: Result<Vec<f64>> = (ranks.rank()..count).step_by(size).map(work).collect();
    let all = together(ranks, own.map(|own| own.into_iter().flat_map(f64::to_le_bytes).collect()))?;
    let of = |i: usize| {
        let words = all[i % size].as_chunks::<8>().0;
        words.get(i / size).map(|word| f64::from_le_bytes(*word))
    };
    let found: Option<Vec<f64>> = (0..count).map(of).collect();
    let found = found.ok_or_else(|| {
        Error::config("the ranks have done different amounts of work; start all with the same arguments")
    });
    known(ranks, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_of_it_once() {
        for (count, size) in [(0, 1), (1, 4), (7, 3), (8, 2), (13, 5)] {
            let all: Vec<usize> = (0..size).flat_map(|rank| share(count, rank, size)).collect();
            assert_eq!(all, (0..count).collect::<Vec<_>>(), "{count} over {size}");
            let sizes = (0..size).map(|rank| share(count, rank, size).len());
            assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
        }
    }

    #[test]
    fn alone_is_one_rank() {
        let said = BTreeMap::from([("a".to_string(), "1".to_string())]);
        agree(&Alone, &said).unwrap();
        assert_eq!(together(&Alone, Ok(vec![3])).unwrap(), [[3]]);
        assert!(together(&Alone, Err(Error::config("no"))).is_err());
        let mut bytes = vec![1, 2];
        Alone.broadcast(&mut bytes).unwrap();
        assert_eq!(Alone.gather(&bytes).unwrap(), [[1, 2]]);
        assert_eq!(collect(&Alone, bytes).unwrap(), [[1, 2]]);
        assert!(Alone.send(&[1]).is_err() && Alone.receive(1).is_err());
    }
}
