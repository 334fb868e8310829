//! Matches attention heads, an assignment on two levels: heads are permuted, and so are the elements inside each head.

use crate::error::Result;
use crate::linalg::assignment::{Assignment, Goal, assign};
use crate::rng::Rng;

/// How many heads a group has, and their size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::merge) struct HeadSizes {
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub rotary: bool,
}

/// An order of heads: the old head that each new one is, and the order of its elements.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::merge) struct HeadOrder {
    /// Old key and value head of each new one.
    kv: Vec<usize>,
    /// Old query head of each new one.
    heads: Vec<usize>,
    /// Order of elements in queries and keys, by new key head.
    qk: Vec<Vec<u32>>,
    /// Order of elements in values and output columns, by new value head.
    vo: Vec<Vec<u32>>,
}

impl HeadOrder {
    /// Returns the order of heads that flat orders of `q k v o` amount to. `None` if they move elements out of their head, move
    /// `q k v o` differently, or move elements that rotary embedding keeps in place.
    pub fn parse(sizes: &HeadSizes, [q, k, v, o]: [&[u32]; 4]) -> Option<HeadOrder> {
        let &HeadSizes { heads, kv_heads, dim, rotary } = sizes;
        let lengths = [heads, kv_heads, kv_heads, heads].map(|n| n * dim);
        if dim == 0 || kv_heads == 0 || heads % kv_heads != 0 || [q, k, v, o].map(<[u32]>::len) != lengths {
            return None;
        }
        let first = |flat: &[u32]| flat.chunks(dim).map(|head| head[0] as usize / dim).collect::<Vec<_>>();
        let inner = |flat: &[u32]| -> Vec<Vec<u32>> {
            flat.chunks(dim).map(|head| head.iter().map(|&i| i % dim as u32).collect()).collect()
        };
        let order = HeadOrder { kv: first(k), heads: first(q), qk: inner(k), vo: inner(v) };
        let set = heads / kv_heads;
        let together = order.heads.iter().enumerate().all(|(h, old)| old / set == order.kv[h / set]);
        let in_place = !rotary || order.qk.iter().all(|head| head.iter().zip(0..).all(|(&i, e)| i == e));
        let rebuilt = order.flat(sizes);
        (together && in_place && rebuilt.iter().zip([q, k, v, o]).all(|(a, b)| a == b)).then_some(order)
    }

    /// Draws a random order.
    pub fn random(sizes: &HeadSizes, rng: &mut Rng) -> HeadOrder {
        let set = sizes.heads / sizes.kv_heads;
        let mut shuffled = |n: usize| {
            let mut order: Vec<usize> = (0..n).collect();
            rng.shuffle(&mut order);
            order
        };
        let kv = shuffled(sizes.kv_heads);
        let heads = kv.iter().flat_map(|old| shuffled(set).into_iter().map(move |h| old * set + h)).collect();
        let mut inner = |still: bool| -> Vec<Vec<u32>> {
            let one = |_: usize| if still { (0..sizes.dim).collect() } else { shuffled(sizes.dim) };
            (0..sizes.kv_heads).map(one).map(|order| order.into_iter().map(|e| e as u32).collect()).collect()
        };
        HeadOrder { qk: inner(sizes.rotary), vo: inner(false), kv, heads }
    }

    /// Returns the orders of the rows or columns of `q k v o`, new -> old.
    pub fn flat(&self, sizes: &HeadSizes) -> [Vec<u32>; 4] {
        let set = sizes.heads / sizes.kv_heads;
        let rows = |from: &[usize], per: usize, inner: &[Vec<u32>]| -> Vec<u32> {
            let head = |(new, old): (usize, &usize)| {
                let start = (old * sizes.dim) as u32;
                inner[new / per].iter().map(move |i| start + i).collect::<Vec<_>>()
            };
            from.iter().enumerate().flat_map(head).collect()
        };
        [
            rows(&self.heads, set, &self.qk),
            rows(&self.kv, 1, &self.qk),
            rows(&self.kv, 1, &self.vo),
            rows(&self.heads, set, &self.vo),
        ]
    }
}

