//! The reference of attention and its test cases.

use super::*;
use crate::ops::case::{Array, Case, Fill, Input};
use crate::ops::timed::{Want, When};
use crate::precision::{Precision, autocast};

/// Attention of `q, k, v` and possibly a mask that broadcasts to `[batch, heads, tokens_q, tokens_k]`, in two passes
/// over the keys.
fn attention64(x: &[Array], causal: bool, scale: f64) -> Array {
    let (q, k, v) = (&x[0], &x[1], &x[2]);
    let [heads, tokens_q, head_dim] = [q.shape[1], q.shape[2], q.shape[3]];
    let (kv_heads, tokens_k) = (k.shape[1], k.shape[2]);
    let mut y = Array::from_fn(q.shape, |_| 0.0);
    for row in 0..q.shape[0] * heads * tokens_q {
        let (b, h, i) = (row / tokens_q / heads, row / tokens_q % heads, row % tokens_q);
        let pair = b * kv_heads + h / (heads / kv_heads);
        let at = |j: usize| (pair * tokens_k + j) * head_dim;
        let scores: Vec<f64> = (0..tokens_k)
            .map(|j| {
                let dot: f64 = (0..head_dim).map(|d| q.data[row * head_dim + d] * k.data[at(j) + d]).sum();
                let bias = x.get(3).map_or(0.0, |m| {
                    let place = [b, h, i, j];
                    m.data[(0..4).fold(0, |at, a| at * m.shape[a] + place[a] % m.shape[a])]
                });
                let seen = !causal || j + tokens_q <= i + tokens_k;
                if seen { dot * scale + bias } else { f64::NEG_INFINITY }
            })
            .collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if most <= -1e30 && !scores.iter().any(|s| s.is_nan()) {
            continue;
        }
        let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
        for (j, s) in scores.iter().enumerate() {
            let p = (s - most).exp() / total;
            (0..head_dim).for_each(|d| y.data[row * head_dim + d] += p * v.data[at(j) + d]);
        }
    }
    y
}

/// One query `[head_dim]` and the keys that it sees.
fn one_query(query: Array, keys: Array, values: Array) -> Array {
    let scale = 1.0 / (query.shape[3] as f64).sqrt();
    attention64(&[query, keys, values], false, scale)
}

/// The errors that elements of rows may have. Those of f16 have weights and results in f16.
fn bound(dtype: DType) -> f64 {
    if dtype == DType::F16 { 5e-4 } else { 1e-5 }
}

/// Causal attention `[batch, heads, kv_heads, queries, keys, head_dim]`, in f32 or in a scope of f16. The queries are the last of
/// the keys.
fn sized(family: &'static str, name: String, of: [usize; 6], dtype: DType) -> Case {
    let [batch, heads, kv_heads, queries, keys, size] = of;
    let (q, kv) = ([batch, heads, queries, size], [batch, kv_heads, keys, size]);
    let inputs = [q, kv, kv].map(|shape| Input::normal(shape).dtype(dtype)).to_vec();
    let precision = if dtype == DType::F16 { Precision::F16 } else { Precision::F32 };
    let last = batch * heads * queries * size - 1;
    Case::new(
        name,
        inputs,
        move |x| autocast(precision, || x[0].attention(&x[1], &x[2], &Mask::Causal)),
        move |x| attention64(x, true, 1.0 / (size as f64).sqrt()),
    )
    .ulps(64.0, 64.0)
    .grad_floor(4.0 * (size as f64).sqrt())
    .timed(family, [(queries - 1) * size + 3 % size, last], move |x, at| {
        let row = at / size;
        let (head, query) = (row / queries, row % queries);
        let pair = head / heads * kv_heads + head % heads / (heads / kv_heads);
        let seen = |x: &Array| x.part([1, 1, keys - queries + query + 1, size], pair * keys * size);
        let y = one_query(x[0].part([1, 1, 1, size], row * size), seen(&x[1]), seen(&x[2]));
        Want { value: y.data[at % size], bound: bound(dtype) }
    })
}

