//! Recorded steps: replays give the same bits as the code, allocate nothing, and are refused with clear messages.

use super::*;
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig};
use tiebeam::{Error, Step};

/// A model that uses a tied layer twice with dropout in between, trained by AdamW with clipping.
struct Training {
    theta: Tensor,
    optimizer: AdamW,
    rng: Rng,
}

impl Training {
    fn new(gpu: &Gpu) -> Training {
        let theta = drawn(gpu, 1, &[24, 24]).scale(0.2).requires_grad();
        let config = AdamWConfig::default().clip(Some(0.5));
        let optimizer = AdamW::new(gpu, vec![Group::new([("theta", &theta)])], config).unwrap();
        Training { theta, optimizer, rng: Rng::new(7) }
    }

    fn step(&mut self, x: &Tensor, lr: f32) -> tiebeam::Result<Tensor> {
        let hidden = linear(x, &self.theta).gelu().dropout(0.3, &mut self.rng);
        let noise = Tensor::randn(x.gpu(), *x.shape(), &mut self.rng).scale(0.1);
        let loss = linear(&hidden.add(&noise), &self.theta).square().mean_all();
        self.optimizer.step(&loss.backward()?, lr)?;
        Ok(loss)
    }
}

#[test]
fn replays_have_the_bits_of_the_code() {
    let gpu = quiet();
    let inputs: Vec<Tensor> = (0..8).map(|i| drawn(&gpu, 10 + i, &[8, 24])).collect();
    let rate = |i: usize| if i < 4 { 0.01 } else { 0.003 };
    let mut eager = Training::new(&gpu);
    let want: Vec<_> =
        (0..8).map(|i| (bits(&eager.step(&inputs[i], rate(i)).unwrap()), bits(&eager.theta))).collect();

    let mut recorded = Training::new(&gpu);
    let mut step = Step::record(&gpu, &[&inputs[0]], |x| Ok(vec![recorded.step(&x[0], rate(0))?])).unwrap();
    assert!(step.dispatches() > 5);
    let mut created = 0;
    for (i, (loss, theta)) in want.iter().enumerate() {
        if i > 0 {
            step.set_lr(rate(i));
            step.run(&[&inputs[i]]).unwrap();
        }
        assert_eq!(&bits(&step.outputs()[0]), loss, "loss of step {i}");
        assert_eq!(&bits(&recorded.theta), theta, "parameters after step {i}");
        // Memory that other work takes in between must not be the step's.
        let other = drawn(&gpu, 99, &[24, 24]);
        assert_eq!(bits(&other.scale(1.0)), bits(&drawn(&gpu, 99, &[24, 24])));
        match i {
            2 => created = gpu.memory_stats().created,
            3.. => assert_eq!(gpu.memory_stats().created, created, "step {i} took new memory"),
            _ => {}
        }
    }
    assert_eq!(recorded.optimizer.steps(), 8);
    // Eager steps continue where the replays stopped, except for the generator, which the code owns.
    eager.rng = recorded.rng.clone();
    let [a, b] =
        [eager.step(&inputs[0], 0.01), recorded.step(&inputs[0], 0.01)].map(|loss| bits(&loss.unwrap()));
    assert_eq!(a, b);
}

#[test]
fn two_updates_in_a_step_count_as_two() {
    let gpu = gpu();
    let x = drawn(gpu, 10, &[8, 24]);
    let twice = |training: &mut Training, x: &Tensor| -> tiebeam::Result<Vec<Tensor>> {
        Ok(vec![training.step(x, 0.01)?, training.step(x, 0.01)?])
    };
    let [mut eager, mut recorded] = [(); 2].map(|()| Training::new(gpu));
    let want: Vec<_> =
        (0..3).map(|_| twice(&mut eager, &x).unwrap().iter().map(bits).collect::<Vec<_>>()).collect();
    let mut step = Step::record(gpu, &[&x], |x| twice(&mut recorded, &x[0])).unwrap();
    for (i, want) in want.iter().enumerate() {
        if i > 0 {
            step.run(&[&x]).unwrap();
        }
        assert_eq!(&step.outputs().iter().map(bits).collect::<Vec<_>>(), want, "run {i}");
        assert_eq!(recorded.optimizer.steps(), 2 * (i as u64 + 1));
    }
    assert_eq!(bits(&recorded.theta), bits(&eager.theta));
}

