//! The adjoint law of the sharing kinds. With its other leaves held, a weight `W = S(theta)` is affine in each stored leaf, and the
//! gradient that a leaf gets is the adjoint of that map: `<S(phi) - S(0), G> = <phi, S^T G>` for every `phi` and `G`.
//!
//! All elements are small whole numbers other than 0, so the arithmetic is exact and both sides are equal. [`EXACT`] says why. No
//! element is 0, so that an error in a single element of a gradient never vanishes in the sum.
//!
//! The table of [`kinds`] has each kind once. `tests/house` fails when a kind of the sources is missing here.

use crate::support::{download, gpu, other_kernels};
use std::collections::BTreeSet;
use std::sync::Arc;
use tiebeam::nn::{Linear, lookup, materialise};
use tiebeam::ops::case::Array;
use tiebeam::share::{
    Bone, DepthLora, Dictionary, Draw, Factored, Hashed, LeafGrads, Load, LowRank, Mapping, Miss, Packed,
    PackedScales, Packing, Reduced, Scales, ShardConfig, ShardPool, Site, Tied, UnifiedEmbedding, check_law,
    hashed,
};
use tiebeam::{DType, Gpu, Precision, Rng, Tensor, autocast};

/// The types that implement [`Site`], with the names that they give themselves.
const SITES: [(&str, &str); 10] = [
    ("Tied", "tied"),
    ("LowRank", "low_rank"),
    ("Factored", "factored"),
    ("Atoms", "atoms"),
    ("Hashed", "hashed"),
    ("Shards", "shards"),
    ("Miss", "miss"),
    ("Bone", "bone"),
    ("Packed", "packed"),
    ("PackedScales", "packed_scales"),
];

/// Elements are whole numbers of at most 3, and constant factors are 2. A weight is then at most 42 (a block of `Bone`: 3 + 4 * 9 +
/// 3), a result with up to 12 inputs at most 1512, and one of [`ONE_NUMBER`] at most 64 * 6 * 3. f16 has every whole
/// number up to 2048 exactly. The gradient of a weight is at most 72 * 9 per element, and that of a leaf sums at most 65 * 64 such
/// elements, each times at most 6: below 2^24, up to which f32 has every whole number.
const EXACT: [f32; 6] = [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0];

/// `[out, in]` of the weights: in whole vectors of four, and with edges.
const SIZES: [[usize; 2]; 2] = [[8, 12], [5, 7]];

/// The size of a weight that reads one number more often than one launch of the hashed adjoint adds up.
const ONE_NUMBER: [usize; 2] = [65, 64];

/// Rows of a product, with its scope: few, whose weight is read by the kind's load, and many, for which it is materialised,
/// in a scope of 16 bits by [`Site::expand_as`]. Both are whole multiples of the sites of the kinds that have several.
const PRODUCTS: [(usize, Precision); 3] = [(6, Precision::F32), (72, Precision::F32), (72, Precision::F16)];

enum Map {
    /// The weight of these leaves.
    Weight(Weight),
    /// The rows `x [rows, in]` times weights of their own, of which there are so many: row i has weight `which[i]`.
    Rows(usize, Rows),
}

type Weight = Box<dyn Fn(&[Tensor]) -> Arc<dyn Site>>;
type Rows = Box<dyn Fn(&[Tensor], &Tensor, &[u32]) -> Tensor>;

/// A sharing kind: the shapes of its leaves, and the map from leaves to what they stand for.
struct Kind {
    name: String,
    size: [usize; 2],
    leaves: Vec<Vec<usize>>,
    map: Map,
}

/// The table, while it is filled with the kinds of one size.
struct Table {
    size: [usize; 2],
    kinds: Vec<Kind>,
}

impl Table {
    fn add(&mut self, name: impl Into<String>, leaves: &[&[usize]], map: Map) {
        let leaves = leaves.iter().map(|shape| shape.to_vec()).collect();
        self.kinds.push(Kind { name: name.into(), size: self.size, leaves, map });
    }