/// The best order of a group of heads.
pub(in crate::merge) struct HeadSolution {
    pub order: HeadOrder,
    /// Sum of the optimality gaps of the assignments that it was made of.
    pub gap: f64,
    /// Whether it is proved that no better order exists.
    pub exact: bool,
    /// Value of each pair of key heads, `[new, old]`.
    pub pairs: Vec<f64>,
}

/// Cost matrices between the heads of both models.
struct Costs<'a> {
    sizes: &'a HeadSizes,
    /// `q k v o`, each `[new, old]`.
    of: [&'a [f32]; 4],
}

/// The best match of one key and value head, with the set of query heads that read it, to another.
struct Pair {
    value: f64,
    /// Old query head of each new one, both counted within their sets.
    heads: Vec<usize>,
    qk: Vec<u32>,
    vo: Vec<u32>,
    gap: f64,
    exact: bool,
}

/// Up to this many query heads per key head, all their orders are tried. With more, heads and elements are solved in turn.
const ENUMERATED: usize = 4;

/// Finds the order of heads and elements with the largest sum of costs.
///
/// First, every pair of key heads is solved for its elements and query heads. Then the key heads are assigned by the values of
/// these pairs. This is exact with up to four query heads per key head, where a pair is solved for every order of its query
/// heads. With more, heads and elements of a pair are solved in turn until neither improves.
pub(in crate::merge) fn solve(sizes: &HeadSizes, costs: [&[f32]; 4]) -> Result<HeadSolution> {
    let costs = Costs { sizes, of: costs };
    let n = sizes.kv_heads;
    let mut pairs = Vec::with_capacity(n * n);
    for new in 0..n {
        for old in 0..n {
            pairs.push(costs.pair(new, old)?);
        }
    }
    let values: Vec<f64> = pairs.iter().map(|pair| pair.value).collect();
    let outer = assign(&values, [n, n], Goal::Maximize)?;
    let kv = columns(&outer);
    let chosen: Vec<&Pair> = kv.iter().enumerate().map(|(new, old)| &pairs[new * n + old]).collect();
    let set = sizes.heads / n;
    let heads = kv.iter().zip(&chosen).flat_map(|(old, pair)| pair.heads.iter().map(move |h| old * set + h));
    Ok(HeadSolution {
        gap: outer.gap + chosen.iter().map(|pair| pair.gap).sum::<f64>(),
        exact: outer.exact && pairs.iter().all(|pair| pair.exact),
        order: HeadOrder {
            heads: heads.collect(),
            qk: chosen.iter().map(|pair| pair.qk.clone()).collect(),
            vo: chosen.iter().map(|pair| pair.vo.clone()).collect(),
            kv,
        },
        pairs: values,
    })
}

/// Returns the column of every row of a square assignment.
pub(in crate::merge) fn columns(assignment: &Assignment) -> Vec<usize> {
    // With a square cost of finite elements, every row has a column.
    assignment.columns.iter().map(|column| column.expect("every row of a square cost is assigned")).collect()
}

