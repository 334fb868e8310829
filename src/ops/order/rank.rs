//! Elements by rank, without sorting: finds the element of rank r, and cuts a tensor down to a range of ranks. Exact
//! and stable, for one tensor or for many that are read one after the other.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::reduction::arg::order64;
use crate::tensor::Tensor;
use std::ops::Range;

const BINS: usize = 2048;
/// Shift and width of the digits of a key, from the highest.
const DIGITS: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];
/// The fewest elements that a workgroup counts. With fewer, its bins cost more than its elements.
const SPAN: usize = 16384;

fn source() -> Source {
    Source::file("rank")
}

/// What elements are ranked by, from small to large. Equal elements keep their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// By absolute value.
    Magnitude,
    /// By value.
    Value,
}

/// The kernel's parameters. Those that an entry does not read stay 0.
#[derive(Clone, Copy, Default)]
struct Params {
    n: usize,
    span: usize,
    signed: bool,
    row: usize,
    shift: u32,
    digit: u32,
    mask: u32,
    prefix: u32,
    tie: Option<u32>,
    low: [u32; 2],
    high: [u32; 2],
}

impl Params {
    fn of(x: &Tensor, order: Order) -> Params {
        let (n, signed) = (x.count(), order == Order::Value);
        // A multiple of four, so that two workgroups never share a vector of four.
        let span = n.div_ceil(4096).next_multiple_of(4).max(SPAN);
        Params { n, span, signed, ..Params::default() }
    }

    fn launch<'a>(&self, source: &'a Source, entry: &'a str, groups: usize) -> Launch<'a> {
        Launch::new("rank", source, entry, grid(groups))
            .set("n", self.n)
            .set("span", self.span)
            .set("signed", self.signed)
            .set("row", self.row)
            .set("shift", self.shift)
            .set("digit", self.digit)
            .set("mask", self.mask)
            .set("prefix", self.prefix)
            .set("of_index", self.tie.is_some())
            .set("tie", self.tie.unwrap_or(0))
            .set("low_key", self.low[0])
            .set("low_index", self.low[1])
            .set("high_key", self.high[0])
            .set("high_index", self.high[1])
            // The loops walk the bins twice, and the span in vectors of four.
            .turns(2 * BINS / 64 + self.span / 256)
    }

    /// Runs an entry over the spans of `x`, with results in `counts`.
    fn over_spans(&self, x: &Tensor, entry: &str, counts: &Tensor) {
        if self.n > 0 {
            let (source, groups) = (source(), self.n.div_ceil(self.span));
            x.gpu().launch(self.launch(&source, entry, groups).bind("x", x).bind_mut("counts", counts));
        }
    }

    /// Adds the counts of one digit of `x` to a row of `counts`.
    fn count(&self, x: &Tensor, counts: &Tensor) {
        self.over_spans(x, "count", counts);
    }
}

/// Returns counters that are set to 0.
pub(super) fn counters(x: &Tensor, rows: usize, columns: usize) -> Tensor {
    let counts = Tensor::empty(x.gpu(), "rank", [rows, columns], DType::U32);
    clear(&counts, rows * columns);
    counts
}

/// Sets the first `n` of these counters to 0.
pub(super) fn clear(counts: &Tensor, n: usize) {
    let source = source();
    let launch = Params { n, ..Params::default() }.launch(&source, "clear", n.div_ceil(64));
    counts.gpu().launch(launch.bind_mut("counts", counts));
}

/// The element of a given rank: its key, and how many elements with the same key come before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    order: Order,
    key: u32,
    ties: u64,
}

impl Cut {
    /// The element of this magnitude before which `ties` others have the same.
    pub(super) fn of_magnitude(key: u32, ties: u64) -> Cut {
        Cut { order: Order::Magnitude, key, ties }
    }

