// Running log-sum-exp: a pair (m, s) represents m + log(s), where m is the largest element so far and s = sum exp(x - m).
// It takes one pass over the data (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").
//
// The importing kernel declares LANES, the number of neighbouring threads that share a row (a power of 2 up to 256), and BLOCK,
// the iterations after which a thread starts another running sum, because a single one would drift.
//
// The start is the lowest finite number instead of -inf, so m - m is 0 and never NaN. Elements of -inf add 0.

fn lse_start() -> vec2<f32> {
    return vec2<f32>(-3.4028234663852886e38, 0.0);
}

// Adds an element with one exp, whichever of the two is larger.
fn lse_push(a: vec2<f32>, x: f32) -> vec2<f32> {
    let d = x - a.x;
    let e = exp_of1(-abs(d));
    return select(vec2<f32>(a.x, a.y + e), vec2<f32>(x, a.y * e + 1.0), d > 0.0);
}

// Adds four elements, whose exps do not depend on each other.
fn lse_push4(a: vec2<f32>, x: vec4<f32>) -> vec2<f32> {
    let m = max(a.x, max(max(x.x, x.y), max(x.z, x.w)));
    let e = exp_of(x - m);
    return vec2<f32>(m, a.y * exp_of1(a.x - m) + ((e.x + e.y) + (e.z + e.w)));
}

fn lse_merge(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    let m = max(a.x, b.x);
    return vec2<f32>(m, a.y * exp_of1(a.x - m) + b.y * exp_of1(b.x - m));
}

const LSE_TREE: u32 = max(64u, LANES);
var<workgroup> lse_tree: array<vec2<f32>, LSE_TREE>;

// Makes the sum of a row that contains infinity NaN, whatever the order of its elements.
fn lse_checked(a: vec2<f32>) -> vec2<f32> {
    // WGSL has no constant that is not finite.
    var nan = 0x7fc00000u;
    return vec2<f32>(a.x, select(a.y, bitcast<f32>(nan), bitcast<u32>(a.x) == 0x7f800000u));
}

// Merges the pairs of a row's LANES threads, and returns the result to all of them. A kernel may call this only once, because
// there is no barrier after the last read.
fn row_lse(lane: u32, value: vec2<f32>) -> vec2<f32> {
    if LANES == 1u { return lse_checked(value); }
    let t = lane % LANES;
    lse_tree[lane] = value;
    workgroupBarrier();
    for (var reach = LANES / 2u; reach > 0u; reach = reach >> 1u) {
        if t < reach { lse_tree[lane] = lse_merge(lse_tree[lane], lse_tree[lane + reach]); }
        workgroupBarrier();
    }
    return lse_checked(lse_tree[lane - t]);
}
