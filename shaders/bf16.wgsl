// bf16 is the upper half of an f32; two to a word, low half first. Integer work on bits: no driver can flush or round.
// unpack: y[2 i] = low half of x[i] << 16, y[2 i + 1] = high half of x[i] << 16
// pack:   y[i] = round(x[2 i]) | round(x[2 i + 1]) << 16, to nearest, ties to even; NaN stays NaN

struct Params {
    groups_x: u32,
    n: u32, // elements, not words
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;

fn round(bits: u32) -> u32 {
    let upper = bits >> 16u;
    let rounded = (bits + 0x7fffu + (upper & 1u)) >> 16u;
    return select(rounded, upper | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

@compute @workgroup_size(64)
fn unpack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if 2u * i >= p.n { return; }
    let word = x[i];
    y[2u * i] = word << 16u;
    if 2u * i + 1u < p.n { y[2u * i + 1u] = word & 0xffff0000u; }
}

@compute @workgroup_size(64)
fn pack(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if 2u * i >= p.n { return; }
    var word = round(x[2u * i]);
    if 2u * i + 1u < p.n { word |= round(x[2u * i + 1u]) << 16u; }
    y[i] = word;
}