/// Data uploaded inside a step must stay intact, since a replay writes its temporaries but uploads nothing.
#[test]
fn a_late_upload_is_not_written_over() {
    let gpu = quiet();
    let x = drawn(&gpu, 5, &[64]);
    let table: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let evaluated = |x: Tensor| {
        x.evaluate();
        x
    };
    let work = |x: &Tensor| {
        // Temporaries of the upload's size, which are all freed, then more than a batch of work of another size.
        let made: Vec<Tensor> = (0..8).map(|i| evaluated(x.scale(i as f32))).collect();
        let mut y =
            evaluated(made.iter().fold(x.clone(), |y, m| y.add(m)).unsqueeze(0).expand([64, 64]).scale(1.0));
        drop(made);
        for _ in 0..600 {
            y = evaluated(y.affine(0.5, 0.25));
        }
        y.add(&Tensor::from_slice(x.gpu(), &table, [64]))
    };
    let want = bits(&work(&x));
    let mut step = Step::record(&gpu, &[&x], |x| Ok(vec![work(&x[0])])).unwrap();
    for replay in 0..3 {
        step.run(&[&x]).unwrap();
        assert!(bits(&step.outputs()[0]) == want, "replay {replay}");
    }
}

#[test]
fn what_is_pending_on_outputs_keeps_their_elements() {
    let gpu = gpu();
    let (x, y) = (drawn(gpu, 1, &[32]), drawn(gpu, 2, &[32]));
    let mut step = Step::record(gpu, &[&x], |x| Ok(vec![x[0].scale(3.0)])).unwrap();
    let pending = step.outputs()[0].affine(1.0, 1.0);
    step.run(&[&y]).unwrap();
    assert_eq!(bits(&pending), bits(&x.scale(3.0).affine(1.0, 1.0)));
    assert_eq!(bits(&step.outputs()[0]), bits(&y.scale(3.0)));
}

#[test]
fn a_step_refuses_what_it_cannot_replay() {
    let gpu = gpu();
    let x = drawn(gpu, 1, &[4, 6]);
    let message = |error: Option<Error>| error.expect("an error").to_string();
    let inside = Step::record(gpu, &[&x], |x| {
        let _ = x[0].to_vec::<f32>();
        Ok(vec![x[0].exp()])
    });
    assert!(message(inside.err()).contains("readback inside a recorded step"));
    let nested = Step::record(gpu, &[&x], |_| Step::record(gpu, &[], |_| Ok(vec![])).map(|_| vec![]));
    assert!(message(nested.err()).contains("a step recorded inside a step"));
    // A panic in the code ends the capture too.
    let panicked = catch_unwind(AssertUnwindSafe(|| Step::record(gpu, &[], |_| panic!("in the code"))));
    assert!(panicked.is_err());
    let mut step = Step::record(gpu, &[&x], |x| Ok(vec![x[0].exp()])).unwrap();
    let wrong = message(step.run(&[&drawn(gpu, 1, &[6, 4])]).err());
    assert!(wrong.contains("input 0 is [6, 4] f32 and was recorded as [4, 6] f32"), "{wrong}");
    assert!(message(step.run(&[]).err()).contains("0 inputs, recorded with 1"));
    assert_eq!(bits(&step.run(&[&x]).unwrap()[0]), bits(&x.exp()));
}

