//! The tape: what is recorded, the results of backward, and the laws of shared weights.

use super::*;
use tiebeam::checkpoint;
use tiebeam::optim::{Group, Sgd, SgdConfig};
use tiebeam::share::LowRank;

#[test]
fn no_grad_and_detach_leave_the_graph() {
    let gpu = gpu();
    let x = Tensor::from_slice(gpu, &[2.0f32, 3.0], [2]).requires_grad();
    assert!(x.is_leaf() && x.is_tracked());
    assert!(!no_grad(|| x.mul(&x)).is_tracked());
    // Recording is on again after a panic inside `no_grad`.
    let _ = catch_unwind(AssertUnwindSafe(|| no_grad(|| panic!("inside"))));
    let y = x.mul(&x.detach());
    assert!(y.is_tracked() && !y.is_leaf() && !y.detach().is_tracked());
    let grads = y.sum_all().backward().unwrap();
    assert_eq!(grads.get(&x).unwrap().to_vec::<f32>().unwrap(), [2.0, 3.0]);
    assert_eq!(grads.len(), 1);
    // `no_grad` does not affect other threads.
    no_grad(|| {
        std::thread::scope(|s| {
            let tracked = s.spawn(|| x.mul(&x).is_tracked()).join();
            assert!(tracked.expect("the thread"));
        });
    });
    let other = Tensor::ones(gpu, [2]).requires_grad();
    assert!(grads.get(&other).is_none());
}

#[test]
fn checkpoint_gives_the_gradients_without_it() {
    let gpu = gpu();
    let [x, w, v, gain] = [(5, [6, 8]), (6, [8, 8]), (7, [8, 8]), (8, [1, 8])]
        .map(|(seed, shape)| drawn(gpu, seed, &shape).requires_grad());
    let fixed = drawn(gpu, 9, &[6, 8]);
    // `gate` is captured and not a leaf, `gain` is a captured leaf, and `w` is both an input and used outside.
    let gate = v.mul(&gain).tanh();
    let block = |x: &Tensor, w: &Tensor, fixed: &Tensor, gate: &Tensor, gain: &Tensor| {
        linear(x, w).gelu().matmul(gate).mul(gain).add(fixed)
    };
    let plain = block(&x, &w, &fixed, &gate, &gain).matmul(&w).square().mean_all();
    let (gate2, gain2) = (gate.clone(), gain.clone());
    let inner = checkpoint(&[&x, &w, &fixed], move |t| block(&t[0], &t[1], &t[2], &gate2, &gain2));
    let nested = {
        let (gate3, gain3) = (gate.clone(), gain.clone());
        checkpoint(&[&x, &w, &fixed], move |t| {
            let (gate4, gain4) = (gate3.clone(), gain3.clone());
            checkpoint(&[&t[0], &t[1], &t[2]], move |t| block(&t[0], &t[1], &t[2], &gate4, &gain4)).scale(1.0)
        })
    };
    let want = plain.backward_retain_graph().unwrap();
    for (name, inner) in [("once", inner), ("nested", nested)] {
        let loss = inner.matmul(&w).square().mean_all();
        assert_eq!(bits(&loss), bits(&plain), "{name}");
        let got = loss.backward_retain_graph().unwrap();
        assert_eq!(got.len(), want.len(), "{name}: leaves");
        for leaf in [&x, &w, &v, &gain] {
            let (got, want) = (download(got.get(leaf).unwrap()), download(want.get(leaf).unwrap()));
            let scale = want.iter().fold(0.0f64, |m, w| m.max(w.abs()));
            // Only the order in which contributions to one leaf arrive may differ.
            within(&format!("checkpoint {name}"), &got, &want, |_| 4.0 * U * scale);
        }
    }
    let kept = no_grad(|| checkpoint(&[&x], |t| t[0].scale(2.0)));
    assert!(!kept.is_tracked());
    // An input without `requires_grad` gets no gradient.
    let loss = checkpoint(&[&fixed, &x], |t| t[0].mul(&t[1])).sum_all();
    let grads = loss.backward().unwrap();
    assert_eq!(grads.len(), 1);
    assert_eq!(bits(grads.get(&x).unwrap()), bits(&fixed));
}

#[test]
fn checkpoint_keeps_less() {
    let peak = |with: bool| {
        let gpu = own();
        let x = drawn(&gpu, 1, &[64, 1024]).requires_grad();
        let block =
            |t: &Tensor| (0..12).fold(t.clone(), |t, i| t.sin().add(&t.sum(-1).unsqueeze(1).scale(i as f32)));
        let mut y = x.clone();
        for _ in 0..6 {
            y = if with { checkpoint(&[&y], move |t| block(&t[0])) } else { block(&y) };
        }
        let grads = y.sum_all().backward().unwrap();
        (bits(grads.get(&x).unwrap()), gpu.memory_stats().peak)
    };
    let ((plain, most), (kept, less)) = (peak(false), peak(true));
    assert_eq!(plain, kept);
    assert!(less * 2 < most, "peak {less} bytes with, {most} without");
}

