// forward:  y[n,a,c] = sum over edges e into n of  w_ea S_c(x_ea, r_ea) h[s_e,a,c]
// backward: dh[n,a,c] = sum over edges e out of n of  w_ea S_c(x_ea, r_ea) dy[t_e,a,c], and with m = dy[t_e,a,c] h[n,a,c]
//           dx = w sum_c m dS_c/dx,  dr = w sum_c m dS_c/dr,  dw = sum_c m S_c
//
// S_c(x, r) = sum over i, j of b_i(x) b_j(r) T[i,j,c] is a uniform cubic B-spline: a cell needs 4 x 4 coefficients, or 4
// if there is one attribute. Beyond the table its value at the edge is taken, with derivative 0.
//
// A thread owns CHANNELS vectors of one node and orientation and walks the node's edges in their order. Nothing is
// scattered, so every run gives the same bits. Spline weights are computed once per edge and thread. Neighbouring threads
// own neighbouring vectors, so that the coefficients of a cell are read as whole lines. Per edge, orientation and vector,
// forward reads 16 + 1 vectors and does 20 multiply-adds of vectors; backward reads the same and does 48. A kernel
// computed from its basis would take K of both. A thread's sums over channels go to `parts`, and `gather` adds those of
// all blocks of a pass. Passes bound the memory of the parts.

const ROWS: u32 = 4u;            // coefficients along the second attribute; 1 where there is none
const CHANNELS: u32 = 2u;        // vectors per thread
const ACCUMULATE: bool = false;  // whether gather adds to y
const FEATURES: bool = true;     // whether backward makes dh
const SEEN: bool = true;         // whether backward makes the parts of dx, dr, dw

