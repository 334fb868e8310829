//! Training on several ranks: the bits of sums in the order of the ranks, and what one rank's failure, stop or mistake does to the others.

use crate::support::gpu;
use crate::support::ranks::{Noting, on_ranks};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tiebeam::nn::{Init, Linear, Module};
use tiebeam::optim::{
    AdamW, AdamWConfig, Group, LossScale, LossScaleConfig, Scalars, ScalarsConfig, Sgd, SgdConfig,
};
use tiebeam::ranks::{Ranks, agree, share, spread, together};
use tiebeam::train::Trainer;
use tiebeam::{Error, Grads, Result, Rng, Tensor};

/// A network of a small and a large leaf and its optimizer.
fn net(seed: u64) -> (Linear, AdamW) {
    let net = Linear::new(gpu(), 96, 70, true, Init::KaimingUniform, &mut Rng::new(seed));
    let group = Group::new(net.parameters().trainable()).weight_decay(0.1);
    (net, AdamW::new(gpu(), vec![group], AdamWConfig::default().lr(0.02).clip(Some(0.5))).unwrap())
}

fn bits(net: &Linear) -> Vec<u32> {
    let all = net.parameters();
    all.named().iter().flat_map(|(_, p)| p.to_vec::<f32>().unwrap()).map(f32::to_bits).collect()
}

/// The rows of a part of a step's batch, which is drawn as a whole.
fn rows(rng: &mut Rng, count: usize, part: usize, parts: usize) -> Tensor {
    let all = Tensor::randn(gpu(), [count, 96], rng);
    all.slice(0, share(count, part, parts)).contiguous()
}

fn loss(net: &Linear, x: &Tensor) -> Tensor {
    net.forward(x).square().mean_all()
}

const BATCH: usize = 12;
const STEPS: u64 = 4;

/// A loop by hand on one rank: gradients of each part, added in the order of the ranks, with the parts of a rank added first.
fn by_hand(ranks: usize, parts: usize, scaled: bool) -> Vec<u32> {
    let ((net, mut adamw), mut rng) = (net(1), Rng::new(7));
    let scale = LossScale::new(gpu(), LossScaleConfig::default().scale(256.0).interval(2)).unwrap();
    for _ in 0..STEPS {
        let state = rng.state();
        let of_rank = |rank: usize| {
            Grads::mean_of((0..parts).map(|part| {
                let x = rows(&mut Rng::from_state(state), BATCH, rank * parts + part, ranks * parts);
                let loss = loss(&net, &x).scale(1.0 / ranks as f32);
                if scaled { scale.backward(&loss) } else { loss.backward() }
            }))
            .unwrap()
        };
        let sum = (1..ranks).fold(of_rank(0), |sum, rank| sum.add(&of_rank(rank)));
        adamw.step(&sum, 0.02).unwrap();
        rng.next_stream();
    }
    bits(&net)
}

/// The same by a trainer on threads. Rank 1's network begins with other weights than rank 0's.
fn by_trainer(ranks: usize, parts: usize, scaled: bool, recorded: bool) -> Vec<(Vec<u32>, Vec<f32>)> {
    on_ranks(ranks, |world| {
        let (net, adamw) = net(1 + world.rank() as u64);
        let (rank, mut part, mut losses) = (world.rank(), 0, Vec::new());
        let mut trainer = Trainer::new(adamw).rng(Rng::new(7)).accumulate(parts).ranks(world);
        if scaled {
            let config = LossScaleConfig::default().scale(256.0).interval(2);
            trainer = trainer.scale(LossScale::new(gpu(), config).unwrap());
        }
        trainer.share_state(&net).unwrap();
        let mut state = [0; 2];
        let mut batch = |rng: &mut Rng| {
            // The whole batch is drawn once a step.
            if part % parts == 0 {
                state = rng.state();
                rng.next_stream();
            }
            part += 1;
            rows(&mut Rng::from_state(state), BATCH, rank * parts + (part - 1) % parts, ranks * parts)
        };
        let keep = |report: &tiebeam::train::Report| {
            losses.push(report.loss);
            Ok(())
        };
        let done = match recorded {
            false => trainer.train(STEPS, |_, rng| Ok(loss(&net, &batch(rng))), keep),
            true => trainer.train_recorded(
                STEPS,
                |_, rng| Ok(vec![batch(rng)]),
                |inputs, _| Ok(loss(&net, &inputs[0])),
                keep,
            ),
        };
        assert!(done.unwrap());
        (bits(&net), losses)
    })
}

