// The sign vote of TIES over trimmed differences, in one pass. For every element i, with the weights w_m of the models:
//
//   d_m   = w_m (x_m - base)   where low_m <= (|x_m - base|, i) < high_m, pairs in lexicographic order, else 0
//   total = sum d_m
//   sum   = sum of the d_m that have the sign of total (0 counts as positive), divided by the sum of their w_m if `normalize`
//   y     = base + lambda sum
//   finite[t] = [number of NaN and infinities, 2^32 - 1 - the index of the first one] of base (t = 0) and x_m (t = m + 1)
// A sum of weights that is 0 divides by 1. Sums are in the order of the models. Bytes: base, every x_m and y once.

const MODELS: u32 = 2u;

struct Params {
    groups_x: u32,
    n: u32,
    normalize: u32,
    lambda: f32,
#unroll m MODELS
    weight$m: f32,
    low_key$m: u32,
    low_index$m: u32,
    high_key$m: u32,
    high_index$m: u32,
#end
}

// Elements are read four at a time. Buffers are padded to a multiple of four.
@group(0) @binding(0) var<storage, read> base: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> finite: array<atomic<u32>>;
@group(0) @binding(3) var<uniform> p: Params;
#unroll m MODELS
@group(0) @binding(${4 + m}) var<storage, read> x$m: array<vec4<f32>>;
#end

// Returns d where (key, index) is at or after (low_key, low_index) and before (high_key, high_index), else 0. It works on bits, so
// no driver's fast math can change it.
fn kept(d: vec4<f32>, i: u32, low_key: u32, low_index: u32, high_key: u32, high_index: u32) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(d);
    let key = bits & vec4(0x7fffffffu);
    let index = vec4(i) + vec4(0u, 1u, 2u, 3u);
    var behind = key >= vec4(low_key);
    var ahead = key < vec4(high_key);
    // Few tensors have an end among equal elements.
    if low_index > 0u { behind = behind & ((key != vec4(low_key)) | (index >= vec4(low_index))); }
    if high_index > 0u { ahead = ahead | ((key == vec4(high_key)) & (index < vec4(high_index))); }
    return bitcast<vec4<f32>>(select(vec4(0u), bits, behind & ahead));
}

fn bad(x: vec4<f32>) -> vec4<bool> { return (bitcast<vec4<u32>>(x) & vec4(0x7f800000u)) == vec4(0x7f800000u); }

// Counts the elements of tensor t that are NaN or infinite, of four that begin at i.
fn note(t: u32, x: vec4<f32>, i: u32) {
    let is_bad = bad(x);
    for (var k = 0u; k < 4u; k++) {
        if is_bad[k] && i + k < p.n {
            atomicAdd(&finite[2u * t], 1u);
            atomicMax(&finite[2u * t + 1u], ~(i + k));
        }
    }
}

@compute @workgroup_size(64)
fn consensus(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    // The test is on `at`, because 4 at wraps for spare threads near 2^32 elements.
    if at > (p.n - 1u) / 4u { return; }
    let b = base[at];
    var total = vec4(0.0);
    // Where an input is not finite, no difference from it is.
    var wrong = vec4(false);
#unroll m MODELS
    let m$m = x$m[at];
    let difference$m = m$m - b;
    wrong = wrong | bad(difference$m);
    let d$m = kept(difference$m, 4u * at, p.low_key$m, p.low_index$m, p.high_key$m, p.high_index$m) * p.weight$m;
    total += d$m;
#end
    let up = total >= vec4(0.0);
    let down = total < vec4(0.0);
    var sum = vec4(0.0);
    var weights = vec4(0.0);
#unroll m MODELS
    let agrees$m = ((d$m > vec4(0.0)) & up) | ((d$m < vec4(0.0)) & down);
    sum += select(vec4(0.0), d$m, agrees$m);
    weights += select(vec4(0.0), vec4(p.weight$m), agrees$m);
#end
    if p.normalize != 0u { sum = sum / select(weights, vec4(1.0), weights == vec4(0.0)); }
    y[at] = b + sum * p.lambda;
    if any(wrong) {
        note(0u, b, 4u * at);
#unroll m MODELS
        note(${m + 1}u, m$m, 4u * at);
#end
    }
}