    fn site<S: Site + 'static>(
        &mut self,
        name: impl Into<String>,
        leaves: &[&[usize]],
        make: impl Fn(&[Tensor]) -> S + 'static,
    ) {
        self.add(name, leaves, Map::Weight(Box::new(move |x| make(x).shared())));
    }

    fn shared(
        &mut self,
        name: impl Into<String>,
        leaves: &[&[usize]],
        make: impl Fn(&[Tensor]) -> Arc<dyn Site> + 'static,
    ) {
        self.add(name, leaves, Map::Weight(Box::new(make)));
    }

    fn rows(
        &mut self,
        name: impl Into<String>,
        leaves: &[&[usize]],
        weights: usize,
        product: impl Fn(&[Tensor], &Tensor, &[u32]) -> Tensor + 'static,
    ) {
        self.add(name, leaves, Map::Rows(weights, Box::new(product)));
    }
}

/// Every kind, in every form in which its leaves may be stored.
fn kinds(gpu: &Gpu, [out, inner]: [usize; 2]) -> Vec<Kind> {
    let mut all = Table { size: [out, inner], kinds: Vec::new() };
    let (theta, a, b): (&[usize], &[usize], &[usize]) = (&[out, inner], &[2, inner], &[out, 2]);
    // Leaves may be transposed views of what is stored. Bit i of `turns` says so of leaf i.
    let turned = |turns: usize, shapes: &[&[usize]]| -> Vec<Vec<usize>> {
        let turn = |(i, shape): (usize, &&[usize])| match turns >> i & 1 {
            0 => shape.to_vec(),
            _ => vec![shape[1], shape[0]],
        };
        shapes.iter().enumerate().map(turn).collect()
    };
    for turns in 0..8 {
        let view = move |x: &[Tensor], i: usize| if turns >> i & 1 > 0 { x[i].t() } else { x[i].clone() };
        let mut site = |name: &str, shapes: &[&[usize]], make: fn(&[Tensor]) -> Arc<dyn Site>| {
            if turns < 1 << shapes.len() {
                let stored = turned(turns, shapes);
                let stored: Vec<&[usize]> = stored.iter().map(|shape| &shape[..]).collect();
                let count = stored.len();
                let views = move |x: &[Tensor]| (0..count).map(|i| view(x, i)).collect::<Vec<_>>();
                all.shared(format!("{name}, turns {turns:03b}"), &stored, move |x| make(&views(x)));
            }
        };
        site("tied", &[theta], |x| Tied::new(&x[0]).shared());
        site("low rank", &[theta, a, b], |x| LowRank::new(&x[0], &x[1], &x[2], 2.0).shared());
        site("factored", &[a, b], |x| Factored::new(&x[0], &x[1]).shared());
        let shard: &[usize] = &[inner / 2 - 1, out];
        site("miss", &[theta, shard], |x| Miss::new(&x[0], &x[1]).shared());
        let mini: &[usize] = &[3, if out.is_multiple_of(2) { out / 2 } else { 1 }];
        site("miss, mini", &[theta, mini], |x| Miss::new(&x[0], &x[1]).shared());
    }
    // One matrix at two depths, whose gradients meet in one buffer, in either order.
    for low_first in [false, true] {
        let name = if low_first { "low rank, then tied" } else { "tied, then low rank" };
        all.rows(name, &[theta, a, b], 2, move |w, x, _| {
            let tied = Tied::new(&w[0]).shared();
            let low = LowRank::new(&w[0], &w[1], &w[2], 2.0).shared();
            let (rows, sites) = (x.shape()[0], if low_first { [low, tied] } else { [tied, low] });
            let parts = [x.slice(0, 0..rows / 2), x.slice(0, rows / 2..rows)];
            let y = [0, 1].map(|i| Linear::from_site(sites[i].clone(), None).forward(&parts[i]));
            Tensor::concat(&[&y[0], &y[1]], 0)
        });
    }
    let list = |x: &Tensor, which: &[u32]| Tensor::from_slice(x.gpu(), which, [which.len()]);
    all.rows("depth lora", &[theta, &[3, 2, inner], &[3, out, 2]], 3, move |w, x, which| {
        let weight = Tied::new(&w[0]).shared();
        DepthLora::new(&w[1], &w[2], 2.0).linear(x, &weight, &list(x, which))
    });
    let (atoms, c): (&[usize], &[usize]) = (&[2, out, inner], &[3, 2]);
    all.shared("dictionary, as read", &[atoms, c], |x| Dictionary::new(&x[0], &x[1]).site(1));
    all.shared("dictionary, one made", &[atoms, c], |x| Dictionary::new(&x[0], &x[1]).weights().remove(1));
    all.rows("dictionary, all made", &[atoms, c], 3, |w, x, _| {
        let (part, made) = (x.shape()[0] / 3, Dictionary::new(&w[0], &w[1]).weights());
        let one = |(i, site)| Linear::from_site(site, None).forward(&x.slice(0, i * part..(i + 1) * part));
        let y: Vec<Tensor> = made.into_iter().enumerate().map(one).collect();
        Tensor::concat(&y.iter().collect::<Vec<_>>(), 0)
    });
    all.rows("dictionary, mixed", &[atoms, c], 3, move |w, x, which| {
        Dictionary::new(&w[0], &w[1]).mixed(x, &list(x, which))
    });
    let draw = Draw {
        stored: 40,
        size: [out, inner],
        offset: 3,
        layer: 3,
        scale: 2.0,
        mapping: Mapping::Stable,
        seeds: hashed::SEEDS,
    };
    for mapping in [Mapping::Element, Mapping::Chunk(16), Mapping::Tile([4, 8]), Mapping::Stable] {
        let draw = Draw { mapping, ..draw };
        all.site(format!("hashed by {mapping:?}"), &[&[40]], move |x| Hashed::new(&x[0], draw));
    }
    // The packed weight itself has no leaf: only products with it have a gradient, that of the rows.
    let given = gpu.clone();
    let levels = move |least| packed(&given, [out, inner], least);
    let base = levels.clone();
    all.site("packed", &[], move |_| base(-2));
    let base = levels.clone();
    all.site("packed, low rank", &[a, b], move |x| base(-2).low_rank(&x[0], &x[1], 2.0));
    let base = levels.clone();
    all.site("packed, miss", &[&[3, out]], move |x| Miss::over(&base(-2).shared(), &x[0]));
    let (base, scales): (_, &[usize]) = (levels.clone(), &[out, 1]);
    all.site("packed, scales", &[scales, scales], move |x| -> PackedScales {
        base(0).scales().expect("a readback").with(&x[0], &x[1])
    });
    // Vectors of a pool are assembled from as many shards as fit both sides.
    let shards = if [out, inner] == SIZES[0] { 4 } else { 1 };
    let index = |seed| ShardPool::draw(2, 2, shards, [3, 1], &mut Rng::new(seed));
    let (index_a, index_b) = (index(1), index(2));
    let pools: [&[usize]; 2] = [&[5, inner / shards], &[5, out / shards]];
    let assembled = move |pools: &[Tensor]| {
        let [pool_a, pool_b] = [0, 1].map(|i| pools[i].clone());
        let (index_a, index_b) = (index_a.clone(), index_b.clone());
        ShardPool { pool_a, pool_b, index_a, index_b, rank: 2, scale: 2.0 }
    };
    let pool = assembled.clone();
    all.shared("shard pool", &[theta, pools[0], pools[1]], move |x| pool(&x[1..]).site(1, &x[0]));
    all.shared("packed, shard pool", &pools, move |x| assembled(x).over(0, &levels(-2).shared()));
    // One as models get it: its indices are drawn with the pools, whose elements are then replaced.
    let config = ShardConfig::new(2, 1).shards(shards).alpha(4.0);
    let made = ShardPool::new(gpu, 3, [out, inner], config, &mut Rng::new(3)).expect("sizes that fit");
    let pools: [&[usize]; 2] = [&[3 * shards, inner / shards], &[3 * shards, out / shards]];
    all.shared("shard pool of a model", &[theta, pools[0], pools[1]], move |x| {
        let [pool_a, pool_b] = [1, 2].map(|i| x[i].clone());
        ShardPool { pool_a, pool_b, ..made.clone() }.site(2, &x[0])
    });
    let r = if [out, inner] == SIZES[0] { 4 } else { 1 };
    all.site("bone", &[theta, &[out / r, r, r]], |x| Bone::new(&x[0], &x[1]));
    // Parts that are added to weights which are neither stored nor packed.
    all.site("hashed, low rank", &[&[40], a, b], move |x| {
        LowRank::over(&Hashed::new(&x[0], draw).shared(), &x[1], &x[2], 2.0)
    });
    all.site("low rank, miss", &[theta, a, b, &[3, out]], |x| {
        Miss::over(&LowRank::new(&x[0], &x[1], &x[2], 1.0).shared(), &x[3])
    });
    all.site("miss, bone", &[theta, &[3, 1], &[out, 1, 1]], |x| {
        Bone::over(&Miss::new(&x[0], &x[1]).shared(), &x[2]).expect("no packed weight")
    });
    // The vectors of a batch of values, some of which are equal, stand for the weight.
    let (width, batch) = (inner / 3, out);
    all.size = [out, 3 * width];
    all.site("unified embedding", &[&[6, width]], move |x| {
        let values: Vec<Vec<u32>> = (0..batch as u32).map(|i| vec![i % 3, 7 + i]).collect();
        Tied::new(&UnifiedEmbedding::new(&x[0], &[2, 1]).forward(&values))
    });
    if [out, inner] == SIZES[0] {
        all.size = ONE_NUMBER;
        let draw = Draw { stored: 1, size: ONE_NUMBER, offset: 0, ..draw };
        all.site("hashed from one number", &[&[1]], move |x| Hashed::new(&x[0], draw));
    }
    all.kinds
}

