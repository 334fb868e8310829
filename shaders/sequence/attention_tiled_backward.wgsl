// The formulas of attention_backward.wgsl, for GPUs, with tiles as in attention_tiled.wgsl.
//
// queries: dq. A workgroup has 8 TALL rows of queries and their dy, and walks tiles of 32 values, then of the same keys.
// keys:    dk, dv. A workgroup has 8 TALL keys and values, and walks tiles of 32 queries of each head, then of their dy. It may
//          keep ds, from which attention_queries.wgsl computes dq.
// A thread has TALL rows, every eighth from `high` on. Against a tile it has four neighbours from 4 `wide` on; of the results it
// has every eighth vector of the head from `wide` on. It computes each sum alone and in a fixed order.
//
// Count for each thread: 2 TALL + 8 vectors from workgroup memory for 32 TALL multiply-adds of s and dp, and TALL + CHUNK / 2 for
// 2 TALL CHUNK of each result. With 4 rows and heads of 64 that is 16 for 128 and 12 for 128. Registers: 8 TALL scores, and
// TALL WIDTH / 2 sums for dq, twice that for dk and dv. Bytes: own rows once, the walked ones once for every 8 TALL rows.

const HEAD: u32 = 16u;     // vectors of a head
const CHUNK: u32 = 16u;    // 8 or 16
const CHUNKS: u32 = 1u;
const TALL: u32 = 4u;      // 1 to 8

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> dq: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

#import mask = mask_none
#import kept = ds_none
#import attention
#import attention_tile
#import exp_log
#import nan

// The workgroup's queries or keys, and their dy or values.
var<workgroup> own: array<vec4<f32>, ROWS * WIDTH>;
var<workgroup> partner: array<vec4<f32>, ROWS * WIDTH>;
// What the threads of a row exchange: p or ds for a tile.
var<workgroup> weights: array<vec4<f32>, ROWS * 8u>;

// Each fills the tile with a chunk of 32 rows from `first` on.
fn fill_q(lane: u32, base: u32, first: u32, end: u32, chunk: u32) {
#unroll f CHUNK/2
    let at$f = base + source_of(lane, ${f}u, first, end) * p.q_steps.w + vector_of(lane, chunk);
    put(lane, ${f}u, first, end, chunk, q[at$f]);
#end
}

fn fill_k(lane: u32, base: u32, first: u32, end: u32, chunk: u32) {
#unroll f CHUNK/2
    let at$f = base + source_of(lane, ${f}u, first, end) * p.k_steps.w + vector_of(lane, chunk);
    put(lane, ${f}u, first, end, chunk, k[at$f]);
#end
}

fn fill_v(lane: u32, base: u32, first: u32, end: u32, chunk: u32) {
#unroll f CHUNK/2
    let at$f = base + source_of(lane, ${f}u, first, end) * p.v_steps.w + vector_of(lane, chunk);
    put(lane, ${f}u, first, end, chunk, v[at$f]);
#end
}

fn fill_dy(lane: u32, base: u32, first: u32, end: u32, chunk: u32) {
#unroll f CHUNK/2
    let at$f = base + source_of(lane, ${f}u, first, end) * p.dy_steps.w + vector_of(lane, chunk);
    put(lane, ${f}u, first, end, chunk, dy[at$f]);
#end
}

