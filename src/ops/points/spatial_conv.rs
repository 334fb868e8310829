//! The spatial half of a separable convolution on positions and orientations: sums over neighbours. The kernels exist in
//! registers only or, where two edges share them, in memory for one chunk of rows.

use super::bonds::{Bonds, Chunk, Incidence};
use super::edges::{Edges, walks};
use super::kernel_basis::{
    Basis, EdgeFeatures, Incoming, Network, Sums, Wants, basis64, chunk, directions, part, sight, small,
    weights,
};
use crate::dtype::DType;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::{Launch, Work, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::ops::product::matmul::gathered::Outer;
use crate::ops::product::matmul::product;
use crate::tape::{Destination, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::ops::Range;

const OP: &str = "spatial_conv";

/// The edges that a thread takes at a time, and the orientations and channels of the sums that it owns.
#[derive(Clone, Copy)]
struct Tile {
    edges: usize,
    orientations: usize,
    /// In vectors of 4 channels.
    channels: usize,
}

impl Tile {
    /// Tiles are larger on CPU drivers, where loads are expensive and sums stay in the nearest cache. A GPU has about 100
    /// registers to spend.
    fn of(class: &DeviceClass, orientations: usize, channels: usize) -> Tile {
        let (rows, most) = if class.has_many_registers() { (16, 4) } else { (8, 2) };
        let whole = [4, 5, 3, 2].into_iter().find(|n| orientations.is_multiple_of(*n));
        let own = whole.unwrap_or(orientations.min(4));
        Tile { edges: rows / own, orientations: own, channels: channels.min(most) }
    }

    fn source(self) -> Source {
        Source::file(OP)
            .u32("EDGES", self.edges as u32)
            .u32("ORIENTATIONS", self.orientations as u32)
            .u32("CHANNELS", self.channels as u32)
    }
}

/// The source in which a thread owns `own` vectors of one orientation, for `o` orientations and `c` vectors of channels.
fn plain(paired: bool, [o, c]: [usize; 2], own: usize) -> Source {
    let source = Tile { edges: 1, orientations: 1, channels: own }.source();
    source.bool("PAIRED", paired).u32("SIDES", o as u32).u32("WIDTH", c as u32)
}

/// Vectors per thread in that source. A CPU driver computes addresses once per thread, so a thread takes several vectors.
/// On a GPU, neighbouring threads should read neighbouring memory.
fn own(class: &DeviceClass, c: usize) -> usize {
    c.min(if class.has_many_registers() { 4 } else { 1 })
}

/// Returns a launch of this many threads on `o` orientations and `c` vectors of channels. `basis` is the number of
/// vectors of the basis, `blocks` the number of blocks of orientations and of channels, and `walk` the range of each
/// node's edges for entries that sum over edges.
fn launch<'a>(
    (source, entry): (&'a Source, &'a str),
    threads: usize,
    [o, c]: [usize; 2],
    basis: usize,
    blocks: [usize; 2],
    walk: Range<usize>,
) -> Launch<'a> {
    Launch::new(OP, source, entry, grid(threads.div_ceil(64)))
        .set("n", threads)
        .set("orientations", o)
        .set("channels", c)
        .set("basis", basis)
        .set("blocks_o", blocks[0])
        .set("blocks_c", blocks[1])
        .set("first", walk.start)
        .set("last", walk.end)
}

