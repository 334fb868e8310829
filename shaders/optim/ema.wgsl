// Running averages e of tensors w, which lie in one buffer, as the averages do in another:
//     update: e += rest (w - e), which keeps an average of equal weights exactly
//     swap:   exchanges e and w, here called x
// One workgroup per chunk of at most 1024 elements of one tensor. Each array is read and written once. No derivative.

struct Params {
    groups_x: u32,
    count: u32,      // chunks
    rest: f32,       // 1 - decay
}
var<immediate> p: Params;

// Per chunk: first element of the tensor and of its average (multiples of 4), length, nothing.
@group(0) @binding(0) var<storage, read> chunks: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> w: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> e: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> x: array<vec4<f32>>;

#import chunk

@compute @workgroup_size(64)
fn update(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count { return; }
    let chunk = chunks[at];
    for (var i = lane; i < (chunk.z + 3u) / 4u; i += 64u) {
        let own = chunk.y / 4u + i;
        let old = e[own];
        let next = inside(w[chunk.x / 4u + i], i, chunk.z);
        // The difference of far apart numbers rounds, and a decay of 0 is w itself.
        e[own] = select(old + p.rest * (next - old), next, p.rest == 1.0);
    }
}

@compute @workgroup_size(64)
fn swap(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.count { return; }
    let chunk = chunks[at];
    for (var i = lane; i < (chunk.z + 3u) / 4u; i += 64u) {
        let own = chunk.y / 4u + i;
        let there = chunk.x / 4u + i;
        let average = e[own];
        e[own] = inside(x[there], i, chunk.z);
        x[there] = average;
    }
}
