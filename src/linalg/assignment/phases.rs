//! The order of the phases for each kind of problem.

use super::Cost;
use super::path::Search;
use super::solver::{NONE, Solver};
use crate::error::{Error, Result};

/// If reduction leaves at most one row in `MANY` free, paths are tried at once, without an auction. Measured at n =
/// 2048: on independent entries, reduction leaves 8 to 11% free, and paths at once take 40 to 60 ms, an auction first
/// 50 to 90 ms. On products of rank 32, it leaves 98% free, and the times are 8000 ms and 200 ms.
const MANY: usize = 4;
/// Blocks per row that paths may read from a caller's prices, before these prices are dropped. Good prices need fewer
/// than 20. Bad ones cost at most a third of the time of a start without prices.
const EARLIER: usize = 64;
/// Blocks per row that paths may read from reduced prices, before an auction looks for better ones. Independent entries
/// at n = 4096 need 40 to 110.
const REDUCED: usize = 400;

/// A solution of the minimisation.
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

/// Solves a problem `[n, n]`, starting from prices that were derived from its own entries.
pub(super) fn square<C: Cost>(cost: &[C], n: usize, sign: f64, range: f64, start: Vec<f64>) -> Result<Found> {
    let mut solver = Solver::new(cost, [n, n], sign, range, start);
    let (price, bound) = (solver.price.clone(), solver.bound.clone());
    solver.reduce(2 * n);
    if solver.free() > n / MANY || !paths(&mut solver, "row", REDUCED * n)? {
        // Not from the prices of the reduction that failed, because its bids were too small to settle anything.
        (solver.price, solver.bound) = (price, bound);
        solver.find_prices();
        paths(&mut solver, "row", usize::MAX)?;
    }
    Ok(Found::of(solver))
}

/// Solves a problem `[n, n]` from a caller's prices. `None` if these are of little use.
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

/// Solves a problem with fewer rows than columns. `line` is what the caller calls a row.
pub(super) fn wide<C: Cost>(
    cost: &[C],
    [rows, columns]: [usize; 2],
    sign: f64,
    range: f64,
    line: &str,
) -> Result<Found> {
    // Columns that stay free must keep the lowest price. An auction with falling `eps` would not ensure this, but
    // reduction, which has `eps = 0`, does.
    let mut solver = Solver::new(cost, [rows, columns], sign, range, vec![0.0; columns]);
    solver.reduce(2 * rows);
    // A flat problem is never made square, because that would take far more memory than the problem itself.
    let most = if columns <= 2 * rows { REDUCED * rows } else { usize::MAX };
    if paths(&mut solver, line, most)? {
        return Ok(Found::of(solver));
    }
    // A hard problem that is nearly square is made square by rows of zeros, which take the spare columns.
    let mut full: Vec<f64> = cost.iter().map(|c| sign * c.to_f64()).collect();
    full.resize(columns * columns, 0.0);
    let most = full.iter().filter(|c| c.is_finite()).fold(0.0f64, |most, c| most.max(c.abs()));
    let mut least = vec![0.0f64; columns];
    for row in full[..rows * columns].chunks_exact(columns) {
        least.iter_mut().zip(row).for_each(|(least, &c)| *least = least.min(c));
    }
    let start = least.into_iter().map(|c| -c).collect();
    let mut found = square(&full, columns, 1.0, 2.0 * most, start)?;
    // The columns that rows of zeros took have the highest potential. A shift makes it 0.
    let top = found.v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    found.v.iter_mut().for_each(|v| *v -= top);
    found.u.iter_mut().for_each(|u| *u += top);
    found.u.truncate(rows);
    found.column_of.truncate(rows);
    found.row_of.iter_mut().filter(|row| **row as usize >= rows).for_each(|row| *row = NONE);
    Ok(found)
}

/// Assigns the rows that are still free, by one shortest path each. Returns `false` if that took more than `budget`
/// blocks.
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