/// The gradient of causal attention `[batch, heads, tokens, head_dim]` for the values: `dv_j = sum_i p_ij dy_i`.
fn sized_gradient(family: &'static str, of: [usize; 4], dtype: DType) -> Case {
    let [batch, heads, tokens, size] = of;
    let name = format!("{batch}x{heads}x{tokens}x{size} causal");
    // The kernels read q, k, v, y and dy, and write dq, dk and dv.
    let bytes = (8 * dtype.size() * of.iter().product::<usize>()) as f64;
    // Five products over the pairs that the mask leaves.
    let flops = 10.0 * (batch * heads * tokens * (tokens + 1) / 2 * size) as f64;
    let of = [batch, heads, heads, tokens, tokens, size];
    let elements = [tokens / 2 * size + 3 % size, (tokens - 1) * size];
    sized(family, name, of, dtype)
        .timed(family, elements, move |x, at| {
            let (head, key) = (at / size / tokens * tokens * size, at / size % tokens);
            // The probability of the key is the attention to values that are 1 at this key and 0 elsewhere.
            let probability = |i: usize| {
                let keys = x[1].part([1, 1, i + 1, size], head);
                let values = Array::from_fn(keys.shape, |place| (place / size == key) as u8 as f64);
                one_query(x[0].part([1, 1, 1, size], head + i * size), keys, values).data[0]
            };
            let term = |i: usize| probability(i) * x[3].data[head + i * size + at % size];
            Want { value: (key..tokens).map(term).sum(), bound: bound(dtype) }
        })
        .gradient_of(2, [bytes, flops])
}

/// The rows of the benchmark, and small ones for tests.
fn timed() -> Vec<Case> {
    let forward = |family, [batch, heads, tokens, size]: [usize; 4], dtype| {
        let name = format!("{batch}x{heads}x{tokens}x{size} causal");
        sized(family, name, [batch, heads, heads, tokens, tokens, size], dtype)
    };
    let one_query = |[batch, heads, kv_heads, keys, size]: [usize; 5]| {
        let name = format!("{batch}x{heads}/{kv_heads}x{keys}x{size}");
        sized("attention, one query", name, [batch, heads, kv_heads, 1, keys, size], DType::F32)
    };
    let (both, gpu) = ([4, 8, 512, 64], [8, 16, 1024, 64]);
    let (full, half) = (DType::F32, DType::F16);
    vec![
        forward("attention", both, full).when(When::Quick, When::Quick),
        sized_gradient("attention backward", both, full).when(When::Quick, When::Quick),
        forward("attention", gpu, full).when(When::Never, When::Quick),
        sized_gradient("attention backward", gpu, full).when(When::Never, When::Quick),
        forward("attention f16", gpu, half).when(When::Never, When::Quick),
        sized_gradient("attention backward f16", gpu, half).when(When::Never, When::Quick),
        one_query([4, 32, 8, 2048, 64]).when(When::Quick, When::Quick),
        forward("attention", [2, 3, 7, 8], full),
        sized_gradient("attention backward", [2, 3, 7, 4], full),
        // Too small for matrix units, which round weights to f16.
        forward("attention f16", [1, 2, 17, 12], half),
        sized_gradient("attention backward f16", [1, 1, 17, 12], half),
        one_query([2, 6, 2, 9, 8]),
    ]
}

/// Kernels of each kind, because an adapter by itself uses only some of them.
const SINGLE: Kernels = Kernels::of_splits([[1, 1], [1, 1], [1, 1]]);
const SEVERAL: Kernels = Kernels::of_splits([[4, 1], [2, 1], [2, 1]]);
const SHARED: Kernels = Kernels::of_splits([[1, 2], [1, 4], [1, 8]]);
const BOTH: Kernels = Kernels::of_splits([[4, 4], [2, 2], [2, 4]]);

/// Kernels with tiles, by the rows per thread of the three passes.
const fn tiled([forward, queries, keys]: [usize; 3]) -> Kernels {
    Kernels {
        forward: Kernel::Tiled { tall: forward },
        queries: Kernel::Tiled { tall: queries },
        keys: Kernel::Tiled { tall: keys },
    }
}

/// Kernels with tiles whose pass of the keys keeps what that of the queries needs.
const fn kept([forward, tall, keys]: [usize; 3]) -> Kernels {
    Kernels { queries: Kernel::Kept { tall }, ..tiled([forward, 1, keys]) }
}

/// The kernel for few rows, with tiles for the gradients.
const fn few(rows: usize) -> Kernels {
    Kernels { forward: Kernel::Few { rows }, ..tiled([1, 1, 1]) }
}

