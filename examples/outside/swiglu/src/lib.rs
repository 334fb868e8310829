//! `silu(gate) * up` in one kernel each way, as an op outside of Tiebeam.
//!
//! The forward half launches the entry `forward` of `swiglu.wgsl`, the backward half its entry `backward`, which makes both
//! gradients in one pass. Source: SwiGLU, Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202.

use tiebeam::op::{Launch, Op, Saved, Sink, Source, grid};
use tiebeam::{DType, Tensor};

/// Elements that a workgroup computes, as in the WGSL.
const THREADS: usize = 64;

fn source() -> Source {
    Source::text("swiglu", include_str!("swiglu.wgsl"))
}

/// `y = silu(gate) * up` in f32, for two tensors of floats and of one shape.
///
/// # Panics
/// When the shapes differ or a type is not a float.
#[track_caller]
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    assert!(gate.shape() == up.shape(), "swiglu: gate {}, up {}", gate.shape(), up.shape());
    let floats = gate.dtype().is_float() && up.dtype().is_float();
    assert!(floats, "swiglu: needs floats, got {} and {}", gate.dtype(), up.dtype());
    // Kernels read f32 in row-major order, outside of the graph.
    let dense = |x: &Tensor| x.detach().cast(DType::F32).contiguous();
    let (g, u) = (dense(gate), dense(up));
    let (gpu, source) = (gate.gpu(), source());
    let y = Tensor::empty(gpu, "swiglu", *gate.shape(), DType::F32);
    let launch = Launch::new("swiglu", &source, "forward", grid(y.count().div_ceil(THREADS)));
    let launch = launch.bind("gate", &g).bind("up", &u).output("y", &y);
    gpu.launch(launch.set("count", y.count()).turns(0));
    y.made_by(&[gate, up], || Box::new(SwiGlu { gate: Saved::new(&g), up: Saved::new(&u) }))
}

struct SwiGlu {
    gate: Saved,
    up: Saved,
}

impl Op for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let (gate, up, dy) = (self.gate.get("swiglu"), self.up.get("swiglu"), dy.contiguous());
        let (gpu, source, count) = (gate.gpu(), source(), gate.count());
        let [dgate, dup] = [(); 2].map(|()| Tensor::empty(gpu, "swiglu", *gate.shape(), DType::F32));
        let launch = Launch::new("swiglu", &source, "backward", grid(count.div_ceil(THREADS)));
        let launch = launch.bind("gate", gate).bind("up", up).bind("dy", &dy);
        let launch = launch.output("dgate", &dgate).output("dup", &dup);
        gpu.launch(launch.set("count", count).turns(0));
        sink.add(0, dgate);
        sink.add(1, dup);
    }
}
