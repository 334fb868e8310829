// dx[o, r, c] (+)= sum over i with ids[i] = r of dy[o, i, c]: the adjoint of lookups for GPUs, in three dispatches. embedding.wgsl has
// the one for CPU drivers. Ids outside the rows add nothing. There are no float atomics, and the order of every sum is fixed.
//
// order: lists the places sorted by id, each with the run of places of equal ids that it is in, and clears dx unless the kernel
//        accumulates. A workgroup has the ids of R rows of dx. It reads all ids, packs those of its rows with their places in
//        workgroup memory, and sorts them (Batcher's bitonic sort, as in sort.wgsl); all packed numbers differ. 4096 ids of 8192 rows
//        are 512 workgroups that read 16 KB each from the cache and sort about 8 numbers; clearing is 16.8 MB beside it.
// describe: the same for a list that sort.wgsl has sorted, with binary searches for the ends of runs.
// runs:  a thread adds up `chunk` places of the sorted list for one column of four elements, 8 loads under way together. A run that
//        lies in the chunk is the whole sum of one row, which no other thread writes. Of the run that began before, and of the one
//        that goes on, the sums are left in `rest`. 4096 x 512 are 65536 threads with one round of loads, 8.4 MB in flight.
// join:  up to 16 lanes for each chunk and column add up the rest of the run that begins in the chunk and goes on. Nearly all
//        threads have nothing to do if few ids repeat. An id that is in all of 4096 places leaves 512 sums of 512 elements, which 4
//        workgroups of 8 lanes add up in 8 rounds.
// Bytes: dy is read once, dx written once by `order`, and the rows with an id once more. Every loop is bounded by the number of ids,
// however they repeat.

alias Elem = vec4<f32>;
const THREADS: u32 = 256u;
const PLACES: u32 = 8192u;      // of a list that `order` sorts, a power of two of at least 1024, 4 bytes each
const AHEAD: u32 = 8u;
const BLOCK: u32 = 32u;         // turns of AHEAD sums, in `join`
const ACCUMULATE: bool = false;

// Stands for no row.
const NOBODY: u32 = 0xffffffffu;
// The bits of a place in a packed number. The rest are the row's number in its workgroup.
const PLACE_BITS: u32 = 13u;

