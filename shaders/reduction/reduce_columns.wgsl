// y[outer, part, inner] = reduction over a part of the axis of x[outer, axis, inner]: the columns of reduce.wgsl where there are too
// few results to fill a GPU with a thread each.
//
// A workgroup of 256 threads has 2^shift neighbouring columns (of four elements each, with vectors) and 256 / 2^shift lanes for
// each of them. Lane t takes elements t, t + lanes, ... of its part, so a workgroup reads whole rows of its columns, one after the
// other. The lanes' sums are joined by a tree in workgroup memory. Sums are in blocks, because a single running sum would drift,
// and the order depends only on the sizes, so the bits are the same every time.
//
// What limits such a sum on a GPU is latency: a thread that waits for each element in turn needs about 0.6 us for each. Here a
// thread has AHEAD loads under way. On an H200, 256 workgroups x 256 threads x 8 loads x 16 bytes are 8.4 MB in flight, where
// bandwidth times latency is about 2.4 MB. [131072, 64] is one pass over 33.5 MB with 512 rows to a workgroup, so four rounds of
// loads, and a second one over 64 KB with one round. Bytes: each element is read once.

alias Elem = f32;
alias Bits = u32;
const THREADS: u32 = 256u;
const AHEAD: u32 = 8u;
const BLOCK: u32 = 32u;     // turns of AHEAD elements

struct Params {
    groups_x: u32,
    groups: u32,
    axis: u32,
    inner: u32,     // in Elem
    parts: u32,     // parts of the axis, each with its own result
    span: u32,      // elements of the axis per part
    shift: u32,     // the columns of a workgroup are 2^shift
    divisor: f32,   // the count of a mean, else 1
    add: u32,       // whether results are added to what is there
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<In>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem>;

#import combine = reduce_sum
#import in = in_elem
#import packed = packed_none

var<workgroup> tree: array<Elem, THREADS>;

@compute @workgroup_size(THREADS)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if at >= p.groups { return; }
    let wide = 1u << p.shift;
    let lanes = THREADS >> p.shift;
    let across = (p.inner + wide - 1u) >> p.shift;
    let piece = at / across;
    let column = ((at % across) << p.shift) + (lane & (wide - 1u));
    let t = lane >> p.shift;
    let first = (piece % p.parts) * p.span;
    // Threads beyond the last column walk nothing, but take part in the barriers.
    let last = select(first, min(first + p.span, p.axis), column < p.inner);
    let base = (piece / p.parts) * p.axis * p.inner + column;
    let step = lanes * p.inner;
    var sum = identity();
    for (var start = first + t; start < last; start += AHEAD * BLOCK * lanes) {
        let stop = min(start + AHEAD * BLOCK * lanes, last);
        var block = identity();
        for (var i = start; i < stop; i += AHEAD * lanes) {
            let near = base + i * p.inner;
            if i + (AHEAD - 1u) * lanes < stop {
#unroll j AHEAD
                let v$j = in_of(x[near + ${j}u * step]);
#end
                block = combine(block, combine(combine(combine(v0, v1), combine(v2, v3)), combine(combine(v4, v5), combine(v6, v7))));
            } else {
                // The last turn reads its first element in place of those beyond the end, so that its loads do not wait either.
                let left = (stop - i + lanes - 1u) / lanes;
#unroll j AHEAD
                let w$j = in_of(x[near + select(0u, ${j}u * step, ${j}u < left)]);
#end
#unroll j AHEAD
                let v$j = select(identity(), w$j, ${j}u < left);
#end
                block = combine(block, combine(combine(combine(v0, v1), combine(v2, v3)), combine(combine(v4, v5), combine(v6, v7))));
            }
        }
        sum = combine(sum, block);
    }
    tree[lane] = sum;
    workgroupBarrier();
    for (var reach = lanes >> 1u; reach > 0u; reach = reach >> 1u) {
        if t < reach { tree[lane] = combine(tree[lane], tree[lane + (reach << p.shift)]); }
        workgroupBarrier();
    }
    if t == 0u && column < p.inner {
        let to = piece * p.inner + column;
        let value = divided(tree[lane], p.divisor);
        y[to] = select(value, y[to] + value, p.add > 0u);
    }
}
