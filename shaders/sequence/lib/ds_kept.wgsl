// kept slot of attention_tiled_backward: the gradients of the scores of one key and four queries of a head are kept for
// attention_queries. A line is a key's: the queries of each head of the pair, filled up to whole vectors.
@group(0) @binding(8) var<storage, read_write> ds: array<vec4<f32>>;

fn keep(pair: u32, key: u32, head: u32, query: u32, slopes: vec4<f32>) {
    let lines = (p.tokens_q + 3u) / 4u;
    let at = ((pair - p.first_pair) * p.tokens_k + key) * p.group * lines + head * lines + query / 4u;
    if query < p.tokens_q { ds[at] = slopes; }
}
