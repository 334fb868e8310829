// Moves one tensor along random directions, each named by a number and scaled by a scalar:
//
//   w[e] = ((base[e] + c_0 z_0[e]) + c_1 z_1[e]) + ..        in the order of the moves
//   z_m  = standard normal of the Philox block (e / 4, m.x, m.y, leaf), rounded half up to 16 significant bits
//   c_m  = a + b, two numbers of at most 8 significant bits, added one after the other: (w + a z) + b z
//
// The products a z and b z have at most 24 bits and are exact in f32, so a compiler that contracts them with the addition to one
// fused operation changes nothing: the same bits on every adapter, and as on the host (src/optim/perturb.rs).
//
//   probe     writes w
//   advance   writes w and base
//
// A thread makes four elements. Bytes: 8 an element (advance: 12), whatever the number of moves; a move costs some 300 operations of
// integers for four elements. No derivative.
#import rng

struct P {
    n: u32,          // elements, at least 1
    groups_x: u32,   // workgroups along x, at most 65535
    moves: u32,
    leaf: u32,       // the tensor's number among the parameters
    key: vec2<u32>,  // the seed, low word first
}

// Per move: its number, low word first, and the bits of a and b.
@group(0) @binding(0) var<storage, read> moves: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> normal_table: array<u32>;
@group(0) @binding(2) var<storage, read> base: array<f32>;
@group(0) @binding(3) var<storage, read_write> w: array<f32>;
@group(0) @binding(4) var<storage, read_write> kept: array<f32>;
var<immediate> p: P;

// 16 of the 24 significant bits. A carry correctly raises the exponent.
fn direction(x: u32) -> f32 {
    let c = normal_cell(x);
    let z = normal_from_bits(x, normal_table[c], normal_table[c + 1u], normal_table[c + 2u]);
    return bitcast<f32>((bitcast<u32>(z) + 0x80u) & 0xffffff00u);
}

fn moved(i: u32, start: vec4<f32>) -> vec4<f32> {
    var sum = start;
    for (var m = 0u; m < p.moves; m++) {
        let move_ = moves[m];
        let x = philox(vec4<u32>(i, move_.x, move_.y, p.leaf), p.key);
        let z = vec4<f32>(direction(x.x), direction(x.y), direction(x.z), direction(x.w));
        sum = sum + bitcast<f32>(move_.z) * z;
        sum = sum + bitcast<f32>(move_.w) * z;
    }
    return sum;
}

fn block(wid: vec3<u32>, lid: u32) -> u32 {
    return (wid.y * p.groups_x + wid.x) * 64u + lid;
}

@compute @workgroup_size(64)
fn probe(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = block(wid, lid);
    // The test is on i, because 4 i wraps for spare threads near 2^32 elements.
    if i > (p.n - 1u) >> 2u { return; }
    let e = 4u * i;
    let count = min(p.n - e, 4u);
    var start = vec4<f32>();
    for (var k = 0u; k < count; k++) { start[k] = base[e + k]; }
    let end = moved(i, start);
    for (var k = 0u; k < count; k++) { w[e + k] = end[k]; }
}

@compute @workgroup_size(64)
fn advance(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = block(wid, lid);
    if i > (p.n - 1u) >> 2u { return; }
    let e = 4u * i;
    let count = min(p.n - e, 4u);
    var start = vec4<f32>();
    for (var k = 0u; k < count; k++) { start[k] = kept[e + k]; }
    let end = moved(i, start);
    for (var k = 0u; k < count; k++) {
        kept[e + k] = end[k];
        w[e + k] = end[k];
    }
}
