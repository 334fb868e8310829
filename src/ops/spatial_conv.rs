//! The spatial half of a separable convolution on positions and orientations: sums over neighbours with kernels that exist in
//! registers only.

use super::case::{Array, Case, Input};
use super::edges::{Chunk, Edges, Rows};
use super::kernel_basis::{
    BasisWeights, Incoming, Network, Sight, Sums, Wants, basis64, directions, onto, part, run, sight, small, weights,
};
use super::matmul::{outer, product};
use super::words;
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::tape::{Into, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

const OP: &str = "spatial_conv";

/// What a thread of the kernel owns.
#[derive(Clone, Copy)]
struct Tile {
    edges: usize,
    orientations: usize,
    /// In vectors.
    channels: usize,
}

impl Tile {
    /// CPU drivers pay for loads and keep sums in the cache near them; a GPU has about 100 registers to spend.
    fn of(gpu: &Gpu, orientations: usize, channels: usize) -> Tile {
        let (rows, most) = if gpu.is_software() { (16, 4) } else { (8, 2) };
        let whole = [4, 5, 3, 2].into_iter().find(|n| orientations.is_multiple_of(*n));
        let own = whole.unwrap_or(orientations.min(4));
        Tile { edges: rows / own, orientations: own, channels: channels.min(most) }
    }

    fn source(self, accumulate: bool) -> Source {
        Source::file(OP)
            .u32("EDGES", self.edges as u32)
            .u32("ORIENTATIONS", self.orientations as u32)
            .u32("CHANNELS", self.channels as u32)
            .bool("ACCUMULATE", accumulate)
    }
}

/// `y[n] (+)= sum over the rows' edges of n: (basis w)[e] v[other]`, for the nodes of `rows`, the first of which is `first`.
fn convolve(basis: &Tensor, w: &Tensor, v: &Tensor, rows: &Rows, first: usize, y: &Tensor, accumulate: bool) {
    let [o, c] = [y.shape()[1], y.shape()[2] / 4];
    let tile = Tile::of(y.gpu(), o, c);
    let blocks = [o.div_ceil(tile.orientations), c.div_ceil(tile.channels)];
    let threads = (rows.starts.count() - 1) * blocks[0] * blocks[1];
    let grid = grid(threads.div_ceil(64));
    let sizes = [threads, first, o, c, w.shape()[0] / 4, blocks[0], blocks[1]];
    let params: Vec<u32> = std::iter::once(grid[0]).chain(sizes.map(|v| v as u32)).collect();
    y.gpu().launch(Launch {
        op: OP,
        source: &tile.source(accumulate),
        entry: "forward",
        binds: vec![
            basis.bind(0),
            w.bind(1),
            v.bind(2),
            rows.starts.bind(3),
            rows.pairs.bind(4),
            y.bind_mut(5),
        ],
        params: words(&params),
        grid,
        reuse: 8,
    });
}

/// `m[e] = g[destination] h[source]` of a run's edges: `[edges * O, C]`.
fn products(g: &Tensor, h: &Tensor, chunk: &Chunk) -> Tensor {
    let [o, c] = [h.shape()[1], h.shape()[2]];
    let m = Tensor::empty(h.gpu(), OP, [chunk.edges.len() * o, c], DType::F32);
    let threads = m.count() / 4;
    let grid = grid(threads.div_ceil(64));
    h.gpu().launch(Launch {
        op: OP,
        source: &Tile { edges: 1, orientations: 1, channels: 1 }.source(false),
        entry: "products",
        binds: vec![g.bind(6), h.bind(2), chunk.ends.bind(4), m.bind_mut(5)],
        params: words(&[grid[0], threads as u32, 0, o as u32, c as u32 / 4, 0, 0, 0]),
        grid,
        reuse: 1,
    });
    m
}

/// A run's share of the backward pass: adds to `dh` and `dkernel`, and gives `m = dk [rows, C]` for the basis' gradient.
struct Halves<'a> {
    h: &'a Tensor,
    /// Gradient of the result.
    g: &'a Tensor,
    /// `[K, C]`
    turned: &'a Tensor,
    dh: Option<Tensor>,
    dkernel: Option<Tensor>,
    kernel: bool,
}

impl Halves<'_> {
    fn add(&mut self, basis: &Tensor, chunk: &Chunk) -> Tensor {
        if let Some(dh) = &self.dh {
            convolve(basis, self.turned, self.g, &chunk.by_source, chunk.sources.start, dh, true);
        }
        let m = products(self.g, self.h, chunk);
        if self.kernel {
            let sum = outer(OP, &m, basis, onto(&mut self.dkernel));
            self.dkernel = Some(sum);
        }
        m
    }
}

