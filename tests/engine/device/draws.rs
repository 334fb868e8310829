//! Random generators in recorded steps: each replay draws what its code would draw, from the present state of the generators.

use super::*;
use tiebeam::optim::{Group, Sgd, SgdConfig};
use tiebeam::{Step, checkpoint};

/// The elements of `x` that a mask kept.
fn mask(x: &Tensor) -> Vec<bool> {
    x.to_vec::<f32>().unwrap().iter().map(|x| *x > 0.0).collect()
}

fn ones(gpu: &Gpu) -> Tensor {
    Tensor::from_slice(gpu, &[1f32; 64], [64])
}

/// The masks of the first `n` draws of a generator.
fn masks(gpu: &Gpu, seed: u64, n: usize) -> Vec<Vec<bool>> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| mask(&ones(gpu).dropout(0.5, &mut rng))).collect()
}

#[test]
fn replays_steps_and_the_host_share_one_order_of_draws() {
    let gpu = gpu();
    let (x, want) = (ones(gpu), masks(gpu, 7, 9));
    let mut rng = Rng::new(7);
    let mut record = || Step::record(gpu, &[&x], |x| Ok(vec![x[0].dropout(0.5, &mut rng)])).unwrap();
    let (mut a, mut b) = (record(), record());
    let mut got = vec![mask(&a.outputs()[0]), mask(&b.outputs()[0])];
    assert_eq!(rng.state(), [7, 2]);
    got.push(mask(&a.run(&[&x]).unwrap()[0]));
    got.push(mask(&x.dropout(0.5, &mut rng)));
    got.push(mask(&b.run(&[&x]).unwrap()[0]));
    got.push(mask(&b.run(&[&x]).unwrap()[0]));
    assert_eq!(rng.state(), [7, 6]);
    rng.below(3);
    got.push(got[0].clone()); // in the place of that draw
    got.push(mask(&a.run(&[&x]).unwrap()[0]));
    got.push(mask(&x.dropout(0.5, &mut rng)));
    for (i, (got, want)) in got.iter().zip(&want).enumerate().filter(|(i, _)| *i != 6) {
        assert!(got == want, "draw {i}");
    }
    assert_eq!(rng.state(), [7, 9]);
    // A refused run draws nothing.
    a.run(&[]).unwrap_err();
    assert_eq!(rng.state(), [7, 9]);
}

#[test]
fn a_step_is_put_back_with_its_generator() {
    let gpu = gpu();
    let (x, want) = (ones(gpu), masks(gpu, 11, 4));
    let mut rng = Rng::new(3);
    let mut step = Step::record(gpu, &[&x], |x| {
        let first = x[0].dropout(0.5, &mut rng);
        // A draw on the host counts too.
        rng.below(10);
        Ok(vec![first, x[0].dropout(0.5, &mut rng)])
    })
    .unwrap();
    assert_eq!(rng.state(), [3, 3]);
    rng.set_state([11, 1]);
    let got: Vec<_> = step.run(&[&x]).unwrap().iter().map(mask).collect();
    assert!(got == [want[1].clone(), want[3].clone()], "another seed, another place");
    assert_eq!(rng.state(), [11, 4]);
    let inside = panic_of(|| {
        Step::record(gpu, &[], |_| {
            rng.set_state([1, 1]);
            Ok(vec![])
        })
    });
    assert!(inside.starts_with("rng: set_state inside a recorded step"), "{inside}");
}

