// Functions of generated elementwise kernels, which also use f16, bf16, exp_log and nan. trig and power are in files of their own. All
// work on vectors of four.

const SQRT_2_OVER_PI: f32 = 0.7978845608028654;
const SQRT_HALF: f32 = 0.7071067811865476;
const INV_SQRT_2PI: f32 = 0.3989422804014327;

/// tanh by e^(-2|x|), which never overflows. The error is at most 8 roundoffs, and -0 stays -0.
fn tanh_of(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x);
    let e = exp_of(-2.0 * a);
    // Near zero 1 - e cancels. Below 0.25, the Taylor polynomial to x^9 has an error of at most 1 ulp.
    let s = x * x;
    let small = x * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.05396825 + s * 0.02186949))));
    return select(sign(x) * (1.0 - e) / (1.0 + e), small, a < vec4(0.25));
}

/// tanh' = 4 e / (1 + e)^2 with e = e^(-2|x|), because 1 - tanh^2 would cancel in the tails.
fn dtanh(x: vec4<f32>) -> vec4<f32> {
    let e = exp_of(-2.0 * abs(x));
    return 4.0 * e / ((1.0 + e) * (1.0 + e));
}

fn sigmoid(x: vec4<f32>) -> vec4<f32> {
    let e = exp_of(-abs(x));
    return select(e, vec4(1.0), x >= vec4(0.0)) / (1.0 + e);
}

/// sigmoid' = e / (1 + e)^2 with e = exp(-|x|), which does not cancel in the tails.
fn dsigmoid(x: vec4<f32>) -> vec4<f32> {
    let e = exp_of(-abs(x));
    return e / ((1.0 + e) * (1.0 + e));
}

/// erf for |x| < 1, by its Taylor series.
fn erf_small(x: vec4<f32>) -> vec4<f32> {
    let s = x * x;
    var p = vec4(-1.6365844691234924e-7);
    p = p * s + 1.6462114365889246e-6;
    p = p * s - 1.4925650358406252e-5;
    p = p * s + 1.2055332981789664e-4;
    p = p * s - 8.548327023450853e-4;
    p = p * s + 5.223977625442188e-3;
    p = p * s - 2.6866170645131252e-2;
    p = p * s + 1.1283791670955126e-1;
    p = p * s - 3.761263890318375e-1;
    p = p * s + 1.1283791670955126;
    return x * p;
}

/// erfc for a >= 0.5 by the Chebyshev fit of Numerical Recipes (Press et al., section 6.2). The relative error is below 1.2e-7,
/// plus that from rounding a^2.
fn erfc_tail(a: vec4<f32>) -> vec4<f32> {
    let t = 1.0 / (1.0 + 0.5 * a);
    var q = vec4(0.17087277);
    q = q * t - 0.82215223;
    q = q * t + 1.48851587;
    q = q * t - 1.13520398;
    q = q * t + 0.27886807;
    q = q * t - 0.18628806;
    q = q * t + 0.09678418;
    q = q * t + 0.37409196;
    q = q * t + 1.00002368;
    q = q * t - 1.26551223;
    return t * exp_of(-a * a + q);
}

fn erf(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x);
    return select(sign(x) * (1.0 - erfc_tail(a)), erf_small(x), a < vec4(1.0));
}

/// Phi(x), the normal distribution function. The left tail is computed by erfc, because 1 + erf would cancel.
fn normal_cdf(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x) * SQRT_HALF;
    let tail = 0.5 * select(erfc_tail(a), 1.0 - erf_small(a), a < vec4(1.0));
    return select(1.0 - tail, tail, x < vec4(0.0));
}

fn gelu(x: vec4<f32>) -> vec4<f32> {
    return x * normal_cdf(x);
}

/// d gelu / dx = Phi(x) + x phi(x).
fn dgelu(x: vec4<f32>) -> vec4<f32> {
    return normal_cdf(x) + x * INV_SQRT_2PI * exp_of(-0.5 * x * x);
}

fn gelu_tanh(x: vec4<f32>) -> vec4<f32> {
    return 0.5 * x * (1.0 + tanh_of(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)));
}

fn dgelu_tanh(x: vec4<f32>) -> vec4<f32> {
    // Beyond 20 the result is 0 or 1 to the last bit, and x^2 could overflow.
    let c = clamp(x, vec4(-20.0), vec4(20.0));
    let inner = SQRT_2_OVER_PI * (c + 0.044715 * c * c * c);
    let d = 0.5 * (1.0 + tanh_of(inner)) + 0.5 * c * dtanh(inner) * SQRT_2_OVER_PI * (1.0 + 0.134145 * c * c);
    return pick4(d, x, nan4(x));
}

fn silu(x: vec4<f32>) -> vec4<f32> {
    return x * sigmoid(x);
}

fn dsilu(x: vec4<f32>) -> vec4<f32> {
    let s = sigmoid(x);
    return s * (1.0 + x * (1.0 - s));
}

/// x = 4^k m with m from 1/2 up to 2, for x > 0, also subnormal. `k` is shifted to the bits of an exponent.
struct Square {
    k: vec4<i32>,
    m: vec4<f32>,
}

fn square_of(x: vec4<f32>) -> Square {
    let u = bitcast<vec4<u32>>(x);
    // The bits of a subnormal, read as an integer, are its value times 2^149. Doubled, the factor is 2^150, a power of 4.
    let tiny = u < vec4(0x00800000u);
    let v = select(bitcast<vec4<i32>>(u), bitcast<vec4<i32>>(vec4<f32>(bitcast<vec4<i32>>(u << vec4(1u)))), tiny);
    let k = (v - vec4(0x3f000000)) >> vec4(24u);
    return Square(select(k, k - vec4(75), tiny) << vec4(23u), bitcast<vec4<f32>>(v - (k << vec4(24u))));
}

