// Narrows down where the elements of some ranks are, in one pass: of the differences d = x_m - base of each model m, counts those
// whose magnitude is below a bracket, and lists those inside of it. There are ENDS brackets a model. The key of an element is its
// magnitude's bits, which have its order. With `row` the number of the bracket and its model:
//
//   found[2 row]     += 1           where key < low
//   found[2 row + 1] += 1           where low <= key <= high
//   list[row, k]      = (key, i)    for the k-th of those, in no particular order, up to k = room. The lists are behind the counts.
// Atomic additions of integers give the same sums in any order, and the host sorts the lists. Bytes: base and every x_m once.

const MODELS: u32 = 2u;
const ENDS: u32 = 1u;
const SPAN: u32 = 16384u; // elements that a workgroup reads

struct Params {
    groups_x: u32,
    n: u32,
    room: u32,
#unroll m MODELS
#unroll e ENDS
    low${m}_${e}: u32,
    width${m}_${e}: u32, // high - low
#end
#end
}

// Elements are read four at a time. Buffers are padded to a multiple of four.
@group(0) @binding(0) var<storage, read> base: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> found: array<atomic<u32>>;
@group(0) @binding(2) var<uniform> p: Params;
#unroll m MODELS
@group(0) @binding(${3 + m}) var<storage, read> x$m: array<vec4<f32>>;
#end

// Lists the elements that are inside, of four that begin at i.
fn list(row: u32, key: vec4<u32>, i: u32, inside: vec4<bool>) {
    for (var k = 0u; k < 4u; k++) {
        if inside[k] {
            let slot = atomicAdd(&found[2u * row + 1u], 1u);
            if slot < p.room {
                let at = 2u * (MODELS * ENDS + row * p.room + slot);
                atomicStore(&found[at], key[k]);
                atomicStore(&found[at + 1u], i + k);
            }
        }
    }
}

@compute @workgroup_size(64)
fn narrow(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = (group.y * p.groups_x + group.x) * SPAN;
    let end = min(first + SPAN, p.n);
#unroll m MODELS
#unroll e ENDS
    var below${m}_${e} = vec4(0u);
#end
#end
    for (var i = first + 4u * lane; i < end; i += 256u) {
        let b = base[i / 4u];
#unroll m MODELS
        var key$m = bitcast<vec4<u32>>(x$m[i / 4u] - b) & vec4(0x7fffffffu);
        // Behind the end is no element. Its key is in no bracket and below none.
        if i + 3u >= p.n { key$m = select(vec4(0xffffffffu), key$m, (vec4(i) + vec4(0u, 1u, 2u, 3u)) < vec4(p.n)); }
#unroll e ENDS
        below${m}_${e} += select(vec4(0u), vec4(1u), key$m < vec4(p.low${m}_${e}));
        // A key below `low` wraps to a large number.
        let inside${m}_${e} = (key$m - vec4(p.low${m}_${e})) <= vec4(p.width${m}_${e});
        if any(inside${m}_${e}) { list(${m * ENDS + e}u, key$m, i, inside${m}_${e}); }
#end
#end
    }
#unroll m MODELS
#unroll e ENDS
    let sum${m}_${e} = below${m}_${e}.x + below${m}_${e}.y + below${m}_${e}.z + below${m}_${e}.w;
    if sum${m}_${e} > 0u { atomicAdd(&found[${2 * (m * ENDS + e)}u], sum${m}_${e}); }
#end
#end
}
