//! Ranges of ranks in one pass over the elements. A sample says between which two magnitudes an end of a range must be. The pass
//! counts what is below and lists what is between, and the list has the element of the rank.
//!
//! Differences of models are often many times the same: 0 where a tensor was not trained, one unit in the last place of bf16
//! elsewhere. Zeros need no place, because they are 0 whether they are kept or not. If the sample has only one magnitude where the
//! end must be, the pass counts it, and each tensor is searched for the place when it is cut.
//!
//! The result is exact, whatever the sample. If an end is not where the sample says, or too much of several magnitudes is between,
//! the answer is that nothing was found, and [`rank::ranges`] finds it in three passes.

use super::rank::{self, Cut, End, Kept};
use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::readback::Reading;
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::tensor::Tensor;
use std::ops::Range;

/// Elements of a piece of the sample. Neighbours may be alike, but they come in the same line of a cache.
const PIECE: usize = 4;
/// The most pieces.
const PIECES: usize = 16384;
/// Half the width of a bracket, in standard errors of the sample's rank. One in 15 000 ends is farther out.
const WIDTH: f64 = 4.0;
/// The largest share of a tensor's elements that may be listed. [`LEAST`] of them may be in any case.
const SHARE: f64 = 1.0 / 16.0;
const LEAST: usize = 4096;
/// The room of a list, as a multiple of what the sample lets expect. Parts of a tensor differ.
const SPARE: f64 = 1.5;

