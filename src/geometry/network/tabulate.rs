//! Samples a network's kernels and fits tables to them.

use super::conv::{Route, linear, whole};
use super::ponita::Ponita;
use super::tables::Tables;
use crate::error::{Error, Result};
use crate::geometry::space::invariants;
use crate::nn::Activation;
use crate::ops::points::edges::Edges;
use crate::ops::points::table_conv::SplineTable;
use crate::tensor::Tensor;

/// A table is sampled this many cells beyond its range. The spline's end condition is a guess, and the error that it
/// causes shrinks by `2 - sqrt 3` per cell: to `(2 - sqrt 3)^15`, 3e-9, at the edge of the range.
const MARGIN: usize = 16;
/// The most samples in memory together, times the widest array that is computed for a sample.
const CHUNK: usize = 4 << 20;

/// The sample positions along one attribute: `points` of them from `low` on, with [`MARGIN`] more at both ends.
#[derive(Clone, Copy)]
struct Axis {
    low: f64,
    step: f64,
    points: usize,
}

impl Axis {
    /// From `-radius` if `signed`, else from 0, to `radius`, in steps of `radius / (points - 1)`.
    fn new(radius: f64, points: usize, signed: bool) -> Axis {
        let (low, points_) = if signed { (-radius, points.saturating_mul(2) - 1) } else { (0.0, points) };
        Axis { low, step: radius / (points - 1) as f64, points: points_ }
    }

    fn sampled(&self) -> usize {
        self.points.saturating_add(2 * MARGIN)
    }

    fn at(&self, i: usize) -> f64 {
        self.low + (i as f64 - MARGIN as f64) * self.step
    }
}

impl Ponita {
    /// A number of points from 0 to the radius that is enough for most networks: in space, tables then have 257 x 129
    /// points. Measured errors, relative to a kernel's largest value, are 1e-6 for an untrained network with radius 4,
    /// and 4e-5 for a trained potential with radius 6, whose kernels curve most near the radius. The error falls with the
    /// fourth power of the number of points.
    pub const TABLE_POINTS: usize = 129;

    /// Returns a copy for inference whose spatial kernels are cubic splines with `points` points from 0 to the radius
    /// (see [`Ponita::TABLE_POINTS`]). Outputs, forces and stress are those of one function with two continuous
    /// derivatives, close to this network's. Fiber kernels are computed once.
    ///
    /// A layer's table takes `4 (2 points + 1) (points + 2) channels` bytes in space, 8.7 MB at 64 channels and 129
    /// points. In the plane both sides have `2 points + 1` numbers, and without orientations a table takes
    /// `4 (points + 2) channels` bytes.
    ///
    /// No tensor of the copy takes a gradient, so it has no [`crate::nn::Parameters`] and cannot be trained or
    /// calibrated. Positions can be tracked as before. Saving the copy saves the parameters.
    ///
    /// ```
    /// use tiebeam::geometry::{Graph, Grid, Ponita, PonitaConfig, PonitaInput};
    /// use tiebeam::{Gpu, Rng, Tensor};
    ///
    /// let gpu = Gpu::open()?;
    /// let config = PonitaConfig::default().channels(4).hidden(4).basis(8).layers(1).radius(Some(2.0));
    /// let net = Ponita::new(&gpu, config, Grid::octahedron(), &mut Rng::new(1))?;
    /// let fast = net.tabulate(33)?;
    /// let graph = Graph::full(&gpu, &[0.0, 0.0, 0.0, 1.0, 0.5, 0.0], 3, &[2], true)?;
    /// let input = PonitaInput::scalars(&Tensor::ones(&gpu, [2, 1]));
    /// let [a, b] = [&net, &fast].map(|net| net.energy_forces(&graph, &input).map(|found| found.energies[0]));
    /// assert!((a? - b?).abs() < 1e-4);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the network has no radius or is itself such a copy, there are fewer than 5 points, a table exceeds one
    /// binding, or the device fails.
    pub fn tabulate(&self, points: usize) -> Result<Ponita> {
        self.trainable("tabulate")?;
        let radius = self.config.radius.ok_or_else(|| {
            Error::config(
                "tabulate: this network has no radius, so that a table has no end; train one with a radius",
            )
        })?;
        if points < 5 {
            return Err(Error::config(format!(
                "tabulate: {points} points from 0 to the radius; use 5 or more"
            )));
        }
        let axis = |signed| Axis::new(radius as f64, points, signed);
        let axes = match (self.grid.is_oriented(), self.grid.dimension()) {
            (false, _) => vec![axis(false)],
            (true, 2) => vec![axis(true), axis(true)],
            (true, _) => vec![axis(true), axis(false)],
        };
        let channels = self.config.channels.next_multiple_of(4);
        let sampled = axes.iter().fold(4 * channels, |n, axis| n.saturating_mul(axis.sampled())) as u64;
        let have = self.embed.gpu().limits().max_storage_buffer_binding_size;
        if sampled > have {
            return Err(Error::Limit { what: "tabulate: bytes of a table".into(), need: sampled, have });
        }
        crate::no_grad(|| {
            let mut copy = self.mapped(&Tensor::detach);
            for at in 0..copy.layers.len() {
                let tables = copy.tables(at, &axes)?;
                copy.layers[at].conv.tables = Some(tables);
            }
            copy.route = Route::Tabulated;
            Ok(copy)
        })
    }

