// y = the matrix [rows, columns] of a sharing kind, through the same load that matmul fuses.

struct Params {
    groups_x: u32,
    site: vec4<u32>,    // the sharing kind's own numbers
}
var<immediate> p: Params;

fn site_numbers() -> vec4<u32> { return p.site; }

@group(0) @binding(4) var<storage, read_write> y: array<f32>;

#import site = site_tied
#import hash

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    let columns4 = (p.site.y + 3u) / 4u;
    let row = i / columns4;
    let col = (i % columns4) * 4u;
    if row >= p.site.x { return; }
    let w = load_site(row, col);
    let at = row * p.site.y + col;
    y[at] = w.x;
    if col + 1u < p.site.y { y[at + 1u] = w.y; }
    if col + 2u < p.site.y { y[at + 2u] = w.z; }
    if col + 3u < p.site.y { y[at + 3u] = w.w; }
}
