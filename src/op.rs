//! An op of your own, outside of the crate: a forward half and a backward half, of other ops or of your own WGSL.
//!
//! # Of other ops
//! What is composed of tensor ops needs nothing from here: its gradient follows. An [`Op`] is for a gradient that you know
//! better, as PyTorch's `autograd.Function` or candle's `CustomOp`. Compute the result under
//! [`no_grad`](crate::no_grad), and record the op with [`Tensor::made_by`](crate::Tensor::made_by), whose closure saves what the
//! backward half reads.
//!
//! ```
//! use tiebeam::op::{Op, Saved, Sink};
//! use tiebeam::ops::case::{Array, Case, Input};
//! use tiebeam::{Gpu, Tensor, no_grad};
//!
//! /// `y = x^3`.
//! fn cube(x: &Tensor) -> Tensor {
//!     let y = no_grad(|| x.square().mul(x));
//!     y.made_by(&[x], || Box::new(Cube { x: Saved::new(x) }))
//! }
//!
//! struct Cube {
//!     x: Saved,
//! }
//!
//! impl Op for Cube {
//!     fn name(&self) -> &'static str {
//!         "cube"
//!     }
//!     /// `dx = 3 x^2 dy`.
//!     fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
//!         if let Some(dy) = &dy[0] {
//!             sink.add(0, self.x.get("cube").square().scale(3.0).mul(dy));
//!         }
//!     }
//! }
//!
//! // The reference in f64. One call compares values, gradients and the bits of a second run.
//! let case = Case::new(
//!     "7 x 5",
//!     vec![Input::normal([7, 5])],
//!     |x| cube(&x[0]),
//!     |x| Array::from_fn(x[0].shape, |i| x[0].data[i].powi(3)),
//! );
//! case.check(&Gpu::open()?)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Of WGSL
//! A kernel is a [`Source`] of your text, and a [`Launch`] names what it reads, writes and sets:
//!
//! ```
//! use tiebeam::op::{Launch, Source, grid};
//! use tiebeam::{DType, Gpu, Tensor};
//!
//! const WGSL: &str = "
//! struct Params { groups_x: u32, count: u32, factor: f32 }
//! var<immediate> p: Params;
//! @group(0) @binding(0) var<storage, read> x: array<f32>;
//! @group(0) @binding(1) var<storage, read_write> y: array<f32>;
//!
//! @compute @workgroup_size(64)
//! fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
//!     let i = (group.y * p.groups_x + group.x) * 64u + lane;
//!     if i < p.count { y[i] = p.factor * x[i]; }
//! }
//! ";
//!
//! fn times(x: &Tensor, factor: f32) -> Tensor {
//!     let x = x.cast(DType::F32).detach().contiguous();
//!     let (source, n) = (Source::text("times", WGSL), x.count());
//!     let y = Tensor::empty(x.gpu(), "times", *x.shape(), DType::F32);
//!     let launch = Launch::new("times", &source, "main", grid(n.div_ceil(64))).bind("x", &x).output("y", &y);
//!     x.gpu().launch(launch.set("count", n).set("factor", factor).turns(0));
//!     y
//! }
//!
//! let gpu = Gpu::open()?;
//! let x = Tensor::from_slice(&gpu, &[1f32, 2.0, 3.0], [3]);
//! assert_eq!(times(&x, 2.0).to_vec::<f32>()?, [2.0, 4.0, 6.0]);
//! # Ok::<(), tiebeam::Error>(())
//! ```
//!
//! The text may import the fragments of the crate's `shaders/` (`#import hash`), repeat lines (`#unroll`) and have constants
//! that the host sets: see [`gpu::shader`](crate::gpu::shader).
//!
//! # Traps
//! * **Shapes are yours to check**, before the launch. Kernels of your text run with bounds checks, so a wrong index reads or
//!   writes another element of the same tensor, or nothing, and says nothing.
//! * **Pass counts as parameters.** Arrays are padded to 16 bytes, so `arrayLength` is no count of elements.
//! * **Write every element** of what [`Tensor::empty`](crate::Tensor::empty) made. It holds what was in that memory before.
//! * **A kernel that does not compile** is a fault of the device, which every later readback reports, with file and line. In a
//!   test, [`Gpu::take_fault`](crate::Gpu::take_fault) removes it.
//! * **State the turns of the loops** ([`Launch::turns`]). The limit of 60 000 is real: some drivers end longer loops silently.
//! * **Sums in a fixed order.** Atomic float additions give other bits in every run, which [`Case::check`] finds only by luck.
//! * **A backward half does not see leaves that changed.** [`Saved::get`] panics if an optimizer's step came between.
//! * **In a scope of 16 bits** activations arrive as f16 or bf16. [`Tensor::cast`](crate::Tensor::cast) to f32 first, as above.
//! * **Portability.** Compilers differ: avoid locals of struct or array type and names such as `from`; use parentheses around
//!   shifts; at most 8 storage buffers. [`Assembled::check`](crate::gpu::shader::Assembled::check) runs naga's validation without
//!   a device.

pub use crate::gpu::kernel::{Launch, Param, Part, Work, grid};
pub use crate::gpu::shader::Source;
pub use crate::ops::case::{Case, Input};
pub use crate::tape::{Destination, Op, Saved, Sink, record};
