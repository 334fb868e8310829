//! Prices of columns: bounds of blocks, reduction and the auction.
//!
//! A row looks for its smallest `cost + price`. Prices only rise while a problem is solved, so the smallest value that
//! a row once saw in a block of columns stays a lower bound for that block. Most blocks need not be read again.

use super::Cost;
use std::collections::VecDeque;

/// Columns per block. This is near the square root of common sizes, so that a row has about as many bounds to compare
/// as columns to read.
pub(super) const BLOCK: usize = 64;
/// The index that means no row or no column.
pub(super) const NONE: u32 = u32::MAX;

/// A minimisation with at least as many columns as rows, and the present state of its solution.
///
/// Between phases `level[i] <= cost[i, j] + price[j]` for all `j`, with equality (up to rounding) at the row's own column.
pub(super) struct Solver<'a, C> {
    pub cost: &'a [C],
    pub rows: usize,
    pub columns: usize,
    pub blocks: usize,
    /// 1, or -1 to maximise.
    pub sign: f64,
    /// The largest difference of two allowed entries.
    pub range: f64,
    pub price: Vec<f64>,
    /// Lower bounds of `cost + price`, `[rows, blocks]`.
    pub bound: Vec<f64>,
    pub level: Vec<f64>,
    pub column_of: Vec<u32>,
    pub row_of: Vec<u32>,
}

/// A row's best column, its `cost + price`, and that of the second best column.
#[derive(Clone, Copy)]
struct Choice {
    column: usize,
    value: f64,
    second: f64,
}

/// Returns the two smallest of `sign * cost + price`.
#[inline]
fn two_smallest<C: Cost>(cost: &[C], price: &[f64], sign: f64) -> (f64, f64) {
    const LANES: usize = 8;
    let mut first = [f64::INFINITY; LANES];
    let mut second = [f64::INFINITY; LANES];
    let mut see = |lane: usize, value: f64| {
        let high = if value > first[lane] { value } else { first[lane] };
        second[lane] = if high < second[lane] { high } else { second[lane] };
        first[lane] = if value < first[lane] { value } else { first[lane] };
    };
    let (costs, prices) = (cost.chunks_exact(LANES), price.chunks_exact(LANES));
    for (lane, (&c, &p)) in costs.remainder().iter().zip(prices.remainder()).enumerate() {
        see(lane, sign * c.to_f64() + p);
    }
    for (c, p) in costs.zip(prices) {
        for lane in 0..LANES {
            see(lane, sign * c[lane].to_f64() + p[lane]);
        }
    }
    (0..LANES).fold((f64::INFINITY, f64::INFINITY), |(one, two), lane| {
        let high = one.max(first[lane]);
        (one.min(first[lane]), two.min(high).min(second[lane]))
    })
}

/// Returns the largest power of two up to `x`.
fn power_of_two(x: f64) -> f64 {
    const EXPONENT: u64 = 0x7ff << 52;
    f64::from_bits(x.to_bits() & EXPONENT)
}

impl<'a, C: Cost> Solver<'a, C> {
    /// Starts with these prices and no row assigned.
    pub fn new(cost: &'a [C], [rows, columns]: [usize; 2], sign: f64, range: f64, price: Vec<f64>) -> Self {
        let blocks = columns.div_ceil(BLOCK);
        let mut bound = Vec::with_capacity(rows * blocks);
        for row in cost.chunks_exact(columns) {
            let parts = row.chunks(BLOCK).zip(price.chunks(BLOCK));
            bound.extend(parts.map(|(c, p)| {
                c.iter().zip(p).fold(f64::INFINITY, |least, (&c, &p)| {
                    let value = sign * c.to_f64() + p;
                    if value < least { value } else { least }
                })
            }));
        }
        let (column_of, row_of) = (vec![NONE; rows], vec![NONE; columns]);
        Solver {
            cost,
            rows,
            columns,
            blocks,
            sign,
            range,
            price,
            bound,
            level: vec![0.0; rows],
            column_of,
            row_of,
        }
    }

    /// The part of a row that is in a block, and the prices there.
    #[inline]
    pub fn part(&self, row: usize, block: usize) -> (&[C], &[f64]) {
        let start = block * BLOCK;
        let end = (start + BLOCK).min(self.columns);
        (&self.cost[row * self.columns..][start..end], &self.price[start..end])
    }

    /// Reads a block again, renews its bound and updates the best choice so far.
    #[inline]
    fn look(&mut self, row: usize, block: usize, best: &mut (f64, f64, usize)) {
        let (cost, price) = self.part(row, block);
        let (first, second) = two_smallest(cost, price, self.sign);
        self.bound[row * self.blocks + block] = first;
        if first < best.0 {
            *best = (first, best.0.min(second), block);
        } else {
            best.1 = best.1.min(first);
        }
    }

