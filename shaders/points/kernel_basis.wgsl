// Polynomial features of an edge d seen from an orientation o, made of attributes a that rigid motions do not change:
// in space a = (o.d, |d - (o.d) o|), in the plane a = (o.d, -d_x o_y + d_y o_x), without orientations a = |d|.
// Features are all products of up to DEGREE attributes in the order of f_k = flatten(f_{k-1} a^T), then zeros up to whole
// vectors.
//
// Product number i of order k of two attributes is a.x^(k - ones) a.y^ones, where `ones` is the number of set bits of i.
// backward: with q = dL/da by the product rule, dd = sum over o of q.x o + q.y r / |r|, r = d - (o.d) o. The projection
// in dr/dd drops out because r is orthogonal to o. At r = 0 the derivative is 0. A thread owns an edge and loops over the
// orientations in order.

const KIND: u32 = 2u;       // 0: distance alone, 1: plane, 2: space
const DEGREE: u32 = 3u;
const WIDTH: u32 = 4u;      // vectors per row of features
const ATTRIBUTES: u32 = 2u; // 1 if there is only the distance

struct Params {
    groups_x: u32,
    n: u32,             // threads
    orientations: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> d: array<f32>;           // [edges, 3], or 2 in the plane
@group(0) @binding(1) var<storage, read> o: array<f32>;           // [orientations, 3] or 2
@group(0) @binding(2) var<storage, read_write> f: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> df: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> dd: array<f32>;
// Numbers per vector. KIND does not imply it: distances exist in the plane and in space.
const DIMENSION: u32 = 3u;

fn edge(i: u32) -> vec3<f32> {
    let at = i * DIMENSION;
    return vec3<f32>(d[at], d[at + 1u], select(0.0, d[at + DIMENSION - 1u], DIMENSION == 3u));
}

fn orientation(i: u32) -> vec3<f32> {
    let at = i * DIMENSION;
    return vec3<f32>(o[at], o[at + 1u], select(0.0, o[at + DIMENSION - 1u], DIMENSION == 3u));
}

// Two attributes and their derivatives by d.
struct Seen { a: vec2<f32>, along: vec3<f32>, across: vec3<f32> }

fn see(v: vec3<f32>, row: u32) -> Seen {
    if KIND == 0u {
        let far = sqrt(dot(v, v));
        return Seen(vec2<f32>(far, 0.0), select(v / far, vec3<f32>(0.0), far == 0.0), vec3<f32>(0.0));
    }
    let unit = orientation(row);
    let x = dot(v, unit);
    if KIND == 1u {
        let turned = vec3<f32>(-unit.y, unit.x, 0.0);
        return Seen(vec2<f32>(x, dot(v, turned)), unit, turned);
    }
    let rest = v - x * unit;
    let far = sqrt(dot(rest, rest));
    return Seen(vec2<f32>(x, far), unit, select(rest / far, vec3<f32>(0.0), far == 0.0));
}

fn power(x: f32, n: u32) -> f32 {
    var y = 1.0;
#unroll i DEGREE
    y = select(y, y * x, ${i}u < n);
#end
    return y;
}

// Exponents of feature q, both 0 beyond the last.
fn exponents(q: u32) -> vec2<u32> {
    var order = 1u;
    var i = q;
    var count = ATTRIBUTES;
#unroll k DEGREE
    if i >= count {
        i -= count;
        count *= ATTRIBUTES;
        order++;
    }
#end
    let ones = select(0u, countOneBits(i), ATTRIBUTES == 2u);
    return select(vec2<u32>(order - ones, ones), vec2<u32>(0u), order > DEGREE);
}

fn feature(q: u32, a: vec2<f32>) -> f32 {
    let n = exponents(q);
    return select(power(a.x, n.x) * power(a.y, n.y), 0.0, n.x + n.y == 0u);
}

@compute @workgroup_size(64)
fn forward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let i = (group.y * p.groups_x + group.x) * 64u + lane;
    if i >= p.n { return; }
    let a = see(edge(i / p.orientations), i % p.orientations).a;
#unroll q WIDTH
    f[i * WIDTH + ${q}u] = vec4<f32>(feature(${q*4}u, a), feature(${q*4+1}u, a), feature(${q*4+2}u, a), feature(${q*4+3}u, a));
#end
}

// dL/da from one feature's gradient.
fn slope(q: u32, a: vec2<f32>, g: f32) -> vec2<f32> {
    let n = exponents(q);
    let less = vec2<u32>(max(n.x, 1u), max(n.y, 1u)) - 1u;
    return g * vec2<f32>(n) * vec2<f32>(power(a.x, less.x) * power(a.y, n.y), power(a.x, n.x) * power(a.y, less.y));
}

@compute @workgroup_size(64)
fn backward(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let e = (group.y * p.groups_x + group.x) * 64u + lane;
    if e >= p.n { return; }
    let v = edge(e);
    var sum = vec3<f32>(0.0);
    for (var row = 0u; row < p.orientations; row++) {
        let seen = see(v, row);
        var q = vec2<f32>(0.0);
#unroll w WIDTH
        let g$w = df[(e * p.orientations + row) * WIDTH + ${w}u];
#unroll c 4
        q += slope(${w*4+c}u, seen.a, g$w[$c]);
#end
#end
        sum += q.x * seen.along + q.y * seen.across;
    }
    let at = e * DIMENSION;
    dd[at] = sum.x;
    dd[at + 1u] = sum.y;
    if DIMENSION == 3u { dd[at + 2u] = sum.z; }
}
