//! The law of sharing, checked for one site in one call.
//!
//! With its other leaves held, a weight `W = S(theta)` is affine in each stored leaf, and the gradient that the leaf gets is the
//! adjoint of that map: `<S(phi) - S(0), G> = <phi, S^T G>` for every `phi` and `G`.

use super::{LeafGrads, Load, Site};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::array::Array;
use crate::ops::check::{Mismatch, U, bits, within};
use crate::ops::product::lookup::lookup;
use crate::ops::product::matmul::Epilogue;
use crate::precision::{Precision, autocast};
use crate::rng::Rng;
use crate::tensor::Tensor;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Rows of a product: few, which read the weight by the kind's load, and many, for which it is materialised.
const ROWS: [usize; 2] = [6, 72];
/// The most elements of a leaf whose gradient is checked.
const MOST: usize = 256;
/// Calls a load for every element of a matrix and for some outside.
const AROUND: &str = "
struct Params { groups_x: u32, rows: u32, columns: u32, site: vec4<u32> }
var<immediate> p: Params;
fn site_numbers() -> vec4<u32> { return p.site; }
#import site = site_tied
#import private = private_none
#import packed = packed_none
#import hash
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    let columns4 = p.columns / 4u;
    if i < p.rows * columns4 { y[i] = load_site(i / columns4, (i % columns4) * 4u); }
}
";
/// Allowed error in roundoffs of the sum of the absolute values of all terms.
const ULPS: f64 = 64.0;

/// Checks a sharing kind by one of its sites, on the site's device:
///
/// * The names of leaves and buffers are distinct, and [`Site::with_tensors`] keeps the settings and replaces all that
///   [`Site::load`] reads directly. A leaf that is not listed would never be trained, saved or moved.
/// * The load returns what [`Site::expand`] makes and zero outside of the matrix, and products with few rows, which read the weight
///   by the load, and with many have that weight, in both directions. So have rows by [`nn::lookup`](crate::nn::lookup) and
///   [`Site::expand_as`] in 16 bits.
/// * The weight is affine in each leaf, and the leaf's gradient obeys the law, by [`Site::reduce`] and by [`Site::backward`], for
///   one use and for two, in a scope of f16, and while another leaf is frozen.
///
/// Leaves are drawn anew from a normal distribution, so the site's own elements do not matter. Use small sizes, once whole
/// multiples of 4 and once not, and a device with the kernels of another class as well: `Options::default().device(Some("discrete"
/// .into()))`. A kind that is not affine in its leaves is told so; compare it with a reference by
/// [`Case::check`](crate::ops::case::Case::check) instead.
///
/// ```
/// # use std::sync::Arc;
/// # use tiebeam::share::{LowRank, Site, check_law};
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// let [theta, a, b] = [[5, 7], [2, 7], [5, 2]].map(|shape| Tensor::zeros(&gpu, shape).requires_grad());
/// let site = LowRank::new(&theta, &a, &b, 0.5).shared();
/// check_law(&site)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// The first difference, with the leaf and its element; the device's fault.
pub fn check_law(site: &Arc<dyn Site>) -> Result<(), Mismatch> {
    let checked = checked(site);
    if checked.is_err() {
        // A kernel that did not compile must not fail whatever comes next on this device.
        site.leaves().first().map(|leaf| leaf.gpu().take_fault());
    }
    checked
}

fn checked(site: &Arc<dyn Site>) -> Result<(), Mismatch> {
    let law = Law::of(site)?;
    law.keeps_settings()?;
    law.lists_what_it_reads()?;
    let whole = Array::read(&law.site.expand())?;
    if let Some(at) = whole.data.iter().position(|w| !w.is_finite()) {
        return Err(
            law.wrong(format!("the weight's element {at} is {} for leaves drawn at random", whole.data[at]))
        );
    }
    law.load(&whole)?;
    law.half(&whole)?;
    law.lookup(&whole)?;
    for rows in ROWS {
        law.product(&whole, rows)?;
    }
    let maps = (0..law.leaves.len()).map(|i| law.map(i)).collect::<Result<Vec<_>, _>>()?;
    let reduced = Reduced(law.site.clone()).shared();
    for (how, site, rows) in [
        ("reduce()", &reduced, ROWS[0]),
        ("backward()", &law.site, ROWS[0]),
        ("backward()", &law.site, ROWS[1]),
    ] {
        law.gradients(how, site, rows, &maps, Precision::F32)?;
    }
    law.gradients("backward()", &law.site, ROWS[1], &maps, Precision::F16)?;
    // The other leaves' gradients while one is frozen.
    (0..maps.len())
        .try_for_each(|i| law.gradients("backward()", &law.frozen(i), ROWS[0], &maps, Precision::F32))
}

