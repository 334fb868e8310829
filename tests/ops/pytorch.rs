//! Layers and losses against numbers that PyTorch 2 computes in f64 for the same small inputs. The f64 references of the cases
//! are ours, so these numbers show that both follow PyTorch's definition: what a mean divides by, which variance, which edge is cut.

use crate::support::*;
use libtest_mimic::Trial;
use tiebeam::nn::{ConvTranspose2dConfig, CrossEntropy};
use tiebeam::{DType, Shape, Tensor};

fn up(data: &[f32], shape: impl Into<Shape>) -> Tensor {
    Tensor::from_slice(gpu(), data, shape.into())
}

fn count_up(n: usize, shape: impl Into<Shape>) -> Tensor {
    up(&(0..n).map(|i| i as f32).collect::<Vec<_>>(), shape)
}

#[track_caller]
fn near(name: &str, got: &Tensor, want: &[f64]) {
    within(name, &download(got), want, |i| 2e-6 * want[i].abs().max(1.0));
}

#[track_caller]
fn gradient(name: &str, y: &Tensor, dy: &Tensor, x: &Tensor, want: &[f64]) {
    let grads = y.backward_with_retain_graph(dy).expect("backward");
    near(name, grads.get(x).expect("a gradient"), want);
}

fn one() -> Tensor {
    Tensor::scalar(gpu(), 1.0)
}

pub fn trials() -> Vec<Trial> {
    let tests: [(&str, fn()); 9] = [
        ("cross_entropy", cross_entropy),
        ("losses", losses),
        ("batch_norm", batch_norm),
        ("group_norm", group_norm),
        ("conv_transpose2d", conv_transpose2d),
        ("shapes_of_losses_do_not_broadcast", refusals),
        ("gradients_at_the_edges", gradients_at_the_edges),
        ("empty_tensors", empty_tensors),
        ("ranges_and_numbers_as_they_are_written", ranges_and_numbers),
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::test(format!("pytorch::{name}"), move || {
            test();
            Ok(())
        })
    };
    tests.into_iter().map(trial).collect()
}

const LOGITS: [f32; 12] = [1.0, 2.0, -1.0, 0.5, 0.0, -2.0, 3.0, 1.0, 2.0, 2.0, 0.25, -0.5];

fn cross_entropy() {
    let x = up(&LOGITS, [3, 4]).requires_grad();
    let t = Tensor::from_slice(gpu(), &[2i32, -100, 0], [3]);
    let weight = up(&[0.5, 1.0, 2.0, 1.5], [4]);
    let ignoring = CrossEntropy::default().ignore(Some(-100));
    let both = ignoring.smoothing(0.1).weight(Some(&weight));
    let loss = x.cross_entropy_with(&t, both);
    near("both", &loss, &[2.88840215]);
    let want = [
        0.16764002,
        0.45928423,
        -0.71663571,
        0.08971147,
        0.0,
        0.0,
        0.0,
        0.0,
        -0.08304327,
        0.09195673,
        -0.00228258,
        -0.00663088,
    ];
    gradient("both, dx", &loss, &one(), &x, &want);
    near("each", &x.cross_entropy_each(&t, both), &[6.57197515, 0.0, 0.64903021]);
    near("smoothing", &x.cross_entropy_with(&t, ignoring.smoothing(0.1)), &[2.12623135]);
    near("weight", &x.cross_entropy_with(&t, ignoring.weight(Some(&weight))), &[2.95885168]);
    let plain = x.cross_entropy_with(&t, ignoring).item().expect("readback");
    assert_eq!(plain, x.cross_entropy(&t, Some(-100)).item().expect("readback"), "the plain call");
}

fn losses() {
    let x = up(&LOGITS, [3, 4]).requires_grad();
    let log = x.log_softmax(-1);
    let p = up(&[0.1, 0.2, 0.3, 0.4, 0.25, 0.25, 0.5, 0.0, 1.0, 0.0, 0.0, 0.0], [3, 4]);
    let loss = log.kl_div(&p);
    near("kl_div", &loss, &[0.92155102]);
    let want = [
        0.04140261,
        0.13648668,
        -0.08988559,
        -0.08800369,
        -0.06940914,
        -0.0814489,
        0.11300817,
        0.03784987,
        -0.18556996,
        0.14776338,
        0.02567742,
        0.01212916,
    ];
    gradient("kl_div, dx", &loss, &one(), &x, &want);
    let t = Tensor::from_slice(gpu(), &[2i32, -100, 0], [3]);
    near("nll_loss", &log.nll_loss(&t, Some(-100)), &[2.15435635]);
    let a = up(&[0.5, -2.0, 3.0, 0.0], [4]).requires_grad();
    let loss = a.huber_loss(&up(&[0.0, 0.0, 1.0, 4.0], [4]), 1.5);
    near("huber_loss", &loss, &[2.1875]);
    gradient("huber_loss, dx", &loss, &one(), &a, &[0.125, -0.375, 0.375, -0.375]);
    let weight = up(&[2.0, 1.0, 3.0, 0.5], [4]);
    let loss = a.bce_with_logits(&up(&[1.0, 0.0, 0.25, 1.0], [4]), Some(&weight));
    near("bce_with_logits", &loss, &[0.93613415]);
    gradient("bce_with_logits, dx", &loss, &one(), &a, &[-0.18877033, 0.02980073, 0.1697153, -0.0625]);
}

