//! The engine: transfers, recording, fusion, the tape, memory, faults and threads. Ops have their own tests, in `tests/ops`.
//!
//! Tests that count dispatches or bytes, or raise faults, take turns on a quiet device, because many tests use the shared one at
//! once. A test opens its own device only if it needs a fresh one.

mod choices;
mod draws;
mod faults;
mod ids;
mod life;
mod open;
mod plans;
mod step;
mod tape;
mod threads;

use crate::support::*;
use half::{bf16, f16};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};
use std::time::Duration;
use tiebeam::ops::product::matmul::Epilogue;
use tiebeam::share::{Site, Tied};
use tiebeam::{DType, Gpu, Rng, Tensor, no_grad};

/// A fresh device that no other test uses. It has compiled no kernels, and its memory statistics start at 0.
fn own() -> Gpu {
    Gpu::open().expect("these tests need an adapter")
}

fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut all = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut all);
    all
}

fn drawn(gpu: &Gpu, seed: u64, shape: &[usize]) -> Tensor {
    Tensor::from_slice(gpu, &normal(seed, shape.iter().product()), shape)
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.to_vec::<f32>().expect("readback").into_iter().map(f32::to_bits).collect()
}

fn tied(theta: &Tensor) -> Arc<dyn Site> {
    Tied::new(theta).shared()
}

fn linear(x: &Tensor, theta: &Tensor) -> Tensor {
    x.linear(&tied(theta), Epilogue::default())
}

fn dot(a: &Tensor, b: &Tensor) -> (f64, f64) {
    let terms: Vec<f64> = download(a).iter().zip(download(b)).map(|(a, b)| a * b).collect();
    (terms.iter().sum(), terms.iter().map(|t| t * t).sum::<f64>().sqrt())
}

/// The message with which `work` panics.
fn panic_of<T>(work: impl FnOnce() -> T) -> String {
    let Err(payload) = catch_unwind(AssertUnwindSafe(work)) else { panic!("should have panicked") };
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|s| s.to_string())).expect("a sentence")
}

// Transfers

#[test]
fn every_dtype_comes_back_as_it_went() {
    let gpu = gpu();
    for n in [0usize, 1, 2, 3, 5, 7, 63, 64, 65, 127, 1001, 65537] {
        let words: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2654435761) ^ 0xA5A5).collect();
        let floats: Vec<f32> = normal(n as u64, n);
        // Finite patterns only, because a kernel may change the payload of a NaN. A copy does not.
        let halves: Vec<f16> = words.iter().map(|w| f16::from_bits((w >> 7) as u16 & 0xBFFF)).collect();
        let brains: Vec<bf16> = words.iter().map(|w| bf16::from_bits((w >> 7) as u16 & 0xBFFF)).collect();
        let signed: Vec<i32> = words.iter().map(|&w| w as i32).collect();
        let want: Vec<u32> = floats.iter().map(|x| x.to_bits()).collect();
        assert_eq!(bits(&Tensor::from_slice(gpu, &floats, [n])), want, "f32, {n}");
        assert_eq!(Tensor::from_slice(gpu, &halves, [n]).to_vec::<f16>().unwrap(), halves, "f16, {n}");
        assert_eq!(Tensor::from_slice(gpu, &brains, [n]).to_vec::<bf16>().unwrap(), brains, "bf16, {n}");
        assert_eq!(Tensor::from_slice(gpu, &words, [n]).to_vec::<u32>().unwrap(), words, "u32, {n}");
        assert_eq!(Tensor::from_slice(gpu, &signed, [n]).to_vec::<i32>().unwrap(), signed, "i32, {n}");
        if n > 3 {
            // Slices that start at offsets which no kernel can bind.
            let part = |x: Tensor| x.slice(0, 1..n - 1);
            assert_eq!(
                part(Tensor::from_slice(gpu, &halves, [n])).to_vec::<f16>().unwrap(),
                halves[1..n - 1]
            );
            assert_eq!(
                part(Tensor::from_slice(gpu, &brains, [n])).to_vec::<bf16>().unwrap(),
                brains[1..n - 1]
            );
            assert_eq!(part(Tensor::from_slice(gpu, &words, [n])).to_vec::<u32>().unwrap(), words[1..n - 1]);
            assert_eq!(
                part(Tensor::from_slice(gpu, &signed, [n])).to_vec::<i32>().unwrap(),
                signed[1..n - 1]
            );
        }
    }
}

