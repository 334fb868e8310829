//! Convolution on the affine groups of the plane, which recognises shapes however they are rotated, stretched and sheared.
//!
//!     cargo run --release --example lie_group
//!     cargo test --release --example lie_group
//!
//! The network is PONITA's relative on `GL+(2)` and `SL(2)`. Features belong to pairs (point, frame `H`). A kernel depends on the
//! offset in the receiver's frame, `H^-1 (x' - x)`, and on the relative frame `H^-1 H'`. The relative frame enters through its
//! polar decomposition `R exp(S)`: the cosine and sine of the rotation, and the symmetric `S` (without its trace on `SL(2)`).
//! Offset and relative frame are invariant when points and frames are moved by the same element of the group, so the network is
//! exactly invariant under that. Source: Mironenco, Forre 2024, "Lie Group Decompositions for Equivariant Neural Networks", arXiv
//! 2310.11366.
//!
//! Frames are a random sample of the group, and other frames give other outputs. For rotations this error falls with the number
//! of frames. For stretches a part of it remains, because the group is not compact and no sample covers it. Frames at the square
//! root of the cloud's covariance `C` avoid that: with `W = C^(1/2)`, a map `g` moves the frames `W R` to `g W R`, which are
//! frames of the moved cloud up to a rotation, and an even sample of angles covers rotations. `W` does not preserve areas, so on
//! `SL(2)` it is scaled to determinant 1.
//!
//! The example trains on four shapes in their own orientation, and tests them under random affine maps. It does so with the
//! identity as the only frame, with frames drawn from the group, and with frames at the covariance. With `--precision f16|bf16` a
//! training step's products and activations have 16 bits; tests are in f32.

#[path = "common/terminal.rs"]
mod terminal;

use clap::Parser;
use std::f64::consts::TAU;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tiebeam::geometry::{Basis, Graph, invariants};
use tiebeam::nn::{Activation, Init, Linear, Mlp, Module, Norm, Parameters, Visit, VisitMut, module};
use tiebeam::optim::{AdamW, AdamWConfig, Group as Leaves, LossScale, Schedule};
use tiebeam::train::Trainer;
use tiebeam::{Gpu, Precision, Result, Rng, Tensor, autocast, no_grad};

/// Learn shapes and recognise them under affine maps.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// Training steps
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Frames drawn from the group in each step
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=256))]
    frames: u32,
    /// Shapes per step
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=256))]
    batch: u32,
    /// Volume-preserving maps only
    #[arg(long)]
    special: bool,
    /// The precision of training
    #[command(flatten)]
    scope: terminal::Scope,
    /// Seed of weights, shapes and frames
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

type Matrix = [[f64; 2]; 2];

const IDENTITY: Matrix = [[1.0, 0.0], [0.0, 1.0]];
const CHANNELS: usize = 16;
const LAYERS: usize = 2;
const POINTS: usize = 16;
const SHAPES: [&str; 4] = ["triangle", "square", "circle", "star"];

fn times(a: &Matrix, b: &Matrix) -> Matrix {
    std::array::from_fn(|i| std::array::from_fn(|j| a[i][0] * b[0][j] + a[i][1] * b[1][j]))
}

fn inverse(m: &Matrix) -> Matrix {
    let det = m[0][0] * m[1][1] - m[0][1] * m[1][0];
    [[m[1][1] / det, -m[0][1] / det], [-m[1][0] / det, m[0][0] / det]]
}

/// Applies a function to the eigenvalues of a symmetric matrix.
fn symmetric(m: &Matrix, f: impl Fn(f64) -> f64) -> Matrix {
    let (mean, half) = (0.5 * (m[0][0] + m[1][1]), 0.5 * (m[0][0] - m[1][1]));
    let radius = half.hypot(m[0][1]);
    let (high, low) = (f(mean + radius), f(mean - radius));
    // The cosine and sine of twice the eigenvectors' angle. For a multiple of the identity, any angle is right.
    let (c, s) = if radius > 0.0 { (half / radius, m[0][1] / radius) } else { (1.0, 0.0) };
    let (sum, difference) = (0.5 * (high + low), 0.5 * (high - low));
    [[sum + c * difference, s * difference], [s * difference, sum - c * difference]]
}

