// forward:   loss = m + log(s) - x[target], m = max(x), s = sum exp(x - m) over the classes of a row
// backward:  dx = (exp(x - m) / s - [class = target]) dy / count
// The total loss is sum(loss) / count over the rows that are not ignored. Ignored rows have loss and gradient 0. A target outside
// the classes reads nothing and gives NaN. Probabilities are not stored: backward recomputes them from m and 1 / s of a row.
//
// LANES neighbouring threads share a row in `forward`, as in softmax.wgsl. One workgroup of `total` then adds up the losses and the
// counts, 8 loads of each under way to a thread, in a fixed order, and divides them: 4096 rows are 32 KB in two rounds. `backward` has
// one thread per piece. Bytes: forward reads x once, backward reads x and writes dx once.

#import logsumexp
#import exp_log
#import piece = piece_1
#import in = in_piece
#import out = out_piece
#import packed = packed_none
#import row = row_1

const LANES: u32 = 64u;
const THREADS: u32 = max(64u, LANES);
const AHEAD: u32 = 1u;      // vectors that a thread loads in a turn
const BLOCK: u32 = 64u;

struct Params {
    groups_x: u32,
    rows: u32,
    classes: u32,
    ignores: u32,   // 1 if `ignored` applies
    ignored: u32,   // the target that marks a row without a loss, as bits
    nan: f32,       // NaN, which WGSL has no constant for
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<In>;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read_write> losses: array<f32>;          // [2, rows]: loss, then 1 or 0 for the count
@group(0) @binding(3) var<storage, read_write> made: array<vec2<f32>>;      // m, 1 / s
// Bindings of `backward`.
@group(0) @binding(4) var<storage, read> statistics: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read> totals: array<f32>;                // sum of losses, count
@group(0) @binding(6) var<storage, read> dy: array<f32>;
@group(0) @binding(7) var<storage, read_write> dx: array<Out>;
// Bindings of `total`.
@group(0) @binding(8) var<storage, read> terms: array<f32>;                 // the losses
@group(0) @binding(9) var<storage, read_write> summed: array<f32>;          // the totals
@group(0) @binding(10) var<storage, read_write> mean: array<f32>;

fn is_ignored(target_class: u32) -> bool {
    return p.ignores != 0u && target_class == p.ignored;
}

@compute @workgroup_size(THREADS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads beyond the last row walk nothing, but take part in the barriers.
    let n = select(0u, p.classes / PIECE, row < p.rows);
    let all = row_lse(lane, walk(row * (p.classes / PIECE), 1u, t, n));
    if t != 0u || row >= p.rows { return; }
    made[row] = vec2<f32>(all.x, 1.0 / all.y);
    finish(row, all);
}

// For rows that are too long to walk. One thread per row, with m and s computed by other ops.
@compute @workgroup_size(64)
fn long_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * 64u + lane;
    if row < p.rows { finish(row, statistics[row]); }
}

fn finish(row: u32, all: vec2<f32>) {
    let wanted = targets[row];
    var loss = p.nan;
    if is_ignored(wanted) {
        loss = 0.0;
    } else if wanted < p.classes {
        // m - x is computed first, because both may be large while their difference is small.
        loss = log_of1(all.y) + (all.x - element(row * p.classes + wanted));
    }
    losses[row] = loss;
    losses[p.rows + row] = select(1.0, 0.0, is_ignored(wanted));
}

const TOTAL: u32 = 256u;    // threads of `total`
var<workgroup> total_tree: array<vec2<f32>, TOTAL>;

@compute @workgroup_size(TOTAL)
fn total(@builtin(local_invocation_index) lane: u32) {
    var sum = vec2<f32>(0.0);
    for (var i = lane; i < p.rows; i += 8u * TOTAL) {
        // The last turn reads its first row in place of those beyond the end, so that no load waits for another.
#unroll j 8
        let at$j = select(i, i + ${j}u * TOTAL, i + ${j}u * TOTAL < p.rows);
        let v$j = vec2<f32>(terms[at$j], terms[p.rows + at$j]);
#end
        var block = v0;
#unroll j 7
        block += select(vec2<f32>(0.0), v${j+1}, i + ${j+1}u * TOTAL < p.rows);
#end
        sum += block;
    }
    total_tree[lane] = sum;
    workgroupBarrier();
    for (var reach = TOTAL / 2u; reach > 0u; reach = reach >> 1u) {
        if lane < reach { total_tree[lane] += total_tree[lane + reach]; }
        workgroupBarrier();
    }
    if lane == 0u {
        let all = total_tree[0];
        summed[0] = all.x;
        summed[1] = all.y;
        mean[0] = all.x / all.y;
    }
}

@compute @workgroup_size(THREADS)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * THREADS + lane;
    let pieces = p.classes / PIECE;
    if at >= p.rows * pieces { return; }
    let row = at / pieces;
    let first = (at - row * pieces) * PIECE;
    let wanted = targets[row];
    let of_row = statistics[row];
    let d = with_target(exp_piece(in_of(x[at]) - of_row.x) * of_row.y, first, wanted) * (dy[0] / totals[1]);
    // By select, not by multiplication, since an ignored row may contain NaN.
    let inside = select(d, Piece(p.nan), wanted >= p.classes);
    dx[at] = to_out(select(inside, Piece(0.0), is_ignored(wanted)));
}
