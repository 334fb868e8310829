// The formulas of attention.wgsl, for GPUs and few rows of queries, as in decoding: what counts is how fast keys and values are
// read.
//
// A workgroup has one part of the keys of one (batch, key head) pair, in tiles of 64, and all of its up to 8 rows of queries. A
// thread computes the scores of one key of the tile, which is read through workgroup memory so that neighbours read neighbouring
// vectors. For the sums a thread has one vector of a chunk and every GROUPSth key; values are read from storage straight.
// attention_combine.wgsl joins the parts.
//
// Bytes: K and V once. A thread has CHUNK loads under way at a time, so a workgroup 16 KiB with heads of 64.

const HEAD: u32 = 16u;     // vectors of a head
const CHUNK: u32 = 16u;    // 8 or 16
const CHUNKS: u32 = 1u;
const TALL: u32 = 8u;      // rows of queries, up to 8
const WIDTH: u32 = CHUNK * CHUNKS;
const GROUPS: u32 = 64u / CHUNK;

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
#import exp_log
#import nan

var<workgroup> queries: array<vec4<f32>, TALL * WIDTH>;
// A chunk of the keys. Neighbouring vectors are exchanged as in lib/attention_tile.wgsl. At last, the sums of the groups.
var<workgroup> tile: array<vec4<f32>, 64u * CHUNK>;
// A row's scores for the tile, then its probabilities, and what eight threads found in its eighths.
var<workgroup> scores: array<f32, TALL * 64u>;
var<workgroup> eighths: array<f32, 64>;

fn inside(vector: vec4<f32>, x: u32) -> vec4<f32> { return select(vec4<f32>(0.0), vector, x < HEAD); }

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    let pair = at % p.pairs;
    let split = at / p.pairs;
    // Uniform over the workgroup.
    if split >= p.splits { return; }
    let keys = keys_at(p.k_steps, pair, entry_of(pair));
    let values = keys_at(p.v_steps, pair, entry_of(pair));
    for (var i = lane; i < TALL * WIDTH; i += 64u) {
        let x = i % WIDTH;
        let row_at = query_at(p.q_steps, pair, min(i / WIDTH, p.rows - 1u));
        queries[i] = inside(q[row_at + min(x, HEAD - 1u)], x) * p.scale;
    }
#unroll r TALL
    // Rows beyond the end repeat the last row.
    let row$r = min(${r}u, p.rows - 1u);
    let limit$r = visible(pair, row$r);
    let mask$r = mask_row(pair, row$r);
    var most$r = HIDDEN;
    var total$r = 0.0;
#unroll h CHUNKS
    var y${r}_$h = vec4<f32>(0.0);
#end
#end
    let start = split * p.chunk;
    let stop = min(furthest(pair), start + p.chunk);
    let x = lane % CHUNK;
    let own_group = lane / CHUNK;
    for (var j = start; j < stop; j += 64u) {
#unroll r TALL
        var s$r = 0.0;
#end
#unroll h CHUNKS
        workgroupBarrier();
#unroll f CHUNK
        let key${h}_$f = ${f}u * GROUPS + own_group;
        let k_at${h}_$f = keys + min(j + key${h}_$f, stop - 1u) * p.k_steps.w + min(${h}u * CHUNK + x, HEAD - 1u);
        let k${h}_$f = in_of(k[k_at${h}_$f]);
#end
#unroll f CHUNK
        tile[key${h}_$f * CHUNK + (x ^ (key${h}_$f % 8u))] = inside(k${h}_$f, ${h}u * CHUNK + x);
#end
        workgroupBarrier();
        for (var d = 0u; d < CHUNK; d++) {
            let own = tile[lane * CHUNK + (d ^ (lane % 8u))];
#unroll r TALL
            s$r = dot_add(queries[${r}u * WIDTH + ${h}u * CHUNK + d], own, s$r);
#end
        }
#end
#unroll r TALL
        // `masked` takes four neighbours, of which only the first is this thread's.
        let own$r = masked(vec4<f32>(s$r), mask$r, j + lane);
        let seen$r = j + lane < min(limit$r, stop) && shown(own$r).x;
        let score$r = select(HIDDEN, own$r.x, seen$r);
        scores[${64*r}u + lane] = score$r;
#end
        workgroupBarrier();
        var top = HIDDEN;
        if lane < 8u * TALL {
#unroll i 8
            top = max(top, scores[lane / 8u * 64u + ${8*i}u + lane % 8u]);
#end
        }
        eighths[lane] = top;
        workgroupBarrier();
#unroll r TALL
        var top$r = most$r;
#unroll i 8
        top$r = max(top$r, eighths[${8*r+i}]);
#end
        let fade$r = exp_of1(most$r - top$r);
        most$r = top$r;
        let p$r = select(0.0, exp_of1(score$r - top$r), seen$r);
        total$r = fma(total$r, fade$r, p$r);
        scores[${64*r}u + lane] = p$r;
#unroll h CHUNKS
        y${r}_$h *= fade$r;
#end
#end
        workgroupBarrier();
#unroll h CHUNKS
#unroll f CHUNK
        let v_key${h}_$f = ${f}u * GROUPS + own_group;
        let v_at${h}_$f = values + min(j + v_key${h}_$f, stop - 1u) * p.v_steps.w + min(${h}u * CHUNK + x, HEAD - 1u);
        // Zeros from the end on: the weights there are 0 as well, but 0 times infinity is NaN.
        let v${h}_$f = select(vec4<f32>(0.0), in_of(v[v_at${h}_$f]), j + v_key${h}_$f < stop);
#end
#unroll f CHUNK
#unroll r TALL
        y${r}_$h = fma(v${h}_$f, vec4<f32>(scores[${64*r}u + v_key${h}_$f]), y${r}_$h);
#end
#end
#end
    }
    workgroupBarrier();
#unroll r TALL
    scores[${64*r}u + lane] = total$r;
#end
    workgroupBarrier();
    var sum = 0.0;
    if lane < 8u * TALL {
#unroll i 8
        sum += scores[lane / 8u * 64u + ${8*i}u + lane % 8u];
#end
    }
    eighths[lane] = sum;
#unroll h CHUNKS
    workgroupBarrier();
#unroll r TALL
    tile[${64*r}u + lane] = y${r}_$h;
#end
    workgroupBarrier();
#unroll r TALL
    // One thread of each chunk's vector writes a row.
    if own_group == ${r}u % GROUPS && ${r}u < p.rows {
        let to_x = ${h}u * CHUNK + x;
        var whole = 0.0;
#unroll i 8
        whole += eighths[${8*r+i}];
#end
        var joined = vec4<f32>(0.0);
        for (var g = 0u; g < GROUPS; g++) { joined += tile[${64*r}u + g * CHUNK + x]; }
        let own = (pair * p.splits + split) * p.rows + ${r}u;
        // The results of parts lie one after the other.
        let to = select(query_at(p.y_steps, pair, ${r}u), own * HEAD, p.splits > 1u) + to_x;
        if to_x < HEAD { y[to] = select(joined * inverse_of(whole), vec4<f32>(0.0), is_blind(whole)); }
        if to_x == 0u { lse[own] = lse_of(most$r, whole); }
    }
#end
#end
}
