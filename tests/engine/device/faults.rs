//! Memory over time, faults and configuration.

use super::folder::Folder;
use super::*;
use tiebeam::error::ErrorKind;
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::{Error, Options, Step};

#[test]
fn a_training_loop_holds_steady() {
    let gpu = quiet();
    let theta = drawn(&gpu, 1, &[24, 24]).scale(0.2);
    theta.to_vec::<f32>().unwrap();
    let held = gpu.memory_stats().used;
    let mut steady = None;
    for step in 0..1000u64 {
        let w = theta.requires_grad();
        let x = drawn(&gpu, step, &[8, 24]);
        let y = linear(&linear(&x, &w).gelu(), &w).gelu();
        let grads = y.sum_all().backward().unwrap();
        if step % 50 == 49 {
            assert!(bits(grads.get(&w).unwrap()).iter().all(|b| f32::from_bits(*b).is_finite()));
            drop((grads, y, x, w));
            let stats = gpu.memory_stats();
            assert!(stats.used <= held, "only theta is held: {stats:?}");
            assert_eq!(*steady.get_or_insert(stats), stats, "step {step}");
        }
    }
}

#[test]
fn trim_gives_free_memory_back() {
    let gpu = quiet();
    let kept = drawn(&gpu, 1, &[1000]);
    drop((0..5).map(|i| drawn(&gpu, i, &[50_000 * (i as usize + 1)])).collect::<Vec<_>>());
    let before = gpu.memory_stats();
    assert!(before.free >= 15 * 200_000 && before.used >= 4000, "{before:?}");
    assert_eq!(gpu.trim(), before.free);
    let after = gpu.memory_stats();
    assert_eq!((after.free, after.used, after.created), (0, before.used, before.created));
    assert_eq!(gpu.trim(), 0);
    assert_eq!(kept.to_vec::<f32>().unwrap(), normal(1, 1000));
    assert_eq!(drawn(&gpu, 3, &[500]).scale(1.0).to_vec::<f32>().unwrap(), normal(3, 500));
}

#[test]
fn an_empty_sum_leaves_the_epilogue() {
    let gpu = gpu();
    let (x, w) = (Tensor::zeros(gpu, [2, 0]), Tensor::zeros(gpu, [3, 0]));
    let (bias, residual) = (drawn(gpu, 1, &[3]), drawn(gpu, 2, &[2, 3]));
    let y = x.linear(&tied(&w), Epilogue::default().bias(Some(&bias)).residual(Some(&residual)));
    assert_eq!(bits(&y), bits(&bias.add(&residual)));
}

#[test]
fn long_sums_lose_nothing() {
    let gpu = gpu();
    for bits in [20, 25] {
        if 4 << bits <= gpu.adapter().max_binding {
            let n = 1usize << bits;
            assert_eq!(Tensor::ones(gpu, [n]).sum_all().item().unwrap(), n as f32);
            assert_eq!(Tensor::ones(gpu, [n / 1024, 1024]).sum(0).sum_all().item().unwrap(), n as f32);
        }
    }
}

#[test]
fn sizes_that_come_once_do_not_pile_up() {
    let gpu = quiet();
    for i in 1..=20usize {
        // From 8 to 160 MiB, each in another size class.
        drop(Tensor::zeros(&gpu, [i << 20]).scale(2.0).to_vec::<f32>().map(|x| x.len()));
        let stats = gpu.memory_stats();
        assert!(stats.free <= (3 * 4 * i as u64 + 64) << 20, "after {i}: {stats:?}");
    }
}

#[test]
fn uploads_alone_do_not_pile_up() {
    let gpu = own();
    const MIB: usize = 1 << 20;
    let data = vec![1u32; MIB];
    for _ in 0..200 {
        drop(Tensor::from_slice(&gpu, &data, [MIB]));
    }
    let stats = gpu.memory_stats();
    assert!(stats.peak < 200 * MIB as u64, "800 MiB came one after another, {stats:?}");
}

/// Returns a number of elements that is too large for a tensor on this adapter, and the limit in bytes.
fn too_many(gpu: &Gpu) -> (usize, u64) {
    let have = gpu.adapter().max_binding.min(gpu.adapter().max_buffer);
    let n = (have / 4 + 5) as usize;
    assert!(n < u32::MAX as usize, "this adapter binds {have} bytes: no shape is above it");
    (n, have)
}

