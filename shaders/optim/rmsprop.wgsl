// One step of RMSprop over every tensor of an arena:
//     g = factor g + wd w;  v = alpha v + (1 - alpha) g^2
//     plain:    d = g / (sqrt(v) + eps)
//     centered: m = alpha m + (1 - alpha) g;  d = g / (sqrt(max(v - m^2, 0)) + eps)
//     w -= lr d,  with momentum  b = mu b + d;  w -= lr b
// lr is the step's learning rate times the group's scale. Nothing changes if the norm of all gradients is not finite.
// One workgroup per chunk of at most 1024 elements of one tensor. Each array is read and written once. No derivative.

struct Params {
    groups_x: u32,
    count: u32,      // chunks
    lr: f32,
    alpha: f32,
    rest: f32,       // 1 - alpha
    eps: f32,
    mu: f32,
}
var<immediate> p: Params;

// Per chunk: first element (a multiple of 4), length, bits of the group's lr_scale and weight_decay.
@group(0) @binding(0) var<storage, read> chunks: array<vec4<u32>>;
// The norm of all gradients, then the clipping factor.
@group(0) @binding(1) var<storage, read> norm: array<f32>;
@group(0) @binding(2) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> w: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> m: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> b: array<vec4<f32>>;

#import chunk

fn gradient(chunk: vec4<u32>, e: u32, i: u32) -> vec4<f32> {
    return norm[1] * inside(g[e], i, chunk.y) + bitcast<f32>(chunk.w) * w[e];
}

// The new mean square.
fn square_mean(e: u32, dw: vec4<f32>) -> vec4<f32> {
    let mean = p.alpha * v[e] + p.rest * dw * dw;
    v[e] = mean;
    return mean;
}

// The direction of a step, from the gradient divided by its root mean square.
fn scaled(e: u32, dw: vec4<f32>) -> vec4<f32> {
    return dw / (sqrt(square_mean(e, dw)) + vec4<f32>(p.eps));
}

// Likewise, from the gradient divided by its standard deviation.
fn standardized(e: u32, dw: vec4<f32>) -> vec4<f32> {
    let mean = p.alpha * m[e] + p.rest * dw;
    m[e] = mean;
    let variance = max(square_mean(e, dw) - mean * mean, vec4<f32>(0.0));
    return dw / (sqrt(variance) + vec4<f32>(p.eps));
}

fn velocity(e: u32, direction: vec4<f32>) -> vec4<f32> {
    let moved = p.mu * b[e] + direction;
    b[e] = moved;
    return moved;
}

@compute @workgroup_size(64)
fn plain(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    for (var i = lane; i < (chunk.y + 3u) / 4u; i += 64u) {
        let e = chunk.x / 4u + i;
        w[e] = w[e] - lr * scaled(e, gradient(chunk, e, i));
    }
}

@compute @workgroup_size(64)
fn momentum(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    for (var i = lane; i < (chunk.y + 3u) / 4u; i += 64u) {
        let e = chunk.x / 4u + i;
        w[e] = w[e] - lr * velocity(e, scaled(e, gradient(chunk, e, i)));
    }
}

@compute @workgroup_size(64)
fn centered(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    for (var i = lane; i < (chunk.y + 3u) / 4u; i += 64u) {
        let e = chunk.x / 4u + i;
        w[e] = w[e] - lr * standardized(e, gradient(chunk, e, i));
    }
}

@compute @workgroup_size(64)
fn centered_momentum(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    for (var i = lane; i < (chunk.y + 3u) / 4u; i += 64u) {
        let e = chunk.x / 4u + i;
        w[e] = w[e] - lr * velocity(e, standardized(e, gradient(chunk, e, i)));
    }
}