/// A packed matrix of whole numbers: `least` and the four above it.
fn packed(gpu: &Gpu, [out, inner]: [usize; 2], least: i32) -> Packed {
    let packing = Packing::new(4, 16, Scales::Affine).expect("a packing");
    let row_words = packing.row_words(inner);
    let mut words = vec![0; out * row_words];
    for (r, row) in words.chunks_exact_mut(row_words).enumerate() {
        let levels: Vec<u8> = (0..inner).map(|c| ((r * 3 + c * 7) % 5) as u8).collect();
        packing.write_levels(&levels, row);
        packing.write_scale(row, inner, 0, [1.0, least as f32]);
    }
    Packed::new(gpu, packing, [out, inner], &words).expect("a packed matrix")
}

/// `parts` identity matrices one below the other, and the number of each row's matrix. Their product with weights is the weights.
fn identities(gpu: &Gpu, inner: usize, parts: usize) -> (Tensor, Vec<u32>) {
    let rows = parts * inner;
    let x: Vec<f32> = (0..rows * inner).map(|i| (i / inner % inner == i % inner) as u32 as f32).collect();
    (Tensor::from_slice(gpu, &x, [rows, inner]), (0..rows).map(|i| (i / inner) as u32).collect())
}

fn draw(count: usize, rng: &mut Rng) -> Vec<f32> {
    let mut at = vec![0.0f32; count];
    rng.fill_uniform(&mut at);
    at.iter().map(|&u| EXACT[(u * EXACT.len() as f32) as usize % EXACT.len()]).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Checks the law of every leaf. `value` computes the map's value without a tape, and `tracked` the same with one. These may be
/// different kernels, and must agree.
fn law(
    gpu: &Gpu,
    what: &str,
    shapes: &[Vec<usize>],
    value: &dyn Fn(&[Tensor]) -> Tensor,
    tracked: &dyn Fn(&[Tensor]) -> Tensor,
) {
    let mut rng = Rng::new(11);
    let count = |shape: &[usize]| shape.iter().product::<usize>();
    let theta: Vec<Vec<f32>> = shapes.iter().map(|shape| draw(count(shape), &mut rng)).collect();
    let place = |i: usize, data: &[f32]| Tensor::from_slice(gpu, data, &shapes[i][..]);
    let at = |i: usize, data: &[f32]| {
        let leaves: Vec<Tensor> =
            (0..shapes.len()).map(|j| place(j, if i == j { data } else { &theta[j] })).collect();
        download(&value(&leaves))
    };
    let leaves: Vec<Tensor> = (0..shapes.len()).map(|i| place(i, &theta[i]).requires_grad()).collect();
    let y = tracked(&leaves);
    let here = at(0, &theta[0]);
    assert_eq!(download(&y), here, "{what}: the value with a tape and without");
    let g = draw(here.len(), &mut rng);
    let weighted = y.cast(DType::F32).mul(&Tensor::from_slice(gpu, &g, *y.shape()));
    let grads = weighted.sum_all().backward().expect("a backward pass");
    let g: Vec<f64> = g.into_iter().map(f64::from).collect();
    for (i, leaf) in leaves.iter().enumerate() {
        let gradient =
            download(grads.get(leaf).unwrap_or_else(|| panic!("{what}: leaf {i} has no gradient")));
        let zero = dot(&at(i, &vec![0.0; theta[i].len()]), &g);
        // At another place the gradient is the same, because the map is affine.
        let other = draw(theta[i].len(), &mut rng);
        for (phi, value) in [(&theta[i], &here), (&other, &at(i, &other))] {
            let phi: Vec<f64> = phi.iter().map(|&v| v.into()).collect();
            let (moved, pulled) = (dot(value, &g) - zero, dot(&phi, &gradient));
            assert_eq!(moved, pulled, "{what}, kernels for CPUs {}: leaf {i}", gpu.class().is_cpu());
        }
    }
}

fn each(check: impl Fn(&Gpu, &Kind)) {
    for gpu in [gpu(), other_kernels()] {
        SIZES.iter().flat_map(|&size| kinds(gpu, size)).for_each(|kind| check(gpu, &kind));
    }
}

/// The weight itself, which for kinds without a weight of their own is their product with the identity.
#[test]
fn law_of_sharing_holds_for_whole_weights() {
    each(|gpu, kind| {
        let what = format!("{} {:?}", kind.name, kind.size);
        if kind.leaves.is_empty() {
            return;
        }
        match &kind.map {
            Map::Weight(make) => {
                let (x, _) = identities(gpu, kind.size[1], 1);
                let product = |leaves: &[Tensor]| {
                    let site = Reduced(make(leaves)).shared();
                    assert_eq!(site.size(), kind.size, "{what}");
                    Linear::from_site(site, None).forward(&x)
                };
                law(gpu, &what, &kind.leaves, &|leaves| make(leaves).expand().t(), &product);
            }
            Map::Rows(parts, product) => {
                let (x, which) = identities(gpu, kind.size[1], *parts);
                let product = |leaves: &[Tensor]| product(leaves, &x, &which);
                law(gpu, &what, &kind.leaves, &product, &product);
            }
        }
    });
}

/// Products with the weight, which read it by the kind's load and have adjoints of their own. A product is linear in its rows too,
/// whose gradient reads the weight in the other direction.
#[test]
fn law_of_sharing_holds_for_products() {
    each(|gpu, kind| {
        for (rows, precision) in PRODUCTS {
            let what = format!("{} {:?}, {rows} rows in {precision}", kind.name, kind.size);
            let shapes: Vec<Vec<usize>> =
                kind.leaves.iter().cloned().chain([vec![rows, kind.size[1]]]).collect();
            let which: Vec<u32> = (0..rows as u32).map(|i| i * i % 3).collect();
            let product = |leaves: &[Tensor]| {
                let (x, leaves) = leaves.split_last().expect("the rows are the last leaf");
                autocast(precision, || match &kind.map {
                    Map::Weight(make) => Linear::from_site(make(leaves), None).forward(x),
                    Map::Rows(_, product) => product(leaves, x, &which),
                })
            };
            law(gpu, &what, &shapes, &product, &product);
        }
    });
}

/// Every type that implements [`Site`] is one that the table reaches, by the name that it gives itself.
#[test]
fn law_of_sharing_reaches_every_site() {
    let reached: BTreeSet<&str> = kinds(gpu(), SIZES[0])
        .iter()
        .filter_map(|kind| match &kind.map {
            Map::Weight(make) => {
                let zeros = |shape: &Vec<usize>| Tensor::zeros(gpu(), &shape[..]);
                Some(make(&kind.leaves.iter().map(zeros).collect::<Vec<_>>()).name())
            }
            Map::Rows(..) => None,
        })
        .collect();
    assert_eq!(reached, SITES.iter().map(|site| site.1).collect());
}

/// The public check accepts every kind that the exact one accepts.
#[test]
fn law_of_sharing_in_one_call_accepts_every_kind() {
    each(|gpu, kind| {
        let Map::Weight(make) = &kind.map else { return };
        if kind.size == ONE_NUMBER {
            return;
        }
        let leaves: Vec<Tensor> =
            kind.leaves.iter().map(|shape| Tensor::zeros(gpu, &shape[..]).requires_grad()).collect();
        let site = make(&leaves);
        if site.leaves().iter().all(Tensor::is_leaf) {
            check_law(&site).unwrap_or_else(|wrong| panic!("{}: {wrong}", kind.name));
        }
    });
}

/// What a kind can get wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// The second leaf is read and not listed.
    Forgets,
    /// The adjoint leaves out the constant factor.
    Unscaled,
    /// The rule for products leaves it out, and the adjoint does not.
    UnscaledProducts,
    /// The load reads the next row's elements beyond the last column.
    Beyond,
    /// The weight is the leaf's square.
    Square,
    /// A leaf has no gradient.
    Silent,
    /// A leaf has none while the other is frozen.
    SilentAlone,
    /// A site of other leaves forgets the constant factor.
    LosesSetting,
    /// The second leaf has little effect, and a gradient of the wrong sign.
    Little,
    /// A square with little effect beside the rest of the weight.
    LittleSquare,
    Names,
}