/// A site whose products have gradients by [`Site::reduce`] alone, which kinds with a rule of their own for products would never
/// call there.
pub struct Reduced(pub Arc<dyn Site>);

impl Site for Reduced {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn size(&self) -> [usize; 2] {
        self.0.size()
    }
    fn leaves(&self) -> Vec<Tensor> {
        self.0.leaves()
    }
    fn leaf_names(&self) -> &'static [&'static str] {
        self.0.leaf_names()
    }
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.0.buffers()
    }
    fn with_tensors(&self, leaves: &[Tensor], buffers: &[Tensor]) -> Arc<dyn Site> {
        Arc::new(Reduced(self.0.with_tensors(leaves, buffers)))
    }
    fn load(&self) -> Load {
        self.0.load()
    }
    fn stored(&self) -> Option<Tensor> {
        self.0.stored()
    }
    fn is_compact(&self) -> bool {
        self.0.is_compact()
    }
    fn expand_as(&self, dtype: DType) -> Tensor {
        self.0.expand_as(dtype)
    }
    fn reduce(&self, dw: &Tensor, grads: &mut LeafGrads) {
        self.0.reduce(dw, grads);
    }
}

/// A site with leaves that were drawn.
struct Law {
    name: &'static str,
    gpu: Gpu,
    given: Arc<dyn Site>,
    leaves: Vec<Array>,
    site: Arc<dyn Site>,
}

/// The weight as a function of one leaf with the others held: `S(0)`, and `S(e) - S(0)` for some elements e.
struct Map {
    zero: Array,
    /// How far an element was moved to measure its column.
    unit: f64,
    columns: Vec<(usize, Vec<f64>)>,
}

