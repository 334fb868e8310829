// Stable sort along the axis of x[outer, size, inner], by pairs (key, index), ascending. For descending order the keys are
// flipped.
//   indices[outer, i, inner] = index of the i-th element, values[outer, i, inner] = x[outer, indices[..], inner], i < k
//   dx[outer, indices[outer, i, inner], inner] = dvalues[outer, i, inner], 0 elsewhere. A row's indices differ, so there are no
//   races.
// rows:    sorts rows of at most TILE elements, TILE / pad rows per workgroup, by a bitonic sort in workgroup memory.
// tiles:   sorts tiles of TILE elements of longer rows and keeps the first `keep` pairs of each. again: the same from pairs.
// merge:   merges two sorted runs. Each element finds its place by binary search in the other run.
// finish:  writes values and indices of the first k pairs.
// All pairs are different, so the order is total and any method gives the same result.

const TILE: u32 = 2048u;    // elements in workgroup memory, 8 bytes each; a power of two, at least 128

struct Params {
    groups_x: u32,
    rows: u32,      // outer * inner
    size: u32,      // elements of the axis
    inner: u32,
    k: u32,         // results per row
    in_row: u32,    // pairs per row that is read
    out_row: u32,   // pairs per row that is written
    keep: u32,      // pairs that a tile writes
    tiles: u32,     // tiles per row
    pad: u32,       // places per row in a tile, a power of two
    flip: u32,      // all bits for descending order, else 0
    kind: u32,      // elements: 0 float, 1 unsigned, 2 signed
    run: u32,       // elements in a sorted run
    accumulate: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read> keys_in: array<u32>;
@group(0) @binding(2) var<storage, read> ids_in: array<u32>;
// Keys of pairs, or the bits of values.
@group(0) @binding(3) var<storage, read_write> y: array<u32>;
@group(0) @binding(4) var<storage, read_write> ids: array<u32>;
@group(0) @binding(5) var<storage, read_write> dx: array<f32>;

#import order

// The key of padding. It sorts behind every element: if a key is equal, as a NaN's may be, the index decides.
const LAST: u32 = 0xffffffffu;

var<workgroup> tile_key: array<u32, TILE>;
var<workgroup> tile_id: array<u32, TILE>;

fn key_of(bits: u32) -> u32 {
    var key = bits;
    if p.kind == 0u { key = order_key(bits); }
    if p.kind == 2u { key = bits ^ 0x80000000u; }
    return key ^ p.flip;
}

/// The position of element `i` of a row in an array whose axis has `size` elements.
fn element(row: u32, i: u32, size: u32) -> u32 {
    return ((row / p.inner) * size + i) * p.inner + row % p.inner;
}

/// Sorts every `pad` elements of the tile. Every lane of the workgroup must call this.
fn sort_tile(lane: u32) {
    workgroupBarrier();
    for (var width = 2u; width <= p.pad; width = width << 1u) {
        for (var step = width >> 1u; step > 0u; step = step >> 1u) {
            for (var t = lane; t < TILE / 2u; t += 64u) {
                let low = 2u * t - (t & (step - 1u));
                let high = low + step;
                // Neighbouring blocks are sorted in opposite orders, which makes them bitonic for the next width. The last width
                // ascends in every row.
                let up = (low & (p.pad - 1u) & width) == 0u;
                let key = tile_key[low];
                let other = tile_key[high];
                let id = tile_id[low];
                let other_id = tile_id[high];
                let after = key > other || (key == other && id > other_id);
                if after == up {
                    tile_key[low] = other;
                    tile_key[high] = key;
                    tile_id[low] = other_id;
                    tile_id[high] = id;
                }
            }
            workgroupBarrier();
        }
    }
}

@compute @workgroup_size(64)
fn rows(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = (group.y * p.groups_x + group.x) * (TILE / p.pad);
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if first >= p.rows { return; }
    for (var t = lane; t < TILE; t += 64u) {
        let row = first + t / p.pad;
        let i = t % p.pad;
        var key = LAST;
        if row < p.rows && i < p.size { key = key_of(x[element(row, i, p.size)]); }
        tile_key[t] = key;
        tile_id[t] = i;
    }
    sort_tile(lane);
    for (var t = lane; t < TILE; t += 64u) {
        let row = first + t / p.pad;
        let i = t % p.pad;
        if row < p.rows && i < p.k {
            let id = tile_id[t];
            let to = element(row, i, p.k);
            y[to] = x[element(row, id, p.size)];
            ids[to] = id;
        }
    }
}

/// Writes the tile's first pairs. The last tile of a row may have fewer.
fn keep_tile(row: u32, tile: u32, lane: u32) {
    let start = tile * p.keep;
    let count = min(p.keep, p.out_row - start);
    for (var t = lane; t < count; t += 64u) {
        let to = row * p.out_row + start + t;
        y[to] = tile_key[t];
        ids[to] = tile_id[t];
    }
}

@compute @workgroup_size(64)
fn tiles(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) / p.tiles;
    let tile = (group.y * p.groups_x + group.x) % p.tiles;
    if row >= p.rows { return; }
    for (var t = lane; t < TILE; t += 64u) {
        let i = tile * TILE + t;
        var key = LAST;
        if i < p.size { key = key_of(x[element(row, i, p.size)]); }
        tile_key[t] = key;
        tile_id[t] = i;
    }
    sort_tile(lane);
    keep_tile(row, tile, lane);
}

