// The formulas of attention.wgsl, for GPUs: blocks of queries against tiles of 32 keys in workgroup memory.
//
// A workgroup has 8 TALL rows of queries of one (batch, key head) pair. Its 64 threads lie 8 high and 8 wide. For the scores a
// thread has TALL rows, every eighth from `high` on, and the four keys from 4 `wide` on. For the sums it has the same rows and
// every eighth vector of the head from `wide` on. Scores and sums are in registers. Probabilities go through workgroup memory,
// since each thread of a row needs those of all keys.
// A head consists of CHUNKS chunks of CHUNK vectors. Of queries all chunks are in workgroup memory. Those of keys, then those of
// values, take turns in `tile`.
//
// Count for each thread: TALL + 4 vectors from workgroup memory for 16 TALL multiply-adds of the scores, and TALL + CHUNK / 2 for
// 2 TALL CHUNK of the sums. With 8 rows and heads of 64 that is 12 for 128 and 16 for 256. Bytes: Q and y once; K and V once for
// every 8 TALL rows of queries, from cache. Registers: 4 TALL scores and TALL WIDTH / 2 sums.

const HEAD: u32 = 16u;     // vectors of a head
const CHUNK: u32 = 16u;    // 8 or 16
const CHUNKS: u32 = 1u;
const TALL: u32 = 8u;      // 1 to 8
const PIECES: u32 = (TALL + 3u) / 4u;

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<In>;
@group(0) @binding(2) var<storage, read> v: array<In>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

#import in = in_vector
#import packed = packed_none
#import mask = mask_none
#import keys = keys_plain
#import attention
#import attention_tile
#import exp_log
#import nan

var<workgroup> queries: array<vec4<f32>, ROWS * WIDTH>;
// What the threads of a row exchange: their largest scores, then the probabilities of a tile, at last their totals.
var<workgroup> weights: array<vec4<f32>, ROWS * 8u>;

// Each fills the tile with a chunk of 32 rows from `first` on.
fn fill_k(lane: u32, base: u32, first: u32, end: u32, chunk: u32) {
#unroll f CHUNK/2
    let at$f = base + source_of(lane, ${f}u, first, end) * p.k_steps.w + vector_of(lane, chunk);
    put(lane, ${f}u, first, end, chunk, in_of(k[at$f]));
#end
}