#[test]
fn ranks_have_the_bits_of_sums_in_their_order() {
    for (ranks, parts, scaled) in [(2, 1, false), (3, 2, false), (4, 1, true), (2, 3, true)] {
        let want = by_hand(ranks, parts, scaled);
        for recorded in [false, true] {
            let found = by_trainer(ranks, parts, scaled, recorded);
            for (own, losses) in &found {
                assert!(*own == want, "{ranks} ranks, {parts} parts, scaled {scaled}, recorded {recorded}");
                assert_eq!(losses, &found[0].1);
                assert!(losses.len() == STEPS as usize && losses[3] < losses[0]);
            }
        }
    }
    assert_ne!(by_hand(2, 1, false), by_hand(3, 1, false), "another order of sums has other bits");
}

/// Large gradients travel in pieces of an arena, some leaves have none, and the gaps between leaves do not matter.
#[test]
fn pieces_of_arenas_are_summed_where_they_lie() {
    let sizes = [5usize, 4 << 20, 3, 1 << 20, 1000];
    let found = on_ranks(2, |world| {
        let leaves: Vec<Tensor> = sizes.iter().map(|&n| Tensor::ones(gpu(), [n]).requires_grad()).collect();
        let named = leaves.iter().enumerate().map(|(i, leaf)| (format!("w{i}"), leaf.clone()));
        let _sgd = Sgd::new(gpu(), vec![Group::new(named)], SgdConfig::default()).unwrap();
        let free = Tensor::ones(gpu(), [7]).requires_grad();
        // Leaf 2 is not used. The free leaf is no optimizer's.
        let used = [0usize, 1, 3, 4];
        let mut noise = Rng::new(5 + world.rank() as u64);
        let factors: Vec<Tensor> =
            used.iter().map(|&i| Tensor::randn(gpu(), [sizes[i]], &mut noise)).collect();
        let mut loss = free.scale(3.0 + world.rank() as f32).sum_all();
        for (&i, factor) in used.iter().zip(&factors) {
            loss = loss.add(&leaves[i].mul(factor).sum_all());
        }
        let mut grads = loss.backward().unwrap();
        assert_eq!(grads.bytes(), 4 * (5 + (4 << 20) + (1 << 20) + 1000 + 7));
        grads.all_reduce(&*world).unwrap();
        assert!(grads.get(&leaves[2]).is_none());
        let mut all: Vec<Vec<f32>> =
            used.iter().map(|&i| grads.get(&leaves[i]).unwrap().to_vec().unwrap()).collect();
        all.push(grads.get(&free).unwrap().to_vec().unwrap());
        all
    });
    assert!(found[0] == found[1]);
    assert_eq!(found[0][4], [7.0; 7]);
    let [mut a, mut b] = [Rng::new(5), Rng::new(6)];
    for (i, &size) in [5usize, 4 << 20, 1 << 20, 1000].iter().enumerate() {
        let [mut x, mut y] = [vec![0.0; size], vec![0.0; size]];
        a.fill_normal(&mut x);
        b.fill_normal(&mut y);
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assert!(found[0][i] == sum, "leaf {i}");
    }
}

