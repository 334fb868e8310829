// y[outer, i, inner] = sum over j <= i of x[outer, j, inner], or over j >= i if reversed. Each is the other's derivative. With
// reduce_product in the slot, the sums are products.
// rows:    inner = 1. One workgroup per part of a row: four elements per lane, a scan over the lanes, and a carry.
// columns: any inner. One thread per part of a column, which it walks in order.
// Long axes are divided into parts, so that few results still fill a device and a carry passes only a few dozen times. First come
// the totals of all parts, then the cumsum of the totals, then each part with the total of the parts before it. The order depends
// only on the sizes, so the bits are the same every time.

alias Elem = f32;
const BLOCK: u32 = 32u;    // terms per running sum of a thread, because a single long one would drift

struct Params {
    groups_x: u32,
    results: u32,   // outer * parts * inner
    axis: u32,
    inner: u32,
    parts: u32,     // parts of the axis
    span: u32,      // elements of the axis per part
    reverse: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<Elem>;
// Cumulative totals of the parts [outer, parts, inner]. Not read if there is only one part.
@group(0) @binding(1) var<storage, read> totals: array<Elem>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

#import combine = reduce_sum

var<workgroup> lanes: array<Elem, 128>;

/// The position along the axis of element `i` in the order of summation.
fn along(i: u32) -> u32 {
    return select(i, p.axis - 1u - i, p.reverse != 0u) * p.inner;
}

fn row_element(base: u32, i: u32, last: u32) -> Elem {
    var value = identity();
    if i < last { value = x[base + along(i)]; }
    return value;
}

@compute @workgroup_size(64)
fn rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let piece = group.y * p.groups_x + group.x;
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if piece >= p.results { return; }
    let part = piece % p.parts;
    let first = part * p.span;
    let last = min(first + p.span, p.axis);
    let base = (piece / p.parts) * p.axis;
    var carry = identity();
    if part > 0u { carry = totals[piece - 1u]; }
    for (var start = first; start < last; start += 256u) {
        let i = start + lane * 4u;
        let s0 = row_element(base, i, last);
        let s1 = combine(s0, row_element(base, i + 1u, last));
        let s2 = combine(s1, row_element(base, i + 2u, last));
        let s3 = combine(s2, row_element(base, i + 3u, last));
        // Sums over the lanes up to this one, with a reach that doubles. The two halves of `lanes` take turns, so one barrier per
        // step is enough.
        lanes[lane] = s3;
        var side = 0u;
        for (var step = 1u; step < 64u; step = step << 1u) {
            workgroupBarrier();
            var sum = lanes[side + lane];
            if lane >= step { sum = combine(lanes[side + lane - step], sum); }
            side = 64u - side;
            lanes[side + lane] = sum;
        }
        workgroupBarrier();
        var before = carry;
        if lane > 0u { before = combine(carry, lanes[side + lane - 1u]); }
        carry = combine(carry, lanes[side + 63u]);
        if i < last { y[base + along(i)] = combine(before, s0); }
        if i + 1u < last { y[base + along(i + 1u)] = combine(before, s1); }
        if i + 2u < last { y[base + along(i + 2u)] = combine(before, s2); }
        if i + 3u < last { y[base + along(i + 3u)] = combine(before, s3); }
        // The next round overwrites values that were just read.
        workgroupBarrier();
    }
}

@compute @workgroup_size(64)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.results { return; }
    let piece = at / p.inner;
    let part = piece % p.parts;
    let first = part * p.span;
    let last = min(first + p.span, p.axis);
    let base = (piece / p.parts) * p.axis * p.inner + at % p.inner;
    var before = identity();
    if part > 0u { before = totals[at - p.inner]; }
    for (var start = first; start < last; start += BLOCK) {
        let stop = min(start + BLOCK, last);
        var sum = identity();
        for (var i = start; i < stop; i++) {
            sum = combine(sum, x[base + along(i)]);
            y[base + along(i)] = combine(before, sum);
        }
        before = combine(before, sum);
    }
}

/// y[outer, part, inner] = the sum over a part. One workgroup each, with a fixed tree of 64.
@compute @workgroup_size(64)
fn row_totals(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let piece = group.y * p.groups_x + group.x;
    if piece >= p.results { return; }
    let first = (piece % p.parts) * p.span;
    let last = min(first + p.span, p.axis);
    let base = (piece / p.parts) * p.axis;
    var sum = identity();
    for (var start = first + lane; start < last; start += BLOCK * 64u) {
        let stop = min(start + BLOCK * 64u, last);
        var block = identity();
        for (var i = start; i < stop; i += 64u) { block = combine(block, x[base + along(i)]); }
        sum = combine(sum, block);
    }
    lanes[lane] = sum;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step { lanes[lane] = combine(lanes[lane], lanes[lane + step]); }
        workgroupBarrier();
    }
    if lane == 0u { y[piece] = lanes[0]; }
}

/// The same with one thread per part.
@compute @workgroup_size(64)
fn column_totals(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.results { return; }
    let piece = at / p.inner;
    let first = (piece % p.parts) * p.span;
    let last = min(first + p.span, p.axis);
    let base = (piece / p.parts) * p.axis * p.inner + at % p.inner;
    var sum = identity();
    for (var start = first; start < last; start += BLOCK) {
        let stop = min(start + BLOCK, last);
        var block = identity();
        for (var i = start; i < stop; i++) { block = combine(block, x[base + along(i)]); }
        sum = combine(sum, block);
    }
    y[at] = sum;
}
