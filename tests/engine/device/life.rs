//! Memory that a long run holds, and the effects of a fault on it.

use super::folder::Folder;
use super::*;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::ops::sequence::cache::KvCache;
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig};
use tiebeam::store::{Checkpoint, load_checkpoint, save_checkpoint};
use tiebeam::{Error, Options, Step};

fn sgd(gpu: &Gpu, all: &[(&str, &Tensor)]) -> tiebeam::Result<Sgd> {
    Sgd::new(gpu, vec![Group::new(all.iter().copied())], SgdConfig::default())
}

fn raise(gpu: &Gpu) {
    gpu.raise(Error::device("made by a test"));
}

// Faults

#[test]
fn a_step_that_fails_changes_nothing() {
    let gpu = quiet();
    let w = drawn(&gpu, 1, &[4]).requires_grad();
    let mut adamw = AdamW::new(&gpu, vec![Group::new([("w", &w)])], AdamWConfig::default()).unwrap();
    let folder = Folder::new("life");
    let path = folder.join("run.safetensors");
    let params = [("w".to_string(), w.clone())];
    let run = Checkpoint::default().optimizer(adamw.state_dict().unwrap());
    save_checkpoint(&path, &params, &run).unwrap();
    let mut step = Step::record(&gpu, &[], |_| {
        adamw.step(&w.sum_all().backward()?, 0.1)?;
        Ok(vec![])
    })
    .unwrap();
    let (start, state) = (bits(&w), adamw.state_dict().unwrap());
    let grads = w.square().sum_all().backward().unwrap();
    // An expression over the weights that is too large to compute does not block the step.
    let wide = w.detach().reshape([1, 4]).expand([1 << 29, 4]).scale(2.0);
    raise(&gpu);
    assert!(adamw.step(&grads, 0.1).is_err() && step.run(&[]).is_err());
    assert!(gpu.snapshot(&[&w]).is_err());
    assert!(load_checkpoint(&path, &params).is_err());
    gpu.take_fault();
    assert_eq!((bits(&w), adamw.state_dict().unwrap(), adamw.steps()), (start.clone(), state, 1));
    adamw.step(&grads, 0.1).unwrap();
    step.run(&[]).unwrap();
    assert_ne!(bits(&w), start);
    assert!(matches!(wide.to_vec::<f32>(), Err(Error::Limit { .. })));
    load_checkpoint(&path, &params).unwrap();
    assert_eq!(w.to_vec::<f32>().unwrap(), normal(1, 4));
}

#[test]
fn an_optimizer_that_cannot_be_made_takes_nothing() {
    let gpu = quiet();
    let (a, b) = (drawn(&gpu, 1, &[4]).requires_grad(), Tensor::ones(&gpu, [4]).requires_grad());
    a.evaluate();
    raise(&gpu);
    assert!(sgd(&gpu, &[("a", &a), ("b", &b)]).is_err());
    gpu.take_fault();
    let taken = sgd(&gpu, &[("b", &b)]).unwrap();
    let said = panic_of(|| sgd(&gpu, &[("a", &a), ("b", &b)]));
    assert!(said.starts_with("sgd: `b` belongs to another optimizer; drop that one first"), "{said}");
    let mut first = sgd(&gpu, &[("a", &a)]).unwrap();
    first.step(&a.sum_all().backward().unwrap(), 1.0).unwrap();
    // Stage two: another optimizer continues where the first stopped.
    drop((first, taken));
    let both = vec![Group::new([("a", &a), ("b", &b)])];
    let mut second = AdamW::new(&gpu, both, AdamWConfig::default()).unwrap();
    let before = a.to_vec::<f32>().unwrap();
    assert_eq!(before, normal(1, 4).iter().map(|x| x - 1.0).collect::<Vec<_>>());
    second.step(&a.add(&b).sum_all().backward().unwrap(), 0.5).unwrap();
    assert_eq!(b.to_vec::<f32>().unwrap(), [0.5; 4]);
}

