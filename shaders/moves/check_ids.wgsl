// found[slot] = how many of ids are outside 0..size, the first such place, and the id there; what is found later adds to the
// count. For devices that check: nothing is written where all ids are inside. No derivative.
//
// One workgroup walks all ids, so that a slot is written by one thread and needs no atomics of its own; integers, so that
// the order of the threads does not matter. A negative id comes as a large one.

struct Params {
    first: u32,     // the ids that this launch looks at: from here
    n: u32,         // up to here
    size: u32,
    slot: u32,
    ignores: u32,   // 1 where `ignored` counts
    ignored: u32,   // the id that may be anywhere, as bits
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read_write> found: array<vec4<u32>>;     // count, place, id, 0

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
