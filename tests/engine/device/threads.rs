//! Threads that share a device: none disturbs another's recording, and none sees half of a change. `tests/long/threads.rs` runs
//! many of them at once.

use super::folder::Folder;
use super::*;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::channel;
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig};
use tiebeam::store::{Checkpoint, File, save_checkpoint};
use tiebeam::{Error, Step};

fn sgd(gpu: &Gpu, w: &Tensor) -> Sgd {
    Sgd::new(gpu, vec![Group::new([("w", w)])], SgdConfig::default()).unwrap()
}

/// Makes a step that subtracts `lr` from every element of `w`.
fn down(sgd: &mut Sgd, w: &Tensor, lr: f32) {
    sgd.step(&w.sum_all().backward().unwrap(), lr).unwrap();
}

/// An expression over a weight that another thread has pending is computed before the weight changes. Replays do not compute it
/// again.
#[test]
fn others_pending_work_is_no_part_of_a_recording() {
    let gpu = gpu();
    let w = Tensor::from_slice(gpu, &[10f32], [1]).requires_grad();
    let mut train = sgd(gpu, &w);
    let alone = {
        let v = Tensor::from_slice(gpu, &[10f32], [1]).requires_grad();
        let mut train = sgd(gpu, &v);
        let record = |train: &mut Sgd| {
            Step::record(gpu, &[], |_| {
                down(train, &v, 1.0);
                Ok(vec![])
            })
        };
        record(&mut train).unwrap().dispatches()
    };
    let (ask, asked) = channel::<()>();
    let (answer, answered) = channel::<Tensor>();
    let late = std::thread::scope(|s| {
        s.spawn(|| {
            let asked = asked;
            asked.recv().unwrap();
            answer.send(w.detach().scale(10.0)).unwrap();
        });
        let mut late = None;
        let mut step = Step::record(gpu, &[], |_| {
            ask.send(()).unwrap();
            late = Some(answered.recv().unwrap());
            down(&mut train, &w, 1.0);
            Ok(vec![])
        })
        .unwrap();
        assert_eq!(step.dispatches(), alone);
        let late = late.unwrap();
        assert_eq!(late.item().unwrap(), 100.0);
        for want in [8.0, 7.0, 6.0] {
            step.run(&[]).unwrap();
            assert_eq!((w.item().unwrap(), late.item().unwrap()), (want, 100.0));
        }
        late
    });
    assert_eq!(late.item().unwrap(), 100.0);
}

/// Work that a thread records stays in its step, even if another thread had to compute it because it changed the weight that it
/// reads.
#[test]
fn a_recording_keeps_what_others_compute_for_it() {
    let gpu = gpu();
    let w = Tensor::from_slice(gpu, &[10f32], [1]).requires_grad();
    let mut train = sgd(gpu, &w);
    let (ask, asked) = channel::<()>();
    let (answer, answered) = channel::<()>();
    let train = std::thread::scope(|s| {
        let other = s.spawn(|| {
            let asked = asked;
            asked.recv().unwrap();
            down(&mut train, &w, 1.0);
            answer.send(()).unwrap();
            train
        });
        let mut step = Step::record(gpu, &[], |_| {
            let inner = w.detach().scale(10.0);
            let y = inner.affine(1.0, 1.0);
            ask.send(()).unwrap();
            answered.recv().unwrap();
            // In the recorded run, the elements are those from when the expression was created. In a replay, they are the
            // replay's.
            Ok(vec![y.scale(2.0), inner, w.detach().scale(3.0)])
        })
        .unwrap();
        let read = |step: &Step| step.outputs().iter().map(|y| y.item().unwrap()).collect::<Vec<_>>();
        assert_eq!(read(&step), [202.0, 100.0, 27.0]);
        let mut train = other.join().unwrap();
        for want in [[182.0, 90.0, 27.0], [162.0, 80.0, 24.0]] {
            step.run(&[]).unwrap();
            assert_eq!(read(&step), want);
            down(&mut train, &w, 1.0);
        }
        train
    });
    assert_eq!((train.steps(), w.item().unwrap()), (3, 7.0));
}

/// A pending value from another thread is an input of the recorded step, and its computation is not recorded.
#[test]
fn what_comes_from_another_thread_is_an_input() {
    let gpu = gpu();
    let w = Tensor::from_slice(gpu, &[10f32], [1]).requires_grad();
    let mut train = sgd(gpu, &w);
    let made = std::thread::scope(|s| {
        let hand = || {
            Step::record(gpu, &[], |_| {
                let given = s.spawn(|| w.detach().scale(10.0)).join().unwrap();
                Ok(vec![given.affine(1.0, 1.0)])
            })
        };
        hand().unwrap()
    });
    let mut step = made;
    assert_eq!(step.dispatches(), 1, "the sum alone");
    down(&mut train, &w, 1.0);
    assert_eq!(step.run(&[]).unwrap()[0].item().unwrap(), 101.0);
}