/// Length and starts of the pieces of a sample of `n` elements.
pub fn pieces(n: usize) -> (usize, Vec<usize>) {
    let length = PIECE.min(n);
    let count = n.checked_div(length).map_or(0, |count| count.min(PIECES));
    // One piece in each of equal stretches, at places without a period, because the columns of a matrix have one.
    let place = |k: usize| {
        let [from, to] = [k, k + 1].map(|k| (k as u128 * n as u128 / count as u128) as usize);
        let hash = (k as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        from + ((hash as usize * (to - from - length + 1)) >> 32)
    };
    (length, (0..count).map(place).collect())
}

/// The most bytes that a search for `ends` ends takes, in a tensor of `n` elements that is read in parts of `part`: the lists with
/// a copy of their keys, two parts' lists on the device and on their way to the host, and the samples.
pub fn bytes(n: usize, part: usize, ends: usize) -> u64 {
    let (room, parts) = (8 * room(part.min(n), SHARE), n.div_ceil(part.max(1)));
    (ends * (parts * room * 3 / 2 + 5 * room + 16 * PIECE * PIECES)) as u64
}

/// The number of elements that may be listed, of `n`, if this share is to be.
fn room(n: usize, share: f64) -> usize {
    ((n as f64 * share) as usize).max(LEAST).min(n)
}

/// The least key of an element that is not 0. No bracket begins before it.
const FIRST: u32 = 1;
/// The largest key: a magnitude has no sign.
const LAST: u32 = u32::MAX >> 1;

/// The sampled elements of one stream, in order.
struct Sample {
    keys: Vec<u32>,
    sorted: Vec<u32>,
    piece: usize,
}

impl Sample {
    fn new(x: &[f32], piece: usize) -> Sample {
        let keys: Vec<u32> = x.iter().map(|x| x.to_bits() & LAST).collect();
        let mut sorted = keys.clone();
        sorted.sort_unstable();
        Sample { keys, sorted, piece }
    }

    /// Returns two keys between which the element of rank `rank` of `n` most likely is, if it is not 0, and the share of elements for
    /// which there should be room. `None` if that is too large, and the keys differ.
    fn bracket(&self, rank: usize, n: usize) -> Option<([u32; 2], f64)> {
        let (count, share) = (self.sorted.len() as f64, rank as f64 / n as f64);
        let middle = *self.sorted.get((share * count) as usize)?;
        // Elements of a piece may be alike, so the error is that of the pieces' shares, and no less than that of independent
        // elements.
        let pieces = self.keys.chunks(self.piece);
        let many = pieces.len() as f64;
        let below = |piece: &[u32]| {
            let below = piece.iter().filter(|&&key| key < middle).count();
            (below as f64 / self.piece as f64 - share).powi(2)
        };
        let variance = (pieces.map(below).sum::<f64>() / (many * many)).max(share * (1.0 - share) / count);
        let half = WIDTH * variance.sqrt() * count + 2.0;
        let low = share * count - half;
        let low = if low < 0.0 { FIRST } else { self.sorted[low as usize].max(FIRST) };
        let high =
            self.sorted.get((share * count + half).ceil() as usize).copied().unwrap_or(LAST).max(FIRST);
        let at = |key: u32| self.sorted.partition_point(|&other| other < key);
        let inside = (at(high + 1) - at(low)) as f64 / count;
        let wanted = SPARE * inside;
        match n <= LEAST || wanted * n as f64 <= room(n, SHARE) as f64 {
            true => Some(([low, high], wanted)),
            false => (low == high).then_some(([low, high], 0.0)),
        }
    }
}

/// An end that is looked for in a stream.
struct Search {
    rank: usize,
    bracket: [u32; 2],
    below: usize,
    inside: usize,
    /// Keys and indices inside of the bracket, for every tensor.
    lists: Vec<Vec<[u32; 2]>>,
    /// Whether a list was too long, and is empty here.
    lost: bool,
}

/// The most models of one kernel: so many have their brackets in a uniform's 256 bytes.
const MODELS: usize = 12;

/// The elements that a workgroup reads.
const SPAN: usize = 16384;

/// Counts and lists that are on their way to the host.
struct Pending {
    reading: Reading,
    /// Number of brackets.
    rows: usize,
    /// Elements of a list.
    room: usize,
}

/// A bracket that no element is inside of.
const NOWHERE: [u32; 2] = [LAST + 1; 2];

/// Starts to read differences of some streams and one `base`, each with up to `most` brackets, and lists with room for this share.
fn start(base: &Tensor, xs: &[(&Tensor, &[Search])], most: usize, share: f64) -> Result<Pending> {
    let plain = |x: &Tensor| crate::ops::float("rank", x).detach().contiguous();
    let (base, n) = (plain(base), base.count());
    let (room, rows) = (room(n, share), xs.len() * most);
    let found = Tensor::empty(base.gpu(), "rank", [2 * rows * (1 + room)], DType::U32);
    rank::clear(&found, 2 * rows);
    let source = Source::file("narrow").u32("MODELS", xs.len() as u32).u32("ENDS", most as u32);
    let mut launch = Launch::new("rank", &source, "narrow", grid(n.div_ceil(SPAN))).bind("base", &base);
    launch = launch.set("n", n).set("room", room);
    for (m, (x, searches)) in xs.iter().enumerate() {
        assert!(x.count() == n, "rank: shapes differ: {}, {}", base.shape(), x.shape());
        launch = launch.bind(format!("x{m}"), &plain(x));
        for e in 0..most {
            let [low, high] = searches.get(e).map_or(NOWHERE, |search| search.bracket);
            launch = launch.set(format!("low{m}_{e}"), low).set(format!("width{m}_{e}"), high - low);
        }
    }
    // A list may take four turns for each vector of four.
    let launch = launch.turns((1 + 5 * rows) * (SPAN / 256 + 1));
    base.gpu().launch(launch.bind_mut("found", &found));
    Ok(Pending { reading: found.read::<u32>()?, rows, room })
}

impl Search {
    fn new(rank: usize, bracket: [u32; 2]) -> Search {
        Search { rank, bracket, below: 0, inside: 0, lists: Vec::new(), lost: false }
    }

    /// Takes the counts and the list of a tensor.
    fn take(&mut self, counts: &[u32], list: &[u32]) {
        self.below += counts[0] as usize;
        self.inside += counts[1] as usize;
        let list = list.get(..2 * counts[1] as usize);
        self.lost |= list.is_none();
        self.lists.push(list.unwrap_or_default().chunks(2).map(|pair| [pair[0], pair[1]]).collect());
    }

    /// Returns the end. `None` if it is not inside of the bracket, or a list that it needs was too long.
    fn end(self) -> Option<End> {
        let [low, high] = self.bracket;
        if low == FIRST && self.rank < self.below {
            // The element is 0.
            return Some(End::Placed(vec![[0, 0]; self.lists.len()].into_iter()));
        }
        let rank = self.rank.checked_sub(self.below).filter(|&rank| rank < self.inside)?;
        match self.lost {
            true => (low == high).then(|| End::Cut(Cut::of_magnitude(low, rank as u64))),
            false => Some(End::Placed(self.places(rank).into_iter())),
        }
    }

    /// Returns where the element of a rank of the lists is in each tensor.
    fn places(self, rank: usize) -> Vec<[u32; 2]> {
        let mut keys: Vec<u32> = self.lists.iter().flatten().map(|pair| pair[0]).collect();
        let key = *keys.select_nth_unstable(rank).1;
        // Equal elements keep their order, so so many of them come before the end.
        let mut ties = rank - keys.iter().filter(|&&other| other < key).count();
        let place = |list: Vec<[u32; 2]>| {
            let mut equal: Vec<u32> =
                list.into_iter().filter(|pair| pair[0] == key).map(|pair| pair[1]).collect();
            equal.sort_unstable();
            let place = match equal.get(ties) {
                _ if ties == 0 => [key, 0],
                Some(&index) => [key, index],
                None => [key.saturating_add(1), 0],
            };
            ties -= ties.min(equal.len());
            place
        };
        self.lists.into_iter().map(place).collect()
    }
}

/// Finds where ranges of ranks by magnitude begin and end in streams of `n` elements `x - base`, as [`rank::ranges`] does.
/// `samples` has for each stream the elements of [`pieces`]. `each` is called at most once, and passes its argument the tensors
/// `base` and `x` of every stream. `None` if the samples do not help.
///
/// # Errors
/// The error that `each` returns, or the device's fault.
pub fn ranges(
    n: usize,
    ranks: &[Range<usize>],
    samples: &[Vec<f32>],
    each: impl FnOnce(&mut dyn FnMut(&Tensor, &[Tensor]) -> Result<()>) -> Result<()>,
) -> Result<Option<Vec<Kept>>> {
    let ends = rank::ends(&vec![n; samples.len()], ranks);
    let (mut streams, mut searches, mut share) = (Vec::new(), Vec::new(), 0.0f64);
    for (stream, (ends, x)) in ends.iter().zip(samples).enumerate() {
        let wanted: Vec<usize> = ends.iter().flatten().copied().collect();
        if wanted.is_empty() {
            continue;
        }
        let sample = Sample::new(x, pieces(n).0);
        let mut search = |&rank: &usize| {
            let (bracket, wanted) = sample.bracket(rank, n)?;
            share = share.max(wanted);
            Some(Search::new(rank, bracket))
        };
        let Some(found) = wanted.iter().map(&mut search).collect::<Option<Vec<Search>>>() else {
            return Ok(None);
        };
        streams.push(stream);
        searches.push(found);
    }
    let most = searches.iter().map(Vec::len).max().unwrap_or(0);
    if most > 0 {
        // While the device reads one tensor, the next is made ready.
        let mut pending: Vec<Pending> = Vec::new();
        each(&mut |base, xs| {
            let at_once = MODELS.min(base.gpu().max_bindings().saturating_sub(2)).max(1);
            let pairs: Vec<_> =
                streams.iter().zip(&searches).map(|(&s, found)| (&xs[s], &found[..])).collect();
            let next =
                pairs.chunks(at_once).map(|pairs| start(base, pairs, most, share)).collect::<Result<_>>()?;
            take(&mut searches, most, std::mem::replace(&mut pending, next))
        })?;
        take(&mut searches, most, pending)?;
    }
    let mut searches = searches.into_iter().flatten();
    let mut all = Vec::new();
    for (pair, ranks) in ends.iter().zip(ranks) {
        let mut found = [End::Open, End::Open];
        for (end, _) in found.iter_mut().zip(pair).filter(|(_, rank)| rank.is_some()) {
            let Some(place) = searches.next().and_then(Search::end) else { return Ok(None) };
            *end = place;
        }
        all.push(Kept::new(n, ranks, found));
    }
    Ok(Some(all))
}

/// Takes what was found in a tensor of every stream.
fn take(searches: &mut [Vec<Search>], most: usize, pending: Vec<Pending>) -> Result<()> {
    let mut searches = searches.iter_mut();
    for Pending { reading, rows, room } in pending {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&reading.wait()?);
        let (counts, lists) = words.split_at(2 * rows);
        let found: Vec<_> = counts.chunks(2).zip(lists.chunks(2 * room)).collect();
        for of_stream in found.chunks(most) {
            let all = searches.next().into_iter().flatten();
            all.zip(of_stream).for_each(|(search, (counts, list))| search.take(counts, list));
        }
    }
    Ok(())
}

