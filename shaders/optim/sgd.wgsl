// One step of gradient descent over every tensor of an arena:
//     g = factor g + wd w;   plain:    w -= lr g
//                            momentum: b = mu b + g;  w -= lr b,  with NESTEROV  w -= lr (g + mu b)
// lr is the step's learning rate times the group's scale. Nothing changes if the norm of all gradients is not finite.
// One workgroup per chunk of at most 1024 elements of one tensor. Each array is read and written once. No derivative.

const NESTEROV: bool = false;

struct Params {
    groups_x: u32,
    count: u32,      // chunks
    lr: f32,
    mu: f32,
}
var<immediate> p: Params;

// Per chunk: first element (a multiple of 4), length, bits of the group's lr_scale and weight_decay.
@group(0) @binding(0) var<storage, read> chunks: array<vec4<u32>>;
// The norm of all gradients, then the clipping factor.
@group(0) @binding(1) var<storage, read> norm: array<f32>;
@group(0) @binding(2) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> w: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> b: array<vec4<f32>>;

#import chunk

fn gradient(chunk: vec4<u32>, e: u32, i: u32) -> vec4<f32> {
    return norm[1] * inside(g[e], i, chunk.y) + bitcast<f32>(chunk.w) * w[e];
}

@compute @workgroup_size(64)
fn plain(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    let vectors = (chunk.y + 3u) / 4u;
    for (var i = lane; i < vectors; i += 64u) {
        let e = chunk.x / 4u + i;
        w[e] = w[e] - lr * gradient(chunk, e, i);
    }
}

@compute @workgroup_size(64)
fn momentum(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    let vectors = (chunk.y + 3u) / 4u;
    for (var i = lane; i < vectors; i += 64u) {
        let e = chunk.x / 4u + i;
        let dw = gradient(chunk, e, i);
        let velocity = p.mu * b[e] + dw;
        b[e] = velocity;
        w[e] = w[e] - lr * select(velocity, dw + p.mu * velocity, vec4<bool>(NESTEROV));
    }
}
