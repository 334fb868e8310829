//! Threads that share a device for a while, with training, recorded steps, requests above a limit, snapshots and caches. Each
//! thread's results must be the same as if it were alone.

use super::Long;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tiebeam::optim::{AdamW, AdamWConfig, Group, Sgd, SgdConfig};
use tiebeam::{Error, Gpu, Result, Rng, Step, Tensor, ops::sequence::cache::KvCache};

/// Tests with 2, 8 and 16 threads, each for one second, or for half a minute with `long`.
pub fn all(long: bool) -> Vec<Long> {
    let time = Duration::from_secs_f64(if long { 30.0 } else { 1.0 });
    let one = |threads| {
        Long::new(format!("{threads} threads share a device"), 1 << 16, move |gpu| share(gpu, threads, time))
    };
    [2, 8, 16].map(one).into()
}

fn share(gpu: &Gpu, threads: usize, time: Duration) {
    let want: Vec<_> = (0..threads).map(|i| train(gpu, i, i % 2 == 1, &|| {}).unwrap()).collect();
    let watched = Watched::new(gpu);
    let (stop, end) = (AtomicBool::new(false), Instant::now() + time);
    let work = |thread: usize| {
        let mut rounds = 0u64;
        while Instant::now() < end && !stop.load(Relaxed) {
            match (thread % 4, rounds % 3) {
                (1, 0) => watched.look(gpu),
                (2, 0) => too_large(gpu),
                (3, 0) => decode(gpu, thread as u64),
                _ => {
                    let got = train(gpu, thread, thread % 2 == 1, &|| std::thread::yield_now()).unwrap();
                    assert!(got == want[thread], "thread {thread}, round {rounds}");
                }
            }
            rounds += 1;
        }
        assert!(rounds > 0);
    };
    // A failure of one thread ends the others.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(std::thread::panicking(), Relaxed);
        }
    }
    std::thread::scope(|s| {
        let (stop, work) = (&stop, &work);
        s.spawn(|| watched.train(end, stop));
        (0..threads).for_each(|thread| {
            s.spawn(move || {
                let _stop = Stop(stop);
                work(thread);
            });
        });
    });
    assert!(gpu.take_fault().is_none());
}

fn drawn(gpu: &Gpu, seed: u64, shape: &[usize]) -> Tensor {
    let mut data = vec![0.0; shape.iter().product()];
    Rng::new(seed).fill_normal(&mut data);
    Tensor::from_slice(gpu, &data, shape)
}

/// Makes eight steps of a small network with dropout, by its code or recorded. Returns the bits of its weights and the
/// generator's state.
fn train(gpu: &Gpu, seed: usize, recorded: bool, between: &dyn Fn()) -> Result<(Vec<u32>, [u64; 2])> {
    let w = drawn(gpu, seed as u64, &[16, 16]).scale(0.2).requires_grad();
    let gain = Tensor::ones(gpu, [16]).requires_grad();
    let mut rng = Rng::new(seed as u64);
    let mut adamw = AdamW::new(gpu, vec![Group::new([("w", &w), ("gain", &gain)])], AdamWConfig::default())?;
    let x = drawn(gpu, 100 + seed as u64, &[8, 16]);
    let mut work = |x: &Tensor| -> Result<Tensor> {
        let hidden = x.matmul(&w).rms_norm(Some(&gain), 1e-5).dropout(0.25, &mut rng);
        between();
        let loss = hidden.matmul(&w.t()).sub(x).square().mean_all();
        adamw.step(&loss.backward()?, 0.01)?;
        Ok(loss)
    };
    if recorded {
        let mut step = Step::record(gpu, &[&x], |x| Ok(vec![work(&x[0])?]))?;
        for _ in 1..8 {
            between();
            step.run(&[&x])?;
        }
    } else {
        for _ in 0..8 {
            let _ = work(&x)?;
        }
    }
    let mut bits: Vec<u32> = Vec::new();
    for x in gpu.snapshot(&[&w, &gain])? {
        bits.extend(x.to_vec::<f32>()?.iter().map(|x| x.to_bits()));
    }
    Ok((bits, rng.state()))
}

/// Weights that all count the steps of one training run, downwards.
struct Watched {
    weights: Vec<Tensor>,
    names: Vec<String>,
}

impl Watched {
    fn new(gpu: &Gpu) -> Watched {
        let weights = (0..4).map(|_| Tensor::from_slice(gpu, &[0f32; 64], [64]).requires_grad()).collect();
        Watched { weights, names: (0..4).map(|i| format!("w{i}")).collect() }
    }

    fn train(&self, end: Instant, stop: &AtomicBool) {
        let gpu = self.weights[0].gpu();
        // Every weight has its own arena, so a step is several kernels.
        let config = SgdConfig::default().arena_limit(Some(256));
        let group = Group::new(self.names.iter().zip(&self.weights));
        let mut sgd = Sgd::new(gpu, vec![group], config).unwrap();
        let mut work = || -> Result<Vec<Tensor>> {
            let loss = self.weights.iter().map(Tensor::sum_all).reduce(|a, b| a.add(&b)).unwrap();
            sgd.step(&loss.backward()?, 1.0)?;
            Ok(vec![loss])
        };
        work().unwrap();
        let mut step = Step::record(gpu, &[], |_| work()).unwrap();
        while Instant::now() < end && !stop.load(Relaxed) {
            step.run(&[]).unwrap();
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    fn look(&self, gpu: &Gpu) {
        let now = gpu.snapshot(&self.weights.iter().collect::<Vec<_>>()).unwrap();
        let all: Vec<f32> = now.iter().flat_map(|x| x.to_vec::<f32>().unwrap()).collect();
        assert!(all.iter().all(|x| *x == all[0]), "weights of different steps: {all:?}");
    }
}

/// Makes a request above the adapter's limit, and a valid one.
fn too_large(gpu: &Gpu) {
    let n = (gpu.adapter().max_binding.min(gpu.adapter().max_buffer) / 4 + 5) as usize;
    let (large, sound) = (Tensor::ones(gpu, [n]), drawn(gpu, 1, &[64]));
    assert!(matches!(large.add(&Tensor::ones(gpu, [1])).to_vec::<f32>(), Err(Error::Limit { .. })));
    assert_eq!(sound.scale(2.0).to_vec::<f32>().unwrap()[0], 2.0 * sound.to_vec::<f32>().unwrap()[0]);
}

/// Checks that keys and values appended token by token give the same result as all at once.
fn decode(gpu: &Gpu, seed: u64) {
    let list = |v: u32| Tensor::from_slice(gpu, &[v], [1]);
    let (x, q) = (drawn(gpu, seed, &[1, 5, 1, 8]), drawn(gpu, seed + 1, &[1, 1, 1, 8]));
    let [mut whole, mut single] = [(); 2].map(|()| KvCache::new(gpu, 1, 1, 8, 8));
    whole.append(&x, &x, &list(0), &list(0)).unwrap();
    for token in 0..5 {
        let x = x.slice(1, token..token + 1);
        single.append(&x, &x, &list(0), &list(token as u32)).unwrap();
    }
    let [a, b] = [whole, single].map(|cache| cache.attend(&q, &list(0), &list(5)).to_vec::<f32>().unwrap());
    assert_eq!(a, b);
}
