// y[n,a,c] (+)= sum over edges e of n:  k[e,a,c] v[m_e,a,c],   k[e,a,c] = sum_b basis[e,a,b] w[b,c]
//
// n and m_e are the ends of an edge: destination and source give the convolution x1 from h, source and destination its gradient
// dh from dx1. The kernels k exist in registers only. A thread owns ORIENTATIONS x 4 CHANNELS numbers of one node and takes
// EDGES of its edges at a time, in the order of the list: a small matrix product of EDGES x ORIENTATIONS rows, times v, added
// to the node's sum. Nothing is scattered, so the same bits come out each time.
// Per row of basis that is read, 16 CHANNELS multiply-adds; w comes from the cache.
//
// products: m[e,a,c] = g[t_e,a,c] h[s_e,a,c], the gradient dk of a run of edges; dw = m^T basis and dbasis = m w^T are matmuls.

const EDGES: u32 = 4u;
const ORIENTATIONS: u32 = 4u;
const CHANNELS: u32 = 4u;       // in vectors
const ACCUMULATE: bool = true;

struct Params {
    groups_x: u32,
    n: u32,             // threads
    first: u32,         // node of the first row of `starts`
    orientations: u32,
    channels: u32,      // in vectors
    basis: u32,         // in vectors
    blocks_o: u32,      // blocks of ORIENTATIONS
    blocks_c: u32,      // blocks of CHANNELS
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> basis: array<vec4<f32>>;    // [edges, orientations, basis]
@group(0) @binding(1) var<storage, read> w: array<vec4<f32>>;        // [4 basis, channels]
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;        // [nodes, orientations, channels]
@group(0) @binding(3) var<storage, read> starts: array<u32>;
@group(0) @binding(4) var<storage, read> pairs: array<vec2<u32>>;    // edge, other node; in `products` destination, source
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> g: array<vec4<f32>>;

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let node = i / (p.blocks_c * p.blocks_o);
    let a = i / p.blocks_c % p.blocks_o * ORIENTATIONS;
    let channel = i % p.blocks_c * CHANNELS;
    // What lies outside is computed from the last one inside, and not stored.
#unroll o ORIENTATIONS
    let a$o = min(a + ${o}u, p.orientations - 1u);
#unroll c CHANNELS
    var y${o}_$c = vec4<f32>();
#end
#end
#unroll c CHANNELS
    let c$c = min(channel + ${c}u, p.channels - 1u);
#end
    let end = starts[node + 1u];
    for (var j = starts[node]; j < end; j += EDGES) {
#unroll e EDGES
        let pair$e = pairs[min(j + ${e}u, end - 1u)];
        let live$e = select(0.0, 1.0, j + ${e}u < end);
#unroll o ORIENTATIONS
        let row${e}_$o = (pair$e.x * p.orientations + a$o) * p.basis;
#unroll c CHANNELS
        var k${e}_${o}_$c = vec4<f32>();
#end
#end
#end
        for (var b = 0u; b < p.basis; b++) {
#unroll c CHANNELS
#unroll r 4
            let w${r}_$c = w[(4u * b + ${r}u) * p.channels + c$c];
#end
#end
#unroll e EDGES
#unroll o ORIENTATIONS
            let b${e}_$o = basis[row${e}_$o + b];
#unroll c CHANNELS
#unroll r 4
            k${e}_${o}_$c = fma(vec4<f32>(b${e}_$o[$r]), w${r}_$c, k${e}_${o}_$c);
#end
#end
#end
#end
        }
#unroll e EDGES
#unroll o ORIENTATIONS
#unroll c CHANNELS
        y${o}_$c = fma(k${e}_${o}_$c * live$e, v[(pair$e.y * p.orientations + a$o) * p.channels + c$c], y${o}_$c);
#end
#end
#end
    }
#unroll o ORIENTATIONS
#unroll c CHANNELS
    if a + ${o}u < p.orientations && channel + ${c}u < p.channels {
        let at${o}_$c = ((p.first + node) * p.orientations + a$o) * p.channels + c$c;
        if ACCUMULATE { y${o}_$c += y[at${o}_$c]; }
        y[at${o}_$c] = y${o}_$c;
    }
#end
#end
}

@compute @workgroup_size(64)
fn products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let wide = p.orientations * p.channels;
    let ends = pairs[i / wide];
    y[i] = g[ends.x * wide + i % wide] * v[ends.y * wide + i % wide];
}