fn fill_v(lane: u32, base: u32, first: u32, end: u32, chunk: u32) {
#unroll f CHUNK/2
    let at$f = base + source_of(lane, ${f}u, first, end) * p.v_steps.w + vector_of(lane, chunk);
    put(lane, ${f}u, first, end, chunk, in_of(v[at$f]));
#end
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let pair = at % p.pairs;
    let item = at / p.pairs;
    let split = item / p.blocks;
    // Uniform over the workgroup.
    if split >= p.splits { return; }
    // Under causality later rows see more keys. They come first, so that no long workgroup is left at the end.
    let block = (p.blocks - 1u - item % p.blocks) * ROWS;
    let high = lane / 8u;
    let wide = lane % 8u;
    let keys = keys_at(p.k_steps, pair, entry_of(pair));
    let values = keys_at(p.v_steps, pair, entry_of(pair));
    for (var i = lane; i < ROWS * WIDTH; i += 64u) {
        let row = i / WIDTH;
        let x = i % WIDTH;
        let from_row = query_at(p.q_steps, pair, min(block + row, p.rows - 1u));
        queries[swizzled(row, x, WIDTH, row)] = inside(q[from_row + min(x, HEAD - 1u)], x) * p.scale;
    }
#unroll r TALL
    // Rows beyond the end repeat the last row.
    let row$r = min(block + ${8*r}u + high, p.rows - 1u);
    let limit$r = visible(pair, row$r);
    let mask$r = mask_row(pair, row$r);
    var most$r = HIDDEN;
    var total$r = 0.0;
#unroll x WIDTH/8
    var y${r}_$x = vec4<f32>(0.0);
#end
#end
    let start = split * p.chunk;
    let stop = min(min(visible(pair, last_row(block, ROWS)), furthest(pair)), start + p.chunk);
    for (var j = start; j < stop; j += 32u) {
#unroll r TALL
#unroll c 4
        var s${r}_$c = 0.0;
#end
#end
#unroll h CHUNKS
        workgroupBarrier();
        fill_k(lane, keys, j, stop, ${h}u);
        workgroupBarrier();
        for (var d = 0u; d < CHUNK; d++) {
            let q_at = swizzled(high, ${h}u * CHUNK + d, WIDTH, high);
            let k_at = swizzled(4u * wide, d, CHUNK, wide);
#unroll c 4
            let k$c = tile[k_at + ${c}u * CHUNK];
#end
#unroll r TALL
            let q$r = queries[q_at + ${8*r}u * WIDTH];
#unroll c 4
            s${r}_$c = dot_add(q$r, k$c, s${r}_$c);
#end
#end
        }
#end
#unroll g PIECES
        var tops$g = vec4<f32>(HIDDEN);
#end
        let key = j + 4u * wide;
#unroll r TALL
        let own$r = masked(vec4<f32>(s${r}_0, s${r}_1, s${r}_2, s${r}_3), mask$r, key);
        let seen$r = (vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(min(limit$r, stop))) & shown(own$r);
        let score$r = select(vec4<f32>(HIDDEN), own$r, seen$r);
        tops${r/4}.$xyzw{r} = max(max(score$r.x, score$r.y), max(score$r.z, score$r.w));
#end
#unroll g PIECES
        weights[lane * PIECES + ${g}u] = tops$g;
#end
        workgroupBarrier();
        // All threads have read the keys, so values may follow them.
        fill_v(lane, values, j, stop, 0u);
#unroll w 8
#unroll g PIECES
        tops$g = max(tops$g, weights[swizzled(high, ${w}u, 8u, high) * PIECES + ${g}u]);
#end
#end
        workgroupBarrier();
#unroll r TALL
        let top$r = max(most$r, tops${r/4}.$xyzw{r});
        let fade$r = exp_of1(most$r - top$r);
        most$r = top$r;
        let p$r = select(vec4<f32>(0.0), exp_of(score$r - top$r), seen$r);
        total$r = fma(total$r, fade$r, (p$r.x + p$r.y) + (p$r.z + p$r.w));
        weights[swizzled(${8*r}u + high, wide, 8u, high)] = p$r;
#unroll x WIDTH/8
        y${r}_$x *= fade$r;
#end
#end
        workgroupBarrier();
#unroll h CHUNKS
#unroll again (h+7)/8
        // Further chunks of the values.
        workgroupBarrier();
        fill_v(lane, values, j, stop, ${h}u);
        workgroupBarrier();
#end
        for (var four = 0u; four < 8u; four++) {
#unroll r TALL
            let w$r = weights[swizzled(${8*r}u + high, four, 8u, high)];
#end
#unroll c 4
#unroll n CHUNK/8
            let v${c}_$n = tile[swizzled(4u * four + ${c}u, wide + ${8*n}u, CHUNK, four)];
#unroll r TALL
            y${r}_${h*CHUNK/8+n} = fma(vec4<f32>(w$r.$xyzw{c}), v${c}_$n, y${r}_${h*CHUNK/8+n});
#end
#end
#end
        }
#end
    }
    workgroupBarrier();
#unroll g PIECES
    var totals$g = vec4<f32>(0.0);
#end
#unroll r TALL
    totals${r/4}.$xyzw{r} = total$r;
#end
#unroll g PIECES
    weights[lane * PIECES + ${g}u] = totals$g;
    var sums$g = vec4<f32>(0.0);
#end
    workgroupBarrier();
#unroll w 8
#unroll g PIECES
    sums$g += weights[(8u * high + ${w}u) * PIECES + ${g}u];
#end
#end
#unroll r TALL
    if block + ${8*r}u + high < p.rows {
        let sum = sums${r/4}.$xyzw{r};
        let own = (pair * p.splits + split) * p.rows + row$r;
        // The results of parts lie one after the other.
        let to = select(query_at(p.y_steps, pair, row$r), own * HEAD, p.splits > 1u);
#unroll x WIDTH/8
        if wide + ${8*x}u < HEAD {
            y[to + wide + ${8*x}u] = select(y${r}_$x * inverse_of(sum), vec4<f32>(0.0), is_blind(sum));
        }
#end
        if wide == 0u { lse[own] = lse_of(most$r, sum); }
    }
#end
}
