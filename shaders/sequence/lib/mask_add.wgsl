// mask slot of attention: adds mask[batch, head, query, key] to the scores. Its strides are 0 along axes where it repeats.

@group(0) @binding(10) var<storage, read> mask: array<f32>;

// The start of the mask of one row of queries.
fn mask_row(pair: u32, row: u32) -> u32 {
    let head = (pair % p.kv_heads) * p.group + row / p.tokens_q;
    return (pair / p.kv_heads) * p.mask_batch + head * p.mask_head + (row % p.tokens_q) * p.mask_query;
}

// Masks the scores of one row for four keys from `key`. Beyond the last key, the last key's mask is read, and the score is hidden
// by the caller.
fn masked(s: vec4<f32>, at: u32, key: u32) -> vec4<f32> {
    let last = p.tokens_k - 1u;
    return s + vec4<f32>(
        mask[at + min(key, last) * p.mask_key],
        mask[at + min(key + 1u, last) * p.mask_key],
        mask[at + min(key + 2u, last) * p.mask_key],
        mask[at + min(key + 3u, last) * p.mask_key],
    );
}

// Masks the scores of four rows for one key.
fn masked_rows(s: vec4<f32>, at: vec4<u32>, key: u32) -> vec4<f32> {
    let column = key * p.mask_key;
    return s + vec4<f32>(mask[at.x + column], mask[at.y + column], mask[at.z + column], mask[at.w + column]);
}
