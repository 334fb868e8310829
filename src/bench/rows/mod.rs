//! The case list: every kernel family at sizes that grow, with an f64 reference of a few elements each.

mod moves;
mod points;
mod products;
mod serve;
mod train;
mod wise;

use super::{Case, Check, Row};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::rng::Rng;
use crate::tape::no_grad;
use crate::tensor::Tensor;

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Suite {
    /// Some minutes on two cores.
    Quick,
    /// Every size.
    Full,
}

const U: f64 = 1.0 / (1u64 << 24) as f64;

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut data = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut data);
    data
}

/// Standard normal arrays of these shapes, and as many copies on the device as a cache cannot hold.
struct Inputs {
    host: Vec<Vec<f32>>,
    sets: Vec<Vec<Tensor>>,
}

impl Inputs {
    fn new(gpu: &Gpu, shapes: &[&[usize]]) -> Inputs {
        let count = |s: &[usize]| s.iter().product::<usize>();
        let host: Vec<Vec<f32>> = shapes.iter().zip(1..).map(|(s, seed)| normal(count(s), seed)).collect();
        let first: Vec<Tensor> =
            host.iter().zip(shapes).map(|(x, s)| Tensor::from_slice(gpu, x, *s)).collect();
        let bytes: usize = host.iter().map(|x| 4 * x.len()).sum();
        let beyond_caches = if gpu.adapter().is_software() { 64 << 20 } else { 256 << 20 };
        let copy = |x: &Tensor| {
            let y = x.affine(1.0, 0.0);
            y.evaluate();
            y
        };
        let more = (beyond_caches / bytes).min(7);
        let mut sets: Vec<Vec<Tensor>> = (0..more).map(|_| first.iter().map(copy).collect()).collect();
        sets.insert(0, first);
        Inputs { host, sets }
    }

    /// The same, stored as f16.
    fn round(&mut self) {
        for x in self.host.iter_mut().flatten() {
            *x = half::f16::from_f32(*x).to_f32();
        }
        for x in self.sets.iter_mut().flatten() {
            *x = x.cast(DType::F16);
            x.evaluate();
        }
    }

    fn row(self, work: [f64; 2], checks: Vec<Check>, run: impl Fn(&[Tensor]) -> Tensor + 'static) -> Row {
        let sets = self.sets;
        let count = sets.len();
        Row { sets: count, checks, ..Row::new(work, move |i| no_grad(|| run(&sets[i]))) }
    }
}

/// The gradient of a leaf; a fault of the device comes out where the result is read.
fn gradient(y: &Tensor, dy: &Tensor, leaf: &Tensor) -> Tensor {
    let grads = y.backward_with_retain_graph(dy).ok();
    grads.and_then(|g| g.get(leaf).cloned()).unwrap_or_else(|| Tensor::full(y.gpu(), [1], f32::NAN))
}

/// The rows for a driver on the host's cores, or for a GPU: they differ in sizes and in what is only measured when asked for.
pub fn rows(cpu: bool, suite: Suite) -> Vec<Case> {
    let full = suite == Suite::Full;
    let mut all = products::matmuls(cpu, full);
    all.extend(wise::cases(full));
    all.extend(moves::cases(cpu));
    all.extend(products::attentions(cpu));
    all.extend(wise::adds());
    all.extend(train::cases(cpu));
    all.extend(points::cases(cpu));
    all.push(serve::depths());
    all
}
