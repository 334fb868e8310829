//! Recorded steps: the bits of the code that they stand for, no allocation, clear refusals.

use super::*;
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig};
use tiebeam::{Error, Step};

/// A tied layer used twice, dropout between, AdamW with clipping.
struct Training {
    theta: Tensor,
    optimizer: AdamW,
    rng: Rng,
}

impl Training {
    fn new(gpu: &Gpu) -> Training {
        let theta = drawn(gpu, 1, &[24, 24]).scale(0.2).requires_grad();
        let config = AdamWConfig { clip: Some(0.5), ..AdamWConfig::default() };
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
    let gpu = own();
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
        // Memory that others take in between is not the step's.
        let other = drawn(&gpu, 99, &[24, 24]);
        assert_eq!(bits(&other.scale(1.0)), bits(&drawn(&gpu, 99, &[24, 24])));
        match i {
            2 => created = gpu.memory_stats().created,
            3.. => assert_eq!(gpu.memory_stats().created, created, "step {i} took new memory"),
            _ => {}
        }
    }
    assert_eq!(recorded.optimizer.steps(), 8);
    // Going on without the record goes on where the replays stopped, but for the generator, which the code owns.
    eager.rng = recorded.rng.clone();
    let [a, b] =
        [eager.step(&inputs[0], 0.01), recorded.step(&inputs[0], 0.01)].map(|loss| bits(&loss.unwrap()));
    assert_eq!(a, b);
}

#[test]
fn two_updates_in_a_step_count_as_two() {
    let gpu = own();
    let x = drawn(&gpu, 10, &[8, 24]);
    let twice = |training: &mut Training, x: &Tensor| -> tiebeam::Result<Vec<Tensor>> {
        Ok(vec![training.step(x, 0.01)?, training.step(x, 0.01)?])
    };
    let [mut eager, mut recorded] = [(); 2].map(|()| Training::new(&gpu));
    let want: Vec<_> =
        (0..3).map(|_| twice(&mut eager, &x).unwrap().iter().map(bits).collect::<Vec<_>>()).collect();
    let mut step = Step::record(&gpu, &[&x], |x| twice(&mut recorded, &x[0])).unwrap();
    for (i, want) in want.iter().enumerate() {
        if i > 0 {
            step.run(&[&x]).unwrap();
        }
        assert_eq!(&step.outputs().iter().map(bits).collect::<Vec<_>>(), want, "run {i}");
        assert_eq!(recorded.optimizer.steps(), 2 * (i as u64 + 1));
    }
    assert_eq!(bits(&recorded.theta), bits(&eager.theta));
}

/// What is uploaded inside a step stays: a replay writes its temporaries, and uploads nothing.
#[test]
fn a_late_upload_is_not_written_over() {
    let gpu = own();
    let x = drawn(&gpu, 5, &[64]);
    let table: Vec<f32> = (0..64).map(|i| i as f32).collect();
    let evaluated = |x: Tensor| {
        x.evaluate();
        x
    };
    let work = |x: &Tensor| {
        // Temporaries of the upload's size, all let go, then more than a batch of work of another size.
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
    let gpu = own();
    let (x, y) = (drawn(&gpu, 1, &[32]), drawn(&gpu, 2, &[32]));
    let mut step = Step::record(&gpu, &[&x], |x| Ok(vec![x[0].scale(3.0)])).unwrap();
    let pending = step.outputs()[0].affine(1.0, 1.0);
    step.run(&[&y]).unwrap();
    assert_eq!(bits(&pending), bits(&x.scale(3.0).affine(1.0, 1.0)));
    assert_eq!(bits(&step.outputs()[0]), bits(&y.scale(3.0)));
}

#[test]
fn a_step_refuses_what_it_cannot_replay() {
    let gpu = own();
    let x = drawn(&gpu, 1, &[4, 6]);
    let message = |error: Option<Error>| error.expect("an error").to_string();
    let inside = Step::record(&gpu, &[&x], |x| {
        let _ = x[0].to_vec::<f32>();
        Ok(vec![x[0].exp()])
    });
    assert!(message(inside.err()).contains("readback inside a recorded step"));
    let nested = Step::record(&gpu, &[&x], |_| Step::record(&gpu, &[], |_| Ok(vec![])).map(|_| vec![]));
    assert!(message(nested.err()).contains("a step recorded inside a step"));
    // A panic in the code ends the capture too.
    let panicked = catch_unwind(AssertUnwindSafe(|| Step::record(&gpu, &[], |_| panic!("in the code"))));
    assert!(panicked.is_err());
    let mut step = Step::record(&gpu, &[&x], |x| Ok(vec![x[0].exp()])).unwrap();
    let wrong = message(step.run(&[&drawn(&gpu, 1, &[6, 4])]).err());
    assert!(wrong.contains("input 0 is [6, 4] f32 and was recorded as [4, 6] f32"), "{wrong}");
    assert!(message(step.run(&[]).err()).contains("0 inputs, recorded with 1"));
    assert_eq!(bits(&step.run(&[&x]).unwrap()[0]), bits(&x.exp()));
}

#[test]
fn what_is_pending_outside_is_no_part_of_the_replays() {
    let gpu = own();
    let x = drawn(&gpu, 1, &[4, 6]);
    let w = drawn(&gpu, 2, &[4, 6]).requires_grad();
    let mut sgd = Sgd::new(&gpu, vec![Group::new([("w", &w)])], SgdConfig::default()).unwrap();
    let want = bits(&w.detach().scale(2.0).add(&x));
    // Pending, of a tensor that changes in place after the recording.
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
    let (gpu, other) = (own(), own());
    let (x, far) = (drawn(&gpu, 1, &[4]), drawn(&other, 1, &[4]));
    let said = |e: Option<Error>| e.expect("an error").to_string();
    let recorded = said(Step::record(&gpu, &[&x, &far], |x| Ok(vec![x[0].exp()])).err());
    assert!(recorded.starts_with("Step: input 1 [4] is on "), "{recorded}");
    let mut step = Step::record(&gpu, &[&x, &x], |x| Ok(vec![x[0].exp()])).unwrap();
    let run = said(step.run(&[&far, &x]).err());
    assert!(run.starts_with("Step: input 0 [4] is on "), "{run}");
}
