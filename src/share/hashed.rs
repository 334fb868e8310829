//! Weights that read fixed pseudo-random positions of a small store: many weights read the same number, each with a
//! random sign.
//!
//! `W[i] = scale * sign(i) * omega[position(i)]`, where `i` is the flat index over all weights of a model. There are four
//! ways to choose `position`. [`Mapping::Stable`] reads the store in order and every number equally often, and its
//! gradient is a gather. Source: STABLE-RPS and ROAST, arXiv 2310.11611.

use super::tied::dense;
use super::{LeafGrads, Load, Site};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::case::{Array, Case, Input};
use crate::ops::moves::embedding_sum::sum_by_index;
use crate::ops::product::conv::Conv2dConfig;
use crate::ops::product::materialise::materialise;
use crate::ops::product::matmul::Epilogue;
use crate::tensor::Tensor;
use std::sync::Arc;

/// Which stored number a weight reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mapping {
    /// Each weight reads the position of its own hash.
    Element,
    /// Runs of this many consecutive weights, each at a hashed position.
    Chunk(usize),
    /// Tiles of this many rows and columns, each at a hashed position (ROAST).
    Tile([usize; 2]),
    /// Each run of `m` weights is a rotation of the store of `m` numbers, so no two weights of a run collide.
    Stable,
}

/// The default seeds of positions and of signs.
pub const SEEDS: [u32; 2] = [1, 2];

fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

/// The hash of a number with a seed, as in `shaders/share/lib/hash.wgsl`.
///
/// ```
/// use tiebeam::share::hashed::hash;
/// assert_eq!(hash(7, 1), hash(7, 1));
/// assert_ne!(hash(7, 1), hash(7, 2)); // another seed, another function
/// ```
pub fn hash(x: u32, seed: u32) -> u32 {
    mix(x.wrapping_add(seed.wrapping_mul(0x9e37_79b9)))
}

/// The hash of two numbers.
pub fn hash2(a: u32, b: u32, seed: u32) -> u32 {
    hash(hash(a, seed).wrapping_add(b), seed)
}

/// The description of the numbers of a store that a weight `[out, in]` reads.
///
/// ```
/// use tiebeam::share::{Draw, Mapping, hashed::SEEDS};
/// let (mapping, size) = (Mapping::Chunk(4), [2, 8]); // runs of 4 weights, from 6 numbers
/// let draw = Draw { stored: 6, size, offset: 0, layer: 0, scale: 1.0, mapping, seeds: SEEDS };
/// let positions = draw.positions();
/// assert_eq!(positions.len(), 16);
/// assert!(positions.chunks(4).all(|run| run[3] == run[0] + 3 && run[3] < 6));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Size of the store.
    pub stored: usize,
    /// `[out, in]`
    pub size: [usize; 2],
    /// Flat index of this weight's first element among all elements that read the store.
    pub offset: usize,
    /// Distinguishes the tiles of different weights.
    pub layer: usize,
    /// A constant factor, such as the weight's initial standard deviation divided by the store's.
    pub scale: f32,
    /// How positions are chosen.
    pub mapping: Mapping,
    /// The seeds of positions and of signs: [`SEEDS`], or others.
    pub seeds: [u32; 2],
}

impl Draw {
    /// The least size of a store for this mapping.
    fn least(&self) -> usize {
        match self.mapping {
            Mapping::Element | Mapping::Stable => 1,
            Mapping::Chunk(length) => length,
            Mapping::Tile([rows, columns]) => rows * columns,
        }
    }

    /// The constants of `shaders/share/lib/site_hashed.wgsl`.
    fn constants(&self) -> Vec<(&'static str, u32)> {
        let (kind, own) = match self.mapping {
            Mapping::Element => (0, vec![]),
            Mapping::Chunk(length) => (1, vec![("CHUNK", length)]),
            Mapping::Tile([rows, columns]) => {
                (2, vec![("LAYER", self.layer), ("TILE_ROWS", rows), ("TILE_COLUMNS", columns)])
            }
            Mapping::Stable => (3, vec![]),
        };
        let mut all = vec![("MAPPING", kind), ("STORED", self.stored as u32)];
        all.extend([("SEED", self.seeds[0]), ("SIGN_SEED", self.seeds[1])]);
        all.extend(own.into_iter().map(|(name, value)| (name, value as u32)));
        all
    }

    /// `site_numbers()` of that fragment.
    fn numbers(&self) -> [u32; 4] {
        let [rows, columns] = self.size.map(|v| v as u32);
        [rows, columns, self.offset as u32, self.scale.to_bits()]
    }

