//! Benchmarks merges from files to files: rate of output and memory of `linear`, of TIES and of its relatives, in turn in one run.
//!
//!     cargo bench --bench merging
//!     cargo bench --bench merging -- --large [--folder DISK]
//!
//! By default two models and a base of 256 MiB in f32, once as one tensor and once as sixteen. `--large` merges models with the
//! shapes of Llama-2-7B in bf16, whose inputs are files without content (holes) and whose output is 13.5 GB, and asks for 30 GB of
//! free disk before it begins.
//!
//! Expectation: `linear` reads two models and writes one, each byte once. TIES reads base and models twice, once for the cuts and
//! once for the vote, so that half of linear's rate is its bound where reading and writing cost alike; on a GPU both wait for the
//! disk. Memory that is not of mapped files is bounded by what `--dry-run` prints, whatever the size of the model.

use clap::Parser;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tiebeam::merge::{Job, MergeConfig};
use tiebeam::store::{Entry, save};
use tiebeam::{Error, Gpu, Result, Rng, files};

/// Benchmark merges from files to files
#[derive(Parser)]
struct Args {
    /// Models with the shapes of Llama-2-7B in bf16
    #[arg(long)]
    large: bool,
    /// Where models and output are written, and removed again [default: the temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Rounds, in each of which every method runs once
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Write a line for each row to this file
    #[arg(long)]
    json: Option<PathBuf>,
    #[arg(long, hide = true)]
    bench: bool,
}

/// Bytes of a disk that the large models need.
const DISK: u64 = 30 << 30;

/// Elements of a model of the small layouts.
const SIZE: usize = 64 << 20;

const METHODS: [(&str, &str); 4] = [
    (
        "linear",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n",
    ),
    (
        "ties",
        "merge_method: ties\nbase_model: base\nparameters: {density: 0.3, weight: 1}\nmodels: [{model: a}, {model: b}]\n",
    ),
    (
        "breadcrumbs",
        "merge_method: breadcrumbs\nbase_model: base\nparameters: {density: 0.8, weight: 1}\nmodels: [{model: a}, {model: b}]\n",
    ),
    ("pcb", "merge_method: pcb\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"),
];

/// Writes a model of random numbers, near those of seed 0.
fn small(folder: &Path, seed: u64, tensors: usize) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let n = SIZE / tensors;
    let values = |t: usize| {
        let mut base = vec![0.0f32; n];
        Rng::from_state([1, t as u64]).fill_normal(&mut base);
        if seed > 0 {
            let mut change = vec![0.0f32; n];
            Rng::from_state([1 + seed, t as u64]).fill_normal(&mut change);
            base.iter_mut().zip(change).for_each(|(x, d)| *x += 0.01 * d);
        }
        Ok(bytemuck::cast_slice::<f32, u8>(&base).to_vec())
    };
    let entry = |t: usize| {
        Entry::lazy(format!("w{t:02}"), tiebeam::store::FileDType::F32, &[n / 4096, 4096], move || values(t))
    };
    save(folder.join("model.safetensors"), (0..tensors).map(entry), &BTreeMap::new())
}

/// Names and shapes of Llama-2-7B.
fn llama() -> Vec<(String, [usize; 2])> {
    let mut all = vec![("model.embed_tokens.weight".to_string(), [32000, 4096])];
    for layer in 0..32 {
        let of = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for part in ["q", "k", "v", "o"] {
            all.push((of(&format!("self_attn.{part}_proj")), [4096, 4096]));
        }
        all.push((of("mlp.gate_proj"), [11008, 4096]));
        all.push((of("mlp.up_proj"), [11008, 4096]));
        all.push((of("mlp.down_proj"), [4096, 11008]));
        all.push((of("input_layernorm"), [1, 4096]));
        all.push((of("post_attention_layernorm"), [1, 4096]));
    }
    all.push(("model.norm.weight".into(), [1, 4096]));
    all.push(("lm_head.weight".into(), [32000, 4096]));
    all
}

/// Writes a header, and behind it a hole of the size of the tensors.
fn sparse(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let (mut header, mut at) = (serde_json::Map::new(), 0u64);
    for (name, [rows, columns]) in llama() {
        let end = at + 2 * (rows * columns) as u64;
        let shape: Vec<usize> = if rows == 1 { vec![columns] } else { vec![rows, columns] };
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let path = folder.join("model.safetensors");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&path)?;
        file.write_all(&(text.len() as u64).to_le_bytes())?;
        file.write_all(text.as_bytes())?;
        let end = file.stream_position()? + at;
        file.set_len(end)
    };
    write().map_err(|e| Error::io(&path, e))
}