fn rotation(angle: f64) -> Matrix {
    [[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]
}

/// Decomposes `m = R exp(S)` into the rotation and the symmetric `S`. The determinant must be positive.
fn polar(m: &Matrix) -> (Matrix, Matrix) {
    // The rotation that leaves a symmetric factor, which is then the one of largest trace.
    let r = rotation((m[1][0] - m[0][1]).atan2(m[0][0] + m[1][1]));
    let rest = times(&[[r[0][0], r[1][0]], [r[0][1], r[1][1]]], m);
    (r, symmetric(&rest, f64::ln))
}

/// A group of linear maps.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Group {
    /// `GL+(2)`, all maps that preserve the orientation.
    General,
    /// `SL(2)`, those that preserve areas too.
    Special,
}

impl Group {
    /// Number of attributes of a pair of frames.
    fn size(self) -> usize {
        if self == Group::General { 5 } else { 4 }
    }

    /// Draws `R exp(S)` with a uniform angle and a normal `S` of this standard deviation.
    fn draw(self, spread: f64, rng: &mut Rng) -> Matrix {
        self.sample(1, spread, rng)[0]
    }

    /// Draws `count` of them. Angles are evenly spaced from a random start: each is uniform by itself, and averages over the
    /// sample have less variance.
    fn sample(self, count: usize, spread: f64, rng: &mut Rng) -> Vec<Matrix> {
        let (mut start, mut draws) = ([0.0f32], vec![0.0f32; 3 * count]);
        rng.fill_uniform(&mut start);
        rng.fill_normal(&mut draws);
        let one = |(i, s): (usize, &[f32])| {
            let [a, b, c] = [0, 1, 2].map(|k| spread * s[k] as f64);
            let trace = if self == Group::General { a } else { 0.0 };
            let angle = TAU * (i as f64 + start[0] as f64) / count as f64;
            times(&rotation(angle), &symmetric(&[[trace + b, c], [c, trace - b]], f64::exp))
        };
        draws.chunks_exact(3).enumerate().map(one).collect()
    }

    /// Returns the inputs of a kernel for two frames: cosine and sine of the relative rotation, and `S`.
    fn attributes(self, own: &Matrix, other: &Matrix) -> Vec<f32> {
        let (r, s) = polar(&times(&inverse(own), other));
        let mut all = vec![r[0][0], r[1][0], 0.5 * (s[0][0] - s[1][1]), s[0][1]];
        if self == Group::General {
            all.push(0.5 * (s[0][0] + s[1][1]));
        }
        all.into_iter().map(|x| x as f32).collect()
    }
}

struct Layer {
    /// Both kernels are `[channels, basis]`.
    kernel: Linear,
    fiber_kernel: Linear,
    norm: Norm,
    mlp: Mlp,
}

/// A network that classifies point clouds.
struct Net {
    group: Group,
    view: View,
    basis: Basis,
    fiber_basis: Basis,
    embed: Tensor,
    layers: Vec<Layer>,
    head: Linear,
}

/// Degrees of the polynomial features of an offset and of a pair of frames.
const DEGREES: [usize; 2] = [3, 2];

impl Net {
    fn new(gpu: &Gpu, group: Group, view: View, rng: &mut Rng) -> Net {
        let c = CHANNELS;
        let uniform = |fan: usize| Init::Uniform(1.0 / (fan as f32).sqrt());
        let basis = |attributes: usize, degree: usize, rng: &mut Rng| {
            let f = invariants::polynomial_size(attributes, degree);
            Basis {
                w1: uniform(f).leaf(gpu, [c, f], rng),
                b1: uniform(f).leaf(gpu, [c], rng),
                w2: uniform(c).leaf(gpu, [c, c], rng),
                b2: uniform(c).leaf(gpu, [c], rng),
            }
        };
        let layer = |rng: &mut Rng| Layer {
            kernel: Linear::new(gpu, c, c, false, uniform(c), rng),
            fiber_kernel: Linear::new(gpu, c, c, false, uniform(c), rng),
            norm: Norm::layer(gpu, c, 1e-5),
            mlp: Mlp {
                gate: None,
                up: Linear::new(gpu, c, 2 * c, true, uniform(c), rng),
                down: Linear::new(gpu, 2 * c, c, true, uniform(2 * c), rng),
                activation: Activation::Gelu,
            },
        };
        Net {
            group,
            view,
            basis: basis(2, DEGREES[0], rng),
            fiber_basis: basis(group.size(), DEGREES[1], rng),
            embed: uniform(1).leaf(gpu, [c], rng),
            layers: (0..LAYERS).map(|_| layer(rng)).collect(),
            head: Linear::new(gpu, c, SHAPES.len(), true, uniform(c), rng),
        }
    }

