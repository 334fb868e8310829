//! The training loop: the bits of a loop by hand, recorded or not; when it reports, stops and goes on.

use crate::support::folder::Folder;
use crate::support::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::nn::{Init, Linear, Module, Parameters};
use tiebeam::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, Group, LossScale, LossScaleConfig, Optimizer, Schedule, Sgd,
    SgdConfig, StepEvent,
};
use tiebeam::train::{Report, Trainer};
use tiebeam::{Error, Gpu, Result, Rng, Tensor};

const RATE: f32 = 0.05;
const SCHEDULE: Schedule = Schedule::WarmupCosine { warmup: 2, total: 9, floor: 0.1 };

fn net(gpu: &Gpu) -> (Linear, AdamW) {
    let net = Linear::new(gpu, 3, 2, true, Init::KaimingUniform, &mut Rng::new(1));
    let group = Group::new(Parameters::of(&net).trainable()).weight_decay(0.1);
    let config = AdamWConfig::default().lr(RATE).clip(Some(0.5));
    let adamw = AdamW::new(gpu, vec![group], config).unwrap();
    (net, adamw)
}

fn trainer(optimizer: AdamW) -> Trainer {
    Trainer::new(optimizer).schedule(SCHEDULE).rng(Rng::new(7))
}

fn loss(net: &Linear, x: &Tensor, rng: &mut Rng) -> Tensor {
    net.forward(&x.dropout(0.25, rng)).sub(&x.sum_keepdim(1)).square().mean_all()
}

fn bits(net: &impl Module) -> Vec<u32> {
    let all = Parameters::of(net);
    all.named().iter().flat_map(|(_, p)| p.to_vec::<f32>().unwrap()).map(f32::to_bits).collect()
}

/// Step, loss, rate and norm of a report, as bits.
fn numbers(report: &Report) -> (u64, [u32; 3]) {
    (report.step, [report.loss, report.lr, report.norm].map(f32::to_bits))
}

/// What a loop by hand computes: numbers of each step, and the parameters.
fn by_hand(gpu: &Gpu, steps: u64) -> (Vec<(u64, [u32; 3])>, Vec<u32>) {
    let ((net, mut adamw), mut rng, mut all) = (net(gpu), Rng::new(7), Vec::new());
    for step in 0..steps {
        let x = Tensor::randn(gpu, [4, 3], &mut rng);
        let loss = loss(&net, &x, &mut rng);
        let lr = SCHEDULE.lr(RATE, step);
        let norm = adamw.step(&loss.backward().unwrap(), lr).unwrap().norm;
        let read = [loss.item().unwrap(), lr, norm.item().unwrap()];
        all.push((step + 1, read.map(f32::to_bits)));
    }
    (all, bits(&net))
}

/// Trains up to each of these steps in a call of its own.
fn by_trainer(gpu: &Gpu, recorded: bool, parts: &[u64]) -> (Vec<(u64, [u32; 3])>, Vec<u32>) {
    let (net, adamw) = net(gpu);
    let (mut trainer, mut all) = (trainer(adamw), Vec::new());
    for &to in parts {
        let draw = |rng: &mut Rng| Tensor::randn(gpu, [4, 3], rng);
        let keep = |report: &Report| {
            all.push(numbers(report));
            Ok(())
        };
        let done = match recorded {
            false => trainer.train(
                to,
                |_, rng| {
                    let x = draw(rng);
                    Ok(loss(&net, &x, rng))
                },
                keep,
            ),
            true => trainer.train_recorded(
                to,
                |_, rng| Ok(vec![draw(rng)]),
                |inputs, rng| Ok(loss(&net, &inputs[0], rng)),
                keep,
            ),
        };
        assert!(done.unwrap() && trainer.step() == to);
    }
    (all, bits(&net))
}

#[test]
fn it_has_the_bits_of_a_loop_by_hand() {
    let want = by_hand(gpu(), 9);
    for recorded in [false, true] {
        assert_eq!(by_trainer(gpu(), recorded, &[9]), want, "recorded: {recorded}");
        assert_eq!(by_trainer(gpu(), recorded, &[1, 4, 9]), want, "recorded: {recorded}, in parts");
    }
}

