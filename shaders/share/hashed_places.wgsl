// Where each weight of a hashed matrix (lib/site_hashed.wgsl) reads the store, and what its gradient adds there:
// places[w] = position(offset + w), parts[w] = scale * sign(offset + w) * dW[w]. The gradient is the sum of parts of equal places.

struct Params {
    groups_x: u32,
    site: vec4<u32>,    // the sharing kind's own numbers: rows, columns, offset, bits of scale
}
var<immediate> p: Params;

fn site_numbers() -> vec4<u32> { return p.site; }

@group(0) @binding(0) var<storage, read> dw: array<f32>;
@group(0) @binding(2) var<storage, read_write> places: array<u32>;
@group(0) @binding(3) var<storage, read_write> parts: array<f32>;

#import site = site_hashed
#import hash

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let w = (group.y * p.groups_x + group.x) * 64u + lane;
    if w >= p.site.x * p.site.y { return; }
    let i = p.site.z + w;
    places[w] = position(i, w / p.site.y, w % p.site.y);
    let part = bitcast<f32>(p.site.w) * dw[w];
    parts[w] = select(part, -part, (hash(i, SIGN_SEED) & 1u) == 1u);
}