fn is_limit<T>(what: &str, result: Result<T, Error>) {
    let Err(error) = result else { panic!("{what}: should be an error") };
    assert!(matches!(&error, Error::Limit { what, .. } if what.starts_with("full: ")), "{what}: {error}");
}

#[test]
fn a_tensor_above_the_limit_fails_what_depends_on_it() {
    let gpu = quiet();
    let (n, have) = too_many(&gpu);
    let good = drawn(&gpu, 1, &[64]);
    let before = good.sum_all();
    let large = Tensor::ones(&gpu, [n]);
    gpu.flush().expect("nothing was asked of it yet");
    let Err(Error::Limit { what, need, have: limit, .. }) = large.to_vec::<f32>() else {
        panic!("above the limit")
    };
    assert!(what.starts_with("full: "), "names the op: {what}");
    assert_eq!((need, limit), ((n as u64 * 4).div_ceil(16) * 16, have));
    // Results of any op on it carry the first cause, and nothing is dispatched for them.
    let dispatched = gpu.dispatches();
    let sum = large.sum_all();
    let made = [
        large.scale(2.0),
        sum.clone(),
        sum.add(&good),
        sum.add(&good).softmax(-1),
        good.reshape([1, 64]).matmul(&sum.expand([64, 3])),
    ];
    for (i, made) in made.iter().enumerate() {
        is_limit(&format!("made {i}, before"), made.check());
        is_limit(&format!("made {i}"), made.to_vec::<f32>());
        is_limit(&format!("made {i}, after"), made.check());
    }
    assert!(sum.to_string().contains("full: bytes of one tensor"), "{sum}");
    assert_eq!(gpu.dispatches(), dispatched, "nothing was dispatched");
    // All other work in the same batch succeeds, whether before, between or after.
    let between = good.scale(3.0);
    is_limit("in the batch", large.scale(3.0).to_vec::<f32>());
    gpu.synchronize().expect("the device has no fault");
    assert!(gpu.take_fault().is_none());
    let tripled: Vec<f32> = normal(1, 64).iter().map(|x| 3.0 * x).collect();
    assert_eq!(between.to_vec::<f32>().unwrap(), tripled);
    let want: f64 = normal(1, 64).iter().map(|&v| v as f64).sum();
    assert!((before.item().unwrap() as f64 - want).abs() < 1e-4);
    // An upload above the limit is treated in the same way, with the name of its op.
    let data = vec![0f32; n];
    let Err(Error::Limit { what, .. }) = Tensor::from_slice(&gpu, &data, [n]).sum_all().item() else {
        panic!("above the limit")
    };
    assert!(what.starts_with("from_slice: "), "{what}");
    assert_eq!(bits(&good.sum_all()), bits(&before));
}

#[test]
fn training_goes_on_after_a_batch_above_the_limit() {
    let gpu = gpu();
    let (n, _) = too_many(gpu);
    let theta = drawn(gpu, 1, &[24, 24]).scale(0.2).requires_grad();
    let mut optimizer =
        AdamW::new(gpu, vec![Group::new([("theta", &theta)])], AdamWConfig::default()).unwrap();
    let x = drawn(gpu, 2, &[8, 24]);
    let start = bits(&theta);
    // A loss that carries an error, a seed that does, and a gradient that does although the loss is valid.
    let large = Tensor::ones(gpu, [n]).sum_all();
    let loss = || linear(&x, &theta).square().mean_all();
    is_limit("loss", loss().mul(&large).backward());
    is_limit("seed", loss().backward_with(&large));
    let sound = Tensor::zeros(gpu, []).requires_grad();
    let spread = sound.expand([n / 2, 4]).slice(0, 0..1).sum_all();
    let error = spread.backward().err().map(|e| e.to_string());
    assert_eq!(spread.item().unwrap(), 0.0);
    assert!(error.as_ref().is_some_and(|e| e.contains("bytes of one tensor")), "{error:?}");
    assert_eq!((bits(&theta), optimizer.steps()), (start.clone(), 0));
    gpu.synchronize().expect("the device has no fault");
    optimizer.step(&loss().backward().unwrap(), 0.01).unwrap();
    assert_eq!(optimizer.steps(), 1);
    assert_ne!(bits(&theta), start);
    assert!(bits(&theta).iter().all(|b| f32::from_bits(*b).is_finite()));
}

