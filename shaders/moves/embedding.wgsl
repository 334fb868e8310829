// select:   y[o, i, c] = x[o, ids[i], c] for x [outer, rows, inner]. An embedding has outer = 1. Elements are words of any type.
// gather:   y[o, i, c] = x[o, ids[o, i, c], c]. `cells` computes the index in x that belongs to each id.
// sum_runs: the adjoint of both, dx[o, r, c] (+)= sum over i with ids[i] = r of dy[o, i, c], in ascending order of i. GPUs have
//           embedding_sum.wgsl for it, which needs fewer dispatches and has more loads under way.
// Ids outside the rows give zeros in y, and add nothing in the adjoints.
//
// The adjoint has no atomics. `order` lists the places sorted by id (stable), so the terms of one row of dx are a contiguous run
// of it. A thread walks CHUNK places of one column. A run that begins and ends inside the chunk is the whole sum of one row of
// dx, which no other thread writes. The sum of a run that crosses the chunk's first or last place is left to the next pass
// (FOLDED). That pass has two such sums per chunk, which are sorted already. It takes log(n) / log(CHUNK / 2) passes, however
// often a row is used, and the sums are trees. dy is read once. dx is written once, after `clear` unless the kernel accumulates.
// The sort costs about log2(n / 2048) passes over 16 n bytes.

alias Elem = u32;       // elements of select
alias Float = f32;      // elements of sum_runs
const CHUNK: u32 = 32u;
const FOLDED: bool = false;
const ACCUMULATE: bool = false;

struct Params {
    groups_x: u32,
    n: u32,         // threads
    rows: u32,
    inner: u32,     // in Elem or Float
    count: u32,     // ids along the axis
    chunks: u32,    // number of chunks in sum_runs
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

@group(0) @binding(3) var<storage, read> order: array<u32>;
// In `cells`, its result. In sum_runs, the two rows per chunk whose sums are left to the next pass, at its first and last place.
@group(0) @binding(4) var<storage, read_write> found: array<u32>;
@group(0) @binding(5) var<storage, read_write> rest: array<Float>;    // the sums that are left
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
        y[at] = Elem(0);
        return;
    }
    y[at] = x[(place / p.count * p.rows + id) * p.inner + at % p.inner];
}

// Stands for no row.
const NOBODY: u32 = 0xffffffffu;

fn place(i: u32) -> u32 {
    if FOLDED { return i; }
    return order[i];
}

@compute @workgroup_size(64)
fn sum_runs(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let column = at % p.inner;
    let chunk = at / p.inner % p.chunks;
    let outer = at / p.inner / p.chunks;
    let first = chunk * CHUNK;
    let last = min(first + CHUNK, p.count);
    var row = ids[place(first)];
    // Whether the present run began before this chunk.
    var open = false;
    if first > 0u { open = ids[place(first - 1u)] == row; }
    var sum = Float(0.0);
    var begun = Float(0.0);
    var begun_row = NOBODY;
    for (var i = first; i < last; i++) {
        let source = place(i);
        let next = ids[source];
        if next != row {
            if open {
                begun = sum;
                begun_row = row;
            } else {
                put(outer, row, column, sum);
            }
            open = false;
            row = next;
            sum = Float(0.0);
        }
        sum += dy[(outer * p.count + source) * p.inner + column];
    }
    var goes_on = false;
    if last < p.count { goes_on = ids[place(last)] == row; }
    if open {
        begun = sum;
        begun_row = row;
        sum = Float(0.0);
    } else if !goes_on {
        put(outer, row, column, sum);
    }
    if p.chunks == 1u { return; }
    let to = (outer * p.chunks + chunk) * 2u;
    rest[to * p.inner + column] = begun;
    rest[(to + 1u) * p.inner + column] = sum;
    if column == 0u && outer == 0u {
        found[to] = begun_row;
        // NOBODY, if no run continues in the next chunk. An entry of another row must not separate two parts of one run.
        found[to + 1u] = select(NOBODY, row, goes_on);
    }
}

fn put(outer: u32, row: u32, column: u32, sum: Float) {
    if row >= p.rows { return; }
    let to = (outer * p.rows + row) * p.inner + column;
    if ACCUMULATE { dx[to] = dx[to] + sum; } else { dx[to] = sum; }
}

@compute @workgroup_size(64)
fn gather(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let id = ids[at];
    if id >= p.rows {
        y[at] = Elem(0);
        return;
    }
    y[at] = x[(at / (p.count * p.inner) * p.rows + id) * p.inner + at % p.inner];
}

// The index in x of each id's element. Ids outside get an index beyond all others.
@compute @workgroup_size(64)
fn cells(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    let id = ids[at];
    let cell = (at / (p.count * p.inner) * p.rows + id) * p.inner + at % p.inner;
    found[at] = select(NOBODY, cell, id < p.rows);
}

@compute @workgroup_size(64)
fn clear(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = thread(group, lane);
    if at >= p.n { return; }
    dx[at] = Float(0.0);
}
