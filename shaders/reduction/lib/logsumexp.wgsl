// Running log-sum-exp: the pair (m, s) stands for m + log(s), with m the largest element so far and s = sum exp(x - m).
// One pass over the data (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax").
//
// The importing kernel declares LANES, the number of neighbouring threads that share a row, a power of 2 up to 64, and BLOCK, the
// turns after which a thread starts another running sum: one alone would drift.
//
// The start is the lowest finite number and not -inf, so that m - m is 0 and never NaN; elements of -inf add 0.

fn lse_start() -> vec2<f32> {
    return vec2<f32>(-3.4028234663852886e38, 0.0);
}

// One more element: one exp, whichever of the two is larger.
fn lse_push(a: vec2<f32>, x: f32) -> vec2<f32> {
    let d = x - a.x;
    let e = exp_of1(-abs(d));
    return select(vec2<f32>(a.x, a.y + e), vec2<f32>(x, a.y * e + 1.0), d > 0.0);
}

// Four more elements, whose exps do not wait for each other.
fn lse_push4(a: vec2<f32>, x: vec4<f32>) -> vec2<f32> {
    let m = max(a.x, max(max(x.x, x.y), max(x.z, x.w)));
    let e = exp_of(x - m);
    return vec2<f32>(m, a.y * exp_of1(a.x - m) + ((e.x + e.y) + (e.z + e.w)));
}

fn lse_merge(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    let m = max(a.x, b.x);
    return vec2<f32>(m, a.y * exp_of1(a.x - m) + b.y * exp_of1(b.x - m));
}

var<workgroup> lse_tree: array<vec2<f32>, 64>;

// A row that holds infinity has no sum: NaN, whatever order its elements came in.
fn lse_checked(a: vec2<f32>) -> vec2<f32> {
    // WGSL has no constant that is not finite.
    var nan = 0x7fc00000u;
    return vec2<f32>(a.x, select(a.y, bitcast<f32>(nan), bitcast<u32>(a.x) == 0x7f800000u));
}

// The pair of a whole row from those of its LANES threads, for all of them. Once a kernel: no barrier behind the last read.
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