#[test]
fn a_cache_keeps_its_rows_through_a_fault() {
    let gpu = quiet();
    let list = |v: u32| Tensor::from_slice(&gpu, &[v], [1]);
    let mut cache = KvCache::new(&gpu, 2, 1, 8, 4);
    let (x, q) = (drawn(&gpu, 1, &[1, 3, 1, 4]), drawn(&gpu, 2, &[1, 1, 1, 4]));
    let (rows, start, length) = (list(0), list(0), list(3));
    cache.append(&x, &x, &rows, &start).unwrap();
    let want = bits(&cache.attend(&q, &rows, &length));
    raise(&gpu);
    assert!(cache.append(&x, &x, &rows, &start).is_err());
    gpu.take_fault();
    assert_eq!(bits(&cache.attend(&q, &rows, &length)), want);
    cache.append(&x.scale(2.0), &x, &list(1), &start).unwrap();
    assert_eq!(bits(&cache.attend(&q, &rows, &length)), want);
    cache.append(&x.scale(2.0), &x, &rows, &start).unwrap();
    assert_ne!(bits(&cache.attend(&q, &rows, &length)), want);
}

// Memory

#[test]
fn a_kept_loss_holds_its_element() {
    let gpu = quiet();
    let w = drawn(&gpu, 1, &[64, 64]).requires_grad();
    let mut losses = Vec::new();
    let mut used = 0;
    for step in 0..20 {
        let x = drawn(&gpu, 2, &[64, 64]);
        let loss = x.matmul(&w.t()).tanh().square().mean_all();
        loss.backward().unwrap();
        losses.push(loss);
        if step == 4 {
            used = gpu.memory_stats().used;
        }
    }
    let now = gpu.memory_stats().used;
    assert!(now <= used + 15 * 1024, "15 losses more hold {now} - {used} bytes");
    let said = panic_of(|| losses[0].backward());
    assert!(said.starts_with("backward: an earlier backward has used up this graph"), "{said}");
    // A retained graph gives the same gradients again. A part that another loss has used up is refused.
    let trunk = w.square();
    let (one, two) = (trunk.sum_all(), trunk.scale(2.0).sum_all());
    let [first, again] =
        [one.backward_retain_graph(), one.backward()].map(|grads| bits(grads.unwrap().get(&w).unwrap()));
    assert_eq!(first, again);
    assert!(panic_of(|| two.backward()).contains("or a part of it"));
}

#[test]
fn gradients_add_and_scale() {
    let gpu = quiet();
    let [a, b, c] = [1, 2, 3].map(|seed| drawn(&gpu, seed, &[6]).requires_grad());
    // `a` and `b` have their own arenas, `c` has none.
    let config = SgdConfig::default().arena_limit(Some(32));
    let mut sgd = Sgd::new(&gpu, vec![Group::new([("a", &a), ("b", &b)])], config).unwrap();
    let first = a.mul(&b).sum_all().backward().unwrap();
    let second = a.scale(3.0).add(&c.scale(2.0)).sum_all().backward().unwrap();
    let held = first.get(&a).unwrap().clone();
    let sum = first.add(&second);
    let want = |x: &Tensor, f: &dyn Fn(usize) -> f32| {
        assert_eq!(x.to_vec::<f32>().unwrap(), (0..6).map(f).collect::<Vec<_>>());
    };
    let (of_a, of_b) = (normal(1, 6), normal(2, 6));
    assert_eq!(sum.len(), 3);
    want(sum.get(&a).unwrap(), &|i| of_b[i] + 3.0);
    want(sum.get(&b).unwrap(), &|i| of_a[i]);
    want(sum.get(&c).unwrap(), &|_| 2.0);
    want(&held, &|i| of_b[i]);
    let half = sum.scale(0.5);
    want(half.get(&a).unwrap(), &|i| (of_b[i] + 3.0) * 0.5);
    sgd.step(&half, 1.0).unwrap();
    want(&a, &|i| of_a[i] - (of_b[i] + 3.0) * 0.5);
    want(&b, &|i| of_b[i] - of_a[i] * 0.5);
    want(&c, &|i| normal(3, 6)[i]);
    // Gradients that carry an error do not change the weights.
    let before = bits(&a);
    raise(&gpu);
    let spoilt = sum.add(&half);
    gpu.take_fault();
    assert!(sgd.step(&spoilt, 1.0).is_err());
    assert_eq!(bits(&a), before);
}

