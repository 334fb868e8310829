// e^x and ln x of our own. WGSL asks of exp only 3 + 2 |x| ulp, of log only 2^-21 absolute near 1, and nothing for NaN.
// Both are within 2 roundoffs (2^-24 of the result) wherever the result is a normal number; polynomials: Cephes, S. Moshier.
//
// Drivers may regroup sums (Metal and DX12 do as wgpu calls them). Where that would cost digits, a value passes through
// integers: with bits masked that are zero anyhow, or with a zero mixed in that the compiler cannot know to be one.

// e^x. Above 88.72 infinity; below -87.33 subnormal, or 0 where the adapter flushes; NaN stays NaN.
fn exp_of(x: vec4<f32>) -> vec4<f32> {
    let c = clamp(x, vec4<f32>(-104.0), vec4<f32>(89.0));
    // Rounds to a whole number, which the last bits of the sum then hold: 12582912 = 1.5 2^23.
    let k = bitcast<vec4<i32>>(c * 1.4426950408889634 + 12582912.0) - vec4<i32>(0x4b400000);
    let n = vec4<f32>(k);
    // r = x - n ln 2. The first part of ln 2 has 9 bits, so that its product is exact and ends in zeros, as n does.
    let first = bitcast<vec4<f32>>(bitcast<vec4<u32>>(n * 0.693359375) & vec4<u32>(0xffffffc0u));
    let zero = bitcast<vec4<u32>>(n) & vec4<u32>(1u);
    let r = bitcast<vec4<f32>>(bitcast<vec4<u32>>(c - first) | zero) + n * 2.12194440e-4;
    var q = vec4<f32>(1.9875691500e-4);
    q = q * r + 1.3981999507e-3;
    q = q * r + 8.3334519073e-3;
    q = q * r + 4.1665795894e-2;
    q = q * r + 1.6666665459e-1;
    q = q * r + 5.0000001201e-1;
    let y = r * r * q + r + 1.0;
    // Times 2^n: half of it on the exponent's bits, half by a product that overflows and underflows as it should.
    let half = k >> vec4<u32>(1u);
    let scaled = bitcast<vec4<f32>>(bitcast<vec4<i32>>(y) + (half << vec4<u32>(23u)));
    let e = scaled * bitcast<vec4<f32>>((k - half + vec4<i32>(127)) << vec4<u32>(23u));
    let u = bitcast<vec4<u32>>(x);
    let is_nan = (u & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    return bitcast<vec4<f32>>(select(bitcast<vec4<u32>>(e), u, is_nan));
}

fn exp_of1(x: f32) -> f32 { return exp_of(vec4<f32>(x)).x; }

// ln x. Right for subnormal x too, whatever float arithmetic does with them; ln +-0 = -infinity, ln of less is NaN, infinity
// and NaN stay.
fn log_of(x: vec4<f32>) -> vec4<f32> {
    let u = bitcast<vec4<u32>>(x);
    // The bits of a subnormal as a number are the number times 2^149.
    let tiny = u < vec4<u32>(0x00800000u);
    let v = select(bitcast<vec4<i32>>(u), bitcast<vec4<i32>>(vec4<f32>(bitcast<vec4<i32>>(u))), tiny);
    // x = 2^e m with m from sqrt(1/2) up to sqrt 2.
    let e = (v - vec4<i32>(0x3f3504f3)) >> vec4<u32>(23u);
    let f = bitcast<vec4<f32>>(v - (e << vec4<u32>(23u))) - 1.0;
    let n = vec4<f32>(select(e, e - vec4<i32>(149), tiny));
    var p = vec4<f32>(7.0376836292e-2);
    p = p * f - 1.1514610310e-1;
    p = p * f + 1.1676998740e-1;
    p = p * f - 1.2420140846e-1;
    p = p * f + 1.4249322787e-1;
    p = p * f - 1.6668057665e-1;
    p = p * f + 2.0000714765e-1;
    p = p * f - 2.4999993993e-1;
    p = p * f + 3.3333331174e-1;
    let s = f * f;
    let rest = s * f * p - n * 2.12194440e-4 - 0.5 * s;
    var y = bitcast<vec4<u32>>((f + rest) + n * 0.693359375);
    y = select(y, u, u >= vec4<u32>(0x7f800000u));
    y = select(y, vec4<u32>(0x7fc00000u), u > vec4<u32>(0x80000000u));
    y = select(y, vec4<u32>(0xff800000u), (u & vec4<u32>(0x7fffffffu)) == vec4<u32>(0u));
    return bitcast<vec4<f32>>(y);
}

fn log_of1(x: f32) -> f32 { return log_of(vec4<f32>(x)).x; }
