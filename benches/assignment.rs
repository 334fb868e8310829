//! Benchmarks exact linear assignment on four families of instances, by the host alone and with prices from the device.
//!
//!     cargo bench --bench assignment [-- WORD...] [-- --sizes N,N] [--write DIR] [--json FILE]
//!
//! uni:   independent uniform entries, least sum.
//! corr:  X Y^T of independent standard normal X, Y [n, n], greatest sum, as the others.
//! plant: the same with Y a permutation of X and noise of 1.5 times its scale.
//! lowr:  rank 32 with rows of log-normal length: the hard ones, nearest to the costs of weight matching.
//!
//! `--write` stores the instances (safetensors) for `scripts/peer-assignment.py`, which times scipy on the same bytes. Times of
//! the host are thread times, on which other load has little influence. Times of the device are wall times, from a matrix on the
//! device to the proved result.

use clap::Parser;
use cpu_time::ThreadTime;
use serde_json::json;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tiebeam::linalg::assignment::{Assignment, Goal, assign};
use tiebeam::store::{Entry, save};
use tiebeam::{Error, Gpu, Result, Rng, Tensor, files, no_grad};

const FAMILIES: [&str; 4] = ["uni", "corr", "plant", "lowr"];

#[derive(Parser)]
struct Args {
    /// Families to run. The default is all.
    words: Vec<String>,
    /// Rows and columns of the instances.
    #[arg(long, value_delimiter = ',', default_values_t = [512, 1024, 2048, 4096])]
    sizes: Vec<usize>,
    /// Writes the instances to this folder.
    #[arg(long)]
    write: Option<PathBuf>,
    /// Adds the results to this file, one line each.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Runs the device's path on software drivers too, where it is slow beyond n = 1024.
    #[arg(long)]
    device: bool,
    /// Passed by cargo and ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

fn normal(rng: &mut Rng, count: usize) -> Vec<f32> {
    let mut x = vec![0.0; count];
    rng.fill_normal(&mut x);
    x
}

/// Draws a normal matrix `[n, rank]` and scales each row by `exp` of a normal draw.
fn uneven(rng: &mut Rng, n: usize, rank: usize) -> Vec<f32> {
    let (mut x, length) = (normal(rng, n * rank), normal(rng, n));
    x.chunks_mut(rank).zip(length).for_each(|(row, l)| row.iter_mut().for_each(|x| *x *= l.exp()));
    x
}

/// Creates an instance on the device.
fn instance(gpu: &Gpu, family: &str, n: usize) -> Tensor {
    let mut rng = Rng::new(n as u64);
    let product = |x: &[f32], y: &[f32], rank: usize| {
        let [x, y] = [x, y].map(|side| Tensor::from_slice(gpu, side, [n, rank]));
        no_grad(|| x.matmul(&y.t()))
    };
    match family {
        "uni" => {
            let mut c = vec![0.0; n * n];
            rng.fill_uniform(&mut c);
            Tensor::from_slice(gpu, &c, [n, n])
        }
        "corr" => {
            let (x, y) = (normal(&mut rng, n * n), normal(&mut rng, n * n));
            product(&x, &y, n)
        }
        "plant" => {
            let (x, noise) = (normal(&mut rng, n * n), normal(&mut rng, n * n));
            let mut order: Vec<usize> = (0..n).collect();
            rng.shuffle(&mut order);
            let y: Vec<f32> = (0..n * n).map(|e| x[order[e / n] * n + e % n] + 1.5 * noise[e]).collect();
            product(&x, &y, n)
        }
        _ => {
            let (x, y) = (uneven(&mut rng, n, 32), uneven(&mut rng, n, 32));
            product(&x, &y, 32)
        }
    }
}

/// Returns the least time of several calls in seconds, and the last result. The least is taken because other load can only add
/// time.
fn least(mut call: impl FnMut() -> Result<(f64, Assignment)>) -> Result<(f64, Assignment)> {
    let started = Instant::now();
    let mut best = call()?;
    for _ in 1..20 {
        if started.elapsed() > Duration::from_secs(3) {
            break;
        }
        let (seconds, found) = call()?;
        best = (best.0.min(seconds), found);
    }
    Ok(best)
}

fn run(args: &Args) -> Result<()> {
    let gpu = Gpu::open()?;
    println!("{}", gpu.adapter());
    let mut lines = String::new();
    let wanted = |family: &&str| args.words.is_empty() || args.words.iter().any(|w| w == family);
    for family in FAMILIES.into_iter().filter(wanted) {
        for &n in &args.sizes {
            let x = instance(&gpu, family, n);
            let cost: Vec<f32> = x.to_vec()?;
            let goal = if family == "uni" { Goal::Minimize } else { Goal::Maximize };
            if let Some(folder) = &args.write {
                std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
                let notes = [("maximize".into(), (goal == Goal::Maximize).to_string())].into();
                save(
                    folder.join(format!("{family}-{n}.safetensors")),
                    [Entry::f32("cost", &[n, n], &cost)],
                    &notes,
                )?;
            }
            let (host, found) = least(|| {
                let started = ThreadTime::now();
                let found = assign(&cost, [n, n], goal)?;
                Ok((started.elapsed().as_secs_f64(), found))
            })?;
            let device = match args.device || !gpu.class().is_cpu() || n <= 1024 {
                false => None,
                true => Some(least(|| {
                    let started = Instant::now();
                    let found = x.assignments_by(goal, true)?.swap_remove(0);
                    Ok((started.elapsed().as_secs_f64(), found))
                })?),
            };
            let near = |other: &Assignment| (other.value - found.value).abs() <= 1e-12 * found.value.abs();
            let exact = found.exact && device.as_ref().is_none_or(|d| d.1.exact && near(&d.1));
            let device = device.map(|d| d.0 * 1e3);
            let shown = device.map_or("not run".into(), |ms| format!("{ms:.1} ms"));
            println!(
                "{family} {n}: host {:.1} ms, device {shown}, value {}, exact {exact}",
                host * 1e3,
                found.value
            );
            let line = json!({"family": family, "n": n, "host_cpu_ms": host * 1e3, "device_ms": device, "value": found.value,
                "gap": found.gap, "exact": exact, "adapter": gpu.adapter().name, "driver": gpu.adapter().driver});
            lines += &format!("{line}\n");
        }
    }
    match &args.json {
        Some(path) => files::append(path, lines),
        None => Ok(()),
    }
}

fn main() -> std::process::ExitCode {
    match run(&Args::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
