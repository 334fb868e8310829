//! Sums in the order of the ranks: an all-to-all of chunks, the sum of each chunk on one rank, an all-gather.
//!
//! ```text
//! rank r gets chunk r of every rank:    x_0[r], x_1[r], .. x_(N-1)[r]        (N-1)/N of the buffer in and out
//! adds them in their order:             s[r] = ((x_0[r] + x_1[r]) + ..)
//! and gives s[r] to all                                                     (N-1)/N of the buffer in and out
//! ```
//!
//! These are the bytes of a ring, in two exchanges.

use crate::{count, starts};
use mpi::Count;
use mpi::collective::CommunicatorCollectives;
use mpi::datatype::{Partition, PartitionMut};
use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator;
use tiebeam::ranks::share;

/// Numbers that are summed at a time. Counts of MPI have 31 bits, and offsets count from the first rank's.
const MOST: usize = 1 << 28;
/// Fewer numbers than this are told to all ranks, which add them up themselves: one exchange, and as few bytes.
const FEW: usize = 256;

/// Replaces the numbers by their sums over ranks. `room` is memory that is kept between calls.
pub fn in_order(comm: &SimpleCommunicator, numbers: &mut [f32], room: &mut Vec<f32>) {
    if comm.size() == 1 {
        return;
    }
    for part in numbers.chunks_mut(MOST) {
        match part.len() < FEW {
            true => few(comm, part, room),
            false => many(comm, part, room),
        }
    }
}

fn few(comm: &SimpleCommunicator, numbers: &mut [f32], room: &mut Vec<f32>) {
    room.resize(numbers.len() * comm.size() as usize, 0.0);
    comm.all_gather_into(&*numbers, &mut room[..]);
    add(room, numbers);
}

fn many(comm: &SimpleCommunicator, numbers: &mut [f32], room: &mut Vec<f32>) {
    let (rank, size) = (comm.rank() as usize, comm.size() as usize);
    let chunks: Vec<Count> = (0..size).map(|rank| count(share(numbers.len(), rank, size).len())).collect();
    let offsets = starts(&chunks);
    let own = share(numbers.len(), rank, size);
    room.resize(own.len() * size, 0.0);
    let arrived = vec![count(own.len()); size];
    let arrive_at = starts(&arrived);
    let send = Partition::new(&*numbers, &chunks[..], &offsets[..]);
    comm.all_to_all_varcount_into(&send, &mut PartitionMut::new(&mut room[..], &arrived[..], &arrive_at[..]));
    let (first, rest) = room.split_at_mut(own.len());
    add_to(first, rest);
    comm.all_gather_varcount_into(&*first, &mut PartitionMut::new(numbers, &chunks[..], &offsets[..]));
}

/// Sums rows one after the other.
fn add(rows: &[f32], sums: &mut [f32]) {
    let n = sums.len();
    sums.copy_from_slice(&rows[..n]);
    add_to(sums, &rows[n..]);
}

/// Adds rows to the first one, in pieces that stay in the cache.
fn add_to(first: &mut [f32], rest: &[f32]) {
    const PIECE: usize = 4096;
    // More ranks than numbers leave some without any.
    let n = first.len().max(1);
    for (i, piece) in first.chunks_mut(PIECE).enumerate() {
        for row in rest.chunks_exact(n) {
            let other = &row[i * PIECE..][..piece.len()];
            piece.iter_mut().zip(other).for_each(|(sum, x)| *sum += x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_added_in_their_order() {
        let (n, rows) = (10_000, 5);
        let all: Vec<f32> =
            (0..n * rows).map(|i| ((i * 7919) % 1013) as f32 * 1.1f32.powi((i % 90) as i32)).collect();
        let want = |i: usize| (1..rows).fold(all[i], |sum, row| sum + all[row * n + i]);
        let mut sums = vec![0.0; n];
        add(&all, &mut sums);
        assert!((0..n).all(|i| sums[i].to_bits() == want(i).to_bits()));
        add(&[], &mut []);
    }
}