    /// Computes the logits of every graph, `[graphs, classes]`. They are invariant when points and `frames` move together.
    fn forward(&self, graph: &Graph, frames: &[Matrix]) -> Tensor {
        let (gpu, a, edges) = (graph.gpu(), frames.len(), graph.edges());
        let inverses: Vec<f32> = frames.iter().flat_map(inverse).flatten().map(|x| x as f32).collect();
        let inverses = Tensor::from_slice(gpu, &inverses, [2 * a, 2]);
        let pairs = frames.iter().flat_map(|p| frames.iter().flat_map(|q| self.group.attributes(p, q)));
        let pairs = Tensor::from_slice(gpu, &pairs.collect::<Vec<f32>>(), [a, a, self.group.size()]);
        // Offsets and what is computed of them once are in f32, whatever the scope, as in PONITA.
        let (basis, fiber) = autocast(Precision::F32, || {
            let offsets = graph.vectors().matmul(&inverses.t()).reshape([edges.len(), a, 2]);
            // An envelope of the distance in the receiver's frame.
            let envelope = offsets.square().sum(2).scale(-0.5).exp().unsqueeze(2);
            let basis = self.basis.forward(&invariants::polynomial(&offsets, DEGREES[0])).mul(&envelope);
            (basis, self.fiber_basis.forward(&invariants::polynomial(&pairs, DEGREES[1])))
        });
        let mut h = self.embed.reshape([1, 1, CHANNELS]).expand([graph.nodes(), a, CHANNELS]).contiguous();
        for layer in &self.layers {
            let messages = h.index_select(0, edges.source_ids()).mul(&layer.kernel.forward(&basis));
            let x1 = messages.index_sum(0, edges.destination_ids(), edges.nodes());
            let x2 = x1.fiber_conv(&layer.fiber_kernel.forward(&fiber), None);
            h = layer.mlp.forward(&layer.norm.forward(&x2), Some(&h));
        }
        self.head.forward(&graph.pool(&h.mean(1)).scale(1.0 / POINTS as f32))
    }
}

impl Module for Net {
    fn visit(&self, visit: &mut Visit) {
        visit.field("basis", &self.basis);
        visit.field("fiber_basis", &self.fiber_basis);
        visit.field("embed", &self.embed);
        for (l, layer) in self.layers.iter().enumerate() {
            visit.field(&format!("layer{l}"), layer);
        }
        visit.field("head", &self.head);
    }
    fn visit_mut(&mut self, visit: &mut VisitMut) {
        visit.field(&mut self.basis);
        visit.field(&mut self.fiber_basis);
        visit.field(&mut self.embed);
        visit.field(&mut self.layers);
        visit.field(&mut self.head);
    }
}

module!(Layer { kernel, fiber_kernel, norm, mlp });

/// Returns the corners of a shape's outline. A circle has many.
fn corners(shape: usize) -> Vec<[f64; 2]> {
    let ring = |n: usize, radius: &dyn Fn(usize) -> f64| {
        let at = |i: usize| {
            let angle = TAU * i as f64 / n as f64;
            [radius(i) * angle.cos(), radius(i) * angle.sin()]
        };
        (0..n).map(at).collect()
    };
    match shape {
        0 => ring(3, &|_| 1.3),
        1 => ring(4, &|_| 1.1),
        2 => ring(48, &|_| 1.0),
        _ => ring(10, &|i| if i % 2 == 0 { 1.3 } else { 0.45 }),
    }
}

/// Draws points along an outline, with a little noise, relative to their centre and transformed by `map`.
fn points(shape: usize, map: &Matrix, rng: &mut Rng) -> Vec<f32> {
    let corners = corners(shape);
    let (mut start, mut noise) = ([0.0f32], [0.0f32; 2 * POINTS]);
    rng.fill_uniform(&mut start);
    rng.fill_normal(&mut noise);
    let mut all = Vec::new();
    for i in 0..POINTS {
        let along = (i as f64 + start[0] as f64) / POINTS as f64 * corners.len() as f64;
        let (a, b) = (corners[along as usize % corners.len()], corners[(along as usize + 1) % corners.len()]);
        let x: [f64; 2] =
            std::array::from_fn(|k| a[k] + along.fract() * (b[k] - a[k]) + 0.03 * noise[2 * i + k] as f64);
        all.extend(map.map(|row| (row[0] * x[0] + row[1] * x[1]) as f32));
    }
    all
}