/// A tensor of zeros with memory of its own, to be added to.
fn zeros(like: &Tensor) -> Tensor {
    let zeros = Tensor::zeros(like.gpu(), *like.shape());
    zeros.evaluate();
    zeros
}

#[track_caller]
fn check(h: &Tensor, kernel: &Tensor, [edges, o, k]: [usize; 3], list: &Edges) {
    let (hs, ks) = (h.shape(), kernel.shape());
    let fits = hs.len() == 3 && ks.len() == 2 && hs[0] == list.nodes() && hs[1] == o && ks[..] == [hs[2], k];
    let whole = hs.len() == 3 && hs[2].is_multiple_of(4) && k.is_multiple_of(4) && o > 0;
    let floats = h.dtype() == DType::F32 && kernel.dtype() == DType::F32;
    assert!(
        fits && whole && floats && edges == list.len(),
        "{OP}: features {hs}, kernel {ks}, basis [{edges}, {o}, {k}] for {list:?}; they must be [nodes, O, C], [C, K] and \
         [edges, O, K] in f32, C and K multiples of 4"
    );
}

impl Tensor {
    /// `y[n,a,c] = sum over edges e into n of k[e,a,c] h[s_e,a,c]`, `k = basis kernel^T`: this is `h [N, O, C]`, `basis [E, O, K]`,
    /// `kernel [C, K]`, and `y` has the shape of `h`. The kernels `k` are never stored.
    ///
    /// Derivatives: `dh` is the same sum over outgoing edges; with `m = dy[t_e] h[s_e]`, made for a run of edges at a time,
    /// `dkernel = m^T basis` and `dbasis = m kernel`. Sums run in the order of `edges`: the same bits every time.
    /// Source: Bekkers et al. 2024, arXiv 2310.02970.
    ///
    /// # Panics
    /// When the shapes do not fit, or C or K is no multiple of 4.
    #[track_caller]
    pub fn edge_conv(&self, basis: &Tensor, kernel: &Tensor, edges: &Edges) -> Tensor {
        same_gpu(OP, &[self, basis, kernel, edges.source_ids()]);
        assert!(basis.shape().len() == 3, "{OP}: the basis must be [edges, O, K], got {}", basis.shape());
        check(self, kernel, [0, 1, 2].map(|axis| basis.shape()[axis]), edges);
        let [h, b, w] = [self, basis, kernel].map(|x| x.detach().contiguous());
        let y = Tensor::empty(self.gpu(), OP, self.shape(), DType::F32);
        convolve(&b, &w.t().contiguous(), &h, edges.by_destination(), 0, &y, false);
        y.made_by(&[self, basis, kernel], || {
            Box::new(EdgeConv { edges: edges.clone(), saved: [&h, &b, &w].map(Saved::new) })
        })
    }

    /// [`Tensor::edge_conv`] with the basis of [`Tensor::kernel_basis`], of edges `d [E, D]`, made again for each run of edges in
    /// both passes: memory does not grow with edges x orientations x K.
    ///
    /// # Panics
    /// As those two.
    #[track_caller]
    pub fn spatial_conv(
        &self,
        d: &Tensor,
        window: Option<&Tensor>,
        sight: &Sight,
        basis: &BasisWeights,
        kernel: &Tensor,
        edges: &Edges,
    ) -> Tensor {
        basis.check(OP, sight);
        sight.check(OP, d);
        check(self, kernel, [d.shape()[0], sight.count(), basis.b2.count()], edges);
        assert!(window.is_none_or(|w| w.shape()[..] == [edges.len()]), "{OP}: a window that is not [{}]", edges.len());
        let mut inputs = vec![self, d];
        inputs.extend(basis.all());
        inputs.push(kernel);
        inputs.extend(window);
        same_gpu(OP, &inputs);
        same_gpu(OP, &[self, sight.orientations.as_ref().unwrap_or(d)]);
        let [h, d, w] = [self, d, kernel].map(|x| x.detach().contiguous());
        let window = window.map(|w| w.detach().contiguous());
        let (network, turned) = (Network::new(sight, basis), w.t().contiguous());
        let y = zeros(&h);
        for chunk in edges.chunks(run(h.gpu(), sight.count())).iter() {
            let window = window.as_ref().map(|w| part(w, &chunk.edges));
            let basis = network.forward(&part(&d, &chunk.edges), window.as_ref(), None);
            convolve(&basis, &turned, &h, &chunk.by_destination, chunk.destinations.start, &y, true);
        }
        y.made_by(&inputs, || {
            Box::new(SpatialConv {
                edges: edges.clone(),
                network,
                weights: basis.all().map(Saved::new),
                saved: [&h, &d, &w].map(Saved::new),
                window: window.as_ref().map(Saved::new),
            })
        })
    }
}

