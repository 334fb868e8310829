//! Linear assignment. Small problems are compared with the best of all permutations, large ones are checked by their optimality
//! proof.

use crate::support::{gpu, other_kernels};
use proptest::prelude::*;
use std::fmt::Debug;
use tiebeam::linalg::assignment::{Assignment, Cost, Goal, assign, assign_from, certify};
use tiebeam::{Result, Rng, Tensor};

const GOALS: [Goal; 2] = [Goal::Minimize, Goal::Maximize];

fn sign(goal: Goal) -> f64 {
    if goal == Goal::Minimize { 1.0 } else { -1.0 }
}

/// Returns the best value by dynamic programming: row by row, the best value for each set of used columns. `None` if every
/// assignment has a forbidden entry.
fn brute<C: Cost>(cost: &[C], [rows, columns]: [usize; 2], goal: Goal) -> Option<f64> {
    let (long, short) = (rows.max(columns), rows.min(columns));
    let at = |i: usize, j: usize| if rows <= columns { i * columns + j } else { j * columns + i };
    // Iterates over the short side. Sets of the long side are bit masks.
    let mut best = vec![f64::INFINITY; 1 << long];
    best[0] = 0.0;
    for i in 0..short {
        let mut next = vec![f64::INFINITY; 1 << long];
        for set in 0..1usize << long {
            for j in (0..long).filter(|j| set >> j & 1 == 0) {
                let value = best[set] + sign(goal) * cost[at(i, j)].to_f64();
                next[set | 1 << j] = next[set | 1 << j].min(value);
            }
        }
        best = next;
    }
    let best = best.into_iter().fold(f64::INFINITY, f64::min);
    best.is_finite().then_some(sign(goal) * best)
}

/// Checks an assignment and its potentials by the definitions, without other code of the library.
fn check<C: Cost>(cost: &[C], [rows, columns]: [usize; 2], goal: Goal, found: &Assignment) {
    let s = sign(goal);
    let most = cost.iter().map(|c| c.to_f64().abs()).filter(|c| c.is_finite()).fold(0.0, f64::max);
    let close = 1e-12 * most;
    assert_eq!((found.columns.len(), found.dual_u.len(), found.dual_v.len()), (rows, rows, columns));
    let mut used = vec![false; columns];
    let (mut value, mut duals) = (0.0, 0.0);
    for (i, column) in found.columns.iter().enumerate() {
        duals += found.dual_u[i];
        let Some(j) = *column else {
            assert!(
                columns < rows && found.dual_u[i].abs() <= close,
                "row {i} is free at {}",
                found.dual_u[i]
            );
            continue;
        };
        assert!(!std::mem::replace(&mut used[j], true), "column {j} twice");
        let c = cost[i * columns + j].to_f64();
        assert!(c.is_finite(), "[{i}, {j}] is forbidden");
        value += c;
        let slack = s * (c - found.dual_u[i] - found.dual_v[j]);
        assert!(slack.abs() <= close, "[{i}, {j}] is taken with slack {slack}");
    }
    assert_eq!(found.columns.iter().flatten().count(), rows.min(columns));
    for j in 0..columns {
        duals += found.dual_v[j];
        assert!(used[j] || found.dual_v[j].abs() <= close, "column {j} is free at {}", found.dual_v[j]);
        for i in 0..rows {
            let slack = s * (cost[i * columns + j].to_f64() - found.dual_u[i] - found.dual_v[j]);
            assert!(slack >= -close, "[{i}, {j}] is better than the potentials by {slack}");
        }
    }
    assert!(
        rows <= columns || found.dual_u.iter().all(|u| s * u <= 0.0),
        "rows to spare, u {:?}",
        found.dual_u
    );
    assert!(columns <= rows || found.dual_v.iter().all(|v| s * v <= 0.0), "columns to spare");
    let sums = close * (rows + columns) as f64;
    assert!((found.value - value).abs() <= sums, "value {} of {value}", found.value);
    assert!((found.gap - s * (value - duals)).abs() <= sums, "gap {} of {}", found.gap, s * (value - duals));
    assert!(found.exact, "gap {}", found.gap);
}

fn solved<C: Cost + Debug>(cost: &[C], size: [usize; 2], goal: Goal) -> Assignment {
    let found = assign(cost, size, goal).unwrap_or_else(|e| panic!("{size:?} {goal:?}: {e}"));
    check(cost, size, goal, &found);
    found
}

fn uniform(size: [usize; 2], seed: u64) -> Vec<f32> {
    let mut x = vec![0.0; size[0] * size[1]];
    Rng::new(seed).fill_uniform(&mut x);
    x
}