/// Replays draw what each run of the code would draw: a copied generator starts from the present state of its original, and one
/// that the code creates from a seed always starts from that seed.
#[test]
fn copies_and_seeds_in_the_code_draw_as_the_code_would() {
    let gpu = gpu();
    let x = ones(gpu);
    let work = |rng: &mut Rng, still: &Rng, x: &Tensor| {
        let (mut copy, mut frozen, mut seeded) = (rng.clone(), still.clone(), Rng::new(5));
        let same = x.dropout(0.5, &mut copy);
        let next = x.dropout(0.5, rng);
        let beyond = x.dropout(0.5, &mut copy);
        [same, next, beyond, x.dropout(0.5, &mut frozen), x.dropout(0.5, &mut seeded)].map(|x| x.copy())
    };
    let [mut a, mut b] = [(); 2].map(|()| Rng::new(9));
    let still = Rng::from_state([9, 40]);
    let want: Vec<Vec<_>> = (0..3).map(|_| work(&mut a, &still, &x).iter().map(mask).collect()).collect();
    let mut step = Step::record(gpu, &[&x], |x| Ok(work(&mut b, &still, &x[0]).to_vec())).unwrap();
    for (i, want) in want.iter().enumerate() {
        if i > 0 {
            step.run(&[&x]).unwrap();
        }
        assert!(&step.outputs().iter().map(mask).collect::<Vec<_>>() == want, "run {i}");
    }
    assert_eq!((a.state(), still.state()), (b.state(), [9, 40]));
}

#[test]
fn a_run_saved_between_replays_resumes_to_the_same_bits() {
    let gpu = gpu();
    let train = |w: &[f32], rng: &mut Rng, steps: usize| {
        let x = ones(gpu);
        let w = Tensor::from_slice(gpu, w, [64]).requires_grad();
        let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
        let mut step = Step::record(gpu, &[&x], |x| {
            let (w, x, seed) = (w.clone(), x[0].clone(), rng.clone());
            rng.next_stream();
            let hidden = checkpoint(&[&w, &x], move |t| t[0].mul(&t[1]).dropout(0.5, &mut seed.clone()));
            let loss = hidden.add(&Tensor::randn(x.gpu(), [64], rng)).dropout(0.25, rng).square().sum_all();
            sgd.step(&loss.backward()?, 0.1)?;
            Ok(vec![])
        })
        .unwrap();
        for _ in 1..steps {
            step.run(&[&x]).unwrap();
        }
        w.to_vec::<f32>().unwrap()
    };
    let whole = train(&[1.0; 64], &mut Rng::new(3), 6);
    let mut rng = Rng::new(3);
    let half = train(&[1.0; 64], &mut rng, 3);
    assert_eq!(rng.state(), [3, 9]);
    assert_eq!(train(&half, &mut Rng::from_state(rng.state()), 3), whole);
    assert_ne!(train(&half, &mut Rng::new(3), 3), whole);
}

/// A mask drawn before the recording stays the mask of its graph.
#[test]
fn what_was_drawn_before_is_not_drawn_again() {
    let gpu = gpu();
    let x = ones(gpu).requires_grad();
    let mut rng = Rng::new(4);
    let early = x.dropout(0.5, &mut rng);
    let want = mask(&early);
    let mut step = Step::record(gpu, &[], |_| {
        let own = ones(gpu).dropout(0.5, &mut rng);
        Ok(vec![early.sum_all().backward_retain_graph()?.get(&x).unwrap().clone(), own])
    })
    .unwrap();
    for run in 1..4 {
        assert!(mask(&step.outputs()[0]) == want, "run {run}");
        assert_eq!(rng.state(), [4, 1 + run]);
        step.run(&[]).unwrap();
    }
}

/// Another thread that draws from a shared generator takes its own streams.
#[test]
fn draws_of_other_threads_are_no_part_of_a_step() {
    let gpu = gpu();
    let x = ones(gpu);
    let shared = std::sync::Mutex::new(Rng::new(6));
    let draw = || shared.lock().unwrap().next_stream();
    let mut seen = Vec::new();
    let mut step = std::thread::scope(|s| {
        let masks = |x: &Tensor| x.dropout(0.5, &mut shared.lock().unwrap());
        Step::record(gpu, &[&x], |x| {
            let first = masks(&x[0]);
            seen.push(s.spawn(draw).join().unwrap());
            let second = masks(&x[0]);
            seen.push(s.spawn(draw).join().unwrap());
            Ok(vec![first, second])
        })
        .unwrap()
    });
    let mut all: Vec<_> = step.outputs().iter().map(mask).collect();
    for _ in 0..3 {
        all.extend(step.run(&[&x]).unwrap().iter().map(mask));
        let mut host = vec![0.0; 64];
        draw().fill_uniform(&mut host);
        all.push(host.iter().map(|u| *u >= 0.5).collect());
    }
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count, "no two masks are equal");
}
