//! Memory over time, faults and configuration.

use super::*;
use tiebeam::{Error, Options};

#[test]
fn a_training_loop_holds_steady() {
    let gpu = own();
    let theta = drawn(&gpu, 1, &[24, 24]).scale(0.2);
    theta.to_vec::<f32>().unwrap();
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
            assert!(stats.used <= 4096, "only theta is held: {stats:?}");
            assert_eq!(*steady.get_or_insert(stats), stats, "step {step}");
        }
    }
}

#[test]
fn trim_gives_free_memory_back() {
    let gpu = own();
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
    let gpu = own();
    let (x, w) = (Tensor::zeros(&gpu, [2, 0]), Tensor::zeros(&gpu, [3, 0]));
    let (bias, residual) = (drawn(&gpu, 1, &[3]), drawn(&gpu, 2, &[2, 3]));
    let y =
        x.linear(&tied(&w), Epilogue { bias: Some(&bias), residual: Some(&residual), ..Epilogue::default() });
    assert_eq!(bits(&y), bits(&bias.add(&residual)));
}

#[test]
fn long_sums_lose_nothing() {
    let gpu = own();
    for bits in [20, 25] {
        if 4 << bits <= gpu.adapter().max_binding {
            let n = 1usize << bits;
            assert_eq!(Tensor::ones(&gpu, [n]).sum_all().item().unwrap(), n as f32);
            assert_eq!(Tensor::ones(&gpu, [n / 1024, 1024]).sum(0).sum_all().item().unwrap(), n as f32);
        }
    }
}

#[test]
fn sizes_that_come_once_do_not_pile_up() {
    let gpu = own();
    for i in 1..=20usize {
        // 8 to 160 MiB, no two of one size class.
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

#[test]
fn a_tensor_above_the_limit_is_a_sticky_error() {
    let gpu = own();
    let have = gpu.adapter().max_binding.min(gpu.adapter().max_buffer);
    let n = (have / 4 + 5) as usize;
    assert!(n < u32::MAX as usize, "this adapter binds {have} bytes: no shape is above it");
    let good = drawn(&gpu, 1, &[64]);
    let made_before = good.sum_all();
    let before = gpu.dispatches();
    let large = Tensor::ones(&gpu, [n]);
    assert!(gpu.flush().is_ok(), "nothing was asked of it yet");
    let Err(Error::Limit { what, need, have: limit }) = large.to_vec::<f32>() else {
        panic!("above the limit")
    };
    assert!(what.starts_with("full"), "names the op: {what}");
    assert_eq!((need, limit), ((n as u64 * 4).div_ceil(16) * 16, have));
    // Sticky: good work is not done either, and every way to ask says why.
    let skipped = good.scale(3.0).sum_all();
    let skipped_too = good.scale(2.0);
    let is_limit = |e: Option<Error>| assert!(matches!(e, Some(Error::Limit { .. })), "{e:?}");
    is_limit(skipped.to_vec::<f32>().err());
    is_limit(skipped_too.to_vec::<f32>().err());
    is_limit(gpu.flush().err());
    is_limit(gpu.synchronize().err());
    is_limit(good.requires_grad().sum_all().backward().err());
    let uploaded = drawn(&gpu, 9, &[64]);
    assert_eq!(gpu.dispatches(), before, "nothing was dispatched");
    is_limit(gpu.take_fault());
    assert!(gpu.take_fault().is_none());
    // New work goes on; what was computed before or only uploaded is whole.
    let want: f64 = normal(1, 64).iter().map(|&v| v as f64).sum();
    assert!((made_before.item().unwrap() as f64 - want).abs() < 1e-4);
    assert_eq!(uploaded.to_vec::<f32>().unwrap(), normal(9, 64));
    assert_eq!(good.scale(2.0).to_vec::<f32>().unwrap()[3], 2.0 * normal(1, 64)[3]);
    // What was skipped has no data: an error, never the bytes that its buffer had before.
    for lost in [&large, &skipped, &skipped_too] {
        let said = lost.to_vec::<f32>().expect_err("was never computed").to_string();
        assert!(said.contains("no data"), "{said}");
        gpu.take_fault();
    }
    // And spoils what is made from it, by name.
    let spoilt = skipped_too.add(&good);
    let said = spoilt.to_vec::<f32>().expect_err("made from what was never computed").to_string();
    assert!(said.contains("no data"), "{said}");
    gpu.take_fault();
    assert_eq!(good.sum_all().item().unwrap().to_bits(), made_before.item().unwrap().to_bits());
}

#[test]
fn wrong_settings_say_what_there_is() {
    let open = |adapter: Option<&str>, backend: Option<&str>| {
        Gpu::open_with(Options {
            adapter: adapter.map(String::from),
            backend: backend.map(String::from),
            ..Options::default()
        })
    };
    let adapters = Gpu::adapters().unwrap();
    let Err(Error::NoAdapter { message }) = open(Some("no such gpu"), None) else { panic!("there is none") };
    assert!(message.contains("'no such gpu'"), "{message}");
    for adapter in &adapters {
        assert!(message.contains(&adapter.name), "{message} lacks {}", adapter.name);
    }
    let Err(Error::NoAdapter { message }) = open(Some("999"), None) else { panic!("there are fewer") };
    assert!(
        message.starts_with("index 999 is not in the list") && message.contains(&adapters[0].name),
        "{message}"
    );
    let Err(Error::Config { message }) = open(None, Some("vulkan,cuda")) else {
        panic!("cuda is no backend")
    };
    assert!(message.contains("'cuda' is no backend; use vulkan, metal, dx12 or gl"), "{message}");
    let shouted = gpu().adapter().name.to_uppercase();
    assert_eq!(open(Some(&shouted), None).unwrap().adapter().name, gpu().adapter().name);
    assert!(open(Some("0"), None).unwrap().adapter().index == 0);
}