/// Returns a matrix of rank `rank` whose rows differ in length. Both the auction and the augmenting paths have work to do on it.
fn low_rank(size: [usize; 2], rank: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    let mut side = |count: usize| {
        let (mut x, mut length) = (vec![0.0f32; count * rank], vec![0.0f32; count]);
        rng.fill_normal(&mut x);
        rng.fill_normal(&mut length);
        x.iter().enumerate().map(|(e, x)| x * length[e / rank].exp()).collect::<Vec<f32>>()
    };
    let (a, b) = (side(size[0]), side(size[1]));
    let dot = |i: usize, j: usize| (0..rank).map(|k| a[i * rank + k] * b[j * rank + k]).sum();
    (0..size[0] * size[1]).map(|e| dot(e / size[1], e % size[1])).collect()
}

/// Small matrices with few different values, so that ties are frequent, and a few forbidden entries.
fn small() -> impl Strategy<Value = ([usize; 2], Vec<f64>)> {
    let entry = prop_oneof![
        4 => (-3i32..4).prop_map(f64::from),
        3 => -1e3..1e3f64,
        1 => Just(f64::NAN),
    ];
    (1usize..8, 1usize..8)
        .prop_flat_map(move |(r, c)| (Just([r, c]), prop::collection::vec(entry.clone(), r * c)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn is_the_best_of_all_permutations((size, mut cost) in small(), maximize: bool, forbid: bool) {
        let goal = GOALS[maximize as usize];
        let stands_for = if forbid { sign(goal) * f64::INFINITY } else { 2.0 };
        cost.iter_mut().filter(|c| c.is_nan()).for_each(|c| *c = stands_for);
        match brute(&cost, size, goal) {
            Some(best) => {
                let found = solved(&cost, size, goal);
                prop_assert!((found.value - best).abs() <= 1e-12 * 7e3, "{} of {best}", found.value);
            }
            None => {
                let error = assign(&cost, size, goal).expect_err("nothing is allowed").to_string();
                prop_assert!(error.starts_with("assignment: ") && error.contains("forbid fewer"), "{error}");
            }
        }
    }

    #[test]
    fn whole_numbers_have_no_gap((size, cost) in small(), maximize: bool) {
        let whole: Vec<i32> = cost.iter().map(|&c| if c.is_nan() { i32::MAX } else { c as i32 }).collect();
        let goal = GOALS[maximize as usize];
        let found = solved(&whole, size, goal);
        prop_assert_eq!(Some(found.value), brute(&whole, size, goal));
        prop_assert_eq!(found.gap, 0.0);
    }

    #[test]
    fn prices_of_any_kind_do_not_change_the_value(
        (size, cost) in small(), prices in prop::collection::vec(-1e9..1e9f64, 8), shrink in 0..12,
    ) {
        let cost: Vec<f64> = cost.iter().map(|&c| if c.is_nan() { 0.5 } else { c }).collect();
        let prices: Vec<f64> = prices[..size[1]].iter().map(|p| p * 0.1f64.powi(shrink)).collect();
        for goal in GOALS {
            let found = assign_from(&cost, size, goal, &prices).expect("all is allowed");
            check(&cost, size, goal, &found);
        }
    }
}

#[test]
fn sizes_around_blocks_prove_themselves() {
    for n in [1, 2, 63, 64, 65, 127, 129, 257] {
        for [rows, columns] in [[n, n], [n, n + 1], [n + 3, n], [n, 2 * n], [3, n], [n, 1]] {
            let size = [rows, columns];
            for cost in &[uniform(size, 1), low_rank(size, 8, 2)] {
                GOALS.iter().for_each(|&goal| drop(solved(cost, size, goal)));
            }
        }
    }
}

#[test]
fn larger_problems_of_each_kind_prove_themselves() {
    let n = 700;
    let cost = low_rank([n, n], 32, 3);
    let found = solved(&cost, [n, n], Goal::Maximize);
    assert_eq!(bits(&found), bits(&solved(&cost, [n, n], Goal::Maximize)), "the same bits twice");
    // The transpose has the same value.
    let turned: Vec<f32> = (0..n * n).map(|e| cost[e % n * n + e / n]).collect();
    let other = solved(&turned, [n, n], Goal::Maximize);
    assert!((found.value - other.value).abs() <= 1e-9 * found.value.abs());
    // Nearly square and of rank 2. With paths alone these would take so long that the problem is padded to a square.
    for size in [[n, n + 1], [n + 20, n]] {
        GOALS.iter().for_each(|&goal| drop(solved(&low_rank(size, 2, 9), size, goal)));
    }
    // Entries (i+1)(j+1) have the smallest sum n(n+1)(n+2)/6 and the largest n(n+1)(2n+1)/6.
    let products: Vec<f64> = (0..n * n).map(|e| ((e / n + 1) * (e % n + 1)) as f64).collect();
    let whole = |k: usize| (n * (n + 1) * k / 6) as f64;
    assert_eq!(solved(&products, [n, n], Goal::Minimize).value, whole(n + 2));
    assert_eq!(solved(&products, [n, n], Goal::Maximize).value, whole(2 * n + 1));
    // All entries equal, then few different values.
    assert_eq!(solved(&vec![3; n * n], [n, n], Goal::Minimize).value, 3.0 * n as f64);
    let few: Vec<i32> = uniform([n, n], 4).iter().map(|x| (x * 4.0) as i32).collect();
    assert_eq!(solved(&few, [n, n], Goal::Minimize).value, 0.0);
    // A band of allowed entries.
    let band = |e: usize| (e / n).abs_diff(e % n) <= 2;
    let some: Vec<f32> = uniform([n, n], 5)
        .iter()
        .enumerate()
        .map(|(e, &x)| if band(e) { x } else { f32::INFINITY })
        .collect();
    solved(&some, [n, n], Goal::Minimize);
}

#[test]
fn earlier_prices_give_the_same_value() {
    let n = 300;
    let cost = low_rank([n, n], 16, 6);
    let near: Vec<f32> = cost.iter().zip(uniform([n, n], 7)).map(|(c, e)| c + 1e-3 * e).collect();
    for goal in GOALS {
        let (first, second) = (solved(&cost, [n, n], goal), solved(&near, [n, n], goal));
        let warm = assign_from(&near, [n, n], goal, &first.dual_v).expect("solvable");
        check(&near, [n, n], goal, &warm);
        assert!((warm.value - second.value).abs() <= 1e-9 * second.value.abs());
        // Potentials so large that entries vanish in their rounding.
        let huge: Vec<f64> = (0..n).map(|j| 1e18 * (j as f64).sin()).collect();
        let warm = assign_from(&near, [n, n], goal, &huge).expect("solvable");
        check(&near, [n, n], goal, &warm);
    }
}

#[test]
fn nothing_to_assign() {
    for (size, free) in [([0, 0], 0), ([0, 4], 0), ([3, 0], 3)] {
        let found = assign::<f32>(&[], size, Goal::Maximize).expect("nothing");
        check::<f32>(&[], size, Goal::Maximize, &found);
        assert_eq!(found.columns, vec![None; free]);
        assert_eq!((found.value, found.gap), (0.0, 0.0));
    }
    assert_eq!(solved(&[-2.5f32], [1, 1], Goal::Minimize).value, -2.5);
}

#[test]
fn only_a_proof_makes_it_exact() {
    let n = 40;
    let cost = uniform([n, n], 8);
    let best = solved(&cost, [n, n], Goal::Minimize);
    let again = certify(&cost, [n, n], Goal::Minimize, &best.columns, &best.dual_v).expect("an assignment");
    assert!(again.exact && again.value == best.value);
    let mut wrong = best.columns.clone();
    wrong.swap(3, 4);
    let wrong = certify(&cost, [n, n], Goal::Minimize, &wrong, &best.dual_v).expect("an assignment");
    let loss = wrong.value - best.value;
    assert!(!wrong.exact && loss > 1e-4 && (wrong.gap - loss).abs() < 1e-12, "{loss} and gap {}", wrong.gap);
    // The right columns with potentials that do not prove them.
    let unproved =
        certify(&cost, [n, n], Goal::Minimize, &best.columns, &vec![0.0; n]).expect("an assignment");
    assert!(!unproved.exact && unproved.value == best.value && unproved.gap > 1e-3);
    // The assignment with the smallest sum is not the one with the largest.
    assert!(!certify(&cost, [n, n], Goal::Maximize, &best.columns, &best.dual_v).expect("one").exact);
}

fn message(found: Result<Assignment>) -> String {
    found.expect_err("refused").to_string()
}

#[test]
fn bad_entries_are_named() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let all = [1.0, 2.0, 3.0, nan, 5.0, 6.0];
    assert!(message(assign(&all, [2, 3], Goal::Minimize)).contains("entry [1, 0] is NaN"));
    assert!(message(assign(&[1.0, -inf], [1, 2], Goal::Minimize)).contains("entry [0, 1] is -inf"));
    assert!(message(assign(&[inf, 1.0], [1, 2], Goal::Maximize)).contains("entry [0, 0] is inf"));
    assert!(message(assign(&[1e308, -1e308], [1, 2], Goal::Minimize)).contains("overflow"));
    let infeasible = [1.0, inf, inf, 1.0, inf, inf, inf, 1.0, 1.0];
    for goal in GOALS {
        let cost = infeasible.map(|c| c * sign(goal) as f32);
        assert!(message(assign(&cost, [3, 3], goal)).contains("forbid fewer entries"));
    }
    assert!(
        message(assign_from(&[1.0, 2.0], [1, 2], Goal::Minimize, &[0.0, f64::NAN]))
            .contains("price 1 is NaN")
    );
    let refuse = |columns: &[Option<usize>]| {
        message(certify(&[1.0, inf, 2.0, 3.0], [2, 2], Goal::Minimize, columns, &[0.0; 2]))
    };
    assert!(refuse(&[Some(0), Some(0)]).contains("row 1: column 0 is taken twice"));
    assert!(refuse(&[Some(0), Some(2)]).contains("past the end"));
    assert!(refuse(&[Some(1), Some(0)]).contains("row 0: column 1 is forbidden"));
    assert!(refuse(&[Some(0), None]).contains("1 pairs"));
}

#[test]
#[should_panic(expected = "assignment: 3 elements for [2, 2]")]
fn a_size_that_does_not_fit_panics() {
    let _ = assign(&[1.0, 2.0, 3.0], [2, 2], Goal::Minimize);
}

/// The complete result as bits, for comparison of two runs.
fn bits(a: &Assignment) -> (Vec<Option<usize>>, Vec<u64>) {
    let numbers =
        [a.value, a.gap].into_iter().chain(a.dual_u.iter().copied()).chain(a.dual_v.iter().copied());
    (a.columns.clone(), numbers.map(f64::to_bits).collect())
}

fn on_device(x: &Tensor, goal: Goal) -> Vec<Assignment> {
    x.assignments_by(goal, true).unwrap_or_else(|e| panic!("{} {goal:?}: {e}", x.shape()))
}

#[test]
fn the_device_gives_the_value_of_the_host_and_the_same_bits_twice() {
    for n in [1, 2, 64, 65, 600] {
        for cost in &[uniform([n, n], 11), low_rank([n, n], 8, 12)] {
            for goal in GOALS {
                let x = Tensor::from_slice(gpu(), cost, [n, n]);
                let (device, host) = (&on_device(&x, goal)[0], solved(cost, [n, n], goal));
                check(cost, [n, n], goal, device);
                assert!((device.value - host.value).abs() <= 1e-11 * host.value.abs());
                assert_eq!(bits(device), bits(&on_device(&x, goal)[0]), "the same bits twice");
            }
        }
    }
}

/// The host corrects any prices, so a test of the result would not notice bad prices of the device. This one checks the prices
/// alone.
#[test]
fn prices_of_the_device_nearly_prove_the_best_assignment() {
    for (n, shape) in
        [(200, vec![200, 200]), (600, vec![600, 600]), (64, vec![1, 64, 64]), (200, vec![1, 200, 200])]
    {
        let cost = uniform([n, n], 16);
        for goal in GOALS {
            let prices =
                Tensor::from_slice(gpu(), &cost, &shape[..]).assignment_prices(goal).expect("prices");
            let prices = prices[0].as_ref().expect("few rounds are enough for independent entries");
            let best = solved(&cost, [n, n], goal);
            let gap = |prices: &[f64]| {
                certify(&cost, [n, n], goal, &best.columns, prices).expect("an assignment").gap
            };
            let (device, without) = (gap(prices), gap(&vec![0.0; n]));
            println!("{shape:?} {goal:?}: gap {device:.2e}, without prices {without:.2e}");
            assert!(device < 0.05 * without, "{shape:?} {goal:?}: gap {device}, without prices {without}");
        }
    }
}

#[test]
fn a_batch_is_its_problems_one_by_one() {
    for (batch, rows, columns) in
        [(1, 1, 1), (9, 12, 12), (3, 64, 64), (2, 130, 130), (4, 5, 8), (2, 257, 257)]
    {
        let cost = low_rank([batch * rows, columns], 6, 13);
        let x = Tensor::from_slice(gpu(), &cost, [batch, rows, columns]);
        for goal in GOALS {
            let all = on_device(&x, goal);
            assert_eq!(all.len(), batch);
            for (b, found) in all.iter().enumerate() {
                let own = &cost[b * rows * columns..][..rows * columns];
                check(own, [rows, columns], goal, found);
                let alone = on_device(&x.slice(0, b..b + 1), goal);
                assert_eq!(bits(found), bits(&alone[0]), "{b} of {batch}");
                let host = x.slice(0, b..b + 1).assignments_by(goal, false).expect("solvable");
                assert_eq!(bits(&host[0]), bits(&solved(own, [rows, columns], goal)));
            }
        }
    }
}

#[test]
fn the_public_methods_choose_a_path_and_prove_the_result() {
    let (batch, n) = (65, 20);
    let cost = uniform([batch * n, n], 14);
    for gpu in [gpu(), other_kernels()] {
        let x = Tensor::from_slice(gpu, &cost, [batch, n, n]);
        let all = x.assignments(Goal::Maximize).expect("solvable");
        all.iter().zip(cost.chunks(n * n)).for_each(|(a, c)| check(c, [n, n], Goal::Maximize, a));
        // A matrix above the size from which the device may be used, as a view that is not contiguous. Then one with more rows
        // than columns.
        let large = low_rank([520, 520], 5, 15);
        let turned: Vec<f32> = (0..520 * 520).map(|e| large[e % 520 * 520 + e / 520]).collect();
        let found =
            Tensor::from_slice(gpu, &large, [520, 520]).t().assignment(Goal::Minimize).expect("solvable");
        check(&turned, [520, 520], Goal::Minimize, &found);
        let tall =
            Tensor::from_slice(gpu, &cost, [batch * n, n]).assignment(Goal::Minimize).expect("solvable");
        check(&cost, [batch * n, n], Goal::Minimize, &tall);
        assert!(Tensor::zeros(gpu, [0, 3, 3]).assignments(Goal::Minimize).expect("nothing").is_empty());
        assert_eq!(Tensor::zeros(gpu, [0, 0]).assignment(Goal::Minimize).expect("nothing").value, 0.0);
    }
}

#[test]
fn the_device_meets_ties_forbidden_and_bad_entries() {
    for n in [48, 150] {
        let inf = f32::INFINITY;
        let band = |e: usize| if (e / n).abs_diff(e % n) <= 3 { (e * 7 % 11) as f32 } else { inf };
        let near = |e: usize| 1000.0 + (e * e % 97) as f32 / 1024.0;
        let mixed = |e: usize| {
            if e.is_multiple_of(3) { (e % 31) as f32 - 15.0 } else { 1e6 * ((e % 5) as f32 - 2.0) }
        };
        let of = |f: &dyn Fn(usize) -> f32| (0..n * n).map(f).collect::<Vec<f32>>();
        for cost in [of(&|_| 3.0), of(&|e| (e % 4) as f32), of(&band), of(&near), of(&mixed)] {
            for shape in [vec![n, n], vec![1, n, n]] {
                let found = &on_device(&Tensor::from_slice(gpu(), &cost, &shape[..]), Goal::Minimize)[0];
                check(&cost, [n, n], Goal::Minimize, found);
            }
        }
        for (at, bad, words) in [(n + 1, f32::NAN, "entry [1, 1] is NaN"), (2, -inf, "entry [0, 2] is -inf")]
        {
            let mut cost = of(&near);
            cost[at] = bad;
            for shape in [vec![n, n], vec![1, n, n]] {
                let x = Tensor::from_slice(gpu(), &cost, &shape[..]);
                let error = x.assignments_by(Goal::Minimize, true).expect_err("refused").to_string();
                assert!(error.contains(words), "{error}");
            }
        }
        let forbidden = Tensor::from_slice(gpu(), &vec![inf; n * n], [n, n]);
        let error = forbidden.assignments_by(Goal::Minimize, true).expect_err("infeasible").to_string();
        assert!(error.contains("forbid fewer entries"), "{error}");
        let huge = Tensor::from_slice(gpu(), &of(&|e| if e % 2 == 0 { 3.3e38 } else { -3.3e38 }), [n, n]);
        assert!(huge.assignments_by(Goal::Minimize, true).expect("f64 has room")[0].exact);
    }
}

#[test]
fn flat_problems_are_not_made_square() {
    // With products as entries, the rows take the last columns in order. Padded to a square, this would take 3 GB.
    let (rows, columns) = (40usize, 20_000usize);
    let cost: Vec<i32> =
        (0..rows * columns).map(|e| -(((e / columns + 1) * (e % columns + 1)) as i32)).collect();
    let best = assign(&cost, [rows, columns], Goal::Minimize).unwrap();
    let want: i64 = (0..rows as i64).map(|i| -(i + 1) * (columns as i64 - rows as i64 + i + 1)).sum();
    assert!(best.value == want as f64 && best.exact, "{} for {want}", best.value);
}
