// concat: y[outer, start + i, inner] = x[outer, i, inner]. There is one dispatch per input, and all write the same output.
// pad:    y[outer, i, inner] = x[outer, i - start, inner] inside, 0 outside. The gradient of pad has the layout of concat's
//         inputs.
// Elements are moved as 32-bit words of any type, two of f16 in each, and four words at a time if all rows are whole vectors. On an
// H200, 64 threads x 32 workgroups x 132 multiprocessors x 16 bytes are 4.3 MB in flight, where bandwidth times latency is about
// 2.4 MB. Bytes: x is read once, y written once.

alias Elem = u32;

struct Params {
    n: u32,         // elements, here and below in Elem: of x in concat, of y in pad
    groups_x: u32,
    x_row: u32,     // elements of x per outer index: its axis times the inner size
    y_row: u32,     // the same for y
    start: u32,     // elements of y before x in each row
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read_write> y: array<Elem>;

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
    y[i] = select(Elem(0u), x[at], inside);
}
