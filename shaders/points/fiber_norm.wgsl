// x2[n,p,c] = s sum_a k[p,a,c] x[n,a,c] + bias[c], then y = x^ gain + shift with x^ the layer norm of x2 over c, as in norm.wgsl.
//
// LANES neighbouring threads share NODES x 4 rows of y, and each has channels of its own. As in fiber_conv, vectors of x
// and k are used several times. x2 is written to y first, and the thread that wrote it reads it back from the cache, so
// it takes no memory of its own. The backward pass recomputes x2 with fiber_conv, which is cheaper than keeping it.

const NODES: u32 = 4u;
const LANES: u32 = 8u;

struct Params {
    groups_x: u32,
    n: u32,          // blocks of NODES x 4 rows
    nodes: u32,
    o: u32,          // orientations
    c: u32,          // channels, in vectors
    blocks: u32,     // blocks of 4 orientations
    scale: f32,
    eps: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;      // [nodes, o, c]
@group(0) @binding(1) var<storage, read> k: array<vec4<f32>>;      // [o, o, c]
@group(0) @binding(2) var<storage, read> bias: array<vec4<f32>>;   // [c]
@group(0) @binding(3) var<storage, read> gain: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> shift: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> made: array<f32>;   // [nodes, o, 3]: mean, reciprocal deviation, rest

#import piece = piece_4

alias Sum = vec4<f32>;
#import row_sum
#import nan

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let block = (group.y * p.groups_x + group.x) * (64u / LANES) + lane / LANES;
    let t = lane % LANES;
    // Threads past the last block only stay for the barriers. Nodes and orientations outside are replaced by the last one
    // inside.
    let end = select(0u, p.c, block < p.n);
    let first = block % p.blocks * 4u;
    let node = block / p.blocks * NODES;
    let size = f32(4u * p.c);
#unroll q 4
    let point$q = min(first + ${q}u, p.o - 1u);
#end
#unroll m NODES
    let node$m = min(node + ${m}u, p.nodes - 1u) * p.o;
    var sum$m = vec4<f32>(0.0);
#unroll q 4
    let live${m}_$q = first + ${q}u < p.o && node + ${m}u < p.nodes;
    let row${m}_$q = (node$m + point$q) * p.c;
#end
#end
    for (var c = t; c < end; c += LANES) {
#unroll m NODES
#unroll q 4
        var y${m}_$q = vec4<f32>(0.0);
#end
#end
        for (var a = 0u; a < p.o; a++) {
#unroll m NODES
            let x$m = x[(node$m + a) * p.c + c];
#end
#unroll q 4
            let k$q = k[(point$q * p.o + a) * p.c + c];
#unroll m NODES
            y${m}_$q = fma(k$q, x$m, y${m}_$q);
#end
#end
        }
#unroll m NODES
#unroll q 4
        y${m}_$q = fma(vec4<f32>(p.scale), y${m}_$q, bias[c]);
        sum$m[$q] += sum_of(y${m}_$q);
        if live${m}_$q { y[row${m}_$q + c] = y${m}_$q; }
#end
#end
    }
#unroll m NODES
    let mean$m = row_sum(lane, sum$m) / size;
    var first$m = vec4<f32>(0.0);
    var second$m = vec4<f32>(0.0);
#end
    // The mean of the deviations is the rounding error of the mean, as in norm.wgsl.
    for (var c = t; c < end; c += LANES) {
#unroll m NODES
#unroll q 4
        let d${m}_$q = select(vec4<f32>(0.0), y[row${m}_$q + c] - mean$m[$q], live${m}_$q);
        first$m[$q] += sum_of(d${m}_$q);
        second$m[$q] += dot(d${m}_$q, d${m}_$q);
#end
#end
    }
#unroll m NODES
    let left$m = row_sum(lane, first$m) / size;
    let square$m = row_sum(lane, second$m) / size;
    // Rounding may make a variance negative: its sign bit tells, and it becomes 0. A NaN stays, as in norm.wgsl.
    let variance$m = square$m - left$m * left$m;
    let bits$m = bitcast<vec4<u32>>(variance$m);
    let below$m = (bits$m >= vec4<u32>(0x80000000u)) & (bits$m <= vec4<u32>(0xff800000u));
    let r$m = finite_or_nan4(inverseSqrt(select(variance$m, vec4<f32>(0.0), below$m) + p.eps), variance$m);
    let rest$m = -left$m * r$m;
#end
    for (var c = t; c < end; c += LANES) {
#unroll m NODES
#unroll q 4
        if live${m}_$q {
            y[row${m}_$q + c] = ((y[row${m}_$q + c] - mean$m[$q]) * r$m[$q] + rest$m[$q]) * gain[c] + shift[c];
        }
#end
#end
    }
#unroll m NODES
#unroll q 4
    if t == 0u && end > 0u && live${m}_$q {
        let at${m}_$q = 3u * (node$m + point$q);
        made[at${m}_$q] = mean$m[$q];
        made[at${m}_$q + 1u] = r$m[$q];
        made[at${m}_$q + 2u] = rest$m[$q];
    }
#end
#end
}
