// forward: y[n,p,c] = s sum_a k[p,a,c] x[n,a,c] + bias[c]; with TURNED k[a,p,c], the gradient dx[n,a,c] = s sum_p k[p,a,c] dy[n,p,c]
// weights: dk[p,a,c] = s sum_n dy[n,p,c] x[n,a,c], in parts of the nodes, which a second pass adds up in order
//
// Orientations are few and channels many. A thread owns 4 channels of NODES x POINTS results, so that each vector of x
// and k is used several times. k is small enough for the cache.

const NODES: u32 = 4u;
const POINTS: u32 = 4u;
const TURNED: bool = false;
const BLOCK: u32 = 64u;    // nodes per partial sum: in one long sum, rounding errors would grow

struct Params {
    groups_x: u32,
    n: u32,          // threads
    nodes: u32,
    o: u32,          // orientations
    c: u32,          // channels, in vectors
    blocks: u32,     // number of blocks of POINTS
    span: u32,       // nodes per part
    scale: f32,
    biased: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;      // [nodes, o, c]
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;      // [o, o, c]
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;   // [c]; k is bound here if there is no bias
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> dy: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> dk: array<vec4<f32>>;  // [parts, o, o, c]

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let c = i % p.c;
    let first = i / p.c % p.blocks * POINTS;
    let node = i / (p.c * p.blocks) * NODES;
#unroll q POINTS
    let point$q = min(first + ${q}u, p.o - 1u);
#unroll m NODES
    var y${m}_$q = vec4<f32>(0.0);
#end
#end
#unroll m NODES
    let row$m = min(node + ${m}u, p.nodes - 1u) * p.o;
#end
    for (var a = 0u; a < p.o; a++) {
#unroll m NODES
        let x$m = x[(row$m + a) * p.c + c];
#end
#unroll q POINTS
        let k$q = k[select(point$q * p.o + a, a * p.o + point$q, TURNED) * p.c + c];
#unroll m NODES
        y${m}_$q = fma(k$q, x$m, y${m}_$q);
#end
#end
    }
    let shift = select(vec4<f32>(0.0), bias[c], p.biased != 0u);
#unroll q POINTS
#unroll m NODES
    if first + ${q}u < p.o && node + ${m}u < p.nodes { y[(row$m + point$q) * p.c + c] = fma(vec4<f32>(p.scale), y${m}_$q, shift); }
#end
#end
}

@compute @workgroup_size(64)
fn weights(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let c = i % p.c;
    let sender = i / p.c % p.blocks * POINTS;
    let receiver = i / (p.c * p.blocks) % p.blocks * POINTS;
    let part = i / (p.c * p.blocks * p.blocks);
#unroll q POINTS
    let sender$q = min(sender + ${q}u, p.o - 1u);
    let receiver$q = min(receiver + ${q}u, p.o - 1u);
#unroll r POINTS
    var sum${q}_$r = vec4<f32>(0.0);
#end
#end
    let last = min((part + 1u) * p.span, p.nodes);
    for (var start = part * p.span; start < last; start += BLOCK) {
        let stop = min(start + BLOCK, last);
#unroll q POINTS
#unroll r POINTS
        var block${q}_$r = vec4<f32>(0.0);
#end
#end
        for (var node = start; node < stop; node++) {
            let row = node * p.o;
#unroll q POINTS
            let x$q = x[(row + sender$q) * p.c + c];
            let g$q = dy[(row + receiver$q) * p.c + c];
#end
#unroll q POINTS
#unroll r POINTS
            block${q}_$r = fma(g$q, x$r, block${q}_$r);
#end
#end
        }
#unroll q POINTS
#unroll r POINTS
        sum${q}_$r += block${q}_$r;
#end
#end
    }
#unroll q POINTS
#unroll r POINTS
    if receiver + ${q}u < p.o && sender + ${r}u < p.o {
        dk[((part * p.o + receiver$q) * p.o + sender$r) * p.c + c] = p.scale * sum${q}_$r;
    }
#end
#end
}