struct Params {
    groups_x: u32,
    n: u32,         // threads in `runs`, workgroups in the others
    rows: u32,
    inner: u32,     // in Elem
    count: u32,     // ids
    outer: u32,
    chunk: u32,     // places of a thread in `runs`
    chunks: u32,
    tiles: u32,     // workgroups of `order` that have rows
    tile: u32,      // rows of such a workgroup
    cleared: u32,   // elements of dx that a workgroup clears
    shift: u32,     // in `join`, 2^shift columns and
    lanes: u32,     // this many lanes share the rest of a chunk
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> ids: array<u32>;               // in `describe`, sorted
@group(0) @binding(1) var<storage, read> sorted: array<u32>;            // in `describe`, the places in the order of the ids
// Place, id, and where the id's run begins and ends.
@group(0) @binding(2) var<storage, read_write> made: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> places: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> dy: array<Elem>;
@group(0) @binding(5) var<storage, read_write> dx: array<Elem>;
// [outer, chunks, 2, inner]: the sum of the run that began before a chunk, and of the one that begins in it and goes on.
@group(0) @binding(6) var<storage, read_write> rest: array<Elem>;
@group(0) @binding(7) var<storage, read> left: array<Elem>;

var<workgroup> list: array<u32, PLACES>;
var<workgroup> tree: array<Elem, THREADS>;

fn clear(at: u32, lane: u32) {
    if ACCUMULATE { return; }
    let first = at * p.cleared;
    let last = min(first + p.cleared, p.outer * p.rows * p.inner);
    for (var i = first + lane; i < last; i += THREADS) { dx[i] = Elem(0.0); }
}

// The first of `count` packed numbers of the list that is not below `key`.
fn lower_bound(count: u32, key: u32) -> u32 {
    var low = 0u;
    var high = count;
    while low < high {
        let middle = (low + high) / 2u;
        if list[middle] < key { low = middle + 1u; } else { high = middle; }
    }
    return low;
}

fn sort_list(lane: u32, pad: u32) {
    for (var width = 2u; width <= pad; width = width << 1u) {
        for (var step = width >> 1u; step > 0u; step = step >> 1u) {
            for (var t = lane; t < pad / 2u; t += THREADS) {
                let low = 2u * t - (t & (step - 1u));
                let key = list[low];
                let other = list[low + step];
                // Neighbouring blocks are sorted in opposite orders, which makes them bitonic for the next width.
                if (key > other) == ((low & (pad - 1u) & width) == 0u) {
                    list[low] = other;
                    list[low + step] = key;
                }
            }
            workgroupBarrier();
        }
    }
}

@compute @workgroup_size(THREADS)
fn order(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    // Uniform over the workgroup, so all lanes reach the barriers below or none does.
    if at >= p.n { return; }
    clear(at, lane);
    if at >= p.tiles { return; }
    let low = at * p.tile;
    let high = min(low + p.tile, p.rows);
    // The ids of lower rows and of these rows, both below 2^16.
    var counts = 0u;
    for (var i = lane; i < p.count; i += AHEAD * THREADS) {
#unroll j AHEAD
        let id$j = ids[select(i, i + ${j}u * THREADS, i + ${j}u * THREADS < p.count)];
#end
#unroll j AHEAD
        if i + ${j}u * THREADS < p.count {
            counts += select(0u, 0x10000u, id$j < low) + select(0u, 1u, id$j >= low && id$j < high);
        }
#end
    }
    // Each lane's numbers go behind those of the lanes before it: sums of 16 lanes, then of 16 such sums.
    list[lane] = counts;
    workgroupBarrier();
    let first = lane & 0xfffffff0u;
    var before = 0u;
    for (var i = first; i < lane; i++) { before += list[i]; }
    if lane % 16u == 15u { list[THREADS + lane / 16u] = before + counts; }
    workgroupBarrier();
    for (var i = 0u; i < lane / 16u; i++) { before += list[THREADS + i]; }
    if lane == THREADS - 1u { list[THREADS + 16u] = before + counts; }
    let all = workgroupUniformLoad(&list[THREADS + 16u]);
    let own = all & 0xffffu;
    let base = all >> 16u;
    var pad = 1u;
    while pad < own { pad = pad << 1u; }
    var to = before & 0xffffu;
    for (var i = lane; i < p.count; i += AHEAD * THREADS) {
#unroll j AHEAD
        let id$j = ids[select(i, i + ${j}u * THREADS, i + ${j}u * THREADS < p.count)];
#end
#unroll j AHEAD
        if i + ${j}u * THREADS < p.count && id$j >= low && id$j < high {
            list[to] = ((id$j - low) << PLACE_BITS) | (i + ${j}u * THREADS);
            to += 1u;
        }
#end
    }
    for (var i = own + lane; i < pad; i += THREADS) { list[i] = NOBODY; }
    workgroupBarrier();
    sort_list(lane, pad);
    for (var i = lane; i < own; i += THREADS) {
        let row = list[i] >> PLACE_BITS;
        let begin = lower_bound(own, row << PLACE_BITS);
        let end = lower_bound(own, (row + 1u) << PLACE_BITS);
        made[base + i] = vec4<u32>(list[i] & ((1u << PLACE_BITS) - 1u), low + row, base + begin, base + end);
    }
    // Ids outside the rows are behind all others.
    if at + 1u == p.tiles {
        for (var i = base + own + lane; i < p.count; i += THREADS) {
            made[i] = vec4<u32>(0u, NOBODY, base + own, p.count);
        }
    }
}

@compute @workgroup_size(THREADS)
fn describe(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    clear(at, lane);
    let i = at * THREADS + lane;
    if i >= p.count { return; }
    let id = ids[i];
    // Below: the first place of the id. Above: the first place of a larger one.
    var low = 0u;
    var high = i;
    while low < high {
        let middle = (low + high) / 2u;
        if ids[middle] < id { low = middle + 1u; } else { high = middle; }
    }
    let begin = low;
    low = i + 1u;
    high = p.count;
    while low < high {
        let middle = (low + high) / 2u;
        if ids[middle] > id { high = middle; } else { low = middle + 1u; }
    }
    made[i] = vec4<u32>(sorted[i], id, begin, low);
}

fn put(outer: u32, row: u32, column: u32, sum: Elem) {
    if row >= p.rows { return; }
    let to = (outer * p.rows + row) * p.inner + column;
    if ACCUMULATE { dx[to] = dx[to] + sum; } else { dx[to] = sum; }
}

@compute @workgroup_size(THREADS)
fn runs(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * THREADS + lane;
    if at >= p.n { return; }
    let column = at % p.inner;
    let chunk = at / p.inner % p.chunks;
    let outer = at / p.inner / p.chunks;
    let first = chunk * p.chunk;
    let last = min(first + p.chunk, p.count);
    let from_before = (outer * p.chunks + chunk) * 2u * p.inner + column;
    // The present run: its id, where it begins and ends, the sum of its whole turns.
    var row = NOBODY;
    var begin = first;
    var end = last;
    var sum = Elem(0.0);
    for (var i = first; i < last; i += AHEAD) {
#unroll j AHEAD
        let place$j = places[min(i + ${j}u, last - 1u)];
#end
#unroll j AHEAD
        let v$j = dy[(outer * p.count + place$j.x) * p.inner + column];
#end
        // A turn's terms are added up first, because a single running sum would drift.
        var block = Elem(0.0);
#unroll j AHEAD
        if i + ${j}u < last {
            if place$j.y != row || i + ${j}u == first {
                if i + ${j}u > first {
                    if begin < first { rest[from_before] = sum + block; } else { put(outer, row, column, sum + block); }
                }
                row = place$j.y;
                begin = place$j.z;
                end = place$j.w;
                sum = Elem(0.0);
                block = Elem(0.0);
            }
            block += v$j;
        }
#end
        sum += block;
    }
    if begin < first {
        rest[from_before] = sum;
    } else if end > last {
        rest[from_before + p.inner] = sum;
    } else {
        put(outer, row, column, sum);
    }
}

@compute @workgroup_size(THREADS)
fn join(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.y * p.groups_x + group.x;
    if at >= p.n { return; }
    let wide = 1u << p.shift;
    let across = (p.inner + wide - 1u) >> p.shift;
    let slots = (THREADS >> p.shift) / p.lanes;
    let which = at / across * slots + (lane >> p.shift) / p.lanes;
    let column = ((at % across) << p.shift) + (lane & (wide - 1u));
    let t = (lane >> p.shift) % p.lanes;
    let chunk = which % p.chunks;
    let outer = which / p.chunks;
    let first = chunk * p.chunk;
    let last = min(first + p.chunk, p.count);
    let run = places[last - 1u];
    // Whether a run begins in the chunk and goes on. Threads without one take part in the barriers.
    let owns = outer < p.outer && column < p.inner && run.w > last && run.z >= first && run.y < p.rows;
    let parts = select(0u, (run.w - 1u) / p.chunk - chunk + 1u, owns);
    let base = (outer * p.chunks + chunk) * 2u * p.inner + column;
    var sum = Elem(0.0);
    for (var start = t; start < parts; start += AHEAD * BLOCK * p.lanes) {
        let stop = min(start + AHEAD * BLOCK * p.lanes, parts);
        var block = Elem(0.0);
        for (var i = start; i < stop; i += AHEAD * p.lanes) {
            // The last turn reads its first sum in place of those beyond the end, so that no load waits for another.
#unroll j AHEAD
            let i$j = select(i, i + ${j}u * p.lanes, i + ${j}u * p.lanes < stop);
            let w$j = left[base + select(2u * i$j, 1u, i$j == 0u) * p.inner];
            let v$j = select(Elem(0.0), w$j, i + ${j}u * p.lanes < stop);
#end
            block += ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7));
        }
        sum += block;
    }
    tree[lane] = sum;
    workgroupBarrier();
    for (var reach = p.lanes >> 1u; reach > 0u; reach = reach >> 1u) {
        if t < reach { tree[lane] += tree[lane + (reach << p.shift)]; }
        workgroupBarrier();
    }
    if t == 0u && owns { put(outer, run.y, column, tree[lane]); }
}
