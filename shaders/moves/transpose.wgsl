// y[b, r, c] = x[b, c, r]: a copy whose rows were columns, for sizes and steps that are multiples of 4. Any 32-bit type.
//
// A thread turns a block of 4 x 4; 8 x 8 threads read and write 128 bytes of each row that they touch, so that neither
// side wastes memory lines. Bytes: each element once in, once out.

struct Params {
    rows: u32,       // of y, in blocks of 4
    cols: u32,
    offset: u32,     // of x, in vectors; then the steps of its batches and rows
    batch_step: u32,
    row_step: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let r = group.x * 8u + lane % 8u;
    let c = group.y * 8u + lane / 8u;
    if r >= p.rows || c >= p.cols { return; }
    let at = p.offset + group.z * p.batch_step + c * 4u * p.row_step + r;
#unroll j 4
    let x$j = x[at + ${j}u * p.row_step];
#end
    let to = (group.z * p.rows + r) * 4u * p.cols + c;
#unroll i 4
    y[to + ${i}u * p.cols] = vec4<u32>(x0.$xyzw{i}, x1.$xyzw{i}, x2.$xyzw{i}, x3.$xyzw{i});
#end
}