const IMAGE: [f32; 12] = [1.0, 2.0, 3.0, -1.0, 0.0, 4.0, 2.0, 2.0, -1.0, 1.0, 0.5, 1.0];

fn batch_norm() {
    let x = up(&IMAGE, [3, 2, 2]).requires_grad();
    let (g, h) = (up(&[2.0, -1.0], [2]).requires_grad(), up(&[0.5, 0.25], [2]).requires_grad());
    let (y, mean, var) = x.batch_norm(Some(&g), Some(&h), 1e-3);
    let want = [
        0.28804329,
        1.55978356,
        -1.11368236,
        2.0033059,
        -0.98369699,
        4.10326412,
        -0.3344353,
        -0.3344353,
        -2.25543726,
        0.28804329,
        0.8344353,
        0.44481177,
    ];
    near("y", &y, &want);
    near("mean", &mean, &[1.16666667, 1.25]);
    // PyTorch keeps the unbiased variance of 6 elements.
    near("var", &var.scale(6.0 / 5.0), &[2.96666667, 1.975]);
    let dy = count_up(12, [3, 2, 2]);
    let want = [
        -5.84424047,
        -3.84404481,
        2.98907219,
        3.3927728,
        -1.48573476,
        2.69982708,
        0.16782084,
        -0.61142622,
        2.87277096,
        5.60142201,
        -2.50556204,
        -3.43267757,
    ];
    gradient("dx", &y, &dy, &x, &want);
    gradient("dweight", &y, &dy, &g, &[-5.40489617, -2.9221765]);
    gradient("dbias", &y, &dy, &h, &[27.0, 39.0]);
    let y = x.batch_norm_with(&up(&[1.0, 2.0], [2]), &up(&[4.0, 0.25], [2]), Some(&g), Some(&h), 1e-3);
    let want = [
        0.5,
        1.49987502,
        -1.74601196,
        6.23803588,
        -0.49987502,
        3.49962507,
        0.25,
        0.25,
        -1.49975005,
        0.5,
        3.24401794,
        2.24601196,
    ];
    near("given statistics", &y, &want);
}

fn group_norm() {
    let x = up(&IMAGE, [1, 4, 3]).requires_grad();
    let (g, h) = (up(&[2.0, -1.0, 0.5, 1.0], [4]), up(&[0.5, 0.25, 0.0, -1.0], [4]));
    let y = x.group_norm(2, Some(&g), Some(&h), 1e-3);
    let want = [
        -0.08543969,
        1.08543969,
        2.25631907,
        1.71359923,
        1.12815954,
        -1.21359923,
        0.53224362,
        0.53224362,
        -0.94166179,
        -0.91811637,
        -1.40941817,
        -0.91811637,
    ];
    near("y", &y, &want);
    let want = [
        0.71920861,
        1.62255015,
        2.52589169,
        -0.50203477,
        -1.3550123,
        -3.01060338,
        -3.14946513,
        -2.65816333,
        -3.64922629,
        2.25203491,
        2.98757772,
        4.21724212,
    ];
    gradient("dx", &y, &count_up(12, [1, 4, 3]), &x, &want);
    let want = [
        -1.94765469,
        0.5,
        2.94765469,
        1.17572092,
        0.71286046,
        -1.13858138,
        0.35346504,
        0.35346504,
        -0.70693007,
        -0.29917254,
        -2.40165493,
        -0.29917254,
    ];
    near("instance_norm", &x.instance_norm(Some(&g), Some(&h), 1e-3), &want);
}

