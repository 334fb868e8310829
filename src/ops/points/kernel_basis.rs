//! The basis functions of which spatial kernels are linear combinations: a small network of an edge's invariants, applied
//! to edges in chunks.

use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::elementwise::unary::erf64;
use crate::ops::product::matmul::gathered::LayerSums;
use crate::ops::product::matmul::{gelu_layer, product, product_slope};
use crate::tape::{Destination, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::ops::Range;

/// Returns the number of monomials up to `degree` of this many attributes, `sum over k of attributes^k`: see
/// [`crate::geometry::invariants::polynomial`].
///
/// ```
/// use tiebeam::geometry::invariants::polynomial_size;
/// assert_eq!(polynomial_size(2, 3), 2 + 4 + 8);
/// ```
pub fn polynomial_size(attributes: usize, degree: usize) -> usize {
    (1..=degree as u32).map(|k| attributes.pow(k)).sum()
}

/// The orientations from which edges are seen, and the degree up to which their attributes are multiplied.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::ops::points::kernel_basis::EdgeFeatures;
/// let sight = EdgeFeatures { orientations: None, degree: 2 };
/// assert_eq!((sight.count(), sight.features()), (1, 4)); // |d|, |d|^2 and two zeros
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct EdgeFeatures {
    /// `[O, D]`: unit vectors. Without them, an edge has its length as its only attribute.
    pub orientations: Option<Tensor>,
    /// Degree of the polynomial, 1 to 6.
    pub degree: usize,
}

impl EdgeFeatures {
    /// Number of orientations, 1 if there are none.
    pub fn count(&self) -> usize {
        self.orientations.as_ref().map_or(1, |o| o.shape()[0])
    }

    fn attributes(&self) -> usize {
        1 + self.orientations.is_some() as usize
    }

    /// Number of features per edge and orientation, including the zeros that fill up the last vector.
    pub fn features(&self) -> usize {
        polynomial_size(self.attributes(), self.degree).next_multiple_of(4)
    }

    fn kind(&self, dimension: usize) -> Variant {
        Variant { dimension, oriented: self.orientations.is_some(), degree: self.degree }
    }

    #[track_caller]
    pub(crate) fn check(&self, op: &str, d: &Tensor) {
        let seen =
            self.orientations.as_ref().is_none_or(|o| o.shape().len() == 2 && o.shape()[1] == d.shape()[1]);
        let fits = d.shape().len() == 2 && (2..=3).contains(&d.shape()[1]) && d.dtype() == DType::F32 && seen;
        let from = self.orientations.as_ref().map(|o| o.shape());
        assert!(
            fits,
            "{op}: edges {} of {} seen from {from:?}; both [.., D], D 2 or 3",
            d.shape(),
            d.dtype()
        );
        assert!((1..=6).contains(&self.degree), "{op}: degree {}; it must be 1 to 6", self.degree);
    }

    /// Returns the features `[edges * O, features]` of the edges `d [edges, D]`.
    fn forward(&self, d: &Tensor) -> Tensor {
        let rows = d.shape()[0] * self.count();
        let f = Tensor::empty(d.gpu(), "edge_features", [rows, self.features()], DType::F32);
        let source = self.kind(d.shape()[1]).source();
        d.gpu().launch(self.launch(&source, "forward", d, rows).bind_mut("f", &f));
        f
    }

    /// Returns the gradient `dd [edges, D]` for the features' gradient `df [edges * O, features]`.
    fn backward(&self, d: &Tensor, df: &Tensor) -> Tensor {
        let dd = Tensor::empty(d.gpu(), "edge_features", d.shape(), DType::F32);
        let source = self.kind(d.shape()[1]).source();
        let launch = self.launch(&source, "backward", d, d.shape()[0]);
        d.gpu().launch(launch.bind("df", df).bind_mut("dd", &dd));
        dd
    }

    fn launch<'a>(&self, source: &'a Source, entry: &'a str, d: &Tensor, threads: usize) -> Launch<'a> {
        // The binding must be filled even if no orientation is read.
        let o = self.orientations.as_ref().map_or(d.clone(), |o| o.detach().contiguous());
        Launch::new("edge_features", source, entry, grid(threads.div_ceil(64)))
            .bind("d", d)
            .bind("o", &o)
            .set("n", threads)
            .set("orientations", self.count())
            .turns(self.count())
    }
}

/// The constants of the kernel's source.
#[derive(Clone, Copy)]
struct Variant {
    dimension: usize,
    oriented: bool,
    degree: usize,
}

impl Variant {
    fn source(self) -> Source {
        let attributes = 1 + self.oriented as usize;
        let count = polynomial_size(attributes, self.degree);
        Source::file("kernel_basis")
            .u32("KIND", if self.oriented { self.dimension as u32 - 1 } else { 0 })
            .u32("DIMENSION", self.dimension as u32)
            .u32("DEGREE", self.degree as u32)
            .u32("WIDTH", count.div_ceil(4) as u32)
            .u32("ATTRIBUTES", attributes as u32)
    }
}

/// The network `gelu(gelu(f w1^T + b1) w2^T + b2)` whose outputs are the basis functions of the kernels: two matrices
/// `[out, in]` and two biases. [`Tensor::kernel_basis`] and [`Tensor::spatial_conv`] need widths that are multiples of 4.
#[derive(Clone)]
pub struct Basis {
    /// `[hidden, features]`
    pub w1: Tensor,
    /// `[hidden]`
    pub b1: Tensor,
    /// `[basis, hidden]`
    pub w2: Tensor,
    /// `[basis]`
    pub b2: Tensor,
}

impl Basis {
    pub(crate) fn all(&self) -> [&Tensor; 4] {
        [&self.w1, &self.b1, &self.w2, &self.b2]
    }

    #[track_caller]
    pub(crate) fn check(&self, op: &str, sight: &EdgeFeatures) {
        let (w1, w2) = (self.w1.shape(), self.w2.shape());
        let fits = w1.len() == 2 && w2.len() == 2 && w1[1] == sight.features() && w2[1] == w1[0];
        let fits = fits && self.b1.shape()[..] == [w1[0]] && self.b2.shape()[..] == [w2[0]];
        let whole = w1.len() == 2 && w2.len() == 2 && w1[0].is_multiple_of(4) && w2[0].is_multiple_of(4);
        assert!(
            fits && whole && self.all().iter().all(|w| w.dtype() == DType::F32),
            "{op}: weights {w1}, {}, {w2}, {} for {} features; they must be [H, F], [H], [K, H], [K] in f32, H and K \
             multiples of 4",
            self.b1.shape(),
            self.b2.shape(),
            sight.features()
        );
    }
}

/// The network as it is applied to chunks of edges, without recording on the tape.
pub(crate) struct Network {
    pub sight: EdgeFeatures,
    weights: [Tensor; 4],
}

/// The results of a chunk's forward pass that the gradient needs.
pub(crate) struct Kept {
    f: Tensor,
    before: [Tensor; 2],
    z: Tensor,
    raw: Tensor,
    /// `[rows, basis]`, multiplied by the envelope.
    pub basis: Tensor,
}

/// Gradients collected over chunks. Those of the weights are added up, those of edges and envelopes are listed chunk by
/// chunk.
#[derive(Default)]
pub(crate) struct Sums {
    layers: [LayerSums; 2],
    edges: Vec<Tensor>,
    envelopes: Vec<Tensor>,
}

const OP: &str = "kernel_basis";

impl Network {
    pub fn new(sight: &EdgeFeatures, weights: &Basis) -> Network {
        Network { sight: sight.clone(), weights: weights.all().map(|w| w.detach().contiguous()) }
    }

    pub fn width(&self) -> usize {
        self.weights[3].count()
    }

    /// Returns the basis `[edges * O, K]` of the edges `d`, written to `into` if given. `envelope` is the envelope of each
    /// edge.
    pub fn forward(&self, d: &Tensor, envelope: Option<&Tensor>, into: Option<&Tensor>) -> Tensor {
        let [w1, b1, w2, b2] = &self.weights;
        let z = gelu_layer(OP, &self.sight.forward(d), [w1, b1], None, None);
        let Some(envelope) = envelope else { return gelu_layer(OP, &z, [w2, b2], into, None) };
        let basis = enveloped(&gelu_layer(OP, &z, [w2, b2], None, None), envelope);
        let Some(into) = into else {
            basis.evaluate();
            return basis;
        };
        basis.write_to(OP, into, false);
        into.clone()
    }

    pub fn keep(&self, d: &Tensor, envelope: Option<&Tensor>) -> Kept {
        let [w1, b1, w2, b2] = &self.weights;
        let f = self.sight.forward(d);
        let before = [w1, w2].map(|w| Tensor::empty(d.gpu(), OP, [f.shape()[0], w.shape()[0]], DType::F32));
        let z = gelu_layer(OP, &f, [w1, b1], None, Some(&before[0]));
        let raw = gelu_layer(OP, &z, [w2, b2], None, Some(&before[1]));
        let basis = envelope.map_or(raw.clone(), |envelope| enveloped(&raw, envelope));
        basis.evaluate();
        Kept { f, before, z, raw, basis }
    }

    /// Adds the wanted gradients of a chunk to `sums`, given the gradient of its basis.
    pub fn backward(
        &self,
        kept: &Kept,
        d: &Tensor,
        envelope: Option<&Tensor>,
        incoming: Incoming,
        wants: &Wants,
        sums: &mut Sums,
    ) {
        let [w1, _, w2, _] = &self.weights;
        let deeper = wants.edges || wants.weights.contains(&true);
        let (dsecond, denvelope) = match incoming {
            Incoming::Kernel { m, kernel } if envelope.is_none() => {
                (product_slope(OP, m, kernel, &kept.before[1]), None)
            }
            _ => {
                let dbasis = match incoming {
                    Incoming::Basis(dbasis) => dbasis.clone(),
                    Incoming::Kernel { m, kernel } => product(OP, m, kernel, Destination::New),
                };
                let denvelope = envelope.filter(|_| wants.envelope).map(|envelope| {
                    let edges = envelope.count();
                    kept.raw.mul(&dbasis).reshape([edges, dbasis.count() / edges.max(1)]).sum(1)
                });
                let draw = envelope.map_or(dbasis.clone(), |envelope| enveloped(&dbasis, envelope));
                let at = &kept.before[1];
                let dsecond = Tensor::lazy("gelu", "$1 * dgelu($0)", DType::F32, *at.shape(), &[at, &draw]);
                (dsecond, denvelope)
            }
        };
        sums.envelopes.extend(denvelope);
        if !deeper {
            return;
        }
        dsecond.evaluate();
        sums.layers[1].add(OP, &dsecond, &kept.z, &wants.weights[2..]);
        let dfirst = product_slope(OP, &dsecond, w2, &kept.before[0]);
        sums.layers[0].add(OP, &dfirst, &kept.f, &wants.weights[..2]);
        if wants.edges {
            sums.edges.push(self.sight.backward(d, &product(OP, &dfirst, w1, Destination::New)));
        }
    }
}

/// The gradient of a chunk's basis.
pub(crate) enum Incoming<'a> {
    /// The gradient itself, `[edges * O, K]`.
    Basis(&'a Tensor),
    /// The product `m kernel`, not yet computed, of the kernels' gradient `m [edges * O, C]` and `kernel [C, K]`.
    Kernel { m: &'a Tensor, kernel: &'a Tensor },
}

/// The gradients that are needed.
pub(crate) struct Wants {
    pub edges: bool,
    pub envelope: bool,
    pub weights: [bool; 4],
}

/// Multiplies `x [edges * O, K]` by the envelope of each edge.
fn enveloped(x: &Tensor, envelope: &Tensor) -> Tensor {
    let edges = envelope.count();
    x.reshape([edges, x.count() / edges.max(1)]).mul(&envelope.reshape([edges, 1])).reshape(*x.shape())
}

/// Edges per chunk: enough to keep a device busy, and a multiple of 64, so that parts of arrays can be bound.
pub(crate) fn chunk(gpu: &crate::Gpu, orientations: usize) -> usize {
    let rows = gpu.class().chunk as usize >> 10;
    (rows / orientations / 64 * 64).max(64)
}

pub(crate) fn chunks(edges: usize, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    (0..edges).step_by(chunk).map(move |first| first..edges.min(first + chunk))
}

/// Returns a chunk's part of an array over edges.
pub(crate) fn part(x: &Tensor, edges: &Range<usize>) -> Tensor {
    x.slice(0, edges.clone()).contiguous()
}

/// Concatenates the pieces. Without edges there are no pieces, and the result has the shape of `like`, whose first axis
/// is 0 then.
pub(crate) fn joined(pieces: &[Tensor], like: &Tensor) -> Tensor {
    match pieces {
        [] => Tensor::zeros(like.gpu(), *like.shape()),
        _ => Tensor::concat(&pieces.iter().collect::<Vec<_>>(), 0),
    }
}

impl Tensor {
    /// Returns the products of up to `degree` attributes of each edge, seen from every orientation, as `[E, O, F]`.
    /// `self` is the edges `d [E, D]`. The attributes are those of [`crate::geometry::invariants::spatial`] (or `|d|`
    /// without orientations), the products are in the order of [`crate::geometry::invariants::polynomial`], and zeros
    /// fill them up to a multiple of 4.
    ///
    /// # Panics
    /// When shapes do not fit, D is not 2 or 3, or the degree is not 1 to 6.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::ops::points::kernel_basis::EdgeFeatures;
    /// let sight = EdgeFeatures { orientations: None, degree: 2 };
    /// let d = Tensor::from_slice(&gpu, &[3f32, 4.0], [1, 2]); // one edge, of length 5
    /// let features = d.edge_features(&sight);
    /// assert_eq!(features.shape()[..], [1, 1, 4]);
    /// assert!((features.sum_all().item()? - 30.0).abs() < 1e-4); // 5 + 25
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn edge_features(&self, sight: &EdgeFeatures) -> Tensor {
        sight.check("edge_features", self);
        let d = self.detach().contiguous();
        let f = sight.forward(&d).reshape([d.shape()[0], sight.count(), sight.features()]);
        f.made_by(&[self], || Box::new(Features { sight: sight.clone(), d: Saved::new(&d) }))
    }

    /// Returns the basis `B [E, O, K] = envelope(e) gelu(gelu(f w1^T + b1) w2^T + b2)` of the features `f` of the edges
    /// `d [E, D]`, which are `self`. `envelope [E]` is the envelope of each edge.
    ///
    /// No other array of the result's size is computed or kept: edges go through the network in chunks, and the backward
    /// pass recomputes them.
    ///
    /// # Panics
    /// When shapes do not fit, or a width is not a multiple of 4.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::geometry::Basis;
    /// use tiebeam::ops::points::kernel_basis::EdgeFeatures;
    /// let sight = EdgeFeatures { orientations: None, degree: 2 };
    /// let ones = |shape: &[usize]| Tensor::ones(&gpu, shape);
    /// let basis = Basis { w1: ones(&[8, 4]), b1: ones(&[8]), w2: ones(&[4, 8]), b2: ones(&[4]) };
    /// let d = Tensor::from_slice(&gpu, &[3f32, 4.0, 0.0, 1.0], [2, 2]); // 2 edges
    /// assert_eq!(d.kernel_basis(None, &sight, &basis).shape()[..], [2, 1, 4]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn kernel_basis(&self, envelope: Option<&Tensor>, sight: &EdgeFeatures, weights: &Basis) -> Tensor {
        sight.check(OP, self);
        weights.check(OP, sight);
        let edges = self.shape()[0];
        assert!(envelope.is_none_or(|w| w.shape()[..] == [edges]), "{OP}: an envelope that is not [{edges}]");
        let mut inputs = vec![self];
        inputs.extend(weights.all());
        inputs.extend(envelope);
        same_gpu(OP, &inputs);
        let (d, network) = (self.detach().contiguous(), Network::new(sight, weights));
        let envelope = envelope.map(|w| w.detach().contiguous());
        let (o, k) = (sight.count(), network.width());
        let all = Tensor::empty(self.gpu(), OP, [edges, o, k], DType::F32);
        for chunk in chunks(edges, chunk(self.gpu(), o)) {
            let into = all.slice(0, chunk.clone()).reshape([chunk.len() * o, k]);
            let _ = network.forward(
                &part(&d, &chunk),
                envelope.as_ref().map(|w| part(w, &chunk)).as_ref(),
                Some(&into),
            );
        }
        all.made_by(&inputs, || {
            let saved = weights.all().map(Saved::new);
            Box::new(KernelBasis {
                network,
                saved,
                d: Saved::new(&d),
                envelope: envelope.map(|w| Saved::new(&w)),
            })
        })
    }
}