/// A weight that is used four times has one gradient, which is sent once; as many weights of their own are sent each.
#[test]
fn a_tied_leaf_is_sent_once() {
    let square = |rng: &mut Rng| Init::KaimingNormal.leaf(gpu(), [64, 64], rng);
    let mut rng = Rng::new(1);
    let bytes = |weights: &[Tensor]| {
        let x = Tensor::ones(gpu(), [2, 64]);
        weights.iter().fold(x, |x, w| x.matmul(w)).sum_all().backward().unwrap().bytes()
    };
    let own: Vec<Tensor> = (0..4).map(|_| square(&mut rng)).collect();
    let tied = vec![own[0].clone(); 4];
    assert_eq!((bytes(&tied), bytes(&own)), (4 * 64 * 64, 4 * 4 * 64 * 64));
}

#[test]
fn what_fails_on_one_rank_fails_on_all() {
    let errors = on_ranks(3, |world| {
        let (net, adamw) = net(1);
        let rank = world.rank();
        let mut trainer = Trainer::new(adamw).ranks(world);
        let mut x = Tensor::ones(gpu(), [2, 96]);
        let wrong = |step, _: &mut Rng| match (step, rank) {
            (2, 1) => Err(Error::config("no more data")),
            _ => Ok(loss(&net, &x)),
        };
        let error = trainer.train(5, wrong, |_| Ok(())).unwrap_err().to_string();
        assert_eq!(trainer.step(), 2);
        // A loss that is not finite on one rank is none on any.
        x = Tensor::full(gpu(), [2, 96], if rank == 2 { f32::NAN } else { 1.0 });
        let nan = trainer.train(4, |_, _| Ok(loss(&net, &x)), |_| Ok(())).unwrap_err().to_string();
        (error, nan)
    });
    assert_eq!(errors[1].0, "no more data");
    for rank in [0, 2] {
        assert_eq!(errors[rank].0, "rank 1: no more data");
    }
    assert!(errors.iter().all(|(_, nan)| nan.starts_with("train: the loss of step 3 is NaN")), "{errors:?}");
}

#[test]
fn a_flag_on_one_rank_stops_all_after_the_same_step() {
    let steps = on_ranks(2, |world| {
        let (net, adamw) = net(1);
        let (rank, flag) = (world.rank(), Arc::new(AtomicBool::new(false)));
        let mut trainer = Trainer::new(adamw).stop(flag.clone()).ranks(world);
        let x = Tensor::ones(gpu(), [2, 96]);
        let of = |step, _: &mut Rng| {
            flag.fetch_or(rank == 1 && step == 2, Ordering::SeqCst);
            Ok(loss(&net, &x))
        };
        assert!(!trainer.train(9, of, |_| Ok(())).unwrap());
        assert!(!trainer.train(9, of, |_| Ok(())).unwrap(), "it is stopped still");
        trainer.step()
    });
    assert_eq!(steps, [3, 3]);
}

#[test]
fn ranks_with_other_leaves_are_told() {
    let errors = on_ranks(2, |world| {
        let leaves = [3, 4, 4].map(|n| Tensor::ones(gpu(), [n]).requires_grad());
        let used = if world.rank() == 0 { &leaves[..2] } else { &leaves[..] };
        let zero = Tensor::zeros(gpu(), [1]);
        let loss = used.iter().fold(zero, |sum, leaf| sum.add(&leaf.sum_all()));
        let mut grads = loss.sum_all().backward().unwrap();
        grads.all_reduce(&*world).unwrap_err().to_string()
    });
    let want = "rank 1 has gradients of 3 leaves with 11 numbers, and rank 0 of 2 with 7";
    assert!(errors.iter().all(|error| error.starts_with(want)), "{errors:?}");
}

