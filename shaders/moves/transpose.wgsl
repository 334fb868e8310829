// y[b, r, c] = x[b, c, r]: a transposed copy, for sizes and strides that are multiples of 4. Any 32-bit type.
//
// A thread transposes a block of 4 x 4. A workgroup of 8 x 8 threads reads and writes 128 bytes of each row, so neither side
// wastes cache lines. Bytes: each element is read once and written once.

struct Params {
    rows: u32,       // rows of y, in blocks of 4
    cols: u32,
    offset: u32,     // offset and strides of x, in vectors
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
