// y[i] = x[i] * scale where draw(i) >= rate, else 0, with scale = 1 / (1 - rate); draw(i) is element i of a uniform stream.
// dx[i] = dy[i] * scale where draw(i) >= rate, else 0: the same kernel on dy. The mask is not stored but drawn again.
//
// A thread computes one Philox block: elements 4 i .. 4 i + 3.
#import rng

struct Params {
    n: u32,            // elements, at least 1
    groups_x: u32,
    key: vec2<u32>,    // the seed, low word first
    stream: vec2<u32>, // the stream's number, low word first
    rate: f32,
    scale: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

// By select, not by multiplication, so a dropped element is 0 even if x is not finite.
fn drop(i: u32, word: u32) {
    if i < p.n {
        y[i] = select(0.0, x[i] * p.scale, uniform_from_bits(word) >= p.rate);
    }
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    // The test is on i, because 4 i wraps for spare threads near 2^32 elements.
    if i > (p.n - 1u) >> 2u { return; }
    let words = philox(vec4<u32>(i, p.stream.x, p.stream.y, 0u), p.key);
    drop(4u * i, words.x);
    drop(4u * i + 1u, words.y);
    drop(4u * i + 2u, words.z);
    drop(4u * i + 3u, words.w);
}