#[test]
fn one_element_of_any_float_is_read() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let x = Tensor::scalar(gpu(), 2.5).cast(dtype).requires_grad();
        assert_eq!(x.item().unwrap(), 2.5, "{dtype}");
    }
    let ids = Tensor::from_slice(gpu(), &[7u32], [1]);
    let panic = catch_unwind(AssertUnwindSafe(|| ids.item())).expect_err("it is refused");
    assert_eq!(
        panic.downcast_ref::<String>().unwrap(),
        "item: the tensor is u32; read it by to_vec::<u32>()?[0]"
    );
}

#[test]
fn display_prints_rows_and_shortens_long_axes() {
    let gpu = gpu();
    let ends = |shape: &str| format!("\n{shape} on {}", gpu.adapter().name);
    let same = |text: String, elements: &str, shape: &str| {
        assert_eq!(text, format!("{elements}{}", ends(shape)));
    };
    let x = Tensor::from_slice(gpu, &[1.0f32, -2.5, 3.25, 4.0, 5.0, 6.0], [2, 3]);
    same(x.to_string(), "[[1.0000, -2.5000, 3.2500],\n [4.0000, 5.0000, 6.0000]]", "[2, 3] f32");
    same(format!("{:.1}", x.t()), "[[1.0, 4.0],\n [-2.5, 5.0],\n [3.2, 6.0]]", "[3, 2] f32");
    same(Tensor::scalar(gpu, 0.5).to_string(), "0.5000", "[] f32");
    same(Tensor::from_slice::<f32>(gpu, &[], [0]).to_string(), "[]", "[0] f32");
    same(Tensor::from_slice(gpu, &[-1i32, 7], [2]).to_string(), "[-1, 7]", "[2] i32");
    let half = Tensor::from_slice(gpu, &[f16::from_f32(0.5)], [1]);
    same(format!("{half:.2}"), "[0.50]", "[1] f16");
    let positions = Tensor::positions(gpu, 10_000);
    same(positions.to_string(), "[0, 1, 2, ..., 9997, 9998, 9999]", "[10000] u32");
    let deep = positions.slice(0, 0..36).reshape([18, 2]);
    let rows = "[[0, 1],\n [2, 3],\n [4, 5],\n ...,\n [30, 31],\n [32, 33],\n [34, 35]]";
    same(deep.to_string(), rows, "[18, 2] u32");
    let debug = format!("{:?}", x.requires_grad());
    assert!(debug.starts_with("Tensor([2, 3], f32, leaf, "), "{debug}");
}

#[test]
fn misuse_is_told_by_name() {
    let gpu = gpu();
    let ids = Tensor::positions(gpu, 3);
    let x = Tensor::zeros(gpu, [2, 3]);
    let told = |work: &dyn Fn() -> Tensor, text: &str| {
        let said = panic_of(work);
        assert!(said.contains(text), "{said:?} does not contain {text:?}");
    };
    told(&|| &ids + 1.0, "add: a number is f32, but the tensor [3] is u32; cast it");
    told(&|| 1.0 / &ids, "div: a number is f32, but the tensor [3] is u32; cast it");
    told(&|| Vec::<Tensor>::new().into_iter().sum(), "sum: an iterator without tensors");
    told(&|| x.sum([0, 0]), "sum: [0, 0] names an axis of [2, 3] twice");
    told(&|| x.sum([]), "sum: no axes of [2, 3] are named");
    told(&|| x.mean_keepdim([1, 2]), "mean: axis 2 is outside shape [2, 3]");
    told(&|| ids.sum(0), "sum: needs floats, got u32");
    told(&|| x.var(1, 3), "var: 3 elements along axes [1] of [2, 3] with correction 3");
    told(&|| x.norm_p(-1.0, 0), "norm: p is -1");
    told(&|| Tensor::arange(gpu, 0.0, 1.0, -0.5), "arange: a step of -0.5 does not lead from 0 to 1");
    told(&|| Tensor::arange(gpu, 0.0, 1.0, 0.0), "arange: a step of 0");
    told(&|| x.one_hot(4), "one_hot: ids must be u32 or i32, got f32");
    told(&|| ids.tril(0), "tril: needs at least two axes, got [3]");
    told(&|| x.masked_fill(&x, 0.0), "masked_fill: the mask must be u32 or i32");
    told(&|| ids.masked_fill(&Tensor::positions(gpu, 4), 0.0), "masked_fill: [4] does not expand to [3]");
    told(&|| x.chunk(0, 0).remove(0), "chunk: into 0 pieces");
    told(&|| x.repeat([2]), "repeat: [2, 3] has 2 axes");
    told(&|| x.flatten(1, 0), "flatten: axis 1 is behind axis 0");
    told(&|| x.unflatten(1, [2, 2]), "unflatten: [2, 2] has 4 elements, axis 1 of [2, 3] not");
    told(&|| x.slice_step(1, 0..3, 0), "slice_step: a step of 0");
    told(&|| x.bmm(&x), "bmm: needs [batch, m, k]");
    told(&|| Tensor::einsum("i->i", &[&ids]), "einsum: operand 0 of \"i->i\" is u32, not float");
    told(
        &|| Tensor::zeros(gpu, [3]).to_vec2::<f32>().map(|_| x.clone()).unwrap(),
        "to_vec2: [3] has not two axes",
    );
}

