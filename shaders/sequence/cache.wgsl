// cache[rows[b], h, places[b] + t, :] = x[b, t, h, :]: appends new keys or values to rows of a cache. Elements beyond a row's
// end, or of a row that the cache does not have, are dropped. A thread moves four elements.

alias Elem = vec4<f32>;     // or four f16

struct Params {
    groups_x: u32,
    count: u32,      // vectors of x
    tokens: u32,
    heads: u32,
    width: u32,      // vectors per head
    rows: u32,       // rows of the cache
    context: u32,    // places per row
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read> rows: array<u32>;
@group(0) @binding(2) var<storage, read> places: array<u32>;
@group(0) @binding(3) var<storage, read_write> cache: array<Elem>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.count { return; }
    let head = i / p.width % p.heads;
    let token = i / (p.width * p.heads) % p.tokens;
    let entry = i / (p.width * p.heads * p.tokens);
    let place = places[entry] + token;
    if rows[entry] >= p.rows || place >= p.context { return; }
    cache[((rows[entry] * p.heads + head) * p.context + place) * p.width + i % p.width] = x[i];
}
