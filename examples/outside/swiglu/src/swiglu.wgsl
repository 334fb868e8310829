// y = silu(gate) up with silu(g) = g s and s = 1 / (1 + exp(-g)), element by element.
// Gradients: dgate = dy up s (1 + g (1 - s)), dup = dy silu(g).

// The library's own functions are accurate where WGSL's exp need not be. They work on vectors of four.
#import elementwise
#import exp_log
#import nan
#import f16
#import bf16

struct Params {
    groups_x: u32,    // set by the launch
    count: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> gate: array<f32>;
@group(0) @binding(1) var<storage, read> up: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> dy: array<f32>;
@group(0) @binding(4) var<storage, read_write> dgate: array<f32>;
@group(0) @binding(5) var<storage, read_write> dup: array<f32>;

fn sigmoid1(x: f32) -> f32 { return sigmoid(vec4<f32>(x)).x; }

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.count { return; }
    y[i] = gate[i] * sigmoid1(gate[i]) * up[i];
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.count { return; }
    let s = sigmoid1(gate[i]);
    dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
    dup[i] = dy[i] * gate[i] * s;
}
