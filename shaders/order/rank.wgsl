// Finds ranks without sorting. An element's key is an integer with the same order as the elements. The element of rank r (ties
// ordered by index) is found digit by digit, from the highest: count how often each value of a digit occurs among the elements
// whose higher digits are those found so far, and take the value at which the running sum passes r. There are three passes of 11,
// 11 and 10 bits.
//
//   counts[row, (key >> shift) & digit] += 1   where (key & mask) == prefix
//   The same for the index instead of the key  where key == tie, once the key is known and occurs more than once.
// keep:        y[i] = x[i] where low <= (key, i) < high, pairs in lexicographic order, else 0
// non_finite:  counts[0] = the number of NaN and infinities, counts[1] = 2^32 - 1 - the index of the first one
// Atomic additions of integers give the same sums in any order. Bytes: x once per pass.

const BINS: u32 = 2048u;

struct Params {
    groups_x: u32,
    n: u32,
    span: u32,      // elements that a workgroup counts, a multiple of 4
    signed: u32,    // 1 to order by value, 0 by magnitude
    row: u32,
    shift: u32,
    digit: u32,
    mask: u32,
    prefix: u32,
    of_index: u32,
    tie: u32,
    low_key: u32,
    low_index: u32,
    high_key: u32,
    high_index: u32,
}
var<immediate> p: Params;

// Elements are read four at a time. Buffers are padded to a multiple of four.
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> counts: array<atomic<u32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<u32>>;

#import order

var<workgroup> tile: array<atomic<u32>, BINS>;

fn key_of(bits: u32) -> u32 {
    return select(bits & 0x7fffffffu, order_key(bits), p.signed != 0u);
}

@compute @workgroup_size(64)
fn clear(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i < p.n { atomicStore(&counts[i], 0u); }
}

fn count_one(bits: u32, i: u32) {
    let key = key_of(bits);
    let place = select(key, i, p.of_index != 0u);
    let here = i < p.n && (place & p.mask) == p.prefix && (p.of_index == 0u || key == p.tie);
    if here { atomicAdd(&tile[(place >> p.shift) & p.digit], 1u); }
}

@compute @workgroup_size(64)
fn count(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    for (var b = lane; b < BINS; b += 64u) { atomicStore(&tile[b], 0u); }
    workgroupBarrier();
    let first = (group.y * p.groups_x + group.x) * p.span;
    let end = min(first + p.span, p.n);
    for (var i = first + 4u * lane; i < end; i += 256u) {
        let four = x[i / 4u];
        count_one(four.x, i);
        count_one(four.y, i + 1u);
        count_one(four.z, i + 2u);
        count_one(four.w, i + 3u);
    }
    workgroupBarrier();
    for (var b = lane; b < BINS; b += 64u) {
        let found = atomicLoad(&tile[b]);
        if found > 0u { atomicAdd(&counts[p.row * BINS + b], found); }
    }
}

fn before(key: u32, i: u32, other: u32, other_index: u32) -> bool {
    return key < other || (key == other && i < other_index);
}

fn kept(bits: u32, i: u32) -> u32 {
    let key = key_of(bits);
    let inside = !before(key, i, p.low_key, p.low_index) && before(key, i, p.high_key, p.high_index);
    return select(0u, bits, inside);
}

@compute @workgroup_size(64)
fn keep(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    let i = 4u * at;
    // The test is on `at`, because 4 at wraps for spare threads near 2^32 elements.
    if at > (p.n - 1u) / 4u { return; }
    let four = x[at];
    y[at] = vec4(kept(four.x, i), kept(four.y, i + 1u), kept(four.z, i + 2u), kept(four.w, i + 3u));
}

@compute @workgroup_size(64)
fn non_finite(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = (group.y * p.groups_x + group.x) * p.span;
    let end = min(first + p.span, p.n);
    var found = 0u;
    var last = 0u;
    for (var i = first + 4u * lane; i < end; i += 256u) {
        let bad = (x[i / 4u] & vec4(0x7f800000u)) == vec4(0x7f800000u);
        if any(bad) {
            for (var k = 0u; k < 4u; k++) {
                if bad[k] && i + k < p.n {
                    found += 1u;
                    last = max(last, ~(i + k));
                }
            }
        }
    }
    if found > 0u {
        atomicAdd(&counts[0], found);
        atomicMax(&counts[1], last);
    }
}