@compute @workgroup_size(64)
fn again(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) / p.tiles;
    let tile = (group.y * p.groups_x + group.x) % p.tiles;
    if row >= p.rows { return; }
    for (var t = lane; t < TILE; t += 64u) {
        let i = tile * TILE + t;
        var key = LAST;
        var id = LAST;
        if i < p.in_row {
            key = keys_in[row * p.in_row + i];
            id = ids_in[row * p.in_row + i];
        }
        tile_key[t] = key;
        tile_id[t] = id;
    }
    sort_tile(lane);
    keep_tile(row, tile, lane);
}

@compute @workgroup_size(64)
fn merge(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.rows * p.in_row { return; }
    let i = at % p.in_row;
    let base = at - i;
    let start = i / (2u * p.run) * (2u * p.run);
    let middle = min(start + p.run, p.in_row);
    let end = min(start + 2u * p.run, p.in_row);
    let key = keys_in[at];
    // Every index of the left run is below every index of the right one, so the left run comes first at equal keys.
    let left = i < middle;
    var low = select(start, middle, left);
    var high = select(middle, end, left);
    let other = low;
    while low < high {
        let between = (low + high) / 2u;
        let k = keys_in[base + between];
        if k < key || (k == key && !left) { low = between + 1u; } else { high = between; }
    }
    let own = select(i - middle, i - start, left);
    let to = base + start + own + (low - other);
    y[to] = key;
    ids[to] = ids_in[at];
}

@compute @workgroup_size(64)
fn finish(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.rows * p.k { return; }
    let row = at / (p.k * p.inner) * p.inner + at % p.inner;
    let id = ids_in[row * p.in_row + at / p.inner % p.k];
    y[at] = x[element(row, id, p.size)];
    ids[at] = id;
}

@compute @workgroup_size(64)
fn clear(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.rows * p.size { return; }
    dx[at] = 0.0;
}

/// x has the bits of dvalues, and ids_in has the indices.
@compute @workgroup_size(64)
fn scatter(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.rows * p.k { return; }
    let row = at / (p.k * p.inner) * p.inner + at % p.inner;
    let to = element(row, ids_in[at], p.size);
    let dy = bitcast<f32>(x[at]);
    if p.accumulate != 0u { dx[to] = dx[to] + dy; } else { dx[to] = dy; }
}