/// As many numbers of other shapes, and the same leaves in other arenas, as an adapter with other limits would have them.
#[test]
fn ranks_with_other_pieces_are_told() {
    let errors = on_ranks(2, |world| {
        let shape = if world.rank() == 0 { [3, 4] } else { [4, 3] };
        let mut shapes = Tensor::ones(gpu(), shape).requires_grad().sum_all().backward().unwrap();
        let leaves = [500, 700].map(|n| Tensor::ones(gpu(), [n]).requires_grad());
        let named = leaves.iter().map(|leaf| (leaf.count().to_string(), leaf.clone()));
        let limit = (world.rank() == 1).then_some(4096);
        let config = AdamWConfig::default().arena_limit(limit);
        let _arenas = AdamW::new(gpu(), vec![Group::new(named)], config).unwrap();
        let mut pieces = leaves[0].sum_all().add(&leaves[1].sum_all()).backward().unwrap();
        [&mut shapes, &mut pieces].map(|grads| grads.all_reduce(&*world).unwrap_err().to_string())
    });
    let want = "rank 1 has gradients of other shapes than rank 0, or an adapter with other limits";
    assert!(errors.iter().flatten().all(|error| error.starts_with(want)), "{errors:?}");
}

/// A checkpoint that two ranks wrote is read by three, of which two have other weights and another optimizer's history.
#[test]
fn checkpoints_are_the_first_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    let train = |trainer: &mut Trainer, net: &Linear, world: &dyn Ranks, to| {
        let of = |_, rng: &mut Rng| Ok(loss(net, &rows(rng, BATCH, world.rank(), world.size())));
        assert!(trainer.train(to, of, |_| Ok(())).unwrap());
    };
    let first = on_ranks(2, |world| {
        let (net, adamw) = net(1);
        let mut trainer = Trainer::new(adamw).rng(Rng::new(7)).ranks(world.clone());
        train(&mut trainer, &net, &*world, 3);
        trainer.save_with(&path, &net, &[("said".to_string(), world.rank().to_string())].into()).unwrap();
        train(&mut trainer, &net, &*world, 5);
        bits(&net)
    });
    let again = |ranks| {
        on_ranks(ranks, |world| {
            let (net, adamw) = net(4 + world.rank() as u64);
            let mut trainer =
                Trainer::new(adamw).rng(Rng::new(70 + world.rank() as u64)).ranks(world.clone());
            train(&mut trainer, &net, &*world, 1);
            let there = if world.rank() == 0 { path.clone() } else { "only rank 0 reads".into() };
            let said = trainer.load(there, &net).unwrap();
            assert_eq!((&said["said"][..], trainer.step()), ("0", 3));
            train(&mut trainer, &net, &*world, 5);
            assert_eq!(trainer.differs(&net).unwrap(), None);
            bits(&net)
        })
    };
    assert!(again(2).iter().all(|own| *own == first[0]), "the bits of a run that was not stopped");
    let three = again(3);
    assert!(three.iter().all(|own| *own == three[0]));
    let near = three[0].iter().zip(&first[0]).all(|(a, b)| {
        let [a, b] = [*a, *b].map(f32::from_bits);
        (a - b).abs() < 1e-5 + 1e-3 * b.abs()
    });
    assert!(near, "the same batches on another number of ranks");
    // A file that only rank 0 looks for, and that is not there, is an error for all.
    let lost = on_ranks(2, |world| {
        let (net, adamw) = net(1);
        let mut trainer = Trainer::new(adamw).ranks(world);
        trainer.load(folder.path().join("none"), &net).unwrap_err().to_string()
    });
    assert!(lost[0].contains("none") && lost[1].starts_with("rank 0: "), "{lost:?}");
}

#[test]
fn parameters_that_drifted_are_found_and_mended() {
    on_ranks(2, |world| {
        let (net, adamw) = net(1 + world.rank() as u64);
        let mut trainer = Trainer::new(adamw).ranks(world);
        assert_eq!(trainer.differs(&net).unwrap(), Some(1));
        assert_eq!(trainer.mend(&net).unwrap(), Some(1));
        assert_eq!((trainer.differs(&net).unwrap(), trainer.mend(&net).unwrap()), (None, None));
    });
}

