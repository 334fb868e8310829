//! Rows of a table by index, and the adjoint that adds rows back in a fixed order.

use super::case::{Array, Case, Input};
use super::words;
use crate::dtype::DType;
use crate::gpu::kernel::{Launch, grid};
use crate::gpu::shader::Source;
use crate::shape::Shape;
use crate::tape::{Op, Saved, Sink};
use crate::tensor::{Tensor, same_gpu};

struct Embedding {
    ids: Saved,
    rows: usize,
    width: usize,
}

/// Ids as flat u32; a negative one becomes larger than any table, so that it is outside.
fn flat(ids: &Tensor) -> Tensor {
    let ids = ids.detach().reshape([ids.count()]);
    if ids.dtype() == DType::U32 { ids.contiguous() } else { ids.cast(DType::U32).contiguous() }
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }
    fn backward(&self, dy: &[Option<Tensor>], sink: &mut Sink) {
        let Some(dy) = &dy[0] else { return };
        let ids = self.ids.get("embedding");
        let (gpu, n, dy) = (dy.gpu(), ids.count(), dy.contiguous());
        let order = ids.argsort(0, false).contiguous();
        sink.add_with(0, |into| {
            let (dtable, accumulate) = into.output(gpu, "embedding", Shape::new(&[self.rows, self.width]));
            let grid = grid(self.rows);
            let params = [grid[0], self.rows as u32, self.width as u32, n as u32, accumulate as u32];
            gpu.launch(Launch {
                op: "embedding",
                source: &Source::file("embedding"),
                entry: "backward",
                binds: vec![dy.bind(0), ids.bind(1), order.bind(2), dtable.bind_mut(3)],
                params: words(&params),
                grid,
            });
            dtable
        });
    }
}

impl Tensor {
    /// `y[.., c] = table[ids[..], c]`: this `[rows, width]` looked up by `ids` of any shape, u32 or i32.
    ///
    /// An id outside the table gives zeros and takes no gradient. The gradient of a row is the sum over the places that
    /// used it, in their order: the same bits every time.
    ///
    /// # Panics
    /// When this is not a matrix of floats or `ids` are not integers.
    #[track_caller]
    pub fn embedding(&self, ids: &Tensor) -> Tensor {
        same_gpu("embedding", &[self, ids]);
        assert!(self.shape().len() == 2, "embedding: the table must be a matrix, got {}", self.shape());
        assert!(!ids.dtype().is_float(), "embedding: ids must be u32 or i32, got {}", ids.dtype());
        let [rows, width] = [self.shape()[0], self.shape()[1]];
        let mut sizes = ids.shape().to_vec();
        sizes.push(width);
        let (table, flat) = (super::float("embedding", &self.detach()).contiguous(), flat(ids));
        let y = Tensor::empty(self.gpu(), "embedding", &sizes[..], DType::F32);
        let grid = grid(y.count().div_ceil(64));
        let params = [grid[0], rows as u32, width as u32, flat.count() as u32, 0];
        if rows > 0 && y.count() > 0 {
            self.gpu().launch(Launch {
                op: "embedding",
                source: &Source::file("embedding"),
                entry: "forward",
                binds: vec![table.bind(0), flat.bind(1), flat.bind(2), y.bind_mut(3)],
                params: words(&params),
                grid,
            });
        }
        y.made_by(&[self], || Box::new(Embedding { ids: Saved::new(&flat), rows, width }))
    }
}

pub(super) fn variants() -> Vec<Source> {
    vec![Source::file("embedding")]
}

pub(super) fn cases() -> Vec<Case> {
    let look = |x: &[Array]| {
        let width = x[0].shape[1];
        let mut sizes = x[1].shape.to_vec();
        sizes.push(width);
        Array::from_fn(&sizes[..], |i| {
            let id = x[1].data[i / width];
            let inside = id >= 0.0 && id < x[0].shape[0] as f64;
            if inside { x[0].data[id as usize * width + i % width] } else { 0.0 }
        })
    };
    let mut all = Vec::new();
    for (rows, width, ids) in [(1, 1, &[1][..]), (7, 13, &[3, 5]), (5, 67, &[131])] {
        let inputs = vec![Input::normal([rows, width]), Input::integers(ids, DType::U32, 0, rows as i64)];
        all.push(Case::new(format!("{rows} {width} {ids:?}"), inputs, |x| x[0].embedding(&x[1]), look));
    }
    let inputs = vec![Input::normal([5, 3]), Input::integers([40], DType::I32, -3, 9)];
    all.push(Case::new("ids outside the table", inputs, |x| x[0].embedding(&x[1]), look));
    all
}
