//! Training by scalars: the bits of all ranks, what is told, and what of a step fails.

use crate::support::gpu;
use crate::support::ranks::{Noting, on_ranks};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::nn::{Init, Linear, Module};
use tiebeam::optim::{Optimizer, Scalars, ScalarsConfig, Schedule};
use tiebeam::ranks::share;
use tiebeam::train::Trainer;
use tiebeam::{Error, Rng, Tensor};

fn bits(net: &Linear) -> Vec<u32> {
    let all = net.parameters();
    all.named().iter().flat_map(|(_, p)| p.to_vec::<f32>().unwrap()).map(f32::to_bits).collect()
}

/// Softmax regression on rows of four classes, by scalars. Returns bits, the last loss and the optimizer's state.
fn by_scalars(
    ranks: usize,
    byte: bool,
    recorded: bool,
    (from, to): (Option<&Path>, u64),
    keep: Option<&Path>,
) -> Vec<(Vec<u32>, f32)> {
    on_ranks(ranks, |world| {
        let net = Linear::new(gpu(), 8, 4, true, Init::Zeros, &mut Rng::new(1));
        let config = ScalarsConfig::default().lr(0.3).byte(byte).samples(2).seed(5);
        let scalars = Scalars::new(net.parameters().trainable(), config).unwrap();
        let schedule = Schedule::WarmupCosine { warmup: 3, total: 300, floor: 0.1 };
        let (rank, size) = (world.rank(), world.size());
        let mut trainer =
            Trainer::new(scalars).rng(Rng::new(7)).schedule(schedule).accumulate(2).ranks(world);
        if let Some(path) = from {
            trainer.load(path, &net).unwrap();
        }
        // A class is a corner of the first two numbers. The generator is the same for each evaluation of a step.
        let rows = |rng: &mut Rng| {
            let mut x = vec![0.0f32; 16 * 8];
            rng.fill_normal(&mut x);
            let labels: Vec<u32> =
                x.chunks(8).map(|row| u32::from(row[0] > 0.0) + 2 * u32::from(row[1] > 0.0)).collect();
            let own = share(16, rank, size);
            let rows = own.len();
            let x = Tensor::from_slice(gpu(), &x[own.start * 8..own.end * 8], [rows, 8]);
            vec![x, Tensor::from_slice(gpu(), &labels[own], [rows])]
        };
        let of = |inputs: &[Tensor]| net.forward(&inputs[0]).cross_entropy(&inputs[1], None);
        let mut last = f32::NAN;
        let report = |report: &tiebeam::train::Report| {
            last = report.loss;
            Ok(())
        };
        let done = match recorded {
            true => trainer.train_recorded(to, |_, rng| Ok(rows(rng)), |inputs, _| Ok(of(inputs)), report),
            false => trainer.train(to, |_, rng| Ok(of(&rows(rng))), report),
        };
        assert!(done.unwrap());
        if let Some(path) = keep {
            trainer.save(path, &net).unwrap();
        }
        assert_eq!(trainer.differs(&net).unwrap(), None);
        (bits(&net), last)
    })
}

#[test]
fn scalars_learn_with_the_same_bits_on_every_rank() {
    for (ranks, byte) in [(1, true), (3, true), (3, false)] {
        let all = by_scalars(ranks, byte, false, (None, 300), None);
        assert!(
            all.iter().all(|(own, loss)| *own == all[0].0 && *loss < 0.75),
            "{ranks} {byte}: {:?}",
            all[0].1
        );
        assert!(by_scalars(ranks, byte, true, (None, 300), None) == all, "recorded");
    }
    // Stopped and gone on, with the exponent of bytes that had been reached.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    by_scalars(2, true, true, (None, 120), Some(&path));
    let whole = by_scalars(2, true, true, (None, 300), None);
    let again = by_scalars(2, true, true, (Some(&path), 300), None);
    assert!(again[0].0 == whole[0].0 && again[1].0 == whole[0].0);
}

/// One byte in a message of one length, and nothing is summed.
#[test]
fn one_byte_a_step_is_told() {
    let counts = on_ranks(2, |world| {
        let w = Tensor::from_slice(gpu(), &[1f32, -2.0, 0.5], [3]);
        let scalars = Scalars::new([("w", &w)], ScalarsConfig::default().byte(true)).unwrap();
        let noting = Noting::new(world);
        let mut trainer = Trainer::new(scalars).ranks(noting.clone());
        trainer.train(10, |_, _| Ok(w.square().sum_all()), |_| Ok(())).unwrap();
        [&noting.equal, &noting.sums].map(|noted| noted.lock().unwrap().clone())
    });
    assert!(counts.iter().all(|[equal, sums]| *equal == [1; 10] && sums.is_empty()), "{counts:?}");
}

