// y = the matrix [rows, columns] of a sharing kind, through the same load that matmul fuses, in f32 or rounded to 16 bits.

struct Params {
    groups_x: u32,
    site: vec4<u32>,    // the sharing kind's own numbers
}
var<immediate> p: Params;

fn site_numbers() -> vec4<u32> { return p.site; }

#import site = site_tied
#import private = private_none
#import pieces = site_pieces_of_1
#import out = out_piece
#import packed = packed_none
#import hash

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    let columns4 = (p.site.y + 3u) / 4u;
    let row = i / columns4;
    let col = (i % columns4) * 4u;
    if row >= p.site.x { return; }
    write(row, col, load_site(row, col));
}
