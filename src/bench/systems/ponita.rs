//! A layer of PONITA with gradients, computed by fused kernels and by ops.

use super::{normal, wide};
use crate::bench::{Check, Entry, Row, carried};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::geometry::vectors::DVec3;
use crate::geometry::{Graph, Grid, Ponita, PonitaConfig, Route};
use crate::ops::elementwise::unary::erf64;
use crate::rng::Rng;
use crate::tensor::Tensor;

/// The number of features per node and orientation, of basis functions, and the basis's hidden width.
const WIDTH: usize = 64;
/// The number of polynomial features of two attributes up to the third degree: 2 + 4 + 8.
const FEATURES: usize = 14;

/// Batches with the sizes of charged particles and of molecules, on the grid that other engines were timed with. The last row has
/// a grid whose orientations have opposites, so that an edge and its reverse share kernels.
pub(super) fn entries(cpu: bool) -> Vec<Entry> {
    vec![
        layer(100, 5, false, Route::Fused),
        Entry { asked: cpu, ..layer(100, 18, false, Route::Fused) },
        Entry { asked: cpu, ..layer(100, 18, true, Route::Fused) },
        // The largest batch whose arrays software drivers bind.
        Entry { asked: cpu, ..layer(40, 18, false, Route::Fused) },
        Entry { asked: cpu, ..layer(40, 18, false, Route::Plain) },
        Entry { asked: cpu, ..layer(40, 18, true, Route::Fused) },
        Entry { asked: cpu, ..layer(40, 18, true, Route::Plain) },
    ]
}

/// Geometry, basis, convolution, norm and MLP of `graphs` graphs with `points` points each, forward and backward. The result is the
/// gradient of the mean square of the layer's output with respect to its input features.
fn layer(graphs: usize, points: usize, dodecahedron: bool, route: Route) -> Entry {
    let edges = graphs * points * (points - 1);
    let grid = if dodecahedron { ", dodecahedron" } else { "" };
    let suffix = format!("{grid}{}", if route == Route::Fused { "" } else { ", by ops" });
    let shape = format!("{graphs} graphs x {points}, E={edges}, O20 C{WIDTH} K{WIDTH}{suffix}");
    Entry::new("ponita", shape, move |gpu| {
        let grid = if dodecahedron { Grid::dodecahedron() } else { Grid::fibonacci(20) };
        let config = PonitaConfig {
            channels: WIDTH,
            hidden: WIDTH,
            basis: WIDTH,
            layers: 1,
            ..PonitaConfig::default()
        };
        let mut net = Ponita::new(gpu, config, grid.clone(), &mut Rng::new(1))?;
        net.route = route;
        let nodes = graphs * points;
        let mut positions = vec![0.0f32; 3 * nodes];
        Rng::new(2).fill_normal(&mut positions);
        let graph = Graph::full(gpu, &positions, 3, &vec![points; graphs], false)?;
        let h = normal(nodes * grid.len() * WIDTH, 3);
        // Only the last graph is checked. Its data are at the end of every array.
        let first = nodes - points;
        let host = Host::new(&net, &positions[3 * first..], &h[first * grid.len() * WIDTH..])?;
        let checks = [(0, 0, 0), (points / 2, 7, 21), (points - 1, grid.len() - 1, WIDTH - 1)]
            .map(|(node, orientation, channel)| {
                let at = (node * grid.len() + orientation) * WIDTH + channel;
                // The bound is that of the sum, before the division by `count`: sums of some hundred terms of size 1 are rounded.
                let (count, bound) = (h.len() as f64, 1000.0 * DType::F32.roundoff());
                let want = host.slope(at) / count;
                Check { at: first * grid.len() * WIDTH + at, want, bound: bound / count }
            })
            .to_vec();
        let h = Tensor::from_slice(gpu, &h, [nodes, grid.len(), WIDTH]).requires_grad();
        let work = work(nodes, edges, grid.len(), if dodecahedron { 2 } else { 1 });
        let run = move |_| {
            let y = net.layers[0].forward(&net.field(&graph), &h);
            let grads = y.square().mean_all().backward();
            carried(
                h.gpu(),
                grads.and_then(|grads| {
                    grads.get(&h).cloned().ok_or_else(|| Error::device("there is no gradient"))
                }),
            )
        };
        Ok(Row { checks, ..Row::new(work, run) })
    })
}

/// Returns bytes and operations. `edges_of` edges share one row of kernels. A product has two of its size in the backward pass. The
/// first product of the basis has only one, because positions have no gradient here.
fn work(nodes: usize, edges: usize, grid: usize, edges_of: usize) -> [f64; 2] {
    let kernels = edges / edges_of * grid * (2 * FEATURES * WIDTH + 6 * WIDTH * WIDTH);
    let messages = 3 * edges * grid * WIDTH;
    let fiber = 3 * nodes * grid * grid * WIDTH;
    let mlp = 3 * nodes * grid * 8 * WIDTH * WIDTH;
    [8.0 * (nodes * grid * WIDTH) as f64, 2.0 * (kernels + messages + fiber + mlp) as f64]
}

