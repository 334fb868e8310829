// With p[i, j] = exp_of(s[i, j] - lse[i]) recomputed (attention.wgsl has the forward formulas):
//   delta[i] = dy[i] . y[i]
//   ds[i, j] = p[i, j] (dy[i] . v[j] - delta[i])
//   dq[i] = scale sum over j of ds[i, j] k[j]
//   dk[j] = scale sum over i of ds[i, j] q[i],   dv[j] = sum over i of p[i, j] dy[i]
// Source: Dao 2023, "FlashAttention-2".
//
// delta:   one thread per row; stats[i] = (lse, delta).
// queries: dq. A thread owns ROWS rows of queries and walks the keys, as in the forward pass.
// keys:    dk, dv. A thread owns COLUMNS keys and walks the rows of queries four at a time, the group's heads in order. It starts
//          at the first query that sees one of its keys under causality.
// One thread computes each sum in a fixed order, without atomics, so the bits are the same every time. A launch walks the keys,
// or the queries of each head, from `first` up to `end`. Later launches add to the result of the first.

const HEAD_DIM: u32 = 64u;
const ROWS: u32 = 1u;
const COLUMNS: u32 = 1u;
const PARTS: u32 = 1u;     // threads that share rows or keys, each with a part of the head
const SLOTS: u32 = 2u;     // slots of workgroup memory for `join`, used in turn: 2 ROWS, or 2 COLUMNS

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> stats: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> dq: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> dk: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> dv: array<vec4<f32>>;

// Bindings of `delta`.
@group(0) @binding(0) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> lse: array<f32>;
@group(0) @binding(2) var<storage, read_write> row_stats: array<vec2<f32>>;

#import mask = mask_none
#import parts = parts_one
#import attention
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
    for (var d = 0u; d < HEAD_DIM / 4u; d++) {
        sum = dot_add(dy[dy_at + d], y[y_at + d], sum);
    }
    row_stats[row] = vec2<f32>(lse[row], sum);
}

@compute @workgroup_size(64)
fn queries(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let pair = at / p.blocks;
    if pair >= p.pairs { return; }
    let block = (at % p.blocks) * (64u / PARTS) * ROWS;
    let first = block + lane % (64u / PARTS) * ROWS;
    let part = lane / (64u / PARTS) * (HEAD_DIM / PARTS / 4u);
    let keys = keys_at(p.k_steps, pair, pair / p.kv_heads) + part;
    let values = keys_at(p.v_steps, pair, pair / p.kv_heads) + part;
    var last = 0u;
#unroll r ROWS
    // Rows beyond the end repeat the last row.
    let row$r = min(first + ${r}u, p.rows - 1u);
    let limit$r = limit(row$r);
    let mask$r = mask_row(pair, row$r);
    let at$r = query_at(p.q_steps, pair, row$r) + part;
    let dy_at$r = query_at(p.dy_steps, pair, row$r) + part;
    let stats$r = stats[pair * p.rows + row$r];
    last = max(last, limit$r);
#unroll d HEAD_DIM/PARTS/4
    let q${r}_$d = q[at$r + ${d}u] * p.scale;
    let dy${r}_$d = dy[dy_at$r + ${d}u];
    var dq${r}_$d = vec4<f32>(0.0);
#end
#end
    last = min(reach(last, first, block), p.end);
    for (var j = p.first; j < last; j += 4u) {
#unroll c 4
        let key$c = min(j + ${c}u, p.tokens_k - 1u);
        let k_at$c = keys + key$c * p.k_steps.w;
        let v_at$c = values + key$c * p.v_steps.w;
#unroll r ROWS
        var s${r}_$c = 0.0;
        var dp${r}_$c = 0.0;
#end
#end
#unroll d HEAD_DIM/PARTS/4
#unroll c 4
        let k${c}_$d = k[k_at$c + ${d}u];
        let v${c}_$d = v[v_at$c + ${d}u];
#unroll r ROWS
        s${r}_$c = dot_add(q${r}_$d, k${c}_$d, s${r}_$c);
        dp${r}_$c = dot_add(dy${r}_$d, v${c}_$d, dp${r}_$c);
#end
#end
#end
#unroll r ROWS
        let s$r = masked(join(vec4<f32>(s${r}_0, s${r}_1, s${r}_2, s${r}_3), lane, ${r}u), mask$r, j);
        let seen$r = (vec4<u32>(j) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(limit$r)) & shown(s$r);
        let p$r = select(vec4<f32>(0.0), exp_of(s$r - stats$r.x), seen$r);
        let dp$r = join(vec4<f32>(dp${r}_0, dp${r}_1, dp${r}_2, dp${r}_3), lane, ROWS + ${r}u) - stats$r.y;
        // By select, not by multiplication, since hidden keys may contain NaN.
        let ds$r = select(vec4<f32>(0.0), p$r * dp$r, seen$r);
#end
#unroll d HEAD_DIM/PARTS/4
#unroll r ROWS
        dq${r}_$d = sum4(dq${r}_$d, ds$r, k0_$d, k1_$d, k2_$d, k3_$d);
#end
#end
    }
    if first >= p.rows { return; }
    // A row in each turn of a loop, as in attention.wgsl.
    for (var turn = 0u; turn < ROWS && first + turn < p.rows; turn++) {
        let to = query_at(p.dq_steps, pair, first + turn) + part;
#unroll d HEAD_DIM/PARTS/4
        var dq_$d = dq0_$d;
#unroll r ROWS-1
        dq_$d = select(dq_$d, dq${r+1}_$d, turn == ${r+1}u);
#end
        dq[to + ${d}u] = added(dq_$d * p.scale, dq[to + ${d}u]);
#end
    }
}

