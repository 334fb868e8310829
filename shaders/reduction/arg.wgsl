// y[outer, inner] = the first index along the axis of the largest x[outer, i, inner], or of the smallest if flipped.
// NaN counts as the largest of all. No derivative.
// rows:    inner = 1. One workgroup per part of a row, with a fixed tree of 64.
// columns: inner > 1. One thread per part of a column.
// finish:  the best of all parts of a long axis. One thread per result.
// Keys and indices are integers and the order is total, so the result does not depend on the parts.

struct Params {
    groups_x: u32,
    results: u32,   // outer * parts * inner
    axis: u32,
    inner: u32,
    parts: u32,     // parts of the axis, each with its own result
    span: u32,      // elements of the axis per part
    flip: u32,      // 0 for the largest, all bits for the smallest
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read> pieces: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<u32>;

#import order

const NOBODY: u32 = 0xffffffffu;

var<workgroup> best_key: array<u32, 64>;
var<workgroup> best_index: array<u32, 64>;

/// The key of an element. A better one has a larger key.
fn rank(at: u32) -> u32 {
    // NaN has the largest key. When the smallest is wanted, the flip makes it the worst.
    return order_key(x[at]) ^ p.flip;
}

/// Whether the second beats the first.
fn beats(key: u32, index: u32, other: u32, other_index: u32) -> bool {
    return other > key || (other == key && other_index < index);
}

@compute @workgroup_size(64)
fn rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let result = group.y * p.groups_x + group.x;
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if result >= p.results { return; }
    let first = (result % p.parts) * p.span;
    let last = min(first + p.span, p.axis);
    let base = (result / p.parts) * p.axis;
    var key = 0u;
    var index = NOBODY;
    for (var i = first + lane; i < last; i += 64u) {
        let k = rank(base + i);
        if beats(key, index, k, i) { key = k; index = i; }
    }
    best_key[lane] = key;
    best_index[lane] = index;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step {
            let other = lane + step;
            if beats(best_key[lane], best_index[lane], best_key[other], best_index[other]) {
                best_key[lane] = best_key[other];
                best_index[lane] = best_index[other];
            }
        }
        workgroupBarrier();
    }
    if lane == 0u { y[result] = best_index[0]; }
}

@compute @workgroup_size(64)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.results { return; }
    let piece = at / p.inner;
    let first = (piece % p.parts) * p.span;
    let last = min(first + p.span, p.axis);
    let base = (piece / p.parts) * p.axis * p.inner + at % p.inner;
    var key = 0u;
    var index = NOBODY;
    for (var i = first; i < last; i++) {
        let k = rank(base + i * p.inner);
        if beats(key, index, k, i) { key = k; index = i; }
    }
    y[at] = index;
}

/// Here `results` is outer * inner.
@compute @workgroup_size(64)
fn finish(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.results { return; }
    let outer = at / p.inner;
    let column = at % p.inner;
    var key = 0u;
    var index = NOBODY;
    for (var part = 0u; part < p.parts; part++) {
        let i = pieces[(outer * p.parts + part) * p.inner + column];
        // A part beyond the end of the axis has no element.
        if i < p.axis {
            let k = rank((outer * p.axis + i) * p.inner + column);
            if beats(key, index, k, i) { key = k; index = i; }
        }
    }
    y[at] = index;
}
