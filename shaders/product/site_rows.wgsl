// y[i] = row ids[i] of the matrix [rows, columns] of a sharing kind, through the load that products fuse: a lookup that computes the
// rows that it needs and no others. An id outside gives zeros. One thread makes four columns of one row.
// Derivative: dW[ids[i]] += dy[i], by the sum of embedding, then the kind's own adjoint.

struct Params {
    groups_x: u32,
    count: u32,         // ids
    site: vec4<u32>,    // the sharing kind's own numbers
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

fn site_numbers() -> vec4<u32> { return p.site; }

#import site = site_tied
#import private = private_none
#import packed = packed_none
#import hash

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let columns = p.site.y;
    let columns4 = (columns + 3u) / 4u;
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.count * columns4 { return; }
    let col = (i % columns4) * 4u;
    let row = ids[i / columns4];
    var four = vec4<f32>(0.0);
    // Not left to the kind, whose products never ask for rows so far outside.
    if row < p.site.x { four = load_site(row, col); }
    let at = i / columns4 * columns + col;
    y[at] = four.x;
    if col + 1u < columns { y[at + 1u] = four.y; }
    if col + 2u < columns { y[at + 2u] = four.z; }
    if col + 3u < columns { y[at + 3u] = four.w; }
}