/// Adds a chunk's share to the sums: `y[n] += sum over the uses of n: (basis w)[row] v[other]`.
fn convolve(
    basis: &Tensor,
    w: &Tensor,
    v: &Tensor,
    (chunk, uses): (&Chunk, &Incidence),
    bonds: &Bonds,
    y: &Tensor,
) {
    let (v, y) = (part(v, &chunk.nodes), y.slice(0, chunk.nodes.clone()));
    let [o, c] = [y.shape()[1], y.shape()[2] / 4];
    let nodes = uses.nodes.shape()[0] - 1;
    let paired = bonds.opposite().map(|opposite| (product(OP, basis, w, Destination::New), opposite));
    // `turns` counts per edge: `forward` has an inner loop over the basis.
    let (entry, source, blocks, turns) = match paired {
        Some(_) => {
            let own = own(y.gpu().class(), c);
            ("messages", plain(true, [o, c], own), [o, c.div_ceil(own)], 1)
        }
        None => {
            let tile = Tile::of(y.gpu().class(), o, c);
            let blocks = [o.div_ceil(tile.orientations), c.div_ceil(tile.channels)];
            ("forward", tile.source(), blocks, 2 + w.shape()[0] / 4)
        }
    };
    let threads = nodes * blocks[0] * blocks[1];
    // All edges are counted. This overestimates a launch that walks only some of them.
    let terms = if paired.is_some() { 1 } else { w.shape()[0] };
    let work = Work::flops(2.0 * (uses.pairs.count() * o) as f64 * (4 * c * terms) as f64);
    for walk in walks(uses.most, turns) {
        let turns = turns * walk.len();
        let launch = launch((&source, entry), threads, [o, c], w.shape()[0] / 4, blocks, walk)
            .bind("v", &v)
            .bind("nodes", &uses.nodes)
            .bind("pairs", &uses.pairs)
            .bind_mut("y", &y);
        let launch = match &paired {
            Some((k, opposite)) => launch.bind("k", k).bind("opposite", *opposite),
            None => launch.bind("basis", basis).bind("w", w),
        };
        y.gpu().launch(launch.turns(turns).reuse(8).work(work));
    }
}

/// Returns `m = g[destination] h[source]` for the edges of a chunk's rows: `[rows * O, C]`.
fn products(g: &Tensor, h: &Tensor, chunk: &Chunk, bonds: &Bonds) -> Tensor {
    let [g, h] = [g, h].map(|x| part(x, &chunk.nodes));
    let [o, c] = [h.shape()[1], h.shape()[2]];
    let m = Tensor::empty(h.gpu(), OP, [chunk.rows.len() * o, c], DType::F32);
    let own = own(h.gpu().class(), c / 4);
    let threads = chunk.rows.len() * o * (c / 4).div_ceil(own);
    let source = plain(bonds.opposite().is_some(), [o, c / 4], own);
    h.gpu().launch(
        launch((&source, "products"), threads, [o, c / 4], 0, [0, 0], 0..0)
            .bind("g", &g)
            .bind("v", &h)
            .bind("ends", chunk.ends())
            // The binding must be filled even if no opposite is read.
            .bind("opposite", bonds.opposite().unwrap_or(chunk.ends()))
            .bind_mut("y", &m)
            .turns(0),
    );
    m
}

/// The backward pass chunk by chunk: `add` adds a chunk's share to `dh` and `dkernel`, and returns
/// `m = dk [rows * O, C]`, from which the gradient of the basis follows.
struct Halves<'a> {
    h: &'a Tensor,
    /// Gradient of the result.
    g: &'a Tensor,
    /// The kernel transposed, `[K, C]`.
    turned: &'a Tensor,
    bonds: &'a Bonds,
    dh: Option<Tensor>,
    dkernel: Outer,
    kernel: bool,
}

impl Halves<'_> {
    fn add(&mut self, basis: &Tensor, chunk: &Chunk) -> Tensor {
        if let Some(dh) = &self.dh {
            convolve(basis, self.turned, self.g, (chunk, chunk.from()), self.bonds, dh);
        }
        let m = products(self.g, self.h, chunk, self.bonds);
        if self.kernel {
            self.dkernel.add(OP, &m, basis);
        }
        m
    }
}

/// Returns zeros in memory of their own, to which results are added.
fn zeros(like: &Tensor) -> Tensor {
    let zeros = Tensor::zeros(like.gpu(), *like.shape());
    zeros.evaluate();
    zeros
}

#[track_caller]
fn check(h: &Tensor, kernel: &Tensor, [rows, o, k]: [usize; 3], bonds: &Bonds) {
    let (hs, ks) = (h.shape(), kernel.shape());
    let fits = hs.len() == 3
        && ks.len() == 2
        && hs[0] == bonds.edges().nodes()
        && hs[1] == o
        && ks[..] == [hs[2], k];
    let whole =
        hs.len() == 3 && hs[2] > 0 && hs[2].is_multiple_of(4) && k > 0 && k.is_multiple_of(4) && o > 0;
    let sides = bonds.opposite().is_none_or(|opposite| opposite.count() == o);
    assert!(
        fits && whole && rows == bonds.len() && sides,
        "{OP}: features {hs}, kernel {ks}, basis [{rows}, {o}, {k}] for {bonds:?}; they must be [nodes, O, C], [C, K] and \
         [rows, O, K], C and K multiples of 4"
    );
}