struct EdgeConv {
    edges: Edges,
    /// Features, basis, kernel.
    saved: [Saved; 3],
}

impl Op for EdgeConv {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(g) = dy[0].as_ref().map(Tensor::contiguous) else { return };
        let [h, basis, kernel] = [0, 1, 2].map(|i| self.saved[i].get(OP));
        let (turned, wants) = (kernel.t().contiguous(), [0, 1, 2].map(|i| sink.needs(i)));
        let dh = wants[0].then(|| zeros(h));
        let mut halves = Halves { h, g: &g, turned: &turned, dh, dkernel: None, kernel: wants[2] };
        let [o, k] = [basis.shape()[1], basis.shape()[2]];
        let chunks = self.edges.chunks(run(h.gpu(), o));
        let mut walk = |dbasis: Option<(&Tensor, bool)>| {
            for chunk in chunks.iter() {
                let rows = [chunk.edges.len() * o, k];
                let m = halves.add(&part(basis, &chunk.edges).reshape(rows), chunk);
                if let Some((dbasis, accumulate)) = dbasis {
                    let own = dbasis.slice(0, chunk.edges.clone()).reshape(rows);
                    product(OP, &m, kernel, if accumulate { Into::Add(own) } else { Into::Write(own) });
                }
            }
        };
        if wants[1] {
            sink.add_with(1, |into| {
                let (dbasis, accumulate) = into.output(h.gpu(), OP, *basis.shape());
                walk(Some((&dbasis, accumulate)));
                dbasis
            });
        } else {
            walk(None);
        }
        let Halves { dh, dkernel, .. } = halves;
        for (i, d) in [(0, dh), (2, dkernel)] {
            if wants[i] {
                sink.add(i, d.unwrap_or_else(|| zeros(self.saved[i].get(OP))));
            }
        }
    }
}

struct SpatialConv {
    edges: Edges,
    network: Network,
    /// Checks that nobody changed them meanwhile.
    weights: [Saved; 4],
    /// Features, edge vectors, kernel.
    saved: [Saved; 3],
    window: Option<Saved>,
}

impl Op for SpatialConv {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(g) = dy[0].as_ref().map(Tensor::contiguous) else { return };
        let [h, d, kernel] = [0, 1, 2].map(|i| self.saved[i].get(OP));
        self.weights.iter().for_each(|w| {
            w.get(OP);
        });
        let window = self.window.as_ref().map(|w| w.get(OP));
        let wants = Wants {
            edges: sink.needs(1),
            window: window.is_some() && sink.needs(7),
            weights: std::array::from_fn(|i| sink.needs(2 + i)),
        };
        let basis = wants.edges || wants.window || wants.weights.contains(&true);
        let turned = kernel.t().contiguous();
        let dh = sink.needs(0).then(|| zeros(h));
        let mut halves = Halves { h, g: &g, turned: &turned, dh, dkernel: None, kernel: sink.needs(6) };
        let mut sums = Sums::default();
        for chunk in self.edges.chunks(run(h.gpu(), self.network.sight.count())).iter() {
            let (d, window) = (part(d, &chunk.edges), window.map(|w| part(w, &chunk.edges)));
            let kept = self.network.keep(&d, window.as_ref());
            let m = halves.add(&kept.basis, chunk);
            if basis {
                let incoming = Incoming::Kernel { m: &m, kernel };
                self.network.backward(&kept, &d, window.as_ref(), incoming, &wants, &mut sums);
            }
        }
        let Halves { dh, dkernel, .. } = halves;
        sums.hand_over(sink, [1, 2, 7], &self.network, d, window);
        if let Some(dh) = dh {
            sink.add(0, dh);
        }
        if sink.needs(6) {
            sink.add(6, dkernel.unwrap_or_else(|| zeros(kernel)));
        }
    }
}

