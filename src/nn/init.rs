//! Initial distributions of weights, by the names that the field uses.

use crate::gpu::Gpu;
use crate::rng::Rng;
use crate::shape::Shape;
use crate::tensor::Tensor;

/// A distribution for a new parameter. Fan-in is the product of all axes but the first, fan-out the first axis times the
/// product of those after the second. For `[out, in]` and `[out, in, kh, kw]` this is as in PyTorch.
///
/// ```
/// # use tiebeam::{Gpu, Tensor};
/// # let gpu = Gpu::open()?;
/// use tiebeam::{Rng, nn::Init};
/// let mut rng = Rng::new(1);
/// let w = Init::KaimingUniform.leaf(&gpu, [4, 6], &mut rng); // 6 inputs: within sqrt(6 / 6)
/// assert!(w.is_leaf());
/// assert!(w.to_vec::<f32>()?.iter().all(|w| w.abs() <= 1.0));
/// assert_eq!(Init::Zeros.leaf(&gpu, [4], &mut rng).to_vec::<f32>()?, [0.0; 4]);
/// # Ok::<(), tiebeam::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Init {
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// Uniform in `[-bound, bound)`.
    Uniform(f32),
    /// Uniform with bound `sqrt(6 / (fan_in + fan_out))`. Source: Glorot & Bengio 2010.
    XavierUniform,
    /// Normal with standard deviation `sqrt(2 / (fan_in + fan_out))`.
    XavierNormal,
    /// Uniform with bound `sqrt(6 / fan_in)`. Source: He et al. 2015.
    KaimingUniform,
    /// Normal with standard deviation `sqrt(2 / fan_in)`.
    KaimingNormal,
}

impl Init {
    /// Makes a leaf of this shape, drawn from `rng` on the host: the same bits on every adapter.
    pub fn leaf(self, gpu: &Gpu, shape: impl Into<Shape>, rng: &mut Rng) -> Tensor {
        let shape = shape.into();
        let mut data = vec![0.0f32; shape.count()];
        let inner: usize = shape.iter().skip(2).product();
        let fan_out = (shape.first().copied().unwrap_or(1) * inner) as f32;
        let fan_in = (shape.iter().skip(1).product::<usize>()) as f32;
        match self {
            Init::Zeros => {}
            Init::Ones => data.fill(1.0),
            Init::Normal(std) => normal(&mut data, std, rng),
            Init::Uniform(bound) => uniform(&mut data, bound, rng),
            Init::XavierUniform => uniform(&mut data, (6.0 / (fan_in + fan_out)).sqrt(), rng),
            Init::XavierNormal => normal(&mut data, (2.0 / (fan_in + fan_out)).sqrt(), rng),
            Init::KaimingUniform => uniform(&mut data, (6.0 / fan_in).sqrt(), rng),
            Init::KaimingNormal => normal(&mut data, (2.0 / fan_in).sqrt(), rng),
        }
        Tensor::from_slice(gpu, &data, shape).requires_grad()
    }
}

fn normal(data: &mut [f32], std: f32, rng: &mut Rng) {
    rng.fill_normal(data);
    data.iter_mut().for_each(|x| *x *= std);
}

fn uniform(data: &mut [f32], bound: f32, rng: &mut Rng) {
    rng.fill_uniform(data);
    data.iter_mut().for_each(|x| *x = (2.0 * *x - 1.0) * bound);
}