    /// The positions in the store of all elements of the weight, row by row.
    pub fn positions(&self) -> Vec<u32> {
        let (m, columns) = (self.stored as u32, self.size[1]);
        let [seed, _] = self.seeds;
        let place = |w: usize| {
            let (row, col, i) = (w / columns, w % columns, (self.offset + w) as u32);
            match self.mapping {
                Mapping::Element => hash(i, seed) % m,
                Mapping::Chunk(length) => {
                    let length = length as u32;
                    hash(i / length, seed) % (m - length + 1) + i % length
                }
                Mapping::Tile([rows, cols]) => {
                    let tile = hash2((self.layer * 65536 + row / rows) as u32, (col / cols) as u32, seed);
                    let inside = row % rows * cols + col % cols;
                    tile % (m - (rows * cols) as u32 + 1) + inside as u32
                }
                Mapping::Stable => (hash(i / m, seed) % m + i % m) % m,
            }
        };
        (0..self.size[0] * columns).map(place).collect()
    }

    /// The signs of all elements of the weight, row by row.
    pub fn signs(&self) -> Vec<f32> {
        let sign = |w| 1.0 - 2.0 * (hash((self.offset + w) as u32, self.seeds[1]) & 1) as f32;
        (0..self.size[0] * self.size[1]).map(sign).collect()
    }

    /// Returns, for each stored number, `(sum of scales)^2 / count` over the weights of all `draws` that read it, or 1 if
    /// none does. Dividing the gradient by it (see [`Tensor::scale_gradient`]) makes the size of steps independent of the
    /// scales.
    ///
    /// # Panics
    /// When the stores differ in size, or there is no draw.
    #[track_caller]
    pub fn stabilizer(draws: &[Draw]) -> Vec<f32> {
        let m = draws[0].stored;
        let (mut sum, mut count) = (vec![0.0f64; m], vec![0u32; m]);
        for draw in draws {
            assert!(draw.stored == m, "hashed: stores of {m} and {}", draw.stored);
            for at in draw.positions() {
                sum[at as usize] += draw.scale as f64;
                count[at as usize] += 1;
            }
        }
        let gamma = |(s, n): (&f64, &u32)| if *n == 0 { 1.0 } else { (s * s / *n as f64) as f32 };
        sum.iter().zip(&count).map(gamma).collect()
    }
}

/// One weight `[out, in]` drawn from `omega [m]`.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::{Draw, Hashed, Mapping, Site, hashed::SEEDS};
/// let omega = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3]).requires_grad();
/// let (mapping, size) = (Mapping::Element, [4, 5]); // 20 weights of 3 numbers
/// let draw = Draw { stored: 3, size, offset: 0, layer: 0, scale: 0.5, mapping, seeds: SEEDS };
/// let weight = Hashed::new(&omega, draw).expand().to_vec::<f32>()?;
/// assert_eq!(weight.len(), 20);
/// assert!(weight.iter().all(|w| [0.5, 1.0, 1.5].contains(&w.abs())));
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct Hashed {
    omega: Tensor,
    draw: Draw,
}

impl Hashed {
    /// Makes the weight that `draw` reads from `omega`.
    ///
    /// # Panics
    /// When `omega` is not one axis of `draw.stored` floats, is shorter than a chunk or tile of the mapping or has 2^31
    /// numbers or more; or when an index reaches 2^32 or the layer 2^16.
    #[track_caller]
    pub fn new(omega: &Tensor, draw: Draw) -> Hashed {
        let least = draw.least();
        assert!(least > 0, "hashed: {:?} has no elements", draw.mapping);
        let fits = **omega.shape() == [draw.stored]
            && draw.stored >= least
            && draw.stored < 1 << 31
            && omega.dtype().is_float();
        assert!(fits, "hashed: {:?} needs one axis of at least {least} floats, got {}", draw, omega.shape());
        let end = draw.offset + draw.size[0] * draw.size[1];
        assert!(
            end < 1 << 32 && draw.layer < 1 << 16,
            "hashed: weights up to index {end}; 32 bits hold them"
        );
        Hashed { omega: omega.clone(), draw }
    }
}

