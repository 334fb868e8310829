// y[b] = store(sum over parts of sums[b, part]) for sums [batch, parts, m, n]: the second pass of a product whose inner
// axis was cut into parts. The stores are those of the first pass, so an epilogue, a sum that is added to y, or rows that
// go to the places of a list need no further pass.
//
// Slot `weights` may weigh the parts of each row: products with atoms are parts, and a row's layer says how to combine
// them.
//
// A thread adds up four columns of every DEEP-th part, four parts at a time, and DEEP threads' sums are then added in
// order. With at most 32 parts a thread, running sums stay short.
// Bytes: every part once, y once.

const THREADS: u32 = 64u;
const DEEP: u32 = 1u;                     // lanes along the parts
const FLAT: u32 = THREADS / DEEP;

#import matmul
#import store = store_plain
#import place = place_plain
#import pieces = pieces_of_1
#import out = out_stored
#import packed = packed_none
#import sums = sums_of_1
#import weights = weights_none
#import deep = deep_one
#import epilogue
#import elementwise
#import exp_log
#import nan

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.x * FLAT + lane % FLAT;
    let columns = (p.n + 3u) / 4u;
    let row = at / columns;
    let col = at % columns * 4u;
    let parts = parts_of_k();
    // Threads past the end read the last row, for the barriers' sake, and store nothing.
    let near = min(row, p.m - 1u);
    let first = group.z * parts;
    var sum = vec4<f32>(0.0);
    for (var part = lane / FLAT; part < parts; part += 4u * DEEP) {
#unroll q 4
        let part$q = part + ${q}u * DEEP;
        let last$q = min(part$q, parts - 1u);
        let x$q = select(vec4<f32>(0.0), weight(last$q, near) * piece(first + last$q, near, col), part$q < parts);
#end
        sum += (x0 + x1) + (x2 + x3);
    }
    let all = total(sum, lane);
    if lane < FLAT { store(group.z, row, col, all); }
}
