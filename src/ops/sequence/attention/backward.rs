//! The gradients of attention.

use super::kernels::{Kernel, Kernels};
use super::pass::Pass;
use super::sizes::{Places, Sizes, readable, room, steps, storage};
use crate::dtype::DType;
use crate::gpu::Gpu;
use crate::gpu::kernel::{Launch, Work, grid};
use crate::shape::Shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::Tensor;

/// Attention without queries or keys, with the shapes of its inputs.
pub(super) struct Nothing(pub [Shape; 3]);

impl Op for Nothing {
    fn name(&self) -> &'static str {
        "attention"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        self.0.iter().enumerate().for_each(|(i, shape)| sink.add(i, Tensor::zeros(dy.gpu(), *shape)));
    }
}

/// Attention as it was computed.
pub(super) struct Attention {
    pub sizes: Sizes,
    pub kernels: Kernels,
    /// Keys or queries that a launch walks, in place of the device's choice.
    pub span: Option<usize>,
    /// Pairs whose slopes are kept at a time, likewise.
    pub pairs: Option<usize>,
    pub q: Saved,
    pub k: Saved,
    pub v: Saved,
    pub y: Saved,
    pub lse: Tensor,
    pub mask: Option<Saved>,
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }
    fn takes_half(&self) -> bool {
        self.kernels.queries.dtype().is_half()
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let op = self.name();
        let [q, k, v, y] = [&self.q, &self.k, &self.v, &self.y].map(|saved| saved.get(op));
        let dtype = self.kernels.queries.dtype();
        let (dy, y) = (readable(&dy.cast(dtype)), &y.cast(dtype));
        let mask = self.mask.as_ref().map(|saved| saved.get(op));
        let places = Places {
            q: steps(q),
            k: steps(k),
            v: steps(v),
            y: steps(y),
            dy: steps(&dy),
            ..self.sizes.places
        };
        let sizes = Sizes { places, ..self.sizes };
        let stats = self.stats(&sizes, &dy, y);
        let inputs = Inputs { q, k, v, dy: &dy, stats: &stats, mask };
        if matches!(self.kernels.queries, Kernel::Kept { .. }) && sink.needs(0) {
            return self.keep(&sizes, &inputs, sink);
        }
        if sink.needs(0) {
            let dq = room(op, q, dtype);
            let sizes = Sizes { places: Places { dq: steps(&dq), ..places }, ..sizes };
            self.walk(&sizes, Pass::Queries, &inputs, &[("dq", &dq)]);
            sink.add(0, dq);
        }
        if sink.needs(1) || sink.needs(2) {
            // Both have k's order, although v may have another.
            let [dk, dv] = [(); 2].map(|()| room(op, k, dtype));
            let sizes = Sizes { places: Places { dk: steps(&dk), ..places }, ..sizes };
            self.walk(&sizes, Pass::Keys, &inputs, &[("dk", &dk), ("dv", &dv)]);
            sink.add(1, dk);
            sink.add(2, dv);
        }
    }
}

impl Attention {
    /// Computes each row's log-sum-exp and `delta`.
    fn stats(&self, sizes: &Sizes, dy: &Tensor, y: &Tensor) -> Tensor {
        let gpu: &Gpu = y.gpu();
        let rows = sizes.pairs * sizes.rows();
        let stats = Tensor::empty(gpu, self.name(), [rows, 2], DType::F32);
        let source = self.kernels.delta(sizes.head_dim);
        // The rows of all pairs together, 64 per workgroup.
        let launch = sizes.launch(&source, "delta", grid(rows.div_ceil(64)), 1).set("row_blocks", 0u32);
        let launch = launch.bind("y", storage(y)).bind("lse", &self.lse).bind("dy", storage(dy));
        gpu.launch(launch.bind_mut("row_stats", &stats).turns(sizes.head_dim / 4));
        stats
    }