    /// Returns the row's best column at present prices. `None` if all entries are forbidden.
    fn choose(&mut self, row: usize) -> Option<Choice> {
        let bounds = &self.bound[row * self.blocks..][..self.blocks];
        let (mut low, mut next) = ((f64::INFINITY, 0), (f64::INFINITY, usize::MAX));
        for (block, &bound) in bounds.iter().enumerate() {
            if bound < low.0 {
                (low, next) = ((bound, block), low);
            } else if bound < next.0 {
                next = (bound, block);
            }
        }
        let mut best = (f64::INFINITY, f64::INFINITY, 0);
        self.look(row, low.1, &mut best);
        if next.0 < best.1 {
            self.look(row, next.1, &mut best);
        }
        for block in 0..self.blocks {
            if block != low.1 && block != next.1 && self.bound[row * self.blocks + block] < best.1 {
                self.look(row, block, &mut best);
            }
        }
        let (value, second, block) = best;
        let (cost, price) = self.part(row, block);
        let at = cost.iter().zip(price).position(|(&c, &p)| self.sign * c.to_f64() + p == value)?;
        value.is_finite().then_some(Choice { column: block * BLOCK + at, value, second })
    }

    /// Returns a column that is not assigned and has exactly this value for the row.
    fn free_at(&self, row: usize, value: f64) -> Option<usize> {
        (0..self.blocks).filter(|block| self.bound[row * self.blocks + block] <= value).find_map(|block| {
            let (cost, price) = self.part(row, block);
            let free = |at: usize| self.row_of[block * BLOCK + at] == NONE;
            let at =
                (0..cost.len()).find(|&at| self.sign * cost[at].to_f64() + price[at] == value && free(at))?;
            Some(block * BLOCK + at)
        })
    }

    /// Assigns the column to the row. Returns the row that had it before.
    fn take(&mut self, row: usize, column: usize) -> Option<usize> {
        let before = std::mem::replace(&mut self.row_of[column], row as u32);
        self.column_of[row] = column as u32;
        if before == NONE {
            return None;
        }
        self.column_of[before as usize] = NONE;
        Some(before as usize)
    }

    fn clear(&mut self) {
        self.column_of.fill(NONE);
        self.row_of.fill(NONE);
    }

    /// The number of rows without a column.
    pub fn free(&self) -> usize {
        self.column_of.iter().filter(|&&c| c == NONE).count()
    }

    /// An auction with `eps = 0`: each row takes its best column and raises its price until the second best is as good.
    /// A row whose best columns are all tied and taken stays free. Makes at most `budget` bids.
    ///
    /// Source: "augmenting row reduction" of Jonker and Volgenant 1987, "A shortest augmenting path algorithm for dense and
    /// sparse linear assignment problems".
    pub fn reduce(&mut self, mut budget: usize) {
        for start in 0..self.rows {
            let mut row = start;
            while self.column_of[row] == NONE && budget > 0 {
                budget -= 1;
                let Some(Choice { mut column, value, second }) = self.choose(row) else { break };
                let raise = (second - value).min(self.range);
                self.level[row] = value + raise;
                if raise == 0.0 && self.row_of[column] != NONE {
                    match self.free_at(row, value) {
                        Some(other) => column = other,
                        None => break,
                    }
                }
                self.price[column] += raise;
                match self.take(row, column) {
                    Some(before) => row = before,
                    None => break,
                }
            }
        }
    }

    /// Finds prices for a square problem, starting from its present ones, by an auction with falling `eps` and then
    /// reduction, which leaves most rows assigned.
    ///
    /// `eps` falls from a tenth of the entries' range to a millionth, to a quarter each time. On products of rank 32
    /// with n = 2048, stopping at 1e-4 leaves half of the rows to the paths and takes 1.8 times as long. `eps` is a
    /// power of two, so that prices of whole numbers, and of most others in f32, are exact in f64.
    pub fn find_prices(&mut self) {
        // About 70 bids per row are usual. A price war can need any number, and then paths do the rest.
        let mut budget = 200 * self.rows;
        let mut eps = power_of_two(0.1 * self.range);
        while eps > 1e-6 * self.range && budget > 0 {
            budget -= self.auction(eps, budget);
            eps *= 0.25;
        }
        self.clear();
        self.reduce(2 * self.rows);
    }

    /// Forward auction: rows in turn bid for their best column, above the second best by `eps`, until each has a column
    /// or `budget` bids were made. Returns the number of bids.
    ///
    /// Source: Bertsekas 1988, "The auction algorithm: a distributed relaxation method for the assignment problem".
    fn auction(&mut self, eps: f64, budget: usize) -> usize {
        self.clear();
        let mut queue: VecDeque<usize> = (0..self.rows).collect();
        for bids in 0..budget {
            let Some(row) = queue.pop_front() else { return bids };
            let Some(Choice { column, value, second }) = self.choose(row) else { continue };
            self.price[column] += (second - value).min(self.range) + eps;
            queue.extend(self.take(row, column));
        }
        budget
    }
}