#[test]
fn a_saved_file_holds_one_step() {
    let gpu = gpu();
    let params: Vec<(String, Tensor)> = (0..6)
        .map(|i| (format!("w{i}"), Tensor::from_slice(gpu, &[0f32; 512], [512]).requires_grad()))
        .collect();
    // There are several arenas, so a step is several kernels.
    let config = SgdConfig::default().arena_limit(Some(4096));
    let group = Group::new(params.iter().map(|(name, w)| (name.as_str(), w)));
    let mut sgd = Sgd::new(gpu, vec![group], config).unwrap();
    let folder = Folder::new("one-step");
    let path = folder.join("run.safetensors");
    let stop = AtomicBool::new(false);
    let (mut seen, mut last) = (0, -1.0);
    std::thread::scope(|s| {
        s.spawn(|| {
            let work = |sgd: &mut Sgd| -> tiebeam::Result<Vec<Tensor>> {
                let loss = params.iter().map(|(_, w)| w.sum_all()).reduce(|a, b| a.add(&b)).unwrap();
                sgd.step(&loss.backward()?, 1.0)?; // every weight is minus the number of steps
                Ok(vec![])
            };
            work(&mut sgd).unwrap();
            let mut step = Step::record(gpu, &[], |_| work(&mut sgd)).unwrap();
            for i in 0.. {
                match i % 3 {
                    0 => work(&mut sgd).map(drop),
                    _ => step.run(&[]).map(drop),
                }
                .unwrap();
                if stop.load(Relaxed) {
                    break;
                }
            }
        });
        for _ in 0..12 {
            save_checkpoint(&path, &params, &Checkpoint::default()).unwrap();
            let file = File::open(&path).unwrap();
            let saved: Vec<f32> =
                params.iter().flat_map(|(name, _)| file.tensor_f32(name).unwrap()).collect();
            assert!(saved.iter().all(|x| *x == saved[0]), "{saved:?}");
            let tensors: Vec<&Tensor> = params.iter().map(|(_, w)| w).collect();
            let now = gpu.snapshot(&tensors).unwrap();
            let first = now[0].to_vec::<f32>().unwrap()[0];
            for x in &now {
                assert!(x.to_vec::<f32>().unwrap().iter().all(|x| *x == first));
                assert!(x.scale(2.0).sub(x).sub(x).to_vec::<f32>().unwrap().iter().all(|x| *x == 0.0));
            }
            seen += (saved[0] != last) as usize;
            last = saved[0];
        }
        stop.store(true, Relaxed);
    });
    assert!(seen > 2, "the training went on meanwhile");
}

#[test]
fn an_optimizer_is_made_while_others_read_the_leaf() {
    let gpu = gpu();
    for round in 0..200 {
        let w = Tensor::ones(gpu, [256]).requires_grad();
        let start = Barrier::new(3);
        let want =
            |x: &Tensor, want: f32| assert!(x.to_vec::<f32>().unwrap().iter().all(|x| *x == want), "{round}");
        std::thread::scope(|s| {
            for scale in [2.0, 3.0] {
                let (w, start) = (&w, &start);
                s.spawn(move || {
                    start.wait();
                    want(&w.scale(scale).relu(), scale);
                });
            }
            start.wait();
            let mut sgd = sgd(gpu, &w);
            let grads = w.scale(2.0).sum_all().backward().unwrap();
            std::thread::sleep(Duration::from_micros(200));
            // The readers expect the old values, and may still be reading.
            let _ = &grads;
            s.spawn(move || drop(sgd.step(&grads, 0.0).unwrap()));
        });
        want(&w, 1.0);
    }
}

/// Faults of one thread's requests cost another thread's training only the steps that return an error.
#[test]
fn a_fault_beside_a_step_costs_no_weight() {
    let gpu = quiet();
    let w = Tensor::from_slice(&gpu, &[0f32; 8], [8]).requires_grad();
    let other = drawn(&gpu, 1, &[8]);
    let group = vec![Group::new([("w", &w)])];
    let mut adamw = AdamW::new(&gpu, group, AdamWConfig::default().arena_limit(Some(64))).unwrap();
    let stop = AtomicBool::new(false);
    let (mut taken, mut refused) = (0, 0);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Relaxed) {
                gpu.raise(Error::device("made by a test"));
                drop(other.scale(2.0).to_vec::<f32>());
                gpu.take_fault();
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        while taken < 200 || refused < 20 {
            match w.sum_all().backward().and_then(|grads| adamw.step(&grads, 1.0)) {
                Ok(_) => taken += 1,
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Relaxed);
    });
    gpu.take_fault();
    assert_eq!(adamw.steps(), taken);
    // With a constant gradient, every step is one learning rate, and a refused step changes nothing.
    for x in w.to_vec::<f32>().unwrap() {
        assert!((x + taken as f32).abs() < 1e-3 * taken as f32, "{x} after {taken} steps, {refused} refused");
    }
    assert_eq!(adamw.state_dict().unwrap().len(), 3, "two moments, and whose they are");
}

/// A step can be recorded on one thread and run on another.
#[test]
fn a_step_goes_to_another_thread() {
    let gpu = gpu();
    let x = drawn(gpu, 1, &[4]);
    let mut step = Step::record(gpu, &[&x], |x| Ok(vec![x[0].scale(2.0)])).unwrap();
    let got = std::thread::spawn(move || bits(&step.run(&[&x.scale(3.0)]).unwrap()[0])).join().unwrap();
    assert_eq!(got, bits(&drawn(gpu, 1, &[4]).scale(3.0).scale(2.0)));
}