/// Whole numbers, so the results are exact.
fn conv_transpose2d() {
    let x = up(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1, 2, 2, 2]).requires_grad();
    let w: Vec<f32> = (0..36).map(|i| (i % 7) as f32 - 3.0).collect();
    let w = up(&w, [2, 2, 3, 3]).requires_grad();
    let conv = ConvTranspose2dConfig::default();
    let double = conv.stride([2, 2]).padding([1, 1]).output_padding([1, 1]);
    let y = x.conv_transpose2d(&w, Some(&up(&[1.0, -1.0], [2])), double);
    let want = [
        -8, -20, -9, -1, 11, 29, 9, 29, -10, -24, -11, 1, -1, 21, -3, 9, 2, -1, 5, -1, -8, 1, -9, -31, 8, -3,
        11, -5, 17, -14, 19, -25,
    ];
    near("y", &y, &want.map(f64::from));
    let dy: Vec<f32> = (0..32).map(|i| (i % 5) as f32).collect();
    let dy = up(&dy, [1, 2, 4, 4]);
    gradient("dx", &y, &dy, &x, &[-13.0, -2.0, 1.0, -14.0, 2.0, -4.0, 1.0, -3.0]);
    let want = [
        0, 16, 8, 18, 13, 23, 12, 28, 13, 4, 8, 15, 4, 23, 18, 18, 13, 23, 0, 36, 16, 38, 33, 59, 24, 72, 33,
        8, 16, 31, 12, 59, 50, 38, 33, 59,
    ];
    gradient("dw", &y, &dy, &w, &want.map(f64::from));
    let w: Vec<f32> = (0..8).map(|i| (i % 5) as f32 - 2.0).collect();
    let y = x.conv_transpose2d(&up(&w, [2, 1, 2, 2]), None, conv.dilation([2, 2]).groups(2));
    let want = [
        -2, -4, -1, -2, -6, -8, -3, -4, 0, 0, 1, 2, 0, 0, 3, 4, 10, 12, -10, -12, 14, 16, -14, -16, -5, -6,
        0, 0, -7, -8, 0, 0,
    ];
    near("groups and dilation", &y, &want.map(f64::from));
}

/// What a loss refuses, and that the message names both shapes.
fn refusals() {
    let (x, row) = (up(&[0.0; 6], [2, 3]), up(&[0.0; 3], [3]));
    let ids = Tensor::from_slice(gpu(), &[0u32; 6], [2, 3]);
    let says = |work: &dyn Fn() -> Tensor, words: &[&str]| {
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).expect_err("it is refused");
        let told = told.downcast_ref::<String>().expect("a message").clone();
        assert!(words.iter().all(|word| told.contains(word)), "{told}");
    };
    says(&|| x.mse_loss(&row), &["mse_loss", "[2, 3]", "[3]"]);
    says(&|| x.l1_loss(&row), &["l1_loss", "[2, 3]", "[3]"]);
    says(&|| x.huber_loss(&row, 1.0), &["huber_loss", "[2, 3]", "[3]"]);
    says(&|| x.bce_with_logits(&row, None), &["bce_with_logits", "[2, 3]", "[3]"]);
    says(&|| x.kl_div(&row), &["kl_div", "[2, 3]", "[3]"]);
    says(&|| x.mse_loss(&ids), &["mse_loss", "u32", "cast"]);
    let targets = Tensor::from_slice(gpu(), &[0u32; 2], [2]);
    let weight = CrossEntropy::default().weight(Some(&targets));
    says(&|| x.cross_entropy_with(&targets, weight), &["cross_entropy_with", "[3]", "[2]"]);
    says(&|| x.nll_loss(&row.slice(0, 0..2), None), &["nll_loss", "f32"]);
}