impl Site for Hashed {
    fn name(&self) -> &'static str {
        "hashed"
    }

    fn size(&self) -> [usize; 2] {
        self.draw.size
    }

    fn leaves(&self) -> Vec<Tensor> {
        vec![self.omega.clone()]
    }

    fn leaf_names(&self) -> &'static [&'static str] {
        &["omega"]
    }

    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(Hashed::new(&leaves[0], self.draw))
    }

    fn load(&self) -> Load {
        let load = Load::new("site_hashed", vec![("theta", dense(&self.omega))], self.draw.numbers());
        Load { constants: self.draw.constants(), ..load }
    }

    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        let dw = dense(dw);
        let gpu = dw.gpu();
        let draw = &self.draw;
        if draw.mapping != Mapping::Stable {
            // The adjoint of a lookup, sorted by position.
            let [places, parts] = self.places(&dw);
            let shape = *self.omega.shape();
            return grads.add_with(0, |into| sum_by_index(&parts, 0, shape, &places, into));
        }
        let m = draw.stored;
        grads.add_with(0, |into| {
            let (domega, accumulate) = into.output(gpu, "hashed", *self.omega.shape());
            let runs = (draw.offset + dw.count() - 1) / m - draw.offset / m + 1;
            for skip in (0..runs).step_by(MOST_RUNS) {
                gpu.launch(
                    Launch::new(
                        "hashed",
                        &reduce(draw, accumulate || skip > 0),
                        "main",
                        grid(m.div_ceil(64)),
                    )
                    .bind("dw", &dw)
                    .bind_mut("domega", &domega)
                    .set("count", dw.count())
                    .set("offset", draw.offset)
                    .set("scale", draw.scale)
                    .set("skip", skip)
                    .turns(MOST_RUNS + MOST_RUNS / 64),
                );
            }
            domega
        });
    }
}

impl Hashed {
    /// The positions that the weights read, and what `dw` adds to each.
    fn places(&self, dw: &Tensor) -> [Tensor; 2] {
        let (gpu, count) = (dw.gpu(), dw.count());
        let places = Tensor::empty(gpu, "hashed_places", [count], DType::U32);
        let parts = Tensor::empty(gpu, "hashed_places", [count], DType::F32);
        let mut source = Source::file("hashed_places");
        for (name, value) in self.draw.constants() {
            source = source.u32(name, value);
        }
        let launch = Launch::new("hashed_places", &source, "main", grid(count.div_ceil(64)))
            .bind("dw", dw)
            .output("places", &places)
            .output("parts", &parts)
            .set("site", self.draw.numbers());
        gpu.launch(launch.turns(1));
        [places, parts]
    }
}

fn reduce(draw: &Draw, accumulate: bool) -> Source {
    Source::file("hashed_reduce")
        .u32("STORED", draw.stored as u32)
        .u32("SEED", draw.seeds[0])
        .u32("SIGN_SEED", draw.seeds[1])
        .bool("ACCUMULATE", accumulate)
        .u32("MOST", MOST_RUNS as u32)
}

/// The most runs of stored numbers that one launch of the adjoint adds up.
const MOST_RUNS: usize = 4096;

/// One table that many features share. Each value of each feature reads `chunks` rows at hashed positions, and its vector
/// is these rows one after the other.
///
/// Source: unified embedding (feature multiplexing), arXiv 2305.12102.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::share::UnifiedEmbedding;
/// let table = Tensor::ones(&gpu, [100, 4]); // 100 rows for the values of all features
/// let embedding = UnifiedEmbedding::new(&table, &[1, 2]); // 1 row and 2 rows a value
/// let y = embedding.forward(&[vec![123456, 7], vec![42, 8]]); // two examples
/// assert_eq!(y.shape()[..], [2, 12]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone)]
pub struct UnifiedEmbedding {
    /// `[buckets, width of a piece]`
    pub table: Tensor,
    /// Number of pieces in each feature's vector.
    pub chunks: Vec<usize>,
}

impl UnifiedEmbedding {
    /// Makes a table `[buckets, width]` for features with these numbers of pieces.
    ///
    /// # Panics
    /// When the table is not a matrix of floats with at least one element, or a feature has no piece.
    #[track_caller]
    pub fn new(table: &Tensor, chunks: &[usize]) -> UnifiedEmbedding {
        let fits = table.shape().len() == 2 && table.count() > 0 && table.dtype().is_float();
        assert!(fits, "unified embedding: the table must be [buckets, width], got {}", table.shape());
        assert!(!chunks.contains(&0), "unified embedding: pieces {chunks:?}; every feature needs one");
        UnifiedEmbedding { table: table.clone(), chunks: chunks.to_vec() }
    }

    /// Returns the row of the table for piece `chunk` of a value of `feature`.
    pub fn bucket(&self, feature: usize, chunk: usize, value: u32) -> u32 {
        hash2(value, (feature * 65536 + chunk) as u32, SEEDS[0]) % self.table.shape()[0] as u32
    }

