// y[outer, inner] = reduction over `axis` of x[outer, axis, inner].
// rows:    inner = 1. One workgroup per row: lane t takes elements t, t + 64, ... in order, followed by a fixed tree of 64.
// columns: inner > 1. One thread per result, which walks the axis in order. Neighbouring threads read neighbouring elements.
// Long axes are divided into parts of `span` elements, so that few results still fill the device. A thread first adds up blocks of
// BLOCK terms, because a single running sum would drift: rounding errors of equal terms do not cancel.
// The order depends only on the sizes, so the bits are the same every time.

alias Elem = f32;
alias Bits = u32;
const BLOCK: u32 = 32u;

struct Params {
    groups_x: u32,
    results: u32,   // outer * parts * inner
    axis: u32,
    inner: u32,
    parts: u32,     // parts of the axis, each with its own result
    span: u32,      // elements of the axis per part
    divisor: f32,   // the count of a mean, else 1
    add: u32,       // whether results are added to what is there
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<In>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem>;

#import combine = reduce_sum
#import in = in_elem
#import packed = packed_none

var<workgroup> tree: array<Elem, 64>;

fn finish(at: u32, value: Elem) {
    let result = divided(value, p.divisor);
    y[at] = select(result, y[at] + result, p.add > 0u);
}

@compute @workgroup_size(64)
fn rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * p.groups_x + group.x;
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if row >= p.results { return; }
    let first = (row % p.parts) * p.span;
    let last = min(first + p.span, p.axis);
    let base = (row / p.parts) * p.axis;
    var sum = identity();
    for (var start = first + lane; start < last; start += BLOCK * 64u) {
        let stop = min(start + BLOCK * 64u, last);
        var block = identity();
        for (var i = start; i < stop; i += 64u) { block = combine(block, in_of(x[base + i])); }
        sum = combine(sum, block);
    }
    tree[lane] = sum;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step { tree[lane] = combine(tree[lane], tree[lane + step]); }
        workgroupBarrier();
    }
    if lane == 0u { finish(row, tree[0]); }
}

@compute @workgroup_size(64)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.results { return; }
    let column = at % p.inner;
    let piece = at / p.inner;
    let first = (piece % p.parts) * p.span;
    let last = min(first + p.span, p.axis);
    let base = (piece / p.parts) * p.axis * p.inner + column;
    var sum = identity();
    var i = first;
    while i < last {
        let stop = min(i + 4u * BLOCK, last);
        // Four running results in a fixed pattern have shorter chains of rounding and independent loads.
        var s0 = identity();
        var s1 = s0;
        var s2 = s0;
        var s3 = s0;
        for (; i + 4u <= stop; i += 4u) {
            s0 = combine(s0, in_of(x[base + i * p.inner]));
            s1 = combine(s1, in_of(x[base + (i + 1u) * p.inner]));
            s2 = combine(s2, in_of(x[base + (i + 2u) * p.inner]));
            s3 = combine(s3, in_of(x[base + (i + 3u) * p.inner]));
        }
        for (; i < stop; i++) { s0 = combine(s0, in_of(x[base + i * p.inner])); }
        sum = combine(sum, combine(combine(s0, s1), combine(s2, s3)));
    }
    finish(at, sum);
}