struct Features {
    sight: EdgeFeatures,
    d: Saved,
}

impl Op for Features {
    fn name(&self) -> &'static str {
        "edge_features"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        if let Some(dy) = &dy[0] {
            sink.add(0, self.sight.backward(self.d.get(self.name()), &dy.contiguous()));
        }
    }
}

struct KernelBasis {
    network: Network,
    /// Kept to check that the weights have not changed since the forward pass.
    saved: [Saved; 4],
    d: Saved,
    envelope: Option<Saved>,
}

impl Op for KernelBasis {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        self.saved.iter().for_each(|w| {
            w.get(OP);
        });
        let (d, dy, envelope) = (self.d.get(OP), dy.contiguous(), self.envelope.as_ref().map(|w| w.get(OP)));
        let wants = Wants {
            edges: sink.needs(0),
            envelope: envelope.is_some() && sink.needs(5),
            weights: std::array::from_fn(|i| sink.needs(1 + i)),
        };
        let mut sums = Sums::default();
        let [edges, o, k] = [0, 1, 2].map(|axis| dy.shape()[axis]);
        for chunk in chunks(edges, chunk(d.gpu(), o)) {
            let (d, envelope) = (part(d, &chunk), envelope.map(|w| part(w, &chunk)));
            let kept = self.network.keep(&d, envelope.as_ref());
            let dy = part(&dy, &chunk).reshape([chunk.len() * o, k]);
            self.network.backward(&kept, &d, envelope.as_ref(), Incoming::Basis(&dy), &wants, &mut sums);
        }
        sums.hand_over(sink, [0, 1, 5], &self.network, d, envelope);
    }
}