#[test]
fn scalars_stop_and_fail_on_all_ranks_together() {
    let found = on_ranks(3, |world| {
        let w = Tensor::from_slice(gpu(), &[1f32, -2.0], [2]);
        let (rank, flag) = (world.rank(), Arc::new(AtomicBool::new(false)));
        let scalars = Scalars::new([("w", &w)], ScalarsConfig::default()).unwrap();
        let mut trainer = Trainer::new(scalars).stop(flag.clone()).ranks(world);
        let of = |step, _: &mut Rng| {
            flag.fetch_or(rank == 1 && step == 2, Ordering::SeqCst);
            Ok(w.square().sum_all())
        };
        assert!(!trainer.train(9, of, |_| Ok(())).unwrap());
        let stopped = trainer.step();
        flag.store(false, Ordering::SeqCst);
        let before = w.to_vec::<f32>().unwrap();
        let bad = |_, _: &mut Rng| Ok(w.square().sum_all().scale(if rank == 2 { f32::NAN } else { 1.0 }));
        let error = trainer.train(9, bad, |_| Ok(())).unwrap_err().to_string();
        // A batch that one rank does not get.
        let batch = |_, _: &mut Rng| match rank {
            2 => Err(Error::config("the file has ended")),
            _ => Ok(vec![w.clone()]),
        };
        let lost = trainer.train_recorded(9, batch, |_, _| Ok(w.square().sum_all()), |_| Ok(()));
        assert!(lost.unwrap_err().to_string().ends_with("the file has ended"));
        let kept = w.to_vec::<f32>().unwrap() == before;
        (stopped, error, kept)
    });
    for (rank, (stopped, error, kept)) in found.iter().enumerate() {
        let prefix = if rank == 2 { "" } else { "rank 2: " };
        assert!(error.starts_with(&format!("{prefix}train: the loss of step 4 is not finite")), "{error}");
        assert!(*stopped == 3 && *kept, "{stopped}");
    }
    let w = Tensor::ones(gpu(), [2]).requires_grad();
    for wrong in [
        ScalarsConfig::default().lr(f32::NAN),
        ScalarsConfig::default().eps(0.0),
        ScalarsConfig::default().samples(0),
    ] {
        assert!(Scalars::new([("w", &w)], wrong).is_err(), "{wrong:?}");
    }
    let mut scalars = Scalars::new([("w", &w)], ScalarsConfig::default()).unwrap();
    let grads = w.sum_all().backward().unwrap();
    assert!(scalars.step(&grads, 0.1).unwrap_err().to_string().contains("takes no gradients"));
    assert!(scalars.load_state(1, &[("m/w".into(), [2].into(), vec![0.0; 2])]).is_err());
}

/// A loss is one number, and the losses of a step have values of the same shapes; else nothing moves.
#[test]
fn losses_that_are_no_numbers_are_refused() {
    let w = Tensor::from_slice(gpu(), &[1f32, -2.0], [2]);
    let trainer = || {
        let scalars = Scalars::new([("w", &w)], ScalarsConfig::default().byte(true)).unwrap();
        Trainer::new(scalars).accumulate(2)
    };
    for shape in [vec![2], vec![0], vec![1, 3]] {
        let loss = Tensor::ones(gpu(), &shape[..]);
        let wanted = format!("train: a loss of shape {}", loss.shape());
        let error = trainer().train(1, |_, _| Ok(loss.clone()), |_| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with(&wanted), "{error}");
        let batch = |_, _: &mut Rng| Ok(vec![w.clone()]);
        let again = trainer().train_recorded(1, batch, |_, _| Ok(loss.clone()), |_| Ok(()));
        assert_eq!(again.unwrap_err().to_string(), error);
    }
    let calls = std::cell::Cell::new(0);
    let values = |x: &Tensor| {
        calls.set(calls.get() + 1);
        (x.square().sum_all(), vec![Tensor::ones(gpu(), [calls.get() % 2 + 1])])
    };
    let error = trainer().train(1, |_, _| Ok(values(&w)), |_| Ok(())).unwrap_err().to_string();
    assert!(error.starts_with("train: the losses of a step have values of different shapes, "), "{error}");
    let batch = |_, _: &mut Rng| Ok(vec![w.clone()]);
    let again = trainer().train_recorded(1, batch, |x, _| Ok(values(&x[0])), |_| Ok(())).unwrap_err();
    assert!(again.to_string().starts_with("train: the losses of a step have values of "), "{again}");
    assert_eq!(w.to_vec::<f32>().unwrap(), [1.0, -2.0]);
}

/// Steps that no number can hold leave the parameters as they were.
#[test]
fn steps_that_are_no_numbers_are_refused() {
    let w = Tensor::from_slice(gpu(), &[1f32, -2.0], [2]);
    for (lr, factor, wanted) in [
        (f32::NAN, 1.0, "scalars: a step with the rate NaN"),
        (-0.1, 1.0, "scalars: a step with the rate -0.1"),
        (1e30, 1e30, "scalars: a step of "),
    ] {
        let mut trainer = Trainer::new(Scalars::new([("w", &w)], ScalarsConfig::default()).unwrap());
        trainer.set_lr(lr);
        let loss = |_, _: &mut Rng| Ok(w.square().sum_all().scale(factor));
        let error = trainer.train(1, loss, |_| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with(wanted), "{error}");
        assert_eq!((trainer.step(), w.to_vec::<f32>().unwrap()), (0, vec![1.0, -2.0]));
    }
}

/// A run that goes on with another number of ranks draws directions that it has not drawn before.
#[test]
fn directions_are_new_on_another_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    let train = |ranks, from: Option<&Path>, to| {
        on_ranks(ranks, |world| {
            let net = Linear::new(gpu(), 2, 1, false, Init::Zeros, &mut Rng::new(1));
            let config = ScalarsConfig::default().samples(3);
            let scalars = Scalars::new(net.parameters().trainable(), config).unwrap();
            let mut trainer = Trainer::new(scalars).ranks(world);
            if let Some(path) = from {
                trainer.load(path, &net).unwrap();
            }
            let x = Tensor::ones(gpu(), [1, 2]);
            trainer.train(to, |_, _| Ok(net.forward(&x).square().sum_all()), |_| Ok(())).unwrap();
            trainer.save(&path, &net).unwrap();
            let state = trainer.optimizer().state_dict().unwrap();
            state.into_iter().find(|(name, ..)| name == "scalars/drawn").unwrap().2
        })
    };
    assert!(train(4, None, 5).iter().all(|drawn| *drawn == [60.0, 0.0, 0.0]));
    assert!(train(2, Some(&path), 7).iter().all(|drawn| *drawn == [72.0, 0.0, 0.0]));
}
