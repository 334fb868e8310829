// The formulas of attention_backward.wgsl in f16, by cooperative matrices, with tiles as in attention_coop.wgsl. Scores, their
// gradients before they are weights, sums and statistics are f32. p and ds are rounded to f16 for their products.
//
// delta:   a thread has a row; stats[i] = (lse, delta).
// queries: dq. A workgroup has ROWS rows of queries and their dy, and walks tiles of WALKED keys and values.
// keys:    dk, dv. A workgroup has ROWS keys and values, and walks tiles of WALKED queries of each head and their dy. Scores lie
//          with a key per line.
// s and dp take turns in `scores`, p and ds in the weights.
//
// Count for a tile of 64 rows, 32 walked ones and a head of 64, in products of 109 cycles at an H200's rate: 3 for queries, 4 for
// keys; workgroup memory about 70 and 90 KiB, 550 and 700 cycles; about 40 instructions a score, 600 cycles on other units.
// Registers of a thread: DIM / 2 for operands, and for sums DIM / 2 in `queries` and DIM in `keys`.

@group(0) @binding(0) var<storage, read> q: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read> dy: array<vec4<f16>>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> dq: array<Out>;
@group(0) @binding(6) var<storage, read_write> dk: array<Out>;
@group(0) @binding(7) var<storage, read_write> dv: array<Out>;

// Bindings of `delta`.
@group(0) @binding(0) var<storage, read> y: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read> lse: array<f32>;
@group(0) @binding(2) var<storage, read_write> row_stats: array<vec2<f32>>;

#import mask = mask_none
#import out = out_f16
#import packed = f16
#import attention
#import attention_matrices
#import halves = halves_words
#import exp_log
#import nan

@compute @workgroup_size(64)
fn delta(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * 64u + lane;
    if row >= p.pairs * p.rows { return; }
    let pair = row / p.rows;
    let dy_at = query_at(p.dy_steps, pair, row % p.rows);
    let y_at = query_at(p.y_steps, pair, row % p.rows);
    var sum = 0.0;
    for (var d = 0u; d < HEAD; d++) {
        sum = dot_add(vec4<f32>(dy[dy_at + d]), vec4<f32>(y[y_at + d]), sum);
    }
    row_stats[row] = vec2<f32>(lse[row], sum);
}