#[test]
fn adjacent_axes_are_one_reduction() {
    let gpu = quiet();
    let x = Tensor::ones(&gpu, [4, 6, 8, 2]);
    x.evaluate();
    let launches = |work: &dyn Fn() -> Tensor| {
        let before = gpu.dispatches();
        let y = work();
        y.evaluate();
        gpu.dispatches() - before
    };
    assert_eq!(launches(&|| x.sum([1, 2])), launches(&|| x.reshape([4, 48, 2]).sum(1)));
    assert_eq!(launches(&|| x.sum([1, 2])), 1);
    assert_eq!(launches(&|| x.mean([0, -1])), 2);
}

#[test]
fn a_read_can_be_polled() {
    let gpu = gpu();
    let x = Tensor::from_slice(gpu, &[1.0f32, 2.0, 3.0], [3]).scale(2.0);
    let mut reading = x.read::<f32>().unwrap();
    // Work recorded later does not change what this readback returns.
    let later = x.scale(10.0);
    let bytes = loop {
        match reading.poll().unwrap() {
            Some(bytes) => break bytes,
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    };
    assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&bytes), [2.0, 4.0, 6.0]);
    let again = reading.poll().expect_err("the bytes are gone").to_string();
    assert!(again.contains("already taken"), "{again}");
    drop(x.read::<f32>().unwrap());
    assert_eq!(later.to_vec::<f32>().unwrap(), [20.0, 40.0, 60.0]);
    let wrong = panic_of(|| x.to_vec::<u32>());
    assert_eq!(wrong, "to_vec: asked for u32 of a tensor of f32");
}

#[test]
fn uploads_do_not_overtake_recorded_work() {
    let gpu = quiet();
    let mut sums = Vec::new();
    for i in 0..700u32 {
        // Its buffer is free again at once, while the sum that reads it is still unsubmitted.
        let x = Tensor::from_slice(&gpu, &[i as f32; 64], [64]);
        sums.push(x.sum_all());
    }
    for (i, sum) in sums.iter().enumerate() {
        assert_eq!(sum.item().unwrap(), 64.0 * i as f32);
    }
}

// Recording and fusion

#[test]
fn a_long_chain_equals_the_host() {
    let gpu = gpu();
    let x = normal(1, 77);
    // Halving is exact, so a fused multiply-add rounds like two operations.
    let mut want = x.clone();
    let mut y = Tensor::from_slice(gpu, &x, [7, 11]);
    let start = y.clone();
    let mut words: Vec<u32> = (0..77).map(|i| i * 7919).collect();
    let mut z = Tensor::from_slice(gpu, &words, [77]);
    let step = Tensor::from_slice(gpu, &(1..78u32).map(|i| i * i * 31).collect::<Vec<_>>(), [77]);
    for i in 0..200 {
        y = match i % 4 {
            0 => y.affine(0.5, 1.0),
            1 => y.sub(&start),
            2 => y.neg(),
            _ => y.maximum(&start),
        };
        for (w, x) in want.iter_mut().zip(&x) {
            *w = match i % 4 {
                0 => *w * 0.5 + 1.0,
                1 => *w - x,
                2 => -*w,
                _ => w.max(*x),
            };
        }
        z = if i % 2 == 0 { z.mul(&step) } else { z.add(&step) };
        for (i2, w) in words.iter_mut().enumerate() {
            let s = (i2 as u32 + 1) * (i2 as u32 + 1) * 31;
            *w = if i % 2 == 0 { w.wrapping_mul(s) } else { w.wrapping_add(s) };
        }
    }
    assert_eq!(y.to_vec::<f32>().unwrap(), want);
    assert_eq!(z.to_vec::<u32>().unwrap(), words);
}