    /// Returns the vectors of a batch: `values [batch][features]` become `[batch, sum of chunks * width]`.
    ///
    /// # Panics
    /// When an example does not have one value per feature.
    #[track_caller]
    pub fn forward(&self, values: &[Vec<u32>]) -> Tensor {
        let mut ids = Vec::new();
        for example in values {
            assert!(
                example.len() == self.chunks.len(),
                "unified embedding: {} values for {} features",
                example.len(),
                self.chunks.len()
            );
            for (feature, (&value, &chunks)) in example.iter().zip(&self.chunks).enumerate() {
                ids.extend((0..chunks).map(|chunk| self.bucket(feature, chunk, value)));
            }
        }
        let (pieces, width) = (self.chunks.iter().sum::<usize>(), self.table.shape()[1]);
        let gpu: &Gpu = self.table.gpu();
        let ids = Tensor::from_slice(gpu, &ids, [values.len() * pieces]);
        self.table.embedding(&ids).reshape([values.len(), pieces * width])
    }
}

fn weight64(draw: &Draw, omega: &Array) -> Array {
    let (positions, signs) = (draw.positions(), draw.signs());
    Array::from_fn(draw.size, |i| draw.scale as f64 * signs[i] as f64 * omega.data[positions[i] as usize])
}

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for mapping in [Mapping::Element, Mapping::Chunk(16), Mapping::Tile([4, 8]), Mapping::Stable] {
        for (rows, n, k, stored, offset) in [(3, 4, 8, 40, 0), (5, 7, 9, 37, 50), (70, 5, 12, 64, 3)] {
            let draw = Draw { stored, size: [n, k], offset, layer: 3, scale: 0.5, mapping, seeds: SEEDS };
            let inputs = vec![Input::normal([rows, k]), Input::normal([stored])];
            let forward = move |x: &[Tensor]| {
                let site = Hashed::new(&x[1], draw).shared();
                x[0].linear(&site, Epilogue::default())
            };
            let reference = move |x: &[Array]| {
                let w = weight64(&draw, &x[1]);
                Array::from_fn([rows, n], |i| {
                    (0..k).map(|q| x[0].data[i / n * k + q] * w.data[i % n * k + q]).sum()
                })
            };
            let name = format!("{mapping:?} {rows} {n} {k} of {stored}").to_lowercase();
            all.push(Case::new(name, inputs, forward, reference).ulps(16.0, 32.0));
        }
    }
    // The filters of a convolution, of which the last weights are the store's first again.
    for mapping in [Mapping::Tile([2, 3]), Mapping::Stable] {
        let draw =
            Draw { stored: 23, size: [3, 2 * 2 * 3], offset: 5, layer: 1, scale: 0.5, mapping, seeds: SEEDS };
        let inputs = vec![Input::normal([2, 2, 5, 4]), Input::normal([23])];
        let forward = move |x: &[Tensor]| {
            let weight = materialise(&Hashed::new(&x[1], draw).shared()).reshape([3, 2, 2, 3]);
            x[0].conv2d(&weight, None, Conv2dConfig::default())
        };
        let reference = move |x: &[Array]| {
            let w = weight64(&draw, &x[1]);
            let at =
                |b: usize, c: usize, row: usize, col: usize| x[0].data[((b * 2 + c) * 5 + row) * 4 + col];
            Array::from_fn([2, 3, 4, 2], |i| {
                let (b, out, row, col) = (i / 24, i / 8 % 3, i / 2 % 4, i % 2);
                let term = |q: usize| at(b, q / 6, row + q / 3 % 2, col + q % 3) * w.data[out * 12 + q];
                (0..12).map(term).sum()
            })
        };
        let name = format!("convolution {mapping:?}").to_lowercase();
        all.push(Case::new(name, inputs, forward, reference).ulps(16.0, 32.0));
    }
    let inputs = vec![Input::normal([6, 3])];
    let features = |x: &[Tensor]| UnifiedEmbedding::new(&x[0], &[2, 1]).forward(&[vec![7, 9], vec![7, 123]]);
    all.push(Case::new("unified embedding", inputs, features, |x| {
        let bucket =
            |feature: u32, chunk: u32, value| hash2(value, feature * 65536 + chunk, SEEDS[0]) as usize % 6;
        let rows = [
            bucket(0, 0, 7),
            bucket(0, 1, 7),
            bucket(1, 0, 9),
            bucket(0, 0, 7),
            bucket(0, 1, 7),
            bucket(1, 0, 123),
        ];
        Array::from_fn([2, 9], |i| x[0].data[rows[i / 3] * 3 + i % 3])
    }));
    all
}
