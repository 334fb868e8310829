// dq[i] = scale sum over j of ds[j, i] k[j], from the ds that the pass of the keys has kept (attention_backward.wgsl has the
// formulas). So two of the seven products of the backward pass are not computed again, for 8 bytes a score.
//
// A workgroup has 32 TALL rows of queries of one pair, in vectors of four queries of one head, and walks tiles of 32 keys. Its 64
// threads lie 8 high and 8 wide. A thread has TALL of these vectors, from TALL `high` on, and every eighth vector of the head from
// `wide` on. It computes each sum alone and in a fixed order.
//
// Count for each thread and key: TALL + WIDTH / 8 vectors from workgroup memory for 2 TALL WIDTH multiply-adds: with 8 rows and
// heads of 64, 4 for 64. Bytes: ds once, K once for every 32 TALL rows, from cache. Registers: 2 TALL WIDTH sums.

const HEAD: u32 = 16u;     // vectors of a head
const CHUNK: u32 = 16u;
const CHUNKS: u32 = 1u;
const WIDTH: u32 = CHUNK * CHUNKS;   // HEAD, filled up with zeros to a multiple of 8
const TALL: u32 = 2u;      // vectors of four rows for each thread
const ROWS: u32 = 8u * TALL;         // vectors of four rows of a workgroup

@group(0) @binding(0) var<storage, read> ds: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> dq: array<vec4<f32>>;

#import attention
#import exp_log
#import nan

var<workgroup> slopes: array<vec4<f32>, 32u * ROWS>;
var<workgroup> tile: array<vec4<f32>, 32u * WIDTH>;

// The numbers of keys that the four queries of a vector see. Those past the end of a head see none.
fn limits(vector: u32, lines: u32) -> vec4<u32> {
    let query = 4u * (vector % lines);
    let seen = vec4<u32>(limit(query), limit(query + 1u), limit(query + 2u), limit(query + 3u));
    return select(vec4<u32>(0u), seen, vec4<u32>(query) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.tokens_q));
}

@compute @workgroup_size(64)
fn queries(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let own = at % p.pairs;
    let pair = p.first_pair + own;
    // Uniform over the workgroup.
    if at / p.pairs >= p.blocks { return; }
    // Under causality later rows see more keys. They come first, so that no long workgroup is left at the end.
    let block = (p.blocks - 1u - at / p.pairs) * ROWS;
    let high = lane / 8u;
    let wide = lane % 8u;
    let keys = keys_at(p.k_steps, pair, pair / p.kv_heads);
    // Vectors of a head's queries, and of all heads of the pair.
    let lines = (p.tokens_q + 3u) / 4u;
    let all = p.group * lines;
    let last = min(block + ROWS, all) - 1u;
    let furthest = select(p.tokens_q - 1u, min(4u * (last % lines) + 3u, p.tokens_q - 1u), block / lines == last / lines);
    let stop = limit(furthest);
#unroll r 4*TALL
#unroll x WIDTH/8
    var dq${r}_$x = vec4<f32>(0.0);
#end
#end
    // The vector of four rows that a thread has in every turn of a fill.
    let vector = min(block + lane % ROWS, all - 1u);
    let seen = limits(vector, lines);
    for (var j = 0u; j < stop; j += 32u) {
        workgroupBarrier();
#unroll f 4*TALL
        let row$f = j + lane / ROWS + ${f}u * (64u / ROWS);
        // What no query sees was not written.
        let ds$f = ds[(own * p.tokens_k + min(row$f, p.tokens_k - 1u)) * all + vector];
        slopes[${f}u * 64u + lane] = select(vec4<f32>(0.0), ds$f, vec4<u32>(row$f) < seen);
#end
#unroll f WIDTH/2
        let key$f = j + (${f}u * 64u + lane) / WIDTH;
        let x$f = (${f}u * 64u + lane) % WIDTH;
        let k$f = k[keys + min(key$f, stop - 1u) * p.k_steps.w + min(x$f, HEAD - 1u)];
        // Keys from the end on are zeros: their slopes are 0 as well, but 0 times infinity is NaN.
        tile[${f}u * 64u + lane] = select(vec4<f32>(0.0), k$f, x$f < HEAD && key$f < stop);
#end
        workgroupBarrier();
        for (var i = 0u; i < 32u; i++) {
#unroll r TALL
            let s$r = slopes[i * ROWS + TALL * high + ${r}u];
#end
#unroll x WIDTH/8
            let k_$x = tile[i * WIDTH + wide + ${8*x}u];
#unroll r TALL
#unroll c 4
            dq${4*r+c}_$x = fma(vec4<f32>(s$r.$xyzw{c}), k_$x, dq${4*r+c}_$x);
#end
#end
#end
        }
    }
#unroll r 4*TALL
    let vector$r = block + TALL * high + ${r/4}u;
    let query$r = 4u * (vector$r % lines) + ${r%4}u;
    if vector$r < all && query$r < p.tokens_q {
        let to = query_at(p.dq_steps, pair, vector$r / lines * p.tokens_q + query$r) + wide;
#unroll x WIDTH/8
        if wide + ${8*x}u < HEAD { dq[to + ${8*x}u] = dq${r}_$x * p.scale; }
#end
    }
#end
}