@compute @workgroup_size(64)
fn keys(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let pair = at / p.blocks;
    if pair >= p.pairs { return; }
    let block = (at % p.blocks) * (64u / PARTS) * COLUMNS;
    let first = block + lane % (64u / PARTS) * COLUMNS;
    let part = lane / (64u / PARTS) * (HEAD_DIM / PARTS / 4u);
    // The first query that sees key `first`. The limits hide the thread's later keys from the first queries.
    let start = max(start_of(first, block), p.first);
#unroll c COLUMNS
    // Keys beyond the end repeat the last key.
    let key$c = min(first + ${c}u, p.tokens_k - 1u);
    let k_at$c = keys_at(p.k_steps, pair, pair / p.kv_heads) + key$c * p.k_steps.w + part;
    let v_at$c = keys_at(p.v_steps, pair, pair / p.kv_heads) + key$c * p.v_steps.w + part;
#unroll d HEAD_DIM/PARTS/4
    let k${c}_$d = k[k_at$c + ${d}u] * p.scale;
    let v${c}_$d = v[v_at$c + ${d}u];
    var dk${c}_$d = vec4<f32>(0.0);
    var dv${c}_$d = vec4<f32>(0.0);
#end
#end
    // This is p.group. Were the bound made of parameters alone, lavapipe would put their values into the kernel and translate it
    // anew at every dispatch.
    let heads = min(p.group, p.group + pair);
    for (var head = 0u; head < heads; head++) {
        let queries = query_at(p.q_steps, pair, head * p.tokens_q) + part;
        let slopes = query_at(p.dy_steps, pair, head * p.tokens_q) + part;
        for (var i = start; i < p.end; i += 4u) {
#unroll r 4
            let query$r = min(i + ${r}u, p.tokens_q - 1u);
            let row$r = head * p.tokens_q + query$r;
            let stats$r = stats[pair * p.rows + row$r];
            // Rows beyond the end see nothing.
            let limit$r = select(0u, limit(i + ${r}u), i + ${r}u < p.end);
#unroll c COLUMNS
            var s${c}_$r = 0.0;
            var dp${c}_$r = 0.0;
#end
#end
            let lse = vec4<f32>(stats0.x, stats1.x, stats2.x, stats3.x);
            let delta = vec4<f32>(stats0.y, stats1.y, stats2.y, stats3.y);
            let limits = vec4<u32>(limit0, limit1, limit2, limit3);
            let masks = vec4<u32>(mask_row(pair, row0), mask_row(pair, row1), mask_row(pair, row2), mask_row(pair, row3));
#unroll d HEAD_DIM/PARTS/4
#unroll r 4
            let q${r}_$d = q[queries + query$r * p.q_steps.w + ${d}u];
            let dy${r}_$d = dy[slopes + query$r * p.dy_steps.w + ${d}u];
#unroll c COLUMNS
            s${c}_$r = dot_add(k${c}_$d, q${r}_$d, s${c}_$r);
            dp${c}_$r = dot_add(v${c}_$d, dy${r}_$d, dp${c}_$r);
#end
#end
#end
#unroll c COLUMNS
            let own$c = vec4<f32>(s${c}_0, s${c}_1, s${c}_2, s${c}_3);
            let s$c = masked_rows(join(own$c, lane, ${c}u), masks, key$c);
            let seen$c = (limits > vec4<u32>(key$c)) & shown(s$c);
            let p$c = select(vec4<f32>(0.0), exp_of(s$c - lse), seen$c);
            let dp$c = join(vec4<f32>(dp${c}_0, dp${c}_1, dp${c}_2, dp${c}_3), lane, COLUMNS + ${c}u) - delta;
            let ds$c = select(vec4<f32>(0.0), p$c * dp$c, seen$c);
#end
#unroll d HEAD_DIM/PARTS/4
#unroll c COLUMNS
            dk${c}_$d = sum4(dk${c}_$d, ds$c, q0_$d, q1_$d, q2_$d, q3_$d);
            dv${c}_$d = sum4(dv${c}_$d, p$c, dy0_$d, dy1_$d, dy2_$d, dy3_$d);
#end
#end
        }
    }
    if first >= p.tokens_k { return; }
    // A key in each turn of a loop, as in attention.wgsl.
    for (var turn = 0u; turn < COLUMNS && first + turn < p.tokens_k; turn++) {
        let to = keys_at(p.dk_steps, pair, pair / p.kv_heads) + (first + turn) * p.dk_steps.w + part;
#unroll d HEAD_DIM/PARTS/4
        var dk_$d = dk0_$d;
        var dv_$d = dv0_$d;
#unroll c COLUMNS-1
        dk_$d = select(dk_$d, dk${c+1}_$d, turn == ${c+1}u);
        dv_$d = select(dv_$d, dv${c+1}_$d, turn == ${c+1}u);
#end
        dk[to + ${d}u] = added(dk_$d * p.scale, dk[to + ${d}u]);
        dv[to + ${d}u] = added(dv_$d, dv[to + ${d}u]);
#end
    }
}
