// keys slot of attention: the keys of a batch entry are in a row of a cache, of which the first `lengths` places are filled. The
// last query of an entry sees all of them, and each query before it one key less than the next.
@group(0) @binding(11) var<storage, read> rows: array<u32>;
@group(0) @binding(12) var<storage, read> lengths: array<u32>;

fn entry_of(pair: u32) -> u32 {
    // A row that the cache does not have is read as row 0, of which `visible` shows nothing.
    return select(0u, rows[pair / p.kv_heads], rows[pair / p.kv_heads] < p.cache_rows);
}

fn visible(pair: u32, row: u32) -> u32 {
    let filled = i32(lengths[pair / p.kv_heads]) - i32(p.tokens_q) + i32(row % p.tokens_q) + 1i;
    let there = rows[pair / p.kv_heads] < p.cache_rows;
    return select(0u, u32(clamp(filled, 0i, i32(p.tokens_k))), there);
}

// No query of the pair sees a key from here on.
fn furthest(pair: u32) -> u32 {
    let there = rows[pair / p.kv_heads] < p.cache_rows;
    return select(0u, min(lengths[pair / p.kv_heads], p.tokens_k), there);
}