@compute @workgroup_size(64)
fn queries(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let pair = at % p.pairs;
    // Uniform over the workgroup.
    if at / p.pairs >= p.blocks { return; }
    // Under causality later rows see more keys. They come first, so that no long workgroup is left at the end.
    let block = (p.blocks - 1u - at / p.pairs) * ROWS;
    let high = lane / 8u;
    let wide = lane % 8u;
    let keys = keys_at(p.k_steps, pair, pair / p.kv_heads);
    let values = keys_at(p.v_steps, pair, pair / p.kv_heads);
    for (var i = lane; i < ROWS * WIDTH; i += 64u) {
        let row = min(block + i / WIDTH, p.rows - 1u);
        let x = i % WIDTH;
        let to = swizzled(i / WIDTH, x, WIDTH, i / WIDTH);
        own[to] = inside(q[query_at(p.q_steps, pair, row) + min(x, HEAD - 1u)], x) * p.scale;
        partner[to] = inside(dy[query_at(p.dy_steps, pair, row) + min(x, HEAD - 1u)], x);
    }
#unroll r TALL
    // Rows beyond the end repeat the last row.
    let row$r = min(block + ${8*r}u + high, p.rows - 1u);
    let limit$r = limit(row$r);
    let mask$r = mask_row(pair, row$r);
    let stats$r = stats[pair * p.rows + row$r];
#unroll x WIDTH/8
    var dq${r}_$x = vec4<f32>(0.0);
#end
#end
    let stop = min(limit(last_row(block, ROWS)), p.end);
    for (var j = p.first; j < stop; j += 32u) {
#unroll r TALL
#unroll c 4
        var s${r}_$c = 0.0;
        var dp${r}_$c = 0.0;
#end
#end
#unroll h CHUNKS
        workgroupBarrier();
        fill_v(lane, values, j, stop, ${h}u);
        workgroupBarrier();
        for (var d = 0u; d < CHUNK; d++) {
            let own_at = swizzled(high, ${h}u * CHUNK + d, WIDTH, high);
            let tile_at = swizzled(4u * wide, d, CHUNK, wide);
#unroll c 4
            let v$c = tile[tile_at + ${c}u * CHUNK];
#end
#unroll r TALL
            let dy$r = partner[own_at + ${8*r}u * WIDTH];
#unroll c 4
            dp${r}_$c = dot_add(dy$r, v$c, dp${r}_$c);
#end
#end
        }
#end
#unroll h CHUNKS
        workgroupBarrier();
        fill_k(lane, keys, j, stop, ${h}u);
        workgroupBarrier();
        for (var d = 0u; d < CHUNK; d++) {
            let own_at = swizzled(high, ${h}u * CHUNK + d, WIDTH, high);
            let tile_at = swizzled(4u * wide, d, CHUNK, wide);
#unroll c 4
            let k$c = tile[tile_at + ${c}u * CHUNK];
#end
#unroll r TALL
            let q$r = own[own_at + ${8*r}u * WIDTH];
#unroll c 4
            s${r}_$c = dot_add(q$r, k$c, s${r}_$c);
#end
#end
        }
#end
        let key = j + 4u * wide;
#unroll r TALL
        let s$r = masked(vec4<f32>(s${r}_0, s${r}_1, s${r}_2, s${r}_3), mask$r, key);
        let seen$r = (vec4<u32>(key) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(min(limit$r, stop))) & shown(s$r);
        let p$r = select(vec4<f32>(0.0), exp_of(s$r - stats$r.x), seen$r);
        let dp$r = vec4<f32>(dp${r}_0, dp${r}_1, dp${r}_2, dp${r}_3) - stats$r.y;
        // By select, not by multiplication, since the score of a hidden key may be NaN.
        weights[swizzled(${8*r}u + high, wide, 8u, high)] = select(vec4<f32>(0.0), p$r * dp$r, seen$r);
#end
        workgroupBarrier();
        // The last chunk of the keys is still there.
#unroll back CHUNKS
#unroll again (back+7)/8
        workgroupBarrier();
        fill_k(lane, keys, j, stop, ${CHUNKS-1-back}u);
        workgroupBarrier();
#end
        for (var four = 0u; four < 8u; four++) {
#unroll r TALL
            let w$r = weights[swizzled(${8*r}u + high, four, 8u, high)];
#end
#unroll c 4
#unroll n CHUNK/8
            let k${c}_$n = tile[swizzled(4u * four + ${c}u, wide + ${8*n}u, CHUNK, four)];
#unroll r TALL
            dq${r}_${(CHUNKS-1-back)*CHUNK/8+n} =
                fma(vec4<f32>(w$r.$xyzw{c}), k${c}_$n, dq${r}_${(CHUNKS-1-back)*CHUNK/8+n});
#end
#end
#end
        }
#end
    }
#unroll r TALL
    if block + ${8*r}u + high < p.rows {
        let to = query_at(p.dq_steps, pair, row$r) + wide;
#unroll x WIDTH/8
        if wide + ${8*x}u < HEAD { dq[to + ${8*x}u] = added(dq${r}_$x * p.scale, dq[to + ${8*x}u]); }
#end
    }
#end
}

