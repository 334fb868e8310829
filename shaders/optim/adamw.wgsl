// One step of AdamW over every tensor of an arena, where s is the number of steps that changed the tensor, with this one:
//     g *= factor;  w *= 1 - lr wd,  or with COUPLED (Adam)  g += wd w
//     m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//     w -= lr (m / (1 - b1^s)) / (sqrt(v / (1 - b2^s)) + eps)
// lr is the step's learning rate times the group's scale. Nothing changes if the norm of all gradients is not finite.
// One workgroup per chunk of at most 1024 elements of one tensor. Each array is read and written once. No derivative.

const COUPLED: bool = false;

struct Params {
    groups_x: u32,
    count: u32,      // chunks
    lr: f32,
    eps: f32,
    beta1: f32,
    beta2: f32,
    rest1: f32,      // 1 - beta1
    rest2: f32,
    first: u32,      // chunks of the arenas before this one
}
var<immediate> p: Params;

// Per chunk: first element (a multiple of 4), length, bits of the group's lr_scale and weight_decay.
@group(0) @binding(0) var<storage, read> chunks: array<vec4<u32>>;
// The norm of all gradients, then the clipping factor.
@group(0) @binding(1) var<storage, read> norm: array<f32>;
@group(0) @binding(2) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> w: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> m: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> v: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> leaves: array<u32>;          // the tensor of each chunk of all arenas
// Per tensor: s, the bits of 1 / (1 - b1^s) and of 1 / (1 - b2^s), nothing.
@group(0) @binding(7) var<storage, read> taken: array<vec4<u32>>;

#import chunk

@compute @workgroup_size(64)
fn update(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count || !is_finite(norm[0]) { return; }
    let chunk = chunks[at];
    let lr = p.lr * bitcast<f32>(chunk.z);
    let decay = bitcast<f32>(chunk.w);
    let keep = select(1.0 - lr * decay, 1.0, COUPLED);
    let unbias = bitcast<vec2<f32>>(taken[leaves[p.first + at]].yz);
    let vectors = (chunk.y + 3u) / 4u;
    for (var i = lane; i < vectors; i += 64u) {
        let e = chunk.x / 4u + i;
        var dw = norm[1] * inside(g[e], i, chunk.y);
        if COUPLED { dw += decay * w[e]; }
        let first = p.beta1 * m[e] + p.rest1 * dw;
        let second = p.beta2 * v[e] + p.rest2 * dw * dw;
        m[e] = first;
        v[e] = second;
        w[e] = keep * w[e] - lr * (first * unbias.x) / (sqrt(second * unbias.y) + vec4<f32>(p.eps));
    }
}
