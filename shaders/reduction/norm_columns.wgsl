// dg = sum over rows of dy x^,  db = sum over rows of dy: norm.wgsl's `columns` for GPUs, with workgroups as in reduce_columns.wgsl.
// The result is [parts, 2, width], which is the gradient itself if there is one part.
//
// A thread has the loads of AHEAD rows under way: 8 vectors of 16 bytes, and the rows' statistics, which all columns share. 256 rows
// of 768 are 48 workgroups x 256 threads that read everything in one round, and need no second pass. 4096 rows are 258 workgroups
// with 16.9 MB in flight. Bytes: x and dy are read once. Workgroup memory: 8 KiB.

const THREADS: u32 = 256u;
const AHEAD: u32 = 4u;
const BLOCK: u32 = 32u;     // turns of AHEAD rows

struct Params {
    groups_x: u32,
    groups: u32,
    rows: u32,
    width: u32,
    span: u32,        // rows per part
    shift: u32,       // the columns of a workgroup are 2^shift, of a Piece each
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<In>;
@group(0) @binding(1) var<storage, read> statistics: array<f32>;
@group(0) @binding(2) var<storage, read> dy: array<Grad>;
@group(0) @binding(3) var<storage, read_write> partial: array<Piece>;

#import piece = piece_4
#import in = in_piece
#import grad = grad_piece
#import packed = packed_none

var<workgroup> tree_g: array<Piece, THREADS>;
var<workgroup> tree_b: array<Piece, THREADS>;

@compute @workgroup_size(THREADS)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if at >= p.groups { return; }
    let wide = 1u << p.shift;
    let lanes = THREADS >> p.shift;
    let width = p.width / PIECE;
    let across = (width + wide - 1u) >> p.shift;
    let part = at / across;
    let column = ((at % across) << p.shift) + (lane & (wide - 1u));
    let t = lane >> p.shift;
    let first = part * p.span;
    // Threads beyond the last column walk nothing, but take part in the barriers.
    let last = select(first, min(first + p.span, p.rows), column < width);
    var dg = Piece(0.0);
    var db = Piece(0.0);
    for (var start = first + t; start < last; start += AHEAD * BLOCK * lanes) {
        let stop = min(start + AHEAD * BLOCK * lanes, last);
        var block_g = Piece(0.0);
        var block_b = Piece(0.0);
        for (var row = start; row < stop; row += AHEAD * lanes) {
            // The last turn reads its first row in place of those beyond the end, so that no load waits for another.
#unroll j AHEAD
            let row$j = select(row, row + ${j}u * lanes, row + ${j}u * lanes < stop);
            let x$j = in_of(x[row$j * width + column]);
            let dy$j = grad_of(dy[row$j * width + column]);
            let mean$j = statistics[3u * row$j];
            let r$j = statistics[3u * row$j + 1u];
            let q$j = statistics[3u * row$j + 2u];
#end
#unroll j AHEAD
            let d$j = select(Piece(0.0), dy$j, row + ${j}u * lanes < stop);
            block_b += d$j;
            block_g = select(block_g, fma(d$j, (x$j - mean$j) * r$j + q$j, block_g), row + ${j}u * lanes < stop);
#end
        }
        dg += block_g;
        db += block_b;
    }
    tree_g[lane] = dg;
    tree_b[lane] = db;
    workgroupBarrier();
    for (var reach = lanes >> 1u; reach > 0u; reach = reach >> 1u) {
        if t < reach {
            tree_g[lane] += tree_g[lane + (reach << p.shift)];
            tree_b[lane] += tree_b[lane + (reach << p.shift)];
        }
        workgroupBarrier();
    }
    if t == 0u && column < width {
        partial[2u * part * width + column] = tree_g[lane];
        partial[(2u * part + 1u) * width + column] = tree_b[lane];
    }
}