    /// The element itself (its magnitude under [`Order::Magnitude`]).
    pub fn value(&self) -> f32 {
        let flip = if self.key >= 1 << 31 { 1 << 31 } else { u32::MAX };
        f32::from_bits(if self.order == Order::Value { self.key ^ flip } else { self.key })
    }

    /// Returns the key and index of this cut in `x`, the next of the tensors that were ranked together, and advances
    /// the cut past `x`.
    fn place(&mut self, x: &Tensor) -> Result<[u32; 2]> {
        if self.ties == 0 {
            return Ok([self.key, 0]);
        }
        let (x, mut index) = (&plain(x), 0);
        for (shift, width) in DIGITS {
            if self.ties == 0 {
                break;
            }
            let counts = counters(x, 1, BINS);
            let mask = above(shift, width);
            let pass =
                Params { shift, digit: digit(width), mask, prefix: index, ..Params::of(x, self.order) };
            Params { tie: Some(self.key), ..pass }.count(x, &counts);
            match walk(counts.to_vec::<u32>()?.into_iter().map(u64::from), self.ties) {
                (Some(bin), before) => (index, self.ties) = (index | bin << shift, self.ties - before),
                // All ties in this tensor come before the cut. The rest are in later tensors.
                (None, all) => {
                    self.ties -= all;
                    return Ok([self.key.saturating_add(1), 0]);
                }
            }
        }
        self.ties = 0;
        Ok([self.key, index])
    }
}

/// The mask of the bits above a digit.
fn above(shift: u32, width: u32) -> u32 {
    u32::MAX.checked_shl(shift + width).unwrap_or(0)
}

fn digit(width: u32) -> u32 {
    (1 << width) - 1
}

/// Returns the bin in which the running sum passes `rank`, and the sum before it. If there is none, the second number
/// is the sum of all.
fn walk(counts: impl Iterator<Item = u64>, rank: u64) -> (Option<u32>, u64) {
    let mut before = 0;
    for (bin, count) in counts.enumerate() {
        if before + count > rank {
            return (Some(bin as u32), before);
        }
        before += count;
    }
    (None, before)
}

/// Returns the elements of the ranks `ranks[s]` of each stream `s`. A stream is many tensors in order, as if
/// concatenated.
///
/// `each` is called three times. Every time it passes the tensors to its argument set by set, where a set has the next
/// tensor of every stream, so only one set must be in memory. A call costs one pass over the elements per rank.
///
/// # Errors
/// The error that `each` returns, or the device's fault.
///
/// # Panics
/// If a rank is not below the stream's count.
#[track_caller]
pub fn select(
    order: Order,
    ranks: &[Vec<u64>],
    mut each: impl FnMut(&mut dyn FnMut(&[Tensor]) -> Result<()>) -> Result<()>,
) -> Result<Vec<Vec<Cut>>> {
    let mut cuts: Vec<Vec<Cut>> = ranks
        .iter()
        .map(|ranks| ranks.iter().map(|&rank| Cut { order, key: 0, ties: rank }).collect())
        .collect();
    let rows: Vec<(usize, usize)> =
        ranks.iter().enumerate().flat_map(|(s, r)| (0..r.len()).map(move |t| (s, t))).collect();
    if rows.is_empty() {
        return Ok(cuts);
    }
    for (shift, width) in DIGITS {
        let mut sums = vec![0u64; rows.len() * BINS];
        each(&mut |xs| {
            let xs: Vec<Tensor> = xs.iter().map(plain).collect();
            let counts = counters(&xs[0], rows.len(), BINS);
            for (row, &(s, t)) in rows.iter().enumerate() {
                let (mask, prefix) = (above(shift, width), cuts[s][t].key);
                let pass =
                    Params { row, shift, digit: digit(width), mask, prefix, ..Params::of(&xs[s], order) };
                pass.count(&xs[s], &counts);
            }
            for (sum, count) in sums.iter_mut().zip(counts.to_vec::<u32>()?) {
                *sum += u64::from(count);
            }
            Ok(())
        })?;
        for (&(s, t), sums) in rows.iter().zip(sums.chunks(BINS)) {
            let cut = &mut cuts[s][t];
            let (bin, before) = walk(sums.iter().copied(), cut.ties);
            let bin = bin.unwrap_or_else(|| panic!("rank: {} of fewer elements", ranks[s][t]));
            (cut.key, cut.ties) = (cut.key | bin << shift, cut.ties - before);
        }
    }
    Ok(cuts)
}

