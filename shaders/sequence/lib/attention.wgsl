// Parameters and functions of forward and backward attention.

struct Params {
    // How heads [batch, heads, tokens, head_dim] lie in storage, in vectors of four: where the first element is, and the steps
    // from one batch entry, head and token to the next.
    q_steps: vec4<u32>,
    k_steps: vec4<u32>,
    v_steps: vec4<u32>,
    y_steps: vec4<u32>,
    dy_steps: vec4<u32>,
    dq_steps: vec4<u32>,
    dk_steps: vec4<u32>,    // and those of dv
    groups_x: u32,
    pairs: u32,         // batch * kv_heads
    blocks: u32,        // workgroups per pair, and in kernels with tiles per part of the keys
    rows: u32,          // group * tokens_q
    tokens_q: u32,
    tokens_k: u32,
    group: u32,         // query heads per key head
    kv_heads: u32,
    shift: i32,         // query i sees keys j <= i + shift
    scale: f32,
    mask_batch: u32,
    mask_head: u32,
    mask_query: u32,
    mask_key: u32,
    row_blocks: u32,    // blocks of ROWS rows per pair: ceil(rows / ROWS)
    splits: u32,        // parts of the keys, whose results attention_combine.wgsl joins
    chunk: u32,         // keys per part, a multiple of those in a kernel's step: 4, 32 or 64
    cache_rows: u32,    // rows of the cache, in slot keys_listed
    first: u32,         // backward: a launch walks the keys, or the queries of a head, from here
    end: u32,           // up to here
    first_pair: u32,    // attention_tiled_backward's keys and attention_queries: a launch has `pairs` pairs from here
}
@group(0) @binding(13) var<uniform> p: Params;

// Used instead of minus infinity. It is below every score.
const HIDDEN: f32 = -3.0e38;
// Scores at or below this are hidden, so a mask may contain minus infinity or any very negative number.
const LOWEST: f32 = -1.0e30;

// Where a row of queries, or of what has their shape, begins.
fn query_at(steps: vec4<u32>, pair: u32, row: u32) -> u32 {
    let head = pair % p.kv_heads * p.group + row / p.tokens_q;
    return steps.x + pair / p.kv_heads * steps.y + head * steps.z + row % p.tokens_q * steps.w;
}

// Where the keys of a pair, or its values, begin. `entry` is their batch entry.
fn keys_at(steps: vec4<u32>, pair: u32, entry: u32) -> u32 {
    return steps.x + entry * steps.y + pair % p.kv_heads * steps.z;
}

// The number of keys that a row of queries sees. Without causality, `shift` is so large that it sees all.
fn limit(row: u32) -> u32 {
    return u32(clamp(i32(row % p.tokens_q) + p.shift + 1i, 0i, i32(p.tokens_k)));
}

// Among `count` rows from `first` on, the one that sees the most keys. If they belong to two heads, they include the last query of
// the first.
fn last_row(first: u32, count: u32) -> u32 {
    let last = min(first + count, p.rows) - 1u;
    return select(p.tokens_q - 1u, last, first / p.tokens_q == last / p.tokens_q);
}

// Whether a score counts. A mask hides it by a value of LOWEST or less. NaN counts, so that it appears in the result.
fn shown(s: vec4<f32>) -> vec4<bool> { return (s > vec4<f32>(LOWEST)) | nan4(s); }

fn dot_add(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, fma(a.w, b.w, sum))));
}

// sum + w.x a + w.y b + w.z c + w.w d
fn sum4(sum: vec4<f32>, w: vec4<f32>, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> vec4<f32> {
    return fma(a, vec4<f32>(w.x), fma(b, vec4<f32>(w.y), fma(c, vec4<f32>(w.z), fma(d, vec4<f32>(w.w), sum))));
}

// What the results of a row are multiplied by at the end, 1 / total. Only a row that sees no key has a total of 0, and gives zeros.
// The test is on the bits, because NaN must stay.
fn is_blind(total: f32) -> bool { return bitcast<u32>(total) == 0u; }
fn inverse_of(total: f32) -> f32 { return select(1.0 / total, 0.0, is_blind(total)); }

// The log-sum-exp of a row, for the backward pass or the pass that joins parts. A row that sees no key has no gradient, and a part
// that sees none has no weight.
fn lse_of(most: f32, total: f32) -> f32 {
    return select(most + log_of1(total), select(0.0, HIDDEN, p.splits > 1u), is_blind(total));
}

// The value that a launch of the backward pass stores: its sum, added to that of the launches before it.
fn added(sum: vec4<f32>, before: vec4<f32>) -> vec4<f32> {
    return select(sum, before + sum, p.first > 0u);
}

// The first query that sees a key.
fn first_query(key: u32) -> u32 {
    return u32(clamp(i32(key) - p.shift, 0i, i32(p.tokens_q)));
}