#[test]
fn what_is_pending_outside_is_no_part_of_the_replays() {
    let gpu = quiet();
    let x = drawn(&gpu, 1, &[4, 6]);
    let w = drawn(&gpu, 2, &[4, 6]).requires_grad();
    let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
    let want = bits(&w.detach().scale(2.0).add(&x));
    // A pending expression over a tensor that changes in place after the recording.
    let outside = w.detach().scale(2.0);
    let mut step = Step::record(&gpu, &[&x], |x| Ok(vec![x[0].add(&outside)])).unwrap();
    assert_eq!(step.dispatches(), 1, "the sum alone");
    let grads = w.square().sum_all().backward().unwrap();
    sgd.step(&grads, 0.25).unwrap();
    let before = gpu.dispatches();
    assert_eq!(bits(&step.run(&[&x]).unwrap()[0]), want, "the value as it was written down");
    assert_eq!(gpu.dispatches() - before, 1);
    assert_ne!(bits(&w.detach().scale(2.0).add(&x)), want);
}

#[test]
fn an_input_of_another_device_is_named() {
    let (gpu, other) = (gpu(), quiet());
    let (x, far) = (drawn(gpu, 1, &[4]), drawn(&other, 1, &[4]));
    let said = |e: Option<Error>| e.expect("an error").to_string();
    let recorded = said(Step::record(gpu, &[&x, &far], |x| Ok(vec![x[0].exp()])).err());
    assert!(recorded.starts_with("Step: input 1 [4] is of another Gpu than the step: "), "{recorded}");
    let mut step = Step::record(gpu, &[&x, &x], |x| Ok(vec![x[0].exp()])).unwrap();
    let run = said(step.run(&[&far, &x]).err());
    assert!(run.starts_with("Step: input 0 [4] is of another Gpu than the step: "), "{run}");
}

/// Any outputs of the last run may be the inputs of the next.
#[test]
fn outputs_are_fed_back_as_inputs() {
    let gpu = gpu();
    let one = |x: f32| Tensor::from_slice(gpu, &[x], [1]);
    let read = |step: &Step| step.outputs().iter().map(|y| y.item().unwrap()).collect::<Vec<_>>();
    let feed = |step: &mut Step, order: &[usize]| {
        let last: Vec<Tensor> = order.iter().map(|&i| step.outputs()[i].clone()).collect();
        step.run(&last.iter().collect::<Vec<_>>()).unwrap();
    };
    let mut sum =
        Step::record(gpu, &[&one(1.0), &one(1.0)], |x| Ok(vec![x[0].add(&x[1]), x[0].clone()])).unwrap();
    for want in [[3.0, 2.0], [5.0, 3.0], [8.0, 5.0]] {
        feed(&mut sum, &[0, 1]);
        assert_eq!(read(&sum), want);
    }
    let swapped = |x: &[Tensor]| Ok(vec![x[1].clone(), x[0].clone()]);
    let mut swap = Step::record(gpu, &[&one(1.0), &one(2.0)], swapped).unwrap();
    for want in [[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]] {
        assert_eq!(read(&swap), want);
        feed(&mut swap, &[0, 1]);
    }
    // An output that is returned twice, views of an input, and an input that is given twice.
    let four = Tensor::from_slice(gpu, &[1f32, 2.0, 3.0, 4.0], [2, 2]);
    let mut views = Step::record(gpu, &[&four, &four], |x| {
        let y = x[0].add(&x[1]);
        Ok(vec![y.clone(), x[1].t(), y, x[0].slice(0, 0..1)])
    })
    .unwrap();
    feed(&mut views, &[1, 2]);
    // x0 = four^T, x1 = 2 four.
    assert_eq!(views.outputs()[0].to_vec::<f32>().unwrap(), [3.0, 7.0, 8.0, 12.0]);
    assert_eq!(views.outputs()[1].to_vec::<f32>().unwrap(), [2.0, 6.0, 4.0, 8.0]);
    assert_eq!(views.outputs()[2].to_vec::<f32>().unwrap(), [3.0, 7.0, 8.0, 12.0]);
    assert_eq!(views.outputs()[3].to_vec::<f32>().unwrap(), [1.0, 3.0]);
    // A copy of a tensor onto itself does not leave an error on the device.
    let mut same = Step::record(gpu, &[&one(1.0)], |x| Ok(vec![x[0].clone(), x[0].scale(2.0)])).unwrap();
    feed(&mut same, &[0]);
    assert_eq!(read(&same), [1.0, 2.0]);
    assert_eq!(one(5.0).scale(2.0).item().unwrap(), 10.0);
}

