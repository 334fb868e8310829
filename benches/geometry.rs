//! One PONITA layer, forward and backward, by fused kernels and by the engine's ops: time and the most memory that tensors held;
//! energy and forces of a network by fused kernels and by tables.
//!
//!     cargo bench --features cli --bench geometry [-- WORD...] [-- --json FILE]
//!
//! `layer`: geometry, kernel basis, convolution and MLP with gradients of every weight and of the features, as `se3conv fwd+bwd` of
//! other engines; `conv`: without norm and MLP, which are the same both ways. The ops' way holds arrays of edges x orientations x channels, so that it cannot have the largest shape on every adapter.

use serde_json::json;
use std::time::Instant;
use tiebeam::geometry::{Cell, Clouds, Graph, Grid, Ponita, PonitaConfig, PonitaInput, Route};
use tiebeam::{Gpu, Result, Rng, Tensor, files};

/// Graphs, nodes of each, orientations and channels: batches of molecules and of charged particles.
const SHAPES: [(&str, usize, usize); 4] =
    [("nbody", 100, 5), ("qm9-10", 10, 18), ("qm9-40", 40, 18), ("qm9", 100, 18)];
const ORIENTATIONS: usize = 20;
const CHANNELS: usize = 64;

struct Measured {
    seconds: f64,
    peak: u64,
}

/// On a device of its own, so that the peak is this run's. A step is long: the median of five says enough.
fn step(part: &str, graphs: usize, atoms: usize, route: Route) -> Result<Measured> {
    let gpu = Gpu::open()?;
    let nodes = graphs * atoms;
    let config = PonitaConfig {
        channels: CHANNELS,
        hidden: CHANNELS,
        basis: CHANNELS,
        layers: 1,
        ..PonitaConfig::default()
    };
    let mut net = Ponita::new(&gpu, config, Grid::fibonacci(ORIENTATIONS), &mut Rng::new(1))?;
    net.route = route;
    let mut positions = vec![0.0f32; 3 * nodes];
    Rng::new(2).fill_normal(&mut positions);
    let graph = Graph::full(&gpu, &positions, 3, &vec![atoms; graphs], false)?;
    let h = Tensor::randn(&gpu, [nodes, ORIENTATIONS, CHANNELS], &mut Rng::new(3)).requires_grad();
    h.evaluate();
    let work = || -> Result<()> {
        let (layer, field) = (&net.layers[0], net.field(&graph));
        let y = if part == "conv" { layer.conv.forward(&field, &h) } else { layer.forward(&field, &h) };
        let grads = y.square().mean_all().backward()?;
        if let Some(dh) = grads.get(&h) {
            dh.evaluate();
        }
        gpu.synchronize()
    };
    work()?;
    let mut times = Vec::new();
    for _ in 0..5 {
        let started = Instant::now();
        work()?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(Measured { seconds: times[2], peak: gpu.memory_stats().most_used })
}

fn run() -> Result<()> {
    // cargo passes --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let json = args.iter().position(|a| a == "--json").and_then(|at| args.get(at + 1));
    let words: Vec<&String> = args.iter().filter(|a| *a != "--json" && Some(*a) != json).collect();
    let gpu = Gpu::open()?;
    println!("{}", gpu.adapter());
    let mut lines = String::new();
    for (shape, part) in SHAPES.iter().flat_map(|shape| ["conv", "layer"].map(|part| (shape, part))) {
        let &(shape, graphs, atoms) = shape;
        let name = format!("{shape} {part}");
        if !words.iter().all(|w| name.split(' ').any(|part| part == w.as_str())) {
            continue;
        }
        let edges = graphs * atoms * (atoms - 1);
        println!("{name}: {graphs} graphs of {atoms} nodes, {edges} edges, O {ORIENTATIONS}, C {CHANNELS}");
        let fused = step(part, graphs, atoms, Route::Fused)?;
        let show = |what: &str, m: &Measured| {
            println!(
                "    {what:6} {:9.1} ms, at most {:7.1} MiB",
                m.seconds * 1e3,
                m.peak as f64 / (1 << 20) as f64
            )
        };
        show("fused", &fused);
        let plain = step(part, graphs, atoms, Route::Plain);
        match &plain {
            Ok(plain) => {
                show("ops", plain);
                let (time, memory) = (plain.seconds / fused.seconds, plain.peak as f64 / fused.peak as f64);
                println!("    {time:.2} times as fast, {memory:.2} times less memory");
            }
            Err(error) => println!("    ops: {error}"),
        }
        let plain = plain.ok();
        let line = json!({"name": name, "edges": edges, "fused_ms": fused.seconds * 1e3, "fused_bytes": fused.peak,
            "ops_ms": plain.as_ref().map(|m| m.seconds * 1e3), "ops_bytes": plain.as_ref().map(|m| m.peak),
            "adapter": gpu.adapter().name, "driver": gpu.adapter().driver});
        lines += &format!("{line}\n");
    }
    for basis in BASES {
        let name = format!("energy-forces tables K{basis}");
        if words.iter().all(|w| name.split(' ').any(|part| part == w.as_str())) {
            lines += &format!("{}\n", tables(&gpu, &name, basis)?);
        }
    }
    match json {
        Some(path) => files::replace_with(path.as_ref(), lines),
        None => Ok(()),
    }
}

/// Widths of the basis that tables are compared at.
const BASES: [usize; 2] = [64, 256];
/// Atoms in a periodic cell, each with about 33 neighbours within the radius: a step of dynamics.
const ATOMS: usize = 125;

/// Energy and forces without gradients of weights, 3 layers, by fused kernels and by tables in turn.
///
/// Expected from counting multiply-adds an edge, orientation and channel: forward K against 20, backward 2 K (features and basis)
/// against 48, so that convolutions should be `3 K / 68` times as fast, 2.8 at K 64 and 11 at K 256, where loads keep
/// up, and somewhat less where a coefficient costs as much to load as to use, as on llvmpipe. The network of the basis goes as
/// well, norm and MLP stay.
fn tables(gpu: &Gpu, name: &str, basis: usize) -> Result<serde_json::Value> {
    let (radius, side) = (2.0f32, 5.0f32);
    let config = PonitaConfig {
        channels: CHANNELS,
        hidden: CHANNELS,
        basis,
        layers: 3,
        radius: Some(radius),
        ..PonitaConfig::default()
    };
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
            // The first makes pipelines.
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