/// `W[i, j] = 2 theta[i, j] + c[j]`.
#[derive(Clone)]
struct Shifted {
    theta: Tensor,
    shift: Tensor,
    fault: Fault,
}

impl Site for Shifted {
    fn name(&self) -> &'static str {
        "shifted"
    }
    fn size(&self) -> [usize; 2] {
        [self.theta.shape()[0], self.theta.shape()[1]]
    }
    fn leaves(&self) -> Vec<Tensor> {
        let all = vec![self.theta.clone(), self.shift.clone()];
        if self.fault == Fault::Forgets { all[..1].to_vec() } else { all }
    }
    fn leaf_names(&self) -> &'static [&'static str] {
        match self.fault {
            Fault::Forgets => &["theta"],
            Fault::Names => &["theta", "theta"],
            _ => &["theta", "shift"],
        }
    }
    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        let shift = leaves.get(1).unwrap_or(&self.shift).clone();
        let fault = if self.fault == Fault::LosesSetting { Fault::None } else { self.fault };
        Arc::new(Shifted { theta: leaves[0].clone(), shift, fault })
    }
    fn load(&self) -> Load {
        const TEXT: &str = "
const SQUARE: u32 = 0u;
const FACTOR: u32 = 1u;
const LITTLE: u32 = 0u;
const BEYOND: u32 = 0u;
@group(0) @binding(1) var<storage, read> theta: array<f32>;
@group(0) @binding(2) var<storage, read> shift: array<f32>;
fn shifted(row: u32, col: u32) -> f32 {
    if row >= site_numbers().x || (BEYOND == 0u && col >= site_numbers().y) { return 0.0; }
    let t = theta[row * site_numbers().y + col];
    var s = shift[col];
    if LITTLE > 0u { s = 1e-4 * s; }
    if LITTLE > 1u { s = 100.0 * s * s; }
    return f32(FACTOR) * select(2.0 * t, t * t, SQUARE > 0u) + s;
}
fn load_site(row: u32, col: u32) -> vec4<f32> {
    return vec4<f32>(shifted(row, col), shifted(row, col + 1u), shifted(row, col + 2u), shifted(row, col + 3u));
}
";
        let tensors = [("theta", &self.theta), ("shift", &self.shift)];
        let load = Load::wgsl("shifted", TEXT, &tensors, self.size(), [0, 0]);
        let is = |fault| (self.fault == fault) as u32;
        let little = is(Fault::Little) + 2 * is(Fault::LittleSquare);
        let load = load.constant("FACTOR", 1 + is(Fault::LosesSetting)).constant("LITTLE", little);
        load.constant("SQUARE", is(Fault::Square)).constant("BEYOND", is(Fault::Beyond))
    }
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        grads.add(0, if self.fault == Fault::Unscaled { dw.clone() } else { dw.scale(2.0) });
        let silent = self.fault == Fault::SilentAlone && !grads.needs(0);
        if !silent && !matches!(self.fault, Fault::Forgets | Fault::Silent) {
            let factor = if self.fault == Fault::Little { -1e-4 } else { 1.0 };
            grads.add(1, dw.sum(0).scale(factor));
        }
    }
    fn backward(&self, x: &Tensor, dy: &Tensor, grads: &mut LeafGrads) {
        let factor = if self.fault == Fault::UnscaledProducts { 0.5 } else { 1.0 };
        self.reduce(&dy.t().matmul(x).scale(factor), grads);
    }
}