/// Returns `x` with 0 in place of elements that are below `low` or not below `high`. Without a cut, that end is open.
/// `x` is the next of the tensors that [`select`] saw, and the cuts are advanced past it.
///
/// # Errors
/// The device's fault.
pub fn keep_between(x: &Tensor, low: Option<&mut Cut>, high: Option<&mut Cut>) -> Result<Tensor> {
    let order = low.as_ref().or(high.as_ref()).map_or(Order::Magnitude, |cut| cut.order);
    let x = plain(x);
    let low = low.map_or(Ok(FIRST), |cut| cut.place(&x))?;
    let high = high.map_or(Ok(BEHIND), |cut| cut.place(&x))?;
    Ok(kept(&x, order, [low, high]))
}

/// Returns `x` with 0 where the key and index of an element are not within `bounds`.
fn kept(x: &Tensor, order: Order, [low, high]: [[u32; 2]; 2]) -> Tensor {
    let y = Tensor::empty(x.gpu(), "rank", x.shape(), DType::F32);
    if y.count() > 0 {
        let (params, source) = (Params { low, high, ..Params::of(x, order) }, source());
        let launch = params.launch(&source, "keep", x.count().div_ceil(4).div_ceil(64));
        x.gpu().launch(launch.bind("x", x).bind_mut("y", &y));
    }
    y
}

/// Returns the elements as f32 in row-major order, outside the graph.
fn plain(x: &Tensor) -> Tensor {
    crate::ops::float("rank", x).detach().contiguous()
}

/// Key and index that no element is before.
const FIRST: [u32; 2] = [0, 0];
/// Key and index that every element is before.
const BEHIND: [u32; 2] = [u32::MAX, u32::MAX];

/// An end of a range of ranks.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// The first or the last rank.
    Open,
    /// An element that is looked for in each tensor as it comes.
    Cut(Cut),
    /// Key and index of the end in each tensor to come.
    Placed(std::vec::IntoIter<[u32; 2]>),
}

impl End {
    fn place(&mut self, x: &Tensor, open: [u32; 2]) -> Result<[u32; 2]> {
        match self {
            End::Open => Ok(open),
            End::Cut(cut) => cut.place(x),
            End::Placed(places) => Ok(places.next().expect("rank: more tensors are cut than were ranked")),
        }
    }
}

/// A range of ranks of one stream by magnitude, found by [`ranges`]. [`Kept::keep`] applies it to the stream's tensors.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Both ends of the range. `None` if nothing is kept.
    ends: Option<[End; 2]>,
}

impl Kept {
    /// A range of ranks of `n`, which lies between these ends.
    pub(super) fn new(n: usize, ranks: &Range<usize>, ends: [End; 2]) -> Kept {
        Kept { ends: (ranks.start.min(n) < ranks.end).then_some(ends) }
    }

    /// Returns the next of the tensors that were ranked, with 0 in place of elements outside the range.
    ///
    /// # Errors
    /// The device's fault.
    pub fn keep(&mut self, x: &Tensor) -> Result<Tensor> {
        if self.ends.is_none() {
            return Ok(Tensor::zeros(x.gpu(), *x.shape()));
        }
        let x = plain(x);
        let bounds = self.bounds(&x)?;
        Ok(kept(&x, Order::Magnitude, bounds))
    }

