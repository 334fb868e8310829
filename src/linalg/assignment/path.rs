//! Shortest augmenting paths in f64, which make the result exact.
//!
//! Dijkstra's algorithm over columns, where the step from row `i` to column `j` has the length `cost[i, j] + price[j] -
//! level[i] >= 0`. A row's columns are read block by block, each block only when its bound is the smallest distance
//! left. Most blocks are never read.
//!
//! Source: Tomizawa 1971 and Edmonds, Karp 1972; Crouse 2016, "On implementing 2D rectangular assignment algorithms".

use super::Cost;
use super::solver::{BLOCK, NONE, Solver};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// An entry of the heap: a column, or (ids from `columns` on) a branch, at the distance of its nearest block that is
/// not read.
struct Entry {
    distance: f64,
    id: u32,
}

impl Ord for Entry {
    /// The nearest entry is the greatest. At equal distances it is the one with the lowest id, so that the order is
    /// total.
    fn cmp(&self, other: &Entry) -> Ordering {
        other.distance.total_cmp(&self.distance).then(other.id.cmp(&self.id))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

/// A row that a search has reached.
struct Branch {
    row: usize,
    distance: f64,
    /// Its nearest block that is not read, and that block's bound.
    nearest: (f64, usize),
}

/// The state of a search. The buffers are reused by later searches.
pub(super) struct Search {
    heap: BinaryHeap<Entry>,
    branches: Vec<Branch>,
    /// Bounds of the blocks that each branch has not read, `[branches, blocks]`.
    unread: Vec<f64>,
    distance: Vec<f64>,
    from: Vec<u32>,
    done: Vec<bool>,
    /// Columns that have a distance. `closed` holds those whose distance is final.
    seen: Vec<u32>,
    closed: Vec<u32>,
    /// Blocks read in all searches, as a measure of work.
    pub reads: usize,
}

impl Search {
    pub fn new(columns: usize) -> Search {
        Search {
            heap: BinaryHeap::new(),
            branches: Vec::new(),
            unread: Vec::new(),
            distance: vec![f64::INFINITY; columns],
            from: vec![NONE; columns],
            done: vec![false; columns],
            seen: Vec::new(),
            closed: Vec::new(),
            reads: 0,
        }
    }

    /// Assigns a free row, moving others on the way, and raises prices so that every assigned row has a best column.
    /// Returns `false` if no path leads to a free column.
    pub fn augment<C: Cost>(&mut self, solver: &mut Solver<C>, row: usize) -> bool {
        let bounds = &solver.bound[row * solver.blocks..][..solver.blocks];
        solver.level[row] = bounds.iter().copied().fold(f64::INFINITY, f64::min);
        // All entries of the row are forbidden.
        if solver.level[row] == f64::INFINITY {
            return false;
        }
        let (limit, mut column) = self.nearest_free(solver, row);
        let found = column != NONE;
        if found {
            for &column in &self.closed {
                solver.price[column as usize] += limit - self.distance[column as usize];
            }
            for branch in &self.branches {
                solver.level[branch.row] += limit - branch.distance;
            }
        }
        while column != NONE {
            let to = self.from[column as usize];
            solver.row_of[column as usize] = to;
            column = std::mem::replace(&mut solver.column_of[to as usize], column);
        }
        self.reset();
        found
    }

    fn reset(&mut self) {
        for &column in &self.seen {
            self.distance[column as usize] = f64::INFINITY;
            self.done[column as usize] = false;
        }
        self.heap.clear();
        self.branches.clear();
        self.unread.clear();
        self.seen.clear();
        self.closed.clear();
    }

    /// Returns distance and index of the nearest column that is not assigned.
    fn nearest_free<C: Cost>(&mut self, solver: &mut Solver<C>, start: usize) -> (f64, u32) {
        let (mut limit, mut free) = (f64::INFINITY, NONE);
        self.reach(solver, start, 0.0, limit);
        while let Some(Entry { distance, id }) = self.heap.pop() {
            if distance >= limit {
                break;
            }
            if id as usize >= solver.columns {
                self.read(solver, id as usize - solver.columns, &mut limit, &mut free);
                continue;
            }
            // A stale entry, from before the column had its final distance.
            if std::mem::replace(&mut self.done[id as usize], true) {
                continue;
            }
            self.closed.push(id);
            self.reach(solver, solver.row_of[id as usize] as usize, distance, limit);
        }
        (limit, free)
    }

    fn reach<C: Cost>(&mut self, solver: &Solver<C>, row: usize, distance: f64, limit: f64) {
        self.unread.extend_from_slice(&solver.bound[row * solver.blocks..][..solver.blocks]);
        self.branches.push(Branch { row, distance, nearest: (0.0, 0) });
        self.queue(solver, self.branches.len() - 1, limit);
    }

    /// Puts a branch's nearest block that is not read on the heap.
    fn queue<C: Cost>(&mut self, solver: &Solver<C>, branch: usize, limit: f64) {
        let unread = &self.unread[branch * solver.blocks..][..solver.blocks];
        let mut nearest = (f64::INFINITY, 0);
        for (block, &bound) in unread.iter().enumerate() {
            if bound < nearest.0 {
                nearest = (bound, block);
            }
        }
        let of = &mut self.branches[branch];
        of.nearest = nearest;
        let distance = (of.distance - solver.level[of.row] + nearest.0).max(of.distance);
        if distance < limit {
            self.heap.push(Entry { distance, id: (solver.columns + branch) as u32 });
        }
    }

    /// Reads a branch's nearest block, which gives its columns distances and renews its bound.
    fn read<C: Cost>(&mut self, solver: &mut Solver<C>, branch: usize, limit: &mut f64, free: &mut u32) {
        let Branch { row, distance, nearest: (_, block) } = self.branches[branch];
        self.reads += 1;
        self.unread[branch * solver.blocks + block] = f64::INFINITY;
        let (cost, price) = solver.part(row, block);
        let base = distance - solver.level[row];
        let mut least = f64::INFINITY;
        for (at, (&c, &p)) in cost.iter().zip(price).enumerate() {
            let value = solver.sign * c.to_f64() + p;
            if value < least {
                least = value;
            }
            let column = block * BLOCK + at;
            if base + value >= self.distance[column].min(*limit) || self.done[column] {
                continue;
            }
            // Rounding must not place a column nearer than the row that leads to it.
            let near = (base + value).max(distance);
            if self.distance[column] == f64::INFINITY {
                self.seen.push(column as u32);
            }
            self.distance[column] = near;
            self.from[column] = row as u32;
            if solver.row_of[column] == NONE {
                (*limit, *free) = (near, column as u32);
            } else {
                self.heap.push(Entry { distance: near, id: column as u32 });
            }
        }
        solver.bound[row * solver.blocks + block] = least;
        self.queue(solver, branch, *limit);
    }
}
