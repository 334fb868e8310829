//! Sums of up to 2^26 equal, alternating and sorted terms, whose rounding errors do not cancel. The bound is `(16 + 2 log2 n) u
//! sum|x|` for sums and prefixes, and `(16 + sqrt(K)) u sum|a b|` for products.

use crate::Long;
use crate::support::{U, download};
use tiebeam::{Gpu, Tensor};

/// Constants for inputs with equal terms, whose sums are not exact.
const CONSTANTS: [f32; 4] = [0.1, 0.7, 1.9999999, 3.3333333e-5];

/// Returns the inputs, by name.
fn inputs(n: usize) -> Vec<(String, Vec<f32>)> {
    let mut all: Vec<(String, Vec<f32>)> =
        CONSTANTS.iter().map(|&c| (format!("all {c}"), vec![c; n])).collect();
    all.push(("alternating".into(), (0..n).map(|i| if i % 2 == 0 { 0.1 } else { -0.07 }).collect()));
    all.push(("rising".into(), (0..n).map(|i| i as f32 / n as f32).collect()));
    all.push(("falling".into(), (0..n).map(|i| 1.0 / (1.0 + i as f32)).collect()));
    all
}

fn sum_bound(n: usize, magnitude: f64) -> f64 {
    (16.0 + 2.0 * (n.max(1) as f64).log2()) * U * magnitude
}

fn check(what: &str, got: f64, want: f64, bound: f64) {
    assert!(
        (got - want).abs() <= bound,
        "{what}: got {got:e}, want {want:e}, off by {:.2} bounds",
        (got - want).abs() / bound
    );
}

/// Returns `[outer, n, inner]` in which every sum over the middle axis has the same `n` terms.
fn placed(gpu: &Gpu, x: &[f32], [outer, inner]: [usize; 2]) -> Tensor {
    Tensor::from_slice(gpu, x, [1, x.len(), 1]).expand([outer, x.len(), inner]).contiguous()
}

fn sums(bits: u32, around: [usize; 2], tests: &mut Vec<Long>) {
    let n = 1usize << bits;
    let name = format!("sums of 2^{bits} terms, {} by {} of them", around[0], around[1]);
    tests.push(Long::new(name, n * around[0] * around[1], move |gpu| {
        for (kind, x) in inputs(n) {
            let (total, magnitude) =
                x.iter().fold((0.0, 0.0), |(s, m), &v| (s + v as f64, m + v.abs() as f64));
            let bound = sum_bound(n, magnitude);
            let all = placed(gpu, &x, around);
            for got in download(&all.sum(1)) {
                check(&format!("sum, {kind}"), got, total, bound);
            }
            for got in download(&all.mean(1)) {
                let count = n as f64;
                check(
                    &format!("mean, {kind}"),
                    got,
                    total / count,
                    bound / count + 2.0 * U * total.abs() / count,
                );
            }
            prefixes(&kind, &x, &all);
            drop(all);
            if around == [1, 1] {
                norms(gpu, &kind, &x);
            }
        }
    }));
}

/// Compares each prefix sum with that of its own terms.
fn prefixes(kind: &str, x: &[f32], all: &Tensor) {
    let inner = all.shape()[2];
    let got = all.cumsum(1).slice(0, 0..1).contiguous().to_vec::<f32>().expect("readback");
    let (mut sum, mut magnitude) = (0.0, 0.0);
    for (i, &v) in x.iter().enumerate() {
        sum += v as f64;
        magnitude += v.abs() as f64;
        for got in &got[i * inner..(i + 1) * inner] {
            check(&format!("cumsum at {i}, {kind}"), *got as f64, sum, sum_bound(i + 1, magnitude) + 1e-37);
        }
    }
}

/// Checks the statistics of a row by the results of norms.
fn norms(gpu: &Gpu, kind: &str, x: &[f32]) {
    let n = x.len() as f64;
    let row = Tensor::from_slice(gpu, x, [1, x.len()]);
    let mean = x.iter().map(|&v| v as f64).sum::<f64>() / n;
    let square = x.iter().map(|&v| (v as f64).powi(2)).sum::<f64>() / n;
    let variance = x.iter().map(|&v| (v as f64 - mean).powi(2)).sum::<f64>() / n;
    let relative = (24.0 + 2.0 * n.log2()) * U;
    let last = x[x.len() - 1] as f64;
    let end = |y: &Tensor| download(&y.slice(1, x.len() - 1..x.len()).contiguous())[0];
    let want = last / square.sqrt();
    check(&format!("rms_norm, {kind}"), end(&row.rms_norm(None, 0.0)), want, relative * want.abs());
    // For equal terms the result is only rounding error. Other inputs have a deviation of their own size.
    let eps = 1e-3;
    let want = (last - mean) / (variance + eps as f64).sqrt();
    let scale = (last.abs() + mean.abs()) / (variance + eps as f64).sqrt();
    check(&format!("layer_norm, {kind}"), end(&row.layer_norm(None, None, eps)), want, relative * scale);
}