    /// Returns the keys and indices between which the elements of the next tensor are kept. Most often this reads no
    /// element of `x`, which may be pending.
    pub(super) fn bounds(&mut self, x: &Tensor) -> Result<[[u32; 2]; 2]> {
        match &mut self.ends {
            // No magnitude has the largest key, so the index beside it says nothing, and 0 spares kernels a comparison.
            Some([low, high]) => Ok([low.place(x, FIRST)?, high.place(x, [u32::MAX, 0])?]),
            None => Ok([BEHIND, FIRST]),
        }
    }
}

/// Returns the ranks of both ends of ranges of `counts[s]` elements. An end outside the stream is open.
pub(super) fn ends(counts: &[usize], ranks: &[Range<usize>]) -> Vec<[Option<usize>; 2]> {
    assert!(counts.len() == ranks.len(), "rank: {} ranges for {} streams", ranks.len(), counts.len());
    let pair =
        |(&n, r): (&usize, &Range<usize>)| [r.start, r.end].map(|end| (end > 0 && end < n).then_some(end));
    counts.iter().zip(ranks).map(pair).collect()
}

/// Finds where ranges of ranks by magnitude begin and end in streams of `counts[s]` elements. For `each`, see
/// [`select`].
///
/// # Errors
/// As for [`select`].
///
/// # Panics
/// If there are not as many ranges as streams.
#[track_caller]
pub fn ranges(
    counts: &[usize],
    ranks: &[Range<usize>],
    each: impl FnMut(&mut dyn FnMut(&[Tensor]) -> Result<()>) -> Result<()>,
) -> Result<Vec<Kept>> {
    let ends = ends(counts, ranks);
    let wanted: Vec<Vec<u64>> =
        ends.iter().map(|pair| pair.iter().flatten().map(|&end| end as u64).collect()).collect();
    let cuts = select(Order::Magnitude, &wanted, each)?;
    let mut kept = Vec::new();
    for (s, cuts) in cuts.into_iter().enumerate() {
        let mut cuts = cuts.into_iter();
        let found = ends[s].map(|end| end.and_then(|_| cuts.next()).map_or(End::Open, End::Cut));
        kept.push(Kept::new(counts[s], &ranks[s], found));
    }
    Ok(kept)
}

/// Returns each tensor with 0 in place of elements whose rank is outside `ranks`. Elements are ranked by magnitude,
/// from small to large, with ties in the order of their index. The result is exact, and nothing is sorted. No gradient.
///
/// # Errors
/// The device's fault.
///
/// # Panics
/// If there are not as many ranges as tensors or the elements are integers.
#[track_caller]
pub fn keep_ranks(xs: &[Tensor], ranks: &[Range<usize>]) -> Result<Vec<Tensor>> {
    let counts: Vec<usize> = xs.iter().map(Tensor::count).collect();
    let kept = ranges(&counts, ranks, |visit| visit(xs))?;
    kept.into_iter().zip(xs).map(|(mut kept, x)| kept.keep(x)).collect()
}

impl Tensor {
    /// Returns `[how many elements are NaN or infinite, 2^32 - 1 - the first one's index]`, as u32, or `[0, 0]` if all
    /// are finite. It reads the bits, so that no driver's fast math can hide such an element.
    ///
    /// # Panics
    /// When the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, f32::NAN, 2.0, f32::INFINITY], [4]);
    /// let found = x.non_finite().to_vec::<u32>()?;
    /// assert_eq!(found, [2, u32::MAX - 1]); // two of them, and the first has index 1
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn non_finite(&self) -> Tensor {
        let x = crate::ops::float("non_finite", self).detach().contiguous();
        let counts = counters(&x, 1, 2);
        Params::of(&x, Order::Magnitude).over_spans(&x, "non_finite", &counts);
        counts.reshape([2])
    }
}

