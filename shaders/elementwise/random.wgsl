// Random fill: out[i] = draw(i) * scale + shift, the same bits on every adapter as rng::Stream on the host.
//
//   uniform   draw in [0, 1), steps of 2^-24
//   normal    standard normal, by inversion of one word
//
// Not differentiable. A thread computes one Philox block: elements 4 i .. 4 i + 3. `uniform` has no binding 1.
#import rng

struct P {
    n: u32,            // elements of out, at least 1
    groups_x: u32,     // workgroups along x, at most 65535
    key: vec2<u32>,    // the seed, low word first
    stream: vec2<u32>, // the stream's number, low word first
    scale: f32,        // large enough that draw * scale is not subnormal, which adapters may flush
    shift: f32,
}

@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@group(0) @binding(1) var<storage, read> normal_table: array<u32>;
var<immediate> p: P;

fn words(i: u32) -> vec4<u32> {
    return philox(vec4<u32>(i, p.stream.x, p.stream.y, 0u), p.key);
}

// Rounds twice, as the host does. A driver that contracts `draw * scale + shift` to an fma would round only once. To prevent
// that, the product is converted to integers and combined with a zero that the compiler cannot know: the top bit of groups_x.
fn place(draw: f32) -> f32 {
    let scaled = bitcast<f32>(bitcast<u32>(draw * p.scale) ^ (p.groups_x >> 31u));
    return scaled + p.shift;
}

fn normal_draw(x: u32) -> f32 {
    let c = normal_cell(x);
    return normal_from_bits(x, normal_table[c], normal_table[c + 1u], normal_table[c + 2u]);
}

fn store(i: u32, values: vec4<f32>) {
    let e = 4u * i;
    if e + 3u < p.n {
        out[e] = values.x;
        out[e + 1u] = values.y;
        out[e + 2u] = values.z;
        out[e + 3u] = values.w;
        return;
    }
    for (var k = 0u; e + k < p.n; k++) {
        out[e + k] = values[k];
    }
}

@compute @workgroup_size(64)
fn uniform(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = (wid.y * p.groups_x + wid.x) * 64u + lid;
    // The test is on i, because 4 i wraps for spare threads near 2^32 elements.
    if i > (p.n - 1u) >> 2u {
        return;
    }
    let w = words(i);
    store(i, vec4<f32>(
        place(uniform_from_bits(w.x)),
        place(uniform_from_bits(w.y)),
        place(uniform_from_bits(w.z)),
        place(uniform_from_bits(w.w)),
    ));
}

@compute @workgroup_size(64)
fn normal(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = (wid.y * p.groups_x + wid.x) * 64u + lid;
    if i > (p.n - 1u) >> 2u {
        return;
    }
    let w = words(i);
    store(i, vec4<f32>(
        place(normal_draw(w.x)),
        place(normal_draw(w.y)),
        place(normal_draw(w.z)),
        place(normal_draw(w.w)),
    ));
}