/// A run that goes on from a file, in a network with other weights, has the bits of one that was not stopped. The text that was
/// saved with it comes back.
#[test]
fn it_goes_on_from_a_checkpoint() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let path = folder.path().join("run.safetensors");
    let to = |trainer: &mut Trainer, net: &Linear, step: u64| {
        let of = |_, rng: &mut Rng| {
            let x = Tensor::randn(gpu, [4, 3], rng);
            Ok(loss(net, &x, rng))
        };
        trainer.train(step, of, |_| Ok(())).unwrap()
    };
    let (first, adamw) = net(gpu);
    let mut run = trainer(adamw).scale(LossScale::new(gpu, LossScaleConfig::default().interval(3)).unwrap());
    to(&mut run, &first, 5);
    let text = [("width".to_string(), "3".to_string())].into();
    run.save_with(&path, &first, &text).unwrap();
    to(&mut run, &first, 9);
    let (second, adamw) = net(gpu);
    let mut resumed = Trainer::new(adamw).schedule(SCHEDULE).rng(Rng::new(99));
    resumed = resumed.scale(LossScale::new(gpu, LossScaleConfig::default().interval(3)).unwrap());
    to(&mut resumed, &second, 2);
    assert_eq!((resumed.load(&path, &second).unwrap(), resumed.step()), (text, 5));
    to(&mut resumed, &second, 9);
    assert_eq!(bits(&second), bits(&first));
    let scale = |run: &Trainer| run.loss_scale().unwrap().scale().unwrap();
    assert_eq!(
        (scale(&run), scale(&resumed)),
        (65536.0 * 8.0, 65536.0 * 8.0),
        "raised after 3, 6 and 9 steps"
    );
    // A file without a loss scale leaves the trainer's as it is.
    let (plain, adamw) = net(gpu);
    trainer(adamw).save(&path, &plain).unwrap();
    resumed.load(&path, &second).unwrap();
    assert_eq!((scale(&resumed), resumed.step()), (65536.0 * 8.0, 0));
}

/// The first step is reported at once, others one step late, the last before the call returns.
#[test]
fn reports_come_in_order_and_late() {
    let gpu = gpu();
    for (every, want) in [
        (1, vec![(1, 1), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 7)]),
        (3, vec![(1, 1), (3, 4), (6, 7), (7, 7)]),
        (0, vec![(1, 1), (7, 7)]),
    ] {
        let (net, adamw) = net(gpu);
        let given = std::cell::Cell::new(0);
        let (mut reports, mut trainer) = (Vec::new(), trainer(adamw).report_every(every).total(14));
        let of = |step, rng: &mut Rng| {
            given.set(step + 1);
            let x = Tensor::randn(gpu, [4, 3], rng);
            let loss = loss(&net, &x, rng);
            Ok((loss, vec![Tensor::from_slice(gpu, &[step as u32, 8], [2])]))
        };
        let done = trainer.train(7, of, |report| {
            assert_eq!(report.values, [[report.step as f32 - 1.0, 8.0]]);
            assert_eq!(report.eta.is_some(), report.step > 1);
            // Half of the run is left after step 7.
            if report.step == 7 {
                let eta = report.eta.unwrap().as_secs_f64();
                let want = report.elapsed.as_secs_f64() * 7.0 / 6.0;
                assert!((eta - want).abs() < 1e-6, "{eta} s, not {want} s");
            }
            reports.push((report.step, given.get()));
            Ok(())
        });
        assert!(done.unwrap());
        assert_eq!(reports, want, "every {every}");
    }
}

/// The flag ends training after the present step, which is reported, and a set flag lets no step begin.
#[test]
fn a_flag_stops_it() {
    let gpu = gpu();
    let (net, adamw) = net(gpu);
    let stop = Arc::new(AtomicBool::new(false));
    let (mut trainer, mut reports) = (trainer(adamw).report_every(100).stop(stop.clone()), Vec::new());
    let mut of = |step: u64, rng: &mut Rng| {
        stop.store(step == 3, Ordering::SeqCst);
        let x = Tensor::randn(gpu, [4, 3], rng);
        Ok(loss(&net, &x, rng))
    };
    let mut keep = |report: &Report| {
        reports.push(report.step);
        Ok(())
    };
    assert!(!trainer.train(9, &mut of, &mut keep).unwrap());
    assert!(!trainer.train(9, &mut of, &mut keep).unwrap());
    assert!(trainer.train(4, &mut of, &mut keep).unwrap(), "there are 4 steps");
    assert_eq!((trainer.step(), reports), (4, vec![1, 4]));
}