/// Returns `x` with 0 outside a range of ranks, by the standard library's stable sort.
pub(super) fn keep64(x: &Array, ranks: Range<usize>) -> Array {
    let mut order: Vec<usize> = (0..x.data.len()).collect();
    order.sort_by(|&a, &b| order64(x.data[a].abs(), x.data[b].abs()));
    let mut y = Array::from_fn(x.shape, |_| 0.0);
    for &i in &order[ranks.start.min(order.len())..ranks.end.min(order.len())] {
        y.data[i] = x.data[i];
    }
    y
}

pub(super) fn cases() -> Vec<Case> {
    let specials = Fill::Values(vec![-0.0, 0.0, 1.5, -1.5, -2.0, 1e-41, 3e38, -1e-41, 0.25]);
    let few = Fill::Integers(-3, 4);
    let mut all = Vec::new();
    for (shape, ranks, fill) in [
        (&[1][..], 0..1, &few),
        (&[1], 0..0, &few),
        (&[7, 13], 40..91, &few),
        (&[7, 13], 0..40, &Fill::Normal(1.0)),
        (&[31], 5..17, &specials),
        (&[3, 2049], 1000..6000, &few),
        (&[40009], 39000..40009, &Fill::Normal(1.0)),
        (&[40009], 13..31007, &few),
        (&[40009], 500..99999, &Fill::Values(vec![2.0])),
    ] {
        let name = format!("keep {ranks:?} of {shape:?}");
        let input = vec![Input::normal(shape).fill(fill.clone()).fixed()];
        let of = ranks.clone();
        let forward =
            move |x: &[Tensor]| keep_ranks(x, std::slice::from_ref(&of)).expect("a device").remove(0);
        all.push(Case::new(name, input, forward, move |x| keep64(&x[0], ranks.clone())).exact());
    }
    for order in [Order::Magnitude, Order::Value] {
        // Two streams of two tensors each, with ranks over all their elements.
        let inputs = vec![Input::normal([3, 700]).fixed(), Input::normal([257]).fill(few.clone()).fixed()];
        let forward = move |x: &[Tensor]| {
            let ranks: Vec<u64> = (0..2357).step_by(131).collect();
            let each = |visit: &mut dyn FnMut(&[Tensor]) -> Result<()>| {
                visit(&[x[0].clone(), x[1].clone()])?;
                visit(&[x[1].clone(), x[0].clone()])
            };
            let cuts = select(order, &[ranks.clone(), ranks], each).expect("a device");
            let values: Vec<f32> = cuts.iter().flatten().map(Cut::value).collect();
            Tensor::from_slice(x[0].gpu(), &values, [2, values.len() / 2])
        };
        let reference = move |x: &[Array]| {
            let mut all: Vec<f64> = x[0].data.iter().chain(&x[1].data).copied().collect();
            if order == Order::Magnitude {
                all.iter_mut().for_each(|v| *v = v.abs());
            }
            all.sort_by(f64::total_cmp);
            let at: Vec<f64> = all.into_iter().step_by(131).collect();
            Array::from_fn([2, at.len()], |i| at[i % at.len()])
        };
        all.push(Case::new(format!("select by {order:?}"), inputs, forward, reference).exact());
    }
    let values = Fill::Values(vec![0.0, 1.0, f64::INFINITY, 3.0, f64::NAN, -1.0, f64::NEG_INFINITY]);
    for (shape, fill) in [(&[2][..], values.clone()), (&[40007], values), (&[40007], Fill::Normal(1.0))] {
        let input = vec![Input::normal(shape).fill(fill).fixed()];
        let reference = |x: &[Array]| {
            let bad = |v: &&f64| !v.is_finite();
            let first = x[0].data.iter().position(|v| !v.is_finite());
            let found = x[0].data.iter().filter(bad).count() as f64;
            let last = first.map_or(0.0, |i| f64::from(u32::MAX - i as u32));
            Array::from_fn([2], |i| [found, last][i])
        };
        all.push(
            Case::new(format!("non finite of {shape:?}"), input, |x| x[0].non_finite(), reference).exact(),
        );
    }
    all
}