impl Tensor {
    /// Returns `y[n,a,c] = sum over edges e into n of k[e,a,c] h[s_e,a,c]` with `k = basis kernel^T`. `self` is
    /// `h [N, O, C]`, `basis [R, O, K]` belongs to the rows of `bonds`, `kernel` is `[C, K]`, and `y` has the shape of
    /// `h`. At most one chunk of rows of the kernels `k` is in memory at a time.
    ///
    /// Derivatives: `dh` is the same sum over outgoing edges. With `m = dy[t_e] h[s_e]`, summed over the edges of a row
    /// and computed for one chunk of rows at a time, `dkernel = m^T basis` and `dbasis = m kernel`. Sums run in the order
    /// of `bonds`, so every run gives the same bits. Source: Bekkers et al. 2024, arXiv 2310.02970.
    ///
    /// # Panics
    /// When the shapes do not fit, or C or K is not a multiple of 4.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::geometry::{Bonds, Edges};
    /// let edges = Edges::new(&gpu, 2, &[0, 1, 1], &[0, 0, 1])?; // two edges into node 0
    /// let h = Tensor::ones(&gpu, [2, 1, 4]); // [nodes, orientations, channels]
    /// let basis = Tensor::ones(&gpu, [3, 1, 4]); // [edges, orientations, K]
    /// let y = h.edge_conv(&basis, &Tensor::ones(&gpu, [4, 4]), &Bonds::single(&edges));
    /// assert_eq!(y.reshape([2, 4]).to_vec2::<f32>()?, [[8.0; 4], [4.0; 4]]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn edge_conv(&self, basis: &Tensor, kernel: &Tensor, bonds: &Bonds) -> Tensor {
        same_gpu(OP, &[self, basis, kernel, bonds.edges().source_ids()]);
        assert!(basis.shape().len() == 3, "{OP}: the basis must be [rows, O, K], got {}", basis.shape());
        check(self, kernel, [0, 1, 2].map(|axis| basis.shape()[axis]), bonds);
        // In a scope of half precision, layers before this one return 16 bits.
        let inputs = [self, basis, kernel].map(|x| crate::ops::float(OP, x));
        let [h, b, w] = inputs.each_ref().map(|x| x.detach().contiguous());
        let (y, turned) = (zeros(&h), w.t().contiguous());
        for chunk in bonds.chunks(most(&h, bonds)).iter() {
            convolve(&rows(&b, chunk), &turned, &h, (chunk, chunk.into()), bonds, &y);
        }
        y.made_by(&inputs.each_ref(), || {
            Box::new(EdgeConv { bonds: bonds.clone(), saved: [&h, &b, &w].map(Saved::new) })
        })
    }

    /// Returns [`Tensor::edge_conv`] with the basis that [`Tensor::kernel_basis`] gives for the rows' edges `d [R, D]`.
    /// Both passes recompute the basis chunk by chunk, so memory does not grow with edges x orientations x K.
    ///
    /// # Panics
    /// When [`Tensor::edge_conv`] or [`Tensor::kernel_basis`] would.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::geometry::{Basis, Bonds, Edges};
    /// use tiebeam::ops::points::kernel_basis::EdgeFeatures;
    /// let edges = Edges::new(&gpu, 2, &[0, 1], &[1, 0])?;
    /// let x = Tensor::from_slice(&gpu, &[0f32, 0.0, 3.0, 4.0], [2, 2]);
    /// let sight = EdgeFeatures { orientations: None, degree: 2 };
    /// let ones = |shape: &[usize]| Tensor::ones(&gpu, shape);
    /// let basis = Basis { w1: ones(&[8, 4]), b1: ones(&[8]), w2: ones(&[4, 8]), b2: ones(&[4]) };
    /// let (d, bonds) = (x.edge_vectors(&edges), Bonds::single(&edges));
    /// let y = ones(&[2, 1, 4]).spatial_conv(&d, None, &sight, &basis, &ones(&[4, 4]), &bonds);
    /// assert_eq!(y.shape()[..], [2, 1, 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn spatial_conv(
        &self,
        d: &Tensor,
        envelope: Option<&Tensor>,
        sight: &EdgeFeatures,
        basis: &Basis,
        kernel: &Tensor,
        bonds: &Bonds,
    ) -> Tensor {
        basis.check(OP, sight);
        sight.check(OP, d);
        check(self, kernel, [d.shape()[0], sight.count(), basis.b2.count()], bonds);
        assert!(
            envelope.is_none_or(|w| w.shape()[..] == [bonds.len()]),
            "{OP}: an envelope that is not [{}]",
            bonds.len()
        );
        let [h, kernel] = [self, kernel].map(|x| crate::ops::float(OP, x));
        let mut inputs = vec![&h, d];
        inputs.extend(basis.all());
        inputs.push(&kernel);
        inputs.extend(envelope);
        same_gpu(OP, &inputs);
        same_gpu(OP, &[self, sight.orientations.as_ref().unwrap_or(d)]);
        let [h, d, w] = [&h, d, &kernel].map(|x| x.detach().contiguous());
        let envelope = envelope.map(|w| w.detach().contiguous());
        let (network, turned) = (Network::new(sight, basis), w.t().contiguous());
        let y = zeros(&h);
        for chunk in bonds.chunks(chunk(h.gpu(), sight.count())).iter() {
            let envelope = envelope.as_ref().map(|w| part(w, &chunk.rows));
            let basis = network.forward(&part(&d, &chunk.rows), envelope.as_ref(), None);
            convolve(&basis, &turned, &h, (chunk, chunk.into()), bonds, &y);
        }
        y.made_by(&inputs, || {
            Box::new(SpatialConv {
                bonds: bonds.clone(),
                network,
                weights: basis.all().map(Saved::new),
                saved: [&h, &d, &w].map(Saved::new),
                envelope: envelope.as_ref().map(Saved::new),
            })
        })
    }
}