#[test]
fn a_parameter_that_carries_an_error_spoils_no_other() {
    let gpu = gpu();
    let (n, _) = too_many(gpu);
    let good = drawn(gpu, 1, &[8]).requires_grad();
    let bad = Tensor::ones(gpu, [n]).sum_all().expand([8]).contiguous().requires_grad();
    let group = |all: &[(&str, &Tensor)]| vec![Group::new(all.iter().copied())];
    is_limit("new", AdamW::new(gpu, group(&[("good", &good), ("bad", &bad)]), AdamWConfig::default()));
    assert_eq!(good.to_vec::<f32>().unwrap(), normal(1, 8));
    let mut optimizer = AdamW::new(gpu, group(&[("good", &good)]), AdamWConfig::default()).unwrap();
    optimizer.step(&good.square().sum_all().backward().unwrap(), 0.1).unwrap();
    assert_ne!(good.to_vec::<f32>().unwrap(), normal(1, 8));
}

#[test]
fn a_step_and_a_file_refuse_what_carries_an_error() {
    let gpu = gpu();
    let (n, _) = too_many(gpu);
    let x = drawn(gpu, 1, &[4]);
    let bad = || Tensor::ones(gpu, [n]).sum_all().expand([4]);
    is_limit("recorded input", Step::record(gpu, &[&bad()], |x| Ok(vec![x[0].exp()])));
    is_limit("recorded op", Step::record(gpu, &[&x], |x| Ok(vec![x[0].add(&bad())])));
    // Also if the result does not need it, because a replay would omit it.
    is_limit(
        "on the side",
        Step::record(gpu, &[&x], |x| {
            bad().evaluate();
            Ok(vec![x[0].exp()])
        }),
    );
    let mut step = Step::record(gpu, &[&x, &x], |x| Ok(vec![x[0].add(&x[1])])).unwrap();
    let y = drawn(gpu, 2, &[4]);
    is_limit("replayed input", step.run(&[&y, &bad()]).map(drop));
    // Nothing was run, nothing was written.
    assert_eq!(bits(&step.outputs()[0]), bits(&x.add(&x)));
    assert_eq!(bits(&step.run(&[&y, &x]).unwrap()[0]), bits(&x.add(&y)));
    let folder = Folder::new("carried");
    let path = folder.join("carried.safetensors");
    is_limit("saved", tiebeam::store::save_tensors(&path, [("bad", &bad())], &Default::default()));
    assert!(!path.exists());
    gpu.synchronize().expect("the device has no fault");
}

/// A request that is too large does not harm other requests whose keys are in the same cache.
#[test]
fn a_cache_refuses_what_carries_an_error() {
    let gpu = gpu();
    let list = |v: u32| Tensor::from_slice(gpu, &[v], [1]);
    let mut cache = tiebeam::ops::sequence::cache::KvCache::new(gpu, 2, 1, 8, 4);
    let good = drawn(gpu, 1, &[1, 3, 1, 4]);
    cache.append(&good, &good, &list(0), &list(0)).unwrap();
    let spoilt = Tensor::ones(gpu, [too_many(gpu).0]).slice(0, 0..12).reshape([1, 3, 1, 4]);
    is_limit("append", cache.append(&good, &spoilt, &list(1), &list(0)));
    let y = cache.attend(&drawn(gpu, 2, &[1, 1, 1, 4]), &list(0), &list(3));
    assert!(y.to_vec::<f32>().unwrap().iter().all(|y| y.is_finite()));
}

