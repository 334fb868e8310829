// y = silu(gate) up with silu(g) = g s and s = 1 / (1 + exp(-g)), element by element.
// Gradients: dgate = dy up s (1 + g (1 - s)), dup = dy silu(g).

// Arrays are padded to whole vectors of four, so the last vector may be read and written as a whole.

// The library's own functions are accurate where WGSL's exp need not be.
#import elementwise
#import exp_log
#import nan
#import f16
#import bf16

struct Params {
    groups_x: u32,    // set by the launch
    vectors: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> gate: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> up: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> dgate: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> dup: array<vec4<f32>>;

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.vectors { return; }
    let g = gate[i];
    y[i] = g * sigmoid(g) * up[i];
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.vectors { return; }
    let g = gate[i];
    let d = dy[i];
    let s = sigmoid(g);
    dgate[i] = d * up[i] * s * (1.0 + g * (1.0 - s));
    dup[i] = d * g * s;
}