/// Returns a batch of shapes, each under its own map, and their classes. The shapes take turns.
fn batch(
    net: &Net,
    size: usize,
    mut map: impl FnMut(&mut Rng) -> Matrix,
    rng: &mut Rng,
) -> Result<(Graph, Vec<u32>)> {
    let classes: Vec<u32> = (0..size).map(|i| (i % SHAPES.len()) as u32).collect();
    let positions: Vec<f32> = classes
        .iter()
        .flat_map(|&class| {
            let map = map(rng);
            net.view.anchored(net.group, points(class as usize, &map, rng))
        })
        .collect();
    let graph = Graph::full(net.embed.gpu(), &positions, 2, &vec![POINTS; size], true)?;
    Ok((graph, classes))
}

/// The frames that a network uses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum View {
    /// Only the identity, which gives a network without equivariance.
    Identity,
    /// Frames drawn from the group.
    Sampled,
    /// Frames `W R`: rotations, followed by the square root of the cloud's covariance.
    Covariance,
}

/// How far frames and test maps stretch: the standard deviation of the logarithm.
const SPREAD: f64 = 0.3;

impl View {
    fn frames(self, group: Group, count: usize, rng: &mut Rng) -> Vec<Matrix> {
        match self {
            View::Identity => vec![IDENTITY],
            View::Sampled => group.sample(count, SPREAD, rng),
            View::Covariance => group.sample(count, 0.0, rng),
        }
    }

    /// Returns a cloud's coordinates relative to its own `W`. For the other views, `W` is the identity.
    fn anchored(self, group: Group, points: Vec<f32>) -> Vec<f32> {
        if self != View::Covariance {
            return points;
        }
        let inverse = inverse(&anchor(group, &points));
        points
            .chunks_exact(2)
            .flat_map(|x| inverse.map(|r| (r[0] * x[0] as f64 + r[1] * x[1] as f64) as f32))
            .collect()
    }
}

/// Returns `W`, the square root of the covariance.
fn anchor(group: Group, points: &[f32]) -> Matrix {
    let n = (points.len() / 2) as f64;
    let mean = |k: usize| points.iter().skip(k).step_by(2).map(|&x| x as f64).sum::<f64>() / n;
    let means = [mean(0), mean(1)];
    let about = |x: &[f32], k: usize| x[k] as f64 - means[k];
    let of = |i: usize, k: usize| points.chunks_exact(2).map(|x| about(x, i) * about(x, k)).sum::<f64>() / n;
    let covariance = [[of(0, 0), of(0, 1)], [of(0, 1), of(1, 1)]];
    let root = symmetric(&covariance, |x| x.max(1e-12).sqrt());
    let det = root[0][0] * root[1][1] - root[0][1] * root[1][0];
    match group {
        Group::General => root,
        Group::Special => root.map(|row| row.map(|x| x / det.sqrt())),
    }
}

/// Trains on shapes in their own orientation. Returns the network and the losses of the first step, every tenth one and the
/// last, and `None` if Ctrl-C stopped it.
fn train(
    gpu: &Gpu,
    args: &Args,
    group: Group,
    view: View,
    stop: &Arc<AtomicBool>,
) -> Result<Option<(Net, Vec<f32>)>> {
    let mut rng = Rng::new(args.seed);
    let net = Net::new(gpu, group, view, &mut rng);
    let leaves = Leaves::new(Parameters::of(&net).trainable());
    let optimizer = AdamW::new(gpu, vec![leaves], AdamWConfig::default().lr(4e-3).clip(Some(1.0)))?;
    let steps = args.steps as u64;
    let mut trainer = Trainer::new(optimizer)
        .schedule(Schedule::WarmupCosine { warmup: steps / 10, total: steps, floor: 0.0 })
        .scale(LossScale::of(gpu, args.scope.precision)?)
        .rng(rng)
        .report_every(10)
        .stop(stop.clone());
    let bar = terminal::bar("{bar:32} {pos}/{len} steps {msg} ETA {eta}", 0, steps);
    let mut losses = Vec::new();
    let loss = |_, rng: &mut Rng| {
        let (graph, classes) = batch(&net, args.batch as usize, |_| IDENTITY, rng)?;
        let frames = view.frames(group, args.frames as usize, rng);
        Ok(autocast(args.scope.precision, || {
            let classes = Tensor::from_slice(gpu, &classes, [classes.len()]);
            net.forward(&graph, &frames).cross_entropy(&classes, None)
        }))
    };
    let done = trainer.train(steps, loss, |report| {
        terminal::events(&bar, "event", report);
        losses.push(report.loss);
        bar.set_message(format!("loss {:.3}", report.loss));
        bar.set_position(report.step);
        Ok(())
    })?;
    bar.finish_and_clear();
    Ok(done.then_some((net, losses)))
}

