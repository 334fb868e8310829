// Cross-entropy with a weight for each class and with smoothed targets.
//
// forward:   loss = own w[t] (L - x[t]) + share sum over c of w[c] (L - x[c]),  L = m + log(s) the log-sum-exp of the row
// backward:  dx = ((own w[t] + share W) exp(x - m) / s - share w - own w[t] [class = t]) g,  W the sum of all w
// With smoothing e, own = 1 - e and share = e / classes. The losses and the weights w[t], which are what a mean divides by, are added up
// by `total` of cross_entropy.wgsl. g is dy / total for a mean, and dy of the row if EACH. Ignored rows have loss, weight and gradient 0.
// A target outside the classes reads nothing and gives NaN.
//
// Threads share a row as in cross_entropy.wgsl. Bytes: forward reads x once, or twice if targets are smoothed, the second time mostly
// from the cache; backward reads x and writes dx once. Weights are read by all rows, so they stay in the cache.

#import logsumexp
#import exp_log
#import piece = piece_1
#import in = in_piece
#import out = out_piece
#import packed = packed_none
#import row = row_1
#import row_sum

alias Sum = f32;

const LANES: u32 = 64u;
const THREADS: u32 = max(64u, LANES);
const AHEAD: u32 = 1u;      // vectors that a thread loads in a turn
const BLOCK: u32 = 64u;
const SMOOTH: bool = false; // share is not 0
const EACH: bool = false;   // every row has its own dy

struct Params {
    groups_x: u32,
    rows: u32,
    classes: u32,
    ignores: u32,   // 1 if `ignored` applies
    ignored: u32,   // the target that marks a row without a loss, as bits
    nan: f32,       // NaN, which WGSL has no constant for
    own: f32,
    share: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<In>;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read> weight: array<Piece>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;          // [2, rows]: loss, then the target's weight
@group(0) @binding(4) var<storage, read_write> made: array<vec4<f32>>;      // m, 1 / s, own w[t], own w[t] + share W
// The sum of the weights.
@group(0) @binding(5) var<storage, read> whole: array<f32>;
// Bindings of `long_rows`: m and s, and the sum of w[c] (L - x[c]).
@group(0) @binding(6) var<storage, read> sums: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read> rests: array<f32>;
// Bindings of `backward`.
@group(0) @binding(8) var<storage, read> statistics: array<vec4<f32>>;
@group(0) @binding(9) var<storage, read> totals: array<f32>;                // sum of losses, sum of weights
@group(0) @binding(10) var<storage, read> dy: array<f32>;
@group(0) @binding(11) var<storage, read_write> dx: array<Out>;

fn is_ignored(target_class: u32) -> bool {
    return p.ignores != 0u && target_class == p.ignored;
}

// The sum of w[c] (m + level - x[c]) over pieces t, t + LANES, ... below n, in blocks. No term is below 0.
fn walk_rest(base: u32, t: u32, n: u32, m: f32, level: f32) -> f32 {
    var all = 0.0;
    for (var start = t; start < n; start += BLOCK * LANES) {
        let stop = min(start + BLOCK * LANES, n);
        var a = 0.0;
        for (var i = start; i < stop; i += LANES) {
            a += sum_of(weight[i] * (level + (m - in_of(x[base + i]))));
        }
        all += a;
    }
    return all;
}

@compute @workgroup_size(THREADS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads beyond the last row walk nothing, but take part in the barriers.
    let n = select(0u, p.classes / PIECE, row < p.rows);
    let base = row * (p.classes / PIECE);
    let all = row_lse(lane, walk(base, 1u, t, n));
    var rest = 0.0;
    if SMOOTH { rest = row_sum(lane, walk_rest(base, t, n, all.x, log_of1(all.y))); }
    if t == 0u && row < p.rows { finish(row, all, rest); }
}

// For rows that are too long to walk. One thread per row, with the sums computed by other ops.
@compute @workgroup_size(64)
fn long_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * 64u + lane;
    if row < p.rows { finish(row, sums[row], rests[row]); }
}

fn finish(row: u32, all: vec2<f32>, rest: f32) {
    let wanted = targets[row];
    var loss = p.nan;
    var of_target = 1.0;
    if is_ignored(wanted) {
        loss = 0.0;
        of_target = 0.0;
    } else if wanted < p.classes {
        of_target = part(weight[wanted / PIECE], wanted % PIECE);
        // m - x is computed first, because both may be large while their difference is small.
        loss = p.own * of_target * (log_of1(all.y) + (all.x - element(row * p.classes + wanted)));
        if SMOOTH { loss += p.share * rest; }
    }
    losses[row] = loss;
    losses[p.rows + row] = of_target;
    let own = p.own * of_target;
    var both = own;
    if SMOOTH { both += p.share * whole[0]; }
    made[row] = vec4<f32>(all.x, 1.0 / all.y, own, both);
}

@compute @workgroup_size(THREADS)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * THREADS + lane;
    let pieces = p.classes / PIECE;
    if at >= p.rows * pieces { return; }
    let row = at / pieces;
    let column = at - row * pieces;
    let wanted = targets[row];
    let of_row = statistics[row];
    var d = exp_piece(in_of(x[at]) - of_row.x) * (of_row.y * of_row.w) + with_target(Piece(0.0), column * PIECE, wanted) * of_row.z;
    if SMOOTH { d -= p.share * weight[column]; }
    if EACH { d *= dy[row]; } else { d *= dy[0] / totals[1]; }
    // By select, not by multiplication, since an ignored row may contain NaN.
    let inside = select(d, Piece(p.nan), wanted >= p.classes);
    dx[at] = to_out(select(inside, Piece(0.0), is_ignored(wanted)));
}