/// Checks `[m, k] x [k, n]` with the same terms for every element.
fn products(k: usize, [m, n]: [usize; 2], tests: &mut Vec<Long>) {
    tests.push(Long::new(format!("products {m} x {k} x {n}"), k * m.max(n), move |gpu| {
        for (kind, x) in inputs(k) {
            let factor = 0.7f32;
            let terms = || x.iter().map(|&v| v as f64 * factor as f64);
            let (want, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            let bound = (16.0 + (k as f64).sqrt()) * U * magnitude;
            let a = Tensor::from_slice(gpu, &x, [1, k]).expand([m, k]).contiguous();
            let b = Tensor::full(gpu, [k, n], factor).contiguous();
            let turned = |x: &Tensor| x.t().contiguous().t();
            for (layout, y) in [("plain", a.matmul(&b)), ("transposed", turned(&a).matmul(&turned(&b)))] {
                for got in download(&y) {
                    check(&format!("{layout}, {kind}"), got, want, bound);
                }
            }
        }
    }));
}

/// Checks gradients that are sums over rows: of a bias, of a norm's gain and shift, of a weight, of a lookup.
fn gradients(bits: u32, tests: &mut Vec<Long>) {
    let n = 1usize << bits;
    tests.push(Long::new(format!("gradients over 2^{bits} rows"), 4 * n, move |gpu| {
        for c in CONSTANTS {
            let dy = Tensor::full(gpu, [n, 4], c).contiguous();
            let (want, bound) = (n as f64 * c as f64, sum_bound(n, n as f64 * c as f64));
            let leaf = || Tensor::ones(gpu, [4]).contiguous().requires_grad();
            let (bias, shift, gain) = (leaf(), leaf(), leaf());
            // All rows are equal, so x^ is the same in every row.
            let x = Tensor::ones(gpu, [n, 4]).contiguous();
            let y =
                x.add(&bias).add(&x.rms_norm(Some(&gain), 0.0)).add(&x.layer_norm(None, Some(&shift), 1.0));
            let grads = y.backward_with(&dy).expect("backward");
            for (what, leaf) in [("bias", &bias), ("shift", &shift), ("gain", &gain)] {
                for got in download(grads.get(leaf).expect("a gradient")) {
                    check(&format!("{what}, all {c}"), got, want, bound + 4.0 * U * want);
                }
            }
            let table = Tensor::ones(gpu, [2, 4]).contiguous().requires_grad();
            let ids = Tensor::from_slice(gpu, &vec![1u32; n], [n]);
            let grads = table.embedding(&ids).backward_with(&dy).expect("backward");
            for got in &download(grads.get(&table).expect("a gradient"))[4..] {
                check(&format!("embedding, all {c}"), *got, want, bound);
            }
            let logits = x.requires_grad();
            let loss = logits.cross_entropy(&ids, None).item().expect("readback") as f64;
            check("cross_entropy's mean", loss, 4f64.ln(), sum_bound(n, 4f64.ln()));
        }
    }));
}

pub fn all(long: bool) -> Vec<Long> {
    let mut tests = Vec::new();
    for (bits, around) in
        [(10, [3, 1]), (10, [2, 3]), (12, [130, 1]), (13, [1, 4]), (16, [1, 3]), (20, [1, 1])]
    {
        sums(bits, around, &mut tests);
    }
    for k in [33, 64, 100, 1000, 4096, 1 << 14, 1 << 16, 1 << 20] {
        products(k, [3, 5], &mut tests);
        if k <= 1 << 16 {
            products(k, [20, 36], &mut tests);
        }
    }
    products(1 << 12, [130, 132], &mut tests);
    gradients(if long { 21 } else { 17 }, &mut tests);
    if long {
        sums(16, [100, 4], &mut tests);
        for bits in [22, 24, 25, 26] {
            sums(bits, [1, 1], &mut tests);
        }
        sums(23, [1, 4], &mut tests);
    }
    tests
}
