// concat: y[outer, start + i, inner] = x[outer, i, inner]. There is one dispatch per input, and all write the same output.
// pad:    y[outer, i, inner] = x[outer, i - start, inner] inside, 0 outside. The gradient of pad has the layout of concat's
//         inputs.
// Elements are moved as 32-bit words of any type.

struct Params {
    n: u32,         // elements: of x in concat, of y in pad
    groups_x: u32,
    x_row: u32,     // elements of x per outer index: its axis times the inner size
    y_row: u32,     // the same for y
    start: u32,     // elements of y before x in each row
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;

@compute @workgroup_size(64)
fn concat(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    y[(i / p.x_row) * p.y_row + p.start + i % p.x_row] = x[i];
}

@compute @workgroup_size(64)
fn pad(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let column = i % p.y_row;
    let inside = column >= p.start && column < p.start + p.x_row;
    let at = select(0u, (i / p.y_row) * p.x_row + column - p.start, inside);
    y[i] = select(0u, x[at], inside);
}
