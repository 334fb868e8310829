//! Benchmarks one PONITA layer, forward and backward, by fused kernels and by the engine's ops: time and peak memory of tensors.
//! Also benchmarks energy and forces of a network by fused kernels and by tables.
//!
//!     cargo bench --bench geometry [-- [WORD...] [--json FILE]]
//!
//! `layer` is geometry, kernel basis, convolution and MLP, with gradients of every weight and of the features, as `se3conv
//! fwd+bwd` of other engines. `conv` is the same without norm and MLP. Both use 20 orientations. Those of a dodecahedron come in
//! opposite pairs, so an edge and its reverse share kernels. Those of a Fibonacci lattice do not; other engines were timed with
//! these.
//!
//! The expected ratio follows from counting multiply-adds per row of kernels, with F = 16 features and H = K = C. There are edges
//! x orientations rows, half as many on the dodecahedron. The ops take `(2 F + 6 C) C`, and the fused kernels take `(F + 2 C) C`
//! more, because they recompute the basis and the kernels. At the same rate, fused kernels would be 0.74 times as fast on the
//! lattice and 1.5 times as fast on the dodecahedron. They gain more than that because the ops also write and read some 14 arrays
//! of rows by C, while fused kernels process chunks of a few thousand rows that stay in the cache. Where a binding is at most 128
//! MiB, the ops cannot run the largest shape, and their memory is scaled from the shape before it.

use serde_json::{Value, json};
use std::time::Instant;
use tiebeam::geometry::{Cell, Clouds, Graph, Grid, Ponita, PonitaConfig, PonitaInput, Route};
use tiebeam::{Gpu, Result, Rng, Tensor, files};

/// Name, graphs, and nodes per graph, of batches of molecules and of charged particles.
const SHAPES: [(&str, usize, usize); 4] =
    [("nbody", 100, 5), ("qm9-10", 10, 18), ("qm9-40", 40, 18), ("qm9", 100, 18)];
const CHANNELS: usize = 64;

/// A training step of one layer. It has its own device, whose peak memory is then that of this step alone.
struct Step {
    gpu: Gpu,
    net: Ponita,
    graph: Graph,
    h: Tensor,
    whole: bool,
}

impl Step {
    fn new(part: &str, graphs: usize, atoms: usize, grid: &Grid, route: Route) -> Result<Step> {
        let gpu = Gpu::open()?;
        let nodes = graphs * atoms;
        let config = PonitaConfig::default().channels(CHANNELS).hidden(CHANNELS).basis(CHANNELS).layers(1);
        let mut net = Ponita::new(&gpu, config, grid.clone(), &mut Rng::new(1))?;
        net.route = route;
        let mut positions = vec![0.0f32; 3 * nodes];
        Rng::new(2).fill_normal(&mut positions);
        let graph = Graph::full(&gpu, &positions, 3, &vec![atoms; graphs], false)?;
        let h = Tensor::randn(&gpu, [nodes, grid.len(), CHANNELS], &mut Rng::new(3)).requires_grad();
        h.evaluate();
        let step = Step { gpu, net, graph, h, whole: part == "layer" };
        // The first step compiles pipelines.
        step.seconds()?;
        Ok(step)
    }

    fn seconds(&self) -> Result<f64> {
        let started = Instant::now();
        let (layer, field) = (&self.net.layers[0], self.net.field(&self.graph));
        let y = match self.whole {
            true => layer.forward(&field, &self.h),
            false => layer.conv.forward(&field, &self.h),
        };
        let grads = y.square().mean_all().backward()?;
        if let Some(dh) = grads.get(&self.h) {
            dh.evaluate();
        }
        drop(grads);
        self.gpu.synchronize()?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn most_used(&self) -> u64 {
        self.gpu.memory_stats().most_used
    }
}

/// Times a row: both ways in turn, with the median of seven.
fn row(
    name: &str,
    edges: usize,
    steps: [Result<Step>; 2],
    before: &mut Option<(usize, u64)>,
) -> Result<Value> {
    let [fused, ops] = steps;
    let fused = fused?;
    let mut times = [vec![], vec![]];
    for _ in 0..7 {
        times[0].push(fused.seconds()?);
        if let Ok(ops) = &ops {
            times[1].push(ops.seconds()?);
        }
    }
    let [fused_ms, ops_ms] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).map(|seconds| 1e3 * seconds)
    });
    let ms = fused_ms.unwrap_or(f64::NAN);
    let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
    println!("    fused {ms:9.1} ms, at most {:7.1} MiB", mib(fused.most_used()));
    let mut bytes = ops.as_ref().ok().map(Step::most_used);
    match (&ops, ops_ms) {
        (Ok(ops), Some(theirs)) => {
            *before = Some((edges, ops.most_used()));
            println!("    ops   {theirs:9.1} ms, at most {:7.1} MiB", mib(ops.most_used()));
            println!("    {:.2} times as fast", theirs / ms);
        }
        (Err(error), _) => {
            println!("    ops: {error}");
            bytes = before.map(|(fewer, bytes)| (bytes as f64 * edges as f64 / fewer as f64) as u64);
            if let Some(bytes) = bytes {
                println!("    ops would hold {:.1} MiB, by the edges of the shape before", mib(bytes));
            }
        }
        _ => {}
    }
    if let Some(bytes) = bytes {
        println!("    {:.2} times less memory", bytes as f64 / fused.most_used() as f64);
    }
    Ok(
        json!({"name": name, "edges": edges, "fused_ms": ms, "fused_bytes": fused.most_used(), "ops_ms": ops_ms,
        "ops_bytes": bytes, "ops_measured": ops_ms.is_some(), "adapter": fused.gpu.adapter().name,
        "driver": fused.gpu.adapter().driver}),
    )
}

