// reduce.wgsl's `rows` with vectors: y[result] = reduction over adjacent elements, a multiple of 4.
// LANES neighbouring threads share a result: 64 with a tree at the end, or 1 without barriers where these are slow.
// A thread takes vectors t, t + LANES, ... in order, in blocks as in reduce.wgsl, and adds up its four columns at the end of each
// block. The bits are the same every time.
//
// A thread has AHEAD loads under way, because one that waits for each load in turn needs about 0.6 us for each on a GPU. On an
// H200, 1024 workgroups x 64 threads x 4 loads x 16 bytes are 4.2 MB in flight, where bandwidth times latency is about 2.4 MB.

const LANES: u32 = 64u;
const AHEAD: u32 = 1u;
const BLOCK: u32 = 32u / AHEAD;     // turns
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
    add: u32,       // whether results are added to what is there
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
    for (var start = first + t; start < last; start += BLOCK * AHEAD * LANES) {
        let stop = min(start + BLOCK * AHEAD * LANES, last);
        var a = identity();
        var b = a;
        var c = a;
        var d = a;
        for (var i = start; i < stop; i += AHEAD * LANES) {
            // The last turn reads its first vector in place of those beyond the end, so that no load waits for another.
#unroll j AHEAD
            let v$j = x[base + select(i, i + ${j}u * LANES, i + ${j}u * LANES < stop)];
#end
#unroll j AHEAD
            let w$j = select(vec4<Elem>(identity()), v$j, i + ${j}u * LANES < stop);
            a = combine(a, w$j.x);
            b = combine(b, w$j.y);
            c = combine(c, w$j.z);
            d = combine(d, w$j.w);
#end
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
    if t == 0u && row < p.results {
        let value = divided(all, p.divisor);
        y[row] = select(value, y[row] + value, p.add > 0u);
    }
}
