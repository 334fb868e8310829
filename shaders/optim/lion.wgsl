// One step of Lion over every tensor of an arena:
//     g *= factor;  w *= 1 - lr wd;  w -= lr sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g
// lr is the step's learning rate times the group's scale. Nothing changes if the norm of all gradients is not finite.
// One workgroup per chunk of at most 1024 elements of one tensor. Each array is read and written once. No derivative.

struct Params {
    groups_x: u32,
    count: u32,      // chunks
    lr: f32,
    beta1: f32,
    rest1: f32,      // 1 - beta1
    beta2: f32,
    rest2: f32,
}
var<immediate> p: Params;

// Per chunk: first element (a multiple of 4), length, bits of the group's lr_scale and weight_decay.
@group(0) @binding(0) var<storage, read> chunks: array<vec4<u32>>;
// The norm of all gradients, then the clipping factor.
@group(0) @binding(1) var<storage, read> norm: array<f32>;
@group(0) @binding(2) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> w: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> m: array<vec4<f32>>;

#import chunk

@compute @workgroup_size(64)
fn update(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    let keep = 1.0 - lr * bitcast<f32>(chunk.w);
    let vectors = (chunk.y + 3u) / 4u;
    for (var i = lane; i < vectors; i += 64u) {
        let e = chunk.x / 4u + i;
        let dw = norm[1] * inside(g[e], i, chunk.y);
        let old = m[e];
        w[e] = keep * w[e] - lr * sign(p.beta1 * old + p.rest1 * dw);
        m[e] = p.beta2 * old + p.rest2 * dw;
    }
}
