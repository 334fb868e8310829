// found[slot] = the number of ids outside 0..size, the index of the first such id, and the id itself. A later launch with the
// same slot adds to the count. Nothing is written if all ids are inside. Runs on devices that check ids. No derivative.
//
// One workgroup walks all ids. A slot is then written by one thread, without atomics. Counts and minima are integers, so the
// order of the threads does not matter. A negative id is read as a large one.

struct Params {
    first: u32,     // the first id that this launch checks
    n: u32,         // the end of the ids that it checks
    size: u32,
    slot: u32,
    ignores: u32,   // 1 if `ignored` applies
    ignored: u32,   // an id that is allowed outside, as bits
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> found: array<vec4<u32>>;     // count, index, id, 0

const THREADS: u32 = 256u;
const NOWHERE: u32 = 0xffffffffu;

var<workgroup> count: atomic<u32>;
var<workgroup> first: atomic<u32>;

@compute @workgroup_size(THREADS)
fn main(@builtin(local_invocation_index) lane: u32) {
    if lane == 0u {
        atomicStore(&count, 0u);
        atomicStore(&first, NOWHERE);
    }
    workgroupBarrier();
    var outside = 0u;
    var place = NOWHERE;
    for (var i = p.first + lane; i < p.n; i += THREADS) {
        let id = ids[i];
        let ignored = p.ignores != 0u && id == p.ignored;
        if id >= p.size && !ignored {
            outside += 1u;
            place = min(place, i);
        }
    }
    if outside > 0u {
        atomicAdd(&count, outside);
        atomicMin(&first, place);
    }
    workgroupBarrier();
    let total = atomicLoad(&count);
    if lane != 0u || total == 0u { return; }
    let before = found[p.slot];
    if before.x > 0u {
        found[p.slot] = vec4<u32>(before.x + total, before.y, before.z, 0u);
    } else {
        let at = atomicLoad(&first);
        found[p.slot] = vec4<u32>(total, at, ids[at], 0u);
    }
}