/// The reference: the layer for one graph in f64, in plain loops.
struct Host {
    points: usize,
    grid: usize,
    h: Vec<f64>,
    /// `[receiver, sender, orientation, channel]`. 0 from a point to itself.
    spatial: Vec<f64>,
    /// `[to, from, channel]`
    fiber: Vec<f64>,
    bias: Vec<f64>,
    /// Gain and shift of the norm, then weight and bias of both linear layers.
    rest: [Vec<f64>; 6],
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf64(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// `W x + b`, `W` row by row.
fn linear(x: &[f64], w: &[f64], b: Option<&[f64]>) -> Vec<f64> {
    let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    w.chunks(x.len()).enumerate().map(|(i, row)| dot(row) + b.map_or(0.0, |b| b[i])).collect()
}

impl Host {
    fn new(net: &Ponita, positions: &[f32], h: &[f32]) -> Result<Host> {
        let points = positions.len() / 3;
        let o: Vec<DVec3> = net.grid.vectors().iter().map(|&v| v.into()).collect();
        let layer = &net.layers[0];
        let missing = || Error::config("ponita: the benchmark's grids have orientations");
        let kernel_of = |basis: &crate::geometry::Basis, kernel: &Tensor| -> Result<_> {
            let [w1, b1, w2, b2] = [wide(&basis.w1)?, wide(&basis.b1)?, wide(&basis.w2)?, wide(&basis.b2)?];
            let kernel = wide(kernel)?;
            Ok(move |attributes: &[f64]| {
                let mut all = attributes.to_vec();
                let mut last = attributes.to_vec();
                for _ in 1..3 {
                    last = last.iter().flat_map(|l| attributes.iter().map(move |a| l * a)).collect();
                    all.extend(&last);
                }
                let z: Vec<f64> = linear(&all, &w1, Some(&b1)).into_iter().map(gelu).collect();
                let z: Vec<f64> = linear(&z, &w2, Some(&b2)).into_iter().map(gelu).collect();
                linear(&z, &kernel, None)
            })
        };
        let kernel = kernel_of(&net.basis, &layer.conv.kernel)?;
        let place = |i: usize| DVec3::from([0, 1, 2].map(|k| positions[3 * i + k] as f64));
        let mut spatial = Vec::with_capacity(points * points * o.len() * WIDTH);
        for (to, from) in (0..points).flat_map(|to| (0..points).map(move |from| (to, from))) {
            let d = place(from) - place(to);
            for &o in &o {
                let along = d.dot(o);
                let values = kernel(&[along, (d - along * o).length()]);
                spatial.extend(values.into_iter().map(|v| if to == from { 0.0 } else { v }));
            }
        }
        let (basis, kernel) =
            net.fiber_basis.as_ref().zip(layer.conv.fiber_kernel.as_ref()).ok_or_else(missing)?;
        let kernel = kernel_of(basis, kernel)?;
        let fiber = o.iter().flat_map(|to| o.iter().map(move |from| (to, from)));
        let fiber = fiber.flat_map(|(to, from)| kernel(&[to.dot(*from)])).collect();
        let [[gain, shift], [w1, b1], [w2, b2]] = [&layer.norm, &layer.linear1, &layer.linear2];
        Ok(Host {
            points,
            grid: o.len(),
            h: h.iter().map(|&v| v as f64).collect(),
            spatial,
            fiber,
            bias: wide(&layer.conv.bias)?,
            rest: [wide(gain)?, wide(shift)?, wide(w1)?, wide(b1)?, wide(w2)?, wide(b2)?],
        })
    }

    /// Returns the sum of squares of the layer's output for input features `h`.
    fn loss(&self, h: &[f64]) -> f64 {
        let (c, row) = (WIDTH, self.grid * WIDTH);
        let [gain, shift, w1, b1, w2, b2] = &self.rest;
        let mut sum = 0.0;
        for to in 0..self.points {
            let mut seen = vec![0.0; row];
            for from in 0..self.points {
                let kernel = &self.spatial[(to * self.points + from) * row..][..row];
                let terms = kernel.iter().zip(&h[from * row..]);
                seen.iter_mut().zip(terms).for_each(|(s, (k, h))| *s += k * h);
            }
            for o in 0..self.grid {
                let mean = |i: usize| {
                    let term = |from: usize| seen[from * c + i] * self.fiber[(o * self.grid + from) * c + i];
                    (0..self.grid).map(term).sum::<f64>() / self.grid as f64 + self.bias[i]
                };
                let x: Vec<f64> = (0..c).map(mean).collect();
                let middle = x.iter().sum::<f64>() / c as f64;
                let variance = x.iter().map(|v| (v - middle).powi(2)).sum::<f64>() / c as f64;
                let normed = |i: usize| (x[i] - middle) / (variance + 1e-5).sqrt() * gain[i] + shift[i];
                let normed: Vec<f64> = (0..c).map(normed).collect();
                let hidden: Vec<f64> = linear(&normed, w1, Some(b1)).into_iter().map(gelu).collect();
                let own = &h[to * row + o * c..];
                sum +=
                    linear(&hidden, w2, Some(b2)).iter().zip(own).map(|(y, h)| (y + h).powi(2)).sum::<f64>();
            }
        }
        sum
    }

    /// Returns the derivative of the loss with respect to one feature, by a central difference.
    fn slope(&self, at: usize) -> f64 {
        let step = 1e-4;
        let moved = |by: f64| {
            let mut h = self.h.clone();
            h[at] += by;
            self.loss(&h)
        };
        (moved(step) - moved(-step)) / (2.0 * step)
    }
}
