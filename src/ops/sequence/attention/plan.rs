//! The dispatches of attention, known without a device.

use super::{Sizes, Split, Tile};
use crate::gpu::DeviceClass;
use crate::gpu::kernel::grid;
use crate::gpu::plan::Pass;
use crate::gpu::shader::Source;

/// Returns the passes of attention of `[batch, heads, tokens_q, head_dim]` to `kv_heads` heads of `tokens_k` keys
/// without a mask: those of the forward pass, of the gradient of the queries, and of the gradients of keys and values.
/// Passes that would be divided because of a driver's watchdog are not divided here.
#[doc(hidden)]
pub fn plan(
    class: &DeviceClass,
    [batch, heads, kv_heads, tokens_q, tokens_k, head_dim]: [usize; 6],
) -> [Vec<Pass>; 3] {
    let all = |head_dim| Sizes::new([batch, heads, kv_heads, tokens_q, tokens_k, head_dim], 1.0);
    let tile = Tile::of(class, head_dim, all(head_dim).rows(), tokens_k);
    let head_dim = head_dim.next_multiple_of(tile.step());
    let sizes = all(head_dim).cut_for(class, tile.forward);
    let (rows, keys, splits) = (sizes.pairs * sizes.rows(), sizes.pairs * tokens_k, sizes.cut[0]);
    let pass =
        |source, entry: &str, (items, split): (usize, Split), parts, products: f64, elements: usize| {
            let ((_, grid), entry, bytes) =
                (sizes.grid(items, split), entry.to_string(), 4.0 * elements as f64);
            Pass { op: "attention".into(), source, entry, grid, parts, bytes, flops: sizes.flops(products) }
        };
    let items = sizes.rows().next_multiple_of(tile.forward.each as usize) * splits;
    let elements = (rows + 2 * keys + splits * rows) * head_dim + splits * rows;
    let source = tile.forward.forward(head_dim, false);
    let mut forward = vec![pass(source, "forward", (items, tile.forward), splits, 2.0, elements)];
    if splits > 1 {
        let (op, source, entry) = ("attention".into(), Source::file("attention_combine"), "main".into());
        let (grid, elements) =
            (grid((rows * head_dim / 4).div_ceil(64)), (splits + 1) * rows * (head_dim + 1));
        forward.push(Pass { op, source, entry, grid, parts: 1, bytes: 4.0 * elements as f64, flops: 0.0 });
    }
    let inputs = 2 * (rows + keys) * head_dim + 2 * rows;
    let (queries, source) = (tile.queries, tile.queries.queries(head_dim, false));
    let queries = pass(source, "queries", (sizes.rows(), queries), 1, 3.0, inputs + rows * head_dim);
    let source = tile.keys.keys(head_dim, false);
    let keys = pass(source, "keys", (tokens_k, tile.keys), 1, 4.0, inputs + 2 * keys * head_dim);
    [forward, vec![queries], vec![keys]]
}