pub(super) fn variants() -> Vec<Source> {
    let tiles = [(4, 4, 4), (3, 5, 4), (16, 1, 4), (5, 3, 1), (8, 2, 2), (2, 4, 2), (8, 1, 2), (1, 1, 1)];
    tiles
        .into_iter()
        .flat_map(|(edges, orientations, channels)| {
            [false, true].map(|accumulate| Tile { edges, orientations, channels }.source(accumulate))
        })
        .collect()
}

/// `h [N, O, C]`, `basis [E, O, K]`, `kernel [C, K]` and the edges' ends, in any order.
fn conv64(h: &Array, basis: &Array, kernel: &Array, from: &[u32], to: &[u32]) -> Array {
    let [o, c, k] = [h.shape[1], h.shape[2], kernel.shape[1]];
    let mut y = Array::from_fn(h.shape, |_| 0.0);
    for (e, (&s, &t)) in from.iter().zip(to).enumerate() {
        for (a, c1) in (0..o).flat_map(|a| (0..c).map(move |c1| (a, c1))) {
            let value: f64 = (0..k).map(|q| basis.data[(e * o + a) * k + q] * kernel.data[c1 * k + q]).sum();
            y.data[(t as usize * o + a) * c + c1] += value * h.data[(s as usize * o + a) * c + c1];
        }
    }
    y
}

/// Edges sorted as [`Edges`] keeps them, so that arrays over edges mean the same.
fn example(nodes: usize, count: usize) -> [Vec<u32>; 2] {
    let [from, to] = super::edges::example(nodes, count);
    let mut ends: Vec<(u32, u32)> = to.into_iter().zip(from).collect();
    ends.sort_unstable();
    [ends.iter().map(|e| e.1).collect(), ends.iter().map(|e| e.0).collect()]
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (nodes, count, o, c, k) in
        [(1, 1, 1, 4, 4), (5, 13, 3, 4, 8), (4, 7, 7, 8, 4), (3, 0, 2, 4, 4), (2, 67, 1, 4, 4), (2, 5, 4, 20, 4), (2, 3, 5, 4, 8)]
    {
        let [from, to] = example(nodes, count);
        let ends = [from.clone(), to.clone()];
        let inputs = vec![Input::normal([nodes, o, c]), Input::normal([count, o, k]), Input::normal([c, k])];
        let forward = move |x: &[Tensor]| {
            let edges = Edges::new(x[0].gpu(), nodes, &ends[0], &ends[1]).expect("edges in range");
            x[0].edge_conv(&x[1], &x[2], &edges)
        };
        let reference = move |x: &[Array]| conv64(&x[0], &x[1], &x[2], &from, &to);
        let name = format!("{count} edges among {nodes} nodes, {o} orientations, {c} channels, basis {k}");
        // Sums of products of three: the last product's rounding acts on each term.
        all.push(Case::new(name, inputs, forward, reference).ulps(32.0, 64.0).grad_floor(64.0));
    }
    // Runs that end among the edges of a node, and a last one that is short.
    for (nodes, count, o, window, run) in
        [(3, 7, 2, false, 64), (4, 67, 1, true, 5), (5, 13, 2, false, 3), (2, 0, 2, false, 64)]
    {
        let [from, to] = example(nodes, count);
        let ends = [from.clone(), to.clone()];
        let (h, k, c) = (4, 4, 4);
        let mut inputs = vec![Input::normal([count, 3]), directions(o, 3)];
        inputs.extend(small([&[h, 4], &[h], &[k, h], &[k]]));
        inputs.extend(window.then(|| Input::normal([count])));
        inputs.extend([Input::normal([nodes, o, c]), Input::normal([c, k])]);
        let forward = move |x: &[Tensor]| {
            let edges = Edges::new(x[0].gpu(), nodes, &ends[0], &ends[1]).expect("edges in range");
            let n = x.len();
            let (sight, weights, window) = (sight(x, 1), weights(x), window.then(|| &x[6]));
            edges.limit_runs(run);
            x[n - 2].spatial_conv(&x[0], window, &sight, &weights, &x[n - 1], &edges)
        };
        let reference = move |x: &[Array]| {
            let n = x.len();
            let basis = basis64(&x[..n - 2], 1);
            conv64(&x[n - 2], &basis, &x[n - 1], &from, &to)
        };
        let name = format!("basis made again, {count} edges by {run} among {nodes} nodes, {o} orientations, window {window}");
        all.push(Case::new(name, inputs, forward, reference).ulps(256.0, 512.0).grad_floor(2048.0));
    }
    all
}