struct Params {
    groups_x: u32,
    n: u32,             // threads
    orientations: u32,
    channels: u32,      // in vectors
    blocks: u32,        // number of blocks of CHANNELS vectors, each with every blocks-th vector of a row
    rows: u32,          // edges times orientations
    cells_x: u32,
    cells_r: u32,
    low_x: f32,
    low_r: f32,
    per_x: f32,         // cells per unit
    per_r: f32,
    first: u32,         // first block of this pass
    span: u32,          // blocks of this pass
    begin: u32,         // the first entry of each node's edges that this launch takes; above 0 it adds
    end: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> seen: array<vec4<f32>>;     // [edges, orientations]: x, r, w
@group(0) @binding(1) var<storage, read> table: array<vec4<f32>>;    // [cells_x + 3, cells_r + 3 or 1, channels]
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;        // h, or dy; in `gather` the parts
@group(0) @binding(3) var<storage, read> starts: array<u32>;
@group(0) @binding(4) var<storage, read> pairs: array<vec2<u32>>;    // edge, other node
@group(0) @binding(5) var<storage, read_write> y: array<vec4<f32>>;  // y, or dh; in `gather` dx, dr, dw, 0
@group(0) @binding(6) var<storage, read> own: array<vec4<f32>>;      // h in `backward`
@group(0) @binding(7) var<storage, read_write> parts: array<vec4<f32>>;

// The cell of a number, the place in it, and 1 if the number lies in the table.
struct Place { cell: u32, at: f32, inside: f32 }

fn place(x: f32, low: f32, per: f32, cells: u32) -> Place {
    let u = (x - low) * per;
    let most = f32(cells);
    let cell = min(u32(clamp(u, 0.0, most)), cells - 1u);
    return Place(cell, clamp(u, 0.0, most) - f32(cell), select(0.0, 1.0, u >= 0.0 && u <= most));
}

fn weights(t: f32) -> vec4<f32> {
    let s = 1.0 - t;
    let first = s * s * s / 6.0;
    let last = t * t * t / 6.0;
    let second = fma(t * t, fma(0.5, t, -1.0), 2.0 / 3.0);
    let third = fma(s * s, fma(0.5, s, -1.0), 2.0 / 3.0);
    return vec4<f32>(first, second, third, last);
}

fn slopes(t: f32) -> vec4<f32> {
    let s = 1.0 - t;
    return vec4<f32>(-0.5 * s * s, t * fma(1.5, t, -2.0), -s * fma(1.5, s, -2.0), 0.5 * t * t);
}

// Number of coefficients along the second attribute.
fn line() -> u32 { return select(p.cells_r + 3u, 1u, ROWS == 1u); }

fn row_of(x: Place, r: Place) -> u32 { return x.cell * line() + select(r.cell, 0u, ROWS == 1u); }

fn store(at: u32, value: vec4<f32>) {
    if p.begin > 0u { y[at] += value; } else { y[at] = value; }
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let node = i / (p.blocks * p.orientations);
    let a = i / p.blocks % p.orientations;
    let wide = line();
    // Indices outside are replaced by the last one inside: their results are computed, and not stored.
#unroll c CHANNELS
    let c$c = min(i % p.blocks + ${c}u * p.blocks, p.channels - 1u);
    var y$c = vec4<f32>(0.0);
#end
    let end = min(starts[node] + p.end, starts[node + 1u]);
    for (var j = starts[node] + p.begin; j < end; j++) {
        let pair = pairs[j];
        let s = seen[pair.x * p.orientations + a];
        let x = place(s.x, p.low_x, p.per_x, p.cells_x);
        let r = place(s.y, p.low_r, p.per_r, p.cells_r);
        let wx = weights(x.at) * s.z;
        let wr = select(weights(r.at), vec4<f32>(1.0), ROWS == 1u);
        let first = row_of(x, r);
        let other = (pair.y * p.orientations + a) * p.channels;
#unroll c CHANNELS
        var k$c = vec4<f32>(0.0);
#end
#unroll i 4
        let line$i = (first + ${i}u * wide) * p.channels;
#unroll c CHANNELS
        var sum${i}_$c = vec4<f32>(0.0);
#unroll q ROWS
        sum${i}_$c = fma(vec4<f32>(wr[$q]), table[line$i + ${q}u * p.channels + c$c], sum${i}_$c);
#end
        k$c = fma(vec4<f32>(wx[$i]), sum${i}_$c, k$c);
#end
#end
#unroll c CHANNELS
        y$c = fma(k$c, v[other + c$c], y$c);
#end
    }
    let to = (node * p.orientations + a) * p.channels;
#unroll c CHANNELS
    if i % p.blocks + ${c}u * p.blocks < p.channels { store(to + c$c, y$c); }
#end
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let node = i / (p.span * p.orientations);
    let a = i / p.span % p.orientations;
    let block = p.first + i % p.span;
    let wide = line();
    let to = (node * p.orientations + a) * p.channels;
#unroll c CHANNELS
    let c$c = min(block + ${c}u * p.blocks, p.channels - 1u);
    var y$c = vec4<f32>(0.0);
    var h$c = vec4<f32>(0.0);
    if SEEN && block + ${c}u * p.blocks < p.channels { h$c = own[to + c$c]; }
#end
    let end = min(starts[node] + p.end, starts[node + 1u]);
    for (var j = starts[node] + p.begin; j < end; j++) {
        let pair = pairs[j];
        let row = pair.x * p.orientations + a;
        let s = seen[row];
        let x = place(s.x, p.low_x, p.per_x, p.cells_x);
        let r = place(s.y, p.low_r, p.per_r, p.cells_r);
        let wx = weights(x.at);
        let dx = slopes(x.at) * (p.per_x * x.inside);
        let wr = select(weights(r.at), vec4<f32>(1.0), ROWS == 1u);
        let dr = select(slopes(r.at) * (p.per_r * r.inside), vec4<f32>(0.0), ROWS == 1u);
        let first = row_of(x, r);
        let other = (pair.y * p.orientations + a) * p.channels;
        var value = vec4<f32>(0.0);
        var along = vec4<f32>(0.0);
        var across = vec4<f32>(0.0);
#unroll c CHANNELS
        var k$c = vec4<f32>(0.0);
        var kx$c = vec4<f32>(0.0);
        var kr$c = vec4<f32>(0.0);
#end
#unroll i 4
        let line$i = (first + ${i}u * wide) * p.channels;
#unroll c CHANNELS
        var sum${i}_$c = vec4<f32>(0.0);
        var sumr${i}_$c = vec4<f32>(0.0);
#unroll q ROWS
        let t${i}_${c}_$q = table[line$i + ${q}u * p.channels + c$c];
        sum${i}_$c = fma(vec4<f32>(wr[$q]), t${i}_${c}_$q, sum${i}_$c);
        if SEEN && ROWS > 1u { sumr${i}_$c = fma(vec4<f32>(dr[$q]), t${i}_${c}_$q, sumr${i}_$c); }
#end
        k$c = fma(vec4<f32>(wx[$i]), sum${i}_$c, k$c);
        if SEEN {
            kx$c = fma(vec4<f32>(dx[$i]), sum${i}_$c, kx$c);
            kr$c = fma(vec4<f32>(wx[$i]), sumr${i}_$c, kr$c);
        }
#end
#end
#unroll c CHANNELS
        let g$c = v[other + c$c];
        if FEATURES { y$c = fma(k$c * s.z, g$c, y$c); }
        if SEEN {
            let m$c = g$c * h$c;
            value = fma(m$c, k$c, value);
            along = fma(m$c, kx$c, along);
            across = fma(m$c, kr$c, across);
        }
#end
        if SEEN {
            let one = vec4<f32>(1.0);
            parts[i % p.span * p.rows + row] = vec4<f32>(dot(along, one) * s.z, dot(across, one) * s.z, dot(value, one), 0.0);
        }
    }
    if FEATURES {
#unroll c CHANNELS
        if block + ${c}u * p.blocks < p.channels { store(to + c$c, y$c); }
#end
    }
}

@compute @workgroup_size(64)
fn gather(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    var sum = vec4<f32>(0.0);
    for (var b = 0u; b < p.span; b++) { sum += v[b * p.rows + i]; }
    if ACCUMULATE { sum += y[i]; }
    y[i] = sum;
}