/// Rows per chunk if the basis is given: all of them if kernels exist in registers only.
fn most(h: &Tensor, bonds: &Bonds) -> usize {
    if bonds.opposite().is_none() { bonds.len() } else { chunk(h.gpu(), h.shape()[1]) }
}

/// Returns a chunk's part of the basis as `[rows * O, K]`.
fn rows(basis: &Tensor, chunk: &Chunk) -> Tensor {
    let [o, k] = [1, 2].map(|axis| basis.shape()[axis]);
    part(basis, &chunk.rows).reshape([chunk.rows.len() * o, k])
}

struct EdgeConv {
    bonds: Bonds,
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
        let mut halves = Halves {
            h,
            g: &g,
            turned: &turned,
            bonds: &self.bonds,
            dh,
            dkernel: Outer::default(),
            kernel: wants[2],
        };
        let [o, k] = [basis.shape()[1], basis.shape()[2]];
        let chunks = self.bonds.chunks(chunk(h.gpu(), o));
        let mut walk = |dbasis: Option<(&Tensor, bool)>| {
            for chunk in chunks.iter() {
                let m = halves.add(&rows(basis, chunk), chunk);
                if let Some((dbasis, accumulate)) = dbasis {
                    let own = dbasis.slice(0, chunk.rows.clone()).reshape([chunk.rows.len() * o, k]);
                    let _ = product(
                        OP,
                        &m,
                        kernel,
                        if accumulate { Destination::Add(own) } else { Destination::Write(own) },
                    );
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
        for (i, d) in [(0, dh), (2, dkernel.sum())] {
            if wants[i] {
                sink.add(i, d.unwrap_or_else(|| zeros(self.saved[i].get(OP))));
            }
        }
    }
}

struct SpatialConv {
    bonds: Bonds,
    network: Network,
    /// Kept to check that the weights have not changed since the forward pass.
    weights: [Saved; 4],
    /// Features, edge vectors, kernel.
    saved: [Saved; 3],
    envelope: Option<Saved>,
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
        let envelope = self.envelope.as_ref().map(|w| w.get(OP));
        let wants = Wants {
            edges: sink.needs(1),
            envelope: envelope.is_some() && sink.needs(7),
            weights: std::array::from_fn(|i| sink.needs(2 + i)),
        };
        let basis = wants.edges || wants.envelope || wants.weights.contains(&true);
        let turned = kernel.t().contiguous();
        let dh = sink.needs(0).then(|| zeros(h));
        let mut halves = Halves {
            h,
            g: &g,
            turned: &turned,
            bonds: &self.bonds,
            dh,
            dkernel: Outer::default(),
            kernel: sink.needs(6),
        };
        let mut sums = Sums::default();
        for chunk in self.bonds.chunks(chunk(h.gpu(), self.network.sight.count())).iter() {
            let (d, envelope) = (part(d, &chunk.rows), envelope.map(|w| part(w, &chunk.rows)));
            let kept = self.network.keep(&d, envelope.as_ref());
            let m = halves.add(&kept.basis, chunk);
            if basis {
                let incoming = Incoming::Kernel { m: &m, kernel };
                self.network.backward(&kept, &d, envelope.as_ref(), incoming, &wants, &mut sums);
            }
        }
        let Halves { dh, dkernel, .. } = halves;
        sums.hand_over(sink, [1, 2, 7], &self.network, d, envelope);
        if let Some(dh) = dh {
            sink.add(0, dh);
        }
        if sink.needs(6) {
            sink.add(6, dkernel.sum().unwrap_or_else(|| zeros(kernel)));
        }
    }
}

/// How an edge uses a row of kernels: the row, whether the edge is the reverse, its source, its destination.
type Use = (usize, bool, usize, usize);

/// The convolution in f64 of `h [N, O, C]`, `basis [R, O, K]` and `kernel [C, K]`. The uses may be in any order.
fn conv64(h: &Array, basis: &Array, kernel: &Array, uses: &[Use]) -> Array {
    let [o, c, k] = [h.shape[1], h.shape[2], kernel.shape[1]];
    let mut y = Array::from_fn(h.shape, |_| 0.0);
    for &(row, turned, s, t) in uses {
        for (a, c1) in (0..o).flat_map(|a| (0..c).map(move |c1| (a, c1))) {
            let side = if turned { opposite(o)[a] as usize } else { a };
            let value: f64 =
                (0..k).map(|q| basis.data[(row * o + side) * k + q] * kernel.data[c1 * k + q]).sum();
            y.data[(t * o + a) * c + c1] += value * h.data[(s * o + a) * c + c1];
        }
    }
    y
}

/// Opposites for tests: orientations in pairs, and the last of an odd number is its own opposite.
fn opposite(o: usize) -> Vec<u32> {
    (0..o as u32).map(|a| (a ^ 1).min(o as u32 - 1)).collect()
}

/// Makes edges for a case, with their reverses if `paired`. Returns their ends, of which [`Bonds`] are made, and the row
/// that each edge uses.
fn example(nodes: usize, count: usize, paired: bool) -> ([Vec<u32>; 2], Vec<Use>) {
    // Many nodes form a chain, so that a chunk touches few of them and does not start at the first.
    let chain = || [(0..count as u32).collect(), (1..=count as u32).collect()];
    let [from, to] = if nodes > 100 { chain() } else { super::edges::example(nodes, count) };
    let mut ends: Vec<(u32, u32)> = to.iter().copied().zip(from.iter().copied()).collect();
    if paired {
        // The first edge has no reverse.
        ends.extend(from.into_iter().zip(to).skip(1).filter(|(s, t)| s != t));
    }
    ends.sort_unstable();
    let mut uses: Vec<Use> = Vec::new();
    let mut waiting: Vec<(usize, (u32, u32))> = Vec::new();
    let mut rows = 0;
    for &(t, s) in &ends {
        let found = waiting.iter().position(|w| paired && w.1 == (s, t));
        let row = found.map_or(rows, |at| waiting.remove(at).0);
        if found.is_none() {
            waiting.push((rows, (t, s)));
            rows += 1;
        }
        uses.push((row, found.is_some(), s as usize, t as usize));
    }
    ([ends.iter().map(|e| e.1).collect(), ends.iter().map(|e| e.0).collect()], uses)
}

fn bonds(x: &Tensor, [from, to]: &[Vec<u32>; 2], o: usize, paired: bool) -> Bonds {
    let edges = Edges::new(x.gpu(), x.shape()[0], from, to).expect("edges in range");
    match paired {
        true => Bonds::paired(&edges, &super::bonds::reverses(&edges, &[], 0), &opposite(o)).expect("pairs"),
        false => Bonds::single(&edges),
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (nodes, count, o, c, k, paired) in [
        (1, 1, 1, 4, 4, false),
        (5, 13, 3, 4, 8, false),
        (4, 7, 7, 8, 4, false),
        (3, 0, 2, 4, 4, false),
        (2, 67, 1, 4, 4, false),
        (2, 5, 4, 20, 4, false),
        (2, 3, 5, 4, 8, false),
        (1, 1, 2, 4, 4, true),
        (5, 7, 4, 4, 8, true),
        (3, 5, 3, 20, 4, true),
        (3, 0, 2, 4, 4, true),
    ] {
        let (ends, uses) = example(nodes, count, paired);
        let rows = uses.iter().map(|u| u.0 + 1).max().unwrap_or(0);
        let inputs = vec![Input::normal([nodes, o, c]), Input::normal([rows, o, k]), Input::normal([c, k])];
        let forward = move |x: &[Tensor]| x[0].edge_conv(&x[1], &x[2], &bonds(&x[0], &ends, o, paired));
        let reference = move |x: &[Array]| conv64(&x[0], &x[1], &x[2], &uses);
        let pairs = if paired { " and their reverses" } else { "" };
        let name =
            format!("{count} edges{pairs} among {nodes} nodes, {o} orientations, {c} channels, basis {k}");
        // Terms are products of three factors, so the rounding of one product affects every term.
        all.push(Case::new(name, inputs, forward, reference).ulps(32.0, 64.0).grad_floor(64.0));
    }
    // Some chunks end among the edges of a node, and some last chunks are short.
    for (nodes, count, o, envelope, chunk, paired) in [
        (3, 7, 2, false, 64, false),
        (4, 67, 1, true, 5, false),
        (5, 13, 2, false, 3, false),
        (2, 0, 2, false, 64, false),
        (5, 13, 2, true, 3, true),
        (140, 139, 1, false, 5, false),
        (140, 139, 1, true, 5, true),
    ] {
        let (ends, uses) = example(nodes, count, paired);
        let rows = uses.iter().map(|u| u.0 + 1).max().unwrap_or(0);
        let (h, k, c) = (4, 4, 4);
        let mut inputs = vec![Input::normal([rows, 3]), directions(o, 3)];
        inputs.extend(small([&[h, 4], &[h], &[k, h], &[k]]));
        inputs.extend(envelope.then(|| Input::normal([rows])));
        inputs.extend([Input::normal([nodes, o, c]), Input::normal([c, k])]);
        let forward = move |x: &[Tensor]| {
            let n = x.len();
            let (sight, weights, envelope) = (sight(x, 1), weights(x), envelope.then(|| &x[6]));
            let bonds = bonds(&x[n - 2], &ends, o, paired);
            bonds.limit_chunks(chunk);
            x[n - 2].spatial_conv(&x[0], envelope, &sight, &weights, &x[n - 1], &bonds)
        };
        let reference = move |x: &[Array]| {
            let n = x.len();
            let basis = basis64(&x[..n - 2], 1);
            conv64(&x[n - 2], &basis, &x[n - 1], &uses)
        };
        let pairs = if paired { " and their reverses" } else { "" };
        let name = format!(
            "basis recomputed, {count} edges{pairs} by {chunk} among {nodes} nodes, {o} orientations, envelope {envelope}"
        );
        all.push(Case::new(name, inputs, forward, reference).ulps(256.0, 512.0).grad_floor(2048.0));
    }
    all
}
