// e^x and ln x with known accuracy. WGSL's exp may be off by 3 + 2 |x| ulp, its log by 2^-21 (absolute) near 1, and neither
// promises anything for NaN. Here exp is within 3 roundoffs and log within 2 (a roundoff is 2^-24 of the result) wherever the
// result is a normal number.
//
// Drivers may regroup sums (wgpu lets Metal and DX12 do so). Where regrouping would cost digits, the bits of a value are combined
// with a zero that no compiler can recognise as zero: the lowest bit of a small whole number stored as a float.

// e^(x + more) for |more| < 0.1. The result is infinite above 88.72. Below -87.33 it is subnormal, or 0 on adapters that flush.
fn exp_sum(x: vec4<f32>, more: vec4<f32>) -> vec4<f32> {
    let c = clamp(x, vec4<f32>(-104.0), vec4<f32>(89.0));
    // Adding 12582912 = 1.5 2^23 rounds to a whole number, which is then in the low bits of the sum.
    let k = bitcast<vec4<i32>>(c * 1.4426950408889634 + 12582912.0) - vec4<i32>(0x4b400000);
    let n = vec4<f32>(k);
    let zero = bitcast<vec4<u32>>(n) & vec4<u32>(1u);
    // r = x - n ln 2, with ln 2 in two parts. The first part has 9 bits, so its product with n and the difference are exact.
    let first = bitcast<vec4<f32>>(bitcast<vec4<u32>>(c - n * 0.693359375) | zero);
    let r = first + (n * 2.12194440e-4 + more);
    // (e^r - 1 - r) / r^2, minimax for |r| <= 0.36: within 0.07 roundoffs of e^r.
    var q = vec4<f32>(1.3808845e-3);
    q = q * r + 8.3714956e-3;
    q = q * r + 4.1668668e-2;
    q = q * r + 1.66664968e-1;
    q = q * r + 4.99999918e-1;
    let y = r * r * q + r + 1.0;
    // Multiplies by 2^n in two halves: one is added to the exponent's bits, the other is a product, which overflows and
    // underflows correctly.
    let half = k >> vec4<u32>(1u);
    let scaled = bitcast<vec4<f32>>(bitcast<vec4<i32>>(y) + (half << vec4<u32>(23u)));
    return scaled * bitcast<vec4<f32>>((k - half + vec4<i32>(127)) << vec4<u32>(23u));
}

// e^x. NaN stays NaN.
fn exp_of(x: vec4<f32>) -> vec4<f32> {
    let u = bitcast<vec4<u32>>(x);
    let is_nan = (u & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    return bitcast<vec4<f32>>(select(bitcast<vec4<u32>>(exp_sum(x, vec4<f32>())), u, is_nan));
}

fn exp_of1(x: f32) -> f32 { return exp_of(vec4<f32>(x)).x; }

// x = 2^n (1 + f) with 1 + f from sqrt(1/2) up to sqrt 2, for x > 0.
struct Octave {
    n: vec4<f32>,
    f: vec4<f32>,
}

// Splits x > 0. Subnormal x are handled as integers, so the result is right even where float arithmetic flushes them.
fn octave_of(x: vec4<f32>) -> Octave {
    let u = bitcast<vec4<u32>>(x);
    // The bits of a subnormal, read as an integer, are the number times 2^149.
    let tiny = u < vec4<u32>(0x00800000u);
    let v = select(bitcast<vec4<i32>>(u), bitcast<vec4<i32>>(vec4<f32>(bitcast<vec4<i32>>(u))), tiny);
    let e = (v - vec4<i32>(0x3f3504f3)) >> vec4<u32>(23u);
    let f = bitcast<vec4<f32>>(v - (e << vec4<u32>(23u))) - 1.0;
    return Octave(vec4<f32>(select(e, e - vec4<i32>(149), tiny)), f);
}

// ln(1 + f) - f + f^2 / 2; polynomial: Cephes, S. Moshier.
fn log_rest(f: vec4<f32>) -> vec4<f32> {
    var p = vec4<f32>(7.0376836292e-2);
    p = p * f - 1.1514610310e-1;
    p = p * f + 1.1676998740e-1;
    p = p * f - 1.2420140846e-1;
    p = p * f + 1.4249322787e-1;
    p = p * f - 1.6668057665e-1;
    p = p * f + 2.0000714765e-1;
    p = p * f - 2.4999993993e-1;
    p = p * f + 3.3333331174e-1;
    return f * f * f * p;
}

// ln x. It is -infinity at 0 and -0, and NaN for negative x. Infinity stays infinity, NaN stays NaN.
fn log_of(x: vec4<f32>) -> vec4<f32> {
    let b = octave_of(x);
    let rest = log_rest(b.f) - b.n * 2.12194440e-4 - 0.5 * b.f * b.f;
    let u = bitcast<vec4<u32>>(x);
    var y = bitcast<vec4<u32>>((b.f + rest) + b.n * 0.693359375);
    y = select(y, u, u >= vec4<u32>(0x7f800000u));
    y = select(y, vec4<u32>(0x7fc00000u), u > vec4<u32>(0x80000000u));
    y = select(y, vec4<u32>(0xff800000u), (u & vec4<u32>(0x7fffffffu)) == vec4<u32>(0u));
    return bitcast<vec4<f32>>(y);
}

fn log_of1(x: f32) -> f32 { return log_of(vec4<f32>(x)).x; }
