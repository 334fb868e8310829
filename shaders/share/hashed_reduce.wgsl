// The adjoint of stable hashing (lib/site_hashed.wgsl): domega[j] += scale * sum of sign(i) dW[i] over the weights i that
// read omega[j]. Each run of STORED consecutive weights is a rotation of omega, so run q has exactly one such weight: i =
// q STORED + (j - shift(q)) mod STORED.
// This is a gather in the order of runs: no atomics, and the same bits every time. It reads dW once. A launch takes MOST
// runs after the first `skip`, in blocks of BLOCK, because rounding errors would grow in one long sum.

const STORED: u32 = 64u;
const SEED: u32 = 1u;
const SIGN_SEED: u32 = 2u;
const ACCUMULATE: bool = false;
const MOST: u32 = 4096u;
const BLOCK: u32 = 64u;

struct Params {
    count: u32,      // number of weights of this site
    offset: u32,     // flat index of its first weight
    scale: f32,
    skip: u32,       // number of runs in earlier launches
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> dw: array<f32>;
@group(0) @binding(1) var<storage, read_write> domega: array<f32>;

#import hash

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let j = group.x * 64u + lane;
    if j >= STORED { return; }
    var sum = 0.0;
    let last = (p.offset + p.count - 1u) / STORED;
    let first = p.offset / STORED + p.skip;
    let end = min(first + MOST, last + 1u);
    for (var start = first; start < end; start += BLOCK) {
        let stop = min(start + BLOCK, end);
        var block = 0.0;
        for (var run = start; run < stop; run++) {
            let i = run * STORED + (j + STORED - hash(run, SEED) % STORED) % STORED;
            if i >= p.offset && i < p.offset + p.count {
                let value = dw[i - p.offset];
                block += select(value, -value, (hash(i, SIGN_SEED) & 1u) == 1u);
            }
        }
        sum += block;
    }
    let before = select(0.0, domega[j], ACCUMULATE);
    domega[j] = before + p.scale * sum;
}
