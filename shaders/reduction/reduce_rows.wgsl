// reduce.wgsl's `rows` with vectors: y[result] = reduction over adjacent elements, a multiple of 4.
// LANES neighbouring threads share a result: 64 with a tree at the end, or 1 without barriers where these are slow.
// A thread takes vectors t, t + LANES, ... in order, in blocks as in reduce.wgsl, and adds up its four columns at the end of each
// block. The bits are the same every time.

const LANES: u32 = 64u;
const BLOCK: u32 = 32u;
alias Elem = f32;
alias Bits = u32;

struct Params {
    groups_x: u32,
    results: u32,   // outer * parts
    axis: u32,      // vectors of the axis
    inner: u32,     // 1
    parts: u32,     // parts of the axis, each with its own result
    span: u32,      // vectors of the axis per part
    divisor: f32,   // the count of a mean, else 1
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<vec4<Elem>>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem>;

#import combine = reduce_sum

var<workgroup> tree: array<Elem, 64>;

@compute @workgroup_size(64)
fn rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * (64u / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads beyond the last result walk nothing, but take part in the barriers.
    let first = (row % p.parts) * p.span;
    let last = select(first, min(first + p.span, p.axis), row < p.results);
    let base = (row / p.parts) * p.axis;
    var all = identity();
    for (var start = first + t; start < last; start += BLOCK * LANES) {
        let stop = min(start + BLOCK * LANES, last);
        var a = identity();
        var b = a;
        var c = a;
        var d = a;
        for (var i = start; i < stop; i += LANES) {
            let v = x[base + i];
            a = combine(a, v.x);
            b = combine(b, v.y);
            c = combine(c, v.z);
            d = combine(d, v.w);
        }
        all = combine(all, combine(combine(a, b), combine(c, d)));
    }
    if LANES > 1u {
        tree[lane] = all;
        workgroupBarrier();
        for (var reach = LANES / 2u; reach > 0u; reach = reach >> 1u) {
            if t < reach { tree[lane] = combine(tree[lane], tree[lane + reach]); }
            workgroupBarrier();
        }
        all = tree[lane];
    }
    if t == 0u && row < p.results { y[row] = divided(all, p.divisor); }
}