impl Costs<'_> {
    fn set(&self) -> usize {
        self.sizes.heads / self.sizes.kv_heads
    }

    /// Adds to `sum` the block of matrix `part` (of `q k v o`) that compares the elements of heads `new` and `old`.
    fn add(&self, sum: &mut [f64], part: usize, new: usize, old: usize) {
        let dim = self.sizes.dim;
        let width = if part == 0 || part == 3 { self.sizes.heads } else { self.sizes.kv_heads } * dim;
        for (row, sum) in sum.chunks_mut(dim).enumerate() {
            let start = (new * dim + row) * width + old * dim;
            let from = &self.of[part][start..start + dim];
            sum.iter_mut().zip(from).for_each(|(sum, &c)| *sum += f64::from(c));
        }
    }

    /// Returns the costs between the elements of key heads `new` and `old`: those of the key heads' own matrix, plus those of the
    /// query heads' matrix, with old query head `heads[i]` at new query head `i`. `parts` are the indices of the two matrices.
    fn elements(&self, parts: [usize; 2], new: usize, old: usize, heads: &[usize]) -> Vec<f64> {
        let (set, dim) = (self.set(), self.sizes.dim);
        let mut sum = vec![0.0; dim * dim];
        let [single, many] = parts;
        self.add(&mut sum, single, new, old);
        heads.iter().enumerate().for_each(|(i, h)| self.add(&mut sum, many, new * set + i, old * set + h));
        sum
    }

    /// Finds the best orders of elements for an order of query heads.
    fn inner(&self, new: usize, old: usize, heads: &[usize]) -> Result<Pair> {
        let dim = self.sizes.dim;
        let still: Vec<u32> = (0..dim as u32).collect();
        let mut pair =
            Pair { value: 0.0, heads: heads.to_vec(), qk: still, vo: Vec::new(), gap: 0.0, exact: true };
        let qk = self.elements([1, 0], new, old, heads);
        if self.sizes.rotary {
            pair.value += (0..dim).map(|e| qk[e * dim + e]).sum::<f64>();
        } else {
            pair.qk = pair.take(assign(&qk, [dim, dim], Goal::Maximize)?);
        }
        let vo = self.elements([2, 3], new, old, heads);
        pair.vo = pair.take(assign(&vo, [dim, dim], Goal::Maximize)?);
        Ok(pair)
    }

    fn pair(&self, new: usize, old: usize) -> Result<Pair> {
        let set = self.set();
        if set > ENUMERATED {
            return self.alternate(new, old);
        }
        let mut best: Option<Pair> = None;
        for heads in orders(set) {
            let pair = self.inner(new, old, &heads)?;
            if best.as_ref().is_none_or(|best| pair.value > best.value) {
                best = Some(pair);
            }
        }
        Ok(best.expect("there is at least one order of heads"))
    }

    /// Solves for elements and heads in turn, starting from unmoved heads, until neither improves.
    fn alternate(&self, new: usize, old: usize) -> Result<Pair> {
        let set = self.set();
        let mut best = self.inner(new, old, &(0..set).collect::<Vec<_>>())?;
        loop {
            let mut costs = vec![0.0; set * set];
            for (place, cost) in costs.iter_mut().enumerate() {
                for (part, inner) in [(0, &best.qk), (3, &best.vo)] {
                    *cost += self.along(part, new * set + place / set, old * set + place % set, inner);
                }
            }
            let heads = columns(&assign(&costs, [set, set], Goal::Maximize)?);
            let next = self.inner(new, old, &heads)?;
            if next.value <= best.value + 1e-9 * best.value.abs() {
                return Ok(Pair { exact: false, ..best });
            }
            best = next;
        }
    }

    /// Returns the value of matching two heads under an order of their elements.
    fn along(&self, part: usize, new: usize, old: usize, inner: &[u32]) -> f64 {
        let (dim, width) = (self.sizes.dim, self.sizes.heads * self.sizes.dim);
        let cost = |(e, &i): (usize, &u32)| self.of[part][(new * dim + e) * width + old * dim + i as usize];
        inner.iter().enumerate().map(cost).map(f64::from).sum()
    }
}

impl Pair {
    /// Adds an assignment's value, gap and exactness to the pair's and returns its order.
    fn take(&mut self, assignment: Assignment) -> Vec<u32> {
        self.value += assignment.value;
        self.gap += assignment.gap;
        self.exact &= assignment.exact;
        columns(&assignment).into_iter().map(|c| c as u32).collect()
    }
}