#[test]
fn law_of_sharing_in_one_call_finds_each_fault() {
    for (fault, told) in [
        (Fault::None, ""),
        (Fault::Forgets, "its load reads `shift`"),
        (Fault::Unscaled, "the gradient of leaf `theta` at element 0"),
        (Fault::UnscaledProducts, "by backward()"),
        (Fault::Beyond, "load_site(0, 7), outside of the matrix"),
        (Fault::Square, "not affine in the leaf `theta`"),
        (Fault::Silent, "the leaf `shift` gets no gradient"),
        (Fault::SilentAlone, "the leaf `shift` gets no gradient by backward(), with `theta` frozen"),
        (Fault::Names, "the same"),
        (Fault::LosesSetting, "with_tensors loses a setting"),
        (Fault::Little, "the gradient of leaf `shift` at element 0"),
        (Fault::LittleSquare, "not affine in the leaf `shift`"),
    ] {
        let zeros = |shape: &[usize]| Tensor::zeros(gpu(), shape).requires_grad();
        let site = Shifted { theta: zeros(&[5, 7]), shift: zeros(&[7]), fault }.shared();
        match check_law(&site) {
            Ok(()) => assert_eq!(fault, Fault::None),
            Err(wrong) => {
                assert!(fault != Fault::None && wrong.to_string().contains(told), "{fault:?}: {wrong}");
            }
        }
    }
}

