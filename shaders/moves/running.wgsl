// Moves an average towards a new value, in place: y += rate (x - y). Each array is read and written once. No derivative.
// A value that is not finite is left out, because no later one would repair the average.

struct Params {
    groups_x: u32,
    count: u32,
    rate: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.count { return; }
    if (bitcast<u32>(x[i]) & 0x7f800000u) == 0x7f800000u { return; }
    y[i] = y[i] + p.rate * (x[i] - y[i]);
}
