// forward:  y[i, c] = table[ids[i], c]; an id outside the table gives zeros.
// backward: dtable[r, c] (+)= sum over positions i with ids[i] = r of dy[i, c], in rising order of i.
//
// The adjoint has no atomics: `order` lists the positions sorted by id (stable), so the positions of row r are one run of
// it. Every workgroup finds its row's run by binary search and its lanes walk it, each for its own columns: every element
// of dy is read once, whatever the ids. Cost beyond that: log2(n) reads a row, and the sort.

struct Params {
    groups_x: u32,
    rows: u32,        // of the table
    width: u32,
    n: u32,           // ids
    accumulate: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;   // the table, or dy
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.n * p.width { return; }
    let id = ids[at / p.width];
    let inside = id < p.rows;
    y[at] = select(0.0, x[select(0u, id, inside) * p.width + at % p.width], inside);
}

/// The first place in `order` whose id is not below `row`.
fn lower(row: u32) -> u32 {
    var first = 0u;
    var last = p.n;
    while first < last {
        let middle = (first + last) / 2u;
        if ids[order[middle]] < row { first = middle + 1u; } else { last = middle; }
    }
    return first;
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * p.groups_x + group.x;
    if row >= p.rows { return; }
    let first = lower(row);
    let last = lower(row + 1u);
    for (var c = lane; c < p.width; c += 64u) {
        var sum = 0.0;
        for (var i = first; i < last; i++) {
            sum += x[order[i] * p.width + c];
        }
        let at = row * p.width + c;
        if p.accumulate == 1u { y[at] = y[at] + sum; } else { y[at] = sum; }
    }
}