/// `W = theta^T`, stored as a view: a square one has rows of the leaf's size.
struct Turned(Tensor);

impl Site for Turned {
    fn name(&self) -> &'static str {
        "turned"
    }
    fn size(&self) -> [usize; 2] {
        [self.0.shape()[1], self.0.shape()[0]]
    }
    fn leaves(&self) -> Vec<Tensor> {
        vec![self.0.clone()]
    }
    fn leaf_names(&self) -> &'static [&'static str] {
        &["theta"]
    }
    fn with_tensors(&self, leaves: &[Tensor], _: &[Tensor]) -> Arc<dyn Site> {
        Turned(leaves[0].clone()).shared()
    }
    fn stored(&self) -> Option<Tensor> {
        Some(self.0.detach().t())
    }
    fn load(&self) -> Load {
        const TEXT: &str = "
@group(0) @binding(1) var<storage, read> theta: array<f32>;
fn turned(row: u32, col: u32) -> f32 {
    if row >= site_numbers().x || col >= site_numbers().y { return 0.0; }
    return theta[col * site_numbers().x + row];
}
fn load_site(row: u32, col: u32) -> vec4<f32> {
    return vec4<f32>(turned(row, col), turned(row, col + 1u), turned(row, col + 2u), turned(row, col + 3u));
}
";
        Load::wgsl("turned", TEXT, &[("theta", &self.0)], self.size(), [0, 0])
    }
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        grads.add(0, dw.t().contiguous());
    }
}