#[test]
fn ranks_agree_or_are_named() {
    let said = on_ranks(3, |world| -> (Option<String>, Vec<f64>, Option<String>) {
        let of = |seed: usize| BTreeMap::from([("data", "5f"), ("seed", if seed == 2 { "8" } else { "7" })]);
        let of = of(world.rank()).into_iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let told = agree(&*world, &of).err().map(|error| error.to_string());
        let numbers = spread(&*world, 7, |i| Ok((10 * i) as f64)).unwrap();
        let own: Result<Vec<u8>> = match world.rank() {
            0 => Err(Error::stopped("Ctrl-C")),
            1 => Err(Error::config("no disk")),
            _ => Ok(vec![1]),
        };
        (told, numbers, together(&*world, own).err().map(|error| error.to_string()))
    });
    for (told, numbers, _) in &said {
        let told = told.as_ref().unwrap();
        assert!(
            told.starts_with("rank 2 is of another run than rank 0: `seed` is '8' there and '7' on rank 0"),
            "{told}"
        );
        assert_eq!(*numbers, [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]);
    }
    let errors: Vec<_> = said.iter().map(|(.., error)| error.as_deref().unwrap()).collect();
    // Rank 0 too, since ranks that were stopped go on to save, and others do not.
    assert_eq!(errors, ["rank 1: no disk", "no disk", "rank 1: no disk"]);
}

/// Large gradients are summed as soon as the backward pass has made them: the last layer's first, while the others are computed. The bits
/// are those of a step that is not recorded.
#[test]
fn recorded_gradients_travel_as_they_are_made() {
    let run = |recorded: bool| {
        on_ranks(2, |world| {
            let mut rng = Rng::new(1);
            let layers = [(1024, 4096), (4096, 300), (300, 16_384)];
            let layer = |(inner, out): (usize, usize)| {
                Linear::new(gpu(), inner, out, false, Init::KaimingUniform, &mut rng)
            };
            let net: Vec<Linear> = layers.into_iter().map(layer).collect();
            let named = net.iter().enumerate().flat_map(|(i, layer)| {
                layer
                    .parameters()
                    .trainable()
                    .into_iter()
                    .map(move |(name, leaf)| (format!("{i}.{name}"), leaf))
            });
            let sgd = Sgd::new(gpu(), vec![Group::new(named)], SgdConfig::default().lr(1.0)).unwrap();
            let noting = Noting::new(world.clone());
            let mut trainer = Trainer::new(sgd).rng(Rng::new(7)).ranks(noting.clone());
            let batch = |rng: &mut Rng| {
                let all = Tensor::randn(gpu(), [4, 1024], rng);
                all.slice(0, share(4, world.rank(), 2)).contiguous()
            };
            let of = |x: &Tensor| {
                net.iter().fold(x.clone(), |x, layer| layer.forward(&x).tanh()).square().mean_all()
            };
            let done = match recorded {
                true => trainer.train_recorded(
                    3,
                    |_, rng| Ok(vec![batch(rng)]),
                    |inputs, _| Ok(of(&inputs[0])),
                    |_| Ok(()),
                ),
                false => trainer.train(3, |_, rng| Ok(of(&batch(rng))), |_| Ok(())),
            };
            assert!(done.unwrap());
            let bits: Vec<u32> = net.iter().flat_map(bits).collect();
            let sums = noting.sums.lock().unwrap().clone();
            (bits, sums)
        })
    };
    let [recorded, not] = [run(true), run(false)];
    assert!(recorded[0].0 == recorded[1].0 && recorded[0].0 == not[0].0 && recorded[0].0 == not[1].0);
    // The first layer fills a part of 16 MiB, and the others have one each, of which the last is cut.
    let [first, second, third] = [1024 * 4096, 4096 * 300, 300 * 16_384];
    let cut = 4 << 20;
    assert_eq!(not[0].1[..4], [first, second, cut, third - cut]);
    assert_eq!(recorded[0].1[..4], [cut, third - cut, second, first]);
    assert!(recorded.iter().all(|(_, sums)| sums.len() == 12 && sums[4..8] == sums[..4]));
}