/// Attention `[batch, heads, kv_heads, tokens_q, tokens_k, head_dim]`, with a mask or causal or neither.
fn forced(
    name: &str,
    [b, h, g, tq, tk, d]: [usize; 6],
    mask: Option<Input>,
    causal: bool,
    forced: Forced,
) -> Case {
    let mut inputs =
        vec![Input::normal([b, h, tq, d]), Input::normal([b, g, tk, d]), Input::normal([b, g, tk, d])];
    inputs.extend(mask);
    let scale = 1.0 / (d as f32).sqrt();
    let case = Case::new(
        format!("{name} {:?}", [b, h, g, tq, tk, d]),
        inputs,
        move |x| {
            let mask = match x.get(3) {
                Some(mask) => Mask::Additive(mask.clone()),
                None if causal => Mask::Causal,
                None => Mask::None,
            };
            attend([&x[0], &x[1], &x[2]], &mask, scale, forced)
        },
        move |x| attention64(x, causal, scale as f64),
    );
    // ds = p (dp - delta). Both terms are dot products of length d that nearly cancel, so their rounding error is
    // absolute.
    case.ulps(64.0, 64.0).grad_floor(4.0 * (d as f64).sqrt())
}

pub(in crate::ops) fn cases() -> Vec<Case> {
    let mut all = timed();
    let mut add = |name: &str,
                   sizes: [usize; 6],
                   mask: Option<Input>,
                   causal: bool,
                   kernels: Option<Kernels>,
                   splits: Option<usize>| {
        all.push(forced(name, sizes, mask, causal, Forced { kernels, splits, ..Forced::default() }));
    };
    let (single, several, shared, both) = (Some(SINGLE), Some(SEVERAL), Some(SHARED), Some(BOTH));
    add("one token", [1, 1, 1, 1, 1, 4], None, true, None, None);
    add("all keys", [2, 2, 2, 7, 7, 8], None, false, None, None);
    add("all keys", [1, 2, 1, 5, 13, 3], None, false, None, None);
    add("causal", [2, 1, 1, 11, 11, 5], None, true, None, None);
    add("causal over the tile", [1, 1, 1, 67, 67, 4], None, true, single, None);
    add("all keys over the tile", [1, 1, 1, 67, 67, 4], None, false, several, None);
    add("causal grouped", [1, 6, 2, 7, 7, 8], None, true, single, None);
    add("causal grouped", [2, 4, 2, 13, 13, 4], None, true, several, None);
    add("causal, earlier keys", [1, 2, 1, 3, 17, 8], None, true, None, None);
    add("causal, one query", [2, 4, 1, 1, 19, 8], None, true, None, None);
    add("causal, rows that see nothing", [1, 2, 2, 9, 4, 8], None, true, None, None);
    add("causal, shared rows", [1, 1, 1, 67, 67, 4], None, true, shared, None);
    add("causal grouped, shared rows", [2, 6, 2, 11, 13, 8], None, true, shared, None);
    add("causal, rows that see nothing, shared", [1, 2, 2, 9, 4, 8], None, true, shared, None);
    add("causal grouped, several shared rows", [2, 6, 2, 23, 27, 16], None, true, both, None);
    add("all keys, several shared rows", [1, 1, 1, 67, 71, 4], None, false, both, None);
    add(
        "mask, several shared rows",
        [2, 4, 2, 5, 7, 4],
        Some(Input::normal([2, 4, 5, 7]).fixed()),
        false,
        both,
        None,
    );
    let (four, three) = (Some(4), Some(3));
    add("one query, keys in parts", [2, 4, 1, 1, 67, 8], None, true, single, four);
    add("queries, keys in parts", [1, 6, 2, 3, 37, 8], None, true, single, four);
    add("queries, keys in parts", [1, 4, 2, 11, 27, 8], None, true, several, four);
    add("queries that see nothing, keys in parts", [1, 2, 2, 13, 6, 4], None, true, single, Some(2));
    add("shared rows, keys in parts", [2, 6, 2, 5, 43, 16], None, true, both, four);
    let mask = Some(Input::normal([2, 1, 5, 39]).fixed());
    add("mask, keys in parts", [2, 4, 2, 5, 39, 8], mask, false, shared, four);
    add("one query, many keys", [1, 3, 1, 1, 260, 8], None, true, None, None);
    add(
        "mask, shared rows",
        [2, 4, 2, 5, 7, 4],
        Some(Input::normal([2, 4, 5, 7]).fixed()),
        false,
        shared,
        None,
    );
    add("causal head_dim", [1, 1, 1, 3, 5, 64], None, true, None, None);
    add("wide head_dim", [1, 1, 1, 3, 4, 96], None, false, None, None);
    add("widest head_dim", [1, 1, 1, 3, 7, 254], None, false, None, None);
    for shape in [[2, 4, 5, 7], [1, 4, 5, 7], [2, 1, 1, 7], [1, 1, 5, 1]] {
        add(
            &format!("mask {shape:?}"),
            [2, 4, 2, 5, 7, 4],
            Some(Input::normal(shape).fixed()),
            false,
            single,
            None,
        );
        add(
            &format!("mask {shape:?}"),
            [2, 4, 2, 5, 7, 8],
            Some(Input::normal(shape).fixed()),
            false,
            several,
            None,
        );
    }
    // Row 0 sees keys 1 and 2, row 1 nothing, row 2 key 0.
    let low = f64::NEG_INFINITY;
    let hidden = vec![low, 0.5, -1.0, low, low, low, 0.25, -1e32, low];
    let hidden = Input::normal([1, 1, 3, 3]).fill(Fill::Values(hidden)).fixed();
    add("mask of minus infinity", [2, 2, 1, 3, 3, 4], Some(hidden), false, None, None);
    let large = Some(tiled([8, 8, 4]));
    add("one token, tiles", [1, 1, 1, 1, 1, 4], None, true, large, None);
    add("tiles, causal", [1, 1, 1, 70, 70, 20], None, true, large, None);
    add("tiles, causal", [1, 1, 1, 35, 35, 64], None, true, Some(tiled([8, 4, 4])), None);
    add("tiles, causal grouped", [1, 4, 2, 37, 37, 12], None, true, large, None);
    add("tiles, all keys", [1, 2, 1, 21, 67, 12], None, false, Some(tiled([4, 2, 2])), None);
    add("tiles, earlier keys", [2, 1, 1, 35, 75, 8], None, true, Some(tiled([2, 1, 4])), None);
    add("tiles, rows that see nothing", [1, 2, 2, 39, 10, 24], None, true, Some(tiled([4, 4, 1])), None);
    add("tiles, keys in parts", [1, 2, 1, 19, 99, 20], None, true, Some(tiled([1, 2, 4])), three);
    add("tiles, a wide head", [1, 1, 1, 11, 35, 100], None, true, Some(tiled([4, 2, 2])), None);
    add("tiles, the widest head", [1, 1, 1, 3, 9, 250], None, true, Some(tiled([2, 1, 1])), None);
    let mask = Some(Input::normal([2, 4, 11, 35]).fixed());
    add("tiles, mask", [2, 4, 2, 11, 35, 12], mask, false, large, None);
    let mask = Some(Input::normal([1, 4, 1, 70]).fixed());
    add("tiles, mask in parts", [1, 4, 2, 9, 70, 20], mask, false, Some(tiled([2, 1, 1])), three);
    add("one token, kept slopes", [1, 1, 1, 1, 1, 4], None, true, Some(kept([8, 2, 4])), None);
    add("kept slopes, causal", [1, 1, 1, 70, 70, 20], None, true, Some(kept([8, 2, 4])), None);
    add("kept slopes, causal grouped", [1, 4, 2, 37, 37, 12], None, true, Some(kept([4, 1, 2])), None);
    add("kept slopes, all keys", [1, 2, 1, 21, 67, 12], None, false, Some(kept([4, 2, 2])), None);
    add("kept slopes, earlier keys", [2, 2, 1, 35, 73, 8], None, true, Some(kept([2, 2, 4])), None);
    add("kept slopes, rows that see nothing", [1, 2, 2, 39, 10, 24], None, true, Some(kept([4, 1, 1])), None);
    add("kept slopes, a wide head", [1, 1, 1, 11, 35, 100], None, true, Some(kept([4, 1, 2])), None);
    add("few rows, one query", [1, 8, 2, 1, 140, 20], None, true, Some(few(4)), three);
    add("few rows, queries", [2, 2, 1, 3, 70, 20], None, true, Some(few(8)), None);
    add("few rows, rows that see nothing", [1, 2, 2, 7, 4, 64], None, true, Some(few(8)), None);
    add("few rows, a wide head", [1, 1, 1, 2, 67, 132], None, true, Some(few(2)), Some(2));
    let mask = Some(Input::normal([1, 2, 2, 130]).fixed());
    add("few rows, mask", [1, 2, 2, 2, 130, 24], mask, false, Some(few(2)), Some(2));
    // Walks of the backward pass in several launches, whose sums are added.
    for (name, kernels, span) in
        [("tiles, walks in pieces", tiled([4, 2, 4]), 32), ("rows, walks in pieces", SEVERAL, 20)]
    {
        let pieces = Forced { kernels: Some(kernels), span: Some(span), ..Forced::default() };
        all.push(forced(name, [1, 4, 2, 37, 70, 12], None, true, pieces));
        let mask = Some(Input::normal([1, 4, 37, 70]).fixed());
        all.push(forced(&format!("{name}, mask"), [1, 4, 2, 37, 70, 12], mask, false, pieces));
    }
    let slopes = Forced { kernels: Some(kept([4, 2, 4])), ..Forced::default() };
    let pieces = Forced { span: Some(32), ..slopes };
    all.push(forced("kept slopes, walks in pieces", [1, 4, 2, 37, 70, 12], None, true, pieces));
    let parts = Forced { pairs: Some(3), ..slopes };
    all.push(forced("kept slopes, some pairs at a time", [2, 4, 2, 13, 19, 8], None, true, parts));
    let views = vec![Input::normal([2, 5, 4, 8]), Input::normal([2, 7, 2, 8]), Input::normal([2, 7, 2, 8])];
    all.push(
        Case::new(
            "permuted views, own scale",
            views,
            |x| {
                let [q, k, v] = [0, 1, 2].map(|i| x[i].transpose(1, 2));
                q.attention_scaled(&k, &v, &Mask::Causal, 0.7).transpose(1, 2)
            },
            |x| {
                let turn = |x: &Array| {
                    let [b, t, h, d] = [x.shape[0], x.shape[1], x.shape[2], x.shape[3]];
                    let from =
                        move |i: usize| ((i / d / t / h * t + i / d % t) * h + i / d / t % h) * d + i % d;
                    Array::from_fn([b, h, t, d], |i| x.data[from(i)])
                };
                turn(&attention64(&[turn(&x[0]), turn(&x[1]), turn(&x[2])], true, 0.7f32 as f64))
            },
        )
        .ulps(64.0, 64.0)
        .grad_floor(16.0),
    );
    let slices = vec![Input::normal([1, 21, 8 * 24])];
    all.push(
        Case::new(
            "slices of one product",
            slices,
            |x| {
                // Four query heads, then two heads each of keys and values.
                let heads = |first: usize, count: usize| {
                    let all = x[0].reshape([1, 21, 8, 24]);
                    all.slice(2, first..first + count).permute([0, 2, 1, 3])
                };
                let y = heads(0, 4).attention(&heads(4, 2), &heads(6, 2), &Mask::Causal);
                y.permute([0, 2, 1, 3]).reshape([1, 21, 96])
            },
            |x| {
                let heads = |first: usize, count: usize| {
                    Array::from_fn([1, count, 21, 24], |i| {
                        let (d, token, head, entry) =
                            (i % 24, i / 24 % 21, i / 24 / 21 % count, i / 24 / 21 / count);
                        x[0].data[((entry * 21 + token) * 8 + first + head) * 24 + d]
                    })
                };
                let y = attention64(&[heads(0, 4), heads(4, 2), heads(6, 2)], true, 1.0 / 24f64.sqrt());
                Array::from_fn([1, 21, 96], |i| {
                    let (d, head, token, entry) = (i % 24, i / 24 % 4, i / 96 % 21, i / 96 / 21);
                    y.data[((entry * 4 + head) * 21 + token) * 24 + d]
                })
            },
        )
        .ulps(64.0, 64.0)
        .grad_floor(4.0 * 24f64.sqrt()),
    );
    let views = vec![Input::normal([2, 2, 5, 11]), Input::normal([1, 1, 9, 8]), Input::normal([2, 9, 1, 8])];
    all.push(
        Case::new(
            "repeated keys, values by tokens, an offset that is no vector",
            views,
            |x| {
                let k = x[1].expand([2, 1, 9, 8]);
                x[0].slice(3, 3..11).attention(&k, &x[2].transpose(1, 2), &Mask::None)
            },
            |x| {
                let q = Array::from_fn([2, 2, 5, 8], |i| x[0].data[i / 8 * 11 + 3 + i % 8]);
                let k = Array::from_fn([2, 1, 9, 8], |i| x[1].data[i % 72]);
                let v = Array::from_fn([2, 1, 9, 8], |i| x[2].data[i]);
                attention64(&[q, k, v], false, 1.0 / 8f64.sqrt())
            },
        )
        .ulps(64.0, 64.0)
        .grad_floor(16.0),
    );
    let half = [[1, 2, 5, 8], [1, 1, 6, 8], [1, 1, 6, 8]].map(|s| Input::normal(s).dtype(DType::F16));
    all.push(
        Case::new(
            "f16",
            half.to_vec(),
            |x| x[0].attention(&x[1], &x[2], &Mask::None),
            |x| attention64(x, false, (1.0 / 8f32.sqrt()) as f64),
        )
        .ulps(64.0, 64.0),
    );
    all
}