@compute @workgroup_size(THREADS)
fn queries(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let at = group.y * p.groups_x + group.x;
    let pair = at % p.pairs;
    // Uniform over the workgroup.
    if at / p.pairs >= p.blocks { return; }
    // Under causality later rows see more keys. They come first, so that no long workgroup is left at the end.
    let block = (p.blocks - 1u - at / p.pairs) * ROWS;
    // If subgroups are smaller than LANES, there are more than SUBGROUPS of them. The surplus ones repeat the work of the last.
    let own = min(subgroup, SUBGROUPS - 1u) * PART;
    for (var t = lane; t < ROWS * DIM / 4u; t += THREADS) {
        let row = min(block + t / (DIM / 4u), p.rows - 1u);
        put_own(t, q[query_at(p.q_steps, pair, row) + min(t % (DIM / 4u), HEAD - 1u)]);
    }
    workgroupBarrier();
#unroll i TALL
#unroll d DEEP
    let q${i}_$d = coopLoadT<MatrixA>(&halves[((own + ${i}u * SIZE) * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#end
#end
    workgroupBarrier();
    for (var t = lane; t < ROWS * DIM / 4u; t += THREADS) {
        let row = min(block + t / (DIM / 4u), p.rows - 1u);
        put_own(t, dy[query_at(p.dy_steps, pair, row) + min(t % (DIM / 4u), HEAD - 1u)]);
    }
    workgroupBarrier();
#unroll i TALL
#unroll d DEEP
    let dy${i}_$d = coopLoadT<MatrixA>(&halves[((own + ${i}u * SIZE) * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
    var dq${i}_$d: MatrixC;
#end
#end
    var none: MatrixC;
    // The thread's row. Rows beyond the end repeat the last row.
    let high = lane / PER;
    let wide = lane % PER;
    let row = min(block + high, p.rows - 1u);
    let reach = limit(row);
    let mask_at = mask_row(pair, row);
    let known = stats[pair * p.rows + row];
    let scores_at = high * SCORE_LINE + 4u * QUADS * wide;
    let weights_at = WEIGHTS + high * WEIGHT_LINE + 4u * QUADS * wide;
    let keys = keys_at(p.k_steps, pair, pair / p.kv_heads);
    let values = keys_at(p.v_steps, pair, pair / p.kv_heads);
    let stop = limit(last_row(block, ROWS));
#unroll f WORDS
    var k$f = vec4<f16>(0.0h);
    var v$f = vec4<f16>(0.0h);
#end
    if stop > 0u {
#unroll f WORDS
        k$f = k[source_of(lane, ${f}u, keys, p.k_steps.w, 0u, stop)];
        v$f = v[source_of(lane, ${f}u, values, p.v_steps.w, 0u, stop)];
#end
    }
    for (var j = 0u; j < stop; j += WALKED) {
        workgroupBarrier();
#unroll f WORDS
        put_walked(lane, ${f}u, TILE_0, j, stop, k$f);
        put_walked(lane, ${f}u, TILE_1, j, stop, v$f);
#end
        workgroupBarrier();
        // The next tile, while this one is worked on. After the last one it is read once more.
#unroll f WORDS
        k$f = k[source_of(lane, ${f}u, keys, p.k_steps.w, j + WALKED, stop)];
        v$f = v[source_of(lane, ${f}u, values, p.v_steps.w, j + WALKED, stop)];
#end
#unroll i TALL
#unroll n WIDE
        var s${i}_$n = none;
        var dp${i}_$n = none;
#end
#end
#unroll d DEEP
#unroll n WIDE
        let k${n}_$d = coopLoad<MatrixB>(&halves[(TILE_0 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
        s${i}_$n = coopMultiplyAdd(q${i}_$d, k${n}_$d, s${i}_$n);
#end
#end
#end
#unroll i TALL
#unroll n WIDE
        coopStoreT(s${i}_$n, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
        workgroupBarrier();
#unroll c QUADS
        let key$c = j + 4u * (QUADS * wide + ${c}u);
        let s$c = masked(score_at(scores_at + ${4*c}u) * p.scale, mask_at, key$c);
        let seen$c = (vec4<u32>(key$c) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(min(reach, stop))) & shown(s$c);
        let p$c = select(vec4<f32>(0.0), exp_of(s$c - known.x), seen$c);
#end
#unroll d DEEP
#unroll n WIDE
        let v${n}_$d = coopLoad<MatrixB>(&halves[(TILE_1 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
        dp${i}_$n = coopMultiplyAdd(dy${i}_$d, v${n}_$d, dp${i}_$n);
#end
#end
#end
        workgroupBarrier();
#unroll i TALL
#unroll n WIDE
        coopStoreT(dp${i}_$n, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
        workgroupBarrier();
#unroll c QUADS
        let ds$c = p$c * (score_at(scores_at + ${4*c}u) - known.y);
        // By select, not by multiplication, since the score of a hidden key may be NaN.
        put(weights_at + ${4*c}u, vec4<f16>(select(vec4<f32>(0.0), ds$c, seen$c)));
#end
        workgroupBarrier();
#unroll n WIDE
#unroll i TALL
        let ds${i}_$n = coopLoadT<MatrixA>(
            &halves[(WEIGHTS + (own + ${i}u * SIZE) * WEIGHT_LINE + ${n}u * SIZE) / UNIT], WEIGHT_LINE / UNIT);
#end
#unroll d DEEP
        let k_of${n}_$d = coopLoadT<MatrixB>(&halves[(TILE_0 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
        dq${i}_$d = coopMultiplyAdd(ds${i}_$n, k_of${n}_$d, dq${i}_$d);
#end
#end
#end
    }
    let to = query_at(p.dq_steps, pair, row);
#unroll b BLOCKS
    workgroupBarrier();
#unroll i TALL
#unroll n WIDE
    coopStoreT(dq${i}_${b*WIDE+n}, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
    workgroupBarrier();
#unroll c QUADS
    let x${b}_$c = ${b}u * WALKED / 4u + QUADS * wide + ${c}u;
    if block + high < p.rows && x${b}_$c < HEAD {
        dq[to + x${b}_$c] = to_out(score_at(scores_at + ${4*c}u) * p.scale);
    }
#end
#end
}

@compute @workgroup_size(THREADS)
fn keys(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let at = group.y * p.groups_x + group.x;
    let pair = at % p.pairs;
    // Uniform over the workgroup. Under causality earlier keys are seen by more queries, and come first.
    let block = at / p.pairs * ROWS;
    if block >= p.tokens_k { return; }
    let own = min(subgroup, SUBGROUPS - 1u) * PART;
    let keys = keys_at(p.k_steps, pair, pair / p.kv_heads);
    let values = keys_at(p.v_steps, pair, pair / p.kv_heads);
    for (var t = lane; t < ROWS * DIM / 4u; t += THREADS) {
        let key = min(block + t / (DIM / 4u), p.tokens_k - 1u);
        put_own(t, k[keys + key * p.k_steps.w + min(t % (DIM / 4u), HEAD - 1u)]);
    }
    workgroupBarrier();
#unroll i TALL
#unroll d DEEP
    let k${i}_$d = coopLoadT<MatrixA>(&halves[((own + ${i}u * SIZE) * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#end
#end
    workgroupBarrier();
    for (var t = lane; t < ROWS * DIM / 4u; t += THREADS) {
        let key = min(block + t / (DIM / 4u), p.tokens_k - 1u);
        put_own(t, v[values + key * p.v_steps.w + min(t % (DIM / 4u), HEAD - 1u)]);
    }
    workgroupBarrier();
#unroll i TALL
#unroll d DEEP
    let v${i}_$d = coopLoadT<MatrixA>(&halves[((own + ${i}u * SIZE) * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
    var dk${i}_$d: MatrixC;
    var dv${i}_$d: MatrixC;
#end
#end
    var none: MatrixC;
    // The thread's key. Keys beyond the end repeat the last key.
    let high = lane / PER;
    let wide = lane % PER;
    let key = min(block + high, p.tokens_k - 1u);
    let scores_at = high * SCORE_LINE + 4u * QUADS * wide;
    let weights_at = WEIGHTS + high * WEIGHT_LINE + 4u * QUADS * wide;
    // The first query that sees a key of the block. The limits hide later keys from it.
    let start = first_query(block);
    for (var head = 0u; head < p.group; head++) {
        let queries = query_at(p.q_steps, pair, head * p.tokens_q);
        let slopes = query_at(p.dy_steps, pair, head * p.tokens_q);
        for (var j = start; j < p.tokens_q; j += WALKED) {
            workgroupBarrier();
#unroll f WORDS
            let q$f = q[source_of(lane, ${f}u, queries, p.q_steps.w, j, p.tokens_q)];
            let dy$f = dy[source_of(lane, ${f}u, slopes, p.dy_steps.w, j, p.tokens_q)];
#end
#unroll f WORDS
            put_walked(lane, ${f}u, TILE_0, j, p.tokens_q, q$f);
            put_walked(lane, ${f}u, TILE_1, j, p.tokens_q, dy$f);
#end
            workgroupBarrier();
#unroll i TALL
#unroll n WIDE
            var s${i}_$n = none;
            var dp${i}_$n = none;
#end
#end
#unroll d DEEP
#unroll n WIDE
            let q${n}_$d = coopLoad<MatrixB>(&halves[(TILE_0 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
            s${i}_$n = coopMultiplyAdd(k${i}_$d, q${n}_$d, s${i}_$n);
#end
#end
#end
#unroll i TALL
#unroll n WIDE
            coopStoreT(s${i}_$n, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
            workgroupBarrier();
#unroll c QUADS
#unroll l 4
            let query${c}_$l = j + 4u * (QUADS * wide + ${c}u) + ${l}u;
            let row${c}_$l = head * p.tokens_q + min(query${c}_$l, p.tokens_q - 1u);
            let stats${c}_$l = stats[pair * p.rows + row${c}_$l];
            // Rows beyond the end see nothing.
            let limit${c}_$l = select(0u, limit(query${c}_$l), query${c}_$l < p.tokens_q);
#end
            let lse$c = vec4<f32>(stats${c}_0.x, stats${c}_1.x, stats${c}_2.x, stats${c}_3.x);
            let delta$c = vec4<f32>(stats${c}_0.y, stats${c}_1.y, stats${c}_2.y, stats${c}_3.y);
            let masks$c = vec4<u32>(
                mask_row(pair, row${c}_0), mask_row(pair, row${c}_1), mask_row(pair, row${c}_2), mask_row(pair, row${c}_3));
            let s$c = masked_rows(score_at(scores_at + ${4*c}u) * p.scale, masks$c, key);
            let seen$c = (vec4<u32>(limit${c}_0, limit${c}_1, limit${c}_2, limit${c}_3) > vec4<u32>(key)) & shown(s$c);
            let p$c = select(vec4<f32>(0.0), exp_of(s$c - lse$c), seen$c);
            put(weights_at + ${4*c}u, vec4<f16>(p$c));
#end
            workgroupBarrier();
#unroll n WIDE
#unroll i TALL
            let p${i}_$n = coopLoadT<MatrixA>(
                &halves[(WEIGHTS + (own + ${i}u * SIZE) * WEIGHT_LINE + ${n}u * SIZE) / UNIT], WEIGHT_LINE / UNIT);
#end
#unroll d DEEP
            let dy_of${n}_$d =
                coopLoadT<MatrixB>(&halves[(TILE_1 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
            dv${i}_$d = coopMultiplyAdd(p${i}_$n, dy_of${n}_$d, dv${i}_$d);
#end
#end
#end
#unroll d DEEP
#unroll n WIDE
            let dy${n}_$d = coopLoad<MatrixB>(&halves[(TILE_1 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
            dp${i}_$n = coopMultiplyAdd(v${i}_$d, dy${n}_$d, dp${i}_$n);
#end
#end
#end
#unroll i TALL
#unroll n WIDE
            coopStoreT(dp${i}_$n, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
            workgroupBarrier();
#unroll c QUADS
            let ds$c = p$c * (score_at(scores_at + ${4*c}u) - delta$c);
            put(weights_at + ${4*c}u, vec4<f16>(select(vec4<f32>(0.0), ds$c, seen$c)));
#end
            workgroupBarrier();
#unroll n WIDE
#unroll i TALL
            let ds${i}_$n = coopLoadT<MatrixA>(
                &halves[(WEIGHTS + (own + ${i}u * SIZE) * WEIGHT_LINE + ${n}u * SIZE) / UNIT], WEIGHT_LINE / UNIT);
#end
#unroll d DEEP
            let q_of${n}_$d =
                coopLoadT<MatrixB>(&halves[(TILE_0 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
            dk${i}_$d = coopMultiplyAdd(ds${i}_$n, q_of${n}_$d, dk${i}_$d);
#end
#end
#end
        }
    }
    let to = keys_at(p.dk_steps, pair, pair / p.kv_heads) + key * p.dk_steps.w;
#unroll b BLOCKS
#unroll side 2
    workgroupBarrier();
#unroll i TALL
#unroll n WIDE
#unroll dk 1-side
    coopStoreT(dk${i}_${b*WIDE+n}, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#unroll dv side
    coopStoreT(dv${i}_${b*WIDE+n}, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
#end
    workgroupBarrier();
#unroll c QUADS
    let x${b}_${side}_$c = ${b}u * WALKED / 4u + QUADS * wide + ${c}u;
    if block + high < p.tokens_k && x${b}_${side}_$c < HEAD {
#unroll dk 1-side
        dk[to + x${b}_${side}_$c] = to_out(score_at(scores_at + ${4*c}u) * p.scale);
#end
#unroll dv side
        dv[to + x${b}_${side}_$c] = to_out(score_at(scores_at + ${4*c}u));
#end
    }
#end
#end
#end
}