fn run() -> Result<()> {
    // cargo passes `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench" && a != "--").collect();
    let json = args.iter().position(|a| a == "--json").and_then(|at| args.get(at + 1));
    let words: Vec<&String> = args.iter().filter(|a| *a != "--json" && Some(*a) != json).collect();
    let wanted = |name: &str| words.iter().all(|w| name.split(' ').any(|part| part == w.as_str()));
    let gpu = Gpu::open()?;
    println!("{}", gpu.adapter());
    let mut lines = String::new();
    for (kind, grid) in [("dodecahedron", Grid::dodecahedron()), ("fibonacci", Grid::fibonacci(20))] {
        for part in ["conv", "layer"] {
            let mut before = None;
            for (shape, graphs, atoms) in SHAPES {
                let name = format!("{shape} {part} {kind}");
                if !wanted(&name) {
                    continue;
                }
                let edges = graphs * atoms * (atoms - 1);
                println!("{name}: {graphs} graphs of {atoms} nodes, {edges} edges, C {CHANNELS}");
                let steps = [Route::Fused, Route::Plain].map(|r| Step::new(part, graphs, atoms, &grid, r));
                lines += &format!("{}\n", row(&name, edges, steps, &mut before)?);
            }
        }
    }
    for basis in BASES {
        let name = format!("energy-forces tables K{basis}");
        if wanted(&name) {
            lines += &format!("{}\n", tables(&gpu, &name, basis)?);
        }
    }
    match json {
        Some(path) => files::replace_with(path.as_ref(), lines),
        None => Ok(()),
    }
}

/// Widths of the basis at which tables are compared.
const BASES: [usize; 2] = [64, 256];
/// Atoms in a periodic cell, each with about 33 neighbours within the radius, as in a step of dynamics.
const ATOMS: usize = 125;

/// Times energy and forces of 3 layers, without gradients of weights, by fused kernels and by tables in turn.
///
/// The expected ratio follows from counting multiply-adds per edge, orientation and channel: fused kernels take K forward and 2 K
/// backward (for features and basis), tables take 20 and 48. Fused kernels of an icosahedron are computed once for an edge and
/// its reverse, but tables are read for both. So tables should make convolutions `3 K / 136` times as fast, 1.4 at K 64 and 5.6
/// at K 256, if loads keep up. They gain less where loading a coefficient costs as much as using it, as on llvmpipe. Tables also
/// save the network of the basis. Norm and MLP stay the same.
fn tables(gpu: &Gpu, name: &str, basis: usize) -> Result<Value> {
    let (radius, side) = (2.0f32, 5.0f32);
    let config = PonitaConfig::default()
        .channels(CHANNELS)
        .hidden(CHANNELS)
        .basis(basis)
        .layers(3)
        .radius(Some(radius));
    let full = Ponita::new(gpu, config, Grid::icosahedron(), &mut Rng::new(1))?;
    let mut positions = vec![0.0f32; 3 * ATOMS];
    Rng::new(2).fill_uniform(&mut positions);
    positions.iter_mut().for_each(|x| *x *= side);
    let cells = [Some(Cell::cuboid([side as f64; 3]))];
    let of = Clouds { positions: &positions, dimension: 3, sizes: &[ATOMS], cells: &cells };
    let graph = Graph::radius(gpu, &of, radius, true)?;
    let input = PonitaInput::scalars(&Tensor::ones(gpu, [ATOMS, 1]));
    let started = Instant::now();
    let fast = full.tabulate(Ponita::TABLE_POINTS)?;
    gpu.synchronize()?;
    let made = started.elapsed().as_secs_f64();
    let mut times = [vec![], vec![]];
    for round in 0..8 {
        for (net, times) in [&full, &fast].into_iter().zip(&mut times) {
            let started = Instant::now();
            net.energy_forces(&graph, &input)?;
            // The first round compiles pipelines.
            if round > 0 {
                times.push(started.elapsed().as_secs_f64());
            }
        }
    }
    let [fused, tables] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        1e3 * times[times.len() / 2]
    });
    let edges = graph.edges().len();
    println!(
        "{name}: {ATOMS} atoms, {edges} edges, O 12, C {CHANNELS}, 3 layers; tables made in {made:.2} s"
    );
    println!("    fused {fused:.1} ms, tables {tables:.1} ms: {:.2} times as fast", fused / tables);
    Ok(json!({"name": name, "edges": edges, "fused_ms": fused, "tables_ms": tables, "making_s": made,
        "adapter": gpu.adapter().name, "driver": gpu.adapter().driver}))
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