    /// Computes all gradients: those of keys and values first, whose pass keeps the gradients of the scores for that of the
    /// queries. What is kept of some pairs is in memory at a time.
    fn keep(&self, sizes: &Sizes, inputs: &Inputs, sink: &mut Sink) {
        let (gpu, op, [q, k]) = (inputs.q.gpu(), self.name(), [inputs.q, inputs.k]);
        let [dq, dk, dv] = [q, k, k].map(|like| room(op, like, DType::F32));
        let places = Places { dq: steps(&dq), dk: steps(&dk), ..sizes.places };
        let sizes = Sizes { places, ..*sizes };
        let kernel = self.kernels.queries;
        let source = kernel.source(Pass::Queries, sizes.head_dim, false);
        for (sizes, elements) in sizes.by_kept(gpu.class(), self.pairs) {
            let ds = Tensor::empty(gpu, op, [elements], DType::F32);
            self.walk(&sizes, Pass::Keys, inputs, &[("dk", &dk), ("dv", &dv), ("ds", &ds)]);
            let rows = sizes.padded_rows();
            let launch = sizes.launch_over(&source, Pass::Queries, kernel, (rows, sizes.tokens_k));
            let launch = launch.bind("ds", &ds).bind("k", storage(k)).bind_mut("dq", storage(&dq));
            gpu.launch(launch.work(Work::flops(sizes.seen_flops(1.0))));
        }
        [dq, dk, dv].into_iter().enumerate().for_each(|(i, dx)| sink.add(i, dx));
    }

    /// Computes `results` by as many launches as their walks over keys or queries need.
    fn walk(&self, sizes: &Sizes, pass: Pass, inputs: &Inputs, results: &[(&'static str, &Tensor)]) {
        let gpu = inputs.q.gpu();
        let (kernel, items, size, heads) = match pass {
            Pass::Keys => (self.kernels.keys, sizes.tokens_k, sizes.tokens_q, sizes.group),
            _ => (self.kernels.queries, sizes.rows(), sizes.tokens_k, 1),
        };
        let mut source = kernel.source(pass, sizes.head_dim, inputs.mask.is_some());
        if results.iter().any(|(name, _)| *name == "ds") {
            source = source.slot("kept", "ds_kept");
        }
        let most = kernel.most(pass, sizes.head_dim) / heads;
        let most = sizes.longest(gpu.class(), pass, size).min(most);
        // Leaves two steps for the work around the walk.
        let span = self.span.unwrap_or_else(|| most.saturating_sub(2 * kernel.step()));
        for walk in pieces(size, span, kernel.step()) {
            let sizes = Sizes { walk, ..*sizes };
            let length = walk[1] - walk[0];
            let walked = length.next_multiple_of(kernel.step()) * heads;
            let flops = sizes.seen_flops(pass.products()) * length as f64 / size as f64;
            let launch = sizes.launch_over(&source, pass, kernel, (items, walked));
            // The loop of each head takes one more turn to end.
            let turns = kernel.turns(pass, sizes.head_dim, walked) + heads;
            let launch = inputs.bind(launch.turns(turns));
            let launch =
                results.iter().fold(launch, |launch, (name, to)| launch.bind_mut(*name, storage(to)));
            gpu.launch(launch.work(Work::flops(flops)));
        }
    }
}

/// The tensors that both gradients read.
struct Inputs<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    dy: &'a Tensor,
    stats: &'a Tensor,
    mask: Option<&'a Tensor>,
}

impl Inputs<'_> {
    fn bind<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        let heads = [("q", self.q), ("k", self.k), ("v", self.v), ("dy", self.dy)];
        let launch = heads.into_iter().fold(launch, |launch, (name, x)| launch.bind(name, storage(x)));
        launch.bind("stats", self.stats).bind_some("mask", self.mask)
    }
}

/// Cuts `size` into pieces and returns where each begins and ends. All but the last have the same length, a multiple of
/// `step` and at most `span`, if that is a step or more.
fn pieces(size: usize, span: usize, step: usize) -> impl Iterator<Item = [usize; 2]> {
    let span = (span / step * step).max(step);
    (0..size).step_by(span).map(move |first| [first, size.min(first + span)])
}
