//! Lookup of rows of a weight that is computed as it is read.

use super::site::{LeafGrads, Site};
use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::ops::moves::check_ids::check_ids;
use crate::ops::moves::embedding_sum::sum_by_index;
use crate::tape::{Destination, Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};
use std::sync::Arc;

const OP: &str = "lookup";

/// `y[.., c] = W[ids[..], c]`: rows of a weight `[rows, width]` by u32 or i32 `ids` of any shape, in f32. Only the rows that are asked
/// for are computed. An id outside gives zeros, as in [`Tensor::embedding`], which a stored table uses.
///
/// # Panics
/// When the ids are floats, or on another device than the weight.
#[track_caller]
pub fn lookup(weight: &Arc<dyn Site>, ids: &Tensor) -> Tensor {
    assert!(!ids.dtype().is_float(), "{OP}: ids must be u32 or i32, got {}", ids.dtype());
    let leaves = weight.leaves();
    // A stored weight that is the kind's one leaf, in the same order.
    if let ([leaf], Some(stored)) = (&leaves[..], weight.stored())
        && leaf.shape() == stored.shape()
        && Arc::ptr_eq(&leaf.value, &stored.value)
        && (leaf.offset, leaf.strides) == (stored.offset, stored.strides)
    {
        return leaf.embedding(ids);
    }
    let ([rows, width], load) = (weight.size(), weight.load());
    let (name, own) = (weight.name(), load.size());
    assert!(
        own == [rows, width],
        "{name}: its load is of a weight {own:?}, and its size is [{rows}, {width}]"
    );
    let gpu = load.tensors[0].1.gpu().clone();
    same_gpu(OP, &[ids, &load.tensors[0].1]);
    check_ids(OP, ids, rows, None);
    // A negative id becomes larger than any axis, so that it is outside.
    let flat = ids.detach().cast(DType::U32).reshape([ids.count()]).contiguous();
    let y = Tensor::empty(&gpu, OP, [flat.count(), width], DType::F32);
    let source = load.set(Source::file("site_rows"));
    let launch = Launch::new(OP, &source, "main", grid((flat.count() * width.div_ceil(4)).div_ceil(64)));
    let launch = load.bind(launch.bind("ids", &flat)).bind_mut("y", &y);
    gpu.launch(launch.set("count", flat.count()).set("site", load.params).turns(load.turns).reuse(0));
    let mut shape = ids.shape().to_vec();
    shape.push(width);
    y.reshape(&shape[..]).made_by(&leaves.iter().collect::<Vec<_>>(), || {
        let saved = leaves.iter().map(Saved::new).collect();
        Box::new(Lookup { weight: weight.clone(), ids: Saved::new(&flat), leaves: saved })
    })
}

struct Lookup {
    weight: Arc<dyn Site>,
    ids: Saved,
    leaves: Vec<Saved>,
}

impl Op for Lookup {
    fn name(&self) -> &'static str {
        OP
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        // The site reads its leaves itself. This only checks that they have not changed.
        for leaf in &self.leaves {
            leaf.get(OP);
        }
        let ([rows, width], ids) = (self.weight.size(), self.ids.get(OP));
        let dy = dy.reshape([ids.count(), width]);
        let dw = sum_by_index(&dy, 0, [rows, width].into(), ids, Destination::New);
        self.weight.reduce(&dw, &mut LeafGrads::new(sink, 0));
    }
}
