// What generated elementwise kernels call. All functions work on four lanes.

const PI: f32 = 3.14159265358979;
const SQRT_2_OVER_PI: f32 = 0.7978845608028654;
const SQRT_HALF: f32 = 0.7071067811865476;
const INV_SQRT_2PI: f32 = 0.3989422804014327;

/// One half of a packed pair.
fn half_at(word: u32, which: u32) -> f32 {
    return select(unpack2x16float(word).x, unpack2x16float(word).y, which == 1u);
}

/// f32 to f16 bits, round to nearest even. Integer arithmetic: `pack2x16float` may round either way.
fn half_bits(x: vec4<f32>) -> vec4<u32> {
    let u = bitcast<vec4<u32>>(x);
    let sign = (u >> vec4(16u)) & vec4(0x8000u);
    let a = u & vec4(0x7fffffffu);
    // Normal: rebias the exponent by 112, then round the 13 dropped bits.
    let odd = (a >> vec4(13u)) & vec4(1u);
    let normal = (a - vec4(0x38000000u) + vec4(0xfffu) + odd) >> vec4(13u);
    // Subnormal: the value in units of 2^-24, rounded by hand from the 24-bit significand.
    let shift = clamp(vec4(126u) - (a >> vec4(23u)), vec4(14u), vec4(25u));
    let m = (a & vec4(0x7fffffu)) | vec4(0x800000u);
    let floor_m = m >> shift;
    let rest = m & ((vec4(1u) << shift) - vec4(1u));
    let half = vec4(1u) << (shift - vec4(1u));
    let up = select(vec4(0u), vec4(1u), (rest > half) | ((rest == half) & ((floor_m & vec4(1u)) == vec4(1u))));
    let subnormal = select(floor_m + up, vec4(0u), a < vec4(0x33000000u));
    var h = select(normal, subnormal, a < vec4(0x38800000u));
    h = select(h, vec4(0x7c00u), a >= vec4(0x477ff000u));
    h = select(h, vec4(0x7e00u), a > vec4(0x7f800000u));
    return h | sign;
}

fn pack_half4(x: vec4<f32>) -> vec2<u32> {
    let h = half_bits(x);
    return vec2(h.x | (h.y << 16u), h.z | (h.w << 16u));
}

fn round_half4(x: vec4<f32>) -> vec4<f32> {
    let h = pack_half4(x);
    return vec4(unpack2x16float(h.x), unpack2x16float(h.y));
}

/// tanh through exp of a negative argument: never overflows, unlike the built-in on some drivers.
fn tanh_safe(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x);
    let e = exp(-2.0 * a);
    // Near zero 1 - e cancels: an odd polynomial (Taylor to x^7) is exact to 1 ulp below 0.25.
    let s = x * x;
    let small = x * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.05396825 + s * 0.02186949))));
    return select(sign(x) * (1.0 - e) / (1.0 + e), small, a < vec4(0.25));
}

fn sigmoid(x: vec4<f32>) -> vec4<f32> {
    let e = exp(-abs(x));
    return select(e, vec4(1.0), x >= vec4(0.0)) / (1.0 + e);
}

/// sigmoid' = e / (1 + e)^2 with e = exp(-|x|): no cancellation in the tails.
fn dsigmoid(x: vec4<f32>) -> vec4<f32> {
    let e = exp(-abs(x));
    return e / ((1.0 + e) * (1.0 + e));
}

/// Error function: its Taylor series in x^2 below 1, one minus erfc above.
fn erf(x: vec4<f32>) -> vec4<f32> {
    let a = abs(x);
    let s = a * a;
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
    let small = x * p;
    return select(sign(x) * (1.0 - erfc_tail(a)), small, a < vec4(1.0));
}

/// erfc for a >= 0.5 by the Chebyshev fit of Numerical Recipes (Press et al., section 6.2): relative error below 1.2e-7.
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
    return t * exp(-a * a + q);
}

fn gelu(x: vec4<f32>) -> vec4<f32> {
    return 0.5 * x * (1.0 + erf(x * SQRT_HALF));
}

/// d gelu / dx = Phi(x) + x phi(x).
fn dgelu(x: vec4<f32>) -> vec4<f32> {
    return 0.5 * (1.0 + erf(x * SQRT_HALF)) + x * INV_SQRT_2PI * exp(-0.5 * x * x);
}

fn gelu_tanh(x: vec4<f32>) -> vec4<f32> {
    return 0.5 * x * (1.0 + tanh_safe(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)));
}

fn dgelu_tanh(x: vec4<f32>) -> vec4<f32> {
    let t = tanh_safe(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x));
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + 0.134145 * x * x);
}

fn silu(x: vec4<f32>) -> vec4<f32> {
    return x * sigmoid(x);
}

fn dsilu(x: vec4<f32>) -> vec4<f32> {
    let s = sigmoid(x);
    return s * (1.0 + x * (1.0 - s));
}

/// |x|^y with the sign that an integer y gives a negative x; NaN for other y, as IEEE pow.
fn power(x: vec4<f32>, y: vec4<f32>) -> vec4<f32> {
    let magnitude = select(pow(abs(x), y), select(vec4(0.0), vec4(1.0), y == vec4(0.0)), x == vec4(0.0) & y >= vec4(0.0));
    let whole = floor(y) == y;
    let odd = whole & (abs(y) < vec4(16777216.0)) & (floor(0.5 * y) * 2.0 != y);
    let negative = x < vec4(0.0);
    let signed = select(magnitude, -magnitude, negative & odd);
    // 0 * inf is the NaN that a constant expression may not be.
    return select(signed, (x - x) / (x - x), negative & !whole);
}

/// sin and cos with our own reduction to [-pi, pi]: drivers' built-ins differ far from zero.
fn reduced(x: vec4<f32>) -> vec4<f32> {
    let n = round(x * 0.15915494309189535);
    // 2 pi in three parts, each product exact for |n| < 2^10.
    return ((x - n * 6.28125) - n * 0.0019350051879882812) - n * 3.0199159819e-7;
}

fn sin_reduced(x: vec4<f32>) -> vec4<f32> {
    return sin(reduced(x));
}

fn cos_reduced(x: vec4<f32>) -> vec4<f32> {
    return cos(reduced(x));
}

/// Float to integer towards zero; out of range gives the nearest end, NaN gives 0.
fn u32_saturated(x: vec4<f32>) -> vec4<u32> {
    let inside = vec4<u32>(clamp(x, vec4(0.0), vec4(4294967040.0)));
    return select(select(inside, vec4(0xffffffffu), x >= vec4(4294967296.0)), vec4(0u), x != x);
}

fn i32_saturated(x: vec4<f32>) -> vec4<i32> {
    let inside = vec4<i32>(clamp(x, vec4(-2147483648.0), vec4(2147483520.0)));
    return select(select(inside, vec4(2147483647i), x >= vec4(2147483648.0)), vec4(0i), x != x);
}

fn relu(x: vec4<f32>) -> vec4<f32> { return max(x, vec4<f32>(0.0)); }
