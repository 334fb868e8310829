// Measures the adapter's rate of copying, y = x. A thread copies SPAN vec4 that are LANES apart, so neighbouring lanes always
// read and write neighbouring words. A workgroup copies SPAN x LANES vec4. Loads come before stores, so many are in flight.

const LANES: u32 = 256u;
const SPAN: u32 = 4u;

struct Params {
    groups_x: u32,
    count: u32,      // number of vec4, a multiple of SPAN x LANES
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = (group.y * p.groups_x + group.x) * SPAN * LANES;
    if first >= p.count { return; }
    let at = first + lane;
#unroll i SPAN
    let v$i = x[at + ${i}u * LANES];
#end
#unroll i SPAN
    y[at + ${i}u * LANES] = v$i;
#end
}
