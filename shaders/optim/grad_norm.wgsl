// norm = sqrt(sum of g^2 over all chunks) / own;  factor = min(1, clip / (norm + 1e-6)) / own, with 1 / own if clip is 0.
// own is the loss scale by which g is too large. It is 1 without one. A step since may have changed the scale that the next
// gradients get, which is `scale`.
// sum_chunks: one workgroup per chunk of at most 1024 elements of one tensor. Lane t takes vectors t, t + 64, ... in order,
//             followed by a fixed tree of 64. The sum goes to partials[first + chunk].
// finish:     one workgroup adds the partial sums of all arenas, in an order that depends only on their number, and counts norms
//             that are not finite. Such a norm lowers the scale, and `interval` finite ones in a row raise it. Both are events,
//             which the journal keeps with the step, the scale before and after, and a bit for each tensor whose own sum is not finite.
//             With a finite norm, each of the `present` tensors counts the step, by the fragment `count`.
// No derivative.

const SLOTS: u32 = 64u;
const ENTRY: u32 = 4u;
// 2^-60 and 2^60. The inverse of a scale and its square must be numbers too.
const LEAST_SCALE: f32 = 0x1p-60;
const MOST_SCALE: f32 = 0x1p60;

struct Params {
    groups_x: u32,
    count: u32,    // chunks of this arena, or of all arenas in `finish`
    first: u32,    // chunks of the arenas before this one
    clip: f32,
    leaf_words: u32,    // words with a bit for each tensor
    interval: u32,      // finite steps in a row that raise the scale, 0 for a scale that stays
    growth: f32,
    backoff: f32,
    inverse_growth: f32,
    inverse_backoff: f32,
    present: u32,       // tensors that count the step
}
var<immediate> p: Params;

// Per chunk: first element (a multiple of 4), length, bits of the group's lr_scale and weight_decay.
@group(0) @binding(0) var<storage, read> chunks: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> g: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> partials: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
// Steps without a finite norm, steps, events, nothing; then SLOTS events of ENTRY words and a bit for each tensor.
@group(0) @binding(4) var<storage, read_write> journal: array<atomic<u32>>;
@group(0) @binding(5) var<storage, read_write> scale: array<f32>;     // the scale, 1 / scale, finite steps since it changed
@group(0) @binding(9) var<storage, read> own: array<f32>;              // the scale of these gradients, and 1 / scale
@group(0) @binding(6) var<storage, read> leaves: array<u32>;          // the tensor of each chunk, then each tensor once

#import chunk
#import count = count_none

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

// The word of slot `slot` of the journal, which begins after four words of counts.
fn entry(slot: u32) -> u32 { return 4u + slot % SLOTS * (ENTRY + p.leaf_words); }

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
    let norm = sqrt(tree[0]) * own[1];
    let overflowed = !is_finite(norm);
    let events = atomicLoad(&journal[2]);
    if overflowed {
        // The bits of this slot are zeros since the event before it.
        for (var chunk = lane; chunk < p.count; chunk += 256u) {
            let leaf = leaves[chunk];
            if !is_finite(partials[chunk]) { atomicOr(&journal[entry(events) + ENTRY + leaf / 32u], 1u << (leaf % 32u)); }
        }
    } else {
        for (var i = lane; i < p.present; i += 256u) { count_step(leaves[p.count + i]); }
    }
    // The other lanes have read the count of events, and the scale, before the one below changes them.
    workgroupBarrier();
    if lane > 0u { return; }
    y[0] = norm;
    y[1] = select(1.0, min(1.0, p.clip / (norm + 1e-6)), p.clip > 0.0) * own[1];
    let step = atomicLoad(&journal[1]) + 1u;
    atomicStore(&journal[1], step);
    if overflowed { atomicStore(&journal[0], atomicLoad(&journal[0]) + 1u); }
    let before = scale[0];
    let good = select(scale[2] + 1.0, 0.0, overflowed);
    let raised = p.interval > 0u && good >= f32(p.interval) && before * p.growth <= MOST_SCALE;
    let lowered = p.interval > 0u && overflowed && before * p.backoff >= LEAST_SCALE;
    if lowered {
        scale[0] = before * p.backoff;
        scale[1] = scale[1] * p.inverse_backoff;
    } else if raised {
        scale[0] = before * p.growth;
        scale[1] = scale[1] * p.inverse_growth;
    }
    scale[2] = select(good, 0.0, raised);
    if overflowed || raised {
        let at = entry(events);
        atomicStore(&journal[at], step);
        atomicStore(&journal[at + 1u], bitcast<u32>(select(before, own[0], overflowed)));
        atomicStore(&journal[at + 2u], bitcast<u32>(scale[0]));
        atomicStore(&journal[at + 3u], select(0u, 1u, overflowed));
        for (var word = 0u; word < p.leaf_words; word++) { atomicStore(&journal[entry(events + 1u) + ENTRY + word], 0u); }
        atomicStore(&journal[2], events + 1u);
    }
}
