// forward:  d[e] = x[s_e] - x[t_e], edges e from node s_e to node t_e
// backward: dx[n] = sum over e with s_e = n of dd[e] - sum over e with t_e = n of dd[e], each in order
//
// A thread owns one number of the result.

struct Params {
    groups_x: u32,
    n: u32,        // threads
    width: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;                // positions; dd in the backward half
@group(0) @binding(1) var<storage, read> s: array<u32>;                // s_e; where a node's outgoing edges begin
@group(0) @binding(2) var<storage, read> t: array<u32>;                // t_e; where its incoming edges begin
@group(0) @binding(3) var<storage, read> outgoing: array<vec2<u32>>;   // edge, other node
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(5) var<storage, read> incoming: array<vec2<u32>>;

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let e = i / p.width;
    let c = i % p.width;
    y[i] = x[s[e] * p.width + c] - x[t[e] * p.width + c];
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let n = i / p.width;
    let c = i % p.width;
    var sum = 0.0;
    for (var j = s[n]; j < s[n + 1u]; j++) { sum += x[outgoing[j].x * p.width + c]; }
    for (var j = t[n]; j < t[n + 1u]; j++) { sum -= x[incoming[j].x * p.width + c]; }
    y[i] = sum;
}