/// Overflows of the loss scale are reported with their step and do not end the run. A loss that is not finite does.
#[test]
fn events_are_reported_and_a_bad_loss_is_an_error() {
    let gpu = gpu();
    let (net, adamw) = net(gpu);
    let scale = LossScale::new(gpu, LossScaleConfig::default().scale(2f32.powi(60))).unwrap();
    let (mut trainer, mut events) = (trainer(adamw).scale(scale).report_every(2), Vec::new());
    // The product of the scale and this gradient is beyond f32 at first, and the loss itself is not.
    let of = |step: u64, _: &mut Rng| {
        let factor = if step == 5 { f32::NAN } else { 1e21 };
        let x = Tensor::ones(gpu, [4, 3]);
        Ok(net.forward(&x).mean_all().scale(factor))
    };
    let error = trainer.train(9, of, |report| {
        events.extend(report.events.iter().cloned());
        Ok(())
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("the loss of step 6 is NaN"), "{error}");
    let steps: Vec<u64> = events
        .iter()
        .map(|event| match event {
            StepEvent::Overflow { step, .. } => *step,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(steps[..2], [1, 2], "each event once, in order");
    assert!(steps.windows(2).all(|pair| pair[0] < pair[1]), "{steps:?}");
}

/// The caller's errors end it, and what is not a loss is refused by name.
#[test]
fn errors_of_the_closures_arrive() {
    let gpu = gpu();
    let (net, adamw) = net(gpu);
    let boxed: Box<dyn Optimizer> = Box::new(adamw);
    let mut trainer = Trainer::new(boxed);
    let fail = |message: &str| -> Result<Tensor> { Err(Error::config(message)) };
    let one = || net.forward(&Tensor::ones(gpu, [1, 3])).square();
    let error = |result: Result<bool>| result.unwrap_err().to_string();
    assert!(error(trainer.train(1, |_, _| fail("no data"), |_| Ok(()))).contains("no data"));
    assert!(error(trainer.train(1, |_, _| Ok(one()), |_| Ok(()))).contains("a loss of shape [1, 2]"));
    assert_eq!(trainer.step(), 0);
    let full = |_: &Report| fail("the disk is full").map(drop);
    assert!(error(trainer.train(1, |_, _| Ok(one().mean_all()), full)).contains("the disk is full"));
    assert_eq!(trainer.step(), 1);
    let none = |_, _: &mut Rng| Ok(Vec::new());
    let recorded = trainer.train_recorded(2, none, |_, _| Ok(one().mean_all()), |_| Ok(()));
    assert!(error(recorded).contains("the batch has no tensors"));
    // A base rate of 0 moves nothing.
    let before = bits(&net);
    trainer.set_lr(0.0);
    assert!(trainer.train(2, |_, _| Ok(one().mean_all()), |_| Ok(())).unwrap());
    assert_eq!(bits(&net), before);
}

/// A file of another optimizer changes neither the model nor the trainer.
#[test]
fn a_checkpoint_of_another_optimizer_changes_nothing() {
    let folder = Folder::new("trainer-other");
    let path = folder.join("adamw.safetensors");
    let gpu = gpu();
    let step = |trainer: &mut Trainer, net: &Linear| {
        let loss = |_, rng: &mut Rng| Ok(loss(net, &Tensor::randn(gpu, [4, 3], rng), rng));
        trainer.train(3, loss, |_| Ok(())).unwrap();
    };
    let (saved, adamw) = net(gpu);
    let mut first = trainer(adamw);
    step(&mut first, &saved);
    first.save(&path, &saved).unwrap();

    let layer = || Linear::new(gpu, 3, 2, true, Init::KaimingUniform, &mut Rng::new(2));
    let refused = |net: &Linear, mut trainer: Trainer, words: &str| {
        let before = bits(net);
        let error = trainer.load(&path, net).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!((bits(net), trainer.step()), (before, 0));
    };
    // Adam has moments of the same names.
    let net = layer();
    let group = || vec![Group::new(net.parameters().trainable())];
    refused(
        &net,
        Trainer::new(Adam::new(gpu, group(), AdamConfig::default()).unwrap()),
        "this is the state of adamw",
    );
    let net = layer();
    let group = || vec![Group::new(net.parameters().trainable())];
    refused(&net, Trainer::new(Sgd::new(gpu, group(), SgdConfig::default()).unwrap()), "sgd");
}

/// A run that only its flag ends has no time left to tell.
#[test]
fn a_run_without_an_end() {
    let gpu = gpu();
    let (net, adamw) = net(gpu);
    let stop = Arc::new(AtomicBool::new(false));
    let mut reports = Vec::new();
    let mut endless = trainer(adamw).stop(stop.clone());
    let draw = |_, rng: &mut Rng| Ok(loss(&net, &Tensor::randn(gpu, [4, 3], rng), rng));
    let report = |report: &Report| {
        reports.push(report.to_string());
        stop.store(report.step > 2, Ordering::SeqCst);
        Ok(())
    };
    assert!(!endless.train(u64::MAX, draw, report).unwrap());
    assert!(reports[1].starts_with("step 2  loss ") && reports[1].ends_with(" 0 s"), "{reports:?}");
}