/// Tensors that the code keeps without returning them have the values of the recorded run for ever, whether computed, pending, an
/// input or an output.
#[test]
fn what_the_code_keeps_is_the_recorded_runs() {
    let gpu = gpu();
    let (x, y) = (drawn(gpu, 1, &[32]), drawn(gpu, 2, &[32]));
    let mut kept = Vec::new();
    let mut step = Step::record(gpu, &[&x], |x| {
        let h = x[0].scale(3.0);
        h.evaluate();
        let out = h.affine(1.0, 1.0);
        kept = vec![x[0].clone(), h.clone(), h.scale(10.0), out.clone(), x[0].exp().add(&out)];
        Ok(vec![out])
    })
    .unwrap();
    let h = x.scale(3.0);
    let out = h.affine(1.0, 1.0);
    let want = [x.clone(), h.clone(), h.scale(10.0), out.clone(), x.exp().add(&out)].map(|t| bits(&t));
    // Computed from a kept tensor after the recording, and read only after a replay.
    let late = kept[1].scale(0.5);
    for round in 0..3 {
        for (i, (kept, want)) in kept.iter().zip(&want).enumerate().skip(if round == 0 { 3 } else { 0 }) {
            assert_eq!(&bits(kept), want, "{i} before run {round}");
        }
        step.run(&[&y]).unwrap();
        assert_eq!(bits(&step.outputs()[0]), bits(&y.scale(3.0).affine(1.0, 1.0)));
    }
    assert_eq!(bits(&late), bits(&h.scale(0.5)));
    drop(step);
    assert_eq!(bits(&kept[1]), want[1]);
}

#[test]
fn memory_stats_count_what_a_step_holds() {
    let gpu = quiet();
    let x = drawn(&gpu, 1, &[1 << 18]);
    let before = gpu.memory_stats();
    let work = |x: &[Tensor]| {
        let inner = x[0].scale(2.0);
        inner.evaluate();
        Ok((0..4).map(|i| inner.affine(1.0, i as f32)).collect())
    };
    let step = Step::record(&gpu, &[&x], work).unwrap();
    let during = gpu.memory_stats();
    assert_eq!(during.steps - before.steps, 1 << 20, "the inner tensor: {during:?}");
    assert_eq!(during.used - before.used, 6 << 20, "with the input and four outputs");
    let kept = step.outputs()[0].clone();
    drop(step);
    let after = gpu.memory_stats();
    assert_eq!((after.steps, after.used - before.used), (0, 1 << 20), "the output that is held");
    drop(kept);
    assert_eq!(gpu.memory_stats().used, before.used);
}

#[test]
fn every_optimizer_of_a_step_has_its_rate() {
    let gpu = gpu();
    let leaf = || Tensor::from_slice(gpu, &[1f32], [1]).requires_grad();
    let sgd = |w: &Tensor| Sgd::new(gpu, vec![Group::new([("w", w)])], SgdConfig::default()).unwrap();
    let (a, b) = (leaf(), leaf());
    let (mut first, mut second) = (sgd(&a), sgd(&b));
    let mut step = Step::record(gpu, &[], |_| {
        first.step(&a.sum_all().backward()?, 0.5)?;
        second.step(&b.sum_all().backward()?, 0.25)?;
        Ok(vec![])
    })
    .unwrap();
    assert_eq!(step.lrs(), [0.5, 0.25]);
    let mut run = |set: &mut dyn FnMut(&mut Step)| {
        set(&mut step);
        let done = step.run(&[]).map(drop).map_err(|e| e.to_string());
        (done, a.item().unwrap(), b.item().unwrap())
    };
    assert_eq!(run(&mut |_| ()), (Ok(()), 0.0, 0.5));
    // The other rates keep their ratio to the first.
    assert_eq!(run(&mut |step| step.set_lr(0.125)), (Ok(()), -0.125, 0.4375));
    assert_eq!(run(&mut |step| step.set_lrs(&[1.0, 0.0]).unwrap()), (Ok(()), -1.125, 0.4375));
    for rate in [-1.0, f32::NAN, f32::INFINITY] {
        let (said, a, b) = run(&mut |step| step.set_lr(rate));
        let want = format!("Step: the learning rate is {rate}; use a finite number, 0 or more");
        assert_eq!((said.unwrap_err(), a, b), (want, -1.125, 0.4375));
        let said = run(&mut |step| assert!(step.set_lrs(&[0.5, rate]).is_err())).0;
        assert!(said.is_err(), "the refused rate of before still stands");
    }
    let few = run(&mut |step| {
        assert_eq!(
            step.set_lrs(&[0.5]).unwrap_err().to_string(),
            "Step: 1 learning rates for 2 optimizer steps"
        );
        step.set_lr(0.5);
    });
    assert_eq!(few, (Ok(()), -1.625, 0.1875));
    assert_eq!((first.steps(), second.steps()), (5, 5));
}

