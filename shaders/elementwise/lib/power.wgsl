// x^y by the rules of IEEE 754: x^0 and 1^y are 1 even for NaN, (-1)^+-infinity is 1, and +-0 and +-infinity follow their limits,
// with the sign that an odd y gives. Any other NaN stays NaN, and a negative x with a fractional y gives NaN.
//
// |x|^y = e^(y ln |x|) with ln |x| in two parts, whose error is below (4 + 0.15 |y ln x|) roundoffs (2^-24 of the result). With
// one part it would be 1.4 |y ln x|. WGSL's pow is even less accurate.

// x without its last 12 bits. The product of two such numbers is exact.
fn short(x: vec4<f32>) -> vec4<f32> { return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) & vec4<u32>(0xfffff000u)); }

// a^y for finite a > 0 and |y ln a| below 200.
fn positive_power(a: vec4<f32>, y: vec4<f32>) -> vec4<f32> {
    let b = octave_of(a);
    let zero = bitcast<vec4<u32>>(b.n) & vec4<u32>(1u);
    let rest = log_rest(b.f);
    // f^2 / 2 = square + more, where square is exact.
    let f = short(b.f);
    let square = 0.5 * f * f;
    let more = 0.5 * (b.f + f) * kept(b.f - f, zero);
    // ln a = n ln 2 + f - f^2/2 + rest = high + low, where high has 12 bits, and low is computed by differences that are exact or
    // small.
    let high = short(b.n * 0.693359375 + (b.f - 0.5 * b.f * b.f + rest));
    let left = kept(kept(kept(b.n * 0.693359375 - high, zero) + b.f, zero) - square, zero);
    let low = left + (rest - more - b.n * 2.12194440e-4);
    let z = short(y);
    return exp_sum(z * high, kept(y - z, zero) * high + y * low);
}

fn power(x: vec4<f32>, y: vec4<f32>) -> vec4<f32> {
    let ux = bitcast<vec4<u32>>(x);
    let uy = bitcast<vec4<u32>>(y);
    let ax = ux & vec4<u32>(0x7fffffffu);
    let ay = uy & vec4<u32>(0x7fffffffu);
    let one = vec4<u32>(0x3f800000u);
    let infinite = vec4<u32>(0x7f800000u);
    let a = bitcast<vec4<f32>>(ax);
    let plain = y * log_of(a);
    // Above 200 in magnitude, the result is 0 or infinite, and the plain product suffices.
    let far = (bitcast<vec4<u32>>(plain) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x43480000u);
    let near = positive_power(select(a, vec4<f32>(1.0), far), select(y, vec4<f32>(1.0), far));
    var p = select(bitcast<vec4<u32>>(near), bitcast<vec4<u32>>(exp_sum(plain, vec4<f32>())), far);
    p = select(p, one, ax == one);
    // Every y of 2^24 or more is even.
    let whole = (floor(y) == y) | (ay >= vec4<u32>(0x4b000000u));
    let half = 0.5 * y;
    let odd = whole & (ay < vec4<u32>(0x4b800000u)) & (floor(half) != half);
    let below = (ux >> vec4<u32>(31u)) == vec4<u32>(1u);
    p = select(p, p | vec4<u32>(0x80000000u), below & odd);
    let broken = below & !whole & (ax != vec4<u32>(0u)) & (ax != infinite);
    p = select(p, vec4<u32>(0x7fc00000u), broken | (ax > infinite) | (ay > infinite));
    return bitcast<vec4<f32>>(select(p, one, (ux == one) | (ay == vec4<u32>(0u))));
}

// b a^(b-1) dy, or 0 for an exponent of 0.
fn dpower_base(a: vec4<f32>, b: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    return pick4(dy * b * power(a, b - 1.0), vec4<f32>(0.0), (bitcast<vec4<u32>>(b) & vec4<u32>(0x7fffffffu)) == vec4<u32>(0u));
}

// a^b ln a dy, or 0 for a base of 0 with an exponent of 0 or more.
fn dpower_exponent(a: vec4<f32>, b: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    let base = (bitcast<vec4<u32>>(a) & vec4<u32>(0x7fffffffu)) == vec4<u32>(0u);
    let exponent = bitcast<vec4<u32>>(b);
    // By its bits, the exponent is from 0 to infinity, or -0.
    let least = (exponent <= vec4<u32>(0x7f800000u)) | (exponent == vec4<u32>(0x80000000u));
    return pick4(dy * power(a, b) * log_of(a), vec4<f32>(0.0), base & least);
}
