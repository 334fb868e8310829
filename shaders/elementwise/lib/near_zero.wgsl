// e^x - 1 and ln(1 + x), which keep their digits near 0, and activations made of them. They use exp_log and nan.

/// e^x - 1 within 4 roundoffs (2^-24 of the result). -0 and subnormal numbers are unchanged.
fn expm1_of(x: vec4<f32>) -> vec4<f32> {
    // x = n ln 2 + r and e^r - 1 as in exp_log.wgsl. Then e^x - 1 = 2^n (e^r - 1) + (2^n - 1), where nothing cancels.
    let c = clamp(x, vec4<f32>(-4.0), vec4<f32>(4.0));
    let k = bitcast<vec4<i32>>(c * 1.4426950408889634 + 12582912.0) - vec4<i32>(0x4b400000);
    let n = vec4<f32>(k);
    let zero = bitcast<vec4<u32>>(n) & vec4<u32>(1u);
    let r = kept(c - n * 0.693359375, zero) + n * 2.12194440e-4;
    var q = vec4<f32>(1.3808845e-3);
    q = q * r + 8.3714956e-3;
    q = q * r + 4.1668668e-2;
    q = q * r + 1.66664968e-1;
    q = q * r + 4.99999918e-1;
    let power = bitcast<vec4<f32>>((k + vec4<i32>(127)) << vec4<u32>(23u));
    let near = power * (r * r * q + r) + (power - 1.0);
    // By bits, because a comparison of floats may say anything about NaN.
    let size = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
    let y = pick4(exp_of(x) - 1.0, near, size < vec4<u32>(0x40800000u));
    return pick4(y, x, (size < vec4<u32>(0x33000000u)) | nan4(x));
}

/// ln(1 + x) within 5 roundoffs. -infinity at -1, NaN below. -0 and subnormal numbers are unchanged.
fn log1p_of(x: vec4<f32>) -> vec4<f32> {
    // From sqrt(1/2) - 1 to sqrt(2) - 1, where the rounding of 1 + x would be felt, x itself is the fraction of the logarithm.
    let near = x - (0.5 * x * x - log_rest(x));
    let u = bitcast<vec4<u32>>(x);
    let size = u & vec4<u32>(0x7fffffffu);
    let inside = size < select(vec4<u32>(0x3ed413cdu), vec4<u32>(0x3e95f61au), u > size);
    let y = pick4(log_of(1.0 + x), near, inside);
    return pick4(y, x, (size < vec4<u32>(0x33000000u)) | nan4(x));
}

/// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|), which neither overflows nor cancels. Within 10 roundoffs.
fn softplus_of(x: vec4<f32>) -> vec4<f32> {
    let y = max(x, vec4<f32>(0.0)) + log1p_of(exp_of(-abs(x)));
    return pick4(y, x, nan4(x));
}

fn elu_of(x: vec4<f32>) -> vec4<f32> { return pick4(expm1_of(x), x, is_less(vec4<f32>(0.0), x)); }

/// The derivative of elu times dy: dy above 0, dy e^x elsewhere.
fn delu(x: vec4<f32>, dy: vec4<f32>) -> vec4<f32> {
    return pick4(dy * exp_of(min_nan(x, vec4<f32>(0.0))), x, nan4(x));
}

fn leaky_relu_of(x: vec4<f32>, slope: vec4<f32>) -> vec4<f32> {
    return pick4(pick4(slope * x, x, is_less(vec4<f32>(0.0), x)), x, nan4(x));
}

fn dleaky_relu(x: vec4<f32>, dy: vec4<f32>, slope: vec4<f32>) -> vec4<f32> {
    return pick4(pick4(slope * dy, dy, is_less(vec4<f32>(0.0), x)), x, nan4(x));
}
