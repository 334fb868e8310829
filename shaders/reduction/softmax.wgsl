// softmax:      y = exp(x - m) / s,        dx = y (dy - sum(y dy))
// log_softmax:  y = (x - m) - log(s),      dx = dy - exp(y) sum(dy)
// with m = max(x) and s = sum exp(x - m) along the axis. Backward reads only y and dy.
//
// Arrays are [outer, axis, inner], and a row is the axis at one (outer, inner). LANES neighbouring threads share a row, so a
// workgroup has 64 / LANES rows. LANES is 64 for long rows, 256 for the longest, and 1 if inner > 1, where neighbouring threads then read neighbouring
// elements. Lane t takes elements t, t + LANES, ... in order, in blocks of BLOCK, followed by a fixed tree. The bits are the same
// every time. A row that contains NaN or infinity is NaN everywhere, and so is its gradient.

#import logsumexp
#import exp_log
#import piece = piece_1
#import in = in_piece
#import packed = packed_none
#import row = row_1

const LANES: u32 = 64u;
const THREADS: u32 = max(64u, LANES);
const AHEAD: u32 = 1u;      // vectors that a thread loads in a turn
const BLOCK: u32 = 64u;
const LOG: bool = false;

struct Params {
    groups_x: u32,
    rows: u32,      // outer * inner
    axis: u32,
    inner: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<In>;
@group(0) @binding(1) var<storage, read_write> y: array<Piece>;
// Bindings of `backward`: the forward result, the incoming gradient, the gradient of x.
@group(0) @binding(2) var<storage, read> out: array<Piece>;
@group(0) @binding(3) var<storage, read> dy: array<Piece>;
@group(0) @binding(4) var<storage, read_write> dx: array<Piece>;

alias Sum = f32;
#import row_sum

@compute @workgroup_size(THREADS)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads beyond the last row walk nothing, but take part in the barriers.
    let n = select(0u, p.axis / PIECE, row < p.rows);
    let base = (row / p.inner) * (p.axis / PIECE) * p.inner + row % p.inner;
    let all = row_lse(lane, walk(base, p.inner, t, n));
    // The maximum is subtracted first and log(s) second, because their sum would lose bits for a large maximum.
    let factor = select(1.0 / all.y, log_of1(all.y), LOG);
    for (var i = t; i < n; i += LANES) {
        let at = base + i * p.inner;
        let d = in_of(x[at]) - all.x;
        if LOG {
            y[at] = d - factor;
        } else {
            y[at] = exp_piece(d) * factor;
        }
    }
}

@compute @workgroup_size(THREADS)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (THREADS / LANES) + lane / LANES;
    let t = lane % LANES;
    let n = select(0u, p.axis / PIECE, row < p.rows);
    let base = (row / p.inner) * (p.axis / PIECE) * p.inner + row % p.inner;
    var sum = Piece(0.0);
    for (var start = t; start < n; start += BLOCK * LANES) {
        let stop = min(start + BLOCK * LANES, n);
        var block = Piece(0.0);
        for (var i = start; i < stop; i += LANES) {
            let at = base + i * p.inner;
            if LOG {
                block += dy[at];
            } else {
                block += out[at] * dy[at];
            }
        }
        sum += block;
    }
    let all = row_sum(lane, sum_of(sum));
    for (var i = t; i < n; i += LANES) {
        let at = base + i * p.inner;
        if LOG {
            dx[at] = dy[at] - exp_piece(out[at]) * all;
        } else {
            dx[at] = out[at] * (dy[at] - all);
        }
    }
}