impl Sums {
    /// Hands the collected gradients to the sink, given the input numbers of the edges, of the first of four weights, and
    /// of the envelope.
    pub fn hand_over(
        self,
        sink: &mut Sink,
        [edges, weights, envelopes]: [usize; 3],
        network: &Network,
        d: &Tensor,
        envelope: Option<&Tensor>,
    ) {
        if sink.needs(edges) {
            sink.add(edges, joined(&self.edges, d));
        }
        for (i, sum) in self.layers.into_iter().flat_map(LayerSums::sums).enumerate() {
            if sink.needs(weights + i) {
                let none = || Tensor::zeros(d.gpu(), *network.weights[i].shape());
                sink.add(weights + i, sum.unwrap_or_else(none));
            }
        }
        if let Some(envelope) = envelope
            && sink.needs(envelopes)
        {
            sink.add(envelopes, joined(&self.envelopes, envelope));
        }
    }
}

/// The features of one edge and orientation in f64, without the zeros at the end.
fn features64(d: &[f64], o: Option<&[f64]>, degree: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let a = match o {
        None => vec![dot(d, d).sqrt()],
        Some(o) if d.len() == 2 => vec![dot(d, o), d[1] * o[0] - d[0] * o[1]],
        Some(o) => {
            let along = dot(d, o);
            let rest: Vec<f64> = d.iter().zip(o).map(|(d, o)| d - along * o).collect();
            vec![along, dot(&rest, &rest).sqrt()]
        }
    };
    let (mut all, mut last) = (a.clone(), a.clone());
    for _ in 1..degree {
        last = last.iter().flat_map(|f| a.iter().map(move |a| f * a)).collect();
        all.extend(&last);
    }
    all
}