    /// Makes a layer's tables.
    fn tables(&self, layer: usize, axes: &[Axis]) -> Result<Tables> {
        let (conv, gpu) = (&self.layers[layer].conv, self.embed.gpu());
        let kernel = whole(&conv.kernel, 0);
        let (low, step) = (axes[0].low as f32, axes[0].step as f32);
        let lows = [low, axes.get(1).map_or(0.0, |axis| axis.low as f32)];
        let (shape, coefficients) = coefficients(self.samples(&kernel, axes)?, axes, kernel.shape()[0]);
        let coefficients = Tensor::from_slice(gpu, &coefficients, shape);
        let fiber = self.fiber_basis.as_ref().zip(conv.fiber_kernel.as_ref()).map(|(basis, kernel)| {
            let seen = invariants::polynomial(&invariants::fiber(&self.grid.tensor(gpu)), self.config.degree);
            let made = linear(&basis.forward(&seen), kernel, None, Activation::None, None);
            let made = whole(&made, 2).contiguous();
            made.evaluate();
            made
        });
        Ok(Tables { spatial: SplineTable::new(&coefficients, lows, [step; 2]), fiber })
    }

    /// Returns the values of the kernel `[C, K]` at all sample points, with the first axis slowest and channels fastest.
    fn samples(&self, kernel: &Tensor, axes: &[Axis]) -> Result<Vec<f64>> {
        let (gpu, config) = (kernel.gpu(), &self.config);
        let across = axes.get(1).map_or(1, Axis::sampled);
        let widest = [config.hidden, config.basis, config.channels].into_iter().max().unwrap_or(1);
        let (count, rows) = (axes[0].sampled() * across, (CHUNK / widest).max(64));
        let mut all = Vec::with_capacity(count * kernel.shape()[0]);
        for first in (0..count).step_by(rows) {
            let chunk = first..count.min(first + rows);
            let point = |i: usize| {
                let second = axes.get(1).map(|axis| axis.at(i % across) as f32);
                std::iter::once(axes[0].at(i / across) as f32).chain(second)
            };
            let attributes: Vec<f32> = chunk.clone().flat_map(point).collect();
            let attributes = Tensor::from_slice(gpu, &attributes, [chunk.len(), axes.len()]);
            let basis = self.basis.forward(&invariants::polynomial(&attributes, config.degree));
            let values = linear(&basis, kernel, None, Activation::None, None).to_vec::<f32>()?;
            all.extend(values.into_iter().map(f64::from));
        }
        Ok(all)
    }

