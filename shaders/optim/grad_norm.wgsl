// norm = sqrt(sum of g^2 over all chunks);  factor = min(1, clip / (norm + 1e-6)), or 1 if clip is 0.
// sum_chunks: one workgroup per chunk of at most 1024 elements of one tensor. Lane t takes vectors t, t + 64, ... in order,
//             followed by a fixed tree of 64. The sum goes to partials[first + chunk].
// finish:     one workgroup adds the partial sums of all arenas, in an order that depends only on their number, and counts norms
//             that are not finite.
// No derivative.

struct Params {
    groups_x: u32,
    count: u32,    // chunks of this arena, or of all arenas in `finish`
    first: u32,    // chunks of the arenas before this one
    clip: f32,
}
var<immediate> p: Params;

// Per chunk: first element (a multiple of 4), length, bits of the group's lr_scale and weight_decay.
@group(0) @binding(0) var<storage, read> chunks: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> partials: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read_write> skipped: array<u32>;

#import chunk

var<workgroup> tree: array<f32, 256>;

@compute @workgroup_size(64)
fn sum_chunks(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if at >= p.count { return; }
    let chunk = chunks[at];
    let vectors = (chunk.y + 3u) / 4u;
    var sum = vec4<f32>(0.0);
    for (var i = lane; i < vectors; i += 64u) {
        let x = inside(g[chunk.x / 4u + i], i, chunk.y);
        sum += x * x;
    }
    tree[lane] = (sum.x + sum.y) + (sum.z + sum.w);
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step { tree[lane] += tree[lane + step]; }
        workgroupBarrier();
    }
    if lane == 0u { partials[p.first + at] = tree[0]; }
}

@compute @workgroup_size(256)
fn finish(@builtin(local_invocation_index) lane: u32) {
    // Four running sums have independent loads and shorter chains of rounding.
    var s0 = 0.0;
    var s1 = 0.0;
    var s2 = 0.0;
    var s3 = 0.0;
    var i = lane;
    for (; i + 768u < p.count; i += 1024u) {
        s0 += partials[i];
        s1 += partials[i + 256u];
        s2 += partials[i + 512u];
        s3 += partials[i + 768u];
    }
    for (; i < p.count; i += 256u) { s0 += partials[i]; }
    tree[lane] = (s0 + s1) + (s2 + s3);
    workgroupBarrier();
    for (var step = 128u; step > 0u; step = step >> 1u) {
        if lane < step { tree[lane] += tree[lane + step]; }
        workgroupBarrier();
    }
    if lane == 0u {
        let norm = sqrt(tree[0]);
        y[0] = norm;
        y[1] = select(1.0, min(1.0, p.clip / (norm + 1e-6)), p.clip > 0.0);
        if !is_finite(norm) { skipped[0] += 1u; }
    }
}
