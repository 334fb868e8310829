//! Linear assignment: one column for each row, such that the chosen entries of a matrix have the smallest or largest
//! sum.
//!
//! ```text
//! minimise  sum_i c[i, s(i)]  over one-to-one s     =     maximise  sum_i u[i] + sum_j v[j]  where  u[i] + v[j] <= c[i, j]
//! ```
//!
//! Any `u, v` that satisfy the right-hand side bound the left-hand side from below. So a solution comes with a proof:
//! the gap between the two sums, computed in f64 from the entries as given. Rows or columns that stay free have `u <=
//! 0` or `v <= 0`. For the largest sum all signs are reversed: `u[i] + v[j] >= c[i, j]`, and free ones are `>= 0`.
//!
//! Square problems first reduce columns and rows. If that leaves many rows free, an auction with falling `eps` finds
//! prices. Shortest augmenting paths then make the result exact from any start. Each phase names its source.

mod path;
mod phases;
mod solver;

use crate::error::{Error, Result};
use phases::{Found, square, warm, wide};
use solver::NONE;

/// Which sum to find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// The smallest. `+inf` marks entries that must not be chosen.
    Minimize,
    /// The largest. `-inf` marks entries that must not be chosen.
    Maximize,
}

impl Goal {
    fn sign(self) -> f64 {
        match self {
            Goal::Minimize => 1.0,
            Goal::Maximize => -1.0,
        }
    }
}

/// An entry of a cost matrix. Every value must be exact in f64.
pub trait Cost: Copy {
    /// The same value in f64.
    fn to_f64(self) -> f64;
}

impl Cost for f32 {
    fn to_f64(self) -> f64 {
        self as f64
    }
}

impl Cost for f64 {
    fn to_f64(self) -> f64 {
        self
    }
}

impl Cost for i32 {
    fn to_f64(self) -> f64 {
        self as f64
    }
}

/// A solution and its proof of optimality.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Assignment {
    /// The column of each row. `None` if a row stays free, because there are more rows than columns.
    pub columns: Vec<Option<usize>>,
    /// Sum of the chosen entries.
    pub value: f64,
    /// Potentials of the rows.
    pub dual_u: Vec<f64>,
    /// Potentials of the columns.
    pub dual_v: Vec<f64>,
    /// The most that `value` can differ from the optimum: its distance from the sum of the potentials.
    pub gap: f64,
    /// Whether the gap is nothing but rounding. The gap plus the rounding error of the potentials is then at most `64
    /// eps max(rows, columns) max|c|`, with f64's `eps` and without forbidden entries. For whole numbers, a gap below 1
    /// means that no assignment is better.
    pub exact: bool,
}

/// Finds the best assignment of `cost`, row-major with `size = [rows, columns]`. It has `min(rows, columns)` pairs.
///
/// ```
/// use tiebeam::linalg::assignment::{Goal, assign};
/// let best = assign(&[4, 1, 3, 2, 0, 5, 3, 2, 2], [3, 3], Goal::Minimize)?;
/// assert_eq!(best.columns, [Some(1), Some(0), Some(2)]);
/// assert!(best.value == 5.0 && best.exact);
/// # Ok::<(), tiebeam::Error>(())
/// ```
///
/// # Errors
/// [`Error::Config`] for an entry that is NaN or infinite with the wrong sign, for entries that f64 cannot sum, and if
/// forbidden entries leave no assignment.
///
/// # Panics
/// If `cost` does not have `rows * columns` elements.
#[track_caller]
pub fn assign<C: Cost>(cost: &[C], size: [usize; 2], goal: Goal) -> Result<Assignment> {
    let scale = Scale::of(cost, size, goal)?;
    solve(cost, size, goal, &scale, None)
}

/// Like [`assign`], starting from the column potentials (`dual_v`) of an earlier, similar problem with the same goal.
///
/// The result is equally good for any prices. Good prices save time. Only square problems use them.
///
/// # Errors
/// As for [`assign`], and for a price that is not finite.
///
/// # Panics
/// If `cost` does not have `rows * columns` elements or `prices` does not have `columns`.
///
/// ```
/// use tiebeam::linalg::assignment::{Goal, assign, assign_from};
/// let first = assign(&[4, 1, 2, 3], [2, 2], Goal::Minimize)?;
/// let next = assign_from(&[4, 1, 2, 4], [2, 2], Goal::Minimize, &first.dual_v)?; // a similar problem
/// assert_eq!(next.columns, [Some(1), Some(0)]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[track_caller]
pub fn assign_from<C: Cost>(cost: &[C], size: [usize; 2], goal: Goal, prices: &[f64]) -> Result<Assignment> {
    check_prices(size, prices)?;
    let scale = Scale::of(cost, size, goal)?;
    solve(cost, size, goal, &scale, Some(prices))
}

