//! The dispatches of attention, known without a device.

use super::kernels::Kernel;
use super::matrices::Matrices;
use super::pass::Pass;
use super::sizes::Sizes;
use crate::gpu::DeviceClass;
use crate::gpu::kernel::grid;
use crate::gpu::plan;
use crate::gpu::shader::Source;

/// Returns the passes of attention of `[batch, heads, tokens_q, head_dim]` to `kv_heads` heads of `tokens_k` keys
/// without a mask: those of the forward pass, and those of the gradients. With `coop`, in a scope of f16 on matrix units of
/// that size, where these take the sizes. Passes that would be divided because of a driver's watchdog are not divided
/// here.
pub fn plan(
    class: &DeviceClass,
    [batch, heads, kv_heads, tokens_q, tokens_k, head_dim]: [usize; 6],
    coop: Option<usize>,
) -> [Vec<plan::Pass>; 2] {
    let all = |head_dim| Sizes::new([batch, heads, kv_heads, tokens_q, tokens_k, head_dim], 1.0);
    let on_units = coop.and_then(|size| Matrices::kernels(class, size, &all(head_dim)));
    let kernels = on_units.unwrap_or_else(|| all(head_dim).kernels(class, false));
    let head_dim = head_dim.next_multiple_of(kernels.multiple());
    let sizes = all(head_dim);
    let cut = sizes.cut_for(class, kernels.forward);
    let (rows, keys, splits) = (sizes.pairs * sizes.rows(), sizes.pairs * tokens_k, cut.cut[0]);
    let of = |sizes: &Sizes, pass: Pass, kernel: Kernel, items, parts, elements: usize| plan::Pass {
        op: "attention".into(),
        source: kernel.source(pass, head_dim, false),
        entry: pass.entry().into(),
        grid: sizes.grid(kernel, items).1,
        parts,
        bytes: (kernel.dtype().size() * elements) as f64,
        flops: sizes.flops(pass.products()),
    };
    let elements = (rows + 2 * keys + splits * rows) * head_dim + splits * rows;
    let mut forward = vec![of(&cut, Pass::Forward, kernels.forward, sizes.rows(), splits, elements)];
    if splits > 1 {
        let (op, source, entry) = ("attention".into(), Source::file("attention_combine"), "main".into());
        let (grid, elements) =
            (grid((rows * head_dim / 4).div_ceil(64)), (splits + 1) * rows * (head_dim + 1));
        let bytes = 4.0 * elements as f64;
        forward.push(plan::Pass { op, source, entry, grid, parts: 1, bytes, flops: 0.0 });
    }
    let keys_elements = keys * head_dim;
    let inputs = 2 * (rows + keys) * head_dim + 2 * rows;
    let results = [rows * head_dim, 2 * keys * head_dim];
    if !matches!(kernels.queries, Kernel::Kept { .. }) {
        let queries = of(&sizes, Pass::Queries, kernels.queries, sizes.rows(), 1, inputs + results[0]);
        let keys = of(&sizes, Pass::Keys, kernels.keys, tokens_k, 1, inputs + results[1]);
        return [forward, vec![queries, keys]];
    }
    let backward = sizes.by_kept(class, None).flat_map(|(part, kept)| {
        let share = |elements: usize| elements / sizes.pairs * part.pairs + kept;
        let mut keys = of(&part, Pass::Keys, kernels.keys, tokens_k, 1, share(inputs + results[1]));
        keys.source = keys.source.slot("kept", "ds_kept");
        let elements = share(results[0] + keys_elements);
        let mut queries = of(&part, Pass::Queries, kernels.queries, part.padded_rows(), 1, elements);
        queries.flops = part.flops(1.0);
        [keys, queries]
    });
    [forward, backward.collect()]
}
