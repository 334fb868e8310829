//! Transfers to and from the device as bf16: half as many bytes cross, and the device converts them.

use crate::dtype::DType;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::readback::Reading;
use crate::gpu::shader::Source;
use crate::gpu::value::Place;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::shape::Shape;
use crate::tensor::Tensor;

fn source() -> Source {
    Source::file("bf16")
}

fn launch(entry: &str, n: usize, x: &Tensor, y: &Tensor) {
    if n == 0 {
        return;
    }
    let grid = grid(n.div_ceil(8).div_ceil(64));
    let (source, gpu) = (source(), x.gpu());
    gpu.launch(Launch::new("bf16", &source, entry, grid).bind("x", x).bind_mut("y", y).set("n", n).turns(0));
}

/// Converts words that hold pairs of bf16 elements to f32 elements.
fn unpack(words: &Tensor, shape: Shape) -> Tensor {
    let y = Tensor::empty(words.gpu(), "bf16", shape, DType::F32);
    launch("unpack", shape.count(), words, &y);
    y
}

/// Converts elements to words that hold pairs of bf16, each rounded to nearest even.
fn pack(x: &Tensor) -> Tensor {
    let x = crate::ops::float("bf16", x).detach().contiguous();
    let y = Tensor::empty(x.gpu(), "bf16", [x.count().div_ceil(2)], DType::U32);
    launch("pack", x.count(), &x, &y);
    y
}

impl Tensor {
    /// Makes an f32 tensor from the little-endian bytes of bf16 elements, row-major.
    ///
    /// # Panics
    /// If there are not two bytes for each element of `shape`.
    #[track_caller]
    pub fn from_bf16(gpu: &Gpu, bytes: &[u8], shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        let n = shape.count();
        assert!(bytes.len() == 2 * n, "from_bf16: {} bytes for shape {shape}", bytes.len());
        let buffer = gpu.upload("from_bf16", bytes, DType::F16.buffer_bytes(n));
        let place = Place { buffer, offset: 0 };
        unpack(&Tensor::from_place(gpu, Shape::new(&[n.div_ceil(2)]), DType::U32, place), shape)
    }

    /// Starts to read the elements as bytes of bf16, each rounded to nearest even, without waiting for them.
    ///
    /// # Errors
    /// The device's fault, if one stands.
    ///
    /// # Panics
    /// If the elements are integers.
    #[track_caller]
    pub fn read_bf16(&self) -> Result<Reading> {
        let words = pack(self);
        let place = words.place();
        self.gpu().start_read(&place.buffer, place.offset, 2 * self.count() as u64)
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
            let forward = |x: &[Tensor]| unpack(&pack(&x[0]), *x[0].shape());
            Case::new(format!("and back {shape:?}"), input, forward, reference).exact()
        })
        .collect()
}
