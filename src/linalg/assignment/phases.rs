//! Which phase follows which, for each kind of problem.

use super::Cost;
use super::path::Search;
use super::solver::{NONE, Solver};
use crate::error::{Error, Result};

/// Paths are tried at once where reduction leaves at most one row in `MANY` free. Measured at n = 2048 on independent
/// entries, where it leaves 8 to 11%: 40 to 60 ms by paths at once, 50 to 90 ms by auction first; on products of rank 32, where
/// it leaves 98%: 8000 ms and 200 ms.
const MANY: usize = 4;
/// Blocks a row that paths may read from a caller's prices before these are dropped. Good prices need fewer than 20; a third of
/// what starting without takes is lost at most.
const EARLIER: usize = 64;
/// The same from reduced prices, before an auction looks for better ones. Independent entries at n = 4096 need 40 to 110.
const REDUCED: usize = 400;

/// A solution of the problem as minimised.
pub(super) struct Found {
    pub column_of: Vec<u32>,
    pub row_of: Vec<u32>,
    pub u: Vec<f64>,
    pub v: Vec<f64>,
}

impl Found {
    fn of<C: Cost>(solver: Solver<C>) -> Found {
        let v = solver.price.iter().map(|p| -p).collect();
        Found { column_of: solver.column_of, row_of: solver.row_of, u: solver.level, v }
    }
}

/// `[n, n]` from prices of its own.
pub(super) fn square<C: Cost>(cost: &[C], n: usize, sign: f64, range: f64, start: Vec<f64>) -> Result<Found> {
    let mut solver = Solver::new(cost, [n, n], sign, range, start);
    let (price, bound) = (solver.price.clone(), solver.bound.clone());
    solver.reduce(2 * n);
    if solver.free() > n / MANY || !paths(&mut solver, "row", REDUCED * n)? {
        // Not from the prices of a reduction that failed: its bids were too small to settle anything.
        (solver.price, solver.bound) = (price, bound);
        solver.find_prices();
        paths(&mut solver, "row", usize::MAX)?;
    }
    Ok(Found::of(solver))
}

/// `[n, n]` from a caller's prices; `None` where these are of little use.
pub(super) fn warm<C: Cost>(
    cost: &[C],
    n: usize,
    sign: f64,
    range: f64,
    start: Vec<f64>,
) -> Result<Option<Found>> {
    let mut solver = Solver::new(cost, [n, n], sign, range, start);
    solver.reduce(2 * n);
    Ok(paths(&mut solver, "row", EARLIER * n)?.then(|| Found::of(solver)))
}

/// Fewer rows than columns. `line` is what the caller calls a row.
pub(super) fn wide<C: Cost>(
    cost: &[C],
    [rows, columns]: [usize; 2],
    sign: f64,
    range: f64,
    line: &str,
) -> Result<Found> {
    // Columns that stay free must keep the lowest price: falling `eps` would not leave it to them, `eps = 0` does.
    let mut solver = Solver::new(cost, [rows, columns], sign, range, vec![0.0; columns]);
    solver.reduce(2 * rows);
    // Made square, a flat problem would take far more memory than it has.
    let most = if columns <= 2 * rows { REDUCED * rows } else { usize::MAX };
    if paths(&mut solver, line, most)? {
        return Ok(Found::of(solver));
    }
    // Hard ones are nearly square: rows of zeros make them so, and take what columns are to spare.
    let mut full: Vec<f64> = cost.iter().map(|c| sign * c.to_f64()).collect();
    full.resize(columns * columns, 0.0);
    let most = full.iter().filter(|c| c.is_finite()).fold(0.0f64, |most, c| most.max(c.abs()));
    let mut least = vec![0.0f64; columns];
    for row in full[..rows * columns].chunks_exact(columns) {
        least.iter_mut().zip(row).for_each(|(least, &c)| *least = least.min(c));
    }
    let start = least.into_iter().map(|c| -c).collect();
    let mut found = square(&full, columns, 1.0, 2.0 * most, start)?;
    // Those that the zeros took have the highest potential: it becomes 0.
    let top = found.v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    found.v.iter_mut().for_each(|v| *v -= top);
    found.u.iter_mut().for_each(|u| *u += top);
    found.u.truncate(rows);
    found.column_of.truncate(rows);
    found.row_of.iter_mut().filter(|row| **row as usize >= rows).for_each(|row| *row = NONE);
    Ok(found)
}

/// Assigns the rows that are still free, one shortest path each; `false` when that took more than `budget` blocks.
fn paths<C: Cost>(solver: &mut Solver<C>, line: &str, budget: usize) -> Result<bool> {
    let mut search = Search::new(solver.columns);
    for row in 0..solver.rows {
        if search.reads > budget {
            return Ok(false);
        }
        if solver.column_of[row] == NONE && !search.augment(solver, row) {
            return Err(Error::config(format!(
                "assignment: {line} {row} cannot be served beside the others; forbid fewer entries"
            )));
        }
    }
    Ok(true)
}