/// Returns the fraction of shapes that are classified correctly, each under its own map.
fn accuracy(net: &Net, count: usize, spread: Option<f64>, rng: &mut Rng) -> Result<f64> {
    const BATCHES: usize = 10;
    let (mut right, mut all) = (0, 0);
    for _ in 0..BATCHES {
        let map = |rng: &mut Rng| spread.map_or(IDENTITY, |spread| net.group.draw(spread, rng));
        let (graph, classes) = batch(net, 20, map, rng)?;
        let logits =
            no_grad(|| net.forward(&graph, &net.view.frames(net.group, count, rng))).to_vec::<f32>()?;
        for (row, &class) in logits.chunks_exact(SHAPES.len()).zip(&classes) {
            right += row.iter().all(|x| *x <= row[class as usize]) as usize;
            all += 1;
        }
    }
    Ok(right as f64 / all as f64)
}

/// Returns the root mean square change of the outputs, relative to their standard deviation, when points are moved by `g` and the
/// frames `own` are replaced by `moved`.
fn change(net: &Net, own: &[Matrix], g: &Matrix, moved: &[Matrix]) -> Result<f64> {
    let answers = |map: &Matrix, frames: &[Matrix]| {
        let (graph, _) = batch(net, 8, |_| *map, &mut Rng::new(11))?;
        no_grad(|| net.forward(&graph, frames)).to_vec::<f32>()
    };
    let (a, b) = (answers(&IDENTITY, own)?, answers(g, moved)?);
    let mean = a.iter().map(|&x| x as f64).sum::<f64>() / a.len() as f64;
    let square = |x: f64| x * x;
    let spread: f64 = a.iter().map(|&x| square(x as f64 - mean)).sum();
    let change: f64 = a.iter().zip(&b).map(|(&a, &b)| square(a as f64 - b as f64)).sum();
    Ok((change / spread).sqrt())
}

fn body(args: &Args) -> Result<()> {
    let gpu = Gpu::open()?;
    println!("adapter    {}", gpu.adapter());
    let group = if args.special { Group::Special } else { Group::General };
    let stop = terminal::interruptible()?;
    for (name, view) in [
        ("the identity alone", View::Identity),
        ("frames of the group", View::Sampled),
        ("frames at the covariance", View::Covariance),
    ] {
        let Some((net, _)) = train(&gpu, args, group, view, &stop)? else {
            println!("stopped");
            return Ok(());
        };
        let mut rng = Rng::new(args.seed ^ 0x7e57);
        let count = args.frames as usize;
        let plain = accuracy(&net, count, None, &mut rng)?;
        let mapped = accuracy(&net, count, Some(SPREAD), &mut rng)?;
        println!(
            "{name:<24} shapes as learned {:.1}%, under random maps {:.1}%",
            100.0 * plain,
            100.0 * mapped
        );
        if view != View::Identity {
            report(&net, &mut rng)?;
        }
    }
    Ok(())
}

