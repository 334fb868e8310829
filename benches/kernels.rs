//! Times the kernels: each row is checked against f64 on a sample of entries before it is timed.
//!
//!     make bench            or  cargo bench -- matmul      for rows whose name contains a word
//!
//! Wall time of many calls with the device kept busy, median of several samples. `copy` is the ceiling for the
//! memory-bound rows; no number means anything without the adapter that the first line names.

use std::time::Instant;
use tiebeam::{Gpu, Rng, Tensor, no_grad};

struct Row {
    name: String,
    /// Bytes that must move.
    bytes: f64,
    /// Floating-point operations that must happen; 0 for memory-bound rows.
    flops: f64,
    run: Box<dyn Fn() -> Tensor>,
    /// Index and expected value of sampled elements, with the allowed error.
    check: Vec<(usize, f64, f64)>,
}

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut data = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut data);
    data
}

fn matmul(gpu: &Gpu, m: usize, n: usize, k: usize) -> Row {
    let (a, b) = (normal(m * k, 1), normal(k * n, 2));
    let samples = [(0, 0), (m / 2, n / 3), (m - 1, n - 1)];
    let check = samples
        .iter()
        .map(|&(row, col)| {
            let terms = (0..k).map(|q| a[row * k + q] as f64 * b[q * n + col] as f64);
            let norm = terms.clone().map(|t| t * t).sum::<f64>().sqrt();
            (row * n + col, terms.sum(), 4.0 * 2f64.powi(-24) * (k as f64).sqrt() * norm)
        })
        .collect();
    let (a, b) = (Tensor::from_slice(gpu, &a, [m, k]), Tensor::from_slice(gpu, &b, [k, n]));
    Row {
        name: format!("matmul {m}x{n}x{k}"),
        bytes: 4.0 * (m * k + k * n + m * n) as f64,
        flops: 2.0 * (m * n * k) as f64,
        run: Box::new(move || a.matmul(&b)),
        check,
    }
}

/// A row over `[rows, width]` whose reference is a function of one row of the inputs.
fn rows(
    gpu: &Gpu,
    name: &str,
    [rows, width]: [usize; 2],
    arrays: usize,
    run: impl Fn(&[Tensor]) -> Tensor + 'static,
    reference: impl Fn(&[&[f32]], usize) -> f64,
) -> Row {
    let data: Vec<Vec<f32>> = (0..arrays).map(|i| normal(rows * width, 3 + i as u64)).collect();
    let check = [0, rows * width / 2, rows * width - 1]
        .iter()
        .map(|&i| {
            let row: Vec<&[f32]> = data.iter().map(|d| &d[i / width * width..][..width]).collect();
            let want = reference(&row, i % width);
            (i, want, 1e-4 * want.abs() + 1e-6)
        })
        .collect();
    let inputs: Vec<Tensor> = data.iter().map(|d| Tensor::from_slice(gpu, d, [rows, width])).collect();
    Row {
        name: format!("{name} {rows}x{width}"),
        bytes: 4.0 * (rows * width * (arrays + 1)) as f64,
        flops: 0.0,
        run: Box::new(move || run(&inputs)),
        check,
    }
}

fn all(gpu: &Gpu) -> Vec<Row> {
    let large = if gpu.is_software() { 512 } else { 2048 };
    let tall = if gpu.is_software() { 1024 } else { 16384 };
    let mean = |x: &[f32]| x.iter().map(|&v| v as f64).sum::<f64>() / x.len() as f64;
    vec![
        rows(gpu, "copy", [tall, 1024], 1, |x| x[0].affine(1.0, 0.0), |x, i| x[0][i] as f64),
        rows(
            gpu,
            "gelu(x*y+z)",
            [tall, 1024],
            3,
            |x| x[0].mul(&x[1]).add(&x[2]).gelu_tanh(),
            |x, i| {
                let v = x[0][i] as f64 * x[1][i] as f64 + x[2][i] as f64;
                0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v)).tanh())
            },
        ),
        rows(
            gpu,
            "softmax",
            [tall, 1024],
            1,
            |x| x[0].softmax(-1),
            |x, i| (x[0][i] as f64).exp() / x[0].iter().map(|&v| (v as f64).exp()).sum::<f64>(),
        ),
        rows(
            gpu,
            "layer_norm",
            [tall, 768],
            1,
            |x| x[0].layer_norm(None, None, 1e-5),
            move |x, i| {
                let m = mean(x[0]);
                let var = x[0].iter().map(|&v| (v as f64 - m).powi(2)).sum::<f64>() / x[0].len() as f64;
                (x[0][i] as f64 - m) / (var + 1e-5).sqrt()
            },
        ),
        matmul(gpu, 256, 256, 256),
        matmul(gpu, large, large, large),
        matmul(gpu, 2 * large, 384, 384),
        matmul(gpu, 8, large, large),
    ]
}

fn main() -> Result<(), tiebeam::Error> {
    let gpu = Gpu::open()?;
    let filter: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    println!("{}", gpu.adapter());
    println!("{:<28} {:>10} {:>19} {:>10} {:>10}", "kernel", "median ms", "min - max ms", "GB/s", "GFLOP/s");
    for row in all(&gpu) {
        if filter.is_empty() || filter.iter().any(|f| row.name.contains(f)) {
            time(&gpu, &row)?;
        }
    }
    Ok(())
}

fn time(gpu: &Gpu, row: &Row) -> Result<(), tiebeam::Error> {
    let got = no_grad(|| (row.run)()).to_vec::<f32>()?;
    for &(i, want, bound) in &row.check {
        assert!(
            (got[i] as f64 - want).abs() <= bound,
            "{}: element {i} is {}, want {want}: no time is printed for a wrong result",
            row.name,
            got[i]
        );
    }
    let sample = |count: usize| -> Result<f64, tiebeam::Error> {
        gpu.synchronize()?;
        let started = Instant::now();
        for _ in 0..count {
            no_grad(|| (row.run)()).contiguous().evaluate();
        }
        gpu.synchronize()?;
        Ok(started.elapsed().as_secs_f64() / count as f64)
    };
    let once = sample(2)?;
    let count = ((0.1 / once) as usize).clamp(1, 200);
    let mut times = (0..7).map(|_| sample(count)).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let rate = |amount: f64| if amount > 0.0 { format!("{:.2}", amount / median * 1e-9) } else { "-".into() };
    let spread = format!("{:.3} - {:.3}", times[0] * 1e3, times[times.len() - 1] * 1e3);
    println!(
        "{:<28} {:>10.3} {spread:>19} {:>10} {:>10}",
        row.name,
        median * 1e3,
        rate(row.bytes),
        rate(row.flops)
    );
    Ok(())
}
