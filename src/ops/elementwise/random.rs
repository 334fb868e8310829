//! Tensors of random numbers, filled on the device with the same bits as [`crate::rng`] gives on the host.

use crate::dtype::DType;
use crate::gpu::buffer::Buffer;
use crate::gpu::kernel::{Launch, Live, Part, grid};
use crate::gpu::shader::Source;
use crate::gpu::{Gpu, lock};
use crate::ops::case::{Array, Case, Input};
use crate::rng::{Draw, Rng, normal_table};
use crate::shape::Shape;
use crate::tensor::Tensor;
use std::sync::Arc;

/// Returns the table of normal draws on `gpu`, which is uploaded once.
pub(crate) fn normal_table_on(gpu: &Gpu) -> Arc<Buffer> {
    let mut kept = lock(&gpu.0.normal_table);
    if let Some(buffer) = &*kept {
        return buffer.clone();
    }
    let words = normal_table();
    let buffer = gpu.upload("randn", bytemuck::cast_slice(words), size_of_val(words) as u64);
    // A buffer without memory is not kept, so that the next call tries again.
    *kept = buffer.data().is_ok().then(|| buffer.clone());
    buffer
}

/// Launches `entry` of `random.wgsl` on a new tensor, with scale 1 and shift 0.
fn fill(gpu: &Gpu, op: &'static str, entry: &str, shape: Shape, draw: Draw) -> Tensor {
    let y = Tensor::empty(gpu, op, shape, DType::F32);
    let n = shape.count();
    // A thread makes four elements.
    let grid = grid(n.div_ceil(4).div_ceil(64));
    let source = Source::file("random");
    let mut launch = Launch::new(op, &source, entry, grid)
        .bind_mut("out", &y)
        .set("n", n)
        .set("key", draw.stream.key)
        .set("stream", draw.stream.id)
        .set("scale", 1.0f32)
        .set("shift", 0.0f32)
        .turns(0)
        .reuse(4)
        .live(Live::Stream { generator: draw.generator });
    if entry == "normal" {
        launch = launch.bind("normal_table", Part::whole(&normal_table_on(gpu)));
    }
    gpu.launch(launch);
    y
}

impl Tensor {
    /// Makes an f32 tensor of uniform draws in `[0, 1)` from the generator's next stream. They have the same bits on
    /// every device and as [`Rng::fill_uniform`] on the host.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Rng;
    /// let x = Tensor::rand(&gpu, [2, 3], &mut Rng::new(1)).to_vec::<f32>()?;
    /// assert!(x.iter().all(|x| (0.0..1.0).contains(x)));
    /// let again = Tensor::rand(&gpu, [2, 3], &mut Rng::new(1));
    /// assert_eq!(again.to_vec::<f32>()?, x); // the same seed, the same bits
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn rand(gpu: &Gpu, shape: impl Into<Shape>, rng: &mut Rng) -> Tensor {
        fill(gpu, "rand", "uniform", shape.into(), rng.draw())
    }

    /// Makes an f32 tensor of standard normal draws from the generator's next stream. They have the same bits on every
    /// device and as [`Rng::fill_normal`] on the host.
    ///
    /// ```
    /// # use tiebeam::{Gpu, Tensor};
    /// # let gpu = Gpu::open()?;
    /// use tiebeam::Rng;
    /// let x = Tensor::randn(&gpu, [1000], &mut Rng::new(1));
    /// assert!(x.mean_all().item()?.abs() < 0.2);
    /// assert!((x.square().mean_all().item()? - 1.0).abs() < 0.2);
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    pub fn randn(gpu: &Gpu, shape: impl Into<Shape>, rng: &mut Rng) -> Tensor {
        fill(gpu, "randn", "normal", shape.into(), rng.draw())
    }
}

pub(super) fn cases() -> Vec<Case> {
    type Draw = fn(&Gpu, Shape, &mut Rng) -> Tensor;
    type Host = fn(&mut Rng, &mut [f32]);
    let table: [(&str, Draw, Host); 2] =
        [("rand", Tensor::rand, Rng::fill_uniform), ("randn", Tensor::randn, Rng::fill_normal)];
    let mut all = Vec::new();
    for (name, draw, host) in table {
        for shape in [&[1][..], &[7, 13], &[257], &[4, 64, 9]] {
            // The input only supplies the device.
            let inputs = vec![Input::integers([1], DType::U32, 0, 1)];
            let shape = Shape::new(shape);
            all.push(
                Case::new(
                    format!("{name} {shape:?}"),
                    inputs,
                    move |x| draw(x[0].gpu(), shape, &mut Rng::new(17)),
                    move |_| {
                        let mut data = vec![0.0; shape.count()];
                        host(&mut Rng::new(17), &mut data);
                        Array::from_fn(shape, |i| data[i] as f64)
                    },
                )
                .exact(),
            );
        }
    }
    all
}