#[test]
fn a_weight_that_is_stored_turned_is_looked_up_turned() {
    for shape in [[5, 5], [4, 8]] {
        let mut rng = Rng::new(3);
        let theta = Tensor::randn(gpu(), shape, &mut rng).requires_grad();
        let site = Turned(theta.clone()).shared();
        check_law(&site).unwrap();
        let ids = Tensor::from_slice(gpu(), &[1u32, 3], [2]);
        let rows = lookup(&site, &ids);
        assert_eq!(download(&rows), download(&theta.t().index_select(0, &ids)), "{shape:?}");
        let grads = rows.sum_all().backward().unwrap();
        let want = Array::from_fn(shape, |i| (i % shape[1] == 1 || i % shape[1] == 3) as u8 as f64);
        assert_eq!(download(grads.get(&theta).unwrap()), want.data, "{shape:?}");
        // The whole weight is as a tensor what it is, and hands its gradient on.
        let whole = materialise(&site);
        assert_eq!(download(&whole), download(&theta.t()), "{shape:?}");
        let column = Tensor::randn(gpu(), [shape[1], 1], &mut rng);
        let grads = whole.mul(&column).sum_all().backward().unwrap();
        let want = Array::from_fn(shape, |i| download(&column)[i % shape[1]]);
        assert_eq!(download(grads.get(&theta).unwrap()), want.data, "{shape:?}");
    }
}
