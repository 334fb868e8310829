// forward:  d[e] = x[s_e] - x[t_e], edges e from node s_e to node t_e
// backward: dx[n] (+)= sum over e with s_e = n of dd[e] - sum over e with t_e = n of dd[e], each in order.
//           A launch takes the edges from `first` up to `last` in each node's lists, and adds if `first` is not 0.
//
// A thread owns one number of the result.

struct Params {
    groups_x: u32,
    n: u32,        // threads
    width: u32,
    first: u32,
    last: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;                // positions; dd in the backward half
@group(0) @binding(1) var<storage, read> s: array<u32>;                // s_e; where a node's outgoing edges begin
@group(0) @binding(2) var<storage, read> t: array<u32>;                // t_e; where its incoming edges begin
@group(0) @binding(3) var<storage, read> outgoing: array<vec2<u32>>;   // edge, other node
@group(0) @binding(4) var<storage, read_write> y: array<f32>;
@group(0) @binding(5) var<storage, read> incoming: array<vec2<u32>>;

#import cascade

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
    var sum = vec4<f32>();
    let out_last = min(s[n] + p.last, s[n + 1u]);
    for (var j = s[n] + p.first; j < out_last; j++) { sum = cascade_add(sum, x[outgoing[j].x * p.width + c]); }
    let in_last = min(t[n] + p.last, t[n + 1u]);
    for (var j = t[n] + p.first; j < in_last; j++) { sum = cascade_add(sum, -x[incoming[j].x * p.width + c]); }
    let before = select(0.0, y[i], p.first > 0u);
    y[i] = before + cascade_sum(sum);
}