#[test]
fn a_chain_is_one_kernel() {
    let gpu = quiet();
    let [x, y, z] = [1, 2, 3].map(|seed| drawn(&gpu, seed, &[33, 65]));
    let count = |work: &dyn Fn() -> Tensor| {
        let before = gpu.dispatches();
        work().to_vec::<f32>().unwrap();
        gpu.dispatches() - before
    };
    assert_eq!(count(&|| no_grad(|| x.mul(&y).add(&z).gelu())), 1, "no_grad");
    let w = x.requires_grad();
    // The same kernel stores the values that backward needs.
    assert_eq!(count(&|| w.mul(&y).add(&z).gelu()), 1, "recorded");
    // A row and a transposed view are read in place.
    let row = drawn(&gpu, 4, &[33]);
    assert_eq!(count(&|| x.t().mul(&row).add(&y.t()).relu()), 1, "strided");
    assert_eq!(count(&|| x.clone()), 0, "nothing to do");
    // 200 operations in kernels of at most 40.
    assert_eq!(count(&|| (0..200).fold(x.clone(), |acc, _| acc.neg())), 5);
    // An intermediate value with a handle is not computed again.
    let middle = x.mul(&y);
    assert_eq!(count(&|| middle.add(&z)), 1);
    assert_eq!(count(&|| middle.clone()), 0, "stored on the way");
}

#[test]
fn values_computed_meanwhile_still_fit_one_kernel() {
    let gpu = gpu();
    // Each tensor is only a constant until it is read. Then it is a buffer, and a kernel can bind only a few buffers.
    let ones: Vec<Tensor> = (0..24).map(|i| Tensor::full(gpu, [5], i as f32)).collect();
    let sum = ones[1..].iter().fold(ones[0].clone(), |sum, x| sum.add(x));
    for one in &ones {
        one.to_vec::<f32>().unwrap();
    }
    assert_eq!(sum.to_vec::<f32>().unwrap(), [276.0; 5]);
}

#[test]
fn twenty_thousand_ops_drop_without_recursion() {
    let gpu = gpu();
    let x = Tensor::ones(gpu, [4]).requires_grad();
    let y = (0..20_000).fold(x.clone(), |y, _| y.add(&x));
    assert_eq!(y.to_vec::<f32>().unwrap(), [20_001.0; 4]);
    let grads = y.sum_all().backward().unwrap();
    assert_eq!(grads.get(&x).unwrap().to_vec::<f32>().unwrap(), [20_001.0; 4]);
    drop(y);
}

#[test]
fn pending_views_do_not_pile_up() {
    let gpu = gpu();
    // Each step reads the last one transposed, so they cannot be fused. No value is needed until the end.
    let x = Tensor::from_slice(gpu, &[1.0f32, 2.0, 3.0, 4.0], [2, 2]);
    let chain = |n: usize| no_grad(|| (0..n).fold(x.clone(), |y, _| y.t().affine(1.0, 1.0)));
    let y = chain(20_000);
    assert_eq!(y.to_vec::<f32>().unwrap(), [20_001.0, 20_002.0, 20_003.0, 20_004.0]);
    drop(chain(20_000));
}

