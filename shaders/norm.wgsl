// Layer norm: y = (x - mean) rstd * gain + bias, rstd = 1 / sqrt(var + eps), biased variance, over the last axis.
// RMS norm (CENTERED = false): the same with mean = 0 and var = mean(x^2).
// With xh = (x - mean) rstd and g = dy * gain:
//   dx = rstd (g - [centered] mean(g) - xh mean(g xh)),  dgain = sum over rows of dy xh,  dbias = sum over rows of dy.
// The variance is summed about the mean in a second walk of the row, so that a large mean does not cancel it.

const CENTERED: bool = true;

struct Params {
    groups_x: u32,
    rows: u32,
    width: u32,
    span: u32,      // rows in one partial sum of backward_parameters
    eps: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> gain: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read> dy: array<f32>;
@group(0) @binding(4) var<storage, read> stats_in: array<vec2<f32>>;   // (mean, rstd) a row
@group(0) @binding(5) var<storage, read_write> y: array<f32>;           // y, dx or partial dgain
@group(0) @binding(6) var<storage, read_write> stats: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read_write> z: array<f32>;           // partial dbias

var<workgroup> tree: array<vec2<f32>, 64>;

/// The sum over lanes, to every lane.
fn total(lane: u32, value: vec2<f32>) -> vec2<f32> {
    tree[lane] = value;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step { tree[lane] = tree[lane] + tree[lane + step]; }
        workgroupBarrier();
    }
    let sum = tree[0];
    // Before anybody writes the tree again.
    workgroupBarrier();
    return sum;
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * p.groups_x + group.x;
    if row >= p.rows { return; }
    let base = row * p.width;
    let n = f32(p.width);
    var mean = 0.0;
    if CENTERED {
        var sum = 0.0;
        for (var c = lane; c < p.width; c += 64u) { sum += x[base + c]; }
        mean = total(lane, vec2<f32>(sum, 0.0)).x / n;
    }
    var squares = 0.0;
    for (var c = lane; c < p.width; c += 64u) {
        let d = x[base + c] - mean;
        squares += d * d;
    }
    let rstd = 1.0 / sqrt(total(lane, vec2<f32>(squares, 0.0)).x / n + p.eps);
    for (var c = lane; c < p.width; c += 64u) {
        y[base + c] = (x[base + c] - mean) * rstd * gain[c] + bias[c];
    }
    if lane == 0u { stats[row] = vec2<f32>(mean, rstd); }
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * p.groups_x + group.x;
    if row >= p.rows { return; }
    let base = row * p.width;
    let mean = stats_in[row].x;
    let rstd = stats_in[row].y;
    var sums = vec2<f32>();
    for (var c = lane; c < p.width; c += 64u) {
        let g = dy[base + c] * gain[c];
        sums += vec2<f32>(g, g * (x[base + c] - mean) * rstd);
    }
    let means = total(lane, sums) / f32(p.width);
    let centre = select(0.0, means.x, CENTERED);
    for (var c = lane; c < p.width; c += 64u) {
        let xh = (x[base + c] - mean) * rstd;
        y[base + c] = rstd * (dy[base + c] * gain[c] - centre - xh * means.y);
    }
}

/// Partial sums over `span` rows: group.y is the span, lanes are columns.
@compute @workgroup_size(64)
fn backward_parameters(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let c = group.x * 64u + lane;
    if c >= p.width { return; }
    let first = group.y * p.span;
    let last = min(first + p.span, p.rows);
    var dgain = 0.0;
    var dbias = 0.0;
    for (var row = first; row < last; row++) {
        let d = dy[row * p.width + c];
        dgain += d * (x[row * p.width + c] - stats_in[row].x) * stats_in[row].y;
        dbias += d;
    }
    y[group.y * p.width + c] = dgain;
    z[group.y * p.width + c] = dbias;
}
