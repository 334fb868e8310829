// Joins the parts of the other kernels of attention. From each row's parts s, with results y[s] and log-sum-exps l[s]:
//
//   y = sum_s exp(l[s] - m) y[s] / sum_s exp(l[s] - m),   lse = m + log sum_s exp(l[s] - m),   m = max_s l[s].
//
// A thread computes four elements of a row. Bytes: every part once.

struct Params {
    y_steps: vec4<u32>,   // as in lib/attention.wgsl, like the others
    groups_x: u32,
    pairs: u32,
    rows: u32,
    tokens_q: u32,
    group: u32,
    kv_heads: u32,
    splits: u32,
    width: u32,           // elements of a row, in vectors
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> logs: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<Out>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;

#import out = out_f32
#import packed = packed_none
#import exp_log
#import nan

// Below every score. The log-sum-exp of a part that sees no key is lower still.
const LOWEST: f32 = -1.0e30;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    let at = i / p.width;
    if at >= p.pairs * p.rows { return; }
    let first = at / p.rows * p.splits * p.rows + at % p.rows;
    var most = LOWEST;
    for (var s = 0u; s < p.splits; s++) { most = max(most, logs[first + s * p.rows]); }
    var total = 0.0;
    var sum = vec4<f32>(0.0);
    for (var s = 0u; s < p.splits; s++) {
        let row = first + s * p.rows;
        let weight = select(0.0, exp_of1(logs[row] - most), logs[row] > LOWEST || nan1(logs[row]));
        total += weight;
        sum = fma(vec4<f32>(weight), parts[row * p.width + i % p.width], sum);
    }
    // The test is on the bits, because NaN must stay.
    let blind = bitcast<u32>(total) == 0u;
    let pair = at / p.rows;
    let row = at % p.rows;
    let head = pair % p.kv_heads * p.group + row / p.tokens_q;
    let to = pair / p.kv_heads * p.y_steps.y + head * p.y_steps.z + row % p.tokens_q * p.y_steps.w;
    y[p.y_steps.x + to + i % p.width] = to_out(select(sum * (1.0 / total), vec4<f32>(0.0), blind));
    if i % p.width == 0u { lse[at] = select(most + log_of1(total), 0.0, blind); }
}