#[test]
fn an_output_of_another_device_is_named() {
    let (gpu, other) = (gpu(), quiet());
    let (x, far) = (drawn(gpu, 1, &[4]), drawn(&other, 1, &[4]));
    let said = Step::record(gpu, &[&x], |x| Ok(vec![x[0].exp(), far.scale(3.0)]))
        .err()
        .expect("an error")
        .to_string();
    assert!(said.starts_with("Step: output 1 [4] is of another Gpu than the step: "), "{said}");
}

/// Only the tensors that a replay writes count as changed in place, not those that it reads or returns.
#[test]
fn only_what_a_replay_writes_is_changed() {
    let gpu = gpu();
    let [read, written] = [1, 2].map(|seed| drawn(gpu, seed, &[4]).requires_grad());
    let groups = vec![Group::new([("read", &read), ("written", &written)])];
    let mut sgd = Sgd::new(gpu, groups, SgdConfig::default()).unwrap();
    let mut look = Step::record(gpu, &[], |_| Ok(vec![read.clone(), read.scale(2.0)])).unwrap();
    let mut train = Step::record(gpu, &[], |_| {
        sgd.step(&written.mul(&read.detach()).sum_all().backward()?, 0.5)?;
        Ok(vec![read.detach(), written.detach()])
    })
    .unwrap();
    let [kept, changed] = [&read, &written].map(|w| w.square().sum_all());
    look.run(&[]).unwrap();
    train.run(&[]).unwrap();
    let want = bits(&read.detach().scale(2.0));
    assert_eq!(bits(kept.backward().unwrap().get(&read).unwrap()), want, "in the arena of what was changed");
    let said = panic_of(|| changed.backward());
    assert!(said.contains("changed in place"), "{said}");
}

/// A step has the old memory of its parameters. After they have moved, a replay would train memory that is no longer used.
#[test]
fn a_step_over_parameters_that_moved_is_refused() {
    let gpu = gpu();
    let w = drawn(gpu, 1, &[4]).requires_grad();
    let sgd = || Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
    let mut early = Step::record(gpu, &[], |_| Ok(vec![w.scale(2.0)])).unwrap();
    let mut first = sgd();
    let said = early.run(&[]).map(drop).unwrap_err().to_string();
    assert!(said.starts_with("Step: a parameter that it uses was taken by an optimizer"), "{said}");
    let mut train = Step::record(gpu, &[], |_| {
        first.step(&w.sum_all().backward()?, 1.0)?;
        Ok(vec![])
    })
    .unwrap();
    train.run(&[]).unwrap();
    drop(first);
    let _second = sgd();
    let before = bits(&w);
    let said = train.run(&[]).map(drop).unwrap_err().to_string();
    assert!(said.starts_with("Step: a parameter that it uses was taken by an optimizer"), "{said}");
    assert_eq!(bits(&w), before);
    let inside = Step::record(gpu, &[], |_| {
        let v = Tensor::zeros(gpu, [4]).requires_grad();
        Sgd::new(gpu, vec![Group::new([("v", &v)])], SgdConfig::default()).map(|_| vec![])
    });
    let said = inside.err().expect("an error").to_string();
    assert!(said.contains("an optimizer made inside a recorded step"), "{said}");
}