/// Prints how much the outputs change under a map of the group and new frames, for several numbers of frames.
fn report(net: &Net, rng: &mut Rng) -> Result<()> {
    let (turn, map) = (rotation(1.0), net.group.draw(SPREAD, rng));
    for count in [4, 16, 64] {
        let mut other = || net.view.frames(net.group, count, rng);
        let (turned, mapped) =
            (change(net, &other(), &turn, &other())?, change(net, &other(), &map, &other())?);
        println!(
            "  {count:2} frames: answers change by {turned:.3} of their spread when turned, {mapped:.3} under a map"
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    terminal::main(|| body(&Args::parse()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: &Matrix, b: &Matrix, bound: f64) -> bool {
        a.iter().flatten().zip(b.iter().flatten()).all(|(x, y)| (x - y).abs() <= bound)
    }

    #[test]
    fn polar_parts_multiply_to_the_whole() {
        let mut rng = Rng::new(1);
        for group in [Group::General, Group::Special] {
            for _ in 0..100 {
                let m = group.draw(0.8, &mut rng);
                let (r, s) = polar(&m);
                let size = m.iter().flatten().fold(1.0f64, |most, x| most.max(x.abs()));
                assert!(near(&times(&r, &symmetric(&s, f64::exp)), &m, 1e-12 * size));
                assert!(near(&times(&r, &[[r[0][0], r[1][0]], [r[0][1], r[1][1]]]), &IDENTITY, 1e-12));
                assert!(s[0][1] == s[1][0] && r[0][0] * r[1][1] - r[0][1] * r[1][0] > 0.0);
                let det = m[0][0] * m[1][1] - m[0][1] * m[1][0];
                assert!((det.ln() - s[0][0] - s[1][1]).abs() < 1e-9, "{det}");
                assert_eq!(group == Group::Special, (det - 1.0).abs() < 1e-9);
            }
        }
    }

    /// The outputs are the same if frames move with the points, but not if frames stay. For rotations, the error falls with the
    /// number of frames.
    #[test]
    fn answers_are_invariant_under_the_group() {
        let gpu = Gpu::open().expect("an adapter");
        for group in [Group::General, Group::Special] {
            let mut rng = Rng::new(3);
            let net = Net::new(&gpu, group, View::Sampled, &mut rng);
            for _ in 0..3 {
                let g = group.draw(0.5, &mut rng);
                let own = net.view.frames(group, 5, &mut rng);
                let moved: Vec<Matrix> = own.iter().map(|h| times(&g, h)).collect();
                let exact = change(&net, &own, &g, &moved).expect("answers");
                let still = change(&net, &own, &g, &own).expect("answers");
                assert!(exact < 1e-4 && still > 1e-2, "{group:?} {g:?}: {exact} moved, {still} still");
            }
            let mut error = |count: usize| {
                let one = |rng: &mut Rng| {
                    let mut other = || net.view.frames(group, count, rng);
                    change(&net, &other(), &rotation(1.0), &other()).expect("answers").powi(2)
                };
                ((0..4).map(|_| one(&mut rng)).sum::<f64>() / 4.0).sqrt()
            };
            let (few, many) = (error(2), error(32));
            assert!(many < 0.6 * few, "{group:?}: {few} with 2 frames, {many} with 32");
        }
    }

    /// Every precision learns, and rounds in its own way.
    #[test]
    fn every_precision_learns() {
        let gpu = Gpu::open().expect("an adapter");
        let losses = |precision: &str| {
            let args =
                ["lie_group", "--steps", "81", "--frames", "4", "--batch", "8", "--precision", precision];
            let args = Args::try_parse_from(args).expect("arguments");
            let stop = Arc::default();
            let trained = train(&gpu, &args, Group::General, View::Covariance, &stop).expect("training");
            trained.expect("it was not stopped").1
        };
        let want = losses("f32");
        for (precision, bound) in [("f32", 0.0), ("f16", 2e-3), ("bf16", 2e-2)] {
            let got = if precision == "f32" { want.clone() } else { losses(precision) };
            let (first, last) = (got[0], got[got.len() - 1]);
            assert!(got.iter().all(|x| x.is_finite()) && last < 0.7 * first, "{precision}: {got:?}");
            assert!((first - want[0]).abs() <= bound, "{precision}: {first} at first, {} in f32", want[0]);
            assert_eq!(got == want, precision == "f32", "{precision}: {got:?}");
        }
        assert!(Args::try_parse_from(["lie_group", "--precision", "f64"]).is_err());
    }

    /// With frames at the covariance, any map (also a stretch) amounts to a rotation of the frames, which an even sample of
    /// angles covers.
    #[test]
    fn frames_at_the_covariance_take_up_stretches() {
        let gpu = Gpu::open().expect("an adapter");
        let mut rng = Rng::new(5);
        for group in [Group::General, Group::Special] {
            let g = group.draw(0.5, &mut rng);
            let cloud = points(3, &IDENTITY, &mut Rng::new(9));
            let moved = points(3, &g, &mut Rng::new(9));
            let q = times(&times(&inverse(&anchor(group, &moved)), &g), &anchor(group, &cloud));
            assert!(
                near(&times(&q, &[[q[0][0], q[1][0]], [q[0][1], q[1][1]]]), &IDENTITY, 1e-5),
                "{group:?} {q:?}"
            );
            let change = |view: View, rng: &mut Rng| {
                let net = Net::new(&gpu, group, view, &mut Rng::new(4));
                let mut other = || net.view.frames(group, 24, rng);
                change(&net, &other(), &g, &other()).expect("answers")
            };
            let (sampled, own) = (change(View::Sampled, &mut rng), change(View::Covariance, &mut rng));
            assert!(
                own < 0.02 && own < 0.2 * sampled,
                "{group:?}: {own} at the covariance, {sampled} sampled"
            );
        }
    }
}
