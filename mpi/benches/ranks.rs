//! What ranks cost: sums of numbers, beside the MPI library's own, and steps of language models that share weights in different ways, on
//! 1, 2 and 4 ranks of this machine.
//!
//! ```sh
//! cargo bench --package tiebeam-mpi                                  # starts itself under mpirun; lines of JSON on stdout
//! cargo bench --package tiebeam-mpi -- --draw lines.jsonl ranks.svg  # a model of latency and bandwidth through such lines
//! ```
//!
//! Expected of a sum of `P` floats on `N` ranks: each rank sends and receives `2 (N - 1) / N` of the buffer, as the library's ring does, and
//! adds as many numbers; so about its time. Of a step: the time of one rank with its part of the batch, and the exchange.
//!
//! On a software driver each rank has one core (`LP_NUM_THREADS=1`), and more ranks than cores share them.

mod model;
#[path = "../tests/support/mod.rs"]
mod support;

use serde_json::{Value, json};
use std::hint::black_box;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use support::mpirun;
use tiebeam::language::{Corpus, Data, Progress, Training, TrainingOptions};
use tiebeam::models::lm::{Lm, LmConfig};
use tiebeam::models::sharing::Sharing;
use tiebeam::nn::Module;
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::ranks::{Alone, Ranks};
use tiebeam::{Gpu, Options, Result, Rng};
use tiebeam_mpi::World;

/// Set in the ranks: what they measure.
const PART: &str = "TIEBEAM_BENCH_RANKS";
/// How many cores the machine has. A rank sees only those that it is bound to.
const CORES: &str = "TIEBEAM_BENCH_CORES";

/// The ways to share that are compared, with the name of each.
const SHARING: [(&str, &str); 3] =
    [("untied", "none"), ("dictionary", "dictionary 2 output true"), ("tied", "tied")];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if let [draw, lines, picture] = &words[..]
        && draw == "--draw"
    {
        let drawn = model::draw(Path::new(lines), Path::new(picture));
        return drawn
            .inspect_err(|error| eprintln!("error: {error}"))
            .map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    match std::env::var(PART).as_deref() {
        Ok("sums") => {
            return tiebeam_mpi::run(|world| {
                sums(&world);
                Ok(())
            });
        }
        Ok("steps") => return tiebeam_mpi::run(steps),
        _ => {}
    }
    for part in ["sums", "steps"] {
        for ranks in [1, 2, 4] {
            start(part, ranks);
        }
    }
    ExitCode::SUCCESS
}

/// Runs a part on so many ranks. Two or fewer are bound to a core each.
fn start(part: &str, ranks: usize) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut command = mpirun();
    command.env(PART, part).env(CORES, cores.to_string()).arg("-n").arg(ranks.to_string());
    command.args(["--bind-to", if ranks <= cores { "core" } else { "none" }]);
    let done = command.arg(std::env::current_exe().expect("this program")).status();
    assert!(done.expect("mpirun starts; `make mpi` installs it").success(), "{part} on {ranks} ranks");
}

