// y[i] = sum over keys j of p[i, j] v[j],   p[i, .] = softmax over visible j of s[i, j],
// s[i, j] = scale q[i] . k[j] + mask[i, j].
// lse[i] = log sum over visible j of exp(s[i, j]), stored for attention_backward.wgsl.
// Source: Milakov & Gimelshein 2018 (online softmax); Dao 2023, "FlashAttention-2".
//
// Query heads that share one key head are adjacent in memory, so a (batch, key head) pair has `group * tokens_q` rows of queries.
// A thread owns ROWS of them, with q and the sum in registers, and walks the keys four at a time. No score is stored, and all
// threads of a workgroup read K and V at the same addresses. Heads that are too wide for the registers are split over PARTS
// threads, which add up their scores in workgroup memory (slot `parts`).
// Row i sees keys j < limit(i). A thread stops at the last limit of its rows, which skips keys that causality hides.
// With few rows and many keys (decoding), most threads would be idle. The keys are then divided into parts as well.
// Bytes: Q and y once; K and V once per 64 ROWS / PARTS rows of queries, from cache.

const HEAD_DIM: u32 = 64u;
const ROWS: u32 = 1u;      // rows of queries per thread
const PARTS: u32 = 1u;     // threads that share rows, each with a part of the head
const SLOTS: u32 = 2u;     // slots of workgroup memory for `join`, used in turn: 2 ROWS

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> k: array<In>;
@group(0) @binding(2) var<storage, read> v: array<In>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

#import in = in_vector
#import packed = packed_none
#import mask = mask_none
#import parts = parts_one
#import keys = keys_plain
#import attention
#import exp_log
#import nan

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let pair = at / p.blocks;
    // Uniform over the workgroup.
    if pair >= p.pairs { return; }
    let block = (at % p.blocks) * (64u / PARTS) * ROWS;
    let item = block / ROWS + lane % (64u / PARTS);
    let split = item / p.row_blocks;
    let start = split * p.chunk;
    let first = select(p.rows, item % p.row_blocks * ROWS, split < p.splits);
    let part = lane / (64u / PARTS) * (HEAD_DIM / PARTS / 4u);
    let keys = keys_at(p.k_steps, pair, entry_of(pair)) + part;
    let values = keys_at(p.v_steps, pair, entry_of(pair)) + part;
    // Memory behind the last key may contain anything, and 0 times infinity is NaN. Loads there are clamped to the last key.
    let end = furthest(pair);
    let final_key = max(end, 1u) - 1u;
    var last = 0u;
#unroll r ROWS
    // Rows beyond the end repeat the last row.
    let row$r = min(first + ${r}u, p.rows - 1u);
    let limit$r = visible(pair, row$r);
    let mask$r = mask_row(pair, row$r);
    let at$r = query_at(p.q_steps, pair, row$r) + part;
    last = max(last, limit$r);
    var most$r = HIDDEN;
    var total$r = 0.0;
#unroll d HEAD_DIM/PARTS/4
    let q${r}_$d = q[at$r + ${d}u] * p.scale;
    var y${r}_$d = vec4<f32>(0.0);
#end
#end
    last = min(reach(last, first, block), end);
    let span = span(last, start);
    for (var step = 0u; step < span; step += 4u) {
        let j = start + step;
#unroll c 4
        let key$c = min(j + ${c}u, final_key);
        let k_at$c = keys + key$c * p.k_steps.w;
        let v_at$c = values + key$c * p.v_steps.w;
#unroll r ROWS
        var s${r}_$c = 0.0;
#end
#end
#unroll d HEAD_DIM/PARTS/4
#unroll c 4
        let k${c}_$d = in_of(k[k_at$c + ${d}u]);
#unroll r ROWS
        s${r}_$c = dot_add(q${r}_$d, k${c}_$d, s${r}_$c);
#end
#end
#end
#unroll r ROWS
        let own$r = vec4<f32>(s${r}_0, s${r}_1, s${r}_2, s${r}_3);
        var s$r = masked(join(own$r, lane, step / 4u % 2u * ROWS + ${r}u), mask$r, j);
        let seen$r = (vec4<u32>(j) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(limit$r)) & shown(s$r);
        s$r = select(vec4<f32>(HIDDEN), s$r, seen$r);
        let top$r = max(most$r, max(max(s$r.x, s$r.y), max(s$r.z, s$r.w)));
        let fade$r = exp_of1(most$r - top$r);
        most$r = top$r;
        let p$r = select(vec4<f32>(0.0), exp_of(s$r - top$r), seen$r);
        total$r = fma(total$r, fade$r, (p$r.x + p$r.y) + (p$r.z + p$r.w));
#end
#unroll d HEAD_DIM/PARTS/4
#unroll c 4
        let v${c}_$d = in_of(v[v_at$c + ${d}u]);
#end
#unroll r ROWS
        y${r}_$d = sum4(y${r}_$d * fade$r, p$r, v0_$d, v1_$d, v2_$d, v3_$d);
#end
#end
    }
    if first >= p.rows { return; }
    // A row in each turn of a loop: llvmpipe has a loop over lanes for each store, and LLVM needs long for many of them.
    for (var turn = 0u; turn < ROWS && first + turn < p.rows; turn++) {
        var total = total0;
        var most = most0;
#unroll r ROWS-1
        total = select(total, total${r+1}, turn == ${r+1}u);
        most = select(most, most${r+1}, turn == ${r+1}u);
#end
        let own = (pair * p.splits + split) * p.rows + first + turn;
        // The results of parts lie one after the other.
        let to = select(query_at(p.y_steps, pair, first + turn), own * (HEAD_DIM / 4u), p.splits > 1u) + part;
#unroll d HEAD_DIM/PARTS/4
        var y_$d = y0_$d;
#unroll r ROWS-1
        y_$d = select(y_$d, y${r+1}_$d, turn == ${r+1}u);
#end
        y[to + ${d}u] = select(y_$d * inverse_of(total), vec4<f32>(0.0), is_blind(total));
#end
        lse[own] = lse_of(most, total);
    }
}