impl Law {
    fn of(given: &Arc<dyn Site>) -> Result<Law, Mismatch> {
        let (name, old, names) = (given.name(), given.leaves(), given.leaf_names());
        let buffers = given.buffers();
        if old.len() != names.len() {
            let (n, m) = (old.len(), names.len());
            return Err(Mismatch::new(format!("{name}: {n} leaves and {m} names of leaves")));
        }
        let all: Vec<&str> = names.iter().copied().chain(buffers.iter().map(|buffer| buffer.0)).collect();
        if all.iter().collect::<BTreeSet<_>>().len() != all.len() {
            return Err(Mismatch::new(format!("{name}: two of the names {all:?} are the same")));
        }
        let Some(gpu) = old.first().or(buffers.first().map(|buffer| &buffer.1)).map(|x| x.gpu().clone())
        else {
            return Err(Mismatch::new(format!("{name}: it has neither leaves nor buffers")));
        };
        gpu.take_fault();
        let mut rng = Rng::new(11);
        let leaves = old.iter().map(|leaf| normal(leaf.shape(), &mut rng)).collect();
        let mut law = Law { name, gpu, given: given.clone(), leaves, site: given.clone() };
        law.site = law.at(None);
        let (have, want) = (law.site.size(), given.size());
        if have != want || law.site.leaves().len() != old.len() {
            return Err(
                law.wrong(format!("with_tensors makes another kind of site, {have:?} and not {want:?}"))
            );
        }
        Ok(law)
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Mismatch {
        Mismatch::new(format!("{} {:?}: {what}", self.name, self.given.size()))
    }

    /// The site at the drawn leaves, with another array in place of one of them.
    fn at(&self, other: Option<(usize, &Array)>) -> Arc<dyn Site> {
        let leaf = |i: usize| match other {
            Some((other, array)) if other == i => array.upload(&self.gpu, DType::F32).requires_grad(),
            _ => self.leaves[i].upload(&self.gpu, DType::F32).requires_grad(),
        };
        let leaves: Vec<Tensor> = (0..self.leaves.len()).map(leaf).collect();
        let buffers: Vec<Tensor> = self.given.buffers().iter().map(|(_, x)| x.detach().copy()).collect();
        self.given.with_tensors(&leaves, &buffers)
    }

    /// The site at the drawn leaves, of which one is frozen.
    fn frozen(&self, i: usize) -> Arc<dyn Site> {
        let mut leaves = self.site.leaves();
        leaves[i] = leaves[i].detach();
        let buffers: Vec<Tensor> = self.site.buffers().into_iter().map(|(_, x)| x).collect();
        self.site.with_tensors(&leaves, &buffers)
    }

    /// Another site of the same leaves must be the same site, or a model that is frozen, cast or moved would change.
    fn keeps_settings(&self) -> Result<(), Mismatch> {
        let buffers: Vec<Tensor> = self.given.buffers().into_iter().map(|(_, x)| x).collect();
        let again = self.given.with_tensors(&self.given.leaves(), &buffers);
        if self.given.stored().is_none() {
            let [one, two] = [&self.given, &again].map(|site| site.load());
            let settings = |load: &Load| (load.params, load.turns, load.constants.clone(), load.fragment);
            if settings(&one) != settings(&two) {
                return Err(
                    self.wrong("with_tensors loses a setting: its load has other numbers or constants")
                );
            }
        }
        let [one, two] = [&self.given, &again].map(|site| Array::read(&site.expand()));
        match bits(&[one?]) == bits(&[two?]) {
            true => Ok(()),
            false => Err(self.wrong("with_tensors of the site's own leaves makes another weight")),
        }
    }

    fn lists_what_it_reads(&self) -> Result<(), Mismatch> {
        let read = |site: &Arc<dyn Site>| match site.stored() {
            Some(w) => vec![("the stored weight", w)],
            None => site.load().tensors,
        };
        let (old, new) = (read(&self.given), read(&self.site));
        match new.iter().find(|(_, x)| old.iter().any(|(_, y)| Arc::ptr_eq(&x.value, &y.value))) {
            None => Ok(()),
            Some((name, _)) => Err(self.wrong(format!(
                "its load reads `{name}`, which is still there after with_tensors: list it in leaves() or buffers()"
            ))),
        }
    }

    /// The weight in 16 bits is the weight, rounded.
    fn half(&self, whole: &Array) -> Result<(), Mismatch> {
        let half = Array::read(&self.site.expand_as(DType::F16))?;
        // A kind may compute its weight from operands of 16 bits.
        let largest = whole.data.iter().map(|w| w.abs()).fold(0.0, f64::max);
        let bound = 8.0 * DType::F16.roundoff() * largest;
        within(&format!("{}: expand_as(F16)", self.name), &half.data, &whole.data, |_| bound)
    }

    /// The load returns what [`Site::expand`] makes, and zero in the rows and columns after it, which products read too.
    fn load(&self, whole: &Array) -> Result<(), Mismatch> {
        if self.site.stored().is_some() {
            return Ok(());
        }
        let ([out, inner], load) = (self.site.size(), self.site.load());
        let [rows, columns] = [out + 3, inner.next_multiple_of(4) + 8];
        let y = Tensor::empty(&self.gpu, "check_law", [rows, columns], DType::F32);
        let source = load.set(Source::text("site_around", AROUND));
        let launch = Launch::new("check_law", &source, "main", grid((rows * columns / 4).div_ceil(64)));
        let launch = load.bind(launch).output("y", &y).set("rows", rows).set("columns", columns);
        self.gpu.launch(launch.set("site", load.params).turns(load.turns));
        let got = Array::read(&y)?.data;
        for (i, got) in got.into_iter().enumerate() {
            let (row, column) = (i / columns, i % columns);
            let inside = row < out && column < inner;
            let want = if inside { whole.data[row * inner + column] } else { 0.0 };
            // A NaN is not near.
            let near = (got - want).abs() <= 64.0 * U * want.abs() + 1e-4 * inside as u8 as f64;
            if !near {
                let place = if inside { "inside" } else { "outside" };
                return Err(self.wrong(format!(
                    "load_site({row}, {column}), {place} of the matrix, returns {got} and not {want}"
                )));
            }
        }
        Ok(())
    }

    /// Rows that are looked up are the weight's.
    fn lookup(&self, whole: &Array) -> Result<(), Mismatch> {
        let [out, inner] = self.site.size();
        let ids = [out - 1, 0, out / 2];
        let given = Tensor::from_slice(&self.gpu, &ids.map(|id| id as u32), [ids.len()]);
        let got = Array::read(&lookup(&self.site, &given))?.data;
        let want: Vec<f64> =
            ids.iter().flat_map(|id| whole.data[id * inner..][..inner].iter().copied()).collect();
        within(&format!("{}: its rows by lookup", self.name), &got, &want, |i| {
            64.0 * U * want[i].abs() + 1e-4
        })
    }

    /// `x W^T` and `dy W` have the weight that [`Site::expand`] makes.
    fn product(&self, w: &Array, rows: usize) -> Result<(), Mismatch> {
        let ([out, inner], mut rng) = (self.site.size(), Rng::new(12));
        let (x, dy) = (normal(&[rows, inner].into(), &mut rng), normal(&[rows, out].into(), &mut rng));
        let leaf = x.upload(&self.gpu, DType::F32).requires_grad();
        let y = leaf.linear(&self.site, Epilogue::default());
        let grads = y.backward_with(&dy.upload(&self.gpu, DType::F32))?;
        let dx = grads.get(&leaf).ok_or_else(|| self.wrong("the rows of a product got no gradient"))?;
        let what = |which: &str| format!("{} {:?}: {which} of {rows} rows", self.name, [out, inner]);
        let sums = |n: usize, k: usize, term: &dyn Fn(usize, usize, usize) -> f64| -> [Vec<f64>; 2] {
            let sum = |i: usize| (0..k).map(|q| term(i / n, i % n, q)).sum::<f64>();
            let norm = |i: usize| (0..k).map(|q| term(i / n, i % n, q).abs()).sum::<f64>();
            [(0..rows * n).map(sum).collect(), (0..rows * n).map(norm).collect()]
        };
        let [want, norm] = sums(out, inner, &|r, n, q| x.data[r * inner + q] * w.data[n * inner + q]);
        within(&what("the product"), &Array::read(&y)?.data, &want, |i| 8.0 * U * norm[i] + 1e-30)?;
        let [want, norm] = sums(inner, out, &|r, n, q| dy.data[r * out + q] * w.data[q * inner + n]);
        within(&what("the rows' gradient"), &Array::read(dx)?.data, &want, |i| 8.0 * U * norm[i] + 1e-30)
    }

    /// Evaluates the map of leaf `i`, and checks that it is affine.
    fn map(&self, i: usize) -> Result<Map, Mismatch> {
        let expand = |leaf: &Array| Array::read(&self.at(Some((i, leaf))).expand());
        let (leaf, count) = (&self.leaves[i], self.leaves[i].data.len());
        let zero = expand(&Array::from_fn(leaf.shape, |_| 0.0))?;
        let here = Array::read(&self.site.expand())?;
        let other = expand(&Array::from_fn(leaf.shape, |e| -2.0 * leaf.data[e]))?;
        let largest =
            |of: &dyn Fn(usize) -> f64| (0..zero.data.len()).map(|j| of(j).abs()).fold(0.0, f64::max);
        // The leaf's own part of the weight, and what is there without it.
        let (part, rest) = (largest(&|j| here.data[j] - zero.data[j]), largest(&|j| zero.data[j]));
        let name = self.given.leaf_names()[i];
        let affine = |got: &Array, want: &dyn Fn(usize) -> f64| {
            let want: Vec<f64> = (0..zero.data.len()).map(want).collect();
            within("", &got.data, &want, |_| ULPS * U * part + 8.0 * U * rest + 1e-30).map_err(|_| {
                self.wrong(format!(
                    "the weight is not affine in the leaf `{name}`, so there is no such law; compare it with a reference"
                ))
            })
        };
        affine(&other, &|j| zero.data[j] - 2.0 * (here.data[j] - zero.data[j]))?;
        // In a second direction, and in the sum of both.
        let second = normal(&leaf.shape, &mut Rng::new(14));
        let there = expand(&second)?;
        let both = expand(&Array::from_fn(leaf.shape, |e| leaf.data[e] + second.data[e]))?;
        affine(&both, &|j| here.data[j] + there.data[j] - zero.data[j])?;
        // Elements are moved so far that their effect is of the size of the rest of the weight.
        let unit = if part > 0.0 { (rest / part).log2().ceil().clamp(0.0, 24.0).exp2() } else { 1.0 };
        // Primes and a stride that is no power of two reach all rows and columns.
        let elements = (0..count.min(MOST)).map(|k| if count <= MOST { k } else { k * 7919 % count });
        let mut columns = Vec::new();
        for e in elements {
            let at = expand(&Array::from_fn(leaf.shape, |k| if k == e { unit } else { 0.0 }))?;
            columns.push((e, at.data.iter().zip(&zero.data).map(|(w, zero)| (w - zero) / unit).collect()));
        }
        Ok(Map { zero, unit, columns })
    }

    /// The gradient of every leaf from a product in this precision, and from two.
    fn gradients(
        &self,
        how: &str,
        site: &Arc<dyn Site>,
        rows: usize,
        maps: &[Map],
        precision: Precision,
    ) -> Result<(), Mismatch> {
        let ([out, inner], mut rng) = (site.size(), Rng::new(13));
        let (x, dy) = (normal(&[rows, inner].into(), &mut rng), normal(&[rows, out].into(), &mut rng));
        let [rows_of_x, seed] = [&x, &dy].map(|array| array.upload(&self.gpu, DType::F32));
        let use_it = || autocast(precision, || rows_of_x.linear(site, Epilogue::default())).cast(DType::F32);
        let roundoff = if precision == Precision::F32 { U } else { DType::F16.roundoff() / 8.0 };
        let (leaves, names) = (site.leaves(), self.given.leaf_names());
        let frozen = leaves.iter().position(|leaf| !leaf.is_leaf());
        if leaves.iter().all(|leaf| !leaf.is_leaf()) {
            return Ok(());
        }
        let how = match frozen {
            Some(i) => format!("{how}, with `{}` frozen", names[i]),
            None => how.to_string(),
        };
        let once = use_it().backward_with(&seed)?;
        let twice = use_it().add(&use_it()).backward_with(&seed)?;
        // dW = dy^T x, and the same of absolute values, by which rounding errors grow.
        let dw = |size: fn(f64) -> f64| -> Vec<f64> {
            let term =
                |i: usize, r: usize| size(dy.data[r * out + i / inner] * x.data[r * inner + i % inner]);
            (0..out * inner).map(|i| (0..rows).map(|r| term(i, r)).sum()).collect()
        };
        let (dw, scale) = (dw(|x| x), dw(f64::abs));
        let trained = leaves.iter().zip(maps).zip(names).filter(|((leaf, _), _)| leaf.is_leaf());
        for ((leaf, map), name) in trained {
            for (grads, uses) in [(&once, 1.0), (&twice, 2.0)] {
                let none = || self.wrong(format!("the leaf `{name}` gets no gradient by {how}"));
                let got = Array::read(grads.get(leaf).ok_or_else(none)?)?.data;
                for (e, column) in &map.columns {
                    let want: f64 = column.iter().zip(&dw).map(|(c, g)| c * g).sum::<f64>() * uses;
                    // What is measured has the rounding of the rest of the weight, in the size of the move.
                    let rest = |j: usize| 4.0 * U / map.unit * map.zero.data[j].abs();
                    let sum = |(j, c): (usize, &f64)| (ULPS * roundoff * c.abs() + rest(j)) * scale[j];
                    let bound = uses * column.iter().enumerate().map(sum).sum::<f64>() + 1e-30;
                    // A NaN is not near.
                    let near = (got[*e] - want).abs() <= bound;
                    if !near {
                        return Err(self.wrong(format!(
                            "the gradient of leaf `{name}` at element {e} is {} by {how}, for {uses} use(s) with {rows} \
                             rows in {precision}; the adjoint of its load is {want}",
                            got[*e]
                        )));
                    }
                }
            }
        }
        Ok(())
    }
}

fn normal(shape: &crate::shape::Shape, rng: &mut Rng) -> Array {
    let mut data = vec![0.0f32; shape.count()];
    rng.fill_normal(&mut data);
    Array { shape: *shape, data: data.into_iter().map(f64::from).collect() }
}
