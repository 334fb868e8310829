// What the matmul cores and the fragments in their slots know of a product: its sizes, and where its operands lie.

struct Params {
    m: u32,
    n: u32,
    k: u32,
    batch_inner: u32,   // batches are (outer, inner): operands step by lhs.z, rhs.z and lhs.w, rhs.w elements
    lhs: vec4<u32>,     // offset, stride of the axis that is not contiguous, outer step, inner step
    rhs: vec4<u32>,     // likewise; for a weight that the load computes, the sharing kind's own numbers
    any: vec2<u32>,     // strides of the other axis, for loads with any strides
    rows: u32,          // number of rows from which a list of rows chooses
    part: u32,          // length of a part of the inner axis, k if there is one part; a multiple of every kernel's step
}
var<immediate> p: Params;

// The parts of the inner axis, each with a result of its own: item z of the grid is part z % parts of product z / parts.
fn parts_of_k() -> u32 { return (p.k + p.part - 1u) / p.part; }

// Where an item's part of the inner axis begins and ends.
fn range_of(z: u32) -> vec2<u32> {
    let first = z % parts_of_k() * p.part;
    return vec2<u32>(first, min(first + p.part, p.k));
}

// Where an item's operands begin.
fn lhs_at(z: u32) -> u32 {
    let batch = z / parts_of_k();
    return p.lhs.x + batch / p.batch_inner * p.lhs.z + batch % p.batch_inner * p.lhs.w;
}
fn rhs_at(z: u32) -> u32 {
    let batch = z / parts_of_k();
    return p.rhs.x + batch / p.batch_inner * p.rhs.z + batch % p.batch_inner * p.rhs.w;
}

// What slot `place` returns for a row that is not stored.
const NOWHERE: u32 = 0xffffffffu;

// A fragment of an operand says by LHS_BY_K or RHS_BY_K whether k is its contiguous axis in storage.

// Whether tiles may reach past the ends. If sizes are multiples of the tile's, they do not, and loads skip the checks.
const EDGES: bool = true;

fn row_at(row: u32) -> u32 { return select(row, min(row, p.m - 1u), EDGES); }
fn col_at(col: u32) -> u32 { return select(col, min(col, p.n - 1u), EDGES); }
fn k_at(k: u32) -> u32 { return select(k, min(k, p.k - 1u), EDGES); }
// x, or 0 past the end of the inner axis. It is selected rather than multiplied, because the repeated values may be
// infinite.
fn in_k(k: u32, x: vec4<f32>) -> vec4<f32> { return select(vec4<f32>(0.0), x, !EDGES || k < p.k); }
