// The formulas of attention.wgsl in f16, by cooperative matrices: the adapter's matrix units. Scores, sums and log-sum-exps are
// f32. Weights are rounded to f16 for their product with the values.
//
// A workgroup has ROWS rows of queries of one (batch, key head) pair, whose matrices its subgroups keep, and walks tiles of WALKED
// keys and values. Scores go through workgroup memory to the threads, and weights go back. The elements of a matrix have no known
// place in registers, so sums cannot be scaled there when a row's largest score grows. Weights are therefore relative to a score
// that may be up to SLACK below the largest (f16 has room for that), and only when a row grows by more, sums go through workgroup
// memory and are scaled there. That is so in the first tiles, and seldom later.
//
// Count for a tile of 64 rows, 32 keys and a head of 64: 16 multiplies of 16 a subgroup, 218 cycles at an H200's rate; 44 KiB of
// workgroup memory for the units and 12 KiB for the threads, 450 cycles; about 25 instructions a score, 400 cycles on other units.
// The tiled kernel takes 2400. Bytes: Q once, y once, K and V once for every ROWS rows, from cache. Registers of a thread: DIM / 4
// for queries (f16) and DIM / 2 for sums. Workgroup memory: 23 KiB for heads of 64, 32 KiB for 128.

// Natural logarithm of the largest weight: exp(8) = 2981.
const SLACK: f32 = 8.0;

@group(0) @binding(0) var<storage, read> q: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f16>>;
@group(0) @binding(3) var<storage, read_write> y: array<Out>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

#import mask = mask_none
#import keys = keys_plain
#import out = out_f32
#import packed = packed_none
#import attention
#import attention_matrices
#import halves = halves_words
#import exp_log
#import nan

// Whether a row grew by more than SLACK, and the same where it is known to be uniform.
var<workgroup> grown: atomic<u32>;
var<workgroup> scaling: u32;

@compute @workgroup_size(THREADS)
fn forward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let at = group.y * p.groups_x + group.x;
    let pair = at % p.pairs;
    let item = at / p.pairs;
    let split = item / p.blocks;
    // Uniform over the workgroup.
    if split >= p.splits { return; }
    // Under causality later rows see more keys. They come first, so that no long workgroup is left at the end.
    let block = (p.blocks - 1u - item % p.blocks) * ROWS;
    // If subgroups are smaller than LANES, there are more than SUBGROUPS of them. The surplus ones repeat the work of the last.
    let own = min(subgroup, SUBGROUPS - 1u) * PART;
    for (var t = lane; t < ROWS * DIM / 4u; t += THREADS) {
        let from_row = query_at(p.q_steps, pair, min(block + t / (DIM / 4u), p.rows - 1u));
        put_own(t, q[from_row + min(t % (DIM / 4u), HEAD - 1u)]);
    }
    if lane == 0u { atomicStore(&grown, 0u); }
    workgroupBarrier();