    /// # Errors
    /// When the network uses tables.
    pub(in crate::geometry) fn trainable(&self, what: &str) -> Result<()> {
        self.layers.iter().try_for_each(|layer| layer.conv.trainable(what))
    }

    /// Returns the spatial kernel of a layer as its convolution sees it, `[rows, channels]`, at attributes `[rows, 2]`
    /// (or 1) within the radius, without the envelope. It is read from the table if there is one: so that the two can be
    /// compared.
    ///
    /// # Errors
    /// When the device fails.
    pub fn kernel_at(&self, layer: usize, attributes: &[f32]) -> Result<Vec<f32>> {
        let (conv, gpu) = (&self.layers[layer].conv, self.embed.gpu());
        let width = 1 + self.grid.is_oriented() as usize;
        let rows = attributes.len() / width;
        let Some(tables) = &conv.tables else {
            let attributes = Tensor::from_slice(gpu, attributes, [rows, width]);
            let basis = self.basis.forward(&invariants::polynomial(&attributes, self.config.degree));
            return linear(&basis, &conv.kernel, None, Activation::None, None).to_vec();
        };
        // Each row becomes the self-loop of a node with features of 1, so that the convolution returns the kernel.
        let ids: Vec<u32> = (0..rows as u32).collect();
        let edges = Edges::new(gpu, rows, &ids, &ids)?;
        let row = |a: &[f32]| [a[0], a.get(1).copied().unwrap_or(0.0), 1.0, 0.0];
        let seen: Vec<f32> = attributes.chunks_exact(width).flat_map(row).collect();
        let ones = Tensor::ones(gpu, [rows, 1, tables.spatial.channels()]);
        let kernel = ones.table_conv(&Tensor::from_slice(gpu, &seen, [rows, 1, 4]), &tables.spatial, &edges);
        kernel.reshape([rows, tables.spatial.channels()]).slice(1, 0..self.config.channels).to_vec()
    }
}

/// Returns the coefficients of the spline through the samples that the cells within the range need, and their shape.
fn coefficients(mut data: Vec<f64>, axes: &[Axis], channels: usize) -> ([usize; 3], Vec<f32>) {
    let [n, m] = [axes[0].sampled(), axes.get(1).map_or(1, Axis::sampled)];
    interpolate(&mut data, n, m * channels);
    if axes.len() > 1 {
        data.chunks_exact_mut(m * channels).for_each(|line| interpolate(line, m, channels));
    }
    // Cells need one coefficient more than the points at each end.
    let kept = |axis: &Axis| MARGIN - 1..MARGIN + axis.points + 1;
    let (first, second) = (kept(&axes[0]), axes.get(1).map_or(0..1, kept));
    let shape = [first.len(), second.len(), channels];
    let rows = first.flat_map(|i| second.clone().map(move |j| (i * m + j) * channels));
    (shape, rows.flat_map(|at| &data[at..at + channels]).map(|&c| c as f32).collect())
}

/// Replaces `n` samples, each of `width` numbers, by the coefficients of a cubic B-spline through them:
/// `c[i-1] + 4 c[i] + c[i+1] = 6 s[i]`, with zero curvature at the ends. Source: Unser 1999, "Splines: a perfect fit for
/// signal and image processing".
fn interpolate(data: &mut [f64], n: usize, width: usize) {
    let mut factors = vec![0.0; n];
    for i in 1..n - 1 {
        factors[i] = 1.0 / (4.0 - factors[i - 1]);
        let (before, own) = data.split_at_mut(i * width);
        for (own, before) in own[..width].iter_mut().zip(&before[(i - 1) * width..]) {
            *own = (6.0 * *own - before) * factors[i];
        }
    }
    for i in (1..n - 1).rev() {
        let (own, after) = data.split_at_mut((i + 1) * width);
        for (own, after) in own[i * width..].iter_mut().zip(after.iter()) {
            *own -= factors[i] * after;
        }
    }
}
