// e^x and ln x of our own. WGSL asks of exp only 3 + 2 |x| ulp, of log only 2^-21 absolute near 1, and nothing for NaN.
// exp is within 3, log within 2 roundoffs (2^-24 of the result) wherever it is a normal number.
//
// Drivers may regroup sums (Metal and DX12 may, as wgpu calls them). Where that would cost digits, a value passes through
// integers, with a zero mixed in that no compiler can know to be one: the last bit of a small whole number as a float.

// e^(x + more) for |more| < 0.1. Above 88.72 infinity; below -87.33 subnormal, or 0 where the adapter flushes.
fn exp_sum(x: vec4<f32>, more: vec4<f32>) -> vec4<f32> {
    let c = clamp(x, vec4<f32>(-104.0), vec4<f32>(89.0));
    // Rounds to a whole number, which the last bits of the sum then hold: 12582912 = 1.5 2^23.
    let k = bitcast<vec4<i32>>(c * 1.4426950408889634 + 12582912.0) - vec4<i32>(0x4b400000);
    let n = vec4<f32>(k);
    let zero = bitcast<vec4<u32>>(n) & vec4<u32>(1u);
    // r = x - n ln 2, of which the first part has 9 bits: its product and the difference are exact.
    let first = bitcast<vec4<f32>>(bitcast<vec4<u32>>(c - n * 0.693359375) | zero);
    let r = first + (n * 2.12194440e-4 + more);
    // (e^r - 1 - r) / r^2, minimax for |r| <= 0.36: within 0.07 roundoffs of e^r.
    var q = vec4<f32>(1.3808845e-3);
    q = q * r + 8.3714956e-3;
    q = q * r + 4.1668668e-2;
    q = q * r + 1.66664968e-1;
    q = q * r + 4.99999918e-1;
    let y = r * r * q + r + 1.0;
    // Times 2^n: half of it on the exponent's bits, half by a product that overflows and underflows as it should.
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

// Right for subnormal x too, whatever float arithmetic does with them.
fn octave_of(x: vec4<f32>) -> Octave {
    let u = bitcast<vec4<u32>>(x);
    // The bits of a subnormal as a number are the number times 2^149.
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

// ln x: -infinity at 0 and -0, NaN below; infinity and NaN stay.
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