/// About as many differences of integers in -3..4 are 0, of 110 010.
const ZEROS: usize = 110_010 / 7;

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (counts, ranks, fill) in [
        (vec![1], 0..1, Fill::Normal(1.0)),
        (vec![31, 7], 5..17, Fill::Integers(-3, 4)),
        (vec![4099, 1], 2000..4100, Fill::Normal(1.0)),
        (vec![70_001, 40_009], 20_000..70_000, Fill::Integers(-3000, 3000)),
        (vec![70_001, 40_009], 110_009..110_010, Fill::Normal(1.0)),
        // More ties at each end than a list has room for: of one magnitude, of zeros, of two magnitudes.
        (vec![70_001, 40_009], 20_000..70_000, Fill::Integers(-3, 4)),
        (vec![70_001, 40_009], 10_000..70_000, Fill::Integers(-3, 4)),
        (vec![70_001, 40_009], 10_000..12_000, Fill::Integers(-3, 4)),
        (vec![70_001, 40_009], ZEROS..70_000, Fill::Integers(-3, 4)),
        (vec![70_001, 40_009], 20_000..70_000, Fill::Values(vec![2.0])),
    ] {
        let inputs = counts.iter().flat_map(|&count| [count; 2]);
        let inputs = inputs.map(|count| Input::normal([count]).fill(fill.clone()).fixed()).collect();
        let is_found = ranks.start != ZEROS;
        let of = ranks.clone();
        let forward = move |x: &[Tensor]| narrowed(x, &of, is_found).expect("a device");
        let of = ranks.clone();
        let n: usize = counts.iter().sum();
        let reference = move |x: &[Array]| {
            let of_pair = |pair: &[Array]| {
                let pairs = pair[0].data.iter().zip(&pair[1].data);
                pairs.map(|(x, base)| f64::from((x - base) as f32)).collect::<Vec<f64>>()
            };
            rank::keep64(
                &Array { shape: [n].into(), data: x.chunks(2).flat_map(of_pair).collect() },
                of.clone(),
            )
        };
        all.push(
            Case::new(format!("keep {ranks:?} of {counts:?}, {fill:?}"), inputs, forward, reference).exact(),
        );
    }
    all
}