/// Ranks whose models, optimizers, rates or lengths of the run are not the same would take one message for another.
#[test]
fn ranks_of_other_models_are_told_before_anything_travels() {
    let errors = on_ranks(2, |world| {
        let other = world.rank() == 1;
        let told = |seen: Result<()>| seen.unwrap_err().to_string();
        let mut rng = Rng::new(1);
        let shapes = [Linear::new(gpu(), 5, if other { 7 } else { 6 }, true, Init::Zeros, &mut rng)];
        let fewer = [Linear::new(gpu(), 5, 6, !other, Init::Zeros, &mut rng)];
        let of = |net: &Linear| {
            let group = Group::new(net.parameters().trainable());
            Trainer::new(Sgd::new(gpu(), vec![group], SgdConfig::default()).unwrap()).ranks(world.clone())
        };
        let models = [&shapes[0], &fewer[0]].map(|net| told(of(net).share_state(net)));
        let net = Linear::new(gpu(), 5, 6, true, Init::Zeros, &mut rng);
        let scalars = |samples| {
            let config = ScalarsConfig::default().samples(samples);
            Trainer::new(Scalars::new(net.parameters().trainable(), config).unwrap()).ranks(world.clone())
        };
        let kinds = told(if other { of(&net) } else { scalars(1) }.share_state(&net));
        let samples = told(scalars(1 + world.rank() as u32).share_state(&net));
        let (x, own) = (Tensor::ones(gpu(), [2, 5]), world.rank() as u64);
        let mut trainer = of(&net);
        let length = trainer.train(3 + own, |_, _| Ok(loss(&net, &x)), |_| Ok(())).map(drop);
        trainer.set_lr(0.5 + own as f32);
        let rate = trainer.train(3, |_, _| Ok(loss(&net, &x)), |_| Ok(())).map(drop);
        [&models[..], &[kinds, samples, told(length), told(rate)]].concat()
    });
    let wanted = [
        "`bias` is 'tensor 1, f32 [7]' there and 'tensor 1, f32 [6]' on rank 0",
        "`bias` is not said there and 'tensor 1, f32 [6]' on rank 0",
        "`optimizer` is 'sgd' there and 'scalars, samples 1, ",
        "`optimizer` is 'scalars, samples 2, ",
        "`steps` is '4' there and '3' on rank 0",
        "`rate` is '1.5' there and '0.5' on rank 0",
    ];
    for own in &errors {
        for (error, wanted) in own.iter().zip(wanted) {
            let starts = error.starts_with("rank 1 is of another run than rank 0: ");
            assert!(starts && error.contains(wanted), "{error}");
        }
    }
}

/// A device that gives no readings, or other values than the others: no rank waits for one that has given up.
#[test]
fn what_cannot_be_read_on_one_rank_fails_on_all() {
    let errors = on_ranks(2, |world| {
        let (net, adamw) = net(1);
        let (rank, x) = (world.rank(), Tensor::ones(gpu(), [2, 96]));
        let mut trainer = Trainer::new(adamw).accumulate(2).ranks(world);
        let values = |_, _: &mut Rng| Ok((loss(&net, &x), vec![Tensor::ones(gpu(), [1 + rank])]));
        let values = trainer.train(2, values, |_| Ok(())).unwrap_err().to_string();
        let mut asked = 0;
        let uneven = |_, _: &mut Rng| {
            asked += 1;
            Ok(vec![x.clone(); if rank == 1 && asked == 2 { 3 } else { 1 }])
        };
        let uneven = trainer.train_recorded(2, uneven, |inputs, _| Ok(loss(&net, &inputs[0])), |_| Ok(()));
        [values, uneven.unwrap_err().to_string()]
    });
    for (rank, own) in errors.iter().enumerate() {
        assert_eq!(own[0], "train: rank 1 reads another number of values than rank 0");
        let prefix = if rank == 1 { "" } else { "rank 1: " };
        let wanted = format!(
            "{prefix}train: a batch of 1 tensors and one of 3 for the losses of a step; give as many for each"
        );
        assert_eq!(own[1], wanted);
    }
}
