// Conversion between f32 and bf16, which is the upper half of an f32. A word has two bf16, the low half first. All arithmetic is
// on integers, which no driver can flush or round.
// unpack: y[2 i] = low half of x[i] << 16, y[2 i + 1] = high half of x[i] << 16
// pack:   y[i] = round(x[2 i]) | round(x[2 i + 1]) << 16, to nearest, ties to even; NaN stays NaN

struct Params {
    groups_x: u32,
    n: u32, // elements
}
var<immediate> p: Params;

// A thread converts eight elements. Buffers are padded to a multiple of four words.
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>;

fn round(bits: vec4<u32>) -> vec4<u32> {
    let upper = bits >> vec4(16u);
    let rounded = (bits + vec4(0x7fffu) + (upper & vec4(1u))) >> vec4(16u);
    return select(rounded, upper | vec4(0x40u), (bits & vec4(0x7fffffffu)) > vec4(0x7f800000u));
}

@compute @workgroup_size(64)
fn unpack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    // The test is on i, because 8 i wraps for spare threads near 2^32 elements.
    if i > (p.n - 1u) / 8u { return; }
    let words = x[i];
    let low = words << vec4(16u);
    let high = words & vec4(0xffff0000u);
    y[2u * i] = vec4(low.x, high.x, low.y, high.y);
    if p.n - 8u * i > 4u { y[2u * i + 1u] = vec4(low.z, high.z, low.w, high.w); }
}

@compute @workgroup_size(64)
fn pack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i > (p.n - 1u) / 8u { return; }
    let a = round(x[2u * i]);
    var b = vec4(0u);
    if p.n - 8u * i > 4u { b = round(x[2u * i + 1u]); }
    y[i] = vec4(a.x | (a.y << 16u), a.z | (a.w << 16u), b.x | (b.y << 16u), b.z | (b.w << 16u));
}
