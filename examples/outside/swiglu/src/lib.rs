//! `silu(gate) * up` in one kernel each way, as an op outside of Tiebeam.
//!
//! The forward half launches the entry `forward` of `swiglu.wgsl`, the backward half its entry `backward`, which makes both
//! gradients in one pass. Source: SwiGLU, Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202.

use tiebeam::op::{Launch, Op, Saved, Sink, Source, grid};
use tiebeam::{DType, Tensor};

fn source() -> Source {
    Source::text("swiglu", include_str!("swiglu.wgsl"))
}

/// A dispatch for all elements of a tensor, with 64 vectors of four in a workgroup, as in the WGSL.
fn launch<'a>(source: &'a Source, entry: &'a str, x: &Tensor) -> Launch<'a> {
    let vectors = x.count().div_ceil(4);
    Launch::new("swiglu", source, entry, grid(vectors.div_ceil(64))).set("vectors", vectors).turns(0)
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
    gpu.launch(launch(&source, "forward", &g).bind("gate", &g).bind("up", &u).output("y", &y));
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
        let (gpu, source) = (gate.gpu(), source());
        let [dgate, dup] = [(); 2].map(|()| Tensor::empty(gpu, "swiglu", *gate.shape(), DType::F32));
        let launch = launch(&source, "backward", gate).bind("gate", gate).bind("up", up).bind("dy", &dy);
        gpu.launch(launch.output("dgate", &dgate).output("dup", &dup));
        sink.add(0, dgate);
        sink.add(1, dup);
    }
}
