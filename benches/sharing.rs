//! Benchmarks what sharing costs and saves. Each row times two ways to the same result in turn, and shows the median and
//! quartiles of their ratio.
//!
//!     cargo bench --bench sharing [-- WORD... --json FILE --profile --plan]
//!
//! On a software driver the ratios are those of the CPU. They say little about a GPU, where reading memory costs more relative to
//! computing.

use serde_json::json;
use std::sync::Arc;
use std::time::Instant;
use tiebeam::bench::{Ceilings, counted};
use tiebeam::decode::{DepthBatch, Exit, Request, Scheduling};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::mor::{Keys, Mor, Routing, capacities};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::{Epilogue, Mask};
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::share::hashed::SEEDS;
use tiebeam::share::{DepthLora, Dictionary, Draw, Hashed, Mapping, Site, Tied};
use tiebeam::{Gpu, Result, Rng, Tensor, files, nn::Parameters, no_grad};

/// The times of two ways to one result.
struct Row {
    name: String,
    ours: (&'static str, f64),
    other: (&'static str, f64),
    /// The other's time over ours in each round, sorted.
    ratios: Vec<f64>,
    /// The ratio that bytes and operations predict.
    expected: String,
}

impl Row {
    /// The lower quartile, the median and the upper quartile of the ratios.
    fn quartiles(&self) -> [f64; 3] {
        let last = self.ratios.len() - 1;
        [1, 2, 3].map(|q| self.ratios[(last * q + 2) / 4])
    }
}

fn normal(gpu: &Gpu, shape: &[usize], seed: u64) -> Tensor {
    let x = Tensor::randn(gpu, shape, &mut Rng::new(seed));
    x.evaluate();
    x
}

/// Number of rounds. Both ways run in each, one after the other, so other load on the machine affects both.
const ROUNDS: usize = 9;
/// Seconds that the calls of one way take in a round, about.
const SLICE: f64 = 0.25;

/// Returns the seconds per call, measured over `calls` calls.
fn seconds(gpu: &Gpu, calls: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    gpu.synchronize()?;
    let started = Instant::now();
    for _ in 0..calls {
        work()?;
    }
    gpu.synchronize()?;
    Ok(started.elapsed().as_secs_f64() / calls as f64)
}

/// The dispatches of a call, without running it, as `tiebeam bench --plan` shows them.
fn planned(gpu: &Gpu, way: &mut dyn FnMut() -> Result<()>) -> Result<String> {
    // What a first call makes, such as copies of weights, is no part of the others.
    way()?;
    let mut done = Ok(());
    let passes = gpu.only_planned(|| done = way())?;
    done?;
    let lines = counted(&passes);
    Ok(lines.into_iter().map(|(line, count)| format!("  {line} ({count} times)\n")).collect())
}

/// Times both ways in turn, or with `--plan` shows what they would launch.
fn versus(
    gpu: &Gpu,
    name: impl Into<String>,
    (ours, mut a): (&'static str, impl FnMut() -> Result<()>),
    (other, mut b): (&'static str, impl FnMut() -> Result<()>),
    expected: impl Into<String>,
) -> Result<Option<Row>> {
    let mut ways: [&mut dyn FnMut() -> Result<()>; 2] = [&mut a, &mut b];
    let mut calls = [1; 2];
    let name = name.into();
    if std::env::args().any(|a| a == "--plan") {
        for (label, way) in [ours, other].iter().zip(&mut ways) {
            print!("{name}: {label}\n{}", planned(gpu, way)?);
        }
        return Ok(None);
    }
    for (way, calls) in ways.iter_mut().zip(&mut calls) {
        // The first call compiles the kernels.
        seconds(gpu, 1, way)?;
        *calls = ((SLICE / seconds(gpu, 1, way)?) as usize).clamp(1, 200);
        if std::env::args().any(|a| a == "--profile") {
            println!("kernels, the longest first");
            let mut run = Ok(());
            for row in gpu.profile(|| run = way())?.iter().take(12) {
                println!("    {:8.3} ms {:5} {}", row.seconds * 1e3, row.count, row.kernel);
            }
            run?;
        }
    }
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for ((way, calls), times) in ways.iter_mut().zip(calls).zip(&mut times) {
            times.push(seconds(gpu, calls, way)?);
        }
    }
    let mut ratios: Vec<f64> = times[0].iter().zip(&times[1]).map(|(a, b)| b / a).collect();
    ratios.sort_by(f64::total_cmp);
    let [a, b] = times.map(|mut t| {
        t.sort_by(f64::total_cmp);
        t[t.len() / 2]
    });
    Ok(Some(Row { name, ours: (ours, a), other: (other, b), ratios, expected: expected.into() }))
}

/// Compares combining all layers of a dictionary in one pass with layer by layer, forward and backward.
fn combine(gpu: &Gpu) -> Result<Vec<Row>> {
    let (layers, atoms, width) = (12usize, 4usize, 768usize);
    let d = normal(gpu, &[atoms, width, width], 1);
    let c = normal(gpu, &[layers, atoms], 2);
    let dictionary = Dictionary::new(&d.requires_grad(), &c.requires_grad());
    let all = || {
        no_grad(|| d.combine(&c)).iter().for_each(Tensor::evaluate);
        Ok(())
    };
    let each = || {
        no_grad(|| {
            for l in 0..layers {
                let row = c.slice(0, l..l + 1).reshape([atoms]);
                let term = |s: usize| d.slice(0, s..s + 1).mul(&row.slice(0, s..s + 1).reshape([1, 1, 1]));
                // This is one kernel per layer, as in a framework that fuses elementwise chains.
                (1..atoms).fold(term(0), |sum, s| sum.add(&term(s))).evaluate();
            }
        });
        Ok(())
    };
    let name = format!("combine {layers} layers of {atoms} atoms {width}x{width}");
    let mut first = versus(gpu, name.clone(), ("one pass", all), ("layer by layer", each), "")?;
    let bytes = 4.0 * (width * width) as f64;
    if let Some(first) = &mut first {
        let rate = (layers + atoms) as f64 * bytes / first.ours.1;
        first.expected = format!(
            "{:.2}: (S+L)/(L(S+1)) of the bytes; {:.2} GB/s, {:.0}% of our copy kernel",
            (layers * (atoms + 1)) as f64 / (layers + atoms) as f64,
            rate * 1e-9,
            100.0 * rate / Ceilings::measure(gpu, |_, _| {}).kernel_copy.unwrap_or(f64::NAN)
        );
    }
    let dw = normal(gpu, &[width, width], 3);
    let backward = |weights: &dyn Fn(usize) -> Tensor| -> Result<()> {
        let one = |l: usize| weights(l).mul(&dw).sum_all();
        (1..layers).fold(one(0), |sum, l| sum.add(&one(l))).backward()?;
        Ok(())
    };
    let joint = || {
        let w = dictionary.atoms.combine(&dictionary.coefficients);
        backward(&|l| w[l].clone())
    };
    let part = |l: usize| {
        let row = dictionary.coefficients.slice(0, l..l + 1);
        row.matmul(&dictionary.atoms.reshape([atoms, width * width])).reshape([width, width])
    };
    let expected = "up to 5SL/(L+2S) = 12 for the backward half alone";
    let ways = (("one pass", joint), ("layer by layer", || backward(&part)));
    let second = versus(gpu, format!("{name}, both ways"), ways.0, ways.1, expected)?;
    Ok(first.into_iter().chain(second).collect())
}

/// Compares a training step on 4096 tokens, with attention from a dictionary, with one of the same model untied.
fn masa_step(gpu: &Gpu) -> Result<Vec<Row>> {
    let ids: Vec<u32> = (0..4096).map(|i| i * 7 % 64).collect();
    let [x, y] = [&ids[..], &ids[..]].map(|ids| Tensor::from_slice(gpu, ids, [64, 64]));
    let step = |sharing| -> Result<_> {
        let config = LmConfig::small()
            .vocab(64)
            .width(128)
            .heads(4)
            .kv_heads(4)
            .hidden(512)
            .context(64)
            .depth(6)
            .sharing(sharing);
        let model = Lm::new(gpu, config, &mut Rng::new(1));
        let all = Parameters::of(&model);
        let group = Group::new(all.named().iter().map(|(n, p)| (n.clone(), p)));
        let mut optimizer = AdamW::new(gpu, vec![group], AdamWConfig::default())?;
        let (x, y) = (x.clone(), y.clone());
        Ok(move || optimizer.step(&model.loss(&x, &y).backward()?, 1e-3).map(|_| ()))
    };
    let masa = step(Sharing::dictionary(2, true))?;
    let untied = step(Sharing::none())?;
    let name = "training step, 4096 tokens, d 128, L 6, S 2";
    let expected = "at least 0.97 (3% slower at most)";
    Ok(versus(gpu, name, ("dictionary", masa), ("untied", untied), expected)?.into_iter().collect())
}

/// Compares two schedulings of a served batch with three depths, whose answers exit at depth 1.5 on average.
fn depthwise(gpu: &Gpu) -> Result<Vec<Row>> {
    let sizes = |width| {
        LmConfig::small()
            .vocab(256)
            .width(width)
            .heads(4)
            .kv_heads(4)
            .hidden(4 * width)
            .context(64)
            .depth(3)
            .sharing(Sharing::tied())
    };
    let mut all = Vec::new();
    for width in [64, 256] {
        let model = Lm::new(gpu, sizes(width), &mut Rng::new(1));
        let serve = |scheduling| {
            // Exit depths 1, 1, 1 and 3 have mean 1.5.
            let exit = Exit::Oracle(Box::new(|id, i| if (id as usize + i) % 4 == 3 { 3 } else { 1 }));
            let mut batch = DepthBatch::new(&model, 16, exit, scheduling)?;
            for id in 0..32 {
                batch.push(Request { id, prompt: vec![id as u32], count: 24 })?;
            }
            batch.run().map(|_| ())
        };
        let name = format!("32 answers of 24 tokens, 16 slots, d {width}, exit 1.5 of 3");
        let ways =
            (("continuous", || serve(Scheduling::Continuous)), ("lock-step", || serve(Scheduling::LockStep)));
        let expected =
            "R / mean exit = 2 where a tick costs the same for any number of slots; 1 where only slots cost";
        all.extend(versus(gpu, name, ways.0, ways.1, expected)?);
    }
    Ok(all)
}

/// Compares a step of Mixture-of-Recursions with applying the same block to all tokens three times.
fn mor(gpu: &Gpu) -> Result<Vec<Row>> {
    let config = LmConfig::small()
        .vocab(8)
        .width(512)
        .heads(8)
        .kv_heads(8)
        .hidden(2048)
        .context(8)
        .depth(1)
        .sharing(Sharing::none());
    let block = Lm::new(gpu, config, &mut Rng::new(1)).blocks[0].dense().expect("a block without experts");
    let model = Mor::new(gpu, block.clone(), 3, Routing::Expert, Keys::Recursion, &mut Rng::new(2));
    let x = normal(gpu, &[1, 1024, 512], 3);
    let k = capacities(1024, 3);
    let routed = || {
        let (y, _) = model.forward(&x, &k)?;
        y.sum_all().backward().map(|_| ())
    };
    let full = || {
        let y = (0..3).fold(x.clone(), |x, _| block.forward(&x, &Mask::Causal));
        y.sum_all().backward().map(|_| ())
    };
    let expected = "1.35 to 1.5: (R+1)/2R of the products";
    let name = "step, 1024 tokens, d 512, R 3";
    Ok(versus(gpu, name, ("routed", routed), ("full depth", full), expected)?.into_iter().collect())
}

/// Compares a hashed weight with a dense one on many rows.
fn hashed(gpu: &Gpu) -> Result<Vec<Row>> {
    let size = [768, 768];
    let stored = size[0] * size[1] / 8;
    let draw = Draw { stored, size, offset: 0, layer: 0, scale: 1.0, mapping: Mapping::Stable, seeds: SEEDS };
    let drawn = Hashed::new(&normal(gpu, &[stored], 1), draw).shared();
    let dense = Tied::new(&normal(gpu, &size, 2)).shared();
    let x = normal(gpu, &[2048, 768], 3);
    let ways = (("hashed", linear(&x, &drawn)), ("dense", linear(&x, &dense)));
    let name = "2048 rows, 768x768, 8 times fewer stored";
    Ok(versus(gpu, name, ways.0, ways.1, "at least 0.9; an eighth of the memory")?.into_iter().collect())
}

fn linear<'a>(x: &'a Tensor, w: &'a Arc<dyn Site>) -> impl FnMut() -> Result<()> + 'a {
    || {
        no_grad(|| x.linear(w, Epilogue::default())).evaluate();
        Ok(())
    }
}

/// Benchmarks batches of rows at different depths: with a low-rank part per depth, and with a dictionary's layers.
fn mixed(gpu: &Gpu) -> Result<Vec<Row>> {
    let (width, depths) = (768usize, 12usize);
    let weight = Tied::new(&normal(gpu, &[width, width], 1)).shared();
    let list = |rows: usize, of: usize| {
        Tensor::from_slice(gpu, &(0..rows).map(|i| (i % of) as u32).collect::<Vec<_>>(), [rows])
    };
    let mut all = Vec::new();
    for (rows, rank) in [(32, 16), (32, 4), (512, 16)] {
        let lora =
            DepthLora::new(&normal(gpu, &[3, rank, width], 2), &normal(gpu, &[3, width, rank], 3), 1.0);
        let (x, three) = (normal(gpu, &[rows, width], 4), list(rows, 3));
        let with = || {
            no_grad(|| lora.linear(&x, &weight, &three)).evaluate();
            Ok(())
        };
        let products = width as f64 / (width + 2 * 3 * rank) as f64;
        all.extend(versus(
            gpu,
            format!("{rows} rows, 768x768, rank {rank} of 3 depths"),
            ("with", with),
            ("without", linear(&x, &weight)),
            format!("{products:.2} by the products of all three parts"),
        )?);
    }
    let rows = 3 * depths;
    let (x, twelve) = (normal(gpu, &[rows, width], 4), list(rows, depths));
    let dictionary = Dictionary::new(&normal(gpu, &[4, width, width], 5), &normal(gpu, &[depths, 4], 6));
    let made: Vec<Tensor> = no_grad(|| dictionary.atoms.combine(&dictionary.coefficients));
    let long = || {
        no_grad(|| dictionary.mixed(&x, &twelve)).evaluate();
        Ok(())
    };
    let grouped = || {
        // Rows are sorted by layer, three per layer, with one product per layer.
        no_grad(|| {
            made.iter().enumerate().for_each(|(l, w)| x.slice(0, l * 3..l * 3 + 3).matmul(&w.t()).evaluate());
        });
        Ok(())
    };
    let name = format!("{rows} rows at 12 layers, 4 atoms 768x768");
    let expected = "2 to 3: L / S, where weights are what costs";
    all.extend(versus(
        gpu,
        name,
        ("one product over atoms", long),
        ("a product a layer", grouped),
        expected,
    )?);
    Ok(all)
}

type Family = (&'static str, fn(&Gpu) -> Result<Vec<Row>>);

const FAMILIES: [Family; 6] = [
    ("combine", combine),
    ("masa", masa_step),
    ("depthwise", depthwise),
    ("mor", mor),
    ("hashed", hashed),
    ("mixed", mixed),
];

fn run() -> Result<()> {
    // cargo passes `--bench`.
    let args: Vec<String> =
        std::env::args().skip(1).filter(|a| a != "--bench" && a != "--profile" && a != "--plan").collect();
    let json = args.iter().position(|a| a == "--json").and_then(|at| args.get(at + 1));
    let words: Vec<&String> = args.iter().filter(|a| *a != "--json" && Some(*a) != json).collect();
    let gpu = Gpu::open()?;
    println!("{}", gpu.adapter());
    let mut lines = String::new();
    for (family, rows) in FAMILIES {
        if !words.is_empty() && !words.iter().any(|w| family.contains(w.as_str())) {
            continue;
        }
        for row in rows(&gpu)? {
            let ([low, ratio, high], (a, x), (b, y)) = (row.quartiles(), row.ours, row.other);
            println!(
                "{family}: {}\n    {a} {:.3} ms, {b} {:.3} ms: {ratio:.2} times ({low:.2} to {high:.2}); expected {}",
                row.name,
                x * 1e3,
                y * 1e3,
                row.expected
            );
            let line = json!({"family": family, "name": row.name, "ours": a, "ours_ms": x * 1e3, "other": b,
                "other_ms": y * 1e3, "ratio": ratio, "ratio_quartiles": [low, high], "rounds": ROUNDS,
                "expected": row.expected, "adapter": gpu.adapter().name, "driver": gpu.adapter().driver});
            lines += &format!("{line}\n");
        }
        gpu.trim();
    }
    match json {
        Some(path) => files::replace_with(path.as_ref(), lines),
        None => Ok(()),
    }
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