/// Keeps a range of ranks of the differences of pairs of tensors, as if concatenated. `is_found` says whether one pass finds them.
fn narrowed(pairs: &[Tensor], range: &Range<usize>, is_found: bool) -> Result<Tensor> {
    let deltas: Vec<Tensor> = pairs.chunks(2).map(|pair| pair[0].sub(&pair[1])).collect();
    let joined = Tensor::concat(&deltas.iter().collect::<Vec<_>>(), 0);
    let (n, values) = (joined.count(), joined.to_vec::<f32>()?);
    let (length, starts) = pieces(n);
    let sample = starts.iter().flat_map(|&start| values[start..start + length].to_vec()).collect();
    let ranks = std::slice::from_ref(range);
    let found = ranges(n, ranks, &[sample], |visit| {
        pairs.chunks(2).try_for_each(|pair| visit(&pair[1], &pair[..1]))
    })?;
    assert!(found.is_some() == is_found, "rank: {range:?} of {n}");
    let mut kept = match found {
        Some(found) => found,
        None => rank::ranges(&[n], ranks, |visit| deltas.chunks(1).try_for_each(visit))?,
    };
    let parts: Vec<Tensor> = deltas.iter().map(|x| kept[0].keep(x)).collect::<Result<_>>()?;
    Ok(Tensor::concat(&parts.iter().collect::<Vec<_>>(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_spread_over_the_tensor() {
        assert_eq!(pieces(0), (0, vec![]));
        assert_eq!(pieces(3), (3, vec![0]));
        for n in [8, 9, 4099, 65_537, 1 << 22, u32::MAX as usize] {
            let (length, starts) = pieces(n);
            assert!(starts.windows(2).all(|pair| pair[0] + length <= pair[1]), "{n}");
            assert!(starts[starts.len() - 1] + length <= n && starts.len() == (n / PIECE).min(PIECES), "{n}");
        }
    }

    #[test]
    fn brackets_are_narrow_and_hold_the_rank() {
        // Pieces of one size each, between 1 and 2, so that the pieces say more than their elements.
        let of = |spread: f32| {
            let element = |i: usize| {
                let [own, piece] =
                    [i, i / PIECE].map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40);
                (1.0 + own as f32 / (1 << 24) as f32) * (1.0 + spread * piece as f32 / (1 << 24) as f32)
            };
            Sample::new(&(0..PIECE * PIECES).map(element).collect::<Vec<f32>>(), PIECE)
        };
        let width = |sample: &Sample| {
            let ([low, high], _) = sample.bracket(1 << 21, 1 << 22).expect("a bracket");
            let middle = sample.sorted[sample.sorted.len() / 2];
            assert!(low < middle && middle < high);
            sample.sorted.partition_point(|&key| key <= high)
                - sample.sorted.partition_point(|&key| key < low)
        };
        let (alike, apart) = (width(&of(0.0)), width(&of(1.0)));
        assert!(alike < PIECE * PIECES / 50 && alike < apart, "{alike}, {apart}");
        // The ends are open where the sample has no rank for them. Equal elements are counted, without room for a list, and those of
        // two magnitudes are too many.
        assert_eq!(of(0.0).bracket((1 << 22) - 1, 1 << 22).expect("a bracket").0[1], LAST);
        let bracket = |x: &[f32]| Sample::new(x, PIECE).bracket(1 << 21, 1 << 22);
        let two = 2f32.to_bits();
        assert_eq!(bracket(&[2.0; 4096]), Some(([two; 2], 0.0)));
        assert_eq!(bracket(&[0.0; 4096]), Some(([FIRST; 2], 0.0)));
        assert_eq!(bracket(&[[1.0; 2048], [2.0; 2048]].concat()), None);
    }
}