/// An output may be a view of a tensor that the code computed. Views of the output then refer to its own elements.
#[test]
fn an_output_that_is_a_view_is_one_of_its_own_elements() {
    let gpu = gpu();
    let (x, y) = (drawn(gpu, 1, &[256]), drawn(gpu, 2, &[256]));
    let work = |x: &Tensor| x.scale(2.0).slice(0, 64..128);
    let mut step = Step::record(gpu, &[&x], |x| Ok(vec![work(&x[0])])).unwrap();
    for x in [&x, &y] {
        step.run(&[x]).unwrap();
        let (got, want) = (&step.outputs()[0], work(x));
        assert_eq!(bits(got), bits(&want));
        for view in
            [|x: &Tensor| x.unsqueeze(1).expand([64, 2]), |x: &Tensor| x.reshape([8, 8]).t().contiguous()]
        {
            assert_eq!(bits(&view(got)), bits(&view(&want)));
        }
    }
}

#[test]
fn a_step_run_inside_a_recording_is_refused() {
    let gpu = gpu();
    let x = drawn(gpu, 1, &[4]);
    let mut inner = Step::record(gpu, &[&x], |x| Ok(vec![x[0].exp()])).unwrap();
    let outer = Step::record(gpu, &[&x], |x| Ok(inner.run(&[&x[0]])?.to_vec()));
    let said = outer.err().expect("an error").to_string();
    assert!(said.contains("a step run inside a recorded step"), "{said}");
    assert_eq!(bits(&inner.run(&[&x]).unwrap()[0]), bits(&x.exp()));
}

/// A step that only returns a parameter has no kernel that reads it, so an optimizer may move the parameter, and the step
/// follows. The step's own results cannot be moved.
#[test]
fn what_a_step_gives_out_may_be_taken_by_an_optimizer() {
    let gpu = gpu();
    let w = drawn(gpu, 1, &[4]).requires_grad();
    let mut look = Step::record(gpu, &[], |_| Ok(vec![w.clone()])).unwrap();
    let mut sgd = Sgd::new(gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
    sgd.step(&w.sum_all().backward().unwrap(), 1.0).unwrap();
    look.run(&[]).unwrap();
    assert_eq!(bits(&look.outputs()[0]), bits(&w));
    let mut make = Step::record(gpu, &[&w], |x| Ok(vec![x[0].scale(2.0)])).unwrap();
    let taken = make.outputs()[0].requires_grad();
    let _other = Sgd::new(gpu, vec![Group::new([("taken", &taken)])], SgdConfig::default()).unwrap();
    let (before, said) = (bits(&taken), make.run(&[&w]).map(drop).unwrap_err().to_string());
    assert!(said.starts_with("Step: a parameter that it uses was taken by an optimizer"), "{said}");
    assert_eq!(bits(&taken), before);
}

/// A cache that is created by the code belongs to the recorded run. Replays do not change it.
#[test]
fn a_cache_made_in_the_code_is_the_recorded_runs() {
    let gpu = gpu();
    let list = |v: u32| Tensor::from_slice(gpu, &[v], [1]);
    let (x, q) = (drawn(gpu, 1, &[1, 3, 1, 4]), drawn(gpu, 2, &[1, 1, 1, 4]));
    let (rows, start, length) = (list(0), list(0), list(3));
    let mut kept = None;
    let mut step = Step::record(gpu, &[&x], |x| {
        let mut cache = tiebeam::ops::sequence::cache::KvCache::new(gpu, 1, 1, 8, 4);
        cache.append(&x[0], &x[0], &rows, &start)?;
        let y = cache.attend(&q, &rows, &length);
        kept = Some(cache);
        Ok(vec![y])
    })
    .unwrap();
    let (kept, first) = (kept.unwrap(), bits(&step.outputs()[0]));
    step.run(&[&x.scale(3.0)]).unwrap();
    assert_ne!(bits(&step.outputs()[0]), first);
    assert_eq!(bits(&kept.attend(&q, &rows, &length)), first);
}