#[test]
fn half_precision_chains_round_where_they_are_stored() {
    let gpu = gpu();
    let host: Vec<f16> = normal(1, 45).iter().map(|&v| f16::from_f32(v * 30.0)).collect();
    let x = Tensor::from_slice(gpu, &host, [45]);
    let fused = x.mul(&x).add(&x);
    let product = x.mul(&x);
    product.to_vec::<f16>().unwrap();
    let stored = product.add(&x);
    let want: Vec<f16> = host
        .iter()
        .map(|h| f16::from_f32(f16::from_f32(h.to_f32() * h.to_f32()).to_f32() + h.to_f32()))
        .collect();
    assert_eq!(fused.dtype(), DType::F16);
    assert_eq!(fused.to_vec::<f16>().unwrap(), want, "fused");
    assert_eq!(stored.to_vec::<f16>().unwrap(), want, "stored between");
    let host: Vec<bf16> = host.iter().map(|h| bf16::from_f32(h.to_f32())).collect();
    let x = Tensor::from_slice(gpu, &host, [45]);
    let fused = x.mul(&x).add(&x);
    let product = x.mul(&x);
    product.to_vec::<bf16>().unwrap();
    let stored = product.add(&x);
    let square = |h: &bf16| bf16::from_f32(h.to_f32() * h.to_f32()).to_f32();
    let want: Vec<bf16> = host.iter().map(|h| bf16::from_f32(square(h) + h.to_f32())).collect();
    assert_eq!(fused.dtype(), DType::Bf16);
    assert_eq!(fused.to_vec::<bf16>().unwrap(), want, "bf16, fused");
    assert_eq!(stored.to_vec::<bf16>().unwrap(), want, "bf16, stored between");
    assert_eq!(x.mul(&x.cast(DType::F16)).dtype(), DType::F32, "two types give f32");
}

/// Every pattern of 16 bits is exact in f32, subnormal numbers and infinities included, and comes back from there.
#[test]
fn every_half_pattern_survives_f32() {
    let gpu = gpu();
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let brains: Vec<bf16> = all.iter().map(|&b| bf16::from_bits(b)).collect();
    let x = Tensor::from_slice(gpu, &brains, [all.len()]);
    let wide = x.cast(DType::F32);
    let bits = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
    let want: Vec<u32> = brains.iter().map(|b| bits(&b.to_f32())).collect();
    assert_eq!(wide.to_vec::<f32>().unwrap().iter().map(bits).collect::<Vec<_>>(), want);
    let back = wide.cast(DType::Bf16).to_vec::<bf16>().unwrap();
    for (a, b) in brains.iter().zip(back) {
        assert!(
            a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
            "{:x} {:x}",
            a.to_bits(),
            b.to_bits()
        );
    }
}

// The same bits

/// Runs a few hundred ops of every sort with a backward pass, and returns all results as bits.
fn program(gpu: &Gpu, seed: u64) -> Vec<u32> {
    let theta = drawn(gpu, seed, &[24, 24]).scale(0.2).requires_grad();
    let gain = Tensor::ones(gpu, [24]).requires_grad();
    let mut all = Vec::new();
    for step in 0..6 {
        let mut x = drawn(gpu, seed * 100 + step, &[17, 24]);
        for _ in 0..6 {
            x = linear(&x, &theta).mul(&gain).gelu().add(&x);
            let top = x.max(1).unsqueeze(1);
            x = x.sub(&top).exp();
            x = x.div(&x.sum(-1).unsqueeze(1)).affine(3.0, -0.5);
            x = x.slice(1, 3..24).pad(1, 1, 2).add(&x.t().reshape([17, 24]));
        }
        let loss = x.square().mean_all();
        let grads = loss.backward().unwrap();
        all.extend(bits(&x));
        all.extend(bits(grads.get(&theta).unwrap()));
        all.extend(bits(grads.get(&gain).unwrap()));
    }
    all
}

#[test]
fn the_same_program_gives_the_same_bits() {
    let gpu = gpu();
    let first = program(gpu, 3);
    assert_ne!(first, program(gpu, 4));
    assert_eq!(first, program(gpu, 3), "again on this device");
    assert_eq!(first, program(&quiet(), 3), "on a second device of this adapter");
}

#[test]
fn two_threads_get_what_each_gets_alone() {
    let gpu = gpu();
    let alone = [program(gpu, 1), program(gpu, 2)];
    for round in 0..2 {
        // The second round uses a fresh device, on which both threads also compile every kernel at once.
        let gpu = if round == 0 { gpu.clone() } else { own() };
        let barrier = Barrier::new(2);
        let together = std::thread::scope(|scope| {
            [1, 2]
                .map(|seed| {
                    let (gpu, barrier) = (&gpu, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        program(gpu, seed)
                    })
                })
                .map(|thread| thread.join().expect("the thread"))
        });
        assert!(together == alone, "round {round}: other bits than alone");
    }
}