#[test]
fn misuse_of_backward_panics_with_a_sentence() {
    let gpu = gpu();
    let x = drawn(gpu, 1, &[2, 3]).requires_grad();
    assert_eq!(
        panic_of(|| x.scale(2.0).backward()),
        "backward: shape [2, 3] is not a scalar; reduce it to a loss or give a seed with backward_with"
    );
    let untracked = panic_of(|| x.detach().sum_all().backward());
    assert!(untracked.starts_with("backward: this tensor depends on no leaf"), "{untracked}");
    let seed = panic_of(|| x.scale(2.0).backward_with(&Tensor::ones(gpu, [3, 2])));
    assert_eq!(seed, "backward: seed [3, 2] for output [2, 3]");
    let whole = Tensor::from_slice(gpu, &[1u32; 6], [2, 3]);
    let seed = panic_of(|| x.scale(2.0).backward_with(&whole));
    assert!(seed.contains("seed") && seed.contains("u32"), "{seed}");
    let integers = panic_of(|| whole.requires_grad());
    assert_eq!(integers, "requires_grad: u32 has no gradient");
}

#[test]
fn a_saved_value_changed_in_place_panics() {
    let gpu = gpu();
    let start = normal(1, 6);
    let w = Tensor::from_slice(gpu, &start, [6]).requires_grad();
    let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
    // `square` saves w, `scale` saves nothing.
    let (squared, scaled) = (w.square().sum_all(), w.scale(3.0).sum_all());
    let pending = w.affine(1.0, 0.0);
    let grads = squared.backward_retain_graph().unwrap();
    sgd.step(&grads, 0.25).unwrap();
    let said = panic_of(|| squared.backward());
    assert!(said.starts_with("square: ") && said.contains("changed in place"), "{said}");
    assert_eq!(scaled.backward().unwrap().get(&w).unwrap().to_vec::<f32>().unwrap(), [3.0; 6]);
    // An expression from before the step has the old elements. Halving is exact.
    assert_eq!(pending.to_vec::<f32>().unwrap(), start);
    let halved: Vec<f32> = start.iter().map(|v| v * 0.5).collect();
    assert_eq!(w.to_vec::<f32>().unwrap(), halved);
    assert_eq!(w.square().sum_all().backward().unwrap().get(&w).unwrap().to_vec::<f32>().unwrap(), start);
}

/// A value that was pending when it was saved is guarded like any other.
#[test]
fn a_pending_value_changed_in_place_panics() {
    let gpu = gpu();
    let sgd = |w: &Tensor| Sgd::new(gpu, vec![Group::new([("w", w)])], SgdConfig::default()).unwrap();
    let changed = |loss: &Tensor| {
        let said = panic_of(|| loss.backward());
        assert!(said.starts_with("square: ") && said.contains("changed in place"), "{said}");
    };
    // Saved before and after the optimizer moves the leaf to its arena.
    let w = Tensor::full(gpu, [6], 3.0).requires_grad();
    let early = w.square().sum_all();
    let mut optimizer = sgd(&w);
    let late = w.square().sum_all();
    let grads = late.backward_retain_graph().unwrap();
    assert_eq!(grads.get(&w).unwrap().to_vec::<f32>().unwrap(), [6.0; 6]);
    assert_eq!(early.backward_retain_graph().unwrap().get(&w).unwrap().to_vec::<f32>().unwrap(), [6.0; 6]);
    optimizer.step(&grads, 0.25).unwrap();
    changed(&early);
    changed(&late);
    assert_eq!(w.square().sum_all().backward().unwrap().get(&w).unwrap().to_vec::<f32>().unwrap(), [3.0; 6]);
    // A leaf that is moved into an arena has not changed.
    let (a, b) = (Tensor::full(gpu, [6], 1.0).requires_grad(), Tensor::full(gpu, [6], 2.0));
    b.evaluate();
    let b = b.requires_grad();
    let loss = a.square().add(&b.square()).sum_all();
    let mut both = Sgd::new(gpu, vec![Group::new([("a", &a), ("b", &b)])], SgdConfig::default()).unwrap();
    let grads = loss.backward_retain_graph().unwrap();
    both.step(&grads, 0.25).unwrap();
    changed(&loss);
    let again = a.square().add(&b.square()).sum_all();
    both.step(&again.backward().unwrap(), 0.25).unwrap();
    assert_eq!(b.to_vec::<f32>().unwrap(), [0.5; 6]);
    // A value with a handle, stored by the kernel of another one, has its own memory, so a change of the leaf does not affect it.
    let leaf = Tensor::full(gpu, [6], 3.0).requires_grad();
    let mut optimizer = sgd(&leaf);
    let held = leaf.scale(2.0);
    let loss = held.square().sum_all();
    optimizer.step(&loss.backward_retain_graph().unwrap(), 0.25).unwrap();
    let grads = loss.backward().expect("`square` saved `held`, which nobody changed");
    assert_eq!(grads.get(&leaf).unwrap().to_vec::<f32>().unwrap(), [24.0; 6]);
}