/// The most memory of this process that is not of mapped files, while it is measured. Only Linux says it.
struct Memory {
    most: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Memory {
    fn watch() -> Memory {
        let (most, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (own, flag) = (most.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                own.fetch_max(anonymous().unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Memory { most, stop, thread: Some(thread) }
    }

    fn most(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.most.load(Ordering::Relaxed)
    }
}

fn anonymous() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
}

/// Free bytes of the disk that a folder is on.
#[cfg(unix)]
fn free(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    Some(found.f_bavail * found.f_frsize)
}

#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}

struct Row {
    method: &'static str,
    rates: Vec<f64>,
    bound: u64,
    most: u64,
}

fn run(gpu: &Gpu, folder: &Path, methods: &[(&'static str, &str)], rounds: usize) -> Result<Vec<Row>> {
    let row = |&(method, _): &(&'static str, &str)| Row { method, rates: vec![], bound: 0, most: 0 };
    let mut rows: Vec<Row> = methods.iter().map(row).collect();
    for round in 0..rounds {
        for (row, (method, text)) in rows.iter_mut().zip(methods) {
            let job = Job::open(MergeConfig::from_yaml(text, folder)?)?;
            gpu.trim(); // what other rows left in the pool is not this one's
            let (out, memory, start) = (folder.join("out"), Memory::watch(), Instant::now());
            let mut done = 0;
            let all = job.bytes() * job.passes();
            let seen = std::io::stderr().is_terminal();
            job.run(gpu, &job.sources(), &out, 20 << 30, text, &mut |bytes| {
                done += bytes;
                let seconds = start.elapsed().as_secs_f64();
                if seconds > 2.0 && seen {
                    let left = seconds * (all - done) as f64 / done as f64;
                    eprint!(
                        "\r{method}, round {}: {:>3.0}%, about {left:.0} s to go   ",
                        round + 1,
                        100.0 * done as f64 / all as f64
                    );
                }
                Ok(())
            })?;
            if seen {
                eprint!("\r{:60}\r", "");
            }
            row.rates.push(job.bytes() as f64 / 1e6 / start.elapsed().as_secs_f64());
            row.most = row.most.max(memory.most());
            row.bound = job.memory();
            std::fs::remove_dir_all(&out).map_err(|e| Error::io(&out, e))?;
        }
    }
    Ok(rows)
}

fn report(layout: &str, rows: &[Row], gpu: &Gpu) -> Vec<String> {
    let best = |row: &Row| row.rates.iter().copied().fold(0.0, f64::max);
    let linear = rows.first().map_or(0.0, best);
    println!(
        "{layout}\n  {:<12} {:>8} {:>10} {:>12} {:>12}",
        "method", "MB/s", "of linear", "memory held", "its bound"
    );
    let line = |row: &Row| {
        let rate = best(row);
        println!(
            "  {:<12} {rate:>8.0} {:>10.2} {:>12} {:>12}",
            row.method,
            rate / linear,
            files::size(row.most),
            files::size(row.bound)
        );
        json!({
            "bench": "merging", "layout": layout, "method": row.method, "rates": row.rates, "of_linear": rate / linear,
            "anonymous_bytes": row.most, "bound": row.bound, "adapter": gpu.adapter().name, "driver": gpu.adapter().driver,
        })
        .to_string()
    };
    rows.iter().map(line).collect()
}

fn body(args: &Args) -> Result<()> {
    let at = args.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = at.join(format!("tiebeam-merging-{}", std::process::id()));
    if args.large {
        match free(&at) {
            Some(free) if free < DISK => {
                return Err(Error::config(format!(
                    "{}: {} of disk are free, and the large models need {}; name another --folder",
                    at.display(),
                    files::size(free),
                    files::size(DISK)
                )));
            }
            Some(free) => println!("{}: {} free", at.display(), files::size(free)),
            None => println!("this needs {} of disk", files::size(DISK)),
        }
    }
    let gpu = Gpu::open()?;
    println!("adapter {}", gpu.adapter());
    let mut lines = Vec::new();
    let removed = Removed(&folder);
    match args.large {
        true => {
            ["base", "a", "b"].iter().try_for_each(|name| sparse(&folder.join(name)))?;
            let rows = run(&gpu, &folder, &METHODS[..2], 1)?;
            lines.extend(report("Llama-2-7B, bf16, inputs of holes", &rows, &gpu));
        }
        false => {
            for (tensors, layout) in [(1, "one tensor of 256 MiB, f32"), (16, "16 tensors of 16 MiB, f32")] {
                for (seed, name) in ["base", "a", "b"].iter().enumerate() {
                    small(&folder.join(name), seed as u64, tensors)?;
                }
                lines.extend(report(layout, &run(&gpu, &folder, &METHODS, args.rounds)?, &gpu));
            }
        }
    }
    drop(removed);
    match &args.json {
        Some(path) => files::replace_with(path, lines.join("\n") + "\n"),
        None => Ok(()),
    }
}

/// A folder that is removed at the end, also after an error.
struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.0);
    }
}

fn main() -> ExitCode {
    match body(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
