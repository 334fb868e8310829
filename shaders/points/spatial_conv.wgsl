// y[n,a,c] += sum over edges e of n:  k[e,a,c] v[m_e,a,c],   k[e,a,c] = sum_b basis[e,a,b] w[b,c]
//
// n and m_e are the ends of an edge. If n is the destination and m_e the source, this is the convolution x1 of h. If n is
// the source and m_e the destination, it is the gradient dh from dx1. Each node has a list of its edges, of which a
// launch takes those from `first` up to `last`. Nothing is scattered, so every run gives the same bits.
//
// forward: every edge has its own row of kernels, in registers only. A thread owns ORIENTATIONS x 4 CHANNELS numbers of
// one node and takes EDGES of its edges at a time, in the order of the list: a small matrix product of EDGES x
// ORIENTATIONS rows, times v, added to the node's sum. Each vector of the basis that is read serves 16 CHANNELS
// multiply-adds; w comes from the cache.
//
// messages: an edge and its reverse share a row, k[reverse,a] = k[e,opposite a], but different threads compute the two
// nodes that need it. So a matmul computes the kernels of a chunk of rows, and they are read back. This halves the
// arithmetic and costs 8 more bytes of traffic per element.
//
// products: m[e,a,c] = g[t_e,a,c] h[s_e,a,c], the gradient dk of a chunk's rows, plus g[s_e,a',c] h[t_e,a',c] with a'
// opposite a if the reverse shares the row. Then dw = m^T basis and dbasis = m w^T are matmuls.

const EDGES: u32 = 4u;
const ORIENTATIONS: u32 = 4u;
const CHANNELS: u32 = 4u;       // in vectors
const PAIRED: bool = false;     // whether an edge and its reverse may share a row
// For `messages` and `products`: orientations, and channels in vectors. As constants, they make divisions cheap.
const SIDES: u32 = 4u;
const WIDTH: u32 = 4u;
const BLOCKS: u32 = (WIDTH + CHANNELS - 1u) / CHANNELS;  // threads per row, each with every BLOCKS-th vector

struct Params {
    groups_x: u32,
    n: u32,             // threads
    orientations: u32,
    channels: u32,      // in vectors
    basis: u32,         // in vectors
    blocks_o: u32,      // number of blocks of ORIENTATIONS
    blocks_c: u32,      // number of blocks of CHANNELS
    first: u32,
    last: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> basis: array<vec4<f32>>;    // [edges, orientations, basis]
@group(0) @binding(1) var<storage, read> w: array<vec4<f32>>;        // [4 basis, channels]
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;        // [nodes, orientations, channels]
@group(0) @binding(3) var<storage, read> nodes: array<vec2<u32>>;    // node, where its entries of `pairs` begin; the last row marks the end
@group(0) @binding(4) var<storage, read> pairs: array<vec2<u32>>;    // twice an edge's row, plus 1 for the reverse; other node
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> opposite: array<u32>;
@group(0) @binding(8) var<storage, read> ends: array<vec4<u32>>;     // destination, source, 1 where the reverse shares the row
@group(0) @binding(9) var<storage, read> k: array<vec4<f32>>;        // [rows, orientations, channels]

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let node = i / (p.blocks_c * p.blocks_o);
    let a = i / p.blocks_c % p.blocks_o * ORIENTATIONS;
    let channel = i % p.blocks_c * CHANNELS;
    // Indices outside are replaced by the last one inside: their results are computed, and not stored.
#unroll o ORIENTATIONS
    let a$o = min(a + ${o}u, p.orientations - 1u);
#unroll c CHANNELS
    var y${o}_$c = vec4<f32>(0.0);
#end
#end
#unroll c CHANNELS
    let c$c = min(channel + ${c}u, p.channels - 1u);
#end
    let end = min(nodes[node].y + p.last, nodes[node + 1u].y);
    for (var j = nodes[node].y + p.first; j < end; j += EDGES) {
#unroll e EDGES
        let pair$e = pairs[min(j + ${e}u, end - 1u)];
        let live$e = select(0.0, 1.0, j + ${e}u < end);
#unroll o ORIENTATIONS
        let row${e}_$o = ((pair$e.x >> 1u) * p.orientations + a$o) * p.basis;
#unroll c CHANNELS
        var k${e}_${o}_$c = vec4<f32>(0.0);
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
        y[(nodes[node].x * p.orientations + a$o) * p.channels + c$c] += y${o}_$c;
    }
#end
#end
}

@compute @workgroup_size(64)
fn messages(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let node = i / (SIDES * BLOCKS);
    let a = i / BLOCKS % SIDES;
    let back = opposite[a];
    let end = min(nodes[node].y + p.last, nodes[node + 1u].y);
#unroll c CHANNELS
    let c$c = min(i % BLOCKS + ${c}u * BLOCKS, WIDTH - 1u);
    var sum$c = vec4<f32>(0.0);
#end
    for (var j = nodes[node].y + p.first; j < end; j++) {
        let pair = pairs[j];
        let row = ((pair.x >> 1u) * SIDES + select(a, back, (pair.x & 1u) != 0u)) * WIDTH;
        let other = (pair.y * SIDES + a) * WIDTH;
#unroll c CHANNELS
        sum$c = fma(k[row + c$c], v[other + c$c], sum$c);
#end
    }
    let to = (nodes[node].x * SIDES + a) * WIDTH;
#unroll c CHANNELS
    if i % BLOCKS + ${c}u * BLOCKS < WIDTH { y[to + c$c] += sum$c; }
#end
}

@compute @workgroup_size(64)
fn products(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let a = i / BLOCKS % SIDES;
    let own = ends[i / (BLOCKS * SIDES)];
    let here = own.x * SIDES * WIDTH;
    let there = own.y * SIDES * WIDTH;
    let paired = PAIRED && own.z != 0u;
    var back = 0u;
    if paired { back = opposite[a] * WIDTH; }
#unroll c CHANNELS
    let c$c = i % BLOCKS + ${c}u * BLOCKS;
    if c$c < WIDTH {
        var m$c = g[here + a * WIDTH + c$c] * v[there + a * WIDTH + c$c];
        if paired { m$c = fma(g[there + back + c$c], v[here + back + c$c], m$c); }
        y[i / BLOCKS * WIDTH + c$c] = m$c;
    }
#end
}