#[test]
fn tensors_of_two_devices_panic() {
    let (a, b) = (gpu(), quiet());
    assert!(*a != *b && *b == b.clone());
    let [x, y] = [a, &*b].map(|gpu| drawn(gpu, 1, &[3, 3]).requires_grad());
    type Use<'a> = (&'static str, Box<dyn Fn() + 'a>);
    let uses: [Use; 8] = [
        ("add", Box::new(|| drop(x.add(&y)))),
        ("lt", Box::new(|| drop(x.lt(&y)))),
        ("matmul", Box::new(|| drop(x.matmul(&y)))),
        ("concat", Box::new(|| drop(Tensor::concat(&[&x, &y], 0)))),
        ("where", Box::new(|| drop(x.where_mask(&x.lt(&x), &y)))),
        ("linear", Box::new(|| drop(linear(&x, &y)))),
        ("linear", {
            let bias = drawn(&b, 1, &[3]);
            let (x, theta) = (x.clone(), tied(&x));
            Box::new(move || drop(x.linear(&theta, Epilogue::default().bias(Some(&bias)))))
        }),
        ("backward", Box::new(|| drop(x.scale(1.0).backward_with(&y)))),
    ];
    for (op, misuse) in uses {
        let said = panic_of(misuse);
        assert!(said.starts_with(&format!("{op}: tensors of two devices")), "{op}: {said}");
    }
    a.synchronize().unwrap();
    b.synchronize().unwrap();
}

#[test]
fn zero_sized_tensors_pass_through() {
    let gpu = gpu();
    let none = Tensor::from_slice::<f32>(gpu, &[], [0, 3]).requires_grad();
    let w = drawn(gpu, 1, &[4, 3]).requires_grad();
    let gone = |x: &Tensor| assert!(x.to_vec::<f32>().unwrap().is_empty());
    let y = linear(&none, &w);
    assert_eq!(**y.shape(), [0, 4]);
    gone(&y);
    gone(&none.mul(&none).add(&none).gelu());
    gone(&none.t().matmul(&none).slice(0, 0..0));
    gone(&none.matmul(&w.t()));
    gone(&none.sum(1));
    gone(&none.max(1));
    gone(&w.slice(0, 4..4));
    assert_eq!(none.sum(0).to_vec::<f32>().unwrap(), [0.0; 3]);
    // A product over an axis of size 0 is zero in every form.
    assert_eq!(none.t().matmul(&none).to_vec::<f32>().unwrap(), [0.0; 9]);
    let thin = Tensor::from_slice::<f32>(gpu, &[], [2, 5, 0]);
    let nothing = Tensor::from_slice::<f32>(gpu, &[], [0, 4]);
    assert_eq!(thin.matmul(&nothing).to_vec::<f32>().unwrap(), [0.0; 40]);
    assert_eq!(linear(&thin, &nothing.t()).to_vec::<f32>().unwrap(), [0.0; 40]);
    // 64 floats are 256 bytes, so the empty rest starts just past the buffer's end.
    let full = drawn(gpu, 2, &[64]);
    let rest = full.slice(0, 64..64);
    assert_eq!(
        Tensor::concat(&[&rest, &full, &rest], 0).to_vec::<f32>().unwrap(),
        full.to_vec::<f32>().unwrap()
    );
    assert_eq!(rest.pad(0, 1, 2).to_vec::<f32>().unwrap(), [0.0; 3]);
    assert!(rest.to_string().starts_with("[]\n[0] f32 on "));
    let grads = y.sum_all().backward().unwrap();
    gone(grads.get(&none).unwrap());
    assert_eq!(grads.get(&w).unwrap().to_vec::<f32>().unwrap(), [0.0; 12]);
    gpu.synchronize().unwrap();
}

// Sharing