/// The features of all edges, `[edges, O, F]`, filled up with zeros.
fn all_features64(d: &Array, o: Option<&Array>, degree: usize) -> Array {
    let [edges, width] = [d.shape[0], d.shape[1]];
    let count = o.map_or(1, |o| o.shape[0]);
    let rows: Vec<Vec<f64>> = (0..edges * count)
        .map(|row| {
            let own = |x: &'_ Array, i: usize| x.data[i * width..(i + 1) * width].to_vec();
            features64(&own(d, row / count), o.map(|o| own(o, row % count)).as_deref(), degree)
        })
        .collect();
    let f = polynomial_size(1 + o.is_some() as usize, degree).next_multiple_of(4);
    Array::from_fn([edges, count, f], |i| rows[i / f].get(i % f).copied().unwrap_or(0.0))
}

/// Applies one layer to `x [.., in]`.
fn layer64(x: &Array, w: &Array, b: &Array) -> Array {
    let [out, inner] = [w.shape[0], w.shape[1]];
    let rows = x.data.len() / inner;
    Array::from_fn([rows, out], |i| {
        let (row, j) = (i / out, i % out);
        let y = (0..inner).map(|q| x.data[row * inner + q] * w.data[j * inner + q]).sum::<f64>() + b.data[j];
        0.5 * y * (1.0 + erf64(y * std::f64::consts::FRAC_1_SQRT_2))
    })
}

