// y[i] = sum over parts of sums[part, i, .. out] + h[i] B[d], for rows i at depths d = depths[i], where
// h[i] = scale * sum over parts of sums[part, i, out + rank d .. out + rank (d + 1)]: the second pass of products with a
// shared matrix of `out` rows, below which the matrices A of all depths are stacked. B is [depths, rank, out]. A row at a
// depth that does not exist has no low-rank part.
//
// A workgroup has one row and 64 pieces of it, of four columns each (Elem = vec4) or one. Its threads first add up h,
// CHUNK ranks at a time, which all of them then multiply with their columns of B.
// Bytes: sums once, of the low-rank columns those of the row's depth once for every workgroup of a row; one depth of B a row,
// from cache; y once.

alias Elem = f32;
const CHUNK: u32 = 64u;

struct Params {
    rows: u32,
    out: u32,      // columns of y, in pieces
    width: u32,    // columns of sums, in pieces
    parts: u32,
    depths: u32,
    rank: u32,
    first: u32,    // the first column of the low-rank parts
    columns: u32,  // columns of sums
    scale: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> sums: array<Elem>;
@group(0) @binding(1) var<storage, read> low: array<f32>;   // the same as sums, by elements
@group(0) @binding(2) var<storage, read> back: array<Elem>;
@group(0) @binding(3) var<storage, read> depths: array<u32>;
@group(0) @binding(4) var<storage, read_write> y: array<Elem>;

var<workgroup> h: array<f32, CHUNK>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y;
    let piece = group.x * 64u + lane;
    // Threads past the end read the last piece, for the barriers' sake, and store nothing.
    let near = min(piece, p.out - 1u);
    var sum = Elem(0.0);
    for (var part = 0u; part < p.parts; part += 4u) {
#unroll q 4
        let last$q = min(part + ${q}u, p.parts - 1u);
        let x$q = select(Elem(0.0), sums[(last$q * p.rows + row) * p.width + near], part + ${q}u < p.parts);
#end
        sum += (x0 + x1) + (x2 + x3);
    }
    let depth = depths[row];
    let rank = select(0u, p.rank, depth < p.depths);
    for (var r0 = 0u; r0 < p.rank; r0 += CHUNK) {
        if r0 + lane < rank {
            let at = row * p.columns + p.first + depth * p.rank + r0 + lane;
            var own = 0.0;
            for (var part = 0u; part < p.parts; part++) { own += low[part * p.rows * p.columns + at]; }
            h[lane] = own * p.scale;
        }
        workgroupBarrier();
        for (var r = r0; r < min(r0 + CHUNK, rank); r++) {
            sum += h[r - r0] * back[(depth * p.rank + r) * p.out + near];
        }
        workgroupBarrier();
    }
    if piece < p.out { y[row * p.out + piece] = sum; }
}