/// Returns all orders of `n` things, the identity first.
fn orders(n: usize) -> Vec<Vec<usize>> {
    let mut all = vec![vec![]];
    for _ in 0..n {
        let longer = |order: &Vec<usize>| {
            let order = order.clone();
            (0..n)
                .filter(|i| !order.contains(i))
                .map(|i| [order.clone(), vec![i]].concat())
                .collect::<Vec<_>>()
        };
        all = all.iter().flat_map(longer).collect();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: HeadSizes = HeadSizes { heads: 6, kv_heads: 2, dim: 3, rotary: false };

    #[test]
    fn flat_orders_and_back() {
        let order = HeadOrder {
            kv: vec![1, 0],
            heads: vec![5, 3, 4, 0, 2, 1],
            qk: vec![vec![2, 0, 1], vec![0, 1, 2]],
            vo: vec![vec![0, 2, 1], vec![1, 0, 2]],
        };
        let flat = order.flat(&SIZES);
        let parse = |flat: &[Vec<u32>; 4]| HeadOrder::parse(&SIZES, [&flat[0], &flat[1], &flat[2], &flat[3]]);
        assert_eq!(flat[1], [5, 3, 4, 0, 1, 2]);
        assert_eq!(parse(&flat), Some(order));
        // Swaps two elements of different heads, two of different sets, and elements of only values or only outputs.
        for (part, [a, b]) in [(0, [0, 3]), (0, [0, 9]), (2, [0, 1]), (3, [1, 2])] {
            let mut bad = flat.clone();
            bad[part].swap(a, b);
            assert_eq!(parse(&bad), None, "{part} {a} {b}");
        }
        assert_eq!(
            HeadOrder::parse(&HeadSizes { rotary: true, ..SIZES }, flat.each_ref().map(|f| &f[..])),
            None
        );
    }

    /// Compares with the best of all orders of a small case.
    #[test]
    fn exact_for_grouped_queries() {
        let sizes = HeadSizes { heads: 4, kv_heads: 2, dim: 2, rotary: false };
        let mut rng = Rng::new(5);
        for case in 0..20 {
            let costs = [64, 16, 16, 64].map(|n| {
                let mut x = vec![0.0; n];
                rng.fill_normal(&mut x);
                x
            });
            let views = costs.each_ref().map(|c| &c[..]);
            let value = |order: &HeadOrder| -> f64 {
                let flat = order.flat(&sizes);
                let sum = |(f, c): (&Vec<u32>, &[f32])| {
                    let n = f.len();
                    f.iter().enumerate().map(|(i, &j)| f64::from(c[i * n + j as usize])).sum::<f64>()
                };
                flat.iter().zip(views).map(sum).sum()
            };
            let solution = solve(&sizes, views).unwrap();
            let mut best = f64::MIN;
            let two = || orders(2).into_iter().map(|o| o.into_iter().map(|i| i as u32).collect::<Vec<u32>>());
            for kv in orders(2) {
                for sets in 0..4 {
                    let heads =
                        [0, 1].map(|new| [0, 1].map(|i| kv[new] * 2 + (i ^ (sets >> new & 1)))).concat();
                    for inner in 0..16usize {
                        let pick = |bit: usize| two().nth(inner >> bit & 1).unwrap();
                        let order = HeadOrder {
                            kv: kv.clone(),
                            heads: heads.clone(),
                            qk: vec![pick(0), pick(1)],
                            vo: vec![pick(2), pick(3)],
                        };
                        best = best.max(value(&order));
                    }
                }
            }
            assert!(solution.exact && (value(&solution.order) - best).abs() < 1e-5, "case {case}");
        }
    }

    #[test]
    fn many_query_heads_a_key_head_find_what_was_planted() {
        let sizes = HeadSizes { heads: 10, kv_heads: 2, dim: 3, rotary: true };
        let planted = HeadOrder {
            kv: vec![1, 0],
            heads: vec![7, 9, 5, 6, 8, 3, 1, 0, 4, 2],
            qk: vec![vec![0, 1, 2]; 2],
            vo: vec![vec![2, 0, 1], vec![1, 0, 2]],
        };
        let costs = planted.flat(&sizes).map(|order| {
            let n = order.len();
            let mut cost = vec![0.0f32; n * n];
            order.iter().enumerate().for_each(|(i, &j)| cost[i * n + j as usize] = 1.0);
            cost
        });
        let solution = solve(&sizes, costs.each_ref().map(|c| &c[..])).unwrap();
        assert_eq!(solution.order, planted);
        assert!(!solution.exact);
    }
}