/// Square root within 2 roundoffs: WGSL's, which has a few, improved by one Newton step. 0, -0, infinity and NaN are unchanged.
fn sqrt_of(x: vec4<f32>) -> vec4<f32> {
    let s = square_of(x);
    let y = sqrt(s.m);
    // Compilers may replace sqrt(m)^2 by m. y is from 0.7 to 1.42, so its bit 30 is a zero that the compiler does not know.
    let known = kept(y, bitcast<vec4<u32>>(y) >> vec4(30u));
    let better = known + (s.m - known * known) * (0.5 / known);
    let u = bitcast<vec4<u32>>(x);
    var bits = bitcast<vec4<u32>>(bitcast<vec4<i32>>(better) + s.k);
    bits = select(bits, u, u >= vec4(0x7f800000u));
    bits = select(bits, vec4(0x7fc00000u), u > vec4(0x80000000u));
    return bitcast<vec4<f32>>(select(bits, u, (u & vec4(0x7fffffffu)) == vec4(0u)));
}

/// 1 / sqrt(x), which is +-infinity at +-0, 0 at infinity and NaN below 0.
fn rsqrt_of(x: vec4<f32>) -> vec4<f32> {
    let s = square_of(x);
    let u = bitcast<vec4<u32>>(x);
    var bits = bitcast<vec4<u32>>(bitcast<vec4<i32>>(inverseSqrt(s.m)) - s.k);
    bits = select(bits, vec4(0u), u == vec4(0x7f800000u));
    bits = select(bits, vec4(0x7fc00000u), u > vec4(0x7f800000u));
    return bitcast<vec4<f32>>(select(bits, u | vec4(0x7f800000u), (u & vec4(0x7fffffffu)) == vec4(0u)));
}

fn relu(x: vec4<f32>) -> vec4<f32> { return pick4(max(x, vec4(0.0)), x, nan4(x)); }

fn drelu(x: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    return pick4(pick4(vec4(0.0), dy, is_less(vec4(0.0), x)), x, nan4(x));
}

fn magnitude(x: vec4<f32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) & vec4(0x7fffffffu));
}

fn dmagnitude(x: vec4<f32>, dy: vec4<f32>) -> vec4<f32> { return pick4(dy * sign(x), x, nan4(x)); }

fn limited(x: vec4<f32>, low: vec4<f32>, high: vec4<f32>) -> vec4<f32> {
    return pick4(clamp(x, low, high), x, nan4(x));
}

fn dlimited(x: vec4<f32>, dy: vec4<f32>, low: vec4<f32>, high: vec4<f32>) -> vec4<f32> {
    return pick4(pick4(vec4(0.0), dy, is_most(low, x) & is_most(x, high)), x, nan4(x));
}

/// Maps floats that are not NaN to integers of the same order. -0 becomes 0.
fn ordered(x: vec4<f32>) -> vec4<i32> {
    let i = bitcast<vec4<i32>>(x);
    return select(i, -(i & vec4(0x7fffffff)), i < vec4(0));
}

/// a == b, a < b and a <= b, all false if either is NaN.
fn is_equal(a: vec4<f32>, b: vec4<f32>) -> vec4<bool> { return (ordered(a) == ordered(b)) & !(nan4(a) | nan4(b)); }

fn is_less(a: vec4<f32>, b: vec4<f32>) -> vec4<bool> { return (ordered(a) < ordered(b)) & !(nan4(a) | nan4(b)); }

fn is_most(a: vec4<f32>, b: vec4<f32>) -> vec4<bool> { return (ordered(a) <= ordered(b)) & !(nan4(a) | nan4(b)); }

/// The gradient of max(a, b) with respect to a, times dy: half of dy at a tie, NaN if either is NaN. With a and b exchanged, it
/// is the gradient of min(a, b) with respect to b.
fn dmax(a: vec4<f32>, b: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    let share = pick4(pick4(vec4(0.0), dy, is_less(b, a)), 0.5 * dy, is_equal(a, b));
    return pick4(pick4(share, a, nan4(a)), b, nan4(b));
}

/// Integer division towards zero. x / 0 is 0, and the least i32 / -1 is itself. Some adapters leave both undefined.
fn quotient_u32(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    let none = b == vec4(0u);
    return select(a / select(b, vec4(1u), none), vec4(0u), none);
}

fn quotient_i32(a: vec4<i32>, b: vec4<i32>) -> vec4<i32> {
    let none = b == vec4(0);
    let wraps = (b == vec4(-1)) & (a == vec4(i32(-2147483648)));
    return select(a / select(b, vec4(1), none | wraps), vec4(0), none);
}

/// Float to integer, towards zero. A value out of range becomes the nearest limit, and NaN becomes 0.
fn u32_saturated(x: vec4<f32>) -> vec4<u32> {
    let inside = vec4<u32>(clamp(x, vec4(0.0), vec4(4294967040.0)));
    return select(select(inside, vec4(0xffffffffu), x >= vec4(4294967296.0)), vec4(0u), nan4(x));
}

fn i32_saturated(x: vec4<f32>) -> vec4<i32> {
    let inside = vec4<i32>(clamp(x, vec4(-2147483648.0), vec4(2147483520.0)));
    return select(select(inside, vec4(2147483647i), x >= vec4(2147483648.0)), vec4(0i), nan4(x));
}