/// The reference for the basis. `x` holds the edges, the orientations, w1, b1, w2, b2 and, if there is one, the envelope.
pub(crate) fn basis64(x: &[Array], degree: usize) -> Array {
    let (edges, o) = (x[0].shape[0], x[1].shape[0]);
    let f = all_features64(&x[0], Some(&x[1]), degree);
    let b = layer64(&layer64(&f, &x[2], &x[3]), &x[4], &x[5]);
    let k = b.shape[1];
    Array::from_fn([edges, o, k], |i| b.data[i] * x.get(6).map_or(1.0, |w| w.data[i / (o * k)]))
}

/// Unit vectors that are all different and not exact in f32.
pub(crate) fn directions(count: usize, dimension: usize) -> Input {
    let one = |i: usize| {
        let angle = 0.7 + 2.1 * i as f64;
        let z = if dimension == 3 { 0.8 - 1.3 * (i % 5) as f64 / 4.0 } else { 0.0 };
        let r = (1.0 - z * z).sqrt();
        [r * angle.cos(), r * angle.sin(), z][..dimension].to_vec()
    };
    Input::normal([count, dimension]).fill(Fill::Values((0..count).flat_map(one).collect())).fixed()
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for (edges, count, dimension, degree) in
        [(1, 1, 3, 1), (7, 5, 3, 3), (67, 2, 3, 2), (13, 3, 2, 3), (3, 4, 2, 4)]
    {
        let inputs = vec![Input::normal([edges, dimension]), directions(count, dimension)];
        let forward = move |x: &[Tensor]| {
            x[0].edge_features(&EdgeFeatures { orientations: Some(x[1].clone()), degree })
        };
        let reference = move |x: &[Array]| all_features64(&x[0], Some(&x[1]), degree);
        let name = format!("features of {edges} edges from {count} sides in {dimension}-D, degree {degree}");
        all.push(Case::new(name, inputs, forward, reference).ulps(64.0, 128.0).grad_floor(64.0));
    }
    for (edges, dimension, degree) in [(9, 3, 3), (5, 2, 5)] {
        let inputs = vec![Input::normal([edges, dimension])];
        let forward = move |x: &[Tensor]| x[0].edge_features(&EdgeFeatures { orientations: None, degree });
        let name = format!("lengths of {edges} edges in {dimension}-D, degree {degree}");
        let reference = move |x: &[Array]| all_features64(&x[0], None, degree);
        all.push(Case::new(name, inputs, forward, reference).ulps(64.0, 128.0).grad_floor(64.0));
    }
    for (edges, count, h, k, envelope) in [(5, 3, 8, 4, false), (3, 2, 4, 12, true), (0, 2, 4, 4, true)] {
        let degree = 2;
        let mut inputs = vec![Input::normal([edges, 3]), directions(count, 3)];
        inputs.extend(small([&[h, 8], &[h], &[k, h], &[k]]));
        inputs.extend(envelope.then(|| Input::normal([edges])));
        let forward = move |x: &[Tensor]| x[0].kernel_basis(x.get(6), &sight(x, degree), &weights(x));
        let name = format!(
            "basis of {edges} edges from {count} sides, {h} hidden, {k} functions, envelope {envelope}"
        );
        let case = Case::new(name, inputs, forward, move |x| basis64(x, degree));
        all.push(case.ulps(256.0, 512.0).grad_floor(1024.0));
    }
    all
}

/// Weights so small that GELU's inputs do not go far below 0, where GELU loses digits as a difference of nearly equal
/// numbers.
pub(crate) fn small<const N: usize>(shapes: [&[usize]; N]) -> [Input; N] {
    shapes.map(|shape| Input::normal(shape).fill(Fill::Normal(0.3)))
}

/// Returns the `EdgeFeatures` in the inputs of [`basis64`].
pub(crate) fn sight(x: &[Tensor], degree: usize) -> EdgeFeatures {
    EdgeFeatures { orientations: Some(x[1].clone()), degree }
}

pub(crate) fn weights(x: &[Tensor]) -> Basis {
    Basis { w1: x[2].clone(), b1: x[3].clone(), w2: x[4].clone(), b2: x[5].clone() }
}