#unroll i TALL
#unroll d DEEP
    let q${i}_$d = coopLoadT<MatrixA>(&halves[((own + ${i}u * SIZE) * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
    var y${i}_$d: MatrixC;
#end
#end
    var none: MatrixC;
    // The thread's row. Rows beyond the end repeat the last row.
    let high = lane / PER;
    let wide = lane % PER;
    let row = min(block + high, p.rows - 1u);
    let limit = visible(pair, row);
    let mask_at = mask_row(pair, row);
    let scores_at = high * SCORE_LINE + 4u * QUADS * wide;
    // The threads of a row exchange numbers at the end of its line.
    let shared_at = high * SCORE_LINE + WALKED;
    var most = HIDDEN;
    var total = 0.0;
    let keys = keys_at(p.k_steps, pair, entry_of(pair));
    let values = keys_at(p.v_steps, pair, entry_of(pair));
    let start = split * p.chunk;
    let stop = min(min(visible(pair, last_row(block, ROWS)), furthest(pair)), start + p.chunk);
#unroll f WORDS
    var k$f = vec4<f16>(0.0h);
    var v$f = vec4<f16>(0.0h);
#end
    if start < stop {
#unroll f WORDS
        k$f = k[source_of(lane, ${f}u, keys, p.k_steps.w, start, stop)];
        v$f = v[source_of(lane, ${f}u, values, p.v_steps.w, start, stop)];
#end
    }
    for (var j = start; j < stop; j += WALKED) {
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
        var top = HIDDEN;
#unroll c QUADS
        let key$c = j + 4u * (QUADS * wide + ${c}u);
        let own$c = masked(score_at(scores_at + ${4*c}u) * p.scale, mask_at, key$c);
        let seen$c = (vec4<u32>(key$c) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(min(limit, stop))) & shown(own$c);
        let score$c = select(vec4<f32>(HIDDEN), own$c, seen$c);
        top = max(top, max(max(score$c.x, score$c.y), max(score$c.z, score$c.w)));
#end
        scores[shared_at + wide] = top;
        workgroupBarrier();
#unroll w PER
        top = max(top, scores[shared_at + ${w}u]);
#end
        let grows = top > most + SLACK;
        let fade = select(1.0, exp_of1(most - top), grows);
        most = select(most, top, grows);
        total *= fade;
#unroll c QUADS
        let p$c = select(vec4<f32>(0.0), exp_of(score$c - most), seen$c);
        total += (p$c.x + p$c.y) + (p$c.z + p$c.w);
        put(WEIGHTS + high * WEIGHT_LINE + 4u * (QUADS * wide + ${c}u), vec4<f16>(p$c));
#end
        // Before the first tile there is nothing to scale.
        if grows && j > start { atomicStore(&grown, 1u); }
        workgroupBarrier();
        if lane == 0u { scaling = atomicExchange(&grown, 0u); }
        if workgroupUniformLoad(&scaling) != 0u {
#unroll b BLOCKS
#unroll i TALL
#unroll n WIDE
            coopStoreT(y${i}_${b*WIDE+n}, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
            workgroupBarrier();
            for (var c = 0u; c < 4u * QUADS; c++) { scores[scores_at + c] *= fade; }
            workgroupBarrier();
#unroll i TALL
#unroll n WIDE
            y${i}_${b*WIDE+n} =
                coopLoadT<MatrixC>(&scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
            workgroupBarrier();
#end
        }
#unroll n WIDE
#unroll i TALL
        let w${i}_$n = coopLoadT<MatrixA>(
            &halves[(WEIGHTS + (own + ${i}u * SIZE) * WEIGHT_LINE + ${n}u * SIZE) / UNIT], WEIGHT_LINE / UNIT);
#end
#unroll d DEEP
        let v${n}_$d = coopLoadT<MatrixB>(&halves[(TILE_1 + ${n}u * SIZE * LINE + ${d}u * SIZE) / UNIT], LINE / UNIT);
#unroll i TALL
        y${i}_$d = coopMultiplyAdd(w${i}_$n, v${n}_$d, y${i}_$d);
#end
#end
#end
    }
    workgroupBarrier();
    scores[shared_at + wide] = total;
    workgroupBarrier();
    var sum = 0.0;
#unroll w PER
    sum += scores[shared_at + ${w}u];
#end
    let there = block + high < p.rows;
    let own_row = (pair * p.splits + split) * p.rows + row;
    // The results of parts lie one after the other.
    let to = select(query_at(p.y_steps, pair, row), own_row * HEAD, p.splits > 1u);
    if there && wide == 0u { lse[own_row] = lse_of(most, sum); }
#unroll b BLOCKS
    workgroupBarrier();
#unroll i TALL
#unroll n WIDE
    coopStoreT(y${i}_${b*WIDE+n}, &scores[(own + ${i}u * SIZE) * SCORE_LINE + ${n}u * SIZE], SCORE_LINE);
#end
#end
    workgroupBarrier();
#unroll c QUADS
    let x${b}_$c = ${b}u * WALKED / 4u + QUADS * wide + ${c}u;
    if there && x${b}_$c < HEAD {
        let y${b}_at$c = score_at(scores_at + ${4*c}u) * inverse_of(sum);
        y[to + x${b}_$c] = to_out(select(y${b}_at$c, vec4<f32>(0.0), is_blind(sum)));
    }
#end
#end
}