@compute @workgroup_size(64)
fn keys(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let pair = p.first_pair + at % p.pairs;
    // Uniform over the workgroup. Under causality earlier keys are seen by more queries, and come first.
    let block = at / p.pairs * ROWS;
    if block >= p.tokens_k { return; }
    let high = lane / 8u;
    let wide = lane % 8u;
    for (var i = lane; i < ROWS * WIDTH; i += 64u) {
        let key = min(block + i / WIDTH, p.tokens_k - 1u);
        let x = i % WIDTH;
        let to = swizzled(i / WIDTH, x, WIDTH, i / WIDTH);
        let k_at = keys_at(p.k_steps, pair, pair / p.kv_heads) + key * p.k_steps.w + min(x, HEAD - 1u);
        let v_at = keys_at(p.v_steps, pair, pair / p.kv_heads) + key * p.v_steps.w + min(x, HEAD - 1u);
        own[to] = inside(k[k_at], x) * p.scale;
        partner[to] = inside(v[v_at], x);
    }
#unroll r TALL
    // Keys beyond the end repeat the last key.
    let key$r = min(block + ${8*r}u + high, p.tokens_k - 1u);
#unroll x WIDTH/8
    var dk${r}_$x = vec4<f32>(0.0);
    var dv${r}_$x = vec4<f32>(0.0);
#end
#end
    // The first query that sees a key of the block, at a whole vector. The limits hide later keys from it.
    let start = max(first_query(block) / 4u * 4u, p.first);
    for (var head = 0u; head < p.group; head++) {
        let queries = query_at(p.q_steps, pair, head * p.tokens_q);
        let slopes = query_at(p.dy_steps, pair, head * p.tokens_q);
        for (var i = start; i < p.end; i += 32u) {
#unroll r TALL
#unroll c 4
            var s${r}_$c = 0.0;
            var dp${r}_$c = 0.0;
#end
#end
#unroll h CHUNKS
            workgroupBarrier();
            fill_q(lane, queries, i, p.end, ${h}u);
            workgroupBarrier();
            for (var d = 0u; d < CHUNK; d++) {
                let own_at = swizzled(high, ${h}u * CHUNK + d, WIDTH, high);
                let tile_at = swizzled(4u * wide, d, CHUNK, wide);
#unroll c 4
                let q$c = tile[tile_at + ${c}u * CHUNK];
#end
#unroll r TALL
                let k$r = own[own_at + ${8*r}u * WIDTH];
#unroll c 4
                s${r}_$c = dot_add(k$r, q$c, s${r}_$c);
#end
#end
            }
#end
#unroll h CHUNKS
            workgroupBarrier();
            fill_dy(lane, slopes, i, p.end, ${h}u);
            workgroupBarrier();
            for (var d = 0u; d < CHUNK; d++) {
                let own_at = swizzled(high, ${h}u * CHUNK + d, WIDTH, high);
                let tile_at = swizzled(4u * wide, d, CHUNK, wide);
#unroll c 4
                let dy$c = tile[tile_at + ${c}u * CHUNK];
#end
#unroll r TALL
                let v$r = partner[own_at + ${8*r}u * WIDTH];
#unroll c 4
                dp${r}_$c = dot_add(v$r, dy$c, dp${r}_$c);
#end
#end
            }
#end
            let query = i + 4u * wide;
#unroll c 4
            let row$c = head * p.tokens_q + min(query + ${c}u, p.tokens_q - 1u);
            let stats$c = stats[pair * p.rows + row$c];
            // Rows beyond the end see nothing.
            let limit$c = select(0u, limit(query + ${c}u), query + ${c}u < p.end);
#end
            let lse = vec4<f32>(stats0.x, stats1.x, stats2.x, stats3.x);
            let delta = vec4<f32>(stats0.y, stats1.y, stats2.y, stats3.y);
            let limits = vec4<u32>(limit0, limit1, limit2, limit3);
            let masks = vec4<u32>(mask_row(pair, row0), mask_row(pair, row1), mask_row(pair, row2), mask_row(pair, row3));
#unroll r TALL
            let s$r = masked_rows(vec4<f32>(s${r}_0, s${r}_1, s${r}_2, s${r}_3), masks, key$r);
            let seen$r = (limits > vec4<u32>(key$r)) & shown(s$r);
            let p$r = select(vec4<f32>(0.0), exp_of(s$r - lse), seen$r);
            let dp$r = vec4<f32>(dp${r}_0, dp${r}_1, dp${r}_2, dp${r}_3) - delta;
            let ds$r = select(vec4<f32>(0.0), p$r * dp$r, seen$r);
            weights[swizzled(${8*r}u + high, wide, 8u, high)] = p$r;
#end
            workgroupBarrier();
            // The last chunk of dy is still there.
#unroll back CHUNKS
#unroll again (back+7)/8
            workgroupBarrier();
            fill_dy(lane, slopes, i, p.end, ${CHUNKS-1-back}u);
            workgroupBarrier();
#end
            for (var four = 0u; four < 8u; four++) {
#unroll r TALL
                let w$r = weights[swizzled(${8*r}u + high, four, 8u, high)];
#end
#unroll c 4
#unroll n CHUNK/8
                let dy${c}_$n = tile[swizzled(4u * four + ${c}u, wide + ${8*n}u, CHUNK, four)];
#unroll r TALL
                dv${r}_${(CHUNKS-1-back)*CHUNK/8+n} =
                    fma(vec4<f32>(w$r.$xyzw{c}), dy${c}_$n, dv${r}_${(CHUNKS-1-back)*CHUNK/8+n});
#end
#end
#end
            }
#end
            workgroupBarrier();
#unroll r TALL
            weights[swizzled(${8*r}u + high, wide, 8u, high)] = ds$r;
            if block + ${8*r}u + high < p.tokens_k { keep(pair, key$r, head, query, ds$r); }
#end
#unroll h CHUNKS
#unroll again (h+7)/8
            workgroupBarrier();
#end
            fill_q(lane, queries, i, p.end, ${h}u);
            workgroupBarrier();
            for (var four = 0u; four < 8u; four++) {
#unroll r TALL
                let w$r = weights[swizzled(${8*r}u + high, four, 8u, high)];
#end
#unroll c 4
#unroll n CHUNK/8
                let q${c}_$n = tile[swizzled(4u * four + ${c}u, wide + ${8*n}u, CHUNK, four)];
#unroll r TALL
                dk${r}_${h*CHUNK/8+n} = fma(vec4<f32>(w$r.$xyzw{c}), q${c}_$n, dk${r}_${h*CHUNK/8+n});
#end
#end
#end
            }
#end
        }
    }
#unroll r TALL
    if block + ${8*r}u + high < p.tokens_k {
        let to = keys_at(p.dk_steps, pair, pair / p.kv_heads) + key$r * p.dk_steps.w + wide;
#unroll x WIDTH/8
        if wide + ${8*x}u < HEAD {
            dk[to + ${8*x}u] = added(dk${r}_$x * p.scale, dk[to + ${8*x}u]);
            dv[to + ${8*x}u] = added(dv${r}_$x, dv[to + ${8*x}u]);
        }
#end
    }
#end
}