/// A fault stays on the device until it is taken. The fault is raised explicitly, because a test cannot exhaust a device's
/// memory.
#[test]
fn a_fault_of_the_device_is_sticky() {
    let gpu = quiet();
    let good = drawn(&gpu, 1, &[64]);
    let before = good.sum_all();
    before.evaluate();
    gpu.raise(Error::device("out of device memory"));
    let is_fault = |e: Option<Error>| {
        assert!(
            matches!(&e, Some(Error::Device { message, .. }) if message.contains("out of device memory")),
            "{e:?}"
        );
    };
    let dispatched = gpu.dispatches();
    let skipped = good.scale(3.0).sum_all();
    is_fault(skipped.to_vec::<f32>().err());
    is_fault(gpu.flush().err());
    is_fault(gpu.synchronize().err());
    is_fault(good.requires_grad().sum_all().backward().err());
    let uploaded = drawn(&gpu, 9, &[64]);
    skipped.evaluate();
    assert_eq!(gpu.dispatches(), dispatched, "nothing was dispatched");
    is_fault(gpu.take_fault());
    assert!(gpu.take_fault().is_none());
    // New work succeeds, and results that were computed before or only uploaded are intact.
    let want: f64 = normal(1, 64).iter().map(|&v| v as f64).sum();
    assert!((before.item().unwrap() as f64 - want).abs() < 1e-4);
    assert_eq!(uploaded.to_vec::<f32>().unwrap(), normal(9, 64));
    // Skipped results and those computed from them carry the fault, but do not put it on the device again.
    is_fault(skipped.to_vec::<f32>().err());
    is_fault(skipped.add(&good).to_vec::<f32>().err());
    assert!(gpu.take_fault().is_none());
    assert_eq!(bits(&good.sum_all()), bits(&before));
}

/// Work that takes longer than the limit is an error with an explanation, and the device remains usable.
#[test]
fn a_wait_has_a_limit() {
    let wait = Some(Duration::from_millis(2));
    let gpu = Gpu::open_with(Options::default().wait(wait)).unwrap();
    let later = |work: &dyn Fn() -> Result<(), Error>| {
        for _ in 0..3000 {
            match work() {
                Ok(()) => return,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        panic!("the device does not come to an end");
    };
    let x = drawn(&gpu, 1, &[512, 512]).scale(0.04);
    // The driver compiles the kernels meanwhile, for which 2 ms are too few as well.
    x.matmul(&x).evaluate();
    later(&|| gpu.synchronize());
    // Less than a batch, so that only the call below waits. lavapipe accepts no second batch before the first is done.
    let work = || (0..8).fold(x.clone(), |y, _| y.matmul(&x));
    let y = work();
    let error = gpu.synchronize().expect_err("2 ms are too few");
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    let said = error.to_string();
    let want = "device: waited 0.002 s for all submitted work and stopped: the driver hangs, or the work takes longer.";
    assert!(said.starts_with(want) && said.contains("TIEBEAM_WAIT"), "{said}");
    assert!(gpu.take_fault().is_none(), "not a fault that stays");
    // With enough time the same work completes with the right result.
    later(&|| gpu.synchronize());
    let z = work();
    let said = z.to_vec::<f32>().expect_err("2 ms are too few").to_string();
    assert!(said.contains("for a readback and stopped"), "{said}");
    later(&|| gpu.synchronize());
    let mut both = Vec::new();
    for tensor in [&y, &z] {
        later(&|| tensor.to_vec::<f32>().map(drop));
        let found = (0..3000).find_map(|_| tensor.to_vec::<f32>().ok());
        both.push(found.expect("readable"));
    }
    assert!(both[0] == both[1] && both[0].iter().all(|x| x.is_finite()));
}

#[test]
fn wrong_settings_say_what_there_is() {
    let open = |adapter: Option<&str>, backend: Option<&str>| {
        Gpu::open_with(
            Options::default().adapter(adapter.map(String::from)).backend(backend.map(String::from)),
        )
    };
    let adapters = Gpu::adapters().unwrap();
    let Err(Error::NoAdapter { message, .. }) = open(Some("no such gpu"), None) else {
        panic!("there is none")
    };
    assert!(message.contains("'no such gpu'"), "{message}");
    for adapter in &adapters {
        assert!(message.contains(&adapter.name), "{message} lacks {}", adapter.name);
    }
    let Err(Error::NoAdapter { message, .. }) = open(Some("999"), None) else { panic!("there are fewer") };
    assert!(
        message.starts_with("index 999 is not in the list") && message.contains(&adapters[0].name),
        "{message}"
    );
    let Err(Error::Config { message, .. }) = open(None, Some("vulkan,cuda")) else {
        panic!("cuda is no backend")
    };
    assert!(message.contains("'cuda' is no backend; use vulkan, metal, dx12 or gl"), "{message}");
    let shouted = gpu().adapter().name.to_uppercase();
    assert_eq!(open(Some(&shouted), None).unwrap().adapter().name, gpu().adapter().name);
    assert!(open(Some("0"), None).unwrap().adapter().index == 0);
}