/// Gradients that a formula as it stands would make infinite or NaN. PyTorch 2 gives these numbers in f32.
fn gradients_at_the_edges() {
    let slope = |name: &str, x: &[f32], forward: fn(&Tensor) -> Tensor, want: &[f64]| {
        let x = up(x, [x.len()]).requires_grad();
        let y = forward(&x);
        gradient(name, &y, &y.ones_like(), &x, want);
    };
    // The sum of the powers is 0, though no element is.
    slope("norm 8 of small ones", &[2e-6, 2e-6], |x| x.norm_p(8.0, 0), &[0.0, 0.0]);
    slope("norm 3 of small ones", &[1e-16, 0.0], |x| x.norm_p(3.0, 0), &[0.0, 0.0]);
    // Products of some elements overflow, the product of all does not.
    let ends = |n: usize| [vec![0.4; n], vec![2.5; n]].concat();
    let x = up(&ends(100), [200]).requires_grad();
    let dx = download(x.prod(0).backward().unwrap().get(&x).unwrap());
    within("prod of many", &dx, &ends(100).iter().map(|&x| 1.0 / x as f64).collect::<Vec<_>>(), |_| 1e-3);
    let x = up(&[1e-20, 1e-20, 1e20, 1e20, 1.0], [5]).requires_grad();
    let y = x.cumprod(0);
    let dx = download(y.backward_with(&y.ones_like()).unwrap().get(&x).unwrap());
    let want = [2e20, 2e20, 2e-20, 2e-20, 1.0];
    within("cumprod of far ones", &dx, &want, |i| 1e-5 * want[i]);
    slope("prod below f32", &[1e-25, 1e-25], |x| x.prod(0), &[1e-25, 1e-25]);
    slope("prod above f32", &[1e20, 1e20], |x| x.prod(0).scale(1e-20), &[1.0, 1.0]);
    slope("cumprod below f32", &[1e-25, 1e-25], |x| x.cumprod(0).select(0, 1), &[1e-25, 1e-25]);
    slope("cumprod with a zero", &[2.0, 0.0, 3.0, 4.0], |x| x.cumprod(0), &[1.0, 32.0, 0.0, 0.0]);
    // All rows are ignored, and the ignored id is a class.
    let x = up(&[-0.5, -1.0, -2.0, -0.25], [2, 2]).requires_grad();
    let targets = Tensor::from_slice(gpu(), &[1u32, 1], [2]);
    let loss = x.nll_loss(&targets, Some(1));
    assert!(loss.item().unwrap().is_nan());
    gradient("nll_loss of ignored rows", &loss, &one(), &x, &[0.0; 4]);
    // A step that is larger than the axis.
    slope("slice_step", &[1.0, 2.0, 3.0, 4.0], |x| x.slice_step(0, 1.., usize::MAX), &[0.0, 1.0, 0.0, 0.0]);
}

fn empty_tensors() {
    // GPT-2's vocabulary, and a batch of none, on the kernels of either class.
    let x = Tensor::zeros(gpu(), [0, 50257]);
    for y in [x.max(1), x.logsumexp(1), x.norm_p(f32::INFINITY, 1), x.sum(1), x.prod(1)] {
        assert_eq!((y.shape()[..].to_vec(), download(&y).len()), (vec![0], 0));
    }
    for (shape, axis) in [([0, 3], 0), ([0, 3], 1), ([3, 0], 1)] {
        for forward in [|x: &Tensor, axis| x.cumprod(axis), |x: &Tensor, axis| x.prod(axis)] {
            let x = Tensor::zeros(gpu(), shape).requires_grad();
            let grads = forward(&x, axis).sum_all().backward().expect("there is a graph");
            assert_eq!(grads.get(&x).expect("a gradient").shape(), x.shape());
        }
    }
}

fn ranges_and_numbers() {
    assert_eq!(Tensor::arange(gpu(), 123456792.0, 123456808.0, 8.0).count(), 2);
    for (end, step, count) in [
        (2.1, 0.7, 3),
        (0.07, 0.01, 7),
        (0.3, 0.1, 3),
        (0.6, 0.1, 6),
        (1.1, 0.1, 11),
        (0.6, 0.2, 3),
        (0.7, 0.1, 7),
        (1.0, 0.25, 4),
    ] {
        assert_eq!(Tensor::arange(gpu(), 0.0, end, step).count(), count, "0 to {end} by {step}");
    }
    assert_eq!(download(&Tensor::linspace(gpu(), -3e38, 3e38, 2)), [-3e38f32 as f64, 3e38f32 as f64]);
    for dtype in [DType::F16, DType::Bf16] {
        let x = up(&[0.1, 0.3], [2]).cast(dtype);
        assert_eq!(x.eq(0.1).to_vec::<u32>().unwrap(), [1, 0], "{dtype}");
        assert_eq!(x.lt(0.1).to_vec::<u32>().unwrap(), [0, 0], "{dtype}");
    }
    // Two of 16 bits give f32, with or without a sum.
    let (a, b) = (up(&[300.0], [1]).cast(DType::F16), up(&[1e-3], [1, 1]));
    assert_eq!(download(&Tensor::einsum("i,j->ij", &[&a, &a])), [90000.0]);
    near("three of them", &Tensor::einsum("i,j,ij->", &[&a, &a, &b]), &[90.0]);
    // A tensor of small or large numbers is printed by powers of ten.
    let text = |x: f32| up(&[x, 0.0], [2]).to_string();
    assert!(text(1e-6).starts_with("[1.0000e-6, 0.0000e0]"), "{}", text(1e-6));
    assert!(text(12.5).starts_with("[12.5000, 0.0000]"), "{}", text(12.5));
}