/// Returns the value of an assignment, with the proof that these column potentials give. It is `exact` only if they
/// prove it.
///
/// Potentials that break the sign rule of free columns are moved to 0. Those of the rows are the best for these column
/// potentials.
///
/// # Errors
/// As for [`assign`], for a price that is not finite, and if `columns` is not an assignment: a column is used twice or
/// out of range, there are too few, or an entry is forbidden.
///
/// # Panics
/// As for [`assign_from`], and if `columns` does not have `rows` elements.
///
/// ```
/// use tiebeam::linalg::assignment::{Goal, certify};
/// let prices = [0.0, -1.0];
/// let best = certify(&[4, 1, 2, 3], [2, 2], Goal::Minimize, &[Some(1), Some(0)], &prices)?;
/// assert!(best.value == 3.0 && best.exact); // 1 + 2, and the prices prove that no less is possible
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[track_caller]
pub fn certify<C: Cost>(
    cost: &[C],
    size: [usize; 2],
    goal: Goal,
    columns: &[Option<usize>],
    prices: &[f64],
) -> Result<Assignment> {
    assert!(columns.len() == size[0], "assignment: {} columns for {} rows", columns.len(), size[0]);
    check_prices(size, prices)?;
    let scale = Scale::of(cost, size, goal)?;
    let mut used = vec![false; size[1]];
    for (row, &column) in columns.iter().enumerate().filter_map(|(i, c)| c.as_ref().map(|c| (i, c))) {
        let taken = used.get_mut(column).is_none_or(|used| std::mem::replace(used, true));
        if taken || !cost[row * size[1] + column].to_f64().is_finite() {
            let why = if taken { "taken twice or past the end" } else { "forbidden" };
            return Err(Error::config(format!("assignment: row {row}: column {column} is {why}")));
        }
    }
    let pairs = columns.iter().flatten().count();
    let want = size[0].min(size[1]);
    if pairs != want {
        let what = format!("assignment: {pairs} pairs, but {size:?} has {want}; give every row a column");
        return Err(Error::config(what));
    }
    Ok(proof(cost, size, goal, &scale, columns.to_vec(), prices))
}

#[track_caller]
fn check_prices(size: [usize; 2], prices: &[f64]) -> Result<()> {
    assert!(prices.len() == size[1], "assignment: {} prices for {} columns", prices.len(), size[1]);
    match prices.iter().position(|p| !p.is_finite()) {
        Some(at) => {
            Err(Error::config(format!("assignment: price {at} is {}; prices must be finite", prices[at])))
        }
        None => Ok(()),
    }
}

/// The magnitudes of the entries, without forbidden ones.
struct Scale {
    /// Largest `|c|`.
    most: f64,
    /// Largest difference of two entries.
    range: f64,
    /// Smallest entry of each column, with the sign of the minimisation.
    least: Vec<f64>,
}

impl Scale {
    /// Reads every entry once.
    #[track_caller]
    fn of<C: Cost>(cost: &[C], [rows, columns]: [usize; 2], goal: Goal) -> Result<Scale> {
        let count = rows.checked_mul(columns);
        assert!(Some(cost.len()) == count, "assignment: {} elements for [{rows}, {columns}]", cost.len());
        if rows.max(columns) >= NONE as usize / 2 {
            return Err(Error::config(format!(
                "assignment: [{rows}, {columns}] is too large for 32-bit indices"
            )));
        }
        let sign = goal.sign();
        let mut least = vec![f64::INFINITY; columns];
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for (i, row) in cost.chunks_exact(columns.max(1)).enumerate() {
            let mut number = true;
            for (&c, least) in row.iter().zip(&mut least) {
                let value = sign * c.to_f64();
                number &= value > f64::NEG_INFINITY;
                *least = if value < *least { value } else { *least };
                let allowed = if value < f64::INFINITY { value } else { f64::NEG_INFINITY };
                high = if allowed > high { allowed } else { high };
            }
            if !number {
                let bad = |&c: &C| sign * c.to_f64() <= f64::NEG_INFINITY || c.to_f64().is_nan();
                let j = row.iter().position(bad).unwrap_or(0);
                let (what, forbidden) = (row[j].to_f64(), sign * f64::INFINITY);
                return Err(Error::config(format!(
                    "assignment: entry [{i}, {j}] is {what}; entries must be numbers, {forbidden:+} where forbidden"
                )));
            }
        }
        low = least.iter().copied().fold(low, f64::min);
        let (most, range) = if high >= low { (low.abs().max(high.abs()), high - low) } else { (0.0, 0.0) };
        if !(most * 8.0 * (rows + columns) as f64).is_finite() {
            return Err(Error::config(format!(
                "assignment: entries up to {most:e} overflow in sums; scale them down"
            )));
        }
        Ok(Scale { most, range, least })
    }
}

