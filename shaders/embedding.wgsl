// select:   y[o, i, c] = x[o, ids[i], c] for x [outer, rows, inner]; an embedding has outer = 1. Words of any type.
// sum_rows: its adjoint, dx[o, r, c] (+)= sum over i with ids[i] = r of dy[o, i, c], in rising order of i.
// gather:   y[o, i, c] = x[o, ids[o, i, c], c]; clear and sum_cells: its adjoint.
// Ids outside the rows give zeros, and take nothing in the adjoints.
//
// The adjoints have no atomics: `order` lists the places sorted by destination (stable), so what goes to one
// destination is one run of it, added by one thread.
// sum_rows:  `starts` has where each row's run begins, by binary search: log2(n) reads a row. A thread owns an element
//            of dx, and four partial sums keep four loads in flight; dy is read once and dx written once. With
//            accumulation, rows that nothing points to are not touched.
// sum_cells: `cells` numbers the element of x behind each id; after the sort the first thread of each run adds the run.
// The sort costs about log2(n / 2048) passes over 16 n bytes. A row that is used by most of n places is one long sum
// for each of its columns: slow on a GPU, but in order.

alias Elem = u32;       // what select moves
alias Float = f32;      // what sum_rows adds

struct Params {
    groups_x: u32,
    n: u32,         // threads
    rows: u32,
    inner: u32,     // in Elem or Float
    count: u32,     // ids along the axis; all ids for sum_cells
    accumulate: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read_write> found: array<u32>;
@group(0) @binding(5) var<storage, read> starts: array<u32>;
@group(0) @binding(6) var<storage, read> dy: array<Float>;
@group(0) @binding(7) var<storage, read_write> dx: array<Float>;

fn thread(group: vec3<u32>, lane: u32) -> u32 {
    return (group.y * p.groups_x + group.x) * 64u + lane;
}

@compute @workgroup_size(64)
fn select_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let place = at / p.inner;
    let id = ids[place % p.count];
    if id >= p.rows {
        y[at] = Elem();
        return;
    }
    y[at] = x[(place / p.count * p.rows + id) * p.inner + at % p.inner];
}

// The first place in `order` whose id is not below `row`.
@compute @workgroup_size(64)
fn find_starts(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = thread(group, lane);
    if row >= p.n { return; }
    var first = 0u;
    var last = p.count;
    while first < last {
        let middle = (first + last) / 2u;
        if ids[order[middle]] < row { first = middle + 1u; } else { last = middle; }
    }
    found[row] = first;
}

@compute @workgroup_size(64)
fn sum_rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let row = at / p.inner % p.rows;
    let last = starts[row + 1u];
    var i = starts[row];
    if p.accumulate != 0u && i == last { return; }
    let base = at / p.inner / p.rows * p.count;
    let column = at % p.inner;
    var s0 = Float();
    var s1 = Float();
    var s2 = Float();
    var s3 = Float();
    for (; i + 4u <= last; i += 4u) {
        s0 += dy[(base + order[i]) * p.inner + column];
        s1 += dy[(base + order[i + 1u]) * p.inner + column];
        s2 += dy[(base + order[i + 2u]) * p.inner + column];
        s3 += dy[(base + order[i + 3u]) * p.inner + column];
    }
    for (; i < last; i++) {
        s0 += dy[(base + order[i]) * p.inner + column];
    }
    let sum = (s0 + s1) + (s2 + s3);
    if p.accumulate != 0u { dx[at] = dx[at] + sum; } else { dx[at] = sum; }
}

@compute @workgroup_size(64)
fn gather(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let id = ids[at];
    if id >= p.rows {
        y[at] = Elem();
        return;
    }
    y[at] = x[(at / (p.count * p.inner) * p.rows + id) * p.inner + at % p.inner];
}

// The element of x behind each id; outside ones come behind all.
@compute @workgroup_size(64)
fn cells(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let id = ids[at];
    let cell = (at / (p.count * p.inner) * p.rows + id) * p.inner + at % p.inner;
    found[at] = select(0xffffffffu, cell, id < p.rows);
}

@compute @workgroup_size(64)
fn clear(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    dx[at] = Float();
}

// `ids` are cells.
@compute @workgroup_size(64)
fn sum_cells(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let cell = ids[order[at]];
    if cell == 0xffffffffu { return; }
    if at > 0u {
        if ids[order[at - 1u]] == cell { return; }
    }
    var sum = Float();
    for (var i = at; i < p.count; i++) {
        let place = order[i];
        if ids[place] != cell { break; }
        sum += dy[place];
    }
    if p.accumulate != 0u { dx[cell] = dx[cell] + sum; } else { dx[cell] = sum; }
}
