// x^y as IEEE 754 has it: x^0 and 1^y are 1 for NaN too, (-1)^+-infinity is 1, +-0 and +-infinity follow their limits with the
// sign that an odd y gives, other NaN stay, and a negative x with a broken y gives NaN.
//
// |x|^y = e^(y ln |x|) with ln |x| in two parts, so that the error is below (4 + 0.15 |y ln x|) roundoffs (2^-24 of the
// result). In one part it would be 1.4 |y ln x|; WGSL's pow is worse yet.

// x without its last 12 bits: the product of two such is exact.
fn short(x: vec4<f32>) -> vec4<f32> { return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) & vec4<u32>(0xfffff000u)); }

// a^y for finite a > 0, and y ln a below 200.
fn positive_power(a: vec4<f32>, y: vec4<f32>) -> vec4<f32> {
    let b = octave_of(a);
    let zero = bitcast<vec4<u32>>(b.n) & vec4<u32>(1u);
    let rest = log_rest(b.f);
    // f^2 / 2 = square + more, the first part exact.
    let f = short(b.f);
    let square = 0.5 * f * f;
    let more = 0.5 * (b.f + f) * kept(b.f - f, zero);
    // ln a = high + low: n ln 2 + f - f^2/2 + rest less its own first 12 bits, by differences that are exact or small.
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
    // Beyond, the result is 0 or infinite, which the plain product says.
    let far = (bitcast<vec4<u32>>(plain) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x43480000u);
    let near = positive_power(select(a, vec4<f32>(1.0), far), select(y, vec4<f32>(1.0), far));
    var p = select(bitcast<vec4<u32>>(near), bitcast<vec4<u32>>(exp_sum(plain, vec4<f32>())), far);
    p = select(p, one, ax == one);
    // At and above 2^24 every y is even.
    let whole = (floor(y) == y) | (ay >= vec4<u32>(0x4b000000u));
    let half = 0.5 * y;
    let odd = whole & (ay < vec4<u32>(0x4b800000u)) & (floor(half) != half);
    let below = (ux >> vec4<u32>(31u)) == vec4<u32>(1u);
    p = select(p, p | vec4<u32>(0x80000000u), below & odd);
    let broken = below & !whole & (ax != vec4<u32>(0u)) & (ax != infinite);
    p = select(p, vec4<u32>(0x7fc00000u), broken | (ax > infinite) | (ay > infinite));
    return bitcast<vec4<f32>>(select(p, one, (ux == one) | (ay == vec4<u32>(0u))));
}

// b a^(b-1) dy, 0 for exponent 0.
fn dpower_base(a: vec4<f32>, b: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    return pick4(dy * b * power(a, b - 1.0), vec4<f32>(0.0), (bitcast<vec4<u32>>(b) & vec4<u32>(0x7fffffffu)) == vec4<u32>(0u));
}

// a^b ln a dy, 0 at base 0 with an exponent of at least 0.
fn dpower_exponent(a: vec4<f32>, b: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    let base = (bitcast<vec4<u32>>(a) & vec4<u32>(0x7fffffffu)) == vec4<u32>(0u);
    let exponent = bitcast<vec4<u32>>(b);
    // From 0 to infinity by the bits, or -0.
    let least = (exponent <= vec4<u32>(0x7f800000u)) | (exponent == vec4<u32>(0x80000000u));
    return pick4(dy * power(a, b) * log_of(a), vec4<f32>(0.0), base & least);
}