fn say(world: &World, line: Value) {
    if world.rank() == 0 {
        println!("{line}");
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// The median time of some work in milliseconds, of so many rounds that all ranks begin together.
fn timed(world: &World, rounds: usize, mut work: impl FnMut()) -> f64 {
    let mut times = Vec::new();
    for round in 0..rounds + 2 {
        world.barrier();
        let start = Instant::now();
        work();
        // The slowest rank counts, and the next round's barrier waits for it.
        world.barrier();
        if round >= 2 {
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
    }
    median(times)
}

/// Sums of these many numbers, in the order of ranks and by the library.
fn sums(world: &World) {
    if world.size() == 1 {
        return;
    }
    for n in [1 << 10, 1 << 14, 142_176, 473_952, 1 << 22, 1 << 24] {
        let mut numbers: Vec<f32> = (0..n).map(|i| (i + world.rank()) as f32).collect();
        let mut sums = vec![0.0; n];
        let rounds = if n < 1 << 20 { 201 } else { 21 };
        // In turn, so that both see the same machine.
        let mut both = [(); 3].map(|()| {
            let ordered = timed(world, rounds / 3, || world.sum(black_box(&mut numbers)).expect("a sum"));
            numbers.iter_mut().for_each(|x| *x = 1.0);
            let library = timed(world, rounds / 3, || world.library_sum(black_box(&numbers), &mut sums));
            numbers.iter_mut().for_each(|x| *x = 1.0);
            [ordered, library]
        });
        both.sort_by(|a, b| a[0].total_cmp(&b[0]));
        let [ordered, library] = [0, 1].map(|i| median(both.iter().map(|pair| pair[i]).collect()));
        say(
            world,
            json!({
                "line": "sum", "ranks": world.size(), "numbers": n, "ms": ordered, "library_ms": library,
                "of_library": ordered / library,
            }),
        );
    }
}

fn open(world: &World) -> Result<Gpu> {
    let adapter = Gpu::adapter_of(world.local(), &Options::default())?;
    Gpu::open_with(Options::default().adapter(Some(adapter.index.to_string())))
}

/// Windows of a step on each rank.
const WINDOWS: usize = 4;

/// Steps of a language model whose batch grows with the ranks, beside those of rank 0 alone with its part of the batch, and the exchange
/// of its gradients.
fn steps(world: Arc<World>) -> Result<()> {
    let gpu = open(&world)?;
    let tokens: Vec<u32> = (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) % 256).collect();
    let corpus = Corpus::new(tokens, 256)?;
    let cores = std::env::var(CORES).ok().and_then(|cores| cores.parse().ok()).unwrap_or(1);
    let idle_cores = world.size() <= cores;
    for (name, sharing) in SHARING {
        let config =
            LmConfig::small().width(96).heads(3).kv_heads(3).hidden(384).context(64).depth(8).vocab(256);
        let model = Lm::new(&gpu, config.sharing(Sharing::named(sharing)?), &mut Rng::new(1));
        let (bytes, exchange) = exchange(&world, &gpu, &model, &corpus, name)?;
        let (mut alone, mut together) = (Vec::new(), Vec::new());
        // In turn, so that both see the same machine.
        for _ in 0..6 {
            world.barrier();
            if world.rank() == 0 && idle_cores {
                alone.extend(times(&model, &corpus, Arc::new(Alone))?);
            }
            world.barrier();
            together.extend(times(&model, &corpus, world.clone())?);
        }
        if world.rank() > 0 {
            continue;
        }
        let ms = median(together);
        let alone = idle_cores.then(|| median(alone));
        let [stored, used] = model.counts();
        say(
            &world,
            json!({
                "line": "step", "sharing": name, "ranks": world.size(), "windows_of_a_rank": WINDOWS, "ms": ms, "bytes": bytes,
                "alone_ms": alone, "of_alone_and_exchange": alone.map(|alone| ms / (alone + exchange)),
                "stored": stored, "used": used, "adapter": gpu.adapter().name, "driver": gpu.adapter().driver,
            }),
        );
    }
    Ok(())
}

/// Milliseconds of steps.
fn times(model: &Lm, corpus: &Corpus, ranks: Arc<dyn Ranks>) -> Result<Vec<f64>> {
    let options = TrainingOptions::default().batch(WINDOWS * ranks.size()).steps(12).every(12).validation(64);
    let mut training = Training::new(model, corpus, options)?.ranks(ranks)?;
    let (mut last, mut times) = (Instant::now(), Vec::new());
    training.run(None, &mut |progress| {
        if let Progress::Step(report) = progress {
            // The first ones compile kernels.
            if report.step > 4 {
                times.push(1e3 * last.elapsed().as_secs_f64());
            }
            last = Instant::now();
        }
        Ok(())
    })?;
    Ok(times)
}

/// Times the exchange of a model's gradients, read back and written again. Returns their bytes, and milliseconds.
fn exchange(world: &World, gpu: &Gpu, model: &Lm, corpus: &Corpus, name: &str) -> Result<(u64, f64)> {
    let group = Group::new(model.parameters().trainable());
    let _arenas = AdamW::new(gpu, vec![group], AdamWConfig::default())?;
    let part = corpus.batch(gpu, [1, 64], (1, 0..1), 0, &mut Rng::new(1)).swap_remove(0);
    let mut grads = model.loss(&part.tokens, &part.targets).backward()?;
    let bytes = grads.bytes();
    if world.size() == 1 {
        return Ok((bytes, 0.0));
    }
    let ms = timed(world, 31, || grads.all_reduce(world).expect("gradients of the same leaves"));
    let mut numbers = vec![1.0; bytes as usize / 4];
    let sum = timed(world, 31, || world.sum(&mut numbers).expect("a sum"));
    let line = json!({
        "line": "exchange", "sharing": name, "ranks": world.size(), "bytes": bytes, "ms": ms, "sum_ms": sum,
    });
    say(world, line);
    Ok((bytes, ms))
}