fn solve<C: Cost>(
    cost: &[C],
    size: [usize; 2],
    goal: Goal,
    scale: &Scale,
    prices: Option<&[f64]>,
) -> Result<Assignment> {
    let [rows, columns] = size;
    let sign = goal.sign();
    let prove = |found: &Found, tall: bool| {
        let (of, v) = if tall { (&found.row_of, &found.u) } else { (&found.column_of, &found.v) };
        let pairs = of.iter().map(|&c| (c != NONE).then_some(c as usize)).collect();
        let prices: Vec<f64> = v.iter().map(|v| sign * v).collect();
        proof(cost, size, goal, scale, pairs, &prices)
    };
    if rows.min(columns) == 0 {
        return Ok(proof(cost, size, goal, scale, vec![None; rows], &vec![0.0; columns]));
    }
    if rows < columns {
        return Ok(prove(&wide(cost, size, sign, scale.range, "row")?, false));
    }
    if rows > columns {
        let turned: Vec<C> = (0..rows * columns).map(|e| cost[e % rows * columns + e / rows]).collect();
        return Ok(prove(&wide(&turned, [columns, rows], sign, scale.range, "column")?, true));
    }
    if let Some(prices) = prices {
        // A constant that all prices share has no meaning and costs digits, so it is removed.
        let (low, high) =
            prices.iter().fold((f64::MAX, f64::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        let start = prices.iter().map(|v| sign * (low / 2.0 + high / 2.0 - v)).collect();
        let found = warm(cost, rows, sign, scale.range, start)?.map(|found| prove(&found, false));
        // Prices that are far larger than the entries leave too few digits for the entries.
        if let Some(found) = found.filter(|found| found.exact) {
            return Ok(found);
        }
    }
    let start = scale.least.iter().map(|&c| if c.is_finite() { -c } else { 0.0 }).collect();
    Ok(prove(&square(cost, rows, sign, scale.range, start)?, false))
}

/// Computes the value and its gap. `columns` is a complete assignment without forbidden entries.
fn proof<C: Cost>(
    cost: &[C],
    [rows, width]: [usize; 2],
    goal: Goal,
    scale: &Scale,
    columns: Vec<Option<usize>>,
    prices: &[f64],
) -> Assignment {
    let sign = goal.sign();
    // With the sign of the minimisation. If columns stay free, all `v <= 0`.
    let bound = if width > rows { 0.0 } else { f64::INFINITY };
    let v: Vec<f64> = prices.iter().map(|p| (sign * p).min(bound)).collect();
    let (mut value, mut gap, mut rounding) = (0.0, 0.0, 0.0);
    let mut dual_u = Vec::with_capacity(rows);
    let mut free: Vec<bool> = vec![true; width];
    for (i, &column) in columns.iter().enumerate() {
        let row = &cost[i * width..][..width];
        // If rows stay free, all `u <= 0`.
        let least = if rows > width { 0.0 } else { f64::INFINITY };
        let u = least_of(row, &v, sign, least);
        let paid = match column {
            Some(j) => {
                free[j] = false;
                value += row[j].to_f64();
                sign * row[j].to_f64() - v[j]
            }
            None => 0.0,
        };
        gap += paid - u;
        rounding += 0.5 * f64::EPSILON * u.abs();
        dual_u.push(sign * u);
    }
    gap -= v.iter().zip(&free).filter(|(_, free)| **free).map(|(v, _)| v).sum::<f64>();
    let allowed = 64.0 * f64::EPSILON * rows.max(width) as f64 * scale.most;
    let dual_v = v.iter().map(|v| sign * v).collect();
    Assignment { columns, value, dual_u, dual_v, gap, exact: gap + rounding <= allowed }
}

/// Returns the smallest of `sign * row - v` and `least`.
fn least_of<C: Cost>(row: &[C], v: &[f64], sign: f64, least: f64) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [least; LANES];
    let (costs, prices) = (row.chunks_exact(LANES), v.chunks_exact(LANES));
    for ((&c, v), lane) in costs.remainder().iter().zip(prices.remainder()).zip(&mut lanes) {
        *lane = lane.min(sign * c.to_f64() - v);
    }
    for (c, v) in costs.zip(prices) {
        for lane in 0..LANES {
            let value = sign * c[lane].to_f64() - v[lane];
            lanes[lane] = if value < lanes[lane] { value } else { lanes[lane] };
        }
    }
    lanes.into_iter().fold(least, f64::min)
}
