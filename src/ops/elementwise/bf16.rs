//! bf16 to and from the host: half as many bytes cross as for f32, and the device converts them.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::readback::Reading;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::Shape;
use crate::tensor::Tensor;

impl Tensor {
    /// Makes an f32 tensor from the little-endian bytes of bf16 elements, row-major. To keep them as bf16, use
    /// [`Tensor::from_bytes`].
    ///
    /// # Panics
    /// If there are not two bytes for each element of `shape`.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// // bf16 is the upper half of f32: 0x3f80 is 1, 0xc000 is -2.
    /// let x = Tensor::from_bf16(&gpu, &[0x80, 0x3f, 0x00, 0xc0], [2]);
    /// assert_eq!(x.to_vec::<f32>()?, [1.0, -2.0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn from_bf16(gpu: &Gpu, bytes: &[u8], shape: impl Into<Shape>) -> Tensor {
        let y = Tensor::from_bytes(gpu, DType::Bf16, bytes, shape).cast(DType::F32);
        y.evaluate();
        y
    }

    /// Starts to read the elements as bytes of bf16, each rounded to nearest even, without waiting for them.
    ///
    /// # Errors
    /// The device's fault, if one stands.
    ///
    /// # Panics
    /// If the elements are integers.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// let x = Tensor::from_slice(&gpu, &[1f32, -2.0], [2]);
    /// assert_eq!(x.read_bf16()?.wait()?, [0x80, 0x3f, 0x00, 0xc0]);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    #[track_caller]
    pub fn read_bf16(&self) -> Result<Reading> {
        crate::ops::float("bf16", self).cast(DType::Bf16).read::<half::bf16>()
    }
}

pub(super) fn cases() -> Vec<Case> {
    let bits = |x: u32| f64::from(f32::from_bits(x));
    // Ties to either side, the largest, the smallest, a carry into the exponent, and values that round to infinity.
    let edges = [
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_8001,
        0x3f80_7fff,
        0x7f7f_0000,
        1,
        0x8000_ffff,
        0x3fff_8000,
        0x7f7f_ffff,
    ];
    let edges = Fill::Values(edges.map(bits).into_iter().chain([-0.0, f64::INFINITY, f64::NAN]).collect());
    let reference =
        |x: &[Array]| Array::from_fn(x[0].shape, |i| half::bf16::from_f32(x[0].data[i] as f32).to_f64());
    [(&[1][..], Fill::Normal(1.0)), (&[7, 13], Fill::Normal(1.0)), (&[36], edges.clone()), (&[131], edges)]
        .into_iter()
        .map(|(shape, fill)| {
            let input = vec![Input::normal(shape).fill(fill).fixed()];
            let forward = |x: &[Tensor]| x[0].cast(DType::Bf16).cast(DType::F32);
            Case::new(format!("and back {shape:?}"), input, forward, reference).exact()
        })
        .collect()
}
