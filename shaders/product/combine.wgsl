// Layers from a dictionary, all in one pass: w[l] = sum_s c[l, s] d[s] for L layers and S atoms of `size` elements.
//
// Backward in one pass over dw and d:   dd[s] = sum_l c[l, s] dw[l],   dc[l, s] = <dw[l], d[s]>.
// A thread keeps four neighbouring elements of every atom in registers. Traffic, in sizes of an atom: forward reads S and
// writes L, backward reads L + S and writes S. Layer by layer, the same would take L (S + 1) and 5 S L.
// Source: MASA, arXiv 2508.04581, section 3.

const ATOMS: u32 = 4u;
const LAYERS: u32 = 4u;    // layers per backward pass: their sums of dc are in registers
const ACCUMULATE: bool = false;

struct Params {
    width: u32,      // elements of an atom, in vectors
    layers: u32,     // number of layers of the forward pass
    first: u32,      // the first layer of this backward pass
    threads: u32,    // threads that share the backward pass
    groups_x: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> d: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> c: array<f32>;
@group(0) @binding(2) var<storage, read_write> w: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dw: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> dd: array<vec4<f32>>;
// [layers of the pass * atoms, threads]; a second pass adds them up.
@group(0) @binding(5) var<storage, read_write> dc: array<f32>;

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.width { return; }
#unroll s ATOMS
    let d$s = d[${s}u * p.width + i];
#end
    for (var l = 0u; l < p.layers; l++) {
        var sum = vec4<f32>(0.0);
#unroll s ATOMS
        sum = fma(vec4<f32>(c[l * ATOMS + ${s}u]), d$s, sum);
#end
        w[l * p.width + i] = sum;
    }
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let thread = group.x * 64u + lane;
#unroll l LAYERS
#unroll s ATOMS
    let c${l}_$s = c[(p.first + ${l}u) * ATOMS + ${s}u];
    var dc${l}_$s = 0.0;
#end
#end
    for (var i = thread; i < p.width; i += p.threads) {
#unroll s ATOMS
        let d$s = d[${s}u * p.width + i];
        var dd$s = vec4<f32>(0.0);
        if ACCUMULATE { dd$s = dd[${s}u * p.width + i]; }
#end
#unroll l LAYERS
        let dw$l = dw[(p.first + ${l}u) * p.width + i];
#unroll s ATOMS
        dd$s = fma(vec4<f32>(c${l}_$s), dw$l, dd$s);
        dc${l}_$s += dot(dw$l, d$s);
#end
#end
#unroll s ATOMS
        dd[${s}u * p.width + i] = dd$s;
#end
    }
#unroll l LAYERS
#unroll s ATOMS
    dc[(${l}u * ATOMS + ${s}u) * p.threads + thread] = dc${l}_$s;
#end
#end
}