#[test]
fn the_gradient_of_a_tied_matrix_is_the_sum_of_untied_ones() {
    let gpu = gpu();
    let theta = drawn(gpu, 1, &[19, 19]);
    let x = drawn(gpu, 2, &[23, 19]);
    let run = |w: [&Tensor; 3]| {
        let y = w.iter().fold(x.clone(), |x, w| linear(&x, w).scale(0.3).gelu());
        y.square().sum_all()
    };
    let shared = theta.requires_grad();
    let loss = run([&shared; 3]);
    let got = download(loss.backward().unwrap().get(&shared).unwrap());
    let copies = [(); 3].map(|()| theta.requires_grad());
    let untied = run([&copies[0], &copies[1], &copies[2]]);
    assert_eq!(bits(&loss), bits(&untied), "forward");
    let grads = untied.backward().unwrap();
    let parts = copies.each_ref().map(|copy| download(grads.get(copy).unwrap()));
    let sum =
        |f: fn(f64) -> f64| move |i: usize, parts: &[Vec<f64>; 3]| parts.iter().map(|p| f(p[i])).sum::<f64>();
    let want: Vec<f64> = (0..got.len()).map(|i| sum(|v| v)(i, &parts)).collect();
    // The parts are the same numbers, and only their two additions round.
    within("tied", &got, &want, |i| 2.0 * U * sum(f64::abs)(i, &parts));
    assert!(parts.iter().all(|p| p.iter().any(|v| v.abs() > 1e-3)), "every site contributes");
}

#[test]
fn low_rank_sites_hold_the_adjoint_law() {
    let gpu = gpu();
    for (rows, n, k, rank) in [(1, 1, 1, 1), (7, 13, 5, 2), (33, 40, 68, 4)] {
        let leaf = |seed, shape: [usize; 2]| drawn(gpu, seed, &shape).requires_grad();
        let (theta, a, b) = (leaf(1, [n, k]), leaf(2, [rank, k]), leaf(3, [n, rank]));
        let site = LowRank::new(&theta, &a, &b, 0.7).shared();
        let (x, dy) = (drawn(gpu, 4, &[rows, k]), drawn(gpu, 5, &[rows, n]));
        let grads = x.linear(&site, Epilogue::default()).backward_with(&dy).unwrap();
        // `<dy, x W^T> = <W, G>` with `G = dy^T x`.
        let g = dy.t().matmul(&x);
        let (want, scale) = dot(&site.expand(), &g);
        let size = |t: &Tensor| download(t).iter().map(|v| v * v).sum::<f64>().sqrt();
        // W is linear in (theta, a) and in (theta, b): `<S v, G> = <v, S^T G>` for either pair.
        let shared = dot(&theta, grads.get(&theta).unwrap()).0;
        for (name, private) in [("a", &a), ("b", &b)] {
            let got = shared + dot(private, grads.get(private).unwrap()).0;
            // Each number in these sums has the rounding error of a dot product over rows, rank, n or k.
            let longest = (rows.max(rank).max(n).max(k) as f64).sqrt();
            let bound = 8.0 * U * longest * (scale + size(&site.expand()) * size(&g));
            assert!((got - want).abs() <= bound, "{name}: {got} is not {want}, bound {bound:e}");
        }
        // The bound is tight enough to detect a missing private part.
        let without = dot(&theta, &g).0;
        let bound = 8.0 * U * (rows.max(n).max(k) as f64).sqrt() * (scale + size(&site.expand()) * size(&g));
        assert!((without - want).abs() > 10.0 * bound);
        // For theta alone, `S` is the identity.
        within("dtheta", &download(grads.get(&theta).unwrap()), &download(&g), |_| {
            8.0 * U * (rows as f64).sqrt() * size(&x) * size(&dy)
        });
    }
}

#[test]
fn a_leaf_used_five_times_has_one_gradient_buffer() {
    const SIDE: usize = 256;
    let peak = |uses: usize| {
        let gpu = own();
        let theta = drawn(&gpu, 1, &[SIDE, SIDE]).requires_grad();
        let x = drawn(&gpu, 2, &[1, SIDE]);
        let loss = (0..uses).fold(x, |x, _| linear(&x, &theta).scale(0.1).gelu()).sum_all();
        let grads = loss.backward().unwrap();
        assert!(bits(grads.get(&theta).unwrap()).iter().any(|b| *b != 0));
        gpu.memory_stats().peak
    };
    let (once, five) = (peak(1), peak(5));
    let matrix = (SIDE * SIDE * 4) as u64;
    assert!(once >= 2 * matrix, "theta and its gradient are there");
    assert!(five < once + matrix / 2, "peak {once} bytes for one use, {five} for five");
}
