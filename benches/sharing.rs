//! What sharing costs and saves: each row is two ways to the same end, timed one after the other, and their ratio.
//!
//!     cargo bench --features cli --bench sharing [-- WORD...] [-- --json FILE]
//!
//! On a software driver the ratios are this CPU's; they say little about a GPU, where reading memory costs more beside computing.

use serde_json::json;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tiebeam::bench::{Ceilings, measure};
use tiebeam::decode::{DepthBatch, Exit, Request, Scheduling};
use tiebeam::models::mor::{Keys, Mor, Routing, capacities};
use tiebeam::models::recursive::{Config, Recursive, Sharing};
use tiebeam::nn::{Epilogue, Mask};
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::share::hashed::SEEDS;
use tiebeam::share::{DepthLora, Dictionary, Draw, Hashed, Mapping, Site, Tied};
use tiebeam::{Gpu, Result, Rng, Tensor, files, nn::Parameters, no_grad};

/// Two times in seconds and what they are of.
struct Row {
    name: String,
    ours: (&'static str, f64),
    other: (&'static str, f64),
    /// What the ratio should be, from bytes and operations.
    expected: String,
}

fn normal(gpu: &Gpu, shape: &[usize], seed: u64) -> Tensor {
    let x = Tensor::randn(gpu, shape, &mut Rng::new(seed));
    x.evaluate();
    x
}

fn seconds(gpu: &Gpu, mut work: impl FnMut()) -> Result<f64> {
    Ok(measure(gpu, Duration::from_millis(800), |_| work())?.median)
}

/// All layers of a dictionary in one pass, against layer by layer; forward, then backward.
fn combine(gpu: &Gpu) -> Result<Vec<Row>> {
    let (layers, atoms, width) = (12usize, 4usize, 768usize);
    let d = normal(gpu, &[atoms, width, width], 1);
    let c = normal(gpu, &[layers, atoms], 2);
    let dictionary = Dictionary::new(&d.requires_grad(), &c.requires_grad());
    let all = seconds(gpu, || no_grad(|| d.combine(&c)).iter().for_each(Tensor::evaluate))?;
    let each = seconds(gpu, || {
        no_grad(|| {
            for l in 0..layers {
                let row = c.slice(0, l..l + 1).reshape([atoms]);
                let term = |s: usize| d.slice(0, s..s + 1).mul(&row.slice(0, s..s + 1).reshape([1, 1, 1]));
                // One kernel for each layer: a framework that fuses elementwise chains does this.
                (1..atoms).fold(term(0), |sum, s| sum.add(&term(s))).evaluate();
            }
        })
    })?;
    let bytes = 4.0 * (width * width) as f64;
    let rate = (layers + atoms) as f64 * bytes / all;
    let ceilings = Ceilings::measure(gpu, |_| {})?;
    let expected = format!(
        "{:.2}: (S+L)/(L(S+1)) of the bytes; {:.2} GB/s, {:.0}% of our copy kernel",
        (layers * (atoms + 1)) as f64 / (layers + atoms) as f64,
        rate * 1e-9,
        100.0 * rate / ceilings.kernel_copy
    );
    let name = format!("combine {layers} layers of {atoms} atoms {width}x{width}");
    let mut rows =
        vec![Row { name: name.clone(), ours: ("one pass", all), other: ("layer by layer", each), expected }];
    let dw = normal(gpu, &[width, width], 3);
    let backward = |weights: &dyn Fn(usize) -> Tensor| {
        let sum = (0..layers).fold(None, |sum: Option<Tensor>, l| {
            let one = weights(l).mul(&dw).sum_all();
            Some(sum.map_or(one.clone(), |s| s.add(&one)))
        });
        sum.map(|s| s.backward()).transpose().map(|_| ())
    };
    let joint = seconds(gpu, || {
        let w = dictionary.atoms.combine(&dictionary.coefficients);
        let _ = backward(&|l| w[l].clone());
    })?;
    let apart = seconds(gpu, || {
        let part = |l: usize| {
            let row = dictionary.coefficients.slice(0, l..l + 1);
            row.matmul(&dictionary.atoms.reshape([atoms, width * width])).reshape([width, width])
        };
        let _ = backward(&part);
    })?;
    let expected = "up to 5SL/(L+2S) = 12 for the backward half alone".to_string();
    rows.push(Row {
        name: format!("{name}, both ways"),
        ours: ("one pass", joint),
        other: ("layer by layer", apart),
        expected,
    });
    Ok(rows)
}

/// A training step at 4096 tokens with attention from a dictionary, against the same model untied.
fn masa_step(gpu: &Gpu) -> Result<Vec<Row>> {
    let step = |sharing| -> Result<f64> {
        let config = Config { vocab: 64, width: 128, heads: 4, hidden: 512, context: 64, depth: 6, sharing };
        let model = Recursive::new(gpu, config, &mut Rng::new(1));
        let all = Parameters::of(&model);
        let group = Group::new(all.named().iter().map(|(n, p)| (n.clone(), p)));
        let optimizer = RefCell::new(AdamW::new(gpu, vec![group], AdamWConfig::default())?);
        let ids: Vec<u32> = (0..4096).map(|i| i * 7 % 64).collect();
        let [x, y] = [&ids[..], &ids[..]].map(|ids| Tensor::from_slice(gpu, ids, [64, 64]));
        seconds(gpu, || {
            if let Ok(grads) = model.loss(&x, &y).backward() {
                let _ = optimizer.borrow_mut().step(&grads, 1e-3);
            }
        })
    };
    let masa = step(Sharing::Dictionary { atoms: 2, output: true })?;
    let untied = step(Sharing::None)?;
    let expected = "at least 0.97 (3% slower at most)".into();
    Ok(vec![Row {
        name: "training step, 4096 tokens, d 128, L 6, S 2".into(),
        ours: ("dictionary", masa),
        other: ("untied", untied),
        expected,
    }])
}

/// Tokens a second with three depths and answers that leave at 1.5 of 3 on average.
fn depthwise(gpu: &Gpu) -> Result<Vec<Row>> {
    let config = Config {
        vocab: 256,
        width: 256,
        heads: 4,
        hidden: 1024,
        context: 64,
        depth: 3,
        sharing: Sharing::Tied,
    };
    let model = Recursive::new(gpu, config, &mut Rng::new(1));
    let serve = |scheduling| -> Result<f64> {
        // 1, 1, 1, 3: mean 1.5.
        let exit = Exit::Oracle(Box::new(|id, i| if (id as usize + i) % 4 == 3 { 3 } else { 1 }));
        let mut batch = DepthBatch::new(&model, 16, exit, scheduling)?;
        for id in 0..32 {
            batch.push(Request { id, prompt: vec![id as u32], count: 24 })?;
        }
        batch.tick()?;
        let started = Instant::now();
        let tokens = batch.run()?.len();
        Ok(started.elapsed().as_secs_f64() / tokens as f64)
    };
    serve(Scheduling::Continuous)?;
    let (continuous, lock_step) = (serve(Scheduling::Continuous)?, serve(Scheduling::LockStep)?);
    let expected = "1.7 to 2: R / mean exit".into();
    let name = "a token, 16 slots, exit 1.5 of 3".into();
    Ok(vec![Row { name, ours: ("continuous", continuous), other: ("lock-step", lock_step), expected }])
}

/// A step of Mixture-of-Recursions against the same block on all tokens three times.
fn mor(gpu: &Gpu) -> Result<Vec<Row>> {
    let config =
        Config { vocab: 8, width: 512, heads: 8, hidden: 2048, context: 8, depth: 1, sharing: Sharing::None };
    let block = Recursive::new(gpu, config, &mut Rng::new(1)).blocks.remove(0);
    let model = Mor::new(gpu, block.clone(), 3, Routing::Expert, Keys::Recursion, &mut Rng::new(2));
    let x = normal(gpu, &[1, 1024, 512], 3);
    let k = capacities(1024, 3);
    let routed = seconds(gpu, || {
        if let Ok((y, _)) = model.forward(&x, &k) {
            let _ = y.sum_all().backward();
        }
    })?;
    let full = seconds(gpu, || {
        let y = (0..3).fold(x.clone(), |x, _| block.forward(&x, &Mask::Causal));
        let _ = y.sum_all().backward();
    })?;
    let expected = "1.35 to 1.5: (R+1)/2R of the products".into();
    Ok(vec![Row {
        name: "step, 1024 tokens, d 512, R 3".into(),
        ours: ("routed", routed),
        other: ("full depth", full),
        expected,
    }])
}

/// A hashed weight against a dense one, many rows.
fn hashed(gpu: &Gpu) -> Result<Vec<Row>> {
    let size = [768, 768];
    let stored = size[0] * size[1] / 8;
    let draw = Draw { stored, size, offset: 0, layer: 0, scale: 1.0, mapping: Mapping::Stable, seeds: SEEDS };
    let drawn: Arc<dyn Site> = Arc::new(Hashed::new(&normal(gpu, &[stored], 1), draw));
    let dense: Arc<dyn Site> = Arc::new(Tied::new(&normal(gpu, &size, 2)));
    let x = normal(gpu, &[2048, 768], 3);
    let time = |w: &Arc<dyn Site>| seconds(gpu, || no_grad(|| x.linear(w, Epilogue::default())).evaluate());
    let (ours, other) = (time(&drawn)?, time(&dense)?);
    let expected = "at least 0.9; an eighth of the memory".into();
    Ok(vec![Row {
        name: "2048 rows, 768x768, 8 times fewer stored".into(),
        ours: ("hashed", ours),
        other: ("dense", other),
        expected,
    }])
}

/// Low-rank parts of each row's own depth, and rows of many layers of a dictionary.
fn mixed(gpu: &Gpu) -> Result<Vec<Row>> {
    let (rows, width, depths) = (32usize, 768usize, 12usize);
    let weight: Arc<dyn Site> = Arc::new(Tied::new(&normal(gpu, &[width, width], 1)));
    let lora =
        DepthLora { a: normal(gpu, &[3, 16, width], 2), b: normal(gpu, &[3, width, 16], 3), scale: 1.0 };
    let x = normal(gpu, &[rows, width], 4);
    let list =
        |of: usize| Tensor::from_slice(gpu, &(0..rows).map(|i| (i % of) as u32).collect::<Vec<_>>(), [rows]);
    let (three, twelve) = (list(3), list(depths));
    let with = seconds(gpu, || no_grad(|| lora.linear(&x, &weight, &three)).evaluate())?;
    let without = seconds(gpu, || no_grad(|| x.linear(&weight, Epilogue::default())).evaluate())?;
    let mut all = vec![Row {
        name: "32 rows, 768x768, rank 16 of 3 depths".into(),
        ours: ("with", with),
        other: ("without", without),
        expected: "at least 0.9".into(),
    }];
    let dictionary = Dictionary::new(&normal(gpu, &[4, width, width], 5), &normal(gpu, &[depths, 4], 6));
    let made: Vec<Tensor> = no_grad(|| dictionary.atoms.combine(&dictionary.coefficients));
    let long = seconds(gpu, || no_grad(|| dictionary.mixed(&x, &twelve)).evaluate())?;
    let grouped = seconds(gpu, || {
        no_grad(|| {
            // Rows sorted by layer: three of each, one product a layer.
            for (l, w) in made.iter().enumerate() {
                let own = x.slice(0, l * 2..l * 2 + 3);
                own.matmul(&w.t()).evaluate();
            }
        })
    })?;
    let expected = "2 to 3: L / S, where weights are what costs".into();
    all.push(Row {
        name: "32 rows at 12 layers, 4 atoms 768x768".into(),
        ours: ("one product over atoms", long),
        other: ("a product a layer", grouped),
        expected,
    });
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
    // cargo passes --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let json = args.iter().position(|a| a == "--json").and_then(|at| args.get(at + 1));
    let words: Vec<&String> = args.iter().filter(|a| *a != "--json" && Some(*a) != json).collect();
    let gpu = Gpu::open()?;
    println!("{}", gpu.adapter());
    let mut lines = String::new();
    for (family, rows) in FAMILIES {
        if !words.is_empty() && !words.iter().any(|w| family.contains(w.as_str())) {
            continue;
        }
        for Row { name, ours: (a, x), other: (b, y), expected } in rows(&gpu)? {
            println!(
                "{family}: {name}\n    {a} {:.3} ms, {b} {:.3} ms: {:.2} times; expected {expected}",
                x * 1e3,
                y * 1e3,
                y / x
            );
            let line = json!({"family": family, "name": name, "ours": a, "ours_ms": x * 1e3, "other": b, "other_ms": y * 1e3,
                "ratio": y / x, "expected": expected, "adapter": gpu.adapter().name, "driver": gpu.adapter().driver});
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