#[test]
fn a_copy_stays_and_a_clone_follows() {
    let gpu = gpu();
    let w = drawn(gpu, 1, &[6]).requires_grad();
    let mut sgd = sgd(gpu, &[("w", &w)]).unwrap();
    let (copy, clone) = (w.copy(), w.clone());
    assert!(copy.is_tracked() && !copy.is_leaf());
    sgd.step(&copy.scale(2.0).sum_all().backward().unwrap(), 0.25).unwrap();
    assert_eq!(copy.to_vec::<f32>().unwrap(), normal(1, 6));
    assert_eq!(bits(&clone), bits(&w));
    assert_eq!(clone.to_vec::<f32>().unwrap(), normal(1, 6).iter().map(|x| x - 0.5).collect::<Vec<_>>());
    let mut step = Step::record(gpu, &[&w], |x| Ok(vec![x[0].scale(2.0)])).unwrap();
    let (kept, want) = (step.outputs()[0].copy(), bits(&step.outputs()[0]));
    step.run(&[&Tensor::ones(gpu, [6])]).unwrap();
    assert_eq!(bits(&kept), want);
}

#[test]
fn a_leaf_is_its_own_leaf() {
    let gpu = gpu();
    let w = drawn(gpu, 1, &[6]).requires_grad();
    assert_eq!(w.requires_grad().leaf_id(), w.leaf_id());
    assert_ne!(w.detach().requires_grad().leaf_id(), w.leaf_id());
    let mut sgd = sgd(gpu, &[("w", &w.requires_grad())]).unwrap();
    sgd.step(&w.sum_all().backward().unwrap(), 1.0).unwrap();
    assert_eq!(w.to_vec::<f32>().unwrap(), normal(1, 6).iter().map(|x| x - 1.0).collect::<Vec<_>>());
}

// A cap on memory

/// Beyond `Options::memory` only what does not fit fails. Free buffers count, and are given back to make room.
#[test]
fn memory_can_be_capped() {
    let capped = Gpu::open_with(Options::default().memory(Some(8 << 20))).expect("opens");
    let zeros = |mib: usize| Tensor::from_slice(&capped, &vec![0.0f32; mib << 18], [mib << 18]);
    let held: Vec<Tensor> = [2, 2, 2].map(zeros).into();
    held.iter().for_each(|x| assert!(x.check().is_ok()));
    let beyond = zeros(3);
    let said = beyond.exp().check().expect_err("9 MiB").to_string();
    assert!(said.contains("at most 8.0 MiB are allowed (Options::memory, TIEBEAM_MEMORY)"), "{said}");
    assert!(capped.take_fault().is_none(), "the device is well");
    assert_eq!(held[0].to_vec::<f32>().expect("as it was")[..2], [0.0; 2]);
    // The three buffers of 2 MiB become free. They are of another size, so they must go before one of 6 MiB can be made.
    drop(held);
    assert!(zeros(6).check().is_ok());
    let stats = capped.memory_stats();
    assert!(stats.peak <= 8 << 20, "{stats:?}");
    // A recorded step's memory counts too.
    let x = Tensor::zeros(&capped, [1, 1 << 18]);
    let big = || x.expand([6, 1 << 18]).exp().contiguous();
    let failed = Step::record(&capped, &[], |_| Ok(vec![big(), big().sin()]));
    assert!(failed.is_err(), "two results of 6 MiB");
    assert!(capped.memory_stats().peak <= 8 << 20);
}

/// What one thread is refused takes nothing from another.
#[test]
fn a_cap_refuses_only_what_does_not_fit() {
    const CAP: u64 = 8 << 20;
    let capped = Gpu::open_with(Options::default().memory(Some(CAP))).expect("opens");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let greedy = scope.spawn(|| {
            let (mut refused, twelve) = (0, vec![0.0f32; 3 << 20]);
            while !stop.load(Ordering::Relaxed) {
                refused += usize::from(Tensor::from_slice(&capped, &twelve, [3 << 20]).check().is_err());
            }
            refused
        });
        // Each holds at most a quarter of the cap, in buffers of many sizes.
        let modest = |seed: usize| {
            for turn in 0..300 {
                let size = 1000 * (seed * 37 + turn * 101) % 400_000 + 64;
                let x = Tensor::from_slice(&capped, &vec![1.0f32; size], [size]);
                assert!(x.check().is_ok(), "{size} of thread {seed}: {:?}", x.check());
            }
        };
        let threads = [1, 2, 3].map(|seed| scope.spawn(move || modest(seed)));
        let done = threads.map(|thread| thread.join());
        stop.store(true, Ordering::Relaxed);
        assert!(greedy.join().expect("no panic") > 0, "12 MiB were given");
        done.into_iter().for_each(|result| result.expect("what fits is given"));
    });
    assert!(capped.memory_stats().peak <= CAP);
}
